// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set once, at run time, and hands every call to its table.
//
// How csrc/cpu is compiled (-std=c++20 -O3 -fopenmp -fvisibility=hidden for all; OpenMP is needed by threads.cpp only):
//   once:     dispatch.cpp draw.cpp rows.cpp threads.cpp fiber.cpp machine.cpp ctc_beam.cpp
//   per ISA:  forward.cpp backward.cpp generate.cpp clip.cpp ctc.cpp ctc_align.cpp hmm.cpp and a file for
//   each of CMake's CELLS, each with -DFUSEDRNN_ISA=<name>
//             -ffp-contract=fast -fno-math-errno -fno-trapping-math and
//     baseline  (nothing more)
//     avx2      -mavx2 -mfma -mf16c
//     avx512    -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512
//     neon      (aarch64, in place of avx2 and avx512; nothing more)
//   dispatch.cpp gets one -DFUSEDRNN_HAVE_<NAME> for each ISA beside baseline: FUSEDRNN_HAVE_AVX2, _AVX512, _NEON.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cpu.h"
#include "cpu/recurrence/rows.h"
#include "cpu/threads/machine.h"
#include "cpu/threads/threads.h"
#include "isa.h"

namespace fusedrnn::cpu {
namespace {

struct Table {
  const char* name;
  int bits;  // of a register
  void (*forward)(const Call&);
  void (*backward)(const Call&);
  void (*jvp)(const Call&);
  void (*hvp)(const Call&);
  Failure (*generate)(const Problem&, const Arguments&, const Results&, const Generation&, int);
  double (*sum_of_squares[2])(const void*, int64_t);
  double (*sum_of_sizes[2])(const void*, int64_t);
  double (*largest_size[2])(const void*, int64_t);
  void (*scale[2])(void*, int64_t, double);
  void (*clip_value[2])(void*, int64_t, double);
  void (*ctc)(const Ctc&, int threads);
  void (*ctc_align)(const Ctc&, int threads);
  void (*hmm)(const Hmm&, int threads);
  bool (*found)();
};

template <class S, double (*f)(const S*, int64_t)>
double read(const void* data, int64_t n) {
  return f(static_cast<const S*>(data), n);
}
template <class S, void (*f)(S*, int64_t, S)>
void change(void* data, int64_t n, double by) {
  f(static_cast<S*>(data), n, static_cast<S>(by));
}

bool always() { return true; }
#if defined(FUSEDRNN_HAVE_AVX2) || defined(FUSEDRNN_HAVE_AVX512)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if defined(FUSEDRNN_HAVE_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#define FUSEDRNN_TABLE(isa, bits, found)                                  \
  {#isa,                                                                  \
   bits,                                                                  \
   isa::forward,                                                          \
   isa::backward,                                                         \
   isa::jvp,                                                              \
   isa::hvp,                                                              \
   isa::generate,                                                         \
   {read<float, isa::sum_of_squares>, read<double, isa::sum_of_squares>}, \
   {read<float, isa::sum_of_sizes>, read<double, isa::sum_of_sizes>},     \
   {read<float, isa::largest_size>, read<double, isa::largest_size>},     \
   {change<float, isa::scale>, change<double, isa::scale>},               \
   {change<float, isa::clip_value>, change<double, isa::clip_value>},     \
   isa::ctc,                                                              \
   isa::ctc_align,                                                        \
   isa::hmm,                                                              \
   found}

// Weakest first.
const Table kTables[] = {
    FUSEDRNN_TABLE(baseline, 128, always),
#if defined(FUSEDRNN_HAVE_AVX2)
    FUSEDRNN_TABLE(avx2, 256, has_avx2),
#endif
#if defined(FUSEDRNN_HAVE_AVX512)
    FUSEDRNN_TABLE(avx512, 512, has_avx512),
#endif
#if defined(FUSEDRNN_HAVE_NEON)
    FUSEDRNN_TABLE(neon, 128, always),
#endif
};

std::atomic<const Table*> chosen{nullptr};

const Table& table() {
  if (const Table* now = chosen.load(std::memory_order_acquire)) return *now;
  const char* wish = std::getenv("FUSEDRNN_ISA");
  if (!wish || !set_isa(wish)) set_isa(isas_found().back());
  return *chosen.load(std::memory_order_acquire);
}

// What a step costs several threads, in ns: a meeting, more of it for each thread, and to fetch what others have made.
// Measured on two cores with AVX-512; so are the flops per ns and bit of a register, for one row and for many.
constexpr double kMeeting = 350, kMember = 100, kFetched = 0.88;
constexpr double kFlopsOfRow = 0.17, kFlopsOfRows = 0.25;
constexpr double kWorthwhile = 0.85;  // of the time on one thread
constexpr double kApart = 2e6;        // flops of a call whose threads have nothing to fetch

struct StepCost {
  double alone, meetings, fetched;

  int threads(int most) const {
    const double free = (alone - fetched) / (kMember * std::max(meetings, 1.0));
    const int count = std::clamp(static_cast<int>(std::sqrt(std::clamp(free, 0.0, 1e9))), 2, most);
    const double together = alone / count + meetings * (kMeeting + kMember * count) + fetched * (1 - 1.0 / count);
    return together <= kWorthwhile * alone ? count : 1;
  }
};

// Threads that pay for their meetings.
int useful_threads(const Problem& problem, const Arguments& p, bool back, int threads) {
  if (threads < 0) return -threads;
  // More threads than cores could only wait for one another.
  threads = threads < 1 ? 1 : std::min(threads, processors());
  const Sizes& n = problem.sizes;
  const CellFacts& cell = facts_of(problem.cell);
  double flops = work(problem);
  // A token takes a row of W and multiplies nothing.
  if (p.tokens.data)
    flops -= 2.0 * static_cast<double>(n.T * n.E * n.B * n.D * n.I) * cell.gates * static_cast<double>(n.H);
  if (threads == 1 || flops < 2e5) return 1;
  const double element = problem.dtype == Dtype::f64 ? 8 : 4;
  const int64_t tasks = back ? n.E : n.E * n.D, inputs = back ? 0 : n.I;
  const bool by_rows = !p.tokens.data && !p.context.data && !problem.variant.layer_norm && n.B >= 8 * threads &&
                       element * static_cast<double>((inputs + n.H) * cell.gates * n.H) <= double{kWeightsByRows};
  const bool apart = by_rows || !cell.state_product;
  if (2 * tasks > threads || (apart && !back)) return flops >= kApart ? threads : 1;
  const double rate = table().bits * (n.B < 4 ? kFlopsOfRow : kFlopsOfRows) * 4 / element;
  StepCost step;
  step.alone = flops / rate / static_cast<double>(std::max<int64_t>(n.T, 1) * n.L * n.E * n.D);
  const bool norm = problem.variant.layer_norm, proj = problem.variant.proj > 0;
  step.meetings = apart ? 0 : norm && proj ? 4 : norm || proj || problem.cell == CellKind::gru_reset_before ? 2 : 1;
  step.fetched = kFetched * element * static_cast<double>(n.B * n.H);
  // The products over all steps read what others have made, too.
  if (back) step.alone *= 2, step.fetched *= (1 + 0.57 * cell.gates) * (apart ? 0.72 : 1);
  const int count = step.threads(threads / static_cast<int>(tasks));
  return count > 1 || (tasks > 1 && flops >= kApart) ? count * static_cast<int>(tasks) : 1;
}

Call make_call(const Problem& problem, const Arguments& p, bool back, int threads) {
  Call call{};
  call.problem = &problem;
  call.p = p;
  call.threads = useful_threads(problem, p, back, threads);
#if defined(FUSEDRNN_HAVE_AVX512)
  call.pairs = __builtin_cpu_supports("avx512bf16");
#endif
  return call;
}

}  // namespace

double work(const Problem& problem) {
  const Sizes& n = problem.sizes;
  const double rows = static_cast<double>(n.T) * n.E * n.B, H = static_cast<double>(n.H);
  const double inputs = static_cast<double>(n.I) + (n.L - 1) * static_cast<double>(n.D) * H;
  const CellFacts& cell = facts_of(problem.cell);
  return 2 * rows * cell.gates * H * n.D * (inputs + (cell.state_product ? n.L * H : 0));
}

size_t tape_elements(const Problem& problem) {
  const Sizes& n = problem.sizes;
  const Tape tape(problem);
  return static_cast<size_t>(tape.elements(n.E * n.B)) * static_cast<size_t>(n.L * n.D);
}

void forward(const Problem& problem, const Arguments& p, const Results& out, void* tape, int threads) {
  Call call = make_call(problem, p, false, threads);
  call.out = out;
  call.tape = tape;
  table().forward(call);
}

void backward(const Problem& problem, const Arguments& p, const void* tape, const Results& g, const Arguments& dp,
              int threads) {
  Call call = make_call(problem, p, true, threads);
  call.g = g;
  call.tape = const_cast<void*>(tape);
  call.dp = dp;
  table().backward(call);
}

void jvp(const Problem& problem, const Arguments& p, const Arguments& v, const Results& tout, int threads) {
  Call call = make_call(problem, p, false, threads);
  call.v = v;
  call.out = tout;
  table().jvp(call);
}

void hvp(const Problem& problem, const Arguments& p, const Arguments& v, const Results& g, const Results& t,
         const Arguments& tdp, int threads, const Results& tout) {
  Call call = make_call(problem, p, true, threads);
  call.v = v;
  call.g = g;
  call.t = t;
  call.dp = tdp;
  call.out = tout;
  table().hvp(call);
}

Failure generate(const Problem& problem, const Arguments& p, const Results& out, const Generation& g, int threads) {
  return table().generate(problem, p, out, g, useful_threads(problem, p, false, threads));
}

std::vector<const char*> isas_built() {
  std::vector<const char*> names;
  for (const Table& t : kTables) names.push_back(t.name);
  return names;
}

std::vector<const char*> isas_found() {
  std::vector<const char*> names;
  for (const Table& t : kTables)
    if (t.found()) names.push_back(t.name);
  return names;
}

const char* isa() { return table().name; }

bool set_isa(const char* name) {
  for (const Table& t : kTables) {
    if (std::strcmp(t.name, name) != 0 || !t.found()) continue;
    chosen.store(&t, std::memory_order_release);
    return true;
  }
  return false;
}

double global_norm(const Span* spans, size_t count, double norm_type) {
  const Table& t = table();
  double sum = 0;
  for (size_t i = 0; i < count; ++i) {
    const int f64 = spans[i].dtype == Dtype::f64;
    if (std::isinf(norm_type)) {
      const double size = t.largest_size[f64](spans[i].data, spans[i].size);
      if (!(size <= sum)) sum = std::isnan(sum) ? sum : size;
    } else {
      sum += (norm_type == 1 ? t.sum_of_sizes : t.sum_of_squares)[f64](spans[i].data, spans[i].size);
    }
  }
  return norm_type == 2 ? std::sqrt(sum) : sum;
}

void scale(const Span* spans, size_t count, double factor) {
  for (size_t i = 0; i < count; ++i) table().scale[spans[i].dtype == Dtype::f64](spans[i].data, spans[i].size, factor);
}

void clip_value(const Span* spans, size_t count, double limit) {
  for (size_t i = 0; i < count; ++i)
    table().clip_value[spans[i].dtype == Dtype::f64](spans[i].data, spans[i].size, limit);
}

double work(const Ctc& call) {
  double labels = 0;
  for (int64_t b = 0; b < call.B; ++b) labels += static_cast<double>(call.label_counts[b] + 1);
  const double states = static_cast<double>(call.T) * labels;
  if (call.states) return 8 * states;
  if (!call.dlog_probs.data) return 40 * states;
  return 120 * states + 20 * static_cast<double>(call.T) * static_cast<double>(call.B) * static_cast<double>(call.C);
}

void ctc(const Ctc& call, int threads) {
  if (threads >= 0) {
    const int64_t useful = call.dlog_probs.data || call.B < 1 ? threads : call.B;
    threads = work(call) < 5e5 ? 1 : std::min({threads, processors(), static_cast<int>(useful)});
  }
  table().ctc(call, std::abs(threads));
}

void ctc_align(const Ctc& call, int threads) {
  if (threads >= 0) threads = work(call) < 5e5 ? 1 : std::min({threads, processors(), static_cast<int>(call.B)});
  table().ctc_align(call, std::abs(threads));
}

double work(const Hmm& call) {
  const double pairs = static_cast<double>(call.T) * static_cast<double>(call.B) * static_cast<double>(call.N * call.N);
  return (call.states.data ? 30 : 10) * pairs;
}

void hmm(const Hmm& call, int threads) {
  if (threads >= 0) threads = work(call) < 5e5 ? 1 : std::min({threads, processors(), static_cast<int>(call.B)});
  table().hmm(call, std::abs(threads));
}

}  // namespace fusedrnn::cpu
