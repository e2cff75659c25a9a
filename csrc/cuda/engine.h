// SPDX-License-Identifier: Apache-2.0
// One call, from the caller's arrays to the caller's arrays: the host's side of forward and backward for the whole
// stack of layers and directions. It launches kernels and products on a Queue and knows no CUDA: on a GPU the queue is
// a stream (queue.h), in the tests it runs the same kernels on the CPU, and Counting only counts the memory needed.
//
//   queue.run(kernel, blocks, cluster, cooperative)  queue.fill(pointer, byte, bytes)  queue.product<T, To>(Product)
//
// A *set* is one weight set in one direction: set = e * D + d. Everything between caller and kernels is contiguous:
// states (sets,B,H); what runs over time (sets,T,B,..,pitch), with rows padded to `pitch`, a multiple of 8.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "../api.h"
#include "arrange.h"
#include "backward.h"
#include "forward.h"
#include "inputs.h"
#include "jvp.h"
#include "pack.h"
#include "recompute.h"
#include "stepwise.h"

namespace fusedrnn::cuda {

// Row-major C (m,n) = A (m,k) B (k,n), or with `add` C += A B. ta: A is stored (k,m); tb: B is stored (n,k). Strides in
// elements.
struct Product {
  int64_t m, n, k;
  const void* A;
  int64_t lda, a_batch;
  bool ta;
  const void* B;
  int64_t ldb, b_batch;
  bool tb;
  void* C;
  int64_t ldc, c_batch;
  int64_t batch;
  bool add;
};

// What the routes are chosen by. clusters[n]: how many clusters of n blocks run at once; 0 = none.
struct Device {
  int multiprocessors = 132;
  int compute = 90;
  int shared_bytes = 227 * 1024;
  int clusters[17] = {};
  bool cooperative = true;
  bool wgmma = true;
};

struct Options {
  int route = -1;  // force this Route; -1 = the fastest by the cost model
  TokenType tokens;
};

// Memory from one piece; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(n) * sizeof(T) + 255) / 256 * 256;
    if (used_ > most_) most_ = used_;
    return reinterpret_cast<T*>(p);
  }
  size_t mark() const { return used_; }
  void release(size_t mark) { used_ = mark; }
  size_t most() const { return most_; }

 private:
  char* base_;
  size_t used_ = 0, most_ = 0;
};

struct Counting {
  template <class K>
  void run(const K&, int64_t, int = 0, bool = false) {}
  void fill(void*, int, size_t) {}
  template <class T, class To>
  void product(const Product&) {}
};

template <class... S>
struct List {};
template <class... A, class... B>
List<A..., B...> joined(List<A...>, List<B...>);
// A cut on wgmma, of the types that it multiplies.
template <class Cell, class T, int... n>
using Wide = std::conditional_t<kByWgmma<T>, List<WideShape<Cell, T, n...>>, List<>>;

// ---- the cost model -------------------------------------------------------------------------------------------------
// Microseconds a step, by the formulas of the design notes (predicted from published latencies, not measured here): the
// wait for h, the product (6.26 clocks of the matrix pipe, on each sub-partition, for one of 16 x 8 sums; float32 as
// IEEE has it: one for each of 4 fused multiply-adds and row, of 8 units), h on its way, the gates; times the number of
// waves.
constexpr double kClock = 1.75e3;  // clocks a microsecond

template <class S>
double product_time(int64_t B) {
  const int64_t rows = B > 6 ? 8 : B > 4 ? 6 : B > 2 ? 4 : B;  // of a tile
  const double clocks = kByFma<typename S::T>                   ? 4.0 * static_cast<double>(rows)
                        : std::is_same_v<typename S::T, TF32x3> ? 3 * 6.26
                                                                : 6.26;
  return S::kMma * 2 * S::kChunks * S::kTiles * ((S::kWarps + 3) / 4) * clocks / kClock;
}

// A grid's blocks wait for one another, so it holds only teams (blocks that share one R) that all fit at once: the
// others come in launches of their own.
inline int64_t teams_at_once(const Device& device, int64_t peers) { return device.multiprocessors / peers; }
inline double grid_waves(const Device& device, int64_t teams, int64_t peers) {
  return static_cast<double>((teams + teams_at_once(device, peers) - 1) / teams_at_once(device, peers));
}

// Clocks of a product of 64 gate rows, 32 bytes of depth and 8, 16, .. rows of the batch by wgmma: a floor, then the
// rate of the pipe.
constexpr double wgmma_clocks(int tiles) { return tiles < 8 ? 16.8 + 2 * tiles : 4.1 * tiles; }

template <class S>
double forward_cost(const Device& device, int64_t B, int64_t H, int64_t sets) {
  const int64_t tiles = (B + S::kRows - 1) / S::kRows, teams = tiles * sets;
  const int64_t peers = S::kRoute == Route::single ? 1 : (H + S::kUnits - 1) / S::kUnits;
  const double bytes = static_cast<double>(S::kRows * H) * sizeof(typename S::T::Storage);
  double waves = 1, step = 0.15 + product_time<S>(B) + 0.05 * S::kOwned;
  if (Forward<S>::shared_bytes() > device.shared_bytes || device.compute < Forward<S>::kCompute) return 0;
  if constexpr (S::kRoute == Route::single) {
    if (H > S::kUnits || H > S::kDepth) return 0;
    waves = static_cast<double>((teams + device.multiprocessors - 1) / device.multiprocessors);
    step += 0.05;
  } else if constexpr (S::kRoute == Route::cluster) {
    if (peers > 16 || H > S::kDepth || device.clusters[peers] == 0) return 0;
    waves = static_cast<double>((teams + device.clusters[peers] - 1) / device.clusters[peers]);
    step += 0.2 + bytes / 18 / kClock;
  } else {
    if (H > S::kDepth || !device.cooperative || peers > device.multiprocessors) return 0;
    waves = grid_waves(device, teams, peers);
    if constexpr (S::kWide) {  // products run while h arrives; sums meet in shared memory, 128 bytes a clock
      if (!device.wgmma) return 0;
      const double product = S::kGroups * S::kDepths * S::kChunks * 2 * wgmma_clocks(S::kTiles) / kClock;
      const double arrival = bytes / 38 / kClock, sums = 2 * 256.0 * S::kGroups * S::kDepths * S::kRows / 128 / kClock;
      step = 0.2 + 0.05 * S::kOwned + 0.55 + (product > arrival ? product : arrival) + sums;
    } else {
      step += 0.55 + bytes * S::kGroups / 38 / kClock;
    }
  }
  return waves * step;
}

template <class S>
double backward_cost(const Device& device, int64_t B, int64_t H, int64_t sets) {
  const int64_t tiles = (B + S::kRows - 1) / S::kRows, teams = tiles * sets;
  const int64_t peers = S::kRoute == Route::single ? 1 : (H + S::kUnits - 1) / S::kUnits;
  double waves = 1, step = 0.2 + product_time<S>(B) + 0.05 * S::kOwned;
  if (Backward<S>::shared_bytes() > device.shared_bytes || device.compute < Backward<S>::kCompute || H > S::kMaxH)
    return 0;
  if constexpr (S::kRoute == Route::single) {
    waves = static_cast<double>((teams + device.multiprocessors - 1) / device.multiprocessors);
    step += 0.05;
  } else if constexpr (S::kRoute == Route::cluster) {
    if (peers > S::kMaxPeers || peers > 16 || device.clusters[peers] == 0) return 0;
    waves = static_cast<double>((teams + device.clusters[peers] - 1) / device.clusters[peers]);
    step += 0.25 + static_cast<double>(S::kRows * H) * 4 / 18 / kClock;
  } else {
    if (!device.cooperative || peers > device.multiprocessors) return 0;
    waves = grid_waves(device, teams, peers);
    step += 0.6 + static_cast<double>(S::kRows * H * S::kGates) * sizeof(typename S::T::Storage) / 38 / kClock;
    step += Backward<S>::kLaid * 16.0 * S::kTiles / 128 / kClock;  // weights in shared memory, for each tile of rows
  }
  return waves * step;
}

// Two launches, and R out of the L2 or memory.
inline double stepwise_cost(int64_t gates, int64_t B, int64_t H, int64_t sets, int64_t bytes) {
  const double weights = static_cast<double>(gates * H * H * sets);
  return 4.5 + weights * static_cast<double>(bytes) / 3e6 + 2 * weights * static_cast<double>(B) / 4e8;
}

// ---- one cell in one type -----------------------------------------------------------------------------------------
// Forwards, Backwards: List of Shape and of BackwardShape; empty for what only goes step by step.
template <class Cell, class T, class Forwards, class Backwards, class Queue>
class Engine {
 public:
  using Storage = typename T::Storage;
  using Math = MathOf<T>;
  // Products of a type that kernels round by themselves see it as it is.
  using Full = std::conditional_t<std::is_same_v<Math, double>, F64, F32>;

  Engine(Queue& queue, const Device& device, const Options& options, const Problem& problem,
         int* late)  // late: see run.h; null while only counting
      : queue_(queue), device_(device), options_(options), p_(problem), late_(late) {
    const Sizes& z = p_.sizes;
    T_ = z.T, E_ = z.E, B_ = z.B, I_ = z.I, H_ = z.H, L_ = z.L, D_ = z.D;
    sets_ = E_ * D_;
    pitch_ = up(H_);
    wide_ = up(D_ * H_);
    every_ = T_;
    if (p_.recompute && T_ > 0) {
      // Steps of a part: few enough that its tape is small beside h, enough to fill the device and to pay for a launch.
      const int64_t least = B_ > 128 ? 16 : B_ > 32 ? 2048 / B_ : 64;
      for (every_ = 16, shift_ = 4; every_ < least || every_ * 8 < T_; every_ *= 2) ++shift_;
      parts_ = (T_ + every_ - 1) / every_;
    }
  }

  // keep: a backward will follow, so tape_memory is written.
  void forward(const Arguments& p, const Results& out, void* tape_memory, bool keep, Arena& work) {
    if (T_ * B_ == 0) {
      pass_states(p.h0, out.hn, work);
      if constexpr (Cell::cell_state) pass_states(p.c0, out.cn, work);
      return;
    }
    Arena tape_arena(tape_memory);
    const bool whole = keep && !p_.recompute;  // the tape holds all, else h and marks, or nothing
    std::vector<Layer> tape = keep ? layers(tape_arena) : std::vector<Layer>(static_cast<size_t>(L_));
    if (!keep)
      for (int64_t l = 1; l < L_; ++l) tape[static_cast<size_t>(l)].input = work.take<Storage>(E_ * T_ * B_ * wide_);
    for (int64_t l = 0; l < L_; ++l) {
      const size_t mark = work.mark();
      Layer& layer = tape[static_cast<size_t>(l)];
      if (!whole) gates(layer, T_, out.cells.data, work);
      const bool last = l == L_ - 1, marked = keep && p_.recompute, tokens = l == 0 && p.tokens.data;
      const int64_t W_in = l == 0 ? I_ : D_ * H_, in = up(W_in);
      const Storage* x = tokens ? nullptr : input(p, tape, l, work);
      const Weights W = tokens ? Weights() : padded_weights(&Params::W, W_in, in, p, l, work);
      multiply_inputs(p, l, x, in, W, context_products(p, l, work), whole_walk(), layer.gx, work);
      Math* bias = biases(p, l, work);
      const Storage* h0 = states(p.h0, l, work);
      const Storage* c0 = Cell::cell_state ? states(p.c0, l, work) : nullptr;
      Storage* hn = work.take<Storage>(sets_ * B_ * H_);
      Storage* cn = work.take<Storage>(sets_ * B_ * H_);
      // where y goes: to the caller if the kernels can write it there, else to the next layer's input or a copy
      Storage* y = nullptr;
      int64_t y_t = B_ * wide_, y_b = wide_, y_e = T_ * B_ * wide_, y_d = H_;
      bool direct = false;
      if (marked) {
        y = layer.h;
      } else if (last) {
        direct = out.y.data && out.y.stride[3] == 1;
        if (direct) {
          y = static_cast<Storage*>(out.y.data);
          y_t = out.y.stride[0], y_e = out.y.stride[1], y_b = out.y.stride[2];
        } else {
          y = work.take<Storage>(E_ * y_e);
        }
      } else {
        y = tape[static_cast<size_t>(l + 1)].input;
      }
      if (!last && wide_ != D_ * H_) queue_.fill(y, 0, static_cast<size_t>(E_ * y_e) * sizeof(Storage));
      if (whole && p_.lengths.data)
        queue_.fill(layer.prev, 0, static_cast<size_t>(sets_ * T_ * B_ * pitch_) * sizeof(Storage));
      ForwardArgs<T> a = {};
      a.Tn = static_cast<int>(T_), a.B = static_cast<int>(B_), a.H = static_cast<int>(H_),
      a.pitch = static_cast<int>(pitch_);
      a.sets = static_cast<int>(sets_), a.directions = static_cast<int>(D_);
      a.reverse = p_.reverse, a.reset_to_initial = p_.reset_to_initial, a.keep = whole || out.cells.data;
      a.wide = aligned(y, {y_t, y_b, y_e, y_d});
      a.clip_cell = static_cast<float>(p_.clip_cell);
      a.gx = layer.gx, a.extra = layer.extra, a.cells = layer.cells, a.prev = layer.prev;
      a.h0 = h0, a.c0 = c0, a.y = y, a.hn = hn, a.cn = cn;
      a.y_t = y_t, a.y_b = y_b, a.y_e = y_e, a.y_d = y_d;
      rows(a);
      a.late = late_;
      if constexpr (Cell::cell_state)
        if (marked && parts_ > 1) a.marks = layer.marks, a.marks_shift = shift_, a.slots = static_cast<int>(parts_ - 1);
      run_forward(a, bias, p, l, work);
      give_states(out.hn, hn, l);
      if constexpr (Cell::cell_state) give_states(out.cn, cn, l);
      if (last && !direct && out.y.data) give(Array<4>{y, {y_t, y_e, y_b, 1}}, out.y, D_ * H_, false);
      if (out.cells.data) {
        Array<4> to{static_cast<Storage*>(out.cells.data) + l * out.cells.stride[0],
                    {out.cells.stride[1], out.cells.stride[2], out.cells.stride[3], out.cells.stride[4]}};
        for (int64_t d = 0; d < D_; ++d) {
          Array<4> part = to;
          part.data = static_cast<Storage*>(to.data) + d * H_ * to.stride[3];
          const Array<4> from = Cell::cell_state ? Array<4>{layer.cells + d * T_ * B_ * pitch_,
                                                            {B_ * pitch_, D_ * T_ * B_ * pitch_, pitch_, 1}}
                                                 : Array<4>{y + d * y_d, {y_t, y_e, y_b, 1}};
          give(from, part, H_, true);
        }
      }
      if (!last && !marked && p_.dropout > 0) run_dropout(y, l);
      work.release(mark);
    }
  }

  void backward(const Arguments& p, const void* tape_memory, const Results& g, const Arguments& dp, Arena& work) {
    if (T_ * B_ == 0) {
      pass_states(g.hn, dp.h0, work);
      if constexpr (Cell::cell_state) pass_states(g.cn, dp.c0, work);
      for (int64_t n = 0; dp.params && n < L_ * D_; ++n) zero(dp.params[n], n < D_ ? I_ : D_ * H_);
      for (const Array<3>& a : dp.context_weights) zero(a, G, H_, p_.sizes.K);
      zero(dp.context, 1, B_, p_.sizes.K);
      return;
    }
    Arena tape_arena(const_cast<void*>(tape_memory));
    std::vector<Layer> tape = layers(tape_arena);
    // The gradient of what layer l gives to the next (E,T,B,wide). Two: of two directions one writes where the other
    // has yet to read, unless all is read at once.
    const bool swap = D_ == 2 && parts_ > 1;
    Storage* dy_next = L_ > 1 ? work.take<Storage>(E_ * T_ * B_ * wide_) : nullptr;
    Storage* dy_other = L_ > 1 && swap ? work.take<Storage>(E_ * T_ * B_ * wide_) : dy_next;
    for (int64_t l = L_ - 1; l >= 0; --l) {
      const size_t mark = work.mark();
      const Layer& layer = tape[static_cast<size_t>(l)];
      BackwardArgs<T> a = {};
      Strided dy, dcells;
      if (l == L_ - 1) {
        if (g.y.data) dy = gradient(g.y, work);
      } else {
        if (p_.dropout > 0) run_dropout(dy_next, l);
        dy = gradient(Array<4>{dy_next, {B_ * wide_, T_ * B_ * wide_, wide_, 1}}, work);
      }
      if (g.cells.data)
        dcells = gradient(Array<4>{static_cast<Storage*>(g.cells.data) + l * g.cells.stride[0],
                                   {g.cells.stride[1], g.cells.stride[2], g.cells.stride[3], g.cells.stride[4]}},
                          work);
      const int64_t W_in = l == 0 ? I_ : D_ * H_, in = up(W_in);
      const bool want_x = l > 0 || dp.x.data, rebuild = p_.recompute && Cell::kept > 0;
      bool want_W = false;
      for (int64_t d = 0; d < D_; ++d) want_W |= dp.params && dp.params[l * D_ + d].W.data;
      const bool tokens = l == 0 && p.tokens.data;
      const Storage* x = (want_W || rebuild) && !tokens ? input(p, tape, l, work) : nullptr;
      Weights W, R;
      if (want_x || (rebuild && !tokens)) W = padded_weights(&Params::W, W_in, in, p, l, work);
      const int choice = std::get<1>(pick_backward(Backwards()));
      if (Cell::state_product && (choice < 0 || rebuild)) R = padded_weights(&Params::R, H_, pitch_, p, l, work);
      const Math* bias = rebuild ? biases(p, l, work) : nullptr;
      const std::vector<const Math*> context = rebuild ? context_products(p, l, work) : std::vector<const Math*>();
      const Storage* h0 = p_.recompute ? states(p.h0, l, work) : nullptr;

      Layer part_tape = layer;
      Storage *da = nullptr, *da_h = nullptr, *c_enters = nullptr;
      Math* carry = nullptr;
      if (p_.recompute) {  // gradients go where the gates were
        gates(part_tape, every_, true, work);
        da = part_tape.gx, da_h = part_tape.extra;
        if (Cell::cell_state) c_enters = work.take<Storage>(sets_ * B_ * H_);
        if (parts_ > 1) carry = work.take<Math>(4 * sets_ * B_ * H_);
      } else {
        da = work.take<Storage>(sets_ * T_ * B_ * G * pitch_);
        da_h = kTwoSums ? work.take<Storage>(sets_ * T_ * B_ * pitch_) : nullptr;
      }
      Storage* dh0 = work.take<Storage>(sets_ * B_ * H_);
      Storage* dc0 = work.take<Storage>(sets_ * B_ * H_);
      a.B = static_cast<int>(B_), a.H = static_cast<int>(H_), a.pitch = static_cast<int>(pitch_);
      a.sets = static_cast<int>(sets_), a.directions = static_cast<int>(D_);
      a.reverse = p_.reverse, a.reset_to_initial = p_.reset_to_initial, a.wide = dy.wide;
      a.clip_cell = static_cast<float>(p_.clip_cell), a.clip_grad = static_cast<float>(p_.clip_grad);
      a.gx = part_tape.gx, a.extra = part_tape.extra, a.cells = part_tape.cells, a.prev = part_tape.prev;
      a.c0 = Cell::cell_state ? states(p.c0, l, work) : nullptr;
      a.dhn = states(g.hn, l, work);
      a.dcn = Cell::cell_state ? states(g.cn, l, work) : nullptr;
      a.dh0 = dh0, a.dc0 = dc0, a.da = da, a.da_h = da_h, a.c_enters = c_enters;
      rows(a);
      a.late = late_;
      prepare_backward(choice, a, p, l, work);
      Storage* dx = !want_x ? nullptr : l > 0 ? dy_other : work.take<Storage>(E_ * T_ * B_ * in);
      if (want_x && swap) queue_.fill(dx, 0, static_cast<size_t>(E_ * T_ * B_ * in) * sizeof(Storage));
      Gradients sums = gradients(p, dp, l, in, work);

      for (int64_t j = parts_ - 1; j >= 0; --j) {
        const size_t part_mark = work.mark();
        const Part part = part_of(j);
        if (rebuild) multiply_inputs(p, l, x, in, W, context, part, part_tape.gx, work);
        if (p_.recompute) rebuild_tape(layer, part_tape, part, R, bias, h0, a.c0, c_enters, work);
        a.Tn = static_cast<int>(part.n);
        a.begin = static_cast<int>(part.begin[0]), a.begin_d = static_cast<int>(part.begin[1] - part.begin[0]);
        const auto from = [&](const Strided& v) { return v.data ? v.data + part.begin[0] * v.t : nullptr; };
        a.dy = from(dy), a.dy_t = dy.t, a.dy_b = dy.b, a.dy_e = dy.e, a.dy_d = dy.d + a.begin_d * dy.t;
        a.dcells = from(dcells), a.dcells_t = dcells.t, a.dcells_b = dcells.b, a.dcells_e = dcells.e,
        a.dcells_d = dcells.d + a.begin_d * dcells.t;
        a.carry_in = j < parts_ - 1 ? carry : nullptr, a.carry_out = j > 0 ? carry : nullptr;
        run_backward(choice, a, R, work);
        const int64_t steps = part.n * B_, row = G * pitch_;
        if (want_x)
          for (int64_t d = 0; d < D_; ++d)
            queue_.template product<T, T>({steps, in, row, da + d * steps * row, row, D_ * steps * row, false,
                                           W[static_cast<size_t>(d)], in, row * in, false, dx + part.begin[d] * B_ * in,
                                           in, T_ * B_ * in, E_, d > 0 || swap});
        add_gradients(sums, p, dp, l, x, in, part_tape, da, da_h, part, work);
        work.release(part_mark);
      }
      give_states(dp.h0, dh0, l);
      if constexpr (Cell::cell_state) give_states(dp.c0, dc0, l);
      if (want_x && l == 0) give(Array<4>{dx, {B_ * in, T_ * B_ * in, in, 1}}, dp.x, I_, false);
      give_gradients(dp, l, sums, W_in, in, work);
      if (l == 0 && p.context.data) context_gradients(p, sums.dz, dp, work);
      std::swap(dy_next, dy_other);
      work.release(mark);
    }
  }

  // Tangents of the results along v. Float32 and float64: a type is its own arithmetic. tape: what hvp needs is kept,
  // in memory of `work` that stays.
  void jvp(const Arguments& p, const Arguments& v, const Results& out, Arena& work,
           std::vector<DualTape<Math>>* tape = nullptr)
    requires(std::is_same_v<T, Full>)
  {
    if (T_ * B_ == 0) {
      pass_states(v.h0, out.hn, work);
      if constexpr (Cell::cell_state) pass_states(v.c0, out.cn, work);
      return;
    }
    const int64_t steps = T_ * B_, row = G * pitch_, set = steps * row;
    const std::vector<Params> none(static_cast<size_t>(L_ * D_));
    const Params* const params[2] = {p.params, v.params ? v.params : none.data()};
    // what goes from layer to layer, twice: (E,T,B,wide)
    Math* buffers[2][2] = {};
    for (auto& of_layer : buffers)
      for (Math*& plane : of_layer) plane = work.take<Math>(E_ * steps * wide_);
    if (tape)
      for (int64_t l = 0; l < L_; ++l) tape->push_back(dual_tape(l, work));
    for (int64_t l = 0; l < L_; ++l) {
      const size_t mark = work.mark();
      Math *const *from = buffers[l % 2], *const *y = buffers[(l + 1) % 2];
      JvpArgs<Math> a{};
      a.keep = tape;
      if (tape) {
        const DualTape<Math>& own = (*tape)[static_cast<size_t>(l)];
        from = own.input;
        if (l < L_ - 1) y = (*tape)[static_cast<size_t>(l + 1)].input;
        for (int q = 0; q < 2; ++q)
          a.gx[q] = own.gx[q], a.extra[q] = own.extra[q], a.prev[q] = own.prev[q], a.cells[q] = own.cells[q];
      } else {
        for (Math*& plane : a.gx) plane = work.take<Math>(sets_ * set);
        if (Cell::cell_state && out.cells.data) a.cells[1] = work.take<Math>(sets_ * steps * pitch_);
      }
      jvp_inputs(p, v, params, from, l, a.gx, work);
      for (int q = 0; q < 2; ++q) {
        const Arguments& of = q ? v : p;
        a.bias[q] = of.params ? biases(of, l, work) : nullptr;
        a.h0[q] = states(of.h0, l, work), a.c0[q] = Cell::cell_state ? states(of.c0, l, work) : nullptr;
        a.y[q] = y[q];
        if (wide_ != D_ * H_) queue_.fill(y[q], 0, static_cast<size_t>(E_ * steps * wide_) * sizeof(Math));
      }
      a.y_t = B_ * wide_, a.y_b = wide_, a.y_e = steps * wide_, a.y_d = H_;
      Math* hn = work.take<Math>(sets_ * B_ * H_);
      Math* cn = work.take<Math>(sets_ * B_ * H_);
      a.hn = hn, a.cn = cn;
      a.clip_cell = static_cast<Math>(p_.clip_cell);
      jvp_steps(a, params, l, work);
      give_states(out.hn, hn, l);
      if constexpr (Cell::cell_state) give_states(out.cn, cn, l);
      const Array<4> whole{y[1], {a.y_t, a.y_e, a.y_b, 1}};
      if (l == L_ - 1 && out.y.data) give(whole, out.y, D_ * H_, false);
      if (out.cells.data) {
        const int64_t* s = out.cells.stride;
        for (int64_t d = 0; d < D_; ++d) {
          const Array<4> to{static_cast<Math*>(out.cells.data) + l * s[0] + d * H_ * s[4], {s[1], s[2], s[3], s[4]}};
          give(Cell::cell_state
                   ? Array<4>{a.cells[1] + d * steps * pitch_, {B_ * pitch_, D_ * steps * pitch_, pitch_, 1}}
                   : Array<4>{y[1] + d * H_, {a.y_t, a.y_e, a.y_b, 1}},
               to, H_, true);
        }
      }
      if (l < L_ - 1 && p_.dropout > 0)
        for (int q = 0; q < 2; ++q) run_dropout(y[q], l);
      work.release(mark);
    }
  }

  // Tangents of the gradients dp of g, along v of p and t of g; and those of the results, if `out` wants them.
  void hvp(const Arguments& p, const Arguments& v, const Results& g, const Results& t, const Arguments& dp,
           const Results& out, Arena& work)
    requires(std::is_same_v<T, Full>)
  {
    if (T_ * B_ == 0) {
      jvp(p, v, out, work);
      backward(p, nullptr, t, dp, work);
      return;
    }
    const int64_t steps = T_ * B_, row = G * pitch_, set = steps * row;
    const std::vector<Params> none(static_cast<size_t>(L_ * D_));
    const Params* const params[2] = {p.params, v.params ? v.params : none.data()};
    std::vector<DualTape<Math>> tape;
    jvp(p, v, out, work, &tape);
    Math* below[2];  // the gradient of what a layer gives to the next: (E,T,B,wide)
    for (Math*& plane : below) plane = L_ > 1 ? work.take<Math>(E_ * steps * wide_) : nullptr;
    for (int64_t l = L_ - 1; l >= 0; --l) {
      const size_t mark = work.mark();
      const DualTape<Math>& own = tape[static_cast<size_t>(l)];
      HvpArgs<Math> a{};
      for (int q = 0; q < 2; ++q) {
        const Results& given = q ? t : g;
        const Arguments& of = q ? v : p;
        if (l < L_ - 1) {
          if (p_.dropout > 0) run_dropout(below[q], l);
          a.dy[q] = over_time(gradient(Array<4>{below[q], {B_ * wide_, steps * wide_, wide_, 1}}, work));
        } else if (given.y.data) {
          a.dy[q] = over_time(gradient(given.y, work));
        }
        if (const Array<5>& c = given.cells; c.data)
          a.dcells[q] = over_time(gradient(Array<4>{static_cast<Math*>(c.data) + l * c.stride[0],
                                                    {c.stride[1], c.stride[2], c.stride[3], c.stride[4]}},
                                           work));
        a.gx[q] = own.gx[q], a.extra[q] = own.extra[q], a.cells[q] = own.cells[q], a.prev[q] = own.prev[q];
        a.c0[q] = Cell::cell_state ? states(of.c0, l, work) : nullptr;
        a.dhn[q] = states(given.hn, l, work);
        a.dcn[q] = Cell::cell_state ? states(given.cn, l, work) : nullptr;
        a.da[q] = work.take<Math>(sets_ * set);
        a.da_h[q] = kTwoSums ? work.take<Math>(sets_ * steps * pitch_) : nullptr;
      }
      Math* dh0 = work.take<Math>(sets_ * B_ * H_);
      Math* dc0 = work.take<Math>(sets_ * B_ * H_);
      a.dh0 = dh0, a.dc0 = dc0;
      a.clip_cell = static_cast<Math>(p_.clip_cell), a.clip_grad = static_cast<Math>(p_.clip_grad);
      hvp_steps(a, params, l, work);
      give_states(dp.h0, dh0, l);
      if constexpr (Cell::cell_state) give_states(dp.c0, dc0, l);

      const int64_t W_in = l == 0 ? I_ : D_ * H_;
      const int64_t in = up(W_in);
      const bool tokens = l == 0 && p.tokens.data, tangent_x = l > 0 || v.x.data;
      if (l > 0 || dp.x.data) {
        Math* dx[2] = {below[0], l > 0 ? below[1] : work.take<Math>(E_ * steps * in)};
        for (int64_t d = 0; d < D_; ++d) {
          const Array<3>& other = params[1][l * D_ + d].W;
          const Math* W = padded_weights(params[0][l * D_ + d].W, W_in, in, work);
          const auto multiply = [&](const Math* da, const Math* w, Math* to, bool add) {
            queue_.template product<T, T>({steps, in, row, da + d * set, row, D_ * set, false, w, in, row * in, false,
                                           to, in, steps * in, E_, add});
          };
          if (l > 0) multiply(a.da[0], W, dx[0], d > 0);
          multiply(a.da[1], W, dx[1], d > 0);
          if (other.data) multiply(a.da[0], padded_weights(other, W_in, in, work), dx[1], true);
        }
        if (l == 0) give(Array<4>{dx[1], {B_ * in, steps * in, in, 1}}, dp.x, I_, false);
      }
      if (dp.params) {
        bool bias = false;
        for (int64_t d = 0; d < D_; ++d) bias |= dp.params[l * D_ + d].bW.data || dp.params[l * D_ + d].bR.data;
        if (bias) {
          Math* db = work.take<Math>(sets_ * row);
          Math* db_h = kTwoSums ? work.take<Math>(sets_ * pitch_) : nullptr;
          column_sums(a.da[1], steps, row, db, 0, work);
          if (kTwoSums) column_sums(a.da_h[1], steps, pitch_, db_h, 0, work);
          for (int64_t d = 0; d < D_; ++d) give_biases(dp.params[l * D_ + d], db, db_h, d);
        }
        const Math* x[2] = {own.input[0], own.input[1]};
        if (l == 0) {
          bool want_W = false;
          for (int64_t d = 0; d < D_; ++d) want_W |= dp.params[d].W.data != nullptr;
          x[0] = want_W && !tokens ? input(p, {}, 0, work) : nullptr;
          x[1] = want_W && !tokens && tangent_x ? input(v, {}, 0, work) : nullptr;
        }
        for (int64_t d = 0; d < D_; ++d) {
          const size_t before = work.mark();
          const Params& to = dp.params[l * D_ + d];
          if (to.W.data) {
            Math* dW = work.take<Math>(E_ * row * in);
            const auto multiply = [&](const Math* da, const Math* of, bool add) {
              queue_.template product<T, T>({row, in, steps, da + d * set, row, D_ * set, true, of, in, steps * in,
                                             false, dW, in, row * in, E_, add});
            };
            if (tokens) {
              token_gradient(p, a.da[1] + d * set, 0, T_, dW, in, false);
            } else {
              multiply(a.da[1], x[0], false);
              if (tangent_x) multiply(a.da[0], x[1], true);
            }
            give_weights(to.W, dW, W_in, in);
          }
          if (to.R.data) {
            Math* dR = work.take<Math>(E_ * row * pitch_);
            const int64_t own_gates = kTwoSums || Cell::two_products ? G - 1 : G;
            // rows [first, first + gates) of dR from that many gates of da, and what they were multiplied by
            const auto multiply = [&](int64_t first, int64_t gates, Math* const(&da)[2], int64_t da_first,
                                      int64_t da_row, Math* const(&of)[2]) {
              for (int q = 0; q < 2; ++q)
                queue_.template product<T, T>(
                    {gates * pitch_, pitch_, steps, da[1 - q] + d * steps * da_row + da_first * pitch_, da_row,
                     D_ * steps * da_row, true, of[q] + d * steps * pitch_, pitch_, D_ * steps * pitch_, false,
                     dR + first * pitch_ * pitch_, pitch_, row * pitch_, E_, q > 0});
            };
            multiply(0, own_gates, a.da, 0, row, own.prev);
            if (kTwoSums) multiply(own_gates, 1, a.da_h, 0, pitch_, own.prev);
            if (Cell::two_products) multiply(own_gates, 1, a.da, own_gates, row, own.extra);
            give_weights(to.R, dR, H_, pitch_);
          }
          work.release(before);
        }
      }
      if (l == 0 && p.context.data) hvp_context(p, v, a.da, dp, work);
      work.release(mark);
    }
  }

  size_t tape_bytes() {
    Arena arena(nullptr);
    layers(arena);
    return arena.most();
  }

  // The route that forward or backward takes.
  Route forward_route() const { return std::get<0>(pick_forward(Forwards())); }
  Route backward_route() const { return std::get<0>(pick_backward(Backwards())); }

 private:
  static constexpr int64_t G = Cell::gates;
  static constexpr bool kTwoSums = Cell::sums > Cell::gates;
  static constexpr bool kKeepsExtra = Cell::kept > Cell::gates || Cell::two_products;

  struct Layer {
    Storage *input = nullptr, *gx = nullptr, *extra = nullptr, *cells = nullptr, *prev = nullptr;
    Storage* h = nullptr;  // recompute: (E,T,B,wide), what the layer gives before dropout
    Math* marks = nullptr;
  };
  using Weights = std::vector<const Storage*>;  // by direction
  // A part of the walk, of so many steps; where it begins on the time axis, in each direction.
  struct Part {
    int64_t index, n, begin[2];
  };
  // Sums over steps of one layer: (E,G,pitch,in), (E,G,pitch,pitch) by direction; (parts,sets,G,pitch),
  // (parts,sets,pitch).
  struct Gradients {
    Math *dW[2] = {}, *dR[2] = {}, *db = nullptr, *db_h = nullptr;
    Math* dz = nullptr;  // what a context is part of (D,E,B,G,pitch)
    bool bias = false, bias_h = false;
  };
  struct Strided {
    const Storage* data = nullptr;
    int64_t t = 0, b = 0, e = 0, d = 0;
    bool wide = false;
  };

  static int64_t up(int64_t n) { return (n + 7) / 8 * 8; }
  static int64_t blocks_for(int64_t n) {
    const int64_t b = (n + kArrangeThreads - 1) / kArrangeThreads;
    return b < 1 ? 1 : b > 2048 ? 2048 : b;
  }
  bool aligned(const void* data, const std::initializer_list<int64_t>& strides) const {
    const int64_t per = 16 / static_cast<int64_t>(sizeof(Storage));
    bool ok = H_ % per == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (const int64_t s : strides) ok &= s % per == 0;
    return ok;
  }

  bool walks_backwards(int64_t d) const { return D_ == 2 ? d == 1 : p_.reverse; }
  Part part_of(int64_t j) const {
    const int64_t at = j * every_, n = T_ - at < every_ ? T_ - at : every_;
    Part part{j, n, {}};
    for (int64_t d = 0; d < 2; ++d) part.begin[d] = walks_backwards(d < D_ ? d : 0) ? T_ - at - n : at;
    return part;
  }
  Part whole_walk() const { return {0, T_, {}}; }

  // The tape.
  std::vector<Layer> layers(Arena& arena) {
    std::vector<Layer> tape(static_cast<size_t>(L_));
    for (int64_t l = 0; l < L_; ++l) {
      Layer& layer = tape[static_cast<size_t>(l)];
      if (p_.recompute) {
        layer.h = arena.take<Storage>(E_ * T_ * B_ * wide_);
        if (Cell::cell_state && parts_ > 1) layer.marks = arena.take<Math>(sets_ * (parts_ - 1) * B_ * H_);
      } else {
        if (l > 0) layer.input = arena.take<Storage>(E_ * T_ * B_ * wide_);
        gates(layer, T_, true, arena);
      }
    }
    return tape;
  }
  // What forward makes beside h, for so many steps; `all` of it, or only what it cannot do without.
  void gates(Layer& layer, int64_t steps, bool all, Arena& arena) {
    const int64_t n = sets_ * steps * B_;
    layer.gx = arena.take<Storage>(n * G * pitch_);
    if (!all) return;
    if (kKeepsExtra) layer.extra = arena.take<Storage>(n * pitch_);
    if (Cell::cell_state) layer.cells = arena.take<Storage>(n * pitch_);
    layer.prev = arena.take<Storage>(n * pitch_);
  }

  template <class Args>
  void rows(Args& a) const {
    a.lengths = static_cast<const int64_t*>(p_.lengths.data);
    a.len_e = p_.lengths.stride[0], a.len_b = p_.lengths.stride[1];
    a.reset = static_cast<const u8*>(p_.reset.data);
    a.reset_t = p_.reset.stride[0], a.reset_e = p_.reset.stride[1], a.reset_b = p_.reset.stride[2];
  }

  // ---- arrays
  template <class From, class To>
  void copy(const void* from, const Extent4& from_stride, void* to, const Extent4& to_stride, const Extent4& n,
            const Extent4& valid, bool masked = false, bool sum = false) {
    Copy<From, To> k{};
    k.from = static_cast<const typename From::Storage*>(from);
    k.to = static_cast<typename To::Storage*>(to);
    k.n = n, k.valid = valid, k.from_stride = from_stride, k.to_stride = to_stride;
    k.sum = sum;
    if (masked && p_.lengths.data) {
      k.lengths = static_cast<const int64_t*>(p_.lengths.data);
      k.len_e = p_.lengths.stride[0], k.len_b = p_.lengths.stride[1];
    }
    queue_.run(k, blocks_for(n.n[0] * n.n[1] * n.n[2] * n.n[3]));
  }

  // A layer's input as (E,T,B,in), zero past a row's end.
  const Storage* input(const Arguments& p, const std::vector<Layer>& tape, int64_t l, Arena& work) {
    if (l > 0) {
      const Layer& layer = tape[static_cast<size_t>(l)];
      const Storage* h = tape[static_cast<size_t>(l - 1)].h;
      if (!p_.recompute || layer.input || p_.dropout <= 0) return layer.input ? layer.input : h;
      Storage* to = work.take<Storage>(E_ * T_ * B_ * wide_);
      copy<T, T>(h, {{0, 0, wide_, 1}}, to, {{0, 0, wide_, 1}}, {{1, 1, E_ * T_ * B_, wide_}},
                 {{1, 1, E_ * T_ * B_, wide_}});
      run_dropout(to, l - 1);
      return to;
    }
    const int64_t in = up(I_);
    const int64_t* s = p.x.stride;
    const bool as_it_is = !p_.lengths.data && in == I_ && s[3] == 1 && s[2] == I_ && (T_ == 1 || s[0] == B_ * I_) &&
                          (E_ == 1 || s[1] == T_ * B_ * I_) && reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0;
    if (as_it_is) return static_cast<const Storage*>(p.x.data);
    Storage* to = work.take<Storage>(E_ * T_ * B_ * in);
    copy<T, T>(p.x.data, {{s[1], s[0], s[2], s[3]}}, to, {{T_ * B_ * in, B_ * in, in, 1}}, {{E_, T_, B_, in}},
               {{E_, T_, B_, I_}}, true);
    return to;
  }

  // gx of layer l for the steps of a part (sets,n,B,G,pitch): its input x (E,T,B,in) times W^T, or columns of W for
  // tokens, and the context's share.
  void multiply_inputs(const Arguments& p, int64_t l, const Storage* x, int64_t in, const Weights& W,
                       const std::vector<const Math*>& context, const Part& part, Storage* gx, Arena& work) {
    const int64_t steps = part.n * B_, row = G * pitch_;
    const bool tokens = l == 0 && p.tokens.data;
    for (int64_t d = 0; d < D_; ++d) {
      Storage* to = gx + d * steps * row;
      if (!tokens)
        queue_.template product<T, T>({steps, row, in, x + part.begin[d] * B_ * in, in, T_ * B_ * in, false,
                                       W[static_cast<size_t>(d)], in, row * in, true, to, row, D_ * steps * row, E_,
                                       false});
      if (tokens || (l == 0 && p.context.data))
        add_inputs(p, tokens ? &p.params[d].W : nullptr, context[static_cast<size_t>(d)], part.begin[d], part.n, to,
                   work);
    }
  }
  // Into n steps of layer 0's gx, from step `first` on: columns of W, or with W null what is there; plus the context's
  // share (E,B,G,pitch), if any.
  void add_inputs(const Arguments& p, const Array<3>* W, const Math* context, int64_t first, int64_t n, Storage* gx,
                  Arena& work) {
    InputSum<T> k{};
    if (W) {
      const int64_t* s = W->stride;
      k.tokens = tokens_of(p, first);
      k.W = static_cast<const Storage*>(W->data);
      k.w_e = s[0], k.w_gate = H_ * s[1], k.w_unit = s[1], k.w_token = s[2];
      if (T_ * B_ > I_ && s[1] != 1) {  // what is read several times, in one piece
        Storage* turned = work.take<Storage>(E_ * I_ * G * pitch_);
        copy<T, T>(W->data, {{s[0], s[2], H_ * s[1], s[1]}}, turned, {{I_ * G * pitch_, G * pitch_, pitch_, 1}},
                   {{E_, I_, G, pitch_}}, {{E_, I_, G, H_}});
        k.W = turned, k.w_e = I_ * G * pitch_, k.w_gate = pitch_, k.w_unit = 1, k.w_token = G * pitch_;
      }
    }
    k.context = context, k.gx = gx, k.gx_e = D_ * n * B_ * G * pitch_;
    k.E = static_cast<int>(E_), k.Tn = static_cast<int>(n), k.B = static_cast<int>(B_), k.gates = static_cast<int>(G),
    k.H = static_cast<int>(H_), k.pitch = static_cast<int>(pitch_);
    k.wrong = late_ ? late_ + 1 : nullptr;
    queue_.run(k, std::min<int64_t>(E_ * n * B_, 4096));
  }
  Tokens tokens_of(const Arguments& p, int64_t first) const {
    const int64_t* s = p.tokens.stride;
    return {p.tokens.data,
            options_.tokens,
            first,
            s[0],
            s[1],
            s[2],
            I_,
            static_cast<const int64_t*>(p_.lengths.data),
            p_.lengths.stride[0],
            p_.lengths.stride[1]};
  }
  // dW (E,G,pitch,in) of layer 0 in one direction, from da of n steps; with `add` added to it.
  void token_gradient(const Arguments& p, const Storage* da, int64_t first, int64_t n, Math* dW, int64_t in, bool add) {
    TokenGradient<T> k{};
    k.tokens = tokens_of(p, first);
    k.da = da, k.da_e = D_ * n * B_ * G * pitch_, k.dW = dW, k.dW_row = in;
    k.E = static_cast<int>(E_), k.gates = static_cast<int>(G), k.H = static_cast<int>(H_),
    k.pitch = static_cast<int>(pitch_), k.steps = n * B_, k.B = static_cast<int>(B_), k.add = add;
    k.columns = (I_ + k.kTokens - 1) / k.kTokens, k.rows = (G * pitch_ + k.kThreads - 1) / k.kThreads;
    queue_.run(k, std::min<int64_t>(E_ * k.columns * k.rows, 65535));
  }

  // The context (E,B,K), and its weights of direction d (E,G,pitch,K), in what sums are kept in.
  const Math* context_rows(const Arguments& p, Arena& work) {
    const int64_t K = p_.sizes.K, *s = p.context.stride;
    Math* to = work.take<Math>(E_ * B_ * K);
    copy<T, Full>(p.context.data, {{s[0], 0, s[1], s[2]}}, to, {{B_ * K, 0, K, 1}}, {{E_, 1, B_, K}}, {{E_, 1, B_, K}});
    return to;
  }
  const Math* context_weights(const Arguments& p, int64_t d, Arena& work) {
    const int64_t K = p_.sizes.K, *s = p.context_weights[d].stride;
    Math* to = work.take<Math>(E_ * G * pitch_ * K);
    copy<T, Full>(p.context_weights[d].data, {{s[0], H_ * s[1], s[1], s[2]}}, to, {{G * pitch_ * K, pitch_ * K, K, 1}},
                  {{E_, G, pitch_, K}}, {{E_, G, H_, K}});
    return to;
  }
  // context W_c^T (E,B,G,pitch) of direction d.
  const Math* context_product(const Arguments& p, int64_t d, Arena& work) {
    const int64_t K = p_.sizes.K, row = G * pitch_;
    const Math *context = context_rows(p, work), *W = context_weights(p, d, work);
    Math* to = work.take<Math>(E_ * B_ * row);
    queue_.template product<Full, Full>(
        {B_, row, K, context, K, B_ * K, false, W, K, row * K, true, to, row, B_ * row, E_, false});
    return to;
  }
  // Of both directions, where layer l sees a context.
  std::vector<const Math*> context_products(const Arguments& p, int64_t l, Arena& work) {
    std::vector<const Math*> to(static_cast<size_t>(D_), nullptr);
    for (int64_t d = 0; d < D_ && l == 0 && p.context.data; ++d)
      to[static_cast<size_t>(d)] = context_product(p, d, work);
    return to;
  }
  // dz (E,B,G,pitch) of direction d, from da of n steps; with `add` added to it.
  void context_sum(const Storage* da, int64_t n, Math* dz, bool add) {
    const int64_t row = B_ * G * pitch_;
    queue_.run(StepSum<T>{da, D_ * n * row, dz, static_cast<int>(E_), static_cast<int>(n), row, add},
               blocks_for(E_ * row));
  }
  // Of the context and its weights, from dz (D,E,B,G,pitch).
  void context_gradients(const Arguments& p, const Math* dz, const Arguments& dp, Arena& work) {
    const int64_t K = p_.sizes.K, row = G * pitch_;
    const bool wanted = dp.context.data;
    Math* sum = wanted ? work.take<Math>(E_ * B_ * K) : nullptr;
    for (int64_t d = 0; d < D_; ++d) {
      const size_t mark = work.mark();
      const Math* own = dz + d * E_ * B_ * row;
      if (dp.context_weights[d].data) {
        const Math* context = context_rows(p, work);
        Math* dW = work.take<Math>(E_ * row * K);
        queue_.template product<Full, Full>(
            {row, K, B_, own, row, B_ * row, true, context, K, B_ * K, false, dW, K, row * K, E_, false});
        give_weights(dp.context_weights[d], dW, K, K);
      }
      if (wanted)
        queue_.template product<Full, Full>({B_, K, row, own, row, B_ * row, false, context_weights(p, d, work), K,
                                             row * K, false, sum, K, B_ * K, E_, d > 0});
      work.release(mark);
    }
    const int64_t* s = dp.context.stride;
    if (wanted)
      copy<Full, T>(sum, {{B_ * K, 0, K, 1}}, dp.context.data, {{s[0], 0, s[1], s[2]}}, {{E_, 1, B_, K}},
                    {{E_, 1, B_, K}}, false, E_ > 1 && s[0] == 0);
  }

  // Both planes of gx: x W^T; x' W^T + x W'^T. from: what the layer below gave.
  void jvp_inputs(const Arguments& p, const Arguments& v, const Params* const (&params)[2], Math* const* from,
                  int64_t l, Math* const (&gx)[2], Arena& work) {
    const int64_t steps = T_ * B_, row = G * pitch_, set = steps * row;
    const bool tokens = l == 0 && p.tokens.data;
    const int64_t in = l == 0 ? up(I_) : wide_;
    const Math* x[2] = {from[0], from[1]};
    if (l == 0) {
      x[0] = tokens ? nullptr : input(p, {}, 0, work);
      x[1] = tokens || !v.x.data ? nullptr : input(v, {}, 0, work);
    }
    queue_.fill(gx[1], 0, static_cast<size_t>(sets_ * set) * sizeof(Math));
    for (int64_t d = 0; d < D_; ++d) {
      const Math* W[2] = {};
      for (int q = 0; q < 2 && !tokens; ++q)
        if (const Array<3>& w = params[q][l * D_ + d].W; w.data)
          W[q] = padded_weights(w, l == 0 ? I_ : D_ * H_, in, work);
      const auto multiply = [&](const Math* a, const Math* b, Math* to, bool add) {
        queue_.template product<T, T>(
            {steps, row, in, a, in, steps * in, false, b, in, row * in, true, to + d * set, row, D_ * set, E_, add});
      };
      if (!tokens) multiply(x[0], W[0], gx[0], false);
      if (!tokens && (l > 0 || v.x.data)) multiply(x[1], W[0], gx[1], true);
      if (!tokens && params[1][l * D_ + d].W.data) multiply(x[0], W[1], gx[1], true);
      if (l > 0 || (!tokens && !p.context.data)) continue;
      Math* context[2] = {};
      if (p.context.data) {
        const int64_t K = p_.sizes.K;
        for (Math*& plane : context) plane = work.take<Math>(E_ * B_ * row);
        const auto add = [&](const Arguments& c, const Arguments& w, Math* to, bool sum) {
          queue_.template product<Full, Full>({B_, row, K, context_rows(c, work), K, B_ * K, false,
                                               context_weights(w, d, work), K, row * K, true, to, row, B_ * row, E_,
                                               sum});
        };
        add(p, p, context[0], false);
        queue_.fill(context[1], 0, static_cast<size_t>(E_ * B_ * row) * sizeof(Math));
        if (v.context.data) add(v, p, context[1], true);
        if (v.context_weights[d].data) add(p, v, context[1], true);
      }
      for (int q = 0; q < 2; ++q) {
        const Array<3>& own = params[q][d].W;
        const bool columns = tokens && own.data;
        if (columns || p.context.data)
          add_inputs(p, columns ? &own : nullptr, context[q], 0, T_, gx[q] + d * set, work);
      }
    }
  }

  // Memory for layer l of what hvp keeps.
  DualTape<Math> dual_tape(int64_t l, Arena& work) {
    DualTape<Math> tape{};
    const int64_t n = sets_ * T_ * B_;
    for (int q = 0; q < 2; ++q) {
      if (l > 0) tape.input[q] = work.take<Math>(E_ * T_ * B_ * wide_);
      tape.gx[q] = work.take<Math>(n * G * pitch_);
      if (kKeepsExtra) tape.extra[q] = work.take<Math>(n * pitch_);
      if (Cell::cell_state) tape.cells[q] = work.take<Math>(n * pitch_);
      tape.prev[q] = work.take<Math>(n * pitch_);
      // what no step writes, and products read
      queue_.fill(tape.prev[q], 0, static_cast<size_t>(n * pitch_) * sizeof(Math));
      if (Cell::two_products) queue_.fill(tape.extra[q], 0, static_cast<size_t>(n * pitch_) * sizeof(Math));
    }
    return tape;
  }
  static OverTime<Math> over_time(const Strided& g) { return {g.data, g.t, g.b, g.e, g.d}; }

  void hvp_steps(HvpArgs<Math>& a, const Params* const (&params)[2], int64_t l, Arena& work) {
    const int64_t state = sets_ * B_ * pitch_, row = G * pitch_, blocks = blocks_for(state);
    Math *product[2], *product_r[2] = {};
    for (int q = 0; q < 2; ++q) {
      a.operand[q] = work.take<Math>(state * G);
      a.product[q] = product[q] = work.take<Math>(state);
      if (Cell::two_products) a.product_r[q] = product_r[q] = work.take<Math>(state);
      for (Math** one : {&a.dh[q], &a.dc[q], &a.dh_first[q], &a.dc_first[q]}) *one = work.take<Math>(state);
    }
    std::vector<const Math*> R(static_cast<size_t>(2 * D_));
    for (int64_t n = 0; Cell::state_product && n < 2 * D_; ++n)
      if (const Array<3>& w = params[n / D_][l * D_ + n % D_].R; w.data)
        R[static_cast<size_t>(n)] = padded_weights(w, H_, pitch_, work);
    a.w = dual_walk(T_);
    // da R; da' R + da R': of `gates` gates from `first` on
    const auto multiply = [&](int64_t first, int64_t gates, Math* const(&to)[2]) {
      for (int64_t d = 0; d < D_; ++d) {
        const auto one = [&](const Math* da, const Math* w, Math* sum, bool add) {
          queue_.template product<T, T>({B_, pitch_, gates * pitch_, da + d * B_ * row + first * pitch_, row,
                                         D_ * B_ * row, false, w + first * pitch_ * pitch_, pitch_, row * pitch_, false,
                                         sum + d * B_ * pitch_, pitch_, D_ * B_ * pitch_, E_, add});
        };
        one(a.operand[0], R[static_cast<size_t>(d)], to[0], false);
        one(a.operand[1], R[static_cast<size_t>(d)], to[1], false);
        if (params[1][l * D_ + d].R.data) one(a.operand[0], R[static_cast<size_t>(D_ + d)], to[1], true);
      }
    };
    const int64_t own = Cell::two_products ? G - 1 : G;
    queue_.run(HvpStep<Cell, Math>{a}, blocks);
    for (int64_t s = T_ - 1; s >= -1; --s) {
      a.w.s = static_cast<int>(s);
      queue_.run(HvpStep<Cell, Math>{a}, blocks);
      if (s < 0) break;
      if constexpr (Cell::two_products) {
        multiply(own, 1, product_r);
        queue_.run(HvpGate<Cell, Math>{a}, blocks);
      }
      if constexpr (Cell::state_product) multiply(0, own, product);
    }
  }

  void hvp_context(const Arguments& p, const Arguments& v, Math* const (&da)[2], const Arguments& dp, Arena& work) {
    const int64_t K = p_.sizes.K, row = G * pitch_;
    const bool wanted = dp.context.data;
    Math* sum = wanted ? work.take<Math>(E_ * B_ * K) : nullptr;
    for (int64_t d = 0; d < D_; ++d) {
      const size_t mark = work.mark();
      Math* dz[2];
      for (int q = 0; q < 2; ++q) {
        dz[q] = work.take<Math>(E_ * B_ * row);
        context_sum(da[q] + d * T_ * B_ * row, T_, dz[q], false);
      }
      if (dp.context_weights[d].data) {
        Math* dW = work.take<Math>(E_ * row * K);
        const auto add = [&](const Math* of, const Arguments& c, bool more) {
          queue_.template product<T, T>(
              {row, K, B_, of, row, B_ * row, true, context_rows(c, work), K, B_ * K, false, dW, K, row * K, E_, more});
        };
        add(dz[1], p, false);
        if (v.context.data) add(dz[0], v, true);
        give_weights(dp.context_weights[d], dW, K, K);
      }
      const auto add = [&](const Math* of, const Arguments& w, bool more) {
        queue_.template product<T, T>({B_, K, row, of, row, B_ * row, false, context_weights(w, d, work), K, row * K,
                                       false, sum, K, B_ * K, E_, more});
      };
      if (wanted) add(dz[1], p, d > 0);
      if (wanted && v.context_weights[d].data) add(dz[0], v, true);
      work.release(mark);
    }
    const int64_t* s = dp.context.stride;
    if (wanted)
      copy<T, T>(sum, {{B_ * K, 0, K, 1}}, dp.context.data, {{s[0], 0, s[1], s[2]}}, {{E_, 1, B_, K}}, {{E_, 1, B_, K}},
                 false, E_ > 1 && s[0] == 0);
  }

  Walk dual_walk(int64_t s) const {
    Walk w{};
    w.Tn = static_cast<int>(T_), w.B = static_cast<int>(B_), w.H = static_cast<int>(H_),
    w.pitch = static_cast<int>(pitch_), w.sets = static_cast<int>(sets_), w.directions = static_cast<int>(D_),
    w.s = static_cast<int>(s), w.reverse = p_.reverse, w.reset_to_initial = p_.reset_to_initial;
    rows(w);
    return w;
  }

  void jvp_steps(JvpArgs<Math>& a, const Params* const (&params)[2], int64_t l, Arena& work) {
    const int64_t state = sets_ * B_ * pitch_, row = G * pitch_, blocks = blocks_for(state);
    Math *product[2], *last[2] = {};
    for (int q = 0; q < 2; ++q) {
      a.product[q] = product[q] = work.take<Math>(state * G);
      a.h[q] = work.take<Math>(state), a.c[q] = work.take<Math>(state);
      if (!Cell::two_products) continue;
      a.product_last[q] = last[q] = work.take<Math>(state);
      a.rh[q] = work.take<Math>(state), a.z[q] = work.take<Math>(state);
    }
    std::vector<const Math*> R(static_cast<size_t>(2 * D_));
    for (int64_t n = 0; Cell::state_product && n < 2 * D_; ++n)
      if (const Array<3>& w = params[n / D_][l * D_ + n % D_].R; w.data)
        R[static_cast<size_t>(n)] = padded_weights(w, H_, pitch_, work);
    a.w = dual_walk(-1);
    // h R^T; h' R^T + h R'^T: `gates` of them from gate `first` on
    const auto multiply = [&](Math* const(&h)[2], Math* const(&to)[2], int64_t first, int64_t gates, int64_t to_row) {
      for (int64_t d = 0; d < D_; ++d) {
        const auto one = [&](const Math* from, const Math* w, Math* sum, bool add) {
          queue_.template product<T, T>({B_, gates * pitch_, pitch_, from + d * B_ * pitch_, pitch_, D_ * B_ * pitch_,
                                         false, w + first * pitch_ * pitch_, pitch_, row * pitch_, true,
                                         sum + d * B_ * to_row, to_row, D_ * B_ * to_row, E_, add});
        };
        const Array<3>& tangent = params[1][l * D_ + d].R;
        one(h[0], R[static_cast<size_t>(d)], to[0], false);
        one(h[1], R[static_cast<size_t>(d)], to[1], false);
        if (tangent.data) one(h[0], R[static_cast<size_t>(D_ + d)], to[1], true);
      }
    };
    queue_.run(JvpStep<Cell, Math>{a}, blocks);
    for (int64_t s = 0; s < T_; ++s) {
      a.w.s = static_cast<int>(s);
      if constexpr (Cell::two_products) {
        multiply(a.h, product, 0, G - 1, row);
        queue_.run(JvpGate<Cell, Math>{a}, blocks);
        multiply(a.rh, last, G - 1, 1, pitch_);
      } else if constexpr (Cell::state_product) {
        multiply(a.h, product, 0, G, row);
      }
      queue_.run(JvpStep<Cell, Math>{a}, blocks);
    }
  }

  // W or R (E,G*H,columns) as (E,G,pitch,to_columns), of both directions.
  Weights padded_weights(Array<3> Params::* of, int64_t columns, int64_t to_columns, const Arguments& p, int64_t l,
                         Arena& work) {
    Weights to;
    for (int64_t d = 0; d < D_; ++d) to.push_back(padded_weights(p.params[l * D_ + d].*of, columns, to_columns, work));
    return to;
  }
  const Storage* padded_weights(const Array<3>& w, int64_t columns, int64_t to_columns, Arena& work) {
    const int64_t* s = w.stride;
    if (pitch_ == H_ && columns == to_columns && s[2] == 1 && s[1] == columns &&
        (E_ == 1 || s[0] == G * H_ * columns) && reinterpret_cast<uintptr_t>(w.data) % 16 == 0)
      return static_cast<const Storage*>(w.data);
    Storage* to = work.take<Storage>(E_ * G * pitch_ * to_columns);
    copy<T, T>(w.data, {{s[0], H_ * s[1], s[1], s[2]}}, to,
               {{G * pitch_ * to_columns, pitch_ * to_columns, to_columns, 1}}, {{E_, G, pitch_, to_columns}},
               {{E_, G, H_, columns}});
    return to;
  }

  Math* biases(const Arguments& p, int64_t l, Arena& work) {
    bool any = false;
    for (int64_t d = 0; d < D_; ++d) any |= p.params[l * D_ + d].bW.data || p.params[l * D_ + d].bR.data;
    if (!any) return nullptr;
    Math* to = work.take<Math>(sets_ * Cell::sums * pitch_);
    for (int64_t d = 0; d < D_; ++d) {
      const Params& w = p.params[l * D_ + d];
      Biases<Cell, T> k{};
      k.bW = static_cast<const Storage*>(w.bW.data), k.bR = static_cast<const Storage*>(w.bR.data);
      k.bW_e = w.bW.stride[0], k.bW_n = w.bW.stride[1], k.bR_e = w.bR.stride[0], k.bR_n = w.bR.stride[1];
      k.to = to ? to + d * Cell::sums * pitch_ : nullptr;
      k.to_e = D_ * Cell::sums * pitch_;
      k.E = static_cast<int>(E_), k.H = static_cast<int>(H_), k.pitch = static_cast<int>(pitch_);
      queue_.run(k, blocks_for(E_ * pitch_));
    }
    return to;
  }

  // Rows of layer l of (L*D,E,B,H) as (sets,B,H), and back.
  const Storage* states(const Array<4>& from, int64_t l, Arena& work) {
    if (!from.data) return nullptr;
    Storage* to = work.take<Storage>(sets_ * B_ * H_);
    const int64_t* s = from.stride;
    copy<T, T>(static_cast<const Storage*>(from.data) + l * D_ * s[0], {{s[1], s[0], s[2], s[3]}}, to,
               {{D_ * B_ * H_, B_ * H_, H_, 1}}, {{E_, D_, B_, H_}}, {{E_, D_, B_, H_}});
    return to;
  }
  void give_states(const Array<4>& to, const Storage* from, int64_t l) {
    if (!to.data) return;
    const int64_t* s = to.stride;
    copy<T, T>(from, {{D_ * B_ * H_, B_ * H_, H_, 1}}, static_cast<Storage*>(to.data) + l * D_ * s[0],
               {{s[1], s[0], s[2], s[3]}}, {{E_, D_, B_, H_}}, {{E_, D_, B_, H_}}, false, E_ > 1 && s[1] == 0);
  }
  // Without a step: what comes out is what went in, or zero.
  void pass_states(const Array<4>& from, const Array<4>& to, Arena& work) {
    for (int64_t l = 0; to.data && l < L_; ++l) {
      const Storage* v = states(from, l, work);
      if (!v) {
        Storage* zeros = work.take<Storage>(sets_ * B_ * H_);
        queue_.fill(zeros, 0, static_cast<size_t>(sets_ * B_ * H_) * sizeof(Storage));
        v = zeros;
      }
      give_states(to, v, l);
    }
  }
  // Zeros in (E,blocks*rows,columns). (No element is valid, so every one is written as zero.)
  void zero(const Array<3>& a, int64_t blocks, int64_t rows, int64_t columns) {
    const int64_t* s = a.stride;
    if (a.data) copy<T, T>(a.data, {}, a.data, {{s[0], rows * s[1], s[1], s[2]}}, {{E_, blocks, rows, columns}}, {});
  }
  // In all of these weights' gradients.
  void zero(const Params& to, int64_t columns) {
    zero(to.W, G, H_, columns);
    zero(to.R, G, H_, H_);
    for (const Array<2>* a : {&to.bW, &to.bR})
      if (a->data) copy<T, T>(a->data, {}, a->data, {{a->stride[0], 0, 0, a->stride[1]}}, {{E_, 1, 1, G * H_}}, {});
  }
  // (T,E,B,columns) to (T,E,B,columns).
  void give(const Array<4>& from, const Array<4>& to, int64_t columns, bool masked) {
    const int64_t *f = from.stride, *s = to.stride;
    copy<T, T>(from.data, {{f[1], f[0], f[2], f[3]}}, to.data, {{s[1], s[0], s[2], s[3]}}, {{E_, T_, B_, columns}},
               {{E_, T_, B_, columns}}, masked, E_ > 1 && s[1] == 0);
  }
  // A gradient (T,E,B,D*H) as the kernels can read it: in place, or as (sets,T,B,pitch).
  Strided gradient(const Array<4>& g, Arena& work) {
    const int64_t* s = g.stride;
    if (s[3] == 1 && aligned(g.data, {s[0], s[1], s[2]}))
      return {static_cast<const Storage*>(g.data), s[0], s[2], s[1], H_, true};
    Storage* to = work.take<Storage>(sets_ * T_ * B_ * pitch_);
    for (int64_t d = 0; d < D_; ++d)
      copy<T, T>(static_cast<const Storage*>(g.data) + d * H_ * s[3], {{s[1], s[0], s[2], s[3]}},
                 to ? to + d * T_ * B_ * pitch_ : nullptr, {{D_ * T_ * B_ * pitch_, B_ * pitch_, pitch_, 1}},
                 {{E_, T_, B_, pitch_}}, {{E_, T_, B_, H_}});
    return {to, B_ * pitch_, pitch_, D_ * T_ * B_ * pitch_, T_ * B_ * pitch_, true};
  }

  void run_dropout(Storage* v, int64_t l) {
    queue_.run(Dropout<T>{v, static_cast<int>(E_), static_cast<int>(T_), static_cast<int>(B_),
                          static_cast<int>(D_ * H_), static_cast<int>(wide_), static_cast<int>(l), p_.dropout, p_.seed},
               blocks_for(E_ * T_ * B_ * D_ * H_));
  }

  // Where sums over steps go, of what is wanted of layer l.
  Gradients gradients(const Arguments& p, const Arguments& dp, int64_t l, int64_t in, Arena& work) {
    Gradients to;
    if (l == 0 && p.context.data) to.dz = work.take<Math>(sets_ * B_ * G * pitch_);
    if (!dp.params) return to;
    bool bias = false, bias_h = false;
    for (int64_t d = 0; d < D_; ++d) {
      const Params& w = dp.params[l * D_ + d];
      if (w.W.data) to.dW[d] = work.take<Math>(E_ * G * pitch_ * in);
      if (w.R.data) to.dR[d] = work.take<Math>(E_ * G * pitch_ * pitch_);
      bias |= w.bW.data || w.bR.data;
      bias_h |= kTwoSums && w.bR.data;
    }
    if (bias) to.db = work.take<Math>(parts_ * sets_ * G * pitch_);
    if (bias_h) to.db_h = work.take<Math>(parts_ * sets_ * pitch_);
    to.bias = bias, to.bias_h = bias_h;
    return to;
  }

  // A part's share of the sums.
  void add_gradients(const Gradients& to, const Arguments& p, const Arguments& dp, int64_t l, const Storage* x,
                     int64_t in, const Layer& tape, const Storage* da, const Storage* da_h, const Part& part,
                     Arena& work) {
    const int64_t steps = part.n * B_, row = G * pitch_;
    const bool add = part.index < parts_ - 1;
    for (int64_t d = 0; d < D_ && l == 0 && p.context.data; ++d)
      context_sum(da + d * steps * row, part.n, to.dz + d * E_ * B_ * row, add);
    if (!dp.params) return;
    const Params* params = dp.params + l * D_;
    for (int64_t d = 0; d < D_; ++d) {
      const Storage* da_d = da + d * steps * row;
      if (params[d].W.data && l == 0 && p.tokens.data)
        token_gradient(p, da_d, part.begin[d], part.n, to.dW[d], in, add);
      else if (params[d].W.data)
        queue_.template product<T, Full>({row, in, steps, da_d, row, D_ * steps * row, true,
                                          x + part.begin[d] * B_ * in, in, T_ * B_ * in, false, to.dW[d], in, row * in,
                                          E_, add});
      if (!params[d].R.data) continue;
      Math* dR = to.dR[d];
      const Storage* prev = tape.prev + d * steps * pitch_;
      const int64_t own = kTwoSums || Cell::two_products ? G - 1 : G;  // gates whose da goes with h of the step before
      queue_.template product<T, Full>({own * pitch_, pitch_, steps, da_d, row, D_ * steps * row, true, prev, pitch_,
                                        D_ * steps * pitch_, false, dR, pitch_, row * pitch_, E_, add});
      if (kTwoSums)
        queue_.template product<T, Full>({pitch_, pitch_, steps, da_h + d * steps * pitch_, pitch_, D_ * steps * pitch_,
                                          true, prev, pitch_, D_ * steps * pitch_, false, dR + own * pitch_ * pitch_,
                                          pitch_, row * pitch_, E_, add});
      if (Cell::two_products)
        queue_.template product<T, Full>({pitch_, pitch_, steps, da_d + own * pitch_, row, D_ * steps * row, true,
                                          tape.extra + d * steps * pitch_, pitch_, D_ * steps * pitch_, false,
                                          dR + own * pitch_ * pitch_, pitch_, row * pitch_, E_, add});
    }
    if (to.bias) column_sums(da, steps, row, to.db, part.index, work);
    if (to.bias_h) column_sums(da_h, steps, pitch_, to.db_h, part.index, work);
  }

  void give_gradients(const Arguments& dp, int64_t l, const Gradients& sums, int64_t W_in, int64_t in, Arena& work) {
    if (!dp.params) return;
    const Math* db = sums.bias ? sum_of_parts(sums.db, G * pitch_, work) : nullptr;
    const Math* db_h = sums.bias_h ? sum_of_parts(sums.db_h, pitch_, work) : nullptr;
    for (int64_t d = 0; d < D_; ++d) {
      const Params& to = dp.params[l * D_ + d];
      if (to.W.data) give_weights(to.W, sums.dW[d], W_in, in);
      if (to.R.data) give_weights(to.R, sums.dR[d], H_, pitch_);
      give_biases(to, db, db_h, d);
    }
  }
  void give_biases(const Params& to, const Math* db, const Math* db_h, int64_t d) {
    for (const Array<2>* b : {&to.bW, &to.bR}) {
      if (!b->data) continue;
      const bool sum = E_ > 1 && b->stride[0] == 0;
      const int64_t own = kTwoSums && b == &to.bR ? G - 1 : G;
      copy<Full, T>(db + d * G * pitch_, {{D_ * G * pitch_, 0, pitch_, 1}}, b->data,
                    {{b->stride[0], 0, H_ * b->stride[1], b->stride[1]}}, {{E_, 1, own, H_}}, {{E_, 1, own, H_}}, false,
                    sum);
      if (own < G)
        copy<Full, T>(db_h + d * pitch_, {{D_ * pitch_, 0, 0, 1}},
                      static_cast<Storage*>(b->data) + own * H_ * b->stride[1], {{b->stride[0], 0, 0, b->stride[1]}},
                      {{E_, 1, 1, H_}}, {{E_, 1, 1, H_}}, false, sum);
    }
  }
  void give_weights(const Array<3>& to, const Math* from, int64_t columns, int64_t from_columns) {
    const int64_t* s = to.stride;
    copy<Full, T>(from, {{G * pitch_ * from_columns, pitch_ * from_columns, from_columns, 1}}, to.data,
                  {{s[0], H_ * s[1], s[1], s[2]}}, {{E_, G, H_, columns}}, {{E_, G, H_, columns}}, false,
                  E_ > 1 && s[0] == 0);
  }
  // to[part] (sets,columns) = the sum of v (sets,rows,columns) over its rows.
  void column_sums(const Storage* v, int64_t rows, int64_t columns, Math* to, int64_t part, Arena& work) {
    const int parts = static_cast<int>(rows < 64 ? 1 : 64);
    Math* partial = work.take<Math>(sets_ * parts * columns);
    queue_.run(ColumnSum<T, Full>{v, partial, static_cast<int>(sets_), parts, rows, columns},
               blocks_for(sets_ * parts * columns));
    queue_.run(ColumnSum<Full, Full>{partial, to + part * sets_ * columns, static_cast<int>(sets_), 1, parts, columns},
               blocks_for(sets_ * columns));
  }
  const Math* sum_of_parts(const Math* v, int64_t columns, Arena& work) {
    if (parts_ == 1) return v;
    Math* sums = work.take<Math>(sets_ * columns);
    queue_.run(ColumnSum<Full, Full>{v, sums, 1, 1, parts_, sets_ * columns}, blocks_for(sets_ * columns));
    return sums;
  }

  // ---- recompute
  // The tape of a part, as forward would have written it; gx holds the inputs' sums.
  void rebuild_tape(const Layer& from, const Layer& to, const Part& part, const Weights& R, const Math* bias,
                    const Storage* h0, const Storage* c0, Storage* c_enters, Arena& work) {
    const int64_t steps = part.n * B_, row = G * pitch_;
    RebuildArgs<Cell, T> a{};
    ForwardArgs<T> f{};
    f.Tn = static_cast<int>(T_), f.B = static_cast<int>(B_), f.H = static_cast<int>(H_),
    f.pitch = static_cast<int>(pitch_);
    f.sets = static_cast<int>(sets_), f.directions = static_cast<int>(D_);
    f.reverse = p_.reverse, f.reset_to_initial = p_.reset_to_initial;
    rows(f);
    a.w = walk(f);
    a.n = static_cast<int>(part.n), a.index = static_cast<int>(part.index);
    a.begin = static_cast<int>(part.begin[0]), a.begin_d = static_cast<int>(part.begin[1] - part.begin[0]);
    a.slots = static_cast<int>(parts_ - 1), a.clip_cell = static_cast<Math>(p_.clip_cell), a.bias = bias;
    a.h = from.h, a.h_t = B_ * wide_, a.h_b = wide_, a.h_e = T_ * B_ * wide_, a.h_d = H_;
    a.h0 = h0, a.c0 = c0, a.marks = from.marks;
    a.gx = to.gx, a.extra = to.extra, a.cells = to.cells, a.prev = to.prev, a.c_enters = c_enters;
    const int64_t blocks = blocks_for(sets_ * steps * pitch_);
    queue_.run(RebuildBefore<Cell, T>{a}, blocks);
    if constexpr (Cell::kept > 0) {
      const int64_t first = Cell::two_products ? G - 1 : G;
      const auto multiply = [&](const Storage* operand, int64_t gate, int64_t count) {
        Math* product = work.take<Math>(sets_ * steps * count * pitch_);
        for (int64_t d = 0; d < D_; ++d)
          queue_.template product<T, Full>(
              {steps, count * pitch_, pitch_, operand + d * steps * pitch_, pitch_, D_ * steps * pitch_, false,
               R[static_cast<size_t>(d)] + gate * pitch_ * pitch_, pitch_, row * pitch_, true,
               product + d * steps * count * pitch_, count * pitch_, D_ * steps * count * pitch_, E_, false});
        return product;
      };
      if (Cell::state_product) a.product = multiply(to.prev, 0, first);
      queue_.run(RebuildGates<Cell, T, false>{a}, blocks);
      if constexpr (Cell::two_products) {
        a.product_last = multiply(to.extra, first, 1);
        queue_.run(RebuildGates<Cell, T, true>{a}, blocks);
      }
      if constexpr (Cell::cell_state) queue_.run(RebuildCells<Cell, T>{a}, blocks_for(sets_ * B_ * pitch_));
    }
  }

  // ---- routes
  bool allowed(Route route) const { return options_.route < 0 || options_.route == static_cast<int>(route); }

  // The route and the place in the list of the cheapest kernel; stepwise where none fits.
  using Choice = std::tuple<Route, int>;
  template <class... S>
  Choice pick_forward(List<S...>) const {
    return cheapest({{S::kRoute, forward_cost<S>(device_, B_, H_, sets_)}...});
  }
  template <class... S>
  Choice pick_backward(List<S...>) const {
    return cheapest({{S::kRoute, backward_cost<S>(device_, B_, H_, sets_)}...});
  }
  Choice cheapest(std::initializer_list<std::pair<Route, double>> kernels) const {  // cost 0: does not fit
    Choice best{Route::stepwise, -1};
    double cost = allowed(Route::stepwise) ? stepwise_cost(G, B_, H_, sets_, sizeof(Storage)) : 0;
    int n = 0;
    for (const auto& [route, c] : kernels) {
      if (c > 0 && allowed(route) && (cost == 0 || c < cost)) cost = c, best = {route, n};
      ++n;
    }
    return best;
  }

  // R of every set, packed for S.
  template <class Pack>
  const U4* pack(const Arguments& p, int64_t l, int peers, Arena& work) {
    U4* to = work.take<U4>(Pack::pieces(peers) * sets_);
    for (int64_t d = 0; d < D_; ++d) {
      const Array<3>& R = p.params[l * D_ + d].R;
      for (int64_t e = 0; e < E_; ++e)
        queue_.run(Pack{{static_cast<const Storage*>(R.data) + e * R.stride[0], 0, R.stride[1], R.stride[2],
                         to ? to + (e * D_ + d) * Pack::pieces(peers) : nullptr, static_cast<int>(H_), peers, 1}},
                   blocks_for(Pack::pieces(peers)));
    }
    return to;
  }

  void run_forward(ForwardArgs<T>& a, const Math* bias, const Arguments& p, int64_t l, Arena& work) {
    const int n = std::get<1>(pick_forward(Forwards()));
    if (n < 0)
      stepwise_forward(a, bias, p, l, work);
    else
      persistent_forward(Forwards(), n, a, bias, p, l, work);
  }
  template <class... S>
  void persistent_forward(List<S...>, [[maybe_unused]] int n, [[maybe_unused]] ForwardArgs<T>& a,
                          [[maybe_unused]] const Math* bias, [[maybe_unused]] const Arguments& p,
                          [[maybe_unused]] int64_t l, [[maybe_unused]] Arena& work) {
    [[maybe_unused]] int at = 0;
    ((at++ == n ? persistent_forward_by<S>(a, bias, p, l, work) : void()), ...);
  }
  template <class S>
  void persistent_forward_by(ForwardArgs<T>& a, const Math* bias, const Arguments& p, int64_t l, Arena& work) {
    a.bias = bias;
    a.peers = S::kRoute == Route::single ? 1 : static_cast<int>((H_ + S::kUnits - 1) / S::kUnits);
    a.row_tiles = static_cast<int>((B_ + S::kRows - 1) / S::kRows);
    a.weights = pack<PackForward<S>>(p, l, a.peers, work);
    if (S::kRoute == Route::grid) {
      const int64_t pieces = sets_ * (T_ + 1) * a.row_tiles * (pitch_ / T::kPer) * S::kRows;
      a.hand_off = work.take<U4>(pieces);
      queue_.fill(a.hand_off, 0xFF, static_cast<size_t>(pieces) * sizeof(U4));
    }
    run_teams<Forward<S>, S::kRoute>(a);
  }
  template <class K, Route kRoute, class Args>
  void run_teams(Args& a) {
    const int64_t teams = sets_ * a.row_tiles,
                  at_once = kRoute == Route::grid ? teams_at_once(device_, a.peers) : teams;
    for (int64_t n = 0; n < teams; n += at_once) {
      a.first_team = static_cast<int>(n);
      queue_.run(K{a}, (teams - n < at_once ? teams - n : at_once) * a.peers, kRoute == Route::cluster ? a.peers : 0,
                 kRoute == Route::grid);
    }
  }

  // What all parts of the walk share; then a part.
  void prepare_backward(int choice, BackwardArgs<T>& a, const Arguments& p, int64_t l, Arena& work) {
    persistent_backward(Backwards(), choice, [&]<class S>() {
      a.peers = S::kRoute == Route::single ? 1 : static_cast<int>((H_ + S::kUnits - 1) / S::kUnits);
      a.row_tiles = static_cast<int>((B_ + S::kRows - 1) / S::kRows);
      a.weights = pack<PackBackward<S>>(p, l, a.peers, work);
      if (S::kRoute == Route::grid) a.hand_off = work.take<U4>(hand_off_pieces<S>(a, every_));
    });
  }
  void run_backward(int choice, BackwardArgs<T>& a, const Weights& R, Arena& work) {
    if (choice < 0) stepwise_backward(a, R, work);
    persistent_backward(Backwards(), choice, [&]<class S>() {
      if (S::kRoute == Route::grid)
        queue_.fill(a.hand_off, 0xFF, static_cast<size_t>(hand_off_pieces<S>(a, a.Tn)) * sizeof(U4));
      run_teams<Backward<S>, S::kRoute>(a);
    });
  }
  template <class S>
  int64_t hand_off_pieces(const BackwardArgs<T>& a, int64_t steps) const {
    return sets_ * steps * a.row_tiles * (G * pitch_ / T::kPer) * S::kRows;
  }
  // f for the chosen shape; for none where the choice is -1.
  template <class... S, class F>
  void persistent_backward(List<S...>, [[maybe_unused]] int choice, [[maybe_unused]] const F& f) {
    [[maybe_unused]] int at = 0;
    ((at++ == choice ? f.template operator()<S>() : void()), ...);
  }

  template <class Args>
  Walk walk(const Args& a) const {
    return {a.Tn,      a.B,     a.H,     a.pitch, a.sets,    a.directions, -1,        a.reverse, a.reset_to_initial,
            a.lengths, a.len_e, a.len_b, a.reset, a.reset_t, a.reset_e,    a.reset_b, 0,         0};
  }

  void stepwise_forward(const ForwardArgs<T>& f, const Math* bias, const Arguments& p, int64_t l, Arena& work) {
    const int64_t state = sets_ * B_ * pitch_, row = G * pitch_;
    StepForwardArgs<Cell, T> a{};
    a.w = walk(f);
    a.keep = f.keep, a.clip_cell = static_cast<Math>(p_.clip_cell), a.bias = bias;
    a.gx = f.gx, a.extra = f.extra, a.cells = f.cells, a.prev = f.prev;
    a.h0 = f.h0, a.c0 = f.c0, a.y = f.y, a.hn = f.hn, a.cn = f.cn;
    a.y_t = f.y_t, a.y_b = f.y_b, a.y_e = f.y_e, a.y_d = f.y_d;
    a.marks = f.marks, a.marks_shift = f.marks_shift, a.slots = f.slots;
    Math* product = work.take<Math>(state * G);
    Math* product_last = Cell::two_products ? work.take<Math>(state) : nullptr;
    a.product = product, a.product_last = product_last;
    a.h = work.take<Storage>(state);
    a.rh = Cell::two_products ? work.take<Storage>(state) : nullptr;
    a.h_full = work.take<Math>(state);
    a.c = work.take<Math>(state);
    if (f.keep && pitch_ != H_) {  // what no unit writes, and products read
      queue_.fill(a.prev, 0, static_cast<size_t>(sets_ * T_ * B_ * pitch_) * sizeof(Storage));
    }
    if (f.keep && Cell::two_products)
      queue_.fill(a.extra, 0, static_cast<size_t>(sets_ * T_ * B_ * pitch_) * sizeof(Storage));
    const int64_t blocks = blocks_for(state);
    if constexpr (Cell::state_product) {
      const Weights R = padded_weights(&Params::R, H_, pitch_, p, l, work);
      queue_.run(StepPrepare<Cell, T, false>{a}, blocks);
      const int64_t first = Cell::two_products ? G - 1 : G;
      for (int64_t s = 0; s < T_; ++s) {
        a.w.s = static_cast<int>(s);
        for (int64_t d = 0; d < D_; ++d)
          queue_.template product<T, Full>({B_, first * pitch_, pitch_, a.h + d * B_ * pitch_, pitch_, D_ * B_ * pitch_,
                                            false, R[static_cast<size_t>(d)], pitch_, row * pitch_, true,
                                            product + d * B_ * row, row, D_ * B_ * row, E_, false});
        if constexpr (Cell::two_products) {
          queue_.run(StepPrepare<Cell, T, true>{a}, blocks);
          for (int64_t d = 0; d < D_; ++d)
            queue_.template product<T, Full>({B_, pitch_, pitch_, a.rh + d * B_ * pitch_, pitch_, D_ * B_ * pitch_,
                                              false, R[static_cast<size_t>(d)] + first * pitch_ * pitch_, pitch_,
                                              row * pitch_, true, product_last + d * B_ * pitch_, pitch_,
                                              D_ * B_ * pitch_, E_, false});
        }
        queue_.run(StepForward<Cell, T>{a}, blocks);
      }
    } else {
      queue_.run(WalkForward<Cell, T>{a}, blocks);
    }
  }

  void stepwise_backward(const BackwardArgs<T>& b, const Weights& R, Arena& work) {
    const int64_t state = sets_ * B_ * pitch_, row = G * pitch_;
    StepBackwardArgs<Cell, T> a{};
    a.w = walk(b);
    a.w.begin = b.begin, a.w.begin_d = b.begin_d;
    a.carry_in = b.carry_in, a.carry_out = b.carry_out, a.c_enters = b.c_enters;
    a.clip_cell = static_cast<Math>(p_.clip_cell), a.clip_grad = static_cast<Math>(p_.clip_grad);
    a.gx = b.gx, a.extra = b.extra, a.cells = b.cells, a.prev = b.prev, a.c0 = b.c0;
    a.dy = b.dy, a.dcells = b.dcells, a.dhn = b.dhn, a.dcn = b.dcn, a.dh0 = b.dh0, a.dc0 = b.dc0;
    a.dy_t = b.dy_t, a.dy_b = b.dy_b, a.dy_e = b.dy_e, a.dy_d = b.dy_d;
    a.dcells_t = b.dcells_t, a.dcells_b = b.dcells_b, a.dcells_e = b.dcells_e, a.dcells_d = b.dcells_d;
    a.da = b.da, a.da_h = b.da_h;
    a.operand = work.take<Storage>(state * G);
    Math* product = work.take<Math>(state);
    Math* product_r = Cell::two_products ? work.take<Math>(state) : nullptr;
    a.product = product, a.product_r = product_r;
    a.dh = work.take<Math>(state), a.dc = work.take<Math>(state);
    a.dh_first = work.take<Math>(state), a.dc_first = work.take<Math>(state);
    const int64_t blocks = blocks_for(state);
    if constexpr (Cell::state_product) {
      const int64_t own = Cell::two_products ? G - 1 : G;
      a.w.s = b.Tn;
      queue_.run(StepBackward<Cell, T>{a}, blocks);
      for (int64_t s = b.Tn - 1; s >= -1; --s) {
        a.w.s = static_cast<int>(s);
        queue_.run(StepBackward<Cell, T>{a}, blocks);
        if (s < 0) break;
        if constexpr (Cell::two_products) {
          for (int64_t d = 0; d < D_; ++d)
            queue_.template product<T, Full>({B_, pitch_, pitch_, a.operand + d * B_ * row + own * pitch_, row,
                                              D_ * B_ * row, false, R[static_cast<size_t>(d)] + own * pitch_ * pitch_,
                                              pitch_, row * pitch_, false, product_r + d * B_ * pitch_, pitch_,
                                              D_ * B_ * pitch_, E_, false});
          queue_.run(StepBackwardGate<Cell, T>{a}, blocks);
        }
        for (int64_t d = 0; d < D_; ++d)
          queue_.template product<T, Full>({B_, pitch_, own * pitch_, a.operand + d * B_ * row, row, D_ * B_ * row,
                                            false, R[static_cast<size_t>(d)], pitch_, row * pitch_, false,
                                            product + d * B_ * pitch_, pitch_, D_ * B_ * pitch_, E_, false});
      }
    } else {
      queue_.run(WalkBackward<Cell, T>{a}, blocks);
    }
  }

  Queue& queue_;
  const Device& device_;
  const Options& options_;
  const Problem& p_;
  int* late_;
  int64_t T_, E_, B_, I_, H_, L_, D_, sets_, pitch_, wide_;
  int64_t every_, parts_ = 1;  // recompute: steps of a part of the walk, 1 << shift_; parts
  int shift_ = 0;
};

}  // namespace fusedrnn::cuda
