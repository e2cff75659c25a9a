// SPDX-License-Identifier: Apache-2.0
// One call on its way from cuda.h (entry.cpp) to the cell's translation unit (run.h).
#pragma once

#include "cuda.h"

namespace fusedrnn::cuda {

struct Call {
  enum class Kind {
    tape_bytes,
    forward_bytes,
    backward_bytes,
    jvp_bytes,
    hvp_bytes,
    routes,
    forward,
    backward,
    jvp,
    hvp
  } kind;
  const Problem* problem;
  const Arguments *p = nullptr, *v = nullptr;   // v: tangents of p
  const Results* out = nullptr;                 // backward: the gradients of the results, jvp: their tangents
  const Results *t = nullptr, *tout = nullptr;  // hvp: tangents of `out`, and of the results
  const Arguments* dp = nullptr;
  void* tape = nullptr;
  bool keep = false;
  void* workspace = nullptr;
  const Settings* settings;
  void* stream = nullptr;
  size_t* bytes = nullptr;
  const char **forward_route = nullptr, **backward_route = nullptr;
};

constexpr const char* kWrongToken =
    "x of an earlier call had a token that is no input; expected 0 <= token < I. It counted as the zero vector (this "
    "call was not run): check the tokens before they go to the device";

#define FUSEDRNN_RUN(name, ...) Status run_##name(const Call& call);
FUSEDRNN_CELLS(FUSEDRNN_RUN)
#undef FUSEDRNN_RUN

}  // namespace fusedrnn::cuda
