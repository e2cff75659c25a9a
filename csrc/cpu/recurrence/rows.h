// SPDX-License-Identifier: Apache-2.0
// The rows of one weight set in walking order. Rows are sorted by length, longest first, so that the rows alive at any
// step are a prefix, and (step, row) pairs lie packed: pair (s, i) is number off[s] + i. The reverse direction walks
// every row from its own last step, so the same numbering serves both directions.
#pragma once

#include <cstdint>

#include "api.h"
#include "cpu/threads/threads.h"

namespace fusedrnn::cpu {

struct Rows {
  int64_t N = 0, steps = 0, total = 0;                    // rows, longest length, pairs
  bool uniform = true;                                    // every row has length `steps`, rows in natural order
  bool packed = false;                                    // x and y lie pair by pair
  int64_t *e = nullptr, *b = nullptr, *length = nullptr;  // [N]
  int64_t *live = nullptr, *off = nullptr;                // [steps + 1]; live[steps] = 0, off[steps] = total
  uint8_t* cut[2] = {};      // [direction][pair]: the state before the step is not the last one
  uint8_t* any_cut[2] = {};  // [direction][step]

  FUSEDRNN_FORCE int64_t time(bool reversed, int64_t s, int64_t i) const { return reversed ? length[i] - 1 - s : s; }
  // Where step t begins in x and y, in strides of their first axis.
  FUSEDRNN_FORCE int64_t place(int64_t t) const { return packed ? off[t] : t; }
  FUSEDRNN_FORCE bool is_cut(bool reversed, int64_t s, int64_t i) const {
    return cut[reversed] && cut[reversed][off[s] + i];
  }
  FUSEDRNN_FORCE bool step_cut(bool reversed, int64_t s) const { return cut[reversed] && any_cut[reversed][s]; }
};

// Rows (e, b) with e in [e_begin, e_end). Directions for which no cut is wanted are left out.
Rows make_rows(const Problem& problem, int64_t e_begin, int64_t e_end, Workspace& workspace);

// Values kept beside h and c: a cell's own; zoneout's RNN keeps its h as it was before.
FUSEDRNN_FORCE int kept_of(const Problem& problem) {
  const int kept = facts_of(problem.cell).kept;
  return kept == 0 && problem.variant.zoneout_h > 0 ? 1 : kept;
}

// The tape, in elements: per layer and direction, per weight set, h of all pairs, then c, then the kept values.
struct Tape {
  int64_t T, H, Q, every;  // Q: units of h. c is kept before every `every`-th step (recompute) or after each step (0)
  int kept, gates;
  bool cell_state, norm;  // norm: x W^T and h' R^T as they are before the gain, and four numbers a row

  FUSEDRNN_FORCE explicit Tape(const Problem& problem)
      : T(problem.sizes.T),
        H(problem.sizes.H),
        Q(outputs_of(problem)),
        every(0),
        kept(kept_of(problem)),
        gates(facts_of(problem.cell).gates),
        cell_state(has_cell_state(problem)),
        norm(problem.variant.layer_norm) {
    if (problem.recompute && kept > 0) {
      const int64_t B = problem.sizes.B > 0 ? problem.sizes.B : 1;
      every = B > 32 ? 8 : 256 / B;
      kept = 0;
      norm = false;
    }
  }
  FUSEDRNN_FORCE int64_t c_steps() const { return !cell_state ? 0 : every ? (T + every - 1) / every : T; }
  FUSEDRNN_FORCE int64_t elements(int64_t N) const {
    return hat_offset(N, 0) + (norm ? N * T * (2 * gates * H + 4) : 0);
  }  // of one direction and weight set
  FUSEDRNN_FORCE int64_t c_offset(int64_t N) const { return T * N * Q; }
  FUSEDRNN_FORCE int64_t kept_offset(int64_t N) const { return c_offset(N) + c_steps() * N * H; }
  // Rows of G*H of x W^T (which = 0) and h' R^T (1); rows of four: 1 / deviation of both, mean and 1 / deviation of c.
  FUSEDRNN_FORCE int64_t hat_offset(int64_t N, int which) const {
    return kept_offset(N) + T * N * (kept + which * gates) * H;
  }
  FUSEDRNN_FORCE int64_t numbers_offset(int64_t N) const { return hat_offset(N, 2); }
};

}  // namespace fusedrnn::cpu
