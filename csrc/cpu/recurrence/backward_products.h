// SPDX-License-Identifier: Apache-2.0
// The gradients of weights and of the options' parameters, for a chunk of steps at once:
//   dW = da^T x,   dR = da^T h',   db = sum da
// Read: da, x, h' and m of the chunk.
// Written: gradients of the parameters; added to from the second chunk on.
// Route: a member owns rows of each gradient.
// Limit: FMA for many rows; writing dW and dR for few.
#pragma once

#include "backward_pass.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class BackwardProducts : protected BackwardPass<S, P> {
 protected:
  using Base = BackwardPass<S, P>;
  using Base::Base;
  using Base::L, Base::Q_, Base::cell_, Base::da_column, Base::dp_, Base::inputs_, Base::ld_, Base::ld_da_, Base::n_,
      Base::normed, Base::padded, Base::pairs_, Base::sets_, Base::units;
  using typename Base::Part, typename Base::Scratch;

  // Columns of da and the rows of W and R that they belong to; -1: none.
  struct Segment {
    int64_t column, count, w_row, r_row;
    bool reset;  // multiplies r h' instead of h'
  };

  int segments(Segment* s) const {
    const int64_t H = n_.H;
    if (cell_.sums > cell_.gates) {  // n of x | r, z | n of h
      s[0] = {0, H, 2 * H, -1, false};
      s[1] = {H, 2 * H, 0, 0, false};
      s[2] = {3 * H, H, -1, 2 * H, false};
      return 3;
    }
    const int64_t first = (cell_.two_products ? cell_.gates - 1 : cell_.gates) * H, all = cell_.gates * H;
    s[0] = {0, first, 0, 0, false};
    s[1] = {first, all - first, first, first, true};
    return cell_.two_products ? 2 : 1;
  }

  // Of a matrix: left^T right over all pairs of the chunk. `panels`: room for right, whose planes may be null.
  void matrix_gradient(Part& a, const Array<3>& to, int64_t M, const S* const* const* left, int64_t columns,
                       const S* const* const* right, S* const* panels, int64_t pairs) {
    if (!to.data || !right[0]) return;
    Scratch& w = a.w;
    a.team.wait();  // everyone has done with what was in this room
    for (int q = 0; q < P; ++q)
      if (right[q]) pack_panels(a.team, right[q], pairs, columns, panels[q]);
    a.team.wait();
    const int64_t tiles = (M + kTile - 1) / kTile;
    const int64_t m0 = a.team.begin(tiles) * kTile, m1 = smaller(a.team.end(tiles) * kTile, M);
    if (m1 <= m0) return;
    S* packed[P];
    for (int q = 0; q < P; ++q) {
      packed[q] = w.packed[q] + m0 * pairs_;
      pack_columns(left[q], pairs, m0, m1 - m0, packed[q]);
    }
    gradient(a, to, a.set, 0, m0, m1, columns, pairs, packed, panels, true, right[P - 1] != nullptr);
  }

  // With layer norm: W's and R's from the gradients of the products, biases' and gains' from those of the sums.
  void normed_gradients(Part& a, const Params& dp, int64_t s0, int64_t pairs, const S* const* const* x,
                        const S* const* const* h) {
    Scratch& w = a.w;
    const int64_t GH = cell_.gates * n_.H, pair0 = a.rows.off[s0];
    const S *const *left[2][P], *const *da[P];
    for (int q = 0; q < P; ++q) left[0][q] = w.apart_rows[0][q], left[1][q] = w.apart_rows[1][q], da[q] = w.da_rows[q];
    matrix_gradient(a, dp.W, GH, left[0], a.source[0].width, x, w.x_panels, pairs);
    matrix_gradient(a, dp.R, GH, left[1], Q_, h, w.h_panels, pairs);
    Params biases;
    biases.bW = dp.bW, biases.bR = dp.bR;
    weight_gradients(a, biases, a.set, pairs, a.source[0].width, da, x, h, h);
    if (!dp_.extras) return;
    const Extras& to = dp_.extras[a.ld];
    using Pl = Planes<S, P>;
    const int64_t ld = ld_, ld_da = ld_da_;
    for (int k = 0; k < 2; ++k) {
      for (int g = 0; g < cell_.gates; ++g) {
        S *d[P], *hat[P];
        for (int q = 0; q < P; ++q) d[q] = w.da[q] + da_column(k, g), hat[q] = normed(a, q, k, pair0) + g * n_.H;
        sum_of_products(a, k ? to.gain_hh : to.gain_ih, g * n_.H, pairs, [=](int64_t r, int64_t u, int64_t n) {
          return Pl::read(d, r * ld_da + u, n) * Pl::read(hat, r * GH + u, n);
        });
      }
    }
    S *d[P], *hat[P];
    for (int q = 0; q < P; ++q) d[q] = w.dseen[q], hat[q] = w.c_hat[q];
    sum_of_products(a, to.gain_c, 0, pairs, [=](int64_t r, int64_t u, int64_t n) {
      return Pl::read(d, r * ld + u, n) * Pl::read(hat, r * ld + u, n);
    });
    sum_of_products(a, to.bias_c, 0, pairs,
                    [=](int64_t r, int64_t u, int64_t n) { return Pl::read(d, r * ld + u, n); });
  }

  // to[place + u] of the units owned: the sum over all pairs r of product(r, u, n), of n units.
  template <class Product>
  void sum_of_products(Part& a, const Array<2>& to, int64_t place, int64_t pairs, const Product& product) {
    if (!to.data) return;
    const bool add = !a.fresh || (to.stride[0] == 0 && a.set > 0);
    constexpr int Wide = 4;  // registers at a time: rows are far apart
    for (int64_t u = a.u0; u < a.u1; u += Wide * L) {
      typename Planes<S, P>::Number sum[Wide];
      for (auto& one : sum) one = typename Planes<S, P>::Number(S(0));
      const int64_t all = a.u1 - u;
      if (all >= Wide * L) {
        for (int64_t r = 0; r < pairs; ++r)
#pragma GCC unroll 4
          for (int k = 0; k < Wide; ++k) sum[k] = sum[k] + product(r, u + k * L, L);
      } else {
        for (int64_t r = 0; r < pairs; ++r)
          for (int k = 0; k * L < all; ++k) sum[k] = sum[k] + product(r, u + k * L, smaller<int64_t>(L, all - k * L));
      }
      S values[P][L], *planes[P];
      for (int q = 0; q < P; ++q) planes[q] = values[q];
      for (int k = 0; k * L < smaller<int64_t>(all, Wide * L); ++k) {
        Planes<S, P>::write(planes, 0, sum[k], L);
        for (int64_t j = 0; j < smaller<int64_t>(L, all - k * L); ++j) {
          S& at = *element<S>(to, a.set, place + u + k * L + j);
          at = add ? at + values[P - 1][j] : values[P - 1][j];
        }
      }
    }
  }

  // Of the units owned: the sum over all pairs of da times the c that the gate saw.
  void peephole_gradient(Part& a, const Array<2>& to, int64_t pairs) {
    using Pl = Planes<S, P>;
    const Options<S, P>& options = a.w.options;
    for (int k = 0; k < Options<S, P>::kPeeps; ++k) {
      if (options.peep_place(k) < 0) continue;
      const int64_t column = options.peep_gate(k) * n_.H;
      sum_of_products(a, to, options.peep_place(k) * n_.H, pairs, [&](int64_t r, int64_t u, int64_t n) {
        const S *da[P], *c[P];
        for (int q = 0; q < P; ++q) {
          da[q] = a.w.da_rows[q][r] + column;
          c[q] = k == 2 ? a.w.c_new[q] + r * ld_ : a.w.before[1][q][r];
        }
        return Pl::read(da, u, n) * Pl::read(c, u, n);
      });
    }
  }

  static bool all_shared(const Params& p) {
    return !((p.W.data && p.W.stride[0]) || (p.R.data && p.R.stride[0]) || (p.bW.data && p.bW.stride[0]) ||
             (p.bR.data && p.bR.stride[0]));
  }

  void weight_gradients(Part& a, const Params& dp, int64_t e, int64_t R, int64_t inputs, const S* const* const* da,
                        const S* const* const* x, const S* const* const* h, const S* const* const* rh) {
    Scratch& w = a.w;
    Segment segment[3];
    const int count = segments(segment);
    for (int q = 0; q < P; ++q) {
      if (dp.W.data && x[q]) pack_panels(a.team, x[q], R, inputs, w.x_panels[q]);
      if (dp.R.data) pack_panels(a.team, h[q], R, Q_, w.h_panels[q]);
    }
    a.team.wait();
    for (int i = 0; i < count; ++i) {
      const Segment& s = segment[i];
      const int64_t tiles = (s.count + kTile - 1) / kTile;
      const int64_t m0 = a.team.begin(tiles) * kTile, m1 = smaller(a.team.end(tiles) * kTile, s.count);
      if (s.reset && dp.R.data) {  // r h' takes the place of h'; everyone has done with it
        a.team.wait();
        for (int q = 0; q < P; ++q) pack_panels(a.team, rh[q], R, n_.H, w.h_panels[q]);
        a.team.wait();
      }
      if (m1 > m0) {
        S* packed[P];
        for (int q = 0; q < P; ++q) {
          packed[q] = w.packed[q] + (s.column + kTile * i + m0) * pairs_;
          pack_columns(da[q], R, s.column + m0, m1 - m0, packed[q]);
        }
        if (dp.W.data && s.w_row >= 0 && x[0])  // tokens: see token_gradient
          gradient(a, dp.W, e, s.w_row, m0, m1, inputs, R, packed, w.x_panels, x[0] != nullptr, P == 2 && x[P - 1]);
        if (dp.R.data && s.r_row >= 0) gradient(a, dp.R, e, s.r_row, m0, m1, Q_, R, packed, w.h_panels, true, true);
      }
      bias_gradient(a, dp, e, s, a.team.begin(tiles) * kTile, m1, R, da[P - 1]);
    }
    a.team.wait();
  }

  void pack_panels(const Team& team, const S* const* rows, int64_t R, int64_t columns, S* out) const {
    const int64_t width = kWidest * L, panels = (columns + width - 1) / width;
    for (int64_t panel = team.begin(panels); panel < team.end(panels); ++panel) {
      const int64_t column = panel * width, valid = smaller(width, columns - column);
      pack_panel(rows, R, column, valid, static_cast<int>((valid + L - 1) / L), out + column * R);
    }
  }

  // Rows [row + m0, row + m1) of a gradient of `columns` columns: A^T B. Added into what is there unless it is the
  // first.
  void gradient(const Part& a, const Array<3>& to, int64_t e, int64_t row, int64_t m0, int64_t m1, int64_t columns,
                int64_t R, S* const* packed, S* const* panels, bool value, bool tangent) {
    const bool add = !a.fresh || (to.stride[0] == 0 && e > 0);
    const bool straight = to.stride[2] == 1;
    // Memory with other strides gets a copy: `sums` is the place to add up, a row of it always the same member's.
    const int64_t ld = straight ? to.stride[1] : padded(larger(inputs_, larger(n_.H, Q_)));
    S* base = straight ? element<S>(to, e, row + m0) : a.w.sums + (row + m0) * ld;
    if (!straight && add)
      for (int64_t m = m0; m < m1; ++m)
        copy_row(element<S>(to, e, row + m), to.stride[2], base + (m - m0) * ld, 1, columns);
    const int64_t width = kWidest * L;
    for (int64_t column = 0; column < columns; column += width) {
      const int64_t valid = smaller(width, columns - column);
      const int nv = static_cast<int>((valid + L - 1) / L);
      Tile<S> t{};
      t.ldb = nv * L;
      t.K = R;
      t.ldi = t.ldc = ld;
      t.last = valid - (nv - 1) * L;
      for (int j = 0; j < nv; ++j) t.offset[j] = j * L;
      for (int64_t m = m0; m < m1; m += kTile) {
        S* const c = base + (m - m0) * ld + column;
        const int64_t rows = smaller<int64_t>(kTile, m1 - m);
        for (int64_t i = kTile; i < smaller<int64_t>(2 * kTile, m1 - m); ++i)  // the next tile's place
          for (int64_t j = 0; j < valid; j += 64 / int64_t{sizeof(S)}) __builtin_prefetch(c + i * ld + j, 1);
        bool begun = add;
        auto product = [&](int qa, int qb) {
          t.b = panels[qb] + column * R;
          // A tile has at most as many rows as registers allow.
          for (int64_t i = 0; i < rows; i += rows_of(nv)) {
            t.packed = packed[qa] + (m - m0) * R + i;
            t.c = c + i * ld;
            t.init = begun ? t.c : nullptr;
            run_tile<S, true>(t, static_cast<int>(smaller<int64_t>(rows_of(nv), rows - i)), nv);
          }
          begun = true;
        };
        if (P == 1) {
          product(0, 0);
        } else {
          if (value) product(P - 1, 0);
          if (tangent) product(0, P - 1);
          if (!begun)
            for (int64_t i = m; i < smaller(m + kTile, m1); ++i) zero_row(base + (i - m0) * ld + column, 1, valid);
        }
      }
    }
    if (!straight)
      for (int64_t m = m0; m < m1; ++m)
        copy_row(base + (m - m0) * ld, 1, element<S>(to, e, row + m), to.stride[2], columns);
  }

  void bias_gradient(const Part& a, const Params& dp, int64_t e, const Segment& s, int64_t m0, int64_t m1, int64_t R,
                     const S* const* da) {
    if (!dp.bW.data && !dp.bR.data) return;
    constexpr int Wide = 4;  // registers at a time: rows are far apart
    for (int64_t m = m0; m < m1; m += Wide * L) {
      Vec<S> sum[Wide];
      int64_t n[Wide];
      for (int k = 0; k < Wide; ++k) {
        sum[k] = Vec<S>(S(0));
        n[k] = smaller<int64_t>(L, m1 - m - k * L);
      }
      if (n[Wide - 1] > 0) {
        for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int k = 0; k < Wide; ++k) sum[k] = sum[k] + load(da[r] + s.column + m + k * L, k < Wide - 1 ? L : n[k]);
      } else {
        for (int64_t r = 0; r < R; ++r)
          for (int k = 0; k < Wide && n[k] > 0; ++k) sum[k] = sum[k] + load(da[r] + s.column + m + k * L, n[k]);
      }
      for (int k = 0; k < Wide; ++k) {
        for (int64_t j = 0; j < n[k]; ++j) {
          const int64_t at = m + k * L + j;
          if (dp.bW.data && s.w_row >= 0) write_bias(a, dp.bW, e, s.w_row + at, sum[k].v[j]);
          if (dp.bR.data && s.r_row >= 0) write_bias(a, dp.bR, e, s.r_row + at, sum[k].v[j]);
        }
      }
    }
  }

  void write_bias(const Part& a, const Array<2>& to, int64_t e, int64_t m, S sum) const {
    S& at = *element<S>(to, e, m);
    at = !a.fresh || (to.stride[0] == 0 && e > 0) ? at + sum : sum;
  }
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
