// SPDX-License-Identifier: Apache-2.0
// What the cells call with V = float, in terms of dev::ex2 and dev::rcp. Must come before cells/*.h: float has no namespace of its own
// to look the names up in, so they are found here, one namespace out.
#pragma once

namespace fusedrnn {

FUSEDRNN_DEVICE float sigmoid(float x) { return dev::rcp(1.0f + dev::ex2(-1.4426950408889634f * x)); }
FUSEDRNN_DEVICE float tanh(float x) { return 1.0f - 2.0f * dev::rcp(1.0f + dev::ex2(2.8853900817779268f * x)); }
FUSEDRNN_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN
FUSEDRNN_DEVICE float positive(float v, float x) { return x > 0.0f ? v : 0.0f; }
// |x| <= limit; limit 0 = off. NaN stays NaN.
FUSEDRNN_DEVICE float clamp(float x, float limit) {
  if (limit > 0.0f) x = x > limit ? limit : x < -limit ? -limit : x;
  return x;
}
// v where x is strictly inside the limit, else 0: the derivative of clamp.
FUSEDRNN_DEVICE float inside(float v, float x, float limit) {
  return limit > 0.0f && !(x < limit && x > -limit) ? 0.0f : v;
}

}  // namespace fusedrnn
