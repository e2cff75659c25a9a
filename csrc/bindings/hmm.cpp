// SPDX-License-Identifier: Apache-2.0
// Hidden Markov models: checks, then one call of the CPU core without the GIL.
#include <array>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace fusedrnn::bindings {

namespace {

// What both functions take.
class Model {
 public:
  Model(const char* function, const py::object& scores, const py::object& initial, const py::object& transitions,
        const py::object& lengths)
      : checked(function) {
    const std::array<int64_t, 3> sizes = checked.three_axes(scores, "scores", "(T, B, N)");
    call.T = sizes[0];
    call.B = sizes[1];
    call.N = sizes[2];
    call.dtype = checked.dtype();
    if (call.N < 1) checked.value_error("scores has no states; expected N >= 1");
    const int64_t shape[3] = {call.T, call.B, call.N};
    call.scores = checked.array<3>(scores, {"", "scores"}, "(T, B, N)", shape, Access::read);
    call.initial = vector(initial, "initial", "(N,)", call.N, Access::read);
    call.transitions = matrix(transitions, "transitions", Access::read);
    if (!call.initial || !call.transitions) checked.type_error("initial and transitions must be given");
    steps_ = checked.steps(lengths, call.B, call.T);
    call.lengths = steps_.data();
  }

  void* vector(const py::object& object, const char* name, const char* axes, int64_t size, Access access) {
    const int64_t shape[1] = {size};
    const Array<1> array = checked.array<1>(object, {"", name}, axes, shape, access);
    if (array.data && size > 1 && array.stride[0] != 1) checked.value_error(std::string(name) + " must be contiguous");
    return array.data;
  }
  void* matrix(const py::object& object, const char* name, Access access) {
    const int64_t shape[2] = {call.N, call.N};
    const Array<2> array = checked.array<2>(object, {"", name}, "(N, N)", shape, access);
    if (array.data && call.N > 1 && (array.stride[1] != 1 || array.stride[0] != call.N))
      checked.value_error(std::string(name) + " must be C-contiguous");
    return array.data;
  }
  void run() {
    const int threads = threads_now();
    const Released released(cpu::work(call));
    cpu::hmm(call, threads);
  }

  Checked checked;
  Hmm call;

 private:
  std::vector<int64_t> steps_;
};

void hmm(const py::object& scores, const py::object& initial, const py::object& transitions, const py::object& lengths,
         const py::object& log_likelihood, const py::object& weights, py::object states, const py::object& dinitial,
         const py::object& dtransitions) {
  Model model("hmm: ", scores, initial, transitions, lengths);
  Hmm& call = model.call;
  Checked& checked = model.checked;
  call.log_likelihood = model.vector(log_likelihood, "log_likelihood", "(B,)", call.B, Access::write);
  if (!call.log_likelihood) checked.type_error("log_likelihood is None; expected numpy.ndarray");
  call.weights = model.vector(weights, "weights", "(B,)", call.B, Access::read);
  const int64_t shape[3] = {call.T, call.B, call.N};
  call.states = checked.array<3>(std::move(states), {"", "states"}, "(T, B, N)", shape, Access::write);
  call.dinitial = model.vector(dinitial, "dinitial", "(N,)", call.N, Access::write);
  call.dtransitions = model.matrix(dtransitions, "dtransitions", Access::write);
  const bool wanted = call.states.data;
  if (wanted != (call.dinitial != nullptr) || wanted != (call.dtransitions != nullptr))
    checked.value_error("states, dinitial and dtransitions must be given together");
  if (wanted && call.T * call.B > 0 && call.N > 1 && call.states.stride[2] != 1)
    checked.value_error("states must be contiguous along N");
  model.run();
}

void viterbi(const py::object& scores, const py::object& initial, const py::object& transitions,
             const py::object& lengths, const py::object& paths, const py::object& log_probability) {
  Model model("viterbi: ", scores, initial, transitions, lengths);
  Hmm& call = model.call;
  Checked& checked = model.checked;
  const int64_t shape[2] = {call.T, call.B};
  call.paths = checked.written_integers(paths, "paths", "(T, B)", shape);
  call.log_likelihood = model.vector(log_probability, "log_probability", "(B,)", call.B, Access::write);
  if (!call.log_likelihood) checked.type_error("log_probability is None; expected numpy.ndarray");
  model.run();
}

}  // namespace

void register_hmm(py::module_& module) {
  module.def("hmm", &hmm, py::arg("scores"), py::arg("initial"), py::arg("transitions"), py::arg("lengths"),
             py::arg("log_likelihood"), py::arg("weights") = py::none(), py::arg("states") = py::none(),
             py::arg("dinitial") = py::none(), py::arg("dtransitions") = py::none());
  module.def("viterbi", &viterbi, py::arg("scores"), py::arg("initial"), py::arg("transitions"), py::arg("lengths"),
             py::arg("paths"), py::arg("log_probability"));
}

}  // namespace fusedrnn::bindings
