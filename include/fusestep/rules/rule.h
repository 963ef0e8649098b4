// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What a rule must offer.
//
// A rule is the mathematics of one optimizer for one element, written once, for host and device. It
// knows no dtype of memory, no thread, no launch, no clipping and no loss scale: the machinery
// around it (csrc/cpu, kernels/) loads, multiplies the gradient, calls apply() and stores.
#pragma once

#include <concepts>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "fusestep/detail/host_device.h"
#include "fusestep/hyper.h"

namespace fusestep {

/// How far one parameter has come when prepare() is called.
struct Progress {
  std::int64_t step;  ///< steps of this parameter, this one included: 1, 2, ...
  bool first;         ///< no step has filled this parameter's momentum buffer yet
};

/// The most slots a rule may have; a row of the tensor table has room for so many addresses.
inline constexpr int kMaxSlots = 3;

/// `Scalars<Real>` is what apply() needs: numbers of the layout's arithmetic type, computed by
/// prepare() in double once per tensor and step. `slot` has `kSlots` elements, in the order of
/// `kSlotNames`; `kFillsBuffer` says that a step fills the momentum buffer Progress::first speaks
/// of. `matches(hyper)` says whether a group with these settings uses this variant.
template <class R>
concept Rule = requires(const typename R::Hyper& hyper, Progress progress, float p, float g,
                        float* slot, const typename R::template Scalars<float>& scalars) {
  { R::kSlots } -> std::convertible_to<int>;
  { R::kFillsBuffer } -> std::convertible_to<bool>;
  { R::kName } -> std::convertible_to<std::string_view>;
  { R::kSlotNames[0] } -> std::convertible_to<std::string_view>;
  { R::matches(hyper) } -> std::same_as<bool>;
  {
    R::template prepare<float>(hyper, progress)
    } -> std::same_as<typename R::template Scalars<float>>;
  { R::template apply<float>(scalars, p, g, slot) } -> std::same_as<void>;
}
&&R::kSlots <= kMaxSlots;

}  // namespace fusestep
