// SPDX-License-Identifier: Apache-2.0
// GRU, one unit, one step (Cho et al. 2014; gate order r, z, n of PyTorch and cuDNN).
//   r, z = sigmoid(x W^T + bW + h' R^T + bR);   h = (1 - z) n + z h'
//   Gru:            n = tanh(x Wn^T + bWn + r (h' Rn^T + bRn))   reset after the product: PyTorch, cuDNN
//   GruResetBefore: n = tanh(x Wn^T + bWn + (r h') Rn^T + bRn)   reset before it: the paper, Keras v2, ONNX's default
// V is a number: a SIMD vector, a Dual of one, or a CUDA float.
// Whoever includes this defines FUSEDRNN_INLINE:
// static, forced inline, __device__ under nvcc.
#pragma once

#include "functions.h"

namespace fusedrnn::cells {

struct Gru {
  using Plain = Functions;
  static constexpr int gates = 3;
  static constexpr int sums = 4;  // r, z, n of x, n of h'
  static constexpr int kept = 4;  // r, z, n, and the h' part of n's sum
  static constexpr bool cell_state = false;
  static constexpr bool state_product = true;
  static constexpr bool two_products = false;
  static constexpr int x_sum[3] = {0, 1, 2};
  static constexpr int h_sum[3] = {0, 1, 3};

  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void forward(const V* a, const V& h_prev, const V&, S, V* k, V& h, V&, const F& f = F()) {
    k[0] = f.gate(a[0]);
    k[1] = f.gate(a[1]);
    k[2] = f.candidate(a[2] + k[0] * a[3]);
    k[3] = a[3];
    h = output(k, h_prev, h_prev, f);
  }

  // What a projection multiplies, if there is one.
  template <class V, class F = Plain>
  FUSEDRNN_INLINE V output(const V* k, const V& h_prev, const V&, const F& = F()) {
    return k[2] + k[1] * (h_prev - k[2]);
  }

  template <class V, class S, class F = Plain>
  FUSEDRNN_INLINE void backward(const V* k, const V& h_prev, const V&, const V&, const V&, S, const V& dh, const V&,
                                V* da, V& dh_prev, V&, const F& f = F()) {
    da[2] = f.candidate_back(dh * (1 - k[1]), k[2]);
    da[3] = da[2] * k[0];
    da[0] = f.gate_back(da[2] * k[3], k[0]);
    da[1] = f.gate_back(dh * (h_prev - k[2]), k[1]);
    dh_prev = dh * k[1];
  }
};

// Two products a step: first r and z from h', then n from r h'. The engine calls `gate`, multiplies, calls `forward`;
// backward in the other order: `backward`, multiply da[2] by Rn, then `backward_gate` with that product.
struct GruResetBefore {
  using Plain = Functions;
  static constexpr int gates = 3;
  static constexpr int sums = 3;
  static constexpr int kept = 3;  // r, z, n
  static constexpr bool cell_state = false;
  static constexpr bool state_product = true;
  static constexpr bool two_products = true;
  static constexpr int x_sum[3] = {0, 1, 2};
  static constexpr int h_sum[3] = {0, 1, 2};

  // a_r, a_z are complete. rh is what the second product multiplies; h_seen: h' as R sees it.
  template <class V, class F = Plain>
  FUSEDRNN_INLINE void gate(const V& a_r, const V& a_z, const V& h_seen, V& r, V& z, V& rh, const F& f = F()) {
    r = f.gate(a_r);
    z = f.gate(a_z);
    rh = r * h_seen;
  }

  template <class V, class F = Plain>
  FUSEDRNN_INLINE void forward(const V& a_n, const V& z, const V& h_prev, V& n, V& h, const F& f = F()) {
    n = f.candidate(a_n);
    h = n + z * (h_prev - n);
  }

  template <class V, class F = Plain>
  FUSEDRNN_INLINE void backward(const V& z, const V& n, const V& h_prev, const V& dh, V& da_z, V& da_n, V& dh_prev,
                                const F& f = F()) {
    da_n = f.candidate_back(dh * (1 - z), n);
    da_z = f.gate_back(dh * (h_prev - n), z);
    dh_prev = dh * z;
  }

  // drh = da_n Rn. dh_seen is added to.
  template <class V, class F = Plain>
  FUSEDRNN_INLINE void backward_gate(const V& r, const V& h_seen, const V& drh, V& da_r, V& dh_seen, const F& f = F()) {
    da_r = f.gate_back(drh * h_seen, r);
    dh_seen = dh_seen + drh * r;
  }
};

}  // namespace fusedrnn::cells
