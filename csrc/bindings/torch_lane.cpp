// SPDX-License-Identifier: Apache-2.0
// The short way from torch's CPU tensors to the kernels, for eager calls (see torch_forward in _core.pyi). It answers
// the plain case and returns None for all else, having raised and written nothing.
//
// No libtorch: tensors are read and made through DLPack's C exchange API, a table of functions that torch hands out as
// a capsule (torch.Tensor.__dlpack_c_exchange_api__). The structs below are that table's binary interface, version 1.
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "bindings/bindings.h"

namespace fusedrnn::bindings {

namespace {

struct DLPackVersion {
  uint32_t major, minor;
};
struct DLDevice {
  int32_t type, id;  // type 1: CPU
};
struct DLDataType {
  uint8_t code, bits;  // code 2: IEEE floating point, 4: bfloat16
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* previous;
  int (*allocate)(DLTensor* prototype, DLManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, DLManagedTensorVersioned** out);
  int (*object_from_managed)(DLManagedTensorVersioned* tensor, void** out);  // takes the tensor
  int (*view_of_object)(void* object, DLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

const DLPackExchangeAPI* api = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;

// Where torch keeps what DLPack does not tell of a tensor: whether its numbers stand in memory as they are (the
// negative bit, zeros without memory, wrappers of other tensors), and how much memory its storage has. Asking by Python
// methods would take longer than a small call. These are offsets in torch's objects; torch_setup finds them by
// comparing with what the methods say of some tensors, and keeps the short way shut where it does not find them.
struct Places {
  Py_ssize_t tensor;            // in the Python object: the tensor's address
  Py_ssize_t keys, storage;     // in the tensor: its dispatch keys, its storage's address
  Py_ssize_t memory, capacity;  // in the storage: where its memory begins, how many bytes that has
};
Places places{};
uint64_t plain_keys = 0;  // those that a tensor whose numbers stand in memory may have

uint64_t word(uint64_t object, Py_ssize_t place) {
  uint64_t value;
  std::memcpy(&value, reinterpret_cast<const char*>(object) + place, sizeof(value));
  return value;
}
uint64_t address(const void* object) { return reinterpret_cast<uint64_t>(object); }

constexpr int kParts = 4;  // W, R, bW, bR

// How a call's tensors lie: the settings tuple, see _core.pyi.
struct Settings {
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
  bool has_models(int n) const { return (each >> n & 1) != 0; }
};

DLDataType type_of(Dtype dtype) {
  if (dtype == Dtype::bf16) return {4, 16, 1};
  return {2, static_cast<uint8_t>(dtype == Dtype::f32 ? 32 : 64), 1};
}
bool is(const DLDataType& a, const DLDataType& b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

template <class T>
T* data_of(const DLTensor& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data) + tensor.byte_offset);
}

// Whether all elements lie in the storage's memory, which the caller may have freed or shortened (resize_).
bool has_memory(uint64_t tensor, const DLTensor& view) {
  uint64_t last = 0;
  for (int axis = 0; axis < view.ndim; ++axis) {
    if (view.shape[axis] == 0) return true;
    last += static_cast<uint64_t>((view.shape[axis] - 1) * view.strides[axis]);
  }
  const uint64_t storage = word(tensor, places.storage);
  if (storage == 0) return false;
  const uint64_t memory = word(storage, places.memory), begin = address(data_of<void>(view)) - memory;
  const uint64_t bytes = static_cast<uint64_t>(view.dtype.bits) * view.dtype.lanes / 8;
  return memory != 0 && begin + (last + 1) * bytes <= word(storage, places.capacity);
}

// What a plain tensor looks like; false for anything else. All pointers to torch's memory come from here.
bool look(PyObject* object, DLTensor* out) {
  if (!api || (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type)) return false;
  const uint64_t tensor = word(address(object), places.tensor);
  if ((word(tensor, places.keys) & ~plain_keys) != 0) return false;
  if (api->view_of_object(object, out) != 0) {
    PyErr_Clear();
    return false;
  }
  return out->device.type == 1 && has_memory(tensor, *out);
}

// One call: sizes from the tensors, and how canonical axes map to theirs. Tensors are numbered x, h0, c0, weights.
struct Call {
  Settings settings;
  Problem problem;
  Arguments p;
  std::vector<Params> params;
  std::vector<int64_t> lengths;
  PyObject** sources = nullptr;  // weights, borrowed
  int rank = 0;                  // of x, as all ranks here without the axis of models
  int64_t x_shape[3] = {}, y_shape[3] = {}, state_shape[3] = {};
  int state_rank = 0;

  // Fills canonical axes (T,E,B,n) from x's or y's.
  void place(const DLTensor& from, bool models, Array<4>* out) const {
    out->data = data_of<void>(from);
    const int64_t* s = from.strides + models;
    int64_t t = 0, b = 0;
    if (settings.is_cell) {
      b = rank == 2 ? s[0] : 0;
    } else if (rank == 2) {
      t = s[0];
      b = settings.packed ? s[0] : 0;
    } else {
      t = s[settings.batch_first ? 1 : 0], b = s[settings.batch_first ? 0 : 1];
    }
    out->stride[0] = t, out->stride[1] = models ? from.strides[0] : 0, out->stride[2] = b, out->stride[3] = s[rank - 1];
  }
  void place_state(const DLTensor& from, bool models, Array<4>* out) const {
    out->data = data_of<void>(from);
    const int64_t* s = from.strides + models;
    out->stride[0] = settings.is_cell ? 0 : s[0];
    out->stride[1] = models ? from.strides[0] : 0;
    out->stride[2] = state_rank == (settings.is_cell ? 2 : 3) ? s[state_rank - 2] : 0;
    out->stride[3] = s[state_rank - 1];
  }

  bool fits(PyObject* object, bool models, int want_rank, const int64_t* shape, DLTensor* out) const {
    return fits(object, problem.dtype, models, want_rank, shape, out);
  }
  bool fits(PyObject* object, Dtype dtype, bool models, int want_rank, const int64_t* shape, DLTensor* out) const {
    if (!look(object, out) || out->ndim != want_rank + models || !is(out->dtype, type_of(dtype))) return false;
    if (models && out->shape[0] != settings.models) return false;
    for (int axis = 0; axis < want_rank; ++axis)
      if (out->shape[axis + models] != shape[axis]) return false;
    return true;
  }

  // Lengths (B), or the rows that live at each step of a packed x; sets T and B of a packed x.
  bool read_lengths(PyObject* object) {
    Sizes& s = problem.sizes;
    if (object == Py_None) return !settings.packed;
    DLTensor view;
    if (settings.is_cell || !look(object, &view) || view.ndim != 1 || !is(view.dtype, {0, 64, 1})) return false;
    const auto* values = data_of<const int64_t>(view);
    const int64_t count = view.shape[0], stride = view.strides[0];
    if (settings.packed) {
      if (count < 1) return false;
      int64_t before = values[0], sum = 0;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t live = values[t * stride];
        if (live < 1 || live > before || sum > x_shape[0] - live) return false;
        sum += before = live;
      }
      if (sum != x_shape[0]) return false;
      s.T = count, s.B = values[0];
      lengths.resize(static_cast<size_t>(s.B));
      for (int64_t t = 0; t < count; ++t)
        for (int64_t b = t + 1 < count ? values[(t + 1) * stride] : 0; b < values[t * stride]; ++b)
          lengths[static_cast<size_t>(b)] = t + 1;
    } else {
      if (count != s.B) return false;
      lengths.resize(static_cast<size_t>(s.B));
      for (int64_t b = 0; b < s.B; ++b) {
        if (values[b * stride] < 0 || values[b * stride] > s.T) return false;
        lengths[static_cast<size_t>(b)] = values[b * stride];
      }
    }
    problem.lengths = {lengths.data(), {0, 1}};
    return true;
  }

  bool read(PyObject* tuple, PyObject* x, PyObject* h0, PyObject* c0, PyObject* weights, PyObject* given_lengths) {
    if (!api || !settings.read(tuple) || (!PyList_CheckExact(weights) && !PyTuple_CheckExact(weights))) return false;
    const int count = settings.layers * settings.directions;
    if (PySequence_Fast_GET_SIZE(weights) != count * settings.parts || (settings.each && count * settings.parts > 60))
      return false;
    sources = PySequence_Fast_ITEMS(weights);
    const bool x_models = settings.has_models(0), W_models = settings.has_models(3), R_models = settings.has_models(4);
    DLTensor view, first, second;
    if (!look(x, &view) || !look(sources[0], &first) || !look(sources[1], &second)) return false;
    rank = view.ndim - x_models;
    if (first.ndim != 2 + W_models || second.ndim != 2 + R_models || rank < (settings.is_cell ? 1 : 2) ||
        rank > (settings.is_cell || settings.packed ? 2 : 3) || (x_models && view.shape[0] != settings.models))
      return false;
    problem.cell = settings.cell;
    problem.dtype = is(view.dtype, type_of(Dtype::f64)) ? Dtype::f64 : Dtype::f32;
    if (!is(view.dtype, type_of(problem.dtype))) return false;
    problem.bf16_weights = problem.dtype == Dtype::f32 && is(first.dtype, type_of(Dtype::bf16));
    problem.bf16_state = problem.bf16_weights;  // the caller widened x and the states
    const Dtype stored = problem.bf16_weights ? Dtype::bf16 : problem.dtype;
    problem.recompute = settings.recompute;
    problem.packed = settings.packed;
    problem.clip_cell = settings.clip_cell;
    problem.clip_grad = settings.clip_grad;
    Sizes& s = problem.sizes;
    s.E = settings.models ? settings.models : 1;
    s.I = first.shape[1 + W_models], s.H = second.shape[1 + R_models], s.L = settings.layers, s.D = settings.directions;
    for (int axis = 0; axis < rank; ++axis) x_shape[axis] = y_shape[axis] = view.shape[axis + x_models];
    y_shape[rank - 1] = s.D * s.H;
    if (settings.is_cell) {
      s.T = 1, s.B = rank == 2 ? x_shape[0] : 1;
    } else {
      s.T = x_shape[rank == 3 && settings.batch_first ? 1 : 0];
      s.B = rank == 3 ? x_shape[settings.batch_first ? 0 : 1] : 1;
    }
    if (x_shape[rank - 1] != s.I || s.T < 1 || s.B < 1 || s.I < 1 || s.H < 1 || !read_lengths(given_lengths))
      return false;
    state_rank = settings.packed ? 3 : rank;
    int axis = 0;
    if (!settings.is_cell) state_shape[axis++] = count;
    if (state_rank == (settings.is_cell ? 2 : 3)) state_shape[axis++] = s.B;
    state_shape[axis] = s.H;
    place(view, x_models, &p.x);
    if (facts_of(settings.cell).cell_state && (h0 == Py_None) != (c0 == Py_None)) return false;
    DLTensor state;
    if (h0 != Py_None) {
      if (!fits(h0, settings.has_models(1), state_rank, state_shape, &state)) return false;
      place_state(state, settings.has_models(1), &p.h0);
    }
    if (c0 != Py_None) {
      if (!facts_of(settings.cell).cell_state || !fits(c0, settings.has_models(2), state_rank, state_shape, &state))
        return false;
      place_state(state, settings.has_models(2), &p.c0);
    }
    params.resize(static_cast<size_t>(count));
    for (int k = 0; k < count; ++k) {
      Array<3>* matrices[2] = {&params[static_cast<size_t>(k)].W, &params[static_cast<size_t>(k)].R};
      Array<2>* vectors[2] = {&params[static_cast<size_t>(k)].bW, &params[static_cast<size_t>(k)].bR};
      for (int part = 0; part < settings.parts; ++part) {
        int64_t shape[2];
        weight_shape(k, part, shape);
        DLTensor weight;
        const int n = k * settings.parts + part;
        const bool models = settings.each && settings.has_models(3 + n);
        const Dtype type = part < 2 ? stored : problem.dtype;
        if (!fits(sources[n], type, models, part < 2 ? 2 : 1, shape, &weight)) return false;
        const int64_t *stride = weight.strides + models, set = models ? weight.strides[0] : 0;
        if (part < 2)
          *matrices[part] = {data_of<void>(weight), {set, stride[0], stride[1]}};
        else
          *vectors[part - 2] = {data_of<void>(weight), {set, stride[0]}};
      }
    }
    p.params = params.data();
    return true;
  }

  void weight_shape(int k, int part, int64_t (&shape)[2]) const {
    const Sizes& s = problem.sizes;
    shape[0] = facts_of(settings.cell).gates * s.H;
    shape[1] = part == 1 ? s.H : k < s.D ? s.I : s.D * s.H;
  }
  // (E, elements of one model and one more).
  void tape_shape(int64_t (&shape)[2]) const {
    Problem one = problem;
    one.sizes.E = 1;
    shape[0] = problem.sizes.E;
    shape[1] = static_cast<int64_t>(cpu::tape_elements(one)) + 1;
  }
};

// A new tensor with undefined contents; null with an exception set.
PyObject* make(Dtype dtype, int rank, const int64_t* shape, DLTensor* out) {
  DLTensor prototype{nullptr, {1, 0}, rank, type_of(dtype), const_cast<int64_t*>(shape), nullptr, 0};
  DLManagedTensorVersioned* managed = nullptr;
  const auto set_error = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); };
  if (api->allocate(&prototype, &managed, nullptr, set_error) != 0) {
    if (!PyErr_Occurred()) PyErr_NoMemory();
    return nullptr;
  }
  *out = managed->tensor;
  out->shape = const_cast<int64_t*>(shape);
  out->strides = nullptr;  // theirs go with `managed`; a new tensor is contiguous
  void* object = nullptr;
  return api->object_from_managed(managed, &object) == 0 ? static_cast<PyObject*>(object) : nullptr;
}

// The results of a call, made one by one; dropped together when one fails.
class Outputs {
 public:
  Outputs(Py_ssize_t count, Dtype dtype, int64_t models) : tuple_(PyTuple_New(count)), dtype_(dtype), models_(models) {}
  ~Outputs() { Py_XDECREF(tuple_); }
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;

  void none() { set(Py_NewRef(Py_None)); }
  // With `models` of the axis E in front. `out` lies in this object until the next call.
  bool add(bool models, int rank, const int64_t* shape, DLTensor* out) {
    shape_[0] = models_;
    for (int axis = 0; axis < rank; ++axis) shape_[axis + models] = shape[axis];
    PyObject* object = make(dtype_, rank + models, shape_, out);
    if (!object) return false;
    set(object);
    int64_t step = 1;
    for (int axis = rank + models; axis-- > 0; step *= shape_[axis]) strides_[axis] = step;
    out->strides = strides_;
    return true;
  }
  PyObject* take() {
    PyObject* result = tuple_;
    tuple_ = nullptr;
    return result;
  }

 private:
  void set(PyObject* object) { PyTuple_SET_ITEM(tuple_, next_++, object); }

  PyObject* tuple_;
  Dtype dtype_;
  int64_t models_, shape_[4], strides_[4];
  Py_ssize_t next_ = 0;
};

// (settings, x, h0, c0, weights, lengths, tape wanted) -> (y or None, h_n, c_n or None, tape or None), or None
PyObject* torch_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call;
  if (count != 7 || !call.read(args[0], args[1], args[2], args[3], args[4], args[5]) ||
      (call.problem.bf16_weights && args[6] == Py_True)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const Dtype dtype = call.problem.dtype;
  const bool models = call.settings.models > 0;
  Outputs outputs(4, dtype, call.settings.models);
  Results out;
  DLTensor made;
  if (call.settings.is_cell) {
    outputs.none();
  } else {
    if (!outputs.add(models, call.rank, call.y_shape, &made)) return nullptr;
    call.place(made, models, &out.y);
  }
  if (!outputs.add(models, call.state_rank, call.state_shape, &made)) return nullptr;
  call.place_state(made, models, &out.hn);
  if (facts_of(call.settings.cell).cell_state) {
    if (!outputs.add(models, call.state_rank, call.state_shape, &made)) return nullptr;
    call.place_state(made, models, &out.cn);
  } else {
    outputs.none();
  }
  void* tape = nullptr;
  if (args[6] == Py_True) {
    int64_t shape[2];
    call.tape_shape(shape);
    if (!outputs.add(false, 2, shape, &made)) return nullptr;
    tape = data_of<void>(made);
    // whose tape it is: see kernels.py
    if (dtype == Dtype::f32)
      static_cast<float*>(tape)[shape[0] * shape[1] - 1] = 0;
    else
      static_cast<double*>(tape)[shape[0] * shape[1] - 1] = 0;
  } else {
    outputs.none();
  }
  try {
    const int threads = threads_now();
    const Released released(cpu::work(call.problem));
    cpu::forward(call.problem, call.p, out, tape, threads);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const cpu::Interrupted&) {
    return nullptr;
  }
  return outputs.take();
}

// (settings, x, h0, c0, weights, lengths, tape, dy, dh_n, dc_n, wanted: one bit for each of x, h0, c0 and the weights)
// -> as many gradients or Nones, or None
PyObject* torch_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call;
  Results g;
  DLTensor view;
  unsigned long long wanted = 0;
  const auto read = [&] {
    if (count != 11 || !call.read(args[0], args[1], args[2], args[3], args[4], args[5]) || call.problem.bf16_weights)
      return false;
    if (call.settings.layers * call.settings.directions * call.settings.parts > 60) return false;
    const bool models = call.settings.models > 0;
    if (args[7] != Py_None) {
      if (call.settings.is_cell || !call.fits(args[7], models, call.rank, call.y_shape, &view)) return false;
      call.place(view, models, &g.y);
    }
    Array<4>* states[2] = {&g.hn, &g.cn};
    for (int n = 0; n < 2; ++n) {
      if (args[8 + n] == Py_None) continue;
      if (!call.fits(args[8 + n], models, call.state_rank, call.state_shape, &view)) return false;
      call.place_state(view, models, states[n]);
    }
    wanted = PyLong_AsUnsignedLongLong(args[10]);
    if (PyErr_Occurred()) return false;
    int64_t tape[2];
    call.tape_shape(tape);
    return call.fits(args[6], false, 2, tape, &view) && view.strides[1] == 1 &&
           (tape[0] == 1 || view.strides[0] == tape[1]);
  };
  if (!read()) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  void* const tape = data_of<void>(view);
  const Settings& settings = call.settings;
  const int stacks = settings.layers * settings.directions, parts = settings.parts;
  Outputs outputs(3 + stacks * parts, call.problem.dtype, settings.models);
  Arguments dp;
  std::vector<Params> params(static_cast<size_t>(stacks));
  DLTensor made;
  const auto want = [&](int n) { return (wanted >> n & 1) != 0; };
  if (!want(0)) {
    outputs.none();
  } else {
    if (!outputs.add(settings.has_models(0), call.rank, call.x_shape, &made)) return nullptr;
    call.place(made, settings.has_models(0), &dp.x);
  }
  Array<4>* states[2] = {&dp.h0, &dp.c0};
  for (int n = 0; n < 2; ++n) {
    if (!want(1 + n)) {
      outputs.none();
      continue;
    }
    if (!outputs.add(settings.has_models(1 + n), call.state_rank, call.state_shape, &made)) return nullptr;
    call.place_state(made, settings.has_models(1 + n), states[n]);
  }
  for (int k = 0; k < stacks; ++k)
    for (int part = 0; part < parts; ++part) {
      const int n = 3 + k * parts + part;
      if (!want(n)) {
        outputs.none();
        continue;
      }
      int64_t shape[2];
      call.weight_shape(k, part, shape);
      const bool models = settings.has_models(n);
      if (!outputs.add(models, part < 2 ? 2 : 1, shape, &made)) return nullptr;
      const int64_t *stride = made.strides + models, set = models ? made.strides[0] : 0;
      Params& d = params[static_cast<size_t>(k)];
      if (part < 2)
        (part == 0 ? d.W : d.R) = {data_of<void>(made), {set, stride[0], stride[1]}};
      else
        (part == 2 ? d.bW : d.bR) = {data_of<void>(made), {set, stride[0]}};
    }
  dp.params = params.data();
  try {
    const int threads = threads_now();
    const Released released(2 * cpu::work(call.problem));
    cpu::backward(call.problem, call.p, tape, g, dp, threads);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const cpu::Interrupted&) {
    return nullptr;
  }
  return outputs.take();
}

// Whether every one is a plain tensor or None
PyObject* torch_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  DLTensor view;
  for (Py_ssize_t n = 0; n < count; ++n)
    if (args[n] != Py_None && !look(args[n], &view)) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
}

// (tensor) -> another tensor with the same memory, detached, in a storage of its own; or None: not plain. NumPy may
// look at that one: a storage that NumPy has looked at cannot be resized any more, and offloading resizes those of
// weights.
PyObject* torch_alias(PyObject*, PyObject* object) {
  DLTensor view;
  DLManagedTensorVersioned* managed = nullptr;
  if (!look(object, &view)) Py_RETURN_NONE;
  if (api->managed_from_object(object, &managed) != 0) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  void* alias = nullptr;
  return api->object_from_managed(managed, &alias) == 0 ? static_cast<PyObject*>(alias) : nullptr;
}

// What torch's methods say of one tensor, beside its Python object.
struct Sample {
  uint64_t object, tensor, keys, storage, memory, capacity;

  bool read(PyObject* tuple) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 6) return false;
    object = address(PyTuple_GET_ITEM(tuple, 0));
    uint64_t* values[] = {&tensor, &keys, &storage, &memory, &capacity};
    for (int n = 0; n < 5; ++n) *values[n] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple, n + 1));
    return !PyErr_Occurred();
  }
};

// The first place in an object of so many bytes where every sample has what it should have; -1: none.
Py_ssize_t find(const std::vector<Sample>& samples, uint64_t Sample::* object, uint64_t Sample::* value,
                Py_ssize_t bytes) {
  for (Py_ssize_t place = 0; place + 8 <= bytes; place += 8) {
    bool all = true;
    for (const Sample& sample : samples) all = all && word(sample.*object, place) == sample.*value;
    if (all) return place;
  }
  return -1;
}

bool find_places(PyObject* tuple) {
  std::vector<Sample> samples(static_cast<size_t>(PyTuple_GET_SIZE(tuple)));
  for (size_t n = 0; n < samples.size(); ++n)
    if (!samples[n].read(PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(n)))) return false;
  // torch's tensor and storage have 26 and 13 words; the search ends at what it looks for, which lies within
  places.tensor = find(samples, &Sample::object, &Sample::tensor, tensor_type->tp_basicsize);
  places.keys = find(samples, &Sample::tensor, &Sample::keys, 26 * 8);
  places.storage = find(samples, &Sample::tensor, &Sample::storage, 26 * 8);
  places.memory = find(samples, &Sample::storage, &Sample::memory, 13 * 8);
  places.capacity = find(samples, &Sample::storage, &Sample::capacity, 13 * 8);
  for (const Py_ssize_t place : {places.tensor, places.keys, places.storage, places.memory, places.capacity})
    if (place < 0) return false;
  return true;
}

// (capsule, torch.Tensor, torch.nn.Parameter, samples, plain keys): see _core.pyi
PyObject* torch_setup(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !PyType_Check(args[1]) || !PyType_Check(args[2]) || !PyTuple_Check(args[3])) {
    PyErr_SetString(PyExc_TypeError,
                    "torch_setup: expected (capsule, torch.Tensor, torch.nn.Parameter, samples, plain keys)");
    return nullptr;
  }
  const auto* table = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  plain_keys = PyLong_AsUnsignedLongLong(args[4]);
  if (PyErr_Occurred()) return nullptr;
  if (table->version.major != 1 || !table->view_of_object) Py_RETURN_FALSE;
  api = nullptr;
  tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(args[1]));
  parameter_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(args[2]));
  if (!find_places(args[3])) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_FALSE;
  }
  api = table;
  Py_RETURN_TRUE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"torch_setup", fast(torch_setup), METH_FASTCALL, nullptr},
    {"torch_plain", fast(torch_plain), METH_FASTCALL, nullptr},
    {"torch_alias", torch_alias, METH_O, nullptr},
    {"torch_forward", fast(torch_forward), METH_FASTCALL, nullptr},
    {"torch_backward", fast(torch_backward), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void register_torch_lane(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) < 0) throw pybind11::error_already_set();
}

}  // namespace fusedrnn::bindings
