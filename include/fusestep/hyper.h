// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Hyperparameters: torch.optim's names, defaults and limits, all in double.
#pragma once

#include <string>
#include <string_view>
#include <variant>

#include "fusestep/export.h"

namespace fusestep {

/// torch.optim.Adam. With `decoupled_weight_decay` it is AdamW, with `amsgrad` AMSGrad.
struct AdamHyper {
  static constexpr std::string_view kRule = "Adam";

  double lr = 1e-3;
  double betas[2] = {0.9, 0.999};
  double eps = 1e-8;
  double weight_decay = 0;
  bool amsgrad = false;
  bool maximize = false;
  bool decoupled_weight_decay = false;

  friend bool operator==(const AdamHyper&, const AdamHyper&) = default;
};

/// torch.optim.AdamW: an AdamHyper with AdamW's own defaults.
struct AdamWHyper {
  double lr = 1e-3;
  double betas[2] = {0.9, 0.999};
  double eps = 1e-8;
  double weight_decay = 1e-2;
  bool amsgrad = false;
  bool maximize = false;

  operator AdamHyper() const {
    return {lr, {betas[0], betas[1]}, eps, weight_decay, amsgrad, maximize, true};
  }
};

/// torch.optim.SGD.
struct SgdHyper {
  static constexpr std::string_view kRule = "SGD";

  double lr = 1e-3;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  bool nesterov = false;
  bool maximize = false;

  friend bool operator==(const SgdHyper&, const SgdHyper&) = default;
};

/// torch.optim.RMSprop.
struct RmspropHyper {
  static constexpr std::string_view kRule = "RMSprop";

  double lr = 1e-2;
  double alpha = 0.99;
  double eps = 1e-8;
  double weight_decay = 0;
  double momentum = 0;
  bool centered = false;
  bool maximize = false;

  friend bool operator==(const RmspropHyper&, const RmspropHyper&) = default;
};

using Hyper = std::variant<AdamHyper, SgdHyper, RmspropHyper>;

/// Throws InvalidArgument for what torch.optim refuses; the text starts with `where`, for example
/// "group 'head'", and names field and value.
FUSESTEP_API void validate(const Hyper& hyper, const std::string& where);

/// The learning rate of any rule.
inline double learning_rate(const Hyper& hyper) {
  return std::visit([](const auto& h) { return h.lr; }, hyper);
}

/// "Adam", "SGD", "RMSprop".
inline std::string_view rule_name(const Hyper& hyper) {
  return std::visit([](const auto& h) { return h.kRule; }, hyper);
}

}  // namespace fusestep
