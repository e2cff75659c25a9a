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

// Spins for about 2 us, then yields: on a busy machine a spinning thread would keep its partner from the core.
class Barrier {
 public:
  FUSEDRNN_FORCE void wait(int size) {
    const int now = __atomic_load_n(&generation_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation_, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == now;) {
      if (++spins < 64)
        pause();
      else
        sched_yield();
    }
  }

 private:
  static FUSEDRNN_FORCE void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  alignas(64) int arrived_ = 0;
  alignas(64) int generation_ = 0;
};

struct Team {
  int rank, size;
  Barrier* barrier;

  FUSEDRNN_FORCE void wait() const {
    if (size > 1) barrier->wait(size);
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
