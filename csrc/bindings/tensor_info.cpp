// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "tensor_info.h"

#include <algorithm>
#include <numeric>

#include "torch_device.h"

namespace fusestep::bindings {

bool TensorInfo::dense() const {
  if (elements == 0) return true;
  std::int64_t expected = 1;
  bool contiguous = true;
  for (int i = ndim - 1; i >= 0; --i) {
    contiguous = contiguous && (shape[i] == 1 || strides[i] == expected);
    expected *= shape[i];
  }
  if (contiguous) return true;
  std::vector<int> order(static_cast<std::size_t>(ndim));
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](int i) { return shape[i] == 1; });
  std::sort(order.begin(), order.end(), [&](int a, int b) { return strides[a] < strides[b]; });
  expected = 1;
  for (const int i : order) {
    if (strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

bool TensorInfo::laid_out_as(const TensorInfo& other) const {
  if (ndim != other.ndim || elements != other.elements || device != other.device) return false;
  for (int i = 0; i < ndim; ++i) {
    if (shape[i] != other.shape[i]) return false;
    if (shape[i] != 1 && elements != 0 && strides[i] != other.strides[i]) return false;
  }
  return true;
}

bool TensorInfo::is_same_as(const TensorInfo& other) const {
  return data == other.data && dtype == other.dtype && is_complex == other.is_complex &&
         laid_out_as(other);
}

TensorInfo TensorInfo::kept() const {
  TensorInfo copy{data, elements, dtype, is_complex, device, ndim, nullptr, nullptr};
  copy.owned.reserve(2 * static_cast<std::size_t>(ndim));
  copy.owned.assign(shape, shape + ndim);
  copy.owned.insert(copy.owned.end(), strides, strides + ndim);
  copy.shape = copy.owned.data();
  copy.strides = copy.shape + ndim;
  return copy;
}

bool complete(TensorInfo& info, const TorchType& type, bool on_cuda, int index) {
  info.dtype = type.dtype;
  info.is_complex = type.is_complex;
  info.elements = type.is_complex ? 2 : 1;
  for (int i = 0; i < info.ndim; ++i) info.elements *= info.shape[i];
  if (info.data == nullptr && info.elements != 0) return false;
  const std::size_t bytes = static_cast<std::size_t>(info.elements) * size_of(info.dtype);
  const auto device = device_of(on_cuda, index, info.data, bytes);
  if (!device) return false;
  info.device = *device;
  return true;
}

}  // namespace fusestep::bindings
