// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The header of a safetensors file as text: docs/files.md describes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "safetensors.h"

namespace fusestep::detail {

inline constexpr std::string_view kReservedPrefix = "fusestep.";
inline constexpr std::string_view kVersionKey = "fusestep.version";
inline constexpr std::string_view kVersion = "1";
inline constexpr std::string_view kChecksumsKey = "fusestep.crc32c";
inline constexpr std::string_view kHeaderChecksumKey = "fusestep.header_crc32c";

/// A file of ours begins like this, so that the digits that follow stand at a fixed place.
inline constexpr std::string_view kHeaderStart = R"({"__metadata__":{"fusestep.header_crc32c":")";
inline constexpr std::size_t kDigits = 8;

/// The number of bytes of the header, and no more than every reader takes.
inline constexpr std::size_t kLengthBytes = 8;
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

/// Data begins at a multiple of this.
inline constexpr std::uint64_t kDataAlignment = 64;

/// A dtype of the format. Some elements are smaller than a byte.
struct StoredType {
  std::string_view name;
  unsigned bits;
};

/// In the order in which the public writer has it, by which alignment grows. Null: unknown.
const StoredType* find_stored_type(std::string_view name);

/// What a tensor takes in the file, or what is wrong with its dtype or shape.
struct DataSize {
  std::uint64_t bytes = 0;
  std::string problem;
};
DataSize data_size(const TensorInfo& tensor);

/// Length, header and padding: everything in front of the data. `metadata` is without the keys of
/// the file layer. Throws InvalidArgument for text that is not UTF-8.
std::string header_bytes(const std::filesystem::path& file, const Metadata& metadata,
                         const std::vector<TensorInfo>& tensors,
                         const std::vector<std::uint32_t>& checksums);

struct ParsedHeader {
  Metadata metadata;
  std::vector<TensorInfo> tensors;  // as they stand there, values of the right type and no more
};

/// Throws FileError for everything that is not a header.
ParsedHeader parse_header(const std::filesystem::path& file, std::string_view text);

/// A file of ours, which must be whole; or one of somebody else's.
bool is_ours(const Metadata& metadata);

/// Checks version and checksum of a header of ours; `bytes` are length and header. Returns the
/// checksums of the tensors.
std::vector<std::uint32_t> check_our_header(const std::filesystem::path& file, std::string bytes,
                                            const ParsedHeader& header);

}  // namespace fusestep::detail
