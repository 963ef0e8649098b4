// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// RMSprop   Hinton, "Neural networks for machine learning", lecture 6e, 2012
// centered  Graves, "Generating sequences with recurrent neural networks", 2013
#pragma once

#include "fusestep/rules/rule.h"

namespace fusestep {

template <bool kMomentum, bool kCentered>
struct Rmsprop {
  using Hyper = RmspropHyper;
  static constexpr std::string_view kName =
      kMomentum ? (kCentered ? "rmsprop_momentum_centered" : "rmsprop_momentum")
                : (kCentered ? "rmsprop_centered" : "rmsprop");
  static constexpr int kSlots = 1 + kMomentum + kCentered;
  static constexpr bool kFillsBuffer = false;
  static constexpr std::string_view kSlotNames[] = {
      "square_avg", kMomentum ? "momentum_buffer" : "grad_avg", "grad_avg"};

  static bool matches(const Hyper& h) {
    return (h.momentum > 0) == kMomentum && h.centered == kCentered;
  }

  template <class Real>
  struct Scalars {
    Real l2;
    Real w;  // 1 - alpha
    Real eps;
    Real momentum;
    Real step_size;  // -lr
  };

  template <class Real>
  FUSESTEP_HD static Scalars<Real> prepare(const Hyper& h, Progress) {
    return {Real(h.weight_decay), Real(1.0 - h.alpha), Real(h.eps), Real(h.momentum), Real(-h.lr)};
  }

  template <class Real>
  FUSESTEP_HD static void apply(const Scalars<Real>& s, Real& p, Real g, Real* slot) {
    g = s.l2 != 0 ? detail::fma(s.l2, p, g) : g;
    Real& mean_square = slot[0];
    mean_square = detail::lerp_square(mean_square, g, s.w);
    Real variance = mean_square;
    if constexpr (kCentered) {
      Real& mean = slot[kSlots - 1];
      mean = detail::lerp(mean, g, s.w);
      variance = detail::fma(-mean, mean, variance);
      // Rounding can make it negative, where torch's root is NaN; a NaN stays one.
      variance = variance < 0 ? Real(0) : variance;
    }
    Real update = g / (detail::sqrt(variance) + s.eps);
    if constexpr (kMomentum) update = slot[1] = detail::fma(s.momentum, slot[1], update);
    p = detail::fma(s.step_size, update, p);
  }
};

}  // namespace fusestep
