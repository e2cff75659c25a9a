// SPDX-License-Identifier: Apache-2.0
// Generation: the stack reads a token, a linear head makes logits of its output, a token is drawn and read next.
#pragma once

#include <cstdint>

#include "../api.h"

namespace fusedrnn::cpu {

// What a call draws, beside the problem (T = E = D = 1, p.tokens (1,1,B): what the rows read first) and its results
// (hn, cn: the state after the last token that was read).
struct Generation {
  int64_t steps = 0;
  int64_t first = 0;       // number of the first step: the random numbers of a step depend on it
  Array<2> head;           // (I,H): logits = h head^T + head_bias
  Array<1> head_bias;      // (I); null: 0
  double temperature = 1;  // logits are divided by it; 0: the largest logit is taken
  int64_t top_k = 0;       // draw among so many of the largest logits; 0: all
  int64_t stop = -1;       // a token that ends a row, which then repeats it; -1: none
  int64_t* drawn;          // (steps,B), written
  uint8_t* ended;          // (B), read and written: rows that have drawn `stop`
};

// The seed is the problem's.
void generate(const Problem& problem, const Arguments& p, const Results& out, const Generation& g, int threads);

// One token of `count` logits: u in [0,1) is made of the first two words of the Philox block with key `seed` and
// counter (step, row, 1); the token is the first whose sum of exp((logit - largest) / temperature), in float64 and in
// the tokens' order, exceeds u times the whole sum. Of equal logits the earlier ones are among the top_k. `scratch`
// has 2 * count elements.
template <class S>
int64_t draw_token(const S* logits, int64_t count, const Generation& g, uint64_t seed, int64_t step, int64_t row,
                   double* scratch);
extern template int64_t draw_token(const float*, int64_t, const Generation&, uint64_t, int64_t, int64_t, double*);
extern template int64_t draw_token(const double*, int64_t, const Generation&, uint64_t, int64_t, int64_t, double*);

#define FUSEDRNN_DECLARE(isa)                                                                                      \
  namespace isa {                                                                                                  \
  void generate(const Problem& problem, const Arguments& p, const Results& out, const Generation& g, int threads); \
  }
FUSEDRNN_DECLARE(baseline)
FUSEDRNN_DECLARE(avx2)
FUSEDRNN_DECLARE(avx512)
FUSEDRNN_DECLARE(neon)
#undef FUSEDRNN_DECLARE

}  // namespace fusedrnn::cpu
