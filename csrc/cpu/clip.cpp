// SPDX-License-Identifier: Apache-2.0
// sum x^2, sum |x|, max |x| in float64; x *= factor; x = clamp(x, -limit, limit).
// Read: one contiguous array.
// Written: the same array, in place, by the last two. The sums run in 4 * lanes fixed chains, so the bits depend on the
//   size alone.
// Route: one thread; the arrays are as large as the weights, so memory is the limit for most.
// Limit: conversion to float64 in cache, memory bandwidth past it.
#include "cpu/arithmetic/gemm.h"
#include "isa.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {
namespace {

constexpr int kChains = 4 * kBytes / 8;

template <class S, class Fold>
double fold(const S* x, int64_t n, Fold f) {
  double chain[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains)
#pragma GCC ivdep
    for (int j = 0; j < kChains; ++j) chain[j] = f(chain[j], static_cast<double>(x[i + j]));
  for (int j = 0; i < n; ++i, ++j) chain[j] = f(chain[j], static_cast<double>(x[i]));
  double all = 0;
  for (int j = 0; j < kChains; ++j) all = f.join(all, chain[j]);
  return all;
}

struct Squares {
  FUSEDRNN_FORCE double operator()(double sum, double x) const { return sum + x * x; }
  FUSEDRNN_FORCE double join(double a, double b) const { return a + b; }
};
struct Sizes1 {
  FUSEDRNN_FORCE double operator()(double sum, double x) const { return sum + __builtin_fabs(x); }
  FUSEDRNN_FORCE double join(double a, double b) const { return a + b; }
};
struct Largest {  // NaN wins
  FUSEDRNN_FORCE double operator()(double most, double x) const { return join(most, __builtin_fabs(x)); }
  FUSEDRNN_FORCE double join(double a, double b) const { return a >= b || a != a ? a : b; }
};

template <class S>
void scale_all(S* x, int64_t n, S factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}
template <class S>
void clip_all(S* x, int64_t n, S limit) {
  int64_t i = 0;
  for (; i + Vec<S>::lanes <= n; i += Vec<S>::lanes) store(x + i, clamp(load(x + i), limit));
  if (i < n) store(x + i, clamp(load(x + i, n - i), limit), n - i);
}

}  // namespace

double sum_of_squares(const float* x, int64_t n) { return fold(x, n, Squares()); }
double sum_of_squares(const double* x, int64_t n) { return fold(x, n, Squares()); }
double sum_of_sizes(const float* x, int64_t n) { return fold(x, n, Sizes1()); }
double sum_of_sizes(const double* x, int64_t n) { return fold(x, n, Sizes1()); }
double largest_size(const float* x, int64_t n) { return fold(x, n, Largest()); }
double largest_size(const double* x, int64_t n) { return fold(x, n, Largest()); }
void scale(float* x, int64_t n, float factor) { scale_all(x, n, factor); }
void scale(double* x, int64_t n, double factor) { scale_all(x, n, factor); }
void clip_value(float* x, int64_t n, float limit) { clip_all(x, n, limit); }
void clip_value(double* x, int64_t n, double limit) { clip_all(x, n, limit); }

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
