// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// From hyperparameters and step counts to the scalars of a step; in double, on the host and on the
// device alike.
#pragma once

#include "fusestep/detail/norm.h"
#include "fusestep/detail/rule_list.h"
#include "fusestep/detail/tables.h"

namespace fusestep::detail {

/// A number the host knows, times one that is only known where the step runs (if `source` is set).
struct StepScalar {
  double value;
  const void* source = nullptr;
  std::int32_t source_is_double = 0;

  FUSESTEP_HD double get() const {
    if (source == nullptr) return value;
    return value * (source_is_double != 0
                        ? *static_cast<const double*>(source)
                        : static_cast<double>(*static_cast<const float*>(source)));
  }
};

/// What one step was asked to do with its gradients.
struct StepRequest {
  StepScalar grad_multiplier{1.0};
  StepScalar loss_scale{1.0};                   // gradients are divided by it
  StepScalar skip{0.0};                         // not 0 (NaN included): the step changes nothing
  double max_grad_norm = __builtin_huge_val();  // clipping, off at infinity
  double clip_value = __builtin_huge_val();     // of each element, off at infinity
  std::int32_t skip_nonfinite = 0;
  std::int32_t counts_skips = 1;  // of devices that skip together, one counts
  std::int32_t norm_parts = 0;    // how many NormSums there are to add: 0 without a norm
};

/// What prepare() and apply() do in this step.
struct StepDecision {
  double grad_multiplier;
  double grad_unscale;
  double clip_value;
  bool skip;
  double grad_norm;
  std::int64_t nonfinite;
};

/// Unscale, clip as torch's clip_grad_norm_ does (1e-6 beside the norm, never enlarge), decide.
FUSESTEP_HD StepDecision decide(const StepRequest& request, const NormSum* parts) {
  const double unscale = 1.0 / request.loss_scale.get();
  double multiplier = request.grad_multiplier.get() * unscale;
  bool skip = request.skip.get() != 0.0;
  const NormSum total = add_all(parts, request.norm_parts);
  double norm = __builtin_nan("");
  if (request.norm_parts != 0) {
    const double magnitude = multiplier < 0 ? -multiplier : multiplier;
    norm = sqrt(total.squares) * magnitude;
    const double coefficient = request.max_grad_norm / (norm + 1e-6);
    // Written so that a norm of NaN gives NaN, as in torch, not 1.
    if (request.max_grad_norm < __builtin_huge_val() && !(coefficient >= 1.0)) {
      multiplier *= coefficient;
    }
    skip = skip || (request.skip_nonfinite != 0 && total.nonfinite != 0);
  }
  return {multiplier, unscale, request.clip_value, skip, norm, total.nonfinite};
}

FUSESTEP_HD void record(const StepRequest& request, const StepDecision& decision,
                        Control& control) {
  control.skip = decision.skip ? 1 : 0;
  control.grad_norm = decision.grad_norm;
  control.nonfinite = decision.nonfinite;
  control.skipped_steps += decision.skip && request.counts_skips != 0 ? 1 : 0;
}

template <class R>
FUSESTEP_HD typename R::Hyper hyper_of(const HyperRow& row) {
  auto hyper = row.as<typename R::Hyper>();
  if (row.lr_source != nullptr) {
    hyper.lr = StepScalar{1.0, row.lr_source, row.lr_is_double}.get();
  }
  return hyper;
}

template <class R, class Real>
FUSESTEP_HD void write_scalars(const HyperRow& row, Progress progress, const StepDecision& decision,
                               NoiseKey noise, ScalarRow& out) {
  RuleScalars<R, Real> scalars;
  const double multiplier = decision.grad_multiplier;
  scalars.grad_multiplier = Real(row.maximize != 0 ? -multiplier : multiplier);
  scalars.grad_unscale = Real(decision.grad_unscale);
  scalars.clip_value = Real(decision.clip_value);
  scalars.noise = noise;
  scalars.rule = R::template prepare<Real>(hyper_of<R>(row), progress);
  out.set(scalars);
}

/// The state a tensor steps from: a count the caller owns is believed, whatever it was set to.
FUSESTEP_HD StepState state_before(const PrepareRow& row, const StepState* states) {
  StepState state = states[row.state];
  if (row.step_tensor != nullptr) {
    state.step = static_cast<std::int64_t>(
        row.step_is_double != 0 ? *static_cast<const double*>(row.step_tensor)
                                : static_cast<double>(*static_cast<const float*>(row.step_tensor)));
  }
  return state;
}

FUSESTEP_HD void write_state_after(const PrepareRow& row, StepState state, StepState* states) {
  states[row.state] = state;
  if (row.step_tensor == nullptr) return;
  if (row.step_is_double != 0) {
    *static_cast<double*>(row.step_tensor) = static_cast<double>(state.step);
  } else {
    *static_cast<float*>(row.step_tensor) = static_cast<float>(state.step);
  }
}

/// One tensor: count the step, then compute its scalars. Returns the state after it.
FUSESTEP_HD StepState prepare_tensor(const PrepareRow& row, const HyperRow& hyper,
                                     const StepDecision& decision, StepState state,
                                     ScalarRow& out) {
  const Progress progress{++state.step, state.buffer_filled == 0};
  const NoiseKey noise = noise_key(row.noise_seed, state.step);
  Rules::for_each([&]<int kIndex, class R>() {
    if (row.rule != kIndex) return;
    if constexpr (R::kFillsBuffer) state.buffer_filled = 1;
    if (row.wide != 0) {
      write_scalars<R, double>(hyper, progress, decision, noise, out);
    } else {
      write_scalars<R, float>(hyper, progress, decision, noise, out);
    }
  });
  return state;
}

}  // namespace fusestep::detail
