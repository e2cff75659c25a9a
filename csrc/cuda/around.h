// SPDX-License-Identifier: Apache-2.0
// Between the caller's arrays (any strides, any size) and those of the kernels, which are padded and contiguous: what
// goes in, what comes out, and all that is done to it outside the recurrence.
//
// A *set* is one weight set in one direction: set = e * D + d. Contiguous are: states (sets,B,H); what runs over time
// (sets,T,B,..,pitch) or, from layer to layer, (E,T,B,wide); weights (E,G,pitch,columns) of each direction.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "../api.h"
#include "arrange.h"
#include "inputs.h"
#include "measures.h"
#include "memory.h"

namespace fusedrnn::cuda {

struct Options {
  int route = -1;  // force this Route; -1 = the fastest by the cost model
  TokenType tokens;
  int* late = nullptr;  // see run.h; null while only counting
};

// What products sum in. Products of a type that kernels round by themselves see it as it is.
template <class T>
using FullOf = std::conditional_t<std::is_same_v<MathOf<T>, double>, F64, F32>;

// What runs over time, where kernels read it in place.
template <class Storage>
struct Strided {
  const Storage* data = nullptr;
  int64_t t = 0, b = 0, e = 0, d = 0;
  bool wide = false;  // in 16-byte pieces
};

template <class Cell, class T, class Queue>
class Around {
 public:
  using Storage = typename T::Storage;
  using Math = MathOf<T>;
  using Full = FullOf<T>;
  using Weights = std::vector<Matrix<T>>;    // by direction
  using Context = std::vector<const Math*>;  // by direction: context W_c^T (E,B,G,pitch), or null
  static constexpr int64_t G = Cell::gates;
  static constexpr bool kTwoSums = Cell::sums > Cell::gates;
  static constexpr bool kKeepsExtra = Cell::kept > Cell::gates || Cell::two_products;
  static constexpr int64_t kOwnGates = kTwoSums || Cell::two_products ? G - 1 : G;  // whose da goes with h before

  Around(Queue& queue_, Arena& work_, const Problem& problem_, const Options& options)
      : queue(queue_), work(work_), problem(problem_), n(problem_), row(G * n.pitch), options_(options) {}

  Queue& queue;
  Arena& work;
  const Problem& problem;
  const Measures n;
  const int64_t row;  // G * pitch

  static int64_t blocks_for(int64_t threads) {
    const int64_t b = (threads + kArrangeThreads - 1) / kArrangeThreads;
    return b < 1 ? 1 : b > 2048 ? 2048 : b;
  }
  // Can it be read and written in 16-byte pieces?
  bool aligned(const void* data, const std::initializer_list<int64_t>& strides) const {
    const int64_t per = 16 / static_cast<int64_t>(sizeof(Storage));
    bool ok = n.H % per == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (const int64_t s : strides) ok &= s % per == 0;
    return ok;
  }
  template <class Number>
  void clear(Number* data, int64_t count) {
    queue.fill(data, 0, static_cast<size_t>(count) * sizeof(Number));
  }

  // ---- matrices: of direction d of (sets,rows,columns); of (E,rows,columns)
  template <class As = T, class Number>
  Matrix<As, Number> of_sets(Number* data, int64_t d, int64_t rows, int64_t columns) const {
    return {data + d * rows * columns, rows, columns, n.E, n.D * rows * columns, columns};
  }
  template <class As = T, class Number>
  Matrix<As, Number> of_weights(Number* data, int64_t rows, int64_t columns) const {
    return {data, rows, columns, n.E, rows * columns, columns};
  }

  // ---- what goes in
  // x as (E,T*B,inputs), zero past a row's end.
  Matrix<T> input(const Array<4>& x) {
    const int64_t in = n.padded_inputs(0), *s = x.stride;
    const bool as_it_is = !problem.lengths.data && in == n.I && s[3] == 1 && s[2] == in &&
                          (n.T == 1 || s[0] == n.B * in) && (n.E == 1 || s[1] == n.steps * in) &&
                          reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    const Storage* data =
        as_it_is ? static_cast<const Storage*>(x.data)
                 : piece(x.data, {{s[1], s[0], s[2], s[3]}}, {{n.E, n.T, n.B, in}}, {{n.E, n.T, n.B, n.I}}, true);
    return of_weights(data, n.steps, in);
  }
  // W or R (E,G*H,columns) with rows and columns padded.
  Matrix<T> weights(const Array<3>& w, int64_t columns) {
    const int64_t *s = w.stride, padded = n.up(columns);
    const bool as_it_is = n.pitch == n.H && columns == padded && s[2] == 1 && s[1] == columns &&
                          (n.E == 1 || s[0] == G * n.H * columns) && reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
    return of_weights(as_it_is ? static_cast<const Storage*>(w.data) : gates_apart(w, padded, columns), row, padded);
  }
  Weights weights(Array<3> Params::* of, int64_t columns, const Arguments& p, int64_t l) {
    Weights to;
    for (int64_t d = 0; d < n.D; ++d) to.push_back(weights(p.params[l * n.D + d].*of, columns));
    return to;
  }
  // (sets,sums,pitch), or null.
  Math* biases(const Arguments& p, int64_t l) {
    const Params* const params = p.params + l * n.D;
    bool any = false;
    for (int64_t d = 0; d < n.D; ++d) any |= params[d].bW.data || params[d].bR.data;
    if (!any) return nullptr;
    Math* to = work.template take<Math>(n.sets * Cell::sums * n.pitch);
    for (int64_t d = 0; d < n.D; ++d) {
      const Array<2>&bW = params[d].bW, &bR = params[d].bR;
      Biases<Cell, T> k{};
      k.bW = static_cast<const Storage*>(bW.data), k.bW_e = bW.stride[0], k.bW_n = bW.stride[1];
      k.bR = static_cast<const Storage*>(bR.data), k.bR_e = bR.stride[0], k.bR_n = bR.stride[1];
      k.to = to ? to + d * Cell::sums * n.pitch : nullptr;
      k.to_e = n.D * Cell::sums * n.pitch;
      k.E = static_cast<int>(n.E), k.H = static_cast<int>(n.H), k.pitch = static_cast<int>(n.pitch);
      queue.run(k, blocks_for(n.E * n.pitch));
    }
    return to;
  }
  // Rows of layer l of (L*D,E,B,H) as (sets,B,H), or null.
  const Storage* states(const Array<4>& from, int64_t l) {
    if (!from.data) return nullptr;
    const int64_t* s = from.stride;
    const Extent4 size{{n.E, n.D, n.B, n.H}};
    return piece(static_cast<const Storage*>(from.data) + l * n.D * s[0], {{s[1], s[0], s[2], s[3]}}, size, size);
  }
  // A gradient (T,E,B,D*H) as the kernels can read it: in place, or as (sets,T,B,pitch).
  Strided<Storage> gradient(const Array<4>& g) {
    const int64_t* s = g.stride;
    if (s[3] == 1 && aligned(g.data, {s[0], s[1], s[2]}))
      return {static_cast<const Storage*>(g.data), s[0], s[2], s[1], n.H, true};
    const int64_t set = n.steps * n.pitch;
    Storage* to = work.template take<Storage>(n.sets * set);
    for (int64_t d = 0; d < n.D; ++d)
      copy<T, T>({from_column(g, d * n.H).data, {{s[1], s[0], s[2], s[3]}}},
                 {to ? to + d * set : nullptr, {{n.D * set, n.B * n.pitch, n.pitch, 1}}}, {{n.E, n.T, n.B, n.pitch}},
                 {{n.E, n.T, n.B, n.H}});
    return {to, n.B * n.pitch, n.pitch, n.D * set, set, true};
  }
  // Of what layer l gives to the caller, if that is given.
  Strided<Storage> gradient_of_y(const Results& g) { return g.y.data ? gradient(g.y) : Strided<Storage>(); }
  Strided<Storage> gradient_of_cells(const Results& g, int64_t l) {
    return g.cells.data ? gradient(layer_of(g.cells, l)) : Strided<Storage>();
  }
  // What lies contiguous, (E,T,B,width).
  Array<4> over_time(Storage* data, int64_t width) const { return {data, {n.B * width, n.steps * width, width, 1}}; }

  // ---- what comes out
  void give_states(const Array<4>& to, const Storage* from, int64_t l) {
    if (!to.data) return;
    const int64_t* s = to.stride;
    const Extent4 size{{n.E, n.D, n.B, n.H}};
    copy<T, T>({from, contiguous(size)}, {static_cast<Storage*>(to.data) + l * n.D * s[0], {{s[1], s[0], s[2], s[3]}}},
               size, size);
  }
  // (T,E,B,columns) to (T,E,B,columns). Masked: zero past a row's end.
  void give(const Array<4>& from, const Array<4>& to, int64_t columns, bool masked = false) {
    const int64_t *f = from.stride, *s = to.stride;
    const Extent4 size{{n.E, n.T, n.B, columns}};
    copy<T, T>({from.data, {{f[1], f[0], f[2], f[3]}}}, {to.data, {{s[1], s[0], s[2], s[3]}}}, size, size, masked);
  }
  // What layer l carries: c (sets,T,B,pitch), or of a cell without c its h, y.
  void give_cells(const Array<5>& to, int64_t l, Storage* c, const Array<4>& y) {
    if (!to.data) return;
    const int64_t set = n.steps * n.pitch;
    for (int64_t d = 0; d < n.D; ++d)
      give(Cell::cell_state ? Array<4>{c + d * set, {n.B * n.pitch, n.D * set, n.pitch, 1}} : from_column(y, d * n.H),
           from_column(layer_of(to, l), d * n.H), n.H, true);
  }
  // (E,G,pitch,columns of padding and all).
  void give_weights(const Array<3>& to, const Matrix<Full, Math>& from, int64_t columns) {
    const int64_t* s = to.stride;
    const Extent4 size{{n.E, G, n.H, columns}};
    copy<Full, T>({from.data, {{from.step, n.pitch * from.ld, from.ld, 1}}},
                  {to.data, {{s[0], n.H * s[1], s[1], s[2]}}}, size, size);
  }
  // Of direction d, from sums over da (sets,G,pitch) and, where h's last sum is another, (sets,pitch).
  void give_biases(const Params& to, const Math* db, const Math* db_h, int64_t d) {
    for (const Array<2>* b : {&to.bW, &to.bR}) {
      if (!b->data) continue;
      const int64_t s = b->stride[1], own = kTwoSums && b == &to.bR ? G - 1 : G;
      const Extent4 size{{n.E, 1, own, n.H}}, last{{n.E, 1, 1, n.H}};
      copy<Full, T>({db + d * row, {{n.D * row, 0, n.pitch, 1}}}, {b->data, {{b->stride[0], 0, n.H * s, s}}}, size,
                    size);
      if (own < G)
        copy<Full, T>({db_h + d * n.pitch, {{n.D * n.pitch, 0, 0, 1}}},
                      {static_cast<Storage*>(b->data) + own * n.H * s, {{b->stride[0], 0, 0, s}}}, last, last);
    }
  }

  // ---- a call without a step
  // What comes out is what went in, or zero.
  void pass_states(const Array<4>& from, const Array<4>& to) {
    for (int64_t l = 0; to.data && l < n.L; ++l) {
      const Storage* v = states(from, l);
      if (!v) {
        Storage* zeros = work.template take<Storage>(n.sets * n.B * n.H);
        clear(zeros, n.sets * n.B * n.H);
        v = zeros;
      }
      give_states(to, v, l);
    }
  }
  void pass_states(const Arguments& p, const Results& out) {
    pass_states(p.h0, out.hn);
    if constexpr (Cell::cell_state) pass_states(p.c0, out.cn);
  }
  void pass_gradients(const Results& g, const Arguments& dp) {
    pass_states(g.hn, dp.h0);
    if constexpr (Cell::cell_state) pass_states(g.cn, dp.c0);
    for (int64_t k = 0; dp.params && k < n.L * n.D; ++k) {
      const Params& to = dp.params[k];
      zero(to.W, G, n.H, n.inputs(k / n.D));
      zero(to.R, G, n.H, n.H);
      for (const Array<2>* b : {&to.bW, &to.bR}) zero({b->data, {b->stride[0], 0, b->stride[1]}}, 1, 1, G * n.H);
    }
    for (const Array<3>& a : dp.context_weights) zero(a, G, n.H, n.K);
    zero(dp.context, 1, n.B, n.K);
  }

  // ---- layer 0: tokens and context
  // Into layer 0's gx, from step `first` on: columns of W for tokens, or with W null what is there; plus the context's
  // share (E,B,G,pitch), if any.
  void add_inputs(const Array<3>& tokens, const Array<3>* W, const Math* context, int64_t first,
                  const Matrix<T, Storage>& gx) {
    InputSum<T> k{};
    if (W) {
      const int64_t* s = W->stride;
      k.tokens = tokens_of(tokens, first);
      k.W = static_cast<const Storage*>(W->data);
      k.w_e = s[0], k.w_gate = n.H * s[1], k.w_unit = s[1], k.w_token = s[2];
      if (n.steps > n.I && s[1] != 1) {  // what is read several times, in one piece
        k.W = piece(W->data, {{s[0], s[2], n.H * s[1], s[1]}}, {{n.E, n.I, G, n.pitch}}, {{n.E, n.I, G, n.H}});
        k.w_e = n.I * row, k.w_gate = n.pitch, k.w_unit = 1, k.w_token = row;
      }
    }
    k.context = context, k.gx = gx.data, k.gx_e = gx.step;
    k.E = static_cast<int>(n.E), k.Tn = static_cast<int>(gx.rows / n.B), k.B = static_cast<int>(n.B);
    k.gates = static_cast<int>(G), k.H = static_cast<int>(n.H), k.pitch = static_cast<int>(n.pitch);
    k.wrong = options_.late ? options_.late + 1 : nullptr;
    queue.run(k, std::min<int64_t>(n.E * gx.rows, 4096));
  }
  // dW of layer 0 in one direction, or with `add` what is added to it, from da from step `first` on.
  void token_gradient(const Array<3>& tokens, int64_t first, const Matrix<T, Storage>& da, const Matrix<Full, Math>& dW,
                      bool add) {
    TokenGradient<T> k{};
    k.tokens = tokens_of(tokens, first);
    k.da = da.data, k.da_e = da.step, k.dW = dW.data, k.dW_row = dW.ld;
    k.E = static_cast<int>(n.E), k.gates = static_cast<int>(G), k.H = static_cast<int>(n.H);
    k.pitch = static_cast<int>(n.pitch), k.steps = da.rows, k.B = static_cast<int>(n.B), k.add = add;
    k.columns = (n.I + k.kTokens - 1) / k.kTokens, k.rows = (row + k.kThreads - 1) / k.kThreads;
    queue.run(k, std::min<int64_t>(n.E * k.columns * k.rows, 65535));
  }
  // The context (E,B,K), and its weights of direction d (E,G*pitch,K), in what sums are kept in.
  Matrix<Full> context_rows(const Arguments& p) {
    const int64_t* s = p.context.stride;
    const Extent4 size{{n.E, 1, n.B, n.K}};
    return of_weights<Full>(piece<Full>(p.context.data, {{s[0], 0, s[1], s[2]}}, size, size), n.B, n.K);
  }
  Matrix<Full> context_weights(const Arguments& p, int64_t d) {
    return of_weights<Full>(gates_apart<Full>(p.context_weights[d], n.K, n.K), row, n.K);
  }
  // context W_c^T of both directions, where layer l sees a context.
  Context context_products(const Arguments& p, int64_t l) {
    Context to(static_cast<size_t>(n.D), nullptr);
    for (int64_t d = 0; d < n.D && l == 0 && p.context.data; ++d) {
      const Matrix<Full> context = context_rows(p), W = context_weights(p, d);
      Math* sum = work.template take<Math>(n.E * n.B * row);
      product(queue, of_weights<Full>(sum, n.B, row), context, W.turned());
      to[static_cast<size_t>(d)] = sum;
    }
    return to;
  }
  // dz (E,B,G,pitch) of one direction, or with `add` what is added to it, from da of some steps.
  void context_sum(const Matrix<T, Storage>& da, Math* dz, bool add) {
    const int64_t columns = n.B * row;
    queue.run(StepSum<T>{da.data, da.step, dz, static_cast<int>(n.E), static_cast<int>(da.rows / n.B), columns, add},
              blocks_for(n.E * columns));
  }
  void give_context(const Array<3>& to, const Math* from) {
    const int64_t* s = to.stride;
    const Extent4 size{{n.E, 1, n.B, n.K}};
    copy<Full, T>({from, contiguous(size)}, {to.data, {{s[0], 0, s[1], s[2]}}}, size, size);
  }

  // ---- what layers hand on
  // v (E,T,B,wide): what layer l gives, on its way to the next.
  void dropout(Storage* v, int64_t l) {
    if (problem.dropout <= 0) return;
    const int64_t width = n.D * n.H;
    queue.run(
        Dropout<T>{v, static_cast<int>(n.E), static_cast<int>(n.T), static_cast<int>(n.B), static_cast<int>(width),
                   static_cast<int>(n.wide), static_cast<int>(l), problem.dropout, problem.seed},
        blocks_for(n.E * n.steps * width));
  }
  Storage* dropped(const Storage* from, int64_t l) {
    const Extent4 size{{1, 1, n.E * n.steps, n.wide}};
    Storage* to = piece(from, contiguous(size), size, size);
    dropout(to, l);
    return to;
  }
  // to (sets,columns) = the sum of v (sets,rows,columns) over its rows.
  void column_sums(const Storage* v, int64_t rows, int64_t columns, Math* to) {
    const int parts = static_cast<int>(rows < 64 ? 1 : 64);
    Math* partial = work.template take<Math>(n.sets * parts * columns);
    queue.run(ColumnSum<T, Full>{v, partial, static_cast<int>(n.sets), parts, rows, columns},
              blocks_for(n.sets * parts * columns));
    queue.run(ColumnSum<Full, Full>{partial, to, static_cast<int>(n.sets), 1, parts, columns},
              blocks_for(n.sets * columns));
  }
  // The sum of (parts,sets,columns) over the parts of the walk.
  const Math* sum_of_parts(const Math* v, int64_t columns) {
    if (n.parts == 1) return v;
    Math* sums = work.template take<Math>(n.sets * columns);
    queue.run(ColumnSum<Full, Full>{v, sums, 1, 1, n.parts, n.sets * columns}, blocks_for(n.sets * columns));
    return sums;
  }

 private:
  struct From {
    const void* data;
    Extent4 stride;
  };
  struct To {
    void* data;
    Extent4 stride;
  };

  static Extent4 contiguous(const Extent4& size) {
    const int64_t* k = size.n;
    return {{k[1] * k[2] * k[3], k[2] * k[3], k[3], 1}};
  }
  static Array<4> layer_of(const Array<5>& a, int64_t l) {
    const int64_t* s = a.stride;
    return {static_cast<Storage*>(a.data) + l * s[0], {s[1], s[2], s[3], s[4]}};
  }
  static Array<4> from_column(const Array<4>& a, int64_t column) {
    return {static_cast<Storage*>(a.data) + column * a.stride[3], {a.stride[0], a.stride[1], a.stride[2], a.stride[3]}};
  }
  Tokens tokens_of(const Array<3>& tokens, int64_t first) const {
    const int64_t *s = tokens.stride, *len = problem.lengths.stride;
    return {
        tokens.data, options_.tokens, first, s[0], s[1], s[2], n.I, static_cast<const int64_t*>(problem.lengths.data),
        len[0],      len[1]};
  }

  // to = from where `valid`, else 0, for all of `size`; see Copy. Where `to` is one for all weight sets, their sum.
  template <class Of, class As>
  void copy(const From& from, const To& to, const Extent4& size, const Extent4& valid, bool masked = false) {
    Copy<Of, As> k{};
    k.from = static_cast<const typename Of::Storage*>(from.data), k.from_stride = from.stride;
    k.to = static_cast<typename As::Storage*>(to.data), k.to_stride = to.stride;
    k.n = size, k.valid = valid;
    k.sum = size.n[0] > 1 && to.stride.n[0] == 0;
    if (masked && problem.lengths.data) {
      k.lengths = static_cast<const int64_t*>(problem.lengths.data);
      k.len_e = problem.lengths.stride[0], k.len_b = problem.lengths.stride[1];
    }
    queue.run(k, blocks_for(size.n[0] * size.n[1] * size.n[2] * size.n[3]));
  }
  // The same into one piece of new memory.
  template <class As = T>
  typename As::Storage* piece(const void* from, const Extent4& stride, const Extent4& size, const Extent4& valid,
                              bool masked = false) {
    auto* to = work.template take<typename As::Storage>(size.n[0] * size.n[1] * size.n[2] * size.n[3]);
    copy<T, As>({from, stride}, {to, contiguous(size)}, size, valid, masked);
    return to;
  }
  // (E,G*H,columns) as (E,G,pitch,padded).
  template <class As = T>
  typename As::Storage* gates_apart(const Array<3>& w, int64_t padded, int64_t columns) {
    const int64_t* s = w.stride;
    return piece<As>(w.data, {{s[0], n.H * s[1], s[1], s[2]}}, {{n.E, G, n.pitch, padded}}, {{n.E, G, n.H, columns}});
  }
  // Zeros in (E,gates*rows,columns): no element is valid, so every one is written as zero.
  void zero(const Array<3>& a, int64_t gates, int64_t rows, int64_t columns) {
    const int64_t* s = a.stride;
    if (a.data)
      copy<T, T>({a.data, {}}, {a.data, {{s[0], rows * s[1], s[1], s[2]}}}, {{n.E, gates, rows, columns}}, {});
  }

  const Options options_;
};

}  // namespace fusedrnn::cuda
