// SPDX-License-Identifier: Apache-2.0
// What the bindings see of the CUDA backend. All arrays of Problem, Arguments and Results are on the current device
// (see OnDevice); all work is put on `stream` and nothing waits for it, unless it says so. Memory is the caller's: ask
// for the bytes, hand over 256-byte aligned pieces. The tape belongs to one forward call and is only read by backward;
// the workspace may be used again as soon as the call's work is done.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../api.h"

namespace fusedrnn::cuda {

// How float32 is multiplied: as IEEE has it; as TF32; each operand in two TF32 parts (3xTF32), where a persistent
// kernel does it, elsewhere strict.
enum class Precision { strict, tf32, tf32x3 };

struct Settings {
  Precision f32 = Precision::strict;
  int route = -1;  // 0 single, 1 cluster, 2 grid, 3 stepwise; -1 = by the cost model. A route that does not fit gives
                   // way to stepwise
  int token_bytes = 4;  // tokens are integers of 1, 2, 4 or 8 bytes here. What is no input (0..I-1) counts as the zero
  bool token_signed = true;  // vector, and a later call reports it
};

// Empty: done, or under way on the stream. Else what went wrong: kernel or call, sizes, CUDA's words.
using Status = std::string;

// ---- layers
Status tape_bytes(const Problem& problem, const Settings& settings, size_t* bytes);
Status forward_workspace_bytes(const Problem& problem, const Arguments& p, const Results& out, bool keep,
                               const Settings& settings, size_t* bytes);
Status backward_workspace_bytes(const Problem& problem, const Arguments& p, const Results& g, const Arguments& dp,
                                const Settings& settings, size_t* bytes);

// keep: a backward call will follow; tape may be null without it.
Status forward(const Problem& problem, const Arguments& p, const Results& out, void* tape, bool keep, void* workspace,
               const Settings& settings, void* stream);
Status backward(const Problem& problem, const Arguments& p, const void* tape, const Results& g, const Arguments& dp,
                void* workspace, const Settings& settings, void* stream);

// Tangents of the results along v, by the stepwise route: float32 (strict) and float64.
Status jvp_workspace_bytes(const Problem& problem, const Arguments& p, const Arguments& v, const Results& tout,
                           const Settings& settings, size_t* bytes);
Status jvp(const Problem& problem, const Arguments& p, const Arguments& v, const Results& tout, void* workspace,
           const Settings& settings, void* stream);
// Tangents tdp of the gradients of g, along v of p and t of g; and what jvp gives, where tout wants it.
Status hvp_workspace_bytes(const Problem& problem, const Arguments& p, const Arguments& v, const Results& g,
                           const Results& t, const Arguments& tdp, const Results& tout, const Settings& settings,
                           size_t* bytes);
Status hvp(const Problem& problem, const Arguments& p, const Arguments& v, const Results& g, const Results& t,
           const Arguments& tdp, const Results& tout, void* workspace, const Settings& settings, void* stream);

// The routes that a call takes: "single", "cluster", "grid" or "stepwise".
Status routes(const Problem& problem, const Settings& settings, const char** forward, const char** backward);

// ---- clipping of gradients: all arrays in a few launches, sums in float64 in an order that the sizes alone decide
struct Span {  // n elements without gaps
  void* data;
  int64_t n;
  Dtype dtype;
};
// norm = (sum |a|^order)^(1/order), order 1, 2 or inf, into *norm (on the device). With max_norm >= 0 all elements are
// then multiplied by max_norm / (norm + 1e-6) unless that is >= 1. workspace: clip_workspace_bytes.
size_t clip_workspace_bytes(const Span* spans, size_t count);
Status clip_norm(const Span* spans, size_t count, double order, double max_norm, double* norm, void* workspace,
                 void* stream);
// Every element to [-limit, limit]; NaN stays NaN.
Status clip_value(const Span* spans, size_t count, double limit, void* stream);

// ---- CTC: all arrays of the call on the device. most, longest: the largest of label_counts and of lengths.
size_t ctc_workspace_bytes(const Ctc& call, int64_t most, int64_t longest);
Status ctc(const Ctc& call, int64_t most, int64_t longest, void* workspace, void* stream);

// ---- the devices
struct Found {
  std::string name;
  int compute = 0;  // 90 = 9.0
  int multiprocessors = 0;
  int64_t bytes = 0;
};
// Those that the driver shows. A machine without a driver has none: then the status says why.
Status devices(std::vector<Found>* found);
// What the kernels were compiled for, as in "sm_80 sm_90a compute_90".
const char* built_for();

// Makes the device that owns some memory the current one, and the one before it again at the end.
class OnDevice {
 public:
  OnDevice(const void* memory, Status* status);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

// From the host; what `from` holds may change as soon as this returns.
Status upload(void* to, const void* from, size_t bytes, void* stream);
// To the host: waits for the stream.
Status download(void* to, const void* from, size_t bytes, void* stream);

}  // namespace fusedrnn::cuda
