// SPDX-License-Identifier: Apache-2.0
// LSTM with coupled input and forget gates, one unit, one step (Greff et al. 2017, "CIFG"; ONNX's input_forget).
//   a = x W^T + bW + h' R^T + bR;  i, o = sigmoid(a_i, a_o);  g = tanh(a_g);  f = 1 - i
//   c = clip(f c' + i g);  h = o tanh(c)
// V is a number: a SIMD vector, a Dual of one, or a CUDA float. clamp and inside are found by V's namespace. Whoever
// includes this defines FUSEDRNN_INLINE (static, forced inline, __device__ under nvcc).
#pragma once

#include "functions.h"

namespace fusedrnn::cells {

struct Cifg {
  using Plain = Functions;
  static constexpr int gates = 3;
  static constexpr int sums = 3;
  static constexpr int kept = 3;  // i, g, o
  static constexpr bool cell_state = true;
  static constexpr bool state_product = true;
  static constexpr bool two_products = false;
  static constexpr int x_sum[3] = {0, 1, 2};
  static constexpr int h_sum[3] = {0, 1, 2};

  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void forward(const V* a, const V& h_prev, const V& c_prev, S clip, V* k, V& h, V& c,
                               const F& f = F()) {
    k[0] = f.gate(f.peep(0, a[0], c_prev));
    k[1] = f.candidate(a[1]);
    V keep, add;
    flow(k, keep, add);
    c = clamp(keep * c_prev + add, clip);
    k[2] = f.gate(f.peep(2, a[2], c));
    h = output(k, h_prev, c, f);
  }

  // What a projection multiplies, if there is one.
  template <class V, class F = Plain>
  FUSEDRNN_INLINE V output(const V* k, const V&, const V& c, const F& f = F()) {
    return k[2] * f.state(c);
  }

  // c = clip(keep c' + add)
  template <class V>
  FUSEDRNN_INLINE void flow(const V* k, V& keep, V& add) {
    keep = 1 - k[0];
    add = k[0] * k[1];
  }

  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void backward(const V* k, const V&, const V&, const V& c_prev, const V& c, S clip, const V& dh,
                                const V& dc_in, V* da, V& dh_prev, V& dc_prev, const F& f = F()) {
    const V seen = f.state(c);
    da[2] = f.gate_back(dh * seen, k[2]);
    const V dc = inside(f.peep_back(2, dc_in + f.state_back(dh * k[2], seen), da[2]), c, clip);
    da[0] = f.gate_back(dc * (k[1] - c_prev), k[0]);
    da[1] = f.candidate_back(dc * k[0], k[1]);
    dc_prev = f.peep_back(0, dc * (1 - k[0]), da[0]);
    dh_prev = V(0);
  }
};

}  // namespace fusedrnn::cells
