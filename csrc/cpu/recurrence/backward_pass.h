// SPDX-License-Identifier: Apache-2.0
// What all of backward's rooms share: the call, its memory (Scratch), and what one member sees of a layer (Part).
// Read: nothing yet.
// Written: nothing; workspace is taken.
// Route: the base of backward_products.h, backward_inputs.h, backward_step.h and backward.h, in this order.
#pragma once

#include "context.h"
#include "norm.h"
#include "options.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class BackwardPass {
 protected:
  static constexpr int L = Vec<S>::lanes;
  static constexpr int64_t kPairs = 512;  // of a chunk: enough to pay for reading and writing dW, dR once more

 public:
  BackwardPass(const Call& call, const Sets& sets, const Layers<S, P>& layers, Workspace& workspace)
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
    for (int g = 0; g < groups_.count; ++g) {
      Scratch& s = scratch_[g];
      s = Scratch();
      allocate(s, workspace);
      for (int q = 0; q < P; ++q) {
        allocate_plane(s, q, workspace);
        allocate_options(s, q, workspace);
        for (int64_t r = 0; r < pairs_; ++r) {
          s.da_h_rows[0][q][r] = s.da_rows[q][r] + (cell_.sums > cell_.gates ? H : 0);
          s.da_h_rows[1][q][r] = s.da_rows[q][r] + (cell_.gates - 1) * H;
        }
      }
    }
  }

 protected:
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
    Norms<S, P> norms;
    S *apart[2][P] = {}, *c_hat[P] = {}, *dseen[P] = {};
    const S** apart_rows[2][P] = {};
    S *normed[3][P] = {}, *zh[P] = {};  // recompute: what the tape would hold of a chunk, see `normed`; h R^T
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

  static void shape(Panels<S>& w, int64_t K, int64_t columns, int threads) {
    w.K = K;
    w.units = columns;
    w.block = block_tiles(1, w.tiles(), threads);
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

  const S* tape(const Part& a, int q) const { return layers_.plane(q, a.l, a.d, a.set); }

  // Layer norm's rows of a chunk that begins with `pair`: x W^T (k = 0), h' R^T (1), four numbers (2), see Tape.
  S* normed(const Part& a, int q, int k, int64_t pair) const {
    if (tape_.every) return a.w.normed[k][q];
    return layers_.plane(q, a.l, a.d, a.set) + tape_.hat_offset(sets_.N, k) + pair * normed_width(k);
  }
  int64_t normed_width(int k) const { return k < 2 ? cell_.gates * n_.H : 4; }

  S clip_cell() const {
    return problem_.clip_cell > 0 ? static_cast<S>(problem_.clip_cell) : static_cast<S>(__builtin_inf());
  }

  // Where the sum of gate g with x (k = 0) or h' (1) lies in da.
  int64_t da_column(int k, int g) const {
    return place_of(cell_.sums, cell_.gates, k ? cell_.h_sum[g] : cell_.x_sum[g]) * n_.H;
  }

  bool has_hr(const Part& a, int q) const { return proj_ && p_[q]->extras && p_[q]->extras[a.ld].hr.data; }

  bool has_R(const Part& a, int q) const { return p_[q]->params && p_[q]->params[a.ld].R.data; }

  bool has_W(const Part& a, int q) const { return p_[q]->params && p_[q]->params[a.ld].W.data; }

  void allocate(Scratch& s, Workspace& workspace) const {
    const int64_t H = n_.H, N = sets_.N, widest = padded(larger(inputs_, larger(H, Q_)));
    if (tape_.every) s.forward.allocate(cell_, larger(inputs_, vocabulary_.most), H, Q_, workspace);
    if (p_[0]->context.data) {
      s.context.allocate(p_, n_, N, cell_, workspace);
      for (int q = 0; q < P; ++q) take_rows(workspace, N, cell_.gates * H, s.dz[q], s.dz_rows[q]);
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
    s.sums = take<S>(workspace, larger(cell_.gates * H, Q_) * widest);
  }
  void allocate_plane(Scratch& s, int q, Workspace& workspace) const {
    const int64_t H = n_.H, N = sets_.N;
    s.R[q][0].data = take<S>(workspace, cell_.state_product ? ldq_ * cell_.gates * H : 0);
    s.W[q].data = take<S>(workspace, padded(inputs_) * cell_.gates * H);
    take_rows(workspace, pairs_, ld_da_, s.da[q], s.da_rows[q]);
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
    for (int phase = 0; phase < kPhases; ++phase) s.da_h_rows[phase][q] = take<const S*>(workspace, pairs_);
    s.picked[q] = take<const S*>(workspace, 4 * pairs_);
    if (cell_.two_products) {
      take_rows(workspace, pairs_, ld_, s.rh[q], s.rh_rows[q]);
      s.drh[q] = take<S>(workspace, N * ld_);
    }
    if (tape_.every) {
      s.z[q] = take<S>(workspace, pairs_ * ld_ * cell_.sums);
      s.kept[q] = take<S>(workspace, pairs_ * kept_ * H);
      s.c_kept[q] = take<S>(workspace, pairs_ * H);
    }
    for (int which = 0; which < 2 && (tape_.every || proj_); ++which) s.state[which][q] = take<S>(workspace, N * ld_);
  }
  void allocate_options(Scratch& s, int q, Workspace& workspace) const {
    const int64_t N = sets_.N;
    s.h_seen[q] = s.before[0][q];
    if (masks_) {
      take_rows(workspace, pairs_, ldq_, s.seen[q], s.h_seen[q]);
      s.dh_seen[q] = take<S>(workspace, N * ldq_);
    }
    if (norm_) {
      for (int k = 0; k < 2; ++k) take_rows(workspace, pairs_, cell_.gates * n_.H, s.apart[k][q], s.apart_rows[k][q]);
      for (int k = 0; k < 3 && tape_.every; ++k) s.normed[k][q] = take<S>(workspace, pairs_ * normed_width(k));
      if (tape_.every) s.zh[q] = take<S>(workspace, pairs_ * ld_ * cell_.sums);
      s.c_hat[q] = take<S>(workspace, pairs_ * ld_);
      s.dseen[q] = take<S>(workspace, pairs_ * ld_);
    }
    if (problem_.variant.peepholes || norm_) s.c_new[q] = take<S>(workspace, pairs_ * ld_);
    if (proj_) {
      s.hr[q].data = take<S>(workspace, ld_ * Q_);
      take_rows(workspace, pairs_, ldq_, s.dnew[q], s.dnew_rows[q]);
      take_rows(workspace, pairs_, ld_, s.m[q], s.m_rows[q]);
      s.dm[q] = take<S>(workspace, N * ld_);
    }
  }

  S* dplane(int q, int l, int d, int64_t set) const {
    return between_[l & 1][q] + (set * n_.D + d) * n_.T * sets_.N * Q_;
  }

  bool context(const Part& a) const { return a.l == 0 && p_[0]->context.data; }

  // Shared weights have a gradient for each e.
  static bool split(const Call& call, const Sets& sets) {
    bool found = false;
    for (int d = 0; call.dp.params && d < call.problem->sizes.D; ++d)
      found = found || (call.dp.params[d].W.data && call.dp.params[d].W.stride[0]);
    return found && sets.count == 1 && call.problem->sizes.E > 1;
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
