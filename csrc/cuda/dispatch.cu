// SPDX-License-Identifier: Apache-2.0
// cuda.h: from the entry points to the cell; what the device is; cuBLAS.
#include <dlfcn.h>

#include <map>
#include <mutex>

#include "call.h"

namespace fusedrnn::cuda {

const Cublas* cublas(std::string* why) {
  static Cublas functions = {};
  static std::string reason;
  static const bool found = [] {
    constexpr const char* kNames[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so"};
    void* library = nullptr;
    for (const char* name : kNames)  // first what the process already has
      if (!library) library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    for (const char* name : kNames)
      if (!library) library = dlopen(name, RTLD_NOW);
    if (!library) {
      reason =
          "cuBLAS was not found (tried libcublas.so.13, .12 and without number): import torch or cupy first, or "
          "install nvidia-cublas";
      return false;
    }
    const auto find = [&](auto& to, const char* name) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(dlsym(library, name));
      if (!to) reason = std::string("cuBLAS has no ") + name;
      return to != nullptr;
    };
    return find(functions.create, "cublasCreate_v2") && find(functions.set_stream, "cublasSetStream_v2") &&
           find(functions.set_workspace, "cublasSetWorkspace_v2") && find(functions.gemm, "cublasGemmStridedBatchedEx");
  }();
  if (!found) *why = reason;
  return found ? &functions : nullptr;
}

Status blas_handle(cudaStream_t stream, void* workspace, const Cublas** blas, Cublas::Handle* handle) {
  std::string why;
  *blas = cublas(&why);
  if (!*blas) return why;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return cudaGetErrorString(status);
  thread_local std::map<int, Cublas::Handle>
      handles;  // a handle serves one thread at a time; they live as long as the thread
  Cublas::Handle& mine = handles[device];
  if (!mine) {
    if (const int status = (*blas)->create(&mine); status != 0) return "cublasCreate: status " + std::to_string(status);
  }
  int status = (*blas)->set_stream(mine, stream);
  if (status == 0) status = (*blas)->set_workspace(mine, workspace, kBlasBytes);
  if (status != 0) return "cublasSetStream or cublasSetWorkspace: status " + std::to_string(status);
  *handle = mine;
  return {};
}

const Device* current_device(std::string* why) {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  int id = 0;
  cudaError_t status = cudaGetDevice(&id);
  if (status != cudaSuccess) {
    *why = std::string("no CUDA device: ") + cudaGetErrorString(status);
    return nullptr;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = devices.find(id);
  if (known != devices.end()) return &known->second;
  Device d;
  int major = 0, minor = 0, cooperative = 0;
  const auto ask = [&](int* to, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(to, attribute, id);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&cooperative, cudaDevAttrCooperativeLaunch);
  ask(&d.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (status != cudaSuccess) {
    *why = std::string("attributes of CUDA device ") + std::to_string(id) + ": " + cudaGetErrorString(status);
    return nullptr;
  }
  d.compute = 10 * major + minor;
  d.cooperative = cooperative != 0;
  if (d.compute >= 90) {
    // one kernel stands for all: every persistent kernel fills a multiprocessor
    using Typical = Forward<Shape<cells::Lstm, dev::BF16, Route::cluster, 4, 2, 1, 8, 1>>;
    for (int n = 1; n <= 16; ++n) {
      int clusters = 0;
      if (resident_clusters<Typical>(n, &clusters) == cudaSuccess)
        d.clusters[n] = clusters;
      else
        cudaGetLastError();  // this size is not to be had: not an error
    }
  }
  return &(devices[id] = d);
}

namespace {

Status run_any(const Call& call) {
  if (call.problem->recompute) return "recompute is not built into the CUDA kernels yet; expected recompute = false";
  switch (call.problem->cell) {
    case CellKind::rnn_tanh:
      return run_rnn_tanh(call);
    case CellKind::rnn_relu:
      return run_rnn_relu(call);
    case CellKind::lstm:
      return run_lstm(call);
    case CellKind::gru:
      return run_gru(call);
    case CellKind::gru_reset_before:
      return run_gru_reset_before(call);
    default:
      break;
  }
  return "cell " + std::to_string(static_cast<int>(call.problem->cell)) + " is none that the CUDA kernels know";
}

}  // namespace

Status tape_bytes(const Problem& problem, const Settings& settings, size_t* bytes) {
  return run_any({.kind = Call::Kind::tape_bytes, .problem = &problem, .settings = &settings, .bytes = bytes});
}

Status forward_workspace_bytes(const Problem& problem, const Arguments& p, const Results& out, bool keep,
                               const Settings& settings, size_t* bytes) {
  return run_any({.kind = Call::Kind::forward_bytes,
                  .problem = &problem,
                  .p = &p,
                  .out = &out,
                  .keep = keep,
                  .settings = &settings,
                  .bytes = bytes});
}

Status backward_workspace_bytes(const Problem& problem, const Arguments& p, const Results& g, const Arguments& dp,
                                const Settings& settings, size_t* bytes) {
  return run_any({.kind = Call::Kind::backward_bytes,
                  .problem = &problem,
                  .p = &p,
                  .out = &g,
                  .dp = &dp,
                  .settings = &settings,
                  .bytes = bytes});
}

Status forward(const Problem& problem, const Arguments& p, const Results& out, void* tape, bool keep, void* workspace,
               const Settings& settings, void* stream) {
  return run_any({.kind = Call::Kind::forward,
                  .problem = &problem,
                  .p = &p,
                  .out = &out,
                  .tape = tape,
                  .keep = keep,
                  .workspace = workspace,
                  .settings = &settings,
                  .stream = static_cast<cudaStream_t>(stream)});
}

Status backward(const Problem& problem, const Arguments& p, const void* tape, const Results& g, const Arguments& dp,
                void* workspace, const Settings& settings, void* stream) {
  return run_any({.kind = Call::Kind::backward,
                  .problem = &problem,
                  .p = &p,
                  .out = &g,
                  .dp = &dp,
                  .tape = const_cast<void*>(tape),
                  .workspace = workspace,
                  .settings = &settings,
                  .stream = static_cast<cudaStream_t>(stream)});
}

Status routes(const Problem& problem, const Settings& settings, const char** forward_route,
              const char** backward_route) {
  return run_any({.kind = Call::Kind::routes,
                  .problem = &problem,
                  .settings = &settings,
                  .forward_route = forward_route,
                  .backward_route = backward_route});
}

}  // namespace fusedrnn::cuda
