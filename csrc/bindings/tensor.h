// SPDX-License-Identifier: Apache-2.0
// Python arrays as the waist wants them. The only file that knows arrays: today NumPy's.
//
// Two ways in. `NumpyView` is the quick one: it answers false for anything out of the ordinary and raises nothing.
// `Checked` is the thorough one: it raises TypeError or ValueError with name, got and expected.
#pragma once

#include <pybind11/pybind11.h>

#define NPY_NO_DEPRECATED_API NPY_1_23_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL fusedrnn_numpy
#ifndef FUSEDRNN_IMPORTS_NUMPY  // module.cpp defines it
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "bindings/signature.h"

namespace fusedrnn::bindings {

namespace py = pybind11;

// NumPy has no bfloat16 of its own: its bits lie in uint16.
inline int type_of(Dtype dtype) {
  return dtype == Dtype::f32 ? NPY_FLOAT : dtype == Dtype::bf16 ? NPY_UINT16 : NPY_DOUBLE;
}
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::bf16 ? 2 : 8; }

inline PyArrayObject* as_array(PyObject* object) { return reinterpret_cast<PyArrayObject*>(object); }
inline PyObject* as_object(PyArrayObject* array) { return reinterpret_cast<PyObject*>(array); }

// A plain ndarray of this type whose elements can be read where they lie.
inline bool is_plain(PyObject* object, int type) {
  if (!PyArray_CheckExact(object)) return false;
  PyArrayObject* array = as_array(object);
  return PyArray_TYPE(array) == type && PyArray_ISBEHAVED_RO(array);
}

// The quick way to look at one. False for anything out of the ordinary.
class NumpyView {
 public:
  bool look(PyObject* object, Dtype dtype) {
    array_ = as_array(object);
    size_ = size_of(dtype);
    return is_plain(object, type_of(dtype));
  }
  int rank() const { return PyArray_NDIM(array_); }
  int64_t extent(int axis) const { return PyArray_DIM(array_, axis); }
  bool stride(int axis, int64_t* out) const {
    const int64_t bytes = PyArray_STRIDE(array_, axis);
    *out = bytes / size_;
    return bytes % size_ == 0 || extent(axis) <= 1;
  }
  void* data() const { return PyArray_DATA(array_); }

 private:
  PyArrayObject* array_ = nullptr;
  int64_t size_ = 1;
};

// A new array with undefined contents, of up to four axes; null with MemoryError set.
inline PyObject* empty(Dtype dtype, int rank, const int64_t* shape) {
  npy_intp dims[4];
  std::copy_n(shape, rank, dims);
  return PyArray_EMPTY(rank, dims, type_of(dtype), 0);
}

// A C-contiguous array over memory that `owner` keeps alive. Such an array cannot be resized by its user.
inline PyObject* over(Dtype dtype, int rank, const int64_t* shape, void* data, PyObject* owner) {
  npy_intp dims[4];
  std::copy_n(shape, rank, dims);
  PyObject* object =
      PyArray_New(&PyArray_Type, rank, dims, type_of(dtype), nullptr, data, 0, NPY_ARRAY_CARRAY, nullptr);
  if (!object) return nullptr;
  Py_INCREF(owner);
  if (PyArray_SetBaseObject(as_array(object), owner) < 0) {
    Py_DECREF(object);
    return nullptr;
  }
  return object;
}

// An array of any rank: its axes longer than 1 by growing stride (made positive), and where its lowest element lies.
struct Layout {
  char* lowest = nullptr;
  int64_t elements = 1;
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride in elements, extent)
};

enum class Access { read, write, write_sum };  // write_sum: stride 0 is allowed on the axis of weight sets

// Reads the arrays of one call and keeps them alive until it is destroyed (with the GIL held).
class Checked {
 public:
  explicit Checked(const char* function) : function_(function) {}

  [[noreturn]] void type_error(const std::string& text) const { throw py::type_error(function_ + text); }
  [[noreturn]] void value_error(const std::string& text) const { throw py::value_error(function_ + text); }

  void set_dtype(py::handle object, const ArrayName& name) {
    const int type = PyArray_TYPE(ndarray(object, name));
    if (type != NPY_FLOAT && type != NPY_DOUBLE)
      type_error(name.text() + " has dtype " + dtype_text(object) + "; expected float32 or float64");
    dtype_ = type == NPY_FLOAT ? Dtype::f32 : Dtype::f64;
  }
  Dtype dtype() const { return dtype_; }
  void assume(Dtype dtype) { dtype_ = dtype; }

  // Integers stand for one-hot vectors.
  static bool is_tokens(py::handle object) {
    return PyArray_Check(object.ptr()) && PyTypeNum_ISINTEGER(PyArray_TYPE(as_array(object.ptr())));
  }

  // Null for None. `axes` names the expected shape.
  template <int Rank>
  Array<Rank> array(py::object object, const ArrayName& name, const char* axes, const int64_t (&shape)[Rank],
                    Access access) {
    return read<Rank>(std::move(object), name, axes, shape, {access, type_of(dtype_), size_of(dtype_)});
  }
  // The floats of one slot; `role` tells apart whose they are in messages: "v." or "dp.".
  template <int Rank>
  void fill(py::object object, const Slot<Rank>& slot, const char* role, Access access, Dtype dtype) {
    slot.array = read<Rank>(std::move(object), {role, slot.name, slot.index}, slot.axes, slot.shape,
                            {access, type_of(dtype), size_of(dtype), Slot<Rank>::sets});
  }

  // Step counts, each 0..limit. Copied: a change from another thread must not reach the kernels.
  void fill_lengths(py::object object, const Slot<2>& slot, int64_t limit) {
    const Array<2> given =
        read<2>(std::move(object), {"", slot.name}, slot.axes, slot.shape, {Access::read, NPY_INT64, 8});
    if (!given.data) return;
    const auto* data = static_cast<const int64_t*>(given.data);
    const auto [E, B] = slot.shape;
    lengths_.reserve(static_cast<size_t>(E * B) + 1);
    for (int64_t e = 0; e < E; ++e)
      for (int64_t b = 0; b < B; ++b) {
        const int64_t length = data[e * given.stride[0] + b * given.stride[1]];
        if (length < 0 || length > limit)
          value_error("lengths[" + std::to_string(e) + ", " + std::to_string(b) + "] is " + std::to_string(length) +
                      "; expected 0 <= length <= T = " + std::to_string(limit));
        lengths_.push_back(length);
      }
    lengths_.push_back(0);  // so that data() is no null pointer where E*B is 0
    slot.array = {lengths_.data(), {B, 1}};
  }

  // One dimension of int64, copied for the same reason.
  std::vector<int64_t> integers(const py::object& object, const char* name) const {
    PyArrayObject* array = ndarray(object, {"", name});
    if (PyArray_TYPE(array) != NPY_INT64)
      type_error(std::string(name) + " has dtype " + dtype_text(object) + "; expected int64");
    if (PyArray_NDIM(array) != 1 || !PyArray_ISBEHAVED_RO(array))
      value_error(std::string(name) + " must have one axis and be aligned, in native byte order");
    const auto size = static_cast<size_t>(PyArray_DIM(array, 0));
    std::vector<int64_t> out(size);
    for (size_t i = 0; i < size; ++i)
      out[i] = *static_cast<const int64_t*>(PyArray_GETPTR1(array, static_cast<npy_intp>(i)));
    return out;
  }

  // B step counts, each 0..limit, one axis.
  std::vector<int64_t> steps(const py::object& object, int64_t B, int64_t limit) const {
    std::vector<int64_t> out = integers(object, "lengths");
    if (static_cast<int64_t>(out.size()) != B)
      value_error("lengths has " + std::to_string(out.size()) + " elements; expected B = " + std::to_string(B));
    for (size_t b = 0; b < out.size(); ++b)
      if (out[b] < 0 || out[b] > limit)
        value_error("lengths[" + std::to_string(b) + "] is " + std::to_string(out[b]) +
                    "; expected 0 <= length <= T = " + std::to_string(limit));
    return out;
  }

  // (i,j), C-contiguous; written. Integers must be there; the others are null for None.
  int64_t* written_integers(const py::object& object, const char* name, const char* axes, const int64_t (&shape)[2]) {
    void* data = written(object, name, axes, shape, NPY_INT64, 8);
    if (!data) type_error(std::string(name) + " is None; expected numpy.ndarray");
    return static_cast<int64_t*>(data);
  }
  double* written_doubles(const py::object& object, const char* name, const char* axes, const int64_t (&shape)[2]) {
    return static_cast<double*>(written(object, name, axes, shape, NPY_DOUBLE, 8));
  }
  uint8_t* written_flags(const py::object& object, const char* name, const char* axes, const int64_t (&shape)[2]) {
    return static_cast<uint8_t*>(written(object, name, axes, shape, NPY_BOOL, 1));
  }

  // The sizes of an array of floats with three axes; sets the dtype.
  std::array<int64_t, 3> three_axes(py::handle object, const char* name, const char* axes) {
    set_dtype(object, {"", name});
    PyArrayObject* array = as_array(object.ptr());
    if (PyArray_NDIM(array) != 3) value_error(std::string(name) + " must have three axes " + axes);
    return {PyArray_DIM(array, 0), PyArray_DIM(array, 1), PyArray_DIM(array, 2)};
  }

  void fill_reset(py::object object, const Slot<3>& slot) {
    const bool is_bool = PyArray_Check(object.ptr()) && PyArray_TYPE(as_array(object.ptr())) == NPY_BOOL;
    slot.array = read<3>(std::move(object), {"", slot.name}, slot.axes, slot.shape,
                         {Access::read, is_bool ? NPY_BOOL : NPY_UINT8, 1});
  }

  // Any integer type as int32, each 0..kinds-1; those past a row's length are not read. Copied, as lengths are.
  void fill_tokens(const py::object& object, const Slot<3>& slot, int64_t kinds, const Array<2>& lengths) {
    if (kinds > INT32_MAX) value_error("I is " + std::to_string(kinds) + "; expected less than 2**31 with tokens");
    PyArrayObject* array = as_array(object.ptr());
    const int type = PyArray_TYPE(array);
    const int64_t size = PyArray_ITEMSIZE(array);
    const Array<3> given = read<3>(object, {"", slot.name}, slot.axes, slot.shape, {Access::read, type, size});
    const auto copy = [&]<class Signed, class Unsigned>(Signed, Unsigned) {
      slot.array = PyTypeNum_ISSIGNED(type) ? copy_tokens<Signed>(given, slot.shape, kinds, lengths)
                                            : copy_tokens<Unsigned>(given, slot.shape, kinds, lengths);
    };
    size == 1   ? copy(int8_t(), uint8_t())
    : size == 2 ? copy(int16_t(), uint16_t())
    : size == 4 ? copy(int32_t(), uint32_t())
                : copy(int64_t(), uint64_t());
  }

  // Any rank, float32 or float64 (then dtype()). Does not keep the array alive.
  Layout layout(py::handle object, const ArrayName& name, Access access) {
    set_dtype(object, name);
    PyArrayObject* array = as_array(object.ptr());
    if (!PyArray_ISBEHAVED_RO(array)) value_error(name.text() + " is not aligned or not in native byte order");
    if (access != Access::read && !PyArray_ISWRITEABLE(array))
      value_error(name.text() + " is read-only; it is written here");
    Layout out;
    out.lowest = static_cast<char*>(PyArray_DATA(array));
    for (int axis = 0; axis < PyArray_NDIM(array); ++axis) {
      const int64_t extent = PyArray_DIM(array, axis), stride = PyArray_STRIDE(array, axis);
      out.elements *= extent;
      if (extent <= 1) continue;
      if (stride % size_of(dtype_) != 0) value_error(name.text() + " has strides that are no whole elements");
      if (stride < 0) out.lowest += stride * (extent - 1);
      out.axes.emplace_back(std::llabs(stride) / size_of(dtype_), extent);
    }
    std::sort(out.axes.begin(), out.axes.end());
    if (access != Access::read && out.elements > 0 && overlap(out.axes))
      value_error(name.text() + " has elements that share memory; it is written here");
    return out;
  }

  // One dimension without gaps, `elements` or more of them.
  void* tape(py::object object, size_t elements, Access access) {
    PyArrayObject* array = ndarray(object, {"", "tape"});
    const int64_t shape[1] = {PyArray_NDIM(array) == 1 ? static_cast<int64_t>(PyArray_DIM(array, 0)) : 0};
    const Array<1> given = this->array<1>(object, {"", "tape"}, "(n,)", shape, access);
    if (shape[0] > 1 && given.stride[0] != 1) value_error("tape is not contiguous");
    if (static_cast<size_t>(shape[0]) < elements)
      value_error("tape has " + std::to_string(shape[0]) + " elements; expected " + std::to_string(elements) +
                  " = tape_elements(problem)");
    return given.data;
  }

 private:
  template <class T>
  Array<3> copy_tokens(const Array<3>& given, const int64_t (&shape)[3], int64_t kinds, const Array<2>& lengths) {
    const auto* data = static_cast<const T*>(given.data);
    const auto* ends = static_cast<const int64_t*>(lengths.data);
    const int64_t E = given.stride[1] == 0 && !ends ? std::min<int64_t>(shape[1], 1) : shape[1], B = shape[2];
    tokens_.assign(static_cast<size_t>(shape[0] * E * B) + 1, 0);  // + 1: data() is no null pointer
    for (int64_t t = 0; t < shape[0]; ++t)
      for (int64_t e = 0; e < E; ++e)
        for (int64_t b = 0; b < B; ++b) {
          if (ends && t >= ends[e * lengths.stride[0] + b * lengths.stride[1]]) continue;
          const T token = data[t * given.stride[0] + e * given.stride[1] + b * given.stride[2]];
          if (token < T(0) || static_cast<uint64_t>(token) >= static_cast<uint64_t>(kinds))
            value_error("x[" + std::to_string(t) + ", " + std::to_string(e) + ", " + std::to_string(b) + "] is token " +
                        std::to_string(token) + "; expected 0 <= token < I = " + std::to_string(kinds));
          tokens_[static_cast<size_t>((t * E + e) * B + b)] = static_cast<int32_t>(token);
        }
    return {tokens_.data(), {E * B, E == shape[1] ? B : 0, 1}};
  }

  void* written(const py::object& object, const char* name, const char* axes, const int64_t (&shape)[2], int type,
                int64_t size) {
    const Array<2> out = read<2>(object, {"", name}, axes, shape, {Access::write, type, size});
    if (out.data && shape[0] * shape[1] > 0 &&
        ((shape[1] > 1 && out.stride[1] != 1) || (shape[0] > 1 && out.stride[0] != shape[1])))
      value_error(std::string(name) + " must be C-contiguous");
    return out.data;
  }

  static std::string dtype_text(py::handle object) { return py::str(object.attr("dtype")); }

  PyArrayObject* ndarray(py::handle object, const ArrayName& name) const {
    if (!PyArray_Check(object.ptr()))
      type_error(name.text() + " is a " + Py_TYPE(object.ptr())->tp_name + "; expected numpy.ndarray");
    return as_array(object.ptr());
  }

  // What an array is to hold, and what it is for.
  struct Use {
    Access access;
    int type;
    int64_t size;  // of an element
    int sets = 0;  // the axis of weight sets
  };

  template <int Rank>
  Array<Rank> read(py::object object, const ArrayName& name, const char* axes, const int64_t (&shape)[Rank],
                   const Use& use) {
    Array<Rank> out;
    if (object.is_none()) return out;
    PyArrayObject* array = ndarray(object, name);
    if (PyArray_TYPE(array) != use.type) {
      py::object expected = py::reinterpret_steal<py::object>(as_object_of(use.type));
      type_error(name.text() + " has dtype " + dtype_text(object) + "; expected " + std::string(py::str(expected)));
    }
    const int rank = PyArray_NDIM(array);
    bool fits = rank == Rank;
    for (int axis = 0; fits && axis < Rank; ++axis) fits = PyArray_DIM(array, axis) == shape[axis];
    if (!fits) {
      std::vector<int64_t> got(PyArray_DIMS(array), PyArray_DIMS(array) + rank);
      value_error(name.text() + " has shape " + shape_text(rank, got.data()) + "; expected " + shape_text(Rank, shape) +
                  " = " + axes);
    }
    if (!PyArray_ISBEHAVED_RO(array)) value_error(name.text() + " is not aligned or not in native byte order");
    for (int axis = 0; axis < Rank; ++axis) {
      const int64_t stride = PyArray_STRIDE(array, axis);
      if (stride % use.size != 0 && shape[axis] > 1)
        value_error(name.text() + " has strides that are no whole elements");
      out.stride[axis] = stride / use.size;
    }
    if (use.access != Access::read) check_writable(array, out, name, shape, use);
    out.data = PyArray_DATA(array);
    held_.push_back(std::move(object));
    return out;
  }

  template <int Rank>
  void check_writable(PyArrayObject* array, const Array<Rank>& out, const ArrayName& name, const int64_t (&shape)[Rank],
                      const Use& use) const {
    if (!PyArray_ISWRITEABLE(array)) value_error(name.text() + " is read-only; it is written here");
    std::array<std::pair<int64_t, int64_t>, Rank> steps;
    for (int axis = 0; axis < Rank; ++axis) {
      const bool summed = use.access == Access::write_sum && axis == use.sets && out.stride[axis] == 0;
      steps[axis] = {std::llabs(out.stride[axis]), summed ? 1 : shape[axis]};
    }
    std::sort(steps.begin(), steps.end());
    if (PyArray_SIZE(array) > 0 && overlap(steps))
      value_error(name.text() + " has elements that share memory; it is written here");
  }

  static PyObject* as_object_of(int type) { return reinterpret_cast<PyObject*>(PyArray_DescrFromType(type)); }

  // Of axes by growing stride: true unless each steps over all that the ones before cover. (This also refuses a few
  // arrays that interleave without touching, such as strides (2, 3); none comes from slicing.)
  template <class Axes>
  static bool overlap(const Axes& axes) {
    int64_t covered = 1;
    for (const auto& [stride, extent] : axes) {
      if (extent == 1) continue;
      if (stride < covered) return true;
      covered += stride * (extent - 1);
    }
    return false;
  }

  std::string function_;
  Dtype dtype_ = Dtype::f32;
  std::vector<py::object> held_;
  std::vector<int64_t> lengths_;
  std::vector<int32_t> tokens_;
};

}  // namespace fusedrnn::bindings
