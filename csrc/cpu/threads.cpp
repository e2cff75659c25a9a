// SPDX-License-Identifier: Apache-2.0
#include "threads.h"

#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "cpu.h"

namespace fusedrnn::cpu {
namespace {

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

}  // namespace

void parallel(int threads, void (*body)(void* argument, const Team& team), void* argument) {
  if (threads <= 1 || omp_in_parallel()) {
    body(argument, Team{0, 1, nullptr});
    return;
  }
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  body(argument, Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
}

int processors() { return omp_get_num_procs(); }
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
