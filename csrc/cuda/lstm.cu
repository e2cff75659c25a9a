// SPDX-License-Identifier: Apache-2.0
#include "gpu.h"

namespace fusedrnn::cuda {
Status run_lstm(const Call& call) { return run_cell<cells::Lstm, Gpu>(call); }
}  // namespace fusedrnn::cuda
