// SPDX-License-Identifier: Apache-2.0
// The short way from a layer object to the kernels (see Lane in _core.pyi). It answers the plain case and returns None
// for all else, having raised and written nothing. A plain CPython type: pybind11's call would cost as much as the
// rest.
#include <cmath>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "bindings/plain.h"
#include "bindings/tensor.h"

namespace fusedrnn::bindings {

namespace {

// Outputs of step(): memory that the Lane owns, and the finished result tuple over it.
struct Turn {
  PyObject* owner = nullptr;   // capsule that frees the memory
  PyObject* result = nullptr;  // (y, h) or (y, (h, c))
  char *begin = nullptr, *end = nullptr;
  void* parts[3] = {};  // y, h, c

  bool contains(const void* data) const { return begin <= data && data < end; }
  void clear() {
    Py_CLEAR(result);
    Py_CLEAR(owner);
    *this = Turn();
  }
};

struct Lane {
  PyObject_HEAD;
  CellKind cell;
  int32_t layers, directions;
  bool batch_first;
  double clip_cell;
  PyObject** keys;  // [layers*directions*kParts], interned names
  // step()
  Turn turns[2];
  int turn;
  bool inside;  // a thread computes with the GIL released
  Dtype dtype;
  int64_t B, H;  // what the turns are made for; B = -1: unbatched

  int stacks() const { return layers * directions; }
  void clear_turns() {
    for (Turn& one : turns) one.clear();
    B = 0;
  }
};

// A state as the user gives it, h or (h, c); borrowed, null where there is none.
using State = PyObject* [2];
bool find_state(const Lane& lane, PyObject* state, State& parts) {
  parts[0] = parts[1] = nullptr;
  if (state == Py_None) return true;
  if (!facts_of(lane.cell).cell_state) {
    parts[0] = state;
    return true;
  }
  if ((!PyTuple_Check(state) && !PyList_Check(state)) || PySequence_Fast_GET_SIZE(state) != 2) return false;
  parts[0] = PySequence_Fast_GET_ITEM(state, 0);
  parts[1] = PySequence_Fast_GET_ITEM(state, 1);
  return true;
}
// ... and as the user gets it. Null with an exception set.
py::object as_state(py::object h, const py::object& c) {
  return c ? owned(PyTuple_Pack(2, h.ptr(), c.ptr())) : std::move(h);
}

// Borrowed references to the weights; null for an absent bias. False where something else is odd.
bool find_weights(const Lane& lane, PyObject* params, PyObject** sources) {
  const int count = lane.stacks();
  if (PyDict_Check(params)) {
    for (int k = 0; k < count * kParts; ++k) {
      sources[k] = PyDict_GetItemWithError(params, lane.keys[k]);
      if (!sources[k] && (PyErr_Occurred() || k % kParts < 2)) return false;
    }
    return true;
  }
  if (!PyTuple_Check(params) && !PyList_Check(params)) return false;
  const Py_ssize_t given = PySequence_Fast_GET_SIZE(params);
  PyObject** items = PySequence_Fast_ITEMS(params);
  const int each = given == count * kParts ? kParts : kParts / 2;
  if (given != count * each) return false;
  for (int k = 0; k < count; ++k)
    for (int part = 0; part < kParts; ++part)
      sources[k * kParts + part] = part < each ? items[k * each + part] : nullptr;
  return true;
}

// What is left of a tape's memory behind its first cache line: threads that own neighbouring units then write no line
// in common. Null where it holds fewer than `elements`.
void* tape_in(PyObject* memory, Dtype dtype, int64_t elements) {
  if (!is_plain(memory, type_of(dtype)) || PyArray_NDIM(as_array(memory)) != 1 || !PyArray_ISCARRAY(as_array(memory)))
    return nullptr;
  const int64_t line = 64 / size_of(dtype);
  if (PyArray_DIM(as_array(memory), 0) < elements + line) return nullptr;
  char* data = static_cast<char*>(PyArray_DATA(as_array(memory)));
  return data + (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64;
}

// One call's NumPy arrays, read where they lie; and new ones beside them.
class NumpyCall {
 public:
  explicit NumpyCall(const Lane& lane)
      : lane_(lane),
        params_(static_cast<size_t>(lane.stacks())),
        sources_(static_cast<size_t>(lane.stacks() * kParts)) {
    p.params = params_.data();
  }

  // All that goes in. `steps`: x has an axis of them. False where something is odd.
  bool read(PyObject* x, PyObject* state, PyObject* params, bool steps = true) {
    x_ = x;
    if (!find_weights(lane_, params, sources_.data()) || !find_state(lane_, state, states_) || !find_sizes(steps))
      return false;
    return each_argument(problem, p, [&](const auto& slot) {
      PyObject* object = source(slot);
      return !object || look(object, slot);
    });
  }

  // recompute and clip_grad (None: off) into the problem; false where something is odd.
  bool read_options(PyObject* recompute, PyObject* clip_grad) {
    problem.recompute = recompute == Py_True;
    if (problem.bf16_weights || (recompute != Py_True && recompute != Py_False)) return false;
    if (clip_grad == Py_None) return true;
    if (!PyFloat_CheckExact(clip_grad) && !PyLong_CheckExact(clip_grad)) return false;
    problem.clip_grad = PyFloat_AsDouble(clip_grad);
    PyErr_Clear();  // of a number too large: -1
    return problem.clip_grad > 0 && std::isfinite(problem.clip_grad);
  }

  bool read_gradients(PyObject* dy, PyObject* dstate, Results* g) {
    return find_state(lane_, dstate, dstates_) && each_result(problem, *g, [&](const auto& slot) {
             PyObject* object = slot.part ? dstates_[slot.part - 1] : dy == Py_None ? nullptr : dy;
             return !object || look(object, slot);
           });
  }

  // Weights of each layer and direction: 2 or 4; 0 where they do not agree.
  int parts() const {
    const int each = sources_[2] ? kParts : kParts / 2;
    for (int k = 0; k < lane_.stacks() * kParts; ++k)
      if ((sources_[k] != nullptr) != (k % kParts < each)) return 0;
    return each;
  }
  // All of them, in PyTorch's order; null with an exception set.
  py::object weights() const {
    py::object tuple = owned(PyTuple_New(lane_.stacks() * parts()));
    for (int k = 0, n = 0; tuple && k < lane_.stacks() * kParts; ++k)
      if (sources_[k]) PyTuple_SET_ITEM(tuple.ptr(), n++, Py_NewRef(sources_[k]));
    return tuple;
  }

  // (y, state) in new arrays; null with an exception set.
  py::object new_results(Results* out) const {
    py::object made[3];
    const bool done = each_result(problem, *out, [&](const auto& slot) {
      if (slot.has) made[slot.part] = new_array(slot);
      return !slot.has || made[slot.part];
    });
    const py::object state = done ? as_state(made[1], made[2]) : py::object();
    return state ? owned(PyTuple_Pack(2, made[0].ptr(), state.ptr())) : py::object();
  }

  // Gradients of all that went in, in new arrays by name; null with an exception set.
  py::object new_gradients(Arguments* dp) const {
    py::object grads = owned(PyDict_New()), states[2];
    const auto add = [&](PyObject* name, const py::object& array) {
      return array && PyDict_SetItem(grads.ptr(), name, array.ptr()) == 0;
    };
    const bool done = grads && each_argument(problem, *dp, [&](const auto& slot) {
                        if (slot.family == Family::state) {
                          if (slot.has && !(states[slot.part - 1] = new_array(slot))) return false;
                          return slot.part == 1 || add(interned<"state">(), as_state(states[0], states[1]));
                        }
                        if (slot.family == Family::sequence) return add(interned<"x">(), new_array(slot));
                        const int k = slot.index * kParts + slot.part;
                        return !sources_[k] || add(lane_.keys[k], new_array(slot));
                      });
    return done ? grads : py::object();
  }

  // A slot's array over memory without gaps.
  template <int Rank>
  py::object over_memory(void* data, PyObject* owner, const Slot<Rank>& slot) const {
    int64_t shape[4] = {};
    find_shape(slot, order<Rank>(slot.family), shape);
    return owned(over(problem.dtype, order<Rank>(slot.family).rank, shape, data, owner));
  }
  template <int Rank>
  void lie(void* data, const Slot<Rank>& slot) const {
    place_new(data, slot, order<Rank>(slot.family));
  }

  bool forward(const Results& out, void* tape = nullptr) const {
    return run(cpu::work(problem), [&](int threads) { cpu::forward(problem, p, out, tape, threads); });
  }

  // kernels(threads); false with an exception set. What they read stays alive while the GIL is given up: another thread
  // may empty the dict meanwhile.
  template <class Kernels>
  bool run(double flops, const Kernels& kernels) const {
    try {
      std::vector<py::object> kept;
      const auto keep = [&](PyObject* object) { kept.push_back(py::reinterpret_borrow<py::object>(object)); };
      if (flops >= flops_worth_a_release) {
        for (int k = 0; k < lane_.stacks() * kParts; ++k) keep(sources_[k]);
        for (const State* state : {&states_, &dstates_}) keep((*state)[0]), keep((*state)[1]);
      }
      return run_kernels(flops, kernels);
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
      return false;
    }
  }

  bool batched() const { return state_.rank == 3; }

  Problem problem;
  Arguments p;

 private:
  // Which axes there are, dtype and sizes, from x, W and R.
  bool find_sizes(bool steps) {
    if (!PyArray_CheckExact(sources_[0]) || !PyArray_CheckExact(sources_[1]) || !PyArray_CheckExact(x_)) return false;
    PyArrayObject *W = as_array(sources_[0]), *R = as_array(sources_[1]), *x = as_array(x_);
    const int type = PyArray_TYPE(R), rank = PyArray_NDIM(x) + !steps;
    if (type != NPY_FLOAT && type != NPY_DOUBLE && type != NPY_UINT16) return false;
    if (PyArray_NDIM(W) != 2 || PyArray_NDIM(R) != 2 || (rank != 2 && rank != 3)) return false;
    problem.cell = lane_.cell;
    problem.dtype = type == NPY_DOUBLE ? Dtype::f64 : Dtype::f32;
    problem.bf16_weights = type == NPY_UINT16;
    problem.clip_cell = lane_.clip_cell;
    if (rank == 2)
      sequence_ = steps ? Order{0, 3} : Order{3};
    else
      sequence_ = !steps ? Order{2, 3} : lane_.batch_first ? Order{2, 0, 3} : Order{0, 2, 3};
    state_ = rank == 2 ? Order{0, 3} : Order{0, 2, 3};
    Sizes& s = problem.sizes;
    find_steps_and_rows(sequence_, [&](int i) { return PyArray_DIM(x, i); }, &s);
    s.I = PyArray_DIM(W, 1);
    s.H = PyArray_DIM(R, 1);
    s.L = lane_.layers;
    s.D = lane_.directions;
    return s.T > 0 && s.B > 0 && s.I > 0 && s.H > 0;
  }

  template <int Rank>
  const Order& order(Family family) const {
    return family == Family::weights ? one_set<Rank> : family == Family::state ? state_ : sequence_;
  }
  template <int Rank>
  PyObject* source(const Slot<Rank>& slot) const {
    if (slot.family == Family::weights) return sources_[slot.index * kParts + slot.part];
    return slot.part ? states_[slot.part - 1] : x_;
  }
  template <int Rank>
  bool look(PyObject* object, const Slot<Rank>& slot) const {
    NumpyView view;
    return view.look(object, dtype_of(problem, slot.stored)) && place(view, slot, order<Rank>(slot.family));
  }
  template <int Rank>
  py::object new_array(const Slot<Rank>& slot) const {
    int64_t shape[4] = {};
    find_shape(slot, order<Rank>(slot.family), shape);
    py::object array = owned(empty(problem.dtype, order<Rank>(slot.family).rank, shape));
    if (array) lie(PyArray_DATA(as_array(array.ptr())), slot);
    return array;
  }

  const Lane& lane_;
  Order sequence_, state_;
  PyObject* x_ = nullptr;  // borrowed, as all here
  State states_ = {}, dstates_ = {};
  StackedParams params_;
  Small<PyObject*, kFew * kParts> sources_;
};

// None for a case that is not plain; null where an exception is set.
PyObject* decline() {
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyObject* wrong_count(const char* text) {
  PyErr_SetString(PyExc_TypeError, text);
  return nullptr;
}

PyObject* forward(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) return wrong_count("forward() takes exactly 3 arguments (x, state, params)");
  NumpyCall call(*reinterpret_cast<Lane*>(object));
  if (!call.read(arguments[0], arguments[1], arguments[2])) return decline();
  Results out;
  py::object result = call.new_results(&out);
  return result && call.forward(out) ? result.release().ptr() : nullptr;
}

// ---- training ----

PyObject* record(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 6)
    return wrong_count("record() takes exactly 6 arguments (x, state, params, recompute, clip_grad, memory)");
  NumpyCall call(*reinterpret_cast<Lane*>(object));
  if (!call.read(arguments[0], arguments[1], arguments[2]) || !call.read_options(arguments[3], arguments[4]) ||
      !call.parts())
    return decline();
  Results out;
  const py::object results = call.new_results(&out);
  if (!results) return nullptr;
  const py::object weights = call.weights();
  if (!weights) return nullptr;
  // y and h exist, so the sizes multiply to what memory holds. Old memory is not twice as large as needed.
  const Dtype dtype = call.problem.dtype;
  const int64_t elements = static_cast<int64_t>(cpu::tape_elements(call.problem));
  const int64_t size = elements + 64 / size_of(dtype);
  py::object memory = py::reinterpret_borrow<py::object>(arguments[5]);
  void* tape = tape_in(memory.ptr(), dtype, elements);
  if (!tape || PyArray_DIM(as_array(memory.ptr()), 0) > 2 * size) {
    memory = owned(empty(dtype, 1, &size));
    tape = memory ? tape_in(memory.ptr(), dtype, elements) : nullptr;
  }
  if (!tape || !call.forward(out, tape)) return nullptr;
  return PyTuple_Pack(4, PyTuple_GET_ITEM(results.ptr(), 0), PyTuple_GET_ITEM(results.ptr(), 1), weights.ptr(),
                      memory.ptr());
}

PyObject* backward(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
  const Lane& lane = *reinterpret_cast<Lane*>(object);
  if (count != 8)
    return wrong_count(
        "backward() takes exactly 8 arguments (x, state, weights, memory, recompute, clip_grad, dy, dstate)");
  NumpyCall call(lane);
  if (!call.read(arguments[0], arguments[1], arguments[2]) || !call.read_options(arguments[4], arguments[5]))
    return decline();
  const Problem& problem = call.problem;
  const void* tape = tape_in(arguments[3], problem.dtype, static_cast<int64_t>(cpu::tape_elements(problem)));
  Results g;
  if (!tape || !call.read_gradients(arguments[6], arguments[7], &g)) return decline();
  StackedParams params(static_cast<size_t>(lane.stacks()));
  Arguments dp;
  dp.params = params.data();
  py::object grads = call.new_gradients(&dp);
  const bool done = grads && call.run(2 * cpu::work(problem),
                                      [&](int threads) { cpu::backward(problem, call.p, tape, g, dp, threads); });
  return done ? grads.release().ptr() : nullptr;
}

// ---- steps ----

constexpr std::align_val_t kAlignment{64};

// Memory and result tuple of one turn; false with an exception set.
bool make_turn(Turn* turn, const NumpyCall& call) {
  const Sizes& s = call.problem.sizes;
  const int64_t size = size_of(call.problem.dtype);
  auto padded = [&](int64_t elements) { return (elements * size + 63) / 64 * 64; };
  const int64_t y_bytes = padded(s.B * s.H), state_bytes = padded(s.L * s.B * s.H);
  const size_t bytes = static_cast<size_t>(y_bytes + 2 * state_bytes);
  void* memory = operator new(bytes, kAlignment, std::nothrow);
  if (!memory) {
    PyErr_NoMemory();
    return false;
  }
  turn->owner = PyCapsule_New(
      memory, nullptr, [](PyObject* capsule) { operator delete(PyCapsule_GetPointer(capsule, nullptr), kAlignment); });
  if (!turn->owner) {
    operator delete(memory, kAlignment);
    return false;
  }
  turn->begin = static_cast<char*>(memory);
  turn->end = turn->begin + bytes;
  turn->parts[0] = turn->begin;
  turn->parts[1] = turn->begin + y_bytes;
  turn->parts[2] = turn->begin + y_bytes + state_bytes;
  py::object made[3];
  Results out;
  const bool done = each_result(call.problem, out, [&](const auto& slot) {
    if (slot.has) made[slot.part] = call.over_memory(turn->parts[slot.part], turn->owner, slot);
    return !slot.has || made[slot.part];
  });
  const py::object state = done ? as_state(made[1], made[2]) : py::object();
  turn->result = state ? PyTuple_Pack(2, made[0].ptr(), state.ptr()) : nullptr;
  return turn->result != nullptr;
}

// Those of both turns, if they are not there.
bool make_turns(Lane* lane, const NumpyCall& call) {
  const Sizes& s = call.problem.sizes;
  const int64_t B = call.batched() ? s.B : -1;
  if (lane->B == B && lane->H == s.H && lane->dtype == call.problem.dtype && lane->turns[1].result) return true;
  lane->clear_turns();
  for (Turn& turn : lane->turns)
    if (!make_turn(&turn, call)) {
      lane->clear_turns();
      return false;
    }
  lane->dtype = call.problem.dtype;
  lane->B = B;
  lane->H = s.H;
  lane->turn = 0;
  return true;
}

PyObject* step(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
  Lane& lane = *reinterpret_cast<Lane*>(object);
  if (count != 3) return wrong_count("step() takes exactly 3 arguments (x, state, params)");
  if (lane.inside || lane.directions != 1) return decline();
  NumpyCall call(lane);
  if (!call.read(arguments[0], arguments[1], arguments[2], false)) return decline();
  if (!make_turns(&lane, call)) return nullptr;
  // What is read must not be overwritten: usually the last turn's state, so the turns alternate.
  auto is_read = [&](const Turn& turn) {
    return turn.contains(call.p.x.data) || turn.contains(call.p.h0.data) || turn.contains(call.p.c0.data);
  };
  lane.turn ^= 1;
  if (is_read(lane.turns[lane.turn])) lane.turn ^= 1;
  Turn& turn = lane.turns[lane.turn];
  if (is_read(turn)) return decline();
  Results out;
  each_result(call.problem, out, [&](const auto& slot) {
    if (slot.has) call.lie(turn.parts[slot.part], slot);
    return true;
  });
  lane.inside = true;
  const bool done = call.forward(out);
  lane.inside = false;
  return done ? Py_NewRef(turn.result) : nullptr;
}

PyObject* make(PyTypeObject* type, PyObject* positional, PyObject* named) {
  static const char* const names[] = {"cell", "num_layers", "num_directions", "batch_first", "clip_cell", nullptr};
  const char* cell = nullptr;
  int layers = 1, directions = 1, batch_first = 0;
  double clip_cell = 0;
  if (!PyArg_ParseTupleAndKeywords(positional, named, "s|iipd", const_cast<char**>(names), &cell, &layers, &directions,
                                   &batch_first, &clip_cell))
    return nullptr;
  CellKind kind;
  if (!find_cell(cell, &kind) || !facts_of(kind).state_product || layers < 1 || layers > 1 << 20 || directions < 1 ||
      directions > 2 || !(clip_cell >= 0)) {
    PyErr_SetString(
        PyExc_ValueError,
        "Lane: expected a cell of Problem.cell that has R, num_layers >= 1, num_directions 1 or 2, clip_cell >= 0");
    return nullptr;
  }
  PyObject* object = type->tp_alloc(type, 0);
  if (!object) return nullptr;
  Lane& lane = *reinterpret_cast<Lane*>(object);
  lane.cell = kind;
  lane.layers = layers;
  lane.directions = directions;
  lane.batch_first = batch_first != 0;
  lane.clip_cell = clip_cell;
  lane.keys = static_cast<PyObject**>(PyMem_Calloc(static_cast<size_t>(lane.stacks() * kParts), sizeof(PyObject*)));
  static const char* const parts[kParts] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
  for (int k = 0; lane.keys && k < lane.stacks() * kParts; ++k) {
    const int layer = k / kParts / directions;
    const bool reverse = k / kParts % directions == 1;
    lane.keys[k] = PyUnicode_FromFormat("%s_l%d%s", parts[k % kParts], layer, reverse ? "_reverse" : "");
    if (!lane.keys[k]) break;
    PyUnicode_InternInPlace(&lane.keys[k]);
  }
  if (!lane.keys || !lane.keys[lane.stacks() * kParts - 1]) {
    if (!PyErr_Occurred()) PyErr_NoMemory();
    Py_DECREF(object);
    return nullptr;
  }
  return object;
}

void destroy(PyObject* object) {
  Lane& lane = *reinterpret_cast<Lane*>(object);
  lane.clear_turns();
  if (lane.keys)
    for (int k = 0; k < lane.stacks() * kParts; ++k) Py_XDECREF(lane.keys[k]);
  PyMem_Free(lane.keys);
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"forward", fast(&forward), METH_FASTCALL,
     "forward($self, x, state, params, /)\n--\n\n(y, state) in new arrays, or None where the case is not plain."},
    {"step", fast(&step), METH_FASTCALL,
     "step($self, x, state, params, /)\n--\n\n(y, state) in the Lane's own arrays, or None where the case is not "
     "plain."},
    {"record", fast(&record), METH_FASTCALL,
     "record($self, x, state, params, recompute, clip_grad, memory, /)\n--\n\n(y, state, weights, memory) in new "
     "arrays, or None where the case is not plain."},
    {"backward", fast(&backward), METH_FASTCALL,
     "backward($self, x, state, weights, memory, recompute, clip_grad, dy, dstate, /)\n--\n\nThe gradients by name in "
     "new arrays, or None where the case is not plain."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(&make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
    {Py_tp_methods, methods},
    {Py_tp_doc, const_cast<char*>("Lane(cell, num_layers=1, num_directions=1, batch_first=False, clip_cell=0.0)\n--\n\n"
                                  "The short way from a layer object to the kernels.")},
    {0, nullptr},
};

PyType_Spec spec = {"fusedrnn._core.Lane", sizeof(Lane), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};

}  // namespace

void register_lane(py::module_& module) {
  py::object type = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (!type) throw py::error_already_set();
  module.attr("Lane") = type;
}

}  // namespace fusedrnn::bindings
