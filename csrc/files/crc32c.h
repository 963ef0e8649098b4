// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// CRC-32C (Castagnoli), as in RFC 3720: the checksum of fusestep's files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusestep::detail {

/// The CRC of what `crc` is the CRC of (0: of nothing), followed by these bytes.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes);

/// The same without the processor's instruction. For processors that have none, and for tests.
std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t bytes);

}  // namespace fusestep::detail
