// SPDX-License-Identifier: Apache-2.0
#include "threads.h"

#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/cpu.h"
#include "fiber.h"
#include "machine.h"

namespace fusedrnn::cpu {

namespace {

constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000 * kMicrosecond;
constexpr int64_t kStay = 200 * kMicrosecond;  // a member that waits keeps its thread so long
constexpr int64_t kSpin = 50 * kMicrosecond;   // the caller that waits does not sleep before
constexpr int64_t kGrace = 20 * kMicrosecond;  // ... nor run a member that a thread may be on its way to
constexpr int64_t kIdle = 200 * kMicrosecond;  // nor does a thread without a member
constexpr int64_t kSleep = kMillisecond;       // the longest sleep: see Barrier::arrive
constexpr int64_t kSignals = 100 * kMillisecond;

// ---- how many threads the machine has for us, from what earlier calls met ------------------------------------------

// Calls tell how long they waited for threads that had no core. Where that is more than a few percent of the time, the
// next calls use fewer threads: for 4 ms at first, and twice as long each time that trying again shows the same. So
// they do while the system counts more tasks than cores: other programs' bursts of a few milliseconds are waited out.
class Crowd {
 public:
  std::atomic<bool> ignored{false};

  int threads(int wanted) {
    if (ignored.load(relaxed)) return wanted;
    const int64_t now = nanoseconds();
    if (now < until_.load(relaxed)) return std::min(wanted, allowed_.load(relaxed));
    int64_t looked = looked_.load(relaxed);
    if (now - looked < kMillisecond || !looked_.compare_exchange_strong(looked, now)) return wanted;
    const int crowding = tasks_without_a_core();
    const bool again = crowding_.exchange(crowding, relaxed) > 0 && now - looked < kLongBurst + 20 * kMillisecond;
    if (crowding == 0 || !again) {
      burst_.store(kShortBurst, relaxed);
      return wanted;
    }
    const int64_t burst = burst_.load(relaxed);
    burst_.store(std::min(2 * burst, kLongBurst), relaxed);
    limit(wanted - crowding, now + burst);
    return allowed_.load(relaxed);
  }
  // `lost` nanoseconds of waiting, which `allowed` threads would not have met.
  void waited(int64_t lost, int allowed) {
    const int64_t now = nanoseconds();
    const int64_t forgiven = (now - debt_since_.exchange(now, relaxed)) / 32;
    const int64_t debt = std::max<int64_t>(0, debt_.load(relaxed) - forgiven) + lost;
    debt_.store(debt, relaxed);
    if (debt < 3 * kMillisecond) return;
    debt_.store(0, relaxed);
    const int64_t before = pause_.load(relaxed);
    const bool again = now - paused_until_.load(relaxed) < std::max(4 * before, 40 * kMillisecond);
    const int64_t pause = again ? std::min(2 * before, 2000 * kMillisecond) : 4 * kMillisecond;
    pause_.store(pause, relaxed);
    paused_until_.store(now + pause, relaxed);
    limit(allowed, now + pause);
  }

 private:
  static constexpr std::memory_order relaxed = std::memory_order_relaxed;
  static constexpr int64_t kShortBurst = 2 * kMillisecond, kLongBurst = 64 * kMillisecond;

  void limit(int allowed, int64_t until) {
    allowed_.store(std::max(allowed, 1), relaxed);
    until_.store(until, relaxed);
  }

  std::atomic<int> allowed_{1}, crowding_{0};
  std::atomic<int64_t> until_{0};
  std::atomic<int64_t> looked_{0}, burst_{kShortBurst};
  std::atomic<int64_t> debt_{0}, debt_since_{0}, pause_{4 * kMillisecond}, paused_until_{0};
} crowd;

thread_local Signals signals;

// A thread of a call.
struct Host {
  Fiber fiber;
  int64_t put_aside = 0;
  bool is_caller = false;
};

struct FullCrew;

}  // namespace

// A member of a call other than the caller's: its stack, and who runs it.
struct alignas(64) Seat {
  enum State { free, held, ended };
  std::atomic<int> state{free};
  Fiber fiber;
  FullCrew* crew = nullptr;
  Host* host = nullptr;  // of the thread that holds it
  int rank = 0;
  bool begun = false, done = false;
  std::atomic<const Barrier*> barrier{nullptr};  // what it waits for, once it has begun
  uint32_t ticket = 0;
  int size = 0;

  bool is_ready() const { return !begun || barrier.load(std::memory_order_relaxed)->is_complete(ticket, size); }
};

namespace {

thread_local Seat* starting = nullptr;

// One call. Its members have seats; its threads take the seats that are ready to go on, run them to the next meeting,
// and keep them as long as nothing else asks for the thread. Nobody owns a member: a thread that the system has put
// aside holds up the one it was running, no other.
struct FullCrew : Crew {
  void (*body)(void*, const Team&) = nullptr;
  void* argument = nullptr;
  int ranks = 1;
  Barrier barrier;
  std::unique_ptr<Seat[]> seats;
  int seats_made = 0;
  Stacks stacks;
  Host caller;
  bool in_use = false;
  bool helps = false;  // the caller runs others' members: after a grace period, until another thread runs one
  uint32_t bell = 0;   // sleepers sleep on it
  std::atomic<int> threads{1}, seats_ended{0}, threads_left{0}, surplus{0}, dismissed{0};
  std::atomic<bool> over{false};
  std::atomic<const Barrier*> caller_at{nullptr};  // what the caller's member waits for
  std::atomic<int64_t> waiting_since{0}, late{0}, lost{0};
  int64_t began = 0, looked = 0, asked = 0;
  int32_t looks = 0;  // meetings between two looks
  uint64_t mode = 0;

  void begin(int members, void (*function)(void*, const Team&), void* its_argument);
  void run_caller();
  void serve(int number);
  void finish();
  void leave();

  Seat* find(int number);
  void run(Seat& seat, Host& host);
  template <class F>
  Seat* sleep(int number, int64_t since, const F& is_awaited);
  template <class F>
  void caller_waits(const F& is_awaited);
  void ring();
  void was_late(Host& host);
  void ask(int64_t now);
  bool any_held() const;
  bool is_awaited(const Barrier* barrier) const;
};

FullCrew& of(const Team& team) { return *static_cast<FullCrew*>(team.crew); }

void enter() {
  Seat& seat = *starting;
  seat.fiber.arrived();
  FullCrew& crew = *seat.crew;
  crew.body(crew.argument, Team{seat.rank, crew.ranks, &crew.barrier, &crew, &seat});
  seat.done = true;
  seat.fiber.switch_to(seat.host->fiber, true);
}

void FullCrew::begin(int members, void (*function)(void*, const Team&), void* its_argument) {
  body = function;
  argument = its_argument;
  ranks = members;
  threads = 1;
  until_look = looks = 16;
  if (!signals.arrived) until_look = 1 << 30;
  looked = asked = began = nanoseconds();
  stopped = asleep = 0;
  away = members - 1;
  over.store(false, std::memory_order_relaxed);
  helps = false;
  caller_at.store(nullptr, std::memory_order_relaxed);
  if (members == 1) return;
  barrier = Barrier();
  seats_ended.store(0, std::memory_order_relaxed);
  threads_left.store(0, std::memory_order_relaxed);
  surplus.store(0, std::memory_order_relaxed);
  dismissed.store(0, std::memory_order_relaxed);
  late.store(0, std::memory_order_relaxed);
  lost.store(0, std::memory_order_relaxed);
  if (members - 1 > seats_made) {
    seats.reset(new Seat[static_cast<size_t>(members - 1)]);
    seats_made = members - 1;
  }
  stacks.reserve(static_cast<size_t>(members - 1));
  for (int i = 0; i < members - 1; ++i) {
    Seat& seat = seats[static_cast<size_t>(i)];
    seat.crew = this;
    seat.rank = i + 1;
    seat.begun = seat.done = false;
    seat.barrier.store(nullptr, std::memory_order_relaxed);
    seat.fiber.create(stacks.stack(static_cast<size_t>(i)), enter);
    seat.state.store(Seat::free, std::memory_order_relaxed);
  }
  caller.fiber.adopt_caller();
  caller.is_caller = true;
  caller.put_aside = times_put_aside();
  mode = float_mode();
}

// A seat to run, held now; null if there is none. Each thread begins with its own.
Seat* FullCrew::find(int number) {
  const int count = ranks - 1;
  for (int k = 0; k < count; ++k) {
    Seat& seat = seats[static_cast<size_t>((number + count - 1 + k) % count)];
    int state = Seat::free;
    if (seat.state.load(std::memory_order_relaxed) != state ||
        !seat.state.compare_exchange_strong(state, Seat::held, std::memory_order_acquire))
      continue;
    if (!__atomic_load_n(&stopped, __ATOMIC_SEQ_CST) && seat.is_ready()) return &seat;
    seat.state.store(Seat::free, std::memory_order_release);
  }
  return nullptr;
}

// Runs a held seat until it waits or ends.
void FullCrew::run(Seat& seat, Host& host) {
  seat.host = &host;
  seat.begun = true;
  starting = &seat;
  host.fiber.switch_to(seat.fiber);
  const bool done = seat.done;  // it has ended, or is given up
  seat.state.store(done ? Seat::ended : Seat::free, std::memory_order_seq_cst);
  if (!done) return;
  seats_ended.fetch_add(1);
  ring();
}

void FullCrew::ring() {
  if (!__atomic_load_n(&asleep, __ATOMIC_SEQ_CST)) return;
  __atomic_add_fetch(&bell, 1, __ATOMIC_SEQ_CST);
  wake_all(&bell);
}

// Sleeps until something may be there to do.
template <class F>
Seat* FullCrew::sleep(int number, int64_t since, const F& is_awaited) {
  waiting_since.store(since, std::memory_order_relaxed);
  __atomic_add_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
  const uint32_t seen = __atomic_load_n(&bell, __ATOMIC_SEQ_CST);
  Seat* seat = nullptr;
  if (!is_awaited() && (stopped || !(seat = find(number)))) sleep_on(&bell, seen, kSleep);
  __atomic_sub_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
  return seat;
}

// The calling thread, while its own member cannot go on.
template <class F>
void FullCrew::caller_waits(const F& is_awaited) {
  int64_t since = 0;
  for (int spins = 1; !is_awaited(); ++spins) {
    Seat* seat = stopped || !helps ? nullptr : find(0);
    if (!seat && spins % 16 == 0) {
      const int64_t now = nanoseconds();
      if (!since) since = now;
      helps = helps || now - since > kGrace;
      if (now - since > kSpin) seat = sleep(0, since, is_awaited);
      if (!stopped && !over.load(std::memory_order_relaxed)) ask(now);
    }
    if (seat) {
      run(*seat, caller);
      since = 0;
      helps = __atomic_load_n(&away, __ATOMIC_RELAXED) > 0;
    } else {
      relax();
    }
  }
}

// The thread that comes last to a meeting, while others sleep: was it put aside? Then the machine has not enough cores.
void FullCrew::was_late(Host& host) {
  const int64_t times = times_put_aside();
  if (times == host.put_aside) return;
  host.put_aside = times;
  const int64_t now = nanoseconds(), waited = now - waiting_since.load(std::memory_order_relaxed);
  lost.fetch_add(waited);
  if (late.fetch_add(waited) + waited < 500 * kMicrosecond + (now - began) / 8) return;
  late.store(0);
  if (!crowd.ignored.load() && dismissed.load() + surplus.load() < threads - 1) surplus.fetch_add(1);
}

// A thread of the call that is not the caller's.
void FullCrew::serve(int number) {
  Host host;
  host.fiber.adopt_caller();
  host.put_aside = times_put_aside();
  const uint64_t own_mode = float_mode();
  set_float_mode(mode);
  const auto is_over = [&] { return over.load() || __atomic_load_n(&stopped, __ATOMIC_SEQ_CST) != 0; };
  int64_t since = 0;
  for (int spins = 1; !is_over(); ++spins) {
    int count = surplus.load(std::memory_order_relaxed);
    if (count > 0 && surplus.compare_exchange_strong(count, count - 1)) {
      dismissed.fetch_add(1);
      break;
    }
    Seat* seat = find(number);
    if (!seat && spins % 16 == 0) {
      const int64_t now = nanoseconds();
      if (!since) since = now;
      if (now - since > kIdle) seat = sleep(number, now, is_over);
    }
    if (!seat) {
      relax();
      continue;
    }
    __atomic_sub_fetch(&away, 1, __ATOMIC_RELAXED);
    run(*seat, host);
    __atomic_add_fetch(&away, 1, __ATOMIC_RELAXED);
    since = 0;
  }
  set_float_mode(own_mode);
  threads_left.fetch_add(1);
  ring();
}

bool FullCrew::any_held() const {
  for (int i = 0; i < ranks - 1; ++i)
    if (seats[static_cast<size_t>(i)].state.load() == Seat::held) return true;
  return false;
}

// Whether some member waits for this barrier's meeting, and no thread stands by it.
bool FullCrew::is_awaited(const Barrier* meeting) const {
  if (caller_at.load(std::memory_order_relaxed) == meeting) return true;
  for (int i = 0; i < ranks - 1; ++i) {
    const Seat& seat = seats[static_cast<size_t>(i)];
    if (seat.barrier.load(std::memory_order_relaxed) == meeting && seat.state.load() == Seat::free) return true;
  }
  return false;
}

// The caller's own member, and what the others have left to do when it has done its part.
void FullCrew::run_caller() {
  body(argument, Team{0, ranks, &barrier, this, nullptr});
  caller_waits([&] { return seats_ended.load() == ranks - 1; });
}

// Lets the other threads go. One that has no core is waited for here: it still has to leave the region.
void FullCrew::finish() {
  over.store(true);
  ring();
  const int64_t since = nanoseconds();
  const int there = threads_left.load() + 1;
  caller_waits([&] { return threads_left.load() == threads - 1; });
  const int64_t left_late = nanoseconds() - since;
  if (left_late > 2 * kSpin) lost.fetch_add(left_late);
  if (lost.load() > 0) crowd.waited(lost.load(), std::min(threads - 1, std::max(there, threads - dismissed.load())));
}

void FullCrew::ask(int64_t now) {
  if (!signals.arrived || now - asked < kSignals) return;
  asked = now;
  const Signals listening = set_signals({});  // a handler may call us: that call is not to ask the same again
  const bool arrived = listening.arrived(listening.context);
  set_signals(listening);
  if (!arrived) return;
  __atomic_store_n(&stopped, 1, __ATOMIC_SEQ_CST);
  ring();
  if (ranks > 1) caller_waits([&] { return !any_held(); });
  throw Interrupted();
}

// Kept by each calling thread. A call inside a call (from a signal's handler) makes its own.
thread_local FullCrew kept_crew;

// OpenMP's threads do not survive fork: a child would wait for them for ever. So the forking thread gives its own back
// first; parent and child each start new ones at their next call.
void before_fork() { omp_pause_resource_all(omp_pause_soft); }

[[maybe_unused]] const int registered = pthread_atfork(before_fork, nullptr, nullptr);

constexpr size_t kKept = size_t{512} << 20;  // a thread keeps at most so much between calls

struct Kept {
  void* data = nullptr;
  size_t size = 0;
  bool busy = false;
  ~Kept() { std::free(data); }
};
thread_local Kept kept;

// Null where there is none. Large memory asks for large pages: weights are read again at every step.
void* allocate(size_t bytes) {
  constexpr size_t page = size_t{2} << 20;
  const bool large = bytes >= 2 * page;
  const size_t unit = large ? page : 64;
  bytes = (bytes + unit - 1) / unit * unit;
  void* data = std::aligned_alloc(unit, bytes);
#if defined(MADV_HUGEPAGE)
  if (data && large) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

void run_alone(FullCrew& crew, void (*body)(void* argument, const Team& team), void* argument) {
  crew.begin(1, body, argument);
  body(argument, Team{0, 1, nullptr, &crew, nullptr});
}

}  // namespace

void Crew::meet(const Team& team, uint32_t ticket) {
  FullCrew& crew = of(team);
  const auto is_complete = [&] { return team.barrier->is_complete(ticket, team.size); };
  Seat* const seat = team.seat;
  if (!seat) {
    crew.caller_at.store(team.barrier, std::memory_order_relaxed);
    crew.caller_waits(is_complete);
    return crew.caller_at.store(nullptr, std::memory_order_relaxed);
  }
  if (!seat->host->is_caller) {
    int64_t since = 0;
    for (int spins = 1; !__atomic_load_n(&crew.away, __ATOMIC_RELAXED); ++spins) {
      if (is_complete()) return;
      if (__atomic_load_n(&crew.stopped, __ATOMIC_RELAXED) || crew.surplus.load(std::memory_order_relaxed)) break;
      relax();
      if (spins % 16) continue;
      const int64_t now = nanoseconds();
      if (!since) since = now;
      if (now - since > kStay) break;
    }
  }
  seat->barrier.store(team.barrier, std::memory_order_relaxed);
  seat->ticket = ticket;
  seat->size = team.size;
  seat->fiber.switch_to(seat->host->fiber);  // who comes back finds the meeting complete
}

void Crew::wake(const Team& team) {
  FullCrew& crew = of(team);
  if (!crew.is_awaited(team.barrier)) return;
  crew.was_late(team.seat ? *team.seat->host : crew.caller);
  crew.ring();
}

void Crew::look(const Team& team) {
  FullCrew& crew = of(team);
  if (team.seat) {  // the call is given up, and this member with it
    team.seat->done = true;
    team.seat->fiber.switch_to(team.seat->host->fiber, true);
  }
  const int64_t now = nanoseconds();
  if (now - crew.looked < 10 * kMillisecond && crew.looks < 1 << 20)
    crew.looks *= 2;
  else if (now - crew.looked > 50 * kMillisecond && crew.looks > 1)
    crew.looks /= 2;
  crew.looked = now;
  crew.until_look = signals.arrived ? crew.looks : 1 << 30;
  crew.ask(now);
}

void parallel(int threads, void (*body)(void* argument, const Team& team), void* argument) {
  if (kept_crew.in_use) {
    FullCrew crew;
    return run_alone(crew, body, argument);
  }
  FullCrew& crew = kept_crew;
  struct Use {
    bool& in_use;
    ~Use() { in_use = false; }
  } use{crew.in_use};
  crew.in_use = true;
  if (threads > 1) threads = omp_in_parallel() || !Fiber::can_switch() ? 1 : crowd.threads(threads);
  if (threads <= 1) return run_alone(crew, body, argument);
  crew.begin(threads, body, argument);
  bool interrupted = false;
#pragma omp parallel num_threads(std::min(threads, std::max(2, processors())))
  {
    if (omp_get_thread_num() > 0) {
      crew.serve(omp_get_thread_num());
    } else {
      crew.threads = omp_get_num_threads();
      try {
        crew.run_caller();
      } catch (const Interrupted&) {
        interrupted = true;
      }
      crew.finish();
    }
  }
  if (interrupted) throw Interrupted();
}

Signals set_signals(Signals now) {
  const Signals before = signals;
  signals = now;
  return before;
}

void ignore_crowd(bool ignored) { crowd.ignored = ignored; }

int get_num_threads() { return omp_get_max_threads(); }
void set_num_threads(int threads) { omp_set_num_threads(threads < 1 ? 1 : threads); }

struct Workspace::Block {
  Block* next;
  char padding[64 - sizeof(Block*)];
};

Workspace::Workspace() : owner_(!kept.busy) {
  if (owner_) kept.busy = true;
}

void* Workspace::take(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  total_ += bytes;
  if (owner_ && used_ + bytes <= kept.size) {
    void* data = static_cast<char*>(kept.data) + used_;
    used_ += bytes;
    return data;
  }
  void* data = allocate(bytes + sizeof(Block));
  if (!data) throw std::bad_alloc();
  Block* block = new (data) Block;
  block->next = blocks_;
  blocks_ = block;
  return block + 1;
}

// What did not fit came in single blocks; next time it fits.
Workspace::~Workspace() {
  const bool grow = blocks_ && owner_ && total_ <= kKept;
  while (blocks_) {
    Block* next = blocks_->next;
    std::free(blocks_);
    blocks_ = next;
  }
  if (!owner_) return;
  if (grow) {
    std::free(kept.data);
    kept.data = allocate(total_);
    kept.size = kept.data ? total_ : 0;
  }
  kept.busy = false;
}

}  // namespace fusedrnn::cpu
