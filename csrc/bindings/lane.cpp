// SPDX-License-Identifier: Apache-2.0
// The short way from a layer object to the kernels (see Lane in _core.pyi). It answers the plain case and returns None
// for all else, having raised and written nothing. A plain CPython type: pybind11's call would cost as much as the
// rest.
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace fusedrnn::bindings {

namespace {

constexpr int kParts = 4;   // W, R, bW, bR
constexpr int kInline = 8;  // layers x directions that need no memory from the heap

// Outputs of step(): memory that the Lane owns, and the finished result tuple over it.
struct Turn {
  PyObject* owner = nullptr;   // capsule that frees the memory
  PyObject* result = nullptr;  // (y, h) or (y, (h, c))
  char *begin = nullptr, *end = nullptr;
  void *y = nullptr, *h = nullptr, *c = nullptr;

  bool contains(const void* data) const { return begin <= data && data < end; }
};

struct Lane {
  PyObject_HEAD;
  CellKind cell;
  int32_t layers, directions;
  int gates;
  bool batch_first;
  double clip_cell;
  PyObject** keys;  // [layers*directions*kParts], interned names
  // step()
  Turn turns[2];
  int turn;
  bool inside;  // a thread computes with the GIL released
  Dtype dtype;
  int64_t B, H;  // what the turns are made for; B = -1: unbatched
};

// Strong references for as long as the GIL is given up: another thread may empty the dict meanwhile.
class Kept {
 public:
  void add(PyObject* object) {
    if (!object) return;
    Py_INCREF(object);
    objects_.push_back(object);
  }
  ~Kept() {
    for (PyObject* object : objects_) Py_DECREF(object);
  }

 private:
  std::vector<PyObject*> objects_;
};

// One call's arrays, read where they lie.
struct Plain {
  Problem problem;
  Arguments p;
  PyObject* x = nullptr;     // borrowed
  PyObject* states[2] = {};  // h, c; borrowed
  Params* params = nullptr;
  PyObject** sources = nullptr;  // [layers*directions*kParts], borrowed
  Params few[kInline];
  PyObject* few_sources[kInline * kParts];
  std::vector<Params> many;
  std::vector<PyObject*> many_sources;

  explicit Plain(size_t count) {
    if (count > kInline) {
      many.resize(count);
      many_sources.resize(count * kParts);
      params = many.data();
      sources = many_sources.data();
    } else {
      params = few;
      sources = few_sources;
    }
    p.params = params;
  }

  void keep(const Lane& lane, Kept* kept) const {
    for (int k = 0; k < lane.layers * lane.directions * kParts; ++k) kept->add(sources[k]);
    kept->add(states[0]);
    kept->add(states[1]);
  }
};

// Borrowed references to the weights; null for an absent bias. False where something else is odd.
bool find_weights(const Lane& lane, PyObject* params, PyObject** sources) {
  const int count = lane.layers * lane.directions;
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

// Sizes H and I, dtype and all weights.
bool read_weights(const Lane& lane, PyObject* params, Plain* plain) {
  if (!find_weights(lane, params, plain->sources)) return false;
  PyObject* W = plain->sources[0];
  PyObject* R = plain->sources[1];
  if (!PyArray_CheckExact(W) || !PyArray_CheckExact(R)) return false;
  const int type = PyArray_TYPE(as_array(R));
  if (type != NPY_FLOAT && type != NPY_DOUBLE && type != NPY_UINT16) return false;
  if (PyArray_NDIM(as_array(W)) != 2 || PyArray_NDIM(as_array(R)) != 2) return false;
  Problem& problem = plain->problem;
  problem.cell = lane.cell;
  problem.dtype = type == NPY_DOUBLE ? Dtype::f64 : Dtype::f32;
  problem.bf16_weights = type == NPY_UINT16;
  const Dtype stored = problem.bf16_weights ? Dtype::bf16 : problem.dtype;
  problem.clip_cell = lane.clip_cell;
  Sizes& s = problem.sizes;
  s.I = PyArray_DIM(as_array(W), 1);
  s.H = PyArray_DIM(as_array(R), 1);
  s.L = lane.layers;
  s.D = lane.directions;
  if (s.I < 1 || s.H < 1) return false;
  const int64_t rows = lane.gates * s.H;
  for (int k = 0; k < lane.layers * lane.directions; ++k) {
    PyObject** part = plain->sources + k * kParts;
    const int64_t W_shape[2] = {rows, k < s.D ? s.I : s.D * s.H};
    const int64_t R_shape[2] = {rows, s.H};
    Params* out = &plain->params[k];
    if (!view(part[0], stored, W_shape, 2, &out->W) || !view(part[1], stored, R_shape, 2, &out->R) ||
        (part[2] && !view(part[2], problem.dtype, R_shape, 1, &out->bW)) ||
        (part[3] && !view(part[3], problem.dtype, R_shape, 1, &out->bR)))
      return false;
  }
  return true;
}

// State None, h, or (h, c), batched (L*D,B,H) or not (L*D,H).
bool read_state(const Lane& lane, PyObject* state, bool batched, Plain* plain) {
  if (state == Py_None) return true;
  const Sizes& s = plain->problem.sizes;
  if (facts_of(lane.cell).cell_state) {
    if ((!PyTuple_Check(state) && !PyList_Check(state)) || PySequence_Fast_GET_SIZE(state) != 2) return false;
    plain->states[0] = PySequence_Fast_GET_ITEM(state, 0);
    plain->states[1] = PySequence_Fast_GET_ITEM(state, 1);
  } else {
    plain->states[0] = state;
  }
  Array<4>* out[2] = {&plain->p.h0, &plain->p.c0};
  for (int k = 0; k < 2 && plain->states[k]; ++k) {
    const int64_t full[3] = {s.L * s.D, s.B, s.H};
    const int64_t flat[2] = {s.L * s.D, s.H};
    Array<3> rows;
    if (batched) {
      if (!view(plain->states[k], plain->problem.dtype, full, 3, &rows)) return false;
    } else {
      Array<2> row;
      if (!view(plain->states[k], plain->problem.dtype, flat, 2, &row)) return false;
      rows = {row.data, {row.stride[0], s.H, row.stride[1]}};
    }
    *out[k] = {rows.data, {rows.stride[0], s.B * s.H, rows.stride[1], rows.stride[2]}};
  }
  return true;
}

// Runs the kernels, without the GIL where there is much work; false with an exception set.
template <class Kernels>
bool run(const Lane& lane, const Plain& plain, double flops, const Kernels& kernels) {
  const int threads = threads_now();
  try {
    Kept kept;
    if (flops >= flops_worth_a_release) plain.keep(lane, &kept);
    const Released released(flops);
    kernels(threads);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
    return false;
  } catch (const cpu::Interrupted&) {
    return false;
  }
  return true;
}

// None for a case that is not plain; null where an exception is set.
PyObject* decline() {
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

bool run_forward(const Lane& lane, const Plain& plain, const Results& out, void* tape = nullptr) {
  return run(lane, plain, cpu::work(plain.problem),
             [&](int threads) { cpu::forward(plain.problem, plain.p, out, tape, threads); });
}

// How a sequence lies: (T,B,n), (B,T,n) or (T,n).
struct Axes {
  bool batched = true, time = false;  // time: axis 1 is that of the steps

  int rank() const { return batched ? 3 : 2; }
  void shape(const Sizes& s, int64_t width, int64_t* out) const {
    out[0] = batched && time ? s.B : s.T;
    out[1] = batched ? (time ? s.T : s.B) : width;
    out[2] = width;
  }
  // A plain array of that shape as (T,E,B,n).
  bool read(PyObject* object, Dtype dtype, const Sizes& s, int64_t width, Array<4>* out) const {
    int64_t expected[3];
    shape(s, width, expected);
    Array<3> steps;
    if (!view(object, dtype, expected, rank(), &steps)) return false;
    if (!batched) steps.stride[0] = steps.stride[1], steps.stride[1] = width;
    *out = {steps.data, {steps.stride[time], s.B * width, steps.stride[!time], steps.stride[2]}};
    return true;
  }
  // A new one.
  Array<4> made(PyArrayObject* array, const Sizes& s, int64_t width) const {
    const int64_t t = batched && time ? width : s.B * width, b = batched && time ? s.T * width : width;
    return {PyArray_DATA(array), {t, s.B * width, b, 1}};
  }
};

// x and its sizes, and the state.
bool read_inputs(const Lane& lane, PyObject* x, PyObject* state, Plain* plain, Axes* axes) {
  plain->x = x;
  if (!PyArray_CheckExact(x)) return false;
  const int rank = PyArray_NDIM(as_array(x));
  if (rank != 2 && rank != 3) return false;
  *axes = {rank == 3, rank == 3 && lane.batch_first};
  Sizes& s = plain->problem.sizes;
  s.T = PyArray_DIM(as_array(x), axes->time);
  s.B = axes->batched ? PyArray_DIM(as_array(x), !axes->time) : 1;
  return s.T > 0 && s.B > 0 && axes->read(x, plain->problem.dtype, s, s.I, &plain->p.x) &&
         read_state(lane, state, axes->batched, plain);
}

// A state's arrays, h and c, as the user gets them: new ones, and where they lie; null with an exception set.
PyObject* new_state(const Lane& lane, const Plain& plain, const Axes& axes, Array<4>* h_at, Array<4>* c_at) {
  const Sizes& s = plain.problem.sizes;
  const int64_t shape[3] = {s.L * s.D, axes.batched ? s.B : s.H, s.H};
  PyArrayObject* h = empty(plain.problem.dtype, shape, axes.rank());
  if (!h) return nullptr;
  *h_at = {PyArray_DATA(h), {s.B * s.H, s.B * s.H, s.H, 1}};
  if (!facts_of(lane.cell).cell_state) return as_object(h);
  PyArrayObject* c = empty(plain.problem.dtype, shape, axes.rank());
  PyObject* pair = c ? PyTuple_Pack(2, h, c) : nullptr;
  if (pair) *c_at = {PyArray_DATA(c), {s.B * s.H, s.B * s.H, s.H, 1}};
  Py_DECREF(h);
  Py_XDECREF(c);
  return pair;
}

// The results of a call in new arrays, (y, state); null with an exception set.
PyObject* new_results(const Lane& lane, const Plain& plain, const Axes& axes, Results* out) {
  const Sizes& s = plain.problem.sizes;
  int64_t shape[3];
  axes.shape(s, s.D * s.H, shape);
  PyArrayObject* y = empty(plain.problem.dtype, shape, axes.rank());
  if (!y) return nullptr;
  out->y = axes.made(y, s, s.D * s.H);
  PyObject* state = new_state(lane, plain, axes, &out->hn, &out->cn);
  PyObject* result = state ? PyTuple_Pack(2, y, state) : nullptr;
  Py_DECREF(y);
  Py_XDECREF(state);
  return result;
}

PyObject* forward(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
  Lane& lane = *reinterpret_cast<Lane*>(object);
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "forward() takes exactly 3 arguments (x, state, params)");
    return nullptr;
  }
  Plain plain(static_cast<size_t>(lane.layers * lane.directions));
  Axes axes;
  if (!read_weights(lane, arguments[2], &plain) || !read_inputs(lane, arguments[0], arguments[1], &plain, &axes))
    return decline();
  Results out;
  PyObject* result = new_results(lane, plain, axes, &out);
  if (result && !run_forward(lane, plain, out)) Py_CLEAR(result);
  return result;
}

// ---- training ----

// What is left of a tape's memory behind its first cache line: threads that own neighbouring units then write no line
// in common. Null where it holds fewer than `elements`.
void* tape_in(PyObject* memory, Dtype dtype, int64_t elements) {
  if (!is_plain(memory, type_of(dtype), 1) || !PyArray_ISCARRAY(as_array(memory))) return nullptr;
  const int64_t line = 64 / size_of(dtype);
  if (PyArray_DIM(as_array(memory), 0) < elements + line) return nullptr;
  char* data = static_cast<char*>(PyArray_DATA(as_array(memory)));
  return data + (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64;
}

// recompute and clip_grad (None: off) into the problem; false where something is odd.
bool read_options(PyObject* recompute, PyObject* clip_grad, Problem* problem) {
  problem->recompute = recompute == Py_True;
  if (problem->bf16_weights || (recompute != Py_True && recompute != Py_False)) return false;
  if (clip_grad == Py_None) return true;
  if (!PyFloat_CheckExact(clip_grad) && !PyLong_CheckExact(clip_grad)) return false;
  problem->clip_grad = PyFloat_AsDouble(clip_grad);
  PyErr_Clear();  // of a number too large: -1
  return problem->clip_grad > 0 && std::isfinite(problem->clip_grad);
}

PyObject* record(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
  Lane& lane = *reinterpret_cast<Lane*>(object);
  if (count != 6) {
    PyErr_SetString(PyExc_TypeError,
                    "record() takes exactly 6 arguments (x, state, params, recompute, clip_grad, memory)");
    return nullptr;
  }
  Plain plain(static_cast<size_t>(lane.layers * lane.directions));
  Axes axes;
  if (!read_weights(lane, arguments[2], &plain) || !read_options(arguments[3], arguments[4], &plain.problem) ||
      !read_inputs(lane, arguments[0], arguments[1], &plain, &axes))
    return decline();
  const int parts = lane.layers * lane.directions * kParts, each = plain.sources[2] ? kParts : kParts / 2;
  for (int k = 0; k < parts; ++k)
    if ((plain.sources[k] != nullptr) != (k % kParts < each)) return decline();
  Results out;
  PyObject* pair = new_results(lane, plain, axes, &out);
  if (!pair) return nullptr;
  PyObject* result = nullptr;
  PyObject* weights = PyTuple_New(parts / kParts * each);
  for (int k = 0, n = 0; weights && k < parts; ++k)
    if (plain.sources[k]) PyTuple_SET_ITEM(weights, n++, Py_NewRef(plain.sources[k]));
  // y and h exist, so the sizes multiply to what memory holds. Old memory is not twice as large as needed.
  const int64_t elements = static_cast<int64_t>(cpu::tape_elements(plain.problem));
  const int64_t size[1] = {elements + 64 / size_of(plain.problem.dtype)};
  PyObject* memory = arguments[5];
  void* tape = tape_in(memory, plain.problem.dtype, elements);
  if (tape && PyArray_DIM(as_array(memory), 0) <= 2 * size[0]) {
    Py_INCREF(memory);
  } else {
    memory = as_object(empty(plain.problem.dtype, size));
    tape = memory ? tape_in(memory, plain.problem.dtype, elements) : nullptr;
  }
  if (weights && tape && run_forward(lane, plain, out, tape))
    result = PyTuple_Pack(4, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1), weights, memory);
  Py_DECREF(pair);
  Py_XDECREF(weights);
  Py_XDECREF(memory);
  return result;
}

// A new array of the shape of `like`, into a dict; null with an exception set.
PyArrayObject* new_entry(PyObject* dict, PyObject* name, PyObject* like, Dtype dtype) {
  PyArrayObject* array =
      as_array(PyArray_EMPTY(PyArray_NDIM(as_array(like)), PyArray_DIMS(as_array(like)), type_of(dtype), 0));
  if (array && PyDict_SetItem(dict, name, as_object(array)) < 0) Py_CLEAR(array);
  if (array) Py_DECREF(array);  // the dict has it
  return array;
}

PyObject* backward(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
  Lane& lane = *reinterpret_cast<Lane*>(object);
  if (count != 8) {
    PyErr_SetString(
        PyExc_TypeError,
        "backward() takes exactly 8 arguments (x, state, weights, memory, recompute, clip_grad, dy, dstate)");
    return nullptr;
  }
  Plain plain(static_cast<size_t>(lane.layers * lane.directions));
  Axes axes;
  if (!read_weights(lane, arguments[2], &plain) || !read_options(arguments[4], arguments[5], &plain.problem) ||
      !read_inputs(lane, arguments[0], arguments[1], &plain, &axes))
    return decline();
  const Problem& problem = plain.problem;
  const Sizes& s = problem.sizes;
  const void* tape = tape_in(arguments[3], problem.dtype, static_cast<int64_t>(cpu::tape_elements(problem)));
  Results g;
  if (!tape || (arguments[6] != Py_None && !axes.read(arguments[6], problem.dtype, s, s.D * s.H, &g.y)))
    return decline();
  Kept kept;
  {
    Plain last(static_cast<size_t>(lane.layers * lane.directions));
    last.problem = problem;
    if (!read_state(lane, arguments[7], axes.batched, &last)) return decline();
    g.hn = last.p.h0, g.cn = last.p.c0;
    kept.add(last.states[0]), kept.add(last.states[1]);
  }
  static PyObject* const x_name = PyUnicode_InternFromString("x");
  static PyObject* const state_name = PyUnicode_InternFromString("state");
  PyObject* grads = PyDict_New();
  if (!grads) return nullptr;
  Arguments dp;
  Plain written(static_cast<size_t>(lane.layers * lane.directions));
  dp.params = written.params;
  PyArrayObject* dx = new_entry(grads, x_name, plain.x, problem.dtype);
  PyObject* dstate = dx ? new_state(lane, plain, axes, &dp.h0, &dp.c0) : nullptr;
  bool made = dstate && PyDict_SetItem(grads, state_name, dstate) == 0;
  Py_XDECREF(dstate);
  if (made) dp.x = axes.made(dx, s, s.I);
  for (int k = 0; made && k < lane.layers * lane.directions * kParts; ++k) {
    if (!plain.sources[k]) continue;
    PyArrayObject* array = new_entry(grads, lane.keys[k], plain.sources[k], problem.dtype);
    made = array != nullptr;
    if (!made) break;
    Params& to = written.params[k / kParts];
    const int64_t columns = PyArray_NDIM(array) == 2 ? PyArray_DIM(array, 1) : 1;
    if (k % kParts < 2)
      (k % kParts ? to.R : to.W) = {PyArray_DATA(array), {0, columns, 1}};
    else
      (k % kParts == 2 ? to.bW : to.bR) = {PyArray_DATA(array), {0, 1}};
  }
  if (!made || !run(lane, plain, 2 * cpu::work(problem),
                    [&](int threads) { cpu::backward(problem, plain.p, tape, g, dp, threads); }))
    Py_CLEAR(grads);
  return grads;
}

constexpr std::align_val_t kAlignment{64};

void clear_turns(Lane* lane) {
  for (Turn& turn : lane->turns) {
    Py_CLEAR(turn.result);
    Py_CLEAR(turn.owner);
    turn = Turn();
  }
  lane->B = 0;
}

// Memory and result tuples of both turns; false with an exception set.
bool make_turns(Lane* lane, const Problem& problem, bool batched) {
  clear_turns(lane);
  const Sizes& s = problem.sizes;
  const bool lstm = facts_of(lane->cell).cell_state;
  const int64_t size = size_of(problem.dtype);
  auto padded = [&](int64_t elements) { return (elements * size + 63) / 64 * 64; };
  const int64_t y_bytes = padded(s.B * s.H), state_bytes = padded(s.L * s.B * s.H);
  for (Turn& turn : lane->turns) {
    const size_t bytes = static_cast<size_t>(y_bytes + 2 * state_bytes);
    void* memory = operator new(bytes, kAlignment, std::nothrow);
    if (!memory) {
      PyErr_NoMemory();
      return false;
    }
    turn.owner = PyCapsule_New(memory, nullptr, [](PyObject* capsule) {
      operator delete(PyCapsule_GetPointer(capsule, nullptr), kAlignment);
    });
    if (!turn.owner) {
      operator delete(memory, kAlignment);
      return false;
    }
    turn.begin = static_cast<char*>(memory);
    turn.end = turn.begin + bytes;
    turn.y = turn.begin;
    turn.h = turn.begin + y_bytes;
    turn.c = turn.begin + y_bytes + state_bytes;
    const int64_t y_shape[2] = {batched ? s.B : s.H, s.H};
    const int64_t state_shape[3] = {s.L, batched ? s.B : s.H, s.H};
    PyObject* y = over(problem.dtype, y_shape, batched ? 2 : 1, turn.y, turn.owner);
    PyObject* h = over(problem.dtype, state_shape, batched ? 3 : 2, turn.h, turn.owner);
    PyObject* c = lstm ? over(problem.dtype, state_shape, batched ? 3 : 2, turn.c, turn.owner) : Py_NewRef(Py_None);
    if (y && h && c) turn.result = lstm ? Py_BuildValue("(O(OO))", y, h, c) : PyTuple_Pack(2, y, h);
    Py_XDECREF(y);
    Py_XDECREF(h);
    Py_XDECREF(c);
    if (!turn.result) return false;
  }
  lane->dtype = problem.dtype;
  lane->B = batched ? s.B : -1;
  lane->H = s.H;
  lane->turn = 0;
  return true;
}

PyObject* step(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
  Lane& lane = *reinterpret_cast<Lane*>(object);
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "step() takes exactly 3 arguments (x, state, params)");
    return nullptr;
  }
  if (lane.inside || lane.directions != 1) return decline();
  Plain plain(static_cast<size_t>(lane.layers));
  if (!read_weights(lane, arguments[2], &plain)) return decline();

  // x (B,I) or (I,)
  plain.x = arguments[0];
  if (!PyArray_CheckExact(plain.x)) return decline();
  const int rank = PyArray_NDIM(as_array(plain.x));
  if (rank != 1 && rank != 2) return decline();
  const bool batched = rank == 2;
  Sizes& s = plain.problem.sizes;
  s.T = 1;
  s.B = batched ? PyArray_DIM(as_array(plain.x), 0) : 1;
  if (s.B == 0) return decline();
  const int64_t shape[2] = {batched ? s.B : s.I, s.I};
  Array<2> row;
  row.stride[0] = s.I;
  if (!view(plain.x, plain.problem.dtype, shape, rank, &row)) return decline();
  plain.p.x = {row.data, {s.B * s.I, s.B * s.I, row.stride[0], row.stride[1]}};
  if (!read_state(lane, arguments[1], batched, &plain)) return decline();

  if (lane.B != (batched ? s.B : -1) || lane.H != s.H || lane.dtype != plain.problem.dtype || !lane.turns[1].result)
    if (!make_turns(&lane, plain.problem, batched)) {
      clear_turns(&lane);
      return nullptr;
    }
  // What is read must not be overwritten: usually the last turn's state, so the turns alternate.
  auto is_read = [&](const Turn& turn) {
    return turn.contains(plain.p.x.data) || turn.contains(plain.p.h0.data) || turn.contains(plain.p.c0.data);
  };
  lane.turn ^= 1;
  if (is_read(lane.turns[lane.turn])) lane.turn ^= 1;
  Turn& turn = lane.turns[lane.turn];
  if (is_read(turn)) return decline();
  Results out;
  out.y = {turn.y, {s.B * s.H, s.B * s.H, s.H, 1}};
  out.hn = {turn.h, {s.B * s.H, s.B * s.H, s.H, 1}};
  if (facts_of(lane.cell).cell_state) out.cn = {turn.c, {s.B * s.H, s.B * s.H, s.H, 1}};
  lane.inside = true;
  const bool done = run_forward(lane, plain, out);
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
  lane.gates = facts_of(kind).gates;
  lane.layers = layers;
  lane.directions = directions;
  lane.batch_first = batch_first != 0;
  lane.clip_cell = clip_cell;
  lane.keys =
      static_cast<PyObject**>(PyMem_Calloc(static_cast<size_t>(layers * directions * kParts), sizeof(PyObject*)));
  static const char* const parts[kParts] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
  for (int k = 0; lane.keys && k < layers * directions * kParts; ++k) {
    const int layer = k / kParts / directions;
    const bool reverse = k / kParts % directions == 1;
    lane.keys[k] = PyUnicode_FromFormat("%s_l%d%s", parts[k % kParts], layer, reverse ? "_reverse" : "");
    if (!lane.keys[k]) break;
    PyUnicode_InternInPlace(&lane.keys[k]);
  }
  if (!lane.keys || !lane.keys[layers * directions * kParts - 1]) {
    if (!PyErr_Occurred()) PyErr_NoMemory();
    Py_DECREF(object);
    return nullptr;
  }
  return object;
}

void destroy(PyObject* object) {
  Lane& lane = *reinterpret_cast<Lane*>(object);
  clear_turns(&lane);
  if (lane.keys)
    for (int k = 0; k < lane.layers * lane.directions * kParts; ++k) Py_XDECREF(lane.keys[k]);
  PyMem_Free(lane.keys);
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

template <class Function>
PyCFunction fast(Function function) {  // METH_FASTCALL functions have another type than the table says
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
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
