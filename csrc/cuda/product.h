// SPDX-License-Identifier: Apache-2.0
// The product of a persistent kernel: a warp's weights, in registers, by 8 rows of h (or of da) a tile. What a lane
// holds of the weights and gets of the sums is the same for every type; how the sums are made is not:
// - 16-bit types and TF32: products of the matrix unit, summed in it.
// - TF32x3: float32 by TF32. Each operand is the sum of two TF32 numbers; of their four products the three that matter
//   are made, small ones first, and summed in float32 outside of the unit, which cuts sums off where it should round
//   (Ootomo and Yokota 2022). Off by about as much as float32 itself; an infinite operand gives NaN.
// - F32: IEEE float32, one fused multiply-add after the other. A lane holds one unit and a quarter of the depth, reads
//   all 8 rows, and the four lanes of a unit then share out their sums: always in the same order.
#pragma once

#include "shape.h"

namespace fusedrnn::cuda {

// Weights as Sums::add takes them: of registers.
template <int kChunks, int kMma>
FUSEDRNN_DEVICE auto held(const U4 (&w)[kChunks][2][kMma]) {
  return [&w](int k, int half, int m) { return w[k][half][m]; };
}

template <class T, int kMma, int kTiles>
class Sums {
 public:
  // Adds kCount chunks of weights by tiles j0 .. j0 + kTogether - 1. weights(k, half, m); at(k, j, n): the lane's line
  // of row n (0..7), j from 0. rows: of tile j0 and those behind it, how many there are. last: nothing will be added to
  // these tiles any more. All lanes.
  template <int kCount, int kTogether, class Weights, class At>
  FUSEDRNN_DEVICE void add(const Weights& weights, int j0, [[maybe_unused]] int rows, int lane, bool last,
                           const At& at) {
    if constexpr (kByFma<T>) {
      FUSEDRNN_UNROLL
      for (int j = 0; j < kTogether; ++j) {
        add_rows<kCount, 0, 1>(weights, j0 + j, rows - 8 * j, j, at);
        add_rows<kCount, 1, 2>(weights, j0 + j, rows - 8 * j, j, at);
        add_rows<kCount, 2, 4>(weights, j0 + j, rows - 8 * j, j, at);
        add_rows<kCount, 4, 6>(weights, j0 + j, rows - 8 * j, j, at);
        add_rows<kCount, 6, 8>(weights, j0 + j, rows - 8 * j, j, at);
        if (last) share_out(j0 + j, lane);
      }
    } else {
      FUSEDRNN_UNROLL
      for (int k = 0; k < kCount; ++k) {
        U4 w[2][kMma];
        FUSEDRNN_UNROLL
        for (int m = 0; m < kMma; ++m) w[0][m] = weights(k, 0, m), w[1][m] = weights(k, 1, m);
        FUSEDRNN_UNROLL
        for (int j = 0; j < kTogether; ++j) multiply(w, j0 + j, at(k, j, unit_of_lane<T>(lane)));
      }
      if constexpr (kChains == 2) {
        if (!last) return;
        FUSEDRNN_UNROLL
        for (int j = j0; j < j0 + kTogether; ++j) FUSEDRNN_UNROLL
        for (int m = 0; m < kMma; ++m) FUSEDRNN_UNROLL
        for (int r = 0; r < 4; ++r) v_[0][j][m][r] += v_[1][j][m][r];
      }
    }
  }

  // The sum of half tile s (its row: the lane's unit) and row 2 * line + p of tile j, p = 0 or 1.
  FUSEDRNN_DEVICE float of(int j, int s, int p) const {
    if constexpr (kByFma<T>)
      return v_[0][j][s][p];
    else
      return v_[0][j][s / 2][s % 2 * 2 + p];
  }

 private:
  // Two where one would leave the matrix unit waiting for its own results.
  static constexpr int kChains = kByFma<T> || std::is_same_v<T, TF32x3> || kMma * kTiles >= 4 ? 1 : 2;

  FUSEDRNN_DEVICE void multiply(const U4 (&w)[2][kMma], int j, const U4& b) {
    if constexpr (std::is_same_v<T, TF32x3>) {
      U4 big, small;
      split(b, big, small);
      FUSEDRNN_UNROLL
      for (int m = 0; m < kMma; ++m) {
        float sum[4] = {};
        U4 w_big[2], w_small;
        FUSEDRNN_UNROLL
        for (int p = 0; p < 2; ++p) {
          split(w[p][m], w_big[p], w_small);
          dev::mma<dev::TF32>(sum, w_small, big.w[2 * p], big.w[2 * p + 1]);
          dev::mma<dev::TF32>(sum, w_big[p], small.w[2 * p], small.w[2 * p + 1]);
        }
        FUSEDRNN_UNROLL
        for (int p = 0; p < 2; ++p) dev::mma<dev::TF32>(sum, w_big[p], big.w[2 * p], big.w[2 * p + 1]);
        FUSEDRNN_UNROLL
        for (int r = 0; r < 4; ++r) v_[0][j][m][r] += sum[r];
      }
    } else {
      FUSEDRNN_UNROLL
      for (int m = 0; m < kMma; ++m) dev::mma<T>(v_[0][j][m], w[0][m], b.w[0], b.w[1]);
      FUSEDRNN_UNROLL
      for (int m = 0; m < kMma; ++m) dev::mma<T>(v_[kChains - 1][j][m], w[1][m], b.w[2], b.w[3]);
    }
  }
  static FUSEDRNN_DEVICE void split(const U4& v, U4& big, U4& small) {
    FUSEDRNN_UNROLL
    for (int r = 0; r < 4; ++r) dev::split_tf32(v.w[r], big.w[r], small.w[r]);
  }

  // Of 8 rows, two for each of the four lanes of a unit.
  FUSEDRNN_DEVICE void share_out(int j, int lane) {
    const bool upper = lane & 16, odd = lane & 8;
    FUSEDRNN_UNROLL
    for (int s = 0; s < 2 * kMma; ++s) {
      float (&v)[8] = v_[0][j][s];
      FUSEDRNN_UNROLL
      for (int n = 0; n < 4; ++n) {
        const float other = dev::shfl_xor(upper ? v[n] : v[n + 4], 16);
        v[n] = (upper ? v[n + 4] : v[n]) + other;
      }
      FUSEDRNN_UNROLL
      for (int n = 0; n < 2; ++n) {
        const float other = dev::shfl_xor(odd ? v[n] : v[n + 2], 8);
        v[n] = (odd ? v[n + 2] : v[n]) + other;
      }
    }
  }
  // Rows kFrom .. kTo - 1 of a tile, if there is any of them.
  template <int kCount, int kFrom, int kTo, class Weights, class At>
  FUSEDRNN_DEVICE void add_rows(const Weights& weights, int j, int rows, int j_at, const At& at) {
    if (rows <= kFrom) return;
    FUSEDRNN_UNROLL
    for (int n = kFrom; n < kTo; ++n) FUSEDRNN_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const U4 b = at(k, j_at, n);
      FUSEDRNN_UNROLL
      for (int s = 0; s < 2 * kMma; ++s) {
        const U4 w = weights(k, s % 2, s / 2);
        FUSEDRNN_UNROLL
        for (int r = 0; r < 4; ++r) v_[0][j][s][n] = dev::fma(w.w[r], b.w[r], v_[0][j][s][n]);
      }
    }
  }

  float v_[kChains][kTiles][kByFma<T> ? 2 * kMma : kMma][kByFma<T> ? 8 : 4] = {};
};

}  // namespace fusedrnn::cuda
