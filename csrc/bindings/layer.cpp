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

template <Text name>
py::object get(py::handle object) {
  PyObject* value = PyObject_GetAttr(object.ptr(), interned<name>());
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object item(py::handle list, int k) {
  PyObject* value = PySequence_GetItem(list.ptr(), k);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// What a set of arrays is to the call; its name tells them apart in messages.
struct Role {
  const char* name;
  Access access;
  bool required = false;  // x, W and R must be there
};
constexpr Role given_arguments{"", Access::read, true}, tangents{"v.", Access::read};

// One call by way of NumPy: a checked problem and the arrays around it.
class CheckedCall {
 public:
  CheckedCall(const char* function, py::handle given) : checked_(function) {
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
    checked_.fill_lengths(get<"lengths">(given), lengths_slot(problem), s.T);
    checked_.fill_reset(get<"reset">(given), reset_slot(problem));
  }

  // The first array read says which dtype all have.
  void find_dtype(py::handle arguments) {
    const py::object x = get<"x">(arguments);
    if (!Checked::is_tokens(x)) {
      checked_.set_dtype(x, {"", "x"});
    } else if (problem.bf16_weights) {
      checked_.assume(Dtype::f32);
    } else {
      checked_.set_dtype(item(item(get<"params">(arguments), 0), 0), {"", "W", 0});
    }
    problem.dtype = checked_.dtype();
    if (problem.bf16_weights && problem.dtype != Dtype::f32)
      checked_.type_error("x has dtype float64; expected float32 with bf16_weights");
  }

  Arguments arguments(py::handle given, const Role& role) {
    Arguments out;
    read_x(get<"x">(given), role, out);
    each_start(problem, out, [&](const auto& slot) {
      return fill(slot.part == 1 ? get<"h0">(given) : get<"c0">(given), slot, role);
    });
    if (read_params(get<"params">(given), role, out) && problem.variant.given)
      out.extras = extras(get<"extras">(given), role);
    read_context(given, role, out);
    return out;
  }

  Results results(py::handle given, const Role& role) {
    Results out;
    each_result(problem, out, [&](const auto& slot) {
      return fill(slot.part == 0 ? get<"y">(given) : slot.part == 1 ? get<"hn">(given) : get<"cn">(given), slot, role);
    });
    fill(get<"cells">(given), cells_slot(problem, out), role);
    return out;
  }

  void* tape(py::object given, Access access) {
    return checked_.tape(std::move(given), cpu::tape_elements(problem), access);
  }

  // `stop` holds what the result refers to.
  cpu::Generation generation(py::handle given, std::vector<int64_t>& stop) {
    const Sizes& s = problem.sizes;
    cpu::Generation g;
    g.head = checked_.array<2>(get<"head">(given), {"", "head"}, problem.variant.proj ? "(I, P)" : "(I, H)",
                               {s.I, outputs_of(problem)}, Access::read);
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

  // ---- what the kernels do not do together

  void refuse_bf16() const {  // weights of 16 bits are for inference
    if (problem.bf16_weights)
      checked_.value_error("bf16_weights is set; expected float32 weights where a tape is used");
  }
  void refuse_for_generation() const {
    if (problem.variant.training)
      checked_.value_error("variant has training; expected none: text is written, not learnt");
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
    const bool whole = cell.gates >= 3 && problem.cell != CellKind::gru_reset_before;  // takes a projection or norms
    if (v.zoneout_h > 1 || v.zoneout_c > 1 || v.recurrent_dropout > 1)
      checked_.value_error("variant has a probability over 1; expected 0..1");
    if (!cell.state_product || (v.peepholes && !cell.cell_state) || ((v.proj || v.layer_norm) && !whole))
      checked_.value_error("variant asks " + std::string(cell.name) + " for what it does not have");
    const py::object list = get<"activations">(given);
    const size_t count = cell.cell_state ? 3 : cell.gates == 1 ? 1 : 2;
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

  // An array into its slot. True, as each_* wants it: raises where something is wrong.
  template <int Rank>
  bool fill(py::object object, const Slot<Rank>& slot, const Role& role) {
    checked_.fill(std::move(object), slot, role.name, role.access, dtype_of(problem, slot.stored));
    if (slot.family == Family::state && !slot.has && slot.array.data)
      checked_.value_error(std::string(role.name) + slot.name + " is given; only cells with c have it");
    return true;
  }

  void read_x(py::object x, const Role& role, Arguments& out) {
    if (role.required && Checked::is_tokens(x)) {
      checked_.fill_tokens(x, tokens_slot(problem, out), problem.sizes.I, problem.lengths);
      tokens_ = true;
    } else {
      if (tokens_ && !x.is_none())
        checked_.value_error(std::string(role.name) +
                             "x is given; expected None: tokens have no tangent and no gradient");
      fill(std::move(x), x_slot(problem, out), role);
    }
    if (role.required && !out.x.data && !tokens_) checked_.type_error(std::string(role.name) + "x is None");
  }

  // The number of entries, one for each layer and direction; 0 where none is needed and none given.
  int stacks(py::handle list, const Role& role, const char* name) const {
    const size_t count = list.is_none() ? 0 : py::len(list);
    const int expected = problem.sizes.L * problem.sizes.D;
    if (count == 0 && !role.required) return 0;
    if (count != static_cast<size_t>(expected))
      checked_.value_error(std::string(role.name) + name + " has " + std::to_string(count) +
                           " entries; expected L*D = " + std::to_string(expected));
    return expected;
  }

  // False where there are none.
  bool read_params(py::handle list, const Role& role, Arguments& out) {
    const int count = stacks(list, role, "params");
    const bool has_R = facts_of(problem.cell).state_product;
    params_.emplace_back(static_cast<size_t>(count));
    for (int k = 0; k < count; ++k) {
      const py::object entry = item(list, k);
      if (entry.is_none() && !role.required) continue;
      const auto refuse = [&](const char* why) { checked_.type_error(ArrayName{role.name, "", k}.text() + why); };
      if (!py::isinstance<py::tuple>(entry) || py::len(entry) != 4) refuse(" is no tuple (W, R, bW, bR)");
      Params& w = params_.back()[static_cast<size_t>(k)];
      each_weight(problem, k, w, [&](const auto& slot) { return fill(item(entry, slot.part), slot, role); });
      if (role.required && !(w.W.data && (w.R.data || !has_R))) refuse(" lacks W or R");
      if (!has_R && (w.R.data || w.bR.data)) refuse(" holds R or bR; this cell has neither");
    }
    if (count) out.params = params_.back().data();
    return count > 0;
  }

  Extras* extras(py::handle list, const Role& role) {
    const int count = stacks(list, role, "extras");
    if (count == 0) return nullptr;
    extras_.emplace_back(static_cast<size_t>(count));
    for (int k = 0; k < count; ++k) {
      const py::object entry = item(list, k);
      if (entry.is_none() && !role.required) continue;
      const auto refuse = [&](const char* why) { checked_.type_error(ArrayName{role.name, "extras", k}.text() + why); };
      if (!py::isinstance<py::tuple>(entry) || py::len(entry) != 6) refuse(" is no tuple of six");
      bool wanted = true;  // all that are there, and none else
      each_extra(problem, k, extras_.back()[static_cast<size_t>(k)], [&](const auto& slot) {
        const py::object one = item(entry, slot.part);
        wanted = wanted && (one.is_none() ? !slot.has || !role.required : slot.has);
        return fill(one, slot, role);
      });
      if (!wanted) refuse(" has an array too few or too many");
    }
    return extras_.back().data();
  }

  // The context and its weights; both or none of them where they are required.
  void read_context(py::handle given, const Role& role, Arguments& out) {
    Sizes& s = problem.sizes;
    const py::object context = get<"context">(given);
    if (role.required && PyArray_Check(context.ptr()) && PyArray_NDIM(as_array(context.ptr())) == 3)
      s.K = PyArray_DIM(as_array(context.ptr()), 2);
    if (s.K > INT32_MAX) checked_.value_error("K is " + std::to_string(s.K) + "; expected less than 2**31");
    if (!role.required && s.K == 0 && !context.is_none())
      checked_.value_error(std::string(role.name) + "context is given; expected None: the call has no context");
    fill(context, context_slot(problem, out), role);
    if (role.required && out.context.data && s.K < 1) checked_.value_error("context has K = 0; expected K >= 1");
    const py::object list = get<"context_weights">(given);
    if (role.required && list.is_none() != context.is_none())
      checked_.type_error("context and context_weights come both or not at all");
    if (list.is_none()) return;
    if (!PySequence_Check(list.ptr()) || py::len(list) != static_cast<size_t>(s.D) || s.K == 0)
      checked_.value_error(std::string(role.name) + "context_weights: expected a list of D = " + std::to_string(s.D) +
                           " arrays beside a context");
    for (int d = 0; d < s.D; ++d) {
      py::object entry = item(list, d);
      const Slot<3> slot = context_weights_slot(problem, out, d);
      if (role.required && entry.is_none()) checked_.type_error(std::string(role.name) + slot.name + " is None");
      fill(std::move(entry), slot, role);
    }
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

size_t tape_elements(py::handle problem) { return cpu::tape_elements(CheckedCall("tape_elements: ", problem).problem); }

void forward(py::handle problem, py::handle p, py::handle out, py::object tape) {
  CheckedCall call("forward: ", problem);
  call.find_dtype(p);
  const Arguments arguments = call.arguments(p, given_arguments);
  const Results results = call.results(out, {"out.", Access::write});
  if (!tape.is_none()) call.refuse_bf16();
  void* memory = tape.is_none() ? nullptr : call.tape(std::move(tape), Access::write);
  const int threads = threads_now();
  const Released released(call.work());
  cpu::forward(call.problem, arguments, results, memory, threads);
}

void backward(py::handle problem, py::handle p, py::object tape, py::handle g, py::handle dp) {
  CheckedCall call("backward: ", problem);
  call.find_dtype(p);
  call.refuse_bf16();
  const Arguments arguments = call.arguments(p, given_arguments);
  const Results gradients = call.results(g, {"g.", Access::read});
  const Arguments out = call.arguments(dp, {"dp.", Access::write_sum});
  const void* memory = call.tape(std::move(tape), Access::read);
  const int threads = threads_now();
  const Released released(2 * call.work());
  cpu::backward(call.problem, arguments, memory, gradients, out, threads);
}

void jvp(py::handle problem, py::handle p, py::handle v, py::handle tout) {
  CheckedCall call("jvp: ", problem);
  call.find_dtype(p);
  call.refuse_bf16();
  const Arguments arguments = call.arguments(p, given_arguments);
  const Arguments direction = call.arguments(v, tangents);
  const Results out = call.results(tout, {"tout.", Access::write});
  const int threads = threads_now();
  const Released released(2 * call.work());
  cpu::jvp(call.problem, arguments, direction, out, threads);
}

void hvp(py::handle problem, py::handle p, py::handle v, py::handle g, py::handle t, py::handle tdp, py::handle tout) {
  CheckedCall call("hvp: ", problem);
  call.find_dtype(p);
  call.refuse_bf16();
  const Arguments arguments = call.arguments(p, given_arguments);
  const Arguments direction = call.arguments(v, tangents);
  const Results gradients = call.results(g, {"g.", Access::read});
  const Results second = call.results(t, {"t.", Access::read});
  const Arguments out = call.arguments(tdp, {"tdp.", Access::write_sum});
  const Results forward = tout.is_none() ? Results() : call.results(tout, {"tout.", Access::write});
  const int threads = threads_now();
  const Released released(6 * call.work());
  cpu::hvp(call.problem, arguments, direction, gradients, second, out, threads, forward);
}

// Draws g.drawn.shape[0] tokens for every row. T = E = D = 1; p.x (1,1,B) is what the rows read first. None, or the
// first (step, row, what is wrong with its logits), and then nothing that was written is of use.
py::object generate(py::handle problem, py::handle p, py::handle out, py::handle g) {
  CheckedCall call("generate: ", problem);
  call.find_dtype(p);
  call.refuse_bf16();
  const Arguments arguments = call.arguments(p, given_arguments);
  const Results results = call.results(out, {"out.", Access::write});
  const Sizes& s = call.problem.sizes;
  if (s.T != 1 || s.E != 1 || s.D != 1 || !arguments.tokens.data || arguments.context.data || call.problem.reverse ||
      call.problem.lengths.data || call.problem.reset.data || !results.hn.data ||
      (has_cell_state(call.problem) && !results.cn.data))
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
