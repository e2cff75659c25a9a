// SPDX-License-Identifier: Apache-2.0
// What the files of the bindings share; module.cpp calls the register_* functions.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>

#include "cpu/cpu.h"

namespace fusedrnn::bindings {

void register_threads(pybind11::module_& module);
void register_layer(pybind11::module_& module);
void register_lane(pybind11::module_& module);
void register_clip(pybind11::module_& module);
void register_ctc(pybind11::module_& module);
void register_cuda(pybind11::module_& module);
void register_hmm(pybind11::module_& module);
void register_torch_gate(pybind11::module_& module);
void register_torch_lane(pybind11::module_& module);

// False where there is no such cell.
inline bool find_cell(const char* name, CellKind* kind) {
  for (const CellFacts& cell : cell_facts)
    if (std::strcmp(cell.name, name) == 0) {
      *kind = static_cast<CellKind>(&cell - cell_facts);
      return true;
    }
  return false;
}

// The number of threads for a call made now from this Python thread (threads.cpp).
int threads_now();

// A reference that was handed over; null: an exception is set.
inline pybind11::object owned(PyObject* object) { return pybind11::reinterpret_steal<pybind11::object>(object); }

// Text as a template argument, so that every name is made a Python string once.
template <size_t N>
struct Text {
  char text[N];
  consteval Text(const char (&from)[N]) { std::copy_n(from, N, text); }
};
template <Text name>
PyObject* interned() {
  static PyObject* const string = PyUnicode_InternFromString(name.text);
  return string;
}

// Work from which on other Python threads may run meanwhile. Below it (some ten microseconds) the hand-over would cost
// more.
inline constexpr double flops_worth_a_release = 1e6;

// Whether this is Python's main thread, the one that runs signal handlers (threads.cpp).
bool in_main_thread();

// The GIL is given up between construction and destruction if `flops` are worth it. Meanwhile the main thread hears
// signals (Ctrl-C): a call that one of them ends throws cpu::Interrupted, with Python's exception set.
class Released {
 public:
  explicit Released(double flops) {
    if (flops < flops_worth_a_release) return;
    before_ = cpu::set_signals(in_main_thread() ? cpu::Signals{hear, this} : cpu::Signals{});
    state_ = PyEval_SaveThread();
  }
  ~Released() {
    if (!state_) return;
    PyEval_RestoreThread(state_);
    cpu::set_signals(before_);
  }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  static bool hear(void* self) {
    PyThreadState*& state = static_cast<Released*>(self)->state_;
    PyEval_RestoreThread(state);
    const bool arrived = PyErr_CheckSignals() != 0;
    state = PyEval_SaveThread();
    return arrived;
  }

  PyThreadState* state_ = nullptr;
  cpu::Signals before_;
};

}  // namespace fusedrnn::bindings
