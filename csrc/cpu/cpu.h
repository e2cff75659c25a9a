// SPDX-License-Identifier: Apache-2.0
// What the CPU core offers to the bindings. Arguments are taken as checked: nothing here looks for user errors.
// Workspace is allocated before anything is written, so std::bad_alloc leaves every output untouched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "api.h"
#include "cpu/generation/generate.h"

namespace fusedrnn::cpu {

// Size of the tape in elements of the problem's dtype.
size_t tape_elements(const Problem& problem);

// `threads` is an upper bound (>= 1); small work uses fewer; -n asks for n in any case (tests). The bits of the results
// do not depend on it.
void forward(const Problem& problem, const Arguments& p, const Results& out, void* tape, int threads);
void backward(const Problem& problem, const Arguments& p, const void* tape, const Results& g, const Arguments& dp,
              int threads);
void jvp(const Problem& problem, const Arguments& p, const Arguments& v, const Results& tout, int threads);
void hvp(const Problem& problem, const Arguments& p, const Arguments& v, const Results& g, const Results& t,
         const Arguments& tdp, int threads, const Results& tout = Results());  // tout: as jvp, in the same pass

// A rough count of floating-point operations of one call: the bindings release the GIL where this is large.
double work(const Problem& problem);

// OpenMP's own setting for the calling thread (omp_get_max_threads): OMP_NUM_THREADS and threadpoolctl act on it.
int get_num_threads();
void set_num_threads(int threads);
// Whether calls use all their threads on a busy machine, too (tests do: there are more members to go wrong).
void ignore_crowd(bool ignored);

// Instruction sets, weakest first: "baseline", "avx2", "avx512" or "baseline", "neon". The best one found is used
// unless FUSEDRNN_ISA names another or set_isa does. set_isa is false, and changes nothing, where the name is not in
// isas_found().
std::vector<const char*> isas_built();
std::vector<const char*> isas_found();
const char* isa();
bool set_isa(const char* name);

// Clipping, in place, over contiguous arrays (f32 or f64).
struct Span {
  void* data;
  int64_t size;
  Dtype dtype;
};
double global_norm(const Span* spans, size_t count, double norm_type);  // float64 sums; 2, 1 and infinity
void scale(const Span* spans, size_t count, double factor);
void clip_value(const Span* spans, size_t count, double limit);  // to [-limit, limit]; NaN stays NaN

void ctc(const Ctc& call, int threads);
void ctc_align(const Ctc& call, int threads);
double work(const Ctc& call);
void hmm(const Hmm& call, int threads);
double work(const Hmm& call);

struct Spelling {
  std::vector<int64_t> labels;
  double log_probability;
};
std::vector<std::vector<Spelling>> ctc_beam(const BeamSearch& call, int threads);  // of each row, best first

// What a long call asks now and then: the calling thread, about every tenth of a second, until this is set again. True
// ends the call: it throws Interrupted, and what it was to write holds anything.
struct Signals {
  bool (*arrived)(void* context) = nullptr;
  void* context = nullptr;
};
Signals set_signals(Signals signals);  // gives those set before
struct Interrupted {};

}  // namespace fusedrnn::cpu
