// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The settings of each rule, one by one, with torch's names and in torch's order.
#pragma once

#include <type_traits>

#include "fusestep/hyper.h"

namespace fusestep::detail {

template <class H, class Settings>
inline constexpr bool is_settings = std::is_same_v<std::remove_const_t<H>, Settings>;

/// Calls visit(name, field) for every setting; a field is a double, a bool, or double[2] (betas).
template <class H, class Visit>
void for_each_field(H& hyper, Visit&& visit) {
  visit("lr", hyper.lr);
  if constexpr (is_settings<H, AdamHyper>) {
    visit("betas", hyper.betas);
    visit("eps", hyper.eps);
    visit("weight_decay", hyper.weight_decay);
    visit("amsgrad", hyper.amsgrad);
    visit("maximize", hyper.maximize);
    visit("decoupled_weight_decay", hyper.decoupled_weight_decay);
  } else if constexpr (is_settings<H, SgdHyper>) {
    visit("momentum", hyper.momentum);
    visit("dampening", hyper.dampening);
    visit("weight_decay", hyper.weight_decay);
    visit("nesterov", hyper.nesterov);
    visit("maximize", hyper.maximize);
  } else {
    static_assert(is_settings<H, RmspropHyper>);
    visit("alpha", hyper.alpha);
    visit("eps", hyper.eps);
    visit("weight_decay", hyper.weight_decay);
    visit("momentum", hyper.momentum);
    visit("centered", hyper.centered);
    visit("maximize", hyper.maximize);
  }
}

/// Settings of the rule of this name with its defaults: "Adam", "AdamW", "SGD", "RMSprop".
inline bool default_hyper(std::string_view rule, Hyper& hyper) {
  if (rule == AdamHyper::kRule) {
    hyper = AdamHyper{};
  } else if (rule == "AdamW") {
    hyper = AdamHyper(AdamWHyper{});
  } else if (rule == SgdHyper::kRule) {
    hyper = SgdHyper{};
  } else if (rule == RmspropHyper::kRule) {
    hyper = RmspropHyper{};
  } else {
    return false;
  }
  return true;
}

}  // namespace fusestep::detail
