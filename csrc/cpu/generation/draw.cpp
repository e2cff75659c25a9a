// SPDX-License-Identifier: Apache-2.0
// A draw is a few passes over the logits. The filters look for a border, the last token that they leave; nothing is
// sorted but a few candidates.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/arithmetic/philox.h"
#include "generate.h"

namespace fusedrnn::cpu {
namespace {

struct Candidate {
  double value;
  int64_t token;
};
bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.token < b.token);
}
bool is_left(const Candidate& border, double value, int64_t token) {
  return value > border.value || (value == border.value && token <= border.token);
}

// Logits after the penalty, in float64, and the first of the largest.
template <class S>
Outcome read(const S* logits, int64_t count, const uint8_t* seen, double penalty, double* values, int64_t& best) {
  bool wrong = false;
  best = 0;
  for (int64_t v = 0; v < count; ++v) {
    double value = static_cast<double>(logits[v]);
    if (seen && seen[v]) value = value > 0 ? value / penalty : value * penalty;
    values[v] = value;
    wrong |= !(value < HUGE_VAL);
    if (value > values[best]) best = v;
  }
  if (wrong)
    return std::any_of(values, values + count, [](double x) { return x != x; }) ? Outcome::nan : Outcome::infinite;
  return values[best] == -HUGE_VAL ? Outcome::masked : Outcome::drawn;
}

// The last of the k largest, k < count. Only what passes the k-th of those before is looked at again.
Candidate border_of_top_k(const double* values, int64_t count, int64_t k, Candidate* found) {
  const int64_t room = k < (count - 32) / 2 ? 2 * k + 32 : count;
  int64_t n = 0;
  double bar = -HUGE_VAL;  // a later token that equals it comes behind k others
  for (int64_t v = 0; v < count; ++v) {
    if (!(values[v] > bar)) continue;
    found[n++] = {values[v], v};
    if (n < room) continue;
    std::nth_element(found, found + k - 1, found + n, before);
    bar = found[k - 1].value;
    n = k;
  }
  if (n < k) return *std::max_element(found, found + n, before);  // the others are -inf
  std::nth_element(found, found + k - 1, found + n, before);
  return found[k - 1];
}

// Leaves of [begin, end) those candidates among which `reached`, the sum of weights so far, passes `target`, and adds
// the weights of those before them: the range of values is cut into equal parts, the largest first. False where there
// is none to cut.
bool narrow(Candidate*& begin, Candidate*& end, const double* weights, double target, double& reached) {
  constexpr int kParts = 256;
  double top = begin->value, least = top;
  for (const Candidate* c = begin; c != end; ++c) top = std::max(top, c->value), least = std::min(least, c->value);
  const double scale = kParts / (top - least);
  if (!(scale > 0 && scale < HUGE_VAL)) return false;
  const auto part_of = [=](const Candidate& c) {
    return std::min(kParts - 1, static_cast<int>((top - c.value) * scale));
  };
  double sums[kParts] = {};
  for (const Candidate* c = begin; c != end; ++c) sums[part_of(*c)] += weights[c->token];
  int part = 0;
  for (; part < kParts - 1 && reached + sums[part] < target; ++part) reached += sums[part];
  end = std::remove_if(begin, end, [=](const Candidate& c) { return part_of(c) != part; });
  return true;
}

// The last of the fewest, largest first, whose weights sum to `part` of `sum` or more.
Candidate border_of_top_p(const double* values, const double* weights, int64_t count, double part, double sum,
                          Candidate* found) {
  const double target = part * sum;
  const double least = (sum - target) / 2 / static_cast<double>(count);  // all below it together: less than the rest
  Candidate *begin = found, *end = found;
  for (int64_t v = 0; v < count; ++v)
    if (weights[v] > 0 && weights[v] >= least) *end++ = {values[v], v};
  double reached = 0;
  while (end - begin > 64 && narrow(begin, end, weights, target, reached)) {
  }
  if (!std::is_sorted(begin, end, before)) std::sort(begin, end, before);
  for (; begin + 1 < end; ++begin)
    if ((reached += weights[begin->token]) >= target) break;
  return *begin;
}

// What comes after the border weighs nothing. The sum of the others.
double sum_up_to(const Candidate& border, const double* values, double* weights, int64_t count) {
  double sum = 0;
  for (int64_t v = 0; v < count; ++v) {
    if (!is_left(border, values[v], v)) weights[v] = 0;
    sum += weights[v];
  }
  return sum;
}

template <class S>
double log_softmax(const S* logits, int64_t count, int64_t token, Exponentials* exponentials, double* scratch) {
  const auto largest = static_cast<double>(*std::max_element(logits, logits + count));
  std::copy(logits, logits + count, scratch);
  exponentials(scratch, count, largest, 1, scratch + count);
  return static_cast<double>(logits[token]) - largest -
         std::log(std::accumulate(scratch + count, scratch + 2 * count, 0.0));
}

}  // namespace

template <class S>
Drawn draw_token(const S* logits, int64_t count, const Generation& g, uint64_t seed, int64_t step, int64_t row,
                 Exponentials* exponentials, double* scratch) {
  double *values = scratch, *weights = scratch + count;
  auto* found = reinterpret_cast<Candidate*>(scratch + 2 * count);
  int64_t best;
  const uint8_t* seen = g.seen ? g.seen + row * count : nullptr;
  const Outcome outcome = read(logits, count, seen, g.repetition_penalty, values, best);
  if (outcome != Outcome::drawn) return {outcome, 0, 0};
  const bool of_model = g.log_probs && g.of_model;
  if (g.temperature == 0)
    return {outcome, best, of_model ? log_softmax(logits, count, best, exponentials, scratch) : 0};
  const double largest = values[best];
  const bool some = g.top_k > 0 && g.top_k < count;
  Candidate border = some ? border_of_top_k(values, count, g.top_k, found) : Candidate{-HUGE_VAL, count};
  exponentials(values, count, largest, g.temperature, weights);
  double sum = sum_up_to(border, values, weights, count);
  if (g.top_p < 1) {
    border = border_of_top_p(values, weights, count, g.top_p, sum, found);
    sum = sum_up_to(border, values, weights, count);
  }
  uint32_t word[4];
  philox(seed, static_cast<uint64_t>(step), static_cast<uint32_t>(g.first_row + row), 1, word);
  const double u = ((word[0] >> 5) * 67108864.0 + (word[1] >> 6)) / 9007199254740992.0;
  const double target = u * sum;
  double reached = weights[0];
  int64_t token = 0;
  while (!(reached > target)) reached += weights[++token];  // it ends: u < 1, and the same sum was larger
  double log_prob = 0;
  if (of_model)
    log_prob = log_softmax(logits, count, token, exponentials, scratch);
  else if (g.log_probs)
    log_prob = (values[token] - largest) / g.temperature - std::log(sum);
  return {outcome, token, log_prob};
}

template Drawn draw_token(const float*, int64_t, const Generation&, uint64_t, int64_t, int64_t, Exponentials*, double*);
template Drawn draw_token(const double*, int64_t, const Generation&, uint64_t, int64_t, int64_t, Exponentials*,
                          double*);

}  // namespace fusedrnn::cpu
