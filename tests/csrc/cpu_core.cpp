// SPDX-License-Identifier: Apache-2.0
// The CPU core against a reference of its own: one naive forward, generic over the number, in float64. Run on plain
// numbers it gives forward; on dual numbers jvp; on a reverse-mode graph backward; on a graph of dual numbers hvp. It
// shares no formula and no code with csrc/. Prints tensor, first bad coordinate and both values; exits non-zero.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/cpu.h"

using namespace fusedrnn;

namespace {

// ---- numbers ----

struct Dual {
  double v = 0, t = 0;
  Dual() = default;
  Dual(double value, double tangent = 0) : v(value), t(tangent) {}
};
Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.t + b.t}; }
Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.t - b.t}; }
Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.v * b.t + a.t * b.v}; }
double value(double x) { return x; }
double value(Dual x) { return x.v; }
double exp_of(double x) { return std::exp(x); }
Dual exp_of(Dual x) { return {std::exp(x.v), x.t * std::exp(x.v)}; }
double inverse(double x) { return 1 / x; }
Dual inverse(Dual x) { return {1 / x.v, -x.t / (x.v * x.v)}; }

// A node of the graph: its value and up to two parents with the slopes towards them.
template <class T>
struct Graph {
  struct Node {
    int parent[2];
    T slope[2];
    double clip;  // > 0: the gradient that arrives is clamped before it goes on
  };
  static std::vector<Node> nodes;
};
template <class T>
std::vector<typename Graph<T>::Node> Graph<T>::nodes;

template <class T>
struct Var {
  T v{};
  int node = -1;
  Var() = default;
  Var(double x) : v(x) {}
  Var(T x, int a, T da, int b, T db, double clip = 0) : v(x), node(static_cast<int>(Graph<T>::nodes.size())) {
    Graph<T>::nodes.push_back({{a, b}, {da, db}, clip});
  }
};
template <class T>
Var<T> operator+(Var<T> a, Var<T> b) {
  return {a.v + b.v, a.node, T(1), b.node, T(1)};
}
template <class T>
Var<T> operator-(Var<T> a, Var<T> b) {
  return {a.v - b.v, a.node, T(1), b.node, T(-1)};
}
template <class T>
Var<T> operator*(Var<T> a, Var<T> b) {
  return {a.v * b.v, a.node, b.v, b.node, a.v};
}
template <class T>
Var<T> exp_of(Var<T> a) {
  return {exp_of(a.v), a.node, exp_of(a.v), -1, T(0)};
}
template <class T>
Var<T> inverse(Var<T> a) {
  return {inverse(a.v), a.node, T(-1) * inverse(a.v) * inverse(a.v), -1, T(0)};
}
template <class T>
double value(Var<T> a) {
  return value(a.v);
}
// The number as it is, its gradient clamped on the way back.
template <class N>
N clip_gradient(N a, double) {
  return a;
}
template <class T>
Var<T> clip_gradient(Var<T> a, double limit) {
  return {a.v, a.node, T(1), -1, T(0), limit};
}

template <class N>
N sigmoid(N x) {
  return inverse(N(1) + exp_of(N(0) - x));
}
template <class N>
N tanh_of(N x) {
  return N(2) * sigmoid(N(2) * x) - N(1);
}
template <class N>
N clamp(N x, double limit) {
  if (limit <= 0) return x;
  return value(x) >= limit ? N(limit) : value(x) <= -limit ? N(-limit) : x;
}

// ---- the reference ----

struct Case {
  Problem p;
  bool bias = true, states = true, share_p = false, share_d = false, cells = true;
  int layout = 0;  // how arrays lie in memory
  std::vector<int64_t> lengths;
  std::vector<uint8_t> reset;
  int64_t length(int64_t e, int64_t b) const {
    return lengths.empty() ? p.sizes.T : lengths[static_cast<size_t>(e * p.sizes.B + b)];
  }
  bool is_reset(int64_t t, int64_t e, int64_t b) const {
    return !reset.empty() && reset[static_cast<size_t>((t * p.sizes.E + e) * p.sizes.B + b)];
  }
  int64_t inputs(int l) const { return l ? p.sizes.D * p.sizes.H : p.sizes.I; }
  int64_t gates() const {
    return p.cell == CellKind::lstm ? 4 : p.cell == CellKind::gru || p.cell == CellKind::gru_reset_before ? 3 : 1;
  }
  bool lstm() const { return p.cell == CellKind::lstm; }
};

template <class N>
struct Set {  // all arguments or all results, dense
  std::vector<N> x, h0, c0;
  std::vector<std::vector<N>> W, R, bW, bR;
  std::vector<N> y, hn, cn, cells;
};

double keep(const Case& c, int layer, uint64_t n) {
  uint32_t counter[4] = {static_cast<uint32_t>(n / 4), static_cast<uint32_t>(n / 4 >> 32), static_cast<uint32_t>(layer),
                         0};
  uint32_t key[2] = {static_cast<uint32_t>(c.p.seed), static_cast<uint32_t>(c.p.seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * counter[0], p1 = 0xCD9E8D57ull * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(p0)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter[n % 4] < c.p.dropout * 4294967296.0 ? 0 : 1 / (1 - c.p.dropout);
}

template <class N>
void reference(const Case& c, Set<N>& s) {
  const Sizes& n = c.p.sizes;
  const int64_t G = c.gates(), H = n.H;
  const size_t out = static_cast<size_t>(n.T * n.E * n.B * n.D * H),
               states = static_cast<size_t>(n.L * n.D * n.E * n.B * H);
  s.y.assign(out, N(0));
  s.cells.assign(out * static_cast<size_t>(n.L), N(0));
  s.hn.assign(states, N(0));
  s.cn.assign(states, N(0));
  auto at = [](std::vector<N>& v, int64_t i) -> N& { return v[static_cast<size_t>(i)]; };
  std::vector<N> input = s.x;
  for (int l = 0; l < n.L; ++l) {
    const int64_t I = c.inputs(l);
    std::vector<N> output(out, N(0));
    for (int d = 0; d < n.D; ++d)
      for (int64_t e = 0; e < n.E; ++e)
        for (int64_t b = 0; b < n.B; ++b) {
          const int64_t ld = l * n.D + d, state = ((ld * n.E + e) * n.B + b) * H, length = c.length(e, b);
          const bool reversed = d == 1 || c.p.reverse;
          std::vector<N> h(static_cast<size_t>(H), N(0)), cc(h), h_start(h), c_start(h);
          for (int64_t u = 0; u < H && c.states; ++u) {
            h_start[static_cast<size_t>(u)] = at(s.h0, state + u);
            if (c.lstm()) c_start[static_cast<size_t>(u)] = at(s.c0, state + u);
          }
          h = h_start;
          cc = c_start;
          for (int64_t step = 0; step < length; ++step) {
            const int64_t t = reversed ? length - 1 - step : step;
            const bool cut = reversed ? t + 1 < length && c.is_reset(t + 1, e, b) : c.is_reset(t, e, b);
            if (cut) {
              h = h_start;
              cc = c_start;
              if (!c.p.reset_to_initial) h.assign(static_cast<size_t>(H), N(0)), cc = h;
            }
            const int64_t row = (t * n.E + e) * n.B + b;
            auto x_part = [&](int64_t m) {
              N sum(0);
              for (int64_t i = 0; i < I; ++i)
                sum = sum + at(input, row * I + i) * at(s.W[static_cast<size_t>(ld)], (e * G * H + m) * I + i);
              return c.bias ? sum + at(s.bW[static_cast<size_t>(ld)], e * G * H + m) : sum;
            };
            auto h_part = [&](int64_t m, const std::vector<N>& by) {
              N sum(0);
              for (int64_t i = 0; i < H; ++i)
                sum = sum + by[static_cast<size_t>(i)] * at(s.R[static_cast<size_t>(ld)], (e * G * H + m) * H + i);
              return c.bias ? sum + at(s.bR[static_cast<size_t>(ld)], e * G * H + m) : sum;
            };
            std::vector<N> next(h), c_next(cc), rh(h);
            if (c.p.cell == CellKind::gru_reset_before)
              for (int64_t u = 0; u < H; ++u)
                rh[static_cast<size_t>(u)] = sigmoid(x_part(u) + h_part(u, h)) * h[static_cast<size_t>(u)];
            for (int64_t u = 0; u < H; ++u) {
              const size_t k = static_cast<size_t>(u);
              if (c.lstm()) {
                const N in = sigmoid(x_part(u) + h_part(u, h)), forget = sigmoid(x_part(H + u) + h_part(H + u, h));
                const N g = tanh_of(x_part(2 * H + u) + h_part(2 * H + u, h));
                const N o = sigmoid(x_part(3 * H + u) + h_part(3 * H + u, h));
                const N raw = clamp(forget * cc[k] + in * g, c.p.clip_cell);
                next[k] = o * tanh_of(raw);
                c_next[k] = raw;
              } else if (c.p.cell == CellKind::gru) {
                const N r = sigmoid(x_part(u) + h_part(u, h)), z = sigmoid(x_part(H + u) + h_part(H + u, h));
                const N m = tanh_of(x_part(2 * H + u) + r * h_part(2 * H + u, h));
                next[k] = (N(1) - z) * m + z * h[k];
              } else if (c.p.cell == CellKind::gru_reset_before) {
                const N z = sigmoid(x_part(H + u) + h_part(H + u, h));
                const N m = tanh_of(x_part(2 * H + u) + h_part(2 * H + u, rh));
                next[k] = (N(1) - z) * m + z * h[k];
              } else {
                const N a = x_part(u) + h_part(u, h);
                next[k] = c.p.cell == CellKind::rnn_tanh ? tanh_of(a) : value(a) > 0 ? a : N(0);
              }
            }
            if (c.p.clip_grad > 0)
              for (int64_t u = 0; u < H; ++u) {
                next[static_cast<size_t>(u)] = clip_gradient(next[static_cast<size_t>(u)], c.p.clip_grad);
                if (c.lstm())
                  c_next[static_cast<size_t>(u)] = clip_gradient(c_next[static_cast<size_t>(u)], c.p.clip_grad);
              }
            h = next;
            cc = c_next;
            for (int64_t u = 0; u < H; ++u) {
              const int64_t j = row * n.D * H + d * H + u;
              at(output, j) = h[static_cast<size_t>(u)];
              at(s.cells, l * static_cast<int64_t>(out) + j) = (c.lstm() ? cc : h)[static_cast<size_t>(u)];
            }
          }
          for (int64_t u = 0; u < H; ++u) {
            at(s.hn, state + u) = h[static_cast<size_t>(u)];
            at(s.cn, state + u) = cc[static_cast<size_t>(u)];
          }
        }
    if (l + 1 == n.L) {
      s.y = output;
    } else {
      input = output;
      if (c.p.dropout > 0)
        for (size_t j = 0; j < out; ++j) input[j] = input[j] * N(keep(c, l, j));
    }
  }
}

// ---- arrays in odd memory layouts ----

// A dense array of float64 as an array of S: axes in a chosen order, gaps, poison all around.
template <class S, int Rank>
struct Laid {
  std::vector<S> memory;
  int64_t size[Rank], stride[Rank], start = 0;
  int64_t count = 1;

  // layout: 0 dense; 1 first two axes swapped and rows padded; 2 inner stride 2; 3 last axis but one backwards
  Laid(std::initializer_list<int64_t> sizes, int layout, bool share = false, int share_axis = 0) {
    std::copy(sizes.begin(), sizes.end(), size);
    int order[Rank];
    for (int i = 0; i < Rank; ++i) order[i] = i;
    if (layout == 1 && Rank >= 3) std::swap(order[0], order[Rank - 2]);
    int64_t next = layout == 2 ? 2 : 1;
    for (int i = Rank - 1; i >= 0; --i) {
      const int axis = order[i];
      stride[axis] = next;
      if (share && axis == share_axis) {
        stride[axis] = 0;
        continue;
      }
      next *= std::max<int64_t>(size[axis], 1);
      if (layout == 1 && i == Rank - 1) next += 3;
    }
    memory.resize(static_cast<size_t>(next) + 8);
    poison();
    start = 4;
    if (layout == 3 && Rank >= 2 && size[Rank - 2] > 0) {
      start += (size[Rank - 2] - 1) * stride[Rank - 2];
      stride[Rank - 2] = -stride[Rank - 2];
    }
    for (int64_t s : size) count *= s;
  }
  void poison() { std::memset(static_cast<void*>(memory.data()), 0xFF, memory.size() * sizeof(S)); }
  S& operator[](int64_t n) {
    int64_t at = start;
    for (int i = Rank - 1; i >= 0; --i) {
      at += n % size[i] * stride[i];
      n /= size[i];
    }
    return memory[static_cast<size_t>(at)];
  }
  std::string coordinate(int64_t n) const {
    std::string text;
    for (int i = Rank - 1; i >= 0; --i) {
      text = std::to_string(n % size[i]) + (text.empty() ? "" : ",") + text;
      n /= size[i];
    }
    return "(" + text + ")";
  }
  Laid& operator=(const std::vector<double>& from) {
    for (int64_t i = 0; i < count; ++i) (*this)[i] = static_cast<S>(from[static_cast<size_t>(i)]);
    return *this;
  }
  Array<Rank> array() {
    Array<Rank> a;
    a.data = memory.data() + start;
    std::copy(stride, stride + Rank, a.stride);
    return a;
  }
  // Elements written beside the array.
  bool strayed() {
    std::vector<S> copy = memory;
    for (int64_t i = 0; i < count; ++i) std::memset(static_cast<void*>(&(*this)[i]), 0xFF, sizeof(S));
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory.data());
    const bool bad = std::any_of(bytes, bytes + memory.size() * sizeof(S), [](unsigned char b) { return b != 0xFF; });
    memory = copy;
    return bad;
  }
};

int failures = 0, checks = 0;
std::string context;

template <class S, int Rank>
void expect(const char* name, Laid<S, Rank>& got, const std::vector<double>& want, double tolerance) {
  ++checks;
  double size = 1;
  for (double w : want) size = std::max(size, std::abs(w));
  for (int64_t i = 0; i < got.count; ++i) {
    const double g = static_cast<double>(got[i]), w = want[static_cast<size_t>(i)];
    if (std::abs(g - w) <= tolerance * size) continue;
    if (++failures <= 20)
      std::printf("FAIL %s: %s%s is %.9g, expected %.9g\n", context.c_str(), name, got.coordinate(i).c_str(), g, w);
    return;
  }
  if (got.strayed() && ++failures <= 20)
    std::printf("FAIL %s: %s: memory beside the array was written\n", context.c_str(), name);
}

// All arrays of one role, as the core sees them.
template <class S>
struct Arrays {
  Laid<S, 4> x, h0, c0;
  std::vector<Laid<S, 3>> W, R;
  std::vector<Laid<S, 2>> bW, bR;
  std::vector<Params> params;
  Laid<S, 4> y, hn, cn;
  Laid<S, 5> cells;

  Arrays(const Case& c, bool share_weights, int layout)
      : x({c.p.sizes.T, c.p.sizes.E, c.p.sizes.B, c.p.sizes.I}, layout),
        h0({c.p.sizes.L * c.p.sizes.D, c.p.sizes.E, c.p.sizes.B, c.p.sizes.H}, layout),
        c0({c.p.sizes.L * c.p.sizes.D, c.p.sizes.E, c.p.sizes.B, c.p.sizes.H}, layout),
        y({c.p.sizes.T, c.p.sizes.E, c.p.sizes.B, c.p.sizes.D * c.p.sizes.H}, layout),
        hn({c.p.sizes.L * c.p.sizes.D, c.p.sizes.E, c.p.sizes.B, c.p.sizes.H}, layout),
        cn({c.p.sizes.L * c.p.sizes.D, c.p.sizes.E, c.p.sizes.B, c.p.sizes.H}, layout),
        cells({c.p.sizes.L, c.p.sizes.T, c.p.sizes.E, c.p.sizes.B, c.p.sizes.D * c.p.sizes.H}, layout) {
    const Sizes& n = c.p.sizes;
    for (int i = 0; i < n.L * n.D; ++i) {
      W.emplace_back(std::initializer_list<int64_t>{n.E, c.gates() * n.H, c.inputs(i / n.D)}, layout, share_weights);
      R.emplace_back(std::initializer_list<int64_t>{n.E, c.gates() * n.H, n.H}, layout, share_weights);
      bW.emplace_back(std::initializer_list<int64_t>{n.E, c.gates() * n.H}, layout, share_weights);
      bR.emplace_back(std::initializer_list<int64_t>{n.E, c.gates() * n.H}, layout, share_weights);
    }
  }
  void fill_arguments(const Set<double>& s) {
    x = s.x, h0 = s.h0, c0 = s.c0;
    for (size_t i = 0; i < W.size(); ++i) W[i] = s.W[i], R[i] = s.R[i], bW[i] = s.bW[i], bR[i] = s.bR[i];
  }
  void fill_results(const Set<double>& s) { y = s.y, hn = s.hn, cn = s.cn, cells = s.cells; }
  Arguments arguments(const Case& c) {
    Arguments a;
    a.x = x.array();
    if (c.states) a.h0 = h0.array();
    if (c.states && c.lstm()) a.c0 = c0.array();
    params.clear();
    for (size_t i = 0; i < W.size(); ++i) {
      Params p;
      p.W = W[i].array(), p.R = R[i].array();
      if (c.bias) p.bW = bW[i].array(), p.bR = bR[i].array();
      params.push_back(p);
    }
    a.params = params.data();
    return a;
  }
  Results results(const Case& c) {
    Results r;
    r.y = y.array(), r.hn = hn.array();
    if (c.lstm()) r.cn = cn.array();
    if (c.cells) r.cells = cells.array();
    return r;
  }
  void expect_results(const char* name, const Case& c, const Set<double>& want, double tolerance) {
    const std::string n(name);
    expect((n + "y").c_str(), y, want.y, tolerance);
    expect((n + "hn").c_str(), hn, want.hn, tolerance);
    if (c.lstm()) expect((n + "cn").c_str(), cn, want.cn, tolerance);
    if (c.cells) expect((n + "cells").c_str(), cells, want.cells, tolerance);
  }
  void expect_arguments(const char* name, const Case& c, const Set<double>& want, double tolerance) {
    const std::string n(name);
    expect((n + "x").c_str(), x, want.x, tolerance);
    if (c.states) expect((n + "h0").c_str(), h0, want.h0, tolerance);
    if (c.states && c.lstm()) expect((n + "c0").c_str(), c0, want.c0, tolerance);
    for (size_t i = 0; i < W.size(); ++i) {
      const std::string l = "[" + std::to_string(i) + "]";
      expect((n + "W" + l).c_str(), W[i], want.W[i], tolerance);
      expect((n + "R" + l).c_str(), R[i], want.R[i], tolerance);
      if (c.bias) expect((n + "bW" + l).c_str(), bW[i], want.bW[i], tolerance);
      if (c.bias) expect((n + "bR" + l).c_str(), bR[i], want.bR[i], tolerance);
    }
  }
};

std::mt19937_64 generator(20240607);
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Random values as they will be after rounding to float, so that both precisions see the same numbers.
std::vector<double> random_values(int64_t count, double size) {
  std::vector<double> v(static_cast<size_t>(count));
  for (double& x : v) x = static_cast<double>(static_cast<float>(uniform(-size, size)));
  return v;
}
// The same values for each of `E` sets.
std::vector<double> shared_values(int64_t E, int64_t count, double size, bool share) {
  std::vector<double> v = random_values(share ? count : E * count, size);
  if (share)
    for (int64_t e = 1; e < E; ++e) v.insert(v.end(), v.begin(), v.begin() + count);
  if (share && E == 0) v.clear();
  return v;
}

Set<double> random_arguments(const Case& c, double size) {
  const Sizes& n = c.p.sizes;
  const int64_t states = n.L * n.D * n.E * n.B * n.H, rows = c.gates() * n.H;
  Set<double> s;
  s.x = random_values(n.T * n.E * n.B * n.I, size);
  s.h0 = random_values(states, size);
  s.c0 = random_values(states, size);
  const double scale = size / std::sqrt(static_cast<double>(n.H));
  for (int i = 0; i < n.L * n.D; ++i) {
    s.W.push_back(shared_values(n.E, rows * c.inputs(i / n.D), scale, c.share_p));
    s.R.push_back(shared_values(n.E, rows * n.H, scale * 1.5, c.share_p));
    s.bW.push_back(shared_values(n.E, rows, scale, c.share_p));
    s.bR.push_back(shared_values(n.E, rows, scale, c.share_p));
  }
  return s;
}
Set<double> random_results(const Case& c, double size) {
  const Sizes& n = c.p.sizes;
  const int64_t states = n.L * n.D * n.E * n.B * n.H, out = n.T * n.E * n.B * n.D * n.H;
  Set<double> s;
  s.y = random_values(out, size);
  s.hn = random_values(states, size);
  s.cn = random_values(states, size);
  s.cells = random_values(out * n.L, size);
  return s;
}

// ---- what the reference says ----

void each_argument(const Case& c, auto&& s, auto&& f) {
  f(s.x, 0);
  if (c.states) f(s.h0, 1), f(s.c0, 2);
  for (size_t i = 0; i < s.W.size(); ++i)
    f(s.W[i], 3 + 4 * i), f(s.R[i], 4 + 4 * i), f(s.bW[i], 5 + 4 * i), f(s.bR[i], 6 + 4 * i);
}
std::vector<double>& argument(Set<double>& s, size_t number) {
  if (number < 3) return number == 0 ? s.x : number == 1 ? s.h0 : s.c0;
  const size_t i = (number - 3) / 4, which = (number - 3) % 4;
  return which == 0 ? s.W[i] : which == 1 ? s.R[i] : which == 2 ? s.bW[i] : s.bR[i];
}
template <class N>
Set<N> convert(const Set<double>& s, std::function<N(size_t argument, size_t index, double value)> f) {
  Set<N> out;
  auto vector = [&](const std::vector<double>& from, size_t number) {
    std::vector<N> to(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = f(number, i, from[i]);
    return to;
  };
  out.x = vector(s.x, 0);
  out.h0 = vector(s.h0, 1);
  out.c0 = vector(s.c0, 2);
  for (size_t i = 0; i < s.W.size(); ++i) {
    out.W.push_back(vector(s.W[i], 3 + 4 * i));
    out.R.push_back(vector(s.R[i], 4 + 4 * i));
    out.bW.push_back(vector(s.bW[i], 5 + 4 * i));
    out.bR.push_back(vector(s.bR[i], 6 + 4 * i));
  }
  return out;
}

// Reverse sweep. `seed(result, which, index)`: gradient of that result.
template <class T>
Set<T> reverse(const Case& c, const std::function<T(size_t, size_t, double)>& lift, const Set<double>& p,
               const std::function<T(int, size_t)>& seed) {
  Graph<T>::nodes.clear();
  auto leaf = [&](size_t number, size_t index, double v) {
    Var<T> x;
    x = Var<T>(lift(number, index, v), -1, T(0), -1, T(0));
    return x;
  };
  Set<Var<T>> s = convert<Var<T>>(p, leaf);
  const Set<Var<T>> leaves = s;
  reference(c, s);
  std::vector<T> grad(Graph<T>::nodes.size(), T(0));
  auto plant = [&](const std::vector<Var<T>>& v, int which) {
    for (size_t i = 0; i < v.size(); ++i)
      if (v[i].node >= 0) grad[static_cast<size_t>(v[i].node)] = grad[static_cast<size_t>(v[i].node)] + seed(which, i);
  };
  plant(s.y, 0);
  plant(s.hn, 1);
  if (c.lstm()) plant(s.cn, 2);
  if (c.cells) plant(s.cells, 3);
  for (size_t i = Graph<T>::nodes.size(); i-- > 0;) {
    const auto& node = Graph<T>::nodes[i];
    const T g = node.clip > 0 ? clamp(grad[i], node.clip) : grad[i];
    for (int k = 0; k < 2; ++k)
      if (node.parent[k] >= 0) {
        T& to = grad[static_cast<size_t>(node.parent[k])];
        to = to + g * node.slope[k];
      }
  }
  Set<T> out;
  auto collect = [&](const std::vector<Var<T>>& v) {
    std::vector<T> g(v.size());
    for (size_t i = 0; i < v.size(); ++i) g[i] = grad[static_cast<size_t>(v[i].node)];
    return g;
  };
  out.x = collect(leaves.x), out.h0 = collect(leaves.h0), out.c0 = collect(leaves.c0);
  for (size_t i = 0; i < leaves.W.size(); ++i) {
    out.W.push_back(collect(leaves.W[i])), out.R.push_back(collect(leaves.R[i]));
    out.bW.push_back(collect(leaves.bW[i])), out.bR.push_back(collect(leaves.bR[i]));
  }
  return out;
}

std::vector<double> tangents(const std::vector<Dual>& v) {
  std::vector<double> t(v.size());
  for (size_t i = 0; i < v.size(); ++i) t[i] = v[i].t;
  return t;
}
Set<double> tangents(const Set<Dual>& s) {
  Set<double> t;
  t.x = tangents(s.x), t.h0 = tangents(s.h0), t.c0 = tangents(s.c0);
  for (size_t i = 0; i < s.W.size(); ++i)
    t.W.push_back(tangents(s.W[i])), t.R.push_back(tangents(s.R[i])), t.bW.push_back(tangents(s.bW[i])),
        t.bR.push_back(tangents(s.bR[i]));
  t.y = tangents(s.y), t.hn = tangents(s.hn), t.cn = tangents(s.cn), t.cells = tangents(s.cells);
  return t;
}
// Shared gradients hold the sum over E.
Set<double> add_up(const Case& c, Set<double> s) {
  if (!c.share_d) return s;
  auto fold = [&](std::vector<double>& v) {
    const size_t E = static_cast<size_t>(c.p.sizes.E), part = E ? v.size() / E : 0;
    for (size_t i = 0; i < part; ++i) {
      double sum = 0;
      for (size_t e = 0; e < E; ++e) sum += v[e * part + i];
      for (size_t e = 0; e < E; ++e) v[e * part + i] = sum;
    }
  };
  for (size_t i = 0; i < s.W.size(); ++i) fold(s.W[i]), fold(s.R[i]), fold(s.bW[i]), fold(s.bR[i]);
  return s;
}

// ---- one case: all four operations, each instruction set, several numbers of threads ----

template <class S>
void run(Case c, const Set<double>& p, const Set<double>& v, const Set<double>& g, const Set<double>& t,
         const Set<double>& want, const Set<double>& want_backward, const Set<double>& want_jvp,
         const Set<double>& want_hvp) {
  c.p.dtype = sizeof(S) == 8 ? Dtype::f64 : Dtype::f32;
  if (!c.lengths.empty()) c.p.lengths = {c.lengths.data(), {c.p.sizes.B, 1}};
  if (!c.reset.empty()) c.p.reset = {c.reset.data(), {c.p.sizes.E * c.p.sizes.B, c.p.sizes.B, 1}};
  const double tolerance = sizeof(S) == 8 ? 2e-11 : 2e-5;
  Arrays<S> arguments(c, c.share_p, c.layout), direction(c, c.share_p, c.layout);
  Arrays<S> gradients(c, false, c.layout), gradient_tangents(c, false, c.layout);
  arguments.fill_arguments(p);
  direction.fill_arguments(v);
  gradients.fill_results(g);
  gradient_tangents.fill_results(t);
  const std::string base = context;
  std::vector<std::vector<S>> bits;  // results of one thread, to compare with
  auto remember = [&](Arrays<S>& a, bool first, size_t& slot) {
    auto one = [&](auto& laid) {
      if (first)
        bits.push_back(laid.memory);
      else if (std::memcmp(bits[slot].data(), laid.memory.data(), laid.memory.size() * sizeof(S)) != 0 &&
               ++failures <= 20)
        std::printf("FAIL %s: bits differ from one thread's (array %zu)\n", context.c_str(), slot);
      ++slot;
    };
    one(a.x), one(a.h0), one(a.c0), one(a.y), one(a.hn), one(a.cn), one(a.cells);
    for (size_t i = 0; i < a.W.size(); ++i) one(a.W[i]), one(a.R[i]), one(a.bW[i]), one(a.bR[i]);
  };
  for (const char* isa : cpu::isas_found()) {
    if (!cpu::set_isa(isa)) std::abort();
    bits.clear();
    for (int threads = 1; threads <= 3; ++threads) {
      context = base + " " + (sizeof(S) == 8 ? "f64 " : "f32 ") + isa + " threads=" + std::to_string(threads);
      size_t slot = 0;
      {
        Arrays<S> out(c, false, c.layout);
        cpu::forward(c.p, arguments.arguments(c), out.results(c), nullptr, -threads);
        out.expect_results("inference ", c, want, tolerance);
        remember(out, threads == 1, slot);
      }
      {
        Arrays<S> out(c, false, c.layout), d(c, c.share_d, c.layout);
        const size_t elements = cpu::tape_elements(c.p);
        std::vector<S> tape(elements + 16);
        std::memset(static_cast<void*>(tape.data()), 0xFF, tape.size() * sizeof(S));
        cpu::forward(c.p, arguments.arguments(c), out.results(c), tape.data(), -threads);
        out.expect_results("", c, want, tolerance);
        cpu::backward(c.p, arguments.arguments(c), tape.data(), gradients.results(c), d.arguments(c), -threads);
        d.expect_arguments("d", c, want_backward, tolerance);
        remember(out, threads == 1, slot);
        remember(d, threads == 1, slot);
        for (size_t i = elements; i < tape.size(); ++i)
          if (!std::isnan(static_cast<double>(tape[i])) && ++failures <= 20)
            std::printf("FAIL %s: memory behind the tape was written\n", context.c_str());
      }
      {
        Arrays<S> out(c, false, c.layout);
        cpu::jvp(c.p, arguments.arguments(c), direction.arguments(c), out.results(c), -threads);
        out.expect_results("jvp ", c, want_jvp, tolerance * 4);
        remember(out, threads == 1, slot);
      }
      {
        Arrays<S> d(c, c.share_d, c.layout);
        cpu::hvp(c.p, arguments.arguments(c), direction.arguments(c), gradients.results(c),
                 gradient_tangents.results(c), d.arguments(c), -threads);
        d.expect_arguments("hvp ", c, want_hvp, tolerance * 8);
        remember(d, threads == 1, slot);
      }
    }
  }
  context = base;
}

const char* cell_name(CellKind k) {
  static const char* const names[] = {"rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"};
  return names[static_cast<int>(k)];
}

void check(const Case& c) {
  const Sizes& n = c.p.sizes;
  char text[256];
  std::snprintf(
      text, sizeof text, "%s T=%d E=%d B=%d I=%d H=%d L=%d D=%d%s%s%s%s%s%s%s%s%s layout=%d", cell_name(c.p.cell),
      static_cast<int>(n.T), static_cast<int>(n.E), static_cast<int>(n.B), static_cast<int>(n.I), static_cast<int>(n.H),
      n.L, n.D, c.p.reverse ? " reverse" : "", c.lengths.empty() ? "" : " lengths",
      c.reset.empty()        ? ""
      : c.p.reset_to_initial ? " reset-to-initial"
                             : " reset",
      c.p.recompute ? " recompute" : "", c.p.clip_cell > 0 ? " clip_cell" : "", c.p.clip_grad > 0 ? " clip_grad" : "",
      c.p.dropout > 0 ? " dropout" : "", c.share_p ? " shared" : "", c.share_d ? " summed" : "", c.layout);
  context = text;
  const Set<double> p = random_arguments(c, 0.8), v = random_arguments(c, 0.5), g = random_results(c, 0.5),
                    t = random_results(c, 0.5);
  Set<double> want = p;
  reference(c, want);
  Set<double> vv = v;
  const Set<Dual> dual = [&] {
    Set<Dual> s = convert<Dual>(p, [&](size_t number, size_t i, double x) { return Dual(x, argument(vv, number)[i]); });
    reference(c, s);
    return s;
  }();
  auto of = [](const Set<double>& s, int which) -> const std::vector<double>& {
    return which == 0 ? s.y : which == 1 ? s.hn : which == 2 ? s.cn : s.cells;
  };
  const Set<double> backward = reverse<double>(
      c, [](size_t, size_t, double x) { return x; }, p, [&](int which, size_t i) { return of(g, which)[i]; });
  const Set<Dual> hvp = reverse<Dual>(
      c, [&](size_t number, size_t i, double x) { return Dual(x, argument(vv, number)[i]); }, p,
      [&](int which, size_t i) { return Dual(of(g, which)[i], of(t, which)[i]); });
  const Set<double> want_backward = add_up(c, backward), want_jvp = tangents(dual), want_hvp = add_up(c, tangents(hvp));
  run<double>(c, p, v, g, t, want, want_backward, want_jvp, want_hvp);
  run<float>(c, p, v, g, t, want, want_backward, want_jvp, want_hvp);
}

Case make(CellKind cell, int64_t T, int64_t E, int64_t B, int64_t I, int64_t H, int L = 1, int D = 1) {
  Case c;
  c.p.cell = cell;
  c.p.sizes = {T, E, B, I, H, L, D};
  return c;
}
void add_lengths(Case& c) {
  for (int64_t i = 0; i < c.p.sizes.E * c.p.sizes.B; ++i) c.lengths.push_back(pick(0, c.p.sizes.T));
}
void add_resets(Case& c) {
  for (int64_t i = 0; i < c.p.sizes.T * c.p.sizes.E * c.p.sizes.B; ++i) c.reset.push_back(pick(0, 3) == 0 ? 7 : 0);
}

// The reference's own backward against finite differences of its own forward: the judge is judged, too.
void check_judge() {
  for (int cell = 0; cell < 5; ++cell) {
    Case c = make(static_cast<CellKind>(cell), 4, 1, 2, 3, 3, 2, 2);
    add_lengths(c);
    add_resets(c);
    c.p.reset_to_initial = true;
    c.p.dropout = 0.3;
    const Set<double> p = random_arguments(c, 0.8), g = random_results(c, 0.5);
    auto loss = [&](Set<double> s) {
      reference(c, s);
      double sum = 0;
      for (size_t i = 0; i < s.y.size(); ++i) sum += s.y[i] * g.y[i];
      for (size_t i = 0; i < s.hn.size(); ++i) sum += s.hn[i] * g.hn[i] + (c.lstm() ? s.cn[i] * g.cn[i] : 0);
      for (size_t i = 0; i < s.cells.size(); ++i) sum += s.cells[i] * g.cells[i];
      return sum;
    };
    Set<double> grad = reverse<double>(
        c, [](size_t, size_t, double x) { return x; }, p,
        [&](int which, size_t i) {
          return (which == 0 ? g.y : which == 1 ? g.hn : which == 2 ? g.cn : g.cells)[i];
        });
    for (size_t number = 0; number < 3 + 4 * p.W.size(); ++number) {
      Set<double> q = p;
      std::vector<double>& values = argument(q, number);
      for (size_t i = 0; i < values.size(); i += 1 + values.size() / 7) {
        const double x = values[i], step = 1e-5;
        values[i] = x + step;
        const double up = loss(q);
        values[i] = x - step;
        const double slope = (up - loss(q)) / (2 * step), said = argument(grad, number)[i];
        values[i] = x;
        ++checks;
        if (std::abs(slope - said) > 1e-7 && ++failures <= 20)
          std::printf("FAIL the reference itself: %s argument %zu element %zu: slope %.9g, gradient %.9g\n",
                      cell_name(c.p.cell), number, i, slope, said);
      }
    }
  }
}

void check_functions() {
  // One RNN step with weight 1 shows tanh; one GRU step with zero weights but one shows sigmoid.
  for (const char* isa : cpu::isas_found()) {
    cpu::set_isa(isa);
    std::vector<float> x;
    for (double e = -30; e < 5; e += 0.001) x.push_back(static_cast<float>(std::exp2(e))), x.push_back(-x.back());
    const int64_t n = static_cast<int64_t>(x.size());
    std::vector<float> y(x.size()), one(1, 1.0f), zero(1, 0.0f);
    Problem p;
    p.cell = CellKind::rnn_tanh;
    p.sizes = {1, 1, n, 1, 1, 1, 1};
    Params w;
    w.W = {one.data(), {1, 1, 1}};
    w.R = {zero.data(), {1, 1, 1}};
    Arguments a;
    a.x = {x.data(), {n, n, 1, 1}};
    a.params = &w;
    Results r;
    r.y = {y.data(), {n, n, 1, 1}};
    cpu::forward(p, a, r, nullptr, 1);
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = std::tanh(static_cast<double>(x[i]));
      worst = std::max(worst, std::abs(y[i] - want) / std::abs(want));
    }
    ++checks;
    if (!(worst < 3e-7) && ++failures) std::printf("FAIL tanh %s: relative error %.3g\n", isa, worst);
    // GRU with n = tanh(0) = 0 from zero weights: h = z * h0, so h0 = 1 shows sigmoid.
    std::vector<float> W{0, 1, 0}, R(3, 0.0f), h0(x.size(), 1.0f);
    p.cell = CellKind::gru;
    w.W = {W.data(), {3, 1, 1}};
    w.R = {R.data(), {3, 1, 1}};
    a.h0 = {h0.data(), {n, n, 1, 1}};
    cpu::forward(p, a, r, nullptr, 1);
    worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = 1 / (1 + std::exp(-static_cast<double>(x[i])));
      worst = std::max(worst, std::abs(y[i] - want) / want);
    }
    ++checks;
    if (!(worst < 3e-7) && ++failures) std::printf("FAIL sigmoid %s: relative error %.3g\n", isa, worst);
    // NaN goes through, infinity saturates.
    p.cell = CellKind::rnn_tanh;
    w.W = {one.data(), {1, 1, 1}};
    w.R = {zero.data(), {1, 1, 1}};
    a.h0 = {};
    for (float special : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -1e30f}) {
      std::fill(x.begin(), x.end(), special);
      cpu::forward(p, a, r, nullptr, 1);
      const double want = std::tanh(static_cast<double>(special));
      ++checks;
      if (!(std::isnan(want) ? std::isnan(y[0]) : y[0] == want) && ++failures)
        std::printf("FAIL tanh(%g) %s: %g\n", static_cast<double>(special), isa, static_cast<double>(y[0]));
    }
  }
}

void check_clip() {
  for (const char* isa : cpu::isas_found()) {
    cpu::set_isa(isa);
    for (int64_t n : {0, 1, 7, 64, 1003}) {
      std::vector<double> d = random_values(n, 2);
      std::vector<float> f(d.begin(), d.end());
      double squares = 0, sizes = 0, most = 0;
      for (double x : d) squares += x * x, sizes += std::abs(x), most = std::max(most, std::abs(x));
      const cpu::Span spans[2] = {{d.data(), n, Dtype::f64}, {f.data(), n, Dtype::f32}};
      const double got[3] = {cpu::global_norm(spans, 2, 2), cpu::global_norm(spans, 2, 1),
                             cpu::global_norm(spans, 2, std::numeric_limits<double>::infinity())};
      const double want[3] = {std::sqrt(2 * squares), 2 * sizes, most};
      for (int i = 0; i < 3; ++i) {
        ++checks;
        if (std::abs(got[i] - want[i]) > 1e-12 * (1 + want[i]) && ++failures)
          std::printf("FAIL norm %d %s n=%d: %.17g, expected %.17g\n", i, isa, static_cast<int>(n), got[i], want[i]);
      }
      if (n) f[0] = std::numeric_limits<float>::quiet_NaN();
      cpu::clip_value(spans, 2, 1.25);
      cpu::scale(spans, 2, 0.5);
      for (int64_t i = 0; i < n; ++i) {
        ++checks;
        const bool good =
            std::abs(d[static_cast<size_t>(i)]) <= 0.625 &&
            (i ? f[static_cast<size_t>(i)] == static_cast<float>(d[static_cast<size_t>(i)]) : std::isnan(f[0]));
        if (!good && ++failures <= 20)
          std::printf("FAIL clip_value, scale %s n=%d i=%d\n", isa, static_cast<int>(n), static_cast<int>(i));
      }
      if (n &&
          (!std::isnan(cpu::global_norm(spans, 2, std::numeric_limits<double>::infinity())) ||
           !std::isnan(cpu::global_norm(spans, 2, 2))) &&
          ++failures)
        std::printf("FAIL norm of NaN %s\n", isa);
    }
  }
}

// Inference with weights stored as bfloat16: exact where the weights are.
void check_bf16() {
  for (int cell = 0; cell < 5; ++cell) {
    for (int64_t B : {1, 2, 3}) {
      for (int64_t H : {1, 5, 16, 37}) {
        Case c = make(static_cast<CellKind>(cell), 6, 1, B, 7, H, 2);
        c.p.bf16_weights = true;
        Set<double> p = random_arguments(c, 0.8);
        std::vector<std::vector<uint16_t>> half[2];
        for (int which = 0; which < 2; ++which)
          for (std::vector<double>& values : which ? p.R : p.W) {
            half[which].emplace_back();
            for (double& x : values) {
              const float f = static_cast<float>(x);
              uint32_t bits;
              std::memcpy(&bits, &f, sizeof bits);
              half[which].back().push_back(static_cast<uint16_t>(bits >> 16));
              bits &= 0xffff0000u;
              float back;
              std::memcpy(&back, &bits, sizeof back);
              x = back;
            }
          }
        Set<double> want = p;
        reference(c, want);
        Arrays<float> arguments(c, false, 0);
        arguments.fill_arguments(p);
        for (const char* isa : cpu::isas_found()) {
          cpu::set_isa(isa);
          for (int threads = 1; threads <= 2; ++threads) {
            context = std::string("bf16 ") + cell_name(c.p.cell) + " B=" + std::to_string(B) +
                      " H=" + std::to_string(H) + " " + isa;
            Arguments a = arguments.arguments(c);
            for (size_t i = 0; i < half[0].size(); ++i) {
              arguments.params[i].W.data = half[0][i].data();
              arguments.params[i].R.data = half[1][i].data();
            }
            Arrays<float> out(c, false, 0);
            cpu::forward(c.p, a, out.results(c), nullptr, -threads);
            out.expect_results("", c, want, 2e-5);
          }
        }
      }
    }
  }
}

// A forked child of a process that has run threads still computes, and the same bits.
void check_fork() {
  Case c = make(CellKind::lstm, 5, 1, 3, 4, 40);
  Arrays<float> arguments(c, false, 0), out(c, false, 0), again(c, false, 0);
  arguments.fill_arguments(random_arguments(c, 0.8));
  cpu::forward(c.p, arguments.arguments(c), out.results(c), nullptr, -2);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a child that waits for threads it does not have
    cpu::forward(c.p, arguments.arguments(c), again.results(c), nullptr, -2);
    _exit(std::memcmp(again.y.memory.data(), out.y.memory.data(), out.y.memory.size() * sizeof(float)));
  }
  int status = 0;
  waitpid(child, &status, 0);
  ++checks;
  if (status != 0 && ++failures) std::printf("FAIL fork: the child ended with status %d\n", status);
}

}  // namespace

int main(int argc, char** argv) {
  cpu::ignore_crowd(true);
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 6;
  check_judge();
  check_functions();
  check_clip();
  check_bf16();
  check_fork();
  for (int cell = 0; cell < 5; ++cell) {
    const auto kind = static_cast<CellKind>(cell);
    for (int64_t H : {1, 7, 16, 17, 33}) check(make(kind, 3, 1, 2, 3, H));
    for (int64_t B : {1, 5, 6, 13, 25}) check(make(kind, 3, 1, B, 5, 9));
    check(make(kind, 0, 1, 3, 2, 5));
    check(make(kind, 3, 1, 0, 2, 5));
    check(make(kind, 1, 1, 1, 1, 1));
    check(make(kind, 2, 1, 2, 0, 3));
    check(make(kind, 2, 1, 1, 70, 66));
    check(make(kind, 40, 1, 1, 3, 5));
  }
  for (int round = 0; round < rounds; ++round) {
    for (int cell = 0; cell < 5; ++cell) {
      Case c = make(static_cast<CellKind>(cell), pick(1, 9), pick(0, 2) ? 1 : pick(2, 3), pick(1, 4), pick(1, 6),
                    pick(1, 20), static_cast<int>(pick(1, 3)), static_cast<int>(pick(1, 2)));
      c.p.reverse = c.p.sizes.D == 1 && pick(0, 1);
      c.p.reset_to_initial = pick(0, 1);
      c.p.recompute = pick(0, 2) == 0;
      c.bias = pick(0, 3);
      c.states = pick(0, 3);
      c.cells = pick(0, 1);
      c.share_p = pick(0, 1);
      c.share_d = c.share_p && pick(0, 1);
      c.layout = static_cast<int>(pick(0, 3));
      if (pick(0, 2) == 0) c.p.clip_cell = 0.2;
      if (pick(0, 2) == 0) c.p.clip_grad = 0.3;
      if (pick(0, 2) == 0) c.p.dropout = 0.4, c.p.seed = 0x123456789abcdefull + static_cast<uint64_t>(round);
      if (pick(0, 1)) add_lengths(c);
      if (pick(0, 1)) add_resets(c);
      check(c);
    }
  }
  std::printf("%s: %d checks, %d failures\n", failures ? "FAILED" : "passed", checks, failures);
  return failures ? 1 : 0;
}
