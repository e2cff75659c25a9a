// SPDX-License-Identifier: Apache-2.0
// The elementwise part of a cell on a tile of rows and units, from its formulas in csrc/cells.
// Reads and writes what ForwardTile and BackwardTile of engine.h name; overwrites.
// Limit: the divider and the FMA units about equally (sigmoid and tanh); about 1 ns a unit for an LSTM.
#pragma once

#include "normed.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class Cell, class S, int P>
void forward_tile(const ForwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  for (int64_t r = 0; r < t.rows; ++r) {
    const S *z[P], *h_prev[P];
    S *h[P], *c[P], *kept[P], *c_kept[P];
    for (int q = 0; q < P; ++q) {
      z[q] = t.z[q] + r * t.ldz;
      h_prev[q] = t.h_prev[q] + r * t.ld;
      h[q] = t.h[q] + r * t.ld;
      if (Cell::cell_state) c[q] = t.c[q] + r * t.ld;
      kept[q] = t.kept[q] ? t.kept[q] + r * t.ld_kept : nullptr;
      c_kept[q] = t.c_kept[q] ? t.c_kept[q] + r * t.H : nullptr;
    }
    for (int64_t u = 0; u < t.units; u += L) {
      const int64_t n = smaller<int64_t>(L, t.units - u);
      N k[4], h_new, c_new;
      if constexpr (Cell::two_products) {
        k[0] = Pl::read(z, u * Cell::sums, L);  // r and z, by gate_tile
        k[1] = Pl::read(z, u * Cell::sums + L, L);
        Cell::forward(Pl::read(z, u * Cell::sums + 2 * L, L), k[1], Pl::read(h_prev, u, L), k[2], h_new);
      } else {
        N a[Cell::sums], c_old;
        for (int j = 0; j < Cell::sums; ++j) a[j] = Pl::read(z, u * Cell::sums + j * L, L);
        if constexpr (Cell::cell_state) c_old = Pl::read(c, u, L);
        Cell::forward(a, Pl::read(h_prev, u, L), c_old, t.clip, k, h_new, c_new);
      }
      Pl::write(h, u, h_new, L);
      if constexpr (Cell::cell_state) {
        Pl::write(c, u, c_new, L);
        if (c_kept[0]) Pl::write(c_kept, u, c_new, n);
      }
      if constexpr (Cell::kept > 0) {
        if (kept[0])
          for (int j = 0; j < Cell::kept; ++j) Pl::write(kept, j * t.H + u, k[j], n);
      }
    }
  }
}

// Cells with two products, before the second: r and z in place of their sums, and r h'.
template <class Cell, class S, int P>
void gate_tile(const ForwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  for (int64_t r = 0; r < t.rows; ++r) {
    S *z[P], *rh[P];
    const S* h_prev[P];
    for (int q = 0; q < P; ++q) {
      z[q] = t.z[q] + r * t.ldz;
      h_prev[q] = t.h_prev[q] + r * t.ld;
      rh[q] = t.rh[q] + r * t.ld;
    }
    for (int64_t u = 0; u < t.units; u += L) {
      N gate_r, gate_z, product;
      Cell::gate(Pl::read(z, u * Cell::sums, L), Pl::read(z, u * Cell::sums + L, L), Pl::read(h_prev, u, L), gate_r,
                 gate_z, product);
      Pl::write(z, u * Cell::sums, gate_r, L);
      Pl::write(z, u * Cell::sums + L, gate_z, L);
      Pl::write(rh, u, product, L);
    }
  }
}

template <class Cell, class S, int P>
void backward_tile(const BackwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  for (int64_t r = 0; r < t.rows; ++r) {
    const S *kept[P], *h[P], *c[P], *h_prev[P], *c_prev[P];
    S *dh[P], *dc[P], *da[P];
    for (int q = 0; q < P; ++q) {
      kept[q] = t.kept[q] + r * t.ld_kept;
      h[q] = t.h[q] + r * t.H;
      h_prev[q] = t.h_prev[q][r] + t.unit;
      dh[q] = t.dh[q] + r * t.ld;
      da[q] = t.da[q] + r * t.ld_da;
      if constexpr (Cell::cell_state) {
        c[q] = t.c[q] + r * t.H;
        c_prev[q] = t.c_prev[q][r] + t.unit;
        dc[q] = t.dc[q] + r * t.ld;
      }
    }
    for (int64_t u = 0; u < t.units; u += L) {
      const int64_t n = smaller<int64_t>(L, t.units - u);
      N k[4], a[4], dh_prev, dc_prev;
      for (int j = 0; j < Cell::kept; ++j) k[j] = Pl::read(kept, j * t.H + u, n);
      if constexpr (Cell::two_products) {
        Cell::backward(k[1], k[2], Pl::read(h_prev, u, n), Pl::read(dh, u, L), a[1], a[2], dh_prev);
      } else {
        N c_now, c_old, dc_now;
        if constexpr (Cell::cell_state) {
          c_now = Pl::read(c, u, n);
          c_old = Pl::read(c_prev, u, n);
          dc_now = Pl::read(dc, u, L);
        }
        Cell::backward(k, Pl::read(h_prev, u, n), Pl::read(h, u, n), c_old, c_now, t.clip, Pl::read(dh, u, L), dc_now,
                       a, dh_prev, dc_prev);
        Pl::write(da, place_of(Cell::sums, Cell::gates, 0) * t.H + u, a[0], n);
      }
      for (int j = 1; j < Cell::sums; ++j) Pl::write(da, place_of(Cell::sums, Cell::gates, j) * t.H + u, a[j], n);
      Pl::write(dh, u, dh_prev, L);
      if constexpr (Cell::cell_state) Pl::write(dc, u, dc_prev, L);
    }
  }
}

// Cells with two products, after the first: drh is there.
template <class Cell, class S, int P>
void backward_gate_tile(const BackwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  for (int64_t r = 0; r < t.rows; ++r) {
    const S *kept[P], *h_prev[P], *drh[P];
    S *dh[P], *da[P], *rh[P];
    for (int q = 0; q < P; ++q) {
      kept[q] = t.kept[q] + r * t.ld_kept;
      h_prev[q] = t.h_prev[q][r] + t.unit;
      dh[q] = t.dh[q] + r * t.ld;
      drh[q] = t.drh[q] + r * t.ld;
      rh[q] = t.rh[q] + r * t.ld;
      da[q] = t.da[q] + r * t.ld_da;
    }
    for (int64_t u = 0; u < t.units; u += L) {
      const int64_t n = smaller<int64_t>(L, t.units - u);
      const N gate_r = Pl::read(kept, u, n), before = Pl::read(h_prev, u, n);
      N da_r, dh_prev = Pl::read(dh, u, L);
      Cell::backward_gate(gate_r, before, Pl::read(drh, u, L), da_r, dh_prev);
      Pl::write(da, u, da_r, n);
      Pl::write(dh, u, dh_prev, L);
      Pl::write(rh, u, gate_r * before, L);
    }
  }
}

template <class Cell, class S, int P>
constexpr CellTable<S, P> make_table() {
  CellTable<S, P> t{};
  t.gates = Cell::gates;
  t.sums = Cell::sums;
  t.kept = Cell::kept;
  t.cell_state = Cell::cell_state;
  t.state_product = Cell::state_product;
  t.two_products = Cell::two_products;
  for (int g = 0; g < Cell::gates; ++g) t.x_sum[g] = Cell::x_sum[g], t.h_sum[g] = Cell::h_sum[g];
  t.plain.forward = forward_tile<Cell, S, P>;
  t.plain.backward = backward_tile<Cell, S, P>;
  if constexpr (Cell::two_products) {
    t.plain.gate = gate_tile<Cell, S, P>;
    t.plain.backward_gate = backward_gate_tile<Cell, S, P>;
  }
  if constexpr (Cell::state_product && Cell::cell_state) {
    t.normed[0].forward = normed_forward_tile<Cell, false, S, P>;
    t.normed[0].backward = normed_backward_tile<Cell, false, S, P>;
    t.normed[1].forward = normed_forward_tile<Cell, true, S, P>;
    t.normed[1].backward = normed_backward_tile<Cell, true, S, P>;
  }
  if constexpr (Cell::state_product) {
    t.varied[0] = varied_tiles<Cell, false, S, P>();
    t.varied[1] = varied_tiles<Cell, true, S, P>();
  }
  return t;
}

#define FUSEDRNN_TABLE_OF(name, Cell, S, P)                            \
  template <>                                                          \
  const CellTable<S, P>& name<S, P>() {                                \
    static constexpr CellTable<S, P> table = make_table<Cell, S, P>(); \
    return table;                                                      \
  }
#define FUSEDRNN_TABLE(name, Cell)         \
  FUSEDRNN_TABLE_OF(name, Cell, float, 1)  \
  FUSEDRNN_TABLE_OF(name, Cell, float, 2)  \
  FUSEDRNN_TABLE_OF(name, Cell, double, 1) \
  FUSEDRNN_TABLE_OF(name, Cell, double, 2)

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
