// SPDX-License-Identifier: Apache-2.0
// The short way from torch's CPU tensors to the kernels, for eager calls (see torch_forward in _core.pyi). It answers
// the plain case and returns None for all else, having raised and written nothing.
#include <cstdint>
#include <vector>

#include "bindings/plain.h"
#include "bindings/torch_gate.h"

namespace fusedrnn::bindings {

namespace {

namespace py = pybind11;

// How a call's tensors lie: the settings tuple, see _core.pyi.
struct TorchSettings {
  CellKind cell;
  int layers, directions, parts;
  bool is_cell, batch_first, recompute;
  double clip_cell, clip_grad;
  bool packed;
  int64_t models;           // E, 0 where no tensor has that axis
  unsigned long long each;  // which tensors have it, in front: one bit for each of x, h0, c0 and the weights

  bool read(PyObject* tuple) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 12) return false;
    const auto item = [&](int n) { return PyTuple_GET_ITEM(tuple, n); };
    const char* name = PyUnicode_Check(item(0)) ? PyUnicode_AsUTF8(item(0)) : nullptr;
    if (!name || !find_cell(name, &cell)) return false;
    layers = static_cast<int>(PyLong_AsLong(item(1)));
    directions = static_cast<int>(PyLong_AsLong(item(2)));
    parts = item(3) == Py_True ? kParts : kParts / 2;
    is_cell = item(4) == Py_True;
    batch_first = item(5) == Py_True;
    recompute = item(6) == Py_True;
    clip_cell = PyFloat_AsDouble(item(7));
    clip_grad = PyFloat_AsDouble(item(8));
    packed = item(9) == Py_True;
    models = PyLong_AsLongLong(item(10));
    each = PyLong_AsUnsignedLongLong(item(11));
    return layers >= 1 && layers < (1 << 20) && (directions == 1 || directions == 2) && clip_cell >= 0 &&
           clip_grad >= 0 && models >= 0 && (models > 0 || each == 0) && !(packed && (is_cell || models > 0)) &&
           !PyErr_Occurred();
  }
  bool has_models(int n) const { return each != 0 && (each >> n & 1) != 0; }  // n may be past 63 without models
};

// One call's tensors, numbered x, h0, c0, weights. Borrowed.
class TorchCall {
 public:
  // (settings, x, h0, c0, weights, lengths). False for anything out of the ordinary.
  bool read(PyObject* const* args) {
    PyObject* weights = args[4];
    if (!settings.read(args[0]) || (!PyList_CheckExact(weights) && !PyTuple_CheckExact(weights))) return false;
    const int count = stacks();
    if (PySequence_Fast_GET_SIZE(weights) != count * settings.parts || (settings.each && count * settings.parts > 60))
      return false;
    inputs_ = args + 1;
    weights_ = PySequence_Fast_ITEMS(weights);
    if (!find_sizes() || !read_lengths(args[5])) return false;
    const bool has_c = facts_of(settings.cell).cell_state;
    if (has_c ? (args[2] == Py_None) != (args[3] == Py_None) : args[3] != Py_None) return false;
    params_.resize(static_cast<size_t>(count));
    p.params = params_.data();
    return each_argument(problem, p, [&](const auto& slot) {
      PyObject* object = source(slot);
      return !object || look(object, slot, settings.has_models(number(slot)));
    });
  }

  // dy, dh_n and dc_n.
  bool read_gradients(PyObject* const* gradients, Results* g) const {
    return each_result(problem, *g, [&](const auto& slot) {
      PyObject* object = gradients[slot.part];
      return object == Py_None || (!(settings.is_cell && slot.part == 0) && look(object, slot, settings.models > 0));
    });
  }

  // One that was made for this problem; null where it is not.
  void* tape_in(PyObject* object) const {
    TorchView view;
    int64_t shape[2], stride[2];
    find_tape_shape(shape);
    if (!view.look(object) || view.rank() != 2 || !view.is(problem.dtype)) return nullptr;
    for (int axis = 0; axis < 2; ++axis) {
      view.stride(axis, &stride[axis]);
      if (view.extent(axis) != shape[axis]) return nullptr;
    }
    return stride[1] == 1 && (shape[0] == 1 || stride[0] == shape[1]) ? view.data() : nullptr;
  }
  // (E, elements of one model and one more).
  void find_tape_shape(int64_t (&shape)[2]) const {
    Problem one = problem;
    one.sizes.E = 1;
    shape[0] = problem.sizes.E;
    shape[1] = static_cast<int64_t>(cpu::tape_elements(one)) + 1;
  }

  // A new tensor for the slot, with the axis of models in front or without; null with an exception set.
  template <int Rank>
  PyObject* make(const Slot<Rank>& slot, bool models) const {
    const Order axes = order(slot, models);
    const Slot<Rank> flat = packed(slot);
    int64_t shape[4] = {};
    find_shape(flat, axes, shape);
    void* data = nullptr;
    PyObject* object = new_tensor(problem.dtype, axes.rank, shape, &data);
    if (object) place_new(data, flat, axes);
    unpack(slot);
    return object;
  }

  int stacks() const { return settings.layers * settings.directions; }
  template <int Rank>
  int number(const Slot<Rank>& slot) const {
    return slot.family == Family::weights ? 3 + slot.index * settings.parts + slot.part : slot.part;
  }

  TorchSettings settings;
  Problem problem;
  Arguments p;

 private:
  // Which axes there are, dtype and sizes, from x, W and R.
  bool find_sizes() {
    const bool x_models = settings.has_models(0), W_models = settings.has_models(3), R_models = settings.has_models(4);
    TorchView x, W, R;
    if (!x.look(inputs_[0]) || !W.look(weights_[0]) || !R.look(weights_[1])) return false;
    const int rank = x.rank() - x_models, most = settings.is_cell || settings.packed ? 2 : 3;
    if (W.rank() != 2 + W_models || R.rank() != 2 + R_models || rank < (settings.is_cell ? 1 : 2) || rank > most)
      return false;
    problem.cell = settings.cell;
    problem.dtype = x.is(Dtype::f64) ? Dtype::f64 : Dtype::f32;
    problem.bf16_weights = problem.dtype == Dtype::f32 && W.is(Dtype::bf16);
    problem.bf16_state = problem.bf16_weights;  // the caller widened x and the states
    problem.recompute = settings.recompute;
    problem.packed = settings.packed;
    problem.clip_cell = settings.clip_cell;
    problem.clip_grad = settings.clip_grad;
    if (settings.is_cell)
      state_ = sequence_ = rank == 2 ? Order{2, 3} : Order{3};
    else
      sequence_ = rank == 2 ? Order{0, 3} : settings.batch_first ? Order{2, 0, 3} : Order{0, 2, 3};
    if (!settings.is_cell) state_ = rank == 3 || settings.packed ? Order{0, 2, 3} : Order{0, 3};
    Sizes& s = problem.sizes;
    s.E = settings.models ? settings.models : 1;
    s.I = W.extent(1 + W_models), s.H = R.extent(1 + R_models), s.L = settings.layers, s.D = settings.directions;
    find_steps_and_rows(sequence_, [&](int i) { return x.extent(i + x_models); }, &s);
    rows_ = s.T;
    return s.T > 0 && s.B > 0 && s.I > 0 && s.H > 0;
  }

  // Lengths (B), or the rows that live at each step of a packed x; these say T and B.
  bool read_lengths(PyObject* object) {
    if (object == Py_None) return !settings.packed;
    TorchView view;
    if (settings.is_cell || !view.look(object) || view.rank() != 1 || !view.is({0, 64, 1})) return false;
    int64_t stride;
    view.stride(0, &stride);
    const auto* values = static_cast<const int64_t*>(view.data());
    if (!(settings.packed ? read_live(values, view.extent(0), stride) : read_ends(values, view.extent(0), stride)))
      return false;
    problem.lengths = {lengths_.data(), {0, 1}};
    return true;
  }
  bool read_ends(const int64_t* values, int64_t count, int64_t stride) {
    if (count != problem.sizes.B) return false;
    for (int64_t b = 0; b < count; ++b) {
      if (values[b * stride] < 0 || values[b * stride] > problem.sizes.T) return false;
      lengths_.push_back(values[b * stride]);
    }
    return true;
  }
  bool read_live(const int64_t* values, int64_t count, int64_t stride) {
    if (count < 1) return false;
    int64_t before = values[0], sum = 0;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t live = values[t * stride];
      if (live < 1 || live > before || sum > rows_ - live) return false;
      sum += before = live;
    }
    if (sum != rows_) return false;
    problem.sizes.T = count, problem.sizes.B = values[0];
    lengths_.resize(static_cast<size_t>(values[0]));
    for (int64_t t = 0; t < count; ++t)
      for (int64_t b = t + 1 < count ? values[(t + 1) * stride] : 0; b < values[t * stride]; ++b)
        lengths_[static_cast<size_t>(b)] = t + 1;
    return true;
  }

  template <int Rank>
  Order order(const Slot<Rank>& slot, bool models) const {
    const Order& axes = slot.family == Family::weights ? one_set<Rank>
                        : slot.family == Family::state ? state_
                                                       : sequence_;
    return models ? axes.after(Slot<Rank>::sets) : axes;
  }
  // A packed sequence has one axis of rows in place of steps and batch; its stride stands for both.
  template <int Rank>
  Slot<Rank> packed(Slot<Rank> slot) const {
    if (settings.packed && slot.family == Family::sequence) slot.shape[0] = rows_;
    return slot;
  }
  template <int Rank>
  void unpack(const Slot<Rank>& slot) const {
    if constexpr (Rank == 4)
      if (settings.packed && slot.family == Family::sequence) slot.array.stride[2] = slot.array.stride[0];
  }
  // Null for what is not given.
  template <int Rank>
  PyObject* source(const Slot<Rank>& slot) const {
    if (slot.family == Family::weights) return slot.part < settings.parts ? weights_[number(slot) - 3] : nullptr;
    return inputs_[slot.part] == Py_None ? nullptr : inputs_[slot.part];
  }
  template <int Rank>
  bool look(PyObject* object, const Slot<Rank>& slot, bool models) const {
    TorchView view;
    if (!view.look(object) || !view.is(dtype_of(problem, slot.stored)) ||
        !place(view, packed(slot), order(slot, models)))
      return false;
    unpack(slot);
    return true;
  }

  PyObject* const* inputs_ = nullptr;  // x, h0, c0
  PyObject** weights_ = nullptr;
  Order sequence_, state_;
  int64_t rows_ = 0;  // of a packed x
  std::vector<Params> params_;
  std::vector<int64_t> lengths_;
};

// The results of a call, made one by one; dropped together when one fails.
class TorchOutputs {
 public:
  explicit TorchOutputs(Py_ssize_t count) : tuple_(owned(PyTuple_New(count))) {}

  // False where there is none, with an exception set.
  bool add(PyObject* object) {
    if (!tuple_ || !object) {
      Py_XDECREF(object);
      return false;
    }
    PyTuple_SET_ITEM(tuple_.ptr(), next_++, object);
    return true;
  }
  bool none() { return add(Py_NewRef(Py_None)); }
  PyObject* take() { return tuple_.release().ptr(); }

 private:
  py::object tuple_;
  Py_ssize_t next_ = 0;
};

PyObject* decline() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

// A new tape, whose last element says whose it is. Null with an exception set.
PyObject* new_tape(const TorchCall& call, void** tape) {
  int64_t shape[2];
  call.find_tape_shape(shape);
  const Dtype dtype = call.problem.dtype;
  PyObject* object = new_tensor(dtype, 2, shape, tape);
  if (!object) return nullptr;
  const int64_t last = shape[0] * shape[1] - 1;
  if (dtype == Dtype::f32)
    static_cast<float*>(*tape)[last] = 0;
  else
    static_cast<double*>(*tape)[last] = 0;
  return object;
}

// (settings, x, h0, c0, weights, lengths, tape wanted) -> (y or None, h_n, c_n or None, tape or None), or None
PyObject* torch_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  TorchCall call;
  if (count != 7 || !call.read(args) || (call.problem.bf16_weights && args[6] == Py_True)) return decline();
  TorchOutputs outputs(4);
  Results out;
  const bool made = each_result(call.problem, out, [&](const auto& slot) {
    const bool wanted = slot.has && !(call.settings.is_cell && slot.part == 0);
    return wanted ? outputs.add(call.make(slot, call.settings.models > 0)) : outputs.none();
  });
  if (!made) return nullptr;
  void* tape = nullptr;
  if (!(args[6] == Py_True ? outputs.add(new_tape(call, &tape)) : outputs.none())) return nullptr;
  const bool done = run_kernels(cpu::work(call.problem),
                                [&](int threads) { cpu::forward(call.problem, call.p, out, tape, threads); });
  return done ? outputs.take() : nullptr;
}

// (settings, x, h0, c0, weights, lengths, tape, dy, dh_n, dc_n, wanted: one bit for each of x, h0, c0 and the weights)
// -> as many gradients or Nones, or None
PyObject* torch_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  TorchCall call;
  if (count != 11 || !call.read(args) || call.problem.bf16_weights) return decline();
  const TorchSettings& settings = call.settings;
  const int parts = settings.parts, weights = call.stacks() * parts;
  Results g;
  const void* tape = weights <= 60 && call.read_gradients(args + 7, &g) ? call.tape_in(args[6]) : nullptr;
  const unsigned long long wanted = PyLong_AsUnsignedLongLong(args[10]);
  if (!tape || PyErr_Occurred()) return decline();
  TorchOutputs outputs(3 + weights);
  Arguments dp;
  StackedParams params(static_cast<size_t>(call.stacks()));
  dp.params = params.data();
  const bool made = each_argument(call.problem, dp, [&](const auto& slot) {
    if (slot.family == Family::weights && slot.part >= parts) return true;
    const int n = call.number(slot);
    return (wanted >> n & 1) != 0 ? outputs.add(call.make(slot, settings.has_models(n))) : outputs.none();
  });
  const bool done = made && run_kernels(2 * cpu::work(call.problem), [&](int threads) {
                      cpu::backward(call.problem, call.p, tape, g, dp, threads);
                    });
  return done ? outputs.take() : nullptr;
}

PyMethodDef methods[] = {
    {"torch_forward", fast(torch_forward), METH_FASTCALL, nullptr},
    {"torch_backward", fast(torch_backward), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void register_torch_lane(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) < 0) throw pybind11::error_already_set();
}

}  // namespace fusedrnn::bindings
