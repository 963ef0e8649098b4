// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Where a torch.Tensor's memory is and how it is laid out.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fusestep/device.h"
#include "fusestep/dtype.h"

namespace fusestep::bindings {

/// A real or complex type that is stepped; torch, its C interface and Python call it by one name.
struct TorchType {
  const char* name;
  DType dtype;  // of its real numbers
  bool is_complex;

  std::size_t size() const { return (is_complex ? 2 : 1) * size_of(dtype); }
};
inline constexpr std::array<TorchType, 6> kTorchTypes = {{
    {"float32", DType::kFloat32, false},
    {"bfloat16", DType::kBFloat16, false},
    {"float16", DType::kFloat16, false},
    {"float64", DType::kFloat64, false},
    {"complex64", DType::kFloat32, true},
    {"complex128", DType::kFloat64, true},
}};

/// Shape and strides are borrowed from the tensor, or stand in `owned`.
struct TensorInfo {
  void* data = nullptr;
  std::int64_t elements = 0;  // real numbers: a complex element is two
  DType dtype = DType::kFloat32;
  bool is_complex = false;
  Device device = {};
  int ndim = 0;
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;  // in elements
  std::vector<std::int64_t> owned = {};

  /// All elements in one stretch of memory, in whatever order of dimensions.
  bool dense() const;
  /// The same shape and, dimensions of extent 1 apart, the same strides, on the same device.
  bool laid_out_as(const TensorInfo& other) const;
  /// The same memory as well, of the same type.
  bool is_same_as(const TensorInfo& other) const;
  /// One whose shape and strides are its own.
  TensorInfo kept() const;
};

/// Counts the elements of what was read of a tensor, and finds its device, torch's number `index`.
/// False where elements have no memory, and where there is no backend.
bool complete(TensorInfo& info, const TorchType& type, bool on_cuda, int index);

}  // namespace fusestep::bindings
