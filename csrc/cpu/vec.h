// SPDX-License-Identifier: Apache-2.0
// Numbers that the cells run on: Vec<S>, one register of S = float or double, and Dual<V>, a value with its tangent.
// Compiler vector types; an intrinsic only where the compiler does not find the instruction by itself.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef FUSEDRNN_ISA
#error "compiled once per instruction set, with -DFUSEDRNN_ISA=<name>; see dispatch.cpp"
#endif

#include "threads.h"

#define FUSEDRNN_INLINE static FUSEDRNN_FORCE  // for csrc/cells

namespace fusedrnn::cpu::FUSEDRNN_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
#if defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 instead of 16
#else
constexpr bool kManyRegisters = kBytes == 64;
#endif

template <class S>
struct Register;
template <>
struct Register<float> {
  typedef float Native __attribute__((vector_size(kBytes)));
  typedef float Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(float)), may_alias));
  typedef int32_t Int __attribute__((vector_size(kBytes)));
  static constexpr int mantissa = 23;
};
template <>
struct Register<double> {
  typedef double Native __attribute__((vector_size(kBytes)));
  typedef double Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(double)), may_alias));
  typedef int64_t Int __attribute__((vector_size(kBytes)));
  static constexpr int mantissa = 52;
};

template <class S>
struct Vec {
  using Scalar = S;
  static constexpr int lanes = kBytes / sizeof(S);
  using Native = typename Register<S>::Native;
  using Unaligned = typename Register<S>::Unaligned;
  using Int = typename Register<S>::Int;

  Native v;

  Vec() = default;
  FUSEDRNN_FORCE Vec(Native n) : v(n) {}
  FUSEDRNN_FORCE explicit Vec(S s) : v(s - Native{}) {}  // x - 0 is x, also for -0: one broadcast

  friend FUSEDRNN_FORCE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FUSEDRNN_FORCE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FUSEDRNN_FORCE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FUSEDRNN_FORCE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend FUSEDRNN_FORCE Vec operator-(S a, Vec b) { return Vec(a).v - b.v; }
  friend FUSEDRNN_FORCE Vec operator+(S a, Vec b) { return Vec(a).v + b.v; }
  friend FUSEDRNN_FORCE Vec operator*(S a, Vec b) { return Vec(a).v * b.v; }
};

template <class S>
FUSEDRNN_FORCE Vec<S> load(const S* p) {
  return typename Vec<S>::Native(*reinterpret_cast<const typename Vec<S>::Unaligned*>(p));
}
template <class S>
FUSEDRNN_FORCE void store(S* p, Vec<S> a) {
  *reinterpret_cast<typename Vec<S>::Unaligned*>(p) = a.v;
}

// The first n lanes, 0 < n <= lanes; the others are read as zero and not written.
template <class S>
FUSEDRNN_FORCE Vec<S> load(const S* p, int64_t n) {
  if (n == Vec<S>::lanes) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return typename Vec<S>::Native(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
  else
    return typename Vec<S>::Native(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
#else
  typename Vec<S>::Native v{};
  for (int64_t j = 0; j < n; ++j) v[j] = p[j];
  return v;
#endif
}
template <class S>
FUSEDRNN_FORCE void store(S* p, Vec<S> a, int64_t n) {
  if (n == Vec<S>::lanes) return store(p, a);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), a.v);
#else
  for (int64_t j = 0; j < n; ++j) p[j] = a.v[j];
#endif
}

// Comparisons are written so that NaN falls through to x.
template <class S>
FUSEDRNN_FORCE Vec<S> clamp(Vec<S> x, S limit) {
  const auto hi = Vec<S>(limit).v, lo = Vec<S>(-limit).v;
  const auto y = x.v > hi ? hi : x.v;
  return y < lo ? lo : y;
}
// g where |x| < limit (or x is NaN), else 0.
template <class S>
FUSEDRNN_FORCE Vec<S> inside(Vec<S> g, Vec<S> x, S limit) {
  const auto zero = Vec<S>(0).v;
  const auto y = x.v >= Vec<S>(limit).v ? zero : g.v;
  return x.v <= Vec<S>(-limit).v ? zero : y;
}
template <class S>
FUSEDRNN_FORCE Vec<S> relu(Vec<S> x) {
  const auto zero = Vec<S>(0).v;
  return x.v < zero ? zero : x.v;
}
template <class S>
FUSEDRNN_FORCE Vec<S> positive(Vec<S> g, Vec<S> x) {
  const auto zero = Vec<S>(0).v;
  return x.v <= zero ? zero : g.v;
}

// exp(x) - 1 = scale * part + (scale - 1) with scale = 2^n, part = exp(r) - 1, x = n log 2 + r, |r| <= log(2)/2.
// |x| <= 88 (708 for double) is the caller's care; NaN goes into part.
template <class S>
struct Exp {
  Vec<S> scale, part;
};
template <class S>
FUSEDRNN_FORCE Exp<S> split_exp(Vec<S> x) {
  using V = Vec<S>;
  constexpr int m = Register<S>::mantissa;
  const V magic(static_cast<S>(sizeof(S) == 4 ? 0x1.8p23 : 0x1.8p52));
  const V t = V(static_cast<S>(1.4426950408889634)) * x + magic;
  const V n = t - magic;
  V r, q;
  if constexpr (sizeof(S) == 4) {
    r = x - n * V(0x1.62e400p-1f) - n * V(0x1.7f7d1cp-20f);
    q = V(0.0013926376f);
    q = q * r + V(0.0083633335f);
    q = q * r + V(0.041666552f);
    q = q * r + V(0.16666576f);
    q = q * r + V(0.5f);
  } else {
    r = x - n * V(0x1.62e42fefa3800p-1) - n * V(0x1.ef35793c76730p-45);
    q = V(2.0912843483161167e-09);
    q = q * r + V(2.5105466819243704e-08);
    q = q * r + V(2.755727908522525e-07);
    q = q * r + V(2.755725481017472e-06);
    q = q * r + V(2.4801587320047256e-05);
    q = q * r + V(0.0001984126987527486);
    q = q * r + V(0.0013888888888885969);
    q = q * r + V(0.00833333333332601);
    q = q * r + V(0.041666666666666664);
    q = q * r + V(0.1666666666666667);
    q = q * r + V(0.5);
  }
  // The low bits of t hold n; the magic number's own bits leave at the top.
  using Int = typename V::Int;
  const V one(S(1));
  const Int scale = (reinterpret_cast<Int>(t.v) << m) + reinterpret_cast<Int>(one.v);
  return {V(reinterpret_cast<typename V::Native>(scale)), q * r * r + r};
}

template <class S>
FUSEDRNN_FORCE Vec<S> sigmoid(Vec<S> x) {
  const Exp<S> e = split_exp(clamp(0 - x, static_cast<S>(sizeof(S) == 4 ? 87 : 700)));
  return Vec<S>(1) / (1 + (e.scale * e.part + e.scale));
}
template <class S>
FUSEDRNN_FORCE Vec<S> tanh(Vec<S> x) {
  const Exp<S> e = split_exp(clamp(x + x, static_cast<S>(sizeof(S) == 4 ? 19 : 40)));
  const Vec<S> em1 = e.scale * e.part + (e.scale - Vec<S>(1));
  return em1 / (em1 + Vec<S>(2));
}

// A value and its tangent. Every function of the cells, by the chain rule.
template <class V>
struct Dual {
  using Scalar = typename V::Scalar;
  V v, t;

  Dual() = default;
  FUSEDRNN_FORCE Dual(V value, V tangent) : v(value), t(tangent) {}
  FUSEDRNN_FORCE explicit Dual(Scalar s) : v(s), t(Scalar(0)) {}

  friend FUSEDRNN_FORCE Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.t + b.t}; }
  friend FUSEDRNN_FORCE Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.t - b.t}; }
  friend FUSEDRNN_FORCE Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.t * b.v + a.v * b.t}; }
  friend FUSEDRNN_FORCE Dual operator-(Scalar a, Dual b) { return {a - b.v, 0 - b.t}; }
};

template <class V>
FUSEDRNN_FORCE Dual<V> sigmoid(Dual<V> x) {
  const V y = sigmoid(x.v);
  return {y, x.t * y * (1 - y)};
}
template <class V>
FUSEDRNN_FORCE Dual<V> tanh(Dual<V> x) {
  const V y = tanh(x.v);
  return {y, x.t * (1 - y * y)};
}
template <class V, class S>
FUSEDRNN_FORCE Dual<V> clamp(Dual<V> x, S limit) {
  return {clamp(x.v, limit), inside(x.t, x.v, limit)};
}
template <class V, class S>
FUSEDRNN_FORCE Dual<V> inside(Dual<V> g, Dual<V> x, S limit) {
  return {inside(g.v, x.v, limit), inside(g.t, x.v, limit)};
}
template <class V>
FUSEDRNN_FORCE Dual<V> relu(Dual<V> x) {
  return {relu(x.v), positive(x.t, x.v)};
}
template <class V>
FUSEDRNN_FORCE Dual<V> positive(Dual<V> g, Dual<V> x) {
  return {positive(g.v, x.v), positive(g.t, x.v)};
}

// One number in P planes of memory: P = 1 a Vec, P = 2 a Dual whose parts lie in two arrays.
template <class S, int P>
struct Planes;
template <class S>
struct Planes<S, 1> {
  using Number = Vec<S>;
  static FUSEDRNN_FORCE Number read(const S* const* p, int64_t i, int64_t n) { return load(p[0] + i, n); }
  static FUSEDRNN_FORCE void write(S* const* p, int64_t i, Number a, int64_t n) { store(p[0] + i, a, n); }
};
template <class S>
struct Planes<S, 2> {
  using Number = Dual<Vec<S>>;
  static FUSEDRNN_FORCE Number read(const S* const* p, int64_t i, int64_t n) {
    return {load(p[0] + i, n), load(p[1] + i, n)};
  }
  static FUSEDRNN_FORCE void write(S* const* p, int64_t i, Number a, int64_t n) {
    store(p[0] + i, a.v, n);
    store(p[1] + i, a.t, n);
  }
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
