// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// torch.optim's limits on hyperparameters.
#include "fusestep/hyper.h"

#include <charconv>

#include "fusestep/error.h"

namespace fusestep {
namespace {

/// The shortest text that reads back as the same double.
std::string shortest(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  return {text, end};
}

/// Fields of one group. Comparisons are written so that NaN is refused.
struct Checker {
  const std::string& where;

  void require(bool holds, std::string_view field, std::string_view limit, double value) const {
    if (holds) return;
    throw InvalidArgument(where + ": " + std::string(field) + " must be " + std::string(limit) +
                          ", got " + shortest(value));
  }
  void at_least_zero(std::string_view field, double value) const {
    require(value >= 0, field, ">= 0", value);
  }
  void decay_rate(std::string_view field, double value) const {
    require(value >= 0 && value < 1, field, "in [0, 1)", value);
  }

  void operator()(const AdamHyper& h) const {
    at_least_zero("lr", h.lr);
    at_least_zero("eps", h.eps);
    decay_rate("betas[0]", h.betas[0]);
    decay_rate("betas[1]", h.betas[1]);
    at_least_zero("weight_decay", h.weight_decay);
  }
  void operator()(const SgdHyper& h) const {
    at_least_zero("lr", h.lr);
    at_least_zero("momentum", h.momentum);
    at_least_zero("weight_decay", h.weight_decay);
    if (!h.nesterov) return;
    require(h.momentum > 0, "momentum", "> 0 with nesterov", h.momentum);
    require(h.dampening == 0, "dampening", "0 with nesterov", h.dampening);
  }
  void operator()(const RmspropHyper& h) const {
    at_least_zero("lr", h.lr);
    at_least_zero("eps", h.eps);
    at_least_zero("momentum", h.momentum);
    at_least_zero("weight_decay", h.weight_decay);
    at_least_zero("alpha", h.alpha);
  }
};

}  // namespace

void validate(const Hyper& hyper, const std::string& where) { std::visit(Checker{where}, hyper); }

}  // namespace fusestep
