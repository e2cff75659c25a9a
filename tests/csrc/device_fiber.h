// SPDX-License-Identifier: Apache-2.0
// Cooperative tasks on one OS thread, each with a stack of its own, known to AddressSanitizer and ThreadSanitizer.
// On x86-64 a switch is a dozen instructions; elsewhere it is ucontext's.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fusedrnn::dev::sim {

// The stacks of one launch: one mapping, a guard page under every stack, kept for the next launch.
class Stacks {
 public:
  ~Stacks();
  void reserve(size_t count);  // also takes the poison of abandoned frames off
  std::byte* stack(size_t index) const { return base_ + index * kStride + kGuard; }
  static constexpr size_t kGuard = 4096;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  static constexpr size_t kBytes = 256 * 1024 - kGuard;
#else
  static constexpr size_t kBytes = 128 * 1024 - kGuard;
#endif

 private:
  static constexpr size_t kStride = kBytes + kGuard;
  std::byte* base_ = nullptr;
  size_t count_ = 0;
};

// A task, or (default-constructed) the OS thread that runs them.
class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void create(std::byte* stack, void (*entry)());  // entry must never return: its last act is switch_to(..., true)
  void adopt_caller();                             // this object stands for the stack that is running now
  void switch_to(Fiber& next, bool for_good = false);
  void arrived();  // the first thing an entry function does

  // ThreadSanitizer only: what `access` touches counts as done by this fiber, though it is not running.
  template <class F>
  void in_the_name_of(F&& access);

  static void* tsan_switch(void* fiber);  // gives the fiber that was running

 private:
  void landed();
  void* sp_ = nullptr;
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* tsan_ = nullptr;
  bool owns_tsan_ = false;
  bool begun_ = false;
#if !defined(__x86_64__)
  ucontext_t context_;
#endif
};

// While one lives, what the simulator itself reads and writes is no business of ThreadSanitizer.
class Unseen {
 public:
  Unseen() { begin(); }
  ~Unseen() { end(); }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
  static void begin();
  static void end();
};

// What the kernel itself touches through a primitive; called under Unseen.
void seen_read(const void* p, size_t bytes);
void seen_write(void* p, size_t bytes);
void order_acquire(void* tag);
void order_release(void* tag);
int races_reported();  // by ThreadSanitizer, since the program began

template <class F>
void Fiber::in_the_name_of(F&& access) {
  void* before = tsan_switch(tsan_);
  access();
  tsan_switch(before);
}

}  // namespace fusedrnn::dev::sim
