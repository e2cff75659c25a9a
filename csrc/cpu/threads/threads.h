// SPDX-License-Identifier: Apache-2.0
// Threads and workspace. A call is cut into members, always the same ones, whose work meets at barriers; threads come
// and go. A member waits where its thread has nothing better to do: a thread that waits runs members that nobody runs.
#pragma once

#include <cstddef>
#include <cstdint>

// Code compiled per ISA includes this: nothing here may become a symbol that the linker could share between ISAs.
#define FUSEDRNN_FORCE inline __attribute__((always_inline))

namespace fusedrnn::cpu {

FUSEDRNN_FORCE void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Members write a line each and read the others': one trip between cores and back. Many members share a counter.
class Barrier {
 public:
  // This member's ticket of the meeting at which it has arrived. No full fence, which would cost as much as the
  // meeting: so a thread that goes to sleep just now may be missed. It looks again within a millisecond.
  FUSEDRNN_FORCE uint32_t arrive(int rank, int size) {
    if (size > kLines) return count(size);
    const uint32_t now = __atomic_load_n(&lines_[rank].value, __ATOMIC_RELAXED) + 1;
    __atomic_store_n(&lines_[rank].value, now, __ATOMIC_RELEASE);
    return now;
  }
  // Whether all have arrived. One that is ahead has gone through this meeting and waits at the next.
  FUSEDRNN_FORCE bool is_complete(uint32_t ticket, int size) const {
    if (size > kLines) return __atomic_load_n(&lines_[1].value, __ATOMIC_ACQUIRE) != ticket;
    for (int other = 0; other < size; ++other)
      if (static_cast<int32_t>(__atomic_load_n(&lines_[other].value, __ATOMIC_ACQUIRE) - ticket) < 0) return false;
    return true;
  }

 private:
  static constexpr int kLines = 8;
  struct alignas(64) Line {
    uint32_t value = 0;
  };

  FUSEDRNN_FORCE uint32_t count(int size) {
    uint32_t &arrived = lines_[0].value, &generation = lines_[1].value;
    const uint32_t now = __atomic_load_n(&generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_SEQ_CST) == static_cast<uint32_t>(size)) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, now + 1, __ATOMIC_SEQ_CST);
    }
    return now;
  }

  Line lines_[kLines];
};

struct Team;
struct Seat;  // threads.cpp

// What all members of a call look at when they meet; threads.cpp has the rest.
struct Crew {
  alignas(64) int32_t away = 0;        // members, beside the caller's own, that no other thread is running now
  uint32_t asleep = 0;                 // threads that sleep until a meeting is complete
  uint32_t stopped = 0;                // the call is given up
  alignas(64) int32_t until_look = 0;  // the caller's own: meetings until it looks at the clock

  // The long ways, for a meeting that is not complete, and for the caller's look at the clock and at signals.
  static void meet(const Team& team, uint32_t ticket);
  static void look(const Team& team);
  static void wake(const Team& team);
};

struct Team {
  int rank, size;
  Barrier* barrier;
  Crew* crew;
  Seat* seat;  // of this member of the crew; null: the caller itself

  // Returns when all members of the team have come here. Throws Interrupted (cpu.h) in the caller, if a signal ends the
  // call.
  FUSEDRNN_FORCE void wait() const {
    if (size > 1) {
      const uint32_t ticket = barrier->arrive(rank, size);
      bool complete = barrier->is_complete(ticket, size);
      if (complete) {
        if (__atomic_load_n(&crew->asleep, __ATOMIC_RELAXED)) Crew::wake(*this);
      } else {
        for (int spins = 0; !complete && spins < 64 && !__atomic_load_n(&crew->away, __ATOMIC_RELAXED); ++spins) {
          relax();
          complete = barrier->is_complete(ticket, size);
        }
        if (!complete) Crew::meet(*this, ticket);
      }
    }
    listen();
  }
  // For work that goes on for long between meetings: the part of wait() that hears signals.
  FUSEDRNN_FORCE void listen() const {
    if (seat ? __atomic_load_n(&crew->stopped, __ATOMIC_RELAXED) != 0 : --crew->until_look <= 0) Crew::look(*this);
  }
  // Whether a signal has ended the call: for members that own memory, and so return instead of being forgotten.
  FUSEDRNN_FORCE bool is_given_up() const { return seat && __atomic_load_n(&crew->stopped, __ATOMIC_RELAXED) != 0; }
  // This member's part of n things: [begin(n), end(n)).
  FUSEDRNN_FORCE int64_t begin(int64_t n) const { return n * rank / size; }
  FUSEDRNN_FORCE int64_t end(int64_t n) const { return n * (rank + 1) / size; }
  // Members [first, past) as a team of their own, as this one sees it.
  FUSEDRNN_FORCE Team part(int first, int past, Barrier* own) const {
    return {rank - first, past - first, own, crew, seat};
  }
};

// Runs body(argument, team member) for `threads` members; for one inside another parallel region, and on a busy
// machine. body may throw in the caller only (Interrupted, see cpu.h); the other members' frames are dropped then, so
// they own nothing.
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
