// SPDX-License-Identifier: Apache-2.0
// The few cuBLAS functions that are used, found at run time: in the process (PyTorch and CuPy bring them), else by
// name. So the library loads, and says what is missing, where there is no CUDA at all.
#pragma once

#include <cstddef>
#include <string>

namespace fusedrnn::cuda {

// The part of cuBLAS's interface that is used here; names and values are its own.
struct Cublas {
  using Handle = void*;
  int (*create)(Handle*);
  int (*set_stream)(Handle, void*);
  int (*set_workspace)(Handle, void*, size_t);
  int (*gemm)(Handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* A, int Atype, int lda,
              long long strideA, const void* B, int Btype, int ldb, long long strideB, const void* beta, void* C,
              int Ctype, int ldc, long long strideC, int batch, int compute, int algorithm);
};
constexpr int kCublasN = 0, kCublasT = 1;
constexpr int kCuda32F = 0, kCuda64F = 1, kCuda16F = 2, kCuda16BF = 14;
constexpr int kCompute32F = 68, kCompute32FFastTF32 = 77, kCompute64F = 70;

// Null where it was not found; then `why` says what was tried.
const Cublas* cublas(std::string* why);

}  // namespace fusedrnn::cuda
