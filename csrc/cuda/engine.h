// SPDX-License-Identifier: Apache-2.0
// One call, from the caller's arrays to the caller's arrays: the host's side of forward and backward for the whole
// stack of layers and directions. It launches kernels and products on a Queue and knows no CUDA: on a GPU the queue is
// a stream (queue.h), in the tests it runs the same kernels on the CPU, and Counting only counts the memory needed.
//
//   queue.run(kernel, blocks, cluster, cooperative)  queue.fill(pointer, byte, bytes)  queue.product<T, To>(Product)
#pragma once

#include <utility>
#include <vector>

#include "recurrence.h"

namespace fusedrnn::cuda {

// One cell in one type. Forwards, Backwards: see Recurrence.
template <class Cell, class T, class Forwards, class Backwards, class Queue>
class Engine {
  using Outside = Around<Cell, T, Queue>;
  using Storage = typename T::Storage;
  using Math = MathOf<T>;
  using Full = FullOf<T>;
  using Tape = std::vector<Layer<T>>;
  using Weights = typename Outside::Weights;
  static constexpr bool kTwoSums = Outside::kTwoSums;

 public:
  Engine(Queue& queue, Arena& work, const Device& device, const Problem& problem, const Options& options)
      : around_(queue, work, problem, options),
        recurrence_(around_, device, options.route),
        n_(around_.n),
        queue_(queue),
        work_(work),
        p_(problem),
        late_(options.late) {}

  // keep: a backward will follow, so tape_memory is written.
  void forward(const Arguments& p, const Results& out, void* tape_memory, bool keep) {
    if (n_.steps == 0) return around_.pass_states(p, out);
    Arena tape_arena(tape_memory);
    Tape tape = keep ? layers(tape_arena) : Tape(static_cast<size_t>(n_.L));
    if (!keep)
      for (int64_t l = 1; l < n_.L; ++l) at(tape, l).input = work_.take<Storage>(n_.E * n_.steps * n_.wide);
    for (int64_t l = 0; l < n_.L; ++l) {
      const Borrowed memory(work_);
      forward_layer(p, out, tape, l, keep);
    }
  }

  void backward(const Arguments& p, const void* tape_memory, const Results& g, const Arguments& dp) {
    if (n_.steps == 0) return around_.pass_gradients(g, dp);
    Arena tape_arena(const_cast<void*>(tape_memory));
    const Tape tape = layers(tape_arena);
    // The gradient of what layer l gives to the next (E,T,B,wide). Two: of two directions one writes where the other
    // has yet to read, unless all is read at once.
    const bool swap = n_.D == 2 && n_.parts > 1;
    Storage* dy_next = n_.L > 1 ? work_.take<Storage>(n_.E * n_.steps * n_.wide) : nullptr;
    Storage* dy_other = n_.L > 1 && swap ? work_.take<Storage>(n_.E * n_.steps * n_.wide) : dy_next;
    for (int64_t l = n_.L - 1; l >= 0; --l) {
      const Borrowed memory(work_);
      backward_layer(Back{p, g, dp, tape, l}, dy_next, dy_other);
      std::swap(dy_next, dy_other);
    }
  }

  size_t tape_bytes() {
    Arena arena(nullptr);
    layers(arena);
    return arena.most();
  }

  // The route that forward or backward takes.
  Route forward_route() const { return recurrence_.forward_route(); }
  Route backward_route() const { return recurrence_.backward_route(); }

 private:
  // What a layer sees: x (E,T*B,inputs), empty for tokens; of layer 0 the context's share.
  struct Seen {
    int64_t l;
    Matrix<T> x;
    Weights W;
    typename Outside::Context context;
  };
  // Where y of a layer goes: to the caller if the kernels can write it there, else to the next layer's input or a copy.
  struct Outlet {
    Storage* y;
    int64_t t, b, e, d;
    bool direct;
  };
  // What backward of layer l is about.
  struct Back {
    const Arguments& p;
    const Results& g;
    const Arguments& dp;
    const Tape& tape;
    int64_t l;
    bool tokens() const { return l == 0 && p.tokens.data; }
    bool context() const { return l == 0 && p.context.data; }
  };
  // Sums over steps of one layer: by direction; (parts,sets,G,pitch), (parts,sets,pitch).
  struct Gradients {
    Matrix<Full, Math> dW[2], dR[2];
    Math *db = nullptr, *db_h = nullptr;
    Math* dz = nullptr;  // what a context is part of (D,E,B,G,pitch)
    bool bias = false, bias_h = false;
  };

  static Layer<T>& at(Tape& tape, int64_t l) { return tape[static_cast<size_t>(l)]; }
  static const Layer<T>& at(const Tape& tape, int64_t l) { return tape[static_cast<size_t>(l)]; }

  // ---- the tape
  Tape layers(Arena& arena) {
    Tape tape(static_cast<size_t>(n_.L));
    for (int64_t l = 0; l < n_.L; ++l) {
      Layer<T>& layer = at(tape, l);
      if (p_.recompute) {
        layer.h = arena.take<Storage>(n_.E * n_.steps * n_.wide);
        if (Cell::cell_state && n_.parts > 1) layer.marks = arena.take<Math>(n_.sets * (n_.parts - 1) * n_.B * n_.H);
      } else {
        if (l > 0) layer.input = arena.take<Storage>(n_.E * n_.steps * n_.wide);
        gates(layer, n_.T, true, arena);
      }
    }
    return tape;
  }
  // What forward makes beside h, for so many steps; `all` of it, or only what it cannot do without.
  void gates(Layer<T>& layer, int64_t steps, bool all, Arena& arena) {
    const int64_t units = n_.sets * steps * n_.B * n_.pitch;
    layer.gx = arena.take<Storage>(units * Outside::G);
    if (!all) return;
    if (Outside::kKeepsExtra) layer.extra = arena.take<Storage>(units);
    if (Cell::cell_state) layer.cells = arena.take<Storage>(units);
    layer.prev = arena.take<Storage>(units);
  }
  // What a layer takes in, (E,T*B,inputs), zero past a row's end.
  Matrix<T> input(const Arguments& p, const Tape& tape, int64_t l) {
    if (l == 0) return around_.input(p.x);
    const Layer<T>& layer = at(tape, l);
    const Storage* x = layer.input ? layer.input : at(tape, l - 1).h;
    if (p_.recompute && !layer.input && p_.dropout > 0) x = around_.dropped(x, l - 1);
    return around_.of_weights(x, n_.steps, n_.wide);
  }

  // ---- forward
  void forward_layer(const Arguments& p, const Results& out, Tape& tape, int64_t l, bool keep) {
    Layer<T>& layer = at(tape, l);
    const bool whole = keep && !p_.recompute;  // the tape holds all, else h and marks, or nothing
    const bool last = l == n_.L - 1, marked = keep && p_.recompute, tokens = l == 0 && p.tokens.data;
    if (!whole) gates(layer, n_.T, out.cells.data, work_);
    Seen seen{l, {}, {}, {}};
    if (!tokens) seen.x = input(p, tape, l), seen.W = around_.weights(&Params::W, n_.inputs(l), p, l);
    seen.context = around_.context_products(p, l);
    multiply_inputs(p, seen, n_.whole(), layer.gx);
    ForwardArgs<T> a = forward_args(p, layer, l, whole || out.cells.data);
    const Outlet to = outlet(out, tape, l, marked);
    a.y = to.y, a.y_t = to.t, a.y_b = to.b, a.y_e = to.e, a.y_d = to.d;
    a.wide = around_.aligned(to.y, {to.t, to.b, to.e, to.d});
    if (!last && n_.wide != n_.D * n_.H) around_.clear(to.y, n_.E * to.e);
    if (whole && p_.lengths.data) around_.clear(layer.prev, n_.sets * n_.steps * n_.pitch);
    if constexpr (Cell::cell_state)
      if (marked && n_.parts > 1)
        a.marks = layer.marks, a.marks_shift = n_.shift, a.slots = static_cast<int>(n_.parts - 1);
    recurrence_.forward(a, p, l);
    around_.give_states(out.hn, a.hn, l);
    if constexpr (Cell::cell_state) around_.give_states(out.cn, a.cn, l);
    const Array<4> y{to.y, {to.t, to.e, to.b, 1}};
    if (last && !to.direct && out.y.data) around_.give(y, out.y, n_.D * n_.H);
    around_.give_cells(out.cells, l, layer.cells, y);
    if (!last && !marked) around_.dropout(to.y, l);
  }

  ForwardArgs<T> forward_args(const Arguments& p, const Layer<T>& layer, int64_t l, bool keep) {
    ForwardArgs<T> a = {};
    static_cast<Walk&>(a) = walk_of(p_, n_);
    a.keep = keep, a.clip_cell = static_cast<Math>(p_.clip_cell), a.late = late_;
    a.gx = layer.gx, a.extra = layer.extra, a.cells = layer.cells, a.prev = layer.prev;
    a.bias = around_.biases(p, l);
    a.h0 = around_.states(p.h0, l), a.c0 = Cell::cell_state ? around_.states(p.c0, l) : nullptr;
    a.hn = work_.take<Storage>(n_.sets * n_.B * n_.H), a.cn = work_.take<Storage>(n_.sets * n_.B * n_.H);
    return a;
  }

  Outlet outlet(const Results& out, Tape& tape, int64_t l, bool marked) {
    const int64_t* s = out.y.stride;
    Outlet to{nullptr, n_.B * n_.wide, n_.wide, n_.steps * n_.wide, n_.H, false};
    if (marked)
      to.y = at(tape, l).h;
    else if (l < n_.L - 1)
      to.y = at(tape, l + 1).input;
    else if (out.y.data && s[3] == 1)
      to = {static_cast<Storage*>(out.y.data), s[0], s[2], s[1], n_.H, true};
    else
      to.y = work_.take<Storage>(n_.E * to.e);
    return to;
  }

  // gx of a layer for the steps of a part (sets,n,B,G,pitch): its input times W^T, or columns of W for tokens, and the
  // context's share.
  void multiply_inputs(const Arguments& p, const Seen& seen, const Part& part, Storage* gx) {
    const int64_t steps = part.n * n_.B;
    const bool first = seen.l == 0, tokens = first && p.tokens.data;
    for (int64_t d = 0; d < n_.D; ++d) {
      const Matrix<T, Storage> to = around_.of_sets(gx, d, steps, around_.row);
      const auto at_d = static_cast<size_t>(d);
      if (!tokens) product(queue_, to, seen.x.of_rows(part.begin[d] * n_.B, steps), seen.W[at_d].turned());
      if (tokens || (first && p.context.data))
        around_.add_inputs(p.tokens, tokens ? &p.params[d].W : nullptr, seen.context[at_d], part.begin[d], to);
    }
  }

  // ---- backward
  // dy: the gradient of what this layer gives to the next; dx: where that of the layer below goes.
  void backward_layer(const Back& b, Storage* dy, Storage* dx) {
    const int64_t l = b.l, in = n_.padded_inputs(l);
    const Layer<T>& layer = at(b.tape, l);
    const bool want_x = l > 0 || b.dp.x.data, rebuild = p_.recompute && Cell::kept > 0;
    const bool add_x = n_.D == 2 && n_.parts > 1;  // parts of the two directions overlap
    bool want_W = false;
    for (int64_t d = 0; d < n_.D; ++d) want_W |= b.dp.params && b.dp.params[l * n_.D + d].W.data;
    const Strided<Storage> dy_given = given(b, dy), dcells = around_.gradient_of_cells(b.g, l);
    Seen seen{l, {}, {}, {}};
    if ((want_W || rebuild) && !b.tokens()) seen.x = input(b.p, b.tape, l);
    if (want_x || (rebuild && !b.tokens())) seen.W = around_.weights(&Params::W, n_.inputs(l), b.p, l);
    Weights R;
    if (Cell::state_product && (rebuild || backward_route() == Route::stepwise))
      R = around_.weights(&Params::R, n_.H, b.p, l);

    Layer<T> tape = layer;
    if (p_.recompute) gates(tape, n_.every, true, work_);
    BackwardArgs<T> a = backward_args(b, tape);
    a.wide = dy_given.wide;
    const RebuildArgs<Cell, T> made_anew = p_.recompute ? rebuild_args(b, a, tape) : RebuildArgs<Cell, T>{};
    if (rebuild) seen.context = around_.context_products(b.p, l);
    Math* carry = n_.parts > 1 ? work_.take<Math>(4 * n_.sets * n_.B * n_.H) : nullptr;
    recurrence_.prepare_backward(a, b.p, l);
    if (want_x && l == 0) dx = work_.take<Storage>(n_.E * n_.steps * in);
    if (want_x && add_x) around_.clear(dx, n_.E * n_.steps * in);
    const Gradients sums = gradients(b);

    for (int64_t j = n_.parts - 1; j >= 0; --j) {
      const Borrowed memory(work_);
      const Part part = n_.part(j);
      if (rebuild) multiply_inputs(b.p, seen, part, tape.gx);
      if (p_.recompute) recurrence_.rebuild_tape(made_anew, part, R);
      set_part(a, part, dy_given, dcells);
      a.carry_in = j < n_.parts - 1 ? carry : nullptr, a.carry_out = j > 0 ? carry : nullptr;
      recurrence_.backward(a, R);
      for (int64_t d = 0; want_x && d < n_.D; ++d)
        product(queue_, around_.of_weights(dx, n_.steps, in).of_rows(part.begin[d] * n_.B, part.n * n_.B),
                around_.of_sets(a.da, d, part.n * n_.B, around_.row), seen.W[static_cast<size_t>(d)], d > 0 || add_x);
      add_gradients(b, sums, seen.x, a, part);
    }
    around_.give_states(b.dp.h0, a.dh0, l);
    if constexpr (Cell::cell_state) around_.give_states(b.dp.c0, a.dc0, l);
    if (want_x && l == 0) around_.give(around_.over_time(dx, in), b.dp.x, n_.I);
    give_gradients(b, sums);
  }

  Strided<Storage> given(const Back& b, Storage* dy) {
    if (b.l == n_.L - 1) return around_.gradient_of_y(b.g);
    around_.dropout(dy, b.l);
    return around_.gradient(around_.over_time(dy, n_.wide));
  }

  BackwardArgs<T> backward_args(const Back& b, const Layer<T>& tape) {
    BackwardArgs<T> a = {};
    const int64_t steps = n_.sets * n_.steps, states = n_.sets * n_.B * n_.H;
    static_cast<Walk&>(a) = walk_of(p_, n_);
    a.clip_cell = static_cast<Math>(p_.clip_cell), a.clip_grad = static_cast<Math>(p_.clip_grad), a.late = late_;
    a.gx = tape.gx, a.extra = tape.extra, a.cells = tape.cells, a.prev = tape.prev;
    if (p_.recompute) {  // gradients go where the gates were
      a.da = tape.gx, a.da_h = tape.extra;
    } else {
      a.da = work_.take<Storage>(steps * around_.row);
      a.da_h = kTwoSums ? work_.take<Storage>(steps * n_.pitch) : nullptr;
    }
    a.c0 = Cell::cell_state ? around_.states(b.p.c0, b.l) : nullptr;
    a.dhn = around_.states(b.g.hn, b.l);
    a.dcn = Cell::cell_state ? around_.states(b.g.cn, b.l) : nullptr;
    a.dh0 = work_.take<Storage>(states), a.dc0 = work_.take<Storage>(states);
    return a;
  }

  RebuildArgs<Cell, T> rebuild_args(const Back& b, BackwardArgs<T>& back, const Layer<T>& to) {
    RebuildArgs<Cell, T> a{};
    const Layer<T>& from = at(b.tape, b.l);
    a.w = walk_of(p_, n_);
    a.slots = static_cast<int>(n_.parts - 1), a.clip_cell = static_cast<Math>(p_.clip_cell);
    a.h = from.h, a.h_t = n_.B * n_.wide, a.h_b = n_.wide, a.h_e = n_.steps * n_.wide, a.h_d = n_.H;
    a.marks = from.marks, a.h0 = around_.states(b.p.h0, b.l), a.c0 = back.c0;
    if (Cell::kept > 0) a.bias = around_.biases(b.p, b.l);
    a.gx = to.gx, a.extra = to.extra, a.cells = to.cells, a.prev = to.prev;
    if (Cell::cell_state) back.c_enters = a.c_enters = work_.take<Storage>(n_.sets * n_.B * n_.H);
    return a;
  }

  static void set_part(BackwardArgs<T>& a, const Part& part, const Strided<Storage>& dy,
                       const Strided<Storage>& dcells) {
    a.Tn = static_cast<int>(part.n);
    a.begin = static_cast<int>(part.begin[0]), a.begin_d = static_cast<int>(part.begin[1] - part.begin[0]);
    const auto from = [&](const Strided<Storage>& v) { return v.data ? v.data + part.begin[0] * v.t : nullptr; };
    a.dy = from(dy), a.dy_t = dy.t, a.dy_b = dy.b, a.dy_e = dy.e, a.dy_d = dy.d + a.begin_d * dy.t;
    a.dcells = from(dcells), a.dcells_t = dcells.t, a.dcells_b = dcells.b, a.dcells_e = dcells.e;
    a.dcells_d = dcells.d + a.begin_d * dcells.t;
  }

  // Where sums over steps go, of what is wanted.
  Gradients gradients(const Back& b) {
    Gradients to;
    if (b.context()) to.dz = work_.take<Math>(n_.sets * n_.B * around_.row);
    if (!b.dp.params) return to;
    const auto matrix = [&](int64_t columns) {
      return around_.template of_weights<Full>(work_.take<Math>(n_.E * around_.row * columns), around_.row, columns);
    };
    for (int64_t d = 0; d < n_.D; ++d) {
      const Params& w = b.dp.params[b.l * n_.D + d];
      if (w.W.data) to.dW[d] = matrix(n_.padded_inputs(b.l));
      if (w.R.data) to.dR[d] = matrix(n_.pitch);
      to.bias |= w.bW.data || w.bR.data;
      to.bias_h |= kTwoSums && w.bR.data;
    }
    if (to.bias) to.db = work_.take<Math>(n_.parts * n_.sets * around_.row);
    if (to.bias_h) to.db_h = work_.take<Math>(n_.parts * n_.sets * n_.pitch);
    return to;
  }

  // A part's share of the sums. a: what backward of the part had.
  void add_gradients(const Back& b, const Gradients& to, const Matrix<T>& x, const BackwardArgs<T>& a,
                     const Part& part) {
    const int64_t steps = part.n * n_.B;
    const bool add = part.index < n_.parts - 1;
    const auto da_of = [&](int64_t d) { return around_.of_sets(a.da, d, steps, around_.row); };
    for (int64_t d = 0; d < n_.D && b.context(); ++d)
      around_.context_sum(da_of(d), to.dz + d * n_.E * n_.B * around_.row, add);
    if (!b.dp.params) return;
    for (int64_t d = 0; d < n_.D; ++d) {
      const Params& wanted = b.dp.params[b.l * n_.D + d];
      if (wanted.W.data && b.tokens())
        around_.token_gradient(b.p.tokens, part.begin[d], da_of(d), to.dW[d], add);
      else if (wanted.W.data)
        product(queue_, to.dW[d], da_of(d).turned(), x.of_rows(part.begin[d] * n_.B, steps), add);
      if (wanted.R.data) add_gradient_of_R(to.dR[d], a, d, steps, add);
    }
    if (to.bias) around_.column_sums(a.da, steps, around_.row, to.db + part.index * n_.sets * around_.row);
    if (to.bias_h) around_.column_sums(a.da_h, steps, n_.pitch, to.db_h + part.index * n_.sets * n_.pitch);
  }
  void add_gradient_of_R(const Matrix<Full, Math>& dR, const BackwardArgs<T>& a, int64_t d, int64_t steps, bool add) {
    constexpr int64_t own = Outside::kOwnGates;
    const Matrix<T, Storage> da = around_.of_sets(a.da, d, steps, around_.row);
    const Matrix<T> h = around_.of_sets(a.prev, d, steps, n_.pitch);
    product(queue_, dR.of_rows(0, own * n_.pitch), da.of_columns(0, own * n_.pitch).turned(), h, add);
    [[maybe_unused]] const Matrix<Full, Math> last = dR.of_rows(own * n_.pitch, (Outside::G - own) * n_.pitch);
    if constexpr (kTwoSums)
      product(queue_, last, around_.of_sets(a.da_h, d, steps, n_.pitch).turned(), h, add);
    else if constexpr (Cell::two_products)
      product(queue_, last, da.of_columns(own * n_.pitch, n_.pitch).turned(),
              around_.of_sets(a.extra, d, steps, n_.pitch), add);
  }

  void give_gradients(const Back& b, const Gradients& sums) {
    if (b.dp.params) {
      const Math* db = sums.bias ? around_.sum_of_parts(sums.db, around_.row) : nullptr;
      const Math* db_h = sums.bias_h ? around_.sum_of_parts(sums.db_h, n_.pitch) : nullptr;
      for (int64_t d = 0; d < n_.D; ++d) {
        const Params& to = b.dp.params[b.l * n_.D + d];
        if (to.W.data) around_.give_weights(to.W, sums.dW[d], n_.inputs(b.l));
        if (to.R.data) around_.give_weights(to.R, sums.dR[d], n_.H);
        around_.give_biases(to, db, db_h, d);
      }
    }
    if (b.context()) context_gradients(b, sums.dz);
  }
  // Of the context and its weights, from dz (D,E,B,G,pitch).
  void context_gradients(const Back& b, const Math* dz) {
    const bool wanted = b.dp.context.data;
    Math* sum = wanted ? work_.take<Math>(n_.E * n_.B * n_.K) : nullptr;
    for (int64_t d = 0; d < n_.D; ++d) {
      const Borrowed memory(work_);
      const Matrix<Full> own = around_.template of_weights<Full>(dz + d * n_.E * n_.B * around_.row, n_.B, around_.row);
      if (b.dp.context_weights[d].data) {
        const Matrix<Full> context = around_.context_rows(b.p);
        const Matrix<Full, Math> dW =
            around_.template of_weights<Full>(work_.take<Math>(n_.E * around_.row * n_.K), around_.row, n_.K);
        product(queue_, dW, own.turned(), context);
        around_.give_weights(b.dp.context_weights[d], dW, n_.K);
      }
      if (wanted)
        product(queue_, around_.template of_weights<Full>(sum, n_.B, n_.K), own, around_.context_weights(b.p, d),
                d > 0);
    }
    if (wanted) around_.give_context(b.dp.context, sum);
  }

  Outside around_;
  Recurrence<Cell, T, Forwards, Backwards, Queue> recurrence_;
  const Measures& n_;
  Queue& queue_;
  Arena& work_;
  const Problem& p_;
  int* const late_;
};

}  // namespace fusedrnn::cuda
