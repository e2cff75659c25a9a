// SPDX-License-Identifier: Apache-2.0
// One call on its way from cuda.h to the cell's translation unit, and what that does with it.
#pragma once

#include "cells_on_gpu.h"  // before everything that is written on the device
#include "cuda.h"
#include "queue.h"
#include "shapes.h"

namespace fusedrnn::cuda {

struct Call {
  enum class Kind { tape_bytes, forward_bytes, backward_bytes, routes, forward, backward } kind;
  const Problem* problem;
  const Arguments* p = nullptr;
  const Results* out = nullptr;  // backward: the gradients of the results
  const Arguments* dp = nullptr;
  void* tape = nullptr;
  bool keep = false;
  void* workspace = nullptr;
  const Settings* settings;
  cudaStream_t stream = nullptr;
  size_t* bytes = nullptr;
  const char **forward_route = nullptr, **backward_route = nullptr;
};

// What stands in front of every workspace: cuBLAS's own, and the word that a kernel sets when it gives up a wait.
constexpr size_t kBlasBytes = size_t{32} << 20;

// The device that is current, asked once. Null and a reason where that fails.
const Device* current_device(std::string* why);
// A handle of this thread on the device that is current, with its stream and workspace set.
Status blas_handle(cudaStream_t stream, void* workspace, const Cublas** blas, Cublas::Handle* handle);

Status run_rnn_tanh(const Call& call);
Status run_rnn_relu(const Call& call);
Status run_lstm(const Call& call);
Status run_gru(const Call& call);
Status run_gru_reset_before(const Call& call);

template <class Cell, class T>
Status run(const Call& call) {
  using Forwards = typename Shapes<Cell, T>::Forward;
  using Backwards = typename Shapes<Cell, T>::Backward;
  std::string why;
  const Device* device = current_device(&why);
  if (!device) return why;
  const Options options{call.settings->route};
  const auto count = [&](auto&& body) {
    Counting queue;
    Engine<Cell, T, Forwards, Backwards, Counting> engine(queue, *device, options, *call.problem, nullptr);
    Arena arena(nullptr);
    body(engine, arena);
    return arena.most();
  };
  switch (call.kind) {
    case Call::Kind::tape_bytes:
      count([&](auto& engine, Arena&) { *call.bytes = engine.tape_bytes(); });
      return {};
    case Call::Kind::forward_bytes:
      *call.bytes = kBlasBytes + 256 + count([&](auto& engine, Arena& arena) {
                      engine.forward(*call.p, *call.out, nullptr, call.keep, arena);
                    });
      return {};
    case Call::Kind::backward_bytes:
      *call.bytes = kBlasBytes + 256 + count([&](auto& engine, Arena& arena) {
                      engine.backward(*call.p, nullptr, *call.out, *call.dp, arena);
                    });
      return {};
    case Call::Kind::routes:
      count([&](auto& engine, Arena&) {
        constexpr const char* names[] = {"single", "cluster", "grid", "stepwise"};
        *call.forward_route = names[static_cast<int>(engine.forward_route())];
        *call.backward_route = names[static_cast<int>(engine.backward_route())];
      });
      return {};
    default:
      break;
  }
  const Cublas* blas = nullptr;
  Cublas::Handle handle = nullptr;
  if (Status status = blas_handle(call.stream, call.workspace, &blas, &handle); !status.empty()) return status;
  Queue queue(call.stream, blas, handle);
  char* base = static_cast<char*>(call.workspace) + kBlasBytes;
  queue.fill(base, 0, 256);
  Engine<Cell, T, Forwards, Backwards, Queue> engine(queue, *device, options, *call.problem,
                                                     reinterpret_cast<int*>(base));
  Arena arena(base + 256);
  if (call.kind == Call::Kind::forward)
    engine.forward(*call.p, *call.out, call.tape, call.keep, arena);
  else
    engine.backward(*call.p, call.tape, *call.out, *call.dp, arena);
  return queue.failure();
}

template <class Cell>
Status run_cell(const Call& call) {
  switch (call.problem->dtype) {
    case Dtype::f16:
      return run<Cell, dev::F16>(call);
    case Dtype::bf16:
      return run<Cell, dev::BF16>(call);
    case Dtype::f32:
      return call.settings->f32 == Precision::tf32 ? run<Cell, dev::TF32>(call) : run<Cell, F32>(call);
    case Dtype::f64:
      return run<Cell, F64>(call);
  }
  return "dtype " + std::to_string(static_cast<int>(call.problem->dtype)) + " is none that the CUDA kernels know";
}

}  // namespace fusedrnn::cuda
