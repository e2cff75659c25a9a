// SPDX-License-Identifier: Apache-2.0
// What the short ways share: how a user's arrays lie in the slots of a call, and how its kernels run.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <new>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/signature.h"

namespace fusedrnn::bindings {

constexpr int kParts = 4;  // W, R, bW, bR

// Which of a slot's axes a user's array has, in its own order. The others have stride 0: one element, or shared.
struct Order {
  int rank = 0;
  int axis[4] = {};

  Order() = default;
  constexpr Order(std::initializer_list<int> axes) {
    for (const int one : axes) axis[rank++] = one;
  }
  // With the axis of weight sets in front.
  constexpr Order after(int sets) const {
    Order out{sets};
    for (int i = 0; i < rank; ++i) out.axis[out.rank++] = axis[i];
    return out;
  }
};

// The order of weights that have no axis E.
template <int Rank>
constexpr Order one_set = Rank == 3 ? Order{1, 2} : Order{1};

// T and B; extent(i): of the user's axis i.
template <class Extent>
void find_steps_and_rows(const Order& order, const Extent& extent, Sizes* s) {
  s->T = s->B = 1;
  for (int i = 0; i < order.rank; ++i) {
    if (order.axis[i] == 0) s->T = extent(i);
    if (order.axis[i] == 2) s->B = extent(i);
  }
}

// Whether an object has the slot's shape; then the slot's array is the object's.
template <class Object, int Rank>
bool place(const Object& object, const Slot<Rank>& slot, const Order& order) {
  if (object.rank() != order.rank) return false;
  for (int i = 0; i < order.rank; ++i) {
    const int axis = order.axis[i];
    if (object.extent(i) != slot.shape[axis] || !object.stride(i, &slot.array.stride[axis])) return false;
  }
  slot.array.data = object.data();
  return true;
}

// The shape of a new array for the slot.
template <int Rank>
void find_shape(const Slot<Rank>& slot, const Order& order, int64_t (&shape)[4]) {
  for (int i = 0; i < order.rank; ++i) shape[i] = slot.shape[order.axis[i]];
}
// The slot's array lies there, without gaps.
template <int Rank>
void place_new(void* data, const Slot<Rank>& slot, const Order& order) {
  int64_t step = 1;
  for (int i = order.rank; i-- > 0; step *= slot.shape[order.axis[i]]) slot.array.stride[order.axis[i]] = step;
  slot.array.data = data;
}

// So many of them, without memory from the heap where they are few.
template <class T, size_t Few>
class Small {
 public:
  explicit Small(size_t count) {
    if (count <= Few) return;
    many_.resize(count);
    data_ = many_.data();
  }
  Small(const Small&) = delete;
  Small& operator=(const Small&) = delete;
  T* data() { return data_; }
  T& operator[](int i) { return data_[i]; }
  const T& operator[](int i) const { return data_[i]; }

 private:
  T few_[Few];
  std::vector<T> many_;
  T* data_ = few_;
};
constexpr size_t kFew = 8;  // layers x directions
using StackedParams = Small<Params, kFew>;

// kernels(threads), without the GIL where they have much to do; false with an exception set.
template <class Kernels>
bool run_kernels(double flops, const Kernels& kernels) {
  try {
    const int threads = threads_now();
    const Released released(flops);
    kernels(threads);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
    return false;
  } catch (const cpu::Interrupted&) {
    return false;
  }
  return true;
}

template <class Function>
PyCFunction fast(Function function) {  // METH_FASTCALL functions have another type than the table says
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace fusedrnn::bindings
