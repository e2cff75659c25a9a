// SPDX-License-Identifier: Apache-2.0
// Probabilities that never underflow: a register of numbers m * 2^e, with m and the whole number e in floating point.
// The log-semiring of CTC and hidden Markov models without logarithms: a product is a multiplication and an addition,
// a sum needs 2^n for whole n only. Rounding is relative to the probability, where log(p) in float32 rounds to
// |log p| * 6e-8, which for p = e^-4000 is a part in 4000.
// A number is nothing (zero) where e <= kNothing / 2, whatever m is. m may be anything from 2^-40 to 2^40: sums lose
// only what is smaller by 2^-80. NaN lives in m.
#pragma once

#include "vec.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {
namespace {

constexpr double kNothing = -1e38;  // in float32's range; sums of a few stay finite
constexpr double kLargest = 1e37f;  // scores from here on are no scores, as NaN is; those below -1e37 are -inf
constexpr int kRenewal = 16;  // steps after which m must be brought back to [1, 2): each multiplies it by 0.7..4.3

template <class S>
struct Wide {
  Vec<S> m, e;
};

// `marks`, and 1 where x is NaN or too large to be a score.
template <class S>
FUSEDRNN_FORCE Vec<S> marked(Vec<S> marks, Vec<S> x) {
  const Vec<S> limit(static_cast<S>(kLargest)), one(S(1));
  return x.v < limit.v ? marks.v : one.v;
}
template <class S>
FUSEDRNN_FORCE bool any(Vec<S> marks) {
  S sum = 0;
  for (int j = 0; j < Vec<S>::lanes; ++j) sum += marks.v[j];
  return sum != 0;
}

// The larger one; b where one is NaN.
template <class S>
FUSEDRNN_FORCE Vec<S> larger(Vec<S> a, Vec<S> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return typename Vec<S>::Native(_mm512_maskz_max_ps(0xffff, a.v, b.v));
  else
    return typename Vec<S>::Native(_mm512_maskz_max_pd(0xff, a.v, b.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    return typename Vec<S>::Native(_mm256_max_ps(a.v, b.v));
  else
    return typename Vec<S>::Native(_mm256_max_pd(a.v, b.v));
#else
  return a.v > b.v ? a.v : b.v;
#endif
}

// m * 2^d for whole d <= 127; 0 (or NaN) far below.
template <class S>
FUSEDRNN_FORCE Vec<S> scaled(Vec<S> m, Vec<S> d) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return typename Vec<S>::Native(_mm512_maskz_scalef_ps(0xffff, m.v, d.v));
  else
    return typename Vec<S>::Native(_mm512_maskz_scalef_pd(0xff, m.v, d.v));
#else
  // The magic number leaves d + bias in the lowest bits: the exponent of 2^d, or that of 0.
  constexpr S magic = sizeof(S) == 4 ? 0x1.8p23 : 0x1.8p52, bias = sizeof(S) == 4 ? 127 : 1023;
  const Vec<S> t = larger(d + Vec<S>(magic + bias), Vec<S>(magic));
  using Int = typename Vec<S>::Int;
  return m * Vec<S>(reinterpret_cast<typename Vec<S>::Native>(reinterpret_cast<Int>(t.v) << Register<S>::mantissa));
#endif
}

template <class S>
FUSEDRNN_FORCE Wide<S> product(Wide<S> a, Wide<S> b) {
  return {a.m * b.m, larger(a.e + b.e, Vec<S>(static_cast<S>(kNothing)))};
}
template <class S>
FUSEDRNN_FORCE Wide<S> sum(Wide<S> a, Wide<S> b) {
  const Vec<S> e = larger(a.e, b.e);
  return {scaled(a.m, a.e - e) + scaled(b.m, b.e - e), e};
}
template <class S>
FUSEDRNN_FORCE Wide<S> sum(Wide<S> a, Wide<S> b, Wide<S> c) {
  const Vec<S> e = larger(larger(a.e, b.e), c.e);
  return {scaled(a.m, a.e - e) + scaled(b.m, b.e - e) + scaled(c.m, c.e - e), e};
}

// The same numbers with m in [1, 2); NaN stays.
template <class S>
FUSEDRNN_FORCE Wide<S> renewed(Wide<S> a) {
  using Int = typename Vec<S>::Int;
  constexpr int bias = sizeof(S) == 4 ? 127 : 1023;
  const Int k = (reinterpret_cast<Int>(a.m.v) >> Register<S>::mantissa) - bias;
  const Vec<S> power(reinterpret_cast<typename Vec<S>::Native>((bias - k) << Register<S>::mantissa));
  const Vec<S> e = a.e + Vec<S>(__builtin_convertvector(k, typename Vec<S>::Native));
  return {a.m * power, larger(e, Vec<S>(static_cast<S>(kNothing)))};
}

// exp(x), with m in [0.7, 1.5]. Below -1e37 it is nothing, as for -inf.
template <class S>
FUSEDRNN_FORCE Wide<S> wide_exp(Vec<S> x) {
  const Vec<S> magic(static_cast<S>(sizeof(S) == 4 ? 0x1.8p23 : 0x1.8p52));
  const Vec<S> near = clamp(x, static_cast<S>(kLargest));
  const Vec<S> n = (Vec<S>(static_cast<S>(1.4426950408889634)) * near + magic) - magic;
  Vec<S> r;
  if constexpr (sizeof(S) == 4)
    r = near - n * Vec<S>(0x1.62e400p-1f) - n * Vec<S>(0x1.7f7d1cp-20f);
  else
    r = near - n * Vec<S>(0x1.62e42fefa3800p-1) - n * Vec<S>(0x1.ef35793c76730p-45);
  const Exp<S, 1> e(clamp(r, static_cast<S>(0.35)));  // the clamp acts where x has no fraction left
  const Vec<S> zero(S(0)), low(static_cast<S>(-kLargest)), nothing(static_cast<S>(kNothing));
  const Vec<S> whole(n.v == n.v ? n.v : zero.v);
  return {e.scale * (e.tail * e.r + Vec<S>(S(1))), Vec<S>(near.v <= low.v ? nothing.v : whole.v)};
}

// exp(x) as it is; 0 below the smallest number, inf above exp(87) or exp(700), NaN where x is no score.
template <class S>
FUSEDRNN_FORCE Vec<S> plain_exp(Vec<S> x) {
  constexpr S limit = sizeof(S) == 4 ? 87 : 700;
  const Exp<S, 1> e(x);  // there is no 2^n beyond the limits; what comes out for it is replaced
  const Vec<S> y = e.scale * (e.tail * e.r + Vec<S>(S(1))), zero(S(0));
  const Vec<S> infinity(static_cast<S>(__builtin_huge_val())), none(static_cast<S>(__builtin_nan("")));
  const Vec<S> below(x.v > Vec<S>(limit).v ? infinity.v : y.v);
  const Vec<S> finite(x.v < Vec<S>(-limit).v ? zero.v : below.v);
  return x.v < Vec<S>(static_cast<S>(kLargest)).v ? finite.v : none.v;
}

// log of one number, in float64.
FUSEDRNN_FORCE double wide_log(double m, double e) {
  if (m != m) return m;
  return e <= kNothing / 2 ? -__builtin_huge_val() : __builtin_log(m) + e * 0.69314718055994531;
}

}  // namespace
}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
