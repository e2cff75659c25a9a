// SPDX-License-Identifier: Apache-2.0
// The products.   C[r][n] = init + sum_k A[r][k] B[k][n]
// Read: A by row pointers, or packed k-major; B packed in panels of up to 4 registers' width.
// Written: C, affine rows. Overwrites C, starting from zero, from a bias row or from C itself (then it accumulates).
// Route: packed; `dot_kernel` needs no packing and wins where a weight is used by few rows.
// Limit: FMA from 2 rows of A on; one row streams B at the bandwidth of the cache that holds it. The chain of FMAs
//   behind an element of C depends on K and on the number of rows only: threads do not change a bit.
#pragma once

#include "vec.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class T>
FUSEDRNN_FORCE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FUSEDRNN_FORCE T larger(T a, T b) {
  return a > b ? a : b;
}

// Rows of C that one micro-kernel holds in registers beside `nv` registers of B.
constexpr int rows_of(int nv) {
  if (kManyRegisters) return nv == 4 ? 6 : 8;
  return nv == 4 ? 2 : nv == 3 ? 4 : 6;
}
constexpr int kWidest = kManyRegisters ? 4 : 2;  // best width of a panel, in registers; 3 where 3 gates ask for it
constexpr int kTile = 6;                         // rows of a packed A panel

template <class S>
struct Tile {
  const S* const* rows;  // A by rows ...
  const S* packed;       // ... or A packed: element (i, k) at packed[k * kTile + i]
  const S* b;            // panel: register j of step k at b + k * ldb + j * lanes
  int64_t ldb, K;
  const S* init;  // null: zero
  int64_t ldi;    // 0: one bias row for all
  S* c;
  int64_t ldc;
  int64_t offset[4];  // of register j in a row of C (and of init)
  int64_t last;       // lanes of the last register that exist in C
  bool part;          // its rows are a part of those that are multiplied
};

template <class S, int MR, int NV, bool Packed>
void tile_kernel(const Tile<S>& t) {
  using V = Vec<S>;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      if (!t.init)
        acc[i][j] = V(0);
      else
        acc[i][j] = load(t.init + i * t.ldi + t.offset[j], j == NV - 1 ? t.last : V::lanes);
    }
  }
  const S* a[MR];
  if constexpr (!Packed) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) a[i] = t.rows[i];
  }
  const S* b = t.b;
  const S* packed = t.packed;
  const int64_t ldb = t.ldb, K = t.K;
  int64_t k = 0;
  // One row: several chains over k, or the FMA's latency would be the limit. As many whatever NV is, because the width
  // of a panel may depend on the number of threads; not where one thread of several has one row of many.
  if constexpr (MR == 1 && !Packed) {
    if (!t.part) {
      constexpr int Chains = 2;
      V chain[Chains][NV];
#pragma GCC unroll 8
      for (int c = 0; c < Chains; ++c)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) chain[c][j] = V(S(0));
      for (; k + Chains <= K; k += Chains, b += Chains * ldb) {
#pragma GCC unroll 8
        for (int c = 0; c < Chains; ++c) {
          const V av(a[0][k + c]);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) chain[c][j] = chain[c][j] + av * load(b + c * ldb + j * V::lanes);
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < Chains; ++c)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[0][j] = acc[0][j] + chain[c][j];
    }
  }
  for (; k < K; ++k, b += ldb) {
    V bv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * V::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const V av(Packed ? packed[i] : a[i][k]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = acc[i][j] + av * bv[j];
    }
    if constexpr (Packed) packed += kTile;
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(t.c + i * t.ldc + t.offset[j], acc[i][j], j == NV - 1 ? t.last : V::lanes);
  }
}

template <class S, bool Packed, int NV, int MR = rows_of(NV)>
FUSEDRNN_FORCE void run_rows(const Tile<S>& t, int rows) {
  if constexpr (Packed && MR > kTile)
    run_rows<S, Packed, NV, kTile>(t, rows);
  else if (rows == MR)
    tile_kernel<S, MR, NV, Packed>(t);
  else if constexpr (MR > 1)
    run_rows<S, Packed, NV, MR - 1>(t, rows);
}
// One tile of `rows` <= rows_of(nv) (and <= kTile where A is packed) by nv registers.
template <class S, bool Packed>
void run_tile(const Tile<S>& t, int rows, int nv) {
  switch (nv) {
    case 1:
      return run_rows<S, Packed, 1>(t, rows);
    case 2:
      return run_rows<S, Packed, 2>(t, rows);
    case 3:
      return run_rows<S, Packed, 3>(t, rows);
    default:
      return run_rows<S, Packed, 4>(t, rows);
  }
}

// Weights in panels. The registers of B are numbered v = tile * gates + gate, so that a panel holds all gates of its
// units; `sum[gate]` says where in C's row (tile * sums + sum) register v lands. Blocks of `block` unit tiles are what
// threads own.
template <class S>
struct Panels {
  static constexpr int lanes = Vec<S>::lanes;
  S* data = nullptr;
  int64_t K = 0, units = 0;
  int gates = 1, sums = 1, block = 1;
  int sum[4] = {0, 1, 2, 3};
  bool plain = false;   // C is user-like memory: `units` columns without padding
  bool halves = false;  // packed as bfloat16, in pairs: steps k and k + 1 in the halves of a lane
  bool pairs = false;   // ... and the rows of A are such pairs, too: see pair_kernel
  // Not packed: the matrix itself, rows of K contiguous elements, gate g's from row g * units on.
  const S* source = nullptr;
  int64_t row_stride = 0;

  int64_t tiles() const { return (units + lanes - 1) / lanes; }
  int64_t blocks() const { return (tiles() + block - 1) / block; }
  int width() const {
    return gates * block % kWidest == 0 ? kWidest : gates == 3 ? 3 : smaller(gates * block, kWidest);
  }
  int64_t elements() const { return tiles() * lanes * gates * K; }
};
// Packing costs as much as multiplying about so many rows (measured).
inline bool worth_packing(int64_t rows, int64_t K) { return rows > 4 + K / 32; }

// Unit tiles that a block has: enough to fill a panel, fewer where that leaves a thread without a block.
inline int block_tiles(int gates, int64_t tiles, int threads) {
  int block = gates >= 3 ? 1 : kWidest / gates;
  while (block > 1 && (tiles + block - 1) / block < threads) block /= 2;
  return block < 1 ? 1 : block;
}

// Sums of L registers: lane i of the result is the sum of register i's lanes.
template <class S>
FUSEDRNN_FORCE Vec<S> sum_lanes(typename Vec<S>::Native* v) {
  constexpr int L = Vec<S>::lanes;
  typename Vec<S>::Int even, odd;
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) even[j] = 2 * j, odd[j] = 2 * j + 1;
#pragma GCC unroll 4
  for (int count = L; count > 1; count /= 2)
    for (int i = 0; i < count / 2; ++i)
      v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
  return v[0];
}

// The product without packing: one register of C for each of MR rows, `valid` rows of weights times rows of A along k.
template <class S, int MR>
void dot_kernel(const Tile<S>& t, const S* w, int64_t row_stride, int64_t valid) {
  using V = Vec<S>;
  constexpr int L = V::lanes, Rows = L < 4 ? L : 4;  // rows of weights at a time: as many streams
  typename V::Native sums[MR][L];
  for (int i = 0; i < L; i += Rows) {
    V acc[MR][Rows];
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < Rows; ++j) acc[r][j] = V(S(0));
    const S* row[Rows];
#pragma GCC unroll 4
    for (int j = 0; j < Rows; ++j) row[j] = w + smaller<int64_t>(i + j, valid - 1) * row_stride;
    auto step = [&](int64_t k, int64_t n) {
      V av[MR];
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) av[r] = load(t.rows[r] + k, n);
#pragma GCC unroll 4
      for (int j = 0; j < Rows; ++j) {
        const V wv = load(row[j] + k, n);
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) acc[r][j] = acc[r][j] + av[r] * wv;
      }
    };
    int64_t k = 0;
    for (; k + L <= t.K; k += L) step(k, L);
    if (k < t.K) step(k, t.K - k);
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < Rows; ++j) sums[r][i + j] = acc[r][j].v;
  }
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r) {
    V sum = sum_lanes<S>(sums[r]);
    if (t.init) sum = sum + load(t.init + r * t.ldi + t.offset[0], t.last);
    store(t.c + r * t.ldc + t.offset[0], sum, t.last);
  }
}

// One row of A, B packed as bfloat16: half the bytes to read. A has a finite element behind its last one.
template <int NV>
void half_kernel(const Tile<float>& t) {
  using V = Vec<float>;
  V acc[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) acc[j] = t.init ? load(t.init + t.offset[j]) : V(0);
  const float *a = t.rows[0], *b = t.b;
  for (int64_t k = 0; k < t.K; k += 2, b += t.ldb) {
    const V a0(a[k]), a1(a[k + 1]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const auto two = reinterpret_cast<V::Int>(load(b + j * V::lanes).v);
      acc[j] = acc[j] + a0 * V(reinterpret_cast<V::Native>(two << 16));
      acc[j] = acc[j] + a1 * V(reinterpret_cast<V::Native>(two & static_cast<int32_t>(0xffff0000)));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) store(t.c + t.offset[j], acc[j]);
}
inline void run_halves(const Tile<float>& t, int nv) {
  switch (nv) {
    case 1:
      return half_kernel<1>(t);
    case 2:
      return half_kernel<2>(t);
    case 3:
      return half_kernel<3>(t);
    default:
      return half_kernel<4>(t);
  }
}

// A and B as pairs of bfloat16, sums in float: two steps of k at once.
#if defined(__AVX512F__)
constexpr bool kPairs = true;
template <int MR, int NV>
__attribute__((target("avx512bf16"))) void pair_kernel(const Tile<float>& t) {
  using V = Vec<float>;
  __m512 acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = t.init ? load(t.init + i * t.ldi + t.offset[j]).v : V(0).v;
  const float *b = t.b, *a[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) a[i] = t.rows[i];
  for (int64_t k = 0; k < (t.K + 1) / 2; ++k, b += t.ldb) {
    __m512bh bv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) bv[j] = reinterpret_cast<__m512bh>(load(b + j * V::lanes).v);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const auto av = reinterpret_cast<__m512bh>(_mm512_set1_ps(a[i][k]));
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(t.c + i * t.ldc + t.offset[j], V(acc[i][j]));
}
#else
constexpr bool kPairs = false;
template <int MR, int NV>
void pair_kernel(const Tile<float>&) {}
#endif
template <int NV, int MR = rows_of(NV)>
FUSEDRNN_FORCE void pair_rows(const Tile<float>& t, int rows) {
  if (rows == MR)
    pair_kernel<MR, NV>(t);
  else if constexpr (MR > 1)
    pair_rows<NV, MR - 1>(t, rows);
}
inline void run_pairs(const Tile<float>& t, int rows, int nv) {
  switch (nv) {
    case 1:
      return pair_rows<1>(t, rows);
    case 2:
      return pair_rows<2>(t, rows);
    case 3:
      return pair_rows<3>(t, rows);
    default:
      return pair_rows<4>(t, rows);
  }
}

template <class S>
void multiply_unpacked(const Panels<S>& w, int64_t first, int64_t end, Tile<S> t, const S* const* rows, int64_t n) {
  const S* const init = t.init;
  S* const c = t.c;
  for (int64_t v = first; v < end; ++v) {
    const int64_t tile = v / w.gates, gate = v % w.gates;
    t.offset[0] = (tile * w.sums + w.sum[gate]) * w.lanes;
    t.last = w.lanes;
    const int64_t valid = smaller<int64_t>(w.lanes, w.units - tile * w.lanes);
    const S* from = w.source + (gate * w.units + tile * w.lanes) * w.row_stride;
    for (int64_t r = 0; r < n; r += 4) {
      t.rows = rows + r;
      t.init = init ? init + r * t.ldi : nullptr;
      t.c = c + r * t.ldc;
      switch (smaller<int64_t>(4, n - r)) {
        case 1:
          dot_kernel<S, 1>(t, from, w.row_stride, valid);
          break;
        case 2:
          dot_kernel<S, 2>(t, from, w.row_stride, valid);
          break;
        case 3:
          dot_kernel<S, 3>(t, from, w.row_stride, valid);
          break;
        default:
          dot_kernel<S, 4>(t, from, w.row_stride, valid);
      }
    }
  }
}

// C rows [0, n) of one block. `rows`: A. part: other threads multiply other rows.
template <class S>
void multiply(const Panels<S>& w, int64_t block, const S* const* rows, int64_t n, const S* init, int64_t ldi, S* c,
              int64_t ldc, bool part = false) {
  const int64_t first = block * w.block * w.gates;
  const int64_t end = smaller((block + 1) * w.block, w.tiles()) * w.gates;
  const int width = w.width();
  Tile<S> t{};
  t.K = w.K;
  t.ldi = ldi;
  t.ldc = ldc;
  t.part = part;
  if (w.source) {
    t.init = init;
    t.c = c;
    return multiply_unpacked(w, first, end, t, rows, n);
  }
  for (int64_t v = first; v < end; v += width) {
    const int nv = static_cast<int>(smaller<int64_t>(width, end - v));
    t.b = w.data + v * w.lanes * w.K;
    t.ldb = nv * w.lanes;
    for (int j = 0; j < nv; ++j) {
      const int64_t tile = (v + j) / w.gates;
      t.offset[j] = (tile * w.sums + w.sum[(v + j) % w.gates]) * w.lanes;
    }
    t.last = w.plain ? smaller<int64_t>(w.lanes, w.units - (v + nv - 1) * w.lanes) : w.lanes;
    if constexpr (sizeof(S) == 4) {
      if (w.halves) {
        t.b = w.data + v * w.lanes * ((w.K + 1) / 2);
        for (int64_t r = 0; r < n && !w.pairs; ++r) {
          t.rows = rows + r;
          t.init = init ? init + r * ldi : nullptr;
          t.c = c + r * ldc;
          run_halves(t, nv);
        }
        if (!w.pairs) continue;
      }
    }
    // Tiles of equal height: a last one of one row would be slow.
    const int64_t parts = n <= rows_of(nv) ? 1 : (n + rows_of(nv) - 1) / rows_of(nv);
    for (int64_t i = 0, r = 0; i < parts; ++i) {
      const int64_t next = i + 1 == parts ? n : n * (i + 1) / parts;
      t.rows = rows + r;
      t.init = init ? init + r * ldi : nullptr;
      t.c = c + r * ldc;
      if constexpr (kPairs && sizeof(S) == 4) {
        if (w.pairs)
          run_pairs(t, static_cast<int>(next - r), nv);
        else
          run_tile<S, false>(t, static_cast<int>(next - r), nv);
      } else {
        run_tile<S, false>(t, static_cast<int>(next - r), nv);
      }
      r = next;
    }
  }
}

// ---- packing ----

// Weights may lie in memory as bfloat16: the upper half of a float.
using Half = uint16_t;
FUSEDRNN_FORCE float as(const Half* p, float) {
  const uint32_t bits = uint32_t{*p} << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
template <class S>
FUSEDRNN_FORCE S as(const S* p, S) {
  return *p;
}
template <class S>
FUSEDRNN_FORCE Vec<S> load_as(const S* p, S) {
  return load(p);
}
FUSEDRNN_FORCE Vec<float> load_as(const Half* p, float) {
  typedef Half Halves __attribute__((vector_size(kBytes / 2)));
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return reinterpret_cast<Vec<float>::Native>(__builtin_convertvector(halves, Vec<float>::Int) << 16);
}

// A row of pairs: rounded to the nearest, ties to even; whole registers are written, zeros behind the last element.
inline void round_row(const float* from, int64_t n, float* to) {
  using V = Vec<float>;
  typedef Half Halves __attribute__((vector_size(kBytes / 2)));
  for (int64_t u = 0; u < n; u += V::lanes) {
    const V x = load(from + u, smaller<int64_t>(V::lanes, n - u));
    const auto bits = reinterpret_cast<V::Int>(x.v);
    const auto up = bits + 0x7fff + (bits >> 16 & 1);
    const auto nan = bits | 0x400000;  // else rounding could make it infinite
    const auto rounded = (x.v == x.v ? up : nan) >> 16;
    const auto halves = __builtin_convertvector(rounded, Halves);
    __builtin_memcpy(reinterpret_cast<char*>(to) + 2 * u, &halves, sizeof halves);
  }
}

// `lanes` rows of `count` elements become `count` registers: out[k * ldo + lane] = in[lane][k]. T: as S, or Half.
template <class T, class S>
void transpose_rows(const T* const* in, int64_t stride, int64_t valid, int64_t count, S* out, int64_t ldo) {
  using V = Vec<S>;
  constexpr int L = V::lanes;
  using Int = typename V::Int;
  int64_t k = 0;
  if (stride == 1 && valid == L) {
    Int low, high;  // interleave the first halves, the second halves, of two registers
    for (int j = 0; j < L; ++j) {
      low[j] = j / 2 + (j & 1) * L;
      high[j] = L / 2 + j / 2 + (j & 1) * L;
    }
    for (; k + L <= count; k += L) {
      typename V::Native v[L], w[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = load_as(in[i] + k, S()).v;
#pragma GCC unroll 4
      for (int half = 1; half < L; half *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < L / 2; ++i) {
          w[2 * i] = __builtin_shuffle(v[i], v[i + L / 2], low);
          w[2 * i + 1] = __builtin_shuffle(v[i], v[i + L / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = w[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(out + (k + i) * ldo, V(v[i]));
    }
  }
  for (; k < count; ++k)
    for (int i = 0; i < L; ++i) out[k * ldo + i] = i < valid ? as(in[i] + k * stride, S()) : S(0);
}

// The same for the columns `kinds` alone, by rising number, of a matrix of so many columns.
template <class T, class S>
void transpose_some(const T* const* in, int64_t stride, int64_t valid, const int64_t* kinds, int64_t count,
                    int64_t columns, S* out, int64_t ldo) {
  constexpr int L = Vec<S>::lanes;
  S part[L * L];
  for (int64_t k = 0; k < count;) {
    const int64_t first = stride == 1 ? kinds[k] / L * L : kinds[k];
    const int64_t n = stride == 1 ? smaller<int64_t>(L, columns - first) : 1;
    const T* from[L];
    for (int i = 0; i < L; ++i) from[i] = i < valid ? in[i] + first * stride : nullptr;
    transpose_rows(from, stride, valid, n, part, L);
    for (; k < count && kinds[k] < first + n; ++k) store(out + k * ldo, load(part + (kinds[k] - first) * L));
  }
}

inline void pack_halves(const Half* const* in, int64_t stride, int64_t valid, int64_t count, float* out, int64_t ldo) {
  using V = Vec<float>;
  constexpr int L = V::lanes, Steps = 2 * L;
  float part[Steps * L];
  for (int64_t k = 0; k < count; k += Steps) {
    const int64_t n = smaller<int64_t>(Steps, count - k);
    const Half* from[L];
    for (int i = 0; i < L; ++i) from[i] = i < valid ? in[i] + k * stride : nullptr;
    transpose_rows(from, stride, valid, n, part, L);
    if (n % 2) store(part + n * L, V(0));
    for (int64_t j = 0; j < n; j += 2) {
      const auto low = reinterpret_cast<V::Int>(load(part + j * L).v),
                 high = reinterpret_cast<V::Int>(load(part + (j + 1) * L).v);
      store(out + (k + j) / 2 * ldo, V(reinterpret_cast<V::Native>((low >> 16 & 0xffff) | high)));
    }
  }
}

// Panels of a matrix M (gates * H, K) for C = A M^T: the forward products. `gate[g]`: row block of gate g.
// With `halves`, as bfloat16: a register holds steps k (lower halves) and k + 1 (upper ones).
// kinds: those of the `columns` of M that are packed; null: all.
template <class T, class S>
void pack_transposed(const Panels<S>& w, int64_t block, const T* m, int64_t row_stride, int64_t stride, int64_t H,
                     const int* gate, const int64_t* kinds = nullptr, int64_t columns = 0) {
  const int64_t first = block * w.block * w.gates;
  const int64_t end = smaller((block + 1) * w.block, w.tiles()) * w.gates;
  const int width = w.width();
  for (int64_t v = first; v < end; v += width) {
    const int nv = static_cast<int>(smaller<int64_t>(width, end - v));
    for (int j = 0; j < nv; ++j) {
      const int64_t u = (v + j) / w.gates * w.lanes;
      const int64_t valid = smaller<int64_t>(w.lanes, w.units - u);
      const T* in[Vec<S>::lanes];
      for (int64_t i = 0; i < w.lanes; ++i)
        in[i] = i < valid ? m + (gate[(v + j) % w.gates] * H + u + i) * row_stride : nullptr;
      S* out = w.data + v * w.lanes * w.K + j * w.lanes;
      if constexpr (sizeof(T) == 2) {
        if (w.halves) {
          pack_halves(in, stride, valid, w.K, w.data + v * w.lanes * ((w.K + 1) / 2) + j * w.lanes, nv * w.lanes);
          continue;
        }
      }
      if (kinds)
        transpose_some(in, stride, valid, kinds, w.K, columns, out, nv * w.lanes);
      else
        transpose_rows(in, stride, valid, w.K, out, nv * w.lanes);
    }
  }
}

// Panels of M's rows for C = A M: k runs over `parts` row blocks of H rows, in the order of `part`. The backward
// products.
template <class S>
void pack_rows(const Panels<S>& w, int64_t block, const S* m, int64_t row_stride, int64_t stride, int64_t H, int parts,
               const int* part) {
  const int64_t first = block * w.block, end = smaller((block + 1) * w.block, w.tiles());
  const int width = w.width();
  for (int64_t v = first; v < end; v += width) {
    const int nv = static_cast<int>(smaller<int64_t>(width, end - v));
    S* out = w.data + v * w.lanes * w.K;
    const int64_t column = v * w.lanes, columns = nv * w.lanes, valid = smaller(columns, w.units - column);
    for (int p = 0; p < parts; ++p) {
      for (int64_t k = 0; k < H; ++k, out += columns) {
        const S* in = m + (part[p] * H + k) * row_stride + column * stride;
        if (stride == 1 && valid == columns) {
          for (int j = 0; j < nv; ++j) store(out + j * w.lanes, load(in + j * w.lanes));
        } else {
          for (int64_t j = 0; j < columns; ++j) out[j] = j < valid ? in[j * stride] : S(0);
        }
      }
    }
  }
}

// ---- C[m][n] += sum_r A[r][m] B[r][n]: weight gradients. A and B packed over a chunk of R rows. ----

// A columns [0, M) of R rows, in panels of kTile columns: element (r, m) at panel(m / kTile) + r * kTile + m % kTile.
template <class S>
void pack_columns(const S* const* rows, int64_t R, int64_t column, int64_t M, S* out) {
  for (int64_t r0 = 0; r0 < R; r0 += 8) {
    const int64_t r1 = smaller(R, r0 + 8);
    for (int64_t m = 0; m < M; m += kTile) {
      S* to = out + m * R;
      const int64_t valid = smaller<int64_t>(kTile, M - m);
      for (int64_t r = r0; r < r1; ++r) {
        const S* from = rows[r] + column + m;
        if (m + 8 <= M && r + 1 < r1) {  // two more than asked for, which the next row then overwrites
          __builtin_memcpy(to + r * kTile, from, 8 * sizeof(S));
        } else {
          for (int i = 0; i < kTile; ++i) to[r * kTile + i] = i < valid ? from[i] : S(0);
        }
      }
    }
  }
}
// B: one panel of up to kWidest registers, columns [column, column + nv * lanes) of which `valid` exist.
template <class S>
void pack_panel(const S* const* rows, int64_t R, int64_t column, int64_t valid, int nv, S* out) {
  constexpr int L = Vec<S>::lanes;
  for (int64_t r = 0; r < R; ++r, out += nv * L) {
    const S* in = rows[r] + column;
    for (int j = 0; j < nv; ++j) {
      const int64_t n = smaller<int64_t>(L, valid - j * L);
      store(out + j * L, load(in + j * L, n));
    }
  }
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
