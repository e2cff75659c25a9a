// SPDX-License-Identifier: Apache-2.0
// clang-format off
#include "gpu.h"
#include "clip.h"
// clang-format on

namespace fusedrnn::cuda {

size_t clip_workspace_bytes(const Span* spans, size_t count) { return clip_doubles(spans, count) * sizeof(double); }
Status clip_norm(const Span* spans, size_t count, double order, double max_norm, double* norm, void* workspace,
                 void* stream) {
  return clip_norm_on<Gpu>(spans, count, order, max_norm, norm, workspace, stream);
}
Status clip_value(const Span* spans, size_t count, double limit, void* stream) {
  return clip_value_on<Gpu>(spans, count, limit, stream);
}

}  // namespace fusedrnn::cuda
