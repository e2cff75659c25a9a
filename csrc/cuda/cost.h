// SPDX-License-Identifier: Apache-2.0
// The cost model: what a step of the recurrence takes on each route, from sizes and device alone.
#pragma once

#include "backward.h"
#include "forward.h"

namespace fusedrnn::cuda {

// What the routes are chosen by. clusters[n]: how many clusters of n blocks run at once; 0 = none.
struct Device {
  int multiprocessors = 132;
  int compute = 90;
  int shared_bytes = 227 * 1024;
  int clusters[17] = {};
  bool cooperative = true;
  bool wgmma = true;
};

// Microseconds a step, by the formulas of the design notes (predicted from published latencies, not measured here): the
// wait for h, the product (6.26 clocks of the matrix pipe, on each sub-partition, for one of 16 x 8 sums; float32 as
// IEEE has it: one for each of 4 fused multiply-adds and row, of 8 units), h on its way, the gates; times the number of
// waves.
constexpr double kClock = 1.75e3;  // clocks a microsecond

template <class S>
double product_time(int64_t B) {
  const int64_t rows = B > 6 ? 8 : B > 4 ? 6 : B > 2 ? 4 : B;  // of a tile
  const double clocks = kByFma<typename S::T>                   ? 4.0 * static_cast<double>(rows)
                        : std::is_same_v<typename S::T, TF32x3> ? 3 * 6.26
                                                                : 6.26;
  return S::kMma * 2 * S::kChunks * S::kTiles * ((S::kWarps + 3) / 4) * clocks / kClock;
}

// A grid's blocks wait for one another, so it holds only teams (blocks that share one R) that all fit at once: the
// others come in launches of their own.
inline int64_t teams_at_once(const Device& device, int64_t peers) { return device.multiprocessors / peers; }
inline double grid_waves(const Device& device, int64_t teams, int64_t peers) {
  return static_cast<double>((teams + teams_at_once(device, peers) - 1) / teams_at_once(device, peers));
}

// Clocks of a product of 64 gate rows, 32 bytes of depth and 8, 16, .. rows of the batch by wgmma: a floor, then the
// rate of the pipe.
constexpr double wgmma_clocks(int tiles) { return tiles < 8 ? 16.8 + 2 * tiles : 4.1 * tiles; }

template <class S>
double forward_cost(const Device& device, int64_t B, int64_t H, int64_t sets) {
  const int64_t tiles = (B + S::kRows - 1) / S::kRows, teams = tiles * sets;
  const int64_t peers = S::kRoute == Route::single ? 1 : (H + S::kUnits - 1) / S::kUnits;
  const double bytes = static_cast<double>(S::kRows * H) * sizeof(typename S::T::Storage);
  double waves = 1, step = 0.15 + product_time<S>(B) + 0.05 * S::kOwned;
  if (Forward<S>::shared_bytes() > device.shared_bytes || device.compute < Forward<S>::kCompute) return 0;
  if constexpr (S::kRoute == Route::single) {
    if (H > S::kUnits || H > S::kDepth) return 0;
    waves = static_cast<double>((teams + device.multiprocessors - 1) / device.multiprocessors);
    step += 0.05;
  } else if constexpr (S::kRoute == Route::cluster) {
    if (peers > 16 || H > S::kDepth || device.clusters[peers] == 0) return 0;
    waves = static_cast<double>((teams + device.clusters[peers] - 1) / device.clusters[peers]);
    step += 0.2 + bytes / 18 / kClock;
  } else {
    if (H > S::kDepth || !device.cooperative || peers > device.multiprocessors) return 0;
    waves = grid_waves(device, teams, peers);
    if constexpr (S::kWide) {  // products run while h arrives; sums meet in shared memory, 128 bytes a clock
      if (!device.wgmma) return 0;
      const double product = S::kGroups * S::kDepths * S::kChunks * 2 * wgmma_clocks(S::kTiles) / kClock;
      const double arrival = bytes / 38 / kClock, sums = 2 * 256.0 * S::kGroups * S::kDepths * S::kRows / 128 / kClock;
      step = 0.2 + 0.05 * S::kOwned + 0.55 + (product > arrival ? product : arrival) + sums;
    } else {
      step += 0.55 + bytes * S::kGroups / 38 / kClock;
    }
  }
  return waves * step;
}

template <class S>
double backward_cost(const Device& device, int64_t B, int64_t H, int64_t sets) {
  const int64_t tiles = (B + S::kRows - 1) / S::kRows, teams = tiles * sets;
  const int64_t peers = S::kRoute == Route::single ? 1 : (H + S::kUnits - 1) / S::kUnits;
  double waves = 1, step = 0.2 + product_time<S>(B) + 0.05 * S::kOwned;
  if (Backward<S>::shared_bytes() > device.shared_bytes || device.compute < Backward<S>::kCompute || H > S::kMaxH)
    return 0;
  if constexpr (S::kRoute == Route::single) {
    waves = static_cast<double>((teams + device.multiprocessors - 1) / device.multiprocessors);
    step += 0.05;
  } else if constexpr (S::kRoute == Route::cluster) {
    if (peers > S::kMaxPeers || peers > 16 || device.clusters[peers] == 0) return 0;
    waves = static_cast<double>((teams + device.clusters[peers] - 1) / device.clusters[peers]);
    step += 0.25 + static_cast<double>(S::kRows * H) * 4 / 18 / kClock;
  } else {
    if (!device.cooperative || peers > device.multiprocessors) return 0;
    waves = grid_waves(device, teams, peers);
    step += 0.6 + static_cast<double>(S::kRows * H * S::kGates) * sizeof(typename S::T::Storage) / 38 / kClock;
    step += Backward<S>::kLaid * 16.0 * S::kTiles / 128 / kClock;  // weights in shared memory, for each tile of rows
  }
  return waves * step;
}

// Two launches, and R out of the L2 or memory.
inline double stepwise_cost(int64_t gates, int64_t B, int64_t H, int64_t sets, int64_t bytes) {
  const double weights = static_cast<double>(gates * H * H * sets);
  return 4.5 + weights * static_cast<double>(bytes) / 3e6 + 2 * weights * static_cast<double>(B) / 4e8;
}

}  // namespace fusedrnn::cuda
