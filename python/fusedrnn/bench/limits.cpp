// SPDX-License-Identifier: Apache-2.0
// What this machine's cores can do: multiply-adds per second, and bytes read per second from a buffer of a given size.
// Compiled with -march=native when a benchmark starts; the figures are the limits that the tables divide by.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <thread>
#include <vector>

#ifdef __aarch64__
#define REGISTER "w"
#else
#define REGISTER "x"
#endif

namespace {

constexpr int trials = 20;  // a limit is what was reached once, whatever else runs here

using Clock = std::chrono::steady_clock;

template <int Bytes>
struct Vector {
  typedef float type __attribute__((vector_size(Bytes)));
};

double seconds(Clock::time_point from) { return std::chrono::duration<double>(Clock::now() - from).count(); }

// Runs body(thread) on all threads at once, `trials` times; returns the shortest time from the common start to the last
// end.
template <typename Body>
double shortest(int threads, Body body) {
  double best = 1e30;
  for (int trial = 0; trial < trials; ++trial) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; ++i)
      pool.emplace_back([&, i] {
        ++ready;
        while (!go) std::this_thread::yield();
        body(i);
      });
    while (ready != threads - 1) std::this_thread::yield();
    const auto start = Clock::now();
    go = true;
    body(0);
    for (auto& thread : pool) thread.join();
    const double time = seconds(start);
    if (time < best) best = time;
  }
  return best;
}

// Chains that depend on nothing but themselves: enough of them to cover the latency of two units.
template <int Bytes>
double flops(int threads, long rounds) {
  using V = typename Vector<Bytes>::type;
  constexpr int chains = 12;
  const double time = shortest(threads, [rounds](int) {
    V chain[chains], a, b;
    for (int lane = 0; lane < Bytes / 4; ++lane) a[lane] = 0.999f, b[lane] = 0.001f;
#pragma GCC unroll 12
    for (int k = 0; k < chains; ++k) chain[k] = a * float(k);
    asm volatile("" : "+" REGISTER(a), "+" REGISTER(b));
    for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
      for (int k = 0; k < chains; ++k) chain[k] = chain[k] * a + b;
    }
    V sum = chain[0];
    for (int k = 1; k < chains; ++k) sum += chain[k];
    asm volatile("" : : REGISTER(sum));
  });
  return 2.0 * (Bytes / 4) * chains * double(rounds) * threads / time;
}

template <int Bytes>
double bandwidth(size_t bytes, int threads, size_t total) {
  using V = typename Vector<Bytes>::type;
  constexpr size_t step = 8;
  const size_t count = bytes / sizeof(V) / step * step;
  const long rounds = long(total / (count * sizeof(V))) + 1;
  std::vector<V*> buffers;
  for (int i = 0; i < threads; ++i) {
    buffers.push_back(static_cast<V*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
    for (size_t n = 0; n < count; ++n) buffers[size_t(i)][n] = V{} + 1.0f;
  }
  const double time = shortest(threads, [&](int i) {
    const V* data = buffers[size_t(i)];
    V sum[step] = {};
    for (long round = 0; round < rounds; ++round) {
      for (size_t n = 0; n < count; n += step)
#pragma GCC unroll 8
        for (size_t k = 0; k < step; ++k) sum[k] += data[n + k];
      asm volatile("" : : : "memory");
    }
    for (size_t k = 1; k < step; ++k) sum[0] += sum[k];
    asm volatile("" : : REGISTER(sum[0]));
  });
  for (V* buffer : buffers) std::free(buffer);
  return double(rounds) * double(count * sizeof(V)) * threads / time;
}

double larger(double a, double b) { return a > b ? a : b; }

}  // namespace

// Multiply-adds count as two. 64-byte vectors are faster on some machines and slower on others: the better counts.
extern "C" double fusedrnn_flops(int threads, long rounds) {
#ifdef __AVX512F__
  return larger(flops<32>(threads, rounds), flops<64>(threads, rounds));
#elif defined(__AVX__)
  return flops<32>(threads, rounds);
#else
  return flops<16>(threads, rounds);
#endif
}

// `bytes` per thread, each thread its own; `total` bytes are read by each.
extern "C" double fusedrnn_bandwidth(size_t bytes, int threads, size_t total) {
#ifdef __AVX512F__
  return larger(bandwidth<32>(bytes, threads, total), bandwidth<64>(bytes, threads, total));
#elif defined(__AVX__)
  return bandwidth<32>(bytes, threads, total);
#else
  return bandwidth<16>(bytes, threads, total);
#endif
}
