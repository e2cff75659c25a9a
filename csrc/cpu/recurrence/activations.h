// SPDX-License-Identifier: Apache-2.0
// ONNX's activations y = f(x), their slopes f'(x) and the slopes' own slopes, both taken from y (api.h: conditions).
// Read, written: registers, or rows that are padded to whole registers and changed in place.
// Route: `with_activation` chooses once, so that a loop over a row holds one function only.
// Limit: exp, one or two a unit; the others are bound by L1.
#pragma once

#include "api.h"
#include "cpu/arithmetic/vec.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// exp(x) - 1 for x <= 0.
template <class S>
FUSEDRNN_FORCE Vec<S> exp_less_one(Vec<S> x) {
  const Exp<S, -1> e(clamp(0 - x, static_cast<S>(sizeof(S) == 4 ? 87 : 700)));
  return e.scale * (e.tail * e.r) + (e.scale - Vec<S>(S(1)));
}
template <class S>
FUSEDRNN_FORCE Vec<S> where_positive(Vec<S> x, Vec<S> yes, Vec<S> no) {
  return x.v > Vec<S>(0).v ? yes.v : no.v;
}

// One struct for each of ActivationKind. value(x) is y; slope(y) is dy/dx; bend(y) is d slope / dy.
namespace activation {

template <class S>
struct Constants {
  using V = Vec<S>;
  V a, b, one, zero;
  explicit FUSEDRNN_FORCE Constants(const Activation& of)
      : a(static_cast<S>(of.alpha)), b(static_cast<S>(of.beta)), one(S(1)), zero(S(0)) {}
};

#define FUSEDRNN_ACTIVATION(Name, value_of_x, slope_of_y, bend_of_y)   \
  template <class S>                                                   \
  struct Name : Constants<S> {                                         \
    using V = Vec<S>;                                                  \
    using Constants<S>::a, Constants<S>::b;                            \
    using Constants<S>::one, Constants<S>::zero;                       \
    using Constants<S>::Constants;                                     \
    FUSEDRNN_FORCE V value([[maybe_unused]] V x) const { value_of_x; } \
    FUSEDRNN_FORCE V slope([[maybe_unused]] V y) const { slope_of_y; } \
    FUSEDRNN_FORCE V bend([[maybe_unused]] V y) const { bend_of_y; }   \
  };
FUSEDRNN_ACTIVATION(Sigmoid, return fusedrnn::cpu::FUSEDRNN_ISA::sigmoid(x), return y * (1 - y), return one - y - y)
FUSEDRNN_ACTIVATION(Tanh, return fusedrnn::cpu::FUSEDRNN_ISA::tanh(x), return 1 - y * y, return zero - y - y)
FUSEDRNN_ACTIVATION(Relu, return relu(x), return y.v <= zero.v ? zero.v : one.v, return zero)
FUSEDRNN_ACTIVATION(Affine, return a * x + b, return a, return zero)
FUSEDRNN_ACTIVATION(LeakyRelu, return x.v < zero.v ? (a * x).v : x.v, return y.v <= zero.v ? a.v : one.v, return zero)
FUSEDRNN_ACTIVATION(ThresholdedRelu, return x.v <= a.v ? zero.v : x.v, return y.v <= zero.v ? zero.v : one.v,
                    return zero)
FUSEDRNN_ACTIVATION(ScaledTanh, return a * fusedrnn::cpu::FUSEDRNN_ISA::tanh(b * x), return b * (a - y * y / a),
                    return zero - b * (y + y) / a)
FUSEDRNN_ACTIVATION(
    HardSigmoid,
    {
      const V low = relu(a * x + b);
      return low.v >= one.v ? one.v : low.v;
    },
    {
      const V above = y.v <= zero.v ? zero.v : a.v;
      return y.v >= one.v ? zero.v : above.v;
    },
    return zero)
FUSEDRNN_ACTIVATION(Elu, return x.v <= zero.v ? (a * exp_less_one(x)).v : x.v, return where_positive(y, one, y + a),
                    return where_positive(y, zero, one))
FUSEDRNN_ACTIVATION(
    Softsign, return x / (one + relu(x) + relu(zero - x)),
    {
      const V rest = one - relu(y) - relu(zero - y);
      return rest * rest;
    },
    {
      const V rest = one - relu(y) - relu(zero - y);
      return where_positive(y, zero - rest - rest, rest + rest);
    })
FUSEDRNN_ACTIVATION(Softplus, return softplus(x), return zero - exp_less_one(zero - y),
                    return one + exp_less_one(zero - y))
#undef FUSEDRNN_ACTIVATION

}  // namespace activation

// Calls f with the struct of `of`.
template <class S, class F>
FUSEDRNN_FORCE void with_activation(const Activation& of, F f) {
  switch (of.kind) {
    case ActivationKind::sigmoid:
      return f(activation::Sigmoid<S>(of));
    case ActivationKind::tanh:
      return f(activation::Tanh<S>(of));
    case ActivationKind::relu:
      return f(activation::Relu<S>(of));
    case ActivationKind::affine:
      return f(activation::Affine<S>(of));
    case ActivationKind::leaky_relu:
      return f(activation::LeakyRelu<S>(of));
    case ActivationKind::thresholded_relu:
      return f(activation::ThresholdedRelu<S>(of));
    case ActivationKind::scaled_tanh:
      return f(activation::ScaledTanh<S>(of));
    case ActivationKind::hard_sigmoid:
      return f(activation::HardSigmoid<S>(of));
    case ActivationKind::elu:
      return f(activation::Elu<S>(of));
    case ActivationKind::softsign:
      return f(activation::Softsign<S>(of));
    case ActivationKind::softplus:
      return f(activation::Softplus<S>(of));
  }
}

// A register or a dual number of them: y = f(x), and d times the slope that y tells. Calls, because eleven functions in
// the place of each activation would be too much code.
template <class S>
Vec<S> activated(const Activation& of, Vec<S> x) {
  with_activation<S>(of, [&](auto f) { x = f.value(x); });
  return x;
}
template <class S>
Vec<S> times_slope(const Activation& of, Vec<S> d, Vec<S> y) {
  with_activation<S>(of, [&](auto f) { d = d * f.slope(y); });
  return d;
}
template <class S>
Dual<Vec<S>> activated(const Activation& of, Dual<Vec<S>> x) {
  with_activation<S>(of, [&](auto f) {
    x.v = f.value(x.v);
    x.t = x.t * f.slope(x.v);
  });
  return x;
}
template <class S>
Dual<Vec<S>> times_slope(const Activation& of, Dual<Vec<S>> d, Dual<Vec<S>> y) {
  with_activation<S>(of, [&](auto f) { d = d * Dual<Vec<S>>(f.slope(y.v), f.bend(y.v) * y.t); });
  return d;
}

template <class S, class F>
FUSEDRNN_FORCE void change_row(S* x, int64_t n, F f) {
  for (int64_t u = 0; u < n; u += Vec<S>::lanes) store(x + u, f(load(x + u)));
}
template <class S>
void activate_row(const Activation& of, S* x, int64_t n) {
  with_activation<S>(of, [&](auto f) { change_row(x, n, [&](Vec<S> v) { return f.value(v); }); });
}
// d *= f'(x), where y = f(x).
template <class S>
void times_slope_row(const Activation& of, const S* y, S* d, int64_t n) {
  with_activation<S>(of, [&](auto f) {
    for (int64_t u = 0; u < n; u += Vec<S>::lanes) store(d + u, load(d + u) * f.slope(load(y + u)));
  });
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
