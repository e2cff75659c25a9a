// SPDX-License-Identifier: Apache-2.0
// The CUDA backend for backends/cuda.py: the submodule _core.cuda, or None in a build without CUDA.
//
// An array is any object with `pointer` (int), `shape` and `strides` (tuples; bytes) and `kind` (its dtype's name). Its
// shape, type and strides are checked here; whose memory the pointer is, nobody can check. Streams are integers. No
// memory is taken: a call says how much it needs, and `run` gets it.
#include "bindings/bindings.h"

#ifdef FUSEDRNN_HAVE_CUDA
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/signature.h"
#include "cuda/cuda.h"
#endif

namespace fusedrnn::bindings {

namespace py = pybind11;

#ifndef FUSEDRNN_HAVE_CUDA

void register_cuda(py::module_& module) { module.attr("cuda") = py::none(); }

#else

namespace {

constexpr const char* kDtypes[] = {"float32", "float64", "bfloat16", "float16"};  // in the order of Dtype
constexpr int64_t kSizes[] = {4, 8, 2, 2};

// RuntimeError: what CUDA, or a library, or a kernel says. Python makes its own exception of it.
void raise(const cuda::Status& status) {
  if (!status.empty()) throw std::runtime_error(status);
}

[[noreturn]] void fail(const std::string& text) { throw py::value_error("cuda: " + text); }

Dtype dtype_of(const std::string& kind, const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (kind == kDtypes[i]) return static_cast<Dtype>(i);
  throw py::type_error("cuda: " + name + " has dtype " + kind + "; expected float16, bfloat16, float32 or float64");
}

bool is_integer(const std::string& kind) { return kind.starts_with("int") || kind.starts_with("uint"); }

void* pointer_of(py::handle object) { return reinterpret_cast<void*>(object.attr("pointer").cast<uintptr_t>()); }

// Null for None.
template <int Rank>
Array<Rank> array(py::handle object, const std::string& name, const int64_t (&shape)[Rank], const std::string& kind,
                  int64_t size) {
  Array<Rank> out;
  if (object.is_none()) return out;
  const auto got = object.attr("shape").cast<std::vector<int64_t> >();
  const auto strides = object.attr("strides").cast<std::vector<int64_t> >();
  if (const auto own = object.attr("kind").cast<std::string>(); own != kind)
    throw py::type_error("cuda: " + name + " has dtype " + own + "; expected " + kind);
  bool fits = got.size() == Rank && strides.size() == Rank;
  int64_t elements = 1;
  for (int i = 0; fits && i < Rank; ++i) fits = got[static_cast<size_t>(i)] == shape[i], elements *= shape[i];
  if (!fits)
    fail(name + " has shape " + shape_text(static_cast<int>(got.size()), got.data()) + "; expected " +
         shape_text(Rank, shape));
  for (int i = 0; i < Rank; ++i) {
    const int64_t stride = strides[static_cast<size_t>(i)];
    if (stride % size != 0 && shape[i] > 1) fail(name + " has strides that are no whole elements");
    out.stride[i] = stride / size;
  }
  out.data = pointer_of(object);
  if (elements == 0) out.data = reinterpret_cast<void*>(uintptr_t{256});  // there, though nothing is in it
  if (!out.data) fail(name + " has no memory");
  return out;
}

// One call: what goes in and out, kept as pointers. Python keeps the arrays.
class DeviceCall {
 public:
  DeviceCall(py::handle given, py::handle p, int route, int float32) {
    settings_.route = route;
    settings_.f32 = static_cast<cuda::Precision>(float32);
    if (route < -1 || route > 3) fail("route is " + std::to_string(route) + "; expected -1..3");
    if (float32 < 0 || float32 > 2) fail("float32 is " + std::to_string(float32) + "; expected 0..2");
    Sizes& s = problem_.sizes;
    const auto cell = given.attr("cell").cast<std::string>();
    if (!find_cell(cell.c_str(), &problem_.cell)) fail("cell is '" + cell + "'; the kernels know no such cell");
    s.T = size(given, "T", 0), s.E = size(given, "E", 1), s.B = size(given, "B", 0);
    s.I = size(given, "I", 0), s.H = size(given, "H", 1);
    s.L = static_cast<int32_t>(size(given, "L", 1)), s.D = static_cast<int32_t>(size(given, "D", 1));
    if (s.D > 2) fail("D is " + std::to_string(s.D) + "; expected 1 or 2");
    // what kernels and products count with 32 bits
    const double rows = static_cast<double>(s.T) * static_cast<double>(s.B);
    if (rows > 2e9 || static_cast<double>(s.E) * s.D * s.B * 4 * (s.H + 8) > 2e9 || 4.0 * (s.H + 8) * (s.H + 8) > 2e9)
      fail("T=" + std::to_string(s.T) + " E=" + std::to_string(s.E) + " B=" + std::to_string(s.B) + " H=" +
           std::to_string(s.H) + " are too large: a product has at most 2e9 rows, and a step 2e9 pre-activations");
    problem_.reverse = given.attr("reverse").cast<bool>();
    problem_.reset_to_initial = given.attr("reset_to_initial").cast<bool>();
    problem_.recompute = given.attr("recompute").cast<bool>();
    problem_.clip_cell = given.attr("clip_cell").cast<double>();
    problem_.clip_grad = given.attr("clip_grad").cast<double>();
    problem_.dropout = given.attr("dropout").cast<double>();
    problem_.seed = given.attr("seed").cast<uint64_t>();
    if (given.attr("bf16_weights").cast<bool>()) fail("bf16_weights is set; expected weights of x's dtype");
    if (problem_.reverse && s.D == 2) fail("reverse is set; expected one direction with it, but D is 2");
    const py::object x = p.attr("x"), context = p.attr("context");
    kind_ = x.attr("kind").cast<std::string>();
    if (is_integer(kind_)) {
      token_kind_ = kind_;
      settings_.token_bytes = static_cast<int>(x.attr("itemsize").cast<int64_t>());
      settings_.token_signed = kind_[0] == 'i';
      const auto params = py::sequence(p.attr("params"));
      if (params.size() == 0) fail("params are missing");
      kind_ = py::sequence(params[0])[0].attr("kind").cast<std::string>();
    }
    problem_.dtype = dtype_of(kind_, token_kind_.empty() ? "x" : "params[0].W");
    if (!context.is_none()) s.K = py::sequence(context.attr("shape"))[2].cast<int64_t>();
    fill(given.attr("lengths"), lengths_slot(problem_));
    fill(given.attr("reset"), reset_slot(problem_));
    p_ = arguments(p, "", p_params_);
    for (const Params& w : p_params_)
      if (!w.W.data || !w.R.data == facts_of(problem_.cell).state_product) fail("params lack W or R");
    if (static_cast<int64_t>(p_params_.size()) != s.L * s.D || (!p_.x.data && !p_.tokens.data))
      fail("x or params are missing");
    for (int d = 0; p_.context.data && d < s.D; ++d)
      if (!p_.context_weights[d].data) fail("context_weights are missing");
  }

  size_t workspace_bytes() const { return workspace_; }
  size_t tape_bytes() const { return tape_; }
  const char* route() const { return route_; }

 protected:
  void find_route(bool backward) {
    const char *forward_route = "", *backward_route = "";
    raise(cuda::routes(problem_, settings_, &forward_route, &backward_route));
    route_ = backward ? backward_route : forward_route;
  }

  static int64_t size(py::handle given, const char* name, int64_t least) {
    const auto n = given.attr(name).cast<int64_t>();
    if (n < least || n > (int64_t{1} << 31) - 1) fail(std::string(name) + " is " + std::to_string(n));
    return n;
  }

  // An array into its slot. True, as each_* wants it: raises where something is wrong.
  template <int Rank>
  bool fill(py::handle object, const Slot<Rank>& slot, const char* role = "") const {
    const std::string name = ArrayName{role, slot.name, slot.index}.text();
    switch (slot.stored) {
      case Stored::lengths:
        slot.array = array<Rank>(object, name, slot.shape, "int64", 8);
        break;
      case Stored::flags:
        slot.array = array<Rank>(object, name, slot.shape, "uint8", 1);
        break;
      case Stored::tokens:
        slot.array = array<Rank>(object, name, slot.shape, token_kind_, settings_.token_bytes);
        break;
      default:
        slot.array = array<Rank>(object, name, slot.shape, kind_, kSizes[static_cast<int>(problem_.dtype)]);
    }
    if (slot.family == Family::state && !slot.has && slot.array.data)
      fail(name + " is given; only cells with c have it");
    return true;
  }

  Arguments arguments(py::handle given, const char* role, std::vector<Params>& params) const {
    const Sizes& s = problem_.sizes;
    Arguments out;
    const py::object x = given.attr("x");
    if (!*role && !token_kind_.empty())
      fill(x, tokens_slot(problem_, out), role);
    else
      fill(x, x_slot(problem_, out), role);
    each_start(problem_, out, [&](const auto& slot) { return fill(given.attr(slot.name), slot, role); });
    const auto entries = py::reinterpret_borrow<py::sequence>(given.attr("params"));
    const int count = static_cast<int>(py::len(entries));
    if (count != 0 && count != s.L * s.D)
      fail(role + ("params has " + std::to_string(count)) + " entries; expected " + std::to_string(s.L * s.D));
    params.resize(static_cast<size_t>(count));
    for (int k = 0; k < count; ++k) {
      const auto entry = py::reinterpret_borrow<py::sequence>(entries[static_cast<size_t>(k)]);
      each_weight(problem_, k, params[static_cast<size_t>(k)], [&](const auto& slot) {
        return fill(py::object(entry[static_cast<size_t>(slot.part)]), slot, role);
      });
    }
    out.params = params.empty() ? nullptr : params.data();
    fill(given.attr("context"), context_slot(problem_, out), role);
    if (const py::object weights = given.attr("context_weights"); !weights.is_none())
      for (int d = 0; d < s.D; ++d)
        fill(py::object(py::sequence(weights)[static_cast<size_t>(d)]), context_weights_slot(problem_, out, d), role);
    return out;
  }

  Results results(py::handle given, const char* role) const {
    Results out;
    each_result(problem_, out, [&](const auto& slot) { return fill(given.attr(slot.name), slot, role); });
    fill(given.attr("cells"), cells_slot(problem_, out), role);
    return out;
  }

  Problem problem_;
  cuda::Settings settings_;
  std::string kind_, token_kind_;  // of the numbers, and of x where it is tokens
  std::vector<Params> p_params_, dp_params_;
  Arguments p_, dp_;
  size_t workspace_ = 0, tape_ = 0;
  const char* route_ = "";
};

class DeviceForward : public DeviceCall {
 public:
  DeviceForward(py::handle problem, py::handle p, py::handle out, bool keep, int route, int float32)
      : DeviceCall(problem, p, route, float32), keep_(keep), out_(results(out, "out.")) {
    cuda::Status status;
    const cuda::OnDevice device(p_.params[0].W.data, &status);
    raise(status);
    find_route(false);
    if (keep) raise(cuda::tape_bytes(problem_, settings_, &tape_));
    raise(cuda::forward_workspace_bytes(problem_, p_, out_, keep, settings_, &workspace_));
  }
  void run(uintptr_t tape, uintptr_t workspace, uintptr_t stream) {
    cuda::Status status;
    {
      const py::gil_scoped_release release;
      const cuda::OnDevice device(p_.params[0].W.data, &status);
      if (status.empty())
        status = cuda::forward(problem_, p_, out_, reinterpret_cast<void*>(tape), keep_,
                               reinterpret_cast<void*>(workspace), settings_, reinterpret_cast<void*>(stream));
    }
    raise(status);
  }

 private:
  bool keep_;
  Results out_;
};

class DeviceBackward : public DeviceCall {
 public:
  DeviceBackward(py::handle problem, py::handle p, py::handle g, py::handle dp, int route, int float32)
      : DeviceCall(problem, p, route, float32), g_(results(g, "g.")) {
    dp_ = arguments(dp, "dp.", dp_params_);
    cuda::Status status;
    const cuda::OnDevice device(p_.params[0].W.data, &status);
    raise(status);
    find_route(true);
    raise(cuda::tape_bytes(problem_, settings_, &tape_));
    raise(cuda::backward_workspace_bytes(problem_, p_, g_, dp_, settings_, &workspace_));
  }
  void run(uintptr_t tape, uintptr_t workspace, uintptr_t stream) {
    cuda::Status status;
    {
      const py::gil_scoped_release release;
      const cuda::OnDevice device(p_.params[0].W.data, &status);
      if (status.empty())
        status = cuda::backward(problem_, p_, reinterpret_cast<const void*>(tape), g_, dp_,
                                reinterpret_cast<void*>(workspace), settings_, reinterpret_cast<void*>(stream));
    }
    raise(status);
  }

 private:
  Results g_;
};

class DeviceJvp : public DeviceCall {
 public:
  DeviceJvp(py::handle problem, py::handle p, py::handle v, py::handle tout) : DeviceCall(problem, p, -1, 0) {
    v_ = arguments(v, "v.", v_params_);
    tout_ = results(tout, "tout.");
    cuda::Status status;
    const cuda::OnDevice device(p_.params[0].W.data, &status);
    raise(status);
    raise(cuda::jvp_workspace_bytes(problem_, p_, v_, tout_, settings_, &workspace_));
  }
  void run(uintptr_t workspace, uintptr_t stream) {
    cuda::Status status;
    {
      const py::gil_scoped_release release;
      const cuda::OnDevice device(p_.params[0].W.data, &status);
      if (status.empty())
        status = cuda::jvp(problem_, p_, v_, tout_, reinterpret_cast<void*>(workspace), settings_,
                           reinterpret_cast<void*>(stream));
    }
    raise(status);
  }

 private:
  std::vector<Params> v_params_;
  Arguments v_;
  Results tout_;
};

class DeviceHvp : public DeviceCall {
 public:
  DeviceHvp(py::handle problem, py::handle p, py::handle v, py::handle g, py::handle t, py::handle tdp, py::handle tout)
      : DeviceCall(problem, p, -1, 0), g_(results(g, "g.")), t_(results(t, "t.")) {
    v_ = arguments(v, "v.", v_params_);
    dp_ = arguments(tdp, "tdp.", dp_params_);
    if (!tout.is_none()) tout_ = results(tout, "tout.");
    cuda::Status status;
    const cuda::OnDevice device(p_.params[0].W.data, &status);
    raise(status);
    raise(cuda::hvp_workspace_bytes(problem_, p_, v_, g_, t_, dp_, tout_, settings_, &workspace_));
  }
  void run(uintptr_t workspace, uintptr_t stream) {
    cuda::Status status;
    {
      const py::gil_scoped_release release;
      const cuda::OnDevice device(p_.params[0].W.data, &status);
      if (status.empty())
        status = cuda::hvp(problem_, p_, v_, g_, t_, dp_, tout_, reinterpret_cast<void*>(workspace), settings_,
                           reinterpret_cast<void*>(stream));
    }
    raise(status);
  }

 private:
  std::vector<Params> v_params_;
  Arguments v_;
  Results g_, t_, tout_;
};

// Arrays of any rank as runs without gaps: axes by growing stride, the innermost ones joined.
std::vector<cuda::Span> spans_of(const py::sequence& arrays) {
  std::vector<cuda::Span> spans;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const py::object object = arrays[i];
    const std::string name = "arrays[" + std::to_string(i) + "]";
    const Dtype dtype = dtype_of(object.attr("kind").cast<std::string>(), name);
    const int64_t bytes = kSizes[static_cast<int>(dtype)];
    const auto shape = object.attr("shape").cast<std::vector<int64_t> >();
    const auto strides = object.attr("strides").cast<std::vector<int64_t> >();
    auto* start = static_cast<char*>(pointer_of(object));
    std::vector<std::pair<int64_t, int64_t> > axes;  // stride, extent
    int64_t elements = 1;
    for (size_t k = 0; k < shape.size(); ++k) {
      elements *= shape[k];
      if (shape[k] <= 1) continue;
      if (strides[k] < 0) start += strides[k] * (shape[k] - 1);
      axes.emplace_back(std::llabs(strides[k]), shape[k]);
    }
    if (elements == 0) continue;
    std::sort(axes.begin(), axes.end());
    int64_t covered = bytes;
    size_t inner = 0;
    while (inner < axes.size() && axes[inner].first == covered) covered *= axes[inner++].second;
    int64_t reach = covered;
    for (size_t k = inner; k < axes.size(); ++k) {
      if (axes[k].first < reach || axes[k].first % bytes != 0) fail(name + " has elements that share memory");
      reach += axes[k].first * (axes[k].second - 1);
    }
    std::vector<int64_t> index(axes.size(), 0);
    for (;;) {
      spans.push_back({start, covered / bytes, dtype});
      size_t k = inner;
      for (; k < axes.size(); ++k) {
        start += axes[k].first;
        if (++index[k] < axes[k].second) break;
        start -= axes[k].first * axes[k].second;
        index[k] = 0;
      }
      if (k == axes.size()) break;
    }
  }
  return spans;
}

size_t clip_workspace_bytes(const py::sequence& arrays) {
  const std::vector<cuda::Span> spans = spans_of(arrays);
  return cuda::clip_workspace_bytes(spans.data(), spans.size());
}

void clip_norm(const py::sequence& arrays, double order, double max_norm, uintptr_t norm, uintptr_t workspace,
               uintptr_t stream) {
  if (order != 1 && order != 2 && order != HUGE_VAL)
    fail("norm_type is " + std::to_string(order) + "; expected 1, 2 or inf");
  const std::vector<cuda::Span> spans = spans_of(arrays);
  cuda::Status status;
  const cuda::OnDevice device(reinterpret_cast<void*>(norm), &status);
  raise(status);
  raise(cuda::clip_norm(spans.data(), spans.size(), order, max_norm, reinterpret_cast<double*>(norm),
                        reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream)));
}

void clip_value(const py::sequence& arrays, double limit, uintptr_t stream) {
  const std::vector<cuda::Span> spans = spans_of(arrays);
  if (spans.empty()) return;
  cuda::Status status;
  const cuda::OnDevice device(spans[0].data, &status);
  raise(status);
  raise(cuda::clip_value(spans.data(), spans.size(), limit, reinterpret_cast<void*>(stream)));
}

// The checks that the front door has made of the four lists are not made again: they are on the device.
struct CtcCall {
  CtcCall(py::handle log_probs, const py::tuple& lists, int64_t blank, bool zero_infinity, py::handle loss,
          py::handle dloss, py::handle dlog_probs, int64_t most_labels, int64_t longest_row)
      : most(most_labels), longest(longest_row) {
    const auto kind = log_probs.attr("kind").cast<std::string>();
    call.dtype = dtype_of(kind, "log_probs");
    if (call.dtype != Dtype::f32 && call.dtype != Dtype::f64) fail("log_probs must be float32 or float64");
    const int64_t bytes = kSizes[static_cast<int>(call.dtype)];
    const auto sizes = log_probs.attr("shape").cast<std::vector<int64_t> >();
    if (sizes.size() != 3) fail("log_probs must have three axes (T, B, C)");
    call.T = sizes[0], call.B = sizes[1], call.C = sizes[2];
    call.blank = blank;
    call.zero_infinity = zero_infinity;
    const int64_t shape[3] = {call.T, call.B, call.C}, rows[1] = {call.B};
    call.log_probs = array<3>(log_probs, "log_probs", shape, kind, bytes);
    if (blank < 0 || blank >= call.C || most < 0 || longest < 0 || longest > call.T)
      fail("blank, most_labels or longest is out of range");
    const int64_t given[1] = {lists[0].attr("size").cast<int64_t>()};
    call.labels = static_cast<const int64_t*>(array<1>(lists[0], "labels", given, "int64", 8).data);
    const int64_t** places[] = {&call.first, &call.label_counts, &call.lengths};
    for (size_t i = 0; i < 3; ++i)
      *places[i] = static_cast<const int64_t*>(array<1>(lists[i + 1], "a list of rows", rows, "int64", 8).data);
    const Array<1> out = array<1>(loss, "loss", rows, kind, bytes), by = array<1>(dloss, "dloss", rows, kind, bytes);
    if (!out.data) fail("loss is None");
    if (call.B > 1 && (out.stride[0] != 1 || (by.data && by.stride[0] != 1))) fail("loss and dloss must be contiguous");
    call.loss = out.data;
    call.dloss = by.data;
    call.dlog_probs = array<3>(dlog_probs, "dlog_probs", shape, kind, bytes);
  }
  size_t workspace_bytes() const { return cuda::ctc_workspace_bytes(call, most, longest); }
  void run(uintptr_t workspace, uintptr_t stream) const {
    cuda::Status status;
    const cuda::OnDevice device(call.loss, &status);
    raise(status);
    raise(cuda::ctc(call, most, longest, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream)));
  }

  Ctc call;
  int64_t most, longest;
};

py::tuple devices() {
  std::vector<cuda::Found> found;
  const cuda::Status why = cuda::devices(&found);
  py::list list;
  for (const cuda::Found& d : found) list.append(py::make_tuple(d.name, d.compute, d.multiprocessors, d.bytes));
  return py::make_tuple(list, why);
}

void upload(uintptr_t to, const py::buffer& from, uintptr_t stream) {
  const py::buffer_info info = from.request();
  cuda::Status status;
  const cuda::OnDevice device(reinterpret_cast<void*>(to), &status);
  raise(status);
  raise(cuda::upload(reinterpret_cast<void*>(to), info.ptr, static_cast<size_t>(info.size * info.itemsize),
                     reinterpret_cast<void*>(stream)));
}

void download(const py::buffer& to, uintptr_t from, uintptr_t stream) {
  const py::buffer_info info = to.request(true);
  cuda::Status status;
  const cuda::OnDevice device(reinterpret_cast<void*>(from), &status);
  raise(status);
  {
    const py::gil_scoped_release release;
    status = cuda::download(info.ptr, reinterpret_cast<void*>(from), static_cast<size_t>(info.size * info.itemsize),
                            reinterpret_cast<void*>(stream));
  }
  raise(status);
}

}  // namespace

void register_cuda(py::module_& module) {
  py::module_ m = module.def_submodule("cuda");
  m.attr("architectures") = std::string(cuda::built_for());
  m.def("devices", &devices);
  py::class_<DeviceForward>(m, "Forward")
      .def(py::init<py::handle, py::handle, py::handle, bool, int, int>(), py::arg("problem"), py::arg("p"),
           py::arg("out"), py::arg("keep"), py::arg("route"), py::arg("float32"))
      .def_property_readonly("route", &DeviceForward::route)
      .def_property_readonly("tape_bytes", &DeviceForward::tape_bytes)
      .def_property_readonly("workspace_bytes", &DeviceForward::workspace_bytes)
      .def("run", &DeviceForward::run, py::arg("tape"), py::arg("workspace"), py::arg("stream"));
  py::class_<DeviceBackward>(m, "Backward")
      .def(py::init<py::handle, py::handle, py::handle, py::handle, int, int>(), py::arg("problem"), py::arg("p"),
           py::arg("g"), py::arg("dp"), py::arg("route"), py::arg("float32"))
      .def_property_readonly("route", &DeviceBackward::route)
      .def_property_readonly("tape_bytes", &DeviceBackward::tape_bytes)
      .def_property_readonly("workspace_bytes", &DeviceBackward::workspace_bytes)
      .def("run", &DeviceBackward::run, py::arg("tape"), py::arg("workspace"), py::arg("stream"));
  py::class_<DeviceJvp>(m, "Jvp")
      .def(py::init<py::handle, py::handle, py::handle, py::handle>(), py::arg("problem"), py::arg("p"), py::arg("v"),
           py::arg("tout"))
      .def_property_readonly("workspace_bytes", &DeviceJvp::workspace_bytes)
      .def("run", &DeviceJvp::run, py::arg("workspace"), py::arg("stream"));
  py::class_<DeviceHvp>(m, "Hvp")
      .def(py::init<py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle>(),
           py::arg("problem"), py::arg("p"), py::arg("v"), py::arg("g"), py::arg("t"), py::arg("tdp"), py::arg("tout"))
      .def_property_readonly("workspace_bytes", &DeviceHvp::workspace_bytes)
      .def("run", &DeviceHvp::run, py::arg("workspace"), py::arg("stream"));
  m.def("clip_workspace_bytes", &clip_workspace_bytes, py::arg("arrays"));
  m.def("clip_norm", &clip_norm, py::arg("arrays"), py::arg("norm_type"), py::arg("max_norm"), py::arg("norm"),
        py::arg("workspace"), py::arg("stream"));
  m.def("clip_value", &clip_value, py::arg("arrays"), py::arg("limit"), py::arg("stream"));
  py::class_<CtcCall>(m, "Ctc")
      .def(
          py::init<py::handle, const py::tuple&, int64_t, bool, py::handle, py::handle, py::handle, int64_t, int64_t>(),
          py::arg("log_probs"), py::arg("lists"), py::arg("blank"), py::arg("zero_infinity"), py::arg("loss"),
          py::arg("dloss"), py::arg("dlog_probs"), py::arg("most_labels"), py::arg("longest"))
      .def_property_readonly("workspace_bytes", &CtcCall::workspace_bytes)
      .def("run", &CtcCall::run, py::arg("workspace"), py::arg("stream"));
  m.def("upload", &upload, py::arg("to"), py::arg("buffer"), py::arg("stream"));
  m.def("download", &download, py::arg("buffer"), py::arg("from_"), py::arg("stream"));
}

#endif

}  // namespace fusedrnn::bindings
