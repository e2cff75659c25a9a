// SPDX-License-Identifier: Apache-2.0
// Gradients of what a layer reads: dx = da W, columns of dW for tokens, the context and its weights.
// Read: da of a chunk, W.
// Written: dx or the gradient of the layer below, dW's columns, the context's gradients.
// Route: a member owns columns of x. Tokens: dW has columns for those that occur; they are added up, then written.
// Limit: FMA; for tokens the bandwidth of writing.
#pragma once

#include "backward_products.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class BackwardInputs : protected BackwardProducts<S, P> {
 protected:
  using Base = BackwardProducts<S, P>;
  using Base::Base;
  using Base::L, Base::Q_, Base::adds, Base::cell_, Base::context, Base::dp_, Base::dplane, Base::dx_adds_up,
      Base::has_W, Base::matrix_gradient, Base::n_, Base::norm_, Base::p_, Base::padded, Base::pairs_, Base::problem_,
      Base::segments, Base::sets_, Base::shape, Base::table_, Base::tape_, Base::weight_gradients;
  using typename Base::Part, typename Base::Scratch, typename Base::Segment;

  // Rows of the gradient of x W^T: in the order of gates with layer norm, else in that of da.
  const S* const* dx_rows(const Part& a, int q) const { return norm_ ? a.w.apart_rows[0][q] : a.w.da_rows[q]; }

  // dx of the columns owned: to the user, or to the layer below.
  void input_gradient(Part& a, int64_t s0, int64_t s1) {
    Scratch& w = a.w;
    const Rows& rows = a.rows;
    const int64_t pair0 = rows.off[s0], pairs = rows.off[s1] - pair0, ld = padded(a.source[0].width);
    const int64_t c0 = smaller(a.x_first * w.W[0].block * L, a.source[0].width);
    const int64_t c1 = smaller(a.x_end * w.W[0].block * L, a.source[0].width);
    const S* const* da[P];
    for (int q = 0; q < P; ++q) da[q] = dx_rows(a, q);
    for (int64_t b = a.x_first; b < a.x_end; ++b) {
      if (P == 1 || a.l > 0) multiply(w.W[0], b, da[0], pairs, static_cast<S*>(nullptr), 0, w.dx[0], ld);
      if constexpr (P == 2) {
        multiply(w.W[0], b, da[1], pairs, static_cast<S*>(nullptr), 0, w.dx[1], ld);
        if (has_W(a, 1)) multiply(w.W[1], b, da[0], pairs, w.dx[1], ld, w.dx[1], ld);
      }
    }
    if (c1 <= c0) return;
    for (int64_t s = s0; s < s1; ++s) {
      for (int64_t i = 0; i < rows.live[s]; ++i) {
        const int64_t r = rows.off[s] - pair0 + i, t = rows.time(a.reversed, s, i);
        if (a.l == 0) {
          S* to = element<S>(dp_.x, rows.place(t), rows.e[i], rows.b[i], c0);
          const S* from = w.dx[P - 1] + r * ld + c0;
          if (a.d == 0 && !dx_adds_up())
            copy_row(from, 1, to, dp_.x.stride[3], c1 - c0);
          else
            add_row(from, 1, to, dp_.x.stride[3], c1 - c0);
          continue;
        }
        for (int q = 0; q < P; ++q) {
          S* from = w.dx[q] + r * ld;
          if (problem_.dropout > 0) {
            const uint64_t row = static_cast<uint64_t>((t * n_.E + rows.e[i]) * n_.B + rows.b[i]);
            Dropout{problem_.dropout, problem_.seed}.apply(from + c0, c1 - c0,
                                                           row * static_cast<uint64_t>(n_.D * Q_) + c0, a.l - 1);
          }
          for (int d = 0; d < n_.D; ++d) {
            const int64_t low = larger(c0, d * Q_), high = smaller(c1, (d + 1) * Q_);
            if (high <= low) continue;
            const int64_t walk = n_.D == 1 ? s : rows.time(d == 1, t, i);
            S* to = dplane(q, a.l - 1, d, a.set) + (rows.off[walk] + i) * Q_ + low - d * Q_;
            if (a.d == 0)
              copy_row(from + low, 1, to, 1, high - low);
            else
              add_row(from + low, 1, to, 1, high - low);
          }
        }
      }
    }
  }

  // dx where no step writes it, or where all weight sets add into it.
  void zero_dx(const Team& part, int group, int groups) {
    if (!dp_.x.data || problem_.packed) return;
    for (int64_t set = group; set < sets_.count; set += groups) {
      const Rows& rows = sets_.rows[set];
      for (int64_t i = part.begin(sets_.N); i < part.end(sets_.N); ++i)
        for (int64_t t = dx_adds_up() ? 0 : rows.length[i]; t < n_.T; ++t)
          zero_row(element<S>(dp_.x, t, rows.e[i], rows.b[i]), dp_.x.stride[3], n_.I);
    }
    part.wait();
  }

  int64_t sum_begin(const Part& a) const { return smaller(a.team.begin(x_tiles()) * L, cell_.gates * n_.H); }

  int64_t sum_end(const Part& a) const { return smaller(a.team.end(x_tiles()) * L, cell_.gates * n_.H); }

  int64_t x_tiles() const { return (cell_.gates * n_.H + L - 1) / L; }

  void begin_context(Part& a) {
    Scratch& w = a.w;
    const int64_t m0 = sum_begin(a), m1 = sum_end(a);
    for (int q = 0; q < P; ++q)
      for (int64_t i = 0; i < sets_.N; ++i)
        zero_row(w.dz[q] + i * cell_.gates * n_.H + m0, 1, larger<int64_t>(m1 - m0, 0));
    w.context.fill(a.team, p_, a.rows, n_.K);
    a.team.wait();
    if (tape_.every)
      w.context.multiply_all(w.forward, cell_, p_, a.d, sets_.count == 1 ? 0 : a.set, n_.H, n_.K, sets_.N,
                             a.team.begin(w.forward.blocks()), a.team.end(w.forward.blocks()));
  }

  void sum_steps(Part& a, int64_t s0, int64_t s1) {
    const int64_t m0 = sum_begin(a), m1 = sum_end(a);
    if (m1 <= m0) return;
    for (int q = 0; q < P; ++q)
      for (int64_t s = s0; s < s1; ++s)
        for (int64_t i = 0; i < a.rows.live[s]; ++i)
          add_row(dx_rows(a, q)[a.rows.off[s] - a.rows.off[s0] + i] + m0, 1, a.w.dz[q] + i * cell_.gates * n_.H + m0, 1,
                  m1 - m0);
  }

  // Of the context and its weights: dz is what one step of the layer would have for da.
  void context_gradient(Part& a) {
    Scratch& w = a.w;
    const Rows& rows = a.rows;
    const S *const *dz[P], *const *ctx[P];
    for (int q = 0; q < P; ++q) dz[q] = w.dz_rows[q], ctx[q] = w.context.given[q] ? w.context.rows[q] : nullptr;
    Params dp;
    dp.W = dp_.context_weights[a.d];
    Part first = a;
    first.fresh = true;
    if (norm_) {
      matrix_gradient(first, dp.W, cell_.gates * n_.H, dz, n_.K, ctx, w.x_panels, sets_.N);
      a.team.wait();  // dz is everyone's
    } else if (dp.W.data && sets_.count == 1 && n_.E > 1 && dp.W.stride[0]) {
      for (int64_t e = 0; e < n_.E; ++e) {
        int64_t count = 0;
        for (int64_t i = 0; i < sets_.N; ++i) {
          if (rows.e[i] != e) continue;
          for (int q = 0; q < P && a.team.rank == 0; ++q) {
            w.picked[q][count] = dz[q][i];
            w.picked[q][pairs_ + count] = ctx[q] ? ctx[q][i] : nullptr;
          }
          ++count;
        }
        const S *const *dz_e[P], *const *ctx_e[P];
        for (int q = 0; q < P; ++q) dz_e[q] = w.picked[q], ctx_e[q] = ctx[q] ? w.picked[q] + pairs_ : nullptr;
        a.team.wait();
        weight_gradients(first, dp, e, count, n_.K, dz_e, ctx_e, nullptr, nullptr);
      }
    } else if (dp.W.data) {
      weight_gradients(first, dp, sets_.count == 1 ? 0 : a.set, sets_.N, n_.K, dz, ctx, nullptr, nullptr);
    }
    if (!dp_.context.data) return;
    static constexpr int in_order[4] = {0, 1, 2, 3}, n_first[3] = {2, 0, 1};
    const int64_t ld = padded(n_.K), e = sets_.count == 1 ? 0 : a.set;
    for (int q = 0; q < P; ++q) shape(w.W[q], cell_.gates * n_.H, n_.K, a.team.size);
    a.team.wait();
    const Panels<S>& first_W = w.W[0];
    const int64_t b0 = a.team.begin(first_W.blocks()), b1 = a.team.end(first_W.blocks());
    for (int64_t b = b0; b < b1; ++b) {
      for (int q = 0; q < P; ++q) {
        const Array<3>& m = p_[q]->context_weights[a.d];
        if (m.data)
          pack_rows(w.W[q], b, element<S>(m, e), m.stride[1], m.stride[2], n_.H, cell_.gates,
                    cell_.sums > cell_.gates && !norm_ ? n_first : in_order);
      }
      multiply(w.W[0], b, dz[P - 1], sets_.N, static_cast<S*>(nullptr), 0, w.dx[P - 1], ld);
      if constexpr (P == 2)
        if (p_[1]->context_weights[a.d].data) multiply(w.W[1], b, dz[0], sets_.N, w.dx[1], ld, w.dx[1], ld);
    }
    const int64_t c0 = smaller(b0 * first_W.block * L, n_.K), c1 = smaller(b1 * first_W.block * L, n_.K);
    for (int64_t i = 0; i < sets_.N && c1 > c0; ++i) {
      const S* from = w.dx[P - 1] + i * ld + c0;
      S* to = element<S>(dp_.context, rows.e[i], rows.b[i], c0);
      if (a.d == 0 && !dcontext_adds_up())
        copy_row(from, 1, to, dp_.context.stride[2], c1 - c0);
      else
        add_row(from, 1, to, dp_.context.stride[2], c1 - c0);
    }
    a.team.wait();
  }

  bool dcontext_adds_up() const { return n_.E > 1 && !dp_.context.stride[0]; }

  void zero_dcontext(const Team& team) const {
    if (!dp_.context.data || !dcontext_adds_up()) return;
    for (int64_t b = team.begin(n_.B); b < team.end(n_.B); ++b)
      zero_row(element<S>(dp_.context, 0, b), dp_.context.stride[2], n_.K);
    team.wait();
  }

  // da of a chunk into the columns of its tokens, pair by pair, each thread its own gate rows.
  void token_gradient(Part& a, int64_t s0, int64_t s1) {
    const Rows& rows = a.rows;
    const int64_t width = cell_.gates * n_.H, tiles = (width + L - 1) / L;
    const int64_t m0 = smaller(a.team.begin(tiles) * L, width), m1 = smaller(a.team.end(tiles) * L, width);
    if (m1 <= m0) return;
    if (a.fresh)
      for (int64_t kind = 0; kind < table_.of[a.set].count; ++kind)
        zero_row(a.w.columns + kind * width + m0, 1, m1 - m0);
    for (int64_t s = s0; s < s1; ++s)
      for (int64_t i = 0; i < rows.live[s]; ++i) {
        const int64_t r = rows.off[s] - rows.off[s0] + i;
        const int64_t kind = table_.of[a.set].place[a.w.tokens[r] + (table_.split ? rows.e[i] * n_.I : 0)];
        add_row(dx_rows(a, P - 1)[r] + m0, 1, a.w.columns + kind * width + m0, 1, m1 - m0);
      }
  }

  void write_columns(const Part& a, const Array<3>& to) const {
    const int64_t width = cell_.gates * n_.H, tiles = (width + L - 1) / L, e_first = sets_.count == 1 ? 0 : a.set;
    const int64_t m0 = smaller(a.team.begin(tiles) * L, width), m1 = smaller(a.team.end(tiles) * L, width);
    const bool adds = e_first > 0 && to.stride[0] == 0;
    Segment segment[3] = {{0, width, 0, 0, false}};
    const int segment_count = norm_ ? 1 : segments(segment);
    for (int64_t m = m0; m < m1; m += L) {
      int64_t row[L] = {};  // of W, for each column of da
      const int64_t n = smaller<int64_t>(L, m1 - m);
      for (int64_t j = 0; j < n; ++j)
        for (int k = 0; k < segment_count; ++k)
          if (segment[k].w_row >= 0 && m + j >= segment[k].column && m + j < segment[k].column + segment[k].count)
            row[j] = segment[k].w_row + m + j - segment[k].column;
      for (int64_t e = e_first; !adds && e < (sets_.count == 1 && to.stride[0] ? n_.E : e_first + 1); ++e)
        for (int64_t j = 0; j < n; ++j) zero_row(element<S>(to, e, row[j]), to.stride[2], n_.I);
      for (int64_t kind = 0; kind < table_.of[a.set].count; ++kind) {
        const int64_t key = table_.of[a.set].kinds[kind];
        const int64_t e = table_.split ? key / n_.I : e_first, token = table_.split ? key % n_.I : key;
        for (int64_t j = 0; j < n; ++j) *element<S>(to, e, row[j], token) += a.w.columns[kind * width + m + j];
      }
    }
  }
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
