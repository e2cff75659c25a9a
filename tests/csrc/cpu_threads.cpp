// SPDX-License-Identifier: Apache-2.0
// Members of a call: they meet, whoever runs them; more of them than threads; teams in the team; signals; calls in
// calls.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/threads/machine.h"
#include "cpu/threads/threads.h"

using namespace fusedrnn::cpu;

namespace {

int checks = 0, failures = 0;
bool inside_a_call = false;  // where there is one member only

void expect(bool holds, const char* what, int members) {
  ++checks;
  if (!holds && ++failures) std::printf("FAIL %s (%d members)\n", what, members);
}

template <class F>
void parallel_over(int members, F body) {
  parallel(members, [](void* it, const Team& team) { (*static_cast<F*>(it))(team); }, &body);
}

// At every meeting all have done all that came before it, and nobody what comes after the next one.
void check_meetings(int members, int meetings) {
  std::vector<std::atomic<int>> done(64);
  std::atomic<int> wrong{0}, ended{0}, size{0};
  parallel_over(members, [&](const Team& team) {
    size = team.size;
    for (int n = 1; n <= meetings; ++n) {
      done[static_cast<size_t>(team.rank)].store(n, std::memory_order_relaxed);
      team.wait();
      for (int other = 0; other < team.size; ++other) {
        const int seen = done[static_cast<size_t>(other)].load(std::memory_order_relaxed);
        if (seen != n && seen != n + 1) ++wrong;
      }
    }
    ++ended;
  });
  expect(wrong == 0, "meetings", members);
  expect(size == members || inside_a_call, "size", members);
  expect(ended == size, "all members end", members);
}

// What one member writes before a meeting, the others read after it: plain memory.
void check_memory(int members) {
  const int n = 1000;
  std::vector<int64_t> a(n, 1), b(n);
  parallel_over(members, [&](const Team& team) {
    for (int round = 0; round < 50; ++round) {
      for (int64_t i = team.begin(n); i < team.end(n); ++i)
        b[static_cast<size_t>(i)] = a[static_cast<size_t>((i + 1) % n)] + a[static_cast<size_t>(i)];
      team.wait();
      for (int64_t i = team.begin(n); i < team.end(n); ++i)
        a[static_cast<size_t>(i)] = b[static_cast<size_t>(i)] % 1009;
      team.wait();
    }
  });
  bool same = true;
  for (int64_t value : a) same = same && value == a[0];
  expect(same && a[0] == (int64_t{1} << 50) % 1009, "memory", members);
}

void check_teams(int members) {
  std::vector<Barrier> barriers(2);
  std::atomic<int> wrong{0};
  std::vector<std::atomic<int>> done(64);
  parallel_over(members, [&](const Team& team) {
    if (team.size < 2) return;
    const int middle = team.size / 2;
    const bool low = team.rank < middle;
    const Team part = low ? team.part(0, middle, &barriers[0]) : team.part(middle, team.size, &barriers[1]);
    for (int n = 1; n <= (low ? 200 : 50); ++n) {
      done[static_cast<size_t>(team.rank)] = n;
      part.wait();
      for (int other = low ? 0 : middle; other < (low ? middle : team.size); ++other)
        if (done[static_cast<size_t>(other)] != n && done[static_cast<size_t>(other)] != n + 1) ++wrong;
    }
    team.wait();
    for (int other = 0; other < team.size; ++other)
      if (done[static_cast<size_t>(other)] != (other < middle ? 200 : 50)) ++wrong;
  });
  expect(wrong == 0, "teams in a team", members);
}

struct Pressed {
  int64_t begin = nanoseconds();
  int asked = 0;
  bool inside = false;
};
bool pressed(void* context) {
  auto& state = *static_cast<Pressed*>(context);
  ++state.asked;
  if (!state.inside) {  // a handler may call us again
    state.inside = inside_a_call = true;
    check_meetings(3, 20);
    inside_a_call = false;
  }
  return nanoseconds() - state.begin > 150000000;
}

void check_signals(int members) {
  Pressed state;
  const Signals before = set_signals({pressed, &state});
  bool thrown = false;
  std::atomic<int64_t> rounds{0};
  try {
    parallel_over(members, [&](const Team& team) {
      for (int n = 0; n < 2000000000 && nanoseconds() - state.begin < 20000000000; ++n) {
        if (team.rank == 0) ++rounds;
        team.wait();
      }
    });
  } catch (const Interrupted&) {
    thrown = true;
  }
  set_signals(before);
  expect(thrown, "a signal ends the call", members);
  expect(state.asked > 0 && state.asked < 20 && rounds > 1, "signals are asked for now and then", members);
  expect(nanoseconds() - state.begin < 1000000000, "soon", members);
  check_meetings(members, 100);
}

// All members compute in the caller's way, so that bits do not depend on who runs them.
void check_float_mode(int members) {
#if defined(__x86_64__)
  const uint64_t before = float_mode(), flushing = before | 0x8040;
#else
  const uint64_t before = float_mode(), flushing = before;
#endif
  set_float_mode(flushing);
  std::atomic<int> other{0};
  parallel_over(members, [&](const Team& team) {
    for (int n = 0; n < 100; ++n) {
      if ((float_mode() & 0xffc0) != (flushing & 0xffc0)) ++other;
      team.wait();
    }
  });
  set_float_mode(before);
  expect(other == 0, "float mode", members);
}

void check_callers() {
  std::vector<std::thread> callers;
  for (int k = 0; k < 4; ++k)
    callers.emplace_back([] {
      std::atomic<int> sum{0};
      for (int n = 0; n < 50; ++n)
        parallel_over(3, [&](const Team& team) {
          team.wait();
          if (team.rank == team.size - 1) ++sum;
          team.wait();
        });
      if (sum != 50) std::printf("FAIL callers\n"), std::abort();
    });
  for (std::thread& caller : callers) caller.join();
  ++checks;
}

}  // namespace

int main() {
  ignore_crowd(true);
  for (int members : {1, 2, 3, 4, 7, 8, 9, 17}) {
    check_meetings(members, members > 4 ? 300 : 3000);
    check_memory(members);
    check_teams(members);
    check_float_mode(members);
  }
  for (int members : {1, 2, 5, 9}) check_signals(members);
  check_callers();
  std::printf("%s: %d checks, %d failures\n", failures ? "FAILED" : "passed", checks, failures);
  return failures ? 1 : 0;
}
