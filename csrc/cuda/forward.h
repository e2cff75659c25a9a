// SPDX-License-Identifier: Apache-2.0
// Formula: h_t, c_t = cell(gx_t + bias + h_{t-1} R^T) for all t in one launch; gx = x W^T comes in, cells: cells/*.h.
// Reads gx (sets,T,B,G,pitch), packed R, bias (sets,sums,pitch), h0, c0 (sets,B,H). Overwrites y (T,B,..), hn, cn; and
//   for backward gates over gx, and extra, cells, prev (sets,T,B,pitch): a 5th value, c_t, h before step t.
// single: R in one block; cluster: R over <= 16 blocks, h pushed by DSMEM, sm_90; grid: R over many, h through L2.
// Limit: a step's latency (hand-off, product, gates); then 0.2 us per 128 KB of R and 8 rows; then h to every block.
#pragma once

#include "product.h"

namespace fusedrnn::cuda {

template <class Storage>
struct ForwardArgsOf : Walk {
  using Math = std::conditional_t<sizeof(Storage) == 8, double, float>;
  int peers;       // blocks that share one R
  int row_tiles;   // ceil(B / kRows)
  int first_team;  // of this launch; a team is the blocks that share one R
  bool keep;       // write what backward needs
  bool wide;       // y can be written in 16-byte pieces: H, its strides and its address are multiples of one
  Math clip_cell;
  const U4* weights;
  const Math* bias;  // may be null
  Storage *gx, *extra, *cells, *prev;
  const Storage *h0, *c0;  // may be null
  Storage *y, *hn, *cn;    // hn, cn may be null
  int64_t y_t, y_b, y_e, y_d;
  Math* marks;  // (sets,slots,B,H): c that enters every part of the walk but the first; may be null
  int marks_shift, slots;
  U4* hand_off;  // grid: [set][T+1][row tile][line][tile][8], slot 0 = h0, the others kEmpty
  int* late;     // set where a wait was given up
};

template <class T>
using ForwardArgs = ForwardArgsOf<typename T::Storage>;

template <class S>
struct Forward {
  using Cell = typename S::Cell;
  using T = typename S::T;
  using Storage = typename T::Storage;
  ForwardArgs<T> a;

  static constexpr int kThreads = S::kThreads;
  // Fused multiply-adds with so many registers taken would spill on sm_80.
  static constexpr bool kFull = kByFma<T> && S::kTiles * S::kMma * S::kChunks >= 32;
  static constexpr int kCompute = S::kWide || kFull ? 90 : oldest<S>();
  static constexpr int kStages = S::kWide ? 3 : 4;  // steps of gx under way
  static constexpr int kGates = S::kGates;
  static constexpr int kPieces = 8 * S::kHalves;  // 16-byte pieces of a block
  static constexpr bool kOnChip = S::kRoute != Route::grid;
  static constexpr int kRing = S::kWarps * kStages * S::kOwned * kGates * 64;
  static constexpr int kStaged = S::kWarps * S::kOwned * 3 * 64;
  // of a group: sums of the warps that do not finish them; wide: of all
  static constexpr int kShare = S::kWide ? S::kSplit * 2 * S::kTiles * 64 : S::kBlocks * (S::kSplit - 1) * kGates * 64;
  // In a grid a warp may be a step ahead of one that still reads what it wrote: it waits for its part of the depth
  // only.
  static constexpr int kPartial = S::kGroups * kShare * (kOnChip ? 1 : 2);
  static constexpr int kH = (kOnChip ? 2 : S::kWide ? 1 : 0) * S::kLines * S::kTiles * 8;
  static constexpr int kPassed = kByFma<T> && !kOnChip ? 2 * S::kWarps * S::kChunks * 32 : 0;  // what a warp polled

  static constexpr int shared_bytes() {
    return dev::shared_size<U4>(kH) + dev::shared_size<U4>(kPassed) + dev::shared_size<Storage>(kRing) +
           dev::shared_size<Storage>(kStaged) + dev::shared_size<float>(kPartial) + dev::shared_size<int>(S::kRows) +
           dev::shared_size<u64>(2);
  }

  // The time index at which a row of length `len` is in step s: past its end, the step itself (y is zero there).
  static FUSEDRNN_DEVICE int time(int s, int len, bool backwards) { return s < len && backwards ? len - 1 - s : s; }

  FUSEDRNN_DEVICE void operator()() const {
    const int lane = dev::tid() % 32, warp = dev::tid() / 32;
    const int g = unit_of_lane<T>(lane), q = line_of_lane<T>(lane);
    const int group = S::group_of(warp), split = S::split_of(warp);
    const int rank = S::kRoute == Route::single ? 0 : dev::block() % a.peers;
    const int team = a.first_team + (S::kRoute == Route::single ? dev::block() : dev::block() / a.peers);
    const int tile_row = team % a.row_tiles, set = team / a.row_tiles;
    const int e = set / a.directions, d = set % a.directions;
    const bool backwards = a.directions == 2 ? d == 1 : a.reverse;
    const int row0 = tile_row * S::kRows;
    const int lines = a.pitch / T::kPer;
    bool late = false;

    dev::Shared shared;
    U4* const h_lines = shared.take<U4>(kH);
    [[maybe_unused]] U4* const passed = shared.take<U4>(kPassed) + warp * (2 * S::kChunks * 32);
    Storage* const ring = shared.take<Storage>(kRing) + warp * (kStages * S::kOwned * kGates * 64);
    Storage* const staged = shared.take<Storage>(kStaged) + warp * (S::kOwned * 3 * 64);
    float* const partial = shared.take<float>(kPartial) + group * kShare;
    int* const length = shared.take<int>(S::kRows);
    u64* const bar = shared.take<u64>(2);

    // -- weights
    U4 w[S::kChunks][2][S::kMma];
    load_weights<S>(w, a.weights, set * a.peers + rank, warp, lane);

    // -- rows: how long each runs; where it starts
    row_lengths<S>(a, e, row0, 0, length);
    const int expected = lines * S::kTiles * 128;  // bytes of h that a block gets per step
    open_barriers<S>(bar, expected);
    if constexpr (kOnChip) {
      for (int i = dev::tid(); i < kH; i += kThreads) {
        const int n = i % (kH / 2), l = n / (8 * S::kTiles);
        const int row = row0 + n / 8 % S::kTiles * 8 + (n % 8 ^ (2 * (l & 3)));
        union {
          U4 v;
          Storage x[T::kPer];
        } u;
        FUSEDRNN_UNROLL
        for (int j = 0; j < T::kPer; ++j)
          u.x[j] =
              T::operand(i < kH / 2 ? T::store(start(a.h0, e, set, row, l * T::kPer + j, backwards)) : T::store(0.0f));
        h_lines[i] = u.v;
      }
    }
    if constexpr (S::kWide) {
      for (int i = dev::tid(); i < kH; i += kThreads) dev::operand16(h_lines + i, U4{});
      dev::fence_async();
    }
    if constexpr (S::kRoute == Route::cluster)
      dev::sync_cluster();
    else
      dev::sync_block();
    int steps = 0;
    FUSEDRNN_UNROLL
    for (int r = 0; r < S::kRows; ++r) steps = length[r] > steps ? length[r] : steps;

    // -- what this warp finishes: cells (unit g, rows 2q and 2q + 1) of its blocks
    float h[S::kOwned][2], c[S::kOwned][2], bias[S::kOwned][Cell::sums];
    FUSEDRNN_UNROLL
    for (int i = 0; i < S::kOwned; ++i) {
      const int unit = unit_of(rank, group, split, i) + g;
      FUSEDRNN_UNROLL
      for (int p = 0; p < 2; ++p) {
        const int row = row0 + tile_of(split, i) * 8 + 2 * q + p;
        h[i][p] = start(a.h0, e, set, row, unit, backwards);
        c[i][p] = Cell::cell_state ? start(a.c0, e, set, row, unit, backwards) : 0.0f;
      }
      FUSEDRNN_UNROLL
      for (int n = 0; n < Cell::sums; ++n) bias[i][n] = owned(split, i) ? bias_of(set, n, unit) : 0.0f;
    }
    // the same blocks as 16-byte pieces: lane -> row and half of the first line
    const int piece_row = lane / S::kHalves % 8, piece_half = lane % S::kHalves * T::kPer;

    FUSEDRNN_UNROLL
    for (int s = 0; s < kStages - 1; ++s) fetch(ring, s, steps, lane, rank, group, split, set, row0, length, backwards);
    // the h that enters the first step: to the tape, and to the other blocks of a grid
    if (a.keep || S::kRoute == Route::grid) {
      FUSEDRNN_UNROLL
      for (int i = 0; i < S::kOwned; ++i) FUSEDRNN_UNROLL
      for (int p = 0; p < 2; ++p) staged[(i * 3) * 64 + (2 * q + p) * 8 + g] = T::operand(T::store(h[i][p]));
      dev::sync_warp();
      FUSEDRNN_UNROLL
      for (int i = 0; i < S::kOwned; ++i) {
        if (!live(rank, group, split, i) || lane >= kPieces) continue;
        const int r = tile_of(split, i) * 8 + piece_row, unit = unit_of(rank, group, split, i) + piece_half;
        const U4 v = *reinterpret_cast<const U4*>(staged + (i * 3) * 64 + piece_row * 8 + piece_half);
        if (S::kRoute == Route::grid) dev::publish16(slot(set, 0, tile_row) + (unit / T::kPer * S::kTiles * 8 + r), v);
        if (a.keep && length[r] > 0)
          *reinterpret_cast<U4*>(a.prev + padded(set, time(0, length[r], backwards), row0 + r) + unit) = v;
      }
    }

    // a group beyond the last unit has nothing to do, and nobody would hold it to the pace of the others
    if (S::kRoute != Route::single && !S::kWide && unit_of(rank, group, 0, 0) >= a.H) steps = 0;
    for (int s = 0; s < steps; ++s) {
      // wide has no registers left to carry along what follows from a thread's place: it is computed anew in every step
      const int thread = S::kWide ? dev::opaque(dev::tid()) : dev::tid();
      const int lane = thread % 32, warp = thread / 32, group = S::group_of(warp), split = S::split_of(warp);
      const int g = unit_of_lane<T>(lane), q = line_of_lane<T>(lane), piece_row = lane / S::kHalves % 8,
                piece_half = lane % S::kHalves * T::kPer;
      // -- product of this warp's rows of R with h
      float* const shares = partial + (kOnChip ? 0 : (s & 1) * (S::kGroups * kShare));
      Sums<T, S::kMma, S::kTiles> acc;
      if constexpr (S::kWide) {
        wide_product(shares, h_lines, w, slot(set, s, tile_row), lines, warp, late);
      } else if constexpr (kOnChip) {
        if constexpr (S::kRoute == Route::cluster) {
          if (s > 0) {
            dev::mbar_wait(bar + (s & 1), (s - 1) >> 1 & 1, late);
            if (dev::tid() == 0) dev::mbar_arrive_expect(bar + (s & 1), expected);
            dev::sync_warp();  // the lanes leave a wait one by one, and the products want them together
          }
        }
        const U4* from = h_lines + (s & 1) * (kH / 2);
        acc.template add<S::kChunks, S::kTiles>(held(w), 0, a.B - row0, lane, true, [&](int k, int j, int n) {
          return from[piece<S::kTiles>((split * S::kChunks + k) * 4 + q, j, n)];
        });
      } else {
        const int line = split * S::kChunks * 4 + q;
        const U4* from = slot(set, s, tile_row) + line * S::kTiles * 8 + g;
        u32 wanted = 0;
        FUSEDRNN_UNROLL
        for (int k = 0; k < S::kChunks; ++k) wanted |= line + 4 * k < lines ? 1u << k : 0u;
        FUSEDRNN_UNROLL
        for (int j = 0; j < S::kTiles; ++j) {
          U4 b[S::kChunks] = {};
          dev::poll16(b, from + j * 8, 4 * S::kTiles * 8 * 16, wanted, late);
          U4* const pass = passed + ((s * S::kTiles + j) & 1) * (S::kChunks * 32);
          if constexpr (kByFma<T>) {  // every lane wants the rows of the others
            FUSEDRNN_UNROLL
            for (int k = 0; k < S::kChunks; ++k) pass[piece<1>(4 * k + q, 0, g)] = b[k];
          }
          dev::sync_warp();
          acc.template add<S::kChunks, 1>(held(w), j, a.B - row0 - 8 * j, lane, true, [&](int k, int, int n) {
            return kByFma<T> ? pass[piece<1>(4 * k + q, 0, n)] : b[k];
          });
        }
      }

      // -- sums of the warps that share the depth
      float sum[S::kOwned][kGates][2] = {};
      FUSEDRNN_UNROLL
      for (int n = 0; n < (S::kWide ? 0 : S::kBlocks); ++n) FUSEDRNN_UNROLL
      for (int k = 0; k < kGates; ++k) {
        const int half = n % S::kOctets * kGates + k;
        const float v0 = acc.of(n / S::kOctets, half, 0), v1 = acc.of(n / S::kOctets, half, 1);
        if (n % S::kSplit == split) {
          sum[n / S::kSplit][k][0] = v0;
          sum[n / S::kSplit][k][1] = v1;
        } else {
          const int other = split < n % S::kSplit ? split : split - 1;
          float* to = shares + (((n * (S::kSplit - 1) + other) * kGates + k) * 32 + lane) * 2;
          to[0] = v0;
          to[1] = v1;
        }
      }
      if constexpr (S::kWide) {
        dev::sync_block();
        FUSEDRNN_UNROLL
        for (int i = 0; i < S::kOwned; ++i) FUSEDRNN_UNROLL
        for (int part = 0; part < S::kDepths; ++part) FUSEDRNN_UNROLL
        for (int k = 0; k < kGates; ++k) {
          if (!owned(split, i)) continue;
          const int half = part * 8 + (split + i * S::kSplit) % S::kOctets * kGates + k;
          const Two v = reinterpret_cast<const Two*>(shares)[(half * S::kTiles + tile_of(split, i)) * 32 + lane];
          sum[i][k][0] += v.x[0];
          sum[i][k][1] += v.x[1];
        }
      } else if constexpr (S::kSplit > 1) {
        dev::sync_named(1 + group, 32 * S::kSplit);
        FUSEDRNN_UNROLL
        for (int i = 0; i < S::kOwned; ++i) {
          if (!owned(split, i)) continue;
          FUSEDRNN_UNROLL
          for (int other = 0; other < S::kSplit - 1; ++other) FUSEDRNN_UNROLL
          for (int k = 0; k < kGates; ++k) {
            const float* from =
                shares + ((((split + i * S::kSplit) * (S::kSplit - 1) + other) * kGates + k) * 32 + lane) * 2;
            sum[i][k][0] += from[0];
            sum[i][k][1] += from[1];
          }
        }
      }

      // -- gates
      dev::cp_async_wait<kStages - 2>();
      dev::sync_warp();
      Storage* const now = ring + s % kStages * (S::kOwned * kGates * 64);
      const int first_row = dev::opaque(row0);
      FUSEDRNN_UNROLL
      for (int i = 0; i < S::kOwned; ++i) {
        if (!live(rank, group, split, i)) continue;
        const int unit = unit_of(rank, group, split, i) + g;
        FUSEDRNN_UNROLL
        for (int p = 0; p < 2; ++p) {
          const int r = tile_of(split, i) * 8 + 2 * q + p, len = length[r];
          Storage* const x = now + i * (kGates * 64) + (2 * q + p) * 8 + g;
          float sums[Cell::sums];
          FUSEDRNN_UNROLL
          for (int n = 0; n < Cell::sums; ++n) sums[n] = S::kWide ? bias_of(set, n, unit) : bias[i][n];
          each<kGates>([&](auto k) {
            constexpr int of_x = Cell::x_sum[k.value], of_h = Cell::h_sum[k.value];
            sums[of_x] += T::load(x[k.value * 64]);
            sums[of_h] += sum[i][k.value][p];
          });
          float kept[Cell::kept + 1], h_new, c_new = 0.0f;
          Cell::forward(sums, h[i][p], c[i][p], a.clip_cell, kept, h_new, c_new);
          if (s < len) {
            h[i][p] = h_new;
            c[i][p] = c_new;
          }
          if (unit >= a.H) h[i][p] = 0.0f;
          Storage* const to = staged + (i * 3) * 64 + (2 * q + p) * 8 + g;
          to[64] = T::store(h[i][p]);
          if (a.keep) {
            if constexpr (Cell::kept == 0) x[0] = T::store(h_new);
            FUSEDRNN_UNROLL
            for (int k = 0; k < kGates && k < Cell::kept; ++k) x[k * 64] = T::store(kept[k]);
            if constexpr (Cell::cell_state) to[128] = T::store(c_new);
            if constexpr (Cell::kept > kGates) to[128] = T::store(kept[kGates]);
          }
          if (a.reset && s + 1 < len && restart(e, first_row + r, backwards ? len - 1 - s : s + 1)) {
            h[i][p] = initial(a.h0, set, first_row + r, unit);
            if constexpr (Cell::cell_state) c[i][p] = initial(a.c0, set, first_row + r, unit);
          }
          to[0] = T::operand(T::store(h[i][p]));
          if constexpr (S::kRoute == Route::single) {
            Storage* const line = reinterpret_cast<Storage*>(h_lines + ((s + 1) & 1) * (kH / 2));
            line[piece<S::kTiles>(unit / T::kPer, tile_of(split, i), 2 * q + p) * T::kPer + unit % T::kPer] = to[0];
          }
        }
      }
      dev::sync_warp();

      // -- h to all who need it
      FUSEDRNN_UNROLL
      for (int i = 0; i < S::kOwned; ++i) {
        if (!live(rank, group, split, i)) continue;
        const int n = lane % kPieces, line = unit_of(rank, group, split, i) / T::kPer + n % S::kHalves;
        const U4 v = *reinterpret_cast<const U4*>(staged + (i * 3) * 64 + n * T::kPer);
        if constexpr (S::kRoute == Route::cluster) {
          if (s + 1 < steps) {
            U4* const to =
                h_lines + ((s + 1) & 1) * (kH / 2) + piece<S::kTiles>(line, tile_of(split, i), n / S::kHalves);
            for (int to_rank = lane / kPieces; to_rank < a.peers; to_rank += 32 / kPieces)
              dev::st_async(dev::peer(to, to_rank), v, dev::peer(bar + ((s + 1) & 1), to_rank));
          }
        }
        if constexpr (S::kRoute == Route::grid) {
          if (lane < kPieces && s + 1 < steps)
            dev::publish16(slot(set, s + 1, tile_row) + (line * S::kTiles + tile_of(split, i)) * 8 + n / S::kHalves, v);
        }
      }
      if constexpr (S::kRoute == Route::single) dev::sync_block();

      // -- everything nobody waits for
      const int row0_now = dev::opaque(row0), set_now = dev::opaque(set);
      FUSEDRNN_UNROLL
      for (int i = 0; i < S::kOwned; ++i) {
        if (!live(rank, group, split, i)) continue;
        if constexpr (Cell::cell_state) {
          if (a.marks) {
            FUSEDRNN_UNROLL
            for (int p = 0; p < 2; ++p) {
              const int r = tile_of(split, i) * 8 + 2 * q + p;
              mark(set_now, row0_now + r, unit_of(rank, group, split, i) + g, s, length[r], backwards, c[i][p]);
            }
          }
        }
        const int r = tile_of(split, i) * 8 + piece_row, row = row0_now + r;
        if (row >= a.B) continue;
        const int len = length[r], t = time(s, len, backwards), unit = unit_of(rank, group, split, i) + piece_half;
        const Storage* const from = staged + (i * 3) * 64 + piece_row * 8 + piece_half;
        if (lane < kPieces) {
          U4 v = *reinterpret_cast<const U4*>(from + 64);
          if (s >= len) v = U4{};
          write_y(a.y + e * a.y_e + d * a.y_d + t * a.y_t + row * a.y_b, unit, v);
          if (a.keep && s < len) {
            if constexpr (Cell::cell_state)
              *reinterpret_cast<U4*>(a.cells + padded(set_now, t, row) + unit) =
                  *reinterpret_cast<const U4*>(from + 128);
            if constexpr (Cell::kept > kGates)
              *reinterpret_cast<U4*>(a.extra + padded(set_now, t, row) + unit) =
                  *reinterpret_cast<const U4*>(from + 128);
            if (s + 1 < len)
              *reinterpret_cast<U4*>(a.prev + padded(set_now, time(s + 1, len, backwards), row) + unit) =
                  *reinterpret_cast<const U4*>(from);
          }
        }
        if (a.keep && s < len) {
          for (int n = lane; n < kGates * kPieces; n += 32)
            *reinterpret_cast<U4*>(a.gx + padded(set_now, t, row) * kGates + n / kPieces * a.pitch + unit) =
                *reinterpret_cast<const U4*>(now + i * (kGates * 64) + n * T::kPer);
        }
      }
      fetch(ring, s + kStages - 1, steps, lane, rank, group, split, set_now, row0_now, length, backwards);
    }

    // -- the end: final states; y past every row's end
    FUSEDRNN_UNROLL
    for (int i = 0; i < S::kOwned; ++i) {
      if (!live(rank, group, split, i)) continue;
      FUSEDRNN_UNROLL
      for (int p = 0; p < 2; ++p) {
        const int row = row0 + tile_of(split, i) * 8 + 2 * q + p, unit = unit_of(rank, group, split, i) + g;
        if (row >= a.B || unit >= a.H) continue;
        const int64_t at = (static_cast<int64_t>(set) * a.B + row) * a.H + unit;
        if (a.hn) a.hn[at] = T::store(h[i][p]);
        if constexpr (Cell::cell_state) {
          if (a.cn) a.cn[at] = T::store(c[i][p]);
        }
      }
      const int row = row0 + tile_of(split, i) * 8 + piece_row;
      if (lane < kPieces && row < a.B)
        for (int t = steps; t < a.Tn; ++t)
          write_y(a.y + e * a.y_e + d * a.y_d + t * a.y_t + row * a.y_b, unit_of(rank, group, split, i) + piece_half,
                  U4{});
    }
    if (late) *a.late = 1;
  }

 private:
  struct alignas(8) Two {
    float x[2];
  };

  // Block i of this warp: is there one, which tile of rows, which units; and does it hold a unit at all.
  static FUSEDRNN_DEVICE bool owned(int split, int i) { return split + i * S::kSplit < S::kBlocks; }
  static FUSEDRNN_DEVICE int tile_of(int split, int i) { return (split + i * S::kSplit) / S::kOctets; }
  static FUSEDRNN_DEVICE int unit_of(int rank, int group, int split, int i) {
    return ((rank * S::kGroups + group) * S::kOctets + (split + i * S::kSplit) % S::kOctets) * 8;
  }
  FUSEDRNN_DEVICE bool live(int rank, int group, int split, int i) const {
    return owned(split, i) && unit_of(rank, group, split, i) < a.H;
  }
  FUSEDRNN_DEVICE float bias_of(int set, int n, int unit) const {
    return a.bias && unit < a.H ? a.bias[(static_cast<int64_t>(set) * Cell::sums + n) * a.pitch + unit] : 0.0f;
  }
  FUSEDRNN_DEVICE int64_t padded(int set, int t, int row) const {
    return ((static_cast<int64_t>(set) * a.Tn + t) * a.B + row) * a.pitch;
  }
  // grid: what holds the h that enters step s, for one tile of rows.
  FUSEDRNN_DEVICE U4* slot(int set, int s, int tile_row) const {
    return a.hand_off + ((static_cast<int64_t>(set) * (a.Tn + 1) + s) * a.row_tiles + tile_row) *
                            (a.pitch / T::kPer * S::kTiles * 8);
  }
  FUSEDRNN_DEVICE bool restart(int e, int row, int t) const {
    return a.reset[t * a.reset_t + e * a.reset_e + row * a.reset_b] != 0;
  }
  FUSEDRNN_DEVICE float initial(const Storage* from, int set, int row, int unit) const {
    return from && a.reset_to_initial && unit < a.H
               ? T::load(from[(static_cast<int64_t>(set) * a.B + row) * a.H + unit])
               : 0.0f;
  }
  // The state that enters the first step.
  FUSEDRNN_DEVICE float start(const Storage* from, int e, int set, int row, int unit, bool backwards) const {
    if (!from || row >= a.B || unit >= a.H) return 0.0f;
    if (a.reset && !backwards && !a.reset_to_initial && length_of(e, row) > 0 && restart(e, row, 0)) return 0.0f;
    return T::load(from[(static_cast<int64_t>(set) * a.B + row) * a.H + unit]);
  }
  FUSEDRNN_DEVICE int64_t length_of(int e, int row) const {
    return a.lengths ? a.lengths[e * a.len_e + row * a.len_b] : a.Tn;
  }

  // c after step s, where a part of the walk ends.
  FUSEDRNN_DEVICE void mark(int set, int row, int unit, int s, int len, bool backwards, float c) const {
    if (s + 1 >= len || unit >= a.H) return;
    const int n = mark_after(time(s, len, backwards), a.Tn, backwards, a.marks_shift);
    if (n >= 0) a.marks[((static_cast<int64_t>(set) * a.slots + n) * a.B + row) * a.H + unit] = c;
  }

  // wide: h from the slot into shared memory, each part of the depth by the warpgroups that multiply it, a round under
  // way while the one before is multiplied; all sums to `shares` [part][half tile][tile of rows][lane][2].
  FUSEDRNN_DEVICE void wide_product(float* shares, U4* h, const U4 (&w)[S::kChunks][2][S::kMma], const U4* slot,
                                    int lines, int warp, bool& late) const {
    constexpr int kThem = 128 * S::kGroups;  // threads of a part
    constexpr int kChunk = 32 * S::kTiles;   // 16-byte pieces of h
    constexpr int kMost = 16 * S::kGroups / S::kTiles;
    constexpr int kRound = kMost < 1 ? 1 : kMost < S::kChunks ? kMost : S::kChunks;  // chunks
    constexpr int kRounds = S::kChunks / kRound;
    constexpr int kPiecesOfRound = kRound * kChunk, kMine = (kPiecesOfRound + kThem - 1) / kThem;
    static_assert(kRounds * kRound == S::kChunks);
    const int part = S::part_of(warp), me = dev::tid() - part * kThem;
    const int first = part * S::kChunks * kChunk, end = lines * S::kTiles * 8;  // pieces
    const u64 B = dev::operand(h + first, S::kTiles * 128, 128);
    float acc[S::kTiles][4] = {};
    U4 v[kMine] = {};
    const auto wanted = [&](int round) {
      u32 bits = 0;
      FUSEDRNN_UNROLL
      for (int i = 0; i < kMine; ++i)
        if (me + i * kThem < kPiecesOfRound && first + round * kPiecesOfRound + me + i * kThem < end) bits |= 1u << i;
      return bits;
    };
    dev::peek16(v, slot + first + me, 16 * kThem, wanted(0));
    FUSEDRNN_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      const int at = first + round * kPiecesOfRound + me;
      dev::settle16(v, slot + at, 16 * kThem, wanted(round), late);
      FUSEDRNN_UNROLL
      for (int i = 0; i < kMine; ++i)
        if (wanted(round) >> i & 1) dev::operand16(h + at + i * kThem, v[i]);
      dev::fence_async();
      if (round + 1 < kRounds) dev::peek16(v, slot + at + kPiecesOfRound, 16 * kThem, wanted(round + 1));
      dev::sync_named(1 + part, kThem);
      dev::sync_warp();
      dev::wgmma_fence();
      FUSEDRNN_UNROLL
      for (int k = 0; k < kRound; ++k) FUSEDRNN_UNROLL
      for (int p = 0; p < 2; ++p)
        dev::wgmma<T>(acc, w[round * kRound + k][p][0], B + round * kPiecesOfRound + k * kChunk + p * (kChunk / 2));
      dev::wgmma_commit();
    }
    dev::wgmma_wait(acc);
    Two* const to = reinterpret_cast<Two*>(shares) + (part * 8 + warp % 4 * 2) * S::kTiles * 32 + dev::tid() % 32;
    FUSEDRNN_UNROLL
    for (int j = 0; j < S::kTiles; ++j) FUSEDRNN_UNROLL
    for (int p = 0; p < 2; ++p) to[(p * S::kTiles + j) * 32] = {{acc[j][2 * p], acc[j][2 * p + 1]}};
  }

  // gx of step s on its way into the ring: pieces of this warp's blocks only, so no other warp is involved.
  FUSEDRNN_DEVICE void fetch(Storage* ring, int s, int steps, int lane, int rank, int group, int split, int set,
                             int row0, const int* length, bool backwards) const {
    if (s < steps) {
      Storage* const to = ring + s % kStages * (S::kOwned * kGates * 64);
      FUSEDRNN_UNROLL
      for (int i = 0; i < S::kOwned; ++i) {
        if (!live(rank, group, split, i)) continue;
        const int r = tile_of(split, i) * 8 + lane / S::kHalves % 8;
        if (s >= length[r]) continue;
        const Storage* const from = a.gx + padded(set, time(s, length[r], backwards), row0 + r) * kGates +
                                    unit_of(rank, group, split, i) + lane % S::kHalves * T::kPer;
        FUSEDRNN_UNROLL
        for (int n = 0; n < (kGates * kPieces + 31) / 32; ++n)
          if (lane + n * 32 < kGates * kPieces)
            dev::cp_async16(to + i * (kGates * 64) + (lane + n * 32) * T::kPer,
                            from + (lane + n * 32) / kPieces * a.pitch);
      }
    }
    dev::cp_async_commit();
  }

  FUSEDRNN_DEVICE void write_y(Storage* row, int unit, const U4& v) const {
    if (a.wide) {
      if (unit < a.H) *reinterpret_cast<U4*>(row + unit) = v;
      return;
    }
    union {
      U4 v;
      Storage x[T::kPer];
    } u = {v};
    FUSEDRNN_UNROLL
    for (int j = 0; j < T::kPer; ++j)
      if (unit + j < a.H) row[unit + j] = u.x[j];
  }
};

}  // namespace fusedrnn::cuda
