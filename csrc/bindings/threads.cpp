// SPDX-License-Identifier: Apache-2.0
// Threads and instruction sets: which are there, which are used.
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <exception>
#include <string>

#include "bindings/bindings.h"

namespace fusedrnn::bindings {

namespace py = pybind11;

namespace {

// OpenMP keeps its number per thread, but set_num_threads speaks for all Python threads. So each thread compares the
// last setting (its serial number above, the number of threads below) with the one it has seen, and takes it over once.
// What threadpoolctl or omp_set_num_threads do in a thread after that stays.
std::atomic<uint64_t> setting{0};
thread_local uint64_t seen = 0;

unsigned long main_thread = 0;

void set_num_threads(int n) {
  if (n < 1) throw py::value_error("set_num_threads: n is " + std::to_string(n) + "; expected n >= 1");
  const uint64_t serial = (setting.load() >> 32) + 1;
  setting.store(serial << 32 | static_cast<uint32_t>(n));
}

void set_isa(const std::string& name) {
  if (cpu::set_isa(name.c_str())) return;
  std::string found;
  for (const char* isa : cpu::isas_found()) found += (found.empty() ? "" : ", ") + std::string(isa);
  throw py::value_error("set_isa: name is '" + name + "'; expected one of " + found);
}

}  // namespace

bool in_main_thread() { return PyThread_get_thread_ident() == main_thread; }

int threads_now() {
  const uint64_t now = setting.load(std::memory_order_relaxed);
  if (seen != now) {
    seen = now;
    cpu::set_num_threads(static_cast<int>(now & 0xffffffffu));
  }
  return cpu::get_num_threads();
}

void register_threads(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const cpu::Interrupted&) {  // Python's exception is set
    }
  });
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  // a child has one thread, which is its main one
  pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); });
  module.attr("isas_built") = cpu::isas_built();
  module.attr("isas_found") = cpu::isas_found();
  module.def("isa", [] { return std::string(cpu::isa()); });
  module.def("set_isa", &set_isa, py::arg("name"));
  module.def("get_num_threads", &threads_now);
  module.def("ignore_crowd", &cpu::ignore_crowd, py::arg("ignored"));
  module.def("set_num_threads", &set_num_threads, py::arg("n"));
}

}  // namespace fusedrnn::bindings
