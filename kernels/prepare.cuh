// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The first kernel of a step: decide whether and how it goes, count it, and compute the scalars of
// every tensor, one tensor per thread.
#pragma once

#include "fusestep/detail/prepare.h"
#include "tuning.h"

namespace fusestep::detail {

/// Tables that graphs follow to wherever they have grown.
struct SharedTables {
  const HyperRow* hypers;
  StepState* states;
};

struct Prepare {
  static constexpr int kThreads = kPrepareThreads;
  static constexpr int kMinBlocks = 1;

  StepRequest request;
  const NormSum* norm_parts;
  const PrepareRow* rows;
  SharedTables shared;
  const SharedTables* shared_now;  // in a graph: where they are when it runs; else null
  ScalarRow* scalars;
  Control* control;
  int tensors;

  FUSESTEP_HD void operator()(unsigned block, unsigned thread) const {
    const StepDecision decision = decide(request, norm_parts);
    if (block == 0 && thread == 0) record(request, decision, *control);
    const int tensor = static_cast<int>(block) * kThreads + static_cast<int>(thread);
    if (decision.skip || tensor >= tensors) return;
    const SharedTables at = shared_now == nullptr ? shared : *shared_now;
    const PrepareRow row = rows[tensor];
    const StepState state = prepare_tensor(row, at.hypers[row.group], decision,
                                           state_before(row, at.states), scalars[tensor]);
    write_state_after(row, state, at.states);
  }
};

}  // namespace fusestep::detail
