// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Adam    Kingma & Ba, "Adam: a method for stochastic optimization", 2015
// AdamW   Loshchilov & Hutter, "Decoupled weight decay regularization", 2019
// AMSGrad Reddi, Kale & Kumar, "On the convergence of Adam and beyond", 2018
#pragma once

#include "fusestep/rules/rule.h"

namespace fusestep {

template <bool kAmsgrad>
struct Adam {
  using Hyper = AdamHyper;
  static constexpr std::string_view kName = kAmsgrad ? "adam_amsgrad" : "adam";
  static constexpr int kSlots = kAmsgrad ? 3 : 2;
  static constexpr bool kFillsBuffer = false;
  static constexpr std::string_view kSlotNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  static bool matches(const Hyper& h) { return h.amsgrad == kAmsgrad; }

  template <class Real>
  struct Scalars {
    Real l2;         // weight decay added to the gradient
    Real decay;      // -lr * weight decay, applied to the parameter itself
    Real w1, w2;     // 1 - beta
    Real rsqrt_bc2;  // 1 / sqrt(1 - beta2^t)
    Real eps;
    Real step_size;  // -lr / (1 - beta1^t)
  };

  template <class Real>
  FUSESTEP_HD static Scalars<Real> prepare(const Hyper& h, Progress progress) {
    const double bc1 = 1.0 - detail::power(h.betas[0], progress.step);
    const double bc2 = 1.0 - detail::power(h.betas[1], progress.step);
    const double l2 = h.decoupled_weight_decay ? 0.0 : h.weight_decay;
    const double decay = h.decoupled_weight_decay ? -h.lr * h.weight_decay : 0.0;
    return {Real(l2),
            Real(decay),
            Real(1.0 - h.betas[0]),
            Real(1.0 - h.betas[1]),
            Real(1.0 / detail::sqrt(bc2)),
            Real(h.eps),
            Real(-h.lr / bc1)};
  }

  template <class Real>
  FUSESTEP_HD static void apply(const Scalars<Real>& s, Real& p, Real g, Real* slot) {
    Real& m = slot[0];
    Real& v = slot[1];
    g = s.l2 != 0 ? detail::fma(s.l2, p, g) : g;        // a weight decay of 0 leaves infinite
    p = s.decay != 0 ? detail::fma(s.decay, p, p) : p;  // parameters alone, as in torch
    m = detail::lerp(m, g, s.w1);
    v = detail::lerp_square(v, g, s.w2);
    Real second_moment = v;
    if constexpr (kAmsgrad) second_moment = slot[2] = detail::max_or_nan(slot[2], v);
    const Real denominator = detail::fma(detail::sqrt(second_moment), s.rsqrt_bc2, s.eps);
    p = detail::fma(s.step_size, m / denominator, p);
  }
};

}  // namespace fusestep
