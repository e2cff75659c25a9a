// SPDX-License-Identifier: Apache-2.0
// ONNX's activations on a row of units, and their slopes, which are taken from the values (see api.h for the
// conditions). Rows are padded to whole registers and changed in place. Limit: exp, one or two a unit; the others are
// bound by L1.
#pragma once

#include "../api.h"
#include "vec.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// exp(x) - 1 and exp(x) for x <= 0.
template <class S>
FUSEDRNN_FORCE Vec<S> exp_less_one(Vec<S> x) {
  const Exp<S, -1> e(clamp(0 - x, static_cast<S>(sizeof(S) == 4 ? 87 : 700)));
  return e.scale * (e.tail * e.r) + (e.scale - Vec<S>(S(1)));
}
template <class S>
FUSEDRNN_FORCE Vec<S> where_positive(Vec<S> x, Vec<S> yes, Vec<S> no) {
  return x.v > Vec<S>(0).v ? yes.v : no.v;
}

template <class S, class F>
FUSEDRNN_FORCE void change_row(S* x, int64_t n, F f) {
  for (int64_t u = 0; u < n; u += Vec<S>::lanes) store(x + u, f(load(x + u)));
}
template <class S, class F>
FUSEDRNN_FORCE void change_row(S* d, const S* y, int64_t n, F f) {
  for (int64_t u = 0; u < n; u += Vec<S>::lanes) store(d + u, load(d + u) * f(load(y + u)));
}

template <class S>
void activate(const Activation& activation, S* x, int64_t n) {
  using V = Vec<S>;
  const V a(static_cast<S>(activation.alpha)), b(static_cast<S>(activation.beta)), one(S(1)), zero(S(0));
  switch (activation.kind) {
    case ActivationKind::sigmoid:
      return change_row(x, n, [](V v) { return sigmoid(v); });
    case ActivationKind::tanh:
      return change_row(x, n, [](V v) { return tanh(v); });
    case ActivationKind::relu:
      return change_row(x, n, [](V v) { return relu(v); });
    case ActivationKind::affine:
      return change_row(x, n, [&](V v) { return a * v + b; });
    case ActivationKind::leaky_relu:
      return change_row(x, n, [&](V v) -> V { return v.v < zero.v ? (a * v).v : v.v; });
    case ActivationKind::thresholded_relu:
      return change_row(x, n, [&](V v) -> V { return v.v <= a.v ? zero.v : v.v; });
    case ActivationKind::scaled_tanh:
      return change_row(x, n, [&](V v) { return a * tanh(b * v); });
    case ActivationKind::hard_sigmoid:
      return change_row(x, n, [&](V v) -> V {
        const V y = a * v + b, low = relu(y);
        return low.v >= one.v ? one.v : low.v;
      });
    case ActivationKind::elu:
      return change_row(x, n, [&](V v) -> V { return v.v <= zero.v ? (a * exp_less_one(v)).v : v.v; });
    case ActivationKind::softsign:
      return change_row(x, n, [&](V v) { return v / (one + relu(v) + relu(zero - v)); });
    case ActivationKind::softplus:
      return change_row(x, n, [](V v) { return softplus(v); });
  }
}

// d *= f'(x), where y = f(x).
template <class S>
void times_slope(const Activation& activation, const S* y, S* d, int64_t n) {
  using V = Vec<S>;
  const V a(static_cast<S>(activation.alpha)), b(static_cast<S>(activation.beta)), one(S(1)), zero(S(0));
  switch (activation.kind) {
    case ActivationKind::sigmoid:
      return change_row(d, y, n, [](V v) { return v * (1 - v); });
    case ActivationKind::tanh:
      return change_row(d, y, n, [](V v) { return 1 - v * v; });
    case ActivationKind::relu:
    case ActivationKind::thresholded_relu:
      return change_row(d, y, n, [&](V v) -> V { return v.v <= zero.v ? zero.v : one.v; });
    case ActivationKind::affine:
      return change_row(d, y, n, [&](V) { return a; });
    case ActivationKind::leaky_relu:
      return change_row(d, y, n, [&](V v) -> V { return v.v <= zero.v ? a.v : one.v; });
    case ActivationKind::scaled_tanh:
      return change_row(d, y, n, [&](V v) { return b * (a - v * v / a); });
    case ActivationKind::hard_sigmoid:
      return change_row(d, y, n, [&](V v) -> V {
        const V above = v.v <= zero.v ? zero.v : a.v;
        return v.v >= one.v ? zero.v : above.v;
      });
    case ActivationKind::elu:
      return change_row(d, y, n, [&](V v) { return where_positive(v, one, v + a); });
    case ActivationKind::softsign:
      return change_row(d, y, n, [&](V v) {
        const V rest = one - relu(v) - relu(zero - v);
        return rest * rest;
      });
    case ActivationKind::softplus:
      return change_row(d, y, n, [&](V v) { return zero - exp_less_one(zero - v); });
  }
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
