// SPDX-License-Identifier: Apache-2.0
// Launching a kernel functor (see device.h), as a cluster or co-resident where it must be.
#pragma once

#include <cuda_runtime.h>

#include "device.h"

namespace fusedrnn::cuda {

template <class K>
concept UsesShared = requires { K::shared_bytes(); };

template <class K>
constexpr int shared_of() {
  if constexpr (UsesShared<K>)
    return K::shared_bytes();
  else
    return 0;
}

// The shared memory of a block on GPUs of a compute capability.
constexpr int shared_limit(int compute) {
  return 1024 * (compute < 80 ? 64 : compute == 86 || compute == 89 ? 99 : compute < 90 ? 163 : 227);
}

// Is it of use on GPUs of this compute capability? Compiled for others its body is empty, and never chosen: the cost
// model knows K::kCompute, and Device::shared_bytes is no more than the limit of what was compiled.
template <class K, int kCompute>
constexpr bool runs() {
  if constexpr (requires { K::kCompute; })
    return K::kCompute <= kCompute && shared_of<K>() <= shared_limit(kCompute);
  else
    return true;
}
template <class K, int kCompute>
constexpr bool kRuns = runs<K, kCompute>();

template <class K>
__global__ void __launch_bounds__(K::kThreads, 1) entry(const __grid_constant__ K kernel) {
#ifdef __CUDA_ARCH__
  if constexpr (kRuns<K, __CUDA_ARCH__ / 10>) kernel();
#endif
}

// cluster: blocks of a cluster, 0 = none. cooperative: fail rather than start with blocks waiting for room.
template <class K>
cudaError_t launch(const K& kernel, int blocks, int cluster, bool cooperative, cudaStream_t stream) {
  static_assert(sizeof(K) <= 4096, "more parameters than every driver takes");
  constexpr int bytes = shared_of<K>();
  if constexpr (bytes > 48 * 1024) {  // every time: it holds for the current device only
    const cudaError_t status = cudaFuncSetAttribute(entry<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
  }
  if (cluster > 8) {  // more than every device promises
    const cudaError_t status = cudaFuncSetAttribute(entry<K>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attributes[2];
  int n = 0;
  if (cluster > 0) {
    attributes[n].id = cudaLaunchAttributeClusterDimension;
    attributes[n].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    ++n;
  }
  if (cooperative) {
    attributes[n].id = cudaLaunchAttributeCooperative;
    attributes[n].val.cooperative = 1;
    ++n;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(K::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(n);
  return cudaLaunchKernelEx(&config, entry<K>, kernel);
}

// How many clusters of this kernel the device holds at once.
template <class K>
cudaError_t resident_clusters(int cluster, int* clusters) {
  constexpr int bytes = shared_of<K>();
  cudaError_t status = cudaFuncSetAttribute(entry<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess && cluster > 8)
    status = cudaFuncSetAttribute(entry<K>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(K::kThreads);
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, entry<K>, &config);
}

}  // namespace fusedrnn::cuda
