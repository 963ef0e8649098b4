// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A dense array somebody else owns.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "fusestep/device.h"
#include "fusestep/dtype.h"
#include "fusestep/export.h"

namespace fusestep {

/// Contiguous elements of one dtype on one device. A default-made view is 'absent' (no gradient,
/// no scalar); a view of an empty tensor is present, and its address may be null.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;  ///< {} is a 0-dim tensor of one element
  Device device;
  bool present = false;

  /// Elements, 0 if absent; a negative extent counts as none and is refused where the view is
  /// handed in.
  std::int64_t size() const {
    std::int64_t product = present ? 1 : 0;
    for (const std::int64_t extent : shape) product *= extent < 0 ? 0 : extent;
    return product;
  }
  std::size_t bytes() const { return static_cast<std::size_t>(size()) * size_of(dtype); }
};

/// `view(weights.data(), {out, in})`: float, double, bfloat16 or float16 memory of this shape.
template <class T>
TensorView view(T* data, std::vector<std::int64_t> shape, Device device = Device::cpu()) {
  return {data, dtype_of<T>, std::move(shape), device, true};
}

/// A gradient that may only be read; as a value or slot it would be written.
template <class T>
TensorView grad_view(const T* data, std::vector<std::int64_t> shape,
                     Device device = Device::cpu()) {
  return view(const_cast<T*>(data), std::move(shape), device);
}

/// "[64, 3, 7, 7]".
FUSESTEP_API std::string to_string(const std::vector<std::int64_t>& shape);

}  // namespace fusestep
