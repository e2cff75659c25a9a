// SPDX-License-Identifier: Apache-2.0
#include "rows.h"

#include <algorithm>
#include <cstring>

namespace fusedrnn::cpu {

Rows make_rows(const Problem& problem, int64_t e_begin, int64_t e_end, Workspace& workspace) {
  const Sizes& n = problem.sizes;
  Rows rows;
  rows.N = (e_end - e_begin) * n.B;
  rows.packed = problem.packed;
  auto take = [&](int64_t count) {
    return static_cast<int64_t*>(workspace.take(static_cast<size_t>(count) * sizeof(int64_t)));
  };
  rows.e = take(rows.N);
  rows.b = take(rows.N);
  rows.length = take(rows.N);
  const auto* lengths = static_cast<const int64_t*>(problem.lengths.data);
  auto length_of = [&](int64_t row) {
    if (!lengths) return n.T;
    return lengths[(e_begin + row / n.B) * problem.lengths.stride[0] + row % n.B * problem.lengths.stride[1]];
  };
  rows.steps = rows.N && !lengths ? n.T : 0;
  if (lengths) {
    for (int64_t i = 0; i < rows.N; ++i) {
      rows.b[i] = i;
      rows.length[i] = length_of(i);
      rows.steps = std::max(rows.steps, rows.length[i]);
      rows.uniform = rows.uniform && rows.length[i] == rows.length[0];
    }
    if (!rows.uniform)
      std::stable_sort(rows.b, rows.b + rows.N, [&](int64_t i, int64_t j) { return length_of(i) > length_of(j); });
  }
  for (int64_t i = 0; i < rows.N; ++i) {
    const int64_t row = lengths ? rows.b[i] : i;
    rows.length[i] = length_of(row);
    rows.e[i] = e_begin + row / n.B;
    rows.b[i] = row % n.B;
  }
  rows.live = take(rows.steps + 1);
  rows.off = take(rows.steps + 1);
  int64_t alive = rows.N;
  for (int64_t s = 0; s <= rows.steps; ++s) {
    while (alive > 0 && rows.length[alive - 1] <= s) --alive;
    rows.live[s] = alive;
    rows.off[s] = rows.total;
    rows.total += alive;
  }
  const auto* reset = static_cast<const uint8_t*>(problem.reset.data);
  if (!reset) return rows;
  const bool used[2] = {n.D == 2 || !problem.reverse, n.D == 2 || problem.reverse};
  for (int direction = 0; direction < 2; ++direction) {
    if (!used[direction]) continue;
    auto* cut = static_cast<uint8_t*>(workspace.take(static_cast<size_t>(rows.total)));
    auto* any = static_cast<uint8_t*>(workspace.take(static_cast<size_t>(rows.steps)));
    std::memset(any, 0, static_cast<size_t>(rows.steps));
    for (int64_t s = 0; s < rows.steps; ++s) {
      for (int64_t i = 0; i < rows.live[s]; ++i) {
        // Forward: the boundary before t = s. Reverse: the one between t + 1 and t; none before the row's first step.
        const int64_t t = direction ? rows.length[i] - s : s;
        const bool boundary =
            !(direction && s == 0) && reset[t * problem.reset.stride[0] + rows.e[i] * problem.reset.stride[1] +
                                            rows.b[i] * problem.reset.stride[2]] != 0;
        cut[rows.off[s] + i] = boundary;
        any[s] |= boundary;
      }
    }
    rows.cut[direction] = cut;
    rows.any_cut[direction] = any;
  }
  return rows;
}

}  // namespace fusedrnn::cpu
