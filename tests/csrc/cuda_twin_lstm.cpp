// SPDX-License-Identifier: Apache-2.0
#include "cuda_twin.h"

namespace fusedrnn::cuda {
Status run_lstm(const Call& call) { return run_cell<cells::Lstm, Twin>(call); }
Status run_cifg(const Call& call) { return run_cell<cells::Cifg, Twin>(call); }
Status run_minlstm(const Call& call) { return run_cell<cells::MinLstm, Twin>(call); }
}  // namespace fusedrnn::cuda
