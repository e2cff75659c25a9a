// SPDX-License-Identifier: Apache-2.0
// Layer norm (Ba et al. 2016): x W^T and h' R^T each over all gates and units of a row, and an LSTM's c over its units.
//   y = (x - mean) / sqrt(variance + 1e-5) * gain + bias
// Read: rows of z (tiles of sums, engine.h) or of H; gains, biases.
// Written: the rows, and on the tape x before the gain (`hat`) and 1 / deviation. Overwrites.
// Route: threads that own rows do this between the products of a step. Values only: tangents are the reference's.
// Limit: two passes over a row that lies in L1.
#pragma once

#include "options.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// The vectors of one layer, direction and weight set, and what they do to a row.
template <class S>
class Norms {
  using V = Vec<S>;
  static constexpr int L = V::lanes;
  static constexpr double kEpsilon = 1e-5;

 public:
  const S *gain[2], *bias[2], *gain_c, *bias_c;  // of x W^T and of h' R^T (G*H); of c (H)

  void allocate(const Problem& problem, int sums, Workspace& workspace) {
    H_ = problem.sizes.H, gates_ = facts_of(problem.cell).gates, sums_ = sums;
    for (S*& vector : vectors_) vector = take<S>(workspace, gates_ * H_ + L);
    for (int k = 0; k < 2; ++k) gain[k] = vectors_[k], bias[k] = vectors_[2 + k];
    gain_c = vectors_[4], bias_c = vectors_[5];
  }
  void begin(const Params& p, const Extras& extras, int64_t e) {
    const Array<2>* const given[6] = {&extras.gain_ih, &extras.gain_hh, &p.bW, &p.bR, &extras.gain_c, &extras.bias_c};
    for (int k = 0; k < 6; ++k) {
      const int64_t n = k < 4 ? gates_ * H_ : H_;
      zero_row(vectors_[k], 1, n);
      if (given[k]->data) copy_row(element<S>(*given[k], e, 0), given[k]->stride[1], vectors_[k], 1, n);
    }
  }

  // A row of z, of which gate g is sum[g]: normalised, then times gain and plus bias (k = 0: of x, 1: of h'), into
  // `to`, or added there. hat (G*H, may be null). Returns 1 / deviation.
  S row_of_z(int k, const S* z, const int* sum, bool add, S* to, S* hat) const {
    return gates_ == 3 ? row_of_gates<3>(k, z, sum, add, to, hat) : row_of_gates<4>(k, z, sum, add, to, hat);
  }

  // A row of c: its mean and 1 / deviation.
  void moments(const S* c, S* numbers) const {
    V total(S(0));
    for (int64_t u = 0; u < H_; u += L) total = total + load(c + u, smaller<int64_t>(L, H_ - u));
    const S mean = sum_of(total) / static_cast<S>(H_);
    total = V(S(0));
    S rest = 0;
    for (int64_t u = 0; u < H_; u += L) {
      const int64_t n = smaller<int64_t>(L, H_ - u);
      const V d = load(c + u, n) - V(mean);
      if (n == L)
        total = total + d * d;
      else
        for (int64_t j = 0; j < n; ++j) rest += d.v[j] * d.v[j];
    }
    numbers[0] = mean;
    numbers[1] = deviation(sum_of(total) + rest, H_);
  }

  // out = the gradient of what `hat` was made from, given d = that of hat * gain; n numbers.
  static void back(const S* d, const S* gain, const S* hat, S scale, int64_t n, S* out) {
    V a(S(0)), b(S(0));
    for (int64_t u = 0; u < n; u += L) {
      const int64_t k = smaller<int64_t>(L, n - u);
      const V g = load(d + u, k) * load(gain + u, k);
      a = a + g, b = b + g * load(hat + u, k);
    }
    const V mean(sum_of(a) / static_cast<S>(n)), along(sum_of(b) / static_cast<S>(n)), f(scale);
    for (int64_t u = 0; u < n; u += L) {
      const int64_t k = smaller<int64_t>(L, n - u);
      store(out + u, f * (load(d + u, k) * load(gain + u, k) - mean - load(hat + u, k) * along), k);
    }
  }

 private:
  // f(gate, place in a row of z, place in G*H, how many) for all tiles: whole ones first.
  template <int G, class F>
  FUSEDRNN_FORCE void each(const int* sum, F f) const {
    int64_t u = 0;
    for (; u + L <= H_; u += L)
      for (int g = 0; g < G; ++g) f(g, (u / L * sums_ + sum[g]) * L, g * H_ + u, int64_t{L});
    for (int g = 0; g < G && u < H_; ++g) f(g, (u / L * sums_ + sum[g]) * L, g * H_ + u, H_ - u);
  }
  template <int G>
  S row_of_gates(int k, const S* z, const int* sum, bool add, S* to, S* hat) const {
    V total[G];
    const auto all = [&] {
      V together = total[0];
      for (int g = 1; g < G; ++g) together = together + total[g];
      return sum_of(together);
    };
    for (V& one : total) one = V(S(0));
    each<G>(sum, [&](int g, int64_t at, int64_t, int64_t n) { total[g] = total[g] + load(z + at, n); });
    const S mean = all() / static_cast<S>(G * H_);
    for (V& one : total) one = V(S(0));
    S rest = 0;
    each<G>(sum, [&](int g, int64_t at, int64_t, int64_t n) {
      const V d = load(z + at, n) - V(mean);
      if (n == L)
        total[g] = total[g] + d * d;
      else
        for (int64_t j = 0; j < n; ++j) rest += d.v[j] * d.v[j];
    });
    const S scale = deviation(all() + rest, G * H_);
    each<G>(sum, [&](int, int64_t at, int64_t unit, int64_t n) {
      const V x = (load(z + at, n) - V(mean)) * V(scale);
      if (hat) store(hat + unit, x, n);
      const V y = x * load(gain[k] + unit, n) + load(bias[k] + unit, n);
      store(to + at, add ? load(to + at) + y : y);
    });
    return scale;
  }
  static S sum_of(V v) {
    S sum = 0;
    for (int j = 0; j < L; ++j) sum += v.v[j];
    return sum;
  }
  static float root(float x) { return __builtin_sqrtf(x); }
  static double root(double x) { return __builtin_sqrt(x); }
  static S deviation(S squares, int64_t n) {
    return S(1) / root(squares / static_cast<S>(n) + static_cast<S>(kEpsilon));
  }

  S* vectors_[6];
  int64_t H_;
  int gates_, sums_;
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
