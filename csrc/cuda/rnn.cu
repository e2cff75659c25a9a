// SPDX-License-Identifier: Apache-2.0
#include "call.h"

namespace fusedrnn::cuda {
Status run_rnn_tanh(const Call& call) { return run_cell<cells::Rnn<false>>(call); }
Status run_rnn_relu(const Call& call) { return run_cell<cells::Rnn<true>>(call); }
}  // namespace fusedrnn::cuda
