// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// How dtypes, devices and shapes are written in messages.
#include "fusestep/device.h"
#include "fusestep/dtype.h"
#include "fusestep/tensor_view.h"

namespace fusestep {

std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
  }
  return "unknown";
}

std::string to_string(Device device) {
  return device.is_cuda() ? "cuda:" + std::to_string(device.index) : "cpu";
}

std::string to_string(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(extent);
  }
  return text + "]";
}

}  // namespace fusestep
