// SPDX-License-Identifier: Apache-2.0
// Backward through all layers and directions, from the last step to the first:
//   da = cell'(dh, dc),   dh = da R;   then for a chunk of steps at once   dW = da^T x,   dR = da^T h',   dx = da W
// Read: what forward read, its tape, dy, dhn, dcn, dcells.
// Written: dx, dh0, dc0, dW, dR, dbW, dbR, those of the options; overwrites. With P = 2 every number is a value with
//   its tangent, and the tangents are what is written.
// Route: as forward; da of a chunk stays in cache between the recurrence and the products.
// Limit: FMA for 16 rows and more; for one row reading R, and writing dW and dR.
#pragma once

#include "backward_step.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class Backward : BackwardStep<S, P> {
  using Base = BackwardStep<S, P>;
  using Base::L, Base::Q_, Base::all_shared, Base::begin_context, Base::by_rows, Base::carried_, Base::cell_,
      Base::chunk_, Base::clip_cell, Base::context, Base::context_gradient, Base::dp_, Base::groups_, Base::has_hr,
      Base::input_gradient, Base::kept_, Base::last_gradient, Base::layers_, Base::ld_, Base::ldq_, Base::masks_,
      Base::matrix_gradient, Base::n_, Base::norm_, Base::normed, Base::normed_gradients, Base::normed_width, Base::p_,
      Base::pairs_, Base::peephole_gradient, Base::problem_, Base::proj_, Base::scratch_, Base::sets_, Base::shape,
      Base::share, Base::step, Base::sum_steps, Base::tape, Base::tape_, Base::tile_, Base::token_gradient, Base::units,
      Base::vocabulary_, Base::wants_dx, Base::weight_gradients, Base::write_columns, Base::zero_dcontext,
      Base::zero_dx, Base::zeros_;
  using typename Base::Part, typename Base::Scratch, typename Base::Units;

 public:
  using Base::Base;

  void run(const Team& team) {
    Team part = team;
    const int group = groups_.group_of(team, part);
    for (int l = n_.L - 1; l >= 0; --l) {
      if (l == 0) zero_dx(part, group, groups_.used(team));
      if (l == 0) zero_dcontext(team);
      for (int64_t set = group; set < sets_.count; set += groups_.used(team))
        for (int d = 0; d < n_.D; ++d) direction(part, scratch_[group], l, d, set);
      team.wait();
    }
  }

 private:
  void direction(const Team& team, Scratch& w, int l, int d, int64_t set) {
    Part a{team, w, sets_.rows[set], l, d, set, int64_t{l} * n_.D + d, n_.D == 2 ? d == 1 : problem_.reverse};
    for (int q = 0; q < P; ++q) a.source[q] = layers_.source(q, l, set);
    pack(a);
    if (context(a)) begin_context(a);
    begin(a);
    const Rows& rows = a.rows;
    for (int64_t s0 = rows.steps > 0 ? (rows.steps - 1) / chunk_ * chunk_ : -1; s0 >= 0; s0 -= chunk_) {
      const int64_t s1 = smaller(s0 + chunk_, rows.steps);
      for (int q = 0; q < P; ++q)
        if (a.source[q].given()) a.source[q].fill(team, rows, a.reversed, s0, s1, w.copied[q], w.x[q]);
      if (a.source[0].token) a.source[0].fill_tokens(team, rows, a.reversed, s0, s1, w.tokens);
      states_before(a, s0, s1);
      team.wait();
      if (tape_.every) rebuild(a, s0, s1);
      for (int64_t s = s1 - 1; s >= s0; --s) {
        step(a, s, s0, share(a, s));
        if (by_rows(a) && s > s0 && rows.live[s - 1] != rows.live[s]) team.wait();  // rows change hands
      }
      if (by_rows(a)) team.wait();
      products(a, s0, s1);
      if (context(a)) sum_steps(a, s0, s1);
      a.fresh = false;
      team.wait();
    }
    finish(a);
    team.wait();
    if (context(a)) context_gradient(a);
  }

  void pack(Part& a) {
    Scratch& w = a.w;
    const int64_t H = n_.H, e = sets_.count == 1 ? 0 : a.set, inputs = a.source[0].width;
    const bool apart = cell_.sums > cell_.gates && !norm_;
    static constexpr int in_order[4] = {0, 1, 2, 3}, n_first[3] = {2, 0, 1};
    const int state_gates = cell_.two_products ? cell_.gates - 1 : cell_.gates;
    const Params* p[P];
    for (int q = 0; q < P; ++q) {
      p[q] = p_[q]->params ? &p_[q]->params[a.ld] : nullptr;
      shape(w.R[q][0], state_gates * H, Q_, a.team.size);
      shape(w.R[q][1], (cell_.gates - state_gates) * H, Q_, a.team.size);
      if (proj_) shape(w.hr[q], Q_, H, a.team.size);
      shape(w.W[q], cell_.gates * H, inputs, a.team.size);
      w.R[q][1].data = w.R[q][0].data + w.R[q][0].elements();
    }
    a.first = a.team.begin(w.R[0][0].blocks()), a.end = a.team.end(w.R[0][0].blocks());
    a.x_first = a.team.begin(w.W[0].blocks()), a.x_end = a.team.end(w.W[0].blocks());
    a.q0 = smaller(a.first * w.R[0][0].block * L, Q_), a.q1 = smaller(a.end * w.R[0][0].block * L, Q_);
    a.u0 = a.q0, a.u1 = a.q1;
    if (proj_) {
      const Panels<S>& hr = w.hr[0];
      a.o_first = a.team.begin(hr.blocks()), a.o_end = a.team.end(hr.blocks());
      a.u0 = smaller(a.o_first * hr.block * L, H), a.u1 = smaller(a.o_end * hr.block * L, H);
    }
    for (int q = 0; q < P; ++q) {
      if (p[q] && p[q]->R.data) {
        const Array<3>& R = p[q]->R;
        for (int64_t b = a.first; b < a.end; ++b) {
          pack_rows(w.R[q][0], b, element<S>(R, e), R.stride[1], R.stride[2], H, state_gates, in_order);
          if (cell_.two_products)
            pack_rows(w.R[q][1], b, element<S>(R, e), R.stride[1], R.stride[2], H, 1, in_order + state_gates);
        }
      }
      if (has_hr(a, q)) {
        const Array<3>& hr = p_[q]->extras[a.ld].hr;
        for (int64_t b = a.o_first; b < a.o_end; ++b)
          pack_rows(w.hr[q], b, element<S>(hr, e), hr.stride[1], hr.stride[2], Q_, 1, in_order);
      }
      if (wants_dx(a.l) && p[q] && p[q]->W.data) {
        const Array<3>& W = p[q]->W;
        for (int64_t b = a.x_first; b < a.x_end; ++b)
          pack_rows(w.W[q], b, element<S>(W, e), W.stride[1], W.stride[2], H, cell_.gates, apart ? n_first : in_order);
      }
    }
    if (!tape_.every) return;
    Params bare[P];  // layer norm adds the biases itself
    for (int q = 0; q < P && norm_; ++q)
      if (p[q]) bare[q] = without_biases(*p[q]), p[q] = &bare[q];
    w.forward.pack(a.team, cell_, p, e, inputs, H, Q_, a.rows.total, pairs_,
                   a.source[0].token ? &vocabulary_.of[a.set] : nullptr);
  }

  void begin(Part& a) {
    if (problem_.variant.given) {
      if (a.team.rank == 0 && norm_) a.w.norms.begin(p_, a.ld, sets_.count == 1 ? 0 : a.set);
      if (a.team.rank == 0) a.w.options.begin(p_, &a.rows, a.reversed, a.ld, sets_.count == 1 ? 0 : a.set);
      a.team.wait();
      for (int64_t i = 0; masks_ && i < sets_.N; ++i) a.w.options.draw_mask(i, a.q0, a.q1);
    }
    for (int64_t i = 0; i < sets_.N; ++i) {
      for (int which = 0; which < 1 + carried_; ++which) {
        const Units it = units(which, a);
        for (int q = 0; q < P; ++q) {
          const Array<4>& given = which ? p_[q]->c0 : p_[q]->h0;
          S* to = a.w.start[which][q] + i * it.all + it.begin;
          zero_row(to, 1, it.end - it.begin);
          if (given.data)
            copy_row(element<S>(given, a.ld, a.rows.e[i], a.rows.b[i], it.begin), given.stride[3], to, 1,
                     it.end - it.begin);
          S* sum = a.w.d_start[which][q] + i * it.ld;
          zero_row(sum + it.begin, 1, it.pad() - it.begin);
          if (a.rows.length[i] == 0) last_gradient(a, which, q, i, it.begin, it.end, sum);
        }
      }
    }
    a.team.wait();
  }

  // Row pointers to h and c before each step.
  void states_before(Part& a, int64_t s0, int64_t s1) {
    const Rows& rows = a.rows;
    const int64_t H = n_.H, pair0 = rows.off[s0];
    const int64_t low = a.team.begin(rows.off[s1] - pair0) + pair0, high = a.team.end(rows.off[s1] - pair0) + pair0;
    for (int which = 0; which < 1 + carried_; ++which) {
      const int64_t all = which ? H : Q_;
      for (int q = 0; q < P; ++q) {
        const S* from = tape(a, q) + (which ? tape_.c_offset(sets_.N) : 0);
        if (which && tape_.every) from = a.w.c_kept[q] - pair0 * H;
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t end = smaller(rows.live[s], high - rows.off[s]);
          for (int64_t i = larger<int64_t>(0, low - rows.off[s]); i < end; ++i) {
            const bool cut = rows.is_cut(a.reversed, s, i);
            const S* row;
            if (cut && !problem_.reset_to_initial)
              row = zeros_;
            else if (cut || s == 0)
              row = a.w.start[which][q] + i * all;
            else if (which && tape_.every && s == s0)
              row = tape(a, q) + tape_.c_offset(sets_.N) + (s / tape_.every * sets_.N + i) * H;
            else
              row = from + (rows.off[s - 1] + i) * all;
            const int64_t r = rows.off[s] - pair0 + i;
            a.w.before[which][q][r] = row;
            if (masks_ && which == 0) a.w.options.apply_mask(i, row, a.w.seen[q] + r * ldq_, 0, Q_);
          }
        }
      }
    }
  }

  // recompute: the kept values and c of a chunk, from x and h.
  void rebuild(Part& a, int64_t s0, int64_t s1) {
    Scratch& w = a.w;
    const Rows& rows = a.rows;
    const int64_t pairs = rows.off[s1] - rows.off[s0];
    const int64_t first = a.team.begin(w.forward.blocks()), end = a.team.end(w.forward.blocks());
    for (int phase = 0; phase < w.forward.phases; ++phase) {
      const bool gate = cell_.two_products && phase == 0;
      const S* const* h[P];
      for (int q = 0; q < P; ++q) h[q] = phase ? w.rh_rows[q] : w.h_seen[q];
      for (int64_t b = first; b < end; ++b) {
        if (phase == 0) inputs_again(a, b, s0, s1);
        if (norm_) {
          w.forward.state_product_alone(b, h, pairs, w.zh);
          continue;
        }
        w.forward.state_product(phase, b, h, pairs, w.z);
        for (int64_t s = s0; s < s1; ++s)
          step_again(a, s, s0, {w.forward.unit(b), w.forward.unit(b + 1), 0, rows.live[s]}, gate);
      }
      if (gate || norm_) a.team.wait();
    }
    // Norms take whole units: members own rows, at all steps of the chunk.
    for (int64_t s = s0; s < s1 && norm_; ++s) {
      const Again mine{0, n_.H, a.team.begin(sets_.N), smaller(a.team.end(sets_.N), rows.live[s])};
      for (int64_t r = mine.r0; r < mine.r1; ++r) norm_again(a, rows.off[s0], rows.off[s] - rows.off[s0] + r);
      if (mine.r0 < mine.r1) step_again(a, s, s0, mine, false);
    }
    a.team.wait();  // units are owned in other blocks from here on
  }
  // What a member rebuilds of a step: some units of some rows.
  struct Again {
    int64_t u0, u1, r0, r1;
  };
  // The products with x, or what takes its place, of one block of units.
  void inputs_again(Part& a, int64_t block, int64_t s0, int64_t s1) const {
    Scratch& w = a.w;
    const int64_t pairs = a.rows.off[s1] - a.rows.off[s0];
    const S* const* x[P];
    for (int q = 0; q < P; ++q) x[q] = a.source[q].given() ? w.x[q] : nullptr;
    if (a.source[0].token)
      w.forward.token_product(cell_, block, w.tokens, pairs, w.z);
    else
      w.forward.input_product(cell_, block, x, pairs, w.z);
    if (context(a)) w.context.add(w.forward, cell_, block, a.rows, s0, s1, w.z);
  }
  // Layer norm of the two products in row r of a chunk that begins with `pair`.
  void norm_again(Part& a, int64_t pair, int64_t r) const {
    Scratch& w = a.w;
    for (int k = 0; k < 2; ++k) {
      S *from[P], *to[P], *hat[P], scale[P];
      for (int q = 0; q < P; ++q) {
        to[q] = w.z[q] + r * w.forward.ldz;
        from[q] = k ? w.zh[q] + r * w.forward.ldz : to[q];
        hat[q] = normed(a, q, k, pair) + r * normed_width(k);
      }
      w.norms.row_of_z(k, from, k ? cell_.h_sum : cell_.x_sum, k == 1, to, hat, scale);
      for (int q = 0; q < P; ++q) normed(a, q, 2, pair)[r * 4 + k] = scale[q];
    }
  }
  // The cell at step s, where the products are there.
  void step_again(Part& a, int64_t s, int64_t s0, const Again& mine, bool gate) const {
    Scratch& w = a.w;
    const int64_t H = n_.H, u0 = mine.u0, r0 = mine.r0, pair = a.rows.off[s] - a.rows.off[s0] + r0;
    ForwardTile<S, P> t{};
    t.rows = mine.r1 - r0;
    t.units = mine.u1 - u0;
    t.ldz = w.forward.ldz;
    t.ld = ld_;
    t.H = H;
    t.ld_kept = kept_ * H;
    if (problem_.variant.given) t.options = &w.options;
    t.step = s, t.row = r0, t.unit = u0;
    t.clip = clip_cell();
    for (int q = 0; q < P; ++q) {
      for (int64_t i = 0; i < t.rows; ++i)
        for (int which = proj_; which < 1 + carried_; ++which)
          copy_row(w.before[which][q][pair + i] + u0, 1, w.state[which][q] + (r0 + i) * ld_ + u0, 1, t.units);
      t.z[q] = w.z[q] + pair * t.ldz + u0 * cell_.sums;
      t.h_prev[q] = w.state[proj_][q] + r0 * ld_ + u0;
      t.h_seen[q] = masks_ && !proj_ ? w.seen[q] + pair * ld_ + u0 : t.h_prev[q];
      t.h[q] = w.state[0][q] + r0 * ld_ + u0;
      t.c[q] = w.state[1][q] + r0 * ld_ + u0;
      t.rh[q] = cell_.two_products ? w.rh[q] + pair * ld_ + u0 : nullptr;
      t.kept[q] = w.kept[q] + pair * t.ld_kept + u0;
      t.c_kept[q] = w.c_kept[q] + pair * H + u0;
      if (norm_) t.numbers[q] = w.normed[2][q] + pair * 4;
    }
    gate ? tile_.gate(t) : tile_.forward(t);
    if (carried_ && !cell_.cell_state) carry(w, s, pair, mine);
  }
  // What a projected GRU carries on after step s, rows of a chunk from `pair` on: from what it was, and the new m.
  void carry(Scratch& w, int64_t s, int64_t pair, const Again& mine) const {
    const int64_t u0 = mine.u0, u1 = mine.u1;
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      S *fresh[P], *c[P];
      for (int q = 0; q < P; ++q) fresh[q] = w.state[0][q] + i * ld_, c[q] = w.state[1][q] + i * ld_;
      zone_row(w.options, 1, s, i, u0, u1, fresh, c);
      for (int q = 0; q < P; ++q) copy_row(c[q] + u0, 1, w.c_kept[q] + (pair + i - mine.r0) * n_.H + u0, 1, u1 - u0);
    }
  }

  // The weight gradients' rows: all of the chunk, or, where shared weights have a gradient for each e, those of one e.
  void products(Part& a, int64_t s0, int64_t s1) {
    Scratch& w = a.w;
    const Rows& rows = a.rows;
    const int64_t pairs = rows.off[s1] - rows.off[s0];
    const Params* dp = dp_.params ? &dp_.params[a.ld] : nullptr;
    if (a.source[0].token && dp && dp->W.data) token_gradient(a, s0, s1);
    if (dp) {
      const bool split = sets_.count == 1 && n_.E > 1;
      const S *const *da[P], *const *x[P], *const *h[P], *const *rh[P];
      for (int q = 0; q < P; ++q)
        da[q] = w.da_rows[q], x[q] = a.source[q].given() ? w.x[q] : nullptr, h[q] = w.h_seen[q], rh[q] = w.rh_rows[q];
      if (split && !all_shared(*dp)) {
        for (int64_t e = 0; e < n_.E; ++e) {
          int64_t count = 0;
          for (int64_t s = s0; s < s1; ++s)
            for (int64_t i = 0; i < rows.live[s]; ++i)
              if (rows.e[i] == e) {
                const int64_t r = rows.off[s] - rows.off[s0] + i;
                for (int q = 0; q < P && a.team.rank == 0; ++q) {
                  w.picked[q][count] = da[q][r];
                  w.picked[q][pairs_ + count] = x[q] ? x[q][r] : nullptr;
                  w.picked[q][2 * pairs_ + count] = h[q][r];
                  w.picked[q][3 * pairs_ + count] = rh[q] ? rh[q][r] : nullptr;
                }
                ++count;
              }
          const S *const *da_e[P], *const *x_e[P], *const *h_e[P], *const *rh_e[P];
          for (int q = 0; q < P; ++q) {
            da_e[q] = w.picked[q];
            x_e[q] = x[q] ? w.picked[q] + pairs_ : nullptr;
            h_e[q] = w.picked[q] + 2 * pairs_;
            rh_e[q] = rh[q] ? w.picked[q] + 3 * pairs_ : nullptr;
          }
          a.team.wait();
          weight_gradients(a, *dp, e, count, a.source[0].width, da_e, x_e, h_e, rh_e);
        }
      } else {
        norm_ ? normed_gradients(a, *dp, s0, pairs, x, h)
              : weight_gradients(a, *dp, sets_.count == 1 ? 0 : a.set, pairs, a.source[0].width, da, x, h, rh);
      }
    }
    if (dp_.extras && dp_.extras[a.ld].ph.data) peephole_gradient(a, dp_.extras[a.ld].ph, pairs);
    if (dp_.extras && dp_.extras[a.ld].hr.data) {
      const S *const *dnew[P], *const *m[P];
      for (int q = 0; q < P; ++q) dnew[q] = w.dnew_rows[q], m[q] = w.m_rows[q];
      matrix_gradient(a, dp_.extras[a.ld].hr, Q_, dnew, n_.H, m, w.h_panels, pairs);
    }
    if (wants_dx(a.l)) input_gradient(a, s0, s1);
  }

  void finish(Part& a) {
    for (int which = 0; which < 1 + carried_; ++which) {
      const Array<4>& to = which ? dp_.c0 : dp_.h0;
      if (!to.data) continue;
      const Units it = units(which, a);
      const int64_t n = it.end - it.begin;
      const bool adds = n_.E > 1 && to.stride[1] == 0;
      if (adds && a.set == 0)
        for (int64_t b = 0; b < n_.B; ++b) zero_row(element<S>(to, a.ld, 0, b, it.begin), to.stride[3], n);
      for (int64_t i = 0; i < sets_.N; ++i) {
        const S* from = a.w.d_start[which][P - 1] + i * it.ld + it.begin;
        S* at = element<S>(to, a.ld, a.rows.e[i], a.rows.b[i], it.begin);
        adds ? add_row(from, 1, at, to.stride[3], n) : copy_row(from, 1, at, to.stride[3], n);
      }
    }
    if (!a.fresh && a.source[0].token && dp_.params && dp_.params[a.ld].W.data) write_columns(a, dp_.params[a.ld].W);
    if (!a.fresh || a.team.rank != 0) return;
    if (dp_.params) zero_gradients(dp_.params[a.ld], a.set, a.source[0].width);
    if (!dp_.extras) return;
    const Extras& extras = dp_.extras[a.ld];
    if (extras.ph.data && (a.set == 0 || extras.ph.stride[0]))
      zero_row(element<S>(extras.ph, a.set, 0), extras.ph.stride[1], (cell_.gates - 1) * n_.H);
    const Array<2>* const vectors[4] = {&extras.gain_ih, &extras.gain_hh, &extras.gain_c, &extras.bias_c};
    for (int k = 0; k < 4; ++k)
      if (vectors[k]->data && (a.set == 0 || vectors[k]->stride[0]))
        zero_row(element<S>(*vectors[k], a.set, 0), vectors[k]->stride[1], (k < 2 ? cell_.gates : 1) * n_.H);
    for (int64_t m = 0; extras.hr.data && (a.set == 0 || extras.hr.stride[0]) && m < Q_; ++m)
      zero_row(element<S>(extras.hr, a.set, m), extras.hr.stride[2], n_.H);
  }

  // No step at all: every weight gradient is zero.
  void zero_gradients(const Params& dp, int64_t set, int64_t inputs) const {
    const int64_t rows = cell_.gates * n_.H;
    for (int64_t e = sets_.count == 1 ? 0 : set; e < (sets_.count == 1 ? n_.E : set + 1); ++e) {
      for (int64_t m = 0; m < rows; ++m) {
        if (dp.W.data && (e == 0 || dp.W.stride[0])) zero_row(element<S>(dp.W, e, m), dp.W.stride[2], inputs);
        if (dp.R.data && (e == 0 || dp.R.stride[0])) zero_row(element<S>(dp.R, e, m), dp.R.stride[2], Q_);
        if (dp.bW.data && (e == 0 || dp.bW.stride[0])) *element<S>(dp.bW, e, m) = 0;
        if (dp.bR.data && (e == 0 || dp.bR.stride[0])) *element<S>(dp.bR, e, m) = 0;
      }
    }
  }
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
