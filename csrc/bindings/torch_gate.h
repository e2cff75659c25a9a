// SPDX-License-Identifier: Apache-2.0
// The gate to torch's memory: every pointer to it comes from here (see torch_setup in _core.pyi).
//
// No libtorch: tensors are read and made through DLPack's C exchange API, a table of functions that torch hands out as
// a capsule (torch.Tensor.__dlpack_c_exchange_api__).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "api.h"
#include "bindings/dlpack.h"

namespace fusedrnn::bindings {

inline DLDataType torch_type(Dtype dtype) {
  if (dtype == Dtype::bf16) return {4, 16, 1};
  return {2, static_cast<uint8_t>(dtype == Dtype::f32 ? 32 : 64), 1};
}

// A plain tensor on the CPU, looked at where it lies.
class TorchView {
 public:
  bool look(PyObject* object);  // false for anything else
  bool is(const DLDataType& type) const {
    return tensor_.dtype.code == type.code && tensor_.dtype.bits == type.bits && tensor_.dtype.lanes == type.lanes;
  }
  bool is(Dtype dtype) const { return is(torch_type(dtype)); }
  int rank() const { return tensor_.ndim; }
  int64_t extent(int axis) const { return tensor_.shape[axis]; }
  bool stride(int axis, int64_t* out) const {
    *out = tensor_.strides[axis];
    return true;
  }
  void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }

 private:
  bool has_memory(uint64_t tensor) const;

  DLTensor tensor_;
};

// A new tensor with undefined contents, without gaps; null with an exception set.
PyObject* new_tensor(Dtype dtype, int rank, const int64_t* shape, void** data);

}  // namespace fusedrnn::bindings
