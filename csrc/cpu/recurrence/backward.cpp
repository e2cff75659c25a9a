// SPDX-License-Identifier: Apache-2.0
#include "backward.h"

#include "forward.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {
namespace {

template <class S>
void run_backward(const Call& call) {
  Workspace workspace;
  const Sets sets(call, workspace);
  S* tape[1] = {static_cast<S*>(call.tape)};
  const Layers<S, 1> layers(call, sets, tape, workspace);
  Backward<S, 1> backward(call, sets, layers, workspace);
  parallel(call.threads, [](void* it, const Team& team) { static_cast<Backward<S, 1>*>(it)->run(team); }, &backward);
}

// Forward and backward of dual numbers; the tape, and its tangent, are workspace.
template <class S>
void run_hvp(const Call& call) {
  Workspace workspace;
  const Sets sets(call, workspace);
  const Sizes& n = call.problem->sizes;
  const int64_t size = Tape(*call.problem).elements(sets.N) * sets.count * n.L * n.D;
  S* tape[2];
  for (S*& plane : tape) plane = take<S>(workspace, size);
  const Layers<S, 2> layers(call, sets, tape, workspace);
  struct Both {
    Forward<S, 2> forward;
    Backward<S, 2> backward;
  } both{{call, sets, layers, workspace}, {call, sets, layers, workspace}};
  parallel(
      call.threads,
      [](void* it, const Team& team) {
        static_cast<Both*>(it)->forward.run(team);
        static_cast<Both*>(it)->backward.run(team);
      },
      &both);
}

}  // namespace

void backward(const Call& call) {
  call.problem->dtype == Dtype::f64 ? run_backward<double>(call) : run_backward<float>(call);
}
void hvp(const Call& call) { call.problem->dtype == Dtype::f64 ? run_hvp<double>(call) : run_hvp<float>(call); }

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
