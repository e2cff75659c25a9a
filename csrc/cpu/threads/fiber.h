// SPDX-License-Identifier: Apache-2.0
// Tasks that one thread runs in turn, each with a stack of its own, known to AddressSanitizer and ThreadSanitizer.
// A switch is a dozen instructions on x86-64 and aarch64; elsewhere it is ucontext's. A task may go on in another
// thread.
#pragma once

#include <cstddef>

#if defined(__x86_64__) || defined(__aarch64__)
#define FUSEDRNN_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace fusedrnn {

// The stacks of some fibers: one mapping, a guard page under every stack, kept for the next fibers.
class Stacks {
 public:
  Stacks() = default;
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  void reserve(size_t count);  // throws std::bad_alloc; also takes the poison of abandoned frames off
  std::byte* stack(size_t index) const { return base_ + index * kStride + kGuard; }

  static constexpr size_t kGuard = 65536;  // the largest page that a kernel may have
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  static constexpr size_t kBytes = 256 * 1024;
#else
  static constexpr size_t kBytes = 128 * 1024;
#endif

 private:
  static constexpr size_t kStride = kBytes + kGuard;
  std::byte* base_ = nullptr;
  size_t count_ = 0;
};

// A task, or (after adopt_caller) the thread that runs them.
class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // False where the processor keeps a second stack of return addresses (shadow stacks), which a switch would break.
  static bool can_switch();

  // `entry` never returns: its last act is switch_to(..., true). It begins with arrived().
  void create(std::byte* stack, void (*entry)());
  void adopt_caller();  // this object stands for the stack that is running now
  void switch_to(Fiber& next, bool for_good = false);
  void arrived();
  void* tsan() const { return tsan_; }  // ThreadSanitizer's name for it

 protected:
  bool orders_ = true;  // whether ThreadSanitizer takes a switch for an order between the two, as between calls

 private:
  void landed();
  void* sp_ = nullptr;
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* tsan_ = nullptr;
  bool owns_tsan_ = false;
#if !defined(FUSEDRNN_OWN_SWITCH)
  ucontext_t context_;
#endif
};

}  // namespace fusedrnn
