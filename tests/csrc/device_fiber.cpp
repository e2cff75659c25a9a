// SPDX-License-Identifier: Apache-2.0
#include "device_fiber.h"

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

namespace fusedrnn::dev::sim {
namespace {
int reports = 0;
}  // namespace

Fiber::~Fiber() {
  if (begun_) in_the_name_of(Unseen::end);  // it was left inside a primitive, or has ended: one Unseen is open
}

void Fiber::arrived() {
  begun_ = true;
  fusedrnn::Fiber::arrived();
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
