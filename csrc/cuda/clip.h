// SPDX-License-Identifier: Apache-2.0
// Formula: norm = (sum |a|^order)^(1/order) over all arrays; a *= max_norm / (norm + 1e-6) unless that is >= 1; or
// every element to [-limit, limit].
// Reads spans of 32- and 64-bit numbers and 16-bit ones, any number of them, kSpans a launch. Writes in place.
// No routes: one kernel adds up a launch's spans, one finishes the sum, one scales. Sums are float64; which thread and
// block adds what depends on the spans' sizes alone.
// Limit: bytes, read once for the norm, read and written once more for the scaling.
#pragma once

#include "arrange.h"
#include "cuda.h"

namespace fusedrnn::cuda {

constexpr int kSpans = 96;  // as many as the arguments of a launch hold
constexpr int kClipThreads = 256, kClipBlocks = 264;
constexpr int64_t kChunk = 8192;  // elements that a block takes at a time; no chunk reaches over the end of a span

struct SpanList {
  Span spans[kSpans];
  int64_t first_chunk[kSpans + 1];  // of every span, counted over all of them
  int count;

  // The span of a chunk, and its elements [begin, end) there.
  FUSEDRNN_DEVICE const Span& at(int64_t chunk, int64_t& begin, int64_t& end) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_chunk[middle] <= chunk)
        low = middle;
      else
        high = middle - 1;
    }
    begin = (chunk - first_chunk[low]) * kChunk;
    end = begin + kChunk < spans[low].n ? begin + kChunk : spans[low].n;
    return spans[low];
  }
};

// f(tag, elements) with the tag type of a span's elements.
template <class F>
FUSEDRNN_DEVICE void with_type(const Span& span, const F& f) {
  if (span.dtype == Dtype::f32) f(F32(), static_cast<float*>(span.data));
  if (span.dtype == Dtype::f64) f(F64(), static_cast<double*>(span.data));
  if (span.dtype == Dtype::f16) f(dev::F16(), static_cast<u16*>(span.data));
  if (span.dtype == Dtype::bf16) f(dev::BF16(), static_cast<u16*>(span.data));
}

// The sum (`largest`: the largest) of one number per thread, in a fixed order; for thread 0. NaN stays NaN.
FUSEDRNN_DEVICE double block_sum(double v, bool largest, double* shared) {
  shared[dev::tid()] = v;
  for (int half = kClipThreads / 2; half > 0; half /= 2) {
    dev::sync_block();
    if (dev::tid() < half) {
      const double other = shared[dev::tid() + half], own = shared[dev::tid()];
      shared[dev::tid()] = largest ? (other > own || other != other ? other : own) : own + other;
    }
  }
  return shared[0];
}

// partial[block] = sum over this block's chunks of |a|, a^2 or the largest |a|.
struct ClipSum {
  SpanList list;
  double* partial;
  int order;  // 1, 2, or 0 for the largest
  static constexpr int kThreads = kClipThreads;
  static constexpr int shared_bytes() { return dev::shared_size<double>(kClipThreads); }

  FUSEDRNN_DEVICE void operator()() const {
    dev::Shared shared;
    double* const sums = shared.take<double>(kClipThreads);
    double sum = 0;
    for (int64_t chunk = dev::block(); chunk < list.first_chunk[list.count]; chunk += dev::blocks()) {
      int64_t begin, end;
      const Span& span = list.at(chunk, begin, end);
      with_type(span, [&](auto tag, auto* a) {
        using T = decltype(tag);
        for (int64_t i = begin + dev::tid(); i < end; i += kThreads) {
          const double v = static_cast<double>(T::load(a[i])), size = v < 0 ? -v : v;
          if (order == 0)
            sum = size > sum || size != size ? size : sum;
          else
            sum += order == 1 ? size : v * v;
        }
      });
    }
    sum = block_sum(sum, order == 0, sums);
    if (dev::tid() == 0) partial[dev::block()] = sum;
  }
};

// norm and factor from the partial sums of all launches; one block.
struct ClipFinish {
  const double* partial;
  int count, order;
  double max_norm;
  double *norm, *factor;
  static constexpr int kThreads = kClipThreads;
  static constexpr int shared_bytes() { return dev::shared_size<double>(kClipThreads); }

  FUSEDRNN_DEVICE void operator()() const {
    dev::Shared shared;
    double* const sums = shared.take<double>(kClipThreads);
    double sum = 0;
    for (int i = dev::tid(); i < count; i += kThreads) {
      const double v = partial[i];
      sum = order == 0 ? (v > sum || v != v ? v : sum) : sum + v;
    }
    sum = block_sum(sum, order == 0, sums);
    if (dev::tid() == 0) {
      *norm = order == 2 ? ::sqrt(sum) : sum;
      *factor = max_norm / (*norm + 1e-6);
    }
  }
};

// a *= *factor unless that is >= 1 (NaN is not); or with a null factor, a to [-limit, limit].
struct ClipApply {
  SpanList list;
  const double* factor;
  double limit;
  static constexpr int kThreads = kClipThreads;

  FUSEDRNN_DEVICE void operator()() const {
    const double by = factor ? *factor : 1;
    if (factor && by >= 1) return;
    for (int64_t chunk = dev::block(); chunk < list.first_chunk[list.count]; chunk += dev::blocks()) {
      int64_t begin, end;
      const Span& span = list.at(chunk, begin, end);
      with_type(span, [&](auto tag, auto* a) {
        using T = decltype(tag);
        using Math = MathOf<T>;
        const Math scale = static_cast<Math>(by), most = static_cast<Math>(limit);
        for (int64_t i = begin + dev::tid(); i < end; i += kThreads) {
          const Math v = T::load(a[i]);
          a[i] = T::store(factor ? v * scale : v > most ? most : v < -most ? -most : v);
        }
      });
    }
  }
};

// ---- the host's side
// f(list, blocks) for every launch that the spans need.
template <class F>
void each_launch(const Span* spans, size_t count, const F& f) {
  SpanList list;
  list.count = 0;
  list.first_chunk[0] = 0;
  const auto flush = [&] {
    const int64_t chunks = list.first_chunk[list.count];
    if (chunks > 0) f(list, static_cast<int>(chunks < kClipBlocks ? chunks : kClipBlocks));
    list.count = 0;
  };
  for (size_t i = 0; i < count; ++i) {
    if (spans[i].n <= 0) continue;
    list.spans[list.count] = spans[i];
    list.first_chunk[list.count + 1] = list.first_chunk[list.count] + (spans[i].n + kChunk - 1) / kChunk;
    if (++list.count == kSpans) flush();
  }
  flush();
}

inline size_t clip_doubles(const Span* spans, size_t count) {  // partial sums, and the factor
  size_t n = 1;
  each_launch(spans, count, [&](const SpanList&, int blocks) { n += static_cast<size_t>(blocks); });
  return n;
}

template <class Queue>
void run_clip_norm(Queue& queue, const Span* spans, size_t count, int order, double max_norm, double* norm,
                   double* workspace) {
  double *const factor = workspace, *const partial = workspace + 1;
  int n = 0;
  each_launch(spans, count, [&](const SpanList& list, int blocks) {
    queue.run(ClipSum{list, partial + n, order}, blocks);
    n += blocks;
  });
  queue.run(ClipFinish{partial, n, order, max_norm, norm, factor}, 1);
  if (max_norm >= 0)
    each_launch(spans, count, [&](const SpanList& list, int blocks) { queue.run(ClipApply{list, factor, 0}, blocks); });
}

template <class Queue>
void run_clip_value(Queue& queue, const Span* spans, size_t count, double limit) {
  each_launch(spans, count,
              [&](const SpanList& list, int blocks) { queue.run(ClipApply{list, nullptr, limit}, blocks); });
}

// cuda.h's functions, on a machine (run.h).
template <class Machine>
Status clip_norm_on(const Span* spans, size_t count, double order, double max_norm, double* norm, void* workspace,
                    void* stream) {
  Status status;
  if (!Machine::device(&status)) return status;
  auto queue = Machine::simple(stream);
  const int code = order == 1 ? 1 : order == 2 ? 2 : 0;
  run_clip_norm(queue, spans, count, code, max_norm, norm, static_cast<double*>(workspace));
  return queue.failure();
}
template <class Machine>
Status clip_value_on(const Span* spans, size_t count, double limit, void* stream) {
  Status status;
  if (!Machine::device(&status)) return status;
  auto queue = Machine::simple(stream);
  run_clip_value(queue, spans, count, limit);
  return queue.failure();
}

}  // namespace fusedrnn::cuda
