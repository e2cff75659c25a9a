// SPDX-License-Identifier: Apache-2.0
// Hidden Markov models over given scores (Rabiner 1989, section III): log-likelihood, expectations, best path.
//   alpha[t,j] = exp(scores[t,b,j]) sum_i alpha[t-1,i] exp(transitions[i,j])
//   beta[t,i]  = sum_j exp(transitions[i,j] + scores[t+1,b,j]) beta[t+1,j]
//   alpha[0,j] = exp(initial[j] + scores[0,b,j]),   beta[last,i] = 1
// Read: scores (T,B,N) any strides, initial (N), transitions (N,N).
// Written, not added: log_likelihood (B), states (T,B,N) contiguous in N, dinitial (N), dtransitions (N,N); or paths
//   (T,B) and their logarithm (B). Numbers are Wide (wide.h), so nothing underflows, however a model's zeros lie. A
//   register holds neighbours in j forward, and in i backward (transitions transposed), so that no sum crosses lanes.
// Route: rows b, b + kGroups, ... form a group, which one thread walks in order; the groups are added in order at the
//   end: the same bits for any number of threads.
// Limit: about ten operations for each pair of states and step, twenty backward.
#include "cpu/arithmetic/wide.h"
#include "cpu/isa.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {
namespace {

constexpr int64_t kGroups = 8;

template <class S>
struct Model {
  static constexpr int lanes = Vec<S>::lanes;
  const Hmm* c;
  int64_t n;               // N in whole registers
  S *initial, *from, *to;  // as Wide: initial (2,n), exp(transitions) (N,2,n) and its transpose (N,2,n)
  S* memory;
  double* sums;      // (groups, N + N*n)
  int64_t elements;  // of a thread's memory
  int64_t groups, next;
  bool wanted;
  bool sound_initial, sound_transitions;

  static FUSEDRNN_FORCE Wide<S> read(const S* p, int64_t n, int64_t j) { return {load(p + j), load(p + n + j)}; }
  static FUSEDRNN_FORCE void write(S* p, int64_t n, int64_t j, Wide<S> a) {
    store(p + j, a.m);
    store(p + n + j, a.e);
  }
};

// exp of `count` numbers, the rest of n nothing. False where one of them is no score.
template <class S>
bool exp_row(const S* x, int64_t stride, int64_t count, S* out, int64_t n) {
  constexpr int lanes = Vec<S>::lanes;
  Vec<S> marks(S(0));
  for (int64_t j = 0; j < n; j += lanes) {
    Vec<S> v(static_cast<S>(-__builtin_huge_val()));
    for (int64_t k = 0; k < lanes && j + k < count; ++k) v.v[k] = x[(j + k) * stride];
    marks = marked(marks, v);
    Model<S>::write(out, n, j, wide_exp(v));
  }
  return !any(marks);
}

// log of the sum of all n; what is needed to divide by it.
template <class S>
double log_sum(const S* p, int64_t n, double* m, double* e) {
  double most = kNothing, sum = 0;
  for (int64_t j = 0; j < n; ++j) most = p[n + j] > most ? p[n + j] : most;
  for (int64_t j = 0; j < n; ++j) {
    const double d = p[n + j] - most;
    sum += d < -1000 ? 0 * static_cast<double>(p[j]) : p[j] * __builtin_exp2(d);
  }
  *m = sum;
  *e = most;
  return wide_log(sum, most);
}

template <class S>
void walk_row(const Team& team, const Model<S>& w, S* memory, double* sums, int64_t b) {
  using M = Model<S>;
  const Hmm& c = *w.c;
  const int64_t n = w.n, T = c.lengths[b], N = c.N, plane = 2 * n;
  S *y = memory, *beta = y + plane, *pairs = beta + 2 * plane, *alphas = pairs + N * n;
  const auto alpha = [&](int64_t t) { return alphas + plane * (w.wanted ? t : t & 1); };
  const auto emit = [&](int64_t t) {
    const S* x = static_cast<const S*>(c.scores.data) + t * c.scores.stride[0] + b * c.scores.stride[1];
    return exp_row(x, c.scores.stride[2], N, y, n);
  };
  double m = 1, e = 0, log_likelihood = 0;
  bool sound = (T < 1 || w.sound_initial) && (T < 2 || w.sound_transitions);
  for (int64_t t = 0; t < T; ++t) {
    team.listen();
    sound = emit(t) && sound;
    const S* last = alpha(t - 1);
    for (int64_t j = 0; j < n; j += M::lanes) {
      Wide<S> all = M::read(w.initial, n, j);
      if (t > 0) {
        all = product({Vec<S>(last[0]), Vec<S>(last[n])}, M::read(w.from, n, j));
        for (int64_t i = 1; i < N; ++i)
          all = sum(all, product({Vec<S>(last[i]), Vec<S>(last[n + i])}, M::read(w.from + i * plane, n, j)));
      }
      M::write(alpha(t), n, j, renewed(product(all, M::read(y, n, j))));
    }
  }
  if (T > 0) log_likelihood = log_sum(alpha(T - 1), n, &m, &e);
  if (!sound) log_likelihood = __builtin_nan("");
  static_cast<S*>(c.log_likelihood)[b] = static_cast<S>(log_likelihood);
  if (!w.wanted) return;

  const auto states = [&](int64_t t) {
    return static_cast<S*>(c.states.data) + t * c.states.stride[0] + b * c.states.stride[1];
  };
  const bool impossible = log_likelihood == -__builtin_huge_val(), none = impossible || !sound;
  for (int64_t t = none ? 0 : T; t < c.T; ++t)
    for (int64_t j = 0; j < N; ++j) states(t)[j] = sound || t >= T ? S(0) : static_cast<S>(log_likelihood);
  for (int64_t j = 0; j < N + N * n && !sound; ++j) sums[j] = log_likelihood;
  if (none || T == 0) return;
  const S weight = c.weights ? static_cast<const S*>(c.weights)[b] : S(1);
  const Wide<S> p{Vec<S>(static_cast<S>(1 / m)), Vec<S>(static_cast<S>(e))};
  for (int64_t j = 0; j < N * n; ++j) pairs[j] = 0;
  for (int64_t t = T - 1; t >= 0; --t) {
    team.listen();
    S *now = beta + plane * (t & 1), *after = beta + plane * ((t + 1) & 1);
    if (t < T - 1) {  // after = y beta of step t + 1
      emit(t + 1);
      for (int64_t j = 0; j < n; j += M::lanes) M::write(after, n, j, product(M::read(after, n, j), M::read(y, n, j)));
    }
    for (int64_t i = 0; i < n; i += M::lanes) {
      const Wide<S> a = M::read(alpha(t), n, i);
      Wide<S> all{Vec<S>(S(1)), Vec<S>(S(0))};
      if (t < T - 1) {
        all = {Vec<S>(S(0)), Vec<S>(static_cast<S>(kNothing))};
        for (int64_t j = 0; j < N; ++j) {
          const Wide<S> way = product({Vec<S>(after[j]), Vec<S>(after[n + j])}, M::read(w.to + j * plane, n, i));
          S* pair = pairs + j * n + i;
          store(pair, load(pair) + scaled(a.m * way.m * p.m, a.e + way.e - p.e));
          all = sum(all, way);
        }
      }
      const Vec<S> share = scaled(a.m * all.m * p.m, a.e + all.e - p.e);
      const int64_t count = N - i < M::lanes ? N - i : M::lanes;
      if (count > 0) store(states(t) + i, share * Vec<S>(weight), count);
      M::write(now, n, i, renewed(all));
    }
  }
  for (int64_t j = 0; j < N; ++j) sums[j] += static_cast<double>(states(0)[j]);
  for (int64_t j = 0; j < N * n; ++j) sums[N + j] += static_cast<double>(pairs[j]) * static_cast<double>(weight);
}

template <class S>
void some_groups(void* argument, const Team& team) {
  Model<S>& w = *static_cast<Model<S>*>(argument);
  const int64_t size = w.wanted ? w.c->N + w.c->N * w.n : 0;
  for (;;) {
    const int64_t g = __atomic_fetch_add(&w.next, 1, __ATOMIC_RELAXED);
    if (g >= w.groups) return;
    double* sums = w.sums + g * size;
    for (int64_t j = 0; j < size; ++j) sums[j] = 0;
    for (int64_t b = g; b < w.c->B; b += kGroups) walk_row(team, w, w.memory + team.rank * w.elements, sums, b);
  }
}

template <class S>
void run(const Hmm& c, int threads) {
  constexpr int lanes = Vec<S>::lanes;
  const int64_t N = c.N, n = (N + lanes - 1) / lanes * lanes, plane = 2 * n;
  Model<S> w{};
  w.c = &c;
  w.n = n;
  w.wanted = c.states.data;
  w.groups = c.B < kGroups ? c.B : kGroups;
  int64_t longest = 0;
  for (int64_t b = 0; b < c.B; ++b) longest = c.lengths[b] > longest ? c.lengths[b] : longest;
  w.elements = (plane * 3 + (w.wanted ? N * n + plane * longest : plane * 2) + N * n + 15) / 16 * 16;
  Workspace workspace;
  const auto take = [&](int64_t count, size_t size) { return workspace.take(static_cast<size_t>(count) * size); };
  w.initial = static_cast<S*>(take(plane * (1 + 2 * N), sizeof(S)));
  w.from = w.initial + plane;
  w.to = w.from + plane * N;
  w.memory = static_cast<S*>(take(w.elements * threads, sizeof(S)));
  w.sums = static_cast<double*>(take(w.wanted ? w.groups * (N + N * n) + 1 : 1, sizeof(double)));
  w.sound_initial = exp_row(static_cast<const S*>(c.initial), 1, N, w.initial, n);
  w.sound_transitions = true;
  for (int64_t i = 0; i < N; ++i) {
    const bool sound = exp_row(static_cast<const S*>(c.transitions) + i * N, 1, N, w.from + i * plane, n);
    w.sound_transitions = w.sound_transitions && sound;
    exp_row(static_cast<const S*>(c.transitions) + i, N, N, w.to + i * plane, n);
  }
  parallel(threads, some_groups<S>, &w);
  if (!w.wanted) return;
  const int64_t size = N + N * n;
  const auto total = [&](int64_t at) {
    double all = 0;
    for (int64_t g = 0; g < w.groups; ++g) all += w.sums[g * size + at];
    return static_cast<S>(all);
  };
  for (int64_t j = 0; j < N; ++j) static_cast<S*>(c.dinitial)[j] = total(j);
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < N; ++j) static_cast<S*>(c.dtransitions)[i * N + j] = total(N + j * n + i);
}

// ---- the best path: sums of logarithms in float64, of two equal ways the one from the lower state ----

struct Best {
  const Hmm* c;
  int64_t n;
  double* transitions;  // (N,n)
  double* memory;       // of a thread: best (2,n), came from (T,n)
  int64_t elements, next;
  bool sound;  // transitions
};

// x in float64, as wide_exp takes it; `sound` becomes false where it is no score.
template <class S>
FUSEDRNN_FORCE double logarithm(S x, bool& sound) {
  if (!(x < static_cast<S>(kLargest))) sound = false;
  return x <= static_cast<S>(-kLargest) ? -__builtin_huge_val() : static_cast<double>(x);
}

template <class S>
void best_row(const Team& team, const Best& w, double* memory, int64_t b) {
  constexpr int lanes = Vec<double>::lanes;
  using V = Vec<double>;
  const Hmm& c = *w.c;
  const int64_t n = w.n, T = c.lengths[b], N = c.N;
  double* from = memory + 2 * n;
  const auto score = [&](int64_t t, int64_t j) {
    return static_cast<const S*>(
        c.scores.data)[t * c.scores.stride[0] + b * c.scores.stride[1] + j * c.scores.stride[2]];
  };
  bool sound = T < 2 || w.sound;
  for (int64_t t = 0; t < T; ++t) {
    team.listen();
    double *now = memory + n * (t & 1), *last = memory + n * ((t + 1) & 1);
    if (t == 0)
      for (int64_t j = 0; j < N; ++j) now[j] = logarithm(static_cast<const S*>(c.initial)[j], sound);
    for (int64_t j = 0; t > 0 && j < n; j += lanes) {
      V most = V(last[0]) + load(w.transitions + j), source(0.0);
      for (int64_t i = 1; i < N; ++i) {
        const V way = V(last[i]) + load(w.transitions + i * n + j);
        const auto better = way.v > most.v;
        most = better ? way.v : most.v;
        source = better ? V(static_cast<double>(i)).v : source.v;
      }
      store(now + j, most);
      store(from + t * n + j, source);
    }
    for (int64_t j = 0; j < N; ++j) now[j] += logarithm(score(t, j), sound);
    for (int64_t j = N; j < n; ++j) now[j] = 0;
  }
  int64_t state = 0;
  double most = 0;
  if (T > 0) {
    const double* last = memory + n * ((T - 1) & 1);
    most = last[0];
    for (int64_t j = 1; j < N; ++j)
      if (last[j] > most) most = last[state = j];
  }
  if (!sound) most = __builtin_nan("");
  static_cast<S*>(c.log_likelihood)[b] = static_cast<S>(most);
  const bool none = !(most > -__builtin_huge_val());
  for (int64_t t = c.T - 1; t >= 0; --t) {
    c.paths[t * c.B + b] = t >= T || none ? -1 : state;
    if (t < T && t > 0 && !none) state = static_cast<int64_t>(from[t * n + state]);
  }
}

template <class S>
void some_best(void* argument, const Team& team) {
  Best& w = *static_cast<Best*>(argument);
  for (;;) {
    const int64_t b = __atomic_fetch_add(&w.next, 1, __ATOMIC_RELAXED);
    if (b >= w.c->B) return;
    best_row<S>(team, w, w.memory + team.rank * w.elements, b);
  }
}

template <class S>
void run_best(const Hmm& c, int threads) {
  constexpr int lanes = Vec<double>::lanes;
  const int64_t N = c.N, n = (N + lanes - 1) / lanes * lanes;
  Workspace workspace;
  Best w{&c, n, nullptr, nullptr, n * (c.T + 2) + 8, 0, true};
  w.transitions = static_cast<double*>(workspace.take(static_cast<size_t>(N * n) * 8));
  w.memory = static_cast<double*>(workspace.take(static_cast<size_t>(w.elements * threads) * 8));
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < n; ++j)
      w.transitions[i * n + j] =
          j < N ? logarithm(static_cast<const S*>(c.transitions)[i * N + j], w.sound) : -__builtin_huge_val();
  parallel(threads, some_best<S>, &w);
}

}  // namespace

void hmm(const Hmm& c, int threads) {
  if (c.paths)
    c.dtype == Dtype::f64 ? run_best<double>(c, threads) : run_best<float>(c, threads);
  else
    c.dtype == Dtype::f64 ? run<double>(c, threads) : run<float>(c, threads);
}

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
