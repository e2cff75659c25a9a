// SPDX-License-Identifier: Apache-2.0
// The simulator's fibers (csrc/cpu/threads/fiber.h), and what ThreadSanitizer is told about them.
#pragma once

#include "cpu/threads/fiber.h"

namespace fusedrnn::dev::sim {

using fusedrnn::Stacks;

// A task, or (default-constructed) the OS thread that runs them.
class Fiber : public fusedrnn::Fiber {
 public:
  Fiber() { orders_ = false; }  // what orders two tasks is the kernel's own affair
  ~Fiber();
  void arrived();  // the first thing an entry function does

  // ThreadSanitizer only: what `access` touches counts as done by this fiber, though it is not running.
  template <class F>
  void in_the_name_of(F&& access);

  static void* tsan_switch(void* fiber);  // gives the fiber that was running

 private:
  bool begun_ = false;
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
  void* before = tsan_switch(tsan());
  access();
  tsan_switch(before);
}

}  // namespace fusedrnn::dev::sim
