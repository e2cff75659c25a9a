// SPDX-License-Identifier: Apache-2.0
#include "cuda_twin.h"

namespace fusedrnn::cuda {
Status run_lstm(const Call& call) { return run_cell<cells::Lstm, Twin>(call); }
}  // namespace fusedrnn::cuda
