// SPDX-License-Identifier: Apache-2.0
// CTC (Graves et al. 2006): loss[b] = -log sum of the probabilities of all paths that spell row b's labels, and
// dlog_probs[t,b,c] = dloss[b] (exp(log_probs[t,b,c]) - the share of paths that are at class c at step t): torch's
// gradient, which takes log_probs to come from log_softmax.
// Read: log_probs (T,B,C) any strides, labels.
// Written, not added: loss (B), dlog_probs (T,B,C) contiguous in C. A path walks blank 0, label 0, blank 1, ..., label
//   S-1, blank S. Both kinds lie in arrays of their own, so that a register holds neighbours of one kind and no lane
//   asks which kind it is. Numbers are Wide (wide.h).
// Route: a thread owns whole rows, so nothing is added across threads. A step's registers are independent of each
//   other; the chain through the steps is what limits short targets, exp of all classes (memory, in the end) many
//   classes.
#include "cpu/arithmetic/wide.h"
#include "cpu/isa.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {
namespace {

template <class S>
FUSEDRNN_FORCE Wide<S> load_wide(const S* m, const S* e) {
  return {load(m), load(e)};
}

// One walker's memory. n = S + 1 rounded up to whole registers.
template <class S>
struct Walk {
  static constexpr int lanes = Vec<S>::lanes;

  // One step's numbers. Labels are shifted by one where the step reads the label before.
  struct Step {
    S *blank_m, *blank_e, *label_m, *label_e;
  };

  const Ctc& c;
  int64_t n, width;                        // registers of a step, and its arrays with what is read beyond
  S* steps;                                // alpha of every step, or of two
  S* beta;                                 // two steps
  S *emit_m, *emit_e, *blank_m, *blank_e;  // exp(log_probs) of kRenewal steps: labels (kRenewal, n), blank (kRenewal)
  S *skip, *share;
  int64_t* at;  // where a label's class lies

  static constexpr int64_t rounded(int64_t size) { return (size + lanes - 1) / lanes * lanes; }
  static int64_t elements(int64_t labels, int64_t kept) {
    const int64_t n = rounded(labels + 1), width = n + lanes;
    return 4 * width * (kept + 2) + 2 * kRenewal * (n + lanes) + width + n;
  }

  Walk(const Ctc& call, S* memory, int64_t* indices, int64_t labels, int64_t kept)
      : c(call), n(rounded(labels + 1)), width(n + lanes), steps(memory), at(indices) {
    beta = steps + 4 * width * kept;
    emit_m = beta + 8 * width;
    emit_e = emit_m + kRenewal * n;
    blank_m = emit_e + kRenewal * n;
    blank_e = blank_m + kRenewal * lanes;
    skip = blank_e + kRenewal * lanes;
    share = skip + width;
  }

  Step step(S* base, int64_t k) const {
    S* p = base + 4 * width * k;
    return {p, p + width, p + 2 * width, p + 3 * width};
  }

  // A step where nothing is possible, but for blank `from`.
  void begin(const Step& to, int64_t from) const {
    for (int64_t j = 0; j < width; ++j) {
      to.blank_m[j] = to.label_m[j] = 0;
      to.blank_e[j] = to.label_e[j] = static_cast<S>(kNothing);
    }
    to.blank_m[from] = 1;
    to.blank_e[from] = 0;
  }

  void labels_of(int64_t b) const {
    const int64_t* label = c.labels + c.first[b];
    const int64_t count = c.label_counts[b];
    for (int64_t j = 0; j < count; ++j) at[j] = label[j] * c.log_probs.stride[2];
    for (int64_t j = 0; j < width; ++j)  // from one label straight to the next, unless they are the same
      skip[j] = j > 0 && j < count && label[j] != label[j - 1] ? S(0) : static_cast<S>(kNothing);
  }

  // exp(log_probs) at the labels and the blank of steps [t, t + count). False where one of them is no score.
  bool emissions(int64_t b, int64_t t, int64_t count) const {
    const S* from = static_cast<const S*>(c.log_probs.data) + b * c.log_probs.stride[1];
    const S none = static_cast<S>(-__builtin_huge_val());
    const int64_t labels = c.label_counts[b], stride = c.log_probs.stride[0], blank = c.blank * c.log_probs.stride[2];
    for (int64_t k = 0; k < count; ++k) {
      const S* p = from + (t + k) * stride;
      S* out = emit_m + k * n;
      for (int64_t j = 0; j < labels; ++j) out[j] = p[at[j]];
      for (int64_t j = labels; j < n; ++j) out[j] = none;
      blank_m[k] = p[blank];
    }
    for (int64_t k = count; k % lanes != 0; ++k) blank_m[k] = none;
    Vec<S> marks(S(0));
    for (int64_t j = 0; j < count * n; j += lanes) marks = exp_in_place(emit_m + j, emit_e + j, marks);
    for (int64_t j = 0; j < count; j += lanes) marks = exp_in_place(blank_m + j, blank_e + j, marks);
    return !any(marks);
  }
  static FUSEDRNN_FORCE Vec<S> exp_in_place(S* m, S* e, Vec<S> marks) {
    const Vec<S> x = load(m);
    const Wide<S> y = wide_exp(x);
    store(m, y.m);
    store(e, y.e);
    return marked(marks, x);
  }

  void renew(const Step& s, int shift) const {
    S *m = s.label_m + shift, *e = s.label_e + shift;
    for (int64_t j = 0; j < n; j += lanes) {
      keep(s.blank_m + j, s.blank_e + j, renewed(load_wide(s.blank_m + j, s.blank_e + j)));
      keep(m + j, e + j, renewed(load_wide(m + j, e + j)));
    }
  }
  static FUSEDRNN_FORCE void keep(S* m, S* e, Wide<S> a) {
    store(m, a.m);
    store(e, a.e);
  }

  // alpha of one step from the one before; label j lies at j + 1.
  void ahead(const Step& before, const Step& now, int64_t k) const {
    const Wide<S> blank{Vec<S>(blank_m[k]), Vec<S>(blank_e[k])};
    const S *m = emit_m + k * n, *e = emit_e + k * n;
    now.label_m[0] = 0;
    now.label_e[0] = static_cast<S>(kNothing);
    for (int64_t j = 0; j < n; j += lanes) {
      const Wide<S> stay = load_wide(before.label_m + j + 1, before.label_e + j + 1);
      const Wide<S> last = load_wide(before.label_m + j, before.label_e + j);
      const Wide<S> space = load_wide(before.blank_m + j, before.blank_e + j);
      const Wide<S> jump{last.m, last.e + load(skip + j)};
      keep(now.label_m + j + 1, now.label_e + j + 1, product(sum(stay, space, jump), load_wide(m + j, e + j)));
      keep(now.blank_m + j, now.blank_e + j, product(sum(space, last), blank));
    }
  }

  // From y beta of step t+1 (`after`): beta of step t, the shares of its labels and, returned, of its blanks; y beta of
  // step t goes to `now`. Label j lies at j; alpha's at j + 1. p: 1 / probability of the row, at e.
  S back(const Step& alpha, const Step& after, const Step& now, int64_t k, Wide<S> p) const {
    const Wide<S> blank{Vec<S>(blank_m[k]), Vec<S>(blank_e[k])};
    const S *m = emit_m + k * n, *e = emit_e + k * n;
    Vec<S> blanks(S(0));
    for (int64_t j = 0; j < n; j += lanes) {
      const Wide<S> space = load_wide(after.blank_m + j, after.blank_e + j);
      const Wide<S> next_space = load_wide(after.blank_m + j + 1, after.blank_e + j + 1);
      const Wide<S> stay = load_wide(after.label_m + j, after.label_e + j);
      const Wide<S> next = load_wide(after.label_m + j + 1, after.label_e + j + 1);
      const Wide<S> jump{next.m, next.e + load(skip + j + 1)};
      const Wide<S> label = sum(stay, next_space, jump), space_beta = sum(space, stay);
      store(share + j, part(load_wide(alpha.label_m + j + 1, alpha.label_e + j + 1), label, p));
      blanks = blanks + part(load_wide(alpha.blank_m + j, alpha.blank_e + j), space_beta, p);
      keep(now.label_m + j, now.label_e + j, product(label, load_wide(m + j, e + j)));
      keep(now.blank_m + j, now.blank_e + j, product(space_beta, blank));
    }
    S total = 0;
    for (int j = 0; j < lanes; ++j) total += blanks.v[j];
    return total;
  }
  static FUSEDRNN_FORCE Vec<S> part(Wide<S> alpha, Wide<S> beta, Wide<S> p) {
    return scaled(alpha.m * beta.m * p.m, alpha.e + beta.e - p.e);
  }
};

template <class S>
struct Rows {
  const Ctc* c;
  S* memory;
  int64_t* indices;
  int64_t elements, most, kept;  // of a thread's memory, labels of a row, steps of alpha
  int64_t next;                  // the next row that nobody has taken
};

template <class S>
S* gradient(const Ctc& c, int64_t t, int64_t b) {
  return static_cast<S*>(c.dlog_probs.data) + t * c.dlog_probs.stride[0] + b * c.dlog_probs.stride[1];
}
template <class S>
void fill(S* to, int64_t count, S value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// dloss exp(log_probs) of one step of one row.
template <class S>
void fill_exp(const Ctc& c, int64_t t, int64_t b) {
  constexpr int lanes = Vec<S>::lanes;
  S* to = gradient<S>(c, t, b);
  const S* from = static_cast<const S*>(c.log_probs.data) + t * c.log_probs.stride[0] + b * c.log_probs.stride[1];
  const int64_t step = c.log_probs.stride[2];
  const Vec<S> factor(c.dloss ? static_cast<const S*>(c.dloss)[b] : S(1));
  for (int64_t i = 0; i < c.C; i += lanes) {
    const int64_t count = c.C - i < lanes ? c.C - i : lanes;
    if (step == 1) {
      store(to + i, plain_exp(load(from + i, count)) * factor, count);
    } else {
      Vec<S> x(S(0));
      for (int64_t j = 0; j < count; ++j) x.v[j] = from[(i + j) * step];
      store(to + i, plain_exp(x) * factor, count);
    }
  }
}

template <class S>
void walk_row(const Team& team, const Walk<S>& w, int64_t b, bool filled) {
  using Step = typename Walk<S>::Step;
  const Ctc& c = w.c;
  const int64_t labels = c.label_counts[b], T = c.lengths[b];
  const bool wanted = c.dlog_probs.data;
  const auto slot = [&](int64_t t) { return w.step(w.steps, wanted ? t + 1 : (t + 1) & 1); };
  w.labels_of(b);
  w.begin(slot(-1), 0);
  bool sound = true;
  for (int64_t t = 0; t < T; t += kRenewal) {
    team.listen();
    const int64_t count = T - t < kRenewal ? T - t : kRenewal;
    sound = w.emissions(b, t, count) && sound;
    for (int64_t k = 0; k < count; ++k) w.ahead(slot(t + k - 1), slot(t + k), k);
    w.renew(slot(t + count - 1), 1);
  }
  const Step last = slot(T - 1);
  // by hand: the sum of one blank and one label
  const double e = last.blank_e[labels] > last.label_e[labels] ? last.blank_e[labels] : last.label_e[labels];
  const auto term = [&](S m, S exponent) {
    const double d = static_cast<double>(exponent) - e;
    return d < -1000 ? 0 * static_cast<double>(m) : static_cast<double>(m) * __builtin_exp2(d);
  };
  const double m = term(last.blank_m[labels], last.blank_e[labels]) + term(last.label_m[labels], last.label_e[labels]);
  const double loss = sound ? -wide_log(m, e) : __builtin_nan("");
  const bool impossible = loss == __builtin_huge_val();
  static_cast<S*>(c.loss)[b] = impossible && c.zero_infinity ? S(0) : static_cast<S>(loss);
  if (!wanted) return;

  for (int64_t t = T; t < c.T; ++t) fill(gradient<S>(c, t, b), c.C, S(0));
  if (impossible || loss != loss) {
    const S value = impossible && c.zero_infinity ? S(0) : static_cast<S>(__builtin_nan(""));
    for (int64_t t = 0; t < T; ++t) fill(gradient<S>(c, t, b), c.C, value);
    return;
  }
  const S factor = c.dloss ? static_cast<const S*>(c.dloss)[b] : S(1);
  const Wide<S> p{Vec<S>(static_cast<S>(1 / m)), Vec<S>(static_cast<S>(e))};
  const int64_t* label = c.labels + c.first[b];
  w.begin(w.step(w.beta, 0), labels);
  w.begin(w.step(w.beta, 1), labels);
  for (int64_t end = T; end > 0;) {
    team.listen();
    const int64_t t = (end - 1) / kRenewal * kRenewal;
    w.emissions(b, t, end - t);
    for (int64_t k = end - t - 1; k >= 0; --k) {
      const Step after = w.step(w.beta, (t + k + 1) & 1), now = w.step(w.beta, (t + k) & 1);
      const S blanks = w.back(slot(t + k), after, now, k, p);
      if (!filled) fill_exp<S>(c, t + k, b);
      S* to = gradient<S>(c, t + k, b);
      to[c.blank] -= blanks * factor;
      for (int64_t j = 0; j < labels; ++j) to[label[j]] -= w.share[j] * factor;
    }
    w.renew(w.step(w.beta, t & 1), 0);
    end = t;
  }
}

template <class S>
void some_rows(void* argument, const Team& team) {
  Rows<S>& rows = *static_cast<Rows<S>*>(argument);
  const Ctc& c = *rows.c;
  // With fewer rows than threads, exp of all classes is shared by steps.
  const bool filled = c.dlog_probs.data && c.B < team.size;
  if (filled) {
    for (int64_t i = team.begin(c.T * c.B); i < team.end(c.T * c.B); ++i) fill_exp<S>(c, i / c.B, i % c.B);
    team.wait();
  }
  const Walk<S> walk(c, rows.memory + team.rank * rows.elements, rows.indices + team.rank * (rows.most + 1), rows.most,
                     rows.kept);
  for (;;) {
    const int64_t b = __atomic_fetch_add(&rows.next, 1, __ATOMIC_RELAXED);
    if (b >= c.B) return;
    walk_row(team, walk, b, filled);
  }
}

template <class S>
void run(const Ctc& c, int threads) {
  Rows<S> rows{&c, nullptr, nullptr, 0, 0, 2, 0};
  int64_t longest = 0;
  for (int64_t b = 0; b < c.B; ++b) {
    if (c.label_counts[b] > rows.most) rows.most = c.label_counts[b];
    if (c.lengths[b] > longest) longest = c.lengths[b];
  }
  if (c.dlog_probs.data) rows.kept = longest + 1;
  rows.elements = (Walk<S>::elements(rows.most, rows.kept) + 15) / 16 * 16;
  Workspace workspace;
  rows.memory = static_cast<S*>(workspace.take(static_cast<size_t>(rows.elements * threads) * sizeof(S)));
  rows.indices = static_cast<int64_t*>(workspace.take(static_cast<size_t>((rows.most + 1) * threads) * 8));
  parallel(threads, some_rows<S>, &rows);
}

}  // namespace

void ctc(const Ctc& c, int threads) { c.dtype == Dtype::f64 ? run<double>(c, threads) : run<float>(c, threads); }

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
