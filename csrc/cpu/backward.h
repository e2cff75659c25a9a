// SPDX-License-Identifier: Apache-2.0
// Backward through all layers and directions, from the last step to the first:   da = cell'(dh, dc),   dh = da R;
// then, for a chunk of steps at once:   dW = da^T x,   dR = da^T h',   db = sum da,   dx = da W
// Read: what forward read, its tape, dy, dhn, dcn, dcells. Written: dx, dh0, dc0, dW, dR, dbW, dbR.
// Overwrites. With P = 2 every number is a value with its tangent, and the tangents are what is written.
// Route: as forward; da of a chunk stays in cache between the recurrence and the products.
// Limit: FMA for 16 rows and more; for one row the recurrence is limited by reading R, the products by writing dW, dR.
#pragma once

#include "context.h"
#include "norm.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class Backward {
  static constexpr int L = Vec<S>::lanes;
  static constexpr int64_t kRowsAtOnce = 48;
  static constexpr int64_t kPairs = 512;  // of a chunk: enough to pay for reading and writing dW, dR once more

 public:
  Backward(const Call& call, const Sets& sets, const Layers<S, P>& layers, Workspace& workspace)
      : problem_(*call.problem),
        n_(problem_.sizes),
        cell_(table_of<S, P>(problem_.cell)),
        tile_(tiles_of(cell_, problem_)),
        kept_(kept_of(problem_)),
        masks_(problem_.variant.training && problem_.variant.recurrent_dropout > 0),
        dp_(call.dp),
        sets_(sets),
        layers_(layers),
        tape_(layers.layout()),
        groups_(adds_up(call) ? 1 : sets.count, call.threads, workspace),
        table_(call, sets, call.p.tokens.data != nullptr, split(call, sets), workspace),
        vocabulary_(call, sets, tape_.every && packs_columns(call, sets), false, workspace) {
    p_[0] = &call.p;
    g_[0] = &call.g;
    if (P == 2) p_[1] = &call.v, g_[1] = &call.t;
    inputs_ = larger(layers_.widest(), n_.K);
    norm_ = problem_.variant.layer_norm;
    Q_ = outputs_of(problem_), proj_ = problem_.variant.proj > 0, carried_ = has_cell_state(problem_);
    ld_ = padded(n_.H), ldq_ = padded(Q_);
    ld_da_ = cell_.sums * n_.H;
    const int64_t N = sets_.N, H = n_.H;
    chunk_ = tape_.every ? tape_.every
                         : smaller(larger<int64_t>(n_.T, 1), larger<int64_t>(1, kPairs / larger<int64_t>(1, N)));
    pairs_ = chunk_ * N;
    if (n_.L > 1)
      for (int parity = 0; parity < 2; ++parity)
        for (int q = 0; q < P; ++q) between_[parity][q] = take<S>(workspace, sets_.count * n_.D * n_.T * N * Q_);
    zeros_ = take<S>(workspace, larger(H, Q_));
    zero_row(zeros_, 1, larger(H, Q_));
    scratch_ = static_cast<Scratch*>(workspace.take(sizeof(Scratch) * static_cast<size_t>(groups_.count)));
    const int64_t widest = padded(larger(inputs_, larger(H, Q_))), all = larger(cell_.gates * H, Q_);
    for (int g = 0; g < groups_.count; ++g) {
      Scratch& s = scratch_[g];
      s = Scratch();
      if (tape_.every) s.forward.allocate(cell_, larger(inputs_, vocabulary_.most), H, Q_, workspace);
      if (p_[0]->context.data) {
        s.context.allocate(p_, n_, N, cell_, workspace);
        for (int q = 0; q < P; ++q) {
          s.dz[q] = take<S>(workspace, N * cell_.gates * H);
          s.dz_rows[q] = take<const S*>(workspace, N);
          for (int64_t i = 0; i < N; ++i) s.dz_rows[q][i] = s.dz[q] + i * cell_.gates * H;
        }
      }
      if (layers_.tokens()) {
        s.tokens = take<int32_t>(workspace, pairs_);
        s.columns = take<S>(workspace, table_.most * cell_.gates * H);
      }
      if (norm_) {
        s.norms.allocate(problem_, cell_.sums, workspace);
        s.options.norms = &s.norms;
      }
      if (problem_.variant.given) s.options.allocate(problem_, ld_, ldq_, N, workspace);
      for (int q = 0; q < P; ++q) {
        s.R[q][0].data = take<S>(workspace, cell_.state_product ? ldq_ * cell_.gates * H : 0);
        s.W[q].data = take<S>(workspace, padded(inputs_) * cell_.gates * H);
        s.da[q] = take<S>(workspace, pairs_ * ld_da_);
        s.packed[q] = take<S>(workspace, pairs_ * (larger(ld_da_, Q_) + kTile * 4));
        s.x_panels[q] = take<S>(workspace, pairs_ * padded(inputs_));
        s.h_panels[q] = take<S>(workspace, pairs_ * larger(ld_, ldq_));
        s.dx[q] = take<S>(workspace, pairs_ * padded(inputs_));
        s.copied[q] = take<S>(workspace, pairs_ * inputs_);
        for (int which = 0; which < 2; ++which) {
          const int64_t units = which ? H : Q_, ld = which ? ld_ : ldq_;
          s.start[which][q] = take<S>(workspace, N * units);
          s.before[which][q] = take<const S*>(workspace, pairs_);
          s.d[which][q] = take<S>(workspace, N * ld);
          s.d_start[which][q] = take<S>(workspace, N * ld);
        }
        s.x[q] = take<const S*>(workspace, pairs_);
        s.h_seen[q] = s.before[0][q];
        if (masks_) {
          s.seen[q] = take<S>(workspace, pairs_ * ldq_);
          s.h_seen[q] = take<const S*>(workspace, pairs_);
          for (int64_t r = 0; r < pairs_; ++r) s.h_seen[q][r] = s.seen[q] + r * ldq_;
          s.dh_seen[q] = take<S>(workspace, N * ldq_);
        }
        if (norm_) {
          for (int k = 0; k < 2; ++k) {
            s.apart[k] = take<S>(workspace, pairs_ * cell_.gates * H);
            s.apart_rows[k][q] = take<const S*>(workspace, pairs_);
            for (int64_t r = 0; r < pairs_; ++r) s.apart_rows[k][q][r] = s.apart[k] + r * cell_.gates * H;
          }
          s.c_hat = take<S>(workspace, pairs_ * ld_);
          s.dseen = take<S>(workspace, pairs_ * ld_);
        }
        if (problem_.variant.peepholes || norm_) s.c_new[q] = take<S>(workspace, pairs_ * ld_);
        if (proj_) {
          s.hr[q].data = take<S>(workspace, ld_ * Q_);
          s.dnew[q] = take<S>(workspace, pairs_ * ldq_);
          s.dnew_rows[q] = take<const S*>(workspace, pairs_);
          s.m[q] = take<S>(workspace, pairs_ * ld_);
          s.m_rows[q] = take<const S*>(workspace, pairs_);
          for (int64_t r = 0; r < pairs_; ++r)
            s.dnew_rows[q][r] = s.dnew[q] + r * ldq_, s.m_rows[q][r] = s.m[q] + r * ld_;
          s.dm[q] = take<S>(workspace, N * ld_);
        }
        s.da_rows[q] = take<const S*>(workspace, pairs_);
        for (int phase = 0; phase < kPhases; ++phase) s.da_h_rows[phase][q] = take<const S*>(workspace, pairs_);
        s.picked[q] = take<const S*>(workspace, 4 * pairs_);
        if (cell_.two_products) {
          s.rh[q] = take<S>(workspace, pairs_ * ld_);
          s.rh_rows[q] = take<const S*>(workspace, pairs_);
          s.drh[q] = take<S>(workspace, N * ld_);
        }
        for (int64_t r = 0; r < pairs_; ++r) {
          s.da_rows[q][r] = s.da[q] + r * ld_da_;
          s.da_h_rows[0][q][r] = s.da_rows[q][r] + (cell_.sums > cell_.gates ? H : 0);
          s.da_h_rows[1][q][r] = s.da_rows[q][r] + (cell_.gates - 1) * H;
          if (cell_.two_products) s.rh_rows[q][r] = s.rh[q] + r * ld_;
        }
        if (tape_.every) {
          s.z[q] = take<S>(workspace, pairs_ * ld_ * cell_.sums);
          s.kept[q] = take<S>(workspace, pairs_ * kept_ * H);
          s.c_kept[q] = take<S>(workspace, pairs_ * H);
        }
        for (int which = 0; which < 2 && (tape_.every || proj_); ++which)
          s.state[which][q] = take<S>(workspace, N * ld_);
      }
      s.sums = take<S>(workspace, all * widest);
    }
  }

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
  struct Scratch {
    ForwardWeights<S, P> forward;   // recompute: to rebuild the gates
    Panels<S> R[P][kPhases], W[P];  // for da R, da W
    S *da[P], *packed[P], *x_panels[P], *h_panels[P], *dx[P], *copied[P];
    S* start[2][P];              // h0, c0, rows of their units
    S *d[2][P], *d_start[2][P];  // running dh, dc; what reached h0, c0; rows of ldq_, ld_
    Panels<S> hr[P];             // a projection's weights; gradients of its results and of m, and m
    S *dnew[P] = {}, *dm[P] = {}, *m[P] = {};
    const S **dnew_rows[P] = {}, **m_rows[P] = {};
    S *rh[P] = {}, *drh[P] = {}, *sums;
    S *z[P] = {}, *kept[P] = {}, *c_kept[P] = {}, *state[2][P] = {};
    S *seen[P] = {}, *dh_seen[P] = {}, *c_new[P] = {};  // h as R sees it, rows of ldq_; its running gradient
    Context<S, P> context;
    Options<S, P> options;
    // Layer norm: gradients of x W^T and of h' R^T, rows of gates * H; norm(c)'s value before the gain, and gradient.
    Norms<S> norms;
    S *apart[2] = {}, *c_hat = nullptr, *dseen = nullptr;
    const S** apart_rows[2][P] = {};
    S* dz[P] = {};  // da of layer 0's products with x and the context, summed over the steps of each row
    const S** dz_rows[P] = {};
    int32_t* tokens = nullptr;
    S* columns = nullptr;  // dW of the tokens that occur, rows of gates * H
    const S **before[2][P], **h_seen[P], **x[P], **da_rows[P], **da_h_rows[kPhases][P], **rh_rows[P] = {}, **picked[P];
  };

  // One layer, direction and weight set, as seen by one team member.
  struct Part {
    const Team& team;
    Scratch& w;
    const Rows& rows;
    int l, d;
    int64_t set, ld;
    bool reversed;
    Source<S> source[P] = {};
    int64_t u0 = 0, u1 = 0;          // units owned, of the cell
    int64_t q0 = 0, q1 = 0;          // ... of h; the same without a projection
    int64_t o_first = 0, o_end = 0;  // blocks owned of hr's panels
    int64_t first = 0, end = 0;      // blocks owned of R's panels
    int64_t x_first = 0, x_end = 0;  // ... of W's
    bool fresh = true;               // nothing has been added into dW, dR, db yet
  };

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }

  static bool adds(const Array<2>& to) { return to.data && !to.stride[0]; }
  // Weight sets that write into the same memory must take turns.
  static bool adds_up(const Call& call) {
    const Sizes& n = call.problem->sizes;
    if (n.E <= 1) return false;
    const Arguments& dp = call.dp;
    if (dp.context.data && !dp.context.stride[0]) return true;
    for (const Array<3>& w : dp.context_weights)
      if (w.data && !w.stride[0]) return true;
    for (int i = 0; dp.extras && i < n.L * n.D; ++i)
      if (adds(dp.extras[i].ph) || adds(dp.extras[i].gain_ih) || adds(dp.extras[i].gain_hh) ||
          adds(dp.extras[i].gain_c) || adds(dp.extras[i].bias_c))
        return true;
    for (int i = 0; dp.extras && i < n.L * n.D; ++i)
      if (dp.extras[i].hr.data && !dp.extras[i].hr.stride[0]) return true;
    if ((dp.x.data && !dp.x.stride[1]) || (dp.h0.data && !dp.h0.stride[1]) || (dp.c0.data && !dp.c0.stride[1]))
      return true;
    for (int i = 0; dp.params && i < n.L * n.D; ++i) {
      const Params& w = dp.params[i];
      if ((w.W.data && !w.W.stride[0]) || (w.R.data && !w.R.stride[0]) || (w.bW.data && !w.bW.stride[0]) ||
          (w.bR.data && !w.bR.stride[0]))
        return true;
    }
    return false;
  }

  bool wants_dx(int l) const { return l > 0 || dp_.x.data; }
  bool dx_adds_up() const { return n_.E > 1 && !dp_.x.stride[1]; }

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

  // ---- before the first chunk ----

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
    w.forward.pack(a.team, cell_, p, e, inputs, H, Q_, a.rows.total, pairs_,
                   a.source[0].token ? &vocabulary_.of[a.set] : nullptr);
  }

  static void shape(Panels<S>& w, int64_t K, int64_t columns, int threads) {
    w.K = K;
    w.units = columns;
    w.block = block_tiles(1, w.tiles(), threads);
  }

  void begin(Part& a) {
    if (problem_.variant.given) {
      if (a.team.rank == 0 && norm_)
        a.w.norms.begin(p_[0]->params[a.ld], p_[0]->extras[a.ld], sets_.count == 1 ? 0 : a.set);
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
  // The units of h (which = 0) or c (1) in a member's hands.
  struct Units {
    int64_t begin, end, all, ld;
    int64_t pad() const { return end > begin && end == all ? ld : end; }
  };
  template <class M>  // a Part or a Share
  Units units(int which, const M& mine) const {
    return which ? Units{mine.u0, mine.u1, n_.H, ld_} : Units{mine.q0, mine.q1, Q_, ldq_};
  }

  // dhn (which = 0) or dcn (1) of row i, added.
  void last_gradient(const Part& a, int which, int q, int64_t i, int64_t u0, int64_t u1, S* to) const {
    const Array<4>& g = which ? g_[q]->cn : g_[q]->hn;
    if (g.data) add_row(element<S>(g, a.ld, a.rows.e[i], a.rows.b[i], u0), g.stride[3], to + u0, 1, u1 - u0);
  }

  // ---- a chunk ----

  const S* tape(const Part& a, int q) const { return layers_.plane(q, a.l, a.d, a.set); }

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
    const int64_t H = n_.H, pairs = rows.off[s1] - rows.off[s0];
    const int64_t first = a.team.begin(w.forward.blocks()), end = a.team.end(w.forward.blocks());
    const S* const* x[P];
    for (int q = 0; q < P; ++q) x[q] = a.source[q].given() ? w.x[q] : nullptr;
    for (int phase = 0; phase < w.forward.phases; ++phase) {
      const bool gate = cell_.two_products && phase == 0;
      const S* const* h[P];
      for (int q = 0; q < P; ++q) h[q] = phase ? w.rh_rows[q] : w.h_seen[q];
      for (int64_t b = first; b < end; ++b) {
        if (phase == 0 && a.source[0].token)
          w.forward.token_product(cell_, b, w.tokens, pairs, w.z);
        else if (phase == 0)
          w.forward.input_product(cell_, b, x, pairs, w.z);
        if (phase == 0 && context(a)) w.context.add(w.forward, cell_, b, rows, s0, s1, w.z);
        w.forward.state_product(phase, b, h, pairs, w.z);
        const int64_t u0 = w.forward.unit(b), units = w.forward.unit(b + 1) - u0;
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t pair = rows.off[s] - rows.off[s0];
          ForwardTile<S, P> t{};
          t.rows = rows.live[s];
          t.units = units;
          t.ldz = w.forward.ldz;
          t.ld = ld_;
          t.H = H;
          t.ld_kept = kept_ * H;
          if (problem_.variant.given) t.options = &w.options;
          t.step = s, t.unit = u0;
          t.clip = clip_cell();
          for (int q = 0; q < P; ++q) {
            for (int64_t i = 0; i < t.rows; ++i)
              for (int which = proj_; which < 1 + carried_; ++which)
                copy_row(w.before[which][q][pair + i] + u0, 1, w.state[which][q] + i * ld_ + u0, 1, units);
            t.z[q] = w.z[q] + pair * t.ldz + u0 * cell_.sums;
            t.h_prev[q] = w.state[proj_][q] + u0;
            t.h_seen[q] = masks_ && !proj_ ? w.seen[q] + pair * ld_ + u0 : t.h_prev[q];
            t.h[q] = w.state[0][q] + u0;
            t.c[q] = w.state[1][q] + u0;
            t.rh[q] = cell_.two_products ? w.rh[q] + pair * ld_ + u0 : nullptr;
            t.kept[q] = w.kept[q] + pair * t.ld_kept + u0;
            t.c_kept[q] = w.c_kept[q] + pair * H + u0;
          }
          gate ? tile_.gate(t) : tile_.forward(t);
          if (carried_ && !cell_.cell_state) carry(w, s, pair, t.rows, u0, u0 + units);
        }
      }
      if (gate) a.team.wait();
    }
    a.team.wait();  // units are owned in other blocks from here on
  }
  // What a projected GRU carries on after step s, rows of a chunk from `pair` on: from what it was, and the new m.
  void carry(Scratch& w, int64_t s, int64_t pair, int64_t count, int64_t u0, int64_t u1) const {
    for (int64_t i = 0; i < count; ++i) {
      S *fresh[P], *c[P];
      for (int q = 0; q < P; ++q) fresh[q] = w.state[0][q] + i * ld_, c[q] = w.state[1][q] + i * ld_;
      if (problem_.variant.zoneout_c > 0) zone_row(w.options, 1, s, i, u0, u1, fresh, c);
      for (int q = 0; q < P; ++q)
        copy_row((problem_.variant.zoneout_c > 0 ? c[q] : fresh[q]) + u0, 1, w.c_kept[q] + (pair + i) * n_.H + u0, 1,
                 u1 - u0);
    }
  }
  S clip_cell() const {
    return problem_.clip_cell > 0 ? static_cast<S>(problem_.clip_cell) : static_cast<S>(__builtin_inf());
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
    const int64_t N = sets_.N, H = n_.H, r0 = mine.r0, u0 = mine.u0;
    const int64_t pair = rows.off[s] + r0, first = rows.off[s] - rows.off[s0], in_chunk = first + r0;
    arriving(a, s, mine);
    if (proj_) {
      zone_outputs(a, s, first, mine);
      if (!alone) a.team.wait();
      unproject(a, first, columns, part);
      if (norm_ && !alone) a.team.wait();
      if (!cell_.cell_state) take_carried(a, s, mine);
    }
    BackwardTile<S, P> t{};
    t.rows = mine.r1 - r0;
    t.units = mine.u1 - u0;
    t.ld_kept = kept_ * H;
    if (problem_.variant.given) t.options = &w.options;
    t.step = s, t.row = r0;
    t.H = H;
    t.unit = u0;
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
        t.c_hat[q] = w.c_hat + in_chunk * ld_;
        t.dseen[q] = w.dseen + in_chunk * ld_;
        t.numbers = const_cast<S*>(data) + tape_.numbers_offset(N) + pair * 4;
      }
      t.m[q] = proj_ ? w.m[q] + in_chunk * ld_ + u0 : nullptr;
      t.c_new[q] = w.c_new[q] ? w.c_new[q] + in_chunk * ld_ + u0 : nullptr;
      t.c_prev[q] = w.before[1][q] + in_chunk;
      t.dh[q] = (proj_ ? w.dm[q] : w.d[0][q]) + r0 * ld_ + u0;
      t.dc[q] = w.d[1][q] + r0 * ld_ + u0;
      t.da[q] = w.da[q] + in_chunk * ld_da_ + u0;
      if (cell_.two_products) {
        t.drh[q] = w.drh[q] + r0 * ld_ + u0;
        t.rh[q] = w.rh[q] + in_chunk * ld_ + u0;
      }
      t.dh_seen[q] = masks_ && !proj_ ? w.dh_seen[q] + r0 * ld_ + u0 : t.dh[q];
      for (int64_t i = columns.r0; masks_ && i < columns.r1; ++i)
        zero_row(w.dh_seen[q] + i * ldq_ + columns.q0, 1, units(0, columns).pad() - columns.q0);
    }
    if (t.units > 0) tile_.backward(t);
    if (carried_ && !cell_.cell_state)
      for (int q = 0; q < P; ++q)
        for (int64_t i = r0; i < mine.r1; ++i)
          add_row(w.dm[q] + i * ld_ + u0, 1, w.d[1][q] + i * ld_ + u0, 1, mine.u1 - u0);
    if (norm_) norm_back(a, pair, in_chunk, mine);
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

  // From dh to the gradient of the projection's results: zoneout's part stays.
  void zone_outputs(Part& a, int64_t s, int64_t first, const Share& mine) {
    Scratch& w = a.w;
    for (int64_t i = mine.r0; i < mine.r1; ++i) {
      S *dh[P], *fresh[P];
      for (int q = 0; q < P; ++q) dh[q] = w.d[0][q] + i * ldq_, fresh[q] = w.dnew[q] + (first + i) * ldq_;
      if (problem_.variant.zoneout_h > 0) {
        zone_row_back(w.options, 0, s, i, mine.q0, mine.q1, dh, fresh);
        continue;
      }
      for (int q = 0; q < P; ++q) {
        copy_row(dh[q] + mine.q0, 1, fresh[q] + mine.q0, 1, mine.q1 - mine.q0);
        zero_row(dh[q] + mine.q0, 1, mine.q1 - mine.q0);
      }
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
      if (problem_.variant.zoneout_c > 0) zone_row_back(w.options, 1, s, i, mine.u0, mine.u1, dc, fresh);
      for (int q = 0; q < P; ++q) {
        const bool zoned = problem_.variant.zoneout_c > 0;
        add_row((zoned ? fresh[q] : dc[q]) + mine.u0, 1, w.dm[q] + i * ld_ + mine.u0, 1, mine.u1 - mine.u0);
        if (!zoned) zero_row(dc[q] + mine.u0, 1, mine.u1 - mine.u0);
      }
    }
  }
  // Gradients of x W^T and h' R^T from those of the sums, a row at a time.
  void norm_back(Part& a, int64_t pair, int64_t in_chunk, const Share& mine) {
    Scratch& w = a.w;
    const int64_t H = n_.H, GH = cell_.gates * H;
    const S* data = tape(a, 0);
    for (int64_t r = 0; r < mine.r1 - mine.r0; ++r) {
      const S *da = w.da[0] + (in_chunk + r) * ld_da_, *numbers = data + tape_.numbers_offset(sets_.N) + (pair + r) * 4;
      for (int k = 0; k < 2; ++k) {
        S* to = w.apart[k] + (in_chunk + r) * GH;
        for (int g = 0; g < cell_.gates; ++g) copy_row(da + da_column(k, g), 1, to + g * H, 1, H);
        const S* hat = data + tape_.hat_offset(sets_.N, k) + (pair + r) * GH;
        Norms<S>::back(to, w.norms.gain[k], hat, numbers[k], GH, to);
      }
    }
  }
  // Where the sum of gate g with x (k = 0) or h' (1) lies in da.
  int64_t da_column(int k, int g) const {
    return place_of(cell_.sums, cell_.gates, k ? cell_.h_sum[g] : cell_.x_sum[g]) * n_.H;
  }
  bool has_hr(const Part& a, int q) const { return proj_ && p_[q]->extras && p_[q]->extras[a.ld].hr.data; }

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
  bool has_R(const Part& a, int q) const { return p_[q]->params && p_[q]->params[a.ld].R.data; }
  bool has_W(const Part& a, int q) const { return p_[q]->params && p_[q]->params[a.ld].W.data; }

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

  // ---- the time-batched products ----

  // Columns of da and the rows of W and R that they belong to; -1: none.
  struct Segment {
    int64_t column, count, w_row, r_row;
    bool reset;  // multiplies r h' instead of h'
  };
  int segments(Segment* s) const {
    const int64_t H = n_.H;
    if (cell_.sums > cell_.gates) {  // n of x | r, z | n of h
      s[0] = {0, H, 2 * H, -1, false};
      s[1] = {H, 2 * H, 0, 0, false};
      s[2] = {3 * H, H, -1, 2 * H, false};
      return 3;
    }
    const int64_t first = (cell_.two_products ? cell_.gates - 1 : cell_.gates) * H, all = cell_.gates * H;
    s[0] = {0, first, 0, 0, false};
    s[1] = {first, all - first, first, first, true};
    return cell_.two_products ? 2 : 1;
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

  // Of a matrix: left^T right over all pairs of the chunk. `panels`: room for right.
  void matrix_gradient(Part& a, const Array<3>& to, int64_t M, const S* const* const* left, int64_t columns,
                       const S* const* const* right, S* const* panels, int64_t pairs) {
    if (!to.data) return;
    Scratch& w = a.w;
    a.team.wait();  // everyone has done with what was in this room
    for (int q = 0; q < P; ++q) pack_panels(a.team, right[q], pairs, columns, panels[q]);
    a.team.wait();
    const int64_t tiles = (M + kTile - 1) / kTile;
    const int64_t m0 = a.team.begin(tiles) * kTile, m1 = smaller(a.team.end(tiles) * kTile, M);
    if (m1 <= m0) return;
    S* packed[P];
    for (int q = 0; q < P; ++q) {
      packed[q] = w.packed[q] + m0 * pairs_;
      pack_columns(left[q], pairs, m0, m1 - m0, packed[q]);
    }
    gradient(a, to, a.set, 0, m0, m1, columns, pairs, packed, panels, true, true);
  }
  // With layer norm: W's and R's from the gradients of the products, biases' and gains' from those of the sums.
  void normed_gradients(Part& a, const Params& dp, int64_t s0, int64_t pairs, const S* const* const* x,
                        const S* const* const* h) {
    Scratch& w = a.w;
    const int64_t GH = cell_.gates * n_.H, pair0 = a.rows.off[s0];
    const S *const *left[2][P], *const *da[P];
    for (int q = 0; q < P; ++q) left[0][q] = w.apart_rows[0][q], left[1][q] = w.apart_rows[1][q], da[q] = w.da_rows[q];
    matrix_gradient(a, dp.W, GH, left[0], a.source[0].width, x, w.x_panels, pairs);
    matrix_gradient(a, dp.R, GH, left[1], Q_, h, w.h_panels, pairs);
    Params biases;
    biases.bW = dp.bW, biases.bR = dp.bR;
    weight_gradients(a, biases, a.set, pairs, a.source[0].width, da, x, h, h);
    if (!dp_.extras) return;
    const Extras& to = dp_.extras[a.ld];
    const S* data = tape(a, 0);
    for (int k = 0; k < 2; ++k) {
      const S* hat = data + tape_.hat_offset(sets_.N, k) + pair0 * GH;
      for (int g = 0; g < cell_.gates; ++g)
        sum_of_products(a, k ? to.gain_hh : to.gain_ih, g * n_.H, w.da[0] + da_column(k, g), ld_da_, hat + g * n_.H, GH,
                        pairs);
    }
    sum_of_products(a, to.gain_c, 0, w.dseen, ld_, w.c_hat, ld_, pairs);
    sum_of_products(a, to.bias_c, 0, w.dseen, ld_, nullptr, 0, pairs);
  }
  // to[place + u] of the units owned: the sum over all pairs of left[u] right[u], or of left[u].
  void sum_of_products(Part& a, const Array<2>& to, int64_t place, const S* left, int64_t ld_left, const S* right,
                       int64_t ld_right, int64_t pairs) {
    if (!to.data) return;
    const bool add = !a.fresh || (to.stride[0] == 0 && a.set > 0);
    for (int64_t u = a.u0; u < a.u1; u += L) {
      const int64_t n = smaller<int64_t>(L, a.u1 - u);
      Vec<S> sum(S(0));
      for (int64_t r = 0; r < pairs; ++r) {
        const Vec<S> d = load(left + r * ld_left + u, n);
        sum = sum + (right ? d * load(right + r * ld_right + u, n) : d);
      }
      for (int64_t j = 0; j < n; ++j) {
        S& at = *element<S>(to, a.set, place + u + j);
        at = add ? at + sum.v[j] : sum.v[j];
      }
    }
  }

  // Of the units owned: the sum over all pairs of da times the c that the gate saw.
  void peephole_gradient(Part& a, const Array<2>& to, int64_t pairs) {
    using Pl = Planes<S, P>;
    const Options<S, P>& options = a.w.options;
    const bool add = !a.fresh || (to.stride[0] == 0 && a.set > 0);
    for (int k = 0; k < Options<S, P>::kPeeps; ++k) {
      if (options.peep_place(k) < 0) continue;
      const int64_t column = options.peep_gate(k) * n_.H;
      for (int64_t u = a.u0; u < a.u1; u += L) {
        const int64_t n = smaller<int64_t>(L, a.u1 - u);
        typename Pl::Number sum(S(0));
        for (int64_t r = 0; r < pairs; ++r) {
          const S *da[P], *c[P];
          for (int q = 0; q < P; ++q) {
            da[q] = a.w.da_rows[q][r] + column;
            c[q] = k == 2 ? a.w.c_new[q] + r * ld_ : a.w.before[1][q][r];
          }
          sum = sum + Pl::read(da, u, n) * Pl::read(c, u, n);
        }
        S values[P][L], *planes[P];
        for (int q = 0; q < P; ++q) planes[q] = values[q];
        Pl::write(planes, 0, sum, L);
        for (int64_t j = 0; j < n; ++j) {
          S& at = *element<S>(to, a.set, options.peep_place(k) * n_.H + u + j);
          at = add ? at + values[P - 1][j] : values[P - 1][j];
        }
      }
    }
  }
  static bool all_shared(const Params& p) {
    return !((p.W.data && p.W.stride[0]) || (p.R.data && p.R.stride[0]) || (p.bW.data && p.bW.stride[0]) ||
             (p.bR.data && p.bR.stride[0]));
  }

  void weight_gradients(Part& a, const Params& dp, int64_t e, int64_t R, int64_t inputs, const S* const* const* da,
                        const S* const* const* x, const S* const* const* h, const S* const* const* rh) {
    Scratch& w = a.w;
    Segment segment[3];
    const int count = segments(segment);
    for (int q = 0; q < P; ++q) {
      if (dp.W.data && x[q]) pack_panels(a.team, x[q], R, inputs, w.x_panels[q]);
      if (dp.R.data) pack_panels(a.team, h[q], R, Q_, w.h_panels[q]);
    }
    a.team.wait();
    for (int i = 0; i < count; ++i) {
      const Segment& s = segment[i];
      const int64_t tiles = (s.count + kTile - 1) / kTile;
      const int64_t m0 = a.team.begin(tiles) * kTile, m1 = smaller(a.team.end(tiles) * kTile, s.count);
      if (s.reset && dp.R.data) {  // r h' takes the place of h'; everyone has done with it
        a.team.wait();
        for (int q = 0; q < P; ++q) pack_panels(a.team, rh[q], R, n_.H, w.h_panels[q]);
        a.team.wait();
      }
      if (m1 > m0) {
        S* packed[P];
        for (int q = 0; q < P; ++q) {
          packed[q] = w.packed[q] + (s.column + kTile * i + m0) * pairs_;
          pack_columns(da[q], R, s.column + m0, m1 - m0, packed[q]);
        }
        if (dp.W.data && s.w_row >= 0 && x[0])  // tokens: see token_gradient
          gradient(a, dp.W, e, s.w_row, m0, m1, inputs, R, packed, w.x_panels, x[0] != nullptr, P == 2 && x[P - 1]);
        if (dp.R.data && s.r_row >= 0) gradient(a, dp.R, e, s.r_row, m0, m1, Q_, R, packed, w.h_panels, true, true);
      }
      bias_gradient(a, dp, e, s, a.team.begin(tiles) * kTile, m1, R, da[P - 1]);
    }
    a.team.wait();
  }

  void pack_panels(const Team& team, const S* const* rows, int64_t R, int64_t columns, S* out) const {
    const int64_t width = kWidest * L, panels = (columns + width - 1) / width;
    for (int64_t panel = team.begin(panels); panel < team.end(panels); ++panel) {
      const int64_t column = panel * width, valid = smaller(width, columns - column);
      pack_panel(rows, R, column, valid, static_cast<int>((valid + L - 1) / L), out + column * R);
    }
  }

  // Rows [row + m0, row + m1) of a gradient of `columns` columns: A^T B. Added into what is there unless it is the
  // first.
  void gradient(const Part& a, const Array<3>& to, int64_t e, int64_t row, int64_t m0, int64_t m1, int64_t columns,
                int64_t R, S* const* packed, S* const* panels, bool value, bool tangent) {
    const bool add = !a.fresh || (to.stride[0] == 0 && e > 0);
    const bool straight = to.stride[2] == 1;
    // Memory with other strides gets a copy: `sums` is the place to add up, a row of it always the same member's.
    const int64_t ld = straight ? to.stride[1] : padded(larger(inputs_, larger(n_.H, Q_)));
    S* base = straight ? element<S>(to, e, row + m0) : a.w.sums + (row + m0) * ld;
    if (!straight && add)
      for (int64_t m = m0; m < m1; ++m)
        copy_row(element<S>(to, e, row + m), to.stride[2], base + (m - m0) * ld, 1, columns);
    const int64_t width = kWidest * L;
    for (int64_t column = 0; column < columns; column += width) {
      const int64_t valid = smaller(width, columns - column);
      const int nv = static_cast<int>((valid + L - 1) / L);
      Tile<S> t{};
      t.ldb = nv * L;
      t.K = R;
      t.ldi = t.ldc = ld;
      t.last = valid - (nv - 1) * L;
      for (int j = 0; j < nv; ++j) t.offset[j] = j * L;
      for (int64_t m = m0; m < m1; m += kTile) {
        S* const c = base + (m - m0) * ld + column;
        const int64_t rows = smaller<int64_t>(kTile, m1 - m);
        for (int64_t i = kTile; i < smaller<int64_t>(2 * kTile, m1 - m); ++i)  // the next tile's place
          for (int64_t j = 0; j < valid; j += 64 / int64_t{sizeof(S)}) __builtin_prefetch(c + i * ld + j, 1);
        bool begun = add;
        auto product = [&](int qa, int qb) {
          t.b = panels[qb] + column * R;
          // A tile has at most as many rows as registers allow.
          for (int64_t i = 0; i < rows; i += rows_of(nv)) {
            t.packed = packed[qa] + (m - m0) * R + i;
            t.c = c + i * ld;
            t.init = begun ? t.c : nullptr;
            run_tile<S, true>(t, static_cast<int>(smaller<int64_t>(rows_of(nv), rows - i)), nv);
          }
          begun = true;
        };
        if (P == 1) {
          product(0, 0);
        } else {
          if (value) product(P - 1, 0);
          if (tangent) product(0, P - 1);
          if (!begun)
            for (int64_t i = m; i < smaller(m + kTile, m1); ++i) zero_row(base + (i - m0) * ld + column, 1, valid);
        }
      }
    }
    if (!straight)
      for (int64_t m = m0; m < m1; ++m)
        copy_row(base + (m - m0) * ld, 1, element<S>(to, e, row + m), to.stride[2], columns);
  }

  void bias_gradient(const Part& a, const Params& dp, int64_t e, const Segment& s, int64_t m0, int64_t m1, int64_t R,
                     const S* const* da) {
    if (!dp.bW.data && !dp.bR.data) return;
    constexpr int Wide = 4;  // registers at a time: rows are far apart
    for (int64_t m = m0; m < m1; m += Wide * L) {
      Vec<S> sum[Wide];
      int64_t n[Wide];
      for (int k = 0; k < Wide; ++k) {
        sum[k] = Vec<S>(S(0));
        n[k] = smaller<int64_t>(L, m1 - m - k * L);
      }
      if (n[Wide - 1] > 0) {
        for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int k = 0; k < Wide; ++k) sum[k] = sum[k] + load(da[r] + s.column + m + k * L, k < Wide - 1 ? L : n[k]);
      } else {
        for (int64_t r = 0; r < R; ++r)
          for (int k = 0; k < Wide && n[k] > 0; ++k) sum[k] = sum[k] + load(da[r] + s.column + m + k * L, n[k]);
      }
      for (int k = 0; k < Wide; ++k) {
        for (int64_t j = 0; j < n[k]; ++j) {
          const int64_t at = m + k * L + j;
          if (dp.bW.data && s.w_row >= 0) write_bias(a, dp.bW, e, s.w_row + at, sum[k].v[j]);
          if (dp.bR.data && s.r_row >= 0) write_bias(a, dp.bR, e, s.r_row + at, sum[k].v[j]);
        }
      }
    }
  }
  void write_bias(const Part& a, const Array<2>& to, int64_t e, int64_t m, S sum) const {
    S& at = *element<S>(to, e, m);
    at = !a.fresh || (to.stride[0] == 0 && e > 0) ? at + sum : sum;
  }

  // dx of the columns owned: to the user, or to the layer below.
  void input_gradient(Part& a, int64_t s0, int64_t s1) {
    Scratch& w = a.w;
    const Rows& rows = a.rows;
    const int64_t pair0 = rows.off[s0], pairs = rows.off[s1] - pair0, ld = padded(a.source[0].width);
    const int64_t c0 = smaller(a.x_first * w.W[0].block * L, a.source[0].width);
    const int64_t c1 = smaller(a.x_end * w.W[0].block * L, a.source[0].width);
    const S* const* da[P];
    for (int q = 0; q < P; ++q) da[q] = norm_ ? w.apart_rows[0][q] : w.da_rows[q];
    for (int64_t b = a.x_first; b < a.x_end; ++b) {
      if (P == 1 || a.l > 0) multiply(w.W[0], b, da[0], pairs, static_cast<S*>(nullptr), 0, w.dx[0], ld);
      if constexpr (P == 2) {
        multiply(w.W[0], b, da[1], pairs, static_cast<S*>(nullptr), 0, w.dx[1], ld);
        if (has_W(a, 1)) multiply(w.W[1], b, da[0], pairs, w.dx[1], ld, w.dx[1], ld);
      }
    }
    if (c1 <= c0) return;
    for (int64_t s = s0; s < s1; ++s) {
      for (int64_t i = 0; i < rows.live[s]; ++i) {
        const int64_t r = rows.off[s] - pair0 + i, t = rows.time(a.reversed, s, i);
        if (a.l == 0) {
          S* to = element<S>(dp_.x, rows.place(t), rows.e[i], rows.b[i], c0);
          const S* from = w.dx[P - 1] + r * ld + c0;
          if (a.d == 0 && !dx_adds_up())
            copy_row(from, 1, to, dp_.x.stride[3], c1 - c0);
          else
            add_row(from, 1, to, dp_.x.stride[3], c1 - c0);
          continue;
        }
        for (int q = 0; q < P; ++q) {
          S* from = w.dx[q] + r * ld;
          if (problem_.dropout > 0) {
            const uint64_t row = static_cast<uint64_t>((t * n_.E + rows.e[i]) * n_.B + rows.b[i]);
            Dropout{problem_.dropout, problem_.seed}.apply(from + c0, c1 - c0,
                                                           row * static_cast<uint64_t>(n_.D * Q_) + c0, a.l - 1);
          }
          for (int d = 0; d < n_.D; ++d) {
            const int64_t low = larger(c0, d * Q_), high = smaller(c1, (d + 1) * Q_);
            if (high <= low) continue;
            const int64_t walk = n_.D == 1 ? s : rows.time(d == 1, t, i);
            S* to = dplane(q, a.l - 1, d, a.set) + (rows.off[walk] + i) * Q_ + low - d * Q_;
            if (a.d == 0)
              copy_row(from + low, 1, to, 1, high - low);
            else
              add_row(from + low, 1, to, 1, high - low);
          }
        }
      }
    }
  }

  S* dplane(int q, int l, int d, int64_t set) const {
    return between_[l & 1][q] + (set * n_.D + d) * n_.T * sets_.N * Q_;
  }

  // dx where no step writes it, or where all weight sets add into it.
  void zero_dx(const Team& part, int group, int groups) {
    if (!dp_.x.data || problem_.packed) return;
    for (int64_t set = group; set < sets_.count; set += groups) {
      const Rows& rows = sets_.rows[set];
      for (int64_t i = part.begin(sets_.N); i < part.end(sets_.N); ++i)
        for (int64_t t = dx_adds_up() ? 0 : rows.length[i]; t < n_.T; ++t)
          zero_row(element<S>(dp_.x, t, rows.e[i], rows.b[i]), dp_.x.stride[3], n_.I);
    }
    part.wait();
  }

  // ---- after the last chunk ----

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

  // ---- the context ----

  bool context(const Part& a) const { return a.l == 0 && p_[0]->context.data; }
  int64_t sum_begin(const Part& a) const { return smaller(a.team.begin(x_tiles()) * L, cell_.gates * n_.H); }
  int64_t sum_end(const Part& a) const { return smaller(a.team.end(x_tiles()) * L, cell_.gates * n_.H); }
  int64_t x_tiles() const { return (cell_.gates * n_.H + L - 1) / L; }

  void begin_context(Part& a) {
    Scratch& w = a.w;
    const int64_t m0 = sum_begin(a), m1 = sum_end(a);
    for (int q = 0; q < P; ++q)
      for (int64_t i = 0; i < sets_.N; ++i)
        zero_row(w.dz[q] + i * cell_.gates * n_.H + m0, 1, larger<int64_t>(m1 - m0, 0));
    w.context.fill(a.team, p_, a.rows, n_.K);
    a.team.wait();
    if (tape_.every)
      w.context.multiply_all(w.forward, cell_, p_, a.d, sets_.count == 1 ? 0 : a.set, n_.H, n_.K, sets_.N,
                             a.team.begin(w.forward.blocks()), a.team.end(w.forward.blocks()));
  }

  void sum_steps(Part& a, int64_t s0, int64_t s1) {
    const int64_t m0 = sum_begin(a), m1 = sum_end(a);
    if (m1 <= m0) return;
    for (int q = 0; q < P; ++q)
      for (int64_t s = s0; s < s1; ++s)
        for (int64_t i = 0; i < a.rows.live[s]; ++i)
          add_row(a.w.da_rows[q][a.rows.off[s] - a.rows.off[s0] + i] + m0, 1, a.w.dz[q] + i * cell_.gates * n_.H + m0,
                  1, m1 - m0);
  }

  // Of the context and its weights: dz is what one step of the layer would have for da.
  void context_gradient(Part& a) {
    Scratch& w = a.w;
    const Rows& rows = a.rows;
    const S *const *dz[P], *const *ctx[P];
    for (int q = 0; q < P; ++q) dz[q] = w.dz_rows[q], ctx[q] = w.context.given[q] ? w.context.rows[q] : nullptr;
    Params dp;
    dp.W = dp_.context_weights[a.d];
    Part first = a;
    first.fresh = true;
    if (dp.W.data && sets_.count == 1 && n_.E > 1 && dp.W.stride[0]) {
      for (int64_t e = 0; e < n_.E; ++e) {
        int64_t count = 0;
        for (int64_t i = 0; i < sets_.N; ++i) {
          if (rows.e[i] != e) continue;
          for (int q = 0; q < P && a.team.rank == 0; ++q) {
            w.picked[q][count] = dz[q][i];
            w.picked[q][pairs_ + count] = ctx[q] ? ctx[q][i] : nullptr;
          }
          ++count;
        }
        const S *const *dz_e[P], *const *ctx_e[P];
        for (int q = 0; q < P; ++q) dz_e[q] = w.picked[q], ctx_e[q] = ctx[q] ? w.picked[q] + pairs_ : nullptr;
        a.team.wait();
        weight_gradients(first, dp, e, count, n_.K, dz_e, ctx_e, nullptr, nullptr);
      }
    } else if (dp.W.data) {
      weight_gradients(first, dp, sets_.count == 1 ? 0 : a.set, sets_.N, n_.K, dz, ctx, nullptr, nullptr);
    }
    if (!dp_.context.data) return;
    static constexpr int in_order[4] = {0, 1, 2, 3}, n_first[3] = {2, 0, 1};
    const int64_t ld = padded(n_.K), e = sets_.count == 1 ? 0 : a.set;
    for (int q = 0; q < P; ++q) shape(w.W[q], cell_.gates * n_.H, n_.K, a.team.size);
    a.team.wait();
    const Panels<S>& first_W = w.W[0];
    const int64_t b0 = a.team.begin(first_W.blocks()), b1 = a.team.end(first_W.blocks());
    for (int64_t b = b0; b < b1; ++b) {
      for (int q = 0; q < P; ++q) {
        const Array<3>& m = p_[q]->context_weights[a.d];
        if (m.data)
          pack_rows(w.W[q], b, element<S>(m, e), m.stride[1], m.stride[2], n_.H, cell_.gates,
                    cell_.sums > cell_.gates ? n_first : in_order);
      }
      multiply(w.W[0], b, dz[P - 1], sets_.N, static_cast<S*>(nullptr), 0, w.dx[P - 1], ld);
      if constexpr (P == 2)
        if (p_[1]->context_weights[a.d].data) multiply(w.W[1], b, dz[0], sets_.N, w.dx[1], ld, w.dx[1], ld);
    }
    const int64_t c0 = smaller(b0 * first_W.block * L, n_.K), c1 = smaller(b1 * first_W.block * L, n_.K);
    for (int64_t i = 0; i < sets_.N && c1 > c0; ++i) {
      const S* from = w.dx[P - 1] + i * ld + c0;
      S* to = element<S>(dp_.context, rows.e[i], rows.b[i], c0);
      if (a.d == 0 && !dcontext_adds_up())
        copy_row(from, 1, to, dp_.context.stride[2], c1 - c0);
      else
        add_row(from, 1, to, dp_.context.stride[2], c1 - c0);
    }
    a.team.wait();
  }

  bool dcontext_adds_up() const { return n_.E > 1 && !dp_.context.stride[0]; }
  void zero_dcontext(const Team& team) const {
    if (!dp_.context.data || !dcontext_adds_up()) return;
    for (int64_t b = team.begin(n_.B); b < team.end(n_.B); ++b)
      zero_row(element<S>(dp_.context, 0, b), dp_.context.stride[2], n_.K);
    team.wait();
  }

  // ---- tokens: dW has columns only for those that occur. They are added up together, then written. ----

  // Shared weights have a gradient for each e.
  static bool split(const Call& call, const Sets& sets) {
    bool found = false;
    for (int d = 0; call.dp.params && d < call.problem->sizes.D; ++d)
      found = found || (call.dp.params[d].W.data && call.dp.params[d].W.stride[0]);
    return found && sets.count == 1 && call.problem->sizes.E > 1;
  }

  // da of a chunk into the columns of its tokens, pair by pair, each thread its own gate rows.
  void token_gradient(Part& a, int64_t s0, int64_t s1) {
    const Rows& rows = a.rows;
    const int64_t width = cell_.gates * n_.H, tiles = (width + L - 1) / L;
    const int64_t m0 = smaller(a.team.begin(tiles) * L, width), m1 = smaller(a.team.end(tiles) * L, width);
    if (m1 <= m0) return;
    if (a.fresh)
      for (int64_t kind = 0; kind < table_.of[a.set].count; ++kind)
        zero_row(a.w.columns + kind * width + m0, 1, m1 - m0);
    for (int64_t s = s0; s < s1; ++s)
      for (int64_t i = 0; i < rows.live[s]; ++i) {
        const int64_t r = rows.off[s] - rows.off[s0] + i;
        const int64_t kind = table_.of[a.set].place[a.w.tokens[r] + (table_.split ? rows.e[i] * n_.I : 0)];
        add_row(a.w.da_rows[P - 1][r] + m0, 1, a.w.columns + kind * width + m0, 1, m1 - m0);
      }
  }

  void write_columns(const Part& a, const Array<3>& to) const {
    const int64_t width = cell_.gates * n_.H, tiles = (width + L - 1) / L, e_first = sets_.count == 1 ? 0 : a.set;
    const int64_t m0 = smaller(a.team.begin(tiles) * L, width), m1 = smaller(a.team.end(tiles) * L, width);
    const bool adds = e_first > 0 && to.stride[0] == 0;
    Segment segment[3];
    const int segment_count = segments(segment);
    for (int64_t m = m0; m < m1; m += L) {
      int64_t row[L] = {};  // of W, for each column of da
      const int64_t n = smaller<int64_t>(L, m1 - m);
      for (int64_t j = 0; j < n; ++j)
        for (int k = 0; k < segment_count; ++k)
          if (segment[k].w_row >= 0 && m + j >= segment[k].column && m + j < segment[k].column + segment[k].count)
            row[j] = segment[k].w_row + m + j - segment[k].column;
      for (int64_t e = e_first; !adds && e < (sets_.count == 1 && to.stride[0] ? n_.E : e_first + 1); ++e)
        for (int64_t j = 0; j < n; ++j) zero_row(element<S>(to, e, row[j]), to.stride[2], n_.I);
      for (int64_t kind = 0; kind < table_.of[a.set].count; ++kind) {
        const int64_t key = table_.of[a.set].kinds[kind];
        const int64_t e = table_.split ? key / n_.I : e_first, token = table_.split ? key % n_.I : key;
        for (int64_t j = 0; j < n; ++j) *element<S>(to, e, row[j], token) += a.w.columns[kind * width + m + j];
      }
    }
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

  const Problem& problem_;
  const Sizes& n_;
  const CellTable<S, P>& cell_;
  const TileFunctions<S, P>& tile_;
  const int kept_;
  const bool masks_;
  const Arguments* p_[P];
  const Results* g_[P];
  const Arguments& dp_;
  const Sets& sets_;
  const Layers<S, P>& layers_;
  const Tape& tape_;
  Groups groups_;
  Vocabulary table_, vocabulary_;  // of dW; of recompute's products
  S* between_[2][P] = {};
  S* zeros_;
  Scratch* scratch_;
  int64_t inputs_, Q_, ld_, ldq_, ld_da_, chunk_, pairs_;  // Q: units of h; rows of H, of Q
  bool norm_, proj_, carried_;                             // carried: there is a c, or what a projected GRU carries on
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
