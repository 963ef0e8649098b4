// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// State files and the matching of saved parameters, for Python. Descriptions and reports cross as
// JSON text: what they say is in csrc/checkpoint/description.h.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "fusestep/optimizer.h"

namespace fusestep::bindings {

/// CUDA device index and stream handle.
using Streams = std::vector<std::pair<int, std::uintptr_t>>;
std::vector<Stream> streams_of(const Streams& given);

void bind_state_files(pybind11::module_& m);

/// save, load and state of the class that wraps Optimizer.
void bind_state(pybind11::class_<Optimizer>& optimizer);

}  // namespace fusestep::bindings
