// SPDX-License-Identifier: Apache-2.0
// Layer norm (Ba et al. 2016): x W^T and h' R^T each over all gates and units of a row, and an LSTM's c over its units.
//   y = (x - mean) / sqrt(variance + 1e-5) * gain + bias
// Read: rows of z (tiles of sums, engine.h) or of H; gains, biases.
// Written: the rows, and on the tape x before the gain (`hat`) and 1 / deviation. Overwrites.
// Route: threads that own rows do this between the products of a step.
// Limit: two passes over a row that lies in L1.
#pragma once

#include "options.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// The vectors of one layer, direction and weight set, and what they do to a row.
template <class S, int P>
class Norms {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  static constexpr int L = Vec<S>::lanes;
  static constexpr double kEpsilon = 1e-5;

 public:
  S *gain[2][P], *bias[2][P], *gain_c[P], *bias_c[P];  // of x W^T and of h' R^T (G*H); of c (H)

  void allocate(const Problem& problem, int sums, Workspace& workspace) {
    H_ = problem.sizes.H, gates_ = facts_of(problem.cell).gates, sums_ = sums;
    for (int q = 0; q < P; ++q) {
      S** const vectors[] = {&gain[0][q], &gain[1][q], &bias[0][q], &bias[1][q], &gain_c[q], &bias_c[q]};
      for (S** vector : vectors) *vector = take<S>(workspace, gates_ * H_ + L);
    }
  }
  // p[q]: values, tangents.
  void begin(const Arguments* const* p, int64_t layer_and_direction, int64_t e) {
    for (int q = 0; q < P; ++q) {
      const Params w = p[q]->params ? p[q]->params[layer_and_direction] : Params();
      const Extras x = p[q]->extras ? p[q]->extras[layer_and_direction] : Extras();
      fill(gain[0][q], x.gain_ih, e, gates_ * H_), fill(gain[1][q], x.gain_hh, e, gates_ * H_);
      fill(bias[0][q], w.bW, e, gates_ * H_), fill(bias[1][q], w.bR, e, gates_ * H_);
      fill(gain_c[q], x.gain_c, e, H_), fill(bias_c[q], x.bias_c, e, H_);
    }
  }

  // A row of z, of which gate g is sum[g]: normalised, then times gain and plus bias (k = 0: of x, 1: of h'), into
  // `to`, or added there. hat (G*H, may be null); scale: 1 / deviation.
  void row_of_z(int k, const S* const* z, const int* sum, bool add, S* const* to, S* const* hat, S* scale) const {
    gates_ == 3 ? row_of_gates<3>(k, z, sum, add, to, hat, scale) : row_of_gates<4>(k, z, sum, add, to, hat, scale);
  }

  // A row of c: its mean and 1 / deviation.
  void moments(const S* const* c, S* mean, S* scale) const {
    N total(S(0));
    for (int64_t u = 0; u < H_; u += L) total = total + Pl::read(c, u, smaller<int64_t>(L, H_ - u));
    Pl::add_up(total, mean);
    for (int q = 0; q < P; ++q) mean[q] /= static_cast<S>(H_);
    const N middle = Pl::spread(mean);
    total = N(S(0));
    for (int64_t u = 0; u < H_; u += L) {
      const int64_t n = smaller<int64_t>(L, H_ - u);
      const N d = first_of(Pl::read(c, u, n) - middle, n);
      total = total + d * d;
    }
    invert_deviation(total, H_, scale);
  }

  // out = the gradient of what `hat` was made from, given d = that of hat * gain; n numbers.
  static void back(const S* const* d, const S* const* gain, const S* const* hat, const S* scale, int64_t n,
                   S* const* out) {
    N a(S(0)), b(S(0));
    for (int64_t u = 0; u < n; u += L) {
      const int64_t k = smaller<int64_t>(L, n - u);
      const N g = Pl::read(d, u, k) * Pl::read(gain, u, k);
      a = a + g, b = b + g * Pl::read(hat, u, k);
    }
    S means[2][P];
    Pl::add_up(a, means[0]), Pl::add_up(b, means[1]);
    for (int q = 0; q < P; ++q) means[0][q] /= static_cast<S>(n), means[1][q] /= static_cast<S>(n);
    const N mean = Pl::spread(means[0]), along = Pl::spread(means[1]), f = Pl::spread(scale);
    for (int64_t u = 0; u < n; u += L) {
      const int64_t k = smaller<int64_t>(L, n - u);
      const N g = Pl::read(d, u, k) * Pl::read(gain, u, k);
      Pl::write(out, u, f * (g - mean - Pl::read(hat, u, k) * along), k);
    }
  }

 private:
  static void fill(S* to, const Array<2>& from, int64_t e, int64_t n) {
    zero_row(to, 1, n);
    if (from.data) copy_row(element<S>(from, e, 0), from.stride[1], to, 1, n);
  }
  // f(gate, place in a row of z, place in G*H, how many) for all tiles: whole ones first.
  template <int G, class F>
  FUSEDRNN_FORCE void each(const int* sum, F f) const {
    int64_t u = 0;
    for (; u + L <= H_; u += L)
      for (int g = 0; g < G; ++g) f(g, (u / L * sums_ + sum[g]) * L, g * H_ + u, int64_t{L});
    for (int g = 0; g < G && u < H_; ++g) f(g, (u / L * sums_ + sum[g]) * L, g * H_ + u, H_ - u);
  }
  template <int G>
  void row_of_gates(int k, const S* const* z, const int* sum, bool add, S* const* to, S* const* hat, S* scale) const {
    N total[G];
    const auto all = [&] {
      N together = total[0];
      for (int g = 1; g < G; ++g) together = together + total[g];
      return together;
    };
    for (N& one : total) one = N(S(0));
    each<G>(sum, [&](int g, int64_t at, int64_t, int64_t n) { total[g] = total[g] + Pl::read(z, at, n); });
    S mean[P];
    Pl::add_up(all(), mean);
    for (int q = 0; q < P; ++q) mean[q] /= static_cast<S>(G * H_);
    const N middle = Pl::spread(mean);
    for (N& one : total) one = N(S(0));
    each<G>(sum, [&](int g, int64_t at, int64_t, int64_t n) {
      const N d = first_of(Pl::read(z, at, n) - middle, n);
      total[g] = total[g] + d * d;
    });
    invert_deviation(all(), G * H_, scale);
    const N f = Pl::spread(scale);
    each<G>(sum, [&](int, int64_t at, int64_t unit, int64_t n) {
      const N x = (Pl::read(z, at, n) - middle) * f;
      if (hat[0]) Pl::write(hat, unit, x, n);
      const N y = x * Pl::read(gain[k], unit, n) + Pl::read(bias[k], unit, n);
      Pl::write(to, at, add ? Pl::read(to, at, L) + y : y, L);
    });
  }
  static float root(float x) { return __builtin_sqrtf(x); }
  static double root(double x) { return __builtin_sqrt(x); }
  // 1 / sqrt(squares / n + epsilon), and its tangent.
  static void invert_deviation(const N& squares, int64_t n, S* out) {
    S variance[P];
    Pl::add_up(squares, variance);
    for (int q = 0; q < P; ++q) variance[q] /= static_cast<S>(n);
    out[0] = S(1) / root(variance[0] + static_cast<S>(kEpsilon));
    if constexpr (P == 2) out[1] = -variance[1] * out[0] * out[0] * out[0] / 2;
  }

  int64_t H_;
  int gates_, sums_;
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
