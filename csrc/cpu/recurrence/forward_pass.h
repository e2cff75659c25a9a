// SPDX-License-Identifier: Apache-2.0
// Forward's memory (Scratch), what one member sees of a layer (Part), and the states: start, restart, end, handing out.
// Read: h0, c0, lengths, resets.
// Written: y, hn, cn, cells, h and c of the tape; overwrites.
// Route: the base of forward.h.
// Limit: the bandwidth of copying.
#pragma once

#include "context.h"
#include "norm.h"
#include "options.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class ForwardPass {
 protected:
  static constexpr int L = Vec<S>::lanes;
  static constexpr int64_t kRowsAtOnce = 48;    // a step's rows are multiplied and finished in groups that stay in L1
  static constexpr int64_t kUnitsAtOnce = 768;  // ... of so many rows times units

 public:
  ForwardPass(const Call& call, const Sets& sets, const Layers<S, P>& layers, Workspace& workspace)
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
      scratch_[g] = Scratch();
      allocate(scratch_[g], pairs, workspace);
      for (int q = 0; q < P; ++q) allocate_plane(scratch_[g], q, pairs, workspace);
    }
  }

 protected:
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
    Norms<S, P> norms;
    S* zh[P] = {};                           // h R^T of a step, where layer norm keeps the two products apart
    S *x_pairs = nullptr, *h_pairs[2] = {};  // x and h rounded to bfloat16, two in an element
    const S **x_pair_rows = nullptr, **h_pair_rows[2] = {};
  };

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }

  static int64_t row_of_pairs(int64_t n) { return (n + L - 1) / L * (L / 2); }

  // What a member does in a step: some blocks of units of all rows, or all units of some rows.
  // With a projection h has other units than the cell: [q0, q1), the blocks [o0, o1) of hr.
  struct Share {
    int64_t first, end, u0, u1, r0, r1;
    int64_t q0 = u0, q1 = u1, o0 = 0, o1 = 0;
  };

  // One layer, direction and weight set, as seen by one team member.
  struct Part {
    const Team& team;
    Scratch& w;
    const Rows& rows;
    int l, d;
    int64_t set, ld, e;
    bool reversed;
    bool context = false, by_rows = false, at_once = false;  // at_once: x is multiplied once, see ForwardWeights
    Source<S> source[P] = {};
    Share own{};  // of all rows
  };

  // pairs: of a chunk, room for z and x.
  void allocate(Scratch& s, int64_t pairs, Workspace& workspace) const {
    const int64_t N = sets_.N;
    s.weights.allocate(cell_, larger(layers_.widest(), vocabulary_.most), n_.H, Q_, workspace);
    if (layers_.tokens()) s.tokens = take<int32_t>(workspace, pairs);
    if (p_[0]->context.data) s.context.allocate(p_, n_, N, cell_, workspace);
    if (norm_) {
      s.norms.allocate(problem_, cell_.sums, workspace);
      s.options.norms = &s.norms;
      for (S*& plane : s.zh) plane = take<S>(workspace, N * ld_ * cell_.sums);
    }
    if (problem_.variant.given) s.options.allocate(problem_, ld_, ldq_, N, workspace);
    if (!pairs_) return;
    s.weights.in_pairs = true;
    s.x_pairs = take<S>(workspace, pairs * row_of_pairs(layers_.widest()));
    s.x_pair_rows = take<const S*>(workspace, pairs);
    for (int parity = 0; parity < 2; ++parity)
      take_rows(workspace, N, row_of_pairs(n_.H), s.h_pairs[parity], s.h_pair_rows[parity]);
  }
  void allocate_plane(Scratch& s, int q, int64_t pairs, Workspace& workspace) const {
    const int64_t N = sets_.N;
    s.z[q] = take<S>(workspace, pairs * ld_ * cell_.sums);
    s.x[q] = take<const S*>(workspace, pairs);
    if (!layers_.direct()) s.copied[q] = take<S>(workspace, pairs * layers_.widest());
    for (int parity = 0; parity < 2; ++parity) {
      take_rows(workspace, N, ldq_, s.h[parity][q], s.h_rows[parity][q]);
      s.h_seen[parity][q] = s.h[parity][q];
      if (masks_) take_rows(workspace, N, ldq_, s.h_seen[parity][q], s.h_rows[parity][q]);
    }
    if (carried_) s.c[q] = take<S>(workspace, N * ld_);
    if (proj_) {
      s.hr[q].data = take<S>(workspace, ldq_ * n_.H);
      take_rows(workspace, N, ld_, s.m[q], s.m_rows[q]);
    }
    if (cell_.two_products) take_rows(workspace, N, ld_, s.rh[q], s.rh_rows[q]);
  }

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
    if (team.rank == 0 && norm_) w.norms.begin(p_, ld, e);
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

  // recompute: c of row i before step s, where the tape wants it.
  void keep_before(Part& a, int64_t s, int64_t i, int64_t u0, int64_t u1) {
    const Tape& layout = layers_.layout();
    if (!layers_.taped() || !layout.every || s % layout.every) return;
    const int64_t at = layout.c_offset(sets_.N) + (s / layout.every * sets_.N + i) * n_.H + u0;
    for (int q = 0; q < P; ++q)
      copy_row(a.w.c[q] + i * ld_ + u0, 1, layers_.plane(q, a.l, a.d, a.set) + at, 1, u1 - u0);
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

  // This member's h and c after step s, to everyone who wants them.
  void hand_out(Part& a, int64_t s, const Share& mine) {
    Scratch& w = a.w;
    const Rows& rows = a.rows;
    const int64_t H = n_.H, q0 = mine.q0, q1 = mine.q1;
    const int l = a.l, d = a.d, next = !(s & 1);
    const bool reversed = a.reversed, last = l + 1 == n_.L;
    for (int q = 0; q < P; ++q)
      if (S* to = layers_.plane(q, l, d, a.set))
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
