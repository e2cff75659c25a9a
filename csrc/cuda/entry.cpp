// SPDX-License-Identifier: Apache-2.0
// cuda.h: from the entry points to the cell.
#include "call.h"

namespace fusedrnn::cuda {

namespace {

Status run_any(const Call& call) {
  switch (call.problem->cell) {
#define FUSEDRNN_RUN(name, ...) \
  case CellKind::name:          \
    return run_##name(call);
    FUSEDRNN_CELLS(FUSEDRNN_RUN)
#undef FUSEDRNN_RUN
  }
  return std::string("cell ") + facts_of(call.problem->cell).name + " is none that the CUDA kernels know";
}

}  // namespace

Status tape_bytes(const Problem& problem, const Settings& settings, size_t* bytes) {
  return run_any({.kind = Call::Kind::tape_bytes, .problem = &problem, .settings = &settings, .bytes = bytes});
}

Status forward_workspace_bytes(const Problem& problem, const Arguments& p, const Results& out, bool keep,
                               const Settings& settings, size_t* bytes) {
  return run_any({.kind = Call::Kind::forward_bytes,
                  .problem = &problem,
                  .p = &p,
                  .out = &out,
                  .keep = keep,
                  .settings = &settings,
                  .bytes = bytes});
}

Status backward_workspace_bytes(const Problem& problem, const Arguments& p, const Results& g, const Arguments& dp,
                                const Settings& settings, size_t* bytes) {
  return run_any({.kind = Call::Kind::backward_bytes,
                  .problem = &problem,
                  .p = &p,
                  .out = &g,
                  .dp = &dp,
                  .settings = &settings,
                  .bytes = bytes});
}

Status forward(const Problem& problem, const Arguments& p, const Results& out, void* tape, bool keep, void* workspace,
               const Settings& settings, void* stream) {
  return run_any({.kind = Call::Kind::forward,
                  .problem = &problem,
                  .p = &p,
                  .out = &out,
                  .tape = tape,
                  .keep = keep,
                  .workspace = workspace,
                  .settings = &settings,
                  .stream = stream});
}

Status backward(const Problem& problem, const Arguments& p, const void* tape, const Results& g, const Arguments& dp,
                void* workspace, const Settings& settings, void* stream) {
  return run_any({.kind = Call::Kind::backward,
                  .problem = &problem,
                  .p = &p,
                  .out = &g,
                  .dp = &dp,
                  .tape = const_cast<void*>(tape),
                  .workspace = workspace,
                  .settings = &settings,
                  .stream = stream});
}

Status jvp_workspace_bytes(const Problem& problem, const Arguments& p, const Arguments& v, const Results& tout,
                           const Settings& settings, size_t* bytes) {
  return run_any({.kind = Call::Kind::jvp_bytes,
                  .problem = &problem,
                  .p = &p,
                  .v = &v,
                  .out = &tout,
                  .settings = &settings,
                  .bytes = bytes});
}

Status jvp(const Problem& problem, const Arguments& p, const Arguments& v, const Results& tout, void* workspace,
           const Settings& settings, void* stream) {
  return run_any({.kind = Call::Kind::jvp,
                  .problem = &problem,
                  .p = &p,
                  .v = &v,
                  .out = &tout,
                  .workspace = workspace,
                  .settings = &settings,
                  .stream = stream});
}

Status hvp_workspace_bytes(const Problem& problem, const Arguments& p, const Arguments& v, const Results& g,
                           const Results& t, const Arguments& tdp, const Results& tout, const Settings& settings,
                           size_t* bytes) {
  return run_any({.kind = Call::Kind::hvp_bytes,
                  .problem = &problem,
                  .p = &p,
                  .v = &v,
                  .out = &g,
                  .t = &t,
                  .tout = &tout,
                  .dp = &tdp,
                  .settings = &settings,
                  .bytes = bytes});
}

Status hvp(const Problem& problem, const Arguments& p, const Arguments& v, const Results& g, const Results& t,
           const Arguments& tdp, const Results& tout, void* workspace, const Settings& settings, void* stream) {
  return run_any({.kind = Call::Kind::hvp,
                  .problem = &problem,
                  .p = &p,
                  .v = &v,
                  .out = &g,
                  .t = &t,
                  .tout = &tout,
                  .dp = &tdp,
                  .workspace = workspace,
                  .settings = &settings,
                  .stream = stream});
}

Status routes(const Problem& problem, const Settings& settings, const char** forward_route,
              const char** backward_route) {
  return run_any({.kind = Call::Kind::routes,
                  .problem = &problem,
                  .settings = &settings,
                  .forward_route = forward_route,
                  .backward_route = backward_route});
}

}  // namespace fusedrnn::cuda
