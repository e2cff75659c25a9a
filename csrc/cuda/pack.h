// SPDX-License-Identifier: Apache-2.0
// Formula: weights in the order in which a persistent kernel's lanes hold them: loading one is one 16-byte read.
//   forward A[unit, gate][k] = R[gate*H + unit][k]; backward A[unit][gate, k] = R[gate*H + k][unit] (in backward.h).
// Reads R (sets, G*H, H) of any strides. Overwrites packed [set][peer][warp][chunk][half][tile][lane] of 16 bytes.
// Every route but stepwise, once a call, in front of the recurrence.
// Limit: bytes; a few microseconds.
#pragma once

#include "product.h"

namespace fusedrnn::cuda {

template <class T>
struct PackArgs {
  const typename T::Storage* R;
  int64_t r_set, r_row, r_column;  // strides
  U4* packed;
  int H, peers, sets;
};

// Which lane of which warp holds a piece of 16 bytes, and which of its weights that is. S: the Shape of the kernel.
struct Place {
  int set, peer, warp, chunk, half, tile, lane;
};
template <class S>
constexpr int64_t kPiecesOfPeer = S::kWarps * S::kChunks * 2 * S::kMma * 32;

// element(place, r, j): what stands at j in word r of a piece.
template <class S, class F>
FUSEDRNN_DEVICE void pack_pieces(const PackArgs<typename S::T>& a, int threads, const F& element) {
  using Storage = typename S::T::Storage;
  constexpr int kPer = static_cast<int>(4 / sizeof(Storage));
  const int64_t per_set = a.peers * kPiecesOfPeer<S>;
  for (int64_t n = static_cast<int64_t>(dev::block()) * threads + dev::tid(); n < per_set * a.sets;
       n += static_cast<int64_t>(dev::blocks()) * threads) {
    Place at;
    at.set = static_cast<int>(n / per_set);
    int64_t i = n % per_set;
    at.lane = static_cast<int>(i % 32);
    i /= 32;
    at.tile = static_cast<int>(i % S::kMma);
    i /= S::kMma;
    at.half = static_cast<int>(i % 2);
    i /= 2;
    at.chunk = static_cast<int>(i % S::kChunks);
    i /= S::kChunks;
    at.warp = static_cast<int>(i % S::kWarps);
    at.peer = static_cast<int>(i / S::kWarps);
    U4 v;
    FUSEDRNN_UNROLL
    for (int r = 0; r < 4; ++r) {
      Storage e[kPer];
      FUSEDRNN_UNROLL
      for (int j = 0; j < kPer; ++j) e[j] = element(at, r, j);
      if constexpr (kPer == 2)
        v.w[r] = static_cast<u32>(e[0]) | static_cast<u32>(e[1]) << 16;
      else
        v.w[r] = dev::bits(e[0]);
    }
    a.packed[n] = v;
  }
}

template <class S>
struct PackForward {
  using T = typename S::T;
  PackArgs<T> a;
  static constexpr int kThreads = 256;

  static int64_t pieces(int peers) { return peers * kPiecesOfPeer<S>; }

  FUSEDRNN_DEVICE void operator()() const {
    pack_pieces<S>(a, kThreads, [&](const Place& at, int r, int j) {
      const int group = S::group_of(at.warp), s = S::half_of(at.warp, at.tile, at.half, r);
      const int octet = (at.peer * S::kGroups + group) * S::kOctets + s / S::kGates;
      const int unit = octet * 8 + unit_of_lane<T>(at.lane);
      const int k = S::depth_at(at.warp, at.chunk, at.half, r, line_of_lane<T>(at.lane)) + j;
      if (unit >= a.H || k >= a.H || s >= S::kOctets * S::kGates) return T::store(0.0f);
      const int64_t row = static_cast<int64_t>(s % S::kGates) * a.H + unit;
      return T::operand(a.R[at.set * a.r_set + row * a.r_row + k * a.r_column]);
    });
  }
};

}  // namespace fusedrnn::cuda
