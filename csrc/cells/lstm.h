// SPDX-License-Identifier: Apache-2.0
// LSTM, one unit, one step (Hochreiter & Schmidhuber 1997, forget gate of Gers 2000; gate order of PyTorch and cuDNN).
//   a = x W^T + bW + h' R^T + bR;  i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
//   c = clip(f c' + i g);  h = o tanh(c)
// V is a number: a SIMD vector, a Dual of one, or a CUDA float. clamp and inside are found by V's namespace. Whoever
// includes this defines FUSEDRNN_INLINE (static, forced inline, __device__ under nvcc).
#pragma once

#include "functions.h"

namespace fusedrnn::cells {

struct Lstm {
  using Plain = Functions;
  static constexpr int gates = 4;  // row blocks of W and R
  static constexpr int sums = 4;   // pre-activations the engine hands over, per unit
  static constexpr int kept = 4;   // values on the tape beside c and h: i, f, g, o
  static constexpr bool cell_state = true;
  static constexpr bool state_product = true;  // a product with h' every step
  static constexpr bool two_products = false;
  static constexpr int x_sum[4] = {0, 1, 2, 3};  // gate -> sum that takes its row of x W^T + bW
  static constexpr int h_sum[4] = {0, 1, 2, 3};  // gate -> sum that takes its row of h' R^T + bR

  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void forward(const V* a, const V& h_prev, const V& c_prev, S clip, V* k, V& h, V& c,
                               const F& f = F()) {
    k[0] = f.gate(f.peep(0, a[0], c_prev));
    k[1] = f.gate(f.peep(1, a[1], c_prev));
    k[2] = f.candidate(a[2]);
    V keep, add;
    flow(k, keep, add);
    c = clamp(keep * c_prev + add, clip);
    k[3] = f.gate(f.peep(2, a[3], c));
    h = output(k, h_prev, c, f);
  }

  // What a projection multiplies, if there is one.
  template <class V, class F = Plain>
  FUSEDRNN_INLINE V output(const V* k, const V&, const V& c, const F& f = F()) {
    return k[3] * f.state(c);
  }

  // c = clip(keep c' + add)
  template <class V>
  FUSEDRNN_INLINE void flow(const V* k, V& keep, V& add) {
    keep = k[1];
    add = k[0] * k[2];
  }

  // dh, dc: gradients of this step's h and c. da: of the sums. dh_prev: what reaches h' past the product (none here).
  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void backward(const V* k, const V&, const V&, const V& c_prev, const V& c, S clip, const V& dh,
                                const V& dc_in, V* da, V& dh_prev, V& dc_prev, const F& f = F()) {
    const V seen = f.state(c);
    da[3] = f.gate_back(dh * seen, k[3]);
    const V dc = inside(f.peep_back(2, dc_in + f.state_back(dh * k[3], seen), da[3]), c, clip);
    da[0] = f.gate_back(dc * k[2], k[0]);
    da[1] = f.gate_back(dc * c_prev, k[1]);
    da[2] = f.candidate_back(dc * k[0], k[2]);
    dc_prev = f.peep_back(0, f.peep_back(1, dc * k[1], da[1]), da[0]);
    dh_prev = V(0);
  }
};

}  // namespace fusedrnn::cells
