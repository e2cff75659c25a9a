// SPDX-License-Identifier: Apache-2.0
// GRU, one unit, one step (Cho et al. 2014; gate order r, z, n of PyTorch and cuDNN).
//   r, z = sigmoid(x W^T + bW + h' R^T + bR);   h = (1 - z) n + z h'
//   Gru:            n = tanh(x Wn^T + bWn + r (h' Rn^T + bRn))          reset after the product: PyTorch, cuDNN
//   GruResetBefore: n = tanh(x Wn^T + bWn + (r h') Rn^T + bRn)          reset before it: the paper, Keras v2, ONNX
//   default
// V is a number: a SIMD vector, a Dual of one, or a CUDA float. sigmoid and tanh are found by V's namespace;
// whoever includes this defines FUSEDRNN_INLINE (static, forced inline, __device__ under nvcc).
#pragma once

namespace fusedrnn::cells {

struct Gru {
  static constexpr int gates = 3;
  static constexpr int sums = 4;  // r, z, n of x, n of h'
  static constexpr int kept = 4;  // r, z, n, and the h' part of n's sum
  static constexpr bool cell_state = false;
  static constexpr bool state_product = true;
  static constexpr bool two_products = false;
  static constexpr int x_sum[3] = {0, 1, 2};
  static constexpr int h_sum[3] = {0, 1, 3};

  template <class V, class S>
  FUSEDRNN_INLINE void forward(const V* a, const V& h_prev, const V&, S, V* k, V& h, V&) {
    k[0] = sigmoid(a[0]);
    k[1] = sigmoid(a[1]);
    k[2] = tanh(a[2] + k[0] * a[3]);
    k[3] = a[3];
    h = k[2] + k[1] * (h_prev - k[2]);
  }

  template <class V, class S>
  FUSEDRNN_INLINE void backward(const V* k, const V& h_prev, const V&, const V&, const V&, S, const V& dh, const V&,
                                V* da, V& dh_prev, V&) {
    da[2] = dh * (1 - k[1]) * (1 - k[2] * k[2]);
    da[3] = da[2] * k[0];
    da[0] = da[2] * k[3] * k[0] * (1 - k[0]);
    da[1] = dh * (h_prev - k[2]) * k[1] * (1 - k[1]);
    dh_prev = dh * k[1];
  }
};

// Two products a step: first r and z from h', then n from r h'. The engine calls `gate`, multiplies, calls `forward`;
// backward in the other order: `backward`, multiply da[2] by Rn, then `backward_gate` with that product.
struct GruResetBefore {
  static constexpr int gates = 3;
  static constexpr int sums = 3;
  static constexpr int kept = 3;  // r, z, n
  static constexpr bool cell_state = false;
  static constexpr bool state_product = true;
  static constexpr bool two_products = true;
  static constexpr int x_sum[3] = {0, 1, 2};
  static constexpr int h_sum[3] = {0, 1, 2};

  // a[0], a[1] are complete. k[0], k[1] are set; rh is what the second product multiplies.
  template <class V>
  FUSEDRNN_INLINE void gate(const V& a_r, const V& a_z, const V& h_prev, V& r, V& z, V& rh) {
    r = sigmoid(a_r);
    z = sigmoid(a_z);
    rh = r * h_prev;
  }

  template <class V>
  FUSEDRNN_INLINE void forward(const V& a_n, const V& z, const V& h_prev, V& n, V& h) {
    n = tanh(a_n);
    h = n + z * (h_prev - n);
  }

  template <class V>
  FUSEDRNN_INLINE void backward(const V& z, const V& n, const V& h_prev, const V& dh, V& da_z, V& da_n, V& dh_prev) {
    da_n = dh * (1 - z) * (1 - n * n);
    da_z = dh * (h_prev - n) * z * (1 - z);
    dh_prev = dh * z;
  }

  // drh = da_n Rn. dh_prev is added to.
  template <class V>
  FUSEDRNN_INLINE void backward_gate(const V& r, const V& h_prev, const V& drh, V& da_r, V& dh_prev) {
    da_r = drh * h_prev * r * (1 - r);
    dh_prev = dh_prev + drh * r;
  }
};

}  // namespace fusedrnn::cells
