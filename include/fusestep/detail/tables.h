// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The tables of a step, in the form the kernels read: plain data that is copied to where the
// parameters live. One tensor has the same index in `TensorRow`, `PrepareRow` and `ScalarRow`.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "fusestep/detail/host_device.h"
#include "fusestep/detail/noise.h"
#include "fusestep/dtype.h"
#include "fusestep/hyper.h"
#include "fusestep/rules/rule.h"

namespace fusestep::detail {

/// Addresses of one tensor.
struct alignas(16) TensorRow {
  void* value;
  void* grad;  // written only by layouts that store it
  void* slot[kMaxSlots];
  void* master;       // float32, null where the layout has none
  std::int64_t size;  // elements
  std::int32_t
      head;  // elements before the first at which all arrays can be read by vectors, or kAllScalar
  DType grad_dtype;

  friend bool operator==(const TensorRow&, const TensorRow&) = default;
};

/// No element of the tensor's arrays lines up with the others: every access is scalar.
inline constexpr std::int32_t kAllScalar = std::numeric_limits<std::int32_t>::max();

/// Elements [index * chunk_size, (index + 1) * chunk_size) of a tensor, as far as they exist.
struct Chunk {
  std::int32_t tensor;
  std::int32_t index;

  friend bool operator==(const Chunk&, const Chunk&) = default;
};

/// What prepare() has to know of one tensor.
struct PrepareRow {
  void* step_tensor;   // float32 or float64 count the caller owns and sees; null: StepState has it
                       // alone
  std::int32_t state;  // index of its StepState
  std::int32_t group;  // index of its HyperRow
  std::int16_t rule;   // position in Rules
  std::int8_t wide;    // the layout's arithmetic is double
  std::int8_t step_is_double;
  std::uint64_t noise_seed;  // of stochastic rounding

  friend bool operator==(const PrepareRow&, const PrepareRow&) = default;
};

/// How far a parameter has come. Lives where the parameter lives and is only changed by prepare().
struct StepState {
  std::int64_t step = 0;           // steps taken
  std::int64_t buffer_filled = 0;  // a step or a load has filled the momentum buffer

  friend bool operator==(const StepState&, const StepState&) = default;
};

/// A group's settings: those of its rule, whichever that is. `lr_source`, if not null, replaces
/// their `lr` when the step runs.
struct HyperRow {
  alignas(8) unsigned char bytes[64];
  const void* lr_source;
  std::int32_t lr_is_double;
  std::int32_t maximize;

  template <class Settings>
  FUSESTEP_HD const Settings& as() const {
    static_assert(sizeof(Settings) <= sizeof(bytes) && std::is_trivially_copyable_v<Settings>);
    return *reinterpret_cast<const Settings*>(bytes);
  }
  template <class Settings>
  FUSESTEP_HD void set(const Settings& settings) {
    static_assert(sizeof(Settings) <= sizeof(bytes) && std::is_trivially_copyable_v<Settings>);
    *reinterpret_cast<Settings*>(bytes) = settings;
  }
};

/// Scalars of one tensor for this step: the machinery's, then the rule's own.
template <class R, class Real>
struct RuleScalars {
  Real grad_multiplier;  // sign of `maximize` * clip coefficient / loss scale
  Real grad_unscale;     // 1 / loss scale: what a stored gradient is multiplied by
  Real clip_value;       // infinite: no clipping by value
  NoiseKey noise;
  typename R::template Scalars<Real> rule;
};

/// Room for the RuleScalars of any rule and type.
struct alignas(16) ScalarRow {
  unsigned char bytes[96];

  template <class Scalars>
  FUSESTEP_HD const Scalars& as() const {
    static_assert(sizeof(Scalars) <= sizeof(bytes) && std::is_trivially_copyable_v<Scalars>);
    return *reinterpret_cast<const Scalars*>(bytes);
  }
  template <class Scalars>
  FUSESTEP_HD void set(const Scalars& scalars) {
    static_assert(sizeof(Scalars) <= sizeof(bytes) && std::is_trivially_copyable_v<Scalars>);
    *reinterpret_cast<Scalars*>(bytes) = scalars;
  }
};

/// A gradient as the rule sees it. NaN stays NaN.
template <class R, class Real>
FUSESTEP_HD Real scaled_and_clipped(const RuleScalars<R, Real>& scalars, Real grad) {
  return clamp(scalars.grad_multiplier * grad, scalars.clip_value);
}

/// Sum of squares of gradients and how many of their elements are not finite.
struct NormSum {
  double squares = 0;
  std::int64_t nonfinite = 0;
};

/// Of one device: what the last step decided, for the launches after it and for whoever asks later.
struct Control {
  std::int32_t skip;  // this step changes nothing
  std::int32_t reserved;
  double grad_norm;        // of the gradients after the multiplier; NaN where no norm was asked for
  std::int64_t nonfinite;  // elements of gradients, where the norm was asked for
  std::int64_t skipped_steps;  // decided here, since the optimizer was made
};

static_assert(std::is_trivially_copyable_v<TensorRow> && std::is_trivially_copyable_v<HyperRow>);

}  // namespace fusestep::detail
