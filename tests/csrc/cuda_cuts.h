// SPDX-License-Identifier: Apache-2.0
// For one cell: every type and route, each cut in several ways, with the calls to try.
#pragma once

#include <algorithm>

#include "cuda_harness.h"

namespace fusedrnn::test {

// Small odd sizes up to the largest H that is to be tried, with every option on somewhere and several together. rows:
// of a tile.
inline std::vector<Case> cases_for(Cell cell, int most, int rows) {
  const int odd = std::max(1, most - 5);
  std::vector<Case> cases = {
      {.T = 1, .B = 1, .H = 1, .with_state = false, .with_bias = false, .keep = false},
      {.T = 5, .B = 3, .H = odd},
      {.T = 4, .B = rows + 1, .H = most, .reverse = true, .with_lengths = true},
      {.T = 5, .B = 2, .H = most, .D = 2, .with_reset = true},
      {.T = 5, .E = 2, .B = rows, .H = odd, .D = 2, .with_lengths = true, .with_reset = true, .reset_to_initial = true},
      {.T = 6,
       .B = 3,
       .H = odd,
       .reverse = true,
       .with_state = false,
       .with_lengths = true,
       .with_reset = true,
       .keep = false,
       .clip_cell = cell == Cell::lstm ? 0.4 : 0},
      {.T = 3, .B = rows - 1, .H = std::max(1, most / 2), .with_bias = false, .clip_grad = 0.5},
      {.T = 4, .B = 4, .H = odd, .with_nan = true},
      {.T = 9, .B = 2, .H = most, .with_reset = true, .keep = false},
  };
  for (Case& c : cases) c.cell = cell;
  return cases;
}

template <class S>
std::string name_of(const char* cut) {
  return std::string(kCellNames[static_cast<int>(cell_of<typename S::Cell>())]) + "/" + TypeName<typename S::T>::name +
         "/" + kRouteNames[static_cast<int>(S::kRoute)] + "/" + cut;
}

template <class S>
void add_forward(std::vector<Run>& runs, const char* cut) {
  const int blocks = S::kRoute == cuda::Route::single ? 1 : S::kRoute == cuda::Route::cluster ? 4 : S::kWide ? 3 : 5;
  const int units = S::kUnits * blocks;
  add_run(runs, name_of<S>(cut) + "/forward",
          cases_for(cell_of<typename S::Cell>(), std::min(S::kDepth, units), S::kRows), run_forward<S>);
}

template <class S>
void add_backward(std::vector<Run>& runs, const char* cut) {
  add_run(runs, name_of<S>(cut) + "/backward",
          cases_for(cell_of<typename S::Cell>(), std::min(S::kMaxH, 3 * S::kUnits), S::kRows), run_backward<S>);
}

// kOctets: unit octets of a warp, such that octets * gates is even.
template <class C, class T, int kOctets>
void add_type(std::vector<Run>& runs) {
  using cuda::BackwardShape;
  using cuda::Route;
  using cuda::Shape;
  using cuda::WideShape;
  constexpr int kFew = 8 / T::kPer;  // 16-byte pieces that hold eight values
  add_forward<Shape<C, T, Route::single, 2, 1, kOctets, 2, 2>>(runs, "deep");
  add_forward<Shape<C, T, Route::cluster, 1, 2, kOctets, 1, 2>>(runs, "split");
  add_forward<Shape<C, T, Route::grid, 2, 3, kOctets, 1, 1>>(runs, "split");
  if constexpr (std::is_same_v<T, dev::BF16>)
    add_forward<WideShape<C, T, 2, 1, 2, 1>>(runs, "wgmma tall");
  else if constexpr (cuda::kByWgmma<T>)
    add_forward<WideShape<C, T, 1, 2, 1, 2>>(runs, "wgmma");
  add_backward<BackwardShape<C, T, Route::single, 2, 1, 32, 4 * kFew, 1>>(runs, "wide");
  add_backward<BackwardShape<C, T, Route::cluster, 3, 1, 16, 2 * kFew, 1>>(runs, "wide");
  add_backward<BackwardShape<C, T, Route::grid, 2, 1, 16, 3 * kFew, 1>>(runs, "wide");
#if !defined(FUSEDRNN_FEW)
  add_forward<Shape<C, T, Route::single, 3, 2, kOctets, 1, 1>>(runs, "split");
  add_forward<Shape<C, T, Route::cluster, 2, 1, kOctets, 3, 1>>(runs, "deep");
  add_forward<Shape<C, T, Route::grid, 1, 1, kOctets, 3, 2>>(runs, "deep");
  add_backward<BackwardShape<C, T, Route::single, 1, 2, 32, 4 * kFew, 2>>(runs, "tall");
  add_backward<BackwardShape<C, T, Route::cluster, 2, 2, 32, 4 * kFew, 2>>(runs, "tall");
  add_backward<BackwardShape<C, T, Route::grid, 3, 2, 32, 2 * kFew, 2, kFew>>(runs, "tall");
#endif
}

// With FUSEDRNN_FEW: what is run under a sanitizer.
template <class C, int kOctets>
void add_cell(std::vector<Run>& runs) {
  add_type<C, dev::F16, kOctets>(runs);
#if !defined(FUSEDRNN_FEW)
  add_type<C, dev::BF16, kOctets>(runs);
  add_type<C, dev::TF32, kOctets>(runs);
  add_type<C, cuda::TF32x3, kOctets>(runs);
  add_type<C, cuda::F32, kOctets>(runs);
#else
  if constexpr (C::cell_state) add_type<C, cuda::F32, kOctets>(runs);
#endif
}

}  // namespace fusedrnn::test
