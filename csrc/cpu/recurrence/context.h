// SPDX-License-Identifier: Apache-2.0
// The context: a vector for each row that layer 0 sees at every step.   z += ctx Wc^T,   dWc = dz^T ctx,   dctx = dz Wc
// Read: context (E,B,K), its weights (E,G*H,K).
// Written: sums of z's shape, one row of them for each row, and added to z. With P = 2 every number is a value with its
//   tangent.
// Route: the product is made once a call; a step adds a row. Backward (backward_inputs.h) sums da over the steps first.
// Limit: packing and reading Wc, which few rows share.
#pragma once

#include "weights.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

template <class S, int P>
class Context {
 public:
  void allocate(const Arguments* const* p, const Sizes& n, int64_t N, const CellTable<S, P>& cell,
                Workspace& workspace) {
    constexpr int L = Vec<S>::lanes;
    const int64_t units = (n.H + L - 1) / L * L;
    for (int q = 0; q < P; ++q) {
      given[q] = p[q]->context.data != nullptr;
      weights_[q].data = take<S>(workspace, units * cell.gates * n.K);
      rows[q] = take<const S*>(workspace, N);
      copied_[q] = take<S>(workspace, N * n.K);
      z_[q] = take<S>(workspace, N * units * cell.sums);
    }
  }

  // Row pointers to the context: this member's part of them.
  void fill(const Team& team, const Arguments* const* p, const Rows& all, int64_t K) {
    for (int q = 0; q < P; ++q) {
      const Array<3>& from = p[q]->context;
      for (int64_t i = team.begin(all.N); given[q] && i < team.end(all.N); ++i) {
        rows[q][i] = element<S>(from, all.e[i], all.b[i]);
        if (from.stride[2] == 1) continue;
        copy_row(rows[q][i], from.stride[2], copied_[q] + i * K, 1, K);
        rows[q][i] = copied_[q] + i * K;
      }
    }
  }

  // The sums of blocks [first, end) of `like`, once all pointers are there. T: what the weights consist of.
  template <class T = S>
  void multiply_all(const ForwardWeights<S, P>& like, const CellTable<S, P>& cell, const Arguments* const* p, int d,
                    int64_t e, int64_t H, int64_t K, int64_t N, int64_t first, int64_t end) {
    static constexpr int gate[4] = {0, 1, 2, 3};
    for (int q = 0; q < P; ++q) {
      const Array<3>& m = p[q]->context_weights[d];
      Panels<S>& w = weights_[q];
      w.K = K;
      w.units = H;
      w.gates = cell.gates;
      w.sums = cell.sums;
      w.block = like.W[0].block;
      for (int g = 0; g < cell.gates; ++g) w.sum[g] = cell.x_sum[g];
      for (int64_t b = first; m.data && b < end; ++b)
        pack_transposed(w, b, element<T>(m, e), m.stride[1], m.stride[2], H, gate);
      const int64_t begin = like.unit(first) * cell.sums, width = width_of(like, cell, first, end);
      for (int64_t i = 0; i < N; ++i) zero_row(z_[q] + i * like.ldz + begin, 1, width);
    }
    for (int64_t b = first; b < end; ++b) {
      multiply(weights_[0], b, rows[0], N, z_[0], like.ldz, z_[0], like.ldz);
      if constexpr (P == 2) {
        if (given[1]) multiply(weights_[0], b, rows[1], N, z_[1], like.ldz, z_[1], like.ldz);
        if (p[1]->context_weights[d].data) multiply(weights_[1], b, rows[0], N, z_[1], like.ldz, z_[1], like.ldz);
      }
    }
  }

  // z of the pairs of steps [s0, s1), one block of units.
  void add(const ForwardWeights<S, P>& like, const CellTable<S, P>& cell, int64_t block, const Rows& all, int64_t s0,
           int64_t s1, S* const* z) const {
    const int64_t begin = like.unit(block) * cell.sums, width = width_of(like, cell, block, block + 1);
    for (int q = 0; q < P; ++q)
      for (int64_t s = s0; s < s1; ++s)
        for (int64_t i = 0; i < all.live[s]; ++i)
          add_row(z_[q] + i * like.ldz + begin, 1, z[q] + (all.off[s] - all.off[s0] + i) * like.ldz + begin, 1, width);
  }

  const S** rows[P];
  bool given[P];

 private:
  static int64_t width_of(const ForwardWeights<S, P>& like, const CellTable<S, P>& cell, int64_t first, int64_t end) {
    constexpr int L = Vec<S>::lanes;
    const int64_t from = first * like.W[0].block, to = smaller(end * like.W[0].block, like.W[0].tiles());
    return larger<int64_t>(to - from, 0) * cell.sums * L;
  }

  Panels<S> weights_[P];
  S *copied_[P], *z_[P];
};

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
