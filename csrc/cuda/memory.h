// SPDX-License-Identifier: Apache-2.0
// Memory of a call, taken piece by piece from one; and the queue that runs nothing, which tells how much a call needs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

namespace fusedrnn::cuda {

// Memory from one piece; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(n) * sizeof(T) + 255) / 256 * 256;
    if (used_ > most_) most_ = used_;
    return reinterpret_cast<T*>(p);
  }
  size_t most() const { return most_; }

 private:
  friend class Borrowed;
  char* base_;
  size_t used_ = 0, most_ = 0;
};

// What is taken while it lives is given back.
class Borrowed {
 public:
  explicit Borrowed(Arena& arena) : arena_(arena), used_(arena.used_) {}
  ~Borrowed() { arena_.used_ = used_; }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;

 private:
  Arena& arena_;
  size_t used_;
};

struct Counting {
  template <class K>
  void run(const K&, int64_t, int = 0, bool = false) {}
  void fill(void*, int, size_t) {}
  template <class T, class To>
  void product(const Product&) {}
};

}  // namespace fusedrnn::cuda
