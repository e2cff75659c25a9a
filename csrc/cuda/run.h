// SPDX-License-Identifier: Apache-2.0
// What a cell's translation unit does with a call, on a machine: the GPU (gpu.h), or in the tests its CPU twin.
//
// A machine has: device(), which describes it; Queue, on which the engine runs, from open() (with products) or simple()
// (kernels alone); kInFront, the bytes of a workspace that open() wants for itself; Shapes<Cell, T>, the persistent
// kernels that are built; late(), two words that outlive the call: a kernel sets the first when it gives up a wait, the
// second when it meets a token that is no input; and gave_up(), which tells of it and forgets it.
#pragma once

#include <optional>

#include "call.h"
#include "engine.h"
#include "tangents.h"

namespace fusedrnn::cuda {

// Tangents are computed in these types.
template <class T>
constexpr bool kTangents = std::is_same_v<T, F32> || std::is_same_v<T, F64>;

constexpr const char* name_of(Route route) {
  constexpr const char* names[] = {"single", "cluster", "grid", "stepwise"};
  return names[static_cast<int>(route)];
}

template <class Cell, class T, class Queue>
void run_tangents(const Call& call, Queue& queue, Arena& work, const Options& options) {
  Tangents<Cell, T, Queue> tangents(queue, work, *call.problem, options);
  const Along<Arguments> p{*call.p, *call.v};
  if (call.kind == Call::Kind::jvp || call.kind == Call::Kind::jvp_bytes)
    tangents.jvp(p, *call.out);
  else
    tangents.hvp(p, {*call.out, *call.t}, *call.dp, *call.tout);
}

// A call that does something, on the machine.
template <class Cell, class T, class Forwards, class Backwards, class Machine>
Status run_on(const Call& call, const Device& device, Options options) {
  using Queue = typename Machine::Queue;
  if (Status status = Machine::gave_up(); !status.empty()) return status;
  std::optional<Queue> queue;
  if (Status status = Machine::open(call.stream, call.workspace, &queue); !status.empty()) return status;
  Arena work(static_cast<char*>(call.workspace) + Machine::kInFront);
  options.late = Machine::late();
  if (call.kind == Call::Kind::jvp || call.kind == Call::Kind::hvp) {
    if constexpr (kTangents<T>) run_tangents<Cell, T>(call, *queue, work, options);
    return queue->failure();
  }
  Engine<Cell, T, Forwards, Backwards, Queue> engine(*queue, work, device, *call.problem, options);
  if (call.kind == Call::Kind::forward)
    engine.forward(*call.p, *call.out, call.tape, call.keep);
  else
    engine.backward(*call.p, call.tape, *call.out, *call.dp);
  return queue->failure();
}

// Numbers of type T, which persistent kernels multiply as By says.
template <class Cell, class T, class Machine, class By = T>
Status run(const Call& call) {
  using Shapes = typename Machine::template Shapes<Cell, By>;
  using Forwards = typename Shapes::Forward;
  using Backwards = typename Shapes::Backward;
  std::string why;
  const Device* device = Machine::device(&why);
  if (!device) return why;
  const Options options{call.settings->route, {call.settings->token_bytes, call.settings->token_signed}, nullptr};
  Arena counted(nullptr);
  Counting counting;
  Engine<Cell, T, Forwards, Backwards, Counting> counts(counting, counted, *device, *call.problem, options);
  switch (call.kind) {
    case Call::Kind::tape_bytes:
      *call.bytes = counts.tape_bytes();
      return {};
    case Call::Kind::forward_bytes:
      counts.forward(*call.p, *call.out, nullptr, call.keep);
      break;
    case Call::Kind::backward_bytes:
      counts.backward(*call.p, nullptr, *call.out, *call.dp);
      break;
    case Call::Kind::jvp_bytes:
    case Call::Kind::hvp_bytes:
      if constexpr (kTangents<T>) run_tangents<Cell, T>(call, counting, counted, options);
      break;
    case Call::Kind::routes:
      *call.forward_route = name_of(counts.forward_route()), *call.backward_route = name_of(counts.backward_route());
      return {};
    default:
      return run_on<Cell, T, Forwards, Backwards, Machine>(call, *device, options);
  }
  *call.bytes = Machine::kInFront + counted.most();
  return {};
}

template <class Cell, class Machine>
Status run_cell(const Call& call) {
  using Kind = Call::Kind;
  const bool tangents =
      call.kind == Kind::jvp || call.kind == Kind::jvp_bytes || call.kind == Kind::hvp || call.kind == Kind::hvp_bytes;
  if (tangents && call.problem->dtype != Dtype::f32 && call.problem->dtype != Dtype::f64)
    return "tangents of 16-bit numbers are not built into the CUDA kernels; expected float32 or float64";
  switch (call.problem->dtype) {
    case Dtype::f16:
      return run<Cell, dev::F16, Machine>(call);
    case Dtype::bf16:
      return run<Cell, dev::BF16, Machine>(call);
    case Dtype::f32:
      switch (tangents ? Precision::strict : call.settings->f32) {
        case Precision::strict:
          return run<Cell, F32, Machine>(call);
        case Precision::tf32:
          return run<Cell, dev::TF32, Machine>(call);
        case Precision::tf32x3:
          return run<Cell, F32, Machine, TF32x3>(call);
      }
      break;
    case Dtype::f64:
      return run<Cell, F64, Machine>(call);
  }
  return "dtype " + std::to_string(static_cast<int>(call.problem->dtype)) + " is none that the CUDA kernels know";
}

}  // namespace fusedrnn::cuda
