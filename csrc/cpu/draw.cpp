// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <functional>

#include "generate.h"
#include "philox.h"

namespace fusedrnn::cpu {

template <class S>
int64_t draw_token(const S* logits, int64_t count, const Generation& g, uint64_t seed, int64_t step, int64_t row,
                   double* scratch) {
  int64_t best = 0;
  for (int64_t v = 1; v < count; ++v)
    if (logits[v] > logits[best]) best = v;
  if (g.temperature == 0) return best;
  const double largest = static_cast<double>(logits[best]);
  double least = -HUGE_VAL;  // of the top_k
  int64_t equal = count;     // how many of those equal to it are taken
  if (g.top_k > 0 && g.top_k < count) {
    double* sorted = scratch + count;
    std::copy(logits, logits + count, sorted);
    std::nth_element(sorted, sorted + g.top_k - 1, sorted + count, std::greater<double>());
    least = sorted[g.top_k - 1];
    equal = g.top_k - std::count_if(sorted, sorted + g.top_k, [least](double x) { return x > least; });
  }
  double sum = 0;
  for (int64_t v = 0; v < count; ++v) {
    const double logit = static_cast<double>(logits[v]);
    const bool taken = logit > least || (logit == least && equal-- > 0);
    scratch[v] = taken ? std::exp((logit - largest) / g.temperature) : 0;
    sum += scratch[v];
  }
  uint32_t word[4];
  philox(seed, static_cast<uint64_t>(step), static_cast<uint32_t>(row), 1, word);
  const double u = ((word[0] >> 5) * 67108864.0 + (word[1] >> 6)) / 9007199254740992.0;
  const double target = u * sum;
  double reached = 0;
  for (int64_t v = 0; v < count; ++v) {
    reached += scratch[v];
    if (reached > target) return v;
  }
  return best;  // logits that are NaN
}

template int64_t draw_token(const float*, int64_t, const Generation&, uint64_t, int64_t, int64_t, double*);
template int64_t draw_token(const double*, int64_t, const Generation&, uint64_t, int64_t, int64_t, double*);

}  // namespace fusedrnn::cpu
