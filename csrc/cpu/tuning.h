// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Numbers that only change the speed of the CPU backend.
#pragma once

#include <cstdint>

namespace fusestep::detail {

/// Elements of one tensor that are done in one call of a loop. See "Chunks" in docs/performance.md.
inline constexpr int kCpuChunk = 65536;

/// Elements that are worth handing to another thread, from however many tensors: one
/// full chunk.
inline constexpr std::int64_t kCpuTask = 65536;

}  // namespace fusestep::detail
