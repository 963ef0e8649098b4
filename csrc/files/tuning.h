// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Numbers that tune the speed of reading and writing files; measured in docs/performance.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusestep::detail {

/// Data is checksummed and moved in pieces of this size: the second of the two finds it in cache.
inline constexpr std::size_t kFilePieceBytes = std::size_t{256} << 10;

/// So much of what was written is handed to the disk at a time, without waiting for it: the disk
/// works while the rest is made.
inline constexpr std::uint64_t kWriteBackBytes = std::uint64_t{8} << 20;

/// Bytes of each of the three streams of a CRC. Long ones hide what joining them costs; short ones
/// serve what is left.
inline constexpr std::size_t kCrcLongStream = 8192;
inline constexpr std::size_t kCrcShortStream = 256;

}  // namespace fusestep::detail
