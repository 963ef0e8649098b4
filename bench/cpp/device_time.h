// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What the benchmarks of the CUDA backend share: memory and time of the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "options.h"

namespace fusestep::bench {

constexpr int kRepeats = 25, kWarmUp = 4;

inline void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

/// Uninitialised.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) : bytes_(bytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, bytes));
    data_.reset(static_cast<char*>(data));
  }
  char* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(char* data) const { cudaFree(data); }
  };
  std::unique_ptr<char, Free> data_;
  std::size_t bytes_;
};

/// 4 MiB of random numbers, again and again.
inline void fill(const DeviceBuffer& buffer, DType dtype) {
  constexpr std::size_t pattern_bytes = std::size_t{4} << 20;
  std::vector<char> pattern(pattern_bytes);
  std::mt19937 random(1);
  for (std::size_t i = 0; i < pattern_bytes; i += size_of(dtype)) {
    store_random(random, dtype, pattern.data() + i);
  }
  std::size_t done = std::min(pattern_bytes, buffer.bytes());
  check(cudaMemcpy(buffer.data(), pattern.data(), done, cudaMemcpyHostToDevice));
  while (done < buffer.bytes()) {
    const std::size_t more = std::min(done, buffer.bytes() - done);
    check(cudaMemcpy(buffer.data() + done, buffer.data(), more, cudaMemcpyDeviceToDevice));
    done += more;
  }
}

/// Reads more than any L2 cache holds, so that no tensor is still in it. What were written instead
/// would wait there, and be brought to memory in the time of what is measured. In flush_l2.cu.
void flush_l2();

/// Device time of one call in us, the caches cold.
template <class F>
double device_us(F&& work, int repeats = kRepeats, int warm_up = kWarmUp) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int i = 0; i < warm_up; ++i) work();
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    flush_l2();
    check(cudaEventRecord(begin));
    work();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms * 1e3);
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return median(times);
}

/// Bytes read and written per us by a 2 GiB copy: the roof.
inline double copy_rate() {
  static const double rate = [] {
    constexpr std::size_t bytes = std::size_t{2} << 30;
    const DeviceBuffer from(bytes), to(bytes);
    check(cudaMemset(from.data(), 1, bytes));
    return 2.0 * static_cast<double>(bytes) / device_us([&] {
             check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice));
           });
  }();
  return rate;
}

}  // namespace fusestep::bench
