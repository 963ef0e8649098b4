// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The part of DLPack 1.3's C exchange API that is read here (https://dmlc.github.io/dlpack, "C
// Exchange API"): structures of a stable ABI, declared by hand because torch's headers are not
// needed for anything else.
#pragma once

#include <cstdint>

namespace fusestep::dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : std::uint8_t { kFloat = 2, kBfloat = 4, kComplex = 5 };

struct DType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  DType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

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
static_assert(sizeof(Tensor) == 48 && sizeof(ExchangeApi) == 56);

}  // namespace fusestep::dlpack
