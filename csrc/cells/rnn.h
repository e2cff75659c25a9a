// SPDX-License-Identifier: Apache-2.0
// Vanilla RNN, one unit, one step (Elman 1990).   h = act(x W^T + bW + h' R^T + bR),   act = tanh or relu
// V is a number: a SIMD vector, a Dual of one, or a CUDA float. Whoever includes this
// defines FUSEDRNN_INLINE (static, forced inline, __device__ under nvcc).
#pragma once

#include "functions.h"

namespace fusedrnn::cells {

template <bool Relu>
struct Rnn {
  using Plain = RnnFunctions<Relu>;
  static constexpr int gates = 1;
  static constexpr int sums = 1;
  static constexpr int kept = 0;  // h itself tells the slope
  static constexpr bool cell_state = false;
  static constexpr bool state_product = true;  // a product with h' every step
  static constexpr bool two_products = false;
  static constexpr int x_sum[1] = {0};
  static constexpr int h_sum[1] = {0};

  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void forward(const V* a, const V&, const V&, S, V*, V& h, V&, const F& f = F()) {
    h = f.gate(a[0]);
  }

  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void backward(const V*, const V&, const V& h, const V&, const V&, S, const V& dh, const V&, V* da,
                                V& dh_prev, V&, const F& f = F()) {
    da[0] = f.gate_back(dh, h);
    dh_prev = V(0);
  }
};

}  // namespace fusedrnn::cells
