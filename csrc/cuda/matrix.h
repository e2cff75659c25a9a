// SPDX-License-Identifier: Apache-2.0
// Matrices in memory, and the product that a queue makes of them. All numbers of a product follow from its operands.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fusedrnn::cuda {

// What a queue is asked for. Row-major C (m,n) = A (m,k) B (k,n), or with `add` C += A B. ta: A is stored (k,m); tb: B
// is stored (n,k). Strides in elements.
struct Product {
  int64_t m, n, k;
  const void* A;
  int64_t lda, a_batch;
  bool ta;
  const void* B;
  int64_t ldb, b_batch;
  bool tb;
  void* C;
  int64_t ldc, c_batch;
  int64_t batch;
  bool add;
};

// `batch` matrices of type T, one every `step` elements; `ld` elements from row to row where it lies. Turned: it lies
// as (columns, rows). Number: const where it is only read.
template <class T, class Number = const typename T::Storage>
struct Matrix {
  Number* data = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t batch = 0, step = 0, ld = 0;
  bool is_turned = false;

  operator Matrix<T, const Number>() const
    requires(!std::is_const_v<Number>)
  {
    return {data, rows, columns, batch, step, ld, is_turned};
  }
  Matrix turned() const { return {data, columns, rows, batch, step, ld, !is_turned}; }
  Matrix of_rows(int64_t first, int64_t count) const {
    return {data + first * (is_turned ? 1 : ld), count, columns, batch, step, ld, is_turned};
  }
  Matrix of_columns(int64_t first, int64_t count) const { return turned().of_rows(first, count).turned(); }
};

inline void expect_fit(const Product& p, int64_t k, bool sizes_fit) {
  if (sizes_fit) return;
  throw std::logic_error("cuda: product of (.., " + std::to_string(p.k) + ") and (" + std::to_string(k) +
                         ", ..) into (" + std::to_string(p.m) + ", " + std::to_string(p.n) + "), batch " +
                         std::to_string(p.batch) + ": sizes differ");
}

// C = A B, or with `add` C += A B, for every matrix of the batch.
template <class Queue, class To, class T, class NumberA, class NumberB>
void product(Queue& queue, const Matrix<To, typename To::Storage>& C, const Matrix<T, NumberA>& A,
             const Matrix<T, NumberB>& B, bool add = false) {
  const Product p{C.rows, C.columns, A.columns,   A.data, A.ld, A.step, A.is_turned, B.data,
                  B.ld,   B.step,    B.is_turned, C.data, C.ld, C.step, C.batch,     add};
  expect_fit(p, B.rows,
             A.rows == C.rows && B.columns == C.columns && A.columns == B.rows && A.batch == C.batch &&
                 B.batch == C.batch && !C.is_turned);
  queue.template product<T, To>(p);
}

}  // namespace fusedrnn::cuda
