// SPDX-License-Identifier: Apache-2.0
// The elementwise part of a cell with options, on a tile of rows and units: the cell's own formulas, with other
// functions in them (`Chosen`), and zoneout around them.
// Read, written: as in cell.h, and the Options of the tile.
// Route: for problems with a Variant, but LSTMs with layer norm take normed.h's. `Usual`: the plain cell's activations.
// Limit: as in cell.h; other activations are a call each, zoneout draws.
#pragma once

#include "options.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// A cell's functions as the options have them, for one register of units.
template <class Plain, bool Usual, class S, int P>
class Chosen {
  using N = typename Planes<S, P>::Number;
  using V = Vec<S>;

 public:
  explicit Chosen(const Options<S, P>& options)
      : options_(options),
        peeps_(options.peepholes()),
        clips_(options.variant().clip_gates > 0),
        limit_(clips_ ? static_cast<S>(options.variant().clip_gates) : S(0)) {
    const S limits[2] = {-limit_, limit_};
    for (int which = 0; which < 2; ++which)
      for (int side = 0; side < 2 && clips_; ++side)
        end_[which][side] = (which ? by_candidate(V(limits[side])) : by_gate(V(limits[side]))).v[0];
  }
  // Reads the peepholes of the units from u on.
  void at(int64_t u) {
    for (int k = 0; k < Options<S, P>::kPeeps && peeps_; ++k)
      peep_[k] = Planes<S, P>::read(options_.peep(k), u, Vec<S>::lanes);
  }

  FUSEDRNN_FORCE N gate(const N& a) const { return by_gate(clips_ ? clamp(a, limit_) : a); }
  FUSEDRNN_FORCE N gate_back(const N& d, const N& y) const {
    N by = d;
    if constexpr (Usual)
      by = Plain::gate_back(d, y);
    else
      by = times_slope(options_.variant().activations[0], d, y);
    return clips_ ? within(by, y, end_[0]) : by;
  }
  FUSEDRNN_FORCE N candidate(const N& a) const { return by_candidate(clips_ ? clamp(a, limit_) : a); }
  FUSEDRNN_FORCE N candidate_back(const N& d, const N& y) const {
    N by = d;
    if constexpr (Usual)
      by = Plain::candidate_back(d, y);
    else
      by = times_slope(options_.variant().activations[1], d, y);
    return clips_ ? within(by, y, end_[1]) : by;
  }
  FUSEDRNN_FORCE N state(const N& c) const {
    if constexpr (Usual)
      return Plain::state(c);
    else
      return activated(options_.variant().activations[2], c);
  }
  FUSEDRNN_FORCE N state_back(const N& d, const N& y) const {
    if constexpr (Usual)
      return Plain::state_back(d, y);
    else
      return times_slope(options_.variant().activations[2], d, y);
  }
  FUSEDRNN_FORCE N peep(int k, const N& a, const N& c) const { return peeps_ ? a + peep_[k] * c : a; }
  FUSEDRNN_FORCE N peep_back(int k, const N& dc, const N& da) const { return peeps_ ? dc + peep_[k] * da : dc; }

 private:
  template <class A>
  FUSEDRNN_FORCE A by_gate(const A& a) const {
    if constexpr (Usual)
      return Plain::gate(a);
    else
      return activated(options_.variant().activations[0], a);
  }
  template <class A>
  FUSEDRNN_FORCE A by_candidate(const A& a) const {
    if constexpr (Usual)
      return Plain::candidate(a);
    else
      return activated(options_.variant().activations[1], a);
  }
  // d, but 0 where the argument was clipped, which y at one of the two ends tells.
  static FUSEDRNN_FORCE V within(const V& d, const V& y, const S* end) {
    const V zero(S(0)), low(smaller(end[0], end[1])), high(larger(end[0], end[1]));
    const V above = y.v <= low.v ? zero.v : d.v;
    return V(y.v >= high.v ? zero.v : above.v);
  }
  static FUSEDRNN_FORCE Dual<V> within(const Dual<V>& d, const Dual<V>& y, const S* end) {
    return {within(d.v, y.v, end), within(d.t, y.v, end)};
  }

  const Options<S, P>& options_;
  bool peeps_, clips_;
  S limit_, end_[2][2] = {};
  N peep_[Options<S, P>::kPeeps]{};
};

template <class Cell, bool Usual, class S, int P>
void varied_forward_tile(const ForwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  Chosen<typename Cell::Plain, Usual, S, P> f(*t.options);
  Zones<S> zones(*t.options);
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
      const int64_t n = smaller<int64_t>(L, t.units - u), in_run = u % Zones<S>::kUnits;
      if (in_run == 0) zones.draw(*t.options, t.step, t.row + r, t.unit + u, smaller(Zones<S>::kUnits, t.units - u));
      f.at(t.unit + u);
      N k[4], h_new, c_old, c_new;
      const N h_old = Pl::read(h_prev, u, L);
      if constexpr (Cell::two_products) {
        k[0] = Pl::read(z, u * Cell::sums, L);  // r and z, by varied_gate_tile
        k[1] = Pl::read(z, u * Cell::sums + L, L);
        Cell::forward(Pl::read(z, u * Cell::sums + 2 * L, L), k[1], h_old, k[2], h_new, f);
      } else {
        N a[Cell::sums];
        for (int j = 0; j < Cell::sums; ++j) a[j] = Pl::read(z, u * Cell::sums + j * L, L);
        if constexpr (Cell::cell_state) c_old = Pl::read(c, u, L);
        Cell::forward(a, h_old, c_old, t.clip, k, h_new, c_new, f);
      }
      if constexpr (Cell::kept == 0) {
        if (kept[0]) Pl::write(kept, u, h_new, n);
      } else if (kept[0]) {
        for (int j = 0; j < Cell::kept; ++j) Pl::write(kept, j * t.H + u, k[j], n);
      }
      if (zones.used[0]) h_new = mixed(load(zones.keep[0] + in_run), h_old, h_new);
      Pl::write(h, u, h_new, L);
      if constexpr (Cell::cell_state) {
        if (zones.used[1]) c_new = mixed(load(zones.keep[1] + in_run), c_old, c_new);
        Pl::write(c, u, c_new, L);
        if (c_kept[0]) Pl::write(c_kept, u, c_new, n);
      }
    }
  }
}

// Cells with two products, before the second: r and z in place of their sums, and r h'.
template <class Cell, bool Usual, class S, int P>
void varied_gate_tile(const ForwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  Chosen<typename Cell::Plain, Usual, S, P> f(*t.options);
  for (int64_t r = 0; r < t.rows; ++r) {
    S *z[P], *rh[P];
    const S* h_seen[P];
    for (int q = 0; q < P; ++q) {
      z[q] = t.z[q] + r * t.ldz;
      h_seen[q] = t.h_seen[q] + r * t.ld;
      rh[q] = t.rh[q] + r * t.ld;
    }
    for (int64_t u = 0; u < t.units; u += L) {
      N gate_r, gate_z, product;
      Cell::gate(Pl::read(z, u * Cell::sums, L), Pl::read(z, u * Cell::sums + L, L), Pl::read(h_seen, u, L), gate_r,
                 gate_z, product, f);
      Pl::write(z, u * Cell::sums, gate_r, L);
      Pl::write(z, u * Cell::sums + L, gate_z, L);
      Pl::write(rh, u, product, L);
    }
  }
}

template <class Cell, bool Usual, class S, int P>
void varied_backward_tile(const BackwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  Chosen<typename Cell::Plain, Usual, S, P> f(*t.options);
  Zones<S> zones(*t.options);
  for (int64_t r = 0; r < t.rows; ++r) {
    const S *kept[P], *h[P], *c[P], *h_prev[P], *c_prev[P];
    S *dh[P], *dc[P], *da[P], *c_new[P], *m[P];
    for (int q = 0; q < P; ++q) {
      kept[q] = t.kept[q] + r * t.ld_kept;
      h[q] = t.h[q] + r * t.H;
      h_prev[q] = t.h_prev[q][r] + t.unit;
      dh[q] = t.dh[q] + r * t.ld;
      da[q] = t.da[q] + r * t.ld_da;
      c_new[q] = t.c_new[q] ? t.c_new[q] + r * t.ld : nullptr;
      m[q] = t.m[q] ? t.m[q] + r * t.ld : nullptr;
      if constexpr (Cell::cell_state) {
        c[q] = t.c[q] + r * t.H;
        c_prev[q] = t.c_prev[q][r] + t.unit;
        dc[q] = t.dc[q] + r * t.ld;
      }
    }
    for (int64_t u = 0; u < t.units; u += L) {
      const int64_t n = smaller<int64_t>(L, t.units - u), in_run = u % Zones<S>::kUnits;
      if (in_run == 0) zones.draw(*t.options, t.step, t.row + r, t.unit + u, smaller(Zones<S>::kUnits, t.units - u));
      f.at(t.unit + u);
      N k[4], a[4], dh_prev, dc_prev, dh_new = Pl::read(dh, u, L), dh_by(S(0));
      if (zones.used[0]) dh_by = passing(load(zones.keep[0] + in_run), dh_new, dh_new);
      for (int j = 0; j < Cell::kept; ++j) k[j] = Pl::read(kept, j * t.H + u, n);
      if constexpr (Cell::two_products) {
        Cell::backward(k[1], k[2], Pl::read(h_prev, u, n), dh_new, a[1], a[2], dh_prev, f);
      } else {
        N c_now, c_old, dc_new, dc_by(S(0));
        if constexpr (Cell::cell_state) {
          c_old = Pl::read(c_prev, u, n);
          dc_new = Pl::read(dc, u, L);
          if (zones.used[1]) {  // the tape holds what zoneout left of c
            N keep, add;
            Cell::flow(k, keep, add);
            c_now = clamp(keep * c_old + add, t.clip);
            dc_by = passing(load(zones.keep[1] + in_run), dc_new, dc_new);
          } else {
            c_now = Pl::read(c, u, n);
          }
          if (c_new[0]) Pl::write(c_new, u, c_now, L);
        }
        const N h_old = Pl::read(h_prev, u, n);
        if constexpr (requires { Cell::output(k, h_old, c_now, f); }) {
          if (m[0]) Pl::write(m, u, Cell::output(k, h_old, c_now, f), L);
        }
        const N h_new = Cell::kept == 0 && zones.used[0] ? Pl::read(kept, u, n) : Pl::read(h, u, n);
        Cell::backward(k, h_old, h_new, c_old, c_now, t.clip, dh_new, dc_new, a, dh_prev, dc_prev, f);
        Pl::write(da, place_of(Cell::sums, Cell::gates, 0) * t.H + u, a[0], n);
        if constexpr (Cell::cell_state) Pl::write(dc, u, zones.used[1] ? dc_prev + dc_by : dc_prev, L);
      }
      for (int j = 1; j < Cell::sums; ++j) Pl::write(da, place_of(Cell::sums, Cell::gates, j) * t.H + u, a[j], n);
      Pl::write(dh, u, zones.used[0] ? dh_prev + dh_by : dh_prev, L);
    }
  }
}

// Cells with two products, after the first: drh is there. dh_seen: the gradient of h' as R sees it, added to.
template <class Cell, bool Usual, class S, int P>
void varied_backward_gate_tile(const BackwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  Chosen<typename Cell::Plain, Usual, S, P> f(*t.options);
  for (int64_t r = 0; r < t.rows; ++r) {
    const S *kept[P], *h_seen[P], *drh[P];
    S *dh[P], *da[P], *rh[P];
    for (int q = 0; q < P; ++q) {
      kept[q] = t.kept[q] + r * t.ld_kept;
      h_seen[q] = t.h_seen[q][r] + t.unit;
      dh[q] = t.dh_seen[q] + r * t.ld;
      drh[q] = t.drh[q] + r * t.ld;
      rh[q] = t.rh[q] + r * t.ld;
      da[q] = t.da[q] + r * t.ld_da;
    }
    for (int64_t u = 0; u < t.units; u += L) {
      const int64_t n = smaller<int64_t>(L, t.units - u);
      const N gate_r = Pl::read(kept, u, n), before = Pl::read(h_seen, u, n);
      N da_r, dh_new = Pl::read(dh, u, L);
      Cell::backward_gate(gate_r, before, Pl::read(drh, u, L), da_r, dh_new, f);
      Pl::write(da, u, da_r, n);
      Pl::write(dh, u, dh_new, L);
      Pl::write(rh, u, gate_r * before, L);
    }
  }
}

template <class Cell, bool Usual, class S, int P>
constexpr TileFunctions<S, P> varied_tiles() {
  TileFunctions<S, P> t{};
  t.forward = varied_forward_tile<Cell, Usual, S, P>;
  t.backward = varied_backward_tile<Cell, Usual, S, P>;
  if constexpr (Cell::two_products) {
    t.gate = varied_gate_tile<Cell, Usual, S, P>;
    t.backward_gate = varied_backward_gate_tile<Cell, Usual, S, P>;
  }
  return t;
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
