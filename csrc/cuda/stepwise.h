// SPDX-License-Identifier: Apache-2.0
// Formula: one step behind its product, sums = gx + bias + product, then the cell; backward: the cell, then a product.
// Shapes of forward.h and backward.h; product (sets,B,G,pitch) or (sets,B,pitch); states (sets,B,pitch), unrounded.
// Overwrites; the states in place.
// stepwise: 2 launches and a library product a step: float64, strict float32, reset before the product, all the rest.
// Limit: launches (a few us a step), then reading R every step.
#pragma once

#include "arrange.h"
#include "backward.h"
#include "forward.h"

namespace fusedrnn::cuda {

// The cells of one step: which of them this thread does, one after the other.
template <class F>
FUSEDRNN_DEVICE void each_cell(const Walk& w, const F& f) {
  const int64_t total = static_cast<int64_t>(w.sets) * w.B * w.pitch;
  for (int64_t at = static_cast<int64_t>(dev::block()) * 256 + dev::tid(); at < total;
       at += static_cast<int64_t>(dev::blocks()) * 256)
    f(static_cast<int>(at / w.pitch / w.B), static_cast<int>(at / w.pitch % w.B), static_cast<int>(at % w.pitch), at);
}

template <class T>
struct StepForwardArgs : ForwardArgs<T> {
  const MathOf<T>* product;       // (sets,B,G,pitch)
  const MathOf<T>* product_last;  // of the second product (sets,B,pitch)
  typename T::Storage *h, *rh;    // what the products multiply
  MathOf<T>*c, *h_full;           // states
};

// Before the first step (s = -1): the states. With two products, the gates in front of the second.
template <class Cell, class T, bool kGate>
struct StepPrepare {
  StepForwardArgs<T> a;
  static constexpr int kThreads = 256;
  FUSEDRNN_DEVICE void operator()() const {
    using Math = MathOf<T>;
    each_cell(a, [&](int set, int row, int unit, int64_t at) {
      if constexpr (kGate) {
        const int len = a.length(set, row);
        Math rh = 0;
        if (a.s < len && unit < a.H) {
          const int t = a.backwards(set) ? len - 1 - a.s : a.s;
          const int64_t step = (static_cast<int64_t>(set) * a.Tn + t) * a.B + row;
          typename T::Storage* const x = a.gx + step * Cell::gates * a.pitch + unit;
          const int64_t n = (static_cast<int64_t>(set) * a.B + row) * Cell::gates * a.pitch + unit;
          Math sums[2], r, z;
          FUSEDRNN_UNROLL
          for (int k = 0; k < 2; ++k)
            sums[k] = T::load(x[k * a.pitch]) + a.product[n + k * a.pitch] +
                      (a.bias ? a.bias[(static_cast<int64_t>(set) * Cell::sums + k) * a.pitch + unit] : Math(0));
          Cell::gate(sums[0], sums[1], a.h_full[at], r, z, rh);
          x[0] = T::store(r);
          x[a.pitch] = T::store(z);
        }
        a.rh[at] = T::operand(T::store(rh));
      } else {
        Math h = 0, c = 0;
        const int64_t from = (static_cast<int64_t>(set) * a.B + row) * a.H + unit;
        const bool fresh = a.restarts_at_once(set, row) && !a.reset_to_initial && a.length(set, row) > 0;
        if (unit < a.H && !fresh) {
          if (a.h0) h = T::load(a.h0[from]);
          if (a.c0) c = T::load(a.c0[from]);
        }
        a.h_full[at] = h;
        if constexpr (Cell::cell_state) a.c[at] = c;
        if constexpr (Cell::state_product) a.h[at] = T::operand(T::store(h));
      }
    });
  }
};

template <class Cell, class T>
struct StepForward {
  StepForwardArgs<T> a;
  static constexpr int kThreads = 256;
  FUSEDRNN_DEVICE void operator()() const {
    using Math = MathOf<T>;
    each_cell(a, [&](int set, int row, int unit, int64_t at) {
      if (unit >= a.H) return;
      const int len = a.length(set, row), s = a.s, t = s < len && a.backwards(set) ? len - 1 - s : s;
      const int64_t step = (static_cast<int64_t>(set) * a.Tn + t) * a.B + row;
      Math h = a.h_full[at];
      if (s < len) {
        const Math h_prev = h;
        Math c = 0;
        if constexpr (Cell::cell_state) c = a.c[at];
        typename T::Storage* const x = a.gx + step * Cell::gates * a.pitch + unit;
        const int64_t n = (static_cast<int64_t>(set) * a.B + row) * Cell::gates * a.pitch + unit;
        if (a.keep) a.prev[step * a.pitch + unit] = T::operand(T::store(h_prev));
        if constexpr (Cell::two_products) {
          const Math sum = T::load(x[2 * a.pitch]) + a.product_last[at] +
                           (a.bias ? a.bias[(static_cast<int64_t>(set) * Cell::sums + 2) * a.pitch + unit] : Math(0));
          Math new_gate;
          Cell::forward(sum, T::load(x[a.pitch]), h_prev, new_gate, h);
          x[2 * a.pitch] = T::store(new_gate);
          if (a.keep) a.extra[step * a.pitch + unit] = a.rh[at];
        } else {
          Math sums[Cell::sums], kept[Cell::kept + 1], c_new = 0;
          FUSEDRNN_UNROLL
          for (int k = 0; k < Cell::sums; ++k)
            sums[k] = a.bias ? a.bias[(static_cast<int64_t>(set) * Cell::sums + k) * a.pitch + unit] : Math(0);
          each<Cell::gates>([&](auto k) {
            constexpr int of_x = Cell::x_sum[k.value], of_h = Cell::h_sum[k.value];
            sums[of_x] += T::load(x[k.value * a.pitch]);
            if constexpr (Cell::state_product) sums[of_h] += a.product[n + k.value * a.pitch];
          });
          Cell::forward(sums, h_prev, c, a.clip_cell, kept, h, c_new);
          c = c_new;
          if (a.keep) {
            if constexpr (Cell::kept == 0) x[0] = T::store(h);
            FUSEDRNN_UNROLL
            for (int k = 0; k < Cell::gates && k < Cell::kept; ++k) x[k * a.pitch] = T::store(kept[k]);
            if constexpr (Cell::cell_state) a.cells[step * a.pitch + unit] = T::store(c);
            if constexpr (Cell::kept > Cell::gates) a.extra[step * a.pitch + unit] = T::store(kept[Cell::gates]);
          }
        }
        const int64_t out = (static_cast<int64_t>(set) * a.B + row) * a.H + unit;
        a.y[set / a.directions * a.y_e + set % a.directions * a.y_d + t * a.y_t + row * a.y_b + unit] = T::store(h);
        if (s == len - 1) write_last(out, h, c);
        if (a.cut(set, row, s, len)) {
          h = a.reset_to_initial && a.h0 ? T::load(a.h0[out]) : Math(0);
          c = a.reset_to_initial && a.c0 ? T::load(a.c0[out]) : Math(0);
        }
        a.h_full[at] = h;
        if constexpr (Cell::cell_state) {
          a.c[at] = c;
          const int n = a.marks && s + 1 < len ? mark_after(t, a.Tn, a.backwards(set), a.marks_shift) : -1;
          if (n >= 0) a.marks[((static_cast<int64_t>(set) * a.slots + n) * a.B + row) * a.H + unit] = c;
        }
        if constexpr (Cell::state_product) a.h[at] = T::operand(T::store(h));
      } else {
        a.y[set / a.directions * a.y_e + set % a.directions * a.y_d + t * a.y_t + row * a.y_b + unit] =
            T::store(Math(0));
        if (s == 0) {
          Math c = 0;
          if constexpr (Cell::cell_state) c = a.c[at];
          write_last((static_cast<int64_t>(set) * a.B + row) * a.H + unit, h, c);
        }
      }
    });
  }

 private:
  FUSEDRNN_DEVICE void write_last(int64_t at, MathOf<T> h, MathOf<T> c) const {
    if (a.hn) a.hn[at] = T::store(h);
    if constexpr (Cell::cell_state) {
      if (a.cn) a.cn[at] = T::store(c);
    }
  }
};

template <class T>
struct StepBackwardArgs : BackwardArgs<T> {
  typename T::Storage* operand;  // (sets,B,G,pitch): da of h's sums in this step, for the product
  const MathOf<T>* product;      // (sets,B,pitch): of the step after
  const MathOf<T>* product_r;    // of da_n with Rn (sets,B,pitch): two products only
  MathOf<T>*dh, *dc, *dh_first, *dc_first;
};

// Step s: takes what the step after it gave (dh, product), leaves dh, dc and da. s = Tn starts: dh = dhn. s = -1 ends:
// dh0.
template <class Cell, class T>
struct StepBackward {
  StepBackwardArgs<T> a;
  static constexpr int kThreads = 256;

  FUSEDRNN_DEVICE void operator()() const {
    using Math = MathOf<T>;
    each_cell(a, [&](int set, int row, int unit, int64_t at) {
      const int s = a.s, len = a.length(set, row);
      const int64_t out = (static_cast<int64_t>(set) * a.B + row) * a.H + unit;
      const bool real = unit < a.H;
      const int64_t states = static_cast<int64_t>(a.sets) * a.B * a.H;
      if (s == a.Tn) {
        const bool carried = real && a.carry_in;
        a.dh[at] = carried ? a.carry_in[out] : real && a.dhn ? T::load(a.dhn[out]) : Math(0);
        a.dh_first[at] = carried ? a.carry_in[2 * states + out] : Math(0);
        if constexpr (Cell::cell_state) {
          a.dc[at] = carried ? a.carry_in[states + out] : real && a.dcn ? T::load(a.dcn[out]) : Math(0);
          a.dc_first[at] = carried ? a.carry_in[3 * states + out] : Math(0);
        }
        return;
      }
      Math dh = a.dh[at], dc = 0;
      if (Cell::state_product && s + 1 < a.Tn) dh += a.product[at];
      if constexpr (Cell::cell_state) dc = a.dc[at];
      if (s < 0) {
        if (!real) return;
        Math h_first = a.dh_first[at], c_first = 0;
        if constexpr (Cell::cell_state) c_first = a.dc_first[at];
        if (len > 0 && a.restarts_at_once(set, row)) {
          if (a.reset_to_initial) {
            h_first += dh;
            c_first += dc;
          }
          dh = dc = 0;
        }
        if (a.carry_out) {
          a.carry_out[out] = dh;
          a.carry_out[2 * states + out] = h_first;
          if constexpr (Cell::cell_state) {
            a.carry_out[states + out] = dc;
            a.carry_out[3 * states + out] = c_first;
          }
          return;
        }
        if (a.dh0) a.dh0[out] = T::store(dh + h_first);
        if constexpr (Cell::cell_state) {
          if (a.dc0) a.dc0[out] = T::store(dc + c_first);
        }
        return;
      }
      const int t = s < len && a.backwards(set) ? len - 1 - s : s;
      const int64_t step = (static_cast<int64_t>(set) * a.Tn + t) * a.B + row;
      const int64_t n = (static_cast<int64_t>(set) * a.B + row) * Cell::gates * a.pitch + unit;
      Math da[Cell::sums] = {};
      if (s < len && real) {
        if (a.cut(set, row, s, len)) {
          if (a.reset_to_initial) {
            a.dh_first[at] += dh;
            if constexpr (Cell::cell_state) a.dc_first[at] += dc;
          }
          dh = dc = 0;
        }
        const int e = set / a.directions, d = set % a.directions;
        if (a.dcells) {
          const Math v = T::load(a.dcells[e * a.dcells_e + d * a.dcells_d + t * a.dcells_t + row * a.dcells_b + unit]);
          if constexpr (Cell::cell_state)
            dc += v;
          else
            dh += v;
        }
        if (a.dy) dh += T::load(a.dy[e * a.dy_e + d * a.dy_d + t * a.dy_t + row * a.dy_b + unit]);
        const Math h_in = clamp(dh, a.clip_grad), c_in = clamp(dc, a.clip_grad);
        const typename T::Storage* const x = a.gx + step * Cell::gates * a.pitch + unit;
        const Math h_prev = T::load(a.prev[step * a.pitch + unit]);
        if constexpr (Cell::two_products) {
          Cell::backward(T::load(x[a.pitch]), T::load(x[2 * a.pitch]), h_prev, h_in, da[1], da[2], dh);
        } else {
          Math kept[Cell::kept + 1], h = 0, c = 0, c_prev = 0;
          FUSEDRNN_UNROLL
          for (int k = 0; k < Cell::gates && k < Cell::kept; ++k) kept[k] = T::load(x[k * a.pitch]);
          if constexpr (Cell::kept == 0) h = T::load(x[0]);
          if constexpr (Cell::kept > Cell::gates) kept[Cell::gates] = T::load(a.extra[step * a.pitch + unit]);
          if constexpr (Cell::cell_state) {
            c = T::load(a.cells[step * a.pitch + unit]);
            const bool fresh = s == 0 ? a.restarts_at_once(set, row) : a.cut(set, row, s - 1, len);
            if (s == 0 && a.c_enters)
              c_prev = T::load(a.c_enters[out]);
            else if (s == 0 || fresh)
              c_prev = a.c0 && (!fresh || a.reset_to_initial) ? T::load(a.c0[out]) : Math(0);
            else
              c_prev = T::load(a.cells[(step + (a.backwards(set) ? a.B : -a.B)) * a.pitch + unit]);
          }
          // c comes from the tape, so the limit is what it became there
          const Math clip = T::load(T::store(a.clip_cell));
          Cell::backward(kept, h_prev, h, c_prev, c, clip, h_in, c_in, da, dh, dc);
        }
      }
      a.dh[at] = dh;
      if constexpr (Cell::cell_state) a.dc[at] = dc;
      each<Cell::gates>([&](auto k) {
        constexpr int of_x = Cell::x_sum[k.value], of_h = Cell::h_sum[k.value];
        if (Cell::two_products && k.value == 0) return;  // r's follows, and may stand where r still does
        a.da[(step * Cell::gates + k.value) * a.pitch + unit] = T::store(da[of_x]);
        if constexpr (of_x != of_h) a.da_h[step * a.pitch + unit] = T::store(da[of_h]);
        if constexpr (Cell::state_product) a.operand[n + k.value * a.pitch] = T::operand(T::store(da[of_h]));
      });
    });
  }
};

// Cells without R: no unit looks at another, so a thread walks over all steps with the cells that are its own in each
// of them.
template <class Cell, class T>
struct WalkForward {
  StepForwardArgs<T> a;
  static constexpr int kThreads = 256;
  FUSEDRNN_DEVICE void operator()() const {
    StepPrepare<Cell, T, false>{a}();
    StepForward<Cell, T> step{a};
    for (step.a.s = 0; step.a.s < a.Tn; ++step.a.s) step();
  }
};
template <class Cell, class T>
struct WalkBackward {
  StepBackwardArgs<T> a;
  static constexpr int kThreads = 256;
  FUSEDRNN_DEVICE void operator()() const {
    StepBackward<Cell, T> step{a};
    for (step.a.s = a.Tn; step.a.s >= -1; --step.a.s) step();
  }
};

// Two products: da_n Rn is there (product_r); da of the reset gate, and what reaches h past it.
template <class Cell, class T>
struct StepBackwardGate {
  StepBackwardArgs<T> a;
  static constexpr int kThreads = 256;

  FUSEDRNN_DEVICE void operator()() const {
    using Math = MathOf<T>;
    each_cell(a, [&](int set, int row, int unit, int64_t at) {
      const int s = a.s, len = a.length(set, row);
      const int t = s < len && a.backwards(set) ? len - 1 - s : s;
      const int64_t step = (static_cast<int64_t>(set) * a.Tn + t) * a.B + row;
      Math da = 0;
      if (s < len && unit < a.H) {
        Math dh = a.dh[at];
        Cell::backward_gate(T::load(a.gx[step * Cell::gates * a.pitch + unit]), T::load(a.prev[step * a.pitch + unit]),
                            a.product_r[at], da, dh);
        a.dh[at] = dh;
      }
      a.da[step * Cell::gates * a.pitch + unit] = T::store(da);
      a.operand[(static_cast<int64_t>(set) * a.B + row) * Cell::gates * a.pitch + unit] = T::operand(T::store(da));
    });
  }
};

}  // namespace fusedrnn::cuda
