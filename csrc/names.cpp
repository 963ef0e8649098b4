// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// How dtypes, devices, shapes and layouts are written in messages.
#include "fusestep/detail/layout.h"
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

namespace detail {

std::string to_string(const LayoutKey& key) {
  const auto name = [](DType dtype) { return std::string(name_of(dtype)); };
  return name(key.value) + " with gradients of " + name(key.grad) + ", slots of " + name(key.slot) +
         (key.master ? " and float32 master weights" : "");
}

std::string layouts_with(Extra extra) {
  std::string text;
  for (int i = 0; i < kLayouts; ++i) {
    const LayoutKey key = key_at(i);
    if (key.extra != extra) continue;
    if (!text.empty()) text += "; ";
    text += to_string(key);
  }
  return text;
}

}  // namespace detail

}  // namespace fusestep
