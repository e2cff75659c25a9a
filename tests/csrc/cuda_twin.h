// SPDX-License-Identifier: Apache-2.0
// A machine (csrc/cuda/run.h) whose device is the CPU twin and whose memory is the host's: whole calls of the CUDA
// backend, from Python's bindings down to the kernels, without a GPU. Products are plain loops in float64 over operands
// rounded as on the GPU; kernels are cut small. (Of relu, whose slope jumps, only what is not rounded can be compared.)
#pragma once

// clang-format off
#include "device_cpu.h"
#include "cuda/gates.h"
#include "cells/cifg.h"
#include "cells/gru.h"
#include "cells/ligru.h"
#include "cells/lstm.h"
#include "cells/mingru.h"
#include "cells/minlstm.h"
#include "cells/rnn.h"
#include "cuda/run.h"
// clang-format on

#include <cstdlib>
#include <cstring>

namespace fusedrnn::cuda {

template <class K>
concept UsesShared = requires { K::shared_bytes(); };

// What the tests set and look at.
struct TwinState {
  dev::sim::Options options;
  int late[2] = {};
  int compute = 90;          // what device() says
  std::string broken_queue;  // not empty: every queue fails with this
};
TwinState& twin();

struct TwinQueue {
  template <class K>
  void run(const K& kernel, int64_t blocks, int cluster = 0, bool = false) {
    if (!failure_.empty()) return;
    int shared = 0;
    if constexpr (UsesShared<K>)
      shared = K::shared_bytes();
    else if (blocks > 2)
      blocks = 2;  // these walk over what there is with any number of blocks
    try {
      dev::sim::launch(static_cast<int>(blocks), cluster ? cluster : 1, K::kThreads, shared, kernel, twin().options);
    } catch (const std::exception& e) {
      failure_ = e.what();
    }
  }
  void fill(void* p, int byte, size_t bytes) {
    if (bytes) std::memset(p, byte, bytes);
  }
  template <class T, class To>
  void product(const Product& p) {
    const auto at = [](const void* v, bool t, int64_t stride, int64_t row, int64_t column) {
      const auto x = static_cast<const typename T::Storage*>(v)[t ? column * stride + row : row * stride + column];
      return static_cast<double>(T::load(T::operand(x)));
    };
    for (int64_t e = 0; e < p.batch; ++e) {
      const void* A = static_cast<const typename T::Storage*>(p.A) + e * p.a_batch;
      const void* B = static_cast<const typename T::Storage*>(p.B) + e * p.b_batch;
      for (int64_t i = 0; i < p.m; ++i)
        for (int64_t j = 0; j < p.n; ++j) {
          auto& c = (static_cast<typename To::Storage*>(p.C) + e * p.c_batch)[i * p.ldc + j];
          double sum = p.add ? static_cast<double>(To::load(c)) : 0;
          for (int64_t k = 0; k < p.k; ++k) sum += at(A, p.ta, p.lda, i, k) * at(B, p.tb, p.ldb, k, j);
          c = To::store(static_cast<MathOf<To>>(sum));
        }
    }
  }
  const std::string& failure() const { return failure_; }

  std::string failure_;
};

// Small cuts of every route. kOctets: such that octets * gates is even.
template <class C, class T>
struct Small {
  static constexpr int kOctets = C::gates % 2 ? 2 : 1;
  static constexpr int chunks(int units, int warps) {
    return (C::gates * units / T::kPer + 4 * warps - 1) / (4 * warps);
  }
  using Forward = decltype(joined(
      List<Shape<C, T, Route::single, 3, 1, kOctets, 2, 1>, Shape<C, T, Route::single, 2, 2, kOctets, 1, 2>,
           Shape<C, T, Route::cluster, 2, 2, kOctets, 1, 1>, Shape<C, T, Route::grid, 1, 3, kOctets, 1, 1>>(),
      Wide<C, T, 1, 1, 2, 2>()));
  using Backward = List<BackwardShape<C, T, Route::single, 2, 1, 32, chunks(32, 1), 1>,
                        BackwardShape<C, T, Route::cluster, 3, 1, 16, chunks(16, 1), 1>,
                        BackwardShape<C, T, Route::cluster, 2, 2, 32, chunks(32, 1), 2>,
                        BackwardShape<C, T, Route::grid, 3, 1, 16, chunks(48, 3), 1, (chunks(48, 3) + 1) / 2>>;
};
template <class C, class T>
  requires(std::is_same_v<T, F64> || C::two_products || !C::state_product || std::is_same_v<C, cells::Cifg> ||
           (std::is_same_v<C, cells::Rnn<true>> && !std::is_base_of_v<F32, T>))
struct Small<C, T> {
  using Forward = List<>;
  using Backward = List<>;
};

struct Twin {
  using Queue = TwinQueue;
  template <class Cell, class T>
  using Shapes = Small<Cell, T>;
  static constexpr size_t kInFront = 256;

  static const Device* device(std::string* why);
  static Status open(void*, void* workspace, std::optional<Queue>* queue) {
    std::memset(workspace, 0xFF, kInFront);  // it must be there
    queue->emplace(TwinQueue{twin().broken_queue});
    return {};
  }
  static Queue simple(void*) { return {twin().broken_queue}; }
  static int* late() { return twin().late; }
  static Status gave_up() {
    const bool late = twin().late[0], wrong = twin().late[1];
    twin().late[0] = twin().late[1] = 0;
    return late ? "an earlier call gave up waiting" : wrong ? kWrongToken : "";
  }
};

}  // namespace fusedrnn::cuda
