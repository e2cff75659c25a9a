// SPDX-License-Identifier: Apache-2.0
#include "forward.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {
namespace {

template <class S, int P>
void run(const Call& call) {
  Workspace workspace;
  const Sets sets(call, workspace);
  S* tape[P] = {static_cast<S*>(call.tape)};
  const Layers<S, P> layers(call, sets, call.tape ? tape : nullptr, workspace);
  Forward<S, P> forward(call, sets, layers, workspace);
  parallel(call.threads, [](void* it, const Team& team) { static_cast<Forward<S, P>*>(it)->run(team); }, &forward);
}

}  // namespace

void forward(const Call& call) { call.problem->dtype == Dtype::f64 ? run<double, 1>(call) : run<float, 1>(call); }
void jvp(const Call& call) { call.problem->dtype == Dtype::f64 ? run<double, 2>(call) : run<float, 2>(call); }

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
