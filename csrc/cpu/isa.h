// SPDX-License-Identifier: Apache-2.0
// What one instruction set's objects offer to dispatch.cpp.
#pragma once

#include "api.h"

namespace fusedrnn::cpu {

// By rows, no step needs a meeting; but every member reads all weights at every step, so they must fit its own cache.
constexpr int64_t kWeightsByRows = int64_t{512} << 10;  // bytes

// One call of any of the four operations. Parts that an operation does not use are null.
struct Call {
  const Problem* problem;
  Arguments p, v;  // values, tangents
  Results out;     // written by forward, jvp and hvp
  Results g, t;    // gradients, their tangents
  void* tape;      // written by forward, read by backward; null: not wanted
  Arguments dp;    // written by backward and hvp
  int threads;
  bool pairs;  // this CPU multiplies pairs of bfloat16
};

#define FUSEDRNN_DECLARE(isa)                    \
  namespace isa {                                \
  void forward(const Call&);                     \
  void backward(const Call&);                    \
  void jvp(const Call&);                         \
  void hvp(const Call&);                         \
  double sum_of_squares(const float*, int64_t);  \
  double sum_of_squares(const double*, int64_t); \
  double sum_of_sizes(const float*, int64_t);    \
  double sum_of_sizes(const double*, int64_t);   \
  double largest_size(const float*, int64_t);    \
  double largest_size(const double*, int64_t);   \
  void scale(float*, int64_t, float);            \
  void scale(double*, int64_t, double);          \
  void clip_value(float*, int64_t, float);       \
  void clip_value(double*, int64_t, double);     \
  void ctc(const Ctc&, int threads);             \
  void ctc_align(const Ctc&, int threads);       \
  void hmm(const Hmm&, int threads);             \
  }
FUSEDRNN_DECLARE(baseline)
FUSEDRNN_DECLARE(avx2)
FUSEDRNN_DECLARE(avx512)
FUSEDRNN_DECLARE(neon)
#undef FUSEDRNN_DECLARE

}  // namespace fusedrnn::cpu
