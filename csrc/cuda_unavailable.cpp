// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend of a build without CUDA.
#include "fusestep/detail/backend.h"
#include "fusestep/device.h"
#include "fusestep/error.h"

namespace fusestep {

int cuda_device_count() { return 0; }
std::string cuda_status() { return "this build of fusestep has no CUDA backend"; }

std::unique_ptr<detail::Backend> detail::make_cuda_backend(int, std::shared_ptr<Allocator>) {
  throw DeviceError(cuda_status());
}

}  // namespace fusestep
