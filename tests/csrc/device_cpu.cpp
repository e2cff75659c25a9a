// SPDX-License-Identifier: Apache-2.0
// The scheduler and the primitives of the CPU twin. The OS thread runs the scheduler; a primitive that has to wait
// gives the OS thread back to it. A warp is the unit of scheduling: one turn runs each of its lanes that can run until
// that lane waits.
#include "device_cpu.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <deque>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "device_fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
constexpr bool kAddressSanitizer = true;
#else
#define POISON(p, n) (void)(p), (void)(n)
#define UNPOISON(p, n) (void)(p), (void)(n)
constexpr bool kAddressSanitizer = false;
#endif

namespace fusedrnn::dev {
namespace sim {

constinit thread_local const Identity* me = nullptr;

namespace {

constexpr size_t kRedZone = 128;
constexpr int kMaxArrays = 64;
constexpr u8 kCanary = 0xA5;
constexpr u32 kAllLanes = 0xFFFFFFFFu;

struct Warp;
struct Block;

struct Copy {
  void* to;
  const void* from;
};

// A product of a warpgroup under way, as one warp sees it.
struct AsyncProduct {
  int tiles;
  Kind kind;
  u64 b;
  bool committed = false, sound = true, first;  // first: the sums were in `d`, else they come from the product before
  std::array<U4, 32> a;
  std::array<float*, 32> d;
  std::vector<float> sums;  // [lane][tile][4]
  std::vector<U4> early;    // B, if it has been read already
  Where at;
};

struct Thread : Identity {
  Fiber fiber;
  Warp* warp = nullptr;
  Block* home = nullptr;
  int lane = 0;
  bool ended = false;
  bool apart = false;          // it has left a wait that lanes leave one by one, and has met nobody since
  const char* what = nullptr;  // the primitive it waits in
  Where at;
  void* args = nullptr;                      // what the other lanes of a collective may look at
  std::vector<Copy> copies;                  // cp.async, not committed
  std::deque<std::vector<Copy>> groups;      // committed
  std::vector<std::pair<U4*, U4>> operands;  // operand16, not fenced
  bool fenced = false;                       // wgmma_fence since the last wait
  const u8* poll_base = nullptr;
  int poll_stride = 0;
  u32 poll_wanted = 0;
};

struct Warp {
  std::array<Thread*, 32> lanes{};
  int size = 0;
  u32 ready = 0;
  u32 ended = 0;
  u32 arrived = 0;
  Thread* first = nullptr;    // of those that have arrived at a collective
  size_t place = ~size_t{0};  // in Launch::ready
  double priority = 0;
  std::array<u8, 2> tag{};  // for ThreadSanitizer, by phase
  int phase = 0;
  std::deque<AsyncProduct> products;
  size_t issued = 0;
};

struct Barrier {
  int expected = 0;
  int phase = 0;
  Thread* first = nullptr;
  std::vector<Thread*> waiting;
  std::array<u8, 2> tag{};
};

struct MessageBarrier {
  int count = 0;
  int pending = 0;
  int64_t bytes = 0;
  u32 phase = 0;
  Block* home = nullptr;
  std::vector<Thread*> waiting;
  std::array<u8, 2> tag{};
};

struct Block {
  u8* arena = nullptr;
  std::array<Barrier, 16> barriers;
  int begun = 0;
  int ended = 0;
  int index = 0;
  std::array<std::vector<std::pair<u64, u32>>, 8> products;  // of each warpgroup: operand and line
};

struct Delivery {
  Thread* from;
  u8* to;
  U4 value;
  int words;            // 4: st_async, all at once; 1: a word of publish16
  MessageBarrier* bar;  // null: publish16
  Where at;
  uint64_t sent = 0;
};

struct Random {  // splitmix64
  uint64_t state;
  uint64_t operator()() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return static_cast<size_t>((*this)() % n); }
  double unit() { return static_cast<double>((*this)() >> 11) * 0x1p-53; }
};

std::string place(Where at) {
  std::string file = at.file_name();
  if (const size_t slash = file.rfind('/'); slash != std::string::npos) file.erase(0, slash + 1);
  return file + ":" + std::to_string(at.line());
}

std::string name(const Thread& t) { return "block " + std::to_string(t.block) + " thread " + std::to_string(t.tid); }

std::string name(const Thread& t, const char* what, Where at) { return name(t) + " at " + what + " " + place(at); }

struct Launch {
  Options options;
  Random random;
  Fiber scheduler;
  std::unique_ptr<Thread[]> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Barrier> clusters;
  std::vector<Warp*> ready;
  size_t turn = 0;
  std::vector<Delivery> deliveries;
  uint64_t sent = 0;
  std::unordered_map<const u8*, int> under_way;  // by address
  std::unordered_map<const void*, MessageBarrier> message_barriers;
  std::unordered_map<uintptr_t, std::vector<Thread*>> polls;  // by 16-byte granule
  std::vector<Thread*> polling;
  struct Array {
    size_t offset, bytes;
  };
  std::vector<Array> layout;  // the same in every block
  size_t shared_bytes = 0;    // as the launch says
  size_t shared_taken = 0;    // as the hardware would count
  size_t arena_used = 0;
  size_t arena_stride = 0;
  u8* arena = nullptr;
  int cluster = 1;
  int block_threads = 0;
  int alive = 0;
  std::string failure;
  void (*call)(const void*) = nullptr;
  const void* kernel = nullptr;
  u8 start_tag = 0, end_tag = 0;
  u32 broken_line = 0, broken_column = 0;
  std::string broken_what, broken_file;
  struct SiteHash {
    size_t operator()(const std::pair<const char*, uint64_t>& s) const {
      return std::hash<const void*>()(s.first) ^ s.second * 0x9E3779B97F4A7C15u;
    }
  };
  std::unordered_set<std::pair<const char*, uint64_t>, SiteHash> seen;

  ~Launch() {
    if (arena) {
      UNPOISON(arena, arena_stride * blocks.size());
      std::free(arena);
    }
  }
};

thread_local Launch* now = nullptr;
thread_local Stacks stacks;

Thread& self() { return *const_cast<Thread*>(static_cast<const Thread*>(me)); }

void fail(const std::string& text) {
  if (now->failure.empty()) now->failure = text;
}

void suspend() {
  Thread& t = self();
  t.fiber.switch_to(now->scheduler);
}

// From inside a kernel: this thread will not go on.
[[noreturn]] void fault(const std::string& text) {
  fail(text);
  for (;;) suspend();
}

std::string site(const char* what, Where at) {
  return std::string(what) + " " + place(at) + ":" + std::to_string(at.column());
}

// Is this call to be broken?
bool broken(const char* what, Where at) {
  Launch& l = *now;
  if (l.options.sites) {
    if (l.seen
            .insert({what, static_cast<uint64_t>(at.line()) << 32 ^ at.column() ^
                               reinterpret_cast<uintptr_t>(at.file_name()) << 8})
            .second)
      l.options.sites->insert(site(what, at));
  }
  return l.broken_line == at.line() && l.broken_line && l.options.broken == site(what, at);
}

void wake(Thread* t) {
  Warp& w = *t->warp;
  w.ready |= 1u << t->lane;
  if (w.place == ~size_t{0}) {
    w.place = now->ready.size();
    now->ready.push_back(&w);
  }
}

void wait_in(const char* what, Where at) {
  Thread& t = self();
  t.what = what;
  t.at = at;
  suspend();
  t.what = nullptr;
}

// ---- barriers of threads ------------------------------------------------------------------------------------------
void arrive(Barrier& b, int n, const char* what, Where at) {
  Thread& t = self();
  if (b.waiting.empty()) {
    b.expected = n;
    b.first = &t;
  } else if (b.expected != n) {
    fault(std::string(what) + " with different numbers of threads: " + std::to_string(b.expected) + " for " +
          name(*b.first, what, b.first->at) + ", " + std::to_string(n) + " for " + name(t, what, at));
  }
  u8* tag = &b.tag[static_cast<size_t>(b.phase)];
  order_release(tag);
  if (static_cast<int>(b.waiting.size()) + 1 == n) {
    for (Thread* other : b.waiting) wake(other);
    b.waiting.clear();
    b.phase ^= 1;
  } else {
    b.waiting.push_back(&t);
    wait_in(what, at);
  }
  order_acquire(tag);
}

// ---- collectives of a warp ----------------------------------------------------------------------------------------
// All 32 lanes come with their args; the last one runs `all`. Gives no ordering of memory: as on the GPU, only
// sync_warp does.
template <class F>
void collective(const char* what, Where at, void* args, F&& all) {
  Thread& t = self();
  Warp& w = *t.warp;
  if (w.size != 32)
    fault(std::string(what) + " in a warp of " + std::to_string(w.size) + " lanes: " + name(t, what, at));
  if (w.ended)
    fault(std::string(what) + " where lanes have already exited: " + name(t, what, at) + ", exited " +
          name(*w.lanes[static_cast<size_t>(std::countr_zero(w.ended))]));
  if (w.arrived == 0) {
    w.first = &t;
  } else if (w.first->what != what || w.first->at.line() != at.line() || w.first->at.column() != at.column()) {
    fault("divergent collective: " + name(*w.first, w.first->what, w.first->at) + ", but " + name(t, what, at));
  }
  t.args = args;
  t.what = what;
  t.at = at;
  w.arrived |= 1u << t.lane;
  if (w.arrived == kAllLanes) {
    all(w);
    w.arrived = 0;
    w.phase ^= 1;
    t.what = nullptr;
    for (Thread* lane : w.lanes)
      if (lane != &t) wake(lane);
  } else {
    wait_in(what, at);
  }
}

template <class Args>
Args& of(Warp& w, int lane) {
  return *static_cast<Args*>(w.lanes[static_cast<size_t>(lane)]->args);
}

struct MmaArgs {
  float* d;
  const U4* a;
  u32 b[2];
};

// As a tensor core gives a sum: cut off where it should be rounded (Fasi, Higham, Mikaitis and Pranesh 2021).
float cut_off(double v) {
  const auto f = static_cast<float>(v);
  return std::isfinite(f) && std::fabs(static_cast<double>(f)) > std::fabs(v) ? std::nextafter(f, 0.0f) : f;
}

// D += A B with A [16][K], B [K][8] gathered from the lanes' registers.
template <int K>
void multiply(Warp& w, const float (&A)[16][K], const float (&B)[K][8]) {
  for (int i = 0; i < 16; ++i) {
    double sum[8] = {};
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) sum[j] += static_cast<double>(A[i][k]) * static_cast<double>(B[k][j]);
    for (int j = 0; j < 8; ++j) {
      float& d = of<MmaArgs>(w, i % 8 * 4 + j / 2).d[j % 2 + i / 8 * 2];
      d = cut_off(static_cast<double>(d) + sum[j]);
    }
  }
}

// ---- what happens later ---------------------------------------------------------------------------------------------
void maybe_complete(MessageBarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.pending = b.count;
  for (Thread* t : b.waiting) wake(t);
  b.waiting.clear();
}

bool empty(const u8* p) {
  U4 v;
  std::memcpy(&v, p, 16);
  return v.w[0] == kEmpty || v.w[1] == kEmpty || v.w[2] == kEmpty || v.w[3] == kEmpty;
}

bool poll_ready(const Thread& t) {
  for (u32 rest = t.poll_wanted; rest; rest &= rest - 1)
    if (empty(t.poll_base + static_cast<int64_t>(std::countr_zero(rest)) * t.poll_stride)) return false;
  return true;
}

void written(const u8* p) {
  const auto it = now->polls.find(reinterpret_cast<uintptr_t>(p) / 16);
  if (it == now->polls.end()) return;
  std::vector<Thread*> waiting;
  waiting.swap(it->second);
  now->polls.erase(it);
  for (Thread* t : waiting) wake(t);
}

// tag: what a reader that has waited for this write acquires.
void write_now(Thread* from, u8* to, const U4& value, int words, u8* tag) {
  const size_t bytes = static_cast<size_t>(words) * 4;
  from->fiber.in_the_name_of([&] {
    seen_write(to, bytes);
    order_release(tag);
  });
  std::memcpy(to, &value, bytes);
}

void send_later(Delivery d) {
  d.sent = now->sent++;
  ++now->under_way[d.to];
  now->deliveries.push_back(d);
}

void deliver_one() {
  Launch& l = *now;
  size_t i = l.random.below(l.deliveries.size());
  // One thread's writes to one place keep their order.
  if (l.under_way[l.deliveries[i].to] > 1)
    for (size_t j = 0; j < l.deliveries.size(); ++j) {
      const Delivery &a = l.deliveries[j], &b = l.deliveries[i];
      if (a.from == b.from && a.to == b.to && a.sent < b.sent) i = j;
    }
  const Delivery d = l.deliveries[i];
  l.deliveries[i] = l.deliveries.back();
  l.deliveries.pop_back();
  if (--l.under_way[d.to] == 0) l.under_way.erase(d.to);
  if (d.bar) {
    const Block& target = *d.bar->home;
    if (target.ended == l.block_threads)
      return fail("st_async in flight after block " + std::to_string(target.index) + " has ended: sent by " +
                  name(*d.from, "st_async", d.at));
    write_now(d.from, d.to, d.value, d.words, &d.bar->tag[d.bar->phase]);
    d.bar->bytes -= 16;
    maybe_complete(*d.bar);
  } else {
    write_now(d.from, d.to, d.value, d.words, d.to);
    written(d.to);
  }
}

// ---- the scheduler --------------------------------------------------------------------------------------------------
void entry() {
  Thread& t = self();
  t.fiber.arrived();
  order_acquire(&now->start_tag);
  {
    Unseen unseen;
    ++t.home->begun;
  }
  now->call(now->kernel);
  Unseen unseen;
  order_release(&now->end_tag);
  t.groups.push_back(std::move(t.copies));
  for (const std::vector<Copy>& group : t.groups)
    if (!group.empty()) fail(name(t) + " has ended with a cp.async under way");
  t.ended = true;
  ++t.home->ended;
  t.warp->ended |= 1u << t.lane;
  --now->alive;
  if (t.warp->arrived)
    fail(name(t) +
         " has ended, but its warp waits for it: " + name(*t.warp->first, t.warp->first->what, t.warp->first->at));
  for (const Barrier& b : t.home->barriers)
    if (!b.waiting.empty() && b.expected == now->block_threads)
      fail(name(t) + " has ended, but its block waits for it: " + name(*b.first, b.first->what, b.first->at));
  t.fiber.switch_to(now->scheduler, true);
  std::abort();
}

Warp* next_warp() {
  Launch& l = *now;
  if (l.ready.empty()) return nullptr;
  switch (l.options.policy) {
    case Policy::round_robin:
      for (;;) {
        Warp* w = &l.warps[l.turn++ % l.warps.size()];
        if (w->ready) return w;
      }
    case Policy::random:
      return l.ready[l.random.below(l.ready.size())];
    case Policy::skewed:
      if (l.random.below(256) == 0) l.warps[l.random.below(l.warps.size())].priority = l.random.unit();
      return *std::max_element(l.ready.begin(), l.ready.end(),
                               [](const Warp* a, const Warp* b) { return a->priority < b->priority; });
  }
  return nullptr;
}

void take_turn(Warp& w) {
  Launch& l = *now;
  const uint64_t r = l.random();
  const int first = static_cast<int>(r >> 8 & 31);
  const bool backwards = r & 1;
  for (int i = 0; i < 32 && l.failure.empty(); ++i) {
    const int lane = (first + (backwards ? 32 - i : i)) & 31;
    if (!(w.ready >> lane & 1)) continue;
    w.ready &= ~(1u << lane);
    Thread* t = w.lanes[static_cast<size_t>(lane)];
    me = t;
    l.scheduler.switch_to(t->fiber);
    me = nullptr;
  }
  if (w.ready == 0) {
    l.ready[w.place] = l.ready.back();
    l.ready[w.place]->place = w.place;
    l.ready.pop_back();
    w.place = ~size_t{0};
  }
}

// Nothing can run and nothing is under way. A kernel may have written what is polled for with plain stores: look again.
bool wake_polls() {
  bool any = false;
  for (auto& [granule, waiting] : now->polls) {
    (void)granule;
    for (Thread* t : waiting)
      if (poll_ready(*t)) {
        wake(t);
        any = true;
      }
    if (any) std::erase_if(waiting, [](Thread* t) { return t->warp->ready >> t->lane & 1; });
  }
  return any;
}

std::string deadlock() {
  std::string text = "deadlock:";
  std::set<std::string> said;
  int left = 0;
  for (int i = 0; i < static_cast<int>(now->blocks.size()) * now->block_threads; ++i) {
    const Thread& t = now->threads[static_cast<size_t>(i)];
    if (t.ended) continue;
    const std::string where = std::string(t.what ? t.what : "?") + " " + place(t.at);
    if (said.size() < 6 && said.insert(where).second)
      text += " " + name(t, t.what ? t.what : "?", t.at) + ";";
    else
      ++left;
  }
  return text + " and " + std::to_string(left) + " more threads";
}

void run() {
  Launch& l = *now;
  // How often something under way arrives while others could still run: 0 is never, as late as is legal. Under the
  // skewed policy both ends are tried, by the seed: either all else comes first, or what is under way arrives at once,
  // before a slow warp gets its next turn.
  size_t one_in = 8;
  if (l.options.policy == Policy::random) one_in = 4;
  if (l.options.policy == Policy::skewed) one_in = l.options.seed % 2;
  while (l.alive && l.failure.empty()) {
    if (!l.deliveries.empty() && one_in && l.random.below(one_in) == 0) {
      deliver_one();
      continue;
    }
    if (Warp* w = next_warp()) {
      take_turn(*w);
    } else if (!l.deliveries.empty()) {
      deliver_one();
    } else if (!wake_polls()) {
      fail(deadlock());
    }
  }
  while (l.failure.empty() && !l.deliveries.empty()) deliver_one();
}

void check_red_zones() {
  Launch& l = *now;
  if (kAddressSanitizer || !l.failure.empty()) return;
  for (const Block& b : l.blocks) {
    size_t at = 0;
    const auto untouched = [&](size_t end, const std::string& behind) {
      for (; at < end; ++at)
        if (b.arena[at] != kCanary)
          return fail("shared memory written outside its arrays: block " + std::to_string(b.index) + ", " +
                      std::to_string(at) + " bytes into the arena, behind " + behind);
    };
    std::string behind = "the beginning";
    for (size_t k = 0; k < l.layout.size(); ++k) {
      untouched(l.layout[k].offset, behind);
      at = l.layout[k].offset + l.layout[k].bytes;
      behind = "array " + std::to_string(k);
    }
    untouched(l.arena_stride, behind);
  }
}

MessageBarrier& message_barrier(const void* p, const char* what, Where at) {
  const auto it = now->message_barriers.find(p);
  if (it == now->message_barriers.end())
    fault(std::string(what) + " on a barrier that was never initialised: " + name(self(), what, at));
  return it->second;
}

Block* block_of(const void* p) {
  Launch& l = *now;
  const auto* at = static_cast<const u8*>(p);
  if (at < l.arena || at >= l.arena + l.arena_stride * l.blocks.size()) return nullptr;
  return &l.blocks[static_cast<size_t>(at - l.arena) / l.arena_stride];
}

void need(bool condition, const char* text, const char* what, Where at) {
  if (!condition) fault(std::string(text) + ": " + name(self(), what, at));
}

bool aligned(const void* p, size_t n) { return reinterpret_cast<uintptr_t>(p) % n == 0; }

void complete(std::vector<Copy>& group) {
  for (const Copy& c : group) {
    seen_read(c.from, 16);
    seen_write(c.to, 16);
    std::memcpy(c.to, c.from, 16);
  }
  group.clear();
}

}  // namespace

void launch(int grid, int cluster, int threads, int shared_bytes, void (*call)(const void*), const void* kernel,
            const Options& options) {
  if (grid < 1 || cluster < 1 || grid % cluster || threads < 1 || threads > 1024 || shared_bytes < 0)
    throw Failure("launch of " + std::to_string(grid) + " blocks in clusters of " + std::to_string(cluster) + ", " +
                  std::to_string(threads) + " threads, " + std::to_string(shared_bytes) + " bytes");
  if (shared_bytes > 227 * 1024)
    throw Failure("more shared memory than a block can have: " + std::to_string(shared_bytes));
  Unseen unseen;
  Launch l;
  l.options = options;
  l.random.state = options.seed * 0x2545F4914F6CDD1Du + 1;
  l.call = call;
  l.kernel = kernel;
  l.cluster = cluster;
  l.block_threads = threads;
  l.shared_bytes = static_cast<size_t>(shared_bytes);
  if (!options.broken.empty()) {
    const size_t colon = options.broken.rfind(':');
    l.broken_line = static_cast<u32>(std::atoi(options.broken.c_str() + options.broken.rfind(':', colon - 1) + 1));
  }
  const auto blocks = static_cast<size_t>(grid);
  const auto per_block = static_cast<size_t>(threads);
  const size_t warps_per_block = (per_block + 31) / 32;
  l.arena_stride = (l.shared_bytes + 255) / 128 * 128 + kRedZone * (kMaxArrays + 1);
  l.blocks.resize(blocks);
  l.arena = static_cast<u8*>(std::aligned_alloc(128, l.arena_stride * blocks));
  if (!l.arena) throw std::bad_alloc();
  std::memset(l.arena, kCanary, l.arena_stride * blocks);
  POISON(l.arena, l.arena_stride * blocks);
  l.warps.resize(blocks * warps_per_block);
  l.clusters.resize(blocks / static_cast<size_t>(cluster));
  l.threads = std::make_unique<Thread[]>(blocks * per_block);
  stacks.reserve(blocks * per_block);
  now = &l;
  l.scheduler.adopt_caller();
  order_release(&l.start_tag);
  for (size_t b = 0; b < blocks; ++b) {
    l.blocks[b].index = static_cast<int>(b);
    l.blocks[b].arena = l.arena + b * l.arena_stride;
    for (size_t i = 0; i < per_block; ++i) {
      Thread& t = l.threads[b * per_block + i];
      Warp& w = l.warps[b * warps_per_block + i / 32];
      t.tid = static_cast<int>(i);
      t.threads = threads;
      t.block = static_cast<int>(b);
      t.blocks = grid;
      t.cluster_rank = static_cast<int>(b) % cluster;
      t.home = &l.blocks[b];
      t.warp = &w;
      t.lane = static_cast<int>(i % 32);
      w.lanes[i % 32] = &t;
      ++w.size;
      t.fiber.create(stacks.stack(b * per_block + i), entry);
      wake(&t);
    }
  }
  l.alive = static_cast<int>(blocks * per_block);
  for (Warp& w : l.warps) w.priority = l.random.unit();
  const int races = races_reported();
  run();
  order_acquire(&l.end_tag);
  if (races_reported() > races) fail("data race, see the report of ThreadSanitizer");
  check_red_zones();
  for (size_t i = 0; i < l.warps.size() && l.failure.empty(); ++i)
    if (const Thread& t = *l.warps[i].lanes[0]; t.tid / 128 < 8)
      if (l.warps[i].issued != t.home->products[static_cast<size_t>(t.tid / 128)].size() ||
          !l.warps[i].products.empty())
        fail("a warpgroup's product that not all its warps have made and waited for: " + name(t));
  now = nullptr;
  if (!l.failure.empty()) throw Failure(l.failure);
}

void* take(int index, size_t bytes, Where at) {
  Unseen unseen;
  Launch& l = *now;
  const auto k = static_cast<size_t>(index);
  if (k == l.layout.size()) {
    need(k < kMaxArrays, "too many arrays in shared memory", "take", at);
    l.layout.push_back({l.arena_used, bytes});
    const size_t rounded = (bytes + 127) / 128 * 128;
    l.shared_taken += rounded;
    if (l.shared_taken > l.shared_bytes)
      fault("shared memory: " + std::to_string(l.shared_taken) + " bytes taken of " + std::to_string(l.shared_bytes) +
            ": " + name(self(), "take", at));
    for (const Block& b : l.blocks) {
      UNPOISON(b.arena + l.arena_used, bytes);
      std::memset(b.arena + l.arena_used, 0xFF, bytes);
    }
    l.arena_used += rounded + kRedZone;
  }
  need(k < l.layout.size() && l.layout[k].bytes == bytes, "shared memory taken in another order or size than by others",
       "take", at);
  return self().home->arena + l.layout[k].offset;
}

void* peer(const void* shared, int rank, Where at) {
  Unseen unseen;
  Thread& t = self();
  need(block_of(shared) == t.home, "peer of something outside the block's own shared memory", "peer", at);
  need(rank >= 0 && rank < now->cluster, "peer with a rank outside the cluster", "peer", at);
  const Block& target = now->blocks[static_cast<size_t>(t.block - t.cluster_rank + rank)];
  return target.arena + (static_cast<const u8*>(shared) - t.home->arena);
}

float half_to_float(u16 v) {
  const u32 sign = static_cast<u32>(v & 0x8000) << 16;
  const u32 exponent = v >> 10 & 31;
  const u32 fraction = v & 1023u;
  if (exponent == 31) return as_float(sign | 0x7F800000u | fraction << 13);
  if (exponent == 0) return std::copysign(static_cast<float>(fraction) * 0x1p-24f, as_float(sign | 0x3F800000u));
  return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

u16 float_to_half(float v) {
  if (v != v) return 0x7FFF;
  const u32 w = as_word(v);
  const auto sign = static_cast<u16>(w >> 16 & 0x8000);
  const float size = std::fabs(v);
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return static_cast<u16>(sign | static_cast<u16>(std::nearbyint(size * 0x1p24f)));
  const u32 magnitude = w & 0x7FFFFFFF;
  return static_cast<u16>(sign | ((magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

namespace {
const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (u32 i = 0; i < 65536; ++i) t[i] = half_to_float(static_cast<u16>(i));
    return t;
  }();
  return table.data();
}

// Registers 1 and 2 of A the other way round: what a wrong idea of the layout would give.
U4 swapped(const U4& a) { return U4{{a.w[0], a.w[2], a.w[1], a.w[3]}}; }
}  // namespace

void mma_16bit(float (&d)[4], const U4& a, u32 b0, u32 b1, bool bfloat, Where at) {
  Unseen unseen;
  need(!self().apart, "lanes that a wait has let go one by one, without a sync_warp", "mma", at);
  const U4 mine = broken("mma", at) ? swapped(a) : a;
  MmaArgs args{d, &mine, {b0, b1}};
  collective("mma", at, &args, [&](Warp& w) {
    const float* half = half_table();
    const auto number = [&](u32 v) { return bfloat ? as_float(v << 16) : half[v & 0xFFFF]; };
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaArgs& from = of<MmaArgs>(w, lane);
      const int g = lane / 4, q = lane % 4;
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e) A[g + 8 * (r % 2)][8 * (r / 2) + 2 * q + e] = number(from.a->w[r] >> 16 * e);
      for (int r = 0; r < 2; ++r)
        for (int e = 0; e < 2; ++e) B[8 * r + 2 * q + e][g] = number(from.b[r] >> 16 * e);
    }
    multiply<16>(w, A, B);
  });
}

void mma_tf32(float (&d)[4], const U4& a, u32 b0, u32 b1, Where at) {
  Unseen unseen;
  need(!self().apart, "lanes that a wait has let go one by one, without a sync_warp", "mma", at);
  const U4 mine = broken("mma", at) ? swapped(a) : a;
  MmaArgs args{d, &mine, {b0, b1}};
  collective("mma", at, &args, [&](Warp& w) {
    const auto number = [](u32 v) { return as_float(v & ~0x1FFFu); };  // the unit ignores the low 13 bits
    float A[16][8], B[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaArgs& from = of<MmaArgs>(w, lane);
      const int g = lane / 4, q = lane % 4;
      for (int r = 0; r < 4; ++r) A[g + 8 * (r % 2)][4 * (r / 2) + q] = number(from.a->w[r]);
      for (int r = 0; r < 2; ++r) B[4 * r + q][g] = number(from.b[r]);
    }
    multiply<8>(w, A, B);
  });
}

void st_async(void* to, const U4& v, u64* bar, Where at) {
  Unseen unseen;
  Thread& t = self();
  need(aligned(to, 16), "st_async to an address that is not a multiple of 16", "st_async", at);
  Block* target = block_of(to);
  need(target && target == block_of(bar), "st_async: data and barrier are not in the same block", "st_async", at);
  need(target->begun == now->block_threads, "st_async to a block that may not have begun", "st_async", at);
  const Launch& l = *now;
  const size_t offset = static_cast<size_t>(static_cast<u8*>(to) - target->arena);
  need(std::any_of(l.layout.begin(), l.layout.end(),
                   [&](const Launch::Array& a) { return offset >= a.offset && offset + 16 <= a.offset + a.bytes; }),
       "st_async outside the arrays of shared memory", "st_async", at);
  send_later({&t, static_cast<u8*>(to), v, 4, &message_barrier(bar, "st_async", at), at});
}

namespace {

// The two lines of B that a product reads, as the PTX manual has it for an operand whose depth is contiguous and that
// is not swizzled: bits 0-13 first address / 16, 16-29 bytes / 16 from one core matrix (8 columns by 16 bytes) to the
// next along the depth, 32-45 along the columns, 49-51 base offset, 62-63 swizzling.
std::vector<U4> read_operand(const Thread& t, const AsyncProduct& p) {
  const Launch& l = *now;
  const auto field = [&](int bit) { return static_cast<size_t>(p.b >> bit & 0x3FFF) * 16; };
  need((p.b & ~0x3FFF3FFF3FFFull) == 0, "an operand with bits set that are none of its three fields", "wgmma", p.at);
  std::vector<U4> B;
  for (int line = 0; line < 2; ++line)
    for (int column = 0; column < 8 * p.tiles; ++column) {
      const size_t at = field(0) + static_cast<size_t>(line) * field(16) + static_cast<size_t>(column / 8) * field(32) +
                        static_cast<size_t>(column % 8) * 16;
      if (!std::any_of(l.layout.begin(), l.layout.end(),
                       [&](const Launch::Array& a) { return at >= a.offset && at + 16 <= a.offset + a.bytes; }))
        fault("an operand outside the arrays of shared memory: " + name(t, "wgmma", p.at));
      const u8* from = t.home->arena + at;
      seen_read(from, 16);
      U4 v;
      std::memcpy(&v, from, 16);
      B.push_back(v);
    }
  return B;
}

void multiply_operand(const Thread& t, AsyncProduct& p) {
  const std::vector<U4> B = p.early.empty() ? read_operand(t, p) : p.early;
  const float* half = half_table();
  const int each = p.kind == Kind::tf32 ? 1 : 2;  // numbers in a word
  const auto number = [&](u32 v, int e) {
    v >>= 16 * e;
    return p.kind == Kind::tf32 ? as_float(v & ~0x1FFFu) : p.kind == Kind::bf16 ? as_float(v << 16) : half[v & 0xFFFF];
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4 * p.tiles; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int line = 0; line < 2; ++line)
        for (int word = 0; word < 4; ++word)
          for (int e = 0; e < each; ++e)
            sum += number(p.a[static_cast<size_t>(row % 8 * 4 + word)].w[2 * line + row / 8], e) *
                   number(B[static_cast<size_t>(line * 8 * p.tiles + column)].w[word], e);
      p.sums[static_cast<size_t>(lane * 4 * p.tiles + i)] += sum;
    }
}

}  // namespace

// Sums are NaN from here to the wait; B is read here or only there.
void wgmma(float* d, int tiles, const U4& a, u64 b, Kind kind, Where at) {
  Unseen unseen;
  need(!self().apart, "lanes that a wait has let go one by one, without a sync_warp", "wgmma", at);
  struct Args {
    float* d;
    U4 a;
    u64 b;
    bool fenced;
  } args{d, broken("wgmma", at) ? swapped(a) : a, b, self().fenced};
  collective("wgmma", at, &args, [&](Warp& w) {
    const Thread& t = self();
    need(t.threads % 128 == 0, "a block that is not a number of whole warpgroups", "wgmma", at);
    auto& issued = t.home->products[static_cast<size_t>(t.tid / 128)];
    const std::pair<u64, u32> what{b, at.line()};
    if (w.issued == issued.size()) issued.push_back(what);
    need(issued[w.issued++] == what, "the warps of a warpgroup multiply different things", "wgmma", at);
    AsyncProduct p{
        .tiles = tiles, .kind = kind, .b = b, .first = true, .a = {}, .d = {}, .sums = {}, .early = {}, .at = at};
    const auto n = static_cast<size_t>(4 * tiles);
    for (const AsyncProduct& before : w.products) p.first &= before.d[0] != of<Args>(w, 0).d;
    for (int lane = 0; lane < 32; ++lane) {
      const Args& mine = of<Args>(w, lane);
      need(mine.b == b, "lanes with different operands", "wgmma", at);
      p.a[static_cast<size_t>(lane)] = mine.a;
      p.d[static_cast<size_t>(lane)] = mine.d;
      p.sound &= mine.fenced;
      p.sums.insert(p.sums.end(), mine.d, mine.d + n);
      std::fill(mine.d, mine.d + n, NAN);
    }
    if (now->random.below(2)) p.early = read_operand(t, p);
    w.products.push_back(std::move(p));
  });
}

void wgmma_wait(Where at) {
  Unseen unseen;
  const bool skip = broken("wgmma_wait", at);
  collective("wgmma_wait", at, nullptr, [&](Warp& w) {
    for (size_t i = 0; i < w.products.size() && w.products[i].committed && !skip; ++i) {
      AsyncProduct& p = w.products[i];
      for (size_t k = i; !p.first && k-- > 0;)
        if (w.products[k].d[0] == p.d[0]) {
          p.sums = w.products[k].sums;
          p.sound &= w.products[k].sound;
          break;
        }
      multiply_operand(self(), p);
      const size_t n = p.sums.size() / 32;
      for (size_t k = 0; p.sound && k < p.sums.size(); ++k) p.d[k / n][k % n] = p.sums[k];
    }
    std::erase_if(w.products, [&](const AsyncProduct& p) { return p.committed && !skip; });
    for (Thread* t : w.lanes) t->fenced = false;
  });
}

void cp_async_wait(int open, Where at) {
  Unseen unseen;
  if (broken("cp_async_wait", at)) ++open;
  Thread& t = self();
  while (static_cast<int>(t.groups.size()) > open) {
    complete(t.groups.front());
    t.groups.pop_front();
  }
}

void poll16(U4* v, int n, const void* base, int stride, u32 wanted, Where at) {
  Unseen unseen;
  Thread& t = self();
  need(aligned(base, 16) && stride % 16 == 0, "poll16 of an address that is not a multiple of 16", "poll16", at);
  if (n < 32) wanted &= (1u << n) - 1;
  t.apart = true;
  t.poll_base = static_cast<const u8*>(base);
  t.poll_stride = stride;
  t.poll_wanted = wanted;
  if (!broken("poll16", at)) {
    for (u32 rest = wanted; rest;) {
      const u8* p = t.poll_base + static_cast<int64_t>(std::countr_zero(rest)) * stride;
      if (empty(p)) {
        now->polls[reinterpret_cast<uintptr_t>(p) / 16].push_back(&t);
        wait_in("poll16", at);
      } else {
        rest &= rest - 1;
      }
    }
  }
  for (u32 rest = wanted; rest; rest &= rest - 1) {
    const int i = std::countr_zero(rest);
    const u8* p = t.poll_base + static_cast<int64_t>(i) * stride;
    for (int word = 0; word < 4; ++word) order_acquire(const_cast<u8*>(p + 4 * word));
    seen_read(p, 16);
    std::memcpy(&v[i], p, 16);
  }
}

}  // namespace sim

using namespace sim;

void mma_half_depth(float (&d)[4], u32 a0, u32 a1, u32 b, Where at) {
  Unseen unseen;
  need(!self().apart, "lanes that a wait has let go one by one, without a sync_warp", "mma_half_depth", at);
  const U4 mine{{a0, a1, 0, 0}};
  MmaArgs args{d, &mine, {b, 0}};
  collective("mma_half_depth", at, &args, [](Warp& w) {
    float A[16][8], B[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaArgs& from = of<MmaArgs>(w, lane);
      const int g = lane / 4, q = lane % 4;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 2; ++r) A[g + 8 * r][2 * q + e] = half_to_float(static_cast<u16>(from.a->w[r] >> 16 * e));
        B[2 * q + e][g] = half_to_float(static_cast<u16>(from.b[0] >> 16 * e));
      }
    }
    multiply<8>(w, A, B);
  });
}

void sync_block(Where at) {
  Unseen unseen;
  if (broken("sync_block", at)) return;
  Thread& t = self();
  if (t.home->ended) fault("sync_block where threads of the block have already exited: " + name(t, "sync_block", at));
  arrive(t.home->barriers[0], t.threads, "sync_block", at);
}

void sync_named(int id, int n, Where at) {
  Unseen unseen;
  if (broken("sync_named", at)) return;
  need(id >= 1 && id <= 15, "barrier id outside 1..15", "sync_named", at);
  need(n % 32 == 0 && n <= self().threads, "not a number of whole warps of the block", "sync_named", at);
  arrive(self().home->barriers[static_cast<size_t>(id)], n, "sync_named", at);
}

void sync_cluster(Where at) {
  Unseen unseen;
  if (broken("sync_cluster", at)) return;
  Thread& t = self();
  arrive(now->clusters[static_cast<size_t>(t.block / now->cluster)], now->cluster * t.threads, "sync_cluster", at);
  t.apart = false;  // it has a sync_warp in it
}

void sync_warp(Where at) {
  Unseen unseen;
  if (broken("sync_warp", at)) return;
  Warp& w = *self().warp;
  u8* tag = &w.tag[static_cast<size_t>(w.phase)];
  order_release(tag);
  collective("sync_warp", at, nullptr, [](Warp&) {});
  order_acquire(tag);
  self().apart = false;
}

float shfl_xor(float v, int mask, Where at) {
  Unseen unseen;
  struct Args {
    float in, out;
    int mask;
  } args{v, v, mask};
  const bool skip = broken("shfl_xor", at);
  collective("shfl_xor", at, &args, [](Warp& w) {
    for (int lane = 0; lane < 32; ++lane) {
      Args& a = of<Args>(w, lane);
      const int from = lane ^ a.mask;
      a.out = from >= 0 && from < 32 ? of<Args>(w, from).in : a.in;
    }
  });
  return skip ? v : args.out;
}

u64 operand(const void* shared, int along_depth, int along_columns, Where at) {
  Unseen unseen;
  const Block* home = self().home;
  need(block_of(shared) == home && aligned(shared, 16), "not a multiple of 16 in the block's own shared memory",
       "operand", at);
  const auto start = static_cast<u64>(static_cast<const u8*>(shared) - home->arena);
  return start >> 4 | static_cast<u64>(along_depth >> 4) << 16 | static_cast<u64>(along_columns >> 4) << 32;
}

// What products read is there after the writer's fence_async, not before.
void operand16(U4* shared, const U4& v, Where at) {
  Unseen unseen;
  need(block_of(shared) == self().home && aligned(shared, 16), "not a multiple of 16 in the block's own shared memory",
       "operand16", at);
  seen_write(shared, 16);
  std::memset(shared, 0xFF, 16);
  self().operands.emplace_back(shared, v);
}

void fence_async(Where at) {
  Unseen unseen;
  if (broken("fence_async", at)) return;
  for (const auto& [to, v] : self().operands) {
    seen_write(to, 16);
    std::memcpy(to, &v, 16);
  }
  self().operands.clear();
}

void wgmma_fence(Where at) {
  Unseen unseen;
  need(!self().apart, "lanes that a wait has let go one by one, without a sync_warp", "wgmma_fence", at);
  const bool skip = broken("wgmma_fence", at);
  collective("wgmma_fence", at, nullptr, [](Warp&) {});
  if (!skip) self().fenced = true;
}

void wgmma_commit(Where at) {
  Unseen unseen;
  const bool skip = broken("wgmma_commit", at);
  collective("wgmma_commit", at, nullptr, [&](Warp& w) {
    for (AsyncProduct& p : w.products) p.committed |= !skip;
  });
}

U4 ldg16(const void* p, Where at) {
  Unseen unseen;
  need(aligned(p, 16), "ldg16 of an address that is not a multiple of 16", "ldg16", at);
  seen_read(p, 16);
  U4 v;
  std::memcpy(&v, p, 16);
  return v;
}

void cp_async16(void* shared, const void* global, Where at) {
  Unseen unseen;
  need(aligned(shared, 16) && aligned(global, 16), "an address that is not a multiple of 16", "cp_async16", at);
  need(block_of(shared) == self().home, "not to the block's own shared memory", "cp_async16", at);
  need(!block_of(global), "not from global memory", "cp_async16", at);
  seen_write(shared, 16);
  std::memset(shared, 0xFF, 16);  // until the wait that covers it
  self().copies.push_back({shared, global});
}

void cp_async_commit() {
  Unseen unseen;
  Thread& t = self();
  t.groups.push_back(std::move(t.copies));
  t.copies.clear();
}

void mbar_init(u64* bar, int arrivals, Where at) {
  Unseen unseen;
  need(aligned(bar, 8) && block_of(bar) == self().home, "not in the block's own shared memory", "mbar_init", at);
  need(arrivals >= 1, "no arrivals", "mbar_init", at);
  need(!now->message_barriers.contains(bar), "initialised twice", "mbar_init", at);
  seen_write(bar, 8);
  std::memset(bar, 0, 8);
  MessageBarrier& b = now->message_barriers[bar];
  b.count = b.pending = arrivals;
  b.home = self().home;
}

void mbar_arrive_expect(u64* bar, int bytes, Where at) {
  Unseen unseen;
  if (broken("mbar_arrive_expect", at)) bytes -= 16;
  need(block_of(bar) == self().home, "not in the block's own shared memory", "mbar_arrive_expect", at);
  MessageBarrier& b = message_barrier(bar, "mbar_arrive_expect", at);
  need(b.pending > 0, "more arrivals than the barrier counts in a phase", "mbar_arrive_expect", at);
  order_release(&b.tag[b.phase]);
  --b.pending;
  b.bytes += bytes;
  maybe_complete(b);
}

void mbar_wait(u64* bar, u32 parity, bool& late, Where at) {
  Unseen unseen;
  need(parity < 2, "a parity that is neither 0 nor 1", "mbar_wait", at);
  self().apart = true;
  if (late || broken("mbar_wait", at)) return;
  need(block_of(bar) == self().home, "not in the block's own shared memory", "mbar_wait", at);
  MessageBarrier& b = message_barrier(bar, "mbar_wait", at);
  while (b.phase == parity) {
    b.waiting.push_back(&self());
    wait_in("mbar_wait", at);
  }
  order_acquire(&b.tag[parity]);
}

void publish16(void* global, const U4& v, Where at) {
  Unseen unseen;
  need(aligned(global, 16), "an address that is not a multiple of 16", "publish16", at);
  need(!block_of(global), "not to global memory", "publish16", at);
  Launch& l = *now;
  auto* to = static_cast<u8*>(global);
  // Sixteen bytes are not one write: the words become visible one by one, now or later.
  for (int word = 0; word < 4; ++word) {
    const Delivery d{&self(), to + 4 * word, U4{{v.w[word], 0, 0, 0}}, 1, nullptr, at};
    if (l.under_way.contains(d.to) || l.random.below(2)) {
      send_later(d);
    } else {
      write_now(d.from, d.to, d.value, 1, d.to);
      written(d.to);
    }
  }
}

U4 ld_relaxed16(const void* global, Where at) {
  Unseen unseen;
  // Not shown to ThreadSanitizer: a relaxed read may meet a write. What is used later is read again by settle16.
  need(aligned(global, 16), "an address that is not a multiple of 16", "ld_relaxed16", at);
  U4 v;
  std::memcpy(&v, global, 16);
  return v;
}

}  // namespace fusedrnn::dev
