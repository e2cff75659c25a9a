// SPDX-License-Identifier: Apache-2.0
// The GPU as a machine: what the device is, cuBLAS, memory; and of cuda.h what concerns the devices.
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <vector>

#include "gpu.h"

namespace fusedrnn::cuda {

namespace {

// Allocations of ours must not spoil a graph that this thread or, in CUDA's global mode, another one is capturing:
// they put nothing on a stream.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A cuBLAS handle serves one thread at a time. A thread keeps those it has used, one a device, and leaves them to
// others when it ends; none is ever destroyed, since at the end of the process CUDA may be gone before us.
struct Handles {
  std::mutex mutex;
  std::multimap<int, Cublas::Handle> free;
};
Handles& handles() {
  static Handles* const all = new Handles;
  return *all;
}
struct OwnHandles {
  std::map<int, Cublas::Handle> of_device;
  ~OwnHandles() {
    const std::lock_guard<std::mutex> lock(handles().mutex);
    for (const auto& [device, handle] : of_device)
      if (handle) handles().free.emplace(device, handle);
  }
};

}  // namespace

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

Status Gpu::open(void* stream, void* workspace, std::optional<Queue>* queue) {
  std::string why;
  const Cublas* blas = cublas(&why);
  if (!blas) return why;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess)
    return std::string("cudaGetDevice: ") + cudaGetErrorString(status);
  thread_local OwnHandles own;
  Cublas::Handle& mine = own.of_device[device];
  if (!mine) {
    const std::lock_guard<std::mutex> lock(handles().mutex);
    if (const auto left = handles().free.find(device); left != handles().free.end()) {
      mine = left->second;
      handles().free.erase(left);
    }
  }
  if (!mine) {
    const BesideCaptures relaxed;
    if (const int status = blas->create(&mine); status != 0) {
      mine = nullptr;
      return "cublasCreate: status " + std::to_string(status);
    }
  }
  int status = blas->set_stream(mine, stream);
  if (status == 0) status = blas->set_workspace(mine, workspace, kInFront);
  if (status != 0) return "cublasSetStream or cublasSetWorkspace: status " + std::to_string(status);
  queue->emplace(static_cast<cudaStream_t>(stream), blas, mine);
  return {};
}

namespace {

// Two words, mapped into every device; a call that finds none is not run.
int* late_words(std::string* why) {
  static std::mutex mutex;
  static int* words = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (words) return words;
  const BesideCaptures relaxed;
  void* p = nullptr;
  const cudaError_t status = cudaHostAlloc(&p, 2 * sizeof(int), cudaHostAllocMapped | cudaHostAllocPortable);
  if (status != cudaSuccess) {
    *why = std::string("cudaHostAlloc of two words: ") + cudaGetErrorString(status);
    cudaGetLastError();
    return nullptr;
  }
  words = static_cast<int*>(p);
  words[0] = words[1] = 0;
  return words;
}

}  // namespace

int* Gpu::late() {
  std::string why;
  return late_words(&why);
}

Status Gpu::gave_up() {
  std::string why;
  int* const words = late_words(&why);
  if (!words) return why;
  const bool late = __atomic_exchange_n(words, 0, __ATOMIC_RELAXED),
             wrong = __atomic_exchange_n(words + 1, 0, __ATOMIC_RELAXED);
  if (late)
    return "an earlier call on a GPU gave up waiting for another block, so what it returned is wrong (this call was "
           "not run): force the route \"stepwise\", and please report the sizes";
  return wrong ? kWrongToken : "";
}

const Device* Gpu::device(std::string* why) {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  int id = 0;
  cudaError_t status = cudaGetDevice(&id);
  if (status != cudaSuccess) {
    *why = std::string("no CUDA device: ") + cudaGetErrorString(status) + " (the kernels were compiled with CUDA " +
           std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) + ")";
    cudaGetLastError();
    return nullptr;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = devices.find(id);
  if (known != devices.end()) return &known->second;
  const BesideCaptures relaxed;
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
  d.cooperative = cooperative != 0;
  // What runs is the code that was compiled, perhaps for an older architecture: its kernels may lack what this one has.
  using Typical = Forward<cuda::Shape<cells::Lstm, dev::BF16, Route::cluster, 4, 2, 1, 8, 1>>;
  cudaFuncAttributes code = {};
  status = cudaFuncGetAttributes(&code, entry<Typical>);
  if (status != cudaSuccess) {
    *why = std::string("CUDA device ") + std::to_string(id) + " has compute capability " + std::to_string(major) + "." +
           std::to_string(minor) + ", and the kernels were compiled for " + built_for() + ": " +
           cudaGetErrorString(status);
    cudaGetLastError();  // not to be found by the next call
    return nullptr;
  }
  d.compute = std::min(10 * major + minor, code.ptxVersion);
  d.shared_bytes = std::min(d.shared_bytes, shared_limit(code.ptxVersion));
  d.wgmma = 10 * major + minor == 90 && std::string(built_for()).find("sm_90a") != std::string::npos;
  std::string no_word;
  if (!late_words(&no_word)) {
    *why = no_word;
    return nullptr;
  }
  if (d.compute >= 90) {
    // one kernel stands for all: every persistent kernel fills a multiprocessor
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

Status devices(std::vector<Found>* found) {
  found->clear();
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  for (int id = 0; status == cudaSuccess && id < count; ++id) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, id);
    if (status == cudaSuccess)
      found->push_back({properties.name, 10 * properties.major + properties.minor, properties.multiProcessorCount,
                        static_cast<int64_t>(properties.totalGlobalMem)});
  }
  if (status == cudaSuccess) return count ? "" : "the driver shows no device";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

const char* built_for() { return FUSEDRNN_CUDA_ARCHITECTURES; }

OnDevice::OnDevice(const void* memory, Status* status) {
  if (!memory) return;  // an empty array: any device will do
  cudaPointerAttributes attributes;
  int current = 0;
  cudaError_t done = cudaPointerGetAttributes(&attributes, memory);
  if (done == cudaSuccess && attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
    *status = "the memory at " + std::to_string(reinterpret_cast<uintptr_t>(memory)) + " is not on a CUDA device";
    return;
  }
  if (done == cudaSuccess) done = cudaGetDevice(&current);
  if (done == cudaSuccess && attributes.device != current) {
    done = cudaSetDevice(attributes.device);
    if (done == cudaSuccess) before_ = current;
  }
  if (done != cudaSuccess) {
    cudaGetLastError();
    *status = std::string("finding the device of an array: ") + cudaGetErrorString(done);
  }
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

Status upload(void* to, const void* from, size_t bytes, void* stream) {
  // A graph would read `from` again whenever it runs, long after it has gone.
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture) != cudaSuccess)
    cudaGetLastError();
  else if (capture != cudaStreamCaptureStatusNone)
    return "copy of " + std::to_string(bytes) +
           " bytes to the device: the stream is capturing a graph, which a host array cannot go into; copy it to the "
           "device before";
  // Memory that CUDA knows is read when the copy's turn comes; all other before the call returns.
  std::vector<char> own;
  cudaPointerAttributes attributes = {};
  if (cudaPointerGetAttributes(&attributes, from) != cudaSuccess)
    cudaGetLastError();
  else if (attributes.type == cudaMemoryTypeHost)
    own.assign(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
  const cudaError_t status = cudaMemcpyAsync(to, own.empty() ? from : own.data(), bytes, cudaMemcpyHostToDevice,
                                             static_cast<cudaStream_t>(stream));
  return status == cudaSuccess
             ? ""
             : "copy of " + std::to_string(bytes) + " bytes to the device: " + cudaGetErrorString(status);
}

Status download(void* to, const void* from, size_t bytes, void* stream) {
  cudaError_t status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) status = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  return status == cudaSuccess
             ? ""
             : "copy of " + std::to_string(bytes) + " bytes from the device: " + cudaGetErrorString(status);
}

}  // namespace fusedrnn::cuda
