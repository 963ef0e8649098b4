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
  /// Every setting with torch's dtypes, with the others one per kernel.
  static std::vector<RuleCase> cases() {
    const auto is_this = [](const LayoutCase& layout) { return layout.name == GetParam().name; };
    const bool common = std::any_of(std::begin(kLayoutCases), std::end(kLayoutCases), is_this);
    return common ? rule_cases() : variant_cases();
  }
  /// Heads and tails are cut by the same code in all of them.
  static std::vector<RuleCase> kernels() {
    const std::vector<RuleCase> variants = variant_cases();
    if (cases().size() > variants.size()) return variants;
    return {variants[1], variants[3]};  // three slots and one
  }
  static std::uint64_t steps() { return cases().size() > variant_cases().size() ? 200 : 50; }

  /// One group per rule variant and setting.
  static std::vector<GroupSpec> groups(const std::vector<TensorSpec>& tensors) {
    std::vector<GroupSpec> all;
    for (const RuleCase& rule : cases()) {
      all.push_back({rule.name, rule.hyper, GetParam(), tensors});
    }
    return all;
  }
};

TEST_P(Bits, StayEqualOverManySteps) {
  FUSESTEP_NEED_DEVICES(1);
  Twins twins(groups({{1}, {9}, {517}, {2051, 3, 3}}));
  const std::vector<double> pool = ordinary_pool();
  for (std::uint64_t step = 1; step <= steps(); ++step) {
    twins.fill_grads(pool, step);
    twins.step({.store_unscaled_grads = GetParam().stores_grads});
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
    twins.step({.grad_multiplier = step % 2 == 0 ? 1.0 : 0.37,
                .store_unscaled_grads = GetParam().stores_grads,
                .clip_value = step > 3 ? 0.2 : HUGE_VAL});
    twins.expect_equal("step " + std::to_string(step));
    if (HasFatalFailure()) return;
  }
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
  for (const RuleCase& variant : kernels()) {
    Twins twins({{variant.name, variant.hyper, GetParam(), tensors}});
    const std::vector<double> pool = ordinary_pool();
    for (std::uint64_t step = 1; step <= 2; ++step) {
      twins.fill_grads(pool, step);
      twins.step({.store_unscaled_grads = GetParam().stores_grads});
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
  for (const RuleCase& variant : kernels()) {
    Twins twins({{variant.name, variant.hyper, GetParam(), tensors}});
    const std::vector<double> pool = ordinary_pool();
    for (std::uint64_t step = 1; step <= 2; ++step) {
      twins.fill_grads(pool, step);
      twins.step({.store_unscaled_grads = GetParam().stores_grads});
    }
    twins.expect_equal_memory(variant.name);
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Bits, testing::ValuesIn(all_layout_cases()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace fusestep::test
