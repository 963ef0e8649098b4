// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What happens between steps: who steps, with what, and what a skip leaves alone.
#include <gtest/gtest.h>

#include "twins.h"

namespace fusestep::test {
namespace {

const std::vector<TensorSpec> kTensors = {{5}, {1031}, {4100, 1, 2}};

std::vector<GroupSpec> two_groups() {
  return {{"body", AdamWHyper{.lr = 1e-2, .weight_decay = 0.1}, kLayoutCases[0], kTensors},
          {"head", SgdHyper{.lr = 1e-2, .momentum = 0.9}, kLayoutCases[2], kTensors}};
}

class Behaviour : public testing::Test {
 protected:
  void SetUp() override { FUSESTEP_NEED_DEVICES(1); }

  /// A step with new gradients on both.
  void step(Twins& twins, const StepOptions& options = {}) {
    twins.fill_grads(pool_, ++step_);
    twins.step(options);
  }
  void steps(Twins& twins, int count) {
    for (int i = 0; i < count; ++i) step(twins);
  }

  std::vector<double> pool_ = ordinary_pool();
  std::uint64_t step_ = 0;
};

TEST_F(Behaviour, FrozenParametersRestAndGoOnWhenThawed) {
  Twins twins(two_groups());
  steps(twins, 2);
  twins.both([](Optimizer& o) {
    o.freeze("body.1");
    o.freeze("head");
  });
  steps(twins, 3);
  twins.expect_equal("frozen");
  twins.both([](Optimizer& o) { o.thaw("head"); });
  steps(twins, 2);
  twins.both([](Optimizer& o) { o.thaw("body.1"); });
  steps(twins, 2);
  twins.expect_equal("thawed");
  EXPECT_EQ(4, twins.cuda.state("body.1").step());
}

TEST_F(Behaviour, GroupsMayComeLateAndTablesGrow) {
  Twins twins(two_groups());
  for (int i = 0; i < 6; ++i) {
    steps(twins, 2);
    std::vector<TensorSpec> many(static_cast<std::size_t>(1) << (2 * i), {3});
    twins.add({{"late" + std::to_string(i), AdamHyper{.amsgrad = i % 2 == 1},
                kLayoutCases[static_cast<std::size_t>(i)], many}});
  }
  steps(twins, 2);
  twins.expect_equal("at the end");
}

TEST_F(Behaviour, ParametersWithoutGradientsWait) {
  std::vector<GroupSpec> groups = two_groups();
  groups[0].with_grads = false;
  Twins twins(groups);
  steps(twins, 2);
  EXPECT_EQ(0, twins.cuda.state("body.0").step());
  twins.set_grad("body.2", true);
  twins.set_grad("head.1", false);
  steps(twins, 2);
  twins.set_grad("head.1", true);
  steps(twins, 1);
  twins.expect_equal("at the end");
}

TEST_F(Behaviour, GradientsMayMoveEveryStep) {
  Twins twins(two_groups());
  for (int i = 0; i < 20; ++i) {
    twins.fill_grads(pool_, static_cast<std::uint64_t>(i), i % 2);
    twins.use_grads(i % 2);
    twins.step();
  }
  twins.expect_equal_values("at the end");
}

TEST_F(Behaviour, SettingsMayChangeEveryStep) {
  Twins twins(two_groups());
  for (int i = 0; i < 20; ++i) {
    twins.both([i](Optimizer& o) {
      o.group("body").set_hyper(AdamHyper{.lr = 1e-2 / (i + 1),
                                          .betas = {0.9 - 0.01 * i, 0.99},
                                          .weight_decay = 0.01 * i,
                                          .amsgrad = i % 3 == 1,
                                          .maximize = i % 5 == 4,
                                          .decoupled_weight_decay = i % 2 == 1});
      o.group("head").set_hyper(
          SgdHyper{.lr = 1e-3 * i, .momentum = i % 4 == 0 ? 0.0 : 0.9, .dampening = 0.1});
    });
    step(twins);
  }
  twins.expect_equal("at the end");
}

TEST_F(Behaviour, LearningRateMayLiveOnTheDevice) {
  Twins twins(two_groups());
  DeviceScalar<float> body(0);
  DeviceScalar<double> head(0);
  twins.cuda.group("body").set_lr_source(body.view());
  twins.cuda.group("head").set_lr_source(head.view());
  for (int i = 1; i <= 6; ++i) {
    const float lr = 0.01f / static_cast<float>(i);
    twins.cpu.group("body").set_lr(double{lr});
    twins.cpu.group("head").set_lr(0.1 / i);
    body.set(lr);
    head.set(0.1 / i);
    step(twins);
  }
  twins.expect_equal("read from the device");
  twins.both([](Optimizer& o) {
    o.group("body").set_lr_source({});
    o.group("body").set_lr(1e-3);
  });
  step(twins);
  twins.expect_equal("a number again");
}

TEST_F(Behaviour, SkippedStepsChangeNothing) {
  Twins twins(two_groups());
  DeviceScalar<float> found_inf(0);
  DeviceScalar<double> found_inf_wide(0);
  for (int i = 0; i < 12; ++i) {
    const bool skip = i % 3 == 0;  // the first step of all, too: SGD's buffer stays empty
    twins.fill_grads(pool_, static_cast<std::uint64_t>(i));
    const std::string before = twins.values_on_device();
    found_inf.set(skip ? 1.0f : 0.0f);
    found_inf_wide.set(skip ? std::nan("") : 0.0);
    float on_host = skip;
    twins.cpu.step({.skip_source = view(&on_host, {})});
    if (i % 2 == 0) twins.cuda.step({.skip_source = found_inf.view()});
    if (i % 2 == 1) twins.cuda.step({.skip_source = found_inf_wide.view()});
    EXPECT_EQ(skip, before == twins.values_on_device()) << i;
    twins.expect_equal("step " + std::to_string(i));
  }
  twins.cuda.step({.skip = true});
  EXPECT_EQ(5, twins.cuda.skipped_steps());
  EXPECT_EQ(8, twins.cuda.state("body.0").step());
}

TEST_F(Behaviour, SkipSourceMayLiveOnTheHost) {
  Twins twins(two_groups());
  float found_inf = 1;
  const TensorView source = view(&found_inf, {});
  step(twins, {.skip_source = source});
  found_inf = 0;
  step(twins, {.skip_source = source});
  twins.expect_equal("at the end");
  EXPECT_EQ(1, twins.cuda.state("head.0").step());
  EXPECT_EQ(1, twins.cuda.skipped_steps());
}

TEST_F(Behaviour, GradMultiplierMayLiveOnTheDevice) {
  Twins twins(two_groups());
  DeviceScalar<float> narrow(0);
  DeviceScalar<double> wide(0);
  for (int i = 1; i <= 6; ++i) {
    const float multiplier = 1.0f / static_cast<float>(i * 3);
    narrow.set(multiplier);
    wide.set(multiplier);
    twins.fill_grads(pool_, static_cast<std::uint64_t>(i));
    twins.cpu.step({.grad_multiplier = 0.5 * multiplier});
    twins.cuda.step({.grad_multiplier = 0.5,
                     .grad_multiplier_source = i % 2 == 0 ? narrow.view() : wide.view()});
  }
  twins.expect_equal("at the end");
}

TEST_F(Behaviour, StepCountsCanBeReadAndSet) {
  Twins twins(two_groups());
  twins.both([](Optimizer& o) { o.state("body.0").set_step(41); });
  EXPECT_EQ(41, twins.cuda.state("body.0").step());
  step(twins);
  EXPECT_EQ(42, twins.cuda.state("body.0").step());
  EXPECT_EQ(1, twins.cuda.state("body.1").step());
  twins.both([](Optimizer& o) {
    o.state("body.1").set_step(0);
    o.state("head.2").set_step(1000000);
  });
  step(twins);
  twins.expect_equal("at the end");
}

TEST_F(Behaviour, SlotsOfTheCallerGoOnWithWhatTheyHold) {
  std::vector<GroupSpec> groups = two_groups();
  for (GroupSpec& group : groups) group.tensors[1].bind_slots = true;
  groups[1].tensors[1].slot_offset = {3, 0, 0};
  Twins twins(groups);
  steps(twins, 3);
  twins.expect_equal("at the end");
  EXPECT_EQ(twins.cpu.memory_report(), twins.cuda.memory_report());
}

TEST_F(Behaviour, ParametersMayMove) {
  Twins twins({{"only", AdamHyper{}, kLayoutCases[0], {{1000}}}});
  steps(twins, 2);
  const TensorView old = twins.cuda.parameter("only.0").value();
  DeviceMemory moved(old.bytes());
  check(cudaMemcpy(moved.data(), old.data, old.bytes(), cudaMemcpyDeviceToDevice));
  twins.cuda.parameter("only.0").set_value(
      view(reinterpret_cast<float*>(moved.data()), {1000}, Device::cuda()));
  step(twins);
  check(cudaMemcpy(old.data, moved.data(), old.bytes(), cudaMemcpyDeviceToDevice));
  twins.expect_equal("at the end");
}

TEST_F(Behaviour, NothingStepsWithoutParameters) {
  Optimizer optimizer;
  optimizer.step();
  Twins twins({{"only", AdamHyper{}, kLayoutCases[0], {{0}}}});
  twins.cuda.freeze("only.0");
  twins.cuda.step({.measure_grad_norm = true});
  EXPECT_EQ(0, twins.cuda.state("only.0").step());
  twins.cuda.thaw("only.0");
  twins.cuda.step({.measure_grad_norm = true});
  EXPECT_EQ(1, twins.cuda.state("only.0").step());
  EXPECT_EQ(0, twins.cuda.last_grad_norm().norm);
}

TEST_F(Behaviour, DevicesThatAreNotThereAreRefused) {
  float memory[4];
  Optimizer optimizer;
  EXPECT_THROW(
      optimizer.add_group("g", AdamHyper{}, {{"p", view(memory, {4}, Device::cuda(1000))}}),
      InvalidArgument);
}

}  // namespace
}  // namespace fusestep::test
