// SPDX-License-Identifier: Apache-2.0
#include "gpu.h"

namespace fusedrnn::cuda {
Status run_rnn_tanh(const Call& call) { return run_cell<cells::Rnn<false>, Gpu>(call); }
Status run_rnn_relu(const Call& call) { return run_cell<cells::Rnn<true>, Gpu>(call); }
}  // namespace fusedrnn::cuda
