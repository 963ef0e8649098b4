// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Which saved parameter becomes which parameter here, and what does not fit.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/description.h"
#include "fusestep/state_dict.h"

namespace fusestep::detail {

struct MatchOptions {
  LoadWhat what = LoadWhat::kAll;
  bool convert = false;
  bool values = true;
  /// Slots that no variant of the rule has are taken too, whatever they are.
  bool other_slots = false;
  /// By position instead of name. Numbers of groups and parameters must agree.
  bool by_position = false;
};

struct Match {
  struct Pair {
    int saved, here;
    std::vector<std::string> slots = {};  // that are taken; "value" may be among them
  };
  LoadReport report;
  std::vector<Pair> parameters;  // whose state is taken
  std::vector<int> settings;     // of every group here: the saved group it takes them from, or -1
};

/// Throws InvalidArgument for groups that cannot be matched by position, with torch's texts.
Match match(const Description& saved, const Description& here, const MatchOptions& options);

}  // namespace fusestep::detail
