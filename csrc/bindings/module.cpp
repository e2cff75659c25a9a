// SPDX-License-Identifier: Apache-2.0
// The extension module fusedrnn._core. What it offers is written down in python/fusedrnn/_core.pyi.
#include "bindings/bindings.h"
#define FUSEDRNN_IMPORTS_NUMPY
#include "bindings/tensor.h"

PYBIND11_MODULE(_core, module) {
  if (PyArray_ImportNumPyAPI() < 0) throw pybind11::error_already_set();
  module.attr("version") = FUSEDRNN_VERSION;
  module.attr("compiler") = FUSEDRNN_COMPILER;
  fusedrnn::bindings::register_threads(module);
  fusedrnn::bindings::register_layer(module);
  fusedrnn::bindings::register_lane(module);
  fusedrnn::bindings::register_clip(module);
  fusedrnn::bindings::register_ctc(module);
  fusedrnn::bindings::register_cuda(module);
  fusedrnn::bindings::register_hmm(module);
  fusedrnn::bindings::register_torch_gate(module);
  fusedrnn::bindings::register_torch_lane(module);
}
