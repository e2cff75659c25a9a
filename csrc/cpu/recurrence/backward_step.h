// SPDX-License-Identifier: Apache-2.0
// One step of the recurrence, backwards:   da = cell'(dh, dc),   dh = da R;   a projection and layer norm between them
// Read: gradients of the results, the tape, R.
// Written: da of the step, running dh and dc; overwrites.
// Route: a member owns units of all rows, or rows (by_rows).
// Limit: as backward.h.
#pragma once

#include "backward_inputs.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class BackwardStep : protected BackwardInputs<S, P> {
 protected:
  using Base = BackwardInputs<S, P>;
  using Base::Base;
  using Base::L, Base::Q_, Base::carried_, Base::cell_, Base::clip_cell, Base::da_column, Base::dplane, Base::g_,
      Base::gradient, Base::has_R, Base::has_hr, Base::kept_, Base::ld_, Base::ld_da_, Base::ldq_, Base::masks_,
      Base::n_, Base::norm_, Base::normed, Base::problem_, Base::proj_, Base::sets_, Base::tape, Base::tape_,
      Base::tile_, Base::units;
  using typename Base::Part, typename Base::Scratch, typename Base::Units;

  // dhn (which = 0) or dcn (1) of row i, added.
  void last_gradient(const Part& a, int which, int q, int64_t i, int64_t u0, int64_t u1, S* to) const {
    const Array<4>& g = which ? g_[q]->cn : g_[q]->hn;
    if (g.data) add_row(element<S>(g, a.ld, a.rows.e[i], a.rows.b[i], u0), g.stride[3], to + u0, 1, u1 - u0);
  }

  // What a member does in a step: some blocks of units of all rows, or all units of some rows.
  struct Share {
    int64_t first, end, o_first, o_end, u0, u1, q0, q1, r0, r1;
  };

  Share share(const Part& a, int64_t s) const {
    const int64_t live = a.rows.live[s];
    if (!by_rows(a)) return {a.first, a.end, a.o_first, a.o_end, a.u0, a.u1, a.q0, a.q1, 0, live};
    return all_units(a, live);
  }

  Share all_units(const Part& a, int64_t live) const {
    const int64_t outputs = proj_ ? a.w.hr[0].blocks() : 0;
    return {0, a.w.R[0][0].blocks(), 0, outputs, 0, n_.H, 0, Q_, a.team.begin(live), a.team.end(live)};
  }

  // By rows, no step needs a meeting; but every member reads all of R at every step, so it must fit its own cache.
  bool by_rows(const Part& a) const {
    const int64_t bytes = n_.H * cell_.gates * ld_ * int64_t{sizeof(S)} * P;
    return cell_.state_product && a.team.size > 1 && sets_.N >= 8 * a.team.size && bytes <= kWeightsByRows;
  }

  // columns: this member's blocks. With layer norm, members own rows in between.
  void step(Part& a, int64_t s, int64_t s0, const Share& columns) {
    Scratch& w = a.w;
    const Rows& rows = a.rows;
    const bool alone = by_rows(a), part = rows.live[s] > 1;
    const Share mine = norm_ && !alone ? all_units(a, rows.live[s]) : columns;
    const int64_t r0 = mine.r0, u0 = mine.u0, first = rows.off[s] - rows.off[s0], in_chunk = first + r0;
    arriving(a, s, mine);
    if (proj_) {
      zone_outputs(a, s, first, mine);
      if (!alone) a.team.wait();
      unproject(a, first, columns, part);
      if (norm_ && !alone) a.team.wait();
      if (!cell_.cell_state) take_carried(a, s, mine);
    }
    const BackwardTile<S, P> t = tile(a, s, first, mine);
    for (int q = 0; q < P; ++q)
      for (int64_t i = columns.r0; masks_ && i < columns.r1; ++i)
        zero_row(w.dh_seen[q] + i * ldq_ + columns.q0, 1, units(0, columns).pad() - columns.q0);
    if (t.units > 0) tile_.backward(t);
    if (carried_ && !cell_.cell_state)
      for (int q = 0; q < P; ++q)
        for (int64_t i = r0; i < mine.r1; ++i)
          add_row(w.dm[q] + i * ld_ + u0, 1, w.d[1][q] + i * ld_ + u0, 1, mine.u1 - u0);
    if (norm_) norm_back(a, rows.off[s0], in_chunk, mine);
    if (!alone && (cell_.state_product || s == s0)) a.team.wait();
    if (cell_.two_products) {
      state_product(a, 1, in_chunk, mine, part, false, w.drh);
      if (t.units > 0) tile_.backward_gate(t);
      if (!alone) a.team.wait();
    }
    if (cell_.state_product) state_product(a, 0, first + columns.r0, columns, part, true, masks_ ? w.dh_seen : w.d[0]);
    for (int64_t i = columns.r0; masks_ && i < columns.r1; ++i) unmask(a, i, columns.q0, columns.q1);
    leaving(a, s, columns);
    if (norm_ && !alone) a.team.wait();  // columns become rows
  }

  // What a cell's tile function reads and writes for a share. first: the step's first pair in the chunk.
  BackwardTile<S, P> tile(Part& a, int64_t s, int64_t first, const Share& mine) const {
    Scratch& w = a.w;
    const int64_t N = sets_.N, H = n_.H, r0 = mine.r0, u0 = mine.u0, pair = a.rows.off[s] + r0, in_chunk = first + r0;
    BackwardTile<S, P> t{};
    t.rows = mine.r1 - r0;
    t.units = mine.u1 - u0;
    t.ld_kept = kept_ * H;
    if (problem_.variant.given) t.options = &w.options;
    t.step = s, t.row = r0, t.unit = u0;
    t.H = H;
    t.ld = ld_;
    t.ld_da = ld_da_;
    t.clip = clip_cell();
    for (int q = 0; q < P; ++q) {
      const S* data = tape(a, q);
      t.kept[q] =
          tape_.every ? w.kept[q] + in_chunk * t.ld_kept + u0 : data + tape_.kept_offset(N) + pair * t.ld_kept + u0;
      t.c[q] = tape_.every ? w.c_kept[q] + in_chunk * H + u0 : data + tape_.c_offset(N) + pair * H + u0;
      // A projected cell's own h is m; what it carries on lies in c.
      t.h[q] = proj_ ? t.c[q] : data + pair * H + u0;
      t.h_prev[q] = w.before[proj_][q] + in_chunk;
      t.h_seen[q] = proj_ ? t.h_prev[q] : w.h_seen[q] + in_chunk;
      if (norm_) {
        t.c_hat[q] = w.c_hat[q] + in_chunk * ld_;
        t.dseen[q] = w.dseen[q] + in_chunk * ld_;
        t.numbers[q] = normed(a, q, 2, pair - in_chunk) + in_chunk * 4;
      }
      t.m[q] = proj_ ? w.m[q] + in_chunk * ld_ + u0 : nullptr;
      t.c_new[q] = w.c_new[q] ? w.c_new[q] + in_chunk * ld_ + u0 : nullptr;
      t.c_prev[q] = w.before[1][q] + in_chunk;
      t.dh[q] = (proj_ ? w.dm[q] : w.d[0][q]) + r0 * ld_ + u0;
      t.dc[q] = w.d[1][q] + r0 * ld_ + u0;
      t.da[q] = w.da[q] + in_chunk * ld_da_ + u0;
      t.dh_seen[q] = masks_ && !proj_ ? w.dh_seen[q] + r0 * ld_ + u0 : t.dh[q];
      if (!cell_.two_products) continue;
      t.drh[q] = w.drh[q] + r0 * ld_ + u0;
      t.rh[q] = w.rh[q] + in_chunk * ld_ + u0;
    }
    return t;
  }

  // From dh to the gradient of the projection's results: zoneout's part stays.
  void zone_outputs(Part& a, int64_t s, int64_t first, const Share& mine) {
    Scratch& w = a.w;
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      S *dh[P], *fresh[P];
      for (int q = 0; q < P; ++q) dh[q] = w.d[0][q] + i * ldq_, fresh[q] = w.dnew[q] + (first + i) * ldq_;
      zone_row_back(w.options, 0, s, i, mine.q0, mine.q1, dh, fresh);
    }
  }

  // dm: through the projection.
  void unproject(Part& a, int64_t first, const Share& columns, bool part) {
    Scratch& w = a.w;
    const int64_t n = columns.r1 - columns.r0;
    const S* const* rows[P];
    S* dm[P];
    for (int q = 0; q < P; ++q) {
      rows[q] = w.dnew_rows[q] + first + columns.r0;
      dm[q] = w.dm[q] + columns.r0 * ld_;
    }
    for (int64_t b = columns.o_first; b < columns.o_end; ++b) {
      multiply(w.hr[0], b, rows[0], n, static_cast<S*>(nullptr), 0, dm[0], ld_, part);
      if constexpr (P == 2) {
        multiply(w.hr[0], b, rows[1], n, static_cast<S*>(nullptr), 0, dm[1], ld_, part);
        if (has_hr(a, 1)) multiply(w.hr[1], b, rows[0], n, dm[1], ld_, dm[1], ld_, part);
      }
    }
  }

  // dm also gets the gradient of what a projected GRU carried on; zoneout's part stays.
  void take_carried(Part& a, int64_t s, const Share& mine) {
    Scratch& w = a.w;
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      S *dc[P], *fresh[P];
      for (int q = 0; q < P; ++q) dc[q] = w.d[1][q] + i * ld_, fresh[q] = w.state[0][q] + i * ld_;
      zone_row_back(w.options, 1, s, i, mine.u0, mine.u1, dc, fresh);
      for (int q = 0; q < P; ++q) add_row(fresh[q] + mine.u0, 1, w.dm[q] + i * ld_ + mine.u0, 1, mine.u1 - mine.u0);
    }
  }

  // Gradients of x W^T and h' R^T from those of the sums, a row at a time.
  void norm_back(Part& a, int64_t pair0, int64_t in_chunk, const Share& mine) {
    Scratch& w = a.w;
    const int64_t H = n_.H, GH = cell_.gates * H;
    for (int64_t r = in_chunk; r < in_chunk + mine.r1 - mine.r0; ++r) {
      for (int k = 0; k < 2; ++k) {
        S *to[P], scale[P];
        const S* hat[P];
        for (int q = 0; q < P; ++q) {
          to[q] = w.apart[k][q] + r * GH;
          for (int g = 0; g < cell_.gates; ++g)
            copy_row(w.da[q] + r * ld_da_ + da_column(k, g), 1, to[q] + g * H, 1, H);
          hat[q] = normed(a, q, k, pair0) + r * GH;
          scale[q] = normed(a, q, 2, pair0)[r * 4 + k];
        }
        Norms<S, P>::back(to, w.norms.gain[k], hat, scale, GH, to);
      }
    }
  }

  // dh gets what came back through R's view of h.
  void unmask(Part& a, int64_t i, int64_t u0, int64_t u1) const {
    for (int q = 0; q < P; ++q) {
      S* seen = a.w.dh_seen[q] + i * ldq_;
      a.w.options.apply_mask(i, seen, seen, u0, u1);
      add_row(seen + u0, 1, a.w.d[0][q] + i * ldq_ + u0, 1, u1 - u0);
    }
  }

  // dh (or drh) of this member's share: da R, added or written.
  void state_product(Part& a, int phase, int64_t in_chunk, const Share& mine, bool part, bool add, S* const* to) {
    Scratch& w = a.w;
    const int64_t n = mine.r1 - mine.r0;
    const S* const* rows[P];
    S* at[P];
    for (int q = 0; q < P; ++q)
      rows[q] = (norm_ ? w.apart_rows[1][q] : w.da_h_rows[phase][q]) + in_chunk, at[q] = to[q] + mine.r0 * ldq_;
    for (int64_t b = mine.first; b < mine.end; ++b) {
      multiply(w.R[0][phase], b, rows[0], n, add ? at[0] : nullptr, ldq_, at[0], ldq_, part);
      if constexpr (P == 2) {
        multiply(w.R[0][phase], b, rows[1], n, add ? at[1] : nullptr, ldq_, at[1], ldq_, part);
        if (has_R(a, 1)) multiply(w.R[1][phase], b, rows[0], n, at[1], ldq_, at[1], ldq_, part);
      }
    }
  }

  // Adds the gradients of the results of step s to dh and dc, and clips the sums.
  void arriving(Part& a, int64_t s, const Share& mine) {
    const Rows& rows = a.rows;
    const int64_t already = s + 1 < rows.steps ? rows.live[s + 1] : 0;
    const Units h = units(0, mine), c = units(1, mine), cell = units(carried_, mine);
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      const int64_t t = rows.time(a.reversed, s, i);
      S *dh[P], *dc[P];
      for (int q = 0; q < P; ++q) {
        dh[q] = a.w.d[0][q] + i * ldq_;
        dc[q] = a.w.d[1][q] + i * ld_;
        if (i >= already) {
          for (int which = 0; which < 1 + carried_; ++which) {
            const Units it = units(which, mine);
            S* to = which ? dc[q] : dh[q];
            zero_row(to + it.begin, 1, it.pad() - it.begin);
            last_gradient(a, which, q, i, it.begin, it.end, to);
          }
        }
        const Array<4>& dy = g_[q]->y;
        if (a.l + 1 < n_.L)
          add_row(dplane(q, a.l, a.d, a.set) + (rows.off[s] + i) * Q_ + h.begin, 1, dh[q] + h.begin, 1,
                  h.end - h.begin);
        else if (dy.data)
          add_row(element<S>(dy, rows.place(t), rows.e[i], rows.b[i], a.d * Q_ + h.begin), dy.stride[3],
                  dh[q] + h.begin, 1, h.end - h.begin);
        const Array<5>& dcells = g_[q]->cells;
        if (dcells.data)
          add_row(element<S>(dcells, a.l, t, rows.e[i], rows.b[i], a.d * n_.H + cell.begin), dcells.stride[4],
                  (carried_ ? dc[q] : dh[q]) + cell.begin, 1, cell.end - cell.begin);
      }
      if (problem_.clip_grad > 0) {
        clip_gradient(dh, h.begin, h.end);
        if (carried_) clip_gradient(dc, c.begin, c.end);
      }
    }
  }

  void clip_gradient(S* const* d, int64_t u0, int64_t u1) const {
    using Pl = Planes<S, P>;
    for (int64_t u = u0; u < u1; u += L)
      Pl::write(d, u, clamp(Pl::read(d, u, L), static_cast<S>(problem_.clip_grad)), L);
  }

  // What step s hands on: to the step before, or to h0, c0 at a row's first step and at cuts.
  void leaving(Part& a, int64_t s, const Share& mine) {
    const Rows& rows = a.rows;
    if (s > 0 && !rows.step_cut(a.reversed, s)) return;
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      const bool cut = rows.is_cut(a.reversed, s, i);
      if (s > 0 && !cut) continue;
      for (int which = 0; which < 1 + carried_; ++which) {
        const Units it = units(which, mine);
        for (int q = 0; q < P; ++q) {
          S* from = a.w.d[which][q] + i * it.ld + it.begin;
          if (!cut || problem_.reset_to_initial)
            add_row(from, 1, a.w.d_start[which][q] + i * it.ld + it.begin, 1, it.end - it.begin);
          zero_row(from, 1, it.end - it.begin);
        }
      }
    }
  }
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
