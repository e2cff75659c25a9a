// SPDX-License-Identifier: Apache-2.0
// CTC: checks, then one call of the CPU core without the GIL.
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace fusedrnn::bindings {

namespace {

using Integers = std::vector<int64_t>;

// What both functions take: scores, and the labels of each row.
class Spelled {
 public:
  Spelled(const char* function, py::object log_probs, const py::object& labels, const py::object& first,
          const py::object& label_counts, const py::object& lengths, int64_t blank)
      : checked(function) {
    const std::array<int64_t, 3> sizes = checked.three_axes(log_probs, "log_probs", "(T, B, C)");
    call.dtype = checked.dtype();
    call.T = sizes[0];
    call.B = sizes[1];
    call.C = sizes[2];
    call.blank = blank;
    const int64_t shape[3] = {call.T, call.B, call.C};
    call.log_probs = checked.array<3>(std::move(log_probs), {"", "log_probs"}, "(T, B, C)", shape, Access::read);
    if (blank < 0 || blank >= call.C)
      checked.value_error("blank is " + std::to_string(blank) +
                          "; expected a class in [0, C) with C = " + std::to_string(call.C));
    // Copies: a change from another thread must not reach the kernel.
    classes_ = checked.integers(labels, "labels");
    begin_ = checked.integers(first, "first");
    counts_ = checked.integers(label_counts, "label_counts");
    steps_ = checked.steps(lengths, call.B, call.T);
    check_labels();
    call.labels = classes_.data();
    call.first = begin_.data();
    call.label_counts = counts_.data();
    call.lengths = steps_.data();
  }

  // (B,) numbers without gaps; null for None.
  void* vector(py::object object, const char* name, Access access) {
    const int64_t rows[1] = {call.B};
    const Array<1> array = checked.array<1>(std::move(object), {"", name}, "(B,)", rows, access);
    if (array.data && call.B > 1 && array.stride[0] != 1)
      checked.value_error(std::string(name) + " must be contiguous");
    if (!array.data && access == Access::write)
      checked.type_error(std::string(name) + " is None; expected numpy.ndarray");
    return array.data;
  }

  Checked checked;
  Ctc call;

 private:
  void check_labels() const {
    for (const Integers* list : {&begin_, &counts_})
      if (static_cast<int64_t>(list->size()) != call.B)
        checked.value_error("first and label_counts must have B = " + std::to_string(call.B) + " elements");
    const auto size = static_cast<int64_t>(classes_.size());
    for (size_t b = 0; b < begin_.size(); ++b) {
      const std::string row = "[" + std::to_string(b) + "]";
      if (begin_[b] < 0 || counts_[b] < 0 || counts_[b] > size || begin_[b] > size - counts_[b])
        checked.value_error("first" + row + " and label_counts" + row + " name labels outside of the " +
                            std::to_string(size) + " given");
      for (int64_t j = begin_[b]; j < begin_[b] + counts_[b]; ++j) {
        const int64_t label = classes_[static_cast<size_t>(j)];
        if (label < 0 || label >= call.C || label == call.blank)
          checked.value_error("labels[" + std::to_string(j) + "] is " + std::to_string(label) +
                              "; expected a class in [0, C), C = " + std::to_string(call.C) +
                              ", that is not blank = " + std::to_string(call.blank));
      }
    }
  }

  Integers classes_, begin_, counts_, steps_;
};

void ctc(py::object log_probs, const py::object& labels, const py::object& first, const py::object& label_counts,
         const py::object& lengths, int64_t blank, bool zero_infinity, py::object loss, py::object dloss,
         py::object dlog_probs) {
  Spelled spelled("ctc: ", std::move(log_probs), labels, first, label_counts, lengths, blank);
  Ctc& call = spelled.call;
  Checked& checked = spelled.checked;
  call.zero_infinity = zero_infinity;
  call.loss = spelled.vector(std::move(loss), "loss", Access::write);
  call.dloss = spelled.vector(std::move(dloss), "dloss", Access::read);
  const int64_t shape[3] = {call.T, call.B, call.C};
  call.dlog_probs = checked.array<3>(std::move(dlog_probs), {"", "dlog_probs"}, "(T, B, C)", shape, Access::write);
  if (call.dlog_probs.data && call.dlog_probs.stride[2] != 1 && call.T * call.B > 0 && call.C > 1)
    checked.value_error("dlog_probs must be contiguous along C");
  const int threads = threads_now();
  const Released released(cpu::work(call));
  cpu::ctc(call, threads);
}

void ctc_align(py::object log_probs, const py::object& labels, const py::object& first, const py::object& label_counts,
               const py::object& lengths, int64_t blank, const py::object& states, py::object log_probability) {
  Spelled spelled("ctc_align: ", std::move(log_probs), labels, first, label_counts, lengths, blank);
  Ctc& call = spelled.call;
  call.log_probability = spelled.vector(std::move(log_probability), "log_probability", Access::write);
  const int64_t shape[2] = {call.T, call.B};
  call.states = spelled.checked.written_integers(states, "states", "(T, B)", shape);
  const int threads = threads_now();
  const Released released(cpu::work(call));
  cpu::ctc_align(call, threads);
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
    const Released released(static_cast<double>(call.T * call.B) *
                            (1e3 * static_cast<double>(beam_width) + static_cast<double>(call.C)));
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
  module.def("ctc_align", &ctc_align, py::arg("log_probs"), py::arg("labels"), py::arg("first"),
             py::arg("label_counts"), py::arg("lengths"), py::arg("blank"), py::arg("states"),
             py::arg("log_probability"));
  module.def("ctc_beam", &ctc_beam, py::arg("log_probs"), py::arg("lengths"), py::arg("blank"), py::arg("beam_width"),
             py::arg("top"));
}

}  // namespace fusedrnn::bindings
