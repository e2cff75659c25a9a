// SPDX-License-Identifier: Apache-2.0
// The CTC kernels (csrc/cuda/ctc.h) against sums over all paths in float64: logarithms, state by state.
// clang-format off: the device comes first
#include "cuda_harness.h"
#include "cuda/ctc.h"
// clang-format on

#include <algorithm>
#include <cmath>

namespace fusedrnn::test {
namespace {

struct CtcCase {
  int T, B, C, most, blank;  // most: labels of a row
  bool gradient = true, zero_infinity = false, with_nan = false;
};

// Two blocks walk over all rows, so a block has several.
struct TwinQueue {
  const dev::sim::Options& options;
  template <class K>
  void run(const K& kernel, int64_t blocks) {
    int shared = 0;
    if constexpr (requires { K::shared_bytes(); }) shared = K::shared_bytes();
    dev::sim::launch(static_cast<int>(std::min<int64_t>(blocks, 2)), 1, K::kThreads, shared, kernel, options);
  }
};

double log_add(double a, double b) {
  const double most = a > b || a != a ? a : b;  // NaN stays NaN
  return most == -INFINITY ? most : most + std::log(std::exp(a - most) + std::exp(b - most));
}

// One row: its loss; and how often each class is visited at each step, (T,C).
struct Sums {
  double loss;
  std::vector<double> visits;
};
Sums sums_of(int64_t T, int64_t C, const std::vector<int64_t>& labels, int64_t blank,
             const std::function<double(int64_t, int64_t)>& score) {
  const int64_t n = 2 * static_cast<int64_t>(labels.size()) + 1;
  const auto at = [](auto& table, int64_t t, int64_t s) -> double& {
    return table[static_cast<size_t>(t)][static_cast<size_t>(s)];
  };
  const auto of = [&](int64_t s) { return s % 2 ? labels[static_cast<size_t>(s / 2)] : blank; };
  const auto jumps = [&](int64_t s) { return s % 2 && s > 1 && of(s) != of(s - 2); };
  std::vector<std::vector<double>> before(static_cast<size_t>(T + 1),
                                          std::vector<double>(static_cast<size_t>(n), -INFINITY));
  auto after = before;
  at(before, 0, 0) = 0;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t s = 0; s < n; ++s) {
      double sum = at(before, t, s);
      if (s > 0) sum = log_add(sum, at(before, t, s - 1));
      if (jumps(s)) sum = log_add(sum, at(before, t, s - 2));
      at(before, t + 1, s) = sum + score(t, of(s));
    }
  for (int64_t s = std::max<int64_t>(n - 2, 0); s < n; ++s) at(after, T, s) = 0;
  for (int64_t t = T - 1; t >= 0; --t)
    for (int64_t s = 0; s < n; ++s) {
      const auto next = [&](int64_t to) { return at(after, t + 1, to) + (t + 1 < T ? score(t + 1, of(to)) : 0); };
      if (t + 1 == T) {
        at(after, t, s) = at(after, T, s);
        continue;
      }
      double sum = next(s);
      if (s + 1 < n) sum = log_add(sum, next(s + 1));
      if (s + 2 < n && jumps(s + 2)) sum = log_add(sum, next(s + 2));
      at(after, t, s) = sum;
    }
  double all = -INFINITY;
  for (int64_t s = std::max<int64_t>(n - 2, 0); s < n; ++s) all = log_add(all, at(before, T, s));
  Sums result{-all, std::vector<double>(static_cast<size_t>(T * C))};
  for (int64_t t = 0; t < T; ++t)
    for (int64_t s = 0; s < n; ++s)
      result.visits[static_cast<size_t>(t * C + of(s))] += std::exp(at(before, t + 1, s) + at(after, t, s) - all);
  return result;
}

template <class S>
Outcome run(const CtcCase& c, const dev::sim::Options& options, uint64_t data_seed) {
  std::mt19937_64 random(data_seed);
  std::uniform_real_distribution<double> score(-4, 0);
  const auto T = static_cast<size_t>(c.T), B = static_cast<size_t>(c.B), C = static_cast<size_t>(c.C);
  Heap<S> log_probs(T * B * C), gradient(c.gradient ? T * B * C : 0), loss(B), dloss(B);
  Heap<int64_t> lengths(B), counts(B), first(B);
  for (size_t i = 0; i < log_probs.size(); ++i) log_probs[i] = static_cast<S>(score(random));
  std::vector<std::vector<int64_t>> labels(B);
  std::vector<int64_t> all;
  for (size_t b = 0; b < B; ++b) {
    dloss[b] = static_cast<S>(score(random));
    lengths[b] = b == 0 ? c.T : static_cast<int64_t>(random() % (T + 1));
    counts[b] = b == 0 ? c.most : static_cast<int64_t>(random() % static_cast<uint64_t>(c.most + 1));
    first[b] = static_cast<int64_t>(all.size());
    for (int64_t j = 0; j < counts[b]; ++j) {
      auto label = static_cast<int64_t>(random() % (C - 1));
      label += label >= c.blank;
      labels[b].push_back(label);
      all.push_back(label);
    }
  }
  if (c.with_nan) log_probs[B * C + static_cast<size_t>(c.blank)] = static_cast<S>(NAN);
  Heap<int64_t> flat(all.size());
  for (size_t i = 0; i < all.size(); ++i) flat[i] = all[i];
  Ctc call;
  call.T = c.T, call.B = c.B, call.C = c.C, call.blank = c.blank;
  call.dtype = sizeof(S) == 8 ? Dtype::f64 : Dtype::f32;
  call.zero_infinity = c.zero_infinity;
  const int64_t row = static_cast<int64_t>(C), step = row * c.B;
  call.log_probs = {log_probs.get(), {step, row, 1}};
  if (c.gradient) call.dlog_probs = {gradient.get(), {step, row, 1}};
  call.labels = flat.get(), call.first = first.get(), call.label_counts = counts.get(), call.lengths = lengths.get();
  call.loss = loss.get(), call.dloss = dloss.get();
  Heap<int64_t> workspace(cuda::ctc_bytes(call, c.most, c.T) / 8 + 1);
  try {
    TwinQueue queue{options};
    cuda::run_ctc<S>(queue, call, c.most, c.T, workspace.get());
  } catch (const dev::sim::Failure& failure) {
    return {failure.what(), 0};
  }
  Compare compare(sizeof(S) == 8 ? 1e-12 : 5e-6);
  for (size_t b = 0; b < B; ++b) {
    const auto at = [&](int64_t t, int64_t k) { return (static_cast<size_t>(t) * B + b) * C + static_cast<size_t>(k); };
    const auto value = [&](int64_t t, int64_t k) { return static_cast<double>(log_probs[at(t, k)]); };
    const Sums sums = sums_of(lengths[b], c.C, labels[b], c.blank, value);
    const bool nothing = sums.loss == INFINITY && c.zero_infinity;
    const int row_b = static_cast<int>(b);
    compare.value("loss", 0, 0, row_b, 0, static_cast<double>(loss[b]), nothing ? 0 : sums.loss);
    for (int64_t t = 0; c.gradient && t < c.T; ++t)
      for (int64_t k = 0; k < c.C; ++k) {
        double expected = 0;
        if (t < lengths[b] && !nothing)
          expected = std::isfinite(sums.loss)
                         ? static_cast<double>(dloss[b]) *
                               (std::exp(value(t, k)) - sums.visits[static_cast<size_t>(t * c.C + k)])
                         : NAN;
        compare.value("dlog_probs", 0, t, row_b, static_cast<int>(k), static_cast<double>(gradient[at(t, k)]),
                      expected);
      }
  }
  return {compare.wrong(), compare.worst()};
}

template <class S>
void add(std::vector<Run>& runs, const char* name, const std::vector<CtcCase>& cases) {
  runs.push_back({name, {}, nullptr});
  for (const CtcCase& c : cases)
    runs.back().cases.push_back("T=" + std::to_string(c.T) + " B=" + std::to_string(c.B) + " C=" + std::to_string(c.C) +
                                " labels=" + std::to_string(c.most) + (c.gradient ? "" : " loss only"));
  runs.back().run = [cases](size_t i, const dev::sim::Options& options, uint64_t data_seed) {
    return run<S>(cases[i], options, data_seed);
  };
}

}  // namespace

void add_ctc(std::vector<Run>& runs) {
  // what cannot be spelled, NaN, no labels, one class and the blank; more states than threads; T beyond a renewal
  const std::vector<CtcCase> cases = {
      {.T = 1, .B = 1, .C = 2, .most = 0, .blank = 0},
      {.T = 6, .B = 5, .C = 4, .most = 3, .blank = 3},
      {.T = 5, .B = 4, .C = 3, .most = 4, .blank = 1, .zero_infinity = true},
      {.T = 4, .B = 3, .C = 3, .most = 2, .blank = 0, .with_nan = true},
      {.T = 5, .B = 4, .C = 2, .most = 2, .blank = 1, .gradient = false},
#if !defined(FUSEDRNN_FEW)
      {.T = 37, .B = 3, .C = 5, .most = 9, .blank = 2},
      {.T = 140, .B = 1, .C = 4, .most = 70, .blank = 0},
#endif
  };
  add<float>(runs, "ctc/f32", cases);
  add<double>(runs, "ctc/f64", cases);
}

}  // namespace fusedrnn::test
