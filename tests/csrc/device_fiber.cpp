// SPDX-License-Identifier: Apache-2.0
#include "device_fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void __tsan_on_report(void*);
const char* __tsan_default_options();
}
#endif

#if defined(__x86_64__)
// void fusedrnn_switch(void** save, void* load): callee-saved registers go on the old stack and come off the new one.
asm(R"(
.text
.globl fusedrnn_switch
.hidden fusedrnn_switch
.type fusedrnn_switch, @function
fusedrnn_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusedrnn_switch, .-fusedrnn_switch
)");
extern "C" void fusedrnn_switch(void** save, void* load);
#endif

namespace fusedrnn::dev::sim {
namespace {
thread_local Fiber* previous = nullptr;  // who switched to the one now landing
int reports = 0;
}  // namespace

Stacks::~Stacks() {
  if (base_) munmap(base_, count_ * kStride);
}

void Stacks::reserve(size_t count) {
  if (count > count_) {
    if (base_) munmap(base_, count_ * kStride);
    void* p =
        mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<std::byte*>(p);
    count_ = count;
    for (size_t i = 0; i < count; ++i) mprotect(base_ + i * kStride, kGuard, PROT_NONE);
  }
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that has ended, or was left in the middle, never returned from its frames: they are still poisoned.
  for (size_t i = 0; i < count; ++i) ASAN_UNPOISON_MEMORY_REGION(stack(i), kBytes);
#endif
}

Fiber::~Fiber() {
#if defined(__SANITIZE_THREAD__)
  if (!owns_tsan_) return;
  if (begun_) in_the_name_of(Unseen::end);  // it was left inside a primitive, or has ended: one Unseen is open
  __tsan_destroy_fiber(tsan_);
#endif
}

void Fiber::create(std::byte* stack, void (*entry)()) {
  bottom_ = stack;
  size_ = Stacks::kBytes;
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(stack + size_) & ~uintptr_t{15};
  auto** frame = reinterpret_cast<void**>(top) - 8;  // six registers, the address to return to, no caller
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  sp_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = size_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
#if defined(__SANITIZE_THREAD__)
  tsan_ = __tsan_create_fiber(0);
  owns_tsan_ = true;
#endif
}

void Fiber::adopt_caller() {
#if defined(__SANITIZE_THREAD__)
  tsan_ = __tsan_get_current_fiber();
#endif
}

void Fiber::switch_to(Fiber& next, bool for_good) {
  previous = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, next.bottom_, next.size_);
#else
  (void)for_good;
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(next.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  fusedrnn_switch(&sp_, next.sp_);
#else
  swapcontext(&context_, &next.context_);
#endif
  landed();
}

void Fiber::arrived() {
  begun_ = true;
  landed();
}

void Fiber::landed() {
#if defined(__SANITIZE_ADDRESS__)
  // Where the other side's stack lies is learnt here: for the OS thread's there is no other way.
  __sanitizer_finish_switch_fiber(fake_stack_, &previous->bottom_, &previous->size_);
#endif
}

void* Fiber::tsan_switch(void* fiber) {
#if defined(__SANITIZE_THREAD__)
  void* before = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
  return before;
#else
  return fiber;
#endif
}

__attribute__((no_sanitize("thread"))) int races_reported() { return reports; }

#if defined(__SANITIZE_THREAD__)
void Unseen::begin() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
void Unseen::end() {
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}
void seen_read(const void* p, size_t bytes) {
  Unseen::end();
  __tsan_read_range(const_cast<void*>(p), bytes);
  Unseen::begin();
}
void seen_write(void* p, size_t bytes) {
  Unseen::end();
  __tsan_write_range(p, bytes);
  Unseen::begin();
}
void order_acquire(void* tag) { __tsan_acquire(tag); }
void order_release(void* tag) { __tsan_release(tag); }
#else
void Unseen::begin() {}
void Unseen::end() {}
void seen_read(const void*, size_t) {}
void seen_write(void*, size_t) {}
void order_acquire(void*) {}
void order_release(void*) {}
#endif

}  // namespace fusedrnn::dev::sim

#if defined(__SANITIZE_THREAD__)
// Not itself watched: a report inside a report would never end.
__attribute__((no_sanitize("thread"))) void __tsan_on_report(void*) { ++fusedrnn::dev::sim::reports; }
// The same race is to be noticed in every launch that has it. To see the lines: TSAN_OPTIONS=symbolize=1 (slow).
const char* __tsan_default_options() {
  return "suppress_equal_stacks=0:suppress_equal_addresses=0:exitcode=0:symbolize=0";
}
#endif
