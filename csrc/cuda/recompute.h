// SPDX-License-Identifier: Apache-2.0
// Formula: all h_t are known, so a = x W^T + h_{t-1} R^T + b is one product for a part of the steps; then the gates,
// and
//   for the LSTM c_t = clip(keep c_{t-1} + add), walked from the c that forward marked in front of the part.
// Reads h (E,T,B,wide) of the tape, marks (sets,slots,B,H), gx = x W^T and the products h R^T. Overwrites the part's
//   tape as forward writes the whole one: gates over gx, extra, cells, prev (sets,n,B,..); and c_enters (sets,B,H).
// Backward of recompute, every route. A part begins at another time index in a direction that walks backwards.
// Limit: bytes; the walk of c, eight steps' loads at once.
#pragma once

#include "stepwise.h"

namespace fusedrnn::cuda {

template <class Cell, class T>
struct RebuildArgs {
  using Storage = typename T::Storage;
  using Math = MathOf<T>;
  Walk w;              // the whole call's
  int n, index;        // steps of the part, and which it is in the order of the walk
  int begin, begin_d;  // its first time index, in direction d: begin + d * begin_d
  int slots;           // marks
  Math clip_cell;
  const Math* bias;
  const Storage* h;
  int64_t h_t, h_b, h_e, h_d;
  const Storage *h0, *c0;
  const Math* marks;
  Math* product;             // (sets,n,B,gates,pitch); of two products the first; the LSTM's keep and add go over it
  const Math* product_last;  // (sets,n,B,pitch)
  Storage *gx, *extra, *cells, *prev, *c_enters;

  FUSEDRNN_DEVICE int first(int set) const { return begin + set % w.directions * begin_d; }
  FUSEDRNN_DEVICE Math h_at(int set, int row, int unit, int t) const {
    return T::load(h[set / w.directions * h_e + set % w.directions * h_d + t * h_t + row * h_b + unit]);
  }
  // What entered the step at time index t.
  FUSEDRNN_DEVICE Math h_before(int set, int row, int unit, int t, int len) const {
    const bool backwards = w.backwards(set), begins = backwards ? t + 1 == len : t == 0;
    const bool fresh = w.reset && (backwards ? !begins && w.restart(set, row, t + 1) : w.restart(set, row, t));
    if (!begins && !fresh) return h_at(set, row, unit, backwards ? t + 1 : t - 1);
    return initial(h0, set, row, unit, fresh);
  }
  FUSEDRNN_DEVICE Math initial(const Storage* from, int set, int row, int unit, bool fresh) const {
    return from && (!fresh || w.reset_to_initial) ? T::load(from[(static_cast<int64_t>(set) * w.B + row) * w.H + unit])
                                                  : Math(0);
  }
};

// f(set, time index in the part, row, unit, place among (sets,n,B,pitch)), for the whole part.
template <class Args, class F>
FUSEDRNN_DEVICE void each_step(const Args& a, const F& f) {
  const int64_t total = static_cast<int64_t>(a.w.sets) * a.n * a.w.B * a.w.pitch;
  for (int64_t at = static_cast<int64_t>(dev::block()) * 256 + dev::tid(); at < total;
       at += static_cast<int64_t>(dev::blocks()) * 256) {
    const int64_t row = at / a.w.pitch, step = row / a.w.B;
    f(static_cast<int>(step / a.n), static_cast<int>(step % a.n), static_cast<int>(row % a.w.B),
      static_cast<int>(at % a.w.pitch), at);
  }
}

// h before every step, as products see it: zero past a row's end. And of the plain RNN all that its tape has, h.
template <class Cell, class T>
struct RebuildBefore {
  RebuildArgs<Cell, T> a;
  static constexpr int kThreads = 256;
  FUSEDRNN_DEVICE void operator()() const {
    each_step(a, [&](int set, int step, int row, int unit, int64_t at) {
      const int t = a.first(set) + step, len = a.w.length(set, row);
      const bool live = unit < a.w.H && t < len;
      a.prev[at] = T::operand(T::store(live ? a.h_before(set, row, unit, t, len) : MathOf<T>(0)));
      if constexpr (Cell::kept == 0) a.gx[at] = T::store(live ? a.h_at(set, row, unit, t) : MathOf<T>(0));
    });
  }
};

// The gates, of all sums. With two products kLast = false makes those in front of the second, true the last one.
template <class Cell, class T, bool kLast>
struct RebuildGates {
  RebuildArgs<Cell, T> a;
  static constexpr int kThreads = 256;
  FUSEDRNN_DEVICE void operator()() const {
    using Math = MathOf<T>;
    each_step(a, [&](int set, int step, int row, int unit, int64_t at) {
      const int t = a.first(set) + step, len = a.w.length(set, row);
      const bool live = unit < a.w.H && t < len;
      constexpr int kOfProduct = Cell::two_products ? Cell::gates - 1 : Cell::gates;
      typename T::Storage* const x = a.gx + at / a.w.pitch * Cell::gates * a.w.pitch + unit;
      [[maybe_unused]] Math* const product = a.product + at / a.w.pitch * kOfProduct * a.w.pitch + unit;
      Math sums[Cell::sums];
      FUSEDRNN_UNROLL
      for (int k = 0; k < Cell::sums; ++k)
        sums[k] = live && a.bias ? a.bias[(static_cast<int64_t>(set) * Cell::sums + k) * a.w.pitch + unit] : Math(0);
      if constexpr (Cell::two_products && !kLast) {
        Math rh = 0;
        if (live) {
          Math r, z;
          Cell::gate(sums[0] + T::load(x[0]) + product[0], sums[1] + T::load(x[a.w.pitch]) + product[a.w.pitch],
                     a.h_before(set, row, unit, t, len), r, z, rh);
          x[0] = T::store(r);
          x[a.w.pitch] = T::store(z);
        }
        a.extra[at] = T::operand(T::store(rh));
      } else if constexpr (Cell::two_products) {
        if (!live) return;
        Math n, h;
        Cell::forward(sums[2] + T::load(x[2 * a.w.pitch]) + a.product_last[at], Math(0), Math(0), n, h);
        x[2 * a.w.pitch] = T::store(n);
      } else {
        if (!live) return;
        each<Cell::gates>([&](auto k) {
          constexpr int of_x = Cell::x_sum[k.value], of_h = Cell::h_sum[k.value];
          sums[of_x] += T::load(x[k.value * a.w.pitch]);
          if constexpr (Cell::state_product) sums[of_h] += product[k.value * a.w.pitch];
        });
        Math kept[Cell::kept + 1], h, c;
        Cell::forward(sums, Math(0), Math(0), Math(0), kept, h, c);
        FUSEDRNN_UNROLL
        for (int k = 0; k < Cell::gates && k < Cell::kept; ++k) x[k * a.w.pitch] = T::store(kept[k]);
        if constexpr (Cell::kept > Cell::gates) a.extra[at] = T::store(kept[Cell::gates]);
        if constexpr (Cell::cell_state) Cell::flow(kept, product[0], product[a.w.pitch]);
      }
    });
  }
};

// c, from the mark in front of the part, or from the row's beginning.
template <class Cell, class T>
struct RebuildCells {
  RebuildArgs<Cell, T> a;
  static constexpr int kThreads = 256;
  FUSEDRNN_DEVICE void operator()() const {
    using Math = MathOf<T>;
    each_cell(a.w, [&](int set, int row, int unit, int64_t) {
      const bool backwards = a.w.backwards(set);
      const int first = a.first(set), len = a.w.length(set, row), here = len - first < a.n ? len - first : a.n;
      if (unit >= a.w.H || here <= 0) return;
      Math c;
      if (backwards ? len <= first + a.n : a.index == 0)
        c = a.initial(a.c0, set, row, unit, a.w.restarts_at_once(set, row));
      else
        c = a.marks[((static_cast<int64_t>(set) * a.slots + a.index - 1) * a.w.B + row) * a.w.H + unit];
      a.c_enters[(static_cast<int64_t>(set) * a.w.B + row) * a.w.H + unit] = T::store(c);
      const int64_t stride = static_cast<int64_t>(a.w.B) * a.w.pitch * (backwards ? -1 : 1);
      const int64_t from = ((static_cast<int64_t>(set) * a.n + (backwards ? here - 1 : 0)) * a.w.B + row) * a.w.pitch;
      constexpr int kAtOnce = 8;
      for (int s = 0; s < here; s += kAtOnce) {
        Math keep[kAtOnce], add[kAtOnce];
        FUSEDRNN_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const Math* const x = a.product + (from + (s + i < here ? s + i : s) * stride) * Cell::gates + unit;
          keep[i] = x[0];
          add[i] = x[a.w.pitch];
        }
        FUSEDRNN_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          if (s + i >= here) break;
          c = clamp(keep[i] * c + add[i], a.clip_cell);
          a.cells[from + (s + i) * stride + unit] = T::store(c);
          if (a.w.reset && s + i + 1 < here &&
              a.w.restart(set, row, first + (backwards ? here - 1 - (s + i) : s + i + 1)))
            c = a.initial(a.c0, set, row, unit, true);
        }
      }
    });
  }
};

}  // namespace fusedrnn::cuda
