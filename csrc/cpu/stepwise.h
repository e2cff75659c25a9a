// SPDX-License-Identifier: Apache-2.0
// The stepwise engine: cells whose step is more than one product and an elementwise part.
//   forward, per step:    zh = (h' mask) R^T;   whole rows: norm, peepholes, activations, c, m;   h = m hr^T;   zoneout
//   backward, per step:   dm = dh hr;   whole rows: da, norm;   dh' = da R;   then for a chunk all other gradients
// Read and written: as in forward.h and backward.h, with the arrays of Extras. Overwrites. Route: for problems with a
// Variant; a step has two barriers (four with a projection), against one of forward.h. In products threads own columns,
// in between rows; sums over rows are made by who owns the column, in the order of the rows, so threads change no bit.
// Limit: FMA, as forward.h; the gates pass through L2 once more.
#pragma once

#include "activations.h"
#include "weights.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// What both directions of the engine know of a problem, and the row pieces they share.
template <class S>
class Stepwise {
 public:
  using V = Vec<S>;
  static constexpr int L = V::lanes;

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }

  // Weights of one product C = A M^T (forward) or C = A M (backward), packed or where they lie.
  static void shape(Panels<S>& w, int64_t K, int64_t columns, int threads) {
    w.K = K;
    w.units = columns;
    w.block = block_tiles(1, w.tiles(), threads);
  }

 protected:
  Stepwise(const Call& call)
      : problem_(*call.problem),
        n_(problem_.sizes),
        v_(problem_.variant),
        p_(call.p),
        tape_layout_(problem_),
        kind_(problem_.cell),
        lstm_(kind_ == CellKind::lstm || kind_ == CellKind::cifg),
        coupled_(kind_ == CellKind::cifg),
        gru_(kind_ == CellKind::gru || kind_ == CellKind::gru_reset_before),
        before_(kind_ == CellKind::gru_reset_before),
        has_c_(has_cell_state(problem_)),
        H(n_.H),
        Q(outputs_of(problem_)),
        G(facts_of(kind_).gates),
        GH(G * H),
        N(n_.B),
        kept_(tape_layout_.kept),
        ldH(padded(H)),
        ldQ(padded(Q)),
        ldG(padded(GH) + L),
        inputs_(n_.L > 1 ? larger<int64_t>(n_.I, n_.D * Q) : n_.I),
        masks_(v_.training && v_.recurrent_dropout > 0) {}

  // ---- layers ----

  struct Task {
    int l, d;
    int64_t e, ld;
    bool reversed;
    const Rows& rows;
    const Params* p;
    const Extras* x;
  };
  Task task(int l, int d, int64_t e, const Rows* rows) const {
    const int64_t ld = int64_t{l} * n_.D + d;
    return {l, d, e, ld, n_.D == 2 ? d == 1 : problem_.reverse, rows[e], &p_.params[ld], &p_.extras[ld]};
  }
  Rows* all_rows(Workspace& workspace) const {
    Rows* rows = static_cast<Rows*>(workspace.take(sizeof(Rows) * static_cast<size_t>(n_.E)));
    for (int64_t e = 0; e < n_.E; ++e) rows[e] = make_rows(problem_, e, e + 1, workspace);
    return rows;
  }
  S* tape_of(void* tape, int l, int d, int64_t e) const {
    return static_cast<S*>(tape) + ((int64_t{l} * n_.D + d) * n_.E + e) * tape_layout_.elements();
  }
  // A layer's input; `below(d)` gives the rows of the layer below.
  template <class F>
  Source<S> source(int l, F below) const {
    Source<S> s;
    s.width = l ? n_.D * Q : n_.I;
    if (l == 0) {
      s.x = static_cast<const S*>(p_.x.data);
      s.t = p_.x.stride[0], s.e = p_.x.stride[1], s.b = p_.x.stride[2], s.i = p_.x.stride[3];
    } else {
      for (int d = 0; d < n_.D; ++d) s.plane[d] = below(d);
      s.H = Q;
      s.D = n_.D;
      s.layer = l - 1;
      s.dropout = problem_.dropout > 0 ? &problem_ : nullptr;
    }
    return s;
  }

  // ---- masks ----

  // How much of the old state stays: row i at step s, `units` of them, from stream 2 (h) or 3 (c).
  void keep_row(const Task& t, int64_t s, int64_t i, double p, uint32_t stream, int64_t units, S* out) const {
    if (!v_.training || p == 0) {
      for (int64_t u = 0; u < padded(units); u += L) store(out + u, V(static_cast<S>(p)));
      return;
    }
    const int64_t time = t.rows.time(t.reversed, s, i);
    const int64_t row = (time * n_.E + t.rows.e[i]) * n_.B + t.rows.b[i];
    Dropout{p, problem_.seed}.drawn(out, units, static_cast<uint64_t>(row * units), static_cast<int>(t.ld), stream);
  }
  bool zoned(double p) const { return p > 0; }
  // The recurrent dropout of row i.
  void mask_row(const Task& t, int64_t i, S* out) const {
    const double p = v_.recurrent_dropout;
    const int64_t row = t.rows.e[i] * n_.B + t.rows.b[i];
    Dropout{p, problem_.seed}.drawn(out, Q, static_cast<uint64_t>(row * Q), static_cast<int>(t.ld), 4);
    const S scale = p < 1 ? static_cast<S>(1 / (1 - p)) : S(0);
    for (int64_t u = 0; u < Q; ++u) out[u] = out[u] != 0 ? S(0) : scale;
  }

  // ---- rows ----

  template <class F>
  FUSEDRNN_FORCE void units(int64_t n, F f) const {
    for (int64_t u = 0; u < n; u += L) f(u);
  }
  // The same into memory without padding: f gives what is stored at `to` + u.
  template <class F>
  FUSEDRNN_FORCE void fill_units(S* to, int64_t n, F f) const {
    int64_t u = 0;
    for (; u + L <= n; u += L) store(to + u, f(u));
    if (u < n) store(to + u, f(u), n - u);
  }
  void copy(const S* from, S* to, int64_t n) const { copy_row(from, 1, to, 1, n); }

  static S sum_of(V v) {
    S sum = 0;
    for (int j = 0; j < L; ++j) sum += v.v[j];
    return sum;
  }
  static float root(float x) { return __builtin_sqrtf(x); }
  static double root(double x) { return __builtin_sqrt(x); }
  static constexpr double kEpsilon = 1e-5;

  // The row's mean, and 1 / its deviation.
  void moments(const S* x, int64_t n, S* mean, S* scale) const {
    V a(S(0)), b(S(0));
    int64_t u = 0;
    for (; u + 2 * L <= n; u += 2 * L) a = a + load(x + u), b = b + load(x + u + L);
    for (; u < n; u += L) a = a + load(x + u, smaller<int64_t>(L, n - u));
    *mean = sum_of(a + b) / static_cast<S>(n);
    const V m(*mean);
    a = b = V(S(0));
    for (u = 0; u + 2 * L <= n; u += 2 * L) {
      const V first = load(x + u) - m, second = load(x + u + L) - m;
      a = a + first * first, b = b + second * second;
    }
    for (; u + L <= n; u += L) {
      const V d = load(x + u) - m;
      a = a + d * d;
    }
    S rest = 0;
    for (; u < n; ++u) rest += (x[u] - *mean) * (x[u] - *mean);
    *scale = S(1) / root((sum_of(a + b) + rest) / static_cast<S>(n) + static_cast<S>(kEpsilon));
  }
  // x becomes its normalised self times gain plus bias (may be null); hat gets the former (may be null).
  S normalise(S* x, int64_t n, const S* gain, const S* bias, S* hat) const {
    S mean, scale;
    moments(x, n, &mean, &scale);
    const V m(mean), f(scale);
    for (int64_t u = 0; u < n; u += L) {
      const V y = (load(x + u) - m) * f;
      if (hat) store(hat + u, y, smaller<int64_t>(L, n - u));
      store(x + u, bias ? y * load(gain + u) + load(bias + u) : y * load(gain + u), smaller<int64_t>(L, n - u));
    }
    return scale;
  }
  // out = the gradient of what `hat` was made from, given d = that of hat * gain.
  void normalise_back(const S* d, const S* gain, const S* hat, S scale, int64_t n, S* out) const {
    V a(S(0)), b(S(0));
    for (int64_t u = 0; u < n; u += L) {
      const int64_t k = smaller<int64_t>(L, n - u);
      const V g = load(d + u, k) * load(gain + u);
      a = a + g, b = b + g * load(hat + u, k);
    }
    const V mean(sum_of(a) / static_cast<S>(n)), along(sum_of(b) / static_cast<S>(n)), f(scale);
    for (int64_t u = 0; u < n; u += L) {
      const int64_t k = smaller<int64_t>(L, n - u);
      store(out + u, f * (load(d + u, k) * load(gain + u) - mean - load(hat + u, k) * along), k);
    }
  }

  // act(clip(a)) in place. `gate`: its argument is clipped.
  void act(int k, S* a, bool gate) const {
    if (gate && v_.clip_gates > 0) {
      const S limit = static_cast<S>(v_.clip_gates);
      change_row(a, ldH, [&](V x) { return clamp(x, limit); });
    }
    activate_row(v_.activations[k], a, ldH);
  }
  // d *= act'(a), from y = act(a): 0 where the argument was clipped, which y at one of the two ends tells.
  void act_back(int k, const S* y, S* d, bool gate) const {
    times_slope_row(v_.activations[k], y, d, ldH);
    if (!gate || v_.clip_gates <= 0) return;
    S ends[2][L];
    for (int j = 0; j < L; ++j) ends[0][j] = static_cast<S>(-v_.clip_gates), ends[1][j] = -ends[0][j];
    for (int side = 0; side < 2; ++side) activate_row(v_.activations[k], ends[side], L);
    const S low = smaller(ends[0][0], ends[1][0]), high = larger(ends[0][0], ends[1][0]);
    const V zero(S(0)), lo(low), hi(high);
    units(ldH, [&](int64_t u) {
      const V at = load(y + u), was = load(d + u), below = at.v <= lo.v ? zero.v : was.v;
      store(d + u, V(at.v >= hi.v ? zero.v : below.v));
    });
  }

  // A vector of parameters as a padded row; zeros where not given.
  void take_vector(const Array<2>& a, int64_t e, int64_t n, S* to, int64_t ld) const {
    zero_row(to, 1, ld);
    if (a.data) copy_row(element<S>(a, e, 0), a.stride[1], to, 1, n);
  }
  S limit_c() const {
    return problem_.clip_cell > 0 ? static_cast<S>(problem_.clip_cell) : static_cast<S>(__builtin_inf());
  }
  // The vectors of one layer and direction: bias of x and of h, gains, peepholes of i, f, o.
  struct Vectors {
    S *bias[2], *gain[2], *peep[3], *gain_c, *bias_c;
  };
  void allocate(Vectors& w, Workspace& workspace) const {
    for (int k = 0; k < 2; ++k) {
      w.bias[k] = take<S>(workspace, ldG);
      w.gain[k] = take<S>(workspace, ldG);
    }
    for (S*& p : w.peep) p = take<S>(workspace, ldH);
    w.gain_c = take<S>(workspace, ldH);
    w.bias_c = take<S>(workspace, ldH);
  }
  void read(const Task& t, Vectors& w) const {
    take_vector(t.p->bW, t.e, GH, w.bias[0], ldG);
    take_vector(t.p->bR, t.e, GH, w.bias[1], ldG);
    take_vector(t.x->gain_ih, t.e, GH, w.gain[0], ldG);
    take_vector(t.x->gain_hh, t.e, GH, w.gain[1], ldG);
    take_vector(t.x->gain_c, t.e, H, w.gain_c, ldH);
    take_vector(t.x->bias_c, t.e, H, w.bias_c, ldH);
    for (int k = 0; k < 3; ++k) zero_row(w.peep[k], 1, ldH);
    if (!v_.peepholes) return;
    const int places[2][3] = {{0, 1, 2}, {0, -1, 1}};
    for (int k = 0; k < 3; ++k)
      if (const int at = places[coupled_][k]; at >= 0)
        copy_row(element<S>(t.x->ph, t.e, at * H), t.x->ph.stride[1], w.peep[k], 1, H);
  }
  // Which gate is which.
  int g_gate() const { return coupled_ ? 1 : 2; }
  int o_gate() const { return coupled_ ? 2 : 3; }

  const Problem& problem_;
  const Sizes& n_;
  const Variant& v_;
  const Arguments& p_;
  StepwiseTape tape_layout_;
  CellKind kind_;
  bool lstm_, coupled_, gru_, before_, has_c_;
  int64_t H, Q, G, GH, N, kept_, ldH, ldQ, ldG, inputs_;
  bool masks_;
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
