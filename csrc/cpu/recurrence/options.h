// SPDX-License-Identifier: Apache-2.0
// The options that change a cell's elementwise part: activations, clip_gates, peepholes, zoneout, recurrent dropout.
//   gate(a) = act(clip(a));   h = k h' + (1 - k) h_new, k drawn while training, else the probability (c alike)
// Read: Variant, Extras, lengths.
// Written: rows of drawn numbers, as csrc/api.h numbers them.
// Route: the tile functions of varied.h ask for a row of units; the engines ask for recurrent dropout's masks.
// Limit: Philox, about 1 ns an element, where something is drawn; else what the plain cell is limited by.
#pragma once

#include "activations.h"
#include "weights.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// Whether an option asks for more than the plain tile functions.
inline bool usual_activations(const Problem& problem) {
  const Activation* a = problem.variant.activations;
  const CellFacts& cell = facts_of(problem.cell);
  return a[0].kind == cell.gate && (cell.gates == 1 || a[1].kind == cell.candidate) &&
         (!cell.cell_state || a[2].kind == ActivationKind::tanh);
}

template <class S, int P>
const TileFunctions<S, P>& tiles_of(const CellTable<S, P>& cell, const Problem& problem) {
  if (problem.variant.layer_norm && cell.cell_state) return cell.normed[usual_activations(problem)];
  return problem.variant.given ? cell.varied[usual_activations(problem)] : cell.plain;
}

template <class S, int P>
class Norms;

// For one layer, direction and weight set.
template <class S, int P>
class Options {
 public:
  const Norms<S, P>* norms = nullptr;  // with layer norm

  static constexpr int kPeeps = 3;  // i, f, o

  // ld, ldq: of rows of H, and of h.
  void allocate(const Problem& problem, int64_t ld, int64_t ldq, int64_t N, Workspace& workspace) {
    problem_ = &problem;
    ld_ = ld, ldq_ = ldq;
    for (int k = 0; k < kPeeps; ++k)
      for (int q = 0; q < P; ++q) peep_[k][q] = peepholes() ? take<S>(workspace, ld) : nullptr;
    for (int q = 0; q < P; ++q) room_[q] = variant().layer_norm ? take<S>(workspace, N * ld) : nullptr;
    mask_ = masks() ? take<S>(workspace, N * ldq) : nullptr;
  }
  // One member calls it before the others compute. `p[q]`: values, tangents. `rows`: for what is drawn.
  void begin(const Arguments* const* p, const Rows* rows, bool reversed, int64_t layer_and_direction, int64_t e) {
    rows_ = rows;
    reversed_ = reversed;
    layer_ = static_cast<int>(layer_and_direction);
    if (!peepholes()) return;
    const int64_t H = problem_->sizes.H;
    for (int k = 0; k < kPeeps; ++k) {
      for (int q = 0; q < P; ++q) {
        zero_row(peep_[k][q], 1, ld_);
        const Array<2> ph = p[q]->extras ? p[q]->extras[layer_].ph : Array<2>();
        if (ph.data && peep_place(k) >= 0)
          copy_row(element<S>(ph, e, peep_place(k) * H), ph.stride[1], peep_[k][q], 1, H);
      }
    }
  }

  const Variant& variant() const { return problem_->variant; }
  bool masks() const { return variant().training && variant().recurrent_dropout > 0; }
  bool peepholes() const { return variant().peepholes; }
  bool zones(int which) const { return (which ? variant().zoneout_c : variant().zoneout_h) > 0; }
  const S* const* peep(int k) const { return peep_[k]; }
  // Where peephole k stands in weight_ph; -1: a coupled LSTM has none for f.
  int64_t peep_place(int k) const { return problem_->cell == CellKind::cifg ? (k == 1 ? -1 : k / 2) : k; }
  // The gate that peephole k feeds.
  int64_t peep_gate(int k) const { return problem_->cell == CellKind::cifg ? k : (k == 2 ? 3 : k); }

  // How much of the old h (which = 0) or c (1) stays: units [u, u + n) of row i at step s, and zeros to a whole
  // register.
  void keep(int which, int64_t s, int64_t i, int64_t u, int64_t n, S* out) const {
    const double p = which ? variant().zoneout_c : variant().zoneout_h;
    const int64_t whole = (n + Vec<S>::lanes - 1) / Vec<S>::lanes * Vec<S>::lanes;
    for (int64_t j = variant().training ? n : 0; j < whole; ++j) out[j] = variant().training ? S(0) : static_cast<S>(p);
    if (!variant().training) return;
    const Sizes& z = problem_->sizes;
    const int64_t row = (rows_->time(reversed_, s, i) * z.E + rows_->e[i]) * z.B + rows_->b[i];
    const uint32_t stream = which ? 3 : 2;
    const int64_t units = which ? z.H : outputs_of(*problem_);
    Dropout{p, problem_->seed}.drawn(out, n, static_cast<uint64_t>(row * units + u), layer_, stream);
  }

  // Room for the units of each row: rows of ld.
  S* const* room() const { return room_; }
  // Recurrent dropout's factors of row i: one mask for all steps.
  S* mask(int64_t i) const { return mask_ + i * ldq_; }
  void draw_mask(int64_t i, int64_t u0, int64_t u1) const {
    const double p = variant().recurrent_dropout;
    const Sizes& z = problem_->sizes;
    const int64_t row = rows_->e[i] * z.B + rows_->b[i], Q = outputs_of(*problem_);
    S* out = mask(i);
    Dropout{p, problem_->seed}.drawn(out + u0, u1 - u0, static_cast<uint64_t>(row * Q + u0), layer_, 4);
    const S scale = p < 1 ? static_cast<S>(1 / (1 - p)) : S(0);
    for (int64_t u = u0; u < u1; ++u) out[u] = out[u] != 0 ? S(0) : scale;
    if (u1 > u0 && u1 == Q) zero_row(out + u1, 1, ldq_ - u1);
  }
  // to = from * mask in units [u0, u1), a whole register's zeros at the row's end included.
  void apply_mask(int64_t i, const S* from, S* to, int64_t u0, int64_t u1) const {
    const S* m = mask(i);
    for (int64_t u = u0; u < u1; u += Vec<S>::lanes) {
      const int64_t n = smaller<int64_t>(Vec<S>::lanes, u1 - u);
      store(to + u, load(from + u, n) * load(m + u, n));
    }
  }

 private:
  const Problem* problem_ = nullptr;
  const Rows* rows_ = nullptr;
  bool reversed_ = false;
  int layer_ = 0;
  int64_t ld_ = 0, ldq_ = 0;
  S *peep_[kPeeps][P] = {}, *mask_ = nullptr, *room_[P] = {};
};

// k old + (1 - k) fresh; 0 and 1 leave no rounding behind.
template <class V>
FUSEDRNN_FORCE V mixed(const V& k, const V& old, const V& fresh) {
  return k * old + (1 - k) * fresh;
}
template <class V>
FUSEDRNN_FORCE Dual<V> mixed(const V& k, const Dual<V>& old, const Dual<V>& fresh) {
  return {mixed(k, old.v, fresh.v), mixed(k, old.t, fresh.t)};
}
// The parts of a gradient that pass by and that go on: all k, all - all k.
template <class V>
FUSEDRNN_FORCE V passing(const V& k, const V& all, V& on) {
  const V by = k * all;
  on = all - by;
  return by;
}
template <class V>
FUSEDRNN_FORCE Dual<V> passing(const V& k, const Dual<V>& all, Dual<V>& on) {
  Dual<V> by;
  by.v = passing(k, all.v, on.v);
  by.t = passing(k, all.t, on.t);
  return by;
}

// Zoneout of a run of units, drawn into memory once for each row. In a tile: h is not there yet before a projection.
template <class S>
struct Zones {
  static constexpr int64_t kUnits = 256;  // of a run
  bool used[2];
  alignas(64) S keep[2][kUnits];

  template <int P>
  explicit Zones(const Options<S, P>& options)
      : used{options.zones(0) && options.variant().proj == 0, options.zones(1)} {}
  template <int P>
  void draw(const Options<S, P>& options, int64_t s, int64_t i, int64_t u, int64_t n) {
    for (int which = 0; which < 2; ++which)
      if (used[which]) options.keep(which, s, i, u, n, keep[which]);
  }
};

// Units [u0, u1) of a row: to = k to + (1 - k) fresh. Without zoneout k = 0, and `to` gets a copy.
template <class S, int P>
void zone_row(const Options<S, P>& options, int which, int64_t s, int64_t i, int64_t u0, int64_t u1,
              const S* const* fresh, S* const* to) {
  using Pl = Planes<S, P>;
  if (!options.zones(which)) {
    for (int q = 0; q < P; ++q) copy_row(fresh[q] + u0, 1, to[q] + u0, 1, u1 - u0);
    return;
  }
  alignas(64) S keep[Zones<S>::kUnits];
  for (int64_t run = u0; run < u1; run += Zones<S>::kUnits) {
    const int64_t end = smaller(run + Zones<S>::kUnits, u1);
    options.keep(which, s, i, run, end - run, keep);
    for (int64_t u = run; u < end; u += Vec<S>::lanes)
      Pl::write(to, u, mixed(load(keep + u - run), Pl::read(to, u, Vec<S>::lanes), Pl::read(fresh, u, Vec<S>::lanes)),
                Vec<S>::lanes);
  }
}
// ... d = k d, and on = d - k d.
template <class S, int P>
void zone_row_back(const Options<S, P>& options, int which, int64_t s, int64_t i, int64_t u0, int64_t u1, S* const* d,
                   S* const* on) {
  using Pl = Planes<S, P>;
  if (!options.zones(which)) {
    for (int q = 0; q < P; ++q) {
      copy_row(d[q] + u0, 1, on[q] + u0, 1, u1 - u0);
      zero_row(d[q] + u0, 1, u1 - u0);
    }
    return;
  }
  alignas(64) S keep[Zones<S>::kUnits];
  for (int64_t run = u0; run < u1; run += Zones<S>::kUnits) {
    const int64_t end = smaller(run + Zones<S>::kUnits, u1);
    options.keep(which, s, i, run, end - run, keep);
    for (int64_t u = run; u < end; u += Vec<S>::lanes) {
      typename Pl::Number goes;
      Pl::write(d, u, passing(load(keep + u - run), Pl::read(d, u, Vec<S>::lanes), goes), Vec<S>::lanes);
      Pl::write(on, u, goes, Vec<S>::lanes);
    }
  }
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
