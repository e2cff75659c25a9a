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
template <class Plain, bool Usual, class S, int P>
struct Seen : Chosen<Plain, Usual, S, P> {
  using Base = Chosen<Plain, Usual, S, P>;
  using N = typename Planes<S, P>::Number;
  using Base::Base;
  N seen{S(0)}, back{S(0)};
  mutable N asked{S(0)};  // the gradient of norm(c), which the cell's backward asks for

  FUSEDRNN_FORCE N state(const N&) const { return seen; }
  FUSEDRNN_FORCE N state_back(const N& d, const N& y) const {
    asked = Base::state_back(d, y);
    return back;
  }
};

// Row r of each plane; null where there is none.
template <class S, int P>
struct RowOf {
  S* at[P];
  RowOf(S* const* planes, int64_t r, int64_t ld) {
    for (int q = 0; q < P; ++q) at[q] = planes[q] ? planes[q] + r * ld : nullptr;
  }
  operator S* const*() const { return at; }
};

template <class Cell, bool Usual, class S, int P>
void normed_forward_tile(const ForwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  const Norms<S, P>& norms = *t.options->norms;
  const Chosen<typename Cell::Plain, Usual, S, P> chosen(*t.options);
  Seen<typename Cell::Plain, Usual, S, P> f(*t.options);
  Zones<S> zones(*t.options);
  for (int64_t r = 0; r < t.rows; ++r) {
    const RowOf<S, P> z(t.z, r, t.ldz), h(t.h, r, t.ld), c(t.c, r, t.ld), kept(t.kept, r, t.ld_kept);
    const RowOf<S, P> c_kept(t.c_kept, r, t.H), fresh(t.options->room(), t.row + r, t.ld);
    const RowOf<const S, P> h_prev(t.h_prev, r, t.ld);
    for (int64_t u = 0; u < t.units; u += L) {
      const int64_t n = smaller<int64_t>(L, t.units - u);
      f.at(u);
      N a[Cell::sums], k[4], c_new, none(S(0));
      for (int j = 0; j < Cell::sums; ++j) a[j] = Pl::read(z, u * Cell::sums + j * L, L);
      Cell::forward(a, none, Pl::read(c, u, L), t.clip, k, none, c_new, f);
      Pl::write(fresh, u, c_new, L);
      for (int j = 0; j < Cell::kept; ++j) {
        Pl::write(z, u * Cell::sums + j * L, k[j], L);
        if (kept.at[0]) Pl::write(kept, j * t.H + u, k[j], n);
      }
    }
    S mean[P], scale[P];
    norms.moments(fresh, mean, scale);
    for (int q = 0; q < P && t.numbers[0]; ++q) t.numbers[q][r * 4 + 2] = mean[q], t.numbers[q][r * 4 + 3] = scale[q];
    for (int64_t u = 0; u < t.units; u += L) {
      const int64_t n = smaller<int64_t>(L, t.units - u), in_run = u % Zones<S>::kUnits;
      if (in_run == 0) zones.draw(*t.options, t.step, t.row + r, u, smaller(Zones<S>::kUnits, t.units - u));
      N k[4], c_new = Pl::read(fresh, u, L);
      for (int j = 0; j < Cell::kept; ++j) k[j] = Pl::read(z, u * Cell::sums + j * L, L);
      const N hat = (c_new - Pl::spread(mean)) * Pl::spread(scale);
      const N seen = hat * Pl::read(norms.gain_c, u, n) + Pl::read(norms.bias_c, u, n);
      N h_new = Cell::output(k, seen, seen, chosen);
      if (zones.used[0]) h_new = mixed(load(zones.keep[0] + in_run), Pl::read(h_prev, u, L), h_new);
      if (zones.used[1]) c_new = mixed(load(zones.keep[1] + in_run), Pl::read(c, u, L), c_new);
      Pl::write(h, u, h_new, L);
      Pl::write(c, u, c_new, L);
      if (c_kept.at[0]) Pl::write(c_kept, u, c_new, n);
    }
  }
}

template <class Cell, bool Usual, class S, int P>
void normed_backward_tile(const BackwardTile<S, P>& t) {
  using Pl = Planes<S, P>;
  using N = typename Pl::Number;
  constexpr int L = Vec<S>::lanes;
  const Norms<S, P>& norms = *t.options->norms;
  const Chosen<typename Cell::Plain, Usual, S, P> chosen(*t.options);
  Seen<typename Cell::Plain, Usual, S, P> f(*t.options);
  Zones<S> zones(*t.options);
  for (int64_t r = 0; r < t.rows; ++r) {
    const RowOf<const S, P> kept(t.kept, r, t.ld_kept);
    const RowOf<S, P> dh(t.dh, r, t.ld), dc(t.dc, r, t.ld), da(t.da, r, t.ld_da), m(t.m, r, t.ld);
    const RowOf<S, P> c_new(t.c_new, r, t.ld), c_hat(t.c_hat, r, t.ld), dseen(t.dseen, r, t.ld);
    const RowOf<S, P> through(t.options->room(), t.row + r, t.ld);  // the gradient of c through its norm
    const S* c_prev[P];
    S mean[P], scale[P];
    for (int q = 0; q < P; ++q) {
      c_prev[q] = t.c_prev[q][r];
      mean[q] = t.numbers[q][r * 4 + 2], scale[q] = t.numbers[q][r * 4 + 3];
    }
    // The first pass learns the gradient of norm(c), the second one needs c's.
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t u = 0; u < t.units; u += L) {
        const int64_t n = smaller<int64_t>(L, t.units - u), in_run = u % Zones<S>::kUnits;
        if (in_run == 0) zones.draw(*t.options, t.step, t.row + r, u, smaller(Zones<S>::kUnits, t.units - u));
        f.at(u);
        N k[4], a[4], keep, add, dh_prev, dc_prev, dh_by(S(0)), dc_by(S(0));
        N dh_new = Pl::read(dh, u, L), dc_new = Pl::read(dc, u, L);
        for (int j = 0; j < Cell::kept; ++j) k[j] = Pl::read(kept, j * t.H + u, n);
        const N c_old = Pl::read(c_prev, u, n);
        Cell::flow(k, keep, add);
        const N c_now = clamp(keep * c_old + add, t.clip), hat = (c_now - Pl::spread(mean)) * Pl::spread(scale);
        const N seen = hat * Pl::read(norms.gain_c, u, n) + Pl::read(norms.bias_c, u, n);
        f.seen = chosen.state(seen);
        f.back = pass ? Pl::read(through, u, L) : N(S(0));
        if (zones.used[0]) dh_by = passing(load(zones.keep[0] + in_run), dh_new, dh_new);
        if (zones.used[1]) dc_by = passing(load(zones.keep[1] + in_run), dc_new, dc_new);
        Cell::backward(k, c_old, c_old, c_old, c_now, t.clip, dh_new, dc_new, a, dh_prev, dc_prev, f);
        if (pass == 0) {
          Pl::write(c_new, u, c_now, L), Pl::write(c_hat, u, hat, L), Pl::write(dseen, u, f.asked, L);
          if (m.at[0]) Pl::write(m, u, Cell::output(k, c_old, seen, chosen), L);
          continue;
        }
        for (int j = 0; j < Cell::sums; ++j) Pl::write(da, place_of(Cell::sums, Cell::gates, j) * t.H + u, a[j], n);
        Pl::write(dh, u, dh_prev + dh_by, L);
        Pl::write(dc, u, dc_prev + dc_by, L);
      }
      if (pass == 0) Norms<S, P>::back(dseen, norms.gain_c, c_hat, scale, t.H, through);
    }
  }
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
