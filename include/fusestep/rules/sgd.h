// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// SGD with momentum and Nesterov momentum, in torch's variant (the learning rate is applied after
// the momentum): Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and
// momentum in deep learning", 2013
#pragma once

#include "fusestep/rules/rule.h"

namespace fusestep {

template <bool kMomentum>
struct Sgd {
  using Hyper = SgdHyper;
  static constexpr std::string_view kName = kMomentum ? "sgd_momentum" : "sgd";
  static constexpr int kSlots = kMomentum ? 1 : 0;
  static constexpr bool kFillsBuffer = kMomentum;
  static constexpr std::string_view kSlotNames[] = {"momentum_buffer"};

  static bool matches(const Hyper& h) { return (h.momentum != 0) == kMomentum; }

  template <class Real>
  struct Scalars {
    Real l2;
    Real momentum;
    Real gradient_weight;  // 1 - dampening
    Real nesterov;         // the momentum again, or 0
    Real step_size;        // -lr
    Real first;            // not 0: the buffer holds nothing yet
  };

  template <class Real>
  FUSESTEP_HD static Scalars<Real> prepare(const Hyper& h, Progress progress) {
    return {Real(h.weight_decay),
            Real(h.momentum),
            Real(1.0 - h.dampening),
            Real(h.nesterov ? h.momentum : 0.0),
            Real(-h.lr),
            Real(progress.first ? 1.0 : 0.0)};
  }

  template <class Real>
  FUSESTEP_HD static void apply(const Scalars<Real>& s, Real& p, Real g, Real* slot) {
    g = s.l2 != 0 ? detail::fma(s.l2, p, g) : g;
    if constexpr (kMomentum) {
      Real& b = slot[0];
      // A select, never a product with 0: an unused buffer may hold anything.
      b = s.first != 0 ? g : detail::fma(s.momentum, b, s.gradient_weight * g);
      g = s.nesterov != 0 ? detail::fma(s.nesterov, b, g) : b;
    }
    p = detail::fma(s.step_size, g, p);
  }
};

}  // namespace fusestep
