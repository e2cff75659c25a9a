// SPDX-License-Identifier: Apache-2.0
// The elementwise part of an LSTM whose c is normalised before its activation: whole rows of units.
//   h = o act(norm(c)): the cell's own formulas, once up to c, and once more when norm(c) is there
// Read, written: as in varied.h; z gets the gates; numbers (two for c), c_hat and dseen for the gains' gradients.
// Route: layer norm, for cells with c; others take varied.h's tiles.
// Limit: as varied.h, and two passes over c.
#pragma once

#include "norm.h"
#include "varied.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// The functions of a cell, but what it sees of c is given, and so is c's gradient through it.
template <class Plain, bool Usual, class S>
struct Seen : Chosen<Plain, Usual, S, 1> {
  using Base = Chosen<Plain, Usual, S, 1>;
  using V = Vec<S>;
  using Base::Base;
  V seen{S(0)}, back{S(0)};
  mutable V asked{S(0)};  // the gradient of norm(c), which the cell's backward asks for

  FUSEDRNN_FORCE V state(const V&) const { return seen; }
  FUSEDRNN_FORCE V state_back(const V& d, const V& y) const {
    asked = Base::state_back(d, y);
    return back;
  }
};

template <class Cell, bool Usual, class S>
void normed_forward_tile(const ForwardTile<S, 1>& t) {
  using V = Vec<S>;
  constexpr int L = V::lanes;
  const Norms<S>& norms = *t.options->norms;
  const Chosen<typename Cell::Plain, Usual, S, 1> chosen(*t.options);
  Seen<typename Cell::Plain, Usual, S> f(*t.options);
  Zones<S> zones(*t.options);
  for (int64_t r = 0; r < t.rows; ++r) {
    S *z = t.z[0] + r * t.ldz, *h = t.h[0] + r * t.ld, *c = t.c[0] + r * t.ld, *fresh = t.options->row(t.row + r);
    const S* h_prev = t.h_prev[0] + r * t.ld;
    S* kept = t.kept[0] ? t.kept[0] + r * t.ld_kept : nullptr;
    for (int64_t u = 0; u < t.units; u += L) {
      const int64_t n = smaller<int64_t>(L, t.units - u);
      f.at(u);
      V a[Cell::sums], k[4], c_new, none(S(0));
      for (int j = 0; j < Cell::sums; ++j) a[j] = load(z + u * Cell::sums + j * L);
      Cell::forward(a, none, load(c + u), t.clip, k, none, c_new, f);
      store(fresh + u, c_new);
      for (int j = 0; j < Cell::kept; ++j) {
        store(z + u * Cell::sums + j * L, k[j]);
        if (kept) store(kept + j * t.H + u, k[j], n);
      }
    }
    S numbers[2];
    norms.moments(fresh, numbers);
    if (t.numbers) t.numbers[r * 4 + 2] = numbers[0], t.numbers[r * 4 + 3] = numbers[1];
    for (int64_t u = 0; u < t.units; u += L) {
      const int64_t n = smaller<int64_t>(L, t.units - u), in_run = u % Zones<S>::kUnits;
      if (in_run == 0) zones.draw(*t.options, t.step, t.row + r, u, smaller(Zones<S>::kUnits, t.units - u));
      V k[4], c_new = load(fresh + u);
      for (int j = 0; j < Cell::kept; ++j) k[j] = load(z + u * Cell::sums + j * L);
      const V hat = (c_new - V(numbers[0])) * V(numbers[1]);
      const V seen = hat * load(norms.gain_c + u, n) + load(norms.bias_c + u, n);
      V h_new = Cell::output(k, seen, seen, chosen);
      if (zones.used[0]) h_new = mixed(load(zones.keep[0] + in_run), load(h_prev + u), h_new);
      if (zones.used[1]) c_new = mixed(load(zones.keep[1] + in_run), load(c + u), c_new);
      store(h + u, h_new);
      store(c + u, c_new);
      if (t.c_kept[0]) store(t.c_kept[0] + r * t.H + u, c_new, n);
    }
  }
}

template <class Cell, bool Usual, class S>
void normed_backward_tile(const BackwardTile<S, 1>& t) {
  using V = Vec<S>;
  constexpr int L = V::lanes;
  const Norms<S>& norms = *t.options->norms;
  const Chosen<typename Cell::Plain, Usual, S, 1> chosen(*t.options);
  Seen<typename Cell::Plain, Usual, S> f(*t.options);
  Zones<S> zones(*t.options);
  for (int64_t r = 0; r < t.rows; ++r) {
    const S *kept = t.kept[0] + r * t.ld_kept, *c_prev = t.c_prev[0][r], *numbers = t.numbers + r * 4 + 2;
    S *dh = t.dh[0] + r * t.ld, *dc = t.dc[0] + r * t.ld, *da = t.da[0] + r * t.ld_da;
    S *c_new = t.c_new[0] + r * t.ld, *c_hat = t.c_hat[0] + r * t.ld, *dseen = t.dseen[0] + r * t.ld;
    S* through = t.options->row(t.row + r);  // the gradient of c through its norm
    // The first pass learns the gradient of norm(c), the second one needs c's.
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t u = 0; u < t.units; u += L) {
        const int64_t n = smaller<int64_t>(L, t.units - u), in_run = u % Zones<S>::kUnits;
        if (in_run == 0) zones.draw(*t.options, t.step, t.row + r, u, smaller(Zones<S>::kUnits, t.units - u));
        f.at(u);
        V k[4], a[4], keep, add, dh_prev, dc_prev, dh_by(S(0)), dc_by(S(0)), dh_new = load(dh + u),
                                                                             dc_new = load(dc + u);
        for (int j = 0; j < Cell::kept; ++j) k[j] = load(kept + j * t.H + u, n);
        const V c_old = load(c_prev + u, n);
        Cell::flow(k, keep, add);
        const V c_now = clamp(keep * c_old + add, t.clip), hat = (c_now - V(numbers[0])) * V(numbers[1]);
        const V seen = hat * load(norms.gain_c + u, n) + load(norms.bias_c + u, n);
        f.seen = chosen.state(seen);
        f.back = pass ? load(through + u) : V(S(0));
        if (zones.used[0]) dh_by = passing(load(zones.keep[0] + in_run), dh_new, dh_new);
        if (zones.used[1]) dc_by = passing(load(zones.keep[1] + in_run), dc_new, dc_new);
        Cell::backward(k, c_old, c_old, c_old, c_now, t.clip, dh_new, dc_new, a, dh_prev, dc_prev, f);
        if (pass == 0) {
          store(c_new + u, c_now), store(c_hat + u, hat), store(dseen + u, f.asked);
          if (t.m[0]) store(t.m[0] + r * t.ld + u, Cell::output(k, c_old, seen, chosen));
          continue;
        }
        for (int j = 0; j < Cell::sums; ++j) store(da + place_of(Cell::sums, Cell::gates, j) * t.H + u, a[j], n);
        store(dh + u, dh_prev + dh_by);
        store(dc + u, dc_prev + dc_by);
      }
      if (pass == 0) Norms<S>::back(dseen, norms.gain_c, c_hat, numbers[1], t.H, through);
    }
  }
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
