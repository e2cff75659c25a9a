// SPDX-License-Identifier: Apache-2.0
// The extension module that tests/cuda_twin.py builds: the bindings of csrc/bindings/cuda.cpp over the CPU twin.
#include "cuda_twin.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "cuda/clip.h"
#include "cuda/ctc.h"

namespace fusedrnn::cuda {

// So few that a grid of more than a few rows takes several launches, or kernels that take many rows at once.
constexpr int kMultiprocessors = 7;

TwinState& twin() {
  static TwinState state;
  return state;
}

const Device* Twin::device(std::string* why) {
  static Device device;
  for (int& n : device.clusters) n = twin().compute >= 90 ? 8 : 0;
  device.compute = twin().compute;
  device.shared_bytes = (device.compute < 80 ? 64 : device.compute < 90 ? 99 : 227) * 1024;
  device.multiprocessors = kMultiprocessors;
  if (twin().compute == 0) {
    *why = "no CUDA device: the twin was told so";
    return nullptr;
  }
  return &device;
}

size_t clip_workspace_bytes(const Span* spans, size_t count) { return clip_doubles(spans, count) * sizeof(double); }
Status clip_norm(const Span* spans, size_t count, double order, double max_norm, double* norm, void* workspace,
                 void* stream) {
  return clip_norm_on<Twin>(spans, count, order, max_norm, norm, workspace, stream);
}
Status clip_value(const Span* spans, size_t count, double limit, void* stream) {
  return clip_value_on<Twin>(spans, count, limit, stream);
}

size_t ctc_workspace_bytes(const Ctc& call, int64_t most, int64_t longest) { return ctc_bytes(call, most, longest); }
Status ctc(const Ctc& call, int64_t most, int64_t longest, void* workspace, void* stream) {
  return ctc_on<Twin>(call, most, longest, workspace, stream);
}

Status devices(std::vector<Found>* found) {
  found->clear();
  if (twin().compute == 0) return "no CUDA device: the twin was told so";
  found->push_back({"CPU twin", twin().compute, kMultiprocessors, int64_t{1} << 30});
  return {};
}
const char* built_for() { return "twin"; }

OnDevice::OnDevice(const void*, Status*) {}
OnDevice::~OnDevice() = default;
Status upload(void* to, const void* from, size_t bytes, void*) {
  std::memcpy(to, from, bytes);
  return {};
}
Status download(void* to, const void* from, size_t bytes, void*) {
  std::memcpy(to, from, bytes);
  return {};
}

}  // namespace fusedrnn::cuda

PYBIND11_MODULE(fusedrnn_cuda_twin, module) {
  using fusedrnn::cuda::twin;
  fusedrnn::bindings::register_cuda(module);
  auto own = module.attr("cuda");
  own.attr("schedule") = pybind11::cpp_function([](uint64_t seed) {
    twin().options.seed = seed;
    twin().options.policy = static_cast<fusedrnn::dev::sim::Policy>(seed % 3);
  });
  own.attr("pretend") = pybind11::cpp_function(
      [](int compute, bool late, const std::string& broken) {
        twin().compute = compute;
        twin().late[0] = late, twin().late[1] = false;
        twin().broken_queue = broken;
      },
      pybind11::arg("compute") = 90, pybind11::arg("late") = false, pybind11::arg("broken") = "");
}
