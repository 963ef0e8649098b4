// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Return codes of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "fusestep/error.h"

namespace fusestep::detail {

/// Throws OutOfMemory or DeviceError: "cuda:0: launching prepare: cudaErrorXyz (its sentence)".
inline void cuda_check(cudaError_t code, int device, const char* doing) {
  if (code == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // the code is ours now, later calls shall not report it
  const std::string text = "cuda:" + std::to_string(device) + ": " + doing + ": " +
                           cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ")";
  if (code == cudaErrorMemoryAllocation) throw OutOfMemory(text);
  throw DeviceError(text);
}

/// The device is current while it lives; then the caller's is again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    cuda_check(cudaGetDevice(&callers_), device, "finding the current device");
    if (callers_ != device) cuda_check(cudaSetDevice(device), device, "making it current");
  }
  ~DeviceGuard() {
    if (callers_ != device_) static_cast<void>(cudaSetDevice(callers_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, callers_ = 0;
};

/// While it lives, calls of this thread that might disturb a capture (to allocate memory or free
/// it, to ask for an event) are allowed although somebody captures: ours have nothing to do with
/// it. Without it they fail, and the capture with them.
class BesideCaptures {
 public:
  BesideCaptures() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~BesideCaptures() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace fusestep::detail
