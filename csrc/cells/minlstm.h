// SPDX-License-Identifier: Apache-2.0
// minLSTM, one unit, one step (Feng et al. 2024, "Were RNNs All We Needed?"): gates from x alone, normalised.
//   i, f = sigmoid(x Wi^T + bi, x Wf^T + bf);  g = x Wg^T + bg;  h = f / (f + i) h' + i / (f + i) g
// The share of f is sigmoid(log f - log i), and log sigmoid(a) = -softplus(-a): right where both gates underflow, too.
// V is a number: a SIMD vector, a Dual of one, or a CUDA float. sigmoid and softplus are found by V's namespace;
// whoever includes this defines FUSEDRNN_INLINE (static, forced inline, __device__ under nvcc).
#pragma once

namespace fusedrnn::cells {

struct MinLstm {
  static constexpr int gates = 3;  // i, f, g
  static constexpr int sums = 3;
  static constexpr int kept = 4;  // the share of f, g, 1 - i, 1 - f
  static constexpr bool cell_state = false;
  static constexpr bool state_product = false;
  static constexpr bool two_products = false;
  static constexpr int x_sum[3] = {0, 1, 2};
  static constexpr int h_sum[3] = {0, 1, 2};

  template <class V, class S>
  FUSEDRNN_INLINE void forward(const V* a, const V& h_prev, const V&, S, V* k, V& h, V&) {
    const V not_i = 0 - a[0], not_f = 0 - a[1];
    k[0] = sigmoid(softplus(not_i) - softplus(not_f));
    k[1] = a[2];
    k[2] = sigmoid(not_i);
    k[3] = sigmoid(not_f);
    h = k[1] + k[0] * (h_prev - k[1]);
  }

  template <class V, class S>
  FUSEDRNN_INLINE void backward(const V* k, const V& h_prev, const V&, const V&, const V&, S, const V& dh, const V&,
                                V* da, V& dh_prev, V&) {
    const V d = dh * (h_prev - k[1]) * k[0] * (1 - k[0]);
    da[0] = 0 - d * k[2];
    da[1] = d * k[3];
    da[2] = dh * (1 - k[0]);
    dh_prev = dh * k[0];
  }
};

}  // namespace fusedrnn::cells
