// SPDX-License-Identifier: Apache-2.0
// clang-format off
#include "gpu.h"
#include "ctc.h"
// clang-format on

namespace fusedrnn::cuda {

size_t ctc_workspace_bytes(const Ctc& call, int64_t most, int64_t longest) { return ctc_bytes(call, most, longest); }
Status ctc(const Ctc& call, int64_t most, int64_t longest, void* workspace, void* stream) {
  return ctc_on<Gpu>(call, most, longest, workspace, stream);
}

}  // namespace fusedrnn::cuda
