// SPDX-License-Identifier: Apache-2.0
// Numbers that the cells run on: Vec<S>, one register of S = float or double, and Dual<V>, a value with its tangent.
// Compiler vector types; an intrinsic only where the compiler does not find the instruction by itself.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef FUSEDRNN_ISA
#error "compiled once per instruction set, with -DFUSEDRNN_ISA=<name>; see dispatch.cpp"
#endif

#include "cpu/threads/threads.h"

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

// 64-bit lanes, and the product of their lower halves.
typedef uint64_t Wide __attribute__((vector_size(kBytes)));
constexpr int kWideLanes = kBytes / 8;
FUSEDRNN_FORCE Wide times_low(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  return Wide(_mm512_maskz_mul_epu32(0xFF, __m512i(a), _mm512_set1_epi64(b)));  // GCC warns of the other one
#elif defined(__AVX2__)
  return Wide(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return Wide(_mm_mul_epu32(__m128i(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

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
  const Vec<S> hi(limit), lo(-limit);
#if defined(__AVX512F__)  // the second argument where one is NaN; maskz avoids a false warning of g++ 12
  if constexpr (sizeof(S) == 4)
    return typename Vec<S>::Native(_mm512_maskz_max_ps(0xffff, lo.v, _mm512_maskz_min_ps(0xffff, hi.v, x.v)));
  else
    return typename Vec<S>::Native(_mm512_maskz_max_pd(0xff, lo.v, _mm512_maskz_min_pd(0xff, hi.v, x.v)));
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    return typename Vec<S>::Native(_mm256_max_ps(lo.v, _mm256_min_ps(hi.v, x.v)));
  else
    return typename Vec<S>::Native(_mm256_max_pd(lo.v, _mm256_min_pd(hi.v, x.v)));
#else
  const auto y = x.v > hi.v ? hi.v : x.v;
  return y < lo.v ? lo.v : y;
#endif
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

// Both activations rest on exp(a x) = 2^n exp(a r) with a x = n log 2 + a r, |a r| <= log(2) / 2 and a = -1 or 2,
// folded into the constants. |x| is clamped so that 2^n exists; NaN stays in r. `tail`(r) = (exp(a r) - 1) / r.
template <class S, int A>
struct Exp {
  using V = Vec<S>;
  V scale, r, tail;

  FUSEDRNN_FORCE explicit Exp(V x) {
    constexpr S a = A;
    const V magic(static_cast<S>(sizeof(S) == 4 ? 0x1.8p23 : 0x1.8p52));
    const V t = V(static_cast<S>(a * 1.4426950408889634)) * x + magic;
    const V n = t - magic;
    if constexpr (sizeof(S) == 4) {
      r = x - n * V(0x1.62e400p-1f / a) - n * V(0x1.7f7d1cp-20f / a);
      tail = polynomial<4>({0.0013926376, 0.0083633335, 0.041666552, 0.16666576, 0.5});
    } else {
      r = x - n * V(0x1.62e42fefa3800p-1 / a) - n * V(0x1.ef35793c76730p-45 / a);
      tail =
          polynomial<10>({2.0912843483161167e-09, 2.5105466819243704e-08, 2.755727908522525e-07, 2.755725481017472e-06,
                          2.4801587320047256e-05, 0.0001984126987527486, 0.0013888888888885969, 0.00833333333332601,
                          0.041666666666666664, 0.1666666666666667, 0.5});
    }
    // The low bits of t hold n; the magic number's own bits leave at the top.
    using Int = typename V::Int;
    const V one(S(1));
    const Int bits = (reinterpret_cast<Int>(t.v) << Register<S>::mantissa) + reinterpret_cast<Int>(one.v);
    scale = reinterpret_cast<typename V::Native>(bits);
  }

 private:
  // a + a^2 r (c[N] + a r (c[N-1] + ...)): minimax coefficients of ((exp(r) - 1) / r - 1) / r.
  template <int N>
  FUSEDRNN_FORCE V polynomial(const double (&c)[N + 1]) const {
    double power = 1;
    for (int j = 0; j < N + 2; ++j) power *= A;
    V q(static_cast<S>(c[0] * power));
#pragma GCC unroll 16
    for (int j = 1; j <= N; ++j) {
      power /= A;
      q = q * r + V(static_cast<S>(c[j] * power));
    }
    return q * r + V(S(A));
  }
};

// a / b to about an ulp.
template <class S>
FUSEDRNN_FORCE Vec<S> quotient(Vec<S> a, Vec<S> b) {
  return a / b;
}

template <class S>
FUSEDRNN_FORCE Vec<S> sigmoid(Vec<S> x) {
  const Vec<S> one(S(1));
  const Exp<S, -1> e(clamp(x, static_cast<S>(sizeof(S) == 4 ? 87 : 700)));
  return quotient(one, e.scale * (e.tail * e.r + one) + one);
}
template <class S>
FUSEDRNN_FORCE Vec<S> tanh(Vec<S> x) {
  const Exp<S, 2> e(clamp(x, static_cast<S>(sizeof(S) == 4 ? 9.5 : 20)));
  const Vec<S> less_one = e.scale * (e.tail * e.r) + (e.scale - Vec<S>(S(1)));
  return quotient(less_one, less_one + Vec<S>(S(2)));
}

// log(1 + exp(x)) = max(x, 0) + log(1 + u), u = exp(-|x|) in (0, 1]; log(1 + u) = 2 artanh(u / (2 + u)) by its series.
template <class S>
FUSEDRNN_FORCE Vec<S> softplus(Vec<S> x) {
  const Vec<S> one(S(1)), high = relu(x), size = high + high - x;
  const Exp<S, -1> e(clamp(size, static_cast<S>(sizeof(S) == 4 ? 87 : 700)));
  const Vec<S> u = e.scale * (e.tail * e.r + one), s = quotient(u, u + one + one), z = s * s;
  constexpr int Terms = sizeof(S) == 4 ? 8 : 17;
  Vec<S> sum(static_cast<S>(2.0 / (2 * Terms - 1)));
#pragma GCC unroll 17
  for (int j = Terms - 2; j >= 0; --j) sum = sum * z + Vec<S>(static_cast<S>(2.0 / (2 * j + 1)));
  return sum * s + high;
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
template <class V>
FUSEDRNN_FORCE Dual<V> softplus(Dual<V> x) {
  return {softplus(x.v), x.t * sigmoid(x.v)};
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

template <class S>
FUSEDRNN_FORCE S sum_of(Vec<S> a) {
  S sum = 0;
  for (int j = 0; j < Vec<S>::lanes; ++j) sum += a.v[j];
  return sum;
}
// The first n lanes, and zeros.
template <class S>
FUSEDRNN_FORCE Vec<S> first_of(Vec<S> a, int64_t n) {
  for (int64_t j = n; j < Vec<S>::lanes; ++j) a.v[j] = 0;
  return a;
}
template <class V>
FUSEDRNN_FORCE Dual<V> first_of(Dual<V> a, int64_t n) {
  return {first_of(a.v, n), first_of(a.t, n)};
}

// One number in P planes of memory: P = 1 a Vec, P = 2 a Dual whose parts lie in two arrays. spread and add_up: from P
// single numbers to all lanes, and from all lanes to P.
template <class S, int P>
struct Planes;
template <class S>
struct Planes<S, 1> {
  using Number = Vec<S>;
  static FUSEDRNN_FORCE Number read(const S* const* p, int64_t i, int64_t n) { return load(p[0] + i, n); }
  static FUSEDRNN_FORCE void write(S* const* p, int64_t i, Number a, int64_t n) { store(p[0] + i, a, n); }
  static FUSEDRNN_FORCE Number spread(const S* p) { return Number(p[0]); }
  static FUSEDRNN_FORCE void add_up(Number a, S* p) { p[0] = sum_of(a); }
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
  static FUSEDRNN_FORCE Number spread(const S* p) { return {Vec<S>(p[0]), Vec<S>(p[1])}; }
  static FUSEDRNN_FORCE void add_up(Number a, S* p) { p[0] = sum_of(a.v), p[1] = sum_of(a.t); }
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
