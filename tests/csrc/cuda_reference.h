// SPDX-License-Identifier: Apache-2.0
// The recurrence in float64, one row at a time, straight from docs/semantics.md; shares no code with what it judges.
// The kernels round what enters a product (weights, h) to their type; the reference is told how, so that budgets can
// be narrow.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace fusedrnn::test {

enum class Cell { rnn_tanh, rnn_relu, lstm, gru };

inline int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
inline int sums_of(Cell cell) { return cell == Cell::gru ? 4 : gates_of(cell); }

struct Case {
  Cell cell = Cell::lstm;
  int T = 1, E = 1, B = 1, H = 1, D = 1;
  bool reverse = false, with_state = true, with_bias = true, with_lengths = false, with_reset = false;
  bool reset_to_initial = false, keep = true, with_nan = false;
  double clip_cell = 0, clip_grad = 0;
};

// Everything of one call. Arrays: gx (S,T,B,G,H), R (S,G,H,H), bias (S,sums,H), h0, c0 (S,B,H), S = E*D sets.
struct Data {
  std::vector<double> gx, R, bias, h0, c0;
  std::vector<int64_t> lengths;  // (E,B), always filled
  std::vector<uint8_t> reset;    // (T,E,B), always filled
  // results
  std::vector<double> y, hn, cn;            // y (S,T,B,H)
  std::vector<double> kept, cells, prev;    // kept (S,T,B,5,H): what Cell::kept names; prev: h before the step
  std::vector<double> cell_prev, cell_raw;  // c before the step; c before it was clipped
  // gradients, in: dy (S,T,B,H), dhn, dcn (S,B,H), dcells (S,T,B,H); out: da (S,T,B,sums,H), dh0, dc0
  std::vector<double> dy, dhn, dcn, dcells, da, dh0, dc0;
};

struct Reference {
  const Case& c;
  Data& d;
  std::function<double(double)> operand;  // what a product sees of a value

  int sets() const { return c.E * c.D; }
  bool backwards(int set) const { return c.D == 2 ? set % 2 == 1 : c.reverse; }
  int64_t length(int set, int b) const { return d.lengths[static_cast<size_t>(set / c.D * c.B + b)]; }
  bool boundary(int set, int b, int64_t t) const {  // a new sequence begins at t
    return d.reset[static_cast<size_t>((t * c.E + set / c.D) * c.B + b)] != 0;
  }
  size_t step(int set, int64_t t, int b) const {
    return static_cast<size_t>((set * static_cast<int64_t>(c.T) + t) * c.B + b);
  }
  size_t state(int set, int b) const { return static_cast<size_t>((set * c.B + b) * c.H); }
  // Is the state replaced before the step at time t is taken?
  bool restarts(int set, int b, int64_t t) const {
    return backwards(set) ? t + 1 < length(set, b) && boundary(set, b, t + 1) : boundary(set, b, t);
  }

  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

  void forward() {
    const auto H = static_cast<size_t>(c.H);
    const size_t steps = static_cast<size_t>(sets() * c.T * c.B), states = static_cast<size_t>(sets() * c.B) * H;
    d.y.assign(steps * H, 0);
    d.cells = d.prev = d.cell_prev = d.cell_raw = d.y;
    d.kept.assign(steps * 5 * H, 0);
    d.hn.assign(states, 0);
    d.cn.assign(states, 0);
    for (int set = 0; set < sets(); ++set)
      for (int b = 0; b < c.B; ++b) row_forward(set, b);
  }

  void row_forward(int set, int b) {
    const auto H = static_cast<size_t>(c.H);
    const auto G = static_cast<size_t>(gates_of(c.cell)), N = static_cast<size_t>(sums_of(c.cell));
    const double* h0 = &d.h0[state(set, b)];
    const double* c0 = &d.c0[state(set, b)];
    std::vector<double> h(h0, h0 + H), cc(c0, c0 + H), product(G * H);
    const int64_t len = length(set, b);
    for (int64_t s = 0; s < len; ++s) {
      const int64_t t = backwards(set) ? len - 1 - s : s;
      const size_t at = step(set, t, b);
      if (restarts(set, b, t))
        for (size_t j = 0; j < H; ++j) {
          h[j] = c.reset_to_initial ? h0[j] : 0;
          cc[j] = c.reset_to_initial ? c0[j] : 0;
        }
      for (size_t j = 0; j < H; ++j) {
        d.prev[at * H + j] = h[j];
        d.cell_prev[at * H + j] = cc[j];
      }
      for (size_t row = 0; row < G * H; ++row) {
        double sum = 0;
        for (size_t k = 0; k < H; ++k)
          sum += operand(d.R[(static_cast<size_t>(set) * G * H + row) * H + k]) * operand(h[k]);
        product[row] = sum;
      }
      const auto x = [&](size_t gate, size_t j) { return d.gx[(at * G + gate) * H + j]; };
      const auto bias = [&](size_t n, size_t j) { return d.bias[(static_cast<size_t>(set) * N + n) * H + j]; };
      for (size_t j = 0; j < H; ++j) {
        const auto a = [&](size_t gate) { return x(gate, j) + bias(gate, j) + product[gate * H + j]; };
        double* k = &d.kept[at * 5 * H + j];
        switch (c.cell) {
          case Cell::rnn_tanh:
            h[j] = std::tanh(a(0));
            k[0] = h[j];
            break;
          case Cell::rnn_relu:
            h[j] = a(0) < 0 ? 0 : a(0);
            k[0] = h[j];
            break;
          case Cell::lstm: {
            k[0] = sigmoid(a(0));
            k[H] = sigmoid(a(1));
            k[2 * H] = std::tanh(a(2));
            k[3 * H] = sigmoid(a(3));
            cc[j] = k[H] * cc[j] + k[0] * k[2 * H];
            d.cell_raw[at * H + j] = cc[j];
            if (c.clip_cell > 0 && std::fabs(cc[j]) > c.clip_cell) cc[j] = std::copysign(c.clip_cell, cc[j]);
            h[j] = k[3 * H] * std::tanh(cc[j]);
            break;
          }
          case Cell::gru: {
            k[0] = sigmoid(a(0));
            k[H] = sigmoid(a(1));
            k[3 * H] = product[2 * H + j] + bias(3, j);
            k[2 * H] = std::tanh(x(2, j) + bias(2, j) + k[0] * k[3 * H]);
            h[j] = (1 - k[H]) * k[2 * H] + k[H] * h[j];
            break;
          }
        }
        d.y[at * H + j] = h[j];
        d.cells[at * H + j] = cc[j];
      }
    }
    for (size_t j = 0; j < H; ++j) {
      d.hn[state(set, b) + j] = h[j];
      d.cn[state(set, b) + j] = cc[j];
    }
  }

  // From the tape in d (kept, cells, prev as stored), not from a forward pass of its own.
  void backward(const std::function<double(double)>& stored) {
    const auto H = static_cast<size_t>(c.H);
    const size_t states = static_cast<size_t>(sets() * c.B) * H;
    d.da.assign(static_cast<size_t>(sets() * c.T * c.B * sums_of(c.cell)) * H, 0);
    d.dh0.assign(states, 0);
    d.dc0.assign(states, 0);
    for (int set = 0; set < sets(); ++set)
      for (int b = 0; b < c.B; ++b) row_backward(set, b, stored);
  }

  // Did clipping hold c at its bound? On the very edge the stored value decides.
  bool clipped(size_t i, const std::function<double(double)>& stored) const {
    if (c.clip_cell <= 0) return false;
    const double raw = std::fabs(d.cell_raw[i]);
    if (std::fabs(raw - c.clip_cell) < c.clip_cell * 0x1p-7) return std::fabs(d.cells[i]) >= stored(c.clip_cell);
    return raw > c.clip_cell;
  }

  void row_backward(int set, int b, const std::function<double(double)>& stored) {
    const auto H = static_cast<size_t>(c.H);
    const auto G = static_cast<size_t>(gates_of(c.cell)), N = static_cast<size_t>(sums_of(c.cell));
    const auto clip = [&](double v) {
      return c.clip_grad > 0 && std::fabs(v) > c.clip_grad ? std::copysign(c.clip_grad, v) : v;
    };
    const size_t row = state(set, b);
    std::vector<double> dh(&d.dhn[row], &d.dhn[row] + H), dc(&d.dcn[row], &d.dcn[row] + H);
    const int64_t len = length(set, b);
    const auto restart = [&] {
      for (size_t j = 0; j < H; ++j) {
        if (c.reset_to_initial) {
          d.dh0[row + j] += dh[j];
          d.dc0[row + j] += dc[j];
        }
        dh[j] = dc[j] = 0;
      }
    };
    for (int64_t s = len - 1; s >= 0; --s) {
      const int64_t t = backwards(set) ? len - 1 - s : s;
      const size_t at = step(set, t, b);
      for (size_t j = 0; j < H; ++j) {
        const size_t i = at * H + j;
        (c.cell == Cell::lstm ? dc : dh)[j] += d.dcells[i];
        const double g = clip(dh[j] + d.dy[i]), gc = clip(dc[j]);
        const double* k = &d.kept[at * 5 * H + j];
        double* da = &d.da[at * N * H + j];
        dh[j] = 0;
        switch (c.cell) {
          case Cell::rnn_tanh:
            da[0] = g * (1 - k[0] * k[0]);
            break;
          case Cell::rnn_relu:
            da[0] = k[0] > 0 ? g : 0;
            break;
          case Cell::lstm: {
            const double tc = std::tanh(d.cells[i]);
            const double all = clipped(i, stored) ? 0 : gc + g * k[3 * H] * (1 - tc * tc);
            da[0] = all * k[2 * H] * k[0] * (1 - k[0]);
            da[H] = all * d.cell_prev[i] * k[H] * (1 - k[H]);
            da[2 * H] = all * k[0] * (1 - k[2 * H] * k[2 * H]);
            da[3 * H] = g * tc * k[3 * H] * (1 - k[3 * H]);
            dc[j] = all * k[H];
            break;
          }
          case Cell::gru:
            da[2 * H] = g * (1 - k[H]) * (1 - k[2 * H] * k[2 * H]);
            da[3 * H] = da[2 * H] * k[0];
            da[0] = da[2 * H] * k[3 * H] * k[0] * (1 - k[0]);
            da[H] = g * (d.prev[i] - k[2 * H]) * k[H] * (1 - k[H]);
            dh[j] = g * k[H];
            break;
        }
      }
      for (size_t gate = 0; gate < G; ++gate)
        for (size_t k = 0; k < H; ++k) {
          const size_t sum = c.cell == Cell::gru && gate == 2 ? 3 : gate;
          const double v = operand(d.da[(at * N + sum) * H + k]);
          const double* R = &d.R[((static_cast<size_t>(set) * G + gate) * H + k) * H];
          for (size_t j = 0; j < H; ++j) dh[j] += v * operand(R[j]);
        }
      if (restarts(set, b, t)) restart();
    }
    for (size_t j = 0; j < H; ++j) {
      d.dh0[row + j] += dh[j];
      d.dc0[row + j] += dc[j];
    }
  }
};

}  // namespace fusedrnn::test
