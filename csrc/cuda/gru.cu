// SPDX-License-Identifier: Apache-2.0
#include "gpu.h"

namespace fusedrnn::cuda {
Status run_gru(const Call& call) { return run_cell<cells::Gru, Gpu>(call); }
Status run_gru_reset_before(const Call& call) { return run_cell<cells::GruResetBefore, Gpu>(call); }
Status run_ligru(const Call& call) { return run_cell<cells::LiGru, Gpu>(call); }
Status run_mingru(const Call& call) { return run_cell<cells::MinGru, Gpu>(call); }
}  // namespace fusedrnn::cuda
