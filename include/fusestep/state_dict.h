// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// State as a value: torch's state_dict in C++, files of it, and what a load has done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iosfwd>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "fusestep/device.h"
#include "fusestep/dtype.h"
#include "fusestep/error.h"
#include "fusestep/export.h"
#include "fusestep/hyper.h"
#include "fusestep/shard.h"

namespace fusestep {

/// The user's own words in a file: epoch, git commit, ... Keys that begin with "fusestep." are
/// reserved.
using Metadata = std::map<std::string, std::string>;

/// A dense array that owns its memory, in this process.
struct StateTensor {
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> data;  ///< in C order
};

/// One parameter: torch's `state[index]`, and what names it.
struct ParameterState {
  std::string name;
  DType dtype = DType::kFloat32;  ///< of the value
  std::vector<std::int64_t> shape;
  std::optional<Shard> shard = {};  ///< set: this is a part of a tensor
  bool frozen = false;
  std::int64_t step = 0;                     ///< steps taken
  std::map<std::string, StateTensor> slots;  ///< empty: it has never stepped, or its rule has none
};

/// One group: torch's `param_groups[i]`.
struct GroupState {
  std::string name;
  Hyper hyper;
  std::optional<double> initial_lr;  ///< what a schedule multiplies
  std::vector<std::int64_t> params;  ///< positions in StateDict::state
};

/// All that an optimizer knows apart from its parameters' values. Positions count the parameters of
/// the optimizer, group after group, as torch does.
struct StateDict {
  std::vector<ParameterState> state;
  std::vector<GroupState> param_groups;
  Metadata metadata;
};

/// What a load takes.
enum class LoadWhat : std::uint8_t {
  kAll,    ///< state, settings of groups, and which parameters are frozen
  kState,  ///< slots and step counts: resume with the learning rates set now
  kHyper   ///< settings of groups
};

struct LoadOptions {
  /// Refuse if anything is missing, unexpected or does not fit. Otherwise load what matches.
  bool strict = true;
  LoadWhat what = LoadWhat::kAll;
  /// The name here of a parameter that was saved under this one.
  std::function<std::string(const std::string&)> rename = {};
  /// Round slots of another dtype to the one used here. Otherwise they do not fit.
  bool convert = false;
  /// Parameters' values too, where they were saved.
  bool values = true;
  /// The stream of each CUDA device; its default stream where none is given. Waits for it.
  std::span<const Stream> streams = {};
};

struct SaveOptions {
  /// Parameters' values too, as `<parameter>/value`.
  bool values = false;
  /// Added to what the optimizer keeps from the file it has loaded.
  Metadata metadata = {};
  /// Set where several processes save together; commit_ranks() then makes a checkpoint of their
  /// files.
  std::optional<SaveRank> rank = {};
  std::span<const Stream> streams = {};
};

/// What a load took, and what it did not. Names are those used here, after `rename`.
struct FUSESTEP_API LoadReport {
  struct Mismatch {
    std::string name;   ///< of a parameter, `<parameter>/<slot>`, or a group
    std::string what;   ///< "shape", "dtype", "rule", "settings"
    std::string saved;  ///< for example "[10, 512]"
    std::string here;
  };
  struct HyperDifference {
    std::string group, key, saved, here;  ///< values as JSON; empty where there is none
    bool taken = false;                   ///< the saved one holds from now on
  };

  std::vector<std::string> loaded;      ///< parameters whose state is now the saved one
  std::vector<std::string> missing;     ///< here, but not saved
  std::vector<std::string> unexpected;  ///< saved, but not here
  std::vector<Mismatch> mismatched;     ///< in both, and left alone
  std::vector<std::string> converted;   ///< `<parameter>/<slot>`, rounded to another dtype
  /// `<parameter>/<slot>` of the user's own, which the rule does not have and this optimizer cannot
  /// hold: not taken, and no reason to refuse a load.
  std::vector<std::string> left_out;
  std::vector<HyperDifference> hyper;
  Metadata metadata;  ///< the user's

  /// Nothing is missing, unexpected or mismatched.
  bool complete() const { return missing.empty() && unexpected.empty() && mismatched.empty(); }
  /// A table to read.
  std::string to_string() const;
};
FUSESTEP_API std::ostream& operator<<(std::ostream& out, const LoadReport& report);

/// A strict load was refused, and has changed nothing; the report says why, and what would have
/// been loaded.
class FUSESTEP_API LoadError : public InvalidArgument {
 public:
  explicit LoadError(LoadReport what_happened);
  const LoadReport& report() const { return report_; }

 private:
  LoadReport report_;
};

/// A file that Optimizer::save() or write_state_dict() has written, or any safetensors file whose
/// tensors are named `<parameter>/<slot>`. Throws FileError.
FUSESTEP_API StateDict read_state_dict(const std::filesystem::path& path);

/// Writes a file as Optimizer::save() does. Throws FileError; an older file then stays whole.
FUSESTEP_API void write_state_dict(const StateDict& state, const std::filesystem::path& path);

}  // namespace fusestep
