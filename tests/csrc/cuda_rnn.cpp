// SPDX-License-Identifier: Apache-2.0
#include "cuda_cuts.h"
#include "cuda_runs.h"

namespace fusedrnn::test {
void add_rnn(std::vector<Run>& runs) {
  add_cell<cells::Rnn<false>, 2>(runs);
  add_type<cells::Rnn<true>, dev::F16, 2>(runs);
}
}  // namespace fusedrnn::test
