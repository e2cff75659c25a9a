// SPDX-License-Identifier: Apache-2.0
// The recurrence of one layer: which kernel runs it, and running it: in one launch (or a few, see `run_teams`), or step
// by step; and the tape that recompute makes anew.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "around.h"
#include "cost.h"
#include "pack.h"
#include "recompute.h"
#include "stepwise.h"

namespace fusedrnn::cuda {

// What a layer keeps between forward and backward.
template <class T>
struct Layer {
  using Storage = typename T::Storage;
  Storage *input = nullptr, *gx = nullptr, *extra = nullptr, *cells = nullptr, *prev = nullptr;
  Storage* h = nullptr;  // recompute: (E,T,B,wide), what the layer gives before dropout
  MathOf<T>* marks = nullptr;
};

// Forwards, Backwards: List of Shape and of BackwardShape; empty for what only goes step by step.
template <class Cell, class T, class Forwards, class Backwards, class Queue>
class Recurrence {
  using Outside = Around<Cell, T, Queue>;
  using Storage = typename T::Storage;
  using Math = MathOf<T>;
  using Full = FullOf<T>;
  using Weights = typename Outside::Weights;
  static constexpr int64_t G = Cell::gates;
  static constexpr int64_t kFirst = Cell::two_products ? G - 1 : G;  // gates of the first product

 public:
  Recurrence(Outside& around, const Device& device, int route)
      : around_(around),
        n_(around.n),
        queue_(around.queue),
        work_(around.work),
        device_(device),
        route_(route),
        forward_(cheapest_forward(Forwards())),
        backward_(cheapest_backward(Backwards())) {}

  Route forward_route() const { return forward_.route; }
  Route backward_route() const { return backward_.route; }

  // Layer l, from a.gx to a.y.
  void forward(ForwardArgs<T>& a, const Arguments& p, int64_t l) {
    if (forward_.place < 0) return stepwise_forward(a, p, l);
    chosen(Forwards(), forward_.place, [&]<class S>() {
      cut<S>(a);
      a.weights = pack<PackForward<S>>(p, l, a.peers);
      if (S::kRoute == Route::grid) {
        const int64_t pieces = hand_off_pieces<S>(a, n_.T + 1, n_.pitch);
        a.hand_off = work_.template take<U4>(pieces);
        queue_.fill(a.hand_off, 0xFF, static_cast<size_t>(pieces) * sizeof(U4));
      }
      run_teams<Forward<S>, S::kRoute>(a);
    });
  }

  // What all parts of the walk share; then a part. R: used step by step only.
  void prepare_backward(BackwardArgs<T>& a, const Arguments& p, int64_t l) {
    chosen(Backwards(), backward_.place, [&]<class S>() {
      cut<S>(a);
      a.weights = pack<PackBackward<S>>(p, l, a.peers);
      if (S::kRoute == Route::grid) a.hand_off = work_.template take<U4>(hand_off_pieces<S>(a, n_.every, around_.row));
    });
  }
  void backward(BackwardArgs<T>& a, const Weights& R) {
    if (backward_.place < 0) return stepwise_backward(a, R);
    chosen(Backwards(), backward_.place, [&]<class S>() {
      if (S::kRoute == Route::grid)
        queue_.fill(a.hand_off, 0xFF, static_cast<size_t>(hand_off_pieces<S>(a, a.Tn, around_.row)) * sizeof(U4));
      run_teams<Backward<S>, S::kRoute>(a);
    });
  }

  // The tape of a part, as forward would have written it. a: what is the same for every part; its gx holds the inputs'
  // sums.
  void rebuild_tape(RebuildArgs<Cell, T> a, const Part& part, const Weights& R) {
    const int64_t steps = part.n * n_.B, blocks = around_.blocks_for(n_.sets * steps * n_.pitch);
    a.n = static_cast<int>(part.n), a.index = static_cast<int>(part.index);
    a.begin = static_cast<int>(part.begin[0]), a.begin_d = static_cast<int>(part.begin[1] - part.begin[0]);
    queue_.run(RebuildBefore<Cell, T>{a}, blocks);
    if constexpr (Cell::kept > 0) {
      const auto multiply = [&](const Storage* operand, int64_t gate, int64_t count) {
        Math* sums = work_.template take<Math>(n_.sets * steps * count * n_.pitch);
        for (int64_t d = 0; d < n_.D; ++d)
          product(queue_, around_.template of_sets<Full>(sums, d, steps, count * n_.pitch),
                  around_.of_sets(operand, d, steps, n_.pitch), gates_of(R, d, gate, count).turned());
        return sums;
      };
      if constexpr (Cell::state_product) a.product = multiply(a.prev, 0, kFirst);
      queue_.run(RebuildGates<Cell, T, false>{a}, blocks);
      if constexpr (Cell::two_products) {
        a.product_last = multiply(a.extra, kFirst, 1);
        queue_.run(RebuildGates<Cell, T, true>{a}, blocks);
      }
      if constexpr (Cell::cell_state)
        queue_.run(RebuildCells<Cell, T>{a}, around_.blocks_for(n_.sets * n_.B * n_.pitch));
    }
  }

 private:
  // ---- the choice
  struct Choice {
    Route route = Route::stepwise;
    int place = -1;  // in the list; -1: stepwise
  };
  template <class... S>
  Choice cheapest_forward(List<S...>) const {
    return cheapest({{S::kRoute, forward_cost<S>(device_, n_.B, n_.H, n_.sets)}...});
  }
  template <class... S>
  Choice cheapest_backward(List<S...>) const {
    return cheapest({{S::kRoute, backward_cost<S>(device_, n_.B, n_.H, n_.sets)}...});
  }
  // Stepwise where none fits (cost 0).
  Choice cheapest(std::initializer_list<std::pair<Route, double>> kernels) const {
    const auto allowed = [&](Route route) { return route_ < 0 || route_ == static_cast<int>(route); };
    Choice best;
    double cost = allowed(Route::stepwise) ? stepwise_cost(G, n_.B, n_.H, n_.sets, sizeof(Storage)) : 0;
    int place = 0;
    for (const auto& [route, c] : kernels) {
      if (c > 0 && allowed(route) && (cost == 0 || c < cost)) cost = c, best = {route, place};
      ++place;
    }
    return best;
  }
  // f for the shape at this place; for none where it is -1.
  template <class... S, class F>
  static void chosen(List<S...>, [[maybe_unused]] int place, [[maybe_unused]] const F& f) {
    [[maybe_unused]] int at = 0;
    ((at++ == place ? f.template operator()<S>() : void()), ...);
  }

  // ---- one launch
  template <class S, class Args>
  void cut(Args& a) const {
    a.peers = S::kRoute == Route::single ? 1 : static_cast<int>((n_.H + S::kUnits - 1) / S::kUnits);
    a.row_tiles = static_cast<int>((n_.B + S::kRows - 1) / S::kRows);
  }
  // Of 16 bytes, where a step hands over rows of so many numbers.
  template <class S, class Args>
  int64_t hand_off_pieces(const Args& a, int64_t steps, int64_t width) const {
    return n_.sets * steps * a.row_tiles * (width / T::kPer) * S::kRows;
  }
  // R of every set, packed.
  template <class Pack>
  const U4* pack(const Arguments& p, int64_t l, int peers) {
    const int64_t pieces = Pack::pieces(peers);
    U4* to = work_.template take<U4>(pieces * n_.sets);
    for (int64_t d = 0; d < n_.D; ++d) {
      const Array<3>& R = p.params[l * n_.D + d].R;
      for (int64_t e = 0; e < n_.E; ++e)
        queue_.run(Pack{{static_cast<const Storage*>(R.data) + e * R.stride[0], 0, R.stride[1], R.stride[2],
                         to ? to + (e * n_.D + d) * pieces : nullptr, static_cast<int>(n_.H), peers, 1}},
                   around_.blocks_for(pieces));
    }
    return to;
  }
  // A grid larger than the device runs as several launches.
  template <class K, Route kRoute, class Args>
  void run_teams(Args& a) {
    const int64_t teams = n_.sets * a.row_tiles,
                  at_once = kRoute == Route::grid ? teams_at_once(device_, a.peers) : teams;
    for (int64_t first = 0; first < teams; first += at_once) {
      a.first_team = static_cast<int>(first);
      queue_.run(K{a}, (teams - first < at_once ? teams - first : at_once) * a.peers,
                 kRoute == Route::cluster ? a.peers : 0, kRoute == Route::grid);
    }
  }

  // ---- step by step
  // Rows of R in direction d, of so many gates.
  Matrix<T> gates_of(const Weights& R, int64_t d, int64_t first, int64_t count) const {
    return R[static_cast<size_t>(d)].of_rows(first * n_.pitch, count * n_.pitch);
  }

  void stepwise_forward(const ForwardArgs<T>& f, const Arguments& p, int64_t l) {
    const int64_t state = n_.sets * n_.B * n_.pitch, tape = n_.T * state, blocks = around_.blocks_for(state);
    StepForwardArgs<T> a{};
    static_cast<ForwardArgs<T>&>(a) = f;
    Math* sums = work_.template take<Math>(state * G);
    Math* sums_last = Cell::two_products ? work_.template take<Math>(state) : nullptr;
    a.product = sums, a.product_last = sums_last;
    a.h = work_.template take<Storage>(state);
    a.rh = Cell::two_products ? work_.template take<Storage>(state) : nullptr;
    a.h_full = work_.template take<Math>(state), a.c = work_.template take<Math>(state);
    // what no unit writes, and products read
    if (a.keep && n_.pitch != n_.H) around_.clear(a.prev, tape);
    if (a.keep && Cell::two_products) around_.clear(a.extra, tape);
    if constexpr (!Cell::state_product) {
      queue_.run(WalkForward<Cell, T>{a}, blocks);
    } else {
      const Weights R = around_.weights(&Params::R, n_.H, p, l);
      const auto multiply = [&](const Matrix<Full, Math>& to, const Storage* operand, int64_t d, int64_t gate,
                                int64_t count) {
        product(queue_, to, around_.of_sets(operand, d, n_.B, n_.pitch), gates_of(R, d, gate, count).turned());
      };
      queue_.run(StepPrepare<Cell, T, false>{a}, blocks);
      for (a.s = 0; a.s < f.Tn; ++a.s) {
        for (int64_t d = 0; d < n_.D; ++d) {
          const Matrix<Full, Math> to = around_.template of_sets<Full>(sums, d, n_.B, around_.row);
          multiply(to.of_columns(0, kFirst * n_.pitch), a.h, d, 0, kFirst);
        }
        if constexpr (Cell::two_products) {
          queue_.run(StepPrepare<Cell, T, true>{a}, blocks);
          for (int64_t d = 0; d < n_.D; ++d)
            multiply(around_.template of_sets<Full>(sums_last, d, n_.B, n_.pitch), a.rh, d, kFirst, 1);
        }
        queue_.run(StepForward<Cell, T>{a}, blocks);
      }
    }
  }

  void stepwise_backward(const BackwardArgs<T>& b, const Weights& R) {
    const int64_t state = n_.sets * n_.B * n_.pitch, blocks = around_.blocks_for(state);
    StepBackwardArgs<T> a{};
    static_cast<BackwardArgs<T>&>(a) = b;
    a.operand = work_.template take<Storage>(state * G);
    Math* sums = work_.template take<Math>(state);
    Math* sums_r = Cell::two_products ? work_.template take<Math>(state) : nullptr;
    a.product = sums, a.product_r = sums_r;
    for (Math** one : {&a.dh, &a.dc, &a.dh_first, &a.dc_first}) *one = work_.template take<Math>(state);
    if constexpr (!Cell::state_product) {
      queue_.run(WalkBackward<Cell, T>{a}, blocks);
    } else {
      const auto multiply = [&](Math* to, int64_t gate, int64_t count) {
        for (int64_t d = 0; d < n_.D; ++d) {
          const Matrix<T, Storage> da = around_.of_sets(a.operand, d, n_.B, around_.row);
          product(queue_, around_.template of_sets<Full>(to, d, n_.B, n_.pitch),
                  da.of_columns(gate * n_.pitch, count * n_.pitch), gates_of(R, d, gate, count));
        }
      };
      for (a.s = b.Tn; a.s >= -1; --a.s) {
        queue_.run(StepBackward<Cell, T>{a}, blocks);
        if (a.s < 0 || a.s == b.Tn) continue;
        if constexpr (Cell::two_products) {
          multiply(sums_r, kFirst, 1);
          queue_.run(StepBackwardGate<Cell, T>{a}, blocks);
        }
        multiply(sums, 0, kFirst);
      }
    }
  }

  Outside& around_;
  const Measures& n_;
  Queue& queue_;
  Arena& work_;
  const Device& device_;
  const int route_;
  const Choice forward_, backward_;
};

}  // namespace fusedrnn::cuda
