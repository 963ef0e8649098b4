// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// torch's devices and streams as ours. Here alone is it decided on which device a tensor is
// stepped: tests link another translation unit in its place.
#pragma once

#include <cstddef>
#include <optional>

#include "dlpack.h"
#include "fusestep/device.h"

namespace fusestep::bindings {

/// Of memory that torch has on the CPU, or on CUDA device `index`. Nothing where there is no
/// backend for it.
std::optional<Device> device_of(bool on_cuda, int index, const void* data, std::size_t bytes);

/// torch's current stream of a CUDA device. `api` may be null.
void* current_stream(const dlpack::ExchangeApi* api, Device device);

}  // namespace fusestep::bindings
