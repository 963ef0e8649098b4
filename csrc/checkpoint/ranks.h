// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A checkpoint of several files, one a rank, and the index that makes them one: docs/files.md.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/description.h"
#include "fusestep/shard.h"
#include "fusestep/state_dict.h"

namespace fusestep::detail {

/// Metadata of an index: JSON, see docs/files.md.
inline constexpr const char* kRanksKey = "fusestep.ranks";
/// In an index, of a parameter.
inline constexpr const char* kPartsKey = "parts";

/// A file of a rank, and the checksum of its header, by which it is known.
struct RankFile {
  std::string name;  // in the directory of the index
  std::string checksum;
};

struct RankIndex {
  std::int64_t generation = 0;
  std::vector<RankFile> files;
};

/// Elements [begin, end) of a whole tensor are in a file, whose own tensor begins with `first`.
struct TensorPart {
  std::size_t file = 0;
  std::int64_t first = 0, begin = 0, end = 0;
};

Json to_json(const RankIndex& index);
/// These throw InvalidArgument.
RankIndex rank_index_from_json(const Json& json);
std::vector<TensorPart> parts_from_json(const Json& json, std::size_t files, std::int64_t elements,
                                        const std::string& where);

/// Where this rank saves. Throws InvalidArgument for a rank that is none, and for the generation
/// of the checkpoint that is there: its files must stay.
std::filesystem::path file_to_save(const std::filesystem::path& path, const SaveRank& rank);

}  // namespace fusestep::detail
