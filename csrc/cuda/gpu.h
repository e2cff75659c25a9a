// SPDX-License-Identifier: Apache-2.0
// The machine that run.h runs on where it is a GPU.
#pragma once

#include "cells_on_gpu.h"  // before everything that is written on the device
#include "queue.h"
#include "run.h"
#include "shapes.h"

namespace fusedrnn::cuda {

struct Gpu {
  using Queue = cuda::Queue;
  template <class Cell, class T>
  using Shapes = cuda::Shapes<Cell, T>;

  static constexpr size_t kInFront = size_t{32} << 20;  // cuBLAS's own workspace

  // The device that is current, asked once. Null and a reason where that fails.
  static const Device* device(std::string* why);
  // cuBLAS through a handle of this thread on the device that is current, with this stream and workspace.
  static Status open(void* stream, void* workspace, std::optional<Queue>* queue);
  // For kernels alone.
  static Queue simple(void* stream) { return Queue(static_cast<cudaStream_t>(stream), nullptr, nullptr); }
  // In the host's memory, so that it can be looked at without waiting for the device.
  static int* late();
  static Status gave_up();
};

}  // namespace fusedrnn::cuda
