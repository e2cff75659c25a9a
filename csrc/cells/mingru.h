// SPDX-License-Identifier: Apache-2.0
// minGRU, one unit, one step (Feng et al. 2024, "Were RNNs All We Needed?"): gates from x alone.
//   z = sigmoid(x Wz^T + bz);  n = x Wn^T + bn;  h = (1 - z) h' + z n
// V is a number: a SIMD vector, a Dual of one, or a CUDA float. sigmoid is found by V's namespace; whoever includes
// this defines FUSEDRNN_INLINE (static, forced inline, __device__ under nvcc).
#pragma once

namespace fusedrnn::cells {

struct MinGru {
  static constexpr int gates = 2;
  static constexpr int sums = 2;
  static constexpr int kept = 2;  // z, n
  static constexpr bool cell_state = false;
  static constexpr bool state_product = false;
  static constexpr bool two_products = false;
  static constexpr int x_sum[2] = {0, 1};
  static constexpr int h_sum[2] = {0, 1};

  template <class V, class S>
  FUSEDRNN_INLINE void forward(const V* a, const V& h_prev, const V&, S, V* k, V& h, V&) {
    k[0] = sigmoid(a[0]);
    k[1] = a[1];
    h = h_prev + k[0] * (k[1] - h_prev);
  }

  template <class V, class S>
  FUSEDRNN_INLINE void backward(const V* k, const V& h_prev, const V&, const V&, const V&, S, const V& dh, const V&,
                                V* da, V& dh_prev, V&) {
    da[0] = dh * (k[1] - h_prev) * k[0] * (1 - k[0]);
    da[1] = dh * k[0];
    dh_prev = dh * (1 - k[0]);
  }
};

}  // namespace fusedrnn::cells
