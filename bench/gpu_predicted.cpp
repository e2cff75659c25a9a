// SPDX-License-Identifier: Apache-2.0
// What the cost model (csrc/cuda/cost.h) expects of an H200, in microseconds a step of the recurrence, for the sizes
// that gpu_cudnn.py and gpu_kernels.py measure, with the route that it takes; JSON on stdout. Needs no GPU:
//   g++ -std=c++20 -O1 -Icsrc -Itests/csrc bench/gpu_predicted.cpp -o gpu_predicted && ./gpu_predicted
// clang-format off
#include "device_cpu.h"
#include "cuda/gates.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/cost.h"
#include "cuda/shapes.h"
// clang-format on

#include <cstdio>

using namespace fusedrnn::cuda;
namespace cells = fusedrnn::cells;
namespace dev = fusedrnn::dev;

namespace {

constexpr const char* kRoutes[] = {"single", "cluster", "grid", "stepwise"};

struct Best {
  double microseconds;
  Route route = Route::stepwise;
  void offer(double cost, Route of) {
    if (cost > 0 && cost < microseconds) microseconds = cost, route = of;
  }
};

template <class... S>
void forward(List<S...>, [[maybe_unused]] const Device& h200, [[maybe_unused]] int64_t B, [[maybe_unused]] int64_t H,
             Best& best) {
  (best.offer(forward_cost<S>(h200, B, H, 1), S::kRoute), ...);
}
template <class... S>
void backward(List<S...>, [[maybe_unused]] const Device& h200, [[maybe_unused]] int64_t B, [[maybe_unused]] int64_t H,
              Best& best) {
  (best.offer(backward_cost<S>(h200, B, H, 1), S::kRoute), ...);
}

template <class Cell, class T>
void print(const Device& h200, const char* cell, const char* type, bool& first) {
  for (const int64_t H : {64, 128, 256, 512, 768, 1024, 1536, 2048})
    for (const int64_t B : {1, 8, 16, 32, 64, 128, 256}) {
      const double stepwise = stepwise_cost(Cell::gates, B, H, 1, sizeof(typename T::Storage));
      Best there{stepwise}, back{stepwise};
      forward(typename Shapes<Cell, T>::Forward(), h200, B, H, there);
      backward(typename Shapes<Cell, T>::Backward(), h200, B, H, back);
      std::printf("%s\n {\"cell\": \"%s\", \"type\": \"%s\", \"H\": %d, \"B\": %d, ", first ? "" : ",", cell, type,
                  static_cast<int>(H), static_cast<int>(B));
      std::printf("\"forward\": [\"%s\", %.2f], \"backward\": [\"%s\", %.2f]}", kRoutes[static_cast<int>(there.route)],
                  there.microseconds, kRoutes[static_cast<int>(back.route)], back.microseconds);
      first = false;
    }
}

template <class T>
void all(const Device& h200, const char* type, bool& first) {
  print<cells::Lstm, T>(h200, "lstm", type, first);
  print<cells::Gru, T>(h200, "gru", type, first);
  print<cells::Rnn<false>, T>(h200, "rnn_tanh", type, first);
}

}  // namespace

int main() {
  Device h200;
  for (int blocks = 2; blocks <= 16; ++blocks)  // multiprocessors that clusters of so many blocks can use, reported
    h200.clusters[blocks] = (blocks <= 2 ? 132 : blocks <= 4 ? 128 : blocks <= 8 ? 120 : 112) / blocks;
  bool first = true;
  std::printf("[");
  all<dev::F16>(h200, "f16", first);
  all<dev::BF16>(h200, "bf16", first);
  all<dev::TF32>(h200, "tf32", first);
  all<TF32x3>(h200, "3xtf32", first);
  all<F32>(h200, "f32", first);
  std::printf("\n]\n");
}
