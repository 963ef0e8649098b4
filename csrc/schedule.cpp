// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "fusestep/schedule.h"

#include <cmath>
#include <numbers>
#include <utility>

#include "engine.h"

namespace fusestep {

LrFactor step_decay(std::int64_t step_size, double gamma) {
  if (step_size < 1) {
    throw InvalidArgument("step_decay: step_size must be >= 1, got " + std::to_string(step_size));
  }
  return [=](std::int64_t step) { return std::pow(gamma, static_cast<double>(step / step_size)); };
}

LrFactor cosine_with_warmup(std::int64_t warmup, std::int64_t total, double floor) {
  if (warmup < 0 || warmup >= total) {
    throw InvalidArgument("cosine_with_warmup: warmup must be in [0, total), got " +
                          std::to_string(warmup) + " of " + std::to_string(total));
  }
  if (!(floor >= 0 && floor <= 1)) {
    throw InvalidArgument("cosine_with_warmup: floor must be in [0, 1], got " +
                          std::to_string(floor));
  }
  return [=](std::int64_t step) {
    if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
    if (step >= total) return floor;
    const double done = static_cast<double>(step - warmup) / static_cast<double>(total - warmup);
    return floor + (1 - floor) * 0.5 * (1 + std::cos(std::numbers::pi * done));
  };
}

LrSchedule::LrSchedule(Optimizer& optimizer, LrFactor factor, std::int64_t start,
                       std::unordered_map<std::string, double> base)
    : engine_(optimizer.engine_.get()),
      factor_(std::move(factor)),
      step_(start),
      base_(std::move(base)) {
  for (const auto& [name, lr] : base_)
    engine_->find_group(name);  // a name no group has is an error
  for (const detail::GroupRecord& group : engine_->groups()) {
    if (start > 0 && group.initial_lr) base_.try_emplace(group.name, *group.initial_lr);
  }
  set_step(start);
}

void LrSchedule::set_step(std::int64_t step) {
  if (step < 0) {
    throw InvalidArgument("LrSchedule: step must be >= 0, got " + std::to_string(step));
  }
  const double factor = factor_(step);
  if (!(factor >= 0)) {
    throw InvalidArgument("LrSchedule: the factor at step " + std::to_string(step) +
                          " must be >= 0, got " + std::to_string(factor));
  }
  const std::vector<detail::GroupRecord>& groups = engine_->groups();
  for (const detail::GroupRecord& group : groups) {
    const double lr = learning_rate(group.hyper);
    const double base = base_.try_emplace(group.name, lr).first->second;
    if (!(base >= 0)) {
      throw InvalidArgument("LrSchedule: the base of group '" + group.name +
                            "' must be >= 0, got " + std::to_string(base));
    }
    if (!(base * factor >= 0)) {
      throw InvalidArgument("LrSchedule: the rate of group '" + group.name + "' at step " +
                            std::to_string(step) + " must be >= 0, got " +
                            std::to_string(base * factor));
    }
  }
  for (int i = 0; i < static_cast<int>(groups.size()); ++i) {
    const double base = base_.at(detail::at(groups, i).name);
    engine_->set_lr(i, base * factor);
    engine_->set_initial_lr(i, base);
  }
  step_ = step;
}

}  // namespace fusestep
