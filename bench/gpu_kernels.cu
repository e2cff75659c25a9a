// SPDX-License-Identifier: Apache-2.0
// The persistent kernels behind a flat C interface, for bench/gpu_kernels.py: every entry of the table below is one
// kernel, chosen by its number, so that variants can be checked and timed side by side.
#include <cstring>

#include "cells_on_gpu.h"  // before everything that is written on the device
// and then the kernels
#include "backward.h"
#include "cuda.h"
#include "forward.h"
#include "launch.h"
#include "pack.h"

namespace {

using namespace fusedrnn;
using namespace fusedrnn::cuda;
using cells::Gru;
using cells::Lstm;
using dev::BF16;
using dev::F16;
using dev::TF32;
using Tanh = cells::Rnn<false>;
using Relu = cells::Rnn<true>;
constexpr Route kSingle = Route::single, kCluster = Route::cluster, kGrid = Route::grid;

struct Entry {
  const char* name;
  int route, gates, rows, units, depth, bytes, shared;
  int (*pack)(const void* R, int64_t r_set, int64_t r_row, void* packed, int H, int peers, int sets, void* stream);
  int (*forward)(const void* args, void* stream);
  int (*clusters)(int cluster);
  int64_t (*pieces)(int peers);
};

template <class S>
Entry entry_of(const char* name) {
  using T = typename S::T;
  return Entry{
      name,
      static_cast<int>(S::kRoute),
      S::kGates,
      S::kRows,
      S::kUnits,
      S::kDepth,
      static_cast<int>(sizeof(typename T::Storage)),
      Forward<S>::shared_bytes(),
      [](const void* R, int64_t r_set, int64_t r_row, void* packed, int H, int peers, int sets, void* stream) {
        const PackForward<S> k{
            {static_cast<const typename T::Storage*>(R), r_set, r_row, 1, static_cast<U4*>(packed), H, peers, sets}};
        return static_cast<int>(launch(k, 264, 0, false, static_cast<cudaStream_t>(stream)));
      },
      [](const void* args, void* stream) {
        Forward<S> k;
        std::memcpy(&k.a, args, sizeof(k.a));
        const int teams = k.a.sets * k.a.row_tiles;
        return static_cast<int>(launch(k, teams * k.a.peers, S::kRoute == kCluster ? k.a.peers : 0, S::kRoute == kGrid,
                                       static_cast<cudaStream_t>(stream)));
      },
      [](int cluster) {
        int n = 0;
        return resident_clusters<Forward<S>>(cluster, &n) == cudaSuccess ? n : -1;
      },
      [](int peers) { return PackForward<S>::pieces(peers); },
  };
}

#define KERNEL(...) entry_of<Shape<__VA_ARGS__>>(#__VA_ARGS__)
const Entry kTable[] = {
#include "gpu_kernels.inc"
};

}  // namespace

extern "C" {
int count() { return static_cast<int>(sizeof(kTable) / sizeof(kTable[0])); }
const char* name(int id) { return kTable[id].name; }
void info(int id, int64_t* out) {
  const Entry& e = kTable[id];
  const int64_t v[] = {e.route, e.gates, e.rows, e.units, e.depth, e.bytes, e.shared};
  std::memcpy(out, v, sizeof(v));
}
int64_t pieces(int id, int peers) { return kTable[id].pieces(peers); }
int pack(int id, const void* R, int64_t r_set, int64_t r_row, void* packed, int H, int peers, int sets, void* stream) {
  return kTable[id].pack(R, r_set, r_row, packed, H, peers, sets, stream);
}
int forward(int id, const void* args, void* stream) { return kTable[id].forward(args, stream); }
int clusters(int id, int cluster) { return kTable[id].clusters(cluster); }
int args_size() { return static_cast<int>(sizeof(ForwardArgs<BF16>)); }

// The whole backend (csrc/cuda/cuda.h), for the same script. kind: 0 bytes of the tape, 1 and 2 of the workspaces, 3
// forward, 4 backward, 5 routes (10 * forward + backward in *bytes). Returns 0, or 1 with the reason in `failure` (512
// bytes).
void api_sizes(int64_t* sizes) { sizes[0] = sizeof(Problem), sizes[1] = sizeof(Arguments), sizes[2] = sizeof(Results); }
int api(int kind, const Problem* problem, const Arguments* p, const Results* out, const Results* g, const Arguments* dp,
        void* tape, void* workspace, int keep, int float32, int route, int64_t* bytes, void* stream, char* failure) {
  const Settings settings{static_cast<Precision>(float32), route};
  size_t n = 0;
  Status status;
  if (kind == 0) status = tape_bytes(*problem, settings, &n);
  if (kind == 1) status = forward_workspace_bytes(*problem, *p, *out, keep != 0, settings, &n);
  if (kind == 2) status = backward_workspace_bytes(*problem, *p, *g, *dp, settings, &n);
  if (kind == 3) status = fusedrnn::cuda::forward(*problem, *p, *out, tape, keep != 0, workspace, settings, stream);
  if (kind == 4) status = fusedrnn::cuda::backward(*problem, *p, tape, *g, *dp, workspace, settings, stream);
  if (kind == 5) {
    const char *f = "", *b = "";
    status = routes(*problem, settings, &f, &b);
    const auto number = [](const char* name) {
      constexpr const char* kNames[] = {"single", "cluster", "grid", "stepwise"};
      for (int i = 0; i < 4; ++i)
        if (!std::strcmp(name, kNames[i])) return i;
      return 9;
    };
    n = static_cast<size_t>(number(f) * 10 + number(b));
  }
  *bytes = static_cast<int64_t>(n);
  std::strncpy(failure, status.c_str(), 511);
  return status.empty() ? 0 : 1;
}
}
