// SPDX-License-Identifier: Apache-2.0
// Products of csrc/cuda/matrix.h by plain loops, against sums written out: turned operands, parts of matrices, batches;
// and what does not fit is refused.
#include <cstdio>
#include <vector>

#include "cuda/matrix.h"

using namespace fusedrnn::cuda;

namespace {

struct Whole {
  using Storage = int;
};

struct Loops {
  template <class T, class To>
  void product(const Product& p) {
    const auto at = [](const void* v, bool t, int64_t ld, int64_t first, int64_t row, int64_t column) {
      return static_cast<const int*>(v)[first + (t ? column * ld + row : row * ld + column)];
    };
    for (int64_t e = 0; e < p.batch; ++e)
      for (int64_t i = 0; i < p.m; ++i)
        for (int64_t j = 0; j < p.n; ++j) {
          int& c = static_cast<int*>(p.C)[e * p.c_batch + i * p.ldc + j];
          if (!p.add) c = 0;
          for (int64_t k = 0; k < p.k; ++k)
            c += at(p.A, p.ta, p.lda, e * p.a_batch, i, k) * at(p.B, p.tb, p.ldb, e * p.b_batch, k, j);
        }
  }
};

int wrong = 0;
void expect(bool ok, const char* what) {
  if (!ok) std::printf("%s\n", what), ++wrong;
}

template <class A, class B>
bool refused(const Matrix<Whole, int>& C, const A& a, const B& b) {
  Loops queue;
  try {
    product(queue, C, a, b);
  } catch (const std::logic_error&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  constexpr int64_t kBatch = 2;
  Loops queue;
  // A (3,5) and B (4,6), of which columns 1 to 3 and rows 2 to 3 are multiplied, as they stand and turned
  std::vector<int> a(kBatch * 15), b(kBatch * 24), c(kBatch * 12, 100);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<int>(i * i % 17) - 8;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<int>(i * 7 % 13) - 6;
  const Matrix<Whole, int> A{a.data(), 3, 5, kBatch, 15, 5}, C{c.data(), 3, 4, kBatch, 12, 4};
  const Matrix<Whole> B{b.data(), 4, 6, kBatch, 24, 6};
  const auto check = [&](const char* what, int before) {
    for (int64_t e = 0; e < kBatch; ++e)
      for (int64_t i = 0; i < 3; ++i)
        for (int64_t j = 0; j < 4; ++j) {
          int sum = before;
          for (int64_t k = 0; k < 3; ++k)
            sum += a[static_cast<size_t>(e * 15 + i * 5 + 1 + k)] * b[static_cast<size_t>(e * 24 + j * 6 + 2 + k)];
          expect(c[static_cast<size_t>(e * 12 + i * 4 + j)] == sum, what);
        }
  };
  product(queue, C, A.of_columns(1, 3), B.of_columns(2, 3).turned(), true);
  check("added to what was there", 100);
  product(queue, C, A.of_columns(1, 3), B.turned().of_rows(2, 3));
  check("rows of a turned matrix", 0);
  product(queue, C, A.turned().of_rows(1, 3).turned(), B.turned().of_rows(0, 5).of_rows(2, 3));
  check("turned twice", 0);
  const Matrix<Whole, int> part = C.of_rows(1, 2).of_columns(2, 2);
  product(queue, part, A.of_rows(1, 2).of_columns(1, 3), B.of_rows(2, 2).of_columns(2, 3).turned());
  check("a part of what was made", 0);

  expect(refused(C, A, B), "depths differ");
  expect(refused(C, A.of_columns(1, 3), B.of_columns(2, 3).turned().of_columns(0, 3)), "columns differ");
  expect(refused(C.of_rows(0, 2), A.of_columns(1, 3), B.of_columns(2, 3).turned()), "rows differ");
  expect(refused(C.turned(), B.of_columns(2, 3), A.of_columns(1, 3).turned()), "the result is turned");
  Matrix<Whole> one = B;
  one.batch = 1;
  expect(refused(C, A.of_columns(1, 3), one.of_columns(2, 3).turned()), "batches differ");
  return wrong != 0;
}
