// SPDX-License-Identifier: Apache-2.0
// The CPU twin of csrc/cuda/device.h: same names, same signatures, same rules. Every thread of a launch is a
// cooperative task on one OS thread; blocks, clusters and grid run side by side. A translation unit includes this
// instead of device.h, then math.h, then the kernels, and runs them with sim::launch.
//
// What it is strict about, since the hardware may be: warps run in any order (three policies, seeded), lanes of a warp
// too; what is asynchronous happens as late as is legal and in any order; shared memory starts as NaN, with red zones
// between arrays; a wait that nothing will ever end is an error that names thread, primitive and line, and so are
// collectives that lanes disagree about. It can also break a call on purpose (Options::broken), to see whether a test
// would notice. What it cannot show stands in docs/testing.md.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

#define FUSEDRNN_DEVICE inline
#define FUSEDRNN_INLINE static inline
#define FUSEDRNN_UNROLL

namespace fusedrnn::dev {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

struct alignas(16) U4 {
  u32 w[4];
};

constexpr u32 kEmpty = 0xFFFFFFFFu;

// ---- the simulator's own surface ----------------------------------------------------------------------------------
namespace sim {

enum class Policy { round_robin, random, skewed };

struct Options {
  uint64_t seed = 1;
  Policy policy = Policy::random;
  std::string broken = {};                 // the site of a call that is to do less than it should, for every thread
  std::set<std::string>* sites = nullptr;  // wanted: the sites that were reached and could be broken
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs kernel() in grid * threads tasks. Throws Failure on the first thing that is wrong.
void launch(int grid, int cluster, int threads, int shared_bytes, void (*call)(const void*), const void* kernel,
            const Options& options);
template <class K>
void launch(int grid, int cluster, int threads, int shared_bytes, const K& kernel, const Options& options) {
  launch(grid, cluster, threads, shared_bytes, [](const void* k) { (*static_cast<const K*>(k))(); }, &kernel, options);
}

using Where = std::source_location;

struct Identity {
  int tid, threads, block, blocks, cluster_rank;
};
extern constinit thread_local const Identity* me;

void* take(int index, size_t bytes, Where at);
void* peer(const void* shared, int rank, Where at);
void mma_16bit(float (&d)[4], const U4& a, u32 b0, u32 b1, bool bfloat, Where at);
void mma_tf32(float (&d)[4], const U4& a, u32 b0, u32 b1, Where at);
enum class Kind { f16, bf16, tf32 };
void wgmma(float* d, int tiles, const U4& a, u64 b, Kind kind, Where at);
void wgmma_wait(Where at);
void st_async(void* to, const U4& v, u64* bar, Where at);
void cp_async_wait(int open, Where at);
void poll16(U4* v, int n, const void* base, int stride, u32 wanted, Where at);

float half_to_float(u16 v);
u16 float_to_half(float v);

inline float as_float(u32 v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline u32 as_word(float v) {
  u32 w;
  std::memcpy(&w, &v, 4);
  return w;
}
inline float flush(float v) { return std::fabs(v) < 1.17549435e-38f ? std::copysign(0.0f, v) : v; }

}  // namespace sim

// ---- numbers ------------------------------------------------------------------------------------------------------
struct F16 {
  using Storage = u16;
  static constexpr int kPer = 8;
  static float load(Storage v) { return sim::half_to_float(v); }
  static Storage store(float v) { return sim::float_to_half(v); }
  static Storage operand(Storage v) { return v; }
};
struct BF16 {
  using Storage = u16;
  static constexpr int kPer = 8;
  static float load(Storage v) { return sim::as_float(static_cast<u32>(v) << 16); }
  static Storage store(float v) {
    const u32 w = sim::as_word(v);
    return v != v ? u16{0x7FFF} : static_cast<u16>((w + 0x7FFFu + (w >> 16 & 1)) >> 16);
  }
  static Storage operand(Storage v) { return v; }
};
struct TF32 {
  using Storage = float;
  static constexpr int kPer = 4;
  static float load(Storage v) { return v; }
  static Storage store(float v) { return v != v ? sim::as_float(0x7FC00000u) : v; }
  static Storage operand(Storage v) {  // to nearest, ties away from zero
    const u32 w = sim::as_word(v);
    return v - v == 0 ? sim::as_float((w + 0x1000u) & ~0x1FFFu) : store(v);
  }
};

inline u32 bits(float v) { return sim::as_word(v); }
inline float fma(u32 a, u32 b, float c) { return std::fma(sim::as_float(a), sim::as_float(b), c); }
inline void split_tf32(u32 v, u32& big, u32& small) {
  big = bits(TF32::operand(sim::as_float(v)));
  small = bits(sim::as_float(v) - sim::as_float(big));
}
inline float ex2(float x) { return sim::flush(std::exp2(sim::flush(x))); }
inline float rcp(float x) { return sim::flush(1.0f / sim::flush(x)); }

// ---- who am I -----------------------------------------------------------------------------------------------------
inline int tid() { return sim::me->tid; }
inline int threads() { return sim::me->threads; }
inline int block() { return sim::me->block; }
inline int blocks() { return sim::me->blocks; }
inline int cluster_rank() { return sim::me->cluster_rank; }
inline int opaque(int v) { return v; }

// ---- barriers -----------------------------------------------------------------------------------------------------
void sync_block(sim::Where at = sim::Where::current());
void sync_warp(sim::Where at = sim::Where::current());
void sync_named(int id, int n, sim::Where at = sim::Where::current());
void sync_cluster(sim::Where at = sim::Where::current());

// ---- warp ---------------------------------------------------------------------------------------------------------
float shfl_xor(float v, int mask, sim::Where at = sim::Where::current());

template <class T>
inline void mma(float (&d)[4], const U4& a, u32 b0, u32 b1, sim::Where at = sim::Where::current());
void mma_half_depth(float (&d)[4], u32 a0, u32 a1, u32 b, sim::Where at = sim::Where::current());
template <>
inline void mma<F16>(float (&d)[4], const U4& a, u32 b0, u32 b1, sim::Where at) {
  sim::mma_16bit(d, a, b0, b1, false, at);
}
template <>
inline void mma<BF16>(float (&d)[4], const U4& a, u32 b0, u32 b1, sim::Where at) {
  sim::mma_16bit(d, a, b0, b1, true, at);
}
template <>
inline void mma<TF32>(float (&d)[4], const U4& a, u32 b0, u32 b1, sim::Where at) {
  sim::mma_tf32(d, a, b0, b1, at);
}

// ---- products of a warpgroup ----------------------------------------------------------------------------------------
u64 operand(const void* shared, int along_depth, int along_columns, sim::Where at = sim::Where::current());
void operand16(U4* shared, const U4& v, sim::Where at = sim::Where::current());
void fence_async(sim::Where at = sim::Where::current());
void wgmma_fence(sim::Where at = sim::Where::current());
void wgmma_commit(sim::Where at = sim::Where::current());
template <int N>
inline void wgmma_wait(float (&)[N][4], sim::Where at = sim::Where::current()) {
  sim::wgmma_wait(at);
}
template <class T, int N>
inline void wgmma(float (&d)[N][4], const U4& a, u64 b, sim::Where at = sim::Where::current()) {
  sim::wgmma(d[0], N, a, b,
             T::kPer == 4              ? sim::Kind::tf32
             : std::is_same_v<T, BF16> ? sim::Kind::bf16
                                       : sim::Kind::f16,
             at);
}

// ---- memory -------------------------------------------------------------------------------------------------------
class Shared {
 public:
  template <class T>
  T* take(int n, sim::Where at = sim::Where::current()) {
    return static_cast<T*>(sim::take(taken_++, static_cast<size_t>(n) * sizeof(T), at));
  }

 private:
  int taken_ = 0;
};
template <class T>
constexpr int shared_size(int n) {
  return (n * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
}

U4 ldg16(const void* p, sim::Where at = sim::Where::current());
void cp_async16(void* shared, const void* global, sim::Where at = sim::Where::current());
void cp_async_commit();
template <int N>
inline void cp_async_wait(sim::Where at = sim::Where::current()) {
  sim::cp_async_wait(N, at);
}

// ---- hand-off inside a cluster ------------------------------------------------------------------------------------
template <class T>
class Peer {
 public:
  explicit Peer(T* address) : address_(address) {}
  T* address() const { return address_; }

 private:
  T* address_;
};
template <class T>
inline Peer<T> peer(T* shared, int rank, sim::Where at = sim::Where::current()) {
  return Peer<T>(static_cast<T*>(sim::peer(shared, rank, at)));
}
inline void st_async(Peer<U4> to, const U4& v, Peer<u64> bar, sim::Where at = sim::Where::current()) {
  sim::st_async(to.address(), v, bar.address(), at);
}
void mbar_init(u64* bar, int arrivals, sim::Where at = sim::Where::current());
void mbar_arrive_expect(u64* bar, int bytes, sim::Where at = sim::Where::current());
// Never given up here: a phase that will not complete is a deadlock, and reported as one.
void mbar_wait(u64* bar, u32 parity, bool& late, sim::Where at = sim::Where::current());

// ---- hand-off through global memory -------------------------------------------------------------------------------
void publish16(void* global, const U4& v, sim::Where at = sim::Where::current());
U4 ld_relaxed16(const void* global, sim::Where at = sim::Where::current());
template <int N>
inline void peek16(U4 (&v)[N], const void* base, int stride, u32 wanted, sim::Where at = sim::Where::current()) {
  for (int i = 0; i < N; ++i)
    if (wanted >> i & 1) v[i] = ld_relaxed16(static_cast<const u8*>(base) + static_cast<int64_t>(i) * stride, at);
}
template <int N>
inline void settle16(U4 (&v)[N], const void* base, int stride, u32 wanted, bool& late,
                     sim::Where at = sim::Where::current()) {
  if (!late) sim::poll16(v, N, base, stride, wanted, at);
}
template <int N>
inline void poll16(U4 (&v)[N], const void* base, int stride, u32 wanted, bool& late,
                   sim::Where at = sim::Where::current()) {
  static_assert(N <= 32);
  if (!late) sim::poll16(v, N, base, stride, wanted, at);
}

}  // namespace fusedrnn::dev
