// SPDX-License-Identifier: Apache-2.0
// What the cells call with V = float (in terms of dev::ex2 and dev::rcp) or double. Must come before cells/*.h: a
// number has no namespace of its own to look the names up in, so they are found here, one namespace out.
#pragma once

#include <cmath>

namespace fusedrnn {

FUSEDRNN_DEVICE float sigmoid(float x) { return dev::rcp(1.0f + dev::ex2(-1.4426950408889634f * x)); }
FUSEDRNN_DEVICE float tanh(float x) { return 1.0f - 2.0f * dev::rcp(1.0f + dev::ex2(2.8853900817779268f * x)); }
FUSEDRNN_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
FUSEDRNN_DEVICE double tanh(double x) { return ::tanh(x); }
template <class V>
FUSEDRNN_DEVICE V relu(V x) {  // NaN stays NaN
  return x < V(0) ? V(0) : x;
}
// log(1 + exp(x))
FUSEDRNN_DEVICE float softplus(float x) { return relu(x) + ::log1pf(dev::ex2(-1.4426950408889634f * ::fabsf(x))); }
FUSEDRNN_DEVICE double softplus(double x) { return relu(x) + ::log1p(::exp(-::fabs(x))); }
template <class V>
FUSEDRNN_DEVICE V positive(V v, V x) {
  return x > V(0) ? v : V(0);
}
// |x| <= limit; limit 0 = off. NaN stays NaN.
template <class V>
FUSEDRNN_DEVICE V clamp(V x, V limit) {
  if (limit > V(0)) x = x > limit ? limit : x < -limit ? -limit : x;
  return x;
}
// v where x is strictly inside the limit, else 0: the derivative of clamp.
template <class V>
FUSEDRNN_DEVICE V inside(V v, V x, V limit) {
  return limit > V(0) && !(x < limit && x > -limit) ? V(0) : v;
}

}  // namespace fusedrnn
