// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Every rule and variant in every layout against reference.h.
//
// The bounds are not chosen: the reference carries, beside each number, the error that the same
// computation in the library's arithmetic can have, one unit roundoff (2^-24 for float32, 2^-53 for
// float64) for each operation and each rounded setting, handed on through the operations that
// follow. kGrouping allows for the library grouping the same operations differently (lerp and fma
// in place of two products and a sum).
#include <gtest/gtest.h>

#include <memory>

#include "support.h"

namespace fusestep::test {
namespace {

constexpr double kGrouping = 4;

struct Tensor {
  Array value, grad;
  Tensor(const LayoutCase& layout, std::int64_t size)
      : value(layout.value, size), grad(layout.grad, size) {}
};

/// One optimizer with one group of tensors of these sizes.
class Training {
 public:
  Training(const RuleCase& rule, const LayoutCase& layout, const std::vector<std::int64_t>& sizes,
           std::uint64_t seed)
      : seed_(seed), layout_(layout) {
    std::vector<Parameter> parameters;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      tensors.push_back(std::make_unique<Tensor>(layout, sizes[i]));
      Tensor& tensor = *tensors.back();
      tensor.value.fill_numbers(hash(seed, 1000 + i));
      names.push_back("p" + std::to_string(i));
      parameters.push_back({names.back(), tensor.value.view(), tensor.grad.view()});
    }
    optimizer.add_group("all", rule.hyper, parameters, layout.options());
  }

  void step() { optimizer.step({.store_unscaled_grads = layout_.stores_grads}); }

  /// Gradients of another step; with float slots also some that are exactly 0 (a second moment that
  /// fp16 cannot hold makes Adam diverge there, in torch as here).
  void new_gradients(int step) {
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      const std::uint64_t seed = hash(seed_, static_cast<std::uint64_t>(step) * 64 + t);
      tensors[t]->grad.fill([&](std::uint64_t i) {
        const bool zero = size_of(layout_.slot) > 2 && hash(seed, i) % 16 == 0;
        return zero ? 0.0 : 0.25 * number(seed, i);
      });
    }
  }

  /// What is stepped: the value, or its master weight where there is one yet.
  double parameter(std::size_t tensor, std::int64_t i) {
    StateRef state = optimizer.state(names[tensor]);
    const std::vector<std::string> slots = state.slot_names();
    if (std::find(slots.begin(), slots.end(), kMasterWeight) == slots.end()) {
      return tensors[tensor]->value.get(i);
    }
    return read_element(state.slot(kMasterWeight).data, DType::kFloat32, i);
  }

  Optimizer optimizer;
  std::vector<std::unique_ptr<Tensor>> tensors;
  std::vector<std::string> names;

 private:
  std::uint64_t seed_;
  LayoutCase layout_;
};

template <class Wide>
void set_arithmetic(DType value) {
  const bool wide = value == DType::kFloat64;
  Bounded<Wide>::unit = wide ? Wide(0x1p-53) : Wide(0x1p-24);
  Bounded<Wide>::smallest = wide ? Wide(4.9e-324) : Wide(0x1p-149);
}

/// `stochastic`: 16-bit types are stored as either neighbour.
template <class Wide>
::testing::AssertionResult within(DType dtype, double actual, const Bounded<Wide>& expected,
                                  bool stochastic = false) {
  stochastic = stochastic && size_of(dtype) == 2;
  const Wide room = Wide(kGrouping) * expected.error;
  const auto lowest = static_cast<double>(expected.value - room);
  const auto highest = static_cast<double>(expected.value + room);
  // Rounding is monotonic: what is inside the bounds is inside the rounded bounds once stored.
  const double low = stochastic ? rounded_down(dtype, lowest) : rounded_to(dtype, lowest);
  const double high = stochastic ? -rounded_down(dtype, -highest) : rounded_to(dtype, highest);
  if (low <= actual && actual <= high) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "got " << std::hexfloat << actual << ", expected [" << low << ", " << high << "]";
}

/// Each step from the state the library is in: a bound of a few units in the last place.
template <class Wide>
void check_single_steps(const RuleCase& rule, const LayoutCase& layout,
                        const std::vector<std::int64_t>& sizes, int steps, std::uint64_t seed) {
  using N = Bounded<Wide>;
  set_arithmetic<Wide>(layout.value);
  const bool stochastic = layout.rounding == Rounding::kStochastic;
  Training training(rule, layout, sizes, seed);
  std::vector<std::vector<ReferenceState<N>>> states;
  std::vector<std::vector<N>> values;
  for (const auto& tensor : training.tensors) {
    states.emplace_back(static_cast<std::size_t>(tensor->value.size()));
    values.emplace_back(static_cast<std::size_t>(tensor->value.size()));
  }
  for (int step = 1; step <= steps; ++step) {
    training.new_gradients(step);
    for (std::size_t t = 0; t < sizes.size(); ++t) {
      StateRef state = training.optimizer.state(training.names[t]);
      for (const std::string& name : state.slot_names()) {
        if (name == kMasterWeight) continue;
        const TensorView slot = state.slot(name);
        for (std::size_t i = 0; i < states[t].size(); ++i) {
          states[t][i].slot(name) = {
              Wide(read_element(slot.data, slot.dtype, static_cast<std::int64_t>(i)))};
        }
      }
      for (std::size_t i = 0; i < values[t].size(); ++i) {
        const auto at = static_cast<std::int64_t>(i);
        values[t][i] = {Wide(training.parameter(t, at))};
        const N grad{Wide(training.tensors[t]->grad.get(at))};
        std::visit(
            [&](const auto& hyper) {
              reference_step<Wide>(hyper, values[t][i], grad, states[t][i], step, step == 1);
            },
            rule.hyper);
      }
    }
    training.step();
    for (std::size_t t = 0; t < sizes.size(); ++t) {
      StateRef state = training.optimizer.state(training.names[t]);
      ASSERT_EQ(state.step(), step);
      ASSERT_TRUE(training.tensors[t]->value.guards_intact());
      const std::vector<std::string> slot_names = state.slot_names();
      for (std::size_t i = 0; i < values[t].size(); ++i) {
        const auto at = static_cast<std::int64_t>(i);
        const double value = training.tensors[t]->value.get(at);
        const double parameter = training.parameter(t, at);
        ASSERT_TRUE(within(layout.master ? DType::kFloat32 : layout.value, parameter, values[t][i],
                           stochastic))
            << "step " << step << ", parameter of " << sizes[t] << " elements, element " << i;
        if (layout.master) {
          ASSERT_EQ(value, rounded_to(layout.value, parameter));
        }
        for (const std::string& name : slot_names) {
          if (name == kMasterWeight) continue;
          const TensorView slot = state.slot(name);
          ASSERT_EQ(slot.dtype, layout.slot);
          ASSERT_TRUE(within(slot.dtype, read_element(slot.data, slot.dtype, at),
                             states[t][i].slot(name), stochastic))
              << "step " << step << ", slot " << name << " of " << sizes[t] << " elements, element "
              << i;
        }
      }
    }
  }
}

/// Both run on by themselves. The bound grows with the steps and stays far below what the
/// parameters move.
template <class Wide>
void check_long_run(const RuleCase& rule, const LayoutCase& layout,
                    const std::vector<std::int64_t>& sizes, int steps, std::uint64_t seed) {
  using N = Bounded<Wide>;
  set_arithmetic<Wide>(layout.value);
  Training training(rule, layout, sizes, seed);
  std::vector<std::vector<ReferenceState<N>>> states;
  std::vector<std::vector<N>> values;
  for (const auto& tensor : training.tensors) {
    states.emplace_back(static_cast<std::size_t>(tensor->value.size()));
    values.emplace_back();
    for (std::int64_t i = 0; i < tensor->value.size(); ++i) {
      values.back().push_back({Wide(tensor->value.get(i))});
    }
  }
  for (int step = 1; step <= steps; ++step) {
    training.new_gradients(step);
    training.optimizer.step();
    for (std::size_t t = 0; t < sizes.size(); ++t) {
      for (std::size_t i = 0; i < values[t].size(); ++i) {
        const N grad{Wide(training.tensors[t]->grad.get(static_cast<std::int64_t>(i)))};
        std::visit(
            [&](const auto& hyper) {
              reference_step<Wide>(hyper, values[t][i], grad, states[t][i], step, step == 1);
            },
            rule.hyper);
      }
    }
  }
  for (std::size_t t = 0; t < sizes.size(); ++t) {
    for (std::size_t i = 0; i < values[t].size(); ++i) {
      // A bound as wide as the numbers would accept everything.
      ASSERT_LT(values[t][i].error, layout.value == DType::kFloat64 ? 1e-10 : 0.05);
      const double value = training.tensors[t]->value.get(static_cast<std::int64_t>(i));
      ASSERT_TRUE(within(layout.value, value, values[t][i]))
          << "parameter of " << sizes[t] << " elements, element " << i;
    }
  }
}

class EveryRule : public ::testing::TestWithParam<std::tuple<RuleCase, LayoutCase>> {
 protected:
  const RuleCase& rule() const { return std::get<0>(GetParam()); }
  const LayoutCase& layout() const { return std::get<1>(GetParam()); }

  void single_steps(const std::vector<std::int64_t>& sizes, int steps) {
    const std::uint64_t seed = fnv(rule().name + layout().name);
    SCOPED_TRACE("seed " + std::to_string(seed));
    if (layout().value == DType::kFloat64) {
      check_single_steps<long double>(rule(), layout(), sizes, steps, seed);
    } else {
      check_single_steps<double>(rule(), layout(), sizes, steps, seed);
    }
  }
};

TEST_P(EveryRule, ShortRun) { single_steps({0, 1, 7, 8, 15, 16, 17, 33}, 20); }

TEST_P(EveryRule, LongRunOneStepAtATime) {
  single_steps({0, 1, 7, 8, 15, 16, 17}, repetitions(size_of(layout().value) == 2 ? 200 : 1000));
}

/// Around the blocks of the norm and over several chunks.
TEST_P(EveryRule, LargeTensors) { single_steps({4095, 4096, 4097, 150'001}, 2); }

TEST_P(EveryRule, ThousandStepsFreely) {
  // In 16-bit storage one rounding the other way is a different run: LongRunOneStepAtATime.
  if (size_of(layout().value) == 2 || size_of(layout().slot) == 2) return;
  const std::uint64_t seed = fnv(rule().name + layout().name) + 1;
  SCOPED_TRACE("seed " + std::to_string(seed));
  if (layout().value == DType::kFloat64) {
    check_long_run<long double>(rule(), layout(), {1, 17, 8}, repetitions(1000), seed);
  } else {
    check_long_run<double>(rule(), layout(), {1, 17, 8}, repetitions(1000), seed);
  }
}

/// One setting per kernel in the layouts that torch does not have.
class EveryLayout : public EveryRule {};

TEST_P(EveryLayout, ShortRun) { single_steps({0, 1, 7, 8, 15, 16, 17, 33}, 20); }

TEST_P(EveryLayout, LargeTensors) { single_steps({4097, 70'001}, 2); }

INSTANTIATE_TEST_SUITE_P(Layouts, EveryLayout,
                         ::testing::Combine(::testing::ValuesIn(variant_cases()),
                                            ::testing::ValuesIn(further_layout_cases())),
                         [](const auto& info) {
                           return std::get<0>(info.param).name + "_" + std::get<1>(info.param).name;
                         });

INSTANTIATE_TEST_SUITE_P(Rules, EveryRule,
                         ::testing::Combine(::testing::ValuesIn(rule_cases()),
                                            ::testing::ValuesIn(kLayoutCases)),
                         [](const auto& info) {
                           return std::get<0>(info.param).name + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace fusestep::test
