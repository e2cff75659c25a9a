// SPDX-License-Identifier: Apache-2.0
#include "stepwise_backward.h"
#include "stepwise_forward.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {
namespace {

template <class Engine>
void run(const Call& call) {
  Workspace workspace;
  Engine engine(call, workspace);
  parallel(call.threads, [](void* it, const Team& team) { static_cast<Engine*>(it)->run(team); }, &engine);
}

}  // namespace

void forward_stepwise(const Call& call) {
  call.problem->dtype == Dtype::f64 ? run<StepwiseForward<double>>(call) : run<StepwiseForward<float>>(call);
}
void backward_stepwise(const Call& call) {
  call.problem->dtype == Dtype::f64 ? run<StepwiseBackward<double>>(call) : run<StepwiseBackward<float>>(call);
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
