// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The part of DLPack 1.3's C exchange API that is read here (https://dmlc.github.io/dlpack, "C
// Exchange API"): structures of a stable ABI, declared by hand because torch's headers are not
// needed for anything else.
#pragma once

#include <cstdint>

namespace fusestep::dlpack {

enum DeviceType : std::int32_t { kCuda = 2 };

struct ExchangeApi {
  struct Header {
    std::uint32_t major;
    std::uint32_t minor;
    Header* previous;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  void* tensor_from_py_object;
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};
static_assert(sizeof(ExchangeApi) == 56);

}  // namespace fusestep::dlpack
