// SPDX-License-Identifier: Apache-2.0
#include "call.h"

namespace fusedrnn::cuda {
Status run_gru(const Call& call) { return run_cell<cells::Gru>(call); }
Status run_gru_reset_before(const Call& call) { return run_cell<cells::GruResetBefore>(call); }
}  // namespace fusedrnn::cuda
