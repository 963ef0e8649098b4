// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Arrays in one piece of memory that exists twice, on the host and on a CUDA device, laid out the
// same way; what lies between the arrays must come out as it went in.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fusestep/fusestep.h"
#include "support.h"

namespace fusestep::test {

inline void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

/// The device is current while it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~CurrentDevice() { static_cast<void>(cudaSetDevice(before_)); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
};

/// Memory of one device; freed when nothing uses it any more.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes, int device = 0) : device_(device), bytes_(bytes) {
    const CurrentDevice current(device_);
    check(cudaMalloc(&data_, bytes));
  }
  ~DeviceMemory() { static_cast<void>(cudaFree(data_)); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  char* data() const { return static_cast<char*>(data_); }
  std::size_t bytes() const { return bytes_; }
  int device() const { return device_; }
  /// In the order of the legacy default stream.
  void upload(const void* from) {
    const CurrentDevice current(device_);
    check(cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice));
  }
  std::string download() const {
    const CurrentDevice current(device_);
    std::string bytes(bytes_, '\0');
    check(cudaMemcpy(bytes.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return bytes;
  }

 private:
  int device_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

/// One number that lives on a device.
template <class T>
class DeviceScalar {
 public:
  explicit DeviceScalar(T value, int device = 0) : memory_(sizeof(T), device) { set(value); }
  void set(T value) { memory_.upload(&value); }
  TensorView view() const {
    return fusestep::view(reinterpret_cast<T*>(memory_.data()), {}, Device::cuda(memory_.device()));
  }

 private:
  DeviceMemory memory_;
};

class Slab {
 public:
  struct Place {
    std::size_t at;
    DType dtype;
    std::int64_t size;
  };

  /// `offset` elements behind a 64-byte boundary. All arrays come before the first view.
  int add(DType dtype, std::int64_t size, int offset) {
    const std::size_t at = bytes_ + kGap + static_cast<std::size_t>(offset) * size_of(dtype);
    places_.push_back({at, dtype, size});
    const std::size_t end = at + static_cast<std::size_t>(size) * size_of(dtype);
    bytes_ = (end + 63) / 64 * 64;
    return static_cast<int>(places_.size()) - 1;
  }
  void allocate(int device) {
    bytes_ += kGap;
    host_.resize(bytes_ / 64);
    std::memset(host_.data(), 0xa5, bytes_);
    device_ = std::make_unique<DeviceMemory>(bytes_, device);
  }

  int count() const { return static_cast<int>(places_.size()); }
  const Place& place(int i) const { return places_[static_cast<std::size_t>(i)]; }
  char* host() { return host_.data()->bytes; }
  TensorView host_view(int i) { return view_of(host(), i, Device::cpu()); }
  TensorView device_view(int i) {
    return view_of(device_->data(), i, Device::cuda(device_->device()));
  }
  /// f(array, element) for all elements.
  template <class F>
  void fill(F&& f) {
    for (int i = 0; i < count(); ++i) {
      for (std::int64_t k = 0; k < place(i).size; ++k) {
        write_element(host() + place(i).at, place(i).dtype, k, f(i, k));
      }
    }
  }
  void upload() { device_->upload(host()); }
  std::string download() const { return device_->download(); }
  const DeviceMemory& memory() const { return *device_; }

  /// Elements equal to the bit (NaN = NaN), and nothing else touched.
  void expect_equal(const std::string& when) {
    const std::string device = device_->download();
    if (std::memcmp(device.data(), host(), bytes_) == 0) return;
    std::size_t gap = 0;
    for (int i = 0; i < count(); ++i) {
      const Place& p = place(i);
      EXPECT_EQ(0, std::memcmp(device.data() + gap, host() + gap, p.at - gap))
          << when << ": memory before array " << i << " was written";
      ASSERT_EQ(canonical(device.data() + p.at, p.dtype, p.size) ==
                    canonical(host() + p.at, p.dtype, p.size),
                true)
          << when << ": array " << i << " of " << p.size << " x " << name_of(p.dtype) << " at byte "
          << p.at % 64 << ": " << first_difference(device.data(), p);
      gap = p.at + static_cast<std::size_t>(p.size) * size_of(p.dtype);
    }
    EXPECT_EQ(0, std::memcmp(device.data() + gap, host() + gap, bytes_ - gap)) << when;
  }

 private:
  static constexpr std::size_t kGap = 128;
  struct alignas(64) Line {
    char bytes[64];
  };

  TensorView view_of(char* memory, int i, Device device) const {
    const Place& p = place(i);
    return {memory + p.at, p.dtype, {p.size}, device, true};
  }
  std::string first_difference(const char* device, const Place& p) {
    for (std::int64_t k = 0; k < p.size; ++k) {
      const double cuda = read_element(device + p.at, p.dtype, k);
      const double cpu = read_element(host() + p.at, p.dtype, k);
      if (bits(cuda) == bits(cpu) || (std::isnan(cuda) && std::isnan(cpu))) continue;
      char text[128];
      std::snprintf(text, sizeof text, "element %lld is %a, on the CPU %a",
                    static_cast<long long>(k), cuda, cpu);
      return text;
    }
    return "no difference";
  }

  std::vector<Place> places_;
  std::size_t bytes_ = 0;
  std::vector<Line> host_;
  std::unique_ptr<DeviceMemory> device_;
};

}  // namespace fusestep::test
