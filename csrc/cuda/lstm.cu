// SPDX-License-Identifier: Apache-2.0
#include "call.h"

namespace fusedrnn::cuda {
Status run_lstm(const Call& call) { return run_cell<cells::Lstm>(call); }
}  // namespace fusedrnn::cuda
