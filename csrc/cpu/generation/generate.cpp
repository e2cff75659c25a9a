// SPDX-License-Identifier: Apache-2.0
// One step after the other through all layers:   z = W[:, token] + b + h R^T, h = cell(z);   logits = h head^T + bias
// Read: tokens, h0, c0, weights, head.
// Written: the tokens drawn, hn, cn. Overwrites.
// Route: all weights are packed once a call, so a call should have some steps; a thread owns blocks of units, and meets
//   the others once a layer, once for the logits and once for the draw. A projection asks for one meeting more, and so
//   does layer norm, where a thread owns rows. Rows that have ended leave: those that go on lie together in the first
//   places, in their order, so that a step costs what they cost.
// Limit: one row reads all weights every step, from the cache that holds them.
#include "generate.h"

#include "cpu/recurrence/norm.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {
namespace {

void exponentials(const double* values, int64_t count, double largest, double temperature, double* weights) {
  using V = Vec<double>;
  const V one(1.0), zero(0.0), least(-700.0);
  for (int64_t v = 0; v < count; v += V::lanes) {
    const int64_t n = smaller<int64_t>(V::lanes, count - v);
    const V x = (load(values + v, n) - V(largest)) / V(temperature);
    const Exp<double, 1> e(clamp(x, 700.0));
    const V y = e.scale * (e.tail * e.r + one);
    store(weights + v, V(x.v < least.v ? zero.v : y.v), n);
  }
}

template <class S>
class Generate {
  static constexpr int L = Vec<S>::lanes;
  static constexpr int64_t kRowsAtOnce = 48, kUnitsAtOnce = 768;  // as in forward.h
  // Rows that make packing worth it, also in a short call: bits must not tell where one call ends and the next begins.
  static constexpr int64_t kAlways = INT64_MAX;

 public:
  Generate(const Problem& problem, const Arguments& p, const Results& out, const Generation& g, int threads,
           Workspace& workspace)
      : problem_(problem),
        n_(problem.sizes),
        cell_(table_of<S, 1>(problem.cell)),
        tile_(tiles_of(cell_, problem)),
        p_(p),
        out_(out),
        g_(g) {
    const int64_t B = n_.B, H = n_.H;
    if (g.steps * B > n_.I / 4) {  // all columns of W are packed: nobody knows which ones will be asked for
      all_.count = n_.I;
      all_.place = take<int32_t>(workspace, n_.I);
      for (int32_t v = 0; v < n_.I; ++v) all_.place[v] = v;
    }
    Q_ = outputs_of(problem), carried_ = has_cell_state(problem), proj_ = problem.variant.proj > 0;
    norm_ = problem.variant.layer_norm;
    ld_ = padded(H), ldq_ = padded(Q_);
    layers_ = static_cast<Layer*>(workspace.take(sizeof(Layer) * static_cast<size_t>(n_.L)));
    for (int l = 0; l < n_.L; ++l) {
      Layer& layer = layers_[l];
      layer = Layer();
      layer.weights.allocate(cell_, l ? Q_ : all_.count, H, Q_, workspace);
      for (int parity = 0; parity < 2; ++parity)
        take_rows(workspace, B, ldq_, layer.h[parity], layer.h_rows[parity]), zero_row(layer.h[parity], 1, B * ldq_);
      layer.c = zeros(workspace, B * ld_);
      const Arguments* given[1] = {&p_};
      if (norm_) {
        layer.norms.allocate(problem_, cell_.sums, workspace);
        layer.norms.begin(given, l, 0);
        layer.options.norms = &layer.norms;
      }
      if (problem.variant.given) {
        layer.options.allocate(problem_, ld_, ldq_, B, workspace);
        layer.options.begin(given, nullptr, false, l, 0);
      }
      if (proj_) {
        layer.hr.K = H, layer.hr.units = Q_;
        layer.hr.block = block_tiles(1, layer.hr.tiles(), threads);
        layer.hr.data = take<S>(workspace, layer.hr.elements());
      }
    }
    z_ = take<S>(workspace, B * ld_ * cell_.sums);
    zh_ = take<S>(workspace, norm_ ? B * ld_ * cell_.sums : 0);
    if (cell_.two_products) take_rows(workspace, B, ld_, rh_, rh_rows_), zero_row(rh_, 1, B * ld_);
    if (proj_) take_rows(workspace, B, ld_, m_, m_rows_), zero_row(m_, 1, B * ld_);
    head_.K = Q_;
    head_.units = n_.I;
    head_.block = block_tiles(1, head_.tiles(), threads);
    head_.data = take<S>(workspace, head_.elements());
    ld_logits_ = head_.tiles() * L;
    head_bias_ = zeros(workspace, ld_logits_);
    logits_ = take<S>(workspace, B * ld_logits_);
    tokens_ = take<int32_t>(workspace, B);
    rows_ = take<int64_t>(workspace, B);
    for (int64_t i = 0; i < B; ++i) rows_[i] = i;
    outcomes_ = take<Outcome>(workspace, B);
    drawing_ = take<double>(workspace, kDrawScratch * n_.I * threads);
    live_ = B;
  }

  void run(const Team& team) {
    start(team);
    if (!go_on(team, -1)) return;
    for (int64_t s = 0; s < g_.steps && live_ > 0; ++s) {
      for (int l = 0; l < n_.L; ++l) layer(team, l, s);
      const int64_t first = team.begin(head_.blocks()), end = team.end(head_.blocks());
      const S* const* h = layers_[n_.L - 1].h_rows[!(s & 1)];
      for (int64_t b = first; b < end; ++b) multiply(head_, b, h, live_, head_bias_, 0, logits_, ld_logits_);
      team.wait();
      for (int64_t i = team.begin(live_); i < team.end(live_); ++i) draw(team, s, i);
      team.wait();
      if (!go_on(team, s)) return;
    }
    for (int64_t i = team.begin(live_); i < team.end(live_); ++i) give_state(i, g_.steps & 1);
  }

  const Failure& failure() const { return failure_; }

 private:
  struct Layer {
    ForwardWeights<S, 1> weights;
    Options<S, 1> options;
    Norms<S, 1> norms;
    Panels<S> hr;  // the projection's weights
    S *h[2], *c;   // c: also what a projected GRU carries on
    const S** h_rows[2];
  };

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }
  static S* zeros(Workspace& workspace, int64_t count) {
    S* out = take<S>(workspace, count);
    zero_row(out, 1, count);
    return out;
  }

  void start(const Team& team) {
    static constexpr int gate[1] = {0};
    for (int l = 0; l < n_.L; ++l) {
      const Params given = norm_ ? without_biases(p_.params[l]) : p_.params[l];  // layer norm adds them itself
      const Params* p[1] = {&given};
      layers_[l].weights.pack(team, cell_, p, 0, l ? Q_ : n_.I, n_.H, Q_, kAlways, n_.B, l ? nullptr : &all_);
      Panels<S>& hr = layers_[l].hr;
      for (int64_t b = team.begin(hr.blocks()); proj_ && b < team.end(hr.blocks()); ++b)
        pack_transposed(hr, b, element<S>(p_.extras[l].hr, 0), p_.extras[l].hr.stride[1], p_.extras[l].hr.stride[2], Q_,
                        gate);
    }
    for (int64_t b = team.begin(head_.blocks()); b < team.end(head_.blocks()); ++b)
      pack_transposed(head_, b, element<S>(g_.head, 0, 0), g_.head.stride[0], g_.head.stride[1], n_.I, gate);
    if (team.rank == 0 && g_.head_bias.data)
      copy_row(static_cast<const S*>(g_.head_bias.data), g_.head_bias.stride[0], head_bias_, 1, n_.I);
    for (int64_t i = team.begin(n_.B); i < team.end(n_.B); ++i) {
      tokens_[i] = *element<int32_t>(p_.tokens, 0, 0, i);
      outcomes_[i] = g_.ended[i] ? Outcome::ended : Outcome::drawn;
      for (int l = 0; l < n_.L; ++l) {
        if (p_.h0.data) copy_row(element<S>(p_.h0, l, 0, i), p_.h0.stride[3], layers_[l].h[0] + i * ldq_, 1, Q_);
        if (p_.c0.data) copy_row(element<S>(p_.c0, l, 0, i), p_.c0.stride[3], layers_[l].c + i * ld_, 1, n_.H);
      }
    }
    team.wait();
  }

  void layer(const Team& team, int l, int64_t s) {
    const ForwardWeights<S, 1>& weights = layers_[l].weights;
    const int64_t first = team.begin(weights.blocks()), end = team.end(weights.blocks());
    const S* const* below[1] = {l ? layers_[l - 1].h_rows[!(s & 1)] : nullptr};
    S* z[1] = {z_};
    for (int64_t b = first; b < end; ++b) {
      if (l == 0)
        weights.token_product(cell_, b, tokens_, live_, z);
      else
        weights.input_product(cell_, b, below, live_, z);
    }
    if (cell_.two_products) {
      tiles(l, s, first, end, true);
      team.wait();
    }
    norm_ ? normed_tiles(team, l, s, first, end) : tiles(l, s, first, end, false);
    team.wait();
    if (!proj_) return;
    project(team, l, s);
    team.wait();
  }

  void tiles(int l, int64_t s, int64_t first, int64_t end, bool gate) {
    Layer& layer = layers_[l];
    const ForwardWeights<S, 1>& weights = layer.weights;
    const int now = s & 1, phase = cell_.two_products && !gate;
    const int64_t together = larger<int64_t>(1, kUnitsAtOnce / larger<int64_t>(1, live_ * weights.unit(1)));
    for (int64_t b0 = first; b0 < end; b0 += together) {
      const int64_t b1 = smaller(b0 + together, end);
      for (int64_t r = 0; r < live_; r += kRowsAtOnce) {
        const int64_t r1 = smaller(r + kRowsAtOnce, live_);
        S* z[1] = {z_ + r * weights.ldz};
        const S* const* rows[1] = {(phase ? rh_rows_ : layer.h_rows[now]) + r};
        for (int64_t b = b0; b < b1; ++b) weights.state_product(phase, b, rows, r1 - r, z);
        tile(layer, s, weights.unit(b0), weights.unit(b1), r, r1, gate);
      }
    }
  }

  // A thread multiplies for its blocks, and finishes whole rows.
  void normed_tiles(const Team& team, int l, int64_t s, int64_t first, int64_t end) {
    Layer& layer = layers_[l];
    const ForwardWeights<S, 1>& weights = layer.weights;
    const S* const* h[1] = {layer.h_rows[s & 1]};
    S *zh[1] = {zh_}, *hat[1] = {}, scale[1];
    for (int64_t b = first; b < end; ++b) weights.state_product_alone(b, h, live_, zh);
    team.wait();
    const int64_t r0 = team.begin(live_), r1 = team.end(live_);
    for (int64_t r = r0; r < r1; ++r) {
      S *z[1] = {z_ + r * weights.ldz}, *add[1] = {zh_ + r * weights.ldz};
      layer.norms.row_of_z(0, z, cell_.x_sum, false, z, hat, scale);
      layer.norms.row_of_z(1, add, cell_.h_sum, true, z, hat, scale);
    }
    if (r0 < r1) tile(layer, s, 0, n_.H, r0, r1, false);
  }

  // The cell on units [u0, u1) of rows [r0, r1): what the sums in z make of the state.
  void tile(Layer& layer, int64_t s, int64_t u0, int64_t u1, int64_t r0, int64_t r1, bool gate) {
    const int now = s & 1;
    ForwardTile<S, 1> t{};
    t.rows = r1 - r0;
    t.units = u1 - u0;
    t.ldz = layer.weights.ldz;
    t.ld = ld_;
    t.H = n_.H;
    t.clip = problem_.clip_cell > 0 ? static_cast<S>(problem_.clip_cell) : static_cast<S>(__builtin_inf());
    if (problem_.variant.given) t.options = &layer.options;
    t.row = r0, t.unit = u0;
    t.z[0] = z_ + r0 * t.ldz + u0 * cell_.sums;
    // A projected cell's own h is m, and what it carries on lies in c.
    t.h_seen[0] = t.h_prev[0] = (proj_ ? layer.c : layer.h[now]) + r0 * ld_ + u0;
    t.h[0] = (proj_ ? m_ : layer.h[!now]) + r0 * ld_ + u0;
    t.c[0] = cell_.cell_state ? layer.c + r0 * ld_ + u0 : nullptr;
    t.rh[0] = cell_.two_products ? rh_ + r0 * ld_ + u0 : nullptr;
    gate ? tile_.gate(t) : tile_.forward(t);
    for (int64_t i = r0; i < r1 && carried_ && !cell_.cell_state; ++i) {
      S *fresh[1] = {m_ + i * ld_}, *c[1] = {layer.c + i * ld_};
      zone_row(layer.options, 1, s, i, u0, u1, fresh, c);
    }
  }

  // h = m hr^T of a thread's blocks of units, then zoneout.
  void project(const Team& team, int l, int64_t s) {
    Layer& layer = layers_[l];
    const int now = s & 1;
    const int64_t first = team.begin(layer.hr.blocks()), end = team.end(layer.hr.blocks());
    const int64_t q0 = smaller(first * layer.hr.block * L, Q_), q1 = smaller(end * layer.hr.block * L, Q_);
    for (int64_t b = first; b < end; ++b)
      multiply(layer.hr, b, m_rows_, live_, static_cast<S*>(nullptr), 0, layer.h[!now], ldq_);
    for (int64_t i = 0; i < live_ && layer.options.zones(0); ++i) {
      S *fresh[1] = {layer.h[!now] + i * ldq_}, *old[1] = {layer.h[now] + i * ldq_};
      zone_row(layer.options, 0, s, i, q0, q1, fresh, old);
      copy_row(old[0] + q0, 1, fresh[0] + q0, 1, q1 - q0);
    }
  }

  void draw(const Team& team, int64_t s, int64_t i) {
    const int64_t row = rows_[i];
    const Drawn it = draw_token(logits_ + i * ld_logits_, n_.I, g_, problem_.seed, s, row, exponentials,
                                drawing_ + kDrawScratch * n_.I * team.rank);
    outcomes_[i] = it.outcome;
    if (it.outcome != Outcome::drawn) return;
    for (int64_t k = 0; k < g_.stops; ++k)
      if (it.token == g_.stop[k]) outcomes_[i] = Outcome::ended;
    if (g_.seen) g_.seen[row * n_.I + it.token] = 1;
    if (g_.log_probs) g_.log_probs[s * n_.B + row] = it.log_prob;
    g_.drawn[s * n_.B + row] = it.token;
    tokens_[i] = static_cast<int32_t>(it.token);
  }

  // After step s: all members learn what became of the rows, and those that have ended leave. False after a failure.
  bool go_on(const Team& team, int64_t s) {
    Outcome worst = Outcome::drawn;
    for (int64_t i = 0; i < live_; ++i) worst = larger(worst, outcomes_[i]);
    if (worst == Outcome::drawn) return true;
    team.wait();  // until all have looked
    if (team.rank == 0) worst == Outcome::ended ? leave(s) : fail(s);
    team.wait();
    return worst == Outcome::ended;
  }

  void leave(int64_t s) {
    const int now = (s + 1) & 1;
    int64_t staying = 0;
    for (int64_t i = 0; i < live_; ++i) {
      if (outcomes_[i] == Outcome::ended) {
        g_.ended[rows_[i]] = 1;
        give_state(i, now);
        for (int64_t later = s + 1; later < g_.steps; ++later) {
          g_.drawn[later * n_.B + rows_[i]] = tokens_[i];
          if (g_.log_probs) g_.log_probs[later * n_.B + rows_[i]] = 0;
        }
        continue;
      }
      const int64_t to = staying++;
      if (to == i) continue;
      rows_[to] = rows_[i];
      tokens_[to] = tokens_[i];
      for (int l = 0; l < n_.L; ++l) {
        copy_row(layers_[l].h[now] + i * ldq_, 1, layers_[l].h[now] + to * ldq_, 1, Q_);
        copy_row(layers_[l].c + i * ld_, 1, layers_[l].c + to * ld_, 1, n_.H);
      }
    }
    live_ = staying;
  }

  void fail(int64_t s) {
    int64_t i = 0;
    while (outcomes_[i] <= Outcome::ended) ++i;
    failure_ = {outcomes_[i], s, rows_[i]};
  }

  void give_state(int64_t i, int now) {
    const int64_t row = rows_[i];
    for (int l = 0; l < n_.L; ++l) {
      copy_row(layers_[l].h[now] + i * ldq_, 1, element<S>(out_.hn, l, 0, row), out_.hn.stride[3], Q_);
      if (out_.cn.data) copy_row(layers_[l].c + i * ld_, 1, element<S>(out_.cn, l, 0, row), out_.cn.stride[3], n_.H);
    }
  }

  const Problem& problem_;
  const Sizes& n_;
  const CellTable<S, 1>& cell_;
  const TileFunctions<S, 1>& tile_;
  const Arguments& p_;
  const Results& out_;
  const Generation& g_;
  int64_t Q_, ld_, ldq_, ld_logits_;  // Q: units of h
  bool carried_, proj_, norm_;        // carried: there is a c, or what a projected GRU carries on
  Layer* layers_;
  S *z_, *zh_, *rh_ = nullptr, *m_ = nullptr, *head_bias_, *logits_;  // zh: h R^T where layer norm keeps it apart
  const S **rh_rows_ = nullptr, **m_rows_ = nullptr;
  Panels<S> head_;
  int64_t live_;   // rows that go on: in the first places of all that follows, and of h, c, z
  int64_t* rows_;  // [place]: which one
  int32_t* tokens_;
  Outcome* outcomes_;
  Failure failure_;
  Vocabulary::Set all_;
  double* drawing_;
};

template <class S>
Failure run(const Problem& problem, const Arguments& p, const Results& out, const Generation& g, int threads) {
  Workspace workspace;
  Generate<S> work(problem, p, out, g, threads, workspace);
  parallel(threads, [](void* it, const Team& team) { static_cast<Generate<S>*>(it)->run(team); }, &work);
  return work.failure();
}

}  // namespace

Failure generate(const Problem& problem, const Arguments& p, const Results& out, const Generation& g, int threads) {
  return problem.dtype == Dtype::f64 ? run<double>(problem, p, out, g, threads)
                                     : run<float>(problem, p, out, g, threads);
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
