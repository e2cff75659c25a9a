// SPDX-License-Identifier: Apache-2.0
// One call on dual numbers, step by step: jvp and hvp (see api.h) for the whole stack. Whatever has two planes has the
// values in 0 and the tangents in 1. Float32 and float64: a type is its own arithmetic.
#pragma once

#include <optional>
#include <type_traits>
#include <vector>

#include "around.h"
#include "jvp.h"

namespace fusedrnn::cuda {

// What a call is given, and the tangent of it.
template <class Of>
struct Along {
  const Of &value, &tangent;
  const Of& operator[](int plane) const { return plane ? tangent : value; }
};

template <class Cell, class T, class Queue>
class Tangents {
  static_assert(std::is_same_v<T, FullOf<T>>);
  using Outside = Around<Cell, T, Queue>;
  using Math = MathOf<T>;
  using Planes = Math* const[2];
  using Tape = std::vector<DualTape<Math>>;
  static constexpr int64_t G = Cell::gates;
  static constexpr bool kTwoSums = Outside::kTwoSums;
  static constexpr int64_t kFirst = Cell::two_products ? G - 1 : G;  // gates of the first product

 public:
  Tangents(Queue& queue, Arena& work, const Problem& problem, const Options& options)
      : around_(queue, work, problem, options),
        n_(around_.n),
        queue_(queue),
        work_(work),
        p_(problem),
        none_(static_cast<size_t>(n_.L * n_.D)) {}

  // Tangents of the results along those of p.
  void jvp(const Along<Arguments>& p, const Results& out) {
    if (n_.steps == 0) return around_.pass_states(p.tangent, out);
    forward(p, out, nullptr);
  }

  // Tangents of the gradients dp of g; and those of the results, if `out` wants them.
  void hvp(const Along<Arguments>& p, const Along<Results>& g, const Arguments& dp, const Results& out) {
    if (n_.steps == 0) {
      around_.pass_states(p.tangent, out);
      return around_.pass_gradients(g.tangent, dp);
    }
    Tape tape;
    for (int64_t l = 0; l < n_.L; ++l) tape.push_back(dual_tape(l));
    forward(p, out, &tape);
    Math* below[2] = {};  // the gradient of what a layer gives to the next: (E,T,B,wide)
    if (n_.L > 1) take(below, n_.E * n_.steps * n_.wide);
    for (int64_t l = n_.L - 1; l >= 0; --l) {
      const Borrowed memory(work_);
      hvp_layer({p, g, dp, tape[static_cast<size_t>(l)], l}, below);
    }
  }

 private:
  // A matrix and, where there is one, its tangent.
  struct Both {
    Matrix<T> value;
    std::optional<Matrix<T>> tangent;
    template <class F>
    Both mapped(const F& f) const {
      return {f(value), tangent ? std::optional(f(*tangent)) : std::nullopt};
    }
    Both turned() const {
      return mapped([](const Matrix<T>& m) { return m.turned(); });
    }
    Both of_rows(int64_t first, int64_t count) const {
      return mapped([&](const Matrix<T>& m) { return m.of_rows(first, count); });
    }
    Both of_columns(int64_t first, int64_t count) const {
      return mapped([&](const Matrix<T>& m) { return m.of_columns(first, count); });
    }
  };
  // What hvp of layer l is about.
  struct Back {
    const Along<Arguments>& p;
    const Along<Results>& g;
    const Arguments& dp;
    const DualTape<Math>& tape;
    int64_t l;
    bool tokens() const { return l == 0 && p.value.tokens.data; }
    bool context() const { return l == 0 && p.value.context.data; }
  };

  // The tangent of A B: C = A' B + A B', or with `add` C += that.
  void tangent_product(const Matrix<T, Math>& C, const Both& A, const Both& B, bool add) {
    if (A.tangent) product(queue_, C, *A.tangent, B.value, add), add = true;
    if (B.tangent) product(queue_, C, A.value, *B.tangent, add);
  }

  // ---- both planes
  void take(Math* (&planes)[2], int64_t count) {
    for (Math*& plane : planes) plane = work_.take<Math>(count);
  }
  Both of_sets(Planes& planes, int64_t d, int64_t rows, int64_t columns) const {
    return {around_.of_sets(planes[0], d, rows, columns), around_.of_sets(planes[1], d, rows, columns)};
  }
  const Params& params(const Along<Arguments>& p, int plane, int64_t l, int64_t d) const {
    const Params* const all = p[plane].params;
    return (all ? all : none_.data())[l * n_.D + d];
  }
  Both weights(const Along<Arguments>& p, Array<3> Params::* of, int64_t columns, int64_t l, int64_t d) {
    const Array<3>& tangent = params(p, 1, l, d).*of;
    Both to{around_.weights(params(p, 0, l, d).*of, columns), {}};
    if (tangent.data) to.tangent = around_.weights(tangent, columns);
    return to;
  }
  Both input(const Along<Arguments>& p, Planes& from, int64_t l) {
    if (l > 0) return {around_.of_weights(from[0], n_.steps, n_.wide), around_.of_weights(from[1], n_.steps, n_.wide)};
    Both to{around_.input(p.value.x), {}};
    if (p.tangent.x.data) to.tangent = around_.input(p.tangent.x);
    return to;
  }
  Both context_rows(const Along<Arguments>& p) {
    Both to{around_.context_rows(p.value), {}};
    if (p.tangent.context.data) to.tangent = around_.context_rows(p.tangent);
    return to;
  }
  Both context_weights(const Along<Arguments>& p, int64_t d) {
    Both to{around_.context_weights(p.value, d), {}};
    if (p.tangent.context_weights[d].data) to.tangent = around_.context_weights(p.tangent, d);
    return to;
  }
  // Of every direction, R.
  std::vector<Both> state_weights(const Along<Arguments>& p, int64_t l) {
    std::vector<Both> to;
    for (int64_t d = 0; Cell::state_product && d < n_.D; ++d) to.push_back(weights(p, &Params::R, n_.H, l, d));
    return to;
  }

  // ---- forward
  // Memory for layer l of what hvp keeps.
  DualTape<Math> dual_tape(int64_t l) {
    DualTape<Math> tape{};
    const int64_t units = n_.sets * n_.steps * n_.pitch;
    if (l > 0) take(tape.input, n_.E * n_.steps * n_.wide);
    take(tape.gx, units * G);
    if (Outside::kKeepsExtra) take(tape.extra, units);
    if (Cell::cell_state) take(tape.cells, units);
    take(tape.prev, units);
    for (int q = 0; q < 2; ++q) {  // what no step writes, and products read
      around_.clear(tape.prev[q], units);
      if (Cell::two_products) around_.clear(tape.extra[q], units);
    }
    return tape;
  }

  // tape: what hvp needs is kept there.
  void forward(const Along<Arguments>& p, const Results& out, const Tape* tape) {
    Math* between[2][2];  // what goes from layer to layer, in turn: (E,T,B,wide)
    for (auto& of_layer : between) take(of_layer, n_.E * n_.steps * n_.wide);
    for (int64_t l = 0; l < n_.L; ++l) {
      const Borrowed memory(work_);
      const auto at = static_cast<size_t>(l);
      DualTape<Math> own{};
      if (tape) {
        own = (*tape)[at];
      } else {
        own.input[0] = between[l % 2][0], own.input[1] = between[l % 2][1];
        take(own.gx, n_.sets * n_.steps * around_.row);
        if (Cell::cell_state && out.cells.data) own.cells[1] = work_.take<Math>(n_.sets * n_.steps * n_.pitch);
      }
      JvpArgs<Math> a = jvp_args(p, own, l);
      a.keep = tape;
      for (int q = 0; q < 2; ++q) {
        a.y[q] = tape && l < n_.L - 1 ? (*tape)[at + 1].input[q] : between[(l + 1) % 2][q];
        if (n_.wide != n_.D * n_.H) around_.clear(a.y[q], n_.E * n_.steps * n_.wide);
      }
      jvp_inputs(p, own, l);
      jvp_steps(a, state_weights(p, l));
      around_.give_states(out.hn, a.hn, l);
      if constexpr (Cell::cell_state) around_.give_states(out.cn, a.cn, l);
      const Array<4> y = around_.over_time(a.y[1], n_.wide);
      if (l == n_.L - 1 && out.y.data) around_.give(y, out.y, n_.D * n_.H);
      around_.give_cells(out.cells, l, a.cells[1], y);
      for (int q = 0; q < 2 && l < n_.L - 1; ++q) around_.dropout(a.y[q], l);
    }
  }

  JvpArgs<Math> jvp_args(const Along<Arguments>& p, const DualTape<Math>& own, int64_t l) {
    JvpArgs<Math> a{};
    static_cast<Walk&>(a) = walk_of(p_, n_);
    a.clip_cell = static_cast<Math>(p_.clip_cell);
    for (int q = 0; q < 2; ++q) {
      a.gx[q] = own.gx[q], a.extra[q] = own.extra[q], a.prev[q] = own.prev[q], a.cells[q] = own.cells[q];
      a.bias[q] = p[q].params ? around_.biases(p[q], l) : nullptr;
      a.h0[q] = around_.states(p[q].h0, l);
      a.c0[q] = Cell::cell_state ? around_.states(p[q].c0, l) : nullptr;
    }
    a.y_t = n_.B * n_.wide, a.y_b = n_.wide, a.y_e = n_.steps * n_.wide, a.y_d = n_.H;
    a.hn = work_.take<Math>(n_.sets * n_.B * n_.H), a.cn = work_.take<Math>(n_.sets * n_.B * n_.H);
    return a;
  }

  // Both planes of gx.
  void jvp_inputs(const Along<Arguments>& p, const DualTape<Math>& own, int64_t l) {
    const bool tokens = l == 0 && p.value.tokens.data, context = l == 0 && p.value.context.data;
    Both x;
    if (!tokens) x = input(p, own.input, l);
    around_.clear(own.gx[1], n_.sets * n_.steps * around_.row);
    for (int64_t d = 0; d < n_.D; ++d) {
      Matrix<T, Math> gx[2];
      for (int q = 0; q < 2; ++q) gx[q] = around_.of_sets(own.gx[q], d, n_.steps, around_.row);
      if (!tokens) {
        const Both W = weights(p, &Params::W, n_.inputs(l), l, d).turned();
        product(queue_, gx[0], x.value, W.value);
        tangent_product(gx[1], x, W, true);
      }
      Math* sums[2] = {};
      if (context) jvp_context(p, d, sums);
      for (int q = 0; q < 2; ++q) {
        const Array<3>& W = params(p, q, l, d).W;
        const bool columns = tokens && W.data;
        if (columns || context) around_.add_inputs(p.value.tokens, columns ? &W : nullptr, sums[q], 0, gx[q]);
      }
    }
  }
  void jvp_context(const Along<Arguments>& p, int64_t d, Math* (&sums)[2]) {
    take(sums, n_.E * n_.B * around_.row);
    const Both context = context_rows(p), W = context_weights(p, d).turned();
    product(queue_, around_.of_weights(sums[0], n_.B, around_.row), context.value, W.value);
    around_.clear(sums[1], n_.E * n_.B * around_.row);
    tangent_product(around_.of_weights(sums[1], n_.B, around_.row), context, W, true);
  }

  void jvp_steps(JvpArgs<Math>& a, const std::vector<Both>& R) {
    const int64_t state = n_.sets * n_.B * n_.pitch, blocks = around_.blocks_for(state);
    Math *sums[2], *last[2] = {};
    take(sums, state * G);
    take(a.h, state), take(a.c, state);
    if (Cell::two_products) take(last, state), take(a.rh, state), take(a.z, state);
    for (int q = 0; q < 2; ++q) a.product[q] = sums[q], a.product_last[q] = last[q];
    // h R^T, of so many gates
    const auto multiply = [&](Planes& h, Planes& to, int64_t width, int64_t gate, int64_t count) {
      for (int64_t d = 0; d < n_.D; ++d) {
        const Both from = of_sets(h, d, n_.B, n_.pitch);
        const Both w = R[static_cast<size_t>(d)].of_rows(gate * n_.pitch, count * n_.pitch).turned();
        const auto plane = [&](int q) {
          return around_.of_sets(to[q], d, n_.B, width).of_columns(0, count * n_.pitch);
        };
        product(queue_, plane(0), from.value, w.value);
        tangent_product(plane(1), from, w, false);
      }
    };
    queue_.run(JvpStep<Cell, Math>{a}, blocks);
    for (a.s = 0; a.s < a.Tn; ++a.s) {
      if constexpr (Cell::state_product) multiply(a.h, sums, around_.row, 0, kFirst);
      if constexpr (Cell::two_products) {
        queue_.run(JvpGate<Cell, Math>{a}, blocks);
        multiply(a.rh, last, n_.pitch, kFirst, 1);
      }
      queue_.run(JvpStep<Cell, Math>{a}, blocks);
    }
  }

  // ---- backward
  // below: the gradient of what this layer gives to the next; then that of the layer below.
  void hvp_layer(const Back& b, Math* (&below)[2]) {
    HvpArgs<Math> a = hvp_args(b, below);
    Math *dh0 = work_.take<Math>(n_.sets * n_.B * n_.H), *dc0 = work_.take<Math>(n_.sets * n_.B * n_.H);
    a.dh0 = dh0, a.dc0 = dc0;
    hvp_steps(a, state_weights(b.p, b.l));
    around_.give_states(b.dp.h0, dh0, b.l);
    if constexpr (Cell::cell_state) around_.give_states(b.dp.c0, dc0, b.l);
    if (b.l > 0 || b.dp.x.data) hvp_x(b, a, below);
    if (b.dp.params) {
      hvp_biases(b, a);
      hvp_weights(b, a);
    }
    if (b.context()) hvp_context(b, a);
  }

  HvpArgs<Math> hvp_args(const Back& b, Planes& dy) {
    HvpArgs<Math> a{};
    const auto over_time = [](const Strided<Math>& g) { return OverTime<Math>{g.data, g.t, g.b, g.e, g.d}; };
    static_cast<Walk&>(a) = walk_of(p_, n_);
    a.clip_cell = static_cast<Math>(p_.clip_cell), a.clip_grad = static_cast<Math>(p_.clip_grad);
    for (int q = 0; q < 2; ++q) {
      if (b.l < n_.L - 1) {
        around_.dropout(dy[q], b.l);
        a.dy[q] = over_time(around_.gradient(around_.over_time(dy[q], n_.wide)));
      } else {
        a.dy[q] = over_time(around_.gradient_of_y(b.g[q]));
      }
      a.dcells[q] = over_time(around_.gradient_of_cells(b.g[q], b.l));
      a.gx[q] = b.tape.gx[q], a.extra[q] = b.tape.extra[q], a.cells[q] = b.tape.cells[q], a.prev[q] = b.tape.prev[q];
      a.c0[q] = Cell::cell_state ? around_.states(b.p[q].c0, b.l) : nullptr;
      a.dhn[q] = around_.states(b.g[q].hn, b.l);
      a.dcn[q] = Cell::cell_state ? around_.states(b.g[q].cn, b.l) : nullptr;
    }
    take(a.da, n_.sets * n_.steps * around_.row);
    if (kTwoSums) take(a.da_h, n_.sets * n_.steps * n_.pitch);
    return a;
  }

  void hvp_steps(HvpArgs<Math>& a, const std::vector<Both>& R) {
    const int64_t state = n_.sets * n_.B * n_.pitch, blocks = around_.blocks_for(state);
    Math *sums[2], *sums_r[2] = {};
    take(a.operand, state * G);
    take(sums, state);
    if (Cell::two_products) take(sums_r, state);
    for (int q = 0; q < 2; ++q) a.product[q] = sums[q], a.product_r[q] = sums_r[q];
    take(a.dh, state), take(a.dc, state), take(a.dh_first, state), take(a.dc_first, state);
    // da R, of so many gates
    const auto multiply = [&](Planes& to, int64_t gate, int64_t count) {
      for (int64_t d = 0; d < n_.D; ++d) {
        const Both da = of_sets(a.operand, d, n_.B, around_.row).of_columns(gate * n_.pitch, count * n_.pitch);
        const Both w = R[static_cast<size_t>(d)].of_rows(gate * n_.pitch, count * n_.pitch);
        product(queue_, around_.of_sets(to[0], d, n_.B, n_.pitch), da.value, w.value);
        tangent_product(around_.of_sets(to[1], d, n_.B, n_.pitch), da, w, false);
      }
    };
    for (a.s = a.Tn; a.s >= -1; --a.s) {
      queue_.run(HvpStep<Cell, Math>{a}, blocks);
      if (a.s < 0 || a.s == a.Tn) continue;
      if constexpr (Cell::two_products) {
        multiply(sums_r, kFirst, 1);
        queue_.run(HvpGate<Cell, Math>{a}, blocks);
      }
      if constexpr (Cell::state_product) multiply(sums, 0, kFirst);
    }
  }

  void hvp_x(const Back& b, const HvpArgs<Math>& a, Planes& below) {
    const int64_t in = n_.padded_inputs(b.l);
    Math* const tangent = b.l > 0 ? below[1] : work_.take<Math>(n_.E * n_.steps * in);
    for (int64_t d = 0; d < n_.D; ++d) {
      const Both da = of_sets(a.da, d, n_.steps, around_.row), W = weights(b.p, &Params::W, n_.inputs(b.l), b.l, d);
      if (b.l > 0) product(queue_, around_.of_weights(below[0], n_.steps, in), da.value, W.value, d > 0);
      tangent_product(around_.of_weights(tangent, n_.steps, in), da, W, d > 0);
    }
    if (b.l == 0) around_.give(around_.over_time(tangent, in), b.dp.x, n_.I);
  }

  void hvp_biases(const Back& b, const HvpArgs<Math>& a) {
    const Params* const to = b.dp.params + b.l * n_.D;
    bool wanted = false;
    for (int64_t d = 0; d < n_.D; ++d) wanted |= to[d].bW.data || to[d].bR.data;
    if (!wanted) return;
    Math* db = work_.take<Math>(n_.sets * around_.row);
    Math* db_h = kTwoSums ? work_.take<Math>(n_.sets * n_.pitch) : nullptr;
    around_.column_sums(a.da[1], n_.steps, around_.row, db);
    if (kTwoSums) around_.column_sums(a.da_h[1], n_.steps, n_.pitch, db_h);
    for (int64_t d = 0; d < n_.D; ++d) around_.give_biases(to[d], db, db_h, d);
  }

  void hvp_weights(const Back& b, const HvpArgs<Math>& a) {
    const Params* const wanted = b.dp.params + b.l * n_.D;
    Both x;
    bool want_W = b.l > 0;
    for (int64_t d = 0; d < n_.D; ++d) want_W |= wanted[d].W.data != nullptr;
    if (want_W && !b.tokens()) x = input(b.p, b.tape.input, b.l);
    for (int64_t d = 0; d < n_.D; ++d) {
      const Borrowed memory(work_);
      const Both da = of_sets(a.da, d, n_.steps, around_.row);
      const auto matrix = [&](int64_t columns) {
        return around_.of_weights(work_.take<Math>(n_.E * around_.row * columns), around_.row, columns);
      };
      if (wanted[d].W.data) {
        const Matrix<T, Math> dW = matrix(n_.padded_inputs(b.l));
        if (b.tokens())
          around_.token_gradient(b.p.value.tokens, 0, around_.of_sets(a.da[1], d, n_.steps, around_.row), dW, false);
        else
          tangent_product(dW, da.turned(), x, false);
        around_.give_weights(wanted[d].W, dW, n_.inputs(b.l));
      }
      if (wanted[d].R.data) {
        const Matrix<T, Math> dR = matrix(n_.pitch);
        hvp_R(b, a, d, dR);
        around_.give_weights(wanted[d].R, dR, n_.H);
      }
    }
  }
  void hvp_R(const Back& b, const HvpArgs<Math>& a, int64_t d, const Matrix<T, Math>& dR) {
    constexpr int64_t own = Outside::kOwnGates;
    const Both da = of_sets(a.da, d, n_.steps, around_.row), h = of_sets(b.tape.prev, d, n_.steps, n_.pitch);
    tangent_product(dR.of_rows(0, own * n_.pitch), da.of_columns(0, own * n_.pitch).turned(), h, false);
    [[maybe_unused]] const Matrix<T, Math> last = dR.of_rows(own * n_.pitch, (G - own) * n_.pitch);
    if constexpr (kTwoSums)
      tangent_product(last, of_sets(a.da_h, d, n_.steps, n_.pitch).turned(), h, false);
    else if constexpr (Cell::two_products)
      tangent_product(last, da.of_columns(own * n_.pitch, n_.pitch).turned(),
                      of_sets(b.tape.extra, d, n_.steps, n_.pitch), false);
  }

  void hvp_context(const Back& b, const HvpArgs<Math>& a) {
    const bool wanted = b.dp.context.data;
    Math* sum = wanted ? work_.take<Math>(n_.E * n_.B * n_.K) : nullptr;
    for (int64_t d = 0; d < n_.D; ++d) {
      const Borrowed memory(work_);
      Math* dz[2];
      take(dz, n_.E * n_.B * around_.row);
      for (int q = 0; q < 2; ++q) around_.context_sum(around_.of_sets(a.da[q], d, n_.steps, around_.row), dz[q], false);
      const Both own{around_.of_weights(dz[0], n_.B, around_.row), around_.of_weights(dz[1], n_.B, around_.row)};
      if (const Array<3>& to = b.dp.context_weights[d]; to.data) {
        const Matrix<T, Math> dW = around_.of_weights(work_.take<Math>(n_.E * around_.row * n_.K), around_.row, n_.K);
        tangent_product(dW, own.turned(), context_rows(b.p), false);
        around_.give_weights(to, dW, n_.K);
      }
      if (wanted) tangent_product(around_.of_weights(sum, n_.B, n_.K), own, context_weights(b.p, d), d > 0);
    }
    if (wanted) around_.give_context(b.dp.context, sum);
  }

  Outside around_;
  const Measures& n_;
  Queue& queue_;
  Arena& work_;
  const Problem& p_;
  const std::vector<Params> none_;  // for tangents of weights that are not given
};

}  // namespace fusedrnn::cuda
