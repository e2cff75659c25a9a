// SPDX-License-Identifier: Apache-2.0
#include "bindings/torch_gate.h"

#include <cstring>
#include <initializer_list>
#include <vector>

#include "bindings/plain.h"

namespace fusedrnn::bindings {

namespace {

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

}  // namespace

// Whether all elements lie in the storage's memory, which the caller may have freed or shortened (resize_).
bool TorchView::has_memory(uint64_t tensor) const {
  uint64_t last = 0;
  for (int axis = 0; axis < tensor_.ndim; ++axis) {
    if (tensor_.shape[axis] == 0) return true;
    last += static_cast<uint64_t>((tensor_.shape[axis] - 1) * tensor_.strides[axis]);
  }
  const uint64_t storage = word(tensor, places.storage);
  if (storage == 0) return false;
  const uint64_t memory = word(storage, places.memory), begin = address(data()) - memory;
  const uint64_t bytes = static_cast<uint64_t>(tensor_.dtype.bits) * tensor_.dtype.lanes / 8;
  return memory != 0 && begin + (last + 1) * bytes <= word(storage, places.capacity);
}

bool TorchView::look(PyObject* object) {
  if (!api || (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type)) return false;
  const uint64_t tensor = word(address(object), places.tensor);
  if ((word(tensor, places.keys) & ~plain_keys) != 0) return false;
  if (api->view_of_object(object, &tensor_) != 0) {
    PyErr_Clear();
    return false;
  }
  return tensor_.device.type == 1 && has_memory(tensor);
}

PyObject* new_tensor(Dtype dtype, int rank, const int64_t* shape, void** data) {
  DLTensor prototype{nullptr, {1, 0}, rank, torch_type(dtype), const_cast<int64_t*>(shape), nullptr, 0};
  DLManagedTensorVersioned* managed = nullptr;
  const auto set_error = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); };
  if (api->allocate(&prototype, &managed, nullptr, set_error) != 0) {
    if (!PyErr_Occurred()) PyErr_NoMemory();
    return nullptr;
  }
  *data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  void* object = nullptr;
  return api->object_from_managed(managed, &object) == 0 ? static_cast<PyObject*>(object) : nullptr;
}

namespace {

// Whether every one is a plain tensor or None
PyObject* torch_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  TorchView view;
  for (Py_ssize_t n = 0; n < count; ++n)
    if (args[n] != Py_None && !view.look(args[n])) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
}

// (tensor) -> another tensor with the same memory, detached, in a storage of its own; or None: not plain. NumPy may
// look at that one: a storage that NumPy has looked at cannot be resized any more, and offloading resizes those of
// weights.
PyObject* torch_alias(PyObject*, PyObject* object) {
  TorchView view;
  DLManagedTensorVersioned* managed = nullptr;
  if (!view.look(object)) Py_RETURN_NONE;
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

PyMethodDef methods[] = {
    {"torch_setup", fast(torch_setup), METH_FASTCALL, nullptr},
    {"torch_plain", fast(torch_plain), METH_FASTCALL, nullptr},
    {"torch_alias", torch_alias, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void register_torch_gate(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) < 0) throw pybind11::error_already_set();
}

}  // namespace fusedrnn::bindings
