// SPDX-License-Identifier: Apache-2.0
// Formula: da_t = cell'(dh_t, dc_t), dh_{t-1} = da_t R + what the cell passes on; all t in one launch, the last first.
// Reads forward's tape, packed R^T, c0, dy, dcells (T,B,..), dhn, dcn (sets,B,H). Overwrites dh0, dc0 (sets,B,H), and
//   for the time-batched products da (sets,T,B,G,pitch) of x's sums and, where h's last sum is another (GRU), da_h.
// single: R^T in one block; cluster: a block multiplies its own da, pushes sums to their owners; grid: da to all by L2.
// Limit: a step's latency; then the matrix pipe; then, in a grid, G times as much to hand over as in forward.
#pragma once

#include "pack.h"

namespace fusedrnn::cuda {

// single: kUnits = 16 kWarps kMma. cluster: kUnits of a block, 16 kWarps kMma >= H. grid: kUnits = 16 kMma, the warps
// share the depth, and kHeld of the kChunks are kept in registers, the rest in shared memory.
template <class Cell_, class T_, Route kRoute_, int kWarps_, int kMma_, int kUnits_, int kChunks_, int kTiles_,
          int kHeld_ = kChunks_>
struct BackwardShape {
  using Cell = Cell_;
  using T = T_;
  static constexpr Route kRoute = kRoute_;
  static constexpr int kGates = Cell::gates;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMma = kMma_;      // 16-unit weight tiles of a warp
  static constexpr int kUnits = kUnits_;  // of a block
  static constexpr int kChunks = kChunks_;
  static constexpr int kHeld = kHeld_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kHalves = 8 / T::kPer;
  static constexpr int kSplit = kRoute == Route::grid ? kWarps : 1;
  static constexpr int kLines = 4 * kSplit * kChunks;
  static constexpr int kOutputs =
      kRoute == Route::grid ? kUnits : 16 * kWarps * kMma;  // units whose dh a block makes sums for
  static constexpr int kMaxH = kRoute == Route::grid ? kLines * T::kPer / kGates / 8 * 8 : kOutputs;
  static constexpr int kMaxPeers = kRoute == Route::cluster ? kOutputs / kUnits : 1;
  static constexpr int kBlocks = kUnits / 8 * kTiles;  // of a block of threads
  static constexpr int kOwned = (kBlocks + kWarps - 1) / kWarps;
  static_assert(kRoute != Route::single || kUnits == 16 * kWarps * kMma);
  static_assert(kRoute != Route::grid || kUnits == 16 * kMma);
  static_assert(kRoute == Route::grid || kLines * T::kPer >= kGates * kUnits);
  static_assert(kRoute == Route::grid || kHeld == kChunks);
  static_assert(kUnits % 16 == 0);
};

template <class Storage>
struct BackwardArgsOf : Walk {
  using Math = std::conditional_t<sizeof(Storage) == 8, double, float>;
  int peers, row_tiles, first_team;
  bool wide;  // dy can be read in 16-byte pieces
  Math clip_cell, clip_grad;
  const U4* weights;
  const Storage *gx, *extra, *cells, *prev;  // the tape
  Storage *da, *da_h;                        // (sets,T,B,G,pitch), (sets,T,B,pitch); may be gx, extra
  const Storage* c0;                         // may be null
  const Storage *dy, *dcells, *dhn, *dcn;    // may be null
  Storage *dh0, *dc0;                        // may be null
  int64_t dy_t, dy_b, dy_e, dy_d;
  int64_t dcells_t, dcells_b, dcells_e, dcells_d;
  U4* hand_off;  // grid: [set][T][row tile][line][tile][8], all kEmpty; line = (gate * pitch + unit) / kPer
  int* late;
  const Math* carry_in;     // from the part after it: dh, dc, and both of restarts, 4 x (sets,B,H); null: dhn, dcn
  Math* carry_out;          // to the part before it; null: dh0, dc0
  const Storage* c_enters;  // its first step (sets,B,H); null: c0
};

template <class T>
using BackwardArgs = BackwardArgsOf<typename T::Storage>;

// The weights in the order of Backward's lanes: as PackForward in pack.h, with R transposed.
template <class S>
struct PackBackward {
  using T = typename S::T;
  PackArgs<T> a;
  static constexpr int kThreads = 256;
  static constexpr bool kShared = S::kRoute == Route::grid;  // the warps share the depth

  static int64_t pieces(int peers) { return peers * kPiecesOfPeer<S>; }

  FUSEDRNN_DEVICE void operator()() const {
    pack_pieces<S>(a, kThreads, [&](const Place& at, int r, int j) {
      const int unit = ((kShared ? at.peer : at.warp) * S::kMma + at.tile) * 16 + half_tile_of<T>(at.half, r) * 8 +
                       unit_of_lane<T>(at.lane);
      const int k =
          depth_of<T>((kShared ? at.warp * S::kChunks : 0) + at.chunk, at.half, r, line_of_lane<T>(at.lane)) + j;
      const int stride = kShared ? (a.H + 7) / 8 * 8 : S::kUnits;
      const int gate = k / stride, from = k % stride + (kShared ? 0 : at.peer * S::kUnits);
      if (unit >= a.H || from >= a.H || gate >= S::kGates) return T::store(0.0f);
      const int64_t row = static_cast<int64_t>(gate) * a.H + from;
      return T::operand(a.R[at.set * a.r_set + row * a.r_row + unit * a.r_column]);
    });
  }
};

template <class S>
struct Backward {
  using Cell = typename S::Cell;
  using T = typename S::T;
  using Storage = typename T::Storage;
  BackwardArgs<T> a;

  static constexpr int kThreads = S::kThreads;
  // Where a grid's cut would spill registers it is not built: below sm_90, or on sm_75 (bench/cuda_build.py's table).
  static constexpr bool kSpillsBelow90 =
      S::kGates == 4 && ((S::kTiles > 2 && S::kHeld > 9) || (T::kPer == 4 && S::kHeld > 12));
  static constexpr bool kSpillsBelow80 = S::kTiles > 1 && S::kHeld > 9;
  static constexpr int kUnspilled = S::kRoute != Route::grid ? 0 : kSpillsBelow90 ? 90 : kSpillsBelow80 ? 80 : 0;
  static constexpr int kCompute = kUnspilled > oldest<S>() ? kUnspilled : oldest<S>();
  static constexpr int kStages = 4;
  static constexpr int kGates = S::kGates;
  static constexpr int kPieces = 8 * S::kHalves;
  static constexpr bool kExtra = Cell::kept > kGates;             // a kept value beyond the gates
  static constexpr bool kPrev = !Cell::cell_state && Cell::kept;  // the cell looks at h of the step before
  // what is read per step and block: the gates (h for the plain RNN), then
  static constexpr int kExtraAt = kGates;
  static constexpr int kPrevAt = kExtraAt + (kExtra ? 1 : 0);
  static constexpr int kCellAt = kPrevAt + (kPrev ? 1 : 0);  // c of this step and of the step before
  static constexpr int kDyAt = kCellAt + (Cell::cell_state ? 2 : 0);
  static constexpr int kStreams = kDyAt + 1;

  using Acc = Sums<T, S::kMma, S::kTiles>;
  static constexpr int kSlot = S::kOwned * kStreams * 64;  // of one warp and stage
  static constexpr int kRing = S::kWarps * kStages * kSlot;
  static constexpr int kBuffer = S::kRoute == Route::grid ? 0 : S::kLines * S::kTiles * 8;
  // Two: a warp may still multiply the last step's da when another writes this step's.
  static constexpr int kBuffers = 2;
  static constexpr int kSums = S::kRoute == Route::cluster ? S::kMaxPeers * S::kUnits / 16 * S::kTiles * 32 : 0;
  static constexpr int kStaged = S::kRoute == Route::grid ? S::kWarps * S::kOwned * kGates * 64 : 0;
  static constexpr int kPart = S::kChunks % 4 == 0 ? 4 : S::kChunks % 3 == 0 ? 3 : S::kChunks % 2 == 0 ? 2 : 1;
  static constexpr int kLaid = (S::kChunks - S::kHeld) * 2 * S::kMma * kThreads;
  static constexpr int kPassed = kByFma<T> && S::kRoute == Route::grid ? 2 * S::kWarps * kPart * 32 : 0;
  static constexpr int kPartial = S::kRoute == Route::grid ? 2 * S::kBlocks * (S::kSplit - 1) * 64 : 0;

  static constexpr int shared_bytes() {
    return dev::shared_size<U4>(kBuffers * kBuffer) + dev::shared_size<U4>(2 * kSums) + dev::shared_size<U4>(kLaid) +
           dev::shared_size<U4>(kPassed) + dev::shared_size<Storage>(kRing) + dev::shared_size<Storage>(kStaged) +
           dev::shared_size<float>(kPartial) + dev::shared_size<int>(S::kRows) + dev::shared_size<u64>(2);
  }

  FUSEDRNN_DEVICE void operator()() const {
    const int lane = dev::tid() % 32, warp = dev::tid() / 32;
    const int g = unit_of_lane<T>(lane), q = line_of_lane<T>(lane);
    const int rank = S::kRoute == Route::single ? 0 : dev::block() % a.peers;
    const int team = a.first_team + (S::kRoute == Route::single ? dev::block() : dev::block() / a.peers);
    const int tile_row = team % a.row_tiles, set = team / a.row_tiles;
    const int e = set / a.directions, d = set % a.directions;
    const bool backwards = a.directions == 2 ? d == 1 : a.reverse;
    const int row0 = tile_row * S::kRows, begin = a.begin + d * a.begin_d;
    bool late = false;

    dev::Shared shared;
    U4* const lines = shared.take<U4>(kBuffers * kBuffer);
    U4* const sums = shared.take<U4>(2 * kSums);
    U4* const laid = shared.take<U4>(kLaid);
    [[maybe_unused]] U4* const passed = shared.take<U4>(kPassed) + warp * (2 * kPart * 32);
    Storage* const ring = shared.take<Storage>(kRing) + warp * (kStages * kSlot);
    Storage* const staged = shared.take<Storage>(kStaged) + warp * (S::kOwned * kGates * 64);
    float* const partial = shared.take<float>(kPartial);
    int* const length = shared.take<int>(S::kRows);
    u64* const bar = shared.take<u64>(2);

    U4 w[S::kHeld][2][S::kMma];
    load_weights<S>(w, a.weights, set * a.peers + rank, warp, lane, laid);

    row_lengths<S>(a, e, row0, begin, length);
    const int expected = a.peers * (S::kUnits / 16) * S::kTiles * 512;
    open_barriers<S>(bar, expected);
    for (int i = dev::tid(); i < kBuffers * kBuffer; i += kThreads) lines[i] = U4{};
    if constexpr (S::kRoute == Route::cluster)
      dev::sync_cluster();
    else
      dev::sync_block();
    int steps = 0;
    FUSEDRNN_UNROLL
    for (int r = 0; r < S::kRows; ++r) steps = length[r] > steps ? length[r] : steps;

    // what flows from one step into the one before: past the product (dh), dc; and what restarts give to the initial
    // state
    float dh[S::kOwned][2], dc[S::kOwned][2], dh_first[S::kOwned][2], dc_first[S::kOwned][2];
    FUSEDRNN_UNROLL
    for (int i = 0; i < S::kOwned; ++i) FUSEDRNN_UNROLL
    for (int p = 0; p < 2; ++p) {
      const int row = row0 + tile_of(warp, i) * 8 + 2 * q + p, unit = unit_of(rank, warp, i) + g;
      dh[i][p] = a.carry_in ? carried(0, set, row, unit) : state(a.dhn, set, row, unit);
      dc[i][p] = !Cell::cell_state ? 0.0f : a.carry_in ? carried(1, set, row, unit) : state(a.dcn, set, row, unit);
      dh_first[i][p] = a.carry_in ? carried(2, set, row, unit) : 0.0f;
      dc_first[i][p] = Cell::cell_state && a.carry_in ? carried(3, set, row, unit) : 0.0f;
    }
    const int piece_row = lane / S::kHalves % 8, piece_half = lane % S::kHalves * T::kPer;

    FUSEDRNN_UNROLL
    for (int n = 1; n < kStages; ++n) fetch(ring, steps - n, lane, rank, warp, set, row0, length, backwards);

    for (int s = steps - 1; s >= -1; --s) {
      const int turn = steps - 1 - s;  // 0, 1, 2, ...
      // -- what the product of the step after this one gives to the units here (in a single block it is there already)
      if (turn > 0) {
        if constexpr (S::kRoute == Route::cluster) {
          dev::mbar_wait(bar + ((turn - 1) & 1), (turn - 1) >> 1 & 1, late);
          if (dev::tid() == 0) dev::mbar_arrive_expect(bar + ((turn - 1) & 1), expected);
          const U4* const from = sums + ((turn - 1) & 1) * kSums;
          FUSEDRNN_UNROLL
          for (int i = 0; i < S::kOwned; ++i) {
            if (!live(rank, warp, i)) continue;
            const int octet = octet_of(warp, i);
            FUSEDRNN_UNROLL
            for (int peer = 0; peer < S::kMaxPeers; ++peer) {
              if (peer >= a.peers) continue;
              const float* v =
                  reinterpret_cast<const float*>(
                      from + ((peer * (S::kUnits / 16) + octet / 2) * S::kTiles + tile_of(warp, i)) * 32 + lane) +
                  octet % 2 * 2;
              dh[i][0] += v[0];
              dh[i][1] += v[1];
            }
          }
        }
        if constexpr (S::kRoute == Route::grid) {
          Acc acc;
          poll_multiply(acc, w, laid + dev::tid(), passed, set, s + 1, tile_row, warp, lane, late);
          float* const shares =
              partial + (turn & 1) * (kPartial / 2);  // two: the warps are not in step with one another
          FUSEDRNN_UNROLL
          for (int n = 0; n < S::kBlocks; ++n) {
            const float v0 = acc.of(n / (2 * S::kMma), n % (2 * S::kMma), 0);
            const float v1 = acc.of(n / (2 * S::kMma), n % (2 * S::kMma), 1);
            if (n % S::kSplit == warp) {
              dh[n / S::kSplit][0] += v0;
              dh[n / S::kSplit][1] += v1;
            } else {
              float* to = shares + ((n * (S::kSplit - 1) + (warp < n % S::kSplit ? warp : warp - 1)) * 32 + lane) * 2;
              to[0] = v0;
              to[1] = v1;
            }
          }
          dev::sync_block();
          FUSEDRNN_UNROLL
          for (int i = 0; i < S::kOwned; ++i) {
            if (!live(rank, warp, i)) continue;
            FUSEDRNN_UNROLL
            for (int other = 0; other < S::kSplit - 1; ++other) {
              const float* from = shares + (((warp + i * S::kSplit) * (S::kSplit - 1) + other) * 32 + lane) * 2;
              dh[i][0] += from[0];
              dh[i][1] += from[1];
            }
          }
        }
      }
      if (s < 0) break;

      // -- the cell
      dev::cp_async_wait<kStages - 2>();
      dev::sync_warp();
      Storage* const now = ring + s % kStages * kSlot;
      const int first_row = dev::opaque(row0);
      FUSEDRNN_UNROLL
      for (int i = 0; i < S::kOwned; ++i) {
        if (!live(rank, warp, i)) continue;
        const int unit = unit_of(rank, warp, i) + g;
        FUSEDRNN_UNROLL
        for (int p = 0; p < 2; ++p) {
          const int r = tile_of(warp, i) * 8 + 2 * q + p, row = first_row + r, len = length[r];
          Storage* const x = now + i * (kStreams * 64) + (2 * q + p) * 8 + g;
          float da[Cell::sums] = {};
          if (s < len && unit < a.H) {
            const int t = backwards ? len - 1 - s : s;
            if (a.reset && (backwards ? begin + t > 0 : s + 1 < len) &&
                restart(e, row, begin + (backwards ? t : s + 1))) {
              if (a.reset_to_initial) {
                dh_first[i][p] += dh[i][p];
                dc_first[i][p] += dc[i][p];
              }
              dh[i][p] = dc[i][p] = 0.0f;
            }
            if (a.dcells) {
              const float v =
                  T::load(a.dcells[e * a.dcells_e + d * a.dcells_d + t * a.dcells_t + row * a.dcells_b + unit]);
              if constexpr (Cell::cell_state)
                dc[i][p] += v;
              else
                dh[i][p] += v;
            }
            const float h_in = clamp(a.dy ? dh[i][p] + T::load(x[kDyAt * 64]) : dh[i][p], a.clip_grad);
            const float c_in = clamp(dc[i][p], a.clip_grad);
            float kept[Cell::kept + 1], h = 0.0f, h_prev = 0.0f, c = 0.0f, c_prev = 0.0f;
            FUSEDRNN_UNROLL
            for (int k = 0; k < kGates && k < Cell::kept; ++k) kept[k] = T::load(x[k * 64]);
            if constexpr (Cell::kept == 0) h = T::load(x[0]);
            if constexpr (kExtra) kept[kGates] = T::load(x[kExtraAt * 64]);
            if constexpr (kPrev) h_prev = T::load(x[kPrevAt * 64]);
            if constexpr (Cell::cell_state) {
              c = T::load(x[kCellAt * 64]);
              if (s == 0 && a.c_enters)
                c_prev = state(a.c_enters, set, row, unit);
              else if (s == 0)
                c_prev =
                    restarts_at_once(e, row, 0, backwards) && !a.reset_to_initial ? 0.0f : state(a.c0, set, row, unit);
              else if (a.reset && restart(e, row, begin + (backwards ? t + 1 : t)))
                c_prev = a.reset_to_initial ? state(a.c0, set, row, unit) : 0.0f;
              else
                c_prev = T::load(x[(kCellAt + 1) * 64]);
            }
            // c comes from the tape, so the limit is what it became there
            const float clip = T::load(T::store(a.clip_cell));
            Cell::backward(kept, h_prev, h, c_prev, c, clip, h_in, c_in, da, dh[i][p], dc[i][p]);
          }
          each<kGates>([&](auto k) {
            constexpr int of_x = Cell::x_sum[k.value], of_h = Cell::h_sum[k.value];
            x[k.value * 64] = T::store(da[of_x]);
            if constexpr (kExtra && of_x != of_h) x[kExtraAt * 64] = T::store(da[of_h]);
            const Storage v = T::operand(T::store(da[of_h]));
            if constexpr (S::kRoute == Route::grid) {
              staged[(i * kGates + k.value) * 64 + (2 * q + p) * 8 + g] = v;
            } else {
              const int local = k.value * S::kUnits + octet_of(warp, i) * 8 + g;
              Storage* const to = reinterpret_cast<Storage*>(lines + turn % kBuffers * kBuffer);
              to[piece<S::kTiles>(local / T::kPer, tile_of(warp, i), 2 * q + p) * T::kPer + local % T::kPer] = v;
            }
          });
        }
      }
      dev::sync_warp();
      if constexpr (S::kRoute == Route::grid) {
        FUSEDRNN_UNROLL
        for (int i = 0; i < S::kOwned; ++i) {
          if (!live(rank, warp, i)) continue;
          for (int n = lane; n < kGates * kPieces; n += 32)
            dev::publish16(
                slot(set, s, tile_row) +
                    ((n / kPieces * a.pitch + unit_of(rank, warp, i)) / T::kPer + n % S::kHalves) * (S::kTiles * 8) +
                    tile_of(warp, i) * 8 + piece_row,
                *reinterpret_cast<const U4*>(staged + i * (kGates * 64) + n * T::kPer));
        }
      } else {
        dev::sync_block();
        // -- da R for every unit, of this block's da
        if (warp * S::kMma * 16 < a.H) {
          Acc acc;
          const U4* const from = lines + turn % kBuffers * kBuffer;
          acc.template add<S::kChunks, S::kTiles>(held(w), 0, a.B - row0, lane, true, [&](int k, int j, int n) {
            return from[piece<S::kTiles>(k * 4 + q, j, n)];
          });
          if constexpr (S::kRoute == Route::single) {
            FUSEDRNN_UNROLL
            for (int i = 0; i < S::kOwned; ++i) FUSEDRNN_UNROLL
            for (int p = 0; p < 2; ++p) dh[i][p] += acc.of(i / (2 * S::kMma), i % (2 * S::kMma), p);
          } else {
            FUSEDRNN_UNROLL
            for (int j = 0; j < S::kTiles; ++j) FUSEDRNN_UNROLL
            for (int m = 0; m < S::kMma; ++m) {
              const int tile = warp * S::kMma + m, owner = tile / (S::kUnits / 16);
              if (owner >= a.peers) continue;
              U4 v;
              FUSEDRNN_UNROLL
              for (int r = 0; r < 4; ++r) v.w[r] = dev::bits(acc.of(j, 2 * m + r / 2, r % 2));
              U4* const to = sums + (turn & 1) * kSums +
                             ((rank * (S::kUnits / 16) + tile % (S::kUnits / 16)) * S::kTiles + j) * 32 + lane;
              dev::st_async(dev::peer(to, owner), v, dev::peer(bar + (turn & 1), owner));
            }
          }
        }
      }

      // -- to the tape
      const int row0_now = dev::opaque(row0), set_now = dev::opaque(set);
      FUSEDRNN_UNROLL
      for (int i = 0; i < S::kOwned; ++i) {
        if (!live(rank, warp, i)) continue;
        const int r = tile_of(warp, i) * 8 + piece_row, row = row0_now + r;
        if (row >= a.B) continue;
        const int len = length[r], t = s < len && backwards ? len - 1 - s : s;
        const int unit = unit_of(rank, warp, i) + piece_half;
        for (int n = lane; n < kGates * kPieces; n += 32)
          *reinterpret_cast<U4*>(a.da + padded(set_now, t, row) * kGates + n / kPieces * a.pitch + unit) =
              *reinterpret_cast<const U4*>(now + i * (kStreams * 64) + n * T::kPer);
        if constexpr (kExtra) {
          if (lane < kPieces)
            *reinterpret_cast<U4*>(a.da_h + padded(set_now, t, row) + unit) =
                *reinterpret_cast<const U4*>(now + i * (kStreams * 64) + kExtraAt * 64 + lane * T::kPer);
        }
      }
      fetch(ring, s - (kStages - 1), lane, rank, warp, set_now, row0_now, length, backwards);
    }

    // -- the end: gradients of the initial state; zeros past every row's end
    FUSEDRNN_UNROLL
    for (int i = 0; i < S::kOwned; ++i) {
      if (!live(rank, warp, i)) continue;
      FUSEDRNN_UNROLL
      for (int p = 0; p < 2; ++p) {
        const int r = tile_of(warp, i) * 8 + 2 * q + p, row = row0 + r, unit = unit_of(rank, warp, i) + g;
        if (row >= a.B || unit >= a.H) continue;
        const bool cut = length[r] > 0 && restarts_at_once(e, row, begin, backwards);
        const float h_first = dh_first[i][p] + (cut && a.reset_to_initial ? dh[i][p] : 0.0f), h = cut ? 0.0f : dh[i][p];
        const float c_first = dc_first[i][p] + (cut && a.reset_to_initial ? dc[i][p] : 0.0f), c = cut ? 0.0f : dc[i][p];
        const int64_t at = (static_cast<int64_t>(set) * a.B + row) * a.H + unit;
        if (a.carry_out) {
          const int64_t states = static_cast<int64_t>(a.sets) * a.B * a.H;
          a.carry_out[at] = h;
          a.carry_out[2 * states + at] = h_first;
          if constexpr (Cell::cell_state) {
            a.carry_out[states + at] = c;
            a.carry_out[3 * states + at] = c_first;
          }
          continue;
        }
        if (a.dh0) a.dh0[at] = T::store(h_first + h);
        if constexpr (Cell::cell_state) {
          if (a.dc0) a.dc0[at] = T::store(c_first + c);
        }
      }
      const int row = row0 + tile_of(warp, i) * 8 + piece_row, unit = unit_of(rank, warp, i) + piece_half;
      if (row >= a.B) continue;
      for (int t = steps; t < a.Tn; ++t) {
        for (int n = lane; n < kGates * kPieces; n += 32)
          *reinterpret_cast<U4*>(a.da + padded(set, t, row) * kGates + n / kPieces * a.pitch + unit) = U4{};
        if constexpr (kExtra) {
          if (lane < kPieces) *reinterpret_cast<U4*>(a.da_h + padded(set, t, row) + unit) = U4{};
        }
      }
    }
    if (late) *a.late = 1;
  }

 private:
  // Block i of this warp: its tile of rows, its octet among the block's, its first unit; and does it hold a unit at
  // all.
  static FUSEDRNN_DEVICE int tile_of(int warp, int i) {
    if constexpr (S::kRoute == Route::single)
      return i / (2 * S::kMma);
    else
      return (warp + i * S::kWarps) / (S::kUnits / 8);
  }
  static FUSEDRNN_DEVICE int octet_of(int warp, int i) {
    if constexpr (S::kRoute == Route::single)
      return warp * 2 * S::kMma + i % (2 * S::kMma);
    else
      return (warp + i * S::kWarps) % (S::kUnits / 8);
  }
  static FUSEDRNN_DEVICE int unit_of(int rank, int warp, int i) { return rank * S::kUnits + octet_of(warp, i) * 8; }
  FUSEDRNN_DEVICE bool live(int rank, int warp, int i) const {
    return (S::kRoute == Route::single || warp + i * S::kWarps < S::kBlocks) && unit_of(rank, warp, i) < a.H;
  }
  FUSEDRNN_DEVICE int64_t padded(int set, int t, int row) const {
    return ((static_cast<int64_t>(set) * a.Tn + t) * a.B + row) * a.pitch;
  }
  FUSEDRNN_DEVICE U4* slot(int set, int s, int tile_row) const {
    return a.hand_off + ((static_cast<int64_t>(set) * a.Tn + s) * a.row_tiles + tile_row) *
                            (kGates * a.pitch / T::kPer * S::kTiles * 8);
  }
  FUSEDRNN_DEVICE bool restart(int e, int row, int t) const {
    return a.reset[t * a.reset_t + e * a.reset_e + row * a.reset_b] != 0;
  }
  FUSEDRNN_DEVICE bool restarts_at_once(int e, int row, int begin, bool backwards) const {
    return a.reset && !backwards && restart(e, row, begin);
  }
  FUSEDRNN_DEVICE float carried(int n, int set, int row, int unit) const {
    return row < a.B && unit < a.H ? a.carry_in[((static_cast<int64_t>(n) * a.sets + set) * a.B + row) * a.H + unit]
                                   : 0.0f;
  }
  FUSEDRNN_DEVICE float state(const Storage* from, int set, int row, int unit) const {
    return from && row < a.B && unit < a.H ? T::load(from[(static_cast<int64_t>(set) * a.B + row) * a.H + unit]) : 0.0f;
  }

  FUSEDRNN_DEVICE void poll_multiply(Acc& acc, const U4 (&w)[S::kHeld][2][S::kMma], const U4* laid,
                                     [[maybe_unused]] U4* passed, int set, int s, int tile_row, int warp, int lane,
                                     bool& late) const {
    const int g = unit_of_lane<T>(lane), q = line_of_lane<T>(lane);
    // in parts, the next one under way while one is waited for and multiplied: more would not leave registers to the
    // weights
    constexpr int kParts = S::kChunks / kPart;
    static_assert(kPart * kParts == S::kChunks);
    const int count = kGates * a.pitch / T::kPer, line = warp * S::kChunks * 4 + q;
    const U4* const from = slot(set, s, tile_row) + line * S::kTiles * 8 + g;
    constexpr int kStride = 4 * S::kTiles * 8;  // from one chunk to the next
    u32 wanted = 0;
    FUSEDRNN_UNROLL
    for (int k = 0; k < S::kChunks; ++k) wanted |= line + 4 * k < count ? 1u << k : 0u;
    U4 b[2][kPart] = {};
    dev::peek16(b[0], from, 16 * kStride, wanted);
    FUSEDRNN_UNROLL
    for (int n = 0; n < kParts * S::kTiles; ++n) {
      const int j = n / kParts, part = n % kParts, next_j = (n + 1) / kParts, next_part = (n + 1) % kParts;
      if (n + 1 < kParts * S::kTiles)
        dev::peek16(b[(n + 1) % 2], from + next_part * kPart * kStride + next_j * 8, 16 * kStride,
                    wanted >> (next_part * kPart));
      dev::settle16(b[n % 2], from + part * kPart * kStride + j * 8, 16 * kStride, wanted >> (part * kPart), late);
      // a line beyond the last: the buffer still holds another one
      FUSEDRNN_UNROLL
      for (int k = 0; k < kPart; ++k) {
        const u32 on = wanted >> (part * kPart + k) & 1 ? 0xFFFFFFFFu : 0u;
        FUSEDRNN_UNROLL
        for (int r = 0; r < 4; ++r) b[n % 2][k].w[r] &= on;
      }
      U4* const pass = passed + n % 2 * (kPart * 32);
      if constexpr (kByFma<T>) {  // every lane wants the rows of the others
        FUSEDRNN_UNROLL
        for (int k = 0; k < kPart; ++k) pass[piece<1>(4 * k + q, 0, g)] = b[n % 2][k];
      }
      dev::sync_warp();
      const auto weights = [&](int k, int half, int m) {
        const int chunk = part * kPart + k;
        return chunk < S::kHeld ? w[chunk < S::kHeld ? chunk : 0][half][m]
                                : laid[(((chunk - S::kHeld) * 2 + half) * S::kMma + m) * kThreads];
      };
      const int rows = a.B - tile_row * S::kRows - 8 * j;
      acc.template add<kPart, 1>(weights, j, rows, lane, part == kParts - 1, [&](int k, int, int row) {
        return kByFma<T> ? pass[piece<1>(4 * k + q, 0, row)] : b[n % 2][k];
      });
    }
  }

  // What step s needs, on its way into the ring.
  FUSEDRNN_DEVICE void fetch(Storage* ring, int s, int lane, int rank, int warp, int set, int row0, const int* length,
                             bool backwards) const {
    if (s >= 0) {
      FUSEDRNN_UNROLL
      for (int i = 0; i < S::kOwned; ++i) {
        if (!live(rank, warp, i)) continue;
        Storage* const to = ring + s % kStages * kSlot + i * (kStreams * 64);
        const int r = tile_of(warp, i) * 8 + lane / S::kHalves % 8, row = row0 + r;
        if (s >= length[r]) continue;
        const int t = backwards ? length[r] - 1 - s : s, before = backwards ? t + 1 : t - 1;
        const int unit = unit_of(rank, warp, i) + lane % S::kHalves * T::kPer;
        for (int n = lane; n < kGates * kPieces; n += 32)
          dev::cp_async16(to + n * T::kPer, a.gx + padded(set, t, row) * kGates + n / kPieces * a.pitch + unit);
        if (lane >= kPieces) continue;
        if constexpr (kExtra)
          dev::cp_async16(to + kExtraAt * 64 + lane * T::kPer, a.extra + padded(set, t, row) + unit);
        if constexpr (kPrev) dev::cp_async16(to + kPrevAt * 64 + lane * T::kPer, a.prev + padded(set, t, row) + unit);
        if constexpr (Cell::cell_state) {
          dev::cp_async16(to + kCellAt * 64 + lane * T::kPer, a.cells + padded(set, t, row) + unit);
          if (s > 0)
            dev::cp_async16(to + (kCellAt + 1) * 64 + lane * T::kPer, a.cells + padded(set, before, row) + unit);
        }
        if (a.dy) {
          const Storage* const from =
              a.dy + set / a.directions * a.dy_e + set % a.directions * a.dy_d + t * a.dy_t + row * a.dy_b + unit;
          Storage* const dy = to + kDyAt * 64 + lane * T::kPer;
          if (a.wide) {
            if (unit < a.H) dev::cp_async16(dy, from);
          } else {
            FUSEDRNN_UNROLL
            for (int j = 0; j < T::kPer; ++j)
              if (unit + j < a.H) dy[j] = from[j];
          }
        }
      }
    }
    dev::cp_async_commit();
  }
};

}  // namespace fusedrnn::cuda
