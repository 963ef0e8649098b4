// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend gives the bits of the CPU: every rule, layout, size and alignment.
#include <gtest/gtest.h>

#include "twins.h"

namespace fusestep::test {
namespace {

class Bits : public testing::TestWithParam<LayoutCase> {
 protected:
  /// One group per rule variant and setting.
  static std::vector<GroupSpec> groups(const std::vector<TensorSpec>& tensors) {
    std::vector<GroupSpec> all;
    for (const RuleCase& rule : rule_cases()) {
      all.push_back({rule.name, rule.hyper, GetParam(), tensors});
    }
    return all;
  }
};

TEST_P(Bits, StayEqualOver200Steps) {
  FUSESTEP_NEED_DEVICES(1);
  Twins twins(groups({{1}, {9}, {517}, {2051, 3, 3}}));
  const std::vector<double> pool = ordinary_pool();
  for (std::uint64_t step = 1; step <= 200; ++step) {
    twins.fill_grads(pool, step);
    twins.step();
    if (step % 50 == 0) twins.expect_equal_values("step " + std::to_string(step));
    if (HasFatalFailure()) return;
  }
  twins.expect_equal("at the end");
}

TEST_P(Bits, StayEqualForSpecialValues) {
  FUSESTEP_NEED_DEVICES(1);
  Twins twins(groups({{517}, {4099, 1, 1}}));
  const std::vector<double> pool = special_pool(GetParam().value);
  for (std::uint64_t step = 1; step <= 6; ++step) {
    twins.fill_grads(pool, step);
    twins.step({.grad_multiplier = step % 2 == 0 ? 1.0 : 0.37});
    twins.expect_equal("step " + std::to_string(step));
    if (HasFatalFailure()) return;
  }
}

/// One setting per rule variant: the kernels.
std::vector<RuleCase> variants() {
  return {{"adam", AdamWHyper{}},
          {"amsgrad", AdamHyper{.weight_decay = 1e-2, .amsgrad = true}},
          {"sgd", SgdHyper{}},
          {"sgd_momentum", SgdHyper{.momentum = 0.9, .nesterov = true}},
          {"rmsprop", RmspropHyper{}},
          {"rmsprop_momentum", RmspropHyper{.momentum = 0.9}},
          {"rmsprop_centered", RmspropHyper{.centered = true}},
          {"rmsprop_both", RmspropHyper{.momentum = 0.9, .centered = true}}};
}

constexpr std::int64_t kSmallSizes[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33};
constexpr std::int64_t kLargeSizes[] = {
    511,  512,     513,  2047, 2049, 4 * 511,      4 * 513,  4095,  4096,
    4097, 8 * 513, 8191, 8192, 8193, 2 * 4096 + 3, 16 * 513, 16383, 2 * 8192 + 3};

TEST_P(Bits, StayEqualForEverySizeAndSharedMisalignment) {
  FUSESTEP_NEED_DEVICES(1);
  std::vector<TensorSpec> tensors;
  for (int offset = 0; offset < 16; ++offset) {
    for (const std::int64_t size : kSmallSizes) {
      tensors.push_back({size, offset, offset, {offset, offset, offset}, true});
    }
  }
  for (std::size_t i = 0; i < std::size(kLargeSizes); ++i) {
    for (const int offset : {0, static_cast<int>(i * 5 + 1) % 16}) {
      tensors.push_back({kLargeSizes[i], offset, offset, {offset, offset, offset}, true});
    }
  }
  for (const RuleCase& variant : variants()) {
    Twins twins({{variant.name, variant.hyper, GetParam(), tensors}});
    const std::vector<double> pool = ordinary_pool();
    for (std::uint64_t step = 1; step <= 2; ++step) {
      twins.fill_grads(pool, step);
      twins.step();
    }
    twins.expect_equal_memory(variant.name);
    if (HasFatalFailure()) return;
  }
}

TEST_P(Bits, StayEqualForMisalignmentsThatDiffer) {
  FUSESTEP_NEED_DEVICES(1);
  std::vector<TensorSpec> tensors;
  for (std::uint64_t i = 0; i < 160; ++i) {
    const auto offset = [&](std::uint64_t of) { return static_cast<int>(hash(of, i) % 16); };
    const std::int64_t size = i % 8 == 0 ? kLargeSizes[i / 8 % std::size(kLargeSizes)]
                                         : static_cast<std::int64_t>(hash(9, i) % 100);
    tensors.push_back({size, offset(1), offset(2), {offset(3), offset(4), offset(5)}, true});
  }
  for (const RuleCase& variant : variants()) {
    Twins twins({{variant.name, variant.hyper, GetParam(), tensors}});
    const std::vector<double> pool = ordinary_pool();
    for (std::uint64_t step = 1; step <= 2; ++step) {
      twins.fill_grads(pool, step);
      twins.step();
    }
    twins.expect_equal_memory(variant.name);
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Bits, testing::ValuesIn(kLayoutCases),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace fusestep::test
