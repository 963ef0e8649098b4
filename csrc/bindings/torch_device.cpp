// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "torch_device.h"

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace fusestep::bindings {

std::optional<Device> device_of(bool on_cuda, int index, const void* /*data*/,
                                std::size_t /*bytes*/) {
  if (!on_cuda) return Device::cpu();
  static const int cuda_devices = cuda_device_count();
  if (index >= cuda_devices) return {};
  return Device::cuda(index);
}

void* current_stream(const dlpack::ExchangeApi* api, Device device) {
  if (api != nullptr && api->current_work_stream != nullptr) {
    void* stream = nullptr;
    if (api->current_work_stream(dlpack::kCuda, device.index, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }
  const py::object current = py::module_::import("torch.cuda").attr("current_stream")(device.index);
  return reinterpret_cast<void*>(current.attr("cuda_stream").cast<std::uintptr_t>());
}

}  // namespace fusestep::bindings
