// SPDX-License-Identifier: Apache-2.0
// CTC's forced alignment: the most probable of the paths that spell row b's labels.
// Read: log_probs (T,B,C) any strides, labels.
// Written: states (T,B), 2j at the blank before label j and 2j+1 at label j, -1 past a row's length and where there is
//   no path; log_probability (B). Sums of logarithms in float64. Of equal ways a path stays where it is, else comes
//   from the state before, else from two before; of equal ends it has the label, not the blank behind it.
// Route: a thread owns whole rows. Blanks and labels lie in arrays of their own, as in ctc.cpp. Where the blank and the
//   label of one place came from takes three bits a step, and a word holds kSteps of them: 1.5 bits a state.
// Limit: about twenty operations a register and step, independent of each other; the words of one step stay in the
//   nearest caches.
#include "cpu/arithmetic/wide.h"
#include "cpu/isa.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {
namespace {

constexpr int kSteps = 21;
constexpr double kImpossible = -__builtin_huge_val();

using V = Vec<double>;
using Bits = V::Int;
typedef int64_t BitsInMemory __attribute__((vector_size(kBytes), aligned(sizeof(int64_t)), may_alias));

// One walker's memory. n = S + 1 rounded up to whole registers.
struct Walk {
  // One step's logarithms. Label j lies at j + 1: a step reads the label before.
  struct Step {
    double *blank, *label;
  };

  const Ctc& c;
  int64_t n;
  double *steps, *skip, *emit;
  int64_t *at, *words;  // where a label's class lies; where paths came from, (steps / kSteps, n)

  static int64_t rounded(int64_t size) { return (size + V::lanes - 1) / V::lanes * V::lanes; }
  static int64_t numbers(int64_t labels) { return 8 * rounded(labels + 1) + 2 * V::lanes; }
  static int64_t integers(int64_t labels, int64_t longest) {
    return rounded(labels + 1) * (1 + (longest + kSteps - 1) / kSteps);
  }

  Walk(const Ctc& call, double* memory, int64_t* indices, int64_t labels)
      : c(call), n(rounded(labels + 1)), steps(memory), at(indices), words(indices + n) {
    skip = steps + 2 * (2 * n + V::lanes);
    emit = skip + n;
  }

  Step step(int64_t t) const {
    double* p = steps + (t & 1) * (2 * n + V::lanes);
    return {p, p + n};
  }

  // The labels of row b, and both steps empty, but for the first blank before step 0.
  void begin(int64_t b) const {
    const int64_t* label = c.labels + c.first[b];
    const int64_t count = c.label_counts[b];
    for (int64_t j = 0; j < 2 * (2 * n + V::lanes); ++j) steps[j] = kImpossible;
    step(-1).blank[0] = 0;
    for (int64_t j = 0; j < n; ++j) {
      at[j] = j < count ? label[j] * c.log_probs.stride[2] : 0;
      emit[j] = kImpossible;
      skip[j] = j > 0 && j < count && label[j] != label[j - 1] ? 0 : kImpossible;
    }
  }

  // What -inf is, is -inf.
  static FUSEDRNN_FORCE V logarithm(V x) {
    const V low(-kLargest), impossible(kImpossible);
    return x.v <= low.v ? impossible.v : x.v;
  }

  // The best paths to the states of step t, from those of the step before; marks where a label has no score.
  V ahead(int64_t t, double blank_score) const {
    const Step before = step(t - 1), now = step(t);
    const V blank = logarithm(V(blank_score));
    const Bits zero{}, one = zero + 1, two = zero + 2, four = zero + 4;
    const int shift = static_cast<int>(3 * (t % kSteps));
    const Bits older = zero + ((int64_t{1} << shift) - 1);
    int64_t* to = words + t / kSteps * n;
    V marks(0.0);
    for (int64_t j = 0; j < n; j += V::lanes) {
      const V x = load(emit + j), stay = load(before.label + j + 1), last = load(before.label + j);
      const V space = load(before.blank + j), jump = last + load(skip + j);
      const auto moved = space.v > stay.v;
      const V nearer(moved ? space.v : stay.v);
      const auto jumped = jump.v > nearer.v;
      const V best(jumped ? jump.v : nearer.v);
      const auto left = last.v > space.v;
      const V rest(left ? last.v : space.v);
      store(now.label + j + 1, best + logarithm(x));
      store(now.blank + j, rest + blank);
      marks = marked(marks, x);
      const Bits code = (jumped ? two : (moved & one)) | (left & four);
      auto* word = reinterpret_cast<BitsInMemory*>(to + j);
      *word = (Bits(*word) & older) | (code << shift);
    }
    return marks;
  }

  // The state before this one, at step t.
  int64_t came_from(int64_t t, int64_t state) const {
    const int64_t code = words[t / kSteps * n + state / 2] >> (3 * (t % kSteps));
    return state - (state % 2 ? code & 3 : code >> 2 & 1);
  }
};

template <class S>
void align_row(const Team& team, const Walk& w, int64_t b) {
  const Ctc& c = w.c;
  const int64_t count = c.label_counts[b], T = c.lengths[b], blank = c.blank * c.log_probs.stride[2];
  const S* p = static_cast<const S*>(c.log_probs.data) + b * c.log_probs.stride[1];
  w.begin(b);
  V marks(0.0);
  for (int64_t t = 0; t < T; ++t, p += c.log_probs.stride[0]) {
    if (t % kSteps == 0) team.listen();
    for (int64_t j = 0; j < count; ++j) w.emit[j] = static_cast<double>(p[w.at[j]]);
    const double score = static_cast<double>(p[blank]);
    marks = marked(marks + w.ahead(t, score), V(score));
  }
  const Walk::Step last = w.step(T - 1);
  int64_t state = count > 0 && !(last.blank[count] > last.label[count]) ? 2 * count - 1 : 2 * count;
  double best = state % 2 ? last.label[count] : last.blank[count];
  if (any(marks)) best = __builtin_nan("");
  static_cast<S*>(c.log_probability)[b] = static_cast<S>(best);
  const bool found = best > kImpossible;
  for (int64_t t = c.T - 1; t >= 0; --t) {
    c.states[t * c.B + b] = t < T && found ? state : -1;
    if (t < T && found) state = w.came_from(t, state);
  }
}

struct Rows {
  const Ctc* c;
  double* memory;
  int64_t* indices;
  int64_t numbers, integers, most;  // of a thread's memory; labels of a row
  int64_t next;                     // the next row that nobody has taken
};

template <class S>
void some_rows(void* argument, const Team& team) {
  Rows& rows = *static_cast<Rows*>(argument);
  const Walk walk(*rows.c, rows.memory + team.rank * rows.numbers, rows.indices + team.rank * rows.integers, rows.most);
  for (;;) {
    const int64_t b = __atomic_fetch_add(&rows.next, 1, __ATOMIC_RELAXED);
    if (b >= rows.c->B) return;
    align_row<S>(team, walk, b);
  }
}

}  // namespace

void ctc_align(const Ctc& c, int threads) {
  Rows rows{&c, nullptr, nullptr, 0, 0, 0, 0};
  int64_t longest = 0;
  for (int64_t b = 0; b < c.B; ++b) {
    if (c.label_counts[b] > rows.most) rows.most = c.label_counts[b];
    if (c.lengths[b] > longest) longest = c.lengths[b];
  }
  rows.numbers = Walk::numbers(rows.most);
  rows.integers = Walk::integers(rows.most, longest);
  Workspace workspace;
  rows.memory = static_cast<double*>(workspace.take(static_cast<size_t>(rows.numbers * threads) * 8));
  rows.indices = static_cast<int64_t*>(workspace.take(static_cast<size_t>(rows.integers * threads) * 8));
  parallel(threads, c.dtype == Dtype::f64 ? some_rows<double> : some_rows<float>, &rows);
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
