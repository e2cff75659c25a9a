// SPDX-License-Identifier: Apache-2.0
// Hardware ceilings that decide how fast a recurrent kernel can be on one Hopper GPU, printed as JSON.
//
//   nvcc -O3 -std=c++20 -gencode=arch=compute_90a,code=sm_90a -o gpu_ceilings gpu_ceilings.cu
//   ./gpu_ceilings > ceilings.json
//
// Matrix and FMA rates are counted in SM cycles inside the kernel, so they do not depend on the clock of the day.
// Latencies are slopes: the time of 2n steps minus the time of n steps, over n, so launch cost drops out.
// No loop here can hang the GPU. A wait that lasts too long sets `fault`, and from then on that thread waits for
// nothing, while it still runs through every barrier, so nobody else is left alone at one.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace cg = cooperative_groups;

// ---------------------------------------------------------------------------------------------------------------
// Host: errors, records, timing
// ---------------------------------------------------------------------------------------------------------------

static void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#define CUDA(call) check((call), #call)

struct Field {
  std::string key, value;
  template <class Number>
    requires std::is_arithmetic_v<Number>
  Field(const char* k, Number v) : key(k) {
    char text[64];
    std::snprintf(text, sizeof text, v == v ? "%.6g" : "null", static_cast<double>(v));
    value = text;
  }
  Field(const char* k, const char* v) : key(k) {
    value = "\"";
    for (; *v; ++v) {
      if (*v == '"' || *v == '\\') value += '\\';
      value += (static_cast<unsigned char>(*v) < 32) ? ' ' : *v;
    }
    value += '"';
  }
};

static bool first_record = true;

static void record(const char* name, std::initializer_list<Field> fields) {
  std::printf("%s\n  {\"name\": \"%s\"", first_record ? "" : ",", name);
  for (const Field& field : fields) std::printf(", \"%s\": %s", field.key.c_str(), field.value.c_str());
  std::printf("}");
  std::fflush(stdout);
  first_record = false;
}

static double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double started, budget = 80;

// A section that fails says so in the output and does not take the others with it.
template <class F>
static void section(const char* name, F body) {
  if (seconds_now() - started > budget) {
    record(name, {{"error", "skipped: the time budget was spent"}});
    return;
  }
  try {
    body();
  } catch (const std::exception& e) {
    record(name, {{"error", e.what()}});
    cudaGetLastError();
  }
}

static double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  size_t n = v.size();
  return n == 0 ? 0.0 / 0.0 : n % 2 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

static int* fault;  // device word: 0 fine, 1 a wait ran out, 2 a value came out wrong

static void check_fault() {
  int value = 0;
  CUDA(cudaMemcpy(&value, fault, sizeof value, cudaMemcpyDeviceToHost));
  if (value) {
    CUDA(cudaMemset(fault, 0, sizeof(int)));
    throw std::runtime_error(value == 1 ? "a bounded wait ran out" : "a value received was wrong");
  }
}

static double event_ns(const std::function<void()>& body) {
  static cudaEvent_t a = nullptr, b = nullptr;
  if (!a) {
    CUDA(cudaEventCreate(&a));
    CUDA(cudaEventCreate(&b));
  }
  CUDA(cudaEventRecord(a));
  body();
  CUDA(cudaEventRecord(b));
  CUDA(cudaEventSynchronize(b));
  CUDA(cudaGetLastError());
  float ms = 0;
  CUDA(cudaEventElapsedTime(&ms, a, b));
  return ms * 1e6;
}

// Nanoseconds per step: median time of 2n steps minus median time of n steps, over n.
static double slope_ns(int n, const std::function<void(int)>& prepare, const std::function<void(int)>& launch,
                       int repeats = 5) {
  std::vector<double> one, two;
  for (int r = -1; r < repeats; ++r) {
    for (int k = 1; k <= 2; ++k) {
      prepare(k * n);
      double ns = event_ns([&] { launch(k * n); });
      check_fault();
      if (r >= 0) (k == 1 ? one : two).push_back(ns);
    }
  }
  return (median(two) - median(one)) / n;
}

static void nothing(int) {}

struct Shape {
  int grid, block;
  size_t shared = 0;
  int cluster = 0;
  bool cooperative = false;
  bool overlap = false;  // programmatic dependent launch: start before the previous kernel has ended
  cudaStream_t stream = nullptr;
};

struct Config {
  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute attributes[3];
  explicit Config(const Shape& s) {
    launch.gridDim = dim3(s.grid);
    launch.blockDim = dim3(s.block);
    launch.dynamicSmemBytes = s.shared;
    launch.stream = s.stream;
    int n = 0;
    if (s.cluster) {
      attributes[n].id = cudaLaunchAttributeClusterDimension;
      attributes[n].val.clusterDim.x = s.cluster;
      attributes[n].val.clusterDim.y = attributes[n].val.clusterDim.z = 1;
      ++n;
    }
    if (s.cooperative) {
      attributes[n].id = cudaLaunchAttributeCooperative;
      attributes[n].val.cooperative = 1;
      ++n;
    }
    if (s.overlap) {
      attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[n].val.programmaticStreamSerializationAllowed = 1;
      ++n;
    }
    launch.attrs = attributes;
    launch.numAttrs = n;
  }
  Config(const Config&) = delete;
};

template <class... P>
static void allow(void (*kernel)(P...), const Shape& s) {
  const void* f = reinterpret_cast<const void*>(kernel);
  if (s.shared > 48 * 1024)
    CUDA(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(s.shared)));
  if (s.cluster > 8) CUDA(cudaFuncSetAttribute(f, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

template <class... P, class... A>
static void launch(void (*kernel)(P...), const Shape& s, A... arguments) {
  Config c(s);
  CUDA(cudaLaunchKernelEx(&c.launch, kernel, arguments...));
}

// How many clusters of this shape the whole GPU can hold at once.
template <class... P>
static int active_clusters(void (*kernel)(P...), Shape s, int multiprocessors) {
  allow(kernel, s);
  s.grid = (multiprocessors / s.cluster) * s.cluster;
  Config c(s);
  int n = 0;
  CUDA(cudaOccupancyMaxActiveClusters(&n, kernel, &c.launch));
  return n;
}

// ---------------------------------------------------------------------------------------------------------------
// Device: primitives
// ---------------------------------------------------------------------------------------------------------------

constexpr int kGlobalPolls = 1 << 19;   // about 0.2 s of polling through L2
constexpr int kSharedPolls = 1 << 22;   // about 0.1 s of polling in shared memory
constexpr int kBarrierPolls = 1 << 15;  // try_wait may itself sleep for a while
constexpr unsigned kSentinel = 0xFFFFFFFFu;

struct Waiter {
  int* fault;
  bool dead = false;
  __device__ explicit Waiter(int* f) : fault(f) {}
  __device__ void give_up() {
    dead = true;
    atomicExch(fault, 1);
  }
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ uint32_t map_to(uint32_t address, uint32_t rank) {
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(uint4* p, unsigned v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%1,%1,%1};" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void add_release(unsigned* p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t a) {
  uint4 v;
  asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(a)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t a, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_peer(uint32_t a, unsigned v) {
  asm volatile("st.relaxed.cluster.shared::cluster.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(a), "r"(v) : "memory");
}
__device__ __forceinline__ void push_peer(uint32_t a, unsigned v, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1,%1,%1,%1}, [%2];" ::"r"(a),
               "r"(v), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ bool all_equal(uint4 v, unsigned x) { return v.x == x && v.y == x && v.z == x && v.w == x; }
__device__ __forceinline__ bool arrived(uint4 v) {
  return v.x != kSentinel && v.y != kSentinel && v.z != kSentinel && v.w != kSentinel;
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(Waiter& w, uint32_t barrier, unsigned parity) {
  if (w.dead) return;
  for (int i = 0; i < kBarrierPolls; ++i) {
    unsigned done;
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
  }
  w.give_up();
}

// ---------------------------------------------------------------------------------------------------------------
// Clock and arithmetic rates
// ---------------------------------------------------------------------------------------------------------------

__global__ void clock_rate(long long spin, long long* out) {
  unsigned long long t0, t1;
  long long c0 = clock64();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t0));
  float x = threadIdx.x;
  long long c1 = c0;
  for (int i = 0; i < (1 << 24) && c1 - c0 < spin; ++i) {
#pragma unroll
    for (int j = 0; j < 64; ++j) asm volatile("fma.rn.f32 %0, %0, %0, %0;" : "+f"(x));
    c1 = clock64();
  }
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t1));
  if (threadIdx.x == 0) {
    out[2 * blockIdx.x] = c1 - c0;
    out[2 * blockIdx.x + 1] = static_cast<long long>(t1 - t0);
  }
  if (x == 12345.678f) out[0] = 0;
}

enum Type { BF16, F16, TF32 };

// Random operands: timing zeros flatters the power budget.
template <int TYPE>
__device__ __forceinline__ uint32_t operand(uint32_t seed) {
  seed = (seed ^ 61u ^ (seed >> 16)) * 9u;
  seed = (seed ^ (seed >> 4)) * 0x27d4eb2du;
  seed ^= seed >> 15;
  if constexpr (TYPE == TF32) return (seed & 0x807FE000u) | 0x3D000000u;
  if constexpr (TYPE == BF16) return (seed & 0x807F807Fu) | 0x3D003D00u;
  return (seed & 0x83FF83FFu) | 0x28002800u;
}

template <int TYPE>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FUSEDRNN_MMA(SHAPE)                                                                       \
  asm volatile("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (TYPE == BF16) FUSEDRNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  if constexpr (TYPE == F16) FUSEDRNN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  if constexpr (TYPE == TF32) FUSEDRNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef FUSEDRNN_MMA
}

// The inner loop of a weight-stationary recurrent kernel: FRAGMENTS 16-row weight tiles stay in registers, four of
// them (the gates) share each h fragment, TILES tiles of 8 batch columns. FEED: h fragments come from shared memory
// by ldmatrix each time; otherwise from registers.
template <int TYPE, int WARPS, int FRAGMENTS, int TILES, bool FEED>
__global__ __launch_bounds__(WARPS * 32, 1) void mma_rate(int iterations, float* sink, long long* cycles) {
  static_assert(FRAGMENTS % 8 == 0 || FRAGMENTS == 4);
  constexpr int kSteps = FRAGMENTS / 4;                         // k steps of 32 bytes
  constexpr int kStride = (kSteps < 2 ? 2 : kSteps) * 32 + 16;  // bytes a row, padded against bank conflicts
  __shared__ __align__(16) unsigned char h[TILES * 8 * kStride];
  for (int i = threadIdx.x; i < TILES * 8 * kStride / 4; i += blockDim.x)
    reinterpret_cast<uint32_t*>(h)[i] = operand<TYPE>(i * 7919u + blockIdx.x);
  uint32_t a[FRAGMENTS][4];
#pragma unroll
  for (int i = 0; i < FRAGMENTS; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) a[i][j] = operand<TYPE>(threadIdx.x * 1024u + i * 4 + j + blockIdx.x * 77777u);
  uint32_t fixed[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) fixed[j] = operand<TYPE>(threadIdx.x * 31u + j);
  float acc[4][TILES][4] = {};
  int lane = threadIdx.x % 32;
  uint32_t row = shared_address(h) + (lane % 8) * kStride + (lane / 8) * 16;
  __syncthreads();
  long long c0 = clock64();
#pragma unroll 1
  for (int it = 0; it < iterations; ++it) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int k = 0; k < kSteps; k += 2) {
        uint32_t b[4];
        if constexpr (FEED) {
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                       : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                       : "r"(row + n * 8 * kStride + k * 32));
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) b[j] = fixed[j];
        }
#pragma unroll
        for (int kk = 0; kk < 2; ++kk) {
          if (k + kk < kSteps) {
#pragma unroll
            for (int g = 0; g < 4; ++g) mma<TYPE>(acc[g][n], a[(k + kk) * 4 + g], b[2 * kk], b[2 * kk + 1]);
          }
        }
      }
    }
  }
  float sum = 0;
#pragma unroll
  for (int g = 0; g < 4; ++g)
#pragma unroll
    for (int n = 0; n < TILES; ++n) sum += acc[g][n][0] + acc[g][n][1] + acc[g][n][2] + acc[g][n][3];
  __syncthreads();
  long long c1 = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = c1 - c0;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <int TYPE>
__global__ void mma_latency(int iterations, float* sink, long long* cycles) {
  uint32_t a[4];
  for (int j = 0; j < 4; ++j) a[j] = operand<TYPE>(threadIdx.x * 4 + j);
  uint32_t b0 = operand<TYPE>(threadIdx.x + 999), b1 = operand<TYPE>(threadIdx.x + 1999);
  float d[4] = {};
  long long c0 = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int j = 0; j < 16; ++j) mma<TYPE>(d, a, b0, b1);
  }
  sink[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
  __syncwarp();
  long long c1 = clock64();
  if (threadIdx.x == 0) cycles[0] = c1 - c0;
}

// FFMA from registers: 32 independent sums a thread.
template <int WARPS>
__global__ __launch_bounds__(WARPS * 32, 1) void fma_rate(int iterations, float* sink, long long* cycles) {
  float acc[32], x[4], y[4];
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i] = threadIdx.x + i;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = 1.0f + 1e-7f * (threadIdx.x + i);
    y[i] = 1e-3f * (threadIdx.x + 5 * i);
  }
  __syncthreads();
  long long c0 = clock64();
#pragma unroll 1
  for (int it = 0; it < iterations; ++it) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 32; ++i)
        asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(acc[i]) : "f"(x[(i + k) % 4]), "f"(y[i % 4]));
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) sum += acc[i];
  __syncthreads();
  long long c1 = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = c1 - c0;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Strict fp32 as a recurrent kernel would do it: 4 gates x 16 weights a thread in registers, h broadcast from shared
// memory 16 bytes at a time, COLUMNS batch columns.
template <int WARPS, int COLUMNS>
__global__ __launch_bounds__(WARPS * 32, 1) void fma_fed(int iterations, float* sink, long long* cycles) {
  __shared__ __align__(16) float h[COLUMNS * 16];
  for (int i = threadIdx.x; i < COLUMNS * 16; i += blockDim.x) h[i] = 1e-3f * (i % 37);
  float w[4][16];
#pragma unroll
  for (int g = 0; g < 4; ++g)
#pragma unroll
    for (int k = 0; k < 16; ++k) w[g][k] = 1e-4f * (threadIdx.x * 3 + g * 16 + k);
  float acc[4][COLUMNS] = {};
  uint32_t base = shared_address(h);
  __syncthreads();
  long long c0 = clock64();
#pragma unroll 1
  for (int it = 0; it < iterations; ++it) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
      for (int k = 0; k < 16; k += 4) {
        float v[4];
        asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                     : "r"(base + (c * 16 + k) * 4));
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int g = 0; g < 4; ++g)
            asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(acc[g][c]) : "f"(w[g][k + j]), "f"(v[j]));
      }
    }
  }
  float sum = 0;
#pragma unroll
  for (int g = 0; g < 4; ++g)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sum += acc[g][c];
  __syncthreads();
  long long c1 = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = c1 - c0;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// One dependent chain of a gate's nonlinearity. KIND 0: sigmoid by ex2+rcp, 1: tanh by ex2+rcp, 2: tanh.approx.
template <int KIND>
__global__ void gate_latency(int iterations, float* sink, long long* cycles) {
  float x = 0.25f * threadIdx.x;
  long long c0 = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if constexpr (KIND == 2) {
        asm volatile("tanh.approx.f32 %0, %0;" : "+f"(x));
      } else {
        float scaled = x * (KIND == 0 ? -1.4426950409f : -2.8853900818f), e, r;
        asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(scaled));
        e += 1.0f;
        asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(e));
        x = KIND == 0 ? r : fmaf(2.0f, r, -1.0f);
      }
    }
  }
  long long c1 = clock64();
  sink[threadIdx.x] = x;
  if (threadIdx.x == 0) cycles[0] = c1 - c0;
}

// ---------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------

__global__ void copy_kernel(const uint4* __restrict__ from, uint4* __restrict__ to, size_t n) {
  size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __ldcs(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) __stcs(to + i + j * stride, v[j]);
  }
  for (; i < n; i += stride) __stcs(to + i, __ldcs(from + i));
}

// Every CTA reads `chunks` 16-byte pieces again and again past L1, starting `offset` further for each CTA.
__global__ __launch_bounds__(512, 1) void l2_read(const uint4* data, int chunks, int offset, int passes, unsigned* sink,
                                                  long long* cycles) {
  unsigned sum = 0;
  int first = static_cast<int>((static_cast<long long>(blockIdx.x) * offset) % chunks);
  __syncthreads();
  long long c0 = clock64();
  for (int p = 0; p < passes; ++p) {
    for (int i = threadIdx.x; i < chunks; i += 8 * blockDim.x) {
      uint4 v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        int k = first + i + j * static_cast<int>(blockDim.x);
        if (k >= chunks) k -= chunks;
        v[j] = load_relaxed(data + k);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
  }
  __syncthreads();
  long long c1 = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = c1 - c0;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Every CTA brings the same `bytes` from L2 into its shared memory with the bulk copy engine, again and again. In a
// cluster of C each CTA asks for 1/C of it and multicasts that part to all C.
__global__ __launch_bounds__(128, 1) void bulk_read(const unsigned char* data, int bytes, int passes, int* fault) {
  extern __shared__ __align__(128) unsigned char memory[];
  uint32_t barriers = shared_address(memory), buffer = barriers + 128;
  uint32_t rank = cluster_rank(), size = cluster_size();
  Waiter w(fault);
  if (threadIdx.x == 0) {
    barrier_init(barriers, 1);
    barrier_init(barriers + 8, 1);
    barrier_init_done();
    barrier_expect(barriers, bytes);
    barrier_expect(barriers + 8, bytes);
  }
  __syncthreads();
  cluster_barrier();
  int part = bytes / static_cast<int>(size);
  auto issue = [&](int p) {
    if (threadIdx.x) return;
    uint32_t to = buffer + (p & 1) * bytes + rank * part, barrier = barriers + 8 * (p & 1);
    const unsigned char* from = data + rank * part;
    if (size == 1)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                   "l"(from), "r"(part), "r"(barrier)
                   : "memory");
    else
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
          "%4;" ::"r"(to),
          "l"(from), "r"(part), "r"(barrier), "h"(static_cast<unsigned short>((1u << size) - 1))
          : "memory");
  };
  issue(0);
  for (int p = 0; p < passes; ++p) {
    // Pass p+1 goes into the other buffer; everyone left that buffer before the cluster barrier of pass p-1.
    if (p + 1 < passes) issue(p + 1);
    barrier_wait(w, barriers + 8 * (p & 1), (p >> 1) & 1);
    __syncthreads();
    if (threadIdx.x == 0 && p + 2 < passes) barrier_expect(barriers + 8 * (p & 1), bytes);
    if (size == 1)
      __syncthreads();
    else
      cluster_barrier();
  }
  cluster_barrier();
}

__global__ __launch_bounds__(256, 1) void shared_read(int iterations, unsigned* sink, long long* cycles) {
  __shared__ __align__(16) uint4 tile[1024];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) tile[i] = make_uint4(i, i, i, i);
  uint32_t base = shared_address(tile);
  unsigned sum = 0;
  __syncthreads();
  long long c0 = clock64();
#pragma unroll 1
  for (int it = 0; it < iterations; ++it) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = load_shared(base + 16 * ((threadIdx.x + j * 128) & 1023));
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j].x + v[j].w;
  }
  __syncthreads();
  long long c1 = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = c1 - c0;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Cycles of single 16-byte loads that hit L2, one at a time, over many lines.
__global__ void l2_latency(const uint4* data, int count, int stride, int* out) {
  __shared__ unsigned slot;
  uint32_t word = shared_address(&slot);
  unsigned carry = 0;
  for (int i = 0; i < count; ++i) carry += load_relaxed(data + static_cast<size_t>(i) * stride).x;
  for (int i = 0; i < count; ++i) {
    const uint4* p = data + static_cast<size_t>(i) * stride + (carry == 0xDEADBEEFu);
    long long c0 = clock64();
    unsigned v = load_relaxed(p).x;
    carry += v;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(word), "r"(v) : "memory");  // issues only once v is here
    long long c1 = clock64();
    out[i] = static_cast<int>(c1 - c0);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Barriers inside one CTA
// ---------------------------------------------------------------------------------------------------------------

// KIND 0: __syncthreads. 1: each group of 128 threads on its own named barrier. 2: two halves signal each other by
// arrive/sync pairs (one round trip an iteration). 3: mbarrier, one arrival a warp, all threads wait.
template <int KIND>
__global__ void block_barrier(int iterations, long long* cycles, int* fault) {
  __shared__ __align__(8) unsigned long long word;
  Waiter w(fault);
  uint32_t barrier = shared_address(&word);
  int half = blockDim.x / 2, group = threadIdx.x / 128 + 1;
  if (threadIdx.x == 0) barrier_init(barrier, blockDim.x / 32);
  __syncthreads();
  long long c0 = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
    if constexpr (KIND == 0) __syncthreads();
    if constexpr (KIND == 1) asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
    if constexpr (KIND == 2) {
      if (static_cast<int>(threadIdx.x) < half) {
        asm volatile("bar.arrive 1, %0;" ::"r"(static_cast<int>(blockDim.x)) : "memory");
        asm volatile("bar.sync 2, %0;" ::"r"(static_cast<int>(blockDim.x)) : "memory");
      } else {
        asm volatile("bar.sync 1, %0;" ::"r"(static_cast<int>(blockDim.x)) : "memory");
        asm volatile("bar.arrive 2, %0;" ::"r"(static_cast<int>(blockDim.x)) : "memory");
      }
    }
    if constexpr (KIND == 3) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
      barrier_wait(w, barrier, i & 1);
    }
  }
  long long c1 = clock64();
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = c1 - c0;
}

// ---------------------------------------------------------------------------------------------------------------
// Hand-offs through L2
// ---------------------------------------------------------------------------------------------------------------

// CTA 0 and CTA `partner` answer each other: the 16 bytes are the message and its own flag. One step is two hops.
__global__ void l2_pingpong_data(uint4* box, int apart, int partner, int steps, int* fault) {
  if (threadIdx.x || (blockIdx.x != 0 && static_cast<int>(blockIdx.x) != partner)) return;
  Waiter w(fault);
  bool first = blockIdx.x == 0;
  uint4 *mine = box + (first ? 0 : apart), *theirs = box + (first ? apart : 0);
  for (int s = 1; s <= steps; ++s) {
    if (first) store_relaxed(theirs, s);
    for (int i = 0; !w.dead; ++i) {
      if (all_equal(load_relaxed(mine), s)) break;
      if (i > kGlobalPolls) w.give_up();
    }
    if (!first) store_relaxed(theirs, s);
  }
}

// The same with a counter: data, red.release; the other side polls ld.acquire and then loads the data.
__global__ void l2_pingpong_counter(uint4* box, unsigned* counters, int apart, int partner, int steps, int* fault) {
  if (threadIdx.x || (blockIdx.x != 0 && static_cast<int>(blockIdx.x) != partner)) return;
  Waiter w(fault);
  bool first = blockIdx.x == 0;
  uint4 *mine = box + (first ? 0 : apart), *theirs = box + (first ? apart : 0);
  unsigned *my_count = counters + (first ? 0 : 64), *their_count = counters + (first ? 64 : 0);
  for (int s = 1; s <= steps; ++s) {
    if (first) {
      store_relaxed(theirs, s);
      add_release(their_count, 1);
    }
    for (int i = 0; !w.dead; ++i) {
      if (load_acquire(my_count) >= static_cast<unsigned>(s)) break;
      if (i > kGlobalPolls) w.give_up();
    }
    if (!all_equal(load_relaxed(mine), s) && !w.dead) atomicExch(fault, 2);
    if (!first) {
      store_relaxed(theirs, s);
      add_release(their_count, 1);
    }
  }
}

// A grid barrier by one counter: every CTA adds once a step and waits for all.
__global__ __launch_bounds__(256, 1) void counter_barrier(unsigned* counter, int steps, int* fault) {
  Waiter w(fault);
  for (int t = 0; t < steps; ++t) {
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(counter, 1);
      unsigned goal = (t + 1) * gridDim.x;
      for (int i = 0; !w.dead; ++i) {
        if (load_acquire(counter) >= goal) break;
        if (i > kGlobalPolls) w.give_up();
      }
    }
    __syncthreads();
  }
}

__global__ __launch_bounds__(256, 1) void grid_sync(int steps) {
  cg::grid_group grid = cg::this_grid();
  for (int t = 0; t < steps; ++t) grid.sync();
}

// What one recurrent time step needs when a copy of R is spread over P CTAs: each writes its slice of h[t] (`chunks`
// 16-byte pieces in all, to a row nobody wrote before) and brings all of h[t] into shared memory. HANDOFF 0: the data
// are the flag (rows are pre-filled with a sentinel). HANDOFF 1: slice, release add, acquire poll, then plain loads.
// What is sent at t+1 depends on what came at t, as in the real thing. PER = pieces a thread.
template <int PER, int HANDOFF>
__global__ __launch_bounds__(256, 1) void l2_exchange(uint4* rows, unsigned* counters, int chunks, int P, int capacity,
                                                      int steps, int* fault) {
  extern __shared__ __align__(128) unsigned char memory[];
  uint32_t tile = shared_address(memory);
  int group = blockIdx.x / P, member = blockIdx.x % P, tid = threadIdx.x;
  rows += static_cast<size_t>(group) * capacity * chunks;
  counters += group * 64;
  int slice = chunks / P;
  Waiter w(fault);
  unsigned value = 1;
  for (int t = 0; t < steps; ++t) {
    uint4* row = rows + static_cast<size_t>(t) * chunks;
    uint32_t to = tile + (t & 1) * chunks * 16;
    if (tid < slice) store_relaxed(row + member * slice + tid, value);
    if constexpr (HANDOFF == 1) {
      __syncthreads();
      if (tid == 0) {
        add_release(counters, 1);
        unsigned goal = (t + 1) * P;
        for (int i = 0; !w.dead; ++i) {
          if (load_acquire(counters) >= goal) break;
          if (i > kGlobalPolls) w.give_up();
        }
      }
      __syncthreads();
    }
    uint4 v[PER];
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (PER > 1 || tid < chunks) v[j] = load_relaxed(row + tid + j * 256);
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      if (PER > 1 || tid < chunks) {
        if constexpr (HANDOFF == 0) {
          for (int i = 0; !arrived(v[j]) && !w.dead; ++i) {
            v[j] = load_relaxed(row + tid + j * 256);
            if (i > kGlobalPolls) w.give_up();
          }
        }
        store_shared(to + (tid + j * 256) * 16, v[j]);
      }
    }
    __syncthreads();
    value = load_shared(to + ((tid * 5 + member) & (chunks - 1)) * 16).x + 1;
  }
  uint32_t last = tile + ((steps - 1) & 1) * chunks * 16;
  for (int i = tid; i < chunks; i += 256)
    if (!all_equal(load_shared(last + i * 16), steps) && !w.dead) atomicExch(fault, 2);
}

// ---------------------------------------------------------------------------------------------------------------
// Hand-offs inside a cluster
// ---------------------------------------------------------------------------------------------------------------

// Rank 0 and rank `partner` of the first cluster answer each other. KIND 0: st.async and the receiver's mbarrier.
// KIND 1: a plain 16-byte store into the peer's shared memory, which the peer polls. One step is two hops.
template <int KIND>
__global__ void cluster_pingpong(int partner, int steps, int* fault) {
  __shared__ __align__(128) unsigned char memory[128];
  uint32_t barrier = shared_address(memory), box = barrier + 64;
  uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
    store_shared(box, make_uint4(0, 0, 0, 0));
  }
  __syncthreads();
  cluster_barrier();
  if (threadIdx.x == 0 && (rank == 0 || static_cast<int>(rank) == partner)) {
    Waiter w(fault);
    bool first = rank == 0;
    uint32_t peer = first ? partner : 0, their_box = map_to(box, peer), their_barrier = map_to(barrier, peer);
    for (int s = 1; s <= steps; ++s) {
      if constexpr (KIND == 0) barrier_expect(barrier, 16);
      for (int turn = 0; turn < 2; ++turn) {
        if ((turn == 0) == first) {
          if constexpr (KIND == 0)
            push_peer(their_box, s, their_barrier);
          else
            store_peer(their_box, s);
        } else {
          if constexpr (KIND == 0) {
            barrier_wait(w, barrier, (s - 1) & 1);
          } else {
            for (int i = 0; !w.dead; ++i) {
              if (all_equal(load_shared(box), s)) break;
              if (i > kSharedPolls) w.give_up();
            }
          }
        }
      }
    }
    if (!all_equal(load_shared(box), steps) && !w.dead) atomicExch(fault, 2);
  }
  __syncthreads();
  cluster_barrier();
}

__global__ __launch_bounds__(256, 1) void cluster_sync(int steps) {
  for (int t = 0; t < steps; ++t) cluster_barrier();
}

// A recurrent time step in a cluster of C: every CTA pushes its 1/C of h (`bytes` in all) to every CTA, itself
// included, into one of two buffers, and waits for all of h. Two buffers are enough: nobody sends step t+1 before it
// has all of step t, and nobody's step t+1 leaves before its step t-1 was read (the __syncthreads).
// MODE 0: st.async, 16 bytes each.         1: one bulk copy per peer from a staging slice.
// MODE 2: plain stores, barrier.cluster.   3: plain stores, the receiver polls the data in its own shared memory.
template <int MODE>
__global__ __launch_bounds__(256, 1) void cluster_exchange(int bytes, int steps, int* fault) {
  extern __shared__ __align__(128) unsigned char memory[];
  uint32_t barriers = shared_address(memory), buffer = barriers + 128, stage = buffer + 2 * bytes;
  uint32_t rank = cluster_rank(), size = cluster_size();
  int tid = threadIdx.x, log_size = __popc(size - 1);
  int slice = bytes >> log_size, chunks = slice / 16, log_chunks = __popc(chunks - 1), all = bytes / 16;
  Waiter w(fault);
  for (int i = tid; i < 2 * all; i += 256) store_shared(buffer + i * 16, make_uint4(0, 0, 0, 0));
  if (tid == 0 && MODE <= 1) {
    barrier_init(barriers, 1);
    barrier_init(barriers + 8, 1);
    barrier_init_done();
    barrier_expect(barriers, bytes);
    barrier_expect(barriers + 8, bytes);
  }
  __syncthreads();
  cluster_barrier();
  unsigned value = 1;
  for (int t = 0; t < steps; ++t) {
    uint32_t to = buffer + (t & 1) * bytes, barrier = barriers + 8 * (t & 1);
    uint32_t mine = to + rank * slice;
    if constexpr (MODE == 1) {
      uint32_t from = stage + (t & 1) * slice;
      for (int i = tid; i < chunks; i += 256) store_shared(from + i * 16, make_uint4(value, value, value, value));
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncthreads();
      if (tid < static_cast<int>(size)) {
        uint32_t peer = (rank + tid) & (size - 1);
        asm volatile(
            "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                map_to(mine, peer)),
            "r"(from), "r"(slice), "r"(map_to(barrier, peer))
            : "memory");
      }
    } else {
      for (int i = tid; i < all; i += 256) {
        uint32_t peer = (rank + (i >> log_chunks)) & (size - 1);
        uint32_t address = map_to(mine + (i & (chunks - 1)) * 16, peer);
        if constexpr (MODE == 0)
          push_peer(address, value, map_to(barrier, peer));
        else
          store_peer(address, value);
      }
    }
    if constexpr (MODE <= 1) barrier_wait(w, barrier, (t >> 1) & 1);
    if constexpr (MODE == 2) cluster_barrier();
    if constexpr (MODE == 3) {
      for (int i = tid; i < all; i += 256) {
        for (int k = 0; !w.dead; ++k) {
          if (all_equal(load_shared(to + i * 16), t + 1)) break;
          if (k > kSharedPolls) w.give_up();
        }
      }
      __syncthreads();  // what this thread polled, the others need too
    }
    value = load_shared(to + ((tid * 5 + static_cast<int>(rank)) & (all - 1)) * 16).x + 1;
    if (MODE <= 1 && tid == 0) barrier_expect(barrier, bytes);  // armed before this CTA's step t+1 lets anyone send t+2
    __syncthreads();
  }
  uint32_t last = buffer + ((steps - 1) & 1) * bytes;
  if (MODE == 3) cluster_barrier();
  for (int i = tid; i < all; i += 256)
    if (!all_equal(load_shared(last + i * 16), steps) && !w.dead) atomicExch(fault, 2);
  __syncthreads();
  cluster_barrier();
}

// ---------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------

__global__ void empty_kernel() {}
__global__ void empty_overlapped() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---------------------------------------------------------------------------------------------------------------

static long long* cycles_buffer;
static float* sink_buffer;

static double median_cycles(int blocks) {
  std::vector<long long> c(blocks);
  CUDA(cudaMemcpy(c.data(), cycles_buffer, blocks * sizeof(long long), cudaMemcpyDeviceToHost));
  return median(std::vector<double>(c.begin(), c.end()));
}

template <int TYPE, int WARPS, int FRAGMENTS, int TILES, bool FEED>
static void measure_mma(const char* type, int multiprocessors) {
  auto kernel = mma_rate<TYPE, WARPS, FRAGMENTS, TILES, FEED>;
  Shape s{multiprocessors, WARPS * 32};
  int iterations = 400000 / (FRAGMENTS * TILES * WARPS / 4);
  double flops_each = 2.0 * 16 * 8 * (TYPE == TF32 ? 8 : 16);
  launch(kernel, s, iterations, sink_buffer, cycles_buffer);
  double ns = event_ns([&] { launch(kernel, s, iterations, sink_buffer, cycles_buffer); });
  double cycles = median_cycles(multiprocessors);
  double per_warp = static_cast<double>(iterations) * FRAGMENTS * TILES;
  record("mma", {{"type", type},
                 {"warps", WARPS},
                 {"weight_registers", FRAGMENTS * 4},
                 {"n8_tiles", TILES},
                 {"h_from", FEED ? "ldmatrix" : "registers"},
                 {"flop_per_clk_sm", per_warp * WARPS * flops_each / cycles},
                 {"issue_cycles_per_mma_per_subpartition", cycles * 4 / (per_warp * WARPS)},
                 {"tflops", per_warp * WARPS * flops_each * multiprocessors / ns * 1e-3}});
}

template <int TYPE>
static void measure_mma_all(const char* type, int n) {
  measure_mma<TYPE, 4, 4, 4, false>(type, n);
  measure_mma<TYPE, 8, 4, 4, false>(type, n);
  measure_mma<TYPE, 16, 4, 2, false>(type, n);
  measure_mma<TYPE, 8, 32, 1, false>(type, n);
  measure_mma<TYPE, 8, 32, 1, true>(type, n);
  measure_mma<TYPE, 8, 32, 2, true>(type, n);
  measure_mma<TYPE, 8, 32, 4, true>(type, n);
  measure_mma<TYPE, 8, 16, 8, true>(type, n);
  measure_mma<TYPE, 4, 32, 1, true>(type, n);
  measure_mma<TYPE, 16, 16, 1, true>(type, n);
  measure_mma<TYPE, 16, 16, 2, true>(type, n);
  int iterations = 2000;
  launch(mma_latency<TYPE>, Shape{1, 32}, iterations, sink_buffer, cycles_buffer);
  launch(mma_latency<TYPE>, Shape{1, 32}, iterations, sink_buffer, cycles_buffer);
  record("mma_latency", {{"type", type}, {"cycles", median_cycles(1) / (iterations * 16)}});
}

template <int KIND>
static void measure_block_barrier(const char* kind, int threads) {
  int iterations = 20000;
  for (int r = 0; r < 2; ++r) launch(block_barrier<KIND>, Shape{8, threads}, iterations, cycles_buffer, fault);
  double cycles = median_cycles(8) / iterations;
  check_fault();
  record("block_barrier", {{"kind", kind}, {"threads", threads}, {"cycles", cycles}});
}

template <int PER, int HANDOFF>
static double measure_l2_exchange(unsigned char* memory, unsigned* counters, int bytes, int P, int groups) {
  auto kernel = l2_exchange<PER, HANDOFF>;
  // All rows together stay well inside L2, as a freshly pre-filled chunk of y would.
  int steps = std::min<long long>(128, (32LL << 20) / (2LL * groups * bytes));
  int chunks = bytes / 16, capacity = 2 * steps;
  // 200 KB of shared memory each: one CTA per SM, as for a kernel that keeps weights there.
  Shape s{P * groups, 256, 200 * 1024, 0, true};
  allow(kernel, s);
  return slope_ns(
      steps,
      [&](int) {
        CUDA(cudaMemsetAsync(memory, 0xFF, static_cast<size_t>(groups) * capacity * bytes));
        CUDA(cudaMemsetAsync(counters, 0, 64 * 256));
      },
      [&](int n) { launch(kernel, s, reinterpret_cast<uint4*>(memory), counters, chunks, P, capacity, n, fault); });
}

static double graph_ns(int nodes, const Shape& shape, void (*kernel)()) {
  cudaStream_t stream;
  CUDA(cudaStreamCreate(&stream));
  Shape s = shape;
  s.stream = stream;
  allow(kernel, s);
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < nodes; ++i) launch(kernel, s);
  cudaGraph_t graph;
  CUDA(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t exec;
  CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t a, b;
  CUDA(cudaEventCreate(&a));
  CUDA(cudaEventCreate(&b));
  std::vector<double> times;
  for (int r = 0; r < 8; ++r) {
    CUDA(cudaEventRecord(a, stream));
    CUDA(cudaGraphLaunch(exec, stream));
    CUDA(cudaEventRecord(b, stream));
    CUDA(cudaEventSynchronize(b));
    float ms;
    CUDA(cudaEventElapsedTime(&ms, a, b));
    if (r > 1) times.push_back(ms * 1e6);
  }
  CUDA(cudaEventDestroy(a));
  CUDA(cudaEventDestroy(b));
  CUDA(cudaGraphExecDestroy(exec));
  CUDA(cudaGraphDestroy(graph));
  CUDA(cudaStreamDestroy(stream));
  return median(times);
}

int main(int argc, char** argv) {
  started = seconds_now();
  if (argc > 1) budget = std::atof(argv[1]);
  cudaDeviceProp device;
  int driver = 0, runtime = 0;
  try {
    CUDA(cudaGetDeviceProperties(&device, 0));
    CUDA(cudaDriverGetVersion(&driver));
    CUDA(cudaRuntimeGetVersion(&runtime));
    CUDA(cudaMalloc(&fault, sizeof(int)));
    CUDA(cudaMemset(fault, 0, sizeof(int)));
    CUDA(cudaMalloc(&cycles_buffer, 8192 * sizeof(long long)));
    CUDA(cudaMalloc(&sink_buffer, 1024 * 1024 * sizeof(float)));
  } catch (const std::exception& e) {
    std::printf("{\"error\": \"%s\"}\n", e.what());
    return 1;
  }
  int n = device.multiProcessorCount;
  size_t large = 200 * 1024;
  std::printf("{\"device\": \"%s\", \"multiprocessors\": %d, \"compute_capability\": \"%d.%d\", \"l2_bytes\": %d,\n",
              device.name, n, device.major, device.minor, device.l2CacheSize);
  std::printf(" \"shared_bytes_per_block\": %zu, \"driver_cuda\": %d, \"runtime_cuda\": %d, \"records\": [",
              device.sharedMemPerBlockOptin, driver, runtime);

  double mhz = 0;
  section("sm_clock", [&] {
    for (int r = 0; r < 4; ++r) launch(clock_rate, Shape{n, 256}, 100000000LL, cycles_buffer);
    std::vector<long long> c(2 * n);
    CUDA(cudaMemcpy(c.data(), cycles_buffer, c.size() * sizeof(long long), cudaMemcpyDeviceToHost));
    std::vector<double> rates;
    for (int i = 0; i < n; ++i) rates.push_back(1e3 * c[2 * i] / static_cast<double>(c[2 * i + 1]));
    mhz = median(rates);
    record("sm_clock", {{"mhz_under_fma_load", mhz}});
  });

  // Clusters that fit at once, with about 200 KB of shared memory a CTA (one CTA per SM).
  int fit[17] = {};
  section("active_clusters", [&] {
    for (int c : {1, 2, 4, 8, 16}) {
      try {
        fit[c] = active_clusters(cluster_exchange<0>, Shape{0, 256, large, c}, n);
      } catch (const std::exception& e) {
        record("active_clusters", {{"cluster", c}, {"error", e.what()}});
        continue;
      }
      record("active_clusters", {{"cluster", c}, {"shared_bytes", large}, {"count", fit[c]}, {"ctas", fit[c] * c}});
    }
  });

  section("block_barrier", [&] {
    for (int threads : {128, 256, 512, 1024}) measure_block_barrier<0>("syncthreads", threads);
    for (int threads : {256, 512}) {
      measure_block_barrier<1>("named barrier per 128 threads", threads);
      measure_block_barrier<2>("arrive/sync round trip between two halves", threads);
      measure_block_barrier<3>("mbarrier, one arrival per warp, all wait", threads);
    }
  });

  section("gate_latency", [&] {
    auto one = [&](void (*kernel)(int, float*, long long*), const char* what) {
      for (int r = 0; r < 2; ++r) launch(kernel, Shape{1, 32}, 2000, sink_buffer, cycles_buffer);
      record("gate_latency", {{"function", what}, {"cycles", median_cycles(1) / 16000}});
    };
    one(gate_latency<0>, "sigmoid by ex2 and rcp");
    one(gate_latency<1>, "tanh by ex2 and rcp");
    one(gate_latency<2>, "tanh.approx");
  });

  // Hand-offs between two SMs.
  unsigned char* boxes = nullptr;
  unsigned* counters = nullptr;
  CUDA(cudaMalloc(&boxes, 64 << 20));
  CUDA(cudaMalloc(&counters, 64 * 256));
  auto hops = [&](const char* name, bool counter) {
    std::vector<double> all;
    for (int partner : {1, 2, 3, 9, 16, 33, 50, 66, 80, 99, 120, 131}) {
      if (partner >= n) continue;
      for (size_t at : {size_t(0), size_t(4096 + 512), size_t(1 << 20) + 8192 + 1536}) {
        int apart = 64 * 1024 / 16 + 40;
        Shape s{n, 32, large, 0, true};
        allow(l2_pingpong_data, s);
        allow(l2_pingpong_counter, s);
        uint4* box = reinterpret_cast<uint4*>(boxes + at);
        auto reset = [&](int) {
          CUDA(cudaMemsetAsync(boxes, 0, 4 << 20));
          CUDA(cudaMemsetAsync(counters, 0, 64 * 256));
        };
        double ns = slope_ns(
            400, reset,
            [&](int steps) {
              if (counter)
                launch(l2_pingpong_counter, s, box, counters, apart, partner, steps, fault);
              else
                launch(l2_pingpong_data, s, box, apart, partner, steps, fault);
            },
            3);
        all.push_back(ns / 2);
      }
    }
    std::sort(all.begin(), all.end());
    record(name, {{"ns_per_hop_min", all.front()},
                  {"ns_per_hop_median", median(all)},
                  {"ns_per_hop_max", all.back()},
                  {"pairs", static_cast<double>(all.size())}});
  };
  section("l2_handoff_data", [&] { hops("l2_handoff_data", false); });
  section("l2_handoff_counter", [&] { hops("l2_handoff_counter", true); });

  section("cluster_handoff", [&] {
    for (int c : {2, 4, 8, 16}) {
      for (int kind = 0; kind < 2; ++kind) {
        auto kernel = kind == 0 ? cluster_pingpong<0> : cluster_pingpong<1>;
        std::vector<double> all;
        for (int partner = 1; partner < c; partner += (c > 4 ? 2 : 1)) {
          Shape s{c, 32, 0, c};
          allow(kernel, s);
          all.push_back(slope_ns(1000, nothing, [&](int steps) { launch(kernel, s, partner, steps, fault); }, 3) / 2);
        }
        std::sort(all.begin(), all.end());
        record("cluster_handoff", {{"cluster", c},
                                   {"kind", kind == 0 ? "st.async and mbarrier" : "remote store, polled"},
                                   {"ns_per_hop_min", all.front()},
                                   {"ns_per_hop_median", median(all)},
                                   {"ns_per_hop_max", all.back()}});
      }
    }
  });

  section("cluster_barrier", [&] {
    for (int c : {1, 2, 4, 8, 16}) {
      Shape s{c * std::max(1, fit[c]), 256, large, c};
      allow(cluster_sync, s);
      double ns = slope_ns(2000, nothing, [&](int steps) { launch(cluster_sync, s, steps); });
      record("cluster_barrier",
             {{"cluster", c}, {"clusters", fit[c]}, {"threads", 256}, {"ns", ns}, {"cycles", ns * mhz * 1e-3}});
    }
  });

  section("grid_barrier", [&] {
    for (int blocks : {32, 64, 128, n}) {
      Shape s{blocks, 256, large, 0, true};
      allow(grid_sync, s);
      allow(counter_barrier, s);
      double a = slope_ns(500, nothing, [&](int steps) { launch(grid_sync, s, steps); });
      record("grid_barrier", {{"kind", "cooperative groups grid.sync"}, {"ctas", blocks}, {"threads", 256}, {"ns", a}});
      double b = slope_ns(
          500, [&](int) { CUDA(cudaMemsetAsync(counters, 0, 64 * 256)); },
          [&](int steps) { launch(counter_barrier, s, counters, steps, fault); });
      record("grid_barrier",
             {{"kind", "one counter: red.release, ld.acquire"}, {"ctas", blocks}, {"threads", 256}, {"ns", b}});
    }
  });

  // All-to-all exchange of h: the communication of one time step.
  section("cluster_exchange", [&] {
    const char* modes[] = {"st.async 16 B", "bulk copy per peer", "remote stores and barrier.cluster",
                           "remote stores, polled"};
    void (*kernels[])(int, int, int*) = {cluster_exchange<0>, cluster_exchange<1>, cluster_exchange<2>,
                                         cluster_exchange<3>};
    for (int c : {2, 4, 8, 16}) {
      for (int bytes : {1024, 2048, 4096, 8192, 16384, 32768, 65536}) {
        for (int mode = 0; mode < 4; ++mode) {
          Shape s{c * std::max(1, fit[c]), 256, large, c};
          allow(kernels[mode], s);
          try {
            double ns = slope_ns(400, nothing, [&](int steps) { launch(kernels[mode], s, bytes, steps, fault); }, 3);
            record(
                "cluster_exchange",
                {{"cluster", c}, {"clusters", fit[c]}, {"h_bytes", bytes}, {"kind", modes[mode]}, {"ns_per_step", ns}});
          } catch (const std::exception& e) {
            record("cluster_exchange",
                   {{"cluster", c}, {"h_bytes", bytes}, {"kind", modes[mode]}, {"error", e.what()}});
            CUDA(cudaDeviceSynchronize());
          }
        }
      }
    }
  });

  section("l2_exchange", [&] {
    unsigned char* rows = nullptr;
    CUDA(cudaMalloc(&rows, size_t(32) << 20));
    struct Case {
      int P, groups;
    };
    for (Case k : {Case{128, 1}, Case{64, 1}, Case{32, 1}, Case{32, 4}, Case{64, 2}, Case{16, 8}}) {
      if (k.P * k.groups > n) continue;
      for (int bytes : {2048, 4096, 8192, 16384, 32768, 65536}) {
        if (bytes / 16 < k.P) continue;
        for (int counter = 0; counter < 2; ++counter) {
          double ns = 0;
#define FUSEDRNN_EXCHANGE(PER)                                                     \
  ns = counter ? measure_l2_exchange<PER, 1>(rows, counters, bytes, k.P, k.groups) \
               : measure_l2_exchange<PER, 0>(rows, counters, bytes, k.P, k.groups)
          try {
            if (bytes <= 4096) FUSEDRNN_EXCHANGE(1);
            if (bytes == 8192) FUSEDRNN_EXCHANGE(2);
            if (bytes == 16384) FUSEDRNN_EXCHANGE(4);
            if (bytes == 32768) FUSEDRNN_EXCHANGE(8);
            if (bytes == 65536) FUSEDRNN_EXCHANGE(16);
            record("l2_exchange", {{"ctas", k.P},
                                   {"groups", k.groups},
                                   {"h_bytes", bytes},
                                   {"kind", counter ? "counter" : "data is the flag"},
                                   {"ns_per_step", ns}});
          } catch (const std::exception& e) {
            record("l2_exchange", {{"ctas", k.P},
                                   {"groups", k.groups},
                                   {"h_bytes", bytes},
                                   {"kind", counter ? "counter" : "data is the flag"},
                                   {"error", e.what()}});
            CUDA(cudaDeviceSynchronize());
          }
        }
      }
    }
    CUDA(cudaFree(rows));
  });

  section("mma bf16", [&] { measure_mma_all<BF16>("bf16", n); });
  section("mma fp16", [&] { measure_mma_all<F16>("fp16", n); });
  section("mma tf32", [&] { measure_mma_all<TF32>("tf32", n); });

  section("ffma", [&] {
    auto one = [&](void (*kernel)(int, float*, long long*), int warps, int each, const char* h) {
      int iterations = 3000000 / each / (warps / 4);
      launch(kernel, Shape{n, warps * 32}, iterations, sink_buffer, cycles_buffer);
      double ns = event_ns([&] { launch(kernel, Shape{n, warps * 32}, iterations, sink_buffer, cycles_buffer); });
      double flops = 2.0 * iterations * each * warps * 32;
      record("ffma", {{"warps", warps},
                      {"h_from", h},
                      {"flop_per_clk_sm", flops / median_cycles(n)},
                      {"tflops", flops * n / ns * 1e-3}});
    };
    one(fma_rate<4>, 4, 128, "registers");
    one(fma_rate<8>, 8, 128, "registers");
    one(fma_rate<16>, 16, 128, "registers");
    one(fma_fed<8, 1>, 8, 64, "shared memory, 1 column");
    one(fma_fed<8, 8>, 8, 512, "shared memory, 8 columns");
    one(fma_fed<16, 1>, 16, 64, "shared memory, 1 column");
    one(fma_fed<16, 4>, 16, 256, "shared memory, 4 columns");
  });

  section("shared_read", [&] {
    for (int r = 0; r < 2; ++r)
      launch(shared_read, Shape{n, 256}, 4000, reinterpret_cast<unsigned*>(sink_buffer), cycles_buffer);
    record("shared_read", {{"bytes_per_clk_sm", 4000.0 * 8 * 256 * 16 / median_cycles(n)}});
  });

  section("l2_latency", [&] {
    int* out = nullptr;
    int count = 1024;
    CUDA(cudaMalloc(&out, count * sizeof(int)));
    CUDA(cudaMemset(boxes, 0, 4 << 20));
    launch(l2_latency, Shape{1, 1}, reinterpret_cast<const uint4*>(boxes), count, 4096 / 16 + 8, out);
    std::vector<int> v(count);
    CUDA(cudaMemcpy(v.data(), out, count * sizeof(int), cudaMemcpyDeviceToHost));
    std::sort(v.begin(), v.end());
    record("l2_latency",
           {{"cycles_p10", v[count / 10]}, {"cycles_p50", v[count / 2]}, {"cycles_p90", v[count * 9 / 10]}});
    CUDA(cudaFree(out));
  });

  section("l2_read", [&] {
    CUDA(cudaMemset(boxes, 1, 64 << 20));
    struct Case {
      int bytes, offset;
      const char* what;
    };
    for (Case k : {Case{65536, 0, "all SMs read the same 64 KiB in the same order"},
                   Case{65536, 512, "all SMs read the same 64 KiB, each from another start"},
                   Case{1 << 20, 4096, "all SMs read the same 1 MiB, each from another start"},
                   Case{16 << 20, 7936, "all SMs read the same 16 MiB, each from another start"}}) {
      for (int threads : {256, 512}) {
        int passes = std::max(1, (16 << 20) / k.bytes);
        for (int r = 0; r < 2; ++r)
          launch(l2_read, Shape{n, threads}, reinterpret_cast<const uint4*>(boxes), k.bytes / 16, k.offset, passes,
                 reinterpret_cast<unsigned*>(sink_buffer), cycles_buffer);
        double each = static_cast<double>(passes) * k.bytes / median_cycles(n);
        record("l2_read", {{"pattern", k.what},
                           {"threads", threads},
                           {"bytes_per_clk_sm", each},
                           {"tbytes_per_s", each * n * mhz * 1e-6}});
      }
    }
  });

  section("bulk_read", [&] {
    for (int c : {1, 2, 4}) {
      for (int bytes : {16384, 65536}) {
        Shape s{c * std::max(1, fit[c]), 128, large, c};
        allow(bulk_read, s);
        double ns = slope_ns(400, nothing, [&](int passes) {
          launch(bulk_read, s, const_cast<const unsigned char*>(boxes), bytes, passes, fault);
        });
        record(
            "bulk_read",
            {{"cluster", c}, {"bytes", bytes}, {"ns_per_pass", ns}, {"bytes_per_clk_sm", bytes / (ns * mhz * 1e-3)}});
      }
    }
  });

  section("launch", [&] {
    struct Case {
      const char* what;
      Shape shape;
      void (*kernel)();
    };
    Shape overlapped{n, 256};
    overlapped.overlap = true;
    for (const Case& k :
         {Case{"1 x 32 threads", Shape{1, 32}, empty_kernel}, Case{"132 x 256 threads", Shape{n, 256}, empty_kernel},
          Case{"132 x 256 threads, 200 KB shared", Shape{n, 256, large}, empty_kernel},
          Case{"132 x 256 threads, programmatic dependent launch", overlapped, empty_overlapped}}) {
      try {
        double ns = (graph_ns(1000, k.shape, k.kernel) - graph_ns(500, k.shape, k.kernel)) / 500;
        record("graph_node", {{"kernel", k.what}, {"ns", ns}});
      } catch (const std::exception& e) {
        record("graph_node", {{"kernel", k.what}, {"error", e.what()}});
        cudaGetLastError();
      }
    }
    auto stream_launch = [&](const char* what, const Shape& s, void (*kernel)()) {
      allow(kernel, s);
      double gpu = slope_ns(
          1000, nothing,
          [&](int k) {
            for (int i = 0; i < k; ++i) launch(kernel, s);
          },
          3);
      std::vector<double> trip;
      for (int i = 0; i < 200; ++i) {
        double t = seconds_now();
        launch(kernel, s);
        CUDA(cudaDeviceSynchronize());
        trip.push_back((seconds_now() - t) * 1e9);
      }
      std::vector<double> bracket;
      for (int i = 0; i < 50; ++i) bracket.push_back(event_ns([&] { launch(kernel, s); }));
      record("stream_launch", {{"kernel", what},
                               {"ns_each_back_to_back", gpu},
                               {"ns_launch_and_wait_on_host", median(trip)},
                               {"ns_between_events", median(bracket)}});
    };
    stream_launch("132 x 256 threads", Shape{n, 256}, empty_kernel);
    stream_launch("132 x 256 threads, 200 KB shared", Shape{n, 256, large}, empty_kernel);
    stream_launch("132 x 256 threads, cooperative", Shape{n, 256, large, 0, true}, empty_kernel);
    stream_launch("120 x 256 threads, clusters of 8", Shape{120, 256, large, 8}, empty_kernel);
  });

  section("copy", [&] {
    size_t bytes = size_t(4) << 30;
    unsigned char *a = nullptr, *b = nullptr;
    CUDA(cudaMalloc(&a, bytes));
    CUDA(cudaMalloc(&b, bytes));
    CUDA(cudaMemset(a, 0x5A, bytes));
    std::vector<double> engine, kernel, fill;
    for (int r = 0; r < 6; ++r) {
      double e = event_ns([&] { CUDA(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice)); });
      double k = event_ns([&] {
        launch(copy_kernel, Shape{n * 8, 512}, reinterpret_cast<const uint4*>(a), reinterpret_cast<uint4*>(b),
               bytes / 16);
      });
      double f = event_ns([&] { CUDA(cudaMemsetAsync(b, 0xFF, bytes)); });
      if (r) engine.push_back(e), kernel.push_back(k), fill.push_back(f);
    }
    record("copy", {{"kind", "cudaMemcpy device to device"},
                    {"gibibytes", 4},
                    {"tbytes_per_s_read_plus_written", 2.0 * bytes / median(engine) * 1e-3}});
    record("copy", {{"kind", "16-byte copy kernel"},
                    {"gibibytes", 4},
                    {"tbytes_per_s_read_plus_written", 2.0 * bytes / median(kernel) * 1e-3}});
    record("copy", {{"kind", "cudaMemset"}, {"gibibytes", 4}, {"tbytes_per_s_written", bytes / median(fill) * 1e-3}});
    CUDA(cudaFree(a));
    CUDA(cudaFree(b));
  });

  std::printf("\n ],\n \"seconds\": %.1f}\n", seconds_now() - started);
  return 0;
}
