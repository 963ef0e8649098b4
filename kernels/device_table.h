// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A growing array in device memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

#include "cuda_check.h"
#include "upload_ring.h"

namespace fusestep::detail {

/// All calls of one table come in stream order: the caller orders the streams it names.
template <class T>
class DeviceTable {
 public:
  explicit DeviceTable(int device) : device_(device) {}
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;

  T* data() const { return data_; }
  std::size_t capacity() const { return capacity_; }

  /// Room for `count` elements. What was there stays, what is new is zero. Throws OutOfMemory and
  /// leaves the table as it was.
  void reserve(std::size_t count, cudaStream_t stream) {
    DeviceTable before(device_);
    grow(count, before, stream);
    before.release(stream);
  }

  /// The same, for memory that something follows a pointer to: where it is not enough, `before`,
  /// which is empty, gets it.
  void grow(std::size_t count, DeviceTable& before, cudaStream_t stream) {
    if (count <= capacity_) return;
    const std::size_t grown = std::max(count, capacity_ * 2);
    void* memory = nullptr;
    cuda_check(cudaMallocAsync(&memory, grown * sizeof(T), stream), device_, "allocating tables");
    try {
      const std::size_t kept = capacity_ * sizeof(T);
      if (kept != 0) {
        cuda_check(cudaMemcpyAsync(memory, data_, kept, cudaMemcpyDeviceToDevice, stream), device_,
                   "growing tables");
      }
      cuda_check(
          cudaMemsetAsync(static_cast<char*>(memory) + kept, 0, grown * sizeof(T) - kept, stream),
          device_, "clearing tables");
    } catch (...) {
      static_cast<void>(cudaFreeAsync(memory, stream));
      throw;
    }
    before.data_ = std::exchange(data_, static_cast<T*>(memory));
    before.capacity_ = std::exchange(capacity_, grown);
  }

  /// Takes grow() back. What was empty before it may as well be larger.
  void restore(DeviceTable& before, cudaStream_t stream) noexcept {
    if (before.data_ == nullptr) return;
    release(stream);
    data_ = std::exchange(before.data_, nullptr);
    capacity_ = std::exchange(before.capacity_, 0);
  }

  void upload(UploadRing& ring, std::span<const T> rows, std::size_t first, cudaStream_t stream) {
    ring.upload(data_ + first, rows.data(), rows.size_bytes(), stream);
  }

  void release(cudaStream_t stream) noexcept {
    if (data_ != nullptr) static_cast<void>(cudaFreeAsync(data_, stream));
    data_ = nullptr;
    capacity_ = 0;
  }

 private:
  int device_;
  T* data_ = nullptr;
  std::size_t capacity_ = 0;
};

}  // namespace fusestep::detail
