// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda on the CPU twin of the device, on arrays of exactly the size they need, and says what
// is wrong with what they wrote. `run_forward<Shape>` gives an empty string when all is well.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>

// clang-format off: the device comes first, then what the cells call, then the cells, then the kernels
#include "device_cpu.h"
#include "cuda/gates.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/forward.h"
#include "cuda/backward.h"
#include "cuda/pack.h"
// clang-format on
#include "cuda_reference.h"
#include "cuda_runs.h"

namespace fusedrnn::test {

template <class T>
struct TypeName;
template <>
struct TypeName<dev::F16> {
  static constexpr const char* name = "f16";
  static constexpr double budget = 1.5e-3;  // one rounding of a value below 2, and what it does over five steps
};
template <>
struct TypeName<dev::BF16> {
  static constexpr const char* name = "bf16";
  static constexpr double budget = 1.2e-2;
};
template <>
struct TypeName<dev::TF32> {
  static constexpr const char* name = "tf32";
  static constexpr double budget = 1e-3;  // h on the edge between two tf32 numbers may go either way
};

template <>
struct TypeName<cuda::TF32x3> {
  static constexpr const char* name = "3xtf32";
  static constexpr double budget = 1e-6;  // a few roundings of float32, of sums of some dozens
};
template <>
struct TypeName<cuda::F32> {
  static constexpr const char* name = "f32";
  static constexpr double budget = 1e-6;
};

template <class C>
constexpr Cell cell_of() {
  if constexpr (C::cell_state)
    return Cell::lstm;
  else if constexpr (C::gates == 3)
    return Cell::gru;
  else
    return std::is_same_v<C, cells::Rnn<true>> ? Cell::rnn_relu : Cell::rnn_tanh;
}

constexpr const char* kCellNames[] = {"rnn_tanh", "rnn_relu", "lstm", "gru"};
constexpr const char* kRouteNames[] = {"single", "cluster", "grid"};

// An array of exactly n elements, so that the sanitizer knows its end; filled with NaN. malloc aligns to 16 bytes.
template <class T>
class Heap {
 public:
  explicit Heap(size_t n) : size_(n), data_(static_cast<T*>(std::malloc(bytes()))) {
    std::memset(data_, 0xFF, bytes());
  }
  ~Heap() { std::free(data_); }
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  T* get() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return size_; }

 private:
  size_t bytes() const { return size_ * sizeof(T) < 1 ? 1 : size_ * sizeof(T); }
  size_t size_;
  T* data_;
};

template <class T>
double rounded(double v) {
  return static_cast<double>(T::load(T::store(static_cast<float>(v))));
}
template <class T>
double as_operand(double v) {
  return static_cast<double>(T::load(T::operand(T::store(static_cast<float>(v)))));
}

// Inputs, already of the type the kernel sees.
template <class T>
Data make_data(const Case& c, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto S = static_cast<size_t>(c.E * c.D), H = static_cast<size_t>(c.H), B = static_cast<size_t>(c.B);
  const auto steps = static_cast<size_t>(c.T) * B * S, G = static_cast<size_t>(gates_of(c.cell));
  const auto fill = [&](std::vector<double>& v, size_t n, double scale, bool on = true) {
    std::uniform_real_distribution<double> u(-scale, scale);
    v.assign(n, 0);
    if (on)
      for (double& x : v) x = rounded<T>(u(random));
  };
  Data d;
  const double weight = c.cell == Cell::rnn_relu ? 1.0 : 2.0;
  fill(d.gx, steps * G * H, 1.0);
  fill(d.R, S * G * H * H, weight / std::sqrt(static_cast<double>(c.H)));
  fill(d.bias, S * static_cast<size_t>(sums_of(c.cell)) * H, 0.5, c.with_bias);
  fill(d.h0, S * B * H, 1.0, c.with_state);
  fill(d.c0, S * B * H, 1.0, c.with_state);
  fill(d.dy, steps * H, 1.0);
  fill(d.dhn, S * B * H, 1.0);
  fill(d.dcn, S * B * H, 1.0);
  fill(d.dcells, steps * H, 1.0);
  d.lengths.assign(static_cast<size_t>(c.E) * B, c.T);
  if (c.with_lengths)
    for (size_t i = 0; i < d.lengths.size(); ++i)
      d.lengths[i] = i == 0 ? c.T : static_cast<int64_t>(random() % static_cast<uint64_t>(c.T + 1));
  d.reset.assign(static_cast<size_t>(c.T * c.E) * B, 0);
  if (c.with_reset)
    for (uint8_t& r : d.reset) r = random() % 3 == 0;
  if (c.with_nan) {
    d.gx[random() % d.gx.size()] = NAN;
    d.gx[random() % d.gx.size()] = -INFINITY;
    if (c.with_state) d.h0[random() % d.h0.size()] = NAN;
  }
  return d;
}

inline bool close(double got, double expected, double budget) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  return std::fabs(got - expected) <= budget * (1 + std::fabs(expected));
}

// The first coordinate that is off, both values; or nothing.
class Compare {
 public:
  explicit Compare(double budget) : budget_(budget) {}
  void value(const char* what, int set, int64_t t, int b, int j, double got, double expected, double times = 1) {
    if (!std::isnan(expected) && !std::isinf(expected)) worst_ = std::fmax(worst_, std::fabs(got - expected));
    if (!wrong_.empty() || close(got, expected, budget_ * times)) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s[set %d, t %d, row %d, unit %d] is %.7g, expected %.7g", what, set,
                  static_cast<int>(t), b, j, got, expected);
    wrong_ = text;
  }
  const std::string& wrong() const { return wrong_; }
  double worst() const { return worst_; }

 private:
  double budget_;
  double worst_ = 0;
  std::string wrong_;
};

template <class T>
void put(Heap<typename T::Storage>& to, const std::vector<double>& from) {
  for (size_t i = 0; i < from.size(); ++i) to[i] = T::store(static_cast<float>(from[i]));
}

// What both passes share: the kernel's own copies of everything, padded as it wants them.
template <class S>
struct Arrays {
  using T = typename S::T;
  using Storage = typename T::Storage;
  const Case& c;
  size_t H = static_cast<size_t>(c.H), B = static_cast<size_t>(c.B), Tn = static_cast<size_t>(c.T);
  size_t sets = static_cast<size_t>(c.E * c.D), G = S::kGates;
  size_t pitch = (H + 7) / 8 * 8;
  int peers = S::kRoute == cuda::Route::single ? 1 : (c.H + S::kUnits - 1) / S::kUnits;
  int row_tiles = (c.B + S::kRows - 1) / S::kRows;
  Heap<Storage> gx{sets * Tn * B * G * pitch}, extra{sets * Tn * B * pitch}, cells{sets * Tn * B * pitch},
      prev{sets * Tn * B * pitch};
  Heap<Storage> R{sets * G * H * H}, h0{sets * B * H}, c0{sets * B * H};
  Heap<float> bias{sets * S::Cell::sums * pitch};
  size_t y_pitch = static_cast<size_t>(c.D) * H;
  Heap<Storage> y{Tn * static_cast<size_t>(c.E) * B * y_pitch}, hn{sets * B * H}, cn{sets * B * H};
  Heap<int64_t> lengths{static_cast<size_t>(c.E) * B};
  Heap<uint8_t> reset{Tn * static_cast<size_t>(c.E) * B};
  int late = 0;

  int64_t y_row() const { return static_cast<int64_t>(y_pitch); }
  size_t y_at(int set, int t, int b) const {
    return ((static_cast<size_t>(t) * static_cast<size_t>(c.E) + static_cast<size_t>(set / c.D)) * B +
            static_cast<size_t>(b)) *
               y_pitch +
           static_cast<size_t>(set % c.D) * H;
  }
  int grid() const { return static_cast<int>(sets) * row_tiles * peers; }
  int cluster() const { return S::kRoute == cuda::Route::cluster ? peers : 1; }
};

template <class S, class Ref>
void check_forward(const Case& c, Arrays<S>& m, const Ref& ref, const Data& d, Compare& compare) {
  using T = typename S::T;
  using Cell = typename S::Cell;
  const auto load = [](typename T::Storage v) { return static_cast<double>(T::load(v)); };
  for (int set = 0; set < ref.sets(); ++set)
    for (int b = 0; b < c.B; ++b) {
      for (int j = 0; j < c.H; ++j) {
        const auto ju = static_cast<size_t>(j);
        compare.value("hn", set, 0, b, j, load(m.hn[ref.state(set, b) + ju]), d.hn[ref.state(set, b) + ju]);
        if (Cell::cell_state)
          compare.value("cn", set, 0, b, j, load(m.cn[ref.state(set, b) + ju]), d.cn[ref.state(set, b) + ju], 2);
      }
      for (int t = 0; t < c.T; ++t) {
        const size_t at = ref.step(set, t, b);
        for (int j = 0; j < c.H; ++j) {
          const auto ju = static_cast<size_t>(j);
          compare.value("y", set, t, b, j, load(m.y[m.y_at(set, t, b) + ju]), d.y[at * m.H + ju]);
          if (!c.keep || t >= ref.length(set, b)) continue;
          compare.value("prev", set, t, b, j, load(m.prev[at * m.pitch + ju]), as_operand<T>(d.prev[at * m.H + ju]));
          if (Cell::cell_state)
            compare.value("cells", set, t, b, j, load(m.cells[at * m.pitch + ju]), d.cells[at * m.H + ju], 2);
          for (size_t k = 0; k < m.G; ++k)
            compare.value("kept", set, t, b, j, load(m.gx[(at * m.G + k) * m.pitch + ju]),
                          d.kept[(at * 5 + k) * m.H + ju]);
          if (Cell::kept > S::kGates)
            compare.value("extra", set, t, b, j, load(m.extra[at * m.pitch + ju]), d.kept[(at * 5 + m.G) * m.H + ju],
                          2);
        }
      }
    }
}

template <class S>
void fill_arrays(const Case& c, Arrays<S>& m, const Data& d) {
  using T = typename S::T;
  for (size_t at = 0; at < m.sets * m.Tn * m.B; ++at)
    for (size_t k = 0; k < m.G; ++k)
      for (size_t j = 0; j < m.H; ++j)
        m.gx[(at * m.G + k) * m.pitch + j] = T::store(static_cast<float>(d.gx[(at * m.G + k) * m.H + j]));
  put<T>(m.R, d.R);
  put<T>(m.h0, d.h0);
  put<T>(m.c0, d.c0);
  for (size_t n = 0; n < m.sets * S::Cell::sums; ++n)
    for (size_t j = 0; j < m.H; ++j) m.bias[n * m.pitch + j] = static_cast<float>(d.bias[n * m.H + j]);
  for (size_t i = 0; i < d.lengths.size(); ++i) m.lengths[i] = d.lengths[i];
  for (size_t i = 0; i < d.reset.size(); ++i) m.reset[i] = d.reset[i];
  (void)c;
}

template <class S, class Args>
void set_common(const Case& c, Arrays<S>& m, Args& a) {
  a.Tn = c.T;
  a.B = c.B;
  a.H = c.H;
  a.pitch = static_cast<int>(m.pitch);
  a.sets = static_cast<int>(m.sets);
  a.directions = c.D;
  a.peers = m.peers;
  a.row_tiles = m.row_tiles;
  a.reverse = c.reverse;
  a.reset_to_initial = c.reset_to_initial;
  a.lengths = c.with_lengths ? m.lengths.get() : nullptr;
  a.len_e = c.B;
  a.len_b = 1;
  a.reset = c.with_reset ? m.reset.get() : nullptr;
  a.reset_t = static_cast<int64_t>(c.E) * c.B;
  a.reset_e = c.B;
  a.reset_b = 1;
  a.late = &m.late;
}

template <class S>
Outcome run_forward(const Case& c, const dev::sim::Options& options, uint64_t data_seed) {
  using T = typename S::T;
  using Kernel = cuda::Forward<S>;
  Data d = make_data<T>(c, data_seed);
  Reference ref{c, d, as_operand<T>};
  ref.forward();
  Arrays<S> m{.c = c};
  fill_arrays<S>(c, m, d);

  using Pack = cuda::PackForward<S>;
  Heap<dev::U4> weights(static_cast<size_t>(Pack::pieces(m.peers)) * m.sets);
  const auto Hl = static_cast<int64_t>(m.H);
  const Pack pack{{m.R.get(), Hl * Hl * S::kGates, Hl, 1, weights.get(), c.H, m.peers, static_cast<int>(m.sets)}};
  const size_t slots = m.sets * (m.Tn + 1) * static_cast<size_t>(m.row_tiles) * (m.pitch / T::kPer) * S::kTiles * 8;
  Heap<dev::U4> hand_off(S::kRoute == cuda::Route::grid ? slots : 0);

  cuda::ForwardArgs<T> a{};
  set_common(c, m, a);
  a.keep = c.keep;
  a.wide = c.H % T::kPer == 0;
  a.clip_cell = static_cast<float>(c.clip_cell);
  a.weights = weights.get();
  a.bias = c.with_bias ? m.bias.get() : nullptr;
  a.gx = m.gx.get();
  if (c.keep) {
    a.extra = m.extra.get();
    a.cells = m.cells.get();
    a.prev = m.prev.get();
  }
  a.h0 = c.with_state ? m.h0.get() : nullptr;
  a.c0 = c.with_state ? m.c0.get() : nullptr;
  a.y = m.y.get();
  a.hn = m.hn.get();
  a.cn = m.cn.get();
  a.y_b = m.y_row();
  a.y_e = m.y_row() * c.B;
  a.y_t = m.y_row() * c.B * c.E;
  a.y_d = Hl;
  a.hand_off = hand_off.get();
  try {
    dev::sim::launch(2, 1, Pack::kThreads, 0, pack, {.seed = options.seed});
    dev::sim::launch(m.grid(), m.cluster(), Kernel::kThreads, Kernel::shared_bytes(), Kernel{a}, options);
  } catch (const dev::sim::Failure& failure) {
    return {failure.what(), 0};
  }
  if (m.late) return {"a wait was given up", 0};
  Compare compare(TypeName<T>::budget);
  check_forward<S>(c, m, ref, d, compare);
  return {compare.wrong(), compare.worst()};
}

// The tape is the reference's own, rounded; so a pass is judged without the other.
template <class S>
Outcome run_backward(const Case& c, const dev::sim::Options& options, uint64_t data_seed) {
  using T = typename S::T;
  using Storage = typename T::Storage;
  using Cell = typename S::Cell;
  using Kernel = cuda::Backward<S>;
  Case sound = c;
  sound.with_nan = false;
  Data d = make_data<T>(sound, data_seed);
  if (c.with_nan) d.dy[data_seed * 7 % d.dy.size()] = NAN;
  Reference ref{c, d, as_operand<T>};
  ref.forward();
  for (std::vector<double>* v : {&d.kept, &d.cells, &d.prev, &d.cell_prev})
    for (double& x : *v) x = rounded<T>(x);
  ref.backward(rounded<T>);

  Arrays<S> m{.c = c};
  fill_arrays<S>(c, m, d);
  const auto store = [](double v) { return T::store(static_cast<float>(v)); };
  Heap<Storage> dy(m.y.size()), dcells(m.y.size()), dhn(m.hn.size()), dcn(m.cn.size()), dh0(m.hn.size()),
      dc0(m.cn.size());
  put<T>(dhn, d.dhn);
  put<T>(dcn, d.dcn);
  for (int set = 0; set < ref.sets(); ++set)
    for (int b = 0; b < c.B; ++b)
      for (int t = 0; t < c.T; ++t) {
        const size_t at = ref.step(set, t, b);
        for (size_t j = 0; j < m.H; ++j) {
          dy[m.y_at(set, t, b) + j] = store(d.dy[at * m.H + j]);
          dcells[m.y_at(set, t, b) + j] = store(d.dcells[at * m.H + j]);
          if (t >= ref.length(set, b)) continue;  // there the tape is whatever was there before
          for (size_t k = 0; k < m.G; ++k) m.gx[(at * m.G + k) * m.pitch + j] = store(d.kept[(at * 5 + k) * m.H + j]);
          m.extra[at * m.pitch + j] = store(d.kept[(at * 5 + m.G) * m.H + j]);
          m.cells[at * m.pitch + j] = store(d.cells[at * m.H + j]);
          m.prev[at * m.pitch + j] = store(d.prev[at * m.H + j]);
        }
      }
  const bool in_place = c.with_lengths;  // the gradients go where the gates were
  Heap<Storage> da(in_place ? 0 : m.gx.size()), da_h(in_place ? 0 : m.extra.size());

  using Pack = cuda::PackBackward<S>;
  Heap<dev::U4> weights(static_cast<size_t>(Pack::pieces(m.peers)) * m.sets);
  const auto Hl = static_cast<int64_t>(m.H);
  const Pack pack{{m.R.get(), Hl * Hl * S::kGates, Hl, 1, weights.get(), c.H, m.peers, static_cast<int>(m.sets)}};
  const size_t slots = m.sets * m.Tn * static_cast<size_t>(m.row_tiles) * (m.G * m.pitch / T::kPer) * S::kTiles * 8;
  Heap<dev::U4> hand_off(S::kRoute == cuda::Route::grid ? slots : 0);

  cuda::BackwardArgs<T> a{};
  set_common(c, m, a);
  a.wide = c.H % T::kPer == 0;
  a.clip_cell = static_cast<float>(c.clip_cell);
  a.clip_grad = static_cast<float>(c.clip_grad);
  a.weights = weights.get();
  a.gx = m.gx.get();
  a.extra = m.extra.get();
  a.cells = m.cells.get();
  a.prev = m.prev.get();
  a.da = in_place ? m.gx.get() : da.get();
  a.da_h = in_place ? m.extra.get() : da_h.get();
  a.c0 = c.with_state ? m.c0.get() : nullptr;
  a.dy = dy.get();
  a.dcells = dcells.get();
  a.dhn = dhn.get();
  a.dcn = dcn.get();
  a.dh0 = dh0.get();
  a.dc0 = dc0.get();
  a.dy_b = a.dcells_b = m.y_row();
  a.dy_e = a.dcells_e = m.y_row() * c.B;
  a.dy_t = a.dcells_t = m.y_row() * c.B * c.E;
  a.dy_d = a.dcells_d = Hl;
  a.hand_off = hand_off.get();
  try {
    dev::sim::launch(2, 1, Pack::kThreads, 0, pack, {.seed = options.seed});
    dev::sim::launch(m.grid(), m.cluster(), Kernel::kThreads, Kernel::shared_bytes(), Kernel{a}, options);
  } catch (const dev::sim::Failure& failure) {
    return {failure.what(), 0};
  }
  if (m.late) return {"a wait was given up", 0};
  const auto load = [](Storage v) { return static_cast<double>(T::load(v)); };
  Compare compare(TypeName<T>::budget);
  constexpr size_t kSums = Cell::sums;
  for (int set = 0; set < ref.sets(); ++set)
    for (int b = 0; b < c.B; ++b) {
      for (int t = 0; t < c.T; ++t) {
        const size_t at = ref.step(set, t, b);
        for (size_t j = 0; j < m.H; ++j) {
          for (size_t k = 0; k < m.G; ++k)
            compare.value("da", set, t, b, static_cast<int>(j), load(a.da[(at * m.G + k) * m.pitch + j]),
                          d.da[(at * kSums + static_cast<size_t>(Cell::x_sum[k])) * m.H + j]);
          if (Cell::kept > S::kGates)
            compare.value("da_h", set, t, b, static_cast<int>(j), load(a.da_h[at * m.pitch + j]),
                          d.da[(at * kSums + kSums - 1) * m.H + j]);
        }
      }
      for (size_t j = 0; j < m.H; ++j) {
        const size_t at = ref.state(set, b) + j;
        compare.value("dh0", set, 0, b, static_cast<int>(j), load(dh0[at]), d.dh0[at], 2);
        if (Cell::cell_state) compare.value("dc0", set, 0, b, static_cast<int>(j), load(dc0[at]), d.dc0[at], 2);
      }
    }
  return {compare.wrong(), compare.worst()};
}

}  // namespace fusedrnn::test
