// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Training by several processes: parameters of which each has a part, and the files they write
// together. docs/distributed.md.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "fusestep/export.h"

namespace fusestep {

/// What is here of a tensor that other processes have the rest of: a run of its elements in C
/// order. The number of them is that of the parameter's value, which may be 0.
struct Shard {
  std::int64_t offset = 0;  ///< of the first element here
  std::vector<std::int64_t> whole_shape;

  friend bool operator==(const Shard&, const Shard&) = default;
};

/// One of the processes that save together.
struct SaveRank {
  int rank = 0;
  int world = 1;
  /// The same on all ranks, and larger than for the checkpoint before: the number of the step, for
  /// example. Files of different saves have different names by it.
  std::int64_t generation = 0;
};

/// The file that this rank writes when `path` is saved: "state.safetensors" is written as
/// "state.<generation>.<rank>-of-<world>.safetensors".
FUSESTEP_API std::filesystem::path rank_file(const std::filesystem::path& path,
                                             const SaveRank& rank);

/// Makes the files of all ranks the checkpoint `path`: an index of them, which appears whole or not
/// at all; until then the older checkpoint is the one there. To be called by one process when all
/// have saved. Removes files of lower generations. Throws FileError, and InvalidArgument where the
/// files are not parts of one state; both change nothing.
FUSESTEP_API void commit_ranks(const std::filesystem::path& path, int world,
                               std::int64_t generation);

}  // namespace fusestep
