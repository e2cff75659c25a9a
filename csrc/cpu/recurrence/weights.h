// SPDX-License-Identifier: Apache-2.0
// One layer's weights in one direction, packed for the forward products, and the time-batched forward product itself.
// Forward uses them step by step; backward with recompute uses them to rebuild a chunk of steps at once.
#pragma once

#include "engine.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

constexpr int kPhases = 2;  // products with the state in a step: 1, or 2 for cells with two products

// Memory for S elements, zero bytes allowed.
template <class S>
S* take(Workspace& workspace, int64_t count) {
  return static_cast<S*>(workspace.take(static_cast<size_t>(count) * sizeof(S)));
}

// `count` rows of ld elements, and pointers to them.
template <class S>
void take_rows(Workspace& workspace, int64_t count, int64_t ld, S*& data, const S**& rows) {
  data = take<S>(workspace, count * ld);
  rows = take<const S*>(workspace, count);
  for (int64_t i = 0; i < count; ++i) rows[i] = data + i * ld;
}

// The tokens of every weight set, each once, by rising number. `split`, where shared weights have a gradient for each
// e: by e, then so.
struct Vocabulary {
  struct Set {
    int64_t* kinds = nullptr;  // token + e * I; null: all I
    int64_t count = 0;
    int32_t* place = nullptr;  // [token + e * I]: which kind; null: nothing was looked at
  };
  bool split;
  int64_t most = 0;  // kinds that a weight set meets
  Set* of;           // [set]

  // `wanted`: null sets otherwise.
  Vocabulary(const Call& call, const Sets& sets, bool wanted, bool split_by_e, Workspace& workspace)
      : split(split_by_e), of(take<Set>(workspace, sets.count)) {
    const Array<3>& tokens = call.p.tokens;
    const Sizes& n = call.problem->sizes;
    const int64_t keys = n.I * (split ? n.E : 1);
    for (int64_t set = 0; set < sets.count; ++set) {
      Set& to = of[set] = Set();
      if (!wanted) continue;
      const Rows& rows = sets.rows[set];
      to.place = take<int32_t>(workspace, keys);
      for (int64_t key = 0; key < keys; ++key) to.place[key] = 0;
      for (int64_t i = 0; i < rows.N; ++i) {
        const int32_t* row = element<int32_t>(tokens, 0, rows.e[i], rows.b[i]);
        for (int64_t t = 0; t < rows.length[i]; ++t) {
          int32_t& seen = to.place[row[t * tokens.stride[0]] + (split ? rows.e[i] * n.I : 0)];
          to.count += !seen;
          seen = 1;
        }
      }
      to.kinds = take<int64_t>(workspace, to.count);
      int32_t next = 0;
      for (int64_t key = 0; key < keys; ++key)
        if (to.place[key]) to.kinds[to.place[key] = next++] = key;
      most = larger(most, to.count);
    }
  }
};

// Whether the columns of W that tokens ask for are packed first, each once, so that a token's column lies together and
// W is read once, in order: not where looking for them (I) costs more than taking each where it lies (tokens * rows of
// W).
inline bool packs_columns(const Call& call, const Sets& sets) {
  const Sizes& n = call.problem->sizes;
  return call.p.tokens.data && n.T * sets.N * facts_of(call.problem->cell).gates * n.H > n.I;
}

inline Params without_biases(Params p) {
  p.bW.data = p.bR.data = nullptr;
  return p;
}

template <class S, int P>
struct ForwardWeights {
  Panels<S> W[P], R[P][kPhases];
  S* bias[P];  // one row of z
  bool has_W[P], has_R[P];
  const int32_t* place;           // of a token among the columns packed; null: tokens take columns of W where it lies
  const void* W_at[P];            // ... W (G*H,I), of the type that pack was called with
  int64_t W_row[P], W_column[P];  // ... its strides
  int phases;
  int64_t ldz;
  bool in_pairs = false;  // what is multiplied comes as pairs of bfloat16; set before `pack`

  // Room for the widest layer of a call.
  // Q: units of the state that R multiplies.
  void allocate(const CellTable<S, P>& cell, int64_t inputs, int64_t H, int64_t Q, Workspace& workspace) {
    const int64_t units = (H + Vec<S>::lanes - 1) / Vec<S>::lanes * Vec<S>::lanes;
    for (int q = 0; q < P; ++q) {
      W[q].data = take<S>(workspace, units * cell.gates * inputs);
      R[q][0].data = take<S>(workspace, cell.state_product ? units * cell.gates * Q : 0);
      bias[q] = take<S>(workspace, units * cell.sums);
    }
  }

  // Packs the blocks of this team member, where that is worth it. `p[q]`: values, tangents (null pointers: not given).
  // `pairs` rows will be multiplied, `together` at a time those with R. T: what W and R consist of.
  // `tokens`: null for other inputs. Not W where `product_at_once` follows.
  template <class T = S>
  void pack(const Team& team, const CellTable<S, P>& cell, const Params* const* p, int64_t e, int64_t inputs, int64_t H,
            int64_t Q, int64_t pairs, int64_t together, const Vocabulary::Set* tokens, bool at_once = false) {
    constexpr int L = Vec<S>::lanes;
    const int64_t tiles = (H + L - 1) / L;
    const int block = block_tiles(cell.two_products ? 1 : cell.gates, tiles, team.size);
    ldz = tiles * cell.sums * L;
    phases = cell.two_products ? 2 : 1;
    const int first_gates = cell.two_products ? cell.gates - 1 : cell.gates;
    place = tokens ? tokens->place : nullptr;
    static constexpr int gate[4] = {0, 1, 2, 3};
    for (int q = 0; q < P; ++q) {
      shape(W[q], place ? tokens->count : inputs, H, cell.gates, cell, block, cell.x_sum);
      shape(R[q][0], Q, H, first_gates, cell, block, cell.h_sum);
      shape(R[q][1], Q, H, cell.gates - first_gates, cell, block, cell.h_sum + first_gates);
      R[q][1].data = R[q][0].data + R[q][0].elements();
      has_W[q] = p[q] && p[q]->W.data;
      has_R[q] = p[q] && p[q]->R.data;
      const int64_t begin = team.begin(W[q].blocks()), end = team.end(W[q].blocks());
      for (int phase = 0; phase < phases; ++phase) {
        R[q][phase].halves = sizeof(T) == 2 && (in_pairs || together <= 2);
        R[q][phase].pairs = in_pairs;
      }
      W[q].halves = W[q].pairs = in_pairs;
      // Every member writes the same: never something else in between, which a faster one could read.
      if (has_W[q] && !tokens)
        leave_unpacked<T>(W[q], p[q]->W, e, 0, pairs);
      else
        W[q].source = nullptr;
      if (has_W[q]) W_at[q] = element<T>(p[q]->W, e), W_row[q] = p[q]->W.stride[1], W_column[q] = p[q]->W.stride[2];
      for (int phase = 0; has_R[q] && phase < phases; ++phase)
        leave_unpacked<T>(R[q][phase], p[q]->R, e, phase * first_gates * H, pairs);
      for (int64_t b = begin; b < end; ++b) {
        if (has_W[q] && !W[q].source && !at_once && (!tokens || place))
          pack_transposed(W[q], b, element<T>(p[q]->W, e), p[q]->W.stride[1], p[q]->W.stride[2], H, gate,
                          place ? tokens->kinds : nullptr, inputs);
        if (!has_R[q] || R[q][0].source) continue;
        for (int phase = 0; phase < phases; ++phase)
          pack_transposed(R[q][phase], b, element<T>(p[q]->R, e), p[q]->R.stride[1], p[q]->R.stride[2], H,
                          gate + phase * first_gates);
      }
      pack_bias(cell, p[q], e, begin * block * L, end * block * L, H, bias[q]);
    }
  }

  // z of `n` pairs, one block of units: bias + x W^T. `x[q]`: row pointers, null where not given. part: see multiply.
  void input_product(const CellTable<S, P>& cell, int64_t block, const S* const* const* x, int64_t n, S* const* z,
                     bool part = false) const {
    input_product(W, cell, block, x, n, z, part);
  }

  // The same for blocks [first, end) where x is multiplied once in a call: each block of W is packed just before, all
  // of them in the place of the first, which stays in cache. Not for bfloat16.
  void product_at_once(const CellTable<S, P>& cell, int64_t first, int64_t end, const S* const* const* x, int64_t n,
                       S* const* z) const {
    static constexpr int gate[4] = {0, 1, 2, 3};
    for (int64_t b = first; b < end; ++b) {
      Panels<S> w[P];
      for (int q = 0; q < P; ++q) {
        w[q] = W[q];
        // Where block 0 would begin if block b lay in the place of `first`.
        const int64_t bytes = (b - first) * w[q].block * w[q].gates * w[q].lanes * w[q].K * int64_t{sizeof(S)};
        w[q].data = reinterpret_cast<S*>(reinterpret_cast<uintptr_t>(w[q].data) - static_cast<uintptr_t>(bytes));
        if (has_W[q] && !w[q].source)
          pack_transposed(w[q], b, static_cast<const S*>(W_at[q]), W_row[q], W_column[q], w[q].units, gate);
      }
      input_product(w, cell, b, x, n, z, false);
    }
  }

  // The same for tokens: bias + a column of W. T: as in `pack`.
  template <class T = S>
  void token_product(const CellTable<S, P>& cell, int64_t block, const int32_t* tokens, int64_t n, S* const* z) const {
    for (int q = 0; q < P; ++q) {
      if (!has_W[q])
        fill_bias(cell, block, 0, cell.sums, n, z[q], bias[q]);
      else if (place)
        gather_packed(W[q], block, tokens, n, bias[q], z[q]);
      else
        gather<T>(block, tokens, n, W_at[q], W_row[q], W_column[q], bias[q], z[q]);
      if (has_W[q] && cell.gates < cell.sums) fill_bias(cell, block, cell.sums - 1, cell.sums, n, z[q], bias[q]);
    }
  }

  // z += h R^T (phase 0), (r h) R^T (phase 1).
  void state_product(int phase, int64_t block, const S* const* const* h, int64_t n, S* const* z,
                     bool part = false) const {
    if (!has_R[0]) return;
    multiply(R[0][phase], block, h[0], n, z[0], ldz, z[0], ldz, part);
    if constexpr (P == 2) {
      multiply(R[0][phase], block, h[1], n, z[1], ldz, z[1], ldz, part);
      if (has_R[1]) multiply(R[1][phase], block, h[0], n, z[1], ldz, z[1], ldz, part);
    }
  }

  // z = h R^T.
  void state_product_alone(int64_t block, const S* const* const* h, int64_t n, S* const* z, bool part = false) const {
    multiply(R[0][0], block, h[0], n, static_cast<S*>(nullptr), 0, z[0], ldz, part);
    if constexpr (P == 2) {
      multiply(R[0][0], block, h[1], n, static_cast<S*>(nullptr), 0, z[1], ldz, part);
      if (has_R[1]) multiply(R[1][0], block, h[0], n, z[1], ldz, z[1], ldz, part);
    }
  }

  int64_t blocks() const { return W[0].blocks(); }
  int64_t unit(int64_t block) const { return smaller(block * W[0].block * W[0].lanes, W[0].units); }

 private:
  void input_product(const Panels<S>* w, const CellTable<S, P>& cell, int64_t block, const S* const* const* x,
                     int64_t n, S* const* z, bool part) const {
    multiply(w[0], block, x[0], n, bias[0], 0, z[0], ldz, part);
    if constexpr (P == 2) {
      bool begun = false;
      auto add = [&](const Panels<S>& weights, const S* const* rows) {
        multiply(weights, block, rows, n, begun ? z[1] : bias[1], begun ? ldz : 0, z[1], ldz, part);
        begun = true;
      };
      if (x[1]) add(w[0], x[1]);
      if (has_W[1]) add(w[1], x[0]);
      if (!begun) fill_bias(cell, block, 0, cell.sums, n, z[1], bias[1]);
    }
    if (cell.gates < cell.sums)  // the sum that takes nothing from x
      for (int q = 0; q < P; ++q) fill_bias(cell, block, cell.sums - 1, cell.sums, n, z[q], bias[q]);
  }
  template <class T>
  static void leave_unpacked(Panels<S>& w, const Array<3>& m, int64_t e, int64_t row, int64_t pairs) {
    const bool pack = sizeof(T) != sizeof(S) || worth_packing(pairs, w.K) || m.stride[2] != 1;
    w.source = pack ? nullptr : element<S>(m, e, row);
    w.row_stride = m.stride[1];
  }
  // The column of tokens[r] of a packed W: it lies together.
  void gather_packed(const Panels<S>& w, int64_t block, const int32_t* tokens, int64_t n, const S* from, S* z) const {
    const int64_t end = smaller((block + 1) * w.block, w.tiles()) * w.gates;
    for (int64_t v = block * w.block * w.gates; v < end; v += w.width()) {
      const int nv = static_cast<int>(smaller<int64_t>(w.width(), end - v));
      int64_t at[4];
      for (int j = 0; j < nv; ++j) at[j] = ((v + j) / w.gates * w.sums + w.sum[(v + j) % w.gates]) * w.lanes;
      const S* table = w.data + v * w.lanes * w.K;
      for (int64_t r = 0; r < n; ++r) {
        const S* column = table + place[tokens[r]] * int64_t{nv} * w.lanes;
        for (int j = 0; j < nv; ++j) store(z + r * ldz + at[j], load(from + at[j]) + load(column + j * w.lanes));
      }
    }
  }
  // ... of W where it lies, element by element unless a column is contiguous.
  template <class T>
  void gather(int64_t block, const int32_t* tokens, int64_t n, const void* table, int64_t row, int64_t column,
              const S* from, S* z) const {
    constexpr int L = Vec<S>::lanes;
    const Panels<S>& w = W[0];
    const int64_t end = smaller((block + 1) * w.block, w.tiles());
    for (int64_t tile = block * w.block; tile < end; ++tile) {
      const int64_t valid = smaller<int64_t>(L, w.units - tile * L);
      for (int g = 0; g < w.gates; ++g) {
        const T* rows = static_cast<const T*>(table) + (g * w.units + tile * L) * row;
        const int64_t at = (tile * w.sums + w.sum[g]) * L;
        for (int64_t r = 0; r < n; ++r) {
          const T* in = rows + tokens[r] * column;
          typename Vec<S>::Native v{};
          if constexpr (sizeof(T) == sizeof(S)) {
            if (row == 1) {
              store(z + r * ldz + at, load(from + at) + load(in, valid));
              continue;
            }
          }
          for (int64_t i = 0; i < valid; ++i) v[i] = as(in + i * row, S());
          store(z + r * ldz + at, load(from + at) + Vec<S>(v));
        }
      }
    }
  }
  static void shape(Panels<S>& w, int64_t K, int64_t H, int gates, const CellTable<S, P>& cell, int block,
                    const int* sum) {
    w.K = K;
    w.units = H;
    w.gates = gates;
    w.sums = cell.sums;
    w.block = block;
    for (int g = 0; g < gates; ++g) w.sum[g] = sum[g];
  }

  static void pack_bias(const CellTable<S, P>& cell, const Params* p, int64_t e, int64_t begin, int64_t end, int64_t H,
                        S* bias) {
    constexpr int L = Vec<S>::lanes;
    for (int64_t u = begin; u < smaller(end, H); u += L) {
      S* at = bias + u * cell.sums;
      zero_row(at, 1, cell.sums * L);
      const int64_t n = smaller<int64_t>(L, H - u);
      for (int g = 0; p && g < cell.gates; ++g) {
        if (p->bW.data) add_row(element<S>(p->bW, e, g * H + u), p->bW.stride[1], at + cell.x_sum[g] * L, 1, n);
        if (p->bR.data) add_row(element<S>(p->bR, e, g * H + u), p->bR.stride[1], at + cell.h_sum[g] * L, 1, n);
      }
    }
  }

  void fill_bias(const CellTable<S, P>& cell, int64_t block, int first, int end, int64_t n, S* z, const S* from) const {
    constexpr int L = Vec<S>::lanes;
    const int64_t tile_end = smaller((block + 1) * W[0].block, W[0].tiles());
    for (int64_t tile = block * W[0].block; tile < tile_end; ++tile)
      for (int j = first; j < end; ++j)
        for (int64_t r = 0, at = (tile * cell.sums + j) * L; r < n; ++r) store(z + r * ldz + at, load(from + at));
  }
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
