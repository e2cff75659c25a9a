// SPDX-License-Identifier: Apache-2.0
#include "cuda_twin.h"

namespace fusedrnn::cuda {
Status run_gru(const Call& call) { return run_cell<cells::Gru, Twin>(call); }
Status run_gru_reset_before(const Call& call) { return run_cell<cells::GruResetBefore, Twin>(call); }
Status run_ligru(const Call& call) { return run_cell<cells::LiGru, Twin>(call); }
Status run_mingru(const Call& call) { return run_cell<cells::MinGru, Twin>(call); }
}  // namespace fusedrnn::cuda
