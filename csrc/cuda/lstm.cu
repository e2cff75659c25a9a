// SPDX-License-Identifier: Apache-2.0
#include "gpu.h"

namespace fusedrnn::cuda {
Status run_lstm(const Call& call) { return run_cell<cells::Lstm, Gpu>(call); }
Status run_cifg(const Call& call) { return run_cell<cells::Cifg, Gpu>(call); }
Status run_minlstm(const Call& call) { return run_cell<cells::MinLstm, Gpu>(call); }
}  // namespace fusedrnn::cuda
