// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// void fusedrnn_switch(void** save, void* load): the registers that a function must keep go on the old stack and come
// off the new one.
#if defined(__x86_64__)
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
#elif defined(__aarch64__)
asm(R"(
.text
.globl fusedrnn_switch
.hidden fusedrnn_switch
.type fusedrnn_switch, %function
fusedrnn_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fusedrnn_switch, .-fusedrnn_switch
)");
#endif
#if defined(FUSEDRNN_OWN_SWITCH)
extern "C" void fusedrnn_switch(void** save, void* load);
#endif

namespace fusedrnn {
namespace {

thread_local Fiber* previous = nullptr;  // who switched to the one now landing

// Words of a new task's stack below its top, and the one that holds where it begins: what fusedrnn_switch takes off.
#if defined(__x86_64__)
constexpr int kFrame = 8, kEntry = 6;  // six registers, the address to return to, no caller
#elif defined(__aarch64__)
constexpr int kFrame = 20, kEntry = 11;
#endif

}  // namespace

Stacks::~Stacks() {
  if (base_) munmap(base_, count_ * kStride);
}

void Stacks::reserve(size_t count) {
  if (count > count_) {
    void* p =
        mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    if (base_) munmap(base_, count_ * kStride);
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
  if (owns_tsan_) __tsan_destroy_fiber(tsan_);
#endif
}

bool Fiber::can_switch() {
#if defined(__x86_64__)
  uint64_t shadow = 0;
  asm volatile("rdsspq %0" : "+r"(shadow));  // changes nothing where there is none
  return shadow == 0;
#elif defined(__aarch64__)
  uint64_t off;
  asm volatile("mov x16, #1\n\thint #40\n\tmov %0, x16" : "=r"(off) : : "x16");  // chkfeat: guarded control stack
  return off != 0;
#else
  return true;  // swapcontext knows what to do
#endif
}

void Fiber::create(std::byte* stack, void (*entry)()) {
  bottom_ = stack;
  size_ = Stacks::kBytes;
#if defined(FUSEDRNN_OWN_SWITCH)
  auto top = reinterpret_cast<uintptr_t>(stack + size_) & ~uintptr_t{15};
  auto** frame = reinterpret_cast<void**>(top) - kFrame;
  for (int i = 0; i < kFrame; ++i) frame[i] = nullptr;
  frame[kEntry] = reinterpret_cast<void*>(entry);
  sp_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = size_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
#if defined(__SANITIZE_THREAD__)
  if (owns_tsan_) __tsan_destroy_fiber(tsan_);
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
  __tsan_switch_to_fiber(next.tsan_, orders_ ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
#if defined(FUSEDRNN_OWN_SWITCH)
  fusedrnn_switch(&sp_, next.sp_);
#else
  swapcontext(&context_, &next.context_);
#endif
  landed();
}

void Fiber::arrived() { landed(); }

// Not inlined: this may be another thread than before the switch, and `previous` must be that thread's.
__attribute__((noinline)) void Fiber::landed() {
#if defined(__SANITIZE_ADDRESS__)
  // Where the other side's stack lies is learnt here: for the thread's own there is no other way.
  __sanitizer_finish_switch_fiber(fake_stack_, &previous->bottom_, &previous->size_);
#endif
}

}  // namespace fusedrnn
