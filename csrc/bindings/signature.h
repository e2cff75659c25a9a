// SPDX-License-Identifier: Apache-2.0
// The arrays of a call: which there are, what messages call them, which axes they have. Every door (NumPy's two,
// torch's and the device's) asks here, so that a reader knows no more than how to look at one object.
//
// The each_* functions call f(slot) for one array after the other, and end with false where f answers false.
#pragma once

#include <cstdint>
#include <string>

#include "api.h"

namespace fusedrnn::bindings {

inline std::string shape_text(int rank, const int64_t* shape) {
  std::string text = "(";
  for (int axis = 0; axis < rank; ++axis) text += (axis ? ", " : "") + std::to_string(shape[axis]);
  return text + (rank == 1 ? ",)" : ")");
}

// How messages call an array: "g.hn", "params[1].W", "arrays[3]". Put together only where something is wrong.
struct ArrayName {
  const char* role = "";
  const char* name = "";
  int index = -1;  // of the layer and direction

  std::string text() const {
    std::string out = role;
    if (index >= 0) out += "params[" + std::to_string(index) + "]" + (*name ? "." : "");
    return out + name;
  }
};

// What an array holds: the problem's dtype; that or, with bf16_weights, bfloat16; int64; one byte; any integers.
enum class Stored { numbers, weights, lengths, flags, tokens };
inline Dtype dtype_of(const Problem& problem, Stored stored) {
  return stored == Stored::weights && problem.bf16_weights ? Dtype::bf16 : problem.dtype;
}

// Where a user's array differs from ours: sequences and states in order and number of axes, weights in that of sets.
enum class Family { sequence, state, weights };

// One array of a call, to be filled.
template <int Rank>
struct Slot {
  static constexpr int rank = Rank;
  static constexpr int sets = Rank > 3 ? Rank - 3 : 0;  // the axis E, but for those of (T,E,B)

  Family family;
  const char* name;  // in messages
  const char* axes;  // ... too
  Array<Rank>& array;
  int64_t shape[Rank];
  Stored stored = Stored::numbers;
  int part = 0;     // its number among those that come together: (x, h0, c0), (y, hn, cn), (W, R, bW, bR), ...
  int index = -1;   // of the layer and direction
  bool has = true;  // false: the problem knows no such array
};

inline Slot<2> lengths_slot(Problem& problem) {
  const Sizes& s = problem.sizes;
  return {Family::sequence, "lengths", "(E, B)", problem.lengths, {s.E, s.B}, Stored::lengths};
}
inline Slot<3> reset_slot(Problem& problem) {
  const Sizes& s = problem.sizes;
  return {Family::sequence, "reset", "(T, E, B)", problem.reset, {s.T, s.E, s.B}, Stored::flags};
}
inline Slot<4> x_slot(const Problem& problem, Arguments& to) {
  const Sizes& s = problem.sizes;
  return {Family::sequence, "x", "(T, E, B, I)", to.x, {s.T, s.E, s.B, s.I}};
}
inline Slot<3> tokens_slot(const Problem& problem, Arguments& to) {  // in place of x
  const Sizes& s = problem.sizes;
  return {Family::sequence, "x", "(T, E, B)", to.tokens, {s.T, s.E, s.B}, Stored::tokens};
}

// h and c, at the start or at the end.
inline Slot<4> state_slot(const Problem& problem, const char* name, Array<4>& to, int part) {
  const Sizes& s = problem.sizes;
  const bool c = part == 2;
  const int64_t units = c ? s.H : outputs_of(problem);
  return {Family::state,
          name,
          "(L*D, E, B, H)",
          to,
          {s.L * s.D, s.E, s.B, units},
          Stored::numbers,
          part,
          -1,
          !c || has_cell_state(problem)};
}
template <class F>
bool each_start(const Problem& problem, Arguments& to, const F& f) {
  return f(state_slot(problem, "h0", to.h0, 1)) && f(state_slot(problem, "c0", to.c0, 2));
}

// Of layer and direction k.
template <class F>
bool each_weight(const Problem& problem, int k, Params& to, const F& f) {
  const Sizes& s = problem.sizes;
  const bool has_R = facts_of(problem.cell).state_product;
  const int64_t rows = facts_of(problem.cell).gates * s.H, units = outputs_of(problem);
  const int64_t inputs = k < s.D ? s.I : s.D * units;
  const Stored W = Stored::weights, b = Stored::numbers;
  return f(Slot<3>{Family::weights, "W", "(E, G*H, I_l)", to.W, {s.E, rows, inputs}, W, 0, k}) &&
         f(Slot<3>{Family::weights, "R", "(E, G*H, H)", to.R, {s.E, rows, units}, W, 1, k, has_R}) &&
         f(Slot<2>{Family::weights, "bW", "(E, G*H)", to.bW, {s.E, rows}, b, 2, k}) &&
         f(Slot<2>{Family::weights, "bR", "(E, G*H)", to.bR, {s.E, rows}, b, 3, k, has_R});
}

// What a variant adds to these.
template <class F>
bool each_extra(const Problem& problem, int k, Extras& to, const F& f) {
  const Sizes& s = problem.sizes;
  const Variant& v = problem.variant;
  const int64_t rows = facts_of(problem.cell).gates * s.H;
  const bool norm = v.layer_norm, norm_c = norm && facts_of(problem.cell).cell_state;
  const Family own = Family::weights;
  const Stored b = Stored::numbers;
  return f(Slot<3>{own, "weight_hr", "(E, P, H)", to.hr, {s.E, v.proj, s.H}, b, 0, k, v.proj > 0}) &&
         f(Slot<2>{own, "weight_ph", "(E, (G-1)*H)", to.ph, {s.E, rows - s.H}, b, 1, k, v.peepholes}) &&
         f(Slot<2>{own, "gain_ih", "(E, G*H)", to.gain_ih, {s.E, rows}, b, 2, k, norm}) &&
         f(Slot<2>{own, "gain_hh", "(E, G*H)", to.gain_hh, {s.E, rows}, b, 3, k, norm}) &&
         f(Slot<2>{own, "gain_c", "(E, H)", to.gain_c, {s.E, s.H}, b, 4, k, norm_c}) &&
         f(Slot<2>{own, "bias_c", "(E, H)", to.bias_c, {s.E, s.H}, b, 5, k, norm_c});
}

inline Slot<3> context_slot(const Problem& problem, Arguments& to) {
  const Sizes& s = problem.sizes;
  return {Family::weights, "context", "(E, B, K)", to.context, {s.E, s.B, s.K}};
}
inline Slot<3> context_weights_slot(const Problem& problem, Arguments& to, int d) {
  const Sizes& s = problem.sizes;
  const char* name = d ? "context_weights[1]" : "context_weights[0]";
  const int64_t rows = facts_of(problem.cell).gates * s.H;
  return {Family::weights, name, "(E, G*H, K)", to.context_weights[d], {s.E, rows, s.K}, Stored::weights};
}

// All that a plain call takes; to.params points to those of L*D.
template <class F>
bool each_argument(const Problem& problem, Arguments& to, const F& f) {
  if (!f(x_slot(problem, to)) || !each_start(problem, to, f)) return false;
  for (int k = 0; k < problem.sizes.L * problem.sizes.D; ++k)
    if (!each_weight(problem, k, to.params[k], f)) return false;
  return true;
}

template <class F>
bool each_result(const Problem& problem, Results& to, const F& f) {
  const Sizes& s = problem.sizes;
  const int64_t width = s.D * outputs_of(problem);
  return f(Slot<4>{Family::sequence, "y", "(T, E, B, D*H)", to.y, {s.T, s.E, s.B, width}}) &&
         f(state_slot(problem, "hn", to.hn, 1)) && f(state_slot(problem, "cn", to.cn, 2));
}
inline Slot<5> cells_slot(const Problem& problem, Results& to) {  // a result that is seldom wanted
  const Sizes& s = problem.sizes;
  return {Family::sequence, "cells", "(L, T, E, B, D*H)", to.cells, {s.L, s.T, s.E, s.B, s.D * s.H}};
}

}  // namespace fusedrnn::bindings
