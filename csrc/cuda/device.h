// SPDX-License-Identifier: Apache-2.0
// The primitives that kernels are written in, for the GPU. Kernels know no threadIdx, no __shared__, no asm, no half
// type: so the same kernel source also runs over the CPU twin of this file (tests/csrc/device_cpu.h), where a block's
// threads are cooperative tasks. A translation unit includes one of the two, then gates.h, then kernels. A kernel is a
// functor: struct K { static constexpr int kThreads; static int shared_bytes(); void operator()() const; }.
// Rules that both sides keep: collectives are called by all threads they name, in the same order; nothing spins outside
// `poll16`, `settle16` and `mbar_wait`; shared memory comes from `Shared` only, taken in the same order by all threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define FUSEDRNN_DEVICE __device__ __forceinline__
#define FUSEDRNN_INLINE static __device__ __forceinline__
#define FUSEDRNN_UNROLL _Pragma("unroll")

namespace fusedrnn::dev {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

struct alignas(16) U4 {
  u32 w[4];
};

// What a word of a hand-off buffer holds until it is written. No published word may be equal to it: `store` of every
// tag type below canonicalises NaN, and so keeps off it.
constexpr u32 kEmpty = 0xFFFFFFFFu;

// ---- numbers ------------------------------------------------------------------------------------------------------
// Storage: how an element lies in memory. kPer: elements in 16 bytes. load / store convert; store rounds to nearest
// even and turns every NaN into one with its top bit clear. operand: what a matrix product gets to see of a stored
// value.
struct F16 {
  using Storage = u16;
  static constexpr int kPer = 8;
  static FUSEDRNN_DEVICE float load(Storage v) { return __half2float(__ushort_as_half(v)); }
  static FUSEDRNN_DEVICE Storage store(float v) { return __half_as_ushort(__float2half_rn(v)); }
  static FUSEDRNN_DEVICE Storage operand(Storage v) { return v; }
};
struct BF16 {
  using Storage = u16;
  static constexpr int kPer = 8;
  static FUSEDRNN_DEVICE float load(Storage v) { return __uint_as_float(static_cast<u32>(v) << 16); }
  static FUSEDRNN_DEVICE Storage store(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
  static FUSEDRNN_DEVICE Storage operand(Storage v) { return v; }
};
struct TF32 {  // float32 in memory, 10 bits of fraction inside a product
  using Storage = float;
  static constexpr int kPer = 4;
  static FUSEDRNN_DEVICE float load(Storage v) { return v; }
  static FUSEDRNN_DEVICE Storage store(float v) { return v != v ? __uint_as_float(0x7FC00000u) : v; }
  static FUSEDRNN_DEVICE Storage operand(Storage v) {  // to nearest, ties away from zero
#if __CUDA_ARCH__ >= 800
    u32 r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
    return store(__uint_as_float(r));
#else
    return v - v == 0 ? __uint_as_float((__float_as_uint(v) + 0x1000u) & ~0x1FFFu) : store(v);
#endif
  }
};

FUSEDRNN_DEVICE u32 bits(float v) { return __float_as_uint(v); }
// a * b + c of the floats with these bits, rounded once.
FUSEDRNN_DEVICE float fma(u32 a, u32 b, float c) { return __fmaf_rn(__uint_as_float(a), __uint_as_float(b), c); }
// v = big + small, for mma<TF32>: big rounded to nearest, small what is left of it. Not kept: the parts of a number
// that stays in a register for the whole kernel are made anew in every turn of a loop.
FUSEDRNN_DEVICE void split_tf32(u32 v, u32& big, u32& small) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(big) : "f"(__uint_as_float(v)));
#else
  asm volatile("mov.b32 %0, %1;" : "=r"(big) : "r"((v + 0x1000u) & ~0x1FFFu));
#endif
  small = __float_as_uint(__uint_as_float(v) - __uint_as_float(big));
}
FUSEDRNN_DEVICE float ex2(float x) {  // 2^x, 2 ulp; flushes denormals
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
FUSEDRNN_DEVICE float rcp(float x) {  // 1/x, 1 ulp; rcp(inf) = 0
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// ---- who am I -----------------------------------------------------------------------------------------------------
FUSEDRNN_DEVICE int tid() { return static_cast<int>(threadIdx.x); }
FUSEDRNN_DEVICE int threads() { return static_cast<int>(blockDim.x); }
FUSEDRNN_DEVICE int block() { return static_cast<int>(blockIdx.x); }
FUSEDRNN_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
FUSEDRNN_DEVICE int cluster_rank() {  // 0 without clusters; clusters hold consecutive blocks
#if __CUDA_ARCH__ >= 900
  u32 r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return static_cast<int>(r);
#else
  return 0;
#endif
}

// The same number, but nothing that is computed from it is carried along in a register: a loop computes it anew.
FUSEDRNN_DEVICE int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// ---- barriers -----------------------------------------------------------------------------------------------------
FUSEDRNN_DEVICE void sync_block() { __syncthreads(); }
FUSEDRNN_DEVICE void sync_warp() { __syncwarp(); }
FUSEDRNN_DEVICE void sync_named(int id, int n) {  // id 1..15; n threads, whole warps
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(n) : "memory");
}
FUSEDRNN_DEVICE void sync_cluster() {  // all threads of all blocks of the cluster
#if __CUDA_ARCH__ >= 900
  __syncwarp();  // the aligned form wants whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// ---- warp ---------------------------------------------------------------------------------------------------------
FUSEDRNN_DEVICE float shfl_xor(float v, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, v, mask); }

// d += A B. A (16 x 16, 16-bit; 16 x 8, TF32) and B (the same depth, 8 columns) in the layout of mma.sync; g = lane /
// 4, q = lane % 4:
//   16-bit: a[r] = A[g + 8*(r%2)][8*(r/2) + 2q + {0,1}]   b[r] = B[8*r + 2q + {0,1}][g]
//   TF32:   a[r] = A[g + 8*(r%2)][4*(r/2) + q]            b[r] = B[4*r + q][g]
//   d[0], d[1] = D[g][2q + {0,1}];  d[2], d[3] = D[g + 8][2q + {0,1}]
template <class T>
FUSEDRNN_DEVICE void mma(float (&d)[4], const U4& a, u32 b0, u32 b1);
// What sm_75 has, float16 only: A 16 x 8, B 8 x 8. a[r] = A[g + 8*r][2q + {0,1}], b = B[2q + {0,1}][g].
FUSEDRNN_DEVICE void mma_half_depth(float (&d)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}
template <>
FUSEDRNN_DEVICE void mma<F16>(float (&d)[4], const U4& a, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "r"(b0), "r"(b1));
#else
  mma_half_depth(d, a.w[0], a.w[1], b0);
  mma_half_depth(d, a.w[2], a.w[3], b1);
#endif
}
template <>
FUSEDRNN_DEVICE void mma<BF16>(float (&d)[4], const U4& a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "r"(b0), "r"(b1));
}
template <>
FUSEDRNN_DEVICE void mma<TF32>(float (&d)[4], const U4& a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "r"(b0), "r"(b1));
}

// ---- products of a warpgroup, asynchronous: compute capability 9.0 alone -------------------------------------------
//
// A warpgroup is 4 warps from a multiple of 4 on. D (64 x 8N) += A B: warp w of it holds rows 16w .. 16w + 15 of A and
// D as in `mma` (sums d[j] for columns 8j .. 8j + 7), and B, of the same depth, lies in shared memory, where
// `operand16` put it, in 8 columns by 16 bytes of depth (128 bytes) at a time; an `operand` says where: the first of
// these, bytes from one to the next along the depth, and along the columns. Adding n to an operand moves it by 16n
// bytes.
//
//   the writers of B: operand16, fence_async, barrier.   A warpgroup: wgmma_fence, wgmma .., wgmma_commit, and
//   wgmma_wait before it looks at d again; until then A and B stay as they are.
FUSEDRNN_DEVICE u64 operand(const void* shared, int along_depth, int along_columns) {
  return static_cast<u64>(static_cast<u32>(__cvta_generic_to_shared(shared)) >> 4 & 0x3FFFu) |
         static_cast<u64>(along_depth >> 4) << 16 | static_cast<u64>(along_columns >> 4) << 32;
}
FUSEDRNN_DEVICE void operand16(U4* shared, const U4& v) { *shared = v; }
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
FUSEDRNN_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
FUSEDRNN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FUSEDRNN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
FUSEDRNN_DEVICE void wgmma_wait(float (&d)[N][4]) {  // until all that was committed is done; d may then be used
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  FUSEDRNN_UNROLL
  for (int j = 0; j < N; ++j) asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}
#define FUSEDRNN_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FUSEDRNN_WGMMA_32(shape, type, end)                                                                    \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type                                     \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, 1, 1, 1" end \
               : FUSEDRNN_SUMS(0), FUSEDRNN_SUMS(1), FUSEDRNN_SUMS(2), FUSEDRNN_SUMS(3)                        \
               : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "l"(b))
#define FUSEDRNN_WGMMA_64(shape, type, end)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type                                        \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
               "%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1" end                                    \
               : FUSEDRNN_SUMS(0), FUSEDRNN_SUMS(1), FUSEDRNN_SUMS(2), FUSEDRNN_SUMS(3), FUSEDRNN_SUMS(4),        \
                 FUSEDRNN_SUMS(5), FUSEDRNN_SUMS(6), FUSEDRNN_SUMS(7)                                             \
               : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "l"(b))
template <class T, int N>
FUSEDRNN_DEVICE void wgmma(float (&d)[N][4], const U4& a, u64 b) {
  static_assert(N == 4 || N == 8, "32 or 64 columns");
  constexpr bool kHalf = std::is_same_v<T, F16>, kBfloat = std::is_same_v<T, BF16>;
  if constexpr (N == 4 && kHalf) FUSEDRNN_WGMMA_32("m64n32k16", "f16", ", 0;");
  if constexpr (N == 4 && kBfloat) FUSEDRNN_WGMMA_32("m64n32k16", "bf16", ", 0;");
  if constexpr (N == 4 && !kHalf && !kBfloat) FUSEDRNN_WGMMA_32("m64n32k8", "tf32", ";");
  if constexpr (N == 8 && kHalf) FUSEDRNN_WGMMA_64("m64n64k16", "f16", ", 0;");
  if constexpr (N == 8 && kBfloat) FUSEDRNN_WGMMA_64("m64n64k16", "bf16", ", 0;");
  if constexpr (N == 8 && !kHalf && !kBfloat) FUSEDRNN_WGMMA_64("m64n64k8", "tf32", ";");
}
#undef FUSEDRNN_WGMMA_64
#undef FUSEDRNN_WGMMA_32
#undef FUSEDRNN_SUMS
#else  // never chosen (Device::wgmma)
FUSEDRNN_DEVICE void fence_async() {}
FUSEDRNN_DEVICE void wgmma_fence() {}
FUSEDRNN_DEVICE void wgmma_commit() {}
template <int N>
FUSEDRNN_DEVICE void wgmma_wait(float (&)[N][4]) {}
template <class T, int N>
FUSEDRNN_DEVICE void wgmma(float (&)[N][4], const U4&, u64) {
  __trap();
}
#endif

// ---- memory -------------------------------------------------------------------------------------------------------
// Arrays in the block's shared memory, one behind the other, each on a 128-byte boundary.
class Shared {
 public:
  template <class T>
  FUSEDRNN_DEVICE T* take(int n) {
    extern __shared__ __align__(128) u8 base[];
    T* p = reinterpret_cast<T*>(base + used_);
    used_ += (n * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
    return p;
  }

 private:
  int used_ = 0;
};
// What `take` uses for n elements: the sum of these is the launch's shared memory.
template <class T>
constexpr int shared_size(int n) {
  return (n * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
}

FUSEDRNN_DEVICE U4 ldg16(const void* p) {  // read-only for the whole launch, 16-byte aligned
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return U4{{v.x, v.y, v.z, v.w}};
}

// Global to shared, 16 bytes each, both aligned. What a thread has copied is there for it after cp_async_wait, for
// others after a barrier behind that.
FUSEDRNN_DEVICE void cp_async16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  *static_cast<uint4*>(shared) = __ldcg(static_cast<const uint4*>(global));  // sm_75: waited for here
#endif
}
FUSEDRNN_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
FUSEDRNN_DEVICE void cp_async_wait() {  // until at most the N groups committed last are still under way
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- hand-off inside a cluster ------------------------------------------------------------------------------------
// The same variable in another block's shared memory. It can be pushed to, never read.
template <class T>
class Peer {
 public:
  FUSEDRNN_DEVICE explicit Peer(u32 address) : address_(address) {}
  FUSEDRNN_DEVICE u32 address() const { return address_; }

 private:
  u32 address_;
};
template <class T>
FUSEDRNN_DEVICE Peer<T> peer(T* shared, int rank) {
  u32 r = static_cast<u32>(__cvta_generic_to_shared(shared));
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(r) : "r"(rank));
#endif
  return Peer<T>(r);
}
// Writes 16 bytes there and takes 16 off what the barrier over there still expects in its phase.
FUSEDRNN_DEVICE void st_async(Peer<U4> to, const U4& v, Peer<u64> bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                   to.address()),
               "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]), "r"(bar.address())
               : "memory");
#endif
}
FUSEDRNN_DEVICE void mbar_init(u64* bar, int arrivals) {  // one thread; the block or cluster synchronises behind it
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(bar))),
               "r"(arrivals)
               : "memory");
#endif
}
FUSEDRNN_DEVICE void mbar_arrive_expect(u64* bar, int bytes) {  // one arrival, and so many bytes more in this phase
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(bar))),
      "r"(bytes)
      : "memory");
#endif
}
constexpr long long kPatience =
    1ll << 31;  // clocks before a wait is given up: a second, never reached by a sound kernel
// Until phase `parity` of the barrier is complete. A wait that is given up sets `late`, and with `late` set nothing
// waits.
FUSEDRNN_DEVICE void mbar_wait(u64* bar, u32 parity, bool& late) {
#if __CUDA_ARCH__ >= 900
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(bar));
  const long long start = clock64();
  while (!late) {
    u32 done;
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, "
        "1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    if (done) break;
    if (clock64() - start > kPatience) late = true;
  }
#endif
}

// ---- hand-off through global memory: the data is the message -------------------------------------------------------
FUSEDRNN_DEVICE void publish16(void* global, const U4& v) {
#if __CUDA_ARCH__ >= 700
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(global), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]),
               "r"(v.w[3])
               : "memory");
#endif
}
FUSEDRNN_DEVICE U4 ld_relaxed16(const void* global) {
  U4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(global)
               : "memory");
  return v;
}
// v[i] = 16 bytes at base + i * stride bytes, for i < N with bit i of `wanted` set (the others are left alone): what is
// there, or kEmpty.
template <int N>
FUSEDRNN_DEVICE void peek16(U4 (&v)[N], const void* base, int stride, u32 wanted) {
  static_assert(N <= 32);
  FUSEDRNN_UNROLL
  for (int i = 0; i < N; ++i)
    if (wanted >> i & 1) v[i] = ld_relaxed16(static_cast<const u8*>(base) + static_cast<int64_t>(i) * stride);
}
// After peek16 with the same arguments: waits until none of the four words of any of them is kEmpty any more. `late` as
// in mbar_wait.
template <int N>
FUSEDRNN_DEVICE void settle16(U4 (&v)[N], const void* base, int stride, u32 wanted, bool& late) {
  const u8* p = static_cast<const u8*>(base);
  const long long start = clock64();
  while (!late) {
    bool again = false;
    FUSEDRNN_UNROLL
    for (int i = 0; i < N; ++i)
      if ((wanted >> i & 1) &&
          (v[i].w[0] == kEmpty || v[i].w[1] == kEmpty || v[i].w[2] == kEmpty || v[i].w[3] == kEmpty)) {
        v[i] = ld_relaxed16(p + static_cast<int64_t>(i) * stride);
        again = true;
      }
    if (!again) break;
    if (clock64() - start > kPatience) late = true;
  }
}
template <int N>
FUSEDRNN_DEVICE void poll16(U4 (&v)[N], const void* base, int stride, u32 wanted, bool& late) {
  peek16(v, base, stride, wanted);
  settle16(v, base, stride, wanted, late);
}

}  // namespace fusedrnn::dev
