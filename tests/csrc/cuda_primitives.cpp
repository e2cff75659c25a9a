// SPDX-License-Identifier: Apache-2.0
// The test of the CPU twin itself: small kernels that are right, and small kernels with one mistake each, which must be
// named.
#include "cuda_primitives.h"

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "device_cpu.h"

namespace fusedrnn::test {
namespace {

using namespace dev;
using sim::Options;
using sim::Policy;

template <class F>
struct Kernel {
  F body;
  void operator()() const { body(); }
};

// What the launch had to say; empty: nothing.
template <class F>
std::string told(int grid, int cluster, int threads, int bytes, F body, uint64_t seed) {
  try {
    sim::launch(grid, cluster, threads, bytes, Kernel<F>{body},
                Options{.seed = seed, .policy = static_cast<Policy>(seed % 3)});
    return "";
  } catch (const sim::Failure& failure) {
    return failure.what();
  }
}

int bad = 0;

void expect(bool good, const char* what, const std::string& got = "") {
  if (good) return;
  ++bad;
  std::printf("WRONG %s: %s\n", what, got.empty() ? "nothing was said" : got.c_str());
}

void expect_told(const std::string& got, const char* part, const char* what) {
  expect(got.find(part) != std::string::npos, what, got);
}

template <class T>
constexpr int kDepth = 2 * T::kPer;  // of one product
template <class T>
constexpr int kEach = T::kPer / 4;  // values in a register

float value(int row, int k, int of) { return static_cast<float>((row * 7 + k * 3 + of) % 13 - 6) * 0.25f; }

// This lane's registers of A, whose row 0 is `row0`, as the PTX manual's tables have them.
template <class T>
U4 registers_of_a(int row0) {
  const int group = tid() % 32 >> 2, in_group = tid() & 3;
  U4 a{};
  for (int i = 0; i < 4 * kEach<T>; ++i) {
    const int r = i / kEach<T>, e = i % kEach<T>;
    const int row = r == 0 || r == 2 ? group : group + 8;
    const int column = kEach<T> == 2 ? in_group * 2 + e + (i >= 4 ? 8 : 0) : in_group + (r >= 2 ? 4 : 0);
    if constexpr (kEach<T> == 2)
      a.w[r] |= static_cast<u32>(T::store(value(row0 + row, column, 0))) << 16 * e;
    else
      a.w[r] = bits(value(row0 + row, column, 0));
  }
  return a;
}

// D = A B with the operands and sums laid out as the PTX manual's tables say (row and column of every register, by
// lane).
template <class T>
void products(uint64_t seed) {
  float D[16][8] = {};
  const std::string said = told(
      1, 1, 32, 0,
      [&] {
        const int group = tid() >> 2, in_group = tid() & 3;
        u32 b[2] = {};
        for (int i = 0; i < 2 * kEach<T>; ++i) {
          const int r = i / kEach<T>, e = i % kEach<T>;
          const int row = kEach<T> == 2 ? in_group * 2 + e + (i >= 2 ? 8 : 0) : in_group + (r >= 1 ? 4 : 0);
          if constexpr (kEach<T> == 2)
            b[r] |= static_cast<u32>(T::store(value(row, group, 5))) << 16 * e;
          else
            b[r] = bits(value(row, group, 5));
        }
        float d[4] = {1, 1, 1, 1};
        mma<T>(d, registers_of_a<T>(0), b[0], b[1]);
        for (int i = 0; i < 4; ++i) D[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = d[i];
      },
      seed);
  expect(said.empty(), "a product by one warp", said);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 1;
      for (int k = 0; k < kDepth<T>; ++k) sum += value(i, k, 0) * value(k, j, 5);
      expect(D[i][j] == sum, "an element of a product", std::to_string(D[i][j]));
    }
}

// The same for sm_75's product of half the depth; and two of them are one of the full depth, as device.h has it.
void half_products(uint64_t seed) {
  const auto value = [](int row, int k, int of) { return static_cast<float>((row * 5 + k * 3 + of) % 11 - 5) * 0.5f; };
  const auto pair = [&](int row, int k, int of, bool down) {
    u32 two = 0;
    for (int e = 0; e < 2; ++e)
      two |= static_cast<u32>(F16::store(down ? value(row + e, k, of) : value(row, k + e, of))) << 16 * e;
    return two;
  };
  float D[16][8] = {}, full[32][4] = {}, halves[32][4] = {};
  const std::string said = told(
      1, 1, 32, 0,
      [&] {
        const int group = tid() >> 2, in_group = tid() & 3, k = in_group * 2;
        const U4 a{{pair(group, k, 0, false), pair(group + 8, k, 0, false), pair(group, k + 8, 0, false),
                    pair(group + 8, k + 8, 0, false)}};
        const u32 b0 = pair(k, group, 4, true), b1 = pair(k + 8, group, 4, true);
        float d[4] = {2, 2, 2, 2};
        mma_half_depth(d, a.w[0], a.w[1], b0);
        for (int i = 0; i < 4; ++i) D[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = d[i];
        mma_half_depth(halves[tid()], a.w[0], a.w[1], b0);
        mma_half_depth(halves[tid()], a.w[2], a.w[3], b1);
        mma<F16>(full[tid()], a, b0, b1);
      },
      seed);
  expect(said.empty(), "a product of half the depth by one warp", said);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 2;
      for (int k = 0; k < 8; ++k) sum += value(i, k, 0) * value(k, j, 4);
      expect(D[i][j] == sum, "an element of a product of half the depth", std::to_string(D[i][j]));
    }
  for (int i = 0; i < 128; ++i) expect(full[i / 4][i % 4] == halves[i / 4][i % 4], "two halves of a product");
}

// A chain of two products by a warpgroup, of 32 columns, with B in shared memory laid out as the PTX manual has it for
// an operand without swizzling whose depth is contiguous; gaps between its parts, so that no two strides are equal.
template <class T>
void wide_products(uint64_t seed) {
  constexpr int kColumns = 32, kAlongDepth = 1024, kAlongColumns = 192;
  std::vector<float> D(64 * kColumns);
  const std::string said = told(
      1, 1, 128, shared_size<U4>(128),
      [&] {
        Shared shared;
        U4* const s = shared.take<U4>(128);
        for (int at = tid(); at < 2 * kColumns; at += 128) {
          const int line = at / kColumns, column = at % kColumns;
          union {
            U4 v;
            typename T::Storage x[T::kPer];
          } u;
          for (int k = 0; k < T::kPer; ++k) u.x[k] = T::store(value(line * T::kPer + k, column, 5));
          operand16(s + (line * kAlongDepth + column / 8 * kAlongColumns) / 16 + column % 8, u.v);
        }
        fence_async();
        sync_block();
        const U4 a = registers_of_a<T>(tid() / 32 * 16);
        float d[kColumns / 8][4];
        for (auto& tile : d)
          for (float& x : tile) x = 1;
        wgmma_fence();
        for (int twice = 0; twice < 2; ++twice) wgmma<T>(d, a, operand(s, kAlongDepth, kAlongColumns));
        wgmma_commit();
        expect(d[1][2] != d[1][2], "sums that nobody waited for are not there yet");
        wgmma_wait(d);
        for (int i = 0; i < kColumns / 2; ++i) {  // the manual's table of d0, d1, ...
          const int row = tid() / 32 * 16 + tid() % 32 / 4 + (i / 2 % 2) * 8,
                    column = i / 4 * 8 + tid() % 4 * 2 + i % 2;
          D[static_cast<size_t>(row * kColumns + column)] = d[i / 4][i % 4];
        }
      },
      seed);
  expect(said.empty(), "a product by a warpgroup", said);
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < kColumns; ++j) {
      float sum = 1;
      for (int k = 0; k < kDepth<T>; ++k) sum += 2 * value(i, k, 0) * value(k, j, 5);
      const float got = D[static_cast<size_t>(i * kColumns + j)];
      expect(got == sum, "an element of a warpgroup's product", std::to_string(got));
    }
}

// What `change` makes of a sound product by a warpgroup: a word of what was said, or of what came out.
template <class F>
std::string wide_mistake(uint64_t seed, F change) {
  bool nan = false;
  const std::string said = told(
      1, 1, 128, shared_size<U4>(16),
      [&] {
        Shared shared;
        U4* const s = shared.take<U4>(16);
        float d[1][4] = {};
        change(s, d);
        wgmma_wait(d);
        if (d[0][0] != d[0][0]) nan = true;
      },
      seed);
  return said.empty() && nan ? "nan" : said;
}

void numbers() {
  for (u32 i = 0; i < 65536; ++i) {
    const auto h = static_cast<u16>(i);
    const float f = F16::load(h), b = BF16::load(h);
    expect(f != f ? F16::store(f) == 0x7FFF : F16::store(f) == h, "float16 there and back");
    expect(b != b ? BF16::store(b) == 0x7FFF : BF16::store(b) == h, "bfloat16 there and back");
  }
  expect(F16::store(65519.9f) == 0x7BFF && F16::store(65520.0f) == 0x7C00, "float16's end");
  expect(F16::store(1 + 0x1p-11f) == F16::store(1.0f) && F16::store(1 + 3 * 0x1p-11f) == F16::store(1 + 0x1p-9f),
         "float16 rounds to even");
  expect(TF32::operand(1 + 0x1p-11f) == 1 + 0x1p-10f, "tf32 rounds ties away from zero");
}

void sound(uint64_t seed) {
  alignas(16) U4 from[64], to[64];
  for (u32 i = 0; i < 64; ++i) from[i] = {{i, i + 1, i + 2, i + 3}};
  std::string said = told(
      1, 1, 64, shared_size<U4>(64),
      [&] {
        Shared shared;
        U4* const s = shared.take<U4>(64);
        cp_async16(s + tid(), from + tid());
        cp_async_commit();
        cp_async_wait<0>();
        sync_block();
        to[tid()] = s[63 - tid()];
      },
      seed);
  expect(said.empty() && to[0].w[0] == 63 && to[63].w[3] == 3, "a copy turned round through shared memory", said);

  // every block of a cluster pushes its rank to every other
  u32 sums[4] = {};
  said = told(
      4, 4, 32, shared_size<U4>(4) + shared_size<u64>(1),
      [&] {
        Shared shared;
        U4* const s = shared.take<U4>(4);
        u64* const bar = shared.take<u64>(1);
        if (tid() == 0) {
          mbar_init(bar, 1);
          mbar_arrive_expect(bar, 64);
        }
        sync_cluster();
        const u32 r = static_cast<u32>(cluster_rank());
        if (tid() < 4) st_async(peer(s + r, tid()), U4{{r, r, r, r}}, peer(bar, tid()));
        bool late = false;
        mbar_wait(bar, 0, late);
        if (tid() == 0) sums[block()] = s[0].w[3] + 10 * s[1].w[2] + 100 * s[2].w[1] + 1000 * s[3].w[0];
      },
      seed);
  expect(said.empty() && sums[0] == 3210 && sums[3] == 3210, "messages inside a cluster", said);

  // a word goes round the blocks of a grid
  alignas(16) U4 ring[5];
  for (U4& v : ring) v = {{kEmpty, kEmpty, kEmpty, kEmpty}};
  said = told(
      4, 1, 32, 0,
      [&] {
        if (tid()) return;
        U4 v[1] = {{{7, 7, 7, 7}}};
        bool late = false;
        if (block() > 0) poll16(v, ring + block(), 16, 1, late);
        for (u32& w : v[0].w) ++w;
        publish16(ring + block() + 1, v[0]);
      },
      seed);
  expect(said.empty() && ring[4].w[0] == 11 && ring[4].w[3] == 11, "a hand-off through global memory", said);
}

void mistakes(uint64_t seed) {
  alignas(16) U4 global[2] = {};
  for (u32& w : global[0].w) w = kEmpty;
  bool late = false;
  expect_told(told(
                  1, 1, 64, 0,
                  [&] {
                    if (tid() < 32) sync_block();
                  },
                  seed),
              "sync_block", "half a block at a barrier");
  expect_told(told(
                  1, 1, 32, 0,
                  [&] {
                    if (tid() % 2)
                      sync_warp();
                    else
                      shfl_xor(0, 1);
                  },
                  seed),
              "divergent collective", "lanes apart");
  expect_told(told(
                  1, 1, 32, 0,
                  [&] {
                    if (tid() != 9) shfl_xor(0, 1);
                  },
                  seed),
              "at shfl_xor", "a lane that left before a shuffle");
  expect_told(told(
                  2, 1, 32, 0,
                  [&] {
                    U4 v[1];
                    poll16(v, global, 16, 1, late);
                  },
                  seed),
              "deadlock: block 0 thread 0 at poll16 cuda_primitives.cpp", "nobody publishes");
  expect_told(told(
                  1, 1, 32, shared_size<u64>(1),
                  [&] {
                    Shared shared;
                    u64* const bar = shared.take<u64>(1);
                    if (tid() == 0) mbar_init(bar, 1);
                    sync_block();
                    mbar_wait(bar, 0, late);
                  },
                  seed),
              "at mbar_wait", "nobody arrives");
  expect_told(told(
                  1, 1, 32, shared_size<u64>(1),
                  [&] {
                    Shared shared;
                    u64* const bar = shared.take<u64>(1);
                    if (tid() == 0) {
                      mbar_init(bar, 1);
                      mbar_arrive_expect(bar, 16);
                      mbar_arrive_expect(bar, 16);
                    }
                  },
                  seed),
              "more arrivals", "two arrivals where one is counted");
  expect_told(told(
                  1, 1, 32, 0,
                  [&] {
                    Shared shared;
                    shared.take<float>(1);
                  },
                  seed),
              "shared memory", "more shared memory than the launch gives");
  expect_told(told(
                  1, 1, 32, 128,
                  [&] {
                    Shared shared;
                    shared.take<float>(tid() == 3 ? 8 : 4);
                  },
                  seed),
              "another order or size", "arrays that differ by thread");
  expect_told(told(
                  2, 2, 32, shared_size<U4>(1) + shared_size<u64>(1),
                  [&] {
                    Shared shared;
                    U4* const s = shared.take<U4>(1);
                    u64* const bar = shared.take<u64>(1);
                    if (tid() == 0) mbar_init(bar, 1);
                    sync_cluster();
                    if (tid() == 0 && block() == 0) st_async(peer(s, 1), U4{}, peer(bar, 1));
                  },
                  2),
              "in flight after block 1 has ended", "a message to a block that has ended");
  expect_told(told(
                  1, 1, 32, shared_size<U4>(1),
                  [&] {
                    Shared shared;
                    U4* const s = shared.take<U4>(1);
                    cp_async16(reinterpret_cast<u8*>(s) + 8, global);
                  },
                  seed),
              "multiple of 16", "a copy to an odd address");
#if !defined(__SANITIZE_ADDRESS__)
  expect_told(told(
                  1, 1, 32, 256,
                  [&] {
                    Shared shared;
                    float* const s = shared.take<float>(32);
                    s[tid() + 1] = 0;
                  },
                  seed),
              "outside its arrays", "one element too far in shared memory");
#endif
  const auto written = [](U4* s) {
    if (tid() < 16) operand16(s + tid(), U4{});
    fence_async();
    sync_block();
  };
  expect_told(wide_mistake(seed,
                           [&](U4* s, auto& d) {
                             if (tid() < 16) operand16(s + tid(), U4{});
                             sync_block();
                             wgmma_fence();
                             wgmma<F16>(d, U4{}, operand(s, 128, 128));
                             wgmma_commit();
                           }),
              "nan", "an operand that was written but not fenced");
  expect_told(wide_mistake(seed,
                           [&](U4* s, auto& d) {
                             written(s);
                             wgmma<F16>(d, U4{}, operand(s, 128, 128));
                             wgmma_commit();
                           }),
              "nan", "a product without a fence in front");
  expect_told(wide_mistake(seed,
                           [&](U4* s, auto& d) {
                             written(s);
                             wgmma_fence();
                             wgmma<F16>(d, U4{}, operand(s, 128, 128));
                           }),
              "waited for", "a product that is not committed");
  expect_told(wide_mistake(seed,
                           [&](U4* s, auto& d) {
                             written(s);
                             wgmma_fence();
                             wgmma<F16>(d, U4{}, operand(s, 256, 128));
                             wgmma_commit();
                           }),
              "outside the arrays", "an operand that reaches too far along the depth");
  expect_told(wide_mistake(seed,
                           [&](U4* s, auto& d) {
                             written(s);
                             wgmma_fence();
                             wgmma<F16>(d, U4{}, operand(s, 128, 128) | u64{1} << 62);
                             wgmma_commit();
                           }),
              "bits set", "an operand that says it is swizzled");
  expect_told(wide_mistake(seed,
                           [&](U4* s, auto& d) {
                             written(s);
                             wgmma_fence();
                             if (tid() < 96) wgmma<F16>(d, U4{}, operand(s, 128, 128));
                             wgmma_commit();
                           }),
              "not all its warps", "a product by three warps of a warpgroup");
  // copies are late: without the wait, what is read is NaN
  float seen = 0;
  expect_told(told(
                  1, 1, 32, shared_size<float>(4),
                  [&] {
                    Shared shared;
                    float* const s = shared.take<float>(4);
                    if (tid()) return;
                    cp_async16(s, global + 1);
                    cp_async_commit();
                    seen = s[0];
                  },
                  seed),
              "thread 0 has ended with a cp.async under way", "a copy that nobody waited for");
  expect(seen != seen, "a copy that nobody waited for is not there yet");
  expect_told(told(
                  1, 1, 32, 0,
                  [&] {
                    U4 v[1];
                    float d[4] = {};
                    poll16(v, global + 1, 16, 1, late);
                    mma<F16>(d, v[0], 0, 0);
                  },
                  seed),
              "let go one by one", "a product right behind a wait");
}

}  // namespace

int check_primitives() {
  numbers();
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    products<F16>(seed);
    products<BF16>(seed);
    products<TF32>(seed);
    half_products(seed);
    wide_products<F16>(seed);
    wide_products<BF16>(seed);
    wide_products<TF32>(seed);
    sound(seed);
    mistakes(seed);
  }
  std::printf("primitives: %d wrong\n", bad);
  return bad;
}

}  // namespace fusedrnn::test
