// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Numbers that only change the speed of the CPU backend.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusestep::detail {

/// Elements of one tensor that are done in one call of a loop. See "Chunks" in docs/performance.md.
inline constexpr int kCpuChunk = 65536;

/// Elements that are worth handing to another thread, from however many tensors: one
/// full chunk.
inline constexpr std::int64_t kCpuTask = 65536;

/// Bytes: a line of the cache. Where elements of several arrays lie at the same place of a page,
/// they fall into the same sets of the first-level cache. See "Slots" in docs/performance.md.
inline constexpr std::size_t kCpuAlignment = 64;
inline constexpr std::size_t kCpuSkew = 17 * kCpuAlignment;

}  // namespace fusestep::detail
