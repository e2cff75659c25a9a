// SPDX-License-Identifier: Apache-2.0
// What stands between a caller's arrays (any strides, any size) and the kernels' (padded, contiguous): copies, biases,
// dropout, column sums. Shapes stand at each kernel. All overwrite. Every route, outside the recurrence.
// Limit: bytes.
#pragma once

#include "product.h"

namespace fusedrnn::cuda {

// The type that has no persistent kernels.
struct F64 {
  using Storage = double;
  static constexpr int kPer = 2;
  static FUSEDRNN_DEVICE double load(double v) { return v; }
  static FUSEDRNN_DEVICE double store(double v) { return v; }
  static FUSEDRNN_DEVICE double operand(double v) { return v; }
};

constexpr int kArrangeThreads = 256;

struct Extent4 {
  int64_t n[4];
};

// to[i0][i1][i2][i3] = from[...] where i < valid in every dimension, else 0, for i < n. With `lengths` (i0 = e, i1 = t,
// i2 = b) also 0 past a row's end. With `sum`, i0 is summed over, in order, and `to` has no such axis.
template <class From, class To>
struct Copy {
  const typename From::Storage* from;
  typename To::Storage* to;
  Extent4 n, valid, from_stride, to_stride;
  const int64_t* lengths;
  int64_t len_e, len_b;
  bool sum;
  static constexpr int kThreads = kArrangeThreads;

  FUSEDRNN_DEVICE void operator()() const {
    const int64_t outer = sum ? 1 : n.n[0], total = outer * n.n[1] * n.n[2] * n.n[3];
    for (int64_t at = static_cast<int64_t>(dev::block()) * kThreads + dev::tid(); at < total;
         at += static_cast<int64_t>(dev::blocks()) * kThreads) {
      int64_t i[4], rest = at;
      FUSEDRNN_UNROLL
      for (int k = 3; k > 0; --k) {
        i[k] = rest % n.n[k];
        rest /= n.n[k];
      }
      i[0] = rest;
      bool on = i[0] < valid.n[0] && i[1] < valid.n[1] && i[2] < valid.n[2] && i[3] < valid.n[3];
      if (on && lengths) on = i[1] < lengths[i[0] * len_e + i[2] * len_b];
      const int64_t source = i[1] * from_stride.n[1] + i[2] * from_stride.n[2] + i[3] * from_stride.n[3];
      MathOf<From> v = 0;
      if (on)
        for (int64_t k = sum ? 0 : i[0]; k < (sum ? n.n[0] : i[0] + 1); ++k)
          v += From::load(from[k * from_stride.n[0] + source]);
      to[(sum ? 0 : i[0] * to_stride.n[0]) + i[1] * to_stride.n[1] + i[2] * to_stride.n[2] + i[3] * to_stride.n[3]] =
          To::store(static_cast<MathOf<To>>(v));
    }
  }
};

// bias (E, sums, pitch) of one direction = bW where x enters a sum, plus bR where h does. bW, bR (E,G*H), may be null.
template <class Cell, class T>
struct Biases {
  const typename T::Storage *bW, *bR;
  int64_t bW_e, bW_n, bR_e, bR_n;
  MathOf<T>* to;
  int64_t to_e;
  int E, H, pitch;
  static constexpr int kThreads = kArrangeThreads;

  FUSEDRNN_DEVICE void operator()() const {
    for (int64_t at = static_cast<int64_t>(dev::block()) * kThreads + dev::tid(); at < static_cast<int64_t>(E) * pitch;
         at += static_cast<int64_t>(dev::blocks()) * kThreads) {
      const int64_t e = at / pitch, u = at % pitch;
      MathOf<T> sums[Cell::sums] = {};
      if (u < H)
        each<Cell::gates>([&](auto k) {
          constexpr int of_x = Cell::x_sum[k.value], of_h = Cell::h_sum[k.value];
          if (bW) sums[of_x] += T::load(bW[e * bW_e + (k.value * static_cast<int64_t>(H) + u) * bW_n]);
          if (bR) sums[of_h] += T::load(bR[e * bR_e + (k.value * static_cast<int64_t>(H) + u) * bR_n]);
        });
      FUSEDRNN_UNROLL
      for (int k = 0; k < Cell::sums; ++k) to[e * to_e + k * pitch + u] = sums[k];
    }
  }
};

// Four random words: Philox4x32-10 (Salmon et al. 2011).
struct Words {
  u32 w[4];
};
FUSEDRNN_DEVICE Words philox(u32 key0, u32 key1, u32 c0, u32 c1, u32 c2, u32 c3) {
  for (int round = 0; round < 10; ++round) {
    const u64 p0 = static_cast<u64>(0xD2511F53u) * c0, p1 = static_cast<u64>(0xCD9E8D57u) * c2;
    const u32 n0 = static_cast<u32>(p1 >> 32) ^ c1 ^ key0, n2 = static_cast<u32>(p0 >> 32) ^ c3 ^ key1;
    c0 = n0;
    c1 = static_cast<u32>(p1);
    c2 = n2;
    c3 = static_cast<u32>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// v (E,T,B,width of pitch) *= 0 or 1 / (1 - p), in place; the mask is csrc/README.md's.
template <class T>
struct Dropout {
  typename T::Storage* v;
  int E, Tn, B, width, pitch, layer;
  double p;
  u64 seed;
  static constexpr int kThreads = kArrangeThreads;

  FUSEDRNN_DEVICE void operator()() const {
    const int64_t total = static_cast<int64_t>(E) * Tn * B * width;
    const auto scale = static_cast<MathOf<T>>(1.0 / (1.0 - p));
    for (int64_t at = static_cast<int64_t>(dev::block()) * kThreads + dev::tid(); at < total;
         at += static_cast<int64_t>(dev::blocks()) * kThreads) {
      const int64_t j = at % width, row = at / width, b = row % B, t = row / B % Tn, e = row / B / Tn;
      const u64 n = static_cast<u64>(((t * E + e) * B + b) * width + j), block = n / 4;
      const Words words = philox(static_cast<u32>(seed), static_cast<u32>(seed >> 32), static_cast<u32>(block),
                                 static_cast<u32>(block >> 32), static_cast<u32>(layer), 0);
      const u32 lane = static_cast<u32>(n % 4);
      const u32 word = lane == 0 ? words.w[0] : lane == 1 ? words.w[1] : lane == 2 ? words.w[2] : words.w[3];
      const bool dropped = static_cast<double>(word) < p * 4294967296.0;
      typename T::Storage& x = v[row * pitch + j];
      x = T::store(dropped ? MathOf<T>(0) : T::load(x) * scale);
    }
  }
};

// partial (sets,kParts,columns) = sums over a kParts'th of the rows of v (sets,rows,columns), each in order; then, run
// a second time over (sets,kParts,columns), sums (sets,1,columns). The order is fixed by the sizes alone.
template <class T, class To>
struct ColumnSum {
  const typename T::Storage* v;
  typename To::Storage* to;
  int sets, parts;
  int64_t rows, columns;
  static constexpr int kThreads = kArrangeThreads;

  FUSEDRNN_DEVICE void operator()() const {
    const int64_t each_part = (rows + parts - 1) / parts;
    for (int64_t at = static_cast<int64_t>(dev::block()) * kThreads + dev::tid(); at < sets * parts * columns;
         at += static_cast<int64_t>(dev::blocks()) * kThreads) {
      const int64_t column = at % columns, part = at / columns % parts, set = at / columns / parts;
      const int64_t end = (part + 1) * each_part < rows ? (part + 1) * each_part : rows;
      MathOf<To> sum = 0;
      for (int64_t r = part * each_part; r < end; ++r) sum += T::load(v[(set * rows + r) * columns + column]);
      to[at] = To::store(sum);
    }
  }
};

}  // namespace fusedrnn::cuda
