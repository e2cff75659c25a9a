// SPDX-License-Identifier: Apache-2.0
// Generation: the stack reads a token, a linear head makes logits of its output, a token is drawn and read next.
#pragma once

#include <cstdint>

#include "api.h"

namespace fusedrnn::cpu {

// What a call draws, beside the problem (T = E = D = 1, p.tokens (1,1,B): what the rows read first) and its results
// (hn, cn: the state after the last token that a row read; a row that has ended reads no more).
struct Generation {
  int64_t steps = 0;
  int64_t first_row = 0;  // row b is number first_row + b: random numbers depend on it, and on the step
  Array<2> head;          // (I,H), or (I,P) with a projection: logits = h head^T + head_bias
  Array<1> head_bias;     // (I); null: 0
  // In this order:
  double repetition_penalty = 1;  // logits of tokens seen are divided by it where they are > 0, else multiplied
  double temperature = 1;         // logits are divided by it; 0: the largest logit is taken
  int64_t top_k = 0;              // draw among so many of the largest logits; 0: all
  double top_p = 1;               // ... and of these among the fewest, largest first, that have so much of their mass
  const int64_t* stop = nullptr;  // tokens that end a row, which then repeats the one that it has drawn
  int64_t stops = 0;
  bool of_model = false;        // log_probs are those of softmax(logits), not of what the tokens were drawn from
  int64_t* drawn = nullptr;     // (steps,B), written
  double* log_probs = nullptr;  // (steps,B), written: of the tokens drawn, 0 where a row has ended; null: not wanted
  uint8_t* ended = nullptr;     // (B), read and written: rows that have drawn a token of `stop`
  uint8_t* seen = nullptr;      // (B,I), read and written: tokens that a row has seen; null without a penalty
};

// What became of a row in a step. The last three: no token can be drawn, because a logit is NaN or inf, or all are
// -inf. A single -inf is a token that is never drawn.
enum class Outcome : uint8_t { drawn, ended, nan, infinite, masked };

struct Drawn {
  Outcome outcome;
  int64_t token;
  double log_prob;  // 0 unless wanted
};

// The first step, and in it the lowest row, where no token can be drawn; `drawn`: there is none.
struct Failure {
  Outcome outcome = Outcome::drawn;
  int64_t step = 0, row = 0;  // counted as Generation::first does, and without first_row
};

// The seed is the problem's. After a failure nothing that was written is of use.
Failure generate(const Problem& problem, const Arguments& p, const Results& out, const Generation& g, int threads);

// One token of `count` logits for row `row` of the call: u in [0,1) is made of the first two words of the Philox block
// with key `seed` and counter (step, first_row + row, 1); the token is the first whose sum of exp((logit - largest) /
// temperature), over the tokens that top_k and top_p leave, in float64 and in the tokens' order, exceeds u times the
// whole sum. Of equal logits the earlier are the larger ones. `scratch` has kDrawScratch * count elements.
// `exponentials`: weights = exp((values - largest) / temperature), on the registers of an instruction set.
constexpr int64_t kDrawScratch = 4;
using Exponentials = void(const double* values, int64_t count, double largest, double temperature, double* weights);
template <class S>
Drawn draw_token(const S* logits, int64_t count, const Generation& g, uint64_t seed, int64_t step, int64_t row,
                 Exponentials* exponentials, double* scratch);
extern template Drawn draw_token(const float*, int64_t, const Generation&, uint64_t, int64_t, int64_t, Exponentials*,
                                 double*);
extern template Drawn draw_token(const double*, int64_t, const Generation&, uint64_t, int64_t, int64_t, Exponentials*,
                                 double*);

#define FUSEDRNN_DECLARE(isa)                                                                                         \
  namespace isa {                                                                                                     \
  Failure generate(const Problem& problem, const Arguments& p, const Results& out, const Generation& g, int threads); \
  }
FUSEDRNN_DECLARE(baseline)
FUSEDRNN_DECLARE(avx2)
FUSEDRNN_DECLARE(avx512)
FUSEDRNN_DECLARE(neon)
#undef FUSEDRNN_DECLARE

}  // namespace fusedrnn::cpu
