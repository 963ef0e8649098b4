// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What training programs do: freeze and thaw, join late, change settings, clip, skip, resume.
#include <gtest/gtest.h>

#include <functional>
#include <memory>

#include "support.h"

namespace fusestep::test {
namespace {

/// One parameter with its gradient. The same seed gives the same values and gradients.
struct Tensor {
  Array value, grad;
  std::uint64_t seed;

  explicit Tensor(std::uint64_t seed_, DType dtype = DType::kFloat32, std::int64_t size = 37)
      : value(dtype, size), grad(dtype, size), seed(seed_) {
    value.fill_numbers(seed);
    new_gradient(0);
  }
  void new_gradient(int step) {
    grad.fill_numbers(hash(seed, 1'000'000 + static_cast<std::uint64_t>(step)));
  }
  Parameter as(std::string name) { return {std::move(name), value.view(), grad.view()}; }
  Parameter without_grad(std::string name) { return {std::move(name), value.view()}; }
};

std::string state_of(Optimizer& optimizer, std::string_view name) {
  StateRef state = optimizer.state(name);
  std::string all = canonical(optimizer.parameter(name).value()) + std::to_string(state.step());
  for (const std::string& slot : state.slot_names()) all += slot + canonical(state.slot(slot));
  return all;
}

const Hyper kHypers[] = {AdamHyper{.lr = 1e-2, .weight_decay = 0.1},
                         AdamHyper{.lr = 1e-2, .amsgrad = true},
                         AdamWHyper{.lr = 1e-2, .weight_decay = 0.1},
                         SgdHyper{.lr = 1e-2, .weight_decay = 0.1},
                         SgdHyper{.lr = 1e-2, .momentum = 0.9, .dampening = 0.5},
                         RmspropHyper{.weight_decay = 0.1},
                         RmspropHyper{.momentum = 0.9, .centered = true}};

// --- freezing ---------------------------------------------------------------------------------

struct Freezing {
  const char* name;
  std::function<void(Optimizer&)> freeze, thaw;
};
const Freezing kFreezings[] = {
    {"parameter", [](Optimizer& o) { o.parameter("f").freeze(); },
     [](Optimizer& o) { o.parameter("f").thaw(); }},
    {"group", [](Optimizer& o) { o.group("frozen").freeze(); },
     [](Optimizer& o) { o.group("frozen").thaw(); }},
    {"by_parameter_name", [](Optimizer& o) { o.freeze("f"); }, [](Optimizer& o) { o.thaw("f"); }},
    {"by_group_name", [](Optimizer& o) { o.freeze("frozen"); },
     [](Optimizer& o) { o.thaw("frozen"); }},
    {"twice",
     [](Optimizer& o) {
       o.freeze("f");
       o.freeze("frozen");
     },
     [](Optimizer& o) {
       o.thaw("f");
       o.thaw("f");
     }},
};

TEST(Freeze, LeavesEveryBitAndGoesOnWhereItStopped) {
  for (const Hyper& hyper : kHypers) {
    for (const Freezing& way : kFreezings) {
      SCOPED_TRACE(std::string(rule_name(hyper)) + ' ' + way.name);
      Tensor f(1), other(2), alone(1), control(2);
      Optimizer optimizer, control_optimizer;
      optimizer.add_group("frozen", hyper, {f.as("f")});
      optimizer.add_group("rest", hyper, {other.as("other")});
      control_optimizer.add_group("rest", hyper, {control.as("other")});
      for (int step = 0; step < 3; ++step) {
        for (Tensor* t : {&f, &other, &control}) t->new_gradient(step);
        optimizer.step();
        control_optimizer.step();
      }
      const std::string before = state_of(optimizer, "f");
      way.freeze(optimizer);
      EXPECT_TRUE(optimizer.parameter("f").frozen());
      f.grad.fill([](std::uint64_t i) { return i % 2 == 0 ? std::nan("") : HUGE_VAL; });
      for (int step = 3; step < 6; ++step) {
        other.new_gradient(step);
        control.new_gradient(step);
        // Its stale gradient is part of no norm, and makes nothing skip.
        const StepOptions options{.max_grad_norm = 0.5, .skip_nonfinite = true};
        EXPECT_EQ(bits(optimizer.grad_norm().norm), bits(control_optimizer.grad_norm().norm));
        optimizer.step(options);
        control_optimizer.step(options);
        EXPECT_EQ(bits(optimizer.last_grad_norm().norm),
                  bits(control_optimizer.last_grad_norm().norm));
        EXPECT_TRUE(state_of(optimizer, "f") == before);
        EXPECT_TRUE(state_of(optimizer, "other") == state_of(control_optimizer, "other"));
      }
      way.thaw(optimizer);
      EXPECT_FALSE(optimizer.parameter("f").frozen());
      Optimizer uninterrupted;
      uninterrupted.add_group("frozen", hyper, {alone.as("f")});
      for (int step = 0; step < 5; ++step) {
        alone.new_gradient(step);
        uninterrupted.step();
        if (step < 3) continue;
        f.new_gradient(step);
        optimizer.step();
      }
      EXPECT_TRUE(state_of(optimizer, "f") == state_of(uninterrupted, "f"));
    }
  }
}

TEST(Freeze, FromTheStartCostsNothingAndStartsAtStepOne) {
  for (const Hyper& hyper : kHypers) {
    Tensor late(1), other(2), fresh(1);
    Optimizer optimizer, control;
    optimizer.add_group("g", hyper, {late.as("late"), other.as("other")});
    optimizer.freeze("late");
    for (int step = 0; step < 100; ++step) {
      other.new_gradient(step);
      optimizer.step();
    }
    EXPECT_TRUE(optimizer.state("late").slot_names().empty());
    EXPECT_EQ(optimizer.state("late").step(), 0);
    EXPECT_EQ(optimizer.state("other").step(), 100);
    optimizer.thaw("late");
    control.add_group("g", hyper, {fresh.as("late")});
    for (int step = 0; step < 4; ++step) {
      late.new_gradient(step);
      fresh.new_gradient(step);
      optimizer.step();
      control.step();
    }
    EXPECT_TRUE(state_of(optimizer, "late") == state_of(control, "late"));
    EXPECT_EQ(optimizer.state("late").step(), 4);
  }
}

TEST(Freeze, Everything) {
  Tensor a(1);
  Optimizer optimizer;
  optimizer.add_group("g", AdamHyper{}, {a.as("a")});
  optimizer.step();
  optimizer.freeze("g");
  const std::string before = snapshot(optimizer);
  optimizer.step({.max_grad_norm = 1.0});
  EXPECT_TRUE(snapshot(optimizer) == before);
  EXPECT_EQ(optimizer.grad_norm().norm, 0.0);
  EXPECT_TRUE(std::isnan(optimizer.last_grad_norm().norm));
}

// --- joining ----------------------------------------------------------------------------------

TEST(Join, AGroupAfterAHundredSteps) {
  for (const Hyper& hyper : kHypers) {
    Tensor first(1), late(2), fresh(2);
    Optimizer optimizer, control;
    optimizer.add_group("first", AdamHyper{}, {first.as("first")});
    for (int step = 0; step < 100; ++step) optimizer.step();
    optimizer.add_group("late", hyper, {late.as("late")});
    control.add_group("late", hyper, {fresh.as("late")});
    for (int step = 0; step < 5; ++step) {
      late.new_gradient(step);
      fresh.new_gradient(step);
      optimizer.step();
      control.step();
    }
    EXPECT_TRUE(state_of(optimizer, "late") == state_of(control, "late"));
    EXPECT_EQ(optimizer.state("first").step(), 105);
  }
}

TEST(Join, ParametersWithoutGradientAreSkipped) {
  for (const Hyper& hyper : kHypers) {
    Tensor a(1), b(2), fresh(2);
    Optimizer optimizer, control;
    optimizer.add_group("g", hyper, {a.as("a"), b.without_grad("b")});
    control.add_group("g", hyper, {fresh.as("b")});
    EXPECT_FALSE(optimizer.parameter("b").grad().present);
    const std::string before = canonical(b.value);
    optimizer.step();
    optimizer.step();
    EXPECT_TRUE(canonical(b.value) == before);
    EXPECT_EQ(optimizer.state("b").step(), 0);
    EXPECT_TRUE(optimizer.state("b").slot_names().empty());
    optimizer.parameter("b").set_grad(b.grad.view());
    optimizer.step();
    control.step();
    EXPECT_TRUE(state_of(optimizer, "b") == state_of(control, "b"));
    optimizer.parameter("b").clear_grad();
    optimizer.step();
    EXPECT_TRUE(state_of(optimizer, "b") == state_of(control, "b"));
    EXPECT_EQ(optimizer.state("a").step(), 4);
  }
}

/// Between two steps, so that who steps is as before; with the plan's memory, which must not be
/// written before its beginning (under the address sanitizer).
TEST(Join, AGradientMayComeMoveAndGo) {
  for (const Hyper& hyper : kHypers) {
    for (const bool by_freezing : {false, true}) {
      Tensor a(1), b(2), control_a(1);
      Array other_grad(DType::kFloat32, 37, 5);
      Optimizer optimizer, control;
      optimizer.add_group("g", hyper, {a.as("a"), b.without_grad("b")});
      control.add_group("g", hyper, {control_a.as("a")});
      const std::string before = canonical(b.value);
      optimizer.step();
      control.step();
      ParameterRef parameter = optimizer.parameter("b");
      parameter.set_grad(b.grad.view());
      parameter.set_grad(other_grad.view());
      if (by_freezing) {
        optimizer.freeze("b");
      } else {
        parameter.clear_grad();
      }
      optimizer.step();
      control.step();
      EXPECT_TRUE(canonical(b.value) == before);
      EXPECT_TRUE(state_of(optimizer, "a") == state_of(control, "a"));
    }
  }
}

TEST(Join, GradientsAndValuesMayMove) {
  for (const Hyper& hyper : kHypers) {
    Tensor a(1), control_a(1);
    Array other_grad(DType::kFloat32, 37, 5), other_value(DType::kFloat32, 37, 3);
    Optimizer optimizer, control;
    optimizer.add_group("g", hyper, {a.as("a")});
    control.add_group("g", hyper, {control_a.as("a")});
    for (int step = 0; step < 6; ++step) {
      Array& grad = step % 2 == 0 ? a.grad : other_grad;
      control_a.new_gradient(step);
      grad.fill([&](std::uint64_t i) { return control_a.grad.get(static_cast<std::int64_t>(i)); });
      if (step % 3 == 1) optimizer.parameter("a").clear_grad();
      if (step % 3 == 2) optimizer.freeze("a");
      optimizer.parameter("a").set_grad(grad.view());
      optimizer.thaw("a");
      if (step == 3) {
        std::memcpy(other_value.data(), a.value.data(), a.value.bytes());
        a.value.fill([](std::uint64_t) { return std::nan(""); });
        optimizer.parameter("a").set_value(other_value.view());
        EXPECT_EQ(optimizer.parameter("a").value().data, other_value.data());
      }
      EXPECT_EQ(bits(optimizer.grad_norm().norm), bits(control.grad_norm().norm));
      optimizer.step();
      control.step();
      EXPECT_TRUE(state_of(optimizer, "a") == state_of(control, "a"));
    }
    EXPECT_TRUE(other_value.guards_intact() && other_grad.guards_intact());
  }
}

// --- settings that change -----------------------------------------------------------------------

/// A float64 parameter beside the reference, each step from the state the library is in.
class Twin {
 public:
  using N = Bounded<long double>;
  explicit Twin(const Hyper& hyper) : tensor_(7, DType::kFloat64) {
    N::unit = 0x1p-53L;
    N::smallest = 4.9e-324L;
    optimizer.add_group("g", hyper, {tensor_.as("p")});
  }

  void step(const StepOptions& options = {}, double multiplier = 1.0) {
    const Hyper hyper = optimizer.group("g").hyper();
    StateRef state = optimizer.state("p");
    const std::int64_t t = state.step() + 1;
    tensor_.new_gradient(static_cast<int>(t));
    std::vector<N> values;
    std::vector<ReferenceState<N>> states(static_cast<std::size_t>(tensor_.value.size()));
    for (const std::string& name : state.slot_names()) {
      const TensorView slot = state.slot(name);
      for (std::size_t i = 0; i < states.size(); ++i) {
        states[i].slot(name) = {static_cast<const double*>(slot.data)[i]};
      }
    }
    const auto* sgd = std::get_if<SgdHyper>(&hyper);
    const bool first = !buffer_filled_;
    if (sgd != nullptr && sgd->momentum != 0) buffer_filled_ = true;
    for (std::size_t i = 0; i < states.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      values.push_back({tensor_.value.get(at)});
      const N grad = N::setting(multiplier) * N{tensor_.grad.get(at)};
      std::visit([&](const auto& h) { reference_step(h, values[i], grad, states[i], t, first); },
                 hyper);
    }
    optimizer.step(options);
    for (std::size_t i = 0; i < states.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      ASSERT_NEAR(tensor_.value.get(at), static_cast<double>(values[i].value),
                  static_cast<double>(4 * values[i].error))
          << "step " << t << ", element " << i;
      ASSERT_LT(values[i].error, 1e-12L);
      for (const std::string& name : state.slot_names()) {
        const N expected = states[i].slot(name);
        ASSERT_NEAR(static_cast<const double*>(state.slot(name).data)[i],
                    static_cast<double>(expected.value), static_cast<double>(4 * expected.error))
            << "step " << t << ", slot " << name;
      }
    }
  }
  void steps(int count) {
    for (int i = 0; i < count; ++i) ASSERT_NO_FATAL_FAILURE(step());
  }
  void set(const Hyper& hyper) { optimizer.group("g").set_hyper(hyper); }
  Array& gradient() { return tensor_.grad; }

  Optimizer optimizer;

 private:
  Tensor tensor_;
  bool buffer_filled_ = false;
};

struct Change {
  const char* name;
  Hyper before, after;
};
const Change kChanges[] = {
    {"lr", AdamHyper{.lr = 1e-3}, AdamHyper{.lr = 0.5}},
    {"lr_zero", AdamWHyper{}, AdamWHyper{.lr = 0}},
    {"betas", AdamHyper{}, AdamHyper{.betas = {0.5, 0.6}}},
    {"decoupled", AdamHyper{.weight_decay = 0.1}, AdamWHyper{.weight_decay = 0.1}},
    {"maximize", AdamHyper{}, AdamHyper{.maximize = true}},
    {"amsgrad_on", AdamHyper{}, AdamHyper{.amsgrad = true}},
    {"amsgrad_off", AdamHyper{.amsgrad = true}, AdamHyper{}},
    {"momentum_on", SgdHyper{}, SgdHyper{.momentum = 0.9, .dampening = 0.5}},
    {"momentum_off", SgdHyper{.momentum = 0.9}, SgdHyper{}},
    {"momentum_other", SgdHyper{.momentum = 0.9}, SgdHyper{.momentum = 0.5}},
    {"nesterov", SgdHyper{.momentum = 0.9}, SgdHyper{.momentum = 0.9, .nesterov = true}},
    {"centered_on", RmspropHyper{}, RmspropHyper{.centered = true}},
    {"centered_off", RmspropHyper{.centered = true}, RmspropHyper{}},
    {"rmsprop_momentum_on", RmspropHyper{}, RmspropHyper{.momentum = 0.9}},
    {"rmsprop_both_on", RmspropHyper{.momentum = 0.9},
     RmspropHyper{.momentum = 0.9, .centered = true}},
};

TEST(Settings, CountFromTheNextStep) {
  for (const Change& change : kChanges) {
    SCOPED_TRACE(change.name);
    Twin twin(change.before);
    ASSERT_NO_FATAL_FAILURE(twin.steps(3));
    twin.set(change.after);
    ASSERT_NO_FATAL_FAILURE(twin.steps(3));
    twin.set(change.before);  // slots that were there before are still there
    ASSERT_NO_FATAL_FAILURE(twin.steps(2));
    twin.set(change.after);
    ASSERT_NO_FATAL_FAILURE(twin.steps(2));
  }
}

TEST(Settings, SlotsOfEachVariant) {
  using Names = std::vector<std::string>;
  const std::pair<Hyper, Names> table[] = {
      {AdamHyper{}, {"exp_avg", "exp_avg_sq"}},
      {AdamHyper{.amsgrad = true}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}},
      {SgdHyper{}, {}},
      {SgdHyper{.momentum = 0.9}, {"momentum_buffer"}},
      {RmspropHyper{}, {"square_avg"}},
      {RmspropHyper{.momentum = 0.9}, {"square_avg", "momentum_buffer"}},
      {RmspropHyper{.centered = true}, {"square_avg", "grad_avg"}},
      {RmspropHyper{.momentum = 0.9, .centered = true},
       {"square_avg", "momentum_buffer", "grad_avg"}},
  };
  for (const auto& [hyper, names] : table) {
    Tensor a(1);
    Optimizer optimizer;
    optimizer.add_group("g", hyper, {a.as("a")});
    EXPECT_TRUE(optimizer.state("a").slot_names().empty());
    optimizer.step();
    EXPECT_EQ(optimizer.state("a").slot_names(), names);
  }
}

TEST(Settings, LearningRateFromMemory) {
  for (const bool is_double : {false, true}) {
    for (const Hyper& hyper : kHypers) {
      Tensor a(1), b(1);
      Array lr(is_double ? DType::kFloat64 : DType::kFloat32, 1);
      Optimizer optimizer, control;
      GroupRef group = optimizer.add_group("g", hyper, {a.as("a")});
      GroupRef control_group = control.add_group("g", hyper, {b.as("a")});
      group.set_lr_source(lr.view({}));
      for (int step = 0; step < 4; ++step) {
        lr.set(0, 0.01 * (step + 1));
        control_group.set_lr(lr.get(0));
        optimizer.step();
        control.step();
      }
      EXPECT_TRUE(snapshot(optimizer) == snapshot(control));
      group.set_lr_source({});  // back to the hyperparameter
      control_group.set_lr(group.lr());
      optimizer.step();
      control.step();
      EXPECT_TRUE(snapshot(optimizer) == snapshot(control));
    }
  }
}

/// Groups that differ in variant, rule and dtype step in one optimizer as each would alone.
TEST(Settings, GroupsDoNotMix) {
  std::vector<std::unique_ptr<Tensor>> together, alone;
  Optimizer all;
  std::vector<std::unique_ptr<Optimizer>> each;
  std::vector<std::string> names;
  for (const RuleCase& rule : rule_cases()) {
    for (const LayoutCase& layout : kLayoutCases) {
      const std::uint64_t seed = together.size();
      together.push_back(std::make_unique<Tensor>(seed, layout.value));
      alone.push_back(std::make_unique<Tensor>(seed, layout.value));
      names.push_back(rule.name + '.' + layout.name);
      all.add_group(names.back(), rule.hyper, {together.back()->as(names.back())}, {layout.slots});
      each.push_back(std::make_unique<Optimizer>());
      each.back()->add_group("g", rule.hyper, {alone.back()->as(names.back())}, {layout.slots});
    }
  }
  for (int step = 0; step < 3; ++step) {
    for (const auto* tensors : {&together, &alone}) {
      for (const auto& tensor : *tensors) tensor->new_gradient(step);
    }
    all.step();
    for (const auto& optimizer : each) optimizer->step();
  }
  for (std::size_t i = 0; i < names.size(); ++i) {
    EXPECT_TRUE(state_of(all, names[i]) == state_of(*each[i], names[i])) << names[i];
  }
}

// --- skipping and scaling -----------------------------------------------------------------------

TEST(Skip, ChangesNoBit) {
  Array zero(DType::kFloat32, 1), one(DType::kFloat32, 1), nan(DType::kFloat64, 1),
      small(DType::kFloat64, 1);
  one.set(0, 1);
  nan.set(0, std::nan(""));
  small.set(0, -4.9e-324);
  const StepOptions skips[] = {
      {.skip = true},
      {.skip_source = one.view({})},
      {.skip_source = nan.view({})},
      {.skip_source = small.view({1, 1})},
      {.skip_source = one.view({1}), .max_grad_norm = 0.1, .skip_nonfinite = true},
  };
  for (const Hyper& hyper : kHypers) {
    Tensor a(1), b(1);
    Optimizer optimizer, control;
    optimizer.add_group("g", hyper, {a.as("a")});
    control.add_group("g", hyper, {b.as("a")});
    std::int64_t skipped = 0;
    for (int step = 0; step < 3; ++step) {  // skipped first steps leave the buffer 'first'
      a.new_gradient(step);
      b.new_gradient(step);
      for (const StepOptions& skip : skips) {
        const std::string value = canonical(a.value);
        const std::string before = step == 0 ? "" : snapshot(optimizer);
        optimizer.step(skip);
        EXPECT_TRUE(canonical(a.value) == value);
        EXPECT_EQ(optimizer.state("a").step(), step);
        EXPECT_EQ(optimizer.skipped_steps(), ++skipped);
        if (step != 0) {
          EXPECT_TRUE(snapshot(optimizer) == before);
        }
      }
      optimizer.step({.skip_source = zero.view({})});
      control.step();
      EXPECT_TRUE(snapshot(optimizer) == snapshot(control));
      EXPECT_EQ(optimizer.skipped_steps(), skipped);
    }
  }
}

TEST(Skip, NonfiniteGradients) {
  for (const double bad : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
    for (const Hyper& hyper : kHypers) {
      Tensor a(1), b(2);
      Optimizer optimizer;
      optimizer.add_group("g", hyper, {a.as("a"), b.as("b")});
      optimizer.step({.skip_nonfinite = true});
      EXPECT_EQ(optimizer.skipped_steps(), 0);
      const std::string before = snapshot(optimizer);
      a.grad.set(36, bad);
      optimizer.step({.skip_nonfinite = true});
      EXPECT_TRUE(snapshot(optimizer) == before);
      EXPECT_EQ(optimizer.skipped_steps(), 1);
      EXPECT_EQ(optimizer.last_grad_norm().nonfinite, 1);
      a.new_gradient(1);
      optimizer.step({.skip_nonfinite = true});
      EXPECT_EQ(optimizer.skipped_steps(), 1);
      EXPECT_EQ(optimizer.state("a").step(), 2);
    }
  }
}

TEST(Skip, NotAskedForNanSpreadsAsInTorch) {
  for (const RuleCase& rule : rule_cases()) {
    for (const LayoutCase& layout : kLayoutCases) {
      Tensor a(1, layout.value);
      Optimizer optimizer;
      optimizer.add_group("g", rule.hyper, {a.as("a")}, {layout.slots});
      a.grad.set(3, std::nan(""));
      optimizer.step();
      a.new_gradient(1);
      optimizer.step();  // a NaN that is in the state stays there
      for (std::int64_t i = 0; i < a.value.size(); ++i) {
        EXPECT_EQ(std::isnan(a.value.get(i)), i == 3)
            << rule.name << ' ' << layout.name << ' ' << i;
      }
      StateRef state = optimizer.state("a");
      for (const std::string& name : state.slot_names()) {
        const TensorView slot = state.slot(name);
        for (std::int64_t i = 0; i < slot.size(); ++i) {
          EXPECT_EQ(std::isnan(read_element(slot.data, slot.dtype, i)), i == 3)
              << rule.name << ' ' << layout.name << ' ' << name << ' ' << i;
        }
      }
    }
  }
}

/// A second moment that has overflowed stays infinite and its parameter where it is; an infinite
/// parameter without weight decay stays infinite.
TEST(Skip, OverflowAsInTorch) {
  for (const Hyper& hyper :
       {Hyper(AdamHyper{}), Hyper(AdamHyper{.amsgrad = true}), Hyper(RmspropHyper{}),
        Hyper(RmspropHyper{.momentum = 0.9}), Hyper(RmspropHyper{.alpha = 0.5}),
        Hyper(AdamHyper{.betas = {0.9, 0.25}})}) {
    Tensor a(1);
    a.value.set(5, HUGE_VAL);
    a.grad.set(3, 1e30);
    const double before = a.value.get(3);
    Optimizer optimizer;
    optimizer.add_group("g", hyper, {a.as("a")});
    for (int step = 0; step < 3; ++step) optimizer.step();
    a.new_gradient(1);
    optimizer.step();
    EXPECT_EQ(a.value.get(3), before) << rule_name(hyper);
    EXPECT_EQ(a.value.get(5), HUGE_VAL);
    const char* slot = std::holds_alternative<AdamHyper>(hyper) ? "exp_avg_sq" : "square_avg";
    EXPECT_EQ(read_element(optimizer.state("a").slot(slot).data, DType::kFloat32, 3), HUGE_VAL);
  }
}

/// torch's root of s - a^2 can be NaN there.
TEST(Skip, ConstantGradientsKeepCenteredRmspropFinite) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    Tensor a(1, dtype);
    Optimizer optimizer;
    optimizer.add_group("g", RmspropHyper{.lr = 1e-6, .alpha = 0.5, .centered = true}, {a.as("a")});
    a.grad.fill([](std::uint64_t i) { return 0.1 + 0.013 * static_cast<double>(i); });
    for (int step = 0; step < 300; ++step) optimizer.step();
    for (std::int64_t i = 0; i < a.value.size(); ++i) {
      EXPECT_TRUE(std::isfinite(a.value.get(i))) << i;
    }
  }
}

TEST(Scale, MultiplierIsAProductWithEachGradient) {
  for (const Hyper& hyper : kHypers) {
    for (const bool is_double : {false, true}) {
      Tensor a(1), b(1);
      Array source(is_double ? DType::kFloat64 : DType::kFloat32, 1);
      source.set(0, 0x1p-3);
      Optimizer optimizer, control;
      optimizer.add_group("g", hyper, {a.as("a")});
      control.add_group("g", hyper, {b.as("a")});
      for (int step = 0; step < 3; ++step) {
        a.new_gradient(step);
        b.new_gradient(step);
        const std::string grad = canonical(a.grad);
        // A power of two: the products are exact.
        const std::uint64_t norm = bits(optimizer.grad_norm().norm);
        optimizer.step({.grad_multiplier = -2.0,
                        .grad_multiplier_source = source.view({}),
                        .measure_grad_norm = true});
        EXPECT_EQ(bits(4 * optimizer.last_grad_norm().norm), norm);
        EXPECT_TRUE(canonical(a.grad) == grad);
        b.grad.fill(
            [&](std::uint64_t i) { return -0.25 * b.grad.get(static_cast<std::int64_t>(i)); });
        control.step();
      }
      EXPECT_TRUE(snapshot(optimizer) == snapshot(control));
    }
  }
}

TEST(Scale, ClippingIsTorchsClipGradNorm) {
  for (const Hyper& hyper : kHypers) {
    for (const double max_norm : {1e-3, 0.5, 1e6, 0.0}) {
      for (const double multiplier : {1.0, -0.3, 1024.0}) {
        Twin twin(hyper);
        for (int step = 0; step < 3; ++step) {
          long double sum = 0;
          StateRef state = twin.optimizer.state("p");
          Tensor same(7, DType::kFloat64);
          same.new_gradient(static_cast<int>(state.step()) + 1);
          for (std::int64_t i = 0; i < same.grad.size(); ++i) {
            const long double g = static_cast<long double>(multiplier) * same.grad.get(i);
            sum += g * g;
          }
          const auto norm = static_cast<double>(std::sqrt(sum));
          const double coefficient = std::min(1.0, max_norm / (norm + 1e-6));
          ASSERT_NO_FATAL_FAILURE(twin.step(
              {.grad_multiplier = multiplier, .max_grad_norm = max_norm}, multiplier * coefficient))
              << max_norm << ' ' << multiplier;
          const GradNorm measured = twin.optimizer.last_grad_norm();
          EXPECT_NEAR(measured.norm, norm, 1e-14 * norm);
        }
      }
    }
  }
}

TEST(Scale, ClippingIsOverAllGroupsAndDtypes) {
  Tensor a(1), b(2, DType::kFloat64), c(3, DType::kBFloat16), d(4, DType::kFloat16);
  Optimizer optimizer;
  optimizer.add_group("ab", SgdHyper{.lr = 1}, {a.as("a"), b.as("b")});
  optimizer.add_group("cd", SgdHyper{.lr = 1}, {c.as("c"), d.as("d")});
  double sum = 0;
  for (Tensor* t : {&a, &b, &c, &d}) {
    for (std::int64_t i = 0; i < t->grad.size(); ++i) sum += t->grad.get(i) * t->grad.get(i);
  }
  const double norm = std::sqrt(sum);
  const double before = b.value.get(5), grad = b.grad.get(5);
  optimizer.step({.max_grad_norm = 0.25});
  EXPECT_NEAR(optimizer.last_grad_norm().norm, norm, 1e-14 * norm);
  EXPECT_NEAR(b.value.get(5), before - grad * 0.25 / (norm + 1e-6), 1e-15);
}

TEST(Scale, LastNormIsOfTheLastStep) {
  Tensor a(1);
  Optimizer optimizer;
  EXPECT_TRUE(std::isnan(optimizer.last_grad_norm().norm));
  optimizer.add_group("g", AdamHyper{}, {a.as("a")});
  EXPECT_TRUE(std::isnan(optimizer.last_grad_norm().norm));
  const double norm = optimizer.grad_norm().norm;
  optimizer.step({.measure_grad_norm = true});
  EXPECT_EQ(bits(optimizer.last_grad_norm().norm), bits(norm));
  optimizer.step();
  EXPECT_TRUE(std::isnan(optimizer.last_grad_norm().norm));
}

// --- state ----------------------------------------------------------------------------------

TEST(State, CanBeWrittenAndBoundToResume) {
  for (const bool bind : {false, true}) {
    for (const RuleCase& rule : rule_cases()) {
      for (const LayoutCase& layout : kLayoutCases) {
        Tensor a(1, layout.value), b(1, layout.value);
        Optimizer first, second;
        first.add_group("g", rule.hyper, {a.as("a")}, {layout.slots});
        second.add_group("g", rule.hyper, {b.as("a")}, {layout.slots});
        for (int step = 0; step < 3; ++step) {
          a.new_gradient(step);
          first.step();
        }
        std::memcpy(b.value.data(), a.value.data(), a.value.bytes());
        StateRef from = first.state("a"), to = second.state("a");
        std::vector<std::unique_ptr<Array>> memory;
        if (!bind) second.step();  // makes the slots
        std::memcpy(b.value.data(), a.value.data(), a.value.bytes());
        for (const std::string& name : from.slot_names()) {
          const TensorView slot = from.slot(name);
          if (bind) {
            memory.push_back(std::make_unique<Array>(slot.dtype, 37, 3));
            to.bind_slot(name, memory.back()->view());
            EXPECT_EQ(to.slot(name).data, memory.back()->data());
          }
          std::memcpy(to.slot(name).data, slot.data, slot.bytes());
        }
        to.set_step(from.step());
        EXPECT_EQ(to.step(), 3);
        for (int step = 3; step < 6; ++step) {
          a.new_gradient(step);
          b.new_gradient(step);
          first.step();
          second.step();
        }
        EXPECT_TRUE(snapshot(first) == snapshot(second)) << rule.name << ' ' << layout.name;
        if (bind) {
          EXPECT_TRUE(second.memory_report().empty());
        }
        for (const auto& array : memory) EXPECT_TRUE(array->guards_intact());
      }
    }
  }
}

TEST(State, StepCanBeSetBeforeAndBetweenSteps) {
  Tensor a(1);
  Optimizer optimizer;
  optimizer.add_group("g", AdamHyper{}, {a.as("a")});
  StateRef state = optimizer.state("a");
  state.set_step(41);
  EXPECT_EQ(state.step(), 41);
  optimizer.step({.skip = true});
  EXPECT_EQ(state.step(), 41);
  optimizer.step();
  EXPECT_EQ(state.step(), 42);
  state.set_step(0);
  EXPECT_EQ(state.step(), 0);
  optimizer.step();
  optimizer.step();
  EXPECT_EQ(state.step(), 2);
  state.set_step(std::int64_t{1} << 53);
  optimizer.step();
  EXPECT_EQ(state.step(), (std::int64_t{1} << 53) + 1);
  for (std::int64_t i = 0; i < 37; ++i) EXPECT_TRUE(std::isfinite(a.value.get(i)));
}

TEST(State, ReportsItsMemory) {
  Tensor a(1), h(2, DType::kBFloat16), like(3, DType::kFloat16), never(4), frozen(5);
  Optimizer optimizer;
  EXPECT_TRUE(optimizer.memory_report().empty());
  optimizer.add_group("ams", AdamHyper{.amsgrad = true},
                      {a.as("a"), h.as("h"), never.without_grad("never"), frozen.as("frozen")});
  optimizer.add_group("like", AdamHyper{}, {like.as("like")}, {SlotDType::kLikeParameter});
  optimizer.freeze("frozen");
  EXPECT_TRUE(optimizer.memory_report().empty());
  optimizer.step();
  const std::map<std::string, std::size_t> expected = {
      {"exp_avg", 37 * (4 + 4 + 2)}, {"exp_avg_sq", 37 * (4 + 4 + 2)}, {"max_exp_avg_sq", 37 * 8}};
  EXPECT_EQ(optimizer.memory_report(), expected);
  optimizer.freeze("ams");  // its state stays
  optimizer.step();
  EXPECT_EQ(optimizer.memory_report(), expected);
}

TEST(State, SlotsAreAlignedZeroedAndApart) {
  std::vector<std::unique_ptr<Tensor>> tensors;
  std::vector<Parameter> parameters;
  for (std::int64_t size = 0; size < 40; ++size) {
    tensors.push_back(std::make_unique<Tensor>(1, kLayoutCases[size % 6].value, size));
    parameters.push_back(tensors.back()->as("p" + std::to_string(size)));
  }
  Optimizer optimizer;
  optimizer.add_group("g", AdamHyper{.amsgrad = true}, parameters);
  Array skip(DType::kFloat32, 1);
  skip.set(0, 1);
  optimizer.step({.skip_source = skip.view({})});
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> ranges;
  for (const Parameter& parameter : parameters) {
    StateRef state = optimizer.state(parameter.name);
    for (const std::string& name : state.slot_names()) {
      const TensorView slot = state.slot(name);
      const auto address = reinterpret_cast<std::uintptr_t>(slot.data);
      EXPECT_EQ(address % 64, 0u);
      EXPECT_EQ(slot.shape, parameter.value.shape);
      if (slot.bytes() != 0) ranges.push_back({address, address + slot.bytes()});
      for (std::int64_t i = 0; i < slot.size(); ++i) {
        EXPECT_EQ(bits(read_element(slot.data, slot.dtype, i)), 0u);
      }
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    EXPECT_LE(ranges[i - 1].second, ranges[i].first);
  }
}

// --- shapes ---------------------------------------------------------------------------------

TEST(Shapes, ZeroDimensionalAndEmpty) {
  Array scalar(DType::kFloat64, 1), scalar_grad(DType::kFloat64, 1);
  scalar.set(0, 1.0);
  scalar_grad.set(0, 0.5);
  Optimizer optimizer;
  optimizer.add_group(
      "g", SgdHyper{.lr = 0.25, .momentum = 0.5},
      {{"scalar", scalar.view({}), scalar_grad.view({})},
       {"empty", view(static_cast<float*>(nullptr), {0}), view(static_cast<float*>(nullptr), {0})},
       {"empty2", view(static_cast<double*>(nullptr), {3, 0, 5}),
        view(static_cast<double*>(nullptr), {3, 0, 5})}});
  optimizer.step();
  optimizer.step({.max_grad_norm = 100});
  // buffers 0.5 and 0.75
  EXPECT_EQ(scalar.get(0), 1.0 - 0.25 * 0.5 - 0.25 * 0.75);
  EXPECT_EQ(optimizer.state("empty").step(), 2);  // counted, though there is nothing to do
  EXPECT_EQ(optimizer.state("empty2").slot("momentum_buffer").shape,
            (std::vector<std::int64_t>{3, 0, 5}));
  EXPECT_EQ(optimizer.last_grad_norm().norm, 0.5);
}

TEST(Shapes, OnlyEmptyOnes) {
  Optimizer optimizer;
  optimizer.step();
  EXPECT_EQ(optimizer.grad_norm().norm, 0.0);
  optimizer.add_group("g", AdamHyper{},
                      {{"empty", view(static_cast<float*>(nullptr), {0}),
                        view(static_cast<float*>(nullptr), {0})}});
  optimizer.step({.max_grad_norm = 1, .skip_nonfinite = true});
  EXPECT_EQ(optimizer.state("empty").step(), 1);
  EXPECT_EQ(optimizer.last_grad_norm().norm, 0.0);
}

TEST(Shapes, ManyTinyTensors) {
  constexpr int count = 10'000;
  Array values(DType::kFloat32, 3 * count), grads(DType::kFloat32, 3 * count);
  Array whole(DType::kFloat32, 3 * count);
  values.fill_numbers(1);
  whole.fill_numbers(1);
  grads.fill_numbers(2);
  const auto part = [](Array& array, int i) {
    TensorView view = array.view({3});
    view.data = static_cast<float*>(view.data) + 3 * i;
    return view;
  };
  std::vector<Parameter> parameters;
  for (int i = 0; i < count; ++i) {
    parameters.push_back({"p" + std::to_string(i), part(values, i), part(grads, i)});
  }
  Optimizer many, one;
  many.add_group("g", AdamHyper{}, parameters);
  one.add_group("g", AdamHyper{}, {{"p", whole.view(), grads.view()}});
  for (int step = 0; step < 5; ++step) {
    many.step();
    one.step();
  }
  EXPECT_TRUE(values.raw() == whole.raw());
}

TEST(Shapes, HandlesOutliveAMove) {
  Tensor a(1);
  Optimizer optimizer;
  GroupRef group = optimizer.add_group("g", SgdHyper{.lr = 1}, {a.as("a")});
  ParameterRef parameter = optimizer.parameter("a");
  Optimizer moved = std::move(optimizer);
  group.set_lr(0.5);
  moved.step();
  EXPECT_EQ(moved.group("g").lr(), 0.5);
  EXPECT_EQ(parameter.name(), "a");
  Optimizer assigned;
  assigned = std::move(moved);
  assigned.step();
  EXPECT_EQ(assigned.state("a").step(), 2);
  EXPECT_EQ(group.parameters().size(), 1u);
  EXPECT_EQ(group.name(), "g");
}

// --- schedules ------------------------------------------------------------------------------

std::vector<double> rates(LrFactor factor, double lr, int steps, std::int64_t start = 0) {
  Tensor a(1);
  Optimizer optimizer;
  GroupRef group = optimizer.add_group("g", SgdHyper{.lr = lr}, {a.as("a")});
  LrSchedule schedule(optimizer, std::move(factor), start);
  std::vector<double> found;
  for (int i = 0; i < steps; ++i) {
    EXPECT_EQ(schedule.current_step(), start + i);
    found.push_back(group.lr());
    optimizer.step();
    schedule.step();
  }
  return found;
}

void expect_rates(const std::vector<double>& found, const std::vector<double>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    EXPECT_NEAR(found[i], expected[i], 1e-15) << "step " << i;
  }
}

/// The numbers are those of torch.optim.lr_scheduler.
TEST(Schedule, StepDecay) {
  expect_rates(rates(step_decay(3), 0.5, 8), {0.5, 0.5, 0.5, 0.05, 0.05, 0.05, 0.005, 0.005});
  expect_rates(rates(step_decay(1, 0.5), 8, 4), {8, 4, 2, 1});
  expect_rates(rates(step_decay(2, 1.0), 0.1, 3), {0.1, 0.1, 0.1});
}

TEST(Schedule, CosineWithWarmup) {
  expect_rates(rates(cosine_with_warmup(0, 4), 1, 6),  // CosineAnnealingLR(T_max=4), then its end
               {1, 0.8535533905932737, 0.5, 0.14644660940672627, 0, 0});
  expect_rates(rates(cosine_with_warmup(2, 6, 0.1), 2, 9),
               {1, 2, 2, 1.7363961030678928, 1.1, 0.46360389693210735, 0.2, 0.2, 0.2});
  expect_rates(rates(cosine_with_warmup(4, 5), 1, 6), {0.25, 0.5, 0.75, 1, 1, 0});
}

TEST(Schedule, AnyFunctionAndAnyStep) {
  const LrFactor factor = [](std::int64_t step) { return 1.0 / static_cast<double>(1 + step); };
  expect_rates(rates(factor, 1, 4), {1, 1.0 / 2, 1.0 / 3, 1.0 / 4});
  expect_rates(rates(factor, 1, 2, 7), {1.0 / 8, 1.0 / 9});
  expect_rates(rates([](std::int64_t) { return 0.0; }, 1, 2), {0, 0});

  Tensor a(1);
  Optimizer optimizer;
  GroupRef group = optimizer.add_group("g", SgdHyper{.lr = 3}, {a.as("a")});
  LrSchedule schedule(optimizer, factor);
  schedule.set_step(2);
  EXPECT_EQ(group.lr(), 1.0);
  schedule.set_step(0);
  EXPECT_EQ(group.lr(), 3.0);
  Optimizer moved = std::move(optimizer);  // handles and schedules stay valid
  schedule.set_step(2);
  EXPECT_EQ(moved.group("g").lr(), 1.0);
}

TEST(Schedule, GroupsKeepTheirBases) {
  Tensor a(1), b(2), c(3);
  Optimizer optimizer;
  GroupRef ga = optimizer.add_group("a", SgdHyper{.lr = 1}, {a.as("a")});
  GroupRef gb = optimizer.add_group("b", AdamHyper{.lr = 0.01}, {b.as("b")});
  LrSchedule schedule(optimizer, step_decay(1, 0.5));
  schedule.step();
  EXPECT_EQ(ga.lr(), 0.5);
  EXPECT_EQ(gb.lr(), 0.005);
  GroupRef gc = optimizer.add_group("c", RmspropHyper{.lr = 8}, {c.as("c")});  // later
  EXPECT_EQ(gc.lr(), 8);
  schedule.step();
  EXPECT_EQ(ga.lr(), 0.25);
  EXPECT_EQ(gc.lr(), 2);
  const std::unordered_map<std::string, double> base = {{"a", 1}, {"b", 0.01}, {"c", 8}};
  EXPECT_EQ(schedule.base(), base);
}

TEST(Schedule, Resumes) {
  Tensor a(1), b(1);
  Optimizer optimizer, restarted;
  GroupRef group = optimizer.add_group("g", SgdHyper{.lr = 1}, {a.as("a")});
  LrSchedule schedule(optimizer, cosine_with_warmup(3, 20));
  for (int i = 0; i < 7; ++i) schedule.step();
  // A checkpoint keeps the lr of its step.
  GroupRef later = restarted.add_group("g", SgdHyper{.lr = group.lr()}, {b.as("a")});
  LrSchedule resumed(restarted, cosine_with_warmup(3, 20), schedule.current_step(),
                     schedule.base());
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(bits(later.lr()), bits(group.lr()));
    schedule.step();
    resumed.step();
  }
}

}  // namespace
}  // namespace fusestep::test
