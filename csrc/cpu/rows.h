// SPDX-License-Identifier: Apache-2.0
// The rows of one weight set in walking order. Rows are sorted by length, longest first, so that the rows alive at any
// step are a prefix, and (step, row) pairs lie packed: pair (s, i) is number off[s] + i. The reverse direction walks
// every row from its own last step, so the same numbering serves both directions.
#pragma once

#include <cstdint>

#include "../api.h"
#include "threads.h"

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
  int kept;
  bool cell_state;

  FUSEDRNN_FORCE explicit Tape(const Problem& problem)
      : T(problem.sizes.T),
        H(problem.sizes.H),
        Q(outputs_of(problem)),
        every(0),
        kept(kept_of(problem)),
        cell_state(has_cell_state(problem)) {
    if (problem.recompute && kept > 0) {
      const int64_t B = problem.sizes.B > 0 ? problem.sizes.B : 1;
      every = B > 32 ? 8 : 256 / B;
      kept = 0;
    }
  }
  FUSEDRNN_FORCE int64_t c_steps() const { return !cell_state ? 0 : every ? (T + every - 1) / every : T; }
  FUSEDRNN_FORCE int64_t elements(int64_t N) const {
    return N * (T * Q + (c_steps() + T * kept) * H);
  }  // of one direction and weight set
  FUSEDRNN_FORCE int64_t c_offset(int64_t N) const { return T * N * Q; }
  FUSEDRNN_FORCE int64_t kept_offset(int64_t N) const { return c_offset(N) + c_steps() * N * H; }
};

// The stepwise engine's tape, of one layer, direction and weight set: all rows of h, then of c, of the kept gates, and
// with layer norm of x W^T and h' R^T, normalised, and of four numbers: 1/deviation of both, of c, and c's mean.
struct StepwiseTape {
  int64_t rows, Q, H, GH, kept;
  bool has_c, norm;

  FUSEDRNN_FORCE explicit StepwiseTape(const Problem& problem)
      : rows(problem.sizes.T * problem.sizes.B),
        Q(outputs_of(problem)),
        H(problem.sizes.H),
        GH(facts_of(problem.cell).gates * H),
        kept(facts_of(problem.cell).kept > 0 ? facts_of(problem.cell).kept : 1),
        has_c(has_cell_state(problem)),
        norm(problem.variant.layer_norm) {}
  FUSEDRNN_FORCE int64_t c() const { return rows * Q; }
  FUSEDRNN_FORCE int64_t gates() const { return c() + (has_c ? rows * H : 0); }
  FUSEDRNN_FORCE int64_t x_hat() const { return gates() + rows * kept * H; }
  FUSEDRNN_FORCE int64_t h_hat() const { return x_hat() + (norm ? rows * GH : 0); }
  FUSEDRNN_FORCE int64_t numbers() const { return h_hat() + (norm ? rows * GH : 0); }
  FUSEDRNN_FORCE int64_t elements() const { return numbers() + (norm ? rows * 4 : 0); }
};

}  // namespace fusedrnn::cpu
