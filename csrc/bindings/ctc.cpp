// SPDX-License-Identifier: Apache-2.0
// CTC: checks, then one call of the CPU core without the GIL.
#include <array>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace fusedrnn::bindings {

namespace {

using Integers = std::vector<int64_t>;

void ctc(py::object log_probs, const py::object& labels, const py::object& first, const py::object& label_counts,
         const py::object& lengths, int64_t blank, bool zero_infinity, py::object loss, py::object dloss,
         py::object dlog_probs) {
  Checked checked("ctc: ");
  Ctc call;
  const std::array<int64_t, 3> sizes = checked.three_axes(log_probs, "log_probs", "(T, B, C)");
  call.dtype = checked.dtype();
  call.T = sizes[0];
  call.B = sizes[1];
  call.C = sizes[2];
  call.blank = blank;
  call.zero_infinity = zero_infinity;
  const int64_t shape[3] = {call.T, call.B, call.C}, rows[1] = {call.B};
  call.log_probs = checked.array<3>(log_probs, {"", "log_probs"}, "(T, B, C)", shape, Access::read);
  if (blank < 0 || blank >= call.C)
    checked.value_error("blank is " + std::to_string(blank) +
                        "; expected a class in [0, C) with C = " + std::to_string(call.C));

  // Copies: a change from another thread must not reach the kernel.
  const Integers classes = checked.integers(labels, "labels");
  const Integers begin = checked.integers(first, "first"), counts = checked.integers(label_counts, "label_counts"),
                 steps = checked.steps(lengths, call.B, call.T);
  for (const Integers* list : {&begin, &counts})
    if (static_cast<int64_t>(list->size()) != call.B)
      checked.value_error("first and label_counts must have B = " + std::to_string(call.B) + " elements");
  const auto size = static_cast<int64_t>(classes.size());
  for (size_t b = 0; b < begin.size(); ++b) {
    const std::string row = "[" + std::to_string(b) + "]";
    if (begin[b] < 0 || counts[b] < 0 || counts[b] > size || begin[b] > size - counts[b])
      checked.value_error("first" + row + " and label_counts" + row + " name labels outside of the " +
                          std::to_string(size) + " given");
    for (int64_t j = begin[b]; j < begin[b] + counts[b]; ++j) {
      const int64_t label = classes[static_cast<size_t>(j)];
      if (label < 0 || label >= call.C || label == blank)
        checked.value_error("labels[" + std::to_string(j) + "] is " + std::to_string(label) +
                            "; expected a class in [0, C), C = " + std::to_string(call.C) +
                            ", that is not blank = " + std::to_string(blank));
    }
  }
  if (loss.is_none()) checked.type_error("loss is None; expected numpy.ndarray");
  const Array<1> out = checked.array<1>(loss, {"", "loss"}, "(B,)", rows, Access::write);
  const Array<1> factor = checked.array<1>(dloss, {"", "dloss"}, "(B,)", rows, Access::read);
  if (call.B > 1 && (out.stride[0] != 1 || (factor.data && factor.stride[0] != 1)))
    checked.value_error("loss and dloss must be contiguous");
  call.dlog_probs = checked.array<3>(dlog_probs, {"", "dlog_probs"}, "(T, B, C)", shape, Access::write);
  if (call.dlog_probs.data && call.dlog_probs.stride[2] != 1 && call.T * call.B > 0 && call.C > 1)
    checked.value_error("dlog_probs must be contiguous along C");

  call.labels = classes.data();
  call.first = begin.data();
  call.label_counts = counts.data();
  call.lengths = steps.data();
  call.loss = out.data;
  call.dloss = factor.data;
  const int threads = threads_now();
  const Released released(cpu::work(call));
  cpu::ctc(call, threads);
}

py::list ctc_beam(py::object log_probs, const py::object& lengths, int64_t blank, int64_t beam_width, int64_t top) {
  Checked checked("ctc_beam: ");
  BeamSearch call;
  const std::array<int64_t, 3> sizes = checked.three_axes(log_probs, "log_probs", "(T, B, C)");
  call.T = sizes[0];
  call.B = sizes[1];
  call.C = sizes[2];
  call.dtype = checked.dtype();
  call.blank = blank;
  call.width = beam_width;
  call.top = top;
  const int64_t shape[3] = {call.T, call.B, call.C};
  call.log_probs = checked.array<3>(log_probs, {"", "log_probs"}, "(T, B, C)", shape, Access::read);
  if (blank < 0 || blank >= call.C)
    checked.value_error("blank is " + std::to_string(blank) + "; expected one of C classes");
  if (beam_width < 1 || beam_width > int64_t{1} << 24 || top < 1)
    checked.value_error("beam_width and top must be >= 1, beam_width <= 2^24");
  const Integers steps = checked.steps(lengths, call.B, call.T);
  call.lengths = steps.data();
  std::vector<std::vector<cpu::Spelling>> found;
  const int threads = threads_now();
  {
    const Released released(1e3 * static_cast<double>(call.T) * static_cast<double>(call.B * beam_width));
    found = cpu::ctc_beam(call, threads);
  }
  py::list out;
  for (const auto& row : found) {
    py::list spellings;
    for (const cpu::Spelling& spelling : row) {
      py::list labels;
      for (const int64_t label : spelling.labels) labels.append(label);
      spellings.append(py::make_tuple(labels, spelling.log_probability));
    }
    out.append(spellings);
  }
  return out;
}

}  // namespace

void register_ctc(py::module_& module) {
  module.def("ctc", &ctc, py::arg("log_probs"), py::arg("labels"), py::arg("first"), py::arg("label_counts"),
             py::arg("lengths"), py::arg("blank"), py::arg("zero_infinity"), py::arg("loss"),
             py::arg("dloss") = py::none(), py::arg("dlog_probs") = py::none());
  module.def("ctc_beam", &ctc_beam, py::arg("log_probs"), py::arg("lengths"), py::arg("blank"), py::arg("beam_width"),
             py::arg("top"));
}

}  // namespace fusedrnn::bindings
