// SPDX-License-Identifier: Apache-2.0
// The sizes of a call as its host's side uses them, and how recompute cuts the time axis into parts.
#pragma once

#include <cstdint>

#include "../api.h"
#include "walk.h"

namespace fusedrnn::cuda {

// A part of the walk, of so many steps; where it begins on the time axis, in each direction.
struct Part {
  int64_t index, n, begin[2];
};

struct Measures {
  int64_t T, E, B, I, H, L, D, K;
  int64_t steps, sets;       // T*B; E*D
  int64_t pitch, wide;       // H and D*H, rounded up to 8
  int64_t every, parts = 1;  // recompute: steps of a part of the walk, 1 << shift; parts
  int shift = 0;
  bool reverse;

  static int64_t up(int64_t n) { return (n + 7) / 8 * 8; }

  explicit Measures(const Problem& problem)
      : T(problem.sizes.T),
        E(problem.sizes.E),
        B(problem.sizes.B),
        I(problem.sizes.I),
        H(problem.sizes.H),
        L(problem.sizes.L),
        D(problem.sizes.D),
        K(problem.sizes.K),
        steps(T * B),
        sets(E * D),
        pitch(up(H)),
        wide(up(D * H)),
        every(T),
        reverse(problem.reverse) {
    if (!problem.recompute || T == 0) return;
    // Steps of a part: few enough that its tape is small beside h, enough to fill the device and to pay for a launch.
    const int64_t least = B > 128 ? 16 : B > 32 ? 2048 / B : 64;
    for (every = 16, shift = 4; every < least || every * 8 < T; every *= 2) ++shift;
    parts = (T + every - 1) / every;
  }

  // What a layer takes in; and with the padding of its rows.
  int64_t inputs(int64_t l) const { return l == 0 ? I : D * H; }
  int64_t padded_inputs(int64_t l) const { return up(inputs(l)); }

  bool walks_backwards(int64_t d) const { return D == 2 ? d == 1 : reverse; }
  Part whole() const { return {0, T, {}}; }
  Part part(int64_t j) const {
    const int64_t at = j * every, n = T - at < every ? T - at : every;
    Part part{j, n, {}};
    for (int64_t d = 0; d < 2; ++d) part.begin[d] = walks_backwards(d < D ? d : 0) ? T - at - n : at;
    return part;
  }
};

// The whole walk.
inline Walk walk_of(const Problem& p, const Measures& n) {
  Walk w{};
  w.Tn = static_cast<int>(n.T), w.B = static_cast<int>(n.B), w.H = static_cast<int>(n.H);
  w.pitch = static_cast<int>(n.pitch), w.sets = static_cast<int>(n.sets), w.directions = static_cast<int>(n.D);
  w.s = -1, w.reverse = p.reverse, w.reset_to_initial = p.reset_to_initial;
  w.lengths = static_cast<const int64_t*>(p.lengths.data);
  w.len_e = p.lengths.stride[0], w.len_b = p.lengths.stride[1];
  w.reset = static_cast<const u8*>(p.reset.data);
  w.reset_t = p.reset.stride[0], w.reset_e = p.reset.stride[1], w.reset_b = p.reset.stride[2];
  return w;
}

}  // namespace fusedrnn::cuda
