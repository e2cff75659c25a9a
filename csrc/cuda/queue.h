// SPDX-License-Identifier: Apache-2.0
// The engine's queue on a GPU: a stream. The first thing that fails is kept, with what was asked for, and nothing is
// launched after it.
#pragma once

#include <cstdint>
#include <string>

#include "arrange.h"
#include "cublas.h"
#include "launch.h"
#include "matrix.h"

namespace fusedrnn::cuda {

// Which of cuBLAS's types and arithmetics a tag is.
template <class T>
struct BlasType;
template <>
struct BlasType<dev::F16> {
  static constexpr int kType = kCuda16F, kCompute = kCompute32F;
};
template <>
struct BlasType<dev::BF16> {
  static constexpr int kType = kCuda16BF, kCompute = kCompute32F;
};
template <>
struct BlasType<dev::TF32> {
  static constexpr int kType = kCuda32F, kCompute = kCompute32FFastTF32;
};
template <>
struct BlasType<F32> {
  static constexpr int kType = kCuda32F, kCompute = kCompute32F;
};
template <>
struct BlasType<F64> {
  static constexpr int kType = kCuda64F, kCompute = kCompute64F;
};

class Queue {
 public:
  Queue(cudaStream_t stream, const Cublas* blas, Cublas::Handle handle)
      : stream_(stream), blas_(blas), handle_(handle) {}

  template <class K>
  void run(const K& kernel, int64_t blocks, int cluster = 0, bool cooperative = false) {
    if (!failure_.empty()) return;
    const cudaError_t status = launch(kernel, static_cast<int>(blocks), cluster, cooperative, stream_);
    if (status != cudaSuccess)
      failure_ = std::string("launch of ") + __PRETTY_FUNCTION__ + " with " + std::to_string(blocks) + " blocks of " +
                 std::to_string(K::kThreads) + " threads, clusters of " + std::to_string(cluster) + ": " +
                 cudaGetErrorString(status);
  }
  void fill(void* p, int byte, size_t bytes) {
    if (!failure_.empty() || bytes == 0) return;
    const cudaError_t status = cudaMemsetAsync(p, byte, bytes, stream_);
    if (status != cudaSuccess)
      failure_ = "cudaMemsetAsync of " + std::to_string(bytes) + " bytes: " + cudaGetErrorString(status);
  }
  template <class T, class To>
  void product(const Product& p) {
    if (!failure_.empty() || p.m == 0 || p.n == 0 || p.batch == 0) return;
    const double one = 1, zero = 0;
    const float one_f = 1, zero_f = 0;
    const bool full = BlasType<T>::kCompute == kCompute64F;
    const void* alpha = full ? static_cast<const void*>(&one) : &one_f;
    const void* beta = p.add ? alpha : full ? static_cast<const void*>(&zero) : &zero_f;
    // cuBLAS is column-major: it makes C^T = B^T A^T
    const int status = blas_->gemm(
        handle_, p.tb ? kCublasT : kCublasN, p.ta ? kCublasT : kCublasN, static_cast<int>(p.n), static_cast<int>(p.m),
        static_cast<int>(p.k), alpha, p.B, BlasType<T>::kType, static_cast<int>(p.ldb), p.b_batch, p.A,
        BlasType<T>::kType, static_cast<int>(p.lda), p.a_batch, beta, p.C, BlasType<To>::kType, static_cast<int>(p.ldc),
        p.c_batch, static_cast<int>(p.batch), BlasType<T>::kCompute, -1);
    if (status != 0)
      failure_ = "cublasGemmStridedBatchedEx of (" + std::to_string(p.m) + " x " + std::to_string(p.k) + ") by (" +
                 std::to_string(p.k) + " x " + std::to_string(p.n) + "), batch " + std::to_string(p.batch) +
                 ": status " + std::to_string(status);
  }
  const std::string& failure() const { return failure_; }

 private:
  cudaStream_t stream_;
  const Cublas* blas_;
  Cublas::Handle handle_;
  std::string failure_;
};

}  // namespace fusedrnn::cuda
