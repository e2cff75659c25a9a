// SPDX-License-Identifier: Apache-2.0
// Forward through all layers and directions:   z = x W^T + b for a chunk of steps, then step by step z += h R^T, h =
// cell(z) Read: x (T,E,B,I), h0, c0 (L*D,E,B,H), weights. Written: y (T,E,B,D*H), hn, cn, cells, the tape. Overwrites.
// With P = 2 every number is a value with its tangent, and the tangents are what is written. Route: weights packed once
// a call; a thread owns blocks of units, so one barrier a step is all the recurrence needs. Limit: FMA for 16 rows and
// more; the bandwidth of the cache that holds R for one row.
#pragma once

#include "context.h"
#include "norm.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class Forward {
  static constexpr int L = Vec<S>::lanes;
  static constexpr int64_t kRowsAtOnce = 48;    // a step's rows are multiplied and finished in groups that stay in L1
  static constexpr int64_t kUnitsAtOnce = 768;  // ... of so many rows times units

 public:
  Forward(const Call& call, const Sets& sets, const Layers<S, P>& layers, Workspace& workspace)
      : problem_(*call.problem),
        n_(problem_.sizes),
        cell_(table_of<S, P>(problem_.cell)),
        tile_(tiles_of(cell_, problem_)),
        out_(call.out),
        sets_(sets),
        layers_(layers),
        groups_(sets.count * n_.D, call.threads, workspace),
        vocabulary_(call, sets, packs_columns(call, sets), false, workspace) {
    p_[0] = &call.p;
    if (P == 2) p_[1] = &call.v;
    const int64_t inputs = layers_.widest();
    norm_ = problem_.variant.layer_norm;
    Q_ = outputs_of(problem_), proj_ = problem_.variant.proj > 0, carried_ = has_cell_state(problem_);
    ld_ = padded(n_.H), ldq_ = padded(Q_);
    const int64_t ldz = ld_ * cell_.sums, N = sets_.N;
    chunk_ = smaller(larger<int64_t>(n_.T, 1),
                     larger<int64_t>(1, (int64_t{1} << 20) / larger<int64_t>(1, N * ldz * int64_t{sizeof(S)})));
    const int64_t pairs = chunk_ * N;
    masks_ = problem_.variant.training && problem_.variant.recurrent_dropout > 0;
    pairs_ = !masks_ && !proj_ && !norm_ && kPairs && P == 1 && sizeof(S) == 4 && call.pairs && problem_.bf16_weights &&
             problem_.bf16_state && cell_.state_product && !cell_.two_products && !layers_.tokens() &&
             !p_[0]->context.data;
    scratch_ = static_cast<Scratch*>(workspace.take(sizeof(Scratch) * static_cast<size_t>(groups_.count)));
    for (int g = 0; g < groups_.count; ++g) {
      Scratch& s = scratch_[g];
      s = Scratch();
      s.weights.allocate(cell_, larger(inputs, vocabulary_.most), n_.H, Q_, workspace);
      if (layers_.tokens()) s.tokens = take<int32_t>(workspace, pairs);
      if (p_[0]->context.data) s.context.allocate(p_, n_, N, cell_, workspace);
      if (norm_) {
        s.norms.allocate(problem_, cell_.sums, workspace);
        s.options.norms = &s.norms;
        s.zh = take<S>(workspace, N * ldz);
      }
      if (problem_.variant.given) s.options.allocate(problem_, ld_, ldq_, N, workspace);
      if (pairs_) {
        s.weights.in_pairs = true;
        s.x_pairs = take<S>(workspace, pairs * row_of_pairs(inputs));
        s.x_pair_rows = take<const S*>(workspace, pairs);
        for (int parity = 0; parity < 2; ++parity) {
          s.h_pairs[parity] = take<S>(workspace, N * row_of_pairs(n_.H));
          s.h_pair_rows[parity] = take<const S*>(workspace, N);
          for (int64_t i = 0; i < N; ++i) s.h_pair_rows[parity][i] = s.h_pairs[parity] + i * row_of_pairs(n_.H);
        }
      }
      for (int q = 0; q < P; ++q) {
        s.z[q] = take<S>(workspace, pairs * ldz);
        s.x[q] = take<const S*>(workspace, pairs);
        if (!layers_.direct()) s.copied[q] = take<S>(workspace, pairs * inputs);
        for (int parity = 0; parity < 2; ++parity) {
          s.h[parity][q] = take<S>(workspace, N * ldq_);
          s.h_rows[parity][q] = take<const S*>(workspace, N);
          s.h_seen[parity][q] = masks_ ? take<S>(workspace, N * ldq_) : s.h[parity][q];
          for (int64_t i = 0; i < N; ++i) s.h_rows[parity][q][i] = s.h_seen[parity][q] + i * ldq_;
        }
        if (carried_) s.c[q] = take<S>(workspace, N * ld_);
        if (proj_) {
          s.hr[q].data = take<S>(workspace, ldq_ * n_.H);
          s.m[q] = take<S>(workspace, N * ld_);
          s.m_rows[q] = take<const S*>(workspace, N);
          for (int64_t i = 0; i < N; ++i) s.m_rows[q][i] = s.m[q] + i * ld_;
        }
        if (cell_.two_products) {
          s.rh[q] = take<S>(workspace, N * ld_);
          s.rh_rows[q] = take<const S*>(workspace, N);
          for (int64_t i = 0; i < N; ++i) s.rh_rows[q][i] = s.rh[q] + i * ld_;
        }
      }
    }
  }

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
  struct Scratch {
    ForwardWeights<S, P> weights;
    S *z[P], *copied[P] = {}, *h[2][P], *h_seen[2][P], *c[P] = {}, *m[P] = {}, *rh[P] = {};
    Panels<S> hr[P];  // the projection's weights
    bool has_hr[P] = {};
    const S** m_rows[P] = {};
    const S **x[P], **h_rows[2][P], **rh_rows[P] = {};  // h_rows: of h_seen, h as R sees it
    int32_t* tokens = nullptr;
    Context<S, P> context;
    Options<S, P> options;
    Norms<S> norms;
    S* zh = nullptr;                         // h R^T of a step, where layer norm keeps the two products apart
    S *x_pairs = nullptr, *h_pairs[2] = {};  // x and h rounded to bfloat16, two in an element
    const S **x_pair_rows = nullptr, **h_pair_rows[2] = {};
  };
  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }
  static int64_t row_of_pairs(int64_t n) { return (n + L - 1) / L * (L / 2); }

  void direction(const Team& team, Scratch& w, int l, int d, int64_t set) {
    const Rows& rows = sets_.rows[set];
    const bool reversed = n_.D == 2 ? d == 1 : problem_.reverse;
    const int64_t H = n_.H, ld = l * n_.D + d;
    const Params* p[P];
    Source<S> source_of[P];
    Params bare;  // layer norm adds the biases itself
    for (int q = 0; q < P; ++q) {
      p[q] = p_[q]->params ? &p_[q]->params[ld] : nullptr;
      if (norm_) {
        bare = *p[q];
        bare.bW.data = bare.bR.data = nullptr;
        p[q] = &bare;
      }
      source_of[q] = layers_.source(q, l, set);
    }
    const int64_t e = sets_.count == 1 ? 0 : set, inputs = source_of[0].width;
    const Vocabulary::Set* tokens = source_of[0].token ? &vocabulary_.of[set] : nullptr;
    const bool context = l == 0 && p_[0]->context.data;
    const bool by_rows = !tokens && !context && cell_.state_product && cut_by_rows(team, inputs);
    const bool at_once = !tokens && !by_rows && !problem_.bf16_weights && rows.steps <= chunk_;
    if constexpr (P == 1 && sizeof(S) == 4) {
      if (problem_.bf16_weights)
        w.weights.template pack<Half>(team, cell_, p, e, inputs, H, Q_, rows.total, sets_.N, tokens);
      else
        w.weights.pack(team, cell_, p, e, inputs, H, Q_, rows.total, sets_.N, tokens, at_once);
    } else {
      w.weights.pack(team, cell_, p, e, inputs, H, Q_, rows.total, sets_.N, tokens, at_once);
    }
    const int64_t first = team.begin(w.weights.blocks()), end = team.end(w.weights.blocks());
    Share own{first, end, w.weights.unit(first), w.weights.unit(end), 0, sets_.N};
    own_outputs(team, w, rows, ld, e, own);
    begin_options(team, w, rows, reversed, ld, e, own);
    start(w, rows, reversed, ld, own);
    if (rows.steps) show_state(w, 0, own);
    finish_padding(rows, l, d, own);
    if (context) context_product(team, w, rows, d, e, first, end);
    for (int64_t s0 = 0; s0 < rows.steps; s0 += chunk_) {
      const int64_t s1 = smaller(s0 + chunk_, rows.steps), pairs = rows.off[s1] - rows.off[s0];
      const S* const* x[P];
      for (int q = 0; q < P; ++q) {
        x[q] = source_of[q].given() ? w.x[q] : nullptr;
        if (x[q]) source_of[q].fill(team, rows, reversed, s0, s1, w.copied[q], w.x[q]);
      }
      if (source_of[0].token) source_of[0].fill_tokens(team, rows, reversed, s0, s1, w.tokens);
      round_input(w, inputs, team.begin(pairs), team.end(pairs), x);
      team.wait();
      if (at_once) w.weights.product_at_once(cell_, first, end, x, pairs, w.z);
      for (int64_t b = first; b < end && !by_rows; ++b) {
        if (source_of[0].token)
          token_product(w, b, pairs);
        else if (!at_once)
          w.weights.input_product(cell_, b, x, pairs, w.z);
        if (context) w.context.add(w.weights, cell_, b, rows, s0, s1, w.z);
      }
      if (norm_) norm_input(team, w, rows, set, l, d, s0, pairs, by_rows ? x : nullptr);
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t live = rows.live[s], next = s + 1 < rows.steps ? rows.live[s + 1] : 0;
        if (norm_) {
          Share mine = own;
          mine.r1 = live;
          normed_step(team, w, rows, set, l, d, s, s0, mine, next, by_rows);
          continue;
        }
        if (by_rows) {
          Share mine = all_units(w, team.begin(live), team.end(live));
          if (cell_.two_products) each_tile(w, rows, set, l, d, s, s0, mine, true, x, pairs);
          each_tile(w, rows, set, l, d, s, s0, mine, false, cell_.two_products ? nullptr : x, pairs);
          if (proj_) project(w, s, mine, live > 1);
          hand_out(w, rows, set, l, d, s, mine);
          if (next != live) team.wait();  // rows change hands
          if (next && rows.step_cut(reversed, s + 1))
            restart(w, rows, reversed, ld, s + 1, all_units(w, team.begin(next), team.end(next)));
          show_state(w, !(s & 1), all_units(w, team.begin(next), team.end(next)));
          continue;
        }
        Share mine = own;
        mine.r1 = live;
        if (cell_.two_products) {
          each_tile(w, rows, set, l, d, s, s0, mine, true, nullptr, pairs);
          team.wait();
        }
        each_tile(w, rows, set, l, d, s, s0, mine, false, nullptr, pairs);
        if (proj_) {
          team.wait();
          project(w, s, mine, live > 1);
        }
        hand_out(w, rows, set, l, d, s, mine);
        mine.r1 = next;
        if (next && rows.step_cut(reversed, s + 1)) restart(w, rows, reversed, ld, s + 1, mine);
        show_state(w, !(s & 1), mine);
        if (cell_.state_product || s + 1 == s1) team.wait();
      }
      if (by_rows) team.wait();
    }
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

  // What a member does in a step: some blocks of units of all rows, or all units of some rows.
  // With a projection h has other units than the cell: [q0, q1), the blocks [o0, o1) of hr.
  struct Share {
    int64_t first, end, u0, u1, r0, r1;
    int64_t q0 = u0, q1 = u1, o0 = 0, o1 = 0;
  };
  Share all_units(const Scratch& w, int64_t r0, int64_t r1) const {
    Share all{0, w.weights.blocks(), 0, n_.H, r0, r1};
    if (proj_) all.q1 = Q_, all.o1 = w.hr[0].blocks();
    return all;
  }
  bool cut_by_rows(const Team& team, int64_t inputs) const {
    const int64_t bytes = (inputs + n_.H) * cell_.gates * ld_ * int64_t{sizeof(S)} * P;
    return team.size > 1 && sets_.N >= 8 * team.size && bytes <= kWeightsByRows;
  }

  // Pairs of x's rows, which then take x's place, and of h.
  void round_input(Scratch& w, int64_t inputs, int64_t begin, int64_t end, const S* const** x) const {
    if constexpr (sizeof(S) == 4) {
      if (!pairs_) return;
      for (int64_t r = begin; r < end; ++r) {
        S* to = w.x_pairs + r * row_of_pairs(inputs);
        round_row(x[0][r], inputs, to);
        w.x_pair_rows[r] = to;
      }
      x[0] = w.x_pair_rows;
    }
  }
  // h as R sees it: rounded to bfloat16, or with recurrent dropout.
  void show_state(Scratch& w, int parity, const Share& mine) const {
    for (int64_t i = mine.r0; masks_ && i < mine.r1; ++i)
      for (int q = 0; q < P; ++q)
        w.options.apply_mask(i, w.h[parity][q] + i * ldq_, w.h_seen[parity][q] + i * ldq_, mine.q0, mine.q1);
    if constexpr (sizeof(S) == 4) {
      if (!pairs_ || mine.u1 <= mine.u0) return;
      for (int64_t i = mine.r0; i < mine.r1; ++i)
        round_row(w.h[parity][0] + i * ld_ + mine.u0, mine.u1 - mine.u0,
                  w.h_pairs[parity] + i * row_of_pairs(n_.H) + mine.u0 / 2);
    }
  }

  void begin_options(const Team& team, Scratch& w, const Rows& rows, bool reversed, int64_t ld, int64_t e,
                     const Share& own) {
    if (!problem_.variant.given) return;
    if (team.rank == 0) w.options.begin(p_, &rows, reversed, ld, e);
    if (team.rank == 0 && norm_) w.norms.begin(p_[0]->params[ld], p_[0]->extras[ld], e);
    team.wait();
    // Without a step nobody would wait before the next layer's begin.
    for (int64_t i = 0; masks_ && rows.steps && i < sets_.N; ++i) w.options.draw_mask(i, own.q0, own.q1);
  }

  // The projection's weights, packed like R, and the share of h's units.
  void own_outputs(const Team& team, Scratch& w, const Rows& rows, int64_t ld, int64_t e, Share& own) {
    if (!proj_) return;
    static constexpr int gate[1] = {0};
    for (int q = 0; q < P; ++q) {
      const Array<3> hr = p_[q]->extras ? p_[q]->extras[ld].hr : Array<3>();
      Panels<S>& panels = w.hr[q];
      panels.K = n_.H;
      panels.units = Q_;
      panels.block = block_tiles(1, panels.tiles(), team.size);
      own.o0 = team.begin(panels.blocks()), own.o1 = team.end(panels.blocks());
      panels.source = hr.data && !worth_packing(rows.total, n_.H) && hr.stride[2] == 1 ? element<S>(hr, e) : nullptr;
      panels.row_stride = hr.stride[1];
      w.has_hr[q] = hr.data != nullptr;
      for (int64_t b = own.o0; hr.data && !panels.source && b < own.o1; ++b)
        pack_transposed(panels, b, element<S>(hr, e), hr.stride[1], hr.stride[2], Q_, gate);
    }
    own.q0 = smaller(own.o0 * w.hr[0].block * L, Q_), own.q1 = smaller(own.o1 * w.hr[0].block * L, Q_);
  }

  // x W^T of a chunk, normalised: each member its rows.
  void norm_input(const Team& team, Scratch& w, const Rows& rows, int64_t set, int l, int d, int64_t s0, int64_t pairs,
                  const S* const* const* x) {
    const int64_t begin = team.begin(pairs), end = team.end(pairs);
    if (x) {  // each member has multiplied nothing yet: its rows
      const S* const* mine[P];
      S* z[P];
      for (int q = 0; q < P; ++q) mine[q] = x[q] ? x[q] + begin : nullptr, z[q] = w.z[q] + begin * w.weights.ldz;
      for (int64_t b = 0; b < w.weights.blocks(); ++b)
        w.weights.input_product(cell_, b, mine, end - begin, z, pairs > 1);
    } else {
      team.wait();
    }
    const Tape& layout = layers_.layout();
    S* tape = layers_.taped() ? layers_.plane(0, l, d, set) : nullptr;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t pair = rows.off[s0] + r;
      S* z = w.z[0] + r * w.weights.ldz;
      S* hat = tape ? tape + layout.hat_offset(sets_.N, 0) + pair * cell_.gates * n_.H : nullptr;
      const S scale = w.norms.row_of_z(0, z, cell_.x_sum, false, z, hat);
      if (tape) tape[layout.numbers_offset(sets_.N) + pair * 4] = scale;
    }
    team.wait();
  }

  // A step with layer norm. `columns`: this member's blocks of all rows. In between, and by rows, members own rows.
  void normed_step(const Team& team, Scratch& w, const Rows& rows, int64_t set, int l, int d, int64_t s, int64_t s0,
                   const Share& columns_of_all, int64_t next, bool by_rows) {
    const int64_t live = rows.live[s], ldz = w.weights.ldz, ld = int64_t{l} * n_.D + d;
    const bool reversed = n_.D == 2 ? d == 1 : problem_.reverse;
    const Share mine = all_units(w, team.begin(live), team.end(live)), &columns = by_rows ? mine : columns_of_all;
    for (int64_t b = columns.first; b < columns.end; ++b)
      multiply(w.weights.R[0][0], b, w.h_rows[s & 1][0] + columns.r0, columns.r1 - columns.r0, static_cast<S*>(nullptr),
               0, w.zh + columns.r0 * ldz, ldz, live > 1);
    if (!by_rows) team.wait();
    const Tape& layout = layers_.layout();
    S* tape = layers_.taped() ? layers_.plane(0, l, d, set) : nullptr;
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      const int64_t pair = rows.off[s] + i;
      S* hat = tape ? tape + layout.hat_offset(sets_.N, 1) + pair * cell_.gates * n_.H : nullptr;
      S* z = w.z[0] + (pair - rows.off[s0]) * ldz;
      const S scale = w.norms.row_of_z(1, w.zh + i * ldz, cell_.h_sum, true, z, hat);
      if (tape) tape[layout.numbers_offset(sets_.N) + pair * 4 + 1] = scale;
    }
    each_tile(w, rows, set, l, d, s, s0, mine, false, nullptr, 0);
    if (proj_) {
      if (!by_rows) team.wait();
      project(w, s, columns, live > 1);
      if (!by_rows) team.wait();
    }
    hand_out(w, rows, set, l, d, s, mine);
    if (next != live) team.wait();  // rows change hands
    const Share after = all_units(w, team.begin(next), team.end(next));
    if (next && rows.step_cut(reversed, s + 1)) restart(w, rows, reversed, ld, s + 1, after);
    show_state(w, !(s & 1), after);
    if (!by_rows) team.wait();
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
    if (problem_.variant.zoneout_h == 0) return;
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      S *fresh[P], *old[P];
      for (int q = 0; q < P; ++q) fresh[q] = w.h[!now][q] + i * ldq_, old[q] = w.h[now][q] + i * ldq_;
      zone_row(w.options, 0, s, i, mine.q0, mine.q1, fresh, old);
      for (int q = 0; q < P; ++q) copy_row(old[q] + mine.q0, 1, fresh[q] + mine.q0, 1, mine.q1 - mine.q0);
    }
  }

  // A projected GRU's m, which the next step's z carries on: c is its place. Before step s, then after it.
  void keep_carried(Scratch& w, int64_t set, int l, int d, int64_t s, int64_t i, int64_t u0, int64_t u1) {
    const Tape& layout = layers_.layout();
    if (!layers_.taped() || !layout.every || s % layout.every) return;
    for (int q = 0; q < P; ++q)
      copy_row(w.c[q] + i * ld_ + u0, 1,
               layers_.plane(q, l, d, set) + layout.c_offset(sets_.N) + (s / layout.every * sets_.N + i) * n_.H + u0, 1,
               u1 - u0);
  }
  void carry(Scratch& w, const Rows& rows, int64_t set, int l, int d, int64_t s, const Share& mine, int64_t r0,
             int64_t r1) {
    const Tape& layout = layers_.layout();
    for (int64_t i = r0; i < r1; ++i) {
      keep_carried(w, set, l, d, s, i, mine.u0, mine.u1);
      S *fresh[P], *c[P];
      for (int q = 0; q < P; ++q) fresh[q] = w.m[q] + i * ld_, c[q] = w.c[q] + i * ld_;
      if (problem_.variant.zoneout_c > 0)
        zone_row(w.options, 1, s, i, mine.u0, mine.u1, fresh, c);
      else
        for (int q = 0; q < P; ++q) copy_row(fresh[q] + mine.u0, 1, c[q] + mine.u0, 1, mine.u1 - mine.u0);
      for (int q = 0; q < P && layers_.taped() && !layout.every; ++q)
        copy_row(c[q] + mine.u0, 1,
                 layers_.plane(q, l, d, set) + layout.c_offset(sets_.N) + (rows.off[s] + i) * n_.H + mine.u0, 1,
                 mine.u1 - mine.u0);
    }
  }

  // The units of h (which = 0) or c (1) in a share, and their states.
  struct State {
    int64_t begin, end, ld;
    S* rows[P];
  };
  State state(const Scratch& w, int which, int parity, const Share& mine) const {
    State it{which ? mine.u0 : mine.q0, which ? mine.u1 : mine.q1, which ? ld_ : ldq_, {}};
    for (int q = 0; q < P; ++q) it.rows[q] = which ? w.c[q] : w.h[parity][q];
    return it;
  }

  // The state before the first step; rows of length 0 have it as their last one, too.
  void start(Scratch& w, const Rows& rows, bool reversed, int64_t ld, const Share& own) {
    for (int64_t i = 0; i < sets_.N; ++i) {
      for (int which = 0; which < 1 + carried_; ++which) {
        const State it = state(w, which, 0, own);
        const int64_t pad = it.end > it.begin && it.end == (which ? n_.H : Q_) ? it.ld : it.end;
        for (int q = 0; q < P; ++q) {
          if (which == 0) zero_row(w.h[1][q] + i * ldq_ + it.begin, 1, pad - it.begin);
          zero_row(it.rows[q] + i * it.ld + it.begin, 1, pad - it.begin);
          initial(q, which, rows, i, ld, it.begin, it.end, it.rows[q] + i * it.ld);
        }
      }
      if (rows.length[i] == 0) final_state(w, rows, 0, i, ld, own);
    }
    if (rows.steps && rows.step_cut(reversed, 0)) {
      Share first = own;
      first.r1 = rows.live[0];
      restart(w, rows, reversed, ld, 0, first);
    }
  }

  // h0 (which = 0) or c0 (1) of row i into `to`, if given.
  void initial(int q, int which, const Rows& rows, int64_t i, int64_t ld, int64_t u0, int64_t u1, S* to) const {
    const Array<4>& a = which ? p_[q]->c0 : p_[q]->h0;
    if (a.data) copy_row(element<S>(a, ld, rows.e[i], rows.b[i], u0), a.stride[3], to + u0, 1, u1 - u0);
  }

  // Rows that begin a new sequence at step s: their state before it.
  void restart(Scratch& w, const Rows& rows, bool reversed, int64_t ld, int64_t s, const Share& mine) {
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      if (!rows.is_cut(reversed, s, i)) continue;
      for (int which = 0; which < 1 + carried_; ++which) {
        const State it = state(w, which, s & 1, mine);
        for (int q = 0; q < P; ++q) {
          zero_row(it.rows[q] + i * it.ld + it.begin, 1, it.end - it.begin);
          if (problem_.reset_to_initial) initial(q, which, rows, i, ld, it.begin, it.end, it.rows[q] + i * it.ld);
        }
      }
    }
  }

  void final_state(Scratch& w, const Rows& rows, int parity, int64_t i, int64_t ld, const Share& mine) {
    const Array<4>* last[2] = {&out_.hn, &out_.cn};
    for (int which = 0; which < 1 + carried_; ++which) {
      const Array<4>& a = *last[which];
      const State it = state(w, which, parity, mine);
      const S* from = it.rows[P - 1] + i * it.ld + it.begin;
      if (a.data) copy_row(from, 1, element<S>(a, ld, rows.e[i], rows.b[i], it.begin), a.stride[3], it.end - it.begin);
    }
  }

  // Zeros past the rows' ends.
  void finish_padding(const Rows& rows, int l, int d, const Share& own) {
    if (!out_.y.data && !out_.cells.data) return;
    for (int64_t i = 0; i < sets_.N; ++i) {
      for (int64_t t = rows.length[i]; t < n_.T; ++t) {
        if (out_.y.data && l + 1 == n_.L && !rows.packed)
          zero_row(element<S>(out_.y, t, rows.e[i], rows.b[i], d * Q_ + own.q0), out_.y.stride[3], own.q1 - own.q0);
        if (out_.cells.data)
          zero_row(element<S>(out_.cells, l, t, rows.e[i], rows.b[i], d * n_.H + own.u0), out_.cells.stride[4],
                   own.u1 - own.u0);
      }
    }
  }

  // One step of the rows alive: product with the state, then the cell, block by block and a few rows at a time. With x
  // (rows of the chunk) given, the product with x, too.
  void each_tile(Scratch& w, const Rows& rows, int64_t set, int l, int d, int64_t s, int64_t s0, const Share& mine,
                 bool gate, const S* const* const* x, int64_t pairs) {
    const int64_t N = sets_.N, H = n_.H, pair = rows.off[s], chunk_pair = pair - rows.off[s0];
    const int64_t live = mine.r1 - mine.r0, first = mine.first, end = mine.end;
    if (live == 0) return;
    const bool part = rows.live[s] > 1;
    const int now = s & 1, phase = cell_.two_products && !gate;
    const ForwardWeights<S, P>& weights = w.weights;
    // A few rows: several blocks before their cells, which then overlap. Every other step the other way round: what was
    // read last is still in the cache.
    const int64_t together = norm_ ? end - first : larger<int64_t>(1, kUnitsAtOnce / (live * weights.unit(1)));
    const int64_t parts = (end - first + together - 1) / together;
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t b0 = first + together * (s & 1 ? parts - 1 - k : k), b1 = smaller(b0 + together, end);
      const int64_t u0 = weights.unit(b0), u1 = weights.unit(b1);
      for (int64_t r = mine.r0; r < mine.r1; r += kRowsAtOnce) {
        ForwardTile<S, P> t{};
        t.rows = smaller(kRowsAtOnce, mine.r1 - r);
        t.units = u1 - u0;
        t.ldz = weights.ldz;
        t.ld = ld_;
        t.H = H;
        t.ld_kept = layers_.layout().kept * H;
        if (problem_.variant.given) t.options = &w.options;
        t.step = s, t.row = r, t.unit = u0;
        t.clip = problem_.clip_cell > 0 ? static_cast<S>(problem_.clip_cell) : static_cast<S>(__builtin_inf());
        const S* const* a[P];
        S* z[P];
        for (int q = 0; q < P; ++q) {
          a[q] = (phase ? w.rh_rows[q] : pairs_ ? w.h_pair_rows[now] : w.h_rows[now][q]) + r;
          z[q] = w.z[q] + (chunk_pair + r) * weights.ldz;
          t.z[q] = z[q] + u0 * cell_.sums;
          // A projected cell's own h is m, and what it carries on lies in c.
          t.h_prev[q] = (proj_ ? w.c[q] : w.h[now][q]) + r * ld_ + u0;
          t.h_seen[q] = proj_ ? t.h_prev[q] : w.h_seen[now][q] + r * ld_ + u0;
          t.h[q] = (proj_ ? w.m[q] : w.h[!now][q]) + r * ld_ + u0;
          if (cell_.cell_state) t.c[q] = w.c[q] + r * ld_ + u0;
          if (cell_.two_products) t.rh[q] = w.rh[q] + r * ld_ + u0;
          if (layers_.taped()) {
            const Tape& layout = layers_.layout();
            S* tape = layers_.plane(q, l, d, set);
            if (norm_) t.numbers = tape + layout.numbers_offset(N) + (pair + r) * 4;
            if (layout.kept) t.kept[q] = tape + layout.kept_offset(N) + (pair + r) * t.ld_kept + u0;
            if (cell_.cell_state && !layout.every) t.c_kept[q] = tape + layout.c_offset(N) + (pair + r) * H + u0;
            if (cell_.cell_state && layout.every && s % layout.every == 0 && !gate)
              for (int64_t i = r; i < r + t.rows; ++i)
                copy_row(w.c[q] + i * ld_ + u0, 1, tape + layout.c_offset(N) + (s / layout.every * N + i) * H + u0, 1,
                         u1 - u0);
          }
        }
        const S* const* at_x[P] = {};
        for (int q = 0; q < P && x; ++q) at_x[q] = x[q] ? x[q] + chunk_pair + r : nullptr;
        for (int64_t j = b0; j < b1; ++j) {
          const int64_t block = s & 1 ? b0 + b1 - 1 - j : j;
          if (x) weights.input_product(cell_, block, at_x, t.rows, z, pairs > 1);
          if (!norm_) weights.state_product(phase, block, a, t.rows, z, part);
        }
        gate ? tile_.gate(t) : tile_.forward(t);
        if (carried_ && !cell_.cell_state) {
          const Share tile{b0, b1, u0, u1, r, r + t.rows};
          carry(w, rows, set, l, d, s, tile, r, r + t.rows);
        }
      }
    }
  }

  // This member's h and c after step s, to everyone who wants them.
  void hand_out(Scratch& w, const Rows& rows, int64_t set, int l, int d, int64_t s, const Share& mine) {
    const int64_t H = n_.H, q0 = mine.q0, q1 = mine.q1;
    const bool reversed = n_.D == 2 ? d == 1 : problem_.reverse, last = l + 1 == n_.L;
    const int next = !(s & 1);
    for (int q = 0; q < P; ++q)
      if (S* to = layers_.plane(q, l, d, set))
        for (int64_t i = mine.r0; i < mine.r1; ++i)
          copy_row(w.h[next][q] + i * ldq_ + q0, 1, to + (rows.off[s] + i) * Q_ + q0, 1, q1 - q0);
    if (out_.y.data && last)
      for (int64_t i = mine.r0; i < mine.r1; ++i)
        copy_row(w.h[next][P - 1] + i * ldq_ + q0, 1,
                 element<S>(out_.y, rows.place(rows.time(reversed, s, i)), rows.e[i], rows.b[i], d * Q_ + q0),
                 out_.y.stride[3], q1 - q0);
    if (out_.cells.data) {
      const State it = state(w, carried_, next, mine);
      for (int64_t i = mine.r0; i < mine.r1; ++i)
        copy_row(it.rows[P - 1] + i * it.ld + it.begin, 1,
                 element<S>(out_.cells, l, rows.time(reversed, s, i), rows.e[i], rows.b[i], d * H + it.begin),
                 out_.cells.stride[4], it.end - it.begin);
    }
    for (int64_t i = larger(mine.r0, s + 1 < rows.steps ? rows.live[s + 1] : 0); i < mine.r1; ++i)
      final_state(w, rows, next, i, l * n_.D + d, mine);
  }

  const Problem& problem_;
  const Sizes& n_;
  const CellTable<S, P>& cell_;
  const TileFunctions<S, P>& tile_;
  const Arguments* p_[P];
  const Results& out_;
  const Sets& sets_;
  const Layers<S, P>& layers_;
  Groups groups_;
  Vocabulary vocabulary_;
  Scratch* scratch_;
  int64_t Q_, ld_, ldq_, chunk_;                // Q: units of h; rows of H, of Q
  bool pairs_, masks_, norm_, proj_, carried_;  // carried: there is a c, or what a projected GRU carries on
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
