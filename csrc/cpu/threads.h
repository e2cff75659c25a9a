// SPDX-License-Identifier: Apache-2.0
// Threads and workspace. One OpenMP region a call; inside it the engine's own barrier, because a recurrence meets at
// one every step and OpenMP's costs microseconds.
#pragma once

#include <sched.h>

#include <cstddef>
#include <cstdint>

// Code compiled per ISA includes this: nothing here may become a symbol that the linker could share between ISAs.
#define FUSEDRNN_FORCE inline __attribute__((always_inline))

namespace fusedrnn::cpu {

// Members write a line each and read the others': one trip between cores and back. Many members share a counter.
// Spins for about 2 us, then yields: on a busy machine a spinning thread would keep its partner from the core.
class Barrier {
 public:
  FUSEDRNN_FORCE void wait(int rank, int size) {
    if (size > kLines) return count(size);
    const uint32_t now = __atomic_load_n(&lines_[rank].value, __ATOMIC_RELAXED) + 1;
    __atomic_store_n(&lines_[rank].value, now, __ATOMIC_RELEASE);
    // One that is ahead has gone through this meeting and waits at the next.
    for (int other = 0; other < size; ++other)
      for (int spins = 0; static_cast<int32_t>(__atomic_load_n(&lines_[other].value, __ATOMIC_ACQUIRE) - now) < 0;)
        pause(spins);
  }

 private:
  static constexpr int kLines = 8;
  struct alignas(64) Line {
    uint32_t value = 0;
  };

  FUSEDRNN_FORCE void count(int size) {
    uint32_t &arrived = lines_[0].value, &generation = lines_[1].value;
    const uint32_t now = __atomic_load_n(&generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == static_cast<uint32_t>(size)) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == now;) pause(spins);
  }
  static FUSEDRNN_FORCE void pause(int& spins) {
    if (++spins > 64) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Line lines_[kLines];
};

struct Team {
  int rank, size;
  Barrier* barrier;

  FUSEDRNN_FORCE void wait() const {
    if (size > 1) barrier->wait(rank, size);
  }
  // This member's part of n things: [begin(n), end(n)).
  FUSEDRNN_FORCE int64_t begin(int64_t n) const { return n * rank / size; }
  FUSEDRNN_FORCE int64_t end(int64_t n) const { return n * (rank + 1) / size; }
};

// Cores that this process may use.
int processors();

// Runs body(argument, team member) on up to `threads` threads; on one inside another parallel region.
void parallel(int threads, void (*body)(void* argument, const Team& team), void* argument);

// Memory for one call, taken from what the calling thread kept from earlier ones; all is taken before work starts.
class Workspace {
 public:
  Workspace();
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* take(size_t bytes);  // aligned to 64; throws std::bad_alloc

 private:
  bool owner_;  // false where a call of this thread is already using the kept memory
  struct Block;
  Block* blocks_ = nullptr;
  size_t used_ = 0, total_ = 0;
};

}  // namespace fusedrnn::cpu
