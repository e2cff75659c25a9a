// SPDX-License-Identifier: Apache-2.0
// For one cell: every type and route, each cut in several ways, with the calls to try.
#pragma once

#include <algorithm>

#include "cuda_harness.h"

namespace fusedrnn::test {

// Small odd sizes up to what the shape can hold, with every option on somewhere and several together.
template <class S>
std::vector<Case> cases_for() {
  const int most = S::kRoute == cuda::Route::single    ? std::min(S::kDepth, S::kUnits)
                   : S::kRoute == cuda::Route::cluster ? std::min(S::kDepth, 4 * S::kUnits)
                                                       : std::min(S::kDepth, 5 * S::kUnits);
  const int odd = std::max(1, most - 5);
  constexpr Cell cell = cell_of<typename S::Cell>();
  std::vector<Case> cases = {
      {.T = 1, .B = 1, .H = 1, .with_state = false, .with_bias = false, .keep = false},
      {.T = 5, .B = 3, .H = odd},
      {.T = 4, .B = S::kRows + 1, .H = most, .reverse = true, .with_lengths = true},
      {.T = 5, .B = 2, .H = most, .D = 2, .with_reset = true},
      {.T = 5,
       .E = 2,
       .B = S::kRows,
       .H = odd,
       .D = 2,
       .with_lengths = true,
       .with_reset = true,
       .reset_to_initial = true},
      {.T = 6,
       .B = 3,
       .H = odd,
       .reverse = true,
       .with_state = false,
       .with_lengths = true,
       .with_reset = true,
       .keep = false,
       .clip_cell = cell == Cell::lstm ? 0.4 : 0},
      {.T = 3, .B = S::kRows - 1, .H = std::max(1, most / 2), .with_bias = false, .clip_grad = 0.5},
      {.T = 4, .B = 4, .H = odd, .with_nan = true},
      {.T = 9, .B = 2, .H = most, .with_reset = true, .keep = false},
  };
  for (Case& c : cases) c.cell = cell;
  return cases;
}

template <class S>
void add_cut(std::vector<Run>& runs, const char* cut) {
  const std::string name = std::string(kCellNames[static_cast<int>(cell_of<typename S::Cell>())]) + "/" +
                           TypeName<typename S::T>::name + "/" + kRouteNames[static_cast<int>(S::kRoute)] + "/" + cut;
  runs.push_back({name + "/forward", cases_for<S>(), run_forward<S>});
}

// kOctets: unit octets of a warp, such that octets * gates is even.
template <class C, class T, int kOctets>
void add_type(std::vector<Run>& runs) {
  using cuda::Route;
  add_cut<cuda::Shape<C, T, Route::single, 2, 1, kOctets, 2, 2>>(runs, "deep");
  add_cut<cuda::Shape<C, T, Route::single, 3, 2, kOctets, 1, 1>>(runs, "split");
  add_cut<cuda::Shape<C, T, Route::cluster, 1, 2, kOctets, 1, 2>>(runs, "split");
  add_cut<cuda::Shape<C, T, Route::cluster, 2, 1, kOctets, 3, 1>>(runs, "deep");
  add_cut<cuda::Shape<C, T, Route::grid, 2, 3, kOctets, 1, 1>>(runs, "split");
  add_cut<cuda::Shape<C, T, Route::grid, 1, 1, kOctets, 3, 2>>(runs, "deep");
}

template <class C, int kOctets>
void add_cell(std::vector<Run>& runs) {
  add_type<C, dev::F16, kOctets>(runs);
  add_type<C, dev::BF16, kOctets>(runs);
  add_type<C, dev::TF32, kOctets>(runs);
}

}  // namespace fusedrnn::test
