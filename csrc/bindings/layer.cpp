// SPDX-License-Identifier: Apache-2.0
// The checked route: Problem, Arguments and Results of backends/__init__.py become the structs of api.h.
// Nothing is trusted: every number is bounded and every array compared with the sizes before a kernel sees a pointer.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace fusedrnn::bindings {

namespace {

// Text as a template argument, so that every attribute name is made a Python string once.
template <size_t N>
struct Text {
  char text[N];
  consteval Text(const char (&from)[N]) { std::copy_n(from, N, text); }
};

template <Text name>
py::object get(py::handle object) {
  static PyObject* const string = PyUnicode_InternFromString(name.text);
  PyObject* value = PyObject_GetAttr(object.ptr(), string);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// One call: a checked problem and the arrays around it.
class Call {
 public:
  Call(const char* function, py::handle given) : checked_(function) {
    Sizes& s = problem.sizes;
    const py::object name = get<"cell">(given);
    const char* text = PyUnicode_Check(name.ptr()) ? PyUnicode_AsUTF8(name.ptr()) : nullptr;
    if (!text || !find_cell(text, &problem.cell)) {
      PyErr_Clear();
      std::string known;
      for (const CellFacts& cell : cell_facts) known += std::string(known.empty() ? "" : ", ") + cell.name;
      checked_.value_error("cell is " + std::string(py::repr(name)) + "; expected one of " + known);
    }
    s.T = integer<"T">(given, 0);
    s.E = integer<"E">(given, 1);
    s.B = integer<"B">(given, 0);
    s.I = integer<"I">(given, 0);
    s.H = integer<"H">(given, 1);
    s.L = static_cast<int32_t>(integer<"L">(given, 1, 1 << 20));
    s.D = static_cast<int32_t>(integer<"D">(given, 1, 2));
    // so that no product of sizes below leaves int64: any array of this many elements is refused by its shape anyway
    const double largest = 8.0 * s.L * s.D * (static_cast<double>(s.T) * s.E * s.B + 4.0 * s.E * s.H) *
                           (static_cast<double>(s.I) + 4.0 * s.D * static_cast<double>(s.H));
    if (largest > 4e18) checked_.value_error("the sizes multiply to more than any memory holds");
    problem.reverse = boolean<"reverse">(given);
    problem.reset_to_initial = boolean<"reset_to_initial">(given);
    problem.recompute = boolean<"recompute">(given);
    problem.bf16_weights = boolean<"bf16_weights">(given);
    problem.clip_cell = real<"clip_cell">(given);
    problem.clip_grad = real<"clip_grad">(given);
    problem.dropout = real<"dropout">(given);
    if (problem.dropout > 1) checked_.value_error("dropout is " + std::to_string(problem.dropout) + "; expected 0..1");
    if (problem.reverse && s.D == 2) checked_.value_error("reverse is set; expected one direction with it, but D is 2");
    const py::object seed = get<"seed">(given);
    problem.seed = PyLong_AsUnsignedLongLong(seed.ptr());
    if (PyErr_Occurred()) {
      PyErr_Clear();
      checked_.value_error("seed is " + std::string(py::repr(seed)) + "; expected an int, 0 <= seed < 2**64");
    }
    const py::object options = get<"variant">(given);
    if (!options.is_none()) variant(options);
    problem.lengths = checked_.lengths(get<"lengths">(given), {s.E, s.B}, s.T);
    problem.reset = checked_.reset(get<"reset">(given), {s.T, s.E, s.B});
  }

  // The first array read says which dtype all have.
  void dtype_of(py::handle arguments) {
    const py::object x = get<"x">(arguments);
    if (!Checked::is_tokens(x)) {
      checked_.set_dtype(x, {"", "x"});
    } else if (problem.bf16_weights) {
      checked_.assume(Dtype::f32);
    } else {
      const py::object list = get<"params">(arguments);
      const py::object first = py::reinterpret_steal<py::object>(PySequence_GetItem(list.ptr(), 0));
      const py::object W = first ? py::reinterpret_steal<py::object>(PySequence_GetItem(first.ptr(), 0)) : first;
      if (!W) throw py::error_already_set();
      checked_.set_dtype(W, {"", "W", 0});
    }
    problem.dtype = checked_.dtype();
    if (problem.bf16_weights && problem.dtype != Dtype::f32)
      checked_.type_error("x has dtype float64; expected float32 with bf16_weights");
  }

  // Weights of 16 bits are for inference.
  void refuse_bf16() const {
    if (problem.bf16_weights)
      checked_.value_error("bf16_weights is set; expected float32 weights where a tape is used");
  }

  // `role` tells the arrays apart in messages: "", "v.", "dp.", ... `required`: x, W and R must be there.
  Arguments arguments(py::handle given, const char* role, Access access, bool required) {
    const Sizes& s = problem.sizes;
    Arguments out;
    py::object x = get<"x">(given);
    if (required && Checked::is_tokens(x)) {
      out.tokens = checked_.tokens(std::move(x), {s.T, s.E, s.B}, s.I, problem.lengths);
      tokens_ = true;
    } else {
      if (tokens_ && !x.is_none())
        checked_.value_error(std::string(role) + "x is given; expected None: tokens have no tangent and no gradient");
      out.x = checked_.array<4>(std::move(x), {role, "x"}, "(T, E, B, I)", {s.T, s.E, s.B, s.I}, access, 1);
    }
    if (required && !out.x.data && !tokens_) checked_.type_error(std::string(role) + "x is None");
    if (tokens_ && whole_rows(problem)) checked_.value_error("x holds tokens; expected float input with layer_norm");
    const int64_t Q = outputs_of(problem);  // H without a projection
    const int64_t state[4] = {s.L * s.D, s.E, s.B, s.H}, h_state[4] = {s.L * s.D, s.E, s.B, Q};
    out.h0 = checked_.array<4>(get<"h0">(given), {role, "h0"}, "(L*D, E, B, H)", h_state, access, 1);
    out.c0 = checked_.array<4>(get<"c0">(given), {role, "c0"}, "(L*D, E, B, H)", state, access, 1);
    if (!has_cell_state(problem) && out.c0.data)
      checked_.value_error(std::string(role) + "c0 is given; only cells with c have it");

    py::object list = get<"params">(given);
    params_.emplace_back(static_cast<size_t>(s.L * s.D));
    std::vector<Params>& params = params_.back();
    const size_t count = list.is_none() ? 0 : py::len(list);
    if (count == 0 && !required) return context(given, role, access, required, out);
    if (count != params.size())
      checked_.value_error(std::string(role) + "params has " + std::to_string(count) +
                           " entries; expected L*D = " + std::to_string(params.size()));
    for (size_t k = 0; k < params.size(); ++k) {
      const py::object entry =
          py::reinterpret_steal<py::object>(PySequence_GetItem(list.ptr(), static_cast<Py_ssize_t>(k)));
      if (!entry) throw py::error_already_set();
      if (entry.is_none() && !required) continue;
      const int index = static_cast<int>(k);
      if (!py::isinstance<py::tuple>(entry) || py::len(entry) != 4)
        checked_.type_error(ArrayName{role, "", index}.text() + " is no tuple (W, R, bW, bR)");
      const int64_t inputs = static_cast<int64_t>(k) < s.D ? s.I : s.D * Q;
      const int64_t rows = facts_of(problem.cell).gates * s.H;
      const py::tuple tuple = py::reinterpret_borrow<py::tuple>(entry);
      const Dtype stored = problem.bf16_weights ? Dtype::bf16 : problem.dtype;
      params[k].W =
          checked_.array<3>(tuple[0], {role, "W", index}, "(E, G*H, I_l)", {s.E, rows, inputs}, access, 0, stored);
      params[k].R = checked_.array<3>(tuple[1], {role, "R", index}, "(E, G*H, H)", {s.E, rows, Q}, access, 0, stored);
      params[k].bW = checked_.array<2>(tuple[2], {role, "bW", index}, "(E, G*H)", {s.E, rows}, access, 0);
      params[k].bR = checked_.array<2>(tuple[3], {role, "bR", index}, "(E, G*H)", {s.E, rows}, access, 0);
      const bool has_R = facts_of(problem.cell).state_product;
      if (required && !(params[k].W.data && (params[k].R.data || !has_R)))
        checked_.type_error(ArrayName{role, "", index}.text() + " lacks W or R");
      if (!has_R && (params[k].R.data || params[k].bR.data))
        checked_.type_error(ArrayName{role, "", index}.text() + " holds R or bR; this cell has neither");
    }
    out.params = params.data();
    if (problem.variant.given) out.extras = extras(get<"extras">(given), role, access, required);
    return context(given, role, access, required, out);
  }

  // The context and its weights, into `out`; both or none of them where they are required.
  Arguments context(py::handle given, const char* role, Access access, bool required, Arguments out) {
    Sizes& s = problem.sizes;
    py::object context = get<"context">(given);
    if (required && PyArray_Check(context.ptr()) && PyArray_NDIM(as_array(context.ptr())) == 3)
      s.K = PyArray_DIM(as_array(context.ptr()), 2);
    if (s.K > INT32_MAX) checked_.value_error("K is " + std::to_string(s.K) + "; expected less than 2**31");
    if (!required && s.K == 0 && !context.is_none())
      checked_.value_error(std::string(role) + "context is given; expected None: the call has no context");
    out.context = checked_.array<3>(context, {role, "context"}, "(E, B, K)", {s.E, s.B, s.K}, access, 0);
    if (required && out.context.data && s.K < 1) checked_.value_error("context has K = 0; expected K >= 1");
    if (out.context.data && whole_rows(problem))
      checked_.value_error("context is given; expected none with layer_norm");
    const py::object list = get<"context_weights">(given);
    if (required && list.is_none() != context.is_none())
      checked_.type_error("context and context_weights come both or not at all");
    if (list.is_none()) return out;
    if (!PySequence_Check(list.ptr()) || py::len(list) != static_cast<size_t>(s.D) || s.K == 0)
      checked_.value_error(std::string(role) + "context_weights: expected a list of D = " + std::to_string(s.D) +
                           " arrays beside a context");
    const Dtype stored = problem.bf16_weights ? Dtype::bf16 : problem.dtype;
    for (int d = 0; d < s.D; ++d) {
      py::object entry = py::reinterpret_steal<py::object>(PySequence_GetItem(list.ptr(), d));
      if (!entry) throw py::error_already_set();
      const ArrayName name{role, d ? "context_weights[1]" : "context_weights[0]"};
      if (required && entry.is_none()) checked_.type_error(name.text() + " is None");
      out.context_weights[d] = checked_.array<3>(std::move(entry), name, "(E, G*H, K)",
                                                 {s.E, facts_of(problem.cell).gates * s.H, s.K}, access, 0, stored);
    }
    return out;
  }

  Results results(py::handle given, const char* role, Access access) {
    const Sizes& s = problem.sizes;
    Results out;
    out.y = checked_.array<4>(get<"y">(given), {role, "y"}, "(T, E, B, D*H)",
                              {s.T, s.E, s.B, s.D * outputs_of(problem)}, access, -1);
    const int64_t h_state[4] = {s.L * s.D, s.E, s.B, outputs_of(problem)};
    const int64_t state[4] = {s.L * s.D, s.E, s.B, s.H};
    out.hn = checked_.array<4>(get<"hn">(given), {role, "hn"}, "(L*D, E, B, H)", h_state, access, -1);
    out.cn = checked_.array<4>(get<"cn">(given), {role, "cn"}, "(L*D, E, B, H)", state, access, -1);
    if (!has_cell_state(problem) && out.cn.data)
      checked_.value_error(std::string(role) + "cn is given; only cells with c have it");
    out.cells = checked_.array<5>(get<"cells">(given), {role, "cells"}, "(L, T, E, B, D*H)",
                                  {s.L, s.T, s.E, s.B, s.D * s.H}, access, -1);
    return out;
  }

  void* tape(py::object given, Access access) {
    return checked_.tape(std::move(given), cpu::tape_elements(problem), access);
  }

  // `stop` holds what the result refers to.
  cpu::Generation generation(py::handle given, std::vector<int64_t>& stop) {
    const Sizes& s = problem.sizes;
    cpu::Generation g;
    g.head = checked_.array<2>(get<"head">(given), {"", "head"}, "(I, H)", {s.I, s.H}, Access::read);
    g.head_bias = checked_.array<1>(get<"head_bias">(given), {"", "head_bias"}, "(I,)", {s.I}, Access::read);
    if (!g.head.data) checked_.type_error("head is None");
    const py::object drawn = get<"drawn">(given);
    g.steps = PyArray_Check(drawn.ptr()) && PyArray_NDIM(as_array(drawn.ptr())) == 2
                  ? PyArray_DIM(as_array(drawn.ptr()), 0)
                  : 0;
    g.drawn = checked_.written_integers(drawn, "drawn", "(steps, B)", {g.steps, s.B});
    g.log_probs = checked_.written_doubles(get<"log_probs">(given), "log_probs", "(steps, B)", {g.steps, s.B});
    g.ended = checked_.written_flags(get<"ended">(given), "ended", "(E, B)", {s.E, s.B});
    if (!g.ended) checked_.type_error("ended is None");
    g.seen = checked_.written_flags(get<"seen">(given), "seen", "(B, I)", {s.B, s.I});
    g.first_row = integer<"first_row">(given, 0);
    g.top_k = integer<"top_k">(given, 0);
    g.temperature = real<"temperature">(given);
    g.top_p = real<"top_p">(given);
    g.repetition_penalty = real<"repetition_penalty">(given);
    g.of_model = boolean<"of_model">(given);
    if (!(g.top_p > 0 && g.top_p <= 1)) checked_.value_error("expected 0 < top_p <= 1");
    if (!(g.repetition_penalty > 0)) checked_.value_error("expected repetition_penalty > 0");
    stop = checked_.integers(get<"stop">(given), "stop");
    for (const int64_t token : stop)
      if (token < 0 || token >= s.I)
        checked_.value_error("stop has " + std::to_string(token) +
                             "; expected 0 <= token < I = " + std::to_string(s.I));
    g.stop = stop.data();
    g.stops = static_cast<int64_t>(stop.size());
    return g;
  }

  // Tangents of what needs whole rows are the reference's.
  void refuse_whole_rows() const {
    if (whole_rows(problem))
      checked_.value_error("variant has layer_norm; expected none of it: its tangents are the reference's");
  }

  void refuse_for_generation() const {
    if (whole_rows(problem) || problem.variant.proj || problem.variant.training)
      checked_.value_error(
          "variant has proj_size, layer_norm or training; expected none of them: text is written step by step");
  }

  double work() const { return cpu::work(problem); }
  Checked& checked() { return checked_; }

  Problem problem;

 private:
  // The options beyond a plain cell.
  void variant(py::handle given) {
    Variant& v = problem.variant;
    v.given = true;
    v.proj = integer<"proj_size">(given, 0);
    v.peepholes = boolean<"peepholes">(given);
    v.layer_norm = boolean<"layer_norm">(given);
    v.clip_gates = real<"clip_gates">(given);
    v.zoneout_h = real<"zoneout_h">(given);
    v.zoneout_c = real<"zoneout_c">(given);
    v.recurrent_dropout = real<"recurrent_dropout">(given);
    v.training = boolean<"training">(given);
    const CellFacts& cell = facts_of(problem.cell);
    const bool before = problem.cell == CellKind::gru_reset_before, rnn = cell.gates == 1;
    if (v.zoneout_h > 1 || v.zoneout_c > 1 || v.recurrent_dropout > 1)
      checked_.value_error("variant has a probability over 1; expected 0..1");
    if (!cell.state_product || (v.peepholes && !cell.cell_state) || ((v.proj || v.layer_norm) && (before || rnn)))
      checked_.value_error("variant asks " + std::string(cell.name) + " for what it does not have");
    if (whole_rows(problem) && problem.recompute)
      checked_.value_error("variant has layer_norm beside recompute; expected one or the other");
    const py::object list = get<"activations">(given);
    const size_t count = cell.cell_state ? 3 : rnn ? 1 : 2;
    if (!py::isinstance<py::tuple>(list) || py::len(list) != count)
      checked_.value_error("variant.activations is no tuple of " + std::to_string(count));
    for (size_t k = 0; k < count; ++k) {
      const py::object one = py::reinterpret_borrow<py::tuple>(list)[k];
      Activation& to = v.activations[k];
      if (!py::isinstance<py::tuple>(one) || py::len(one) != 3)
        checked_.value_error("variant.activations has an entry that is no (name, alpha, beta)");
      const py::tuple parts = py::reinterpret_borrow<py::tuple>(one);
      const auto* end = std::end(activation_names);
      const std::string name = py::str(parts[0]);
      const auto* found = std::find(std::begin(activation_names), end, name);
      if (found == end) checked_.value_error("variant.activations has " + name + ", which is none of ONNX's");
      to.kind = static_cast<ActivationKind>(found - activation_names);
      to.alpha = PyFloat_AsDouble(parts[1].ptr());
      to.beta = PyFloat_AsDouble(parts[2].ptr());
      if (PyErr_Occurred()) throw py::error_already_set();
    }
  }

  Extras* extras(py::handle list, const char* role, Access access, bool required) {
    const Sizes& s = problem.sizes;
    const Variant& v = problem.variant;
    const CellFacts& cell = facts_of(problem.cell);
    const size_t count = list.is_none() ? 0 : py::len(list);
    if (count == 0 && !required) return nullptr;
    if (count != static_cast<size_t>(s.L * s.D))
      checked_.value_error(std::string(role) + "extras has " + std::to_string(count) +
                           " entries; expected L*D = " + std::to_string(s.L * s.D));
    extras_.emplace_back(count);
    for (size_t k = 0; k < count; ++k) {
      const py::object entry =
          py::reinterpret_steal<py::object>(PySequence_GetItem(list.ptr(), static_cast<Py_ssize_t>(k)));
      if (!entry) throw py::error_already_set();
      if (entry.is_none() && !required) continue;
      const int index = static_cast<int>(k);
      if (!py::isinstance<py::tuple>(entry) || py::len(entry) != 6)
        checked_.type_error(ArrayName{role, "extras", index}.text() + " is no tuple of six");
      const py::tuple t = py::reinterpret_borrow<py::tuple>(entry);
      Extras& to = extras_.back()[k];
      const int64_t rows = cell.gates * s.H;
      to.hr = checked_.array<3>(t[0], {role, "weight_hr", index}, "(E, P, H)", {s.E, v.proj, s.H}, access, 0);
      to.ph = checked_.array<2>(t[1], {role, "weight_ph", index}, "(E, (G-1)*H)", {s.E, rows - s.H}, access, 0);
      to.gain_ih = checked_.array<2>(t[2], {role, "gain_ih", index}, "(E, G*H)", {s.E, rows}, access, 0);
      to.gain_hh = checked_.array<2>(t[3], {role, "gain_hh", index}, "(E, G*H)", {s.E, rows}, access, 0);
      to.gain_c = checked_.array<2>(t[4], {role, "gain_c", index}, "(E, H)", {s.E, s.H}, access, 0);
      to.bias_c = checked_.array<2>(t[5], {role, "bias_c", index}, "(E, H)", {s.E, s.H}, access, 0);
      const bool norm_c = v.layer_norm && cell.cell_state;
      const bool wanted[6] = {v.proj > 0, v.peepholes, v.layer_norm, v.layer_norm, norm_c, norm_c};
      for (size_t i = 0; i < 6; ++i)
        if (t[i].is_none() ? wanted[i] && required : !wanted[i])
          checked_.type_error(ArrayName{role, "extras", index}.text() + " has an array too few or too many");
    }
    return extras_.back().data();
  }

  static constexpr int64_t unbounded = int64_t{1} << 60;

  template <Text name>
  int64_t integer(py::handle given, int64_t least, int64_t most = unbounded) {
    const py::object value = get<name>(given);
    const int64_t out = PyLong_AsLongLong(value.ptr());
    if (out < least || out > most || PyErr_Occurred()) {
      PyErr_Clear();
      checked_.value_error(std::string(name.text) + " is " + std::string(py::repr(value)) + "; expected an int >= " +
                           std::to_string(least) + (most == unbounded ? "" : " and <= " + std::to_string(most)));
    }
    return out;
  }

  template <Text name>
  bool boolean(py::handle given) {
    const int truth = PyObject_IsTrue(get<name>(given).ptr());
    if (truth < 0) throw py::error_already_set();
    return truth == 1;
  }

  template <Text name>
  double real(py::handle given) {
    const py::object value = get<name>(given);
    const double out = PyFloat_AsDouble(value.ptr());
    if (!(out >= 0) || std::isinf(out)) {  // -1 also stands for an error
      PyErr_Clear();
      checked_.value_error(std::string(name.text) + " is " + std::string(py::repr(value)) + "; expected a number >= 0");
    }
    return out;
  }

  Checked checked_;
  bool tokens_ = false;
  std::vector<std::vector<Params>> params_;  // what Arguments::params point to
  std::vector<std::vector<Extras>> extras_;  // ... and Arguments::extras
};

size_t tape_elements(py::handle problem) { return cpu::tape_elements(Call("tape_elements: ", problem).problem); }

void forward(py::handle problem, py::handle p, py::handle out, py::object tape) {
  Call call("forward: ", problem);
  call.dtype_of(p);
  const Arguments arguments = call.arguments(p, "", Access::read, true);
  const Results results = call.results(out, "out.", Access::write);
  if (!tape.is_none()) call.refuse_bf16();
  void* memory = tape.is_none() ? nullptr : call.tape(std::move(tape), Access::write);
  const int threads = threads_now();
  const Released released(call.work());
  cpu::forward(call.problem, arguments, results, memory, threads);
}

void backward(py::handle problem, py::handle p, py::object tape, py::handle g, py::handle dp) {
  Call call("backward: ", problem);
  call.dtype_of(p);
  call.refuse_bf16();
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
  call.refuse_bf16();
  call.refuse_whole_rows();
  const Arguments arguments = call.arguments(p, "", Access::read, true);
  const Arguments tangents = call.arguments(v, "v.", Access::read, false);
  const Results out = call.results(tout, "tout.", Access::write);
  const int threads = threads_now();
  const Released released(2 * call.work());
  cpu::jvp(call.problem, arguments, tangents, out, threads);
}

void hvp(py::handle problem, py::handle p, py::handle v, py::handle g, py::handle t, py::handle tdp, py::handle tout) {
  Call call("hvp: ", problem);
  call.dtype_of(p);
  call.refuse_bf16();
  call.refuse_whole_rows();
  const Arguments arguments = call.arguments(p, "", Access::read, true);
  const Arguments tangents = call.arguments(v, "v.", Access::read, false);
  const Results gradients = call.results(g, "g.", Access::read);
  const Results second = call.results(t, "t.", Access::read);
  const Arguments out = call.arguments(tdp, "tdp.", Access::write_sum, false);
  const Results forward = tout.is_none() ? Results() : call.results(tout, "tout.", Access::write);
  const int threads = threads_now();
  const Released released(6 * call.work());
  cpu::hvp(call.problem, arguments, tangents, gradients, second, out, threads, forward);
}

// Draws g.drawn.shape[0] tokens for every row. T = E = D = 1; p.x (1,1,B) is what the rows read first. None, or the
// first (step, row, what is wrong with its logits), and then nothing that was written is of use.
py::object generate(py::handle problem, py::handle p, py::handle out, py::handle g) {
  Call call("generate: ", problem);
  call.dtype_of(p);
  call.refuse_bf16();
  const Arguments arguments = call.arguments(p, "", Access::read, true);
  const Results results = call.results(out, "out.", Access::write);
  const Sizes& s = call.problem.sizes;
  if (s.T != 1 || s.E != 1 || s.D != 1 || !arguments.tokens.data || arguments.context.data || call.problem.reverse ||
      call.problem.lengths.data || call.problem.reset.data || !results.hn.data ||
      (facts_of(call.problem.cell).cell_state && !results.cn.data))
    call.checked().value_error(
        "expected T = E = D = 1, tokens for x, hn (and cn), and no context, lengths, reset, reverse");
  std::vector<int64_t> stop;
  call.refuse_for_generation();
  const cpu::Generation generation = call.generation(g, stop);
  cpu::Failure failure;
  {
    const int threads = threads_now();
    const Released released(call.work() * static_cast<double>(generation.steps));
    failure = cpu::generate(call.problem, arguments, results, generation, threads);
  }
  if (failure.outcome == cpu::Outcome::drawn) return py::none();
  const char* what = failure.outcome == cpu::Outcome::nan        ? "hold NaN"
                     : failure.outcome == cpu::Outcome::infinite ? "hold inf"
                                                                 : "are all -inf";
  return py::make_tuple(failure.step, failure.row, what);
}

}  // namespace

void register_layer(py::module_& module) {
  module.def("tape_elements", &tape_elements, py::arg("problem"));
  module.def("forward", &forward, py::arg("problem"), py::arg("p"), py::arg("out"), py::arg("tape") = py::none());
  module.def("backward", &backward, py::arg("problem"), py::arg("p"), py::arg("tape"), py::arg("g"), py::arg("dp"));
  module.def("jvp", &jvp, py::arg("problem"), py::arg("p"), py::arg("v"), py::arg("tout"));
  module.def("hvp", &hvp, py::arg("problem"), py::arg("p"), py::arg("v"), py::arg("g"), py::arg("t"), py::arg("tdp"),
             py::arg("tout") = py::none());
  module.def("generate", &generate, py::arg("problem"), py::arg("p"), py::arg("out"), py::arg("g"));
}

}  // namespace fusedrnn::bindings
