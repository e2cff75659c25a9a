// SPDX-License-Identifier: Apache-2.0
// How a persistent kernel is cut: which unit, gate and depth each warp and lane holds, and how h lies in memory.
//
// One product per step, weights (M side, 16 rows a tile) by h (N side, 8 rows of the batch a tile): product.h.
// - A *unit octet* is 8 units. A warp owns kOctets of them with all gates: half tile s = octet * G + gate holds 8 rows,
//   so a lane has every gate of unit g, for rows 2q and 2q + 1 of the batch, in its sums (g = lane / 4, q = lane % 4;
//   in float32 the other way round, see product.h).
// - A *block* is 8 units by 8 rows of the batch: 32 lanes with 2 cells each.
// - A block of threads (CTA) has kGroups octet groups, and each group kSplit warps that share the depth (K); their sums
//   meet in shared memory and each block is finished by one warp.
// - A *line* is 8 rows by 16 bytes (kPer units): 128 bytes. A lane's 16 bytes (row g, line q of four) feed two
//   products: the order of the depth inside a product is free as long as both sides agree, and `depth_of` says what it
//   is. So h needs no ldmatrix, and may come straight from global memory.
// - In shared memory the 8 rows of line l stand in the order row ^ (2 * (l % 4)): reads by lanes and writes by blocks
//   are then both free of bank conflicts.
#pragma once

#include <type_traits>

#include "walk.h"

namespace fusedrnn::cuda {

using dev::u16;
using dev::u32;
using dev::U4;
using dev::u64;

// f(Index<0>), f(Index<1>), ... f(Index<N - 1>): a loop whose counter is a constant.
template <int N>
struct Index {
  static constexpr int value = N;
};
template <int N, int I = 0, class F>
FUSEDRNN_DEVICE void each(const F& f) {
  if constexpr (I < N) {
    f(Index<I>());
    each<N, I + 1>(f);
  }
}

// What sums and states are kept in.
template <class T>
using MathOf = std::conditional_t<sizeof(typename T::Storage) == 8, double, float>;

// recompute: forward marks c after every 2^shift-th step of the time axis, counted from where the direction begins.
// Which mark stands after time index t, or -1.
FUSEDRNN_DEVICE int mark_after(int t, int steps, bool backwards, int shift) {
  const int n = backwards ? steps - t : t + 1;
  return n & ((1 << shift) - 1) ? -1 : (n >> shift) - 1;
}

enum class Route { single, cluster, grid, stepwise };

// float32 as IEEE has it; in the stepwise route the product of a library.
struct F32 {
  using Storage = float;
  static constexpr int kPer = 4;
  static FUSEDRNN_DEVICE float load(float v) { return v; }
  static FUSEDRNN_DEVICE float store(float v) { return v != v ? __builtin_nanf("") : v; }
  static FUSEDRNN_DEVICE float operand(float v) { return v; }
};
// The same numbers, multiplied by persistent kernels in TF32 parts.
struct TF32x3 : F32 {};

template <class T>
constexpr bool kByFma = std::is_same_v<T, F32>;
template <class T>
constexpr bool kByWgmma = !std::is_base_of_v<F32, T>;  // can be

// Which of the warp's units of an octet (and which row of what it multiplies by) a lane has, and which of four lines.
template <class T>
FUSEDRNN_DEVICE int unit_of_lane(int lane) {
  return kByFma<T> ? lane % 8 : lane / 4;  // lanes that read the same are neighbours
}
template <class T>
FUSEDRNN_DEVICE int line_of_lane(int lane) {
  return kByFma<T> ? lane / 8 : lane % 4;
}

// Weight register r (0..3) of `half` (0, 1) on chunk `chunk`: which half of its tile's 16 rows; the first depth index
// it holds (16-bit types hold this one and the next).
template <class T>
FUSEDRNN_DEVICE int half_tile_of(int half, int r) {
  return kByFma<T> ? half : r & 1;
}
template <class T>
FUSEDRNN_DEVICE int depth_of(int chunk, int half, int r, int line) {
  return (chunk * 4 + line) * T::kPer + (kByFma<T> ? r : (half * 2 + (r >> 1)) * (T::kPer / 4));
}

template <class Cell_, class T_, Route kRoute_, int kGroups_, int kSplit_, int kOctets_, int kChunks_, int kTiles_>
struct Shape {
  using Cell = Cell_;
  using T = T_;
  static constexpr Route kRoute = kRoute_;
  static constexpr int kGates = Cell::gates;
  static constexpr int kGroups = kGroups_;  // octet groups of a block
  static constexpr int kSplit = kSplit_;    // warps that share the depth
  static constexpr int kOctets = kOctets_;  // unit octets of a warp
  static constexpr int kChunks =
      kChunks_;  // 16-byte pieces of a row of h that a lane multiplies: 8 * kChunks weight registers per tile
  static constexpr int kTiles = kTiles_;  // 8-row tiles of the batch
  static constexpr int kWarps = kGroups * kSplit;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kUnits = 8 * kGroups * kOctets;            // of a block
  static constexpr int kMma = kGates * kOctets / 2;               // 16-row weight tiles of a warp
  static constexpr int kLines = 4 * kSplit * kChunks;             // of the whole depth
  static constexpr int kDepth = kLines * T::kPer;                 // the largest H
  static constexpr int kBlocks = kTiles * kOctets;                // of a group
  static constexpr int kOwned = (kBlocks + kSplit - 1) / kSplit;  // finished by one warp at most
  static constexpr int kHalves = 8 / T::kPer;                     // lines of a block
  static constexpr bool kWide = false;
  static_assert(kGates * kOctets % 2 == 0);

  static FUSEDRNN_DEVICE int group_of(int warp) { return warp % kGroups; }
  static FUSEDRNN_DEVICE int split_of(int warp) { return warp / kGroups; }
  // What weight register r of a warp's tile holds: which half tile, and from which depth on.
  static FUSEDRNN_DEVICE int half_of(int, int tile, int half, int r) { return 2 * tile + half_tile_of<T>(half, r); }
  static FUSEDRNN_DEVICE int depth_at(int warp, int chunk, int half, int r, int q) {
    return depth_of<T>(split_of(warp) * kChunks + chunk, half, r, q);
  }
};

// The cut for many rows of the batch, on wgmma: a grid whose blocks bring h into shared memory. A group is 64 gate rows
// (8 half tiles; GRU leaves 2 of them empty) and kDepths warpgroups that share the depth: a warp multiplies 16 of
// the rows, so it has only some gates of a unit, and all sums meet in shared memory. kSplit: the warps of a group.
template <class Cell_, class T_, int kGroups_, int kDepths_, int kChunks_, int kTiles_>
struct WideShape {
  using Cell = Cell_;
  using T = T_;
  static constexpr Route kRoute = Route::grid;
  static constexpr bool kWide = true;
  static constexpr int kGates = Cell::gates;
  static constexpr int kGroups = kGroups_;
  static constexpr int kDepths = kDepths_;
  static constexpr int kSplit = 4 * kDepths;
  static constexpr int kOctets = 8 / kGates;
  static constexpr int kChunks = kChunks_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kWarps = kGroups * kSplit;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kUnits = 8 * kGroups * kOctets;
  static constexpr int kMma = 1;
  static constexpr int kLines = 4 * kDepths * kChunks;
  static constexpr int kDepth = kLines * T::kPer;
  static constexpr int kBlocks = kTiles * kOctets;
  static constexpr int kOwned = (kBlocks + kSplit - 1) / kSplit;
  static constexpr int kHalves = 8 / T::kPer;

  // Warpgroups: all groups of the first part of the depth, then of the next.
  static FUSEDRNN_DEVICE int part_of(int warp) { return warp / (4 * kGroups); }
  static FUSEDRNN_DEVICE int group_of(int warp) { return warp / 4 % kGroups; }
  static FUSEDRNN_DEVICE int split_of(int warp) { return part_of(warp) * 4 + warp % 4; }
  static FUSEDRNN_DEVICE int half_of(int warp, int, int, int r) { return 2 * (warp % 4) + (r & 1); }
  static FUSEDRNN_DEVICE int depth_at(int warp, int chunk, int half, int r, int q) {  // a product takes two lines
    return ((part_of(warp) * kChunks + chunk) * 4 + half * 2 + (r >> 1)) * T::kPer + q * (T::kPer / 4);
  }
};

// The oldest GPU that a kernel cut like this runs on: what has clusters, what has the products.
template <class S>
constexpr int oldest() {
  return S::kRoute == Route::cluster ? 90 : std::is_same_v<typename S::T, dev::F16> ? 75 : 80;
}

// The place in a line buffer (in 16-byte pieces) of row n (0..7) of tile j, line l.
template <int kTiles>
FUSEDRNN_DEVICE int piece(int l, int j, int n) {
  return (l * kTiles + j) * 8 + (n ^ (2 * (l & 3)));
}

// Kernels to choose among.
template <class... S>
struct List {};
template <class... A, class... B>
List<A..., B...> joined(List<A...>, List<B...>);
// A cut on wgmma, of the types that it multiplies.
template <class Cell, class T, int... n>
using Wide = std::conditional_t<kByWgmma<T>, List<WideShape<Cell, T, n...>>, List<>>;

// What forward and backward begin with. A warp's weights, into registers for the whole sequence, and those of chunks
// beyond kHeld into shared memory, where `laid` has 16 bytes for every thread, chunk, half and tile; how long each row
// of this block runs; the barriers of a cluster, each with the bytes that a step brings.
template <class S, int kHeld>
FUSEDRNN_DEVICE void load_weights(U4 (&w)[kHeld][2][S::kMma], const U4* packed, int block, int warp, int lane,
                                  U4* laid = nullptr) {
  const U4* from = packed + (static_cast<int64_t>(block) * S::kWarps + warp) * (S::kChunks * 2 * S::kMma * 32) + lane;
  FUSEDRNN_UNROLL
  for (int c = 0; c < kHeld; ++c) FUSEDRNN_UNROLL
  for (int p = 0; p < 2; ++p) FUSEDRNN_UNROLL
  for (int m = 0; m < S::kMma; ++m) w[c][p][m] = dev::ldg16(from + ((c * 2 + p) * S::kMma + m) * 32);
  // a thread reads only what it wrote: no barrier
  for (int n = 0; n < (S::kChunks - kHeld) * 2 * S::kMma; ++n)
    laid[n * S::kThreads + dev::tid()] = dev::ldg16(from + (kHeld * 2 * S::kMma + n) * 32);
}
template <class S, class Args>
FUSEDRNN_DEVICE void row_lengths(const Args& a, int e, int row0, int begin, int* length) {
  for (int r = dev::tid(); r < S::kRows; r += S::kThreads) {
    int64_t n = row0 + r < a.B ? a.Tn : 0;
    if (row0 + r < a.B && a.lengths) n = a.lengths[e * a.len_e + (row0 + r) * a.len_b] - begin;
    length[r] = static_cast<int>(n < 0 ? 0 : n > a.Tn ? a.Tn : n);
  }
}
template <class S>
FUSEDRNN_DEVICE void open_barriers(u64* bar, int expected) {
  if constexpr (S::kRoute == Route::cluster) {
    if (dev::tid() == 0) {
      dev::mbar_init(bar, 1);
      dev::mbar_init(bar + 1, 1);
      dev::mbar_arrive_expect(bar, expected);
      dev::mbar_arrive_expect(bar + 1, expected);
    }
  }
}

}  // namespace fusedrnn::cuda
