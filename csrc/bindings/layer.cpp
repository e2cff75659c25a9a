// SPDX-License-Identifier: Apache-2.0
// The checked route: Problem, Arguments and Results of backends/__init__.py become the structs of api.h.
// Nothing is trusted: every number is bounded and every array compared with the sizes before a kernel sees a pointer.
#include <cmath>
#include <iterator>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace fusedrnn::bindings {

namespace {

constexpr const char* cell_names[] = {"rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"};  // order of CellKind

CellKind cell_kind(const std::string& name, const char* function) {
  for (size_t i = 0; i < std::size(cell_names); ++i)
    if (name == cell_names[i]) return static_cast<CellKind>(i);
  throw py::value_error(std::string(function) + "cell is '" + name +
                        "'; expected rnn_tanh, rnn_relu, lstm, gru or gru_reset_before");
}

// One call: a checked problem and the arrays around it.
class Call {
 public:
  Call(const char* function, py::handle given) : function_(function), checked_(function) {
    Sizes& s = problem.sizes;
    problem.cell = cell_kind(py::cast<std::string>(given.attr("cell")), function);
    s.T = integer(given, "T", 0);
    s.E = integer(given, "E", 1);
    s.B = integer(given, "B", 0);
    s.I = integer(given, "I", 0);
    s.H = integer(given, "H", 1);
    s.L = static_cast<int32_t>(integer(given, "L", 1, 1 << 20));
    s.D = static_cast<int32_t>(integer(given, "D", 1, 2));
    // so that no product of sizes below leaves int64: any array of this many elements is refused by its shape anyway
    const double largest = 8.0 * s.L * s.D * (static_cast<double>(s.T) * s.E * s.B + 4.0 * s.E * s.H) *
                           (static_cast<double>(s.I) + 4.0 * s.D * static_cast<double>(s.H));
    if (largest > 4e18) checked_.value_error("the sizes multiply to more than any memory holds");
    problem.reverse = boolean(given, "reverse");
    problem.reset_to_initial = boolean(given, "reset_to_initial");
    problem.recompute = boolean(given, "recompute");
    problem.clip_cell = real(given, "clip_cell");
    problem.clip_grad = real(given, "clip_grad");
    problem.dropout = real(given, "dropout");
    if (problem.dropout > 1) checked_.value_error("dropout is " + std::to_string(problem.dropout) + "; expected 0..1");
    if (problem.reverse && s.D == 2) checked_.value_error("reverse is set; expected one direction with it, but D is 2");
    problem.seed = PyLong_AsUnsignedLongLong(py::object(given.attr("seed")).ptr());
    if (PyErr_Occurred()) {
      PyErr_Clear();
      checked_.value_error("seed is " + std::string(py::repr(given.attr("seed"))) +
                           "; expected an int, 0 <= seed < 2**64");
    }
    problem.lengths = checked_.lengths(given.attr("lengths"), {s.E, s.B}, s.T);
    problem.reset = checked_.reset(given.attr("reset"), {s.T, s.E, s.B});
  }

  // The first array read says which dtype all have.
  void dtype_of(py::handle arguments) {
    checked_.set_dtype(arguments.attr("x"), "x");
    problem.dtype = checked_.dtype();
  }

  // `prefix` tells the roles apart in messages: "", "v.", "dp.", ... `required`: x, W and R must be there.
  Arguments arguments(py::handle given, const std::string& prefix, Access access, bool required) {
    const Sizes& s = problem.sizes;
    const int64_t gates = problem.cell == CellKind::lstm                                             ? 4
                          : problem.cell == CellKind::rnn_tanh || problem.cell == CellKind::rnn_relu ? 1
                                                                                                     : 3;
    Arguments out;
    out.x = array<4>(given.attr("x"), prefix, "x", "(T, E, B, I)", {s.T, s.E, s.B, s.I}, access, 1);
    const int64_t state[4] = {s.L * s.D, s.E, s.B, s.H};
    out.h0 = array<4>(given.attr("h0"), prefix, "h0", "(L*D, E, B, H)", state, access, 1);
    out.c0 = array<4>(given.attr("c0"), prefix, "c0", "(L*D, E, B, H)", state, access, 1);
    if (problem.cell != CellKind::lstm && out.c0.data) checked_.value_error(prefix + "c0 is given; only lstm has it");

    py::object list = given.attr("params");
    params_.emplace_back(static_cast<size_t>(s.L * s.D));
    std::vector<Params>& params = params_.back();
    const size_t count = list.is_none() ? 0 : py::len(list);
    if (count == 0 && !required) return out;
    if (count != params.size())
      checked_.value_error(prefix + "params has " + std::to_string(count) +
                           " entries; expected L*D = " + std::to_string(params.size()));
    for (size_t k = 0; k < params.size(); ++k) {
      py::object entry = list[py::int_(k)];
      if (entry.is_none() && !required) continue;
      const std::string name = prefix + "params[" + std::to_string(k) + "].";
      if (!py::isinstance<py::tuple>(entry) || py::len(entry) != 4)
        checked_.type_error(name + " is no tuple (W, R, bW, bR)");
      const int64_t inputs = static_cast<int64_t>(k) < s.D ? s.I : s.D * s.H;
      const int64_t rows = gates * s.H;
      const py::tuple tuple = py::reinterpret_borrow<py::tuple>(entry);
      params[k].W = array<3>(tuple[0], name, "W", "(E, G*H, I_l)", {s.E, rows, inputs}, access, 0);
      params[k].R = array<3>(tuple[1], name, "R", "(E, G*H, H)", {s.E, rows, s.H}, access, 0);
      params[k].bW = array<2>(tuple[2], name, "bW", "(E, G*H)", {s.E, rows}, access, 0);
      params[k].bR = array<2>(tuple[3], name, "bR", "(E, G*H)", {s.E, rows}, access, 0);
      if (required && !(params[k].W.data && params[k].R.data))
        checked_.type_error(name + "W or R is None; expected both");
    }
    out.params = params.data();
    return out;
  }

  Results results(py::handle given, const std::string& prefix, Access access) {
    const Sizes& s = problem.sizes;
    Results out;
    out.y = array<4>(given.attr("y"), prefix, "y", "(T, E, B, D*H)", {s.T, s.E, s.B, s.D * s.H}, access, -1);
    const int64_t state[4] = {s.L * s.D, s.E, s.B, s.H};
    out.hn = array<4>(given.attr("hn"), prefix, "hn", "(L*D, E, B, H)", state, access, -1);
    out.cn = array<4>(given.attr("cn"), prefix, "cn", "(L*D, E, B, H)", state, access, -1);
    if (problem.cell != CellKind::lstm && out.cn.data) checked_.value_error(prefix + "cn is given; only lstm has it");
    out.cells = array<5>(given.attr("cells"), prefix, "cells", "(L, T, E, B, D*H)", {s.L, s.T, s.E, s.B, s.D * s.H},
                         access, -1);
    return out;
  }

  void* tape(py::object given, Access access) {
    return checked_.tape(std::move(given), cpu::tape_elements(problem), access);
  }

  double work() const { return cpu::work(problem); }

  Problem problem;

 private:
  template <int Rank>
  Array<Rank> array(py::object object, const std::string& prefix, const char* name, const char* axes,
                    const int64_t (&shape)[Rank], Access access, int sets) {
    return checked_.array<Rank>(std::move(object), (prefix + name).c_str(), axes, shape, access, sets);
  }

  int64_t integer(py::handle given, const char* name, int64_t least, int64_t most = int64_t{1} << 60) {
    py::object value = given.attr(name);
    const int64_t out = PyLong_AsLongLong(value.ptr());
    if (PyErr_Occurred() || out < least || out > most) {
      PyErr_Clear();
      checked_.value_error(std::string(name) + " is " + std::string(py::repr(value)) + "; expected an int, " +
                           std::to_string(least) + " <= " + name + " <= " + std::to_string(most));
    }
    return out;
  }

  bool boolean(py::handle given, const char* name) {
    const int truth = PyObject_IsTrue(py::object(given.attr(name)).ptr());
    if (truth < 0) throw py::error_already_set();
    return truth == 1;
  }

  double real(py::handle given, const char* name) {
    py::object value = given.attr(name);
    const double out = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred() || !(out >= 0) || std::isinf(out)) {
      PyErr_Clear();
      checked_.value_error(std::string(name) + " is " + std::string(py::repr(value)) + "; expected a number >= 0");
    }
    return out;
  }

  std::string function_;
  Checked checked_;
  std::vector<std::vector<Params>> params_;  // what Arguments::params point to
};

size_t tape_elements(py::handle problem) { return cpu::tape_elements(Call("tape_elements: ", problem).problem); }

void forward(py::handle problem, py::handle p, py::handle out, py::object tape) {
  Call call("forward: ", problem);
  call.dtype_of(p);
  const Arguments arguments = call.arguments(p, "", Access::read, true);
  const Results results = call.results(out, "out.", Access::write);
  void* memory = tape.is_none() ? nullptr : call.tape(std::move(tape), Access::write);
  const int threads = threads_now();
  const Released released(call.work());
  cpu::forward(call.problem, arguments, results, memory, threads);
}

void backward(py::handle problem, py::handle p, py::object tape, py::handle g, py::handle dp) {
  Call call("backward: ", problem);
  call.dtype_of(p);
  const Arguments arguments = call.arguments(p, "", Access::read, true);
  const Results gradients = call.results(g, "g.", Access::read);
  const Arguments out = call.arguments(dp, "dp.", Access::write_sum, false);
  const void* memory = call.tape(std::move(tape), Access::read);
  const int threads = threads_now();
  const Released released(2 * call.work());
  cpu::backward(call.problem, arguments, memory, gradients, out, threads);
}

void jvp(py::handle problem, py::handle p, py::handle v, py::handle tout) {
  Call call("jvp: ", problem);
  call.dtype_of(p);
  const Arguments arguments = call.arguments(p, "", Access::read, true);
  const Arguments tangents = call.arguments(v, "v.", Access::read, false);
  const Results out = call.results(tout, "tout.", Access::write);
  const int threads = threads_now();
  const Released released(2 * call.work());
  cpu::jvp(call.problem, arguments, tangents, out, threads);
}

void hvp(py::handle problem, py::handle p, py::handle v, py::handle g, py::handle t, py::handle tdp) {
  Call call("hvp: ", problem);
  call.dtype_of(p);
  const Arguments arguments = call.arguments(p, "", Access::read, true);
  const Arguments tangents = call.arguments(v, "v.", Access::read, false);
  const Results gradients = call.results(g, "g.", Access::read);
  const Results second = call.results(t, "t.", Access::read);
  const Arguments out = call.arguments(tdp, "tdp.", Access::write_sum, false);
  const int threads = threads_now();
  const Released released(6 * call.work());
  cpu::hvp(call.problem, arguments, tangents, gradients, second, out, threads);
}

}  // namespace

void register_layer(py::module_& module) {
  module.def("tape_elements", &tape_elements, py::arg("problem"));
  module.def("forward", &forward, py::arg("problem"), py::arg("p"), py::arg("out"), py::arg("tape") = py::none());
  module.def("backward", &backward, py::arg("problem"), py::arg("p"), py::arg("tape"), py::arg("g"), py::arg("dp"));
  module.def("jvp", &jvp, py::arg("problem"), py::arg("p"), py::arg("v"), py::arg("tout"));
  module.def("hvp", &hvp, py::arg("problem"), py::arg("p"), py::arg("v"), py::arg("g"), py::arg("t"), py::arg("tdp"));
}

}  // namespace fusedrnn::bindings
