// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Learning-rate schedules.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>

#include "fusestep/export.h"
#include "fusestep/optimizer.h"

namespace fusestep {

/// What a base learning rate is multiplied by at a step number: 0, 1, 2, ...
using LrFactor = std::function<double(std::int64_t step)>;

/// gamma^(step / step_size), torch's StepLR. step_size >= 1.
FUSESTEP_API LrFactor step_decay(std::int64_t step_size, double gamma = 0.1);

/// From 1/warmup up to 1 in `warmup` steps, then half a cosine down to `floor` at step `total`, and
/// `floor` from there on (Loshchilov & Hutter, "SGDR", 2017). 0 <= warmup < total, 0 <= floor <= 1.
FUSESTEP_API LrFactor cosine_with_warmup(std::int64_t warmup, std::int64_t total, double floor = 0);

/// Sets lr = base * factor(step) in every group. Valid as long as the optimizer.
class FUSESTEP_API LrSchedule {
 public:
  /// The base of a group is its lr when the schedule first sees it (now, or when step() meets a
  /// group that was added since); with `start` > 0 the base that an earlier schedule gave it, which
  /// save and load keep (torch's initial_lr); what `base` says of it comes before both. Sets the
  /// rates of step `start`.
  LrSchedule(Optimizer& optimizer, LrFactor factor, std::int64_t start = 0,
             std::unordered_map<std::string, double> base = {});

  /// To the next step number: call it after Optimizer::step().
  void step() { set_step(step_ + 1); }
  /// To any step number, for example that of a checkpoint.
  void set_step(std::int64_t step);
  std::int64_t current_step() const { return step_; }
  /// Base rates by group name: what to keep in a checkpoint.
  const std::unordered_map<std::string, double>& base() const { return base_; }

 private:
  detail::Engine* engine_;  // stays where it is when the Optimizer is moved
  LrFactor factor_;
  std::int64_t step_;
  std::unordered_map<std::string, double> base_;
};

}  // namespace fusestep
