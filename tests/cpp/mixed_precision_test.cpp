// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Master weights, dtypes of gradients and slots, stochastic rounding, the loss scale, clipping by
// value. That every layout computes what it should is in rules_test.cpp and bits_test.cpp.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <memory>

#include "fusestep/detail/noise.h"
#include "support.h"

namespace fusestep::test {
namespace {

using ::testing::HasSubstr;

struct Tensor {
  Array value, grad;
  Tensor(DType value_dtype, DType grad_dtype, std::int64_t size, std::uint64_t seed = 1)
      : value(value_dtype, size), grad(grad_dtype, size) {
    value.fill_numbers(seed);
    new_gradient(seed);
  }
  void new_gradient(std::uint64_t step) { grad.fill_numbers(hash(step, 1'000'000)); }
  Parameter as(std::string name) { return {std::move(name), value.view(), grad.view()}; }
};

constexpr DType kF32 = DType::kFloat32, kF64 = DType::kFloat64, kBf16 = DType::kBFloat16,
                kF16 = DType::kFloat16;

template <class F>
std::string message_of(F&& work) {
  try {
    work();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no InvalidArgument";
}

// --- master weights ---------------------------------------------------------------------------

/// With equal gradients the master weights are the parameters of a float32 run, bit for bit.
TEST(MasterWeights, StepAsFloat32ParametersDo) {
  for (const RuleCase& rule : rule_cases()) {
    for (const DType dtype : {kBf16, kF16}) {
      for (const DType grad : {dtype, kF32}) {
        SCOPED_TRACE(rule.name + " " + std::string(name_of(dtype)) + " " +
                     std::string(name_of(grad)));
        Tensor half(dtype, grad, 301), single(kF32, kF32, 301);
        single.value.fill(
            [&](std::uint64_t i) { return half.value.get(static_cast<std::int64_t>(i)); });
        Optimizer with_master, reference;
        with_master.add_group("g", rule.hyper, {half.as("p")}, {.master_weights = true});
        reference.add_group("g", rule.hyper, {single.as("p")});
        for (std::uint64_t step = 1; step <= 20; ++step) {
          half.new_gradient(step);
          single.grad.fill(
              [&](std::uint64_t i) { return half.grad.get(static_cast<std::int64_t>(i)); });
          with_master.step();
          reference.step();
        }
        StateRef state = with_master.state("p"), expected = reference.state("p");
        EXPECT_TRUE(canonical(state.slot(kMasterWeight)) == canonical(single.value));
        for (const std::string& slot : expected.slot_names()) {
          EXPECT_TRUE(canonical(state.slot(slot)) == canonical(expected.slot(slot))) << slot;
        }
        for (std::int64_t i = 0; i < half.value.size(); ++i) {
          ASSERT_EQ(half.value.get(i), rounded_to(dtype, single.value.get(i)));
        }
      }
    }
  }
}

TEST(MasterWeights, StartFromTheParameterAtItsFirstStep) {
  Tensor tensor(kBf16, kBf16, 1000);
  Optimizer optimizer;
  optimizer.add_group("g", SgdHyper{.lr = 0.5}, {{"p", tensor.value.view()}},
                      {.master_weights = true});
  optimizer.step();  // without a gradient there is no step
  EXPECT_TRUE(optimizer.state("p").slot_names().empty());
  tensor.value.fill([](std::uint64_t i) { return i % 2 == 0 ? 1.5 : -3.25; });  // loaded now
  tensor.grad.fill([](std::uint64_t) { return 0x1p-20; });
  optimizer.parameter("p").set_grad(tensor.grad.view());
  const std::string before = canonical(tensor.value);
  optimizer.step();
  EXPECT_TRUE(canonical(tensor.value) == before);  // the step is lost in the parameter,
  const TensorView master = optimizer.state("p").slot(kMasterWeight);
  for (std::int64_t i = 0; i < 1000; ++i) {  // and kept in the master weight
    ASSERT_EQ(read_element(master.data, kF32, i), tensor.value.get(i) - 0x1p-21);
  }
  EXPECT_EQ(optimizer.memory_report().at("master_weight"), 4000u);
}

TEST(MasterWeights, ReplaceWhatIsWrittenToParametersUnlessRefreshed) {
  Tensor tensor(kF16, kF16, 10);
  Optimizer optimizer;
  optimizer.add_group("g", SgdHyper{.lr = 0.25}, {tensor.as("p")}, {.master_weights = true});
  tensor.grad.fill([](std::uint64_t) { return 0.0; });
  optimizer.step();
  const std::string before = canonical(tensor.value);
  tensor.value.fill([](std::uint64_t) { return 3.0; });
  optimizer.step();
  EXPECT_TRUE(canonical(tensor.value) == before);
  tensor.value.fill([](std::uint64_t) { return 3.0; });
  optimizer.refresh_master_weights();
  optimizer.step();
  EXPECT_EQ(tensor.value.get(7), 3.0);
}

/// The host does not know of a step that is skipped when it runs.
TEST(MasterWeights, AreMadeByTheFirstStepThatTheHostDoesNotSkip) {
  float one = 1;
  for (const bool by_host : {false, true}) {
    Tensor tensor(kF16, kF16, 10);
    tensor.value.fill([](std::uint64_t) { return 1.0; });
    tensor.grad.fill([](std::uint64_t) { return 0.0; });
    Optimizer optimizer;
    optimizer.add_group("g", SgdHyper{.lr = 0.25}, {tensor.as("p")}, {.master_weights = true});
    optimizer.step(by_host ? StepOptions{.skip = true}
                           : StepOptions{.skip_source = view(&one, {})});
    tensor.value.fill([](std::uint64_t) { return 3.0; });
    optimizer.step();
    EXPECT_EQ(tensor.value.get(7), by_host ? 3.0 : 1.0);
  }
}

/// Only 16-bit parameters have them.
TEST(MasterWeights, OfMixedGroups) {
  Tensor half(kBf16, kBf16, 5), single(kF32, kF32, 5), wide(kF64, kF64, 5);
  Optimizer optimizer;
  optimizer.add_group("g", SgdHyper{}, {half.as("h"), single.as("s"), wide.as("w")},
                      {.master_weights = true});
  optimizer.step();
  EXPECT_EQ(optimizer.state("h").slot_names(), std::vector<std::string>{"master_weight"});
  EXPECT_TRUE(optimizer.state("s").slot_names().empty());
  EXPECT_TRUE(optimizer.state("w").slot_names().empty());
}

/// A resumed run goes on with all bits, and a checkpoint without them starts them anew.
TEST(MasterWeights, AreSavedAndLoaded) {
  const auto run = [](Optimizer& optimizer, Tensor& tensor, std::uint64_t from, std::uint64_t to) {
    for (std::uint64_t step = from; step < to; ++step) {
      tensor.new_gradient(step);
      optimizer.step();
    }
  };
  const GroupOptions options{SlotDType::kLikeParameter, true};
  Tensor whole(kBf16, kBf16, 501), first(kBf16, kBf16, 501), second(kBf16, kBf16, 501, 2);
  Optimizer uninterrupted, before, after;
  uninterrupted.add_group("g", AdamWHyper{.lr = 1e-3}, {whole.as("p")}, options);
  before.add_group("g", AdamWHyper{.lr = 1e-3}, {first.as("p")}, options);
  after.add_group("g", AdamWHyper{.lr = 1e-3}, {second.as("p")}, options);
  run(uninterrupted, whole, 0, 20);
  run(before, first, 0, 10);
  second.value.fill([&](std::uint64_t i) { return first.value.get(static_cast<std::int64_t>(i)); });
  after.load_state_dict(before.state_dict());
  run(after, second, 10, 20);
  EXPECT_TRUE(snapshot(after) == snapshot(uninterrupted));

  Tensor plain(kBf16, kBf16, 501);
  Optimizer without;
  without.add_group("g", AdamWHyper{.lr = 1e-3}, {plain.as("p")},
                    {SlotDType::kLikeParameter, false});
  run(without, plain, 0, 3);
  EXPECT_TRUE(after.load(without.state_dict()).complete());
  second.grad.fill([](std::uint64_t) { return 0.0; });
  std::get<AdamHyper>(after.group("g").hyper());
  AdamHyper still = std::get<AdamHyper>(after.group("g").hyper());
  still.lr = 0;
  after.group("g").set_hyper(still);
  const std::string values = canonical(second.value);
  after.step();
  EXPECT_TRUE(canonical(second.value) == values);  // made of the values, not what it was before

  EXPECT_THROW(without.load(uninterrupted.state_dict()), LoadError);  // it has nowhere to go
}

// --- gradients --------------------------------------------------------------------------------

TEST(Gradients, MayChangeTheirDtypeBetweenSteps) {
  Tensor tensor(kBf16, kBf16, 100);
  Array single(kF32, 100);
  single.fill([&](std::uint64_t i) { return tensor.grad.get(static_cast<std::int64_t>(i)); });
  Tensor control(kBf16, kBf16, 100);
  Optimizer optimizer, expected;
  optimizer.add_group("g", AdamHyper{}, {tensor.as("p")});
  expected.add_group("g", AdamHyper{}, {control.as("p")});
  for (int step = 0; step < 4; ++step) {
    optimizer.parameter("p").set_grad(step % 2 == 0 ? single.view() : tensor.grad.view());
    optimizer.step();
    expected.step();
  }
  EXPECT_TRUE(snapshot(optimizer) == snapshot(expected));
}

TEST(Gradients, OfOtherDtypesAreRefused) {
  struct Case {
    DType value, grad;
    const char* message;
  };
  for (const Case& c : {Case{kF32, kBf16, "gradient has dtype bfloat16, expected float32"},
                        Case{kF64, kF32, "gradient has dtype float32, expected float64"},
                        Case{kBf16, kF16, "gradient has dtype float16, expected bfloat16"}}) {
    Tensor tensor(c.value, c.grad, 3);
    Optimizer optimizer;
    EXPECT_THAT(message_of([&] { optimizer.add_group("g", SgdHyper{}, {tensor.as("p")}); }),
                HasSubstr(c.message));
    optimizer.add_group("g", SgdHyper{}, {{"p", tensor.value.view()}});
    EXPECT_THAT(message_of([&] { optimizer.parameter("p").set_grad(tensor.grad.view()); }),
                HasSubstr(c.message));
  }
}

TEST(Layouts, ThatAreNotInTheTableAreRefusedWithTheTable) {
  struct Case {
    DType value;
    GroupOptions options;
    const char* message;
  };
  for (const Case& c :
       {Case{kF64, {SlotDType::kBFloat16}, "float64 with gradients of float64, slots of bfloat16;"},
        Case{kF16, {SlotDType::kBFloat16}, "float16 with gradients of float16, slots of bfloat16;"},
        Case{kBf16,
             {SlotDType::kFloat32, true, Rounding::kStochastic},
             "slots of float32 and float32 master weights, rounded stochastically; there are "},
        Case{kF16,
             {SlotDType::kFloat32, false, Rounding::kStochastic},
             "slots of float32, rounded stochastically; there are float32 with"}}) {
    Tensor tensor(c.value, c.value, 3);
    Optimizer optimizer;
    EXPECT_THAT(
        message_of([&] { optimizer.add_group("g", SgdHyper{}, {tensor.as("p")}, c.options); }),
        ::testing::AllOf(HasSubstr("group 'g', parameter 'p': no layout for values of "),
                         HasSubstr(c.message),
                         HasSubstr("bfloat16 with gradients of bfloat16, slots of float32")));
  }
}

// --- stochastic rounding ----------------------------------------------------------------------

constexpr GroupOptions kStochastic{SlotDType::kLikeParameter, false, Rounding::kStochastic, 5};

/// The bits of each array an element is stored to, of neighbours and of one element: all pairs are
/// equally frequent, by chi-squared over the upper 6 bits.
TEST(StochasticRounding, NoiseIsIndependent) {
  constexpr std::uint32_t size = 1 << 18;
  constexpr int cells = 1 << 12;
  constexpr auto bits = [](const detail::Noise& noise, int array) {
    return (array == 0 ? noise.of_value() : noise.of_slot(array - 1)) >> 10;
  };
  for (const std::int64_t step : {1, 2}) {
    const detail::NoiseKey key = detail::noise_key(detail::noise_seed(1, "p"), step);
    constexpr std::int64_t far = std::int64_t{1} << 32;
    for (const std::int64_t lag :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{2}, std::int64_t{8}, std::int64_t{64},
          std::int64_t{4096}, std::int64_t{65536}, far, 2 * far, 3 * far}) {
      std::vector<std::array<std::array<int, cells>, 4>> counts(4);
      const detail::NoiseKey there = detail::noise_key_from(key, lag);
      for (std::uint32_t i = 0; i < size; ++i) {
        const detail::Noise one(key, i), other(there, i + static_cast<std::uint32_t>(lag));
        for (int a = 0; a < 4; ++a) {
          for (int b = 0; b < 4; ++b) ++counts[a][b][bits(one, a) << 6 | bits(other, b)];
        }
      }
      for (int a = 0; a < 4; ++a) {
        for (int b = 0; b < 4; ++b) {
          if (lag == 0 && a == b) continue;
          double chi_squared = 0;
          for (const int count : counts[a][b]) {
            constexpr double expected = double{size} / cells;
            chi_squared += (count - expected) * (count - expected) / expected;
          }
          EXPECT_LT(std::abs(chi_squared - (cells - 1)), 6 * std::sqrt(2.0 * (cells - 1)))
              << "step " << step << ", array " << a << " and " << b << " at " << lag;
        }
      }
    }
  }
}

/// Of a step of 1/16 of a unit in the last place, one in sixteen parameters moves; and who moves
/// is another matter at each step, element, seed and name.
TEST(StochasticRounding, IsUnbiasedAndIndependent) {
  constexpr std::int64_t size = 1 << 20;
  const auto moved = [](std::uint64_t seed, const std::string& name, int steps) {
    Tensor tensor(kBf16, kBf16, size);
    tensor.value.fill([](std::uint64_t) { return 1.0; });
    tensor.grad.fill([](std::uint64_t) { return -1.0; });
    Optimizer optimizer;
    optimizer.add_group("g", SgdHyper{.lr = 0x1p-11}, {tensor.as(name)},
                        {SlotDType::kFloat32, false, Rounding::kStochastic, seed});
    for (int i = 1; i < steps; ++i) optimizer.step();
    std::vector<double> before(size);
    for (std::int64_t i = 0; i < size; ++i) {
      before[static_cast<std::size_t>(i)] = tensor.value.get(i);
    }
    optimizer.step();
    std::vector<bool> moves(size);
    for (std::int64_t i = 0; i < size; ++i) {
      moves[static_cast<std::size_t>(i)] =
          tensor.value.get(i) != before[static_cast<std::size_t>(i)];
    }
    return moves;
  };
  const std::vector<bool> one = moved(1, "p", 1);
  // Standard deviation of the share: sqrt(1/16 * 15/16 / 2^20) = 0.00024.
  const auto share = [](const std::vector<bool>& which) {
    return static_cast<double>(std::count(which.begin(), which.end(), true)) / size;
  };
  EXPECT_NEAR(share(one), 1.0 / 16, 0.0012);
  // Both at once: 1/256, with a standard deviation of 0.00006.
  const auto together = [&](const std::vector<bool>& a, const std::vector<bool>& b,
                            std::int64_t shift = 0) {
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      count += a[static_cast<std::size_t>(i)] && b[static_cast<std::size_t>((i + shift) % size)];
    }
    return static_cast<double>(count) / size;
  };
  constexpr double expected = 1.0 / 256, room = 0.0003;
  for (const std::int64_t shift : {1, 2, 3, 7, 8, 16, 64, 512, 4096, 65536}) {
    EXPECT_NEAR(together(one, one, shift), expected, room) << "neighbours at " << shift;
  }
  EXPECT_NEAR(together(one, moved(1, "p", 2)), expected, room) << "the next step";
  EXPECT_NEAR(together(one, moved(2, "p", 1)), expected, room) << "another seed";
  EXPECT_NEAR(together(one, moved(1, "q", 1)), expected, room) << "another parameter";
}

/// Slots and values of one element draw different bits.
TEST(StochasticRounding, OfSlotsIsUnbiasedToo) {
  constexpr std::int64_t size = 1 << 18;
  Tensor tensor(kF32, kF32, size);
  tensor.grad.fill([](std::uint64_t) { return 1 + 0x1p-10; });  // 1/8 of a unit of bfloat16
  Optimizer optimizer;
  optimizer.add_group("g", SgdHyper{.momentum = 0.5}, {tensor.as("p")},
                      {SlotDType::kBFloat16, false, Rounding::kStochastic});
  optimizer.step();
  const TensorView slot = optimizer.state("p").slot("momentum_buffer");
  std::int64_t up = 0;
  for (std::int64_t i = 0; i < size; ++i) up += read_element(slot.data, kBf16, i) > 1;
  EXPECT_NEAR(static_cast<double>(up) / size, 1.0 / 8, 0.0035);  // 5 standard deviations
}

TEST(StochasticRounding, FollowsTheNameNotThePlace) {
  for (const int threads : {1, 3}) {
    set_num_threads(threads);
    Tensor first(kBf16, kBf16, 70'000), again(kBf16, kBf16, 70'000), other(kBf16, kBf16, 33);
    Optimizer alone, among;
    alone.add_group("g", AdamHyper{}, {first.as("p")}, kStochastic);
    among.add_group("others", AdamHyper{}, {other.as("o")}, kStochastic);
    among.add_group("h", AdamHyper{}, {again.as("p")}, kStochastic);
    for (int i = 0; i < 3; ++i) {
      alone.step();
      among.step();
    }
    EXPECT_TRUE(canonical(first.value) == canonical(again.value));
  }
}

TEST(StochasticRounding, GoesOnAfterALoad) {
  Tensor whole(kBf16, kBf16, 300), part(kBf16, kBf16, 300);
  Optimizer uninterrupted, before, after;
  uninterrupted.add_group("g", AdamHyper{}, {whole.as("p")}, kStochastic);
  before.add_group("g", AdamHyper{}, {part.as("p")}, kStochastic);
  for (int i = 0; i < 10; ++i) uninterrupted.step();
  for (int i = 0; i < 5; ++i) before.step();
  after.add_group("other", AdamHyper{}, {part.as("p")}, kStochastic);
  after.load(before.state_dict());
  for (int i = 0; i < 5; ++i) after.step();
  EXPECT_TRUE(snapshot(after) == snapshot(uninterrupted));
}

TEST(StochasticRounding, KeepsWhatIsExactInfiniteOrNan) {
  Tensor tensor(kBf16, kBf16, 4000);
  const auto number = [](std::uint64_t i) {
    return rounded_to(kBf16, special_number(3, i, kBf16));
  };
  tensor.value.fill(number);
  Optimizer optimizer;
  optimizer.add_group("g", SgdHyper{.lr = 0}, {tensor.as("p")}, kStochastic);
  for (int i = 0; i < 3; ++i) optimizer.step();
  for (std::int64_t i = 0; i < 4000; ++i) {
    const double expected = number(static_cast<std::uint64_t>(i));
    const double found = tensor.value.get(i);
    ASSERT_TRUE(found == expected || (std::isnan(found) && std::isnan(expected))) << i;
  }
}

TEST(Gradients, MayComeBackWithAnotherDtype) {
  Tensor changed(kBf16, kBf16, 300), taken_away(kBf16, kBf16, 300), wide(kF32, kF32, 300);
  wide.grad.fill_numbers(9);
  Optimizer optimizer, control;
  control.add_group("g", AdamHyper{}, {changed.as("p")});
  optimizer.add_group("g", AdamHyper{}, {taken_away.as("p")});
  optimizer.step();
  control.step();
  control.parameter("p").set_grad(wide.grad.view());
  optimizer.parameter("p").clear_grad();
  optimizer.parameter("p").set_grad(wide.grad.view());
  optimizer.step();
  control.step();
  EXPECT_TRUE(snapshot(optimizer) == snapshot(control));
}

// --- loss scale -------------------------------------------------------------------------------

TEST(LossScale, DividesAndStoresAsAskedInEveryLayout) {
  for (const LayoutCase& layout : all_layout_cases()) {
    if (layout.value == kF64) continue;
    SCOPED_TRACE(layout.name);
    float scale = 32;
    const TensorView source = view(&scale, {});
    Tensor scaled(layout.value, layout.grad, 301), plain(layout.value, layout.grad, 301);
    // Far from subnormals, so that the product rounds as the number does.
    const auto gradient = [](std::uint64_t i) {
      return (static_cast<double>(hash(4, i) % 2001) - 1000) / 1024;
    };
    scaled.grad.fill([&](std::uint64_t i) { return 32 * gradient(i); });
    plain.grad.fill(gradient);
    const std::string scaled_before = canonical(scaled.grad);
    Optimizer with_scale, without;
    with_scale.add_group("g", AdamWHyper{}, {scaled.as("p")}, layout.options());
    without.add_group("g", AdamWHyper{}, {plain.as("p")}, layout.options());
    EXPECT_EQ(with_scale.can_store_grads() || !layout.stores_grads, true);
    StepOptions options{.loss_scale_source = source, .max_grad_norm = 3.0, .clip_value = 0.1};
    options.store_unscaled_grads = layout.stores_grads;
    with_scale.step(options);
    without.step({.max_grad_norm = 3.0, .clip_value = 0.1});
    EXPECT_TRUE(snapshot(with_scale) == snapshot(without));
    EXPECT_EQ(with_scale.last_grad_norm().norm, without.last_grad_norm().norm);
    EXPECT_TRUE(canonical(scaled.grad) ==
                (layout.stores_grads ? canonical(plain.grad) : scaled_before));
  }
}

TEST(LossScale, ASkippedStepLeavesGradientsAsTheyAre) {
  float scale = 4, found_inf = 1;
  Tensor tensor(kF32, kF32, 40);
  Optimizer optimizer;
  optimizer.add_group("g", SgdHyper{.momentum = 0.9}, {tensor.as("p")});
  const std::string before = canonical(tensor.value) + canonical(tensor.grad);
  StepOptions options{.skip_source = view(&found_inf, {}), .loss_scale_source = view(&scale, {})};
  options.store_unscaled_grads = true;
  optimizer.step(options);
  EXPECT_TRUE(canonical(tensor.value) + canonical(tensor.grad) == before);
  EXPECT_EQ(optimizer.state("p").step(), 0);
  const double grad = tensor.grad.get(3);
  found_inf = 0;
  optimizer.step(options);
  EXPECT_EQ(tensor.grad.get(3), grad / 4);
  optimizer.step(options);  // and again: it is the caller's to bring new ones
  EXPECT_EQ(tensor.grad.get(3), grad / 16);
}

TEST(LossScale, GradientsThatCannotBeStoredAreRefusedBeforeAnythingHappens) {
  float scale = 4;
  Tensor wide(kF64, kF64, 4), single(kF32, kF32, 4), mixed(kBf16, kF32, 4);
  const StepOptions options{.loss_scale_source = view(&scale, {}), .store_unscaled_grads = true};
  for (Tensor* tensor : {&wide, &mixed}) {
    Optimizer optimizer;
    optimizer.add_group("fine", SgdHyper{}, {single.as("s")});
    optimizer.add_group("g", SgdHyper{}, {tensor->as("p")});
    EXPECT_FALSE(optimizer.can_store_grads());
    const std::string before = snapshot(optimizer);
    EXPECT_THAT(message_of([&] { optimizer.step(options); }),
                ::testing::AllOf(HasSubstr("group 'g', parameter 'p': store_unscaled_grads"),
                                 HasSubstr("it can for float32 with gradients of float32")));
    EXPECT_TRUE(snapshot(optimizer) == before);
    optimizer.parameter("p").freeze();
    EXPECT_TRUE(optimizer.can_store_grads());
  }
}

TEST(LossScale, ANormCanBeTakenOfGradientsThatCannotBeStoredAfterOthersWere) {
  for (const bool in_halves : {false, true}) {
    Tensor single(kF32, kF32, 4), wide(kF64, kF64, 4);
    Optimizer optimizer, control;
    optimizer.add_group("a", SgdHyper{}, {single.as("s")});
    optimizer.step({.store_unscaled_grads = true});
    optimizer.add_group("b", SgdHyper{}, {wide.as("w")});
    control.add_group("a", SgdHyper{}, {single.as("s")});
    control.add_group("b", SgdHyper{}, {wide.as("w")});
    const double norm = control.grad_norm().norm;
    if (in_halves) {
      EXPECT_NO_THROW(optimizer.norm_begin());
    } else {
      EXPECT_EQ(optimizer.grad_norm().norm, norm);
    }
  }
}

/// The caller's memory for it stays in use.
TEST(MasterWeights, ThatALoadLacksAreTheParameters) {
  for (const bool by_name : {false, true}) {
    Tensor tensor(kBf16, kBf16, 70);
    Array master(kF32, 70, 3);
    Optimizer optimizer;
    optimizer.add_group("g", SgdHyper{.lr = 0.5}, {tensor.as("p")}, {.master_weights = true});
    const StateDict never_stepped = optimizer.state_dict();
    master.fill([&](std::uint64_t i) { return tensor.value.get(static_cast<std::int64_t>(i)); });
    optimizer.state("p").bind_slot(kMasterWeight, master.view());
    optimizer.step();
    if (by_name) {
      EXPECT_TRUE(optimizer.load(never_stepped).complete());
    } else {
      optimizer.load_state_dict(never_stepped);
    }
    for (std::int64_t i = 0; i < 70; ++i) EXPECT_EQ(master.get(i), tensor.value.get(i)) << i;
  }
}

// --- clipping by value ------------------------------------------------------------------------

/// torch.nn.utils.clip_grad_value_, after clipping by norm.
TEST(ClipValue, LimitsEveryElementOfWhatTheRuleSees) {
  for (const DType dtype : {kF32, kF64, kBf16, kF16}) {
    Tensor clipped(dtype, dtype, 500), by_hand(dtype, dtype, 500);
    for (std::int64_t i = 0; i < 500; ++i) {
      const double g = clipped.grad.get(i);
      by_hand.grad.set(i, g > 0.25 ? 0.25 : g < -0.25 ? -0.25 : g);
    }
    const std::string grads = canonical(clipped.grad);
    Optimizer optimizer, expected;
    optimizer.add_group("g", SgdHyper{.momentum = 0.9}, {clipped.as("p")});
    expected.add_group("g", SgdHyper{.momentum = 0.9}, {by_hand.as("p")});
    optimizer.step({.clip_value = 0.25});
    expected.step();
    EXPECT_TRUE(snapshot(optimizer) == snapshot(expected)) << name_of(dtype);
    EXPECT_TRUE(canonical(clipped.grad) == grads);
  }
}

TEST(ClipValue, InfinitiesAreClippedAndNanStays) {
  Tensor tensor(kF32, kF32, 3);
  const double grads[] = {HUGE_VAL, -HUGE_VAL, std::nan("")};
  tensor.grad.fill([&](std::uint64_t i) { return grads[i]; });
  tensor.value.fill([](std::uint64_t) { return 0.0; });
  Optimizer optimizer;
  optimizer.add_group("g", SgdHyper{.lr = 1}, {tensor.as("p")});
  optimizer.step({.clip_value = 2});
  EXPECT_EQ(tensor.value.get(0), -2);
  EXPECT_EQ(tensor.value.get(1), 2);
  EXPECT_TRUE(std::isnan(tensor.value.get(2)));
}

TEST(ClipValue, MustNotBeNegative) {
  Optimizer optimizer;
  EXPECT_THAT(message_of([&] { optimizer.step({.clip_value = -1}); }),
              HasSubstr("clip_value must be >= 0, got -1"));
  EXPECT_THAT(message_of([&] { optimizer.step({.clip_value = std::nan("")}); }),
              HasSubstr("clip_value must be >= 0, got nan"));
}

// --- where small steps get lost ---------------------------------------------------------------

/// 2,000 steps of 1/64 of a unit in the last place: to nearest nothing moves; master weights and,
/// on average, stochastic rounding arrive where float32 does.
TEST(SmallSteps, AreLostOnlyWithPlainRounding) {
  struct Case {
    const char* name;
    GroupOptions options;
    double low, high;  // of the mean distance gone, as a share of the whole
  };
  for (const Case& c :
       {Case{"nearest", {SlotDType::kFloat32}, 0, 0},
        Case{"master weights", {SlotDType::kFloat32, true}, 0.999, 1.001},
        Case{"stochastic", {SlotDType::kFloat32, false, Rounding::kStochastic}, 0.98, 1.02}}) {
    Tensor tensor(kBf16, kBf16, 1000);
    tensor.value.fill([](std::uint64_t) { return 1.0; });
    tensor.grad.fill([](std::uint64_t) { return -1.0; });
    Optimizer optimizer;
    optimizer.add_group("g", SgdHyper{.lr = 0x1p-13}, {tensor.as("p")}, c.options);
    constexpr int steps = 2048;
    for (int i = 0; i < steps; ++i) optimizer.step();
    double gone = 0;
    for (std::int64_t i = 0; i < 1000; ++i) gone += (tensor.value.get(i) - 1.0) / 1000;
    EXPECT_GE(gone / (steps * 0x1p-13), c.low) << c.name;
    EXPECT_LE(gone / (steps * 0x1p-13), c.high) << c.name;
  }
}

}  // namespace
}  // namespace fusestep::test
