// SPDX-License-Identifier: Apache-2.0
// What the bindings see of the CUDA backend. All arrays of Problem, Arguments and Results are on the current device;
// all work is put on `stream` and nothing waits for it. Memory is the caller's: ask for the bytes, hand over 256-byte
// aligned pieces. The tape belongs to one forward call and is only read by backward; the workspace may be used again as
// soon as the call's work is done.
#pragma once

#include <cstddef>
#include <string>

#include "../api.h"

namespace fusedrnn::cuda {

enum class Precision { strict, tf32 };  // how float32 is multiplied

struct Settings {
  Precision f32 = Precision::strict;
  int route = -1;  // 0 single, 1 cluster, 2 grid, 3 stepwise; -1 = by the cost model. A route that does not fit gives
                   // way to stepwise
};

// Empty: done, or under way on the stream. Else what went wrong: kernel or call, sizes, CUDA's words.
using Status = std::string;

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

// The routes that a call takes: "single", "cluster", "grid" or "stepwise".
Status routes(const Problem& problem, const Settings& settings, const char** forward, const char** backward);

}  // namespace fusedrnn::cuda
