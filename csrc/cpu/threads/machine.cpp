// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <omp.h>
#include <time.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

namespace fusedrnn::cpu {
namespace {

#if defined(__linux__)
// Cores that a cgroup's quota amounts to, from one file ("max 100000", version 2) or two (version 1); 0: no limit.
double quota_of(const std::string& folder, bool version_2) {
  double quota = 0, period = 0;
  if (version_2) {
    std::ifstream file(folder + "/cpu.max");
    file >> quota >> period;  // "max" is no number
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The smallest quota of the process's cgroup and of those around it.
double quota() {
  double smallest = 0;
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers(1, ',');
    controllers.append(line, first + 1, second - first - 1).push_back(',');
    const bool version_2 = controllers == ",,";
    if (!version_2 && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string root = version_2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      if (path == "/") path.clear();
      const double here = quota_of(root + path, version_2);
      if (here > 0) smallest = smallest > 0 ? std::min(smallest, here) : here;
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  return smallest;
}
#endif

}  // namespace

int processors() {
  const int cores = omp_get_num_procs();
#if defined(__linux__)
  static const double limit = quota();
  // Above a quota's whole cores, all threads stand still together until its next period.
  if (limit > 0) return std::clamp(static_cast<int>(limit), 1, cores);
#endif
  return cores;
}

int tasks_without_a_core() {
#if defined(__linux__)
  static const long cores = sysconf(_SC_NPROCESSORS_ONLN);
  if (omp_get_num_procs() < cores) return 0;  // others' cores may have the tasks
  std::FILE* file = std::fopen("/proc/loadavg", "re");
  if (!file) return 0;
  long running = 0;
  const int read = std::fscanf(file, "%*s %*s %*s %ld/", &running);
  std::fclose(file);
  return read == 1 && running > cores ? static_cast<int>(running - cores) : 0;
#else
  return 0;
#endif
}

int64_t times_put_aside() {
#if defined(__linux__)
  rusage usage;
  return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
#else
  return 0;
#endif
}

int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1000000000 + now.tv_nsec;
}

void sleep_on(const uint32_t* word, uint32_t seen, int64_t limit) {
#if defined(__linux__)
  const timespec time{static_cast<time_t>(limit / 1000000000), static_cast<long>(limit % 1000000000)};
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, &time, nullptr, 0);
#else
  const timespec time{0, std::min<int64_t>(limit, 100000)};
  if (__atomic_load_n(word, __ATOMIC_SEQ_CST) == seen) nanosleep(&time, nullptr);
#endif
}

void wake_all([[maybe_unused]] const uint32_t* word) {
#if defined(__linux__)
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
#endif
}

uint64_t float_mode() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

void set_float_mode([[maybe_unused]] uint64_t mode) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(static_cast<uint32_t>(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

}  // namespace fusedrnn::cpu
