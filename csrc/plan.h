// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// From groups and parameters to the tables of a step.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "fusestep/detail/backend.h"
#include "fusestep/detail/plan.h"
#include "records.h"

namespace fusestep::detail {

/// Calls f(index, parameter) for those of a device that step now, group by group in the order they
/// were added.
template <class F>
void for_each_stepping(int device, std::span<const GroupRecord> groups, auto& parameters, F&& f) {
  for (const GroupRecord& group : groups) {
    for (const int index : group.parameters) {
      auto& parameter = at(parameters, index);
      if (parameter.device == device && parameter.steps()) f(index, parameter);
    }
  }
}

/// Position in `Layouts` of what a parameter steps with, or nothing.
std::optional<int> layout_of(const GroupRecord& group, const ParameterRecord& parameter,
                             bool stores_grads);

/// The plan of the parameters of one device that step now; sets their `row` and `layout`. Every
/// slot they need exists. Tensors of a bucket stand in the order groups and parameters were added.
Plan build_plan(int device, const Backend& backend, std::span<const GroupRecord> groups,
                std::vector<ParameterRecord>& parameters, bool stores_grads);

/// The blocks over which the norm of the planned gradients is summed, in the order of norm.h.
std::vector<Chunk> build_norm_blocks(int device, std::span<const GroupRecord> groups,
                                     const std::vector<ParameterRecord>& parameters);

/// Rewrites the rows of these parameters, which are in the plan already with the same dtypes.
Backend::RowRange refresh_rows(Plan& plan, std::span<const int> changed, const Backend& backend,
                               std::span<const GroupRecord> groups,
                               const std::vector<ParameterRecord>& parameters);

}  // namespace fusestep::detail
