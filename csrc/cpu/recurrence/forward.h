// SPDX-License-Identifier: Apache-2.0
// Forward through all layers and directions:
//   z = x W^T + b for a chunk of steps, then step by step   z += h' R^T,   h = cell(z)
// Read: x (T,E,B,I), h0, c0 (L*D,E,B,H), weights.
// Written: y (T,E,B,D*H), hn, cn, cells, the tape; overwrites. With P = 2 every number is a value with its tangent, and
//   the tangents are what is written.
// Route: weights are packed once a call. A thread owns blocks of units, so one meeting a step is all that it needs.
// Limit: FMA for 16 rows and more; the bandwidth of the cache that holds R for one row.
#pragma once

#include "forward_pass.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class Forward : ForwardPass<S, P> {
  using Base = ForwardPass<S, P>;
  using Base::Q_, Base::all_units, Base::begin_options, Base::carried_, Base::cell_, Base::chunk_, Base::cut_by_rows,
      Base::finish_padding, Base::groups_, Base::hand_out, Base::kRowsAtOnce, Base::kUnitsAtOnce, Base::keep_before,
      Base::layers_, Base::ld_, Base::ldq_, Base::n_, Base::norm_, Base::own_outputs, Base::p_, Base::pairs_,
      Base::problem_, Base::proj_, Base::restart, Base::round_input, Base::scratch_, Base::sets_, Base::show_state,
      Base::start, Base::tile_, Base::vocabulary_;
  using typename Base::Part, typename Base::Scratch, typename Base::Share;

 public:
  using Base::Base;

  void run(const Team& team) {
    Team part = team;
    const int group = groups_.group_of(team, part);
    const int64_t tasks = sets_.count * n_.D;
    for (int l = 0; l < n_.L; ++l) {
      for (int64_t task = group; task < tasks; task += groups_.used(team))
        direction(part, scratch_[group], l, static_cast<int>(task % n_.D), task / n_.D);
      team.wait();
    }
  }

 private:
  void direction(const Team& team, Scratch& w, int l, int d, int64_t set) {
    Part a{team,
           w,
           sets_.rows[set],
           l,
           d,
           set,
           int64_t{l} * n_.D + d,
           sets_.count == 1 ? 0 : set,
           n_.D == 2 ? d == 1 : problem_.reverse};
    for (int q = 0; q < P; ++q) a.source[q] = layers_.source(q, l, set);
    const Rows& rows = a.rows;
    const bool tokens = a.source[0].token;
    a.context = l == 0 && p_[0]->context.data;
    a.by_rows = !tokens && !a.context && cell_.state_product && cut_by_rows(team, a.source[0].width);
    a.at_once = !tokens && !a.by_rows && !problem_.bf16_weights && rows.steps <= chunk_;
    pack(a);
    const int64_t first = team.begin(w.weights.blocks()), end = team.end(w.weights.blocks());
    a.own = {first, end, w.weights.unit(first), w.weights.unit(end), 0, sets_.N};
    own_outputs(team, w, rows, a.ld, a.e, a.own);
    begin_options(team, w, rows, a.reversed, a.ld, a.e, a.own);
    start(w, rows, a.reversed, a.ld, a.own);
    if (rows.steps) show_state(w, 0, a.own);
    finish_padding(rows, l, d, a.own);
    if (a.context) context_product(team, w, rows, d, a.e, first, end);
    for (int64_t s0 = 0; s0 < rows.steps; s0 += chunk_) chunk(a, s0, smaller(s0 + chunk_, rows.steps));
  }

  void pack(Part& a) {
    const Params* p[P];
    Params bare[P];  // layer norm adds the biases itself
    for (int q = 0; q < P; ++q) {
      p[q] = p_[q]->params ? &p_[q]->params[a.ld] : nullptr;
      if (!norm_ || !p[q]) continue;
      bare[q] = without_biases(*p[q]);
      p[q] = &bare[q];
    }
    const int64_t inputs = a.source[0].width;
    const Vocabulary::Set* tokens = a.source[0].token ? &vocabulary_.of[a.set] : nullptr;
    ForwardWeights<S, P>& weights = a.w.weights;
    if constexpr (P == 1 && sizeof(S) == 4)
      if (problem_.bf16_weights)
        return weights.template pack<Half>(a.team, cell_, p, a.e, inputs, n_.H, Q_, a.rows.total, sets_.N, tokens);
    weights.pack(a.team, cell_, p, a.e, inputs, n_.H, Q_, a.rows.total, sets_.N, tokens, a.at_once);
  }

  // The product with x for a chunk of steps, then the steps.
  void chunk(Part& a, int64_t s0, int64_t s1) {
    Scratch& w = a.w;
    const Team& team = a.team;
    const Rows& rows = a.rows;
    const int64_t pairs = rows.off[s1] - rows.off[s0];
    const S* const* x[P];
    for (int q = 0; q < P; ++q) {
      x[q] = a.source[q].given() ? w.x[q] : nullptr;
      if (x[q]) a.source[q].fill(team, rows, a.reversed, s0, s1, w.copied[q], w.x[q]);
    }
    if (a.source[0].token) a.source[0].fill_tokens(team, rows, a.reversed, s0, s1, w.tokens);
    round_input(w, a.source[0].width, team.begin(pairs), team.end(pairs), x);
    team.wait();
    if (a.at_once) w.weights.product_at_once(cell_, a.own.first, a.own.end, x, pairs, w.z);
    for (int64_t b = a.own.first; b < a.own.end && !a.by_rows; ++b) {
      if (a.source[0].token)
        token_product(w, b, pairs);
      else if (!a.at_once)
        w.weights.input_product(cell_, b, x, pairs, w.z);
      if (a.context) w.context.add(w.weights, cell_, b, rows, s0, s1, w.z);
    }
    if (norm_) norm_input(a, s0, pairs, a.by_rows ? x : nullptr);
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t next = s + 1 < rows.steps ? rows.live[s + 1] : 0;
      if (norm_)
        normed_step(a, s, s0, next);
      else if (a.by_rows)
        step_by_rows(a, s, s0, next, x, pairs);
      else
        step(a, s, s0, next, s + 1 == s1);
    }
    if (a.by_rows) team.wait();
  }

  // A member owns units of all rows, and meets the others once.
  void step(Part& a, int64_t s, int64_t s0, int64_t next, bool last) {
    Scratch& w = a.w;
    Share mine = a.own;
    mine.r1 = a.rows.live[s];
    if (cell_.two_products) {
      each_tile(a, s, s0, mine, true, nullptr, 0);
      a.team.wait();
    }
    each_tile(a, s, s0, mine, false, nullptr, 0);
    if (proj_) {
      a.team.wait();
      project(w, s, mine, a.rows.live[s] > 1);
    }
    hand_out(a, s, mine);
    mine.r1 = next;
    if (next && a.rows.step_cut(a.reversed, s + 1)) restart(w, a.rows, a.reversed, a.ld, s + 1, mine);
    show_state(w, !(s & 1), mine);
    if (cell_.state_product || last) a.team.wait();
  }

  // A member owns rows, and meets the others where rows change hands.
  void step_by_rows(Part& a, int64_t s, int64_t s0, int64_t next, const S* const* const* x, int64_t pairs) {
    Scratch& w = a.w;
    const int64_t live = a.rows.live[s];
    const Share mine = all_units(w, a.team.begin(live), a.team.end(live));
    if (cell_.two_products) each_tile(a, s, s0, mine, true, x, pairs);
    each_tile(a, s, s0, mine, false, cell_.two_products ? nullptr : x, pairs);
    if (proj_) project(w, s, mine, live > 1);
    hand_out(a, s, mine);
    give_rows(a, s, next);
  }
  // Between two steps of members that own rows: those of the next step begin it.
  void give_rows(Part& a, int64_t s, int64_t next) {
    if (next != a.rows.live[s]) a.team.wait();  // rows change hands
    const Share mine = all_units(a.w, a.team.begin(next), a.team.end(next));
    if (next && a.rows.step_cut(a.reversed, s + 1)) restart(a.w, a.rows, a.reversed, a.ld, s + 1, mine);
    show_state(a.w, !(s & 1), mine);
  }

  void token_product(Scratch& w, int64_t block, int64_t pairs) const {
    if constexpr (P == 1 && sizeof(S) == 4)
      if (problem_.bf16_weights) return w.weights.template token_product<Half>(cell_, block, w.tokens, pairs, w.z);
    w.weights.token_product(cell_, block, w.tokens, pairs, w.z);
  }

  void context_product(const Team& team, Scratch& w, const Rows& rows, int d, int64_t e, int64_t first, int64_t end) {
    w.context.fill(team, p_, rows, n_.K);
    team.wait();
    if constexpr (P == 1 && sizeof(S) == 4)
      if (problem_.bf16_weights)
        return w.context.template multiply_all<Half>(w.weights, cell_, p_, d, e, n_.H, n_.K, rows.N, first, end);
    w.context.multiply_all(w.weights, cell_, p_, d, e, n_.H, n_.K, rows.N, first, end);
  }

  // x W^T of a chunk, normalised: each member its rows. x: they multiply their own first.
  void norm_input(Part& a, int64_t s0, int64_t pairs, const S* const* const* x) {
    Scratch& w = a.w;
    const int64_t begin = a.team.begin(pairs), end = a.team.end(pairs);
    if (x) {
      const S* const* mine[P];
      S* z[P];
      for (int q = 0; q < P; ++q) mine[q] = x[q] ? x[q] + begin : nullptr, z[q] = w.z[q] + begin * w.weights.ldz;
      for (int64_t b = 0; b < w.weights.blocks(); ++b)
        w.weights.input_product(cell_, b, mine, end - begin, z, pairs > 1);
    } else {
      a.team.wait();
    }
    for (int64_t r = begin; r < end; ++r) norm_row(a, 0, a.rows.off[s0] + r, w.z, r, s0);
    a.team.wait();
  }
  // A row of z (pair of step and row), x's part (k = 0) in its place or that of h' (1) added. It is row r of `from`.
  void norm_row(Part& a, int k, int64_t pair, S* const* from, int64_t r, int64_t s0) {
    Scratch& w = a.w;
    const Tape& layout = layers_.layout();
    const bool taped = layers_.taped() && layout.norm;
    S *z[P], *hat[P] = {}, scale[P];
    const S* in[P];
    for (int q = 0; q < P; ++q) {
      in[q] = from[q] + r * w.weights.ldz;
      z[q] = w.z[q] + (pair - a.rows.off[s0]) * w.weights.ldz;
      if (taped) hat[q] = layers_.plane(q, a.l, a.d, a.set) + layout.hat_offset(sets_.N, k) + pair * cell_.gates * n_.H;
    }
    w.norms.row_of_z(k, in, k ? cell_.h_sum : cell_.x_sum, k == 1, z, hat, scale);
    for (int q = 0; q < P && taped; ++q)
      layers_.plane(q, a.l, a.d, a.set)[layout.numbers_offset(sets_.N) + pair * 4 + k] = scale[q];
  }

  // A step with layer norm: a member multiplies for its blocks of all rows. In between, and by rows, members own rows.
  void normed_step(Part& a, int64_t s, int64_t s0, int64_t next) {
    Scratch& w = a.w;
    const int64_t live = a.rows.live[s], ldz = w.weights.ldz;
    const Share mine = all_units(w, a.team.begin(live), a.team.end(live));
    Share columns = mine;
    if (!a.by_rows) columns = a.own, columns.r1 = live;
    const S* const* h[P];
    S* zh[P];
    for (int q = 0; q < P; ++q) h[q] = w.h_rows[s & 1][q] + columns.r0, zh[q] = w.zh[q] + columns.r0 * ldz;
    for (int64_t b = columns.first; b < columns.end; ++b)
      w.weights.state_product_alone(b, h, columns.r1 - columns.r0, zh, live > 1);
    if (!a.by_rows) a.team.wait();
    for (int64_t i = mine.r0; i < mine.r1; ++i) norm_row(a, 1, a.rows.off[s] + i, w.zh, i, s0);
    each_tile(a, s, s0, mine, false, nullptr, 0);
    if (proj_) {
      if (!a.by_rows) a.team.wait();
      project(w, s, columns, live > 1);
      if (!a.by_rows) a.team.wait();
    }
    hand_out(a, s, mine);
    give_rows(a, s, next);
    if (!a.by_rows) a.team.wait();
  }

  // h = m hr^T of this member's share, then zoneout.
  void project(Scratch& w, int64_t s, const Share& mine, bool part) {
    const int64_t n = mine.r1 - mine.r0;
    const int now = s & 1;
    S* to[P];
    for (int q = 0; q < P; ++q) to[q] = w.h[!now][q] + mine.r0 * ldq_;
    for (int64_t b = mine.o0; b < mine.o1; ++b) {
      multiply(w.hr[0], b, w.m_rows[0] + mine.r0, n, static_cast<S*>(nullptr), 0, to[0], ldq_, part);
      if constexpr (P == 2) {
        multiply(w.hr[0], b, w.m_rows[1] + mine.r0, n, static_cast<S*>(nullptr), 0, to[1], ldq_, part);
        if (w.has_hr[1]) multiply(w.hr[1], b, w.m_rows[0] + mine.r0, n, to[1], ldq_, to[1], ldq_, part);
      }
    }
    for (int64_t i = mine.r0; i < mine.r1 && w.options.zones(0); ++i) {
      S *fresh[P], *old[P];
      for (int q = 0; q < P; ++q) fresh[q] = w.h[!now][q] + i * ldq_, old[q] = w.h[now][q] + i * ldq_;
      zone_row(w.options, 0, s, i, mine.q0, mine.q1, fresh, old);
      for (int q = 0; q < P; ++q) copy_row(old[q] + mine.q0, 1, fresh[q] + mine.q0, 1, mine.q1 - mine.q0);
    }
  }

  // A projected GRU carries on its m. c is the place of that.
  void carry(Part& a, int64_t s, const Share& mine) {
    Scratch& w = a.w;
    const Tape& layout = layers_.layout();
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      keep_before(a, s, i, mine.u0, mine.u1);
      const int64_t at = layout.c_offset(sets_.N) + (a.rows.off[s] + i) * n_.H + mine.u0;
      S *fresh[P], *c[P];
      for (int q = 0; q < P; ++q) fresh[q] = w.m[q] + i * ld_, c[q] = w.c[q] + i * ld_;
      zone_row(w.options, 1, s, i, mine.u0, mine.u1, fresh, c);
      for (int q = 0; q < P && layers_.taped() && !layout.every; ++q)
        copy_row(c[q] + mine.u0, 1, layers_.plane(q, a.l, a.d, a.set) + at, 1, mine.u1 - mine.u0);
    }
  }

  // One step of the rows alive: product with the state, then the cell, block by block and a few rows at a time. With x
  // (rows of the chunk) given, the product with x, too. With layer norm, the products are there.
  void each_tile(Part& a, int64_t s, int64_t s0, const Share& mine, bool gate, const S* const* const* x,
                 int64_t pairs) {
    Scratch& w = a.w;
    const int64_t chunk_pair = a.rows.off[s] - a.rows.off[s0], live = mine.r1 - mine.r0;
    if (live == 0) return;
    const bool part = a.rows.live[s] > 1;
    const int now = s & 1, phase = cell_.two_products && !gate;
    const ForwardWeights<S, P>& weights = w.weights;
    // A few rows: several blocks before their cells, which then overlap. Every other step the other way round: what was
    // read last is still in the cache.
    const int64_t blocks = mine.end - mine.first;
    const int64_t together = norm_ ? blocks : larger<int64_t>(1, kUnitsAtOnce / (live * weights.unit(1)));
    const int64_t parts = (blocks + together - 1) / larger<int64_t>(1, together);
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t b0 = mine.first + together * (s & 1 ? parts - 1 - k : k), b1 = smaller(b0 + together, mine.end);
      for (int64_t r = mine.r0; r < mine.r1; r += kRowsAtOnce) {
        const ForwardTile<S, P> t =
            tile(a, s, s0, {b0, b1, weights.unit(b0), weights.unit(b1), r, smaller(r + kRowsAtOnce, mine.r1)}, gate);
        const S *const *h[P], *const *at_x[P] = {};
        S* z[P];
        for (int q = 0; q < P; ++q) {
          h[q] = (phase ? w.rh_rows[q] : pairs_ ? w.h_pair_rows[now] : w.h_rows[now][q]) + r;
          z[q] = w.z[q] + (chunk_pair + r) * weights.ldz;
          if (x) at_x[q] = x[q] ? x[q] + chunk_pair + r : nullptr;
        }
        for (int64_t j = b0; j < b1; ++j) {
          const int64_t block = s & 1 ? b0 + b1 - 1 - j : j;
          if (x) weights.input_product(cell_, block, at_x, t.rows, z, pairs > 1);
          if (!norm_) weights.state_product(phase, block, h, t.rows, z, part);
        }
        gate ? tile_.gate(t) : tile_.forward(t);
        if (carried_ && !cell_.cell_state) carry(a, s, {b0, b1, t.unit, t.unit + t.units, r, r + t.rows});
      }
    }
  }

  // What a cell's tile function reads and writes for a share.
  ForwardTile<S, P> tile(Part& a, int64_t s, int64_t s0, const Share& of, bool gate) {
    Scratch& w = a.w;
    const int64_t N = sets_.N, H = n_.H, r = of.r0, u0 = of.u0, pair = a.rows.off[s] + r;
    const int now = s & 1;
    ForwardTile<S, P> t{};
    t.rows = of.r1 - r;
    t.units = of.u1 - u0;
    t.ldz = w.weights.ldz;
    t.ld = ld_;
    t.H = H;
    const Tape& layout = layers_.layout();
    t.ld_kept = layout.kept * H;
    if (problem_.variant.given) t.options = &w.options;
    t.step = s, t.row = r, t.unit = u0;
    t.clip = problem_.clip_cell > 0 ? static_cast<S>(problem_.clip_cell) : static_cast<S>(__builtin_inf());
    for (int q = 0; q < P; ++q) {
      t.z[q] = w.z[q] + (pair - a.rows.off[s0]) * t.ldz + u0 * cell_.sums;
      // A projected cell's own h is m, and what it carries on lies in c.
      t.h_prev[q] = (proj_ ? w.c[q] : w.h[now][q]) + r * ld_ + u0;
      t.h_seen[q] = proj_ ? t.h_prev[q] : w.h_seen[now][q] + r * ld_ + u0;
      t.h[q] = (proj_ ? w.m[q] : w.h[!now][q]) + r * ld_ + u0;
      if (cell_.cell_state) t.c[q] = w.c[q] + r * ld_ + u0;
      if (cell_.two_products) t.rh[q] = w.rh[q] + r * ld_ + u0;
      if (!layers_.taped()) continue;
      S* tape = layers_.plane(q, a.l, a.d, a.set);
      if (layout.norm) t.numbers[q] = tape + layout.numbers_offset(N) + pair * 4;
      if (layout.kept) t.kept[q] = tape + layout.kept_offset(N) + pair * t.ld_kept + u0;
      if (cell_.cell_state && !layout.every) t.c_kept[q] = tape + layout.c_offset(N) + pair * H + u0;
    }
    if (cell_.cell_state && !gate)
      for (int64_t i = r; i < of.r1; ++i) keep_before(a, s, i, u0, of.u1);
    return t;
  }
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
