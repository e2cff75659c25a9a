// SPDX-License-Identifier: Apache-2.0
// Formula: csrc/cpu/alignment/ctc.cpp's. Reads log_probs (T,B,C) any strides; labels, first, label_counts and lengths
// lie on the device too. Overwrites loss (B) and, if wanted, dlog_probs (T,B,C). No routes: CtcFill writes dloss *
// exp(log_probs) with the whole device; then CtcRows walks a row with one block and takes the paths' shares off. Each
// thread has its states; a state is a number m * 2^e as in csrc/cpu/arithmetic/wide.h. The order of every sum depends
// on the sizes alone.
// Limit: CtcFill bytes; CtcRows latency, two barriers a step forward and about ten backward.
#pragma once

#include "arrange.h"
#include "cuda.h"

namespace fusedrnn::cuda {

FUSEDRNN_DEVICE float power_of_two(float m, int n) { return ::ldexpf(m, n); }
FUSEDRNN_DEVICE double power_of_two(double m, int n) { return ::ldexp(m, n); }
FUSEDRNN_DEVICE float exact_exp(float x) { return ::expf(x); }
FUSEDRNN_DEVICE double exact_exp(double x) { return ::exp(x); }
FUSEDRNN_DEVICE float whole(float x) { return ::rintf(x); }
FUSEDRNN_DEVICE double whole(double x) { return ::rint(x); }
FUSEDRNN_DEVICE float split(float m, int* n) { return ::frexpf(m, n); }
FUSEDRNN_DEVICE double split(double m, int* n) { return ::frexp(m, n); }

template <class S>
struct WideNumber {  // m * 2^e, e whole; nothing where e <= kNothing / 2
  static constexpr S kNothing = static_cast<S>(-1e38);
  S m, e;

  FUSEDRNN_DEVICE static S scaled(S m, S d) { return d < S(-4000) ? m * S(0) : power_of_two(m, static_cast<int>(d)); }
  FUSEDRNN_DEVICE WideNumber operator*(const WideNumber& o) const {
    return {m * o.m, e + o.e > kNothing ? e + o.e : kNothing};
  }
  FUSEDRNN_DEVICE WideNumber operator+(const WideNumber& o) const {
    const S most = e > o.e ? e : o.e;
    return {scaled(m, e - most) + scaled(o.m, o.e - most), most};
  }
  FUSEDRNN_DEVICE WideNumber renewed() const {
    if (!(m > S(0)) || m - m != S(0)) return *this;
    int n;
    const S fraction = split(m, &n);
    return {fraction, e + static_cast<S>(n)};
  }
  FUSEDRNN_DEVICE static WideNumber exp(S x) {
    if (x <= static_cast<S>(-1e37)) return {S(1), kNothing};
    if (!(x < static_cast<S>(1e37))) return {x - x, S(0)};  // NaN, from NaN and infinity
    const S n = whole(x * static_cast<S>(1.4426950408889634));
    S r = sizeof(S) == 4 ? x - n * static_cast<S>(0x1.62e400p-1) - n * static_cast<S>(0x1.7f7d1cp-20)
                         : x - n * static_cast<S>(0x1.62e42fefa3800p-1) - n * static_cast<S>(0x1.ef35793c76730p-45);
    r = r > S(0.35) ? S(0.35) : r < S(-0.35) ? S(-0.35) : r;  // where x has no fraction left
    return {exact_exp(r), n};
  }
  FUSEDRNN_DEVICE double log() const {
    if (m != m) return static_cast<double>(m);
    return e <= kNothing / 2 ? -HUGE_VAL : ::log(static_cast<double>(m)) + static_cast<double>(e) * 0.69314718055994531;
  }
};

// What both kernels know.
template <class S>
struct CtcArgs {
  int64_t T, B, C, blank;
  const S* log_probs;
  int64_t from_t, from_b, from_c;
  const int64_t *labels, *first, *label_counts, *lengths;
  S *loss, *dlog_probs;
  const S* dloss;
  int64_t to_t, to_b, to_c;
  bool zero_infinity;

  FUSEDRNN_DEVICE S score(int64_t t, int64_t b, int64_t c) const {
    return log_probs[t * from_t + b * from_b + c * from_c];
  }
  FUSEDRNN_DEVICE S& gradient(int64_t t, int64_t b, int64_t c) const {
    return dlog_probs[t * to_t + b * to_b + c * to_c];
  }
  FUSEDRNN_DEVICE S factor(int64_t b) const { return dloss ? dloss[b] : S(1); }
};

// dlog_probs = dloss exp(log_probs), 0 past a row's length.
template <class S>
struct CtcFill {
  CtcArgs<S> a;
  static constexpr int kThreads = kArrangeThreads;

  FUSEDRNN_DEVICE void operator()() const {
    for (int64_t at = static_cast<int64_t>(dev::block()) * kThreads + dev::tid(); at < a.T * a.B * a.C;
         at += static_cast<int64_t>(dev::blocks()) * kThreads) {
      const int64_t c = at % a.C, b = at / a.C % a.B, t = at / a.C / a.B;
      a.gradient(t, b, c) = t < a.lengths[b] ? exact_exp(a.score(t, b, c)) * a.factor(b) : S(0);
    }
  }
};

constexpr int kCtcThreads = 128;

// Of each row in workspace, in numbers: alpha (kept,2,n), y beta (2,2,n), shares (n), with n states at most; in links:
// (2,labels): the next label that is the same (-1: none), and whether there is none before.
template <class S>
struct CtcRows {
  CtcArgs<S> a;
  int64_t most, kept, size;  // labels of a row, at most; steps of alpha; numbers of a row
  S* numbers;
  int64_t* links;
  static constexpr int kThreads = kCtcThreads, kRenewal = 16;
  static constexpr int shared_bytes() { return dev::shared_size<S>(kThreads); }
  using Number = WideNumber<S>;

  FUSEDRNN_DEVICE void operator()() const {
    dev::Shared shared;
    S* const sums = shared.take<S>(kThreads);
    // a row ends with a barrier behind the last use of shared memory, and has its own part of the workspace
    for (int64_t b = dev::block(); b < a.B; b += dev::blocks()) row(b, sums);
  }

 private:
  FUSEDRNN_DEVICE void row(int64_t b, S* sums) const {
    const int tid = dev::tid();
    const int64_t count = a.label_counts[b], n = 2 * count + 1, T = a.lengths[b];
    const int64_t* const label = a.labels + a.first[b];
    S* const alphas = numbers + b * size;
    S* const betas = alphas + 2 * kept * (2 * most + 1);
    S* const share = betas + 4 * (2 * most + 1);
    int64_t *const next = links + b * 2 * most, *const head = next + most;
    const auto class_of = [&](int64_t s) { return s % 2 ? label[s / 2] : a.blank; };
    const auto jumps = [&](int64_t s) { return s % 2 && s >= 3 && label[s / 2] != label[s / 2 - 1]; };  // from s - 2
    const auto alpha = [&](int64_t t) { return alphas + 2 * n * (a.dlog_probs ? t + 1 : (t + 1) & 1); };
    const auto get = [&](const S* p, int64_t s) { return Number{p[s], p[n + s]}; };
    const auto put = [&](S* p, int64_t s, Number v, bool renew) {
      if (renew) v = v.renewed();
      p[s] = v.m;
      p[n + s] = v.e;
    };
    for (int64_t s = tid; s < n; s += kThreads)
      put(alpha(-1), s, s == 0 ? Number{S(1), S(0)} : Number{S(0), Number::kNothing}, false);
    for (int64_t j = tid; a.dlog_probs && j < count; j += kThreads) {
      int64_t k = j + 1, before = j - 1;
      while (k < count && label[k] != label[j]) ++k;
      while (before >= 0 && label[before] != label[j]) --before;
      next[j] = k < count ? k : -1;
      head[j] = before < 0;
    }
    dev::sync_block();
    for (int64_t t = 0; t < T; ++t) {
      const S* const last = alpha(t - 1);
      for (int64_t s = tid; s < n; s += kThreads) {
        Number v = get(last, s);
        if (s > 0) v = v + get(last, s - 1);
        if (jumps(s)) v = v + get(last, s - 2);
        put(alpha(t), s, v * Number::exp(a.score(t, b, class_of(s))), t % kRenewal == kRenewal - 1);
      }
      dev::sync_block();
    }
    Number p = get(alpha(T - 1), n - 1);
    if (n > 1) p = p + get(alpha(T - 1), n - 2);
    const double loss = -p.log();
    const bool impossible = loss == HUGE_VAL;
    if (tid == 0) a.loss[b] = impossible && a.zero_infinity ? S(0) : static_cast<S>(loss);
    if (!a.dlog_probs) return;

    if (impossible || loss != loss) {
      const S value = impossible && a.zero_infinity ? S(0) : static_cast<S>(loss - loss);
      for (int64_t at = tid; at < T * a.C; at += kThreads) a.gradient(at / a.C, b, at % a.C) = value;
      return;
    }
    const S factor = a.factor(b);
    const auto beta = [&](int64_t t) { return betas + 2 * n * (t & 1); };  // y beta, of the step after the one in work
    for (int64_t s = tid; s < n; s += kThreads)
      put(beta(T), s, s == n - 1 ? Number{S(1), S(0)} : Number{S(0), Number::kNothing}, false);
    dev::sync_block();
    for (int64_t t = T - 1; t >= 0; --t) {
      const S* const after = beta(t + 1);
      S blanks = 0;
      for (int64_t s = tid; s < n; s += kThreads) {
        Number v = get(after, s);
        if (s + 1 < n) v = v + get(after, s + 1);
        if (s + 2 < n && jumps(s + 2)) v = v + get(after, s + 2);
        const Number way = get(alpha(t), s);
        share[s] = Number::scaled(way.m * v.m / p.m, way.e + v.e - p.e);
        if (s % 2 == 0) blanks += share[s];
        put(beta(t), s, v * Number::exp(a.score(t, b, class_of(s))), t % kRenewal == 0);
      }
      sums[tid] = blanks;
      for (int half = kThreads / 2; half > 0; half /= 2) {
        dev::sync_block();
        if (tid < half) sums[tid] += sums[tid + half];
      }
      if (tid == 0) a.gradient(t, b, a.blank) -= sums[0] * factor;
      for (int64_t j = tid; j < count; j += kThreads) {
        if (!head[j]) continue;
        S all = 0;
        for (int64_t k = j; k >= 0; k = next[k]) all += share[2 * k + 1];
        a.gradient(t, b, label[j]) -= all * factor;
      }
      dev::sync_block();
    }
  }
};

// ---- the host's side
inline int64_t ctc_kept(const Ctc& c, int64_t longest) { return c.dlog_probs.data ? longest + 1 : 2; }

inline int64_t ctc_numbers(int64_t most, int64_t kept) { return (2 * kept + 5) * (2 * most + 1); }
inline size_t ctc_bytes(const Ctc& c, int64_t most, int64_t longest) {
  const int64_t size = c.dtype == Dtype::f64 ? 8 : 4;
  return static_cast<size_t>(c.B * (2 * most * 8 + ctc_numbers(most, ctc_kept(c, longest)) * size));
}

template <class S, class Queue>
void run_ctc(Queue& queue, const Ctc& c, int64_t most, int64_t longest, void* workspace) {
  const auto* from = c.log_probs.stride;
  const auto* to = c.dlog_probs.stride;
  const CtcArgs<S> a{c.T,
                     c.B,
                     c.C,
                     c.blank,
                     static_cast<const S*>(c.log_probs.data),
                     from[0],
                     from[1],
                     from[2],
                     c.labels,
                     c.first,
                     c.label_counts,
                     c.lengths,
                     static_cast<S*>(c.loss),
                     static_cast<S*>(c.dlog_probs.data),
                     static_cast<const S*>(c.dloss),
                     to[0],
                     to[1],
                     to[2],
                     c.zero_infinity};
  const int64_t elements = c.T * c.B * c.C, wide = (elements + kArrangeThreads - 1) / kArrangeThreads;
  if (a.dlog_probs && elements > 0) queue.run(CtcFill<S>{a}, wide < 4096 ? wide : 4096);
  auto* const links = static_cast<int64_t*>(workspace);
  auto* const numbers = reinterpret_cast<S*>(links + c.B * 2 * most);
  const int64_t kept = ctc_kept(c, longest);
  if (c.B > 0) queue.run(CtcRows<S>{a, most, kept, ctc_numbers(most, kept), numbers, links}, c.B < 65536 ? c.B : 65536);
}

// cuda.h's function, on a machine (run.h).
template <class Machine>
Status ctc_on(const Ctc& c, int64_t most, int64_t longest, void* workspace, void* stream) {
  Status status;
  if (!Machine::device(&status)) return status;
  auto queue = Machine::simple(stream);
  if (c.dtype == Dtype::f64)
    run_ctc<double>(queue, c, most, longest, workspace);
  else
    run_ctc<float>(queue, c, most, longest, workspace);
  return queue.failure();
}

}  // namespace fusedrnn::cuda
