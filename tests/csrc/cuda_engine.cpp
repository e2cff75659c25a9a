// SPDX-License-Identifier: Apache-2.0
// The host's side of the CUDA backend (csrc/cuda/engine.h), whole calls, with the CPU twin of the device under it: a
// shared library that tests/test_cuda_engine.py drives with NumPy arrays. Products are plain loops in float64 over
// operands rounded as on the GPU.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

// clang-format off
#include "device_cpu.h"
#include "cuda/gates.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/engine.h"
// clang-format on

namespace fusedrnn::cuda {
namespace {

template <class K>
concept UsesShared = requires { K::shared_bytes(); };

struct CpuQueue {
  dev::sim::Options options;

  template <class K>
  void run(const K& kernel, int64_t blocks, int cluster = 0, bool = false) {
    int shared = 0;
    if constexpr (UsesShared<K>)
      shared = K::shared_bytes();
    else if (blocks > 2)
      blocks = 2;  // these walk over what there is with any number of blocks
    dev::sim::launch(static_cast<int>(blocks), cluster ? cluster : 1, K::kThreads, shared, kernel, options);
  }
  void fill(void* p, int byte, size_t bytes) { std::memset(p, byte, bytes); }
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
};

// Small cuts of every route. kOctets: such that octets * gates is even.
template <class C, class T>
struct Small {
  static constexpr int kOctets = C::gates % 2 ? 2 : 1;
  static constexpr int chunks(int units, int warps) {
    return (C::gates * units / T::kPer + 4 * warps - 1) / (4 * warps);
  }
  using Forward = List<Shape<C, T, Route::single, 3, 1, kOctets, 2, 1>, Shape<C, T, Route::single, 2, 2, kOctets, 1, 2>,
                       Shape<C, T, Route::cluster, 2, 2, kOctets, 1, 1>, Shape<C, T, Route::grid, 1, 3, kOctets, 1, 1>>;
  using Backward = List<BackwardShape<C, T, Route::single, 2, 1, 32, chunks(32, 1), 1>,
                        BackwardShape<C, T, Route::cluster, 3, 1, 16, chunks(16, 1), 1>,
                        BackwardShape<C, T, Route::cluster, 2, 2, 32, chunks(32, 1), 2>,
                        BackwardShape<C, T, Route::grid, 3, 1, 16, chunks(48, 3), 1>>;
};
template <class C, class T>
  requires(std::is_same_v<T, F32> || std::is_same_v<T, F64> || C::two_products)
struct Small<C, T> {
  using Forward = List<>;
  using Backward = List<>;
};

// Mirrored in the Python file.
struct Call {
  const Problem* problem;
  const Arguments* p;
  const Results *out, *g;
  const Arguments* dp;
  int32_t tf32, route;
  uint64_t seed;
  char* failure;  // 256 bytes
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

// Exactly what was asked for, so that a sanitizer knows its end; full of NaN.
Memory memory(size_t bytes) {
  Memory m(std::aligned_alloc(256, (bytes + 255) / 256 * 256 + (bytes ? 0 : 256)));
  std::memset(m.get(), 0xFF, bytes);
  return m;
}

template <class C, class T>
int run(const Call& call) {
  using Forwards = typename Small<C, T>::Forward;
  using Backwards = typename Small<C, T>::Backward;
  Device device;
  for (int& n : device.clusters) n = 8;
  const Options options{call.route};
  int late = 0;
  Counting nothing;
  Engine<C, T, Forwards, Backwards, Counting> count(nothing, device, options, *call.problem, &late);
  CpuQueue queue{{.seed = call.seed, .policy = static_cast<dev::sim::Policy>(call.seed % 3)}};
  Engine<C, T, Forwards, Backwards, CpuQueue> engine(queue, device, options, *call.problem, &late);
  Arena forward_size(nullptr), backward_size(nullptr);
  count.forward(*call.p, *call.out, nullptr, true, forward_size);
  count.backward(*call.p, nullptr, *call.g, *call.dp, backward_size);
  const Memory tape = memory(count.tape_bytes()), forward_work = memory(forward_size.most()),
               backward_work = memory(backward_size.most());
  Arena forward_arena(forward_work.get()), backward_arena(backward_work.get());
  engine.forward(*call.p, *call.out, tape.get(), true, forward_arena);
  engine.backward(*call.p, tape.get(), *call.g, *call.dp, backward_arena);
  if (late) throw dev::sim::Failure("a wait was given up");
  if (forward_arena.most() != forward_size.most() || backward_arena.most() != backward_size.most())
    throw dev::sim::Failure("the call took another amount of memory than it had asked for");
  return static_cast<int>(engine.forward_route()) * 10 + static_cast<int>(engine.backward_route());
}

template <class C>
int run_cell(const Call& call) {
  switch (call.problem->dtype) {
    case Dtype::f16:
      return run<C, dev::F16>(call);
    case Dtype::bf16:
      return run<C, dev::BF16>(call);
    case Dtype::f32:
      return call.tf32 ? run<C, dev::TF32>(call) : run<C, F32>(call);
    default:
      return run<C, F64>(call);
  }
}

}  // namespace
}  // namespace fusedrnn::cuda

// Forward, then backward. 10 * the route of forward + that of backward, or -1 and the failure's text.
extern "C" int fusedrnn_cuda_on_cpu(const fusedrnn::cuda::Call* call) {
  using namespace fusedrnn;
  try {
    switch (call->problem->cell) {
      case CellKind::lstm:
        return cuda::run_cell<cells::Lstm>(*call);
      case CellKind::gru:
        return cuda::run_cell<cells::Gru>(*call);
      case CellKind::rnn_tanh:
        return cuda::run_cell<cells::Rnn<false>>(*call);
      case CellKind::rnn_relu:
        return cuda::run_cell<cells::Rnn<true>>(*call);
      default:
        return cuda::run_cell<cells::GruResetBefore>(*call);
    }
  } catch (const std::exception& e) {
    std::strncpy(call->failure, e.what(), 255);
    return -1;
  }
}
