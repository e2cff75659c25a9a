// SPDX-License-Identifier: Apache-2.0
// Li-GRU, one unit, one step (Ravanelli et al. 2018, without batch norm): a GRU with no reset gate, and relu for tanh.
//   z = sigmoid(a_z);  n = relu(a_n);  h = (1 - z) n + z h',   a = x W^T + bW + h' R^T + bR
// V is a number: a SIMD vector, a Dual of one, or a CUDA float. Whoever includes this
// defines FUSEDRNN_INLINE (static, forced inline, __device__ under nvcc).
#pragma once

#include "functions.h"

namespace fusedrnn::cells {

struct LiGru {
  using Plain = LiGruFunctions;
  static constexpr int gates = 2;
  static constexpr int sums = 2;
  static constexpr int kept = 2;  // z, n
  static constexpr bool cell_state = false;
  static constexpr bool state_product = true;
  static constexpr bool two_products = false;
  static constexpr int x_sum[2] = {0, 1};
  static constexpr int h_sum[2] = {0, 1};

  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void forward(const V* a, const V& h_prev, const V&, S, V* k, V& h, V&, const F& f = F()) {
    k[0] = f.gate(a[0]);
    k[1] = f.candidate(a[1]);
    h = k[1] + k[0] * (h_prev - k[1]);
  }

  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void backward(const V* k, const V& h_prev, const V&, const V&, const V&, S, const V& dh, const V&,
                                V* da, V& dh_prev, V&, const F& f = F()) {
    da[0] = f.gate_back(dh * (h_prev - k[1]), k[0]);
    da[1] = f.candidate_back(dh * (1 - k[0]), k[1]);
    dh_prev = dh * k[0];
  }
};

}  // namespace fusedrnn::cells
