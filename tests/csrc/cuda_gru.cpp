// SPDX-License-Identifier: Apache-2.0
#include "cuda_cuts.h"
#include "cuda_runs.h"

namespace fusedrnn::test {
void add_gru(std::vector<Run>& runs) { add_cell<cells::Gru, 2>(runs); }
}  // namespace fusedrnn::test
