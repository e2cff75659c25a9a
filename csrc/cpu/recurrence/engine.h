// SPDX-License-Identifier: Apache-2.0
// What forward.cpp, backward.cpp and the cells' files of one instruction set agree on. The engine never names a cell:
// it sees a table of numbers (how many gates, sums, kept values) and functions that do a cell's elementwise part on a
// tile.
//
// S = float or double. P planes: 1 for values, 2 for values and tangents (dual numbers): every array then is a pair.
#pragma once

#include "cpu/arithmetic/gemm.h"
#include "cpu/arithmetic/philox.h"
#include "cpu/isa.h"
#include "rows.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// Pre-activations of row r lie in z + r * ldz: unit tile by unit tile, in each all sums, each one register.
template <class S, int P>
class Options;

// What tile functions of cells with options know beside their arrays. Null and zeros for plain cells.
template <class S, int P>
struct TilePlace {
  const Options<S, P>* options;
  int64_t step, row, unit;  // of the tile's first row and unit
  S* numbers[P];            // layer norm: rows of four on the tape, null in inference
};

template <class S, int P>
struct ForwardTile : TilePlace<S, P> {
  int64_t rows, units;  // units that exist; states and z are padded to whole registers
  S* z[P];
  int64_t ldz;
  const S *h_prev[P], *h_seen[P];  // h_seen: h' as R sees it, which recurrent dropout changes
  S *h[P], *c[P], *rh[P];          // c is updated in place; rh: reset gate times state, for cells with two products
  int64_t ld;
  S* kept[P];  // row r, value j, unit u at kept + r * ld_kept + j * H + u; null in inference
  int64_t ld_kept, H;
  S* c_kept[P];  // rows of H; may be null
  S clip;
};

template <class S, int P>
struct BackwardTile : TilePlace<S, P> {
  int64_t rows, units;
  const S* kept[P];
  int64_t ld_kept, H;
  const S *h[P], *c[P];                                             // rows of H: after the step
  const S *const *h_prev[P], *const *h_seen[P], *const *c_prev[P];  // before the step, by row pointers to unit 0
  S *dh[P], *dc[P], *drh[P];  // in: gradient after the step; out: the part that reaches back past the product
  int64_t ld;
  S* da[P];  // gradient of sum j, unit u at da + r * ld_da + place[j] * H + u
  int64_t ld_da;
  S* rh[P];       // written by backward_gate, rows of ld
  S* dh_seen[P];  // added to by backward_gate
  S* c_new[P];    // c before zoneout, and what a projection multiplies: rows of ld, null where nobody asks
  S* m[P];
  S *c_hat[P], *dseen[P];  // layer norm of c: rows of ld
  S clip;
};

template <class S, int P>
struct TileFunctions {
  void (*gate)(const ForwardTile<S, P>&);
  void (*forward)(const ForwardTile<S, P>&);
  void (*backward)(const BackwardTile<S, P>&);
  void (*backward_gate)(const BackwardTile<S, P>&);
};

template <class S, int P>
struct CellTable {
  int gates, sums, kept;
  bool cell_state, state_product, two_products;
  int x_sum[4], h_sum[4];
  // varied: for problems with options; with other activations, with the usual ones. normed: where c is normalised.
  TileFunctions<S, P> plain, varied[2], normed[2];
};
// Each is defined in the file of its cell.
#define FUSEDRNN_DECLARE_TABLE(name, ...) \
  template <class S, int P>               \
  const CellTable<S, P>& name##_table();
FUSEDRNN_CELLS(FUSEDRNN_DECLARE_TABLE)
#undef FUSEDRNN_DECLARE_TABLE

template <class S, int P>
const CellTable<S, P>& table_of(CellKind cell) {
  switch (cell) {
#define FUSEDRNN_TABLE_OF_KIND(name, ...) \
  case CellKind::name:                    \
    return name##_table<S, P>();
    FUSEDRNN_CELLS(FUSEDRNN_TABLE_OF_KIND)
#undef FUSEDRNN_TABLE_OF_KIND
  }
  __builtin_unreachable();
}

// Where sums go in a row of da: so that those of the product with x, and those of the product with h, are each
// contiguous. With sums of n apart (GRU): n of x, r, z, n of h.
inline int place_of(int sums, int gates, int sum) {
  if (sums == gates) return sum;
  return sum == 3 ? 3 : sum == 2 ? 0 : sum + 1;
}

template <class S>
S* element(const Array<2>& a, int64_t i, int64_t j) {
  return static_cast<S*>(a.data) + i * a.stride[0] + j * a.stride[1];
}
template <class S>
S* element(const Array<3>& a, int64_t i, int64_t j = 0, int64_t k = 0) {
  return static_cast<S*>(a.data) + i * a.stride[0] + j * a.stride[1] + k * a.stride[2];
}
template <class S>
S* element(const Array<4>& a, int64_t i, int64_t j, int64_t k, int64_t l = 0) {
  return static_cast<S*>(a.data) + i * a.stride[0] + j * a.stride[1] + k * a.stride[2] + l * a.stride[3];
}
template <class S>
S* element(const Array<5>& a, int64_t i, int64_t j, int64_t k, int64_t l, int64_t m = 0) {
  return static_cast<S*>(a.data) + i * a.stride[0] + j * a.stride[1] + k * a.stride[2] + l * a.stride[3] +
         m * a.stride[4];
}

template <class S>
FUSEDRNN_FORCE void copy_row(const S* from, int64_t from_stride, S* to, int64_t to_stride, int64_t n) {
  if (from_stride == 1 && to_stride == 1) {
    int64_t u = 0;
    for (; u + Vec<S>::lanes <= n; u += Vec<S>::lanes) store(to + u, load(from + u));
    if (u < n) store(to + u, load(from + u, n - u), n - u);
  } else {
    for (int64_t u = 0; u < n; ++u) to[u * to_stride] = from[u * from_stride];
  }
}
template <class S>
FUSEDRNN_FORCE void add_row(const S* from, int64_t from_stride, S* to, int64_t to_stride, int64_t n) {
  if (from_stride == 1 && to_stride == 1) {
    int64_t u = 0;
    for (; u + Vec<S>::lanes <= n; u += Vec<S>::lanes) store(to + u, load(to + u) + load(from + u));
    if (u < n) store(to + u, load(to + u, n - u) + load(from + u, n - u), n - u);
  } else {
    for (int64_t u = 0; u < n; ++u) to[u * to_stride] += from[u * from_stride];
  }
}
template <class S>
FUSEDRNN_FORCE void zero_row(S* to, int64_t stride, int64_t n) {
  for (int64_t u = 0; u < n; ++u) to[u * stride] = 0;
}

// The words of kDrawn blocks of Philox that follow one another: philox.h, a block in each 64-bit lane of two registers.
constexpr int kDrawn = 2 * kWideLanes;
FUSEDRNN_FORCE void philox_run(uint64_t key, uint64_t counter, uint32_t c2, uint32_t c3, uint32_t* word) {
  const uint64_t low = 0xFFFFFFFFu;
  Wide n;
  for (int j = 0; j < kWideLanes; ++j) n[j] = counter + static_cast<uint64_t>(j);
  Wide c[4][2];
  for (int r = 0; r < 2; ++r, n += kWideLanes)
    c[0][r] = n, c[1][r] = n >> 32, c[2][r] = Wide{} + c2, c[3][r] = Wide{} + c3;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int r = 0; r < 2; ++r) {  // the upper halves of the lanes are left as they come
      const Wide a = times_low(c[0][r], 0xD2511F53u), b = times_low(c[2][r], 0xCD9E8D57u);
      c[0][r] = (b >> 32) ^ c[1][r] ^ k0;
      c[2][r] = (a >> 32) ^ c[3][r] ^ k1;
      c[1][r] = b;
      c[3][r] = a;
    }
  // A block's words lie together: lane j has them in halves, w0 | w1 and w2 | w3.
  Wide first, second;
  for (int j = 0; j < kWideLanes; ++j) {
    first[j] = static_cast<uint64_t>(j / 2 + j % 2 * kWideLanes);
    second[j] = first[j] + kWideLanes / 2;
  }
  for (int r = 0; r < 2; ++r, word += 4 * kWideLanes) {
    const Wide front = (c[0][r] & low) | (c[1][r] << 32), back = (c[2][r] & low) | (c[3][r] << 32);
    const Wide both[2] = {__builtin_shuffle(front, back, first), __builtin_shuffle(front, back, second)};
    __builtin_memcpy(word, both, sizeof both);
  }
}

// The mask of docs/semantics.md for elements number `first`, `first` + 1, ...
struct Dropout {
  double p;
  uint64_t seed;

  // Multiplies one layer's output in place.
  template <class S>
  void apply(S* row, int64_t count, uint64_t first, int layer) const {
    const S scale = static_cast<S>(1 / (1 - p));
    each(count, first, layer, 0, [&](int64_t j, bool dropped) { row[j] = dropped ? S(0) : row[j] * scale; });
  }

  // Whether each element is dropped, as 1 or 0. stream: 2 zoneout of h, 3 of c, 4 recurrent dropout.
  template <class S>
  void drawn(S* row, int64_t count, uint64_t first, int layer, uint32_t stream) const {
    each(count, first, layer, stream, [&](int64_t j, bool dropped) { row[j] = dropped ? S(1) : S(0); });
  }

 private:
  template <class F>
  FUSEDRNN_FORCE void each(int64_t count, uint64_t first, int layer, uint32_t stream, F f) const {
    uint64_t limit = static_cast<uint64_t>(p * 4294967296.0);
    limit += static_cast<double>(limit) < p * 4294967296.0;  // word < p * 2^32 in whole numbers
    const uint32_t last = static_cast<uint32_t>(limit - 1);  // p > 0, so limit > 0. 32 bits compare in registers.
    uint32_t word[4 * kDrawn];
    uint64_t block = first / 4;
    int64_t at = static_cast<int64_t>(first % 4);
    for (int64_t j = 0; j < count; at = 0) {
      const bool few = at + count - j <= 8;
      if (few)
        philox(seed, block, static_cast<uint32_t>(layer), stream, word);
      else
        philox_run(seed, block, static_cast<uint32_t>(layer), stream, word);
      const int64_t blocks = few ? 1 : kDrawn, n = smaller(count - j, 4 * blocks - at);
      for (int64_t i = 0; i < n; ++i) f(j + i, word[at + i] <= last);
      j += n, block += static_cast<uint64_t>(blocks);
    }
  }
};

// How a call is cut into weight sets: one with all rows (e, b) where every weight has stride 0 on E, else E with B
// rows.
struct Sets {
  int64_t count, N;
  Rows* rows;

  Sets(const Call& call, Workspace& workspace) {
    const Problem& problem = *call.problem;
    const Sizes& n = problem.sizes;
    // Gradients of peepholes, projections and norms are made for one weight set at a time.
    const bool apart = problem.variant.peepholes || problem.variant.proj > 0 || problem.variant.layer_norm;
    const bool one = n.E <= 1 || (!apart && shared(call.p, n) && shared(call.v, n));
    count = one ? 1 : n.E;
    N = one ? n.E * n.B : n.B;
    rows = static_cast<Rows*>(workspace.take(static_cast<size_t>(count) * sizeof(Rows)));
    for (int64_t i = 0; i < count; ++i) rows[i] = make_rows(problem, one ? 0 : i, one ? n.E : i + 1, workspace);
  }
  static bool shared(const Arguments& p, const Sizes& n) {
    for (const Array<3>& w : p.context_weights)
      if (w.data && w.stride[0]) return false;
    if (!p.params) return true;
    for (int i = 0; i < n.L * n.D; ++i) {
      const Params& w = p.params[i];
      if ((w.W.data && w.W.stride[0]) || (w.R.data && w.R.stride[0]) || (w.bW.data && w.bW.stride[0]) ||
          (w.bR.data && w.bR.stride[0]))
        return false;
    }
    return true;
  }
};

// One plane of a layer's input: the user's x, or the h of the layer below (one packed plane per direction).
template <class S>
struct Source {
  const S* x = nullptr;
  int64_t t = 0, e = 0, b = 0, i = 1;
  const S* plane[2] = {};
  int64_t H = 0, width = 0;
  int D = 1, layer = 0;  // layer: the one below
  const Problem* dropout = nullptr;
  const int32_t* token = nullptr;  // in place of x, with the strides t, e, b

  bool given() const { return x || plane[0]; }
  bool direct() const { return x ? i == 1 : D == 1 && !dropout; }

  // The tokens of pairs [rows.off[s0], rows.off[s1]).
  void fill_tokens(const Team& team, const Rows& rows, bool reversed, int64_t s0, int64_t s1, int32_t* out) const {
    const int64_t first = rows.off[s0], begin = team.begin(rows.off[s1] - first), end = team.end(rows.off[s1] - first);
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t low = larger<int64_t>(0, begin - (rows.off[s] - first));
      const int64_t high = smaller(rows.live[s], end - (rows.off[s] - first));
      for (int64_t row = low; row < high; ++row)
        out[rows.off[s] - first + row] = token[rows.time(reversed, s, row) * t + rows.e[row] * e + rows.b[row] * b];
    }
  }

  // Pointers to the input rows of pairs [rows.off[s0], rows.off[s1]); copied into `buffer` (rows of width) if not
  // direct.
  void fill(const Team& team, const Rows& rows, bool reversed, int64_t s0, int64_t s1, S* buffer, const S** out) const {
    const int64_t first = rows.off[s0], begin = team.begin(rows.off[s1] - first), end = team.end(rows.off[s1] - first);
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t low = larger<int64_t>(0, begin - (rows.off[s] - first));
      const int64_t high = smaller(rows.live[s], end - (rows.off[s] - first));
      for (int64_t i_row = low; i_row < high; ++i_row) {
        const int64_t r = rows.off[s] - first + i_row;
        if (x) {
          const S* from = x + rows.place(rows.time(reversed, s, i_row)) * t + rows.e[i_row] * e + rows.b[i_row] * b;
          out[r] = from;
          if (i != 1) copy_row(from, i, buffer + r * width, 1, width), out[r] = buffer + r * width;
        } else if (direct()) {
          out[r] = plane[0] + (rows.off[s] + i_row) * H;
        } else {
          S* to = buffer + r * width;
          out[r] = to;
          const int64_t time = rows.time(reversed, s, i_row);
          for (int d = 0; d < D; ++d) {
            const int64_t walk = D == 1 ? s : rows.time(d == 1, time, i_row);
            copy_row(plane[d] + (rows.off[walk] + i_row) * H, 1, to + d * H, 1, H);
          }
          if (dropout) {
            const Sizes& n = dropout->sizes;
            const int64_t row = (time * n.E + rows.e[i_row]) * n.B + rows.b[i_row];
            Dropout{dropout->dropout, dropout->seed}.apply(to, width, static_cast<uint64_t>(row * width), layer);
          }
        }
      }
    }
  }
};

// Where the layers' outputs lie, and so the inputs of the layers above: on the tape, or in workspace between two
// layers.
template <class S, int P>
class Layers {
 public:
  // `tape[q]`: null in inference.
  Layers(const Call& call, const Sets& sets, S* const* tape, Workspace& workspace)
      : problem_(*call.problem),
        n_(problem_.sizes),
        count_(sets.count),
        N_(sets.N),
        Q_(outputs_of(problem_)),
        layout_(problem_) {
    p_[0] = &call.p;
    if (P == 2) p_[1] = &call.v;
    const int64_t size = count_ * n_.D * n_.T * N_ * Q_;
    for (int q = 0; q < P; ++q) {
      tape_[q] = tape ? tape[q] : nullptr;
      for (int parity = 0; !tape && parity < smaller(n_.L - 1, 2); ++parity)
        between_[parity][q] = static_cast<S*>(workspace.take(static_cast<size_t>(size) * sizeof(S)));
    }
  }

  const Tape& layout() const { return layout_; }
  bool taped() const { return tape_[0] != nullptr; }

  // h of one layer and direction in walking order, c and kept values behind it (tape only); null: not wanted.
  S* plane(int q, int l, int d, int64_t set) const {
    if (tape_[q]) return tape_[q] + ((l * n_.D + d) * count_ + set) * layout_.elements(N_);
    return l + 1 < n_.L ? between_[l & 1][q] + (set * n_.D + d) * n_.T * N_ * Q_ : nullptr;
  }

  // Plane q of layer l's input.
  Source<S> source(int q, int l, int64_t set) const {
    Source<S> s;
    s.width = l ? n_.D * Q_ : n_.I;
    if (l == 0) {
      const Array<4>& x = p_[q]->x;
      s.x = static_cast<const S*>(x.data);
      s.t = x.stride[0], s.e = x.stride[1], s.b = x.stride[2], s.i = x.stride[3];
      if (q == 0 && tokens()) {
        const Array<3>& given = p_[0]->tokens;
        s.token = static_cast<const int32_t*>(given.data);
        s.t = given.stride[0], s.e = given.stride[1], s.b = given.stride[2];
      }
    } else {
      for (int d = 0; d < n_.D; ++d) s.plane[d] = plane(q, l - 1, d, set);
      s.H = Q_;
      s.D = n_.D;
      s.layer = l - 1;
      s.dropout = problem_.dropout > 0 ? &problem_ : nullptr;
    }
    return s;
  }

  // The first layer takes tokens; the largest number of them that one weight set meets.
  bool tokens() const { return p_[0]->tokens.data != nullptr; }
  int64_t pairs() const { return n_.T * N_; }

  // The widest input that is multiplied, and whether all of them can be read in place.
  int64_t widest() const {
    const int64_t first = tokens() ? 0 : n_.I;
    return n_.L > 1 ? larger<int64_t>(first, n_.D * Q_) : first;
  }
  bool direct() const {
    for (int q = 0; q < P; ++q)
      if (p_[q]->x.data && p_[q]->x.stride[3] != 1) return false;
    return n_.L == 1 || (n_.D == 1 && problem_.dropout == 0);
  }

 private:
  const Problem& problem_;
  const Sizes& n_;
  int64_t count_, N_, Q_;  // Q: units of h
  Tape layout_;
  const Arguments* p_[P];
  S* tape_[P];
  S* between_[2][P] = {};
};

// Threads of a call: `groups` teams that work on different weight sets or directions; `body(team, group)` runs in each.
struct Groups {
  int count;
  Barrier* barriers;

  Groups(int64_t tasks, int threads, Workspace& workspace)
      : count(static_cast<int>(smaller<int64_t>(larger<int64_t>(tasks, 1), threads))),
        barriers(static_cast<Barrier*>(workspace.take(static_cast<size_t>(count) * sizeof(Barrier)))) {
    for (int i = 0; i < count; ++i) barriers[i] = Barrier();
  }
  // The group of a member of the whole team, and its place there. The team may be smaller than was asked for.
  int group_of(const Team& team, Team& part) const {
    const int groups = smaller(count, team.size);
    const int group = team.rank * groups / team.size;
    const int begin = (group * team.size + groups - 1) / groups, end = ((group + 1) * team.size + groups - 1) / groups;
    part = team.part(begin, end, &barriers[group]);
    return group;
  }
  int used(const Team& team) const { return smaller(count, team.size); }
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
