// SPDX-License-Identifier: Apache-2.0
// DLPack's binary interface, version 1: a tensor, and the table of functions (C exchange API) that a library hands out
// as a capsule.
#pragma once

#include <cstdint>

namespace fusedrnn::bindings {

struct DLPackVersion {
  uint32_t major, minor;
};
struct DLDevice {
  int32_t type, id;  // type 1: CPU
};
struct DLDataType {
  uint8_t code, bits;  // code 0: signed integers, 2: IEEE floating point, 4: bfloat16
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* previous;
  int (*allocate)(DLTensor* prototype, DLManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, DLManagedTensorVersioned** out);
  int (*object_from_managed)(DLManagedTensorVersioned* tensor, void** out);  // takes the tensor
  int (*view_of_object)(void* object, DLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace fusedrnn::bindings
