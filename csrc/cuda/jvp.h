// SPDX-License-Identifier: Apache-2.0
// Formula: one step of forward, or of backward, on dual numbers: values and their tangents in two planes.
//   sums = gx + bias + product;  gx' = x' W^T + x W'^T, and so for R, by the product rule; the cell by the chain rule;
//   backward in the same way: da' of da, and products da' R + da R'
// Shapes of stepwise.h, every array twice. Overwrites; the states in place. float32 (strict) and float64.
// stepwise only: 1 launch and up to three library products a step and direction.
// Limit: launches, then reading R every step.
#pragma once

#include "stepwise.h"

namespace fusedrnn {

// A value and its tangent, with what the cells' formulas ask of a number.
template <class V>
struct Dual {
  V v, t;

  Dual() = default;
  FUSEDRNN_DEVICE Dual(V value, V tangent) : v(value), t(tangent) {}
  FUSEDRNN_DEVICE explicit Dual(int n) : v(n), t(0) {}

  friend FUSEDRNN_DEVICE Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.t + b.t}; }
  friend FUSEDRNN_DEVICE Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.t - b.t}; }
  friend FUSEDRNN_DEVICE Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.t * b.v + a.v * b.t}; }
  friend FUSEDRNN_DEVICE Dual operator-(V a, Dual b) { return {a - b.v, -b.t}; }
};
template <class V>
FUSEDRNN_DEVICE Dual<V> sigmoid(Dual<V> x) {
  const V y = sigmoid(x.v);
  return {y, x.t * y * (1 - y)};
}
template <class V>
FUSEDRNN_DEVICE Dual<V> tanh(Dual<V> x) {
  const V y = tanh(x.v);
  return {y, x.t * (1 - y * y)};
}
template <class V>
FUSEDRNN_DEVICE Dual<V> softplus(Dual<V> x) {
  return {softplus(x.v), x.t * sigmoid(x.v)};
}
template <class V>
FUSEDRNN_DEVICE Dual<V> relu(Dual<V> x) {
  return {relu(x.v), positive(x.t, x.v)};
}
template <class V>
FUSEDRNN_DEVICE Dual<V> positive(Dual<V> g, Dual<V> x) {
  return {positive(g.v, x.v), positive(g.t, x.v)};
}
template <class V>
FUSEDRNN_DEVICE Dual<V> clamp(Dual<V> x, V limit) {
  return {clamp(x.v, limit), inside(x.t, x.v, limit)};
}
template <class V>
FUSEDRNN_DEVICE Dual<V> inside(Dual<V> g, Dual<V> x, V limit) {
  return {inside(g.v, x.v, limit), inside(g.t, x.v, limit)};
}

}  // namespace fusedrnn

namespace fusedrnn::cuda {

// Both planes of an array; a plane that is null is zero.
template <class Math>
FUSEDRNN_DEVICE Dual<Math> read(const Math* const (&planes)[2], int64_t at) {
  return {planes[0] ? planes[0][at] : Math(0), planes[1] ? planes[1][at] : Math(0)};
}
template <class Math>
FUSEDRNN_DEVICE Dual<Math> read(Math* const (&planes)[2], int64_t at) {
  return {planes[0][at], planes[1][at]};
}
template <class Math>
FUSEDRNN_DEVICE void write(Math* const (&planes)[2], int64_t at, Dual<Math> v) {
  planes[0][at] = v.v;
  planes[1][at] = v.t;
}

// What backward needs of forward, as on a tape.
template <class Math>
struct DualTape {
  Math *input[2], *gx[2], *extra[2], *cells[2], *prev[2];
};

// Index 0: values, 1: tangents.
template <class Math>
struct JvpArgs : Walk {
  bool keep;  // the gates go where gx was, h before the step into prev, and what else is kept into extra
  Math clip_cell;
  const Math *bias[2], *h0[2], *c0[2];  // may be null
  Math *gx[2], *extra[2], *prev[2];
  Math* y[2];  // (E,T,B,wide)
  int64_t y_t, y_b, y_e, y_d;
  Math *hn, *cn;                             // tangents
  Math* cells[2];                            // (sets,T,B,pitch), may be null
  const Math *product[2], *product_last[2];  // (sets,B,G,pitch), (sets,B,pitch)
  Math *h[2], *c[2], *rh[2], *z[2];          // (sets,B,pitch); rh, z: two products only
};

// s = -1: the states.
template <class Cell, class Math>
struct JvpStep {
  JvpArgs<Math> a;
  static constexpr int kThreads = 256;

  FUSEDRNN_DEVICE void operator()() const {
    each_cell(a, [&](int set, int row, int unit, int64_t at) {
      const int len = a.length(set, row), s = a.s;
      const int64_t state = (static_cast<int64_t>(set) * a.B + row) * a.H + unit;
      if (s < 0) {
        const bool fresh = a.restarts_at_once(set, row) && !a.reset_to_initial && len > 0;
        const bool on = unit < a.H && !fresh;
        write(a.h, at, on ? read(a.h0, state) : Dual<Math>(0));
        if constexpr (Cell::cell_state) write(a.c, at, on ? read(a.c0, state) : Dual<Math>(0));
        return;
      }
      if (unit >= a.H) return;
      const int t = s < len && a.backwards(set) ? len - 1 - s : s;
      const int64_t step = (static_cast<int64_t>(set) * a.Tn + t) * a.B + row;
      const int64_t out = set / a.directions * a.y_e + set % a.directions * a.y_d + t * a.y_t + row * a.y_b + unit;
      Dual<Math> h(a.h[0][at], a.h[1][at]), c(0);
      if constexpr (Cell::cell_state) c = Dual<Math>(a.c[0][at], a.c[1][at]);
      if (s >= len) {
        write(a.y, out, Dual<Math>(0));
        if (s == 0) write_last(state, h, c);
        return;
      }
      const Dual<Math> h_prev = h;
      const auto sum_of = [&](int k) {
        return read(a.bias, (static_cast<int64_t>(set) * Cell::sums + k) * a.pitch + unit);
      };
      if constexpr (Cell::two_products) {
        const Dual<Math> z(a.z[0][at], a.z[1][at]);
        Dual<Math> n;
        Cell::forward(read(a.gx, (step * Cell::gates + 2) * a.pitch + unit) + read(a.product_last, at) + sum_of(2), z,
                      h_prev, n, h);
        if (a.keep) {
          write(a.gx, (step * Cell::gates + 2) * a.pitch + unit, n);
          write(a.extra, step * a.pitch + unit, read(a.rh, at));
        }
      } else {
        Dual<Math> sums[Cell::sums], kept[Cell::kept + 1], c_new(0);
        FUSEDRNN_UNROLL
        for (int k = 0; k < Cell::sums; ++k) sums[k] = sum_of(k);
        each<Cell::gates>([&](auto k) {
          constexpr int of_x = Cell::x_sum[k.value], of_h = Cell::h_sum[k.value];
          sums[of_x] = sums[of_x] + read(a.gx, (step * Cell::gates + k.value) * a.pitch + unit);
          if constexpr (Cell::state_product)
            sums[of_h] =
                sums[of_h] +
                read(a.product, ((static_cast<int64_t>(set) * a.B + row) * Cell::gates + k.value) * a.pitch + unit);
        });
        Cell::forward(sums, h_prev, c, a.clip_cell, kept, h, c_new);
        c = c_new;
        if (a.keep) {
          if constexpr (Cell::kept == 0) write(a.gx, step * a.pitch + unit, h);
          each<Cell::kept>([&](auto k) {
            if constexpr (k.value < Cell::gates)
              write(a.gx, (step * Cell::gates + k.value) * a.pitch + unit, kept[k.value]);
            else
              write(a.extra, step * a.pitch + unit, kept[k.value]);
          });
        }
      }
      if (a.keep) write(a.prev, step * a.pitch + unit, h_prev);
      write(a.y, out, h);
      if constexpr (Cell::cell_state) {
        if (a.cells[0]) a.cells[0][step * a.pitch + unit] = c.v;
        if (a.cells[1]) a.cells[1][step * a.pitch + unit] = c.t;
      }
      if (s == len - 1) write_last(state, h, c);
      if (a.cut(set, row, s, len)) {
        h = a.reset_to_initial ? read(a.h0, state) : Dual<Math>(0);
        c = a.reset_to_initial ? read(a.c0, state) : Dual<Math>(0);
      }
      write(a.h, at, h);
      if constexpr (Cell::cell_state) write(a.c, at, c);
    });
  }

 private:
  FUSEDRNN_DEVICE void write_last(int64_t at, Dual<Math> h, Dual<Math> c) const {
    a.hn[at] = h.t;
    if constexpr (Cell::cell_state) a.cn[at] = c.t;
  }
};

// Two products: the gates in front of the second.
template <class Cell, class Math>
struct JvpGate {
  JvpArgs<Math> a;
  static constexpr int kThreads = 256;

  FUSEDRNN_DEVICE void operator()() const {
    each_cell(a, [&](int set, int row, int unit, int64_t at) {
      const int len = a.length(set, row), s = a.s;
      Dual<Math> sums[2], r(0), z(0), rh(0);
      if (s < len && unit < a.H) {
        const int t = a.backwards(set) ? len - 1 - s : s;
        const int64_t step = (static_cast<int64_t>(set) * a.Tn + t) * a.B + row;
        const int64_t of_row = (static_cast<int64_t>(set) * a.B + row) * Cell::gates;
        FUSEDRNN_UNROLL
        for (int k = 0; k < 2; ++k)
          sums[k] = read(a.gx, (step * Cell::gates + k) * a.pitch + unit) +
                    read(a.product, (of_row + k) * a.pitch + unit) +
                    read(a.bias, (static_cast<int64_t>(set) * Cell::sums + k) * a.pitch + unit);
        Cell::gate(sums[0], sums[1], Dual<Math>(a.h[0][at], a.h[1][at]), r, z, rh);
        if (a.keep) {
          write(a.gx, step * Cell::gates * a.pitch + unit, r);
          write(a.gx, (step * Cell::gates + 1) * a.pitch + unit, z);
        }
      }
      write(a.z, at, z);
      write(a.rh, at, rh);
    });
  }
};

// A gradient over time, as the caller has it: data[e*e_ + d*d_ + t*t_ + row*b_ + unit].
template <class Math>
struct OverTime {
  const Math* data;
  int64_t t, b, e, d;
};

template <class Math>
struct HvpArgs : Walk {
  Math clip_cell, clip_grad;
  const Math *gx[2], *extra[2], *cells[2], *prev[2], *c0[2];
  OverTime<Math> dy[2], dcells[2];
  const Math *dhn[2], *dcn[2];
  Math *dh0, *dc0;                     // tangents
  Math *da[2], *da_h[2], *operand[2];  // as in StepBackwardArgs
  const Math *product[2], *product_r[2];
  Math *dh[2], *dc[2], *dh_first[2], *dc_first[2];
};

// As StepBackward.
template <class Cell, class Math>
struct HvpStep {
  HvpArgs<Math> a;
  static constexpr int kThreads = 256;

  FUSEDRNN_DEVICE void operator()() const {
    each_cell(a, [&](int set, int row, int unit, int64_t at) {
      const int s = a.s, len = a.length(set, row);
      const int64_t out = (static_cast<int64_t>(set) * a.B + row) * a.H + unit;
      const bool real = unit < a.H;
      const Dual<Math> zero(0);
      if (s == a.Tn) {
        write(a.dh, at, real ? read(a.dhn, out) : zero);
        write(a.dh_first, at, zero);
        if constexpr (Cell::cell_state) {
          write(a.dc, at, real ? read(a.dcn, out) : zero);
          write(a.dc_first, at, zero);
        }
        return;
      }
      Dual<Math> dh = read(a.dh, at), dc = zero;
      if (Cell::state_product && s + 1 < a.Tn) dh = dh + read(a.product, at);
      if constexpr (Cell::cell_state) dc = read(a.dc, at);
      if (s < 0) {
        if (!real) return;
        const bool dropped = len > 0 && !a.reset_to_initial && a.restarts_at_once(set, row);
        if (a.dh0) a.dh0[out] = dropped ? Math(0) : dh.t + a.dh_first[1][at];
        if constexpr (Cell::cell_state) {
          if (a.dc0) a.dc0[out] = dropped ? Math(0) : dc.t + a.dc_first[1][at];
        }
        return;
      }
      const int t = s < len && a.backwards(set) ? len - 1 - s : s;
      const int64_t step = (static_cast<int64_t>(set) * a.Tn + t) * a.B + row;
      const int64_t of_row = (static_cast<int64_t>(set) * a.B + row) * Cell::gates;
      Dual<Math> da[Cell::sums];
      FUSEDRNN_UNROLL
      for (int k = 0; k < Cell::sums; ++k) da[k] = zero;
      if (s < len && real) {
        if (a.cut(set, row, s, len)) {
          if (a.reset_to_initial) {
            write(a.dh_first, at, read(a.dh_first, at) + dh);
            if constexpr (Cell::cell_state) write(a.dc_first, at, read(a.dc_first, at) + dc);
          }
          dh = dc = zero;
        }
        const Dual<Math> v = given(a.dcells, set, t, row, unit);
        if constexpr (Cell::cell_state)
          dc = dc + v;
        else
          dh = dh + v;
        dh = dh + given(a.dy, set, t, row, unit);
        const Dual<Math> h_in = clamp(dh, a.clip_grad), c_in = clamp(dc, a.clip_grad);
        const auto gate = [&](int k) { return read(a.gx, (step * Cell::gates + k) * a.pitch + unit); };
        const Dual<Math> h_prev = read(a.prev, step * a.pitch + unit);
        if constexpr (Cell::two_products) {
          Cell::backward(gate(1), gate(2), h_prev, h_in, da[1], da[2], dh);
        } else {
          Dual<Math> kept[Cell::kept + 1], h = zero, c = zero, c_prev = zero;
          each<Cell::kept>([&](auto k) {
            if constexpr (k.value < Cell::gates)
              kept[k.value] = gate(k.value);
            else
              kept[k.value] = read(a.extra, step * a.pitch + unit);
          });
          if constexpr (Cell::kept == 0) h = gate(0);
          if constexpr (Cell::cell_state) {
            c = read(a.cells, step * a.pitch + unit);
            const bool fresh = s == 0 ? a.restarts_at_once(set, row) : a.cut(set, row, s - 1, len);
            if (s == 0 || fresh)
              c_prev = !fresh || a.reset_to_initial ? read(a.c0, out) : zero;
            else
              c_prev = read(a.cells, (step + (a.backwards(set) ? a.B : -a.B)) * a.pitch + unit);
          }
          Cell::backward(kept, h_prev, h, c_prev, c, a.clip_cell, h_in, c_in, da, dh, dc);
        }
      }
      write(a.dh, at, dh);
      if constexpr (Cell::cell_state) write(a.dc, at, dc);
      each<Cell::gates>([&](auto k) {
        constexpr int of_x = Cell::x_sum[k.value], of_h = Cell::h_sum[k.value];
        write(a.da, (step * Cell::gates + k.value) * a.pitch + unit, da[of_x]);
        if constexpr (of_x != of_h) write(a.da_h, step * a.pitch + unit, da[of_h]);
        if constexpr (Cell::state_product) write(a.operand, (of_row + k.value) * a.pitch + unit, da[of_h]);
      });
    });
  }

 private:
  FUSEDRNN_DEVICE Dual<Math> given(const OverTime<Math> (&g)[2], int set, int t, int row, int unit) const {
    const int e = set / a.directions, d = set % a.directions;
    Dual<Math> v(0);
    if (g[0].data) v.v = g[0].data[e * g[0].e + d * g[0].d + t * g[0].t + row * g[0].b + unit];
    if (g[1].data) v.t = g[1].data[e * g[1].e + d * g[1].d + t * g[1].t + row * g[1].b + unit];
    return v;
  }
};

// As StepBackwardGate.
template <class Cell, class Math>
struct HvpGate {
  HvpArgs<Math> a;
  static constexpr int kThreads = 256;

  FUSEDRNN_DEVICE void operator()() const {
    each_cell(a, [&](int set, int row, int unit, int64_t at) {
      const int s = a.s, len = a.length(set, row);
      const int t = s < len && a.backwards(set) ? len - 1 - s : s;
      const int64_t step = (static_cast<int64_t>(set) * a.Tn + t) * a.B + row;
      Dual<Math> da(0);
      if (s < len && unit < a.H) {
        Dual<Math> dh = read(a.dh, at);
        Cell::backward_gate(read(a.gx, step * Cell::gates * a.pitch + unit), read(a.prev, step * a.pitch + unit),
                            read(a.product_r, at), da, dh);
        write(a.dh, at, dh);
      }
      write(a.da, step * Cell::gates * a.pitch + unit, da);
      write(a.operand, (static_cast<int64_t>(set) * a.B + row) * Cell::gates * a.pitch + unit, da);
    });
  }
};

}  // namespace fusedrnn::cuda
