// SPDX-License-Identifier: Apache-2.0
#include "cuda_twin.h"

namespace fusedrnn::cuda {
Status run_rnn_tanh(const Call& call) { return run_cell<cells::Rnn<false>, Twin>(call); }
Status run_rnn_relu(const Call& call) { return run_cell<cells::Rnn<true>, Twin>(call); }
}  // namespace fusedrnn::cuda
