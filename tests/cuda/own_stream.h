// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "slab.h"

namespace fusestep::test {

class OwnStream {
 public:
  explicit OwnStream(unsigned flags = cudaStreamNonBlocking, int device = 0) : device_(device) {
    const CurrentDevice current(device);
    check(cudaStreamCreateWithFlags(&handle_, flags));
  }
  ~OwnStream() { static_cast<void>(cudaStreamDestroy(handle_)); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t get() const { return handle_; }
  Stream view() const { return {Device::cuda(device_), static_cast<void*>(handle_)}; }

 private:
  int device_;
  cudaStream_t handle_ = nullptr;
};

}  // namespace fusestep::test
