// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Where memory lives, and the stream work is enqueued on.
#pragma once

#include <compare>
#include <cstddef>
#include <string>

#include "fusestep/export.h"

namespace fusestep {

enum class DeviceType { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;

  static constexpr Device cpu() { return {}; }
  static constexpr Device cuda(int index = 0) { return {DeviceType::kCuda, index}; }
  constexpr bool is_cuda() const { return type == DeviceType::kCuda; }
  friend constexpr auto operator<=>(const Device&, const Device&) = default;
};

/// "cpu", "cuda:0".
FUSESTEP_API std::string to_string(Device device);

/// CUDA devices this process can use: 0 without a driver, without a GPU, or in a build without
/// CUDA.
FUSESTEP_API int cuda_device_count();

/// One sentence: what cuda_device_count() found, or why CUDA is not used.
FUSESTEP_API std::string cuda_status();

/// A stream of one device; `handle` is a cudaStream_t. No header of the CUDA toolkit is needed
/// here.
struct Stream {
  Device device;
  void* handle = nullptr;

  /// A device and a handle, never an integer that happens to convert.
  constexpr Stream(Device on, void* stream) : device(on), handle(stream) {}
  Stream(Device, int) = delete;
  Stream(Device, std::nullptr_t) = delete;
};

/// Where optimizer state on a device comes from. Calls come in stream order: memory returned by
/// `allocate` may be used by work enqueued on `stream` afterwards, and `deallocate` is called when
/// all use of it has been enqueued on `stream`.
class FUSESTEP_API Allocator {
 public:
  virtual ~Allocator() = default;
  /// At least `bytes` (> 0) bytes, 256-byte aligned on a CUDA device, 64-byte aligned on the CPU.
  /// Throws, or returns nullptr, when there is no memory.
  virtual void* allocate(std::size_t bytes, Stream stream) = 0;
  virtual void deallocate(void* data, std::size_t bytes, Stream stream) noexcept = 0;
};

}  // namespace fusestep
