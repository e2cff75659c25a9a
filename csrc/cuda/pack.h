// SPDX-License-Identifier: Apache-2.0
// Formula: weights in the order in which a persistent kernel's lanes hold them: loading one is one 16-byte read.
//   forward A[unit, gate][k] = R[gate*H + unit][k]; backward A[unit][gate, k] = R[gate*H + k][unit] (in backward.h).
// Reads R (sets, G*H, H) of any strides. Overwrites packed [set][peer][warp][chunk][half][tile][lane] of 16 bytes.
// Every route but stepwise, once a call, in front of the recurrence.
// Limit: bytes; a few microseconds.
#pragma once

#include "shape.h"

namespace fusedrnn::cuda {

template <class T>
struct PackArgs {
  const typename T::Storage* R;
  int64_t r_set, r_row, r_column;  // strides
  U4* packed;
  int H, peers, sets;
};

// S: the Shape of the kernel that will read them.
template <class S>
struct PackForward {
  using T = typename S::T;
  using Storage = typename T::Storage;
  PackArgs<T> a;
  static constexpr int kThreads = 256;

  static int64_t pieces(int peers) { return static_cast<int64_t>(peers) * S::kWarps * S::kChunks * 2 * S::kMma * 32; }

  FUSEDRNN_DEVICE Storage at(int set, int unit, int gate, int k) const {
    if (unit >= a.H || k >= a.H) return T::store(0.0f);
    const int64_t row = static_cast<int64_t>(gate) * a.H + unit;
    return T::operand(a.R[set * a.r_set + row * a.r_row + k * a.r_column]);
  }

  FUSEDRNN_DEVICE void operator()() const {
    const int64_t per_set = static_cast<int64_t>(a.peers) * S::kWarps * S::kChunks * 2 * S::kMma * 32;
    for (int64_t n = static_cast<int64_t>(dev::block()) * kThreads + dev::tid(); n < per_set * a.sets;
         n += static_cast<int64_t>(dev::blocks()) * kThreads) {
      const int set = static_cast<int>(n / per_set);
      int64_t i = n % per_set;
      const int lane = static_cast<int>(i % 32);
      i /= 32;
      const int tile = static_cast<int>(i % S::kMma);
      i /= S::kMma;
      const int half = static_cast<int>(i % 2);
      i /= 2;
      const int chunk = static_cast<int>(i % S::kChunks);
      i /= S::kChunks;
      const int warp = static_cast<int>(i % S::kWarps);
      const int peer = static_cast<int>(i / S::kWarps);
      const int group = warp % S::kGroups, split = warp / S::kGroups;
      U4 v;
      FUSEDRNN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int s = 2 * tile + (r & 1);
        const int octet = (peer * S::kGroups + group) * S::kOctets + s / S::kGates;
        const int unit = octet * 8 + lane / 4;
        const int k = depth_of<T>(split * S::kChunks + chunk, half, r, lane % 4);
        Storage e[4 / sizeof(Storage)];
        FUSEDRNN_UNROLL
        for (int j = 0; j < static_cast<int>(4 / sizeof(Storage)); ++j) e[j] = at(set, unit, s % S::kGates, k + j);
        if constexpr (sizeof(Storage) == 2)
          v.w[r] = static_cast<u32>(e[0]) | static_cast<u32>(e[1]) << 16;
        else
          v.w[r] = dev::bits(e[0]);
      }
      a.packed[n] = v;
    }
  }
};

}  // namespace fusedrnn::cuda
