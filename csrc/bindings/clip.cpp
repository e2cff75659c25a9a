// SPDX-License-Identifier: Apache-2.0
// Gradient clipping over lists of arrays, in place.
#include <cmath>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace fusedrnn::bindings {

namespace {

// All arrays as runs without gaps.
class Runs {
 public:
  Runs(const char* function, const py::sequence& arrays, bool written) {
    for (size_t i = 0; i < arrays.size(); ++i) {
      Checked checked(function);
      const std::string name = "arrays[" + std::to_string(i) + "]";
      py::object object = arrays[i];
      const Layout layout = checked.layout(object, {name.c_str()}, written ? Access::write : Access::read);
      add(layout, checked.dtype());
      elements_ += static_cast<double>(layout.elements);
      held_.push_back(std::move(object));
    }
  }
  const cpu::Span* data() const { return spans_.data(); }
  size_t count() const { return spans_.size(); }
  double elements() const { return elements_; }

 private:
  void add(const Layout& layout, Dtype dtype) {
    if (layout.elements == 0) return;
    // the axes with the smallest strides form a run as long as each steps exactly over the ones before
    int64_t run = 1;
    size_t inner = 0;
    while (inner < layout.axes.size() && layout.axes[inner].first == run) run *= layout.axes[inner++].second;
    const size_t outer = layout.axes.size() - inner;
    std::vector<int64_t> index(outer, 0);
    char* start = layout.lowest;
    const int64_t size = size_of(dtype);
    for (;;) {
      spans_.push_back({start, run, dtype});
      size_t k = 0;
      for (; k < outer; ++k) {
        const auto& [stride, extent] = layout.axes[inner + k];
        start += stride * size;
        if (++index[k] < extent) break;
        start -= stride * size * extent;
        index[k] = 0;
      }
      if (k == outer) return;
    }
  }

  std::vector<cpu::Span> spans_;
  std::vector<py::object> held_;
  double elements_ = 0;
};

double global_norm(const py::sequence& arrays, double norm_type) {
  if (norm_type != 1 && norm_type != 2 && norm_type != HUGE_VAL)
    throw py::value_error("global_norm: norm_type is " + std::to_string(norm_type) + "; expected 1, 2 or inf");
  const Runs runs("global_norm: ", arrays, false);
  const Released released(2 * runs.elements());
  return cpu::global_norm(runs.data(), runs.count(), norm_type);
}

void scale(const py::sequence& arrays, double factor) {
  const Runs runs("scale_: ", arrays, true);
  const Released released(2 * runs.elements());
  cpu::scale(runs.data(), runs.count(), factor);
}

void clip_value(const py::sequence& arrays, double limit) {
  if (!(limit >= 0))
    throw py::value_error("clip_value_: limit is " + std::to_string(limit) + "; expected a number >= 0");
  const Runs runs("clip_value_: ", arrays, true);
  const Released released(2 * runs.elements());
  cpu::clip_value(runs.data(), runs.count(), limit);
}

}  // namespace

void register_clip(py::module_& module) {
  module.def("global_norm", &global_norm, py::arg("arrays"), py::arg("norm_type") = 2.0);
  module.def("scale_", &scale, py::arg("arrays"), py::arg("factor"));
  module.def("clip_value_", &clip_value, py::arg("arrays"), py::arg("limit"));
}

}  // namespace fusedrnn::bindings
