// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What a step asks of the runtime: one launch of prepare and one per (rule variant, layout), and
// nothing else but marking its place on the stream.
#include <gtest/gtest.h>

#include "cuda_sim.h"
#include "twins.h"

namespace fusestep::test {
namespace {

/// Every rule variant in one layout, several groups each.
std::vector<GroupSpec> all_variants() {
  std::vector<GroupSpec> groups;
  for (const RuleCase& rule : rule_cases()) {
    groups.push_back({rule.name, rule.hyper, kLayoutCases[0], {{100}, {9}}});
  }
  return groups;
}

void expect_nothing_but_launches(std::int64_t launches) {
  EXPECT_EQ(launches, cuda_sim::calls("cudaLaunchKernel")) << cuda_sim::call_list();
  const std::int64_t marks =
      cuda_sim::calls("cudaEventRecord") + cuda_sim::calls("cudaStreamGetId") +
      cuda_sim::calls("cudaStreamWaitEvent") + cuda_sim::calls("cudaStreamGetCaptureInfo") +
      cuda_sim::calls("cudaGetDevice") + cuda_sim::calls("cudaSetDevice");
  EXPECT_EQ(launches + marks, cuda_sim::calls()) << cuda_sim::call_list();
}

TEST(SteadyStep, LaunchesOncePerRuleVariant) {
  Twins twins(all_variants());
  twins.cuda.step();
  cuda_sim::forget_calls();
  twins.cuda.step();
  expect_nothing_but_launches(1 + 8);
}

TEST(SteadyStep, OfFlatGroupsLaunchesAsMuchAndClearsABufferAtOnce) {
  std::vector<GroupSpec> groups = all_variants();
  for (GroupSpec& group : groups) group.flat = true;
  Twins twins(groups);
  twins.cuda.step();
  cuda_sim::forget_calls();
  twins.cuda.step();
  expect_nothing_but_launches(1 + 8);
  cuda_sim::forget_calls();
  twins.cuda.group("adam").zero_grad();
  EXPECT_EQ(1, cuda_sim::calls("cudaMemsetAsync")) << cuda_sim::call_list();
  EXPECT_EQ(0, cuda_sim::calls("cudaLaunchKernel"));
  EXPECT_EQ(0, cuda_sim::calls("cudaStreamSynchronize") + cuda_sim::calls("cudaEventSynchronize"));
}

TEST(SteadyStep, LaunchesOncePerLayout) {
  std::vector<GroupSpec> groups;
  for (const LayoutCase& layout : kLayoutCases) {
    for (const char* name : {"x", "y"}) {
      groups.push_back({std::string(name) + layout.name, AdamHyper{}, layout, {{100}, {9}}});
    }
  }
  Twins twins(groups);
  twins.cuda.step();
  cuda_sim::forget_calls();
  twins.cuda.step();
  expect_nothing_but_launches(1 + 6);
}

TEST(SteadyStep, AddsOneLaunchPerRoundForTheNorm) {
  Twins twins({{"one", AdamHyper{}, kLayoutCases[0], {{100}}},
               {"two", AdamHyper{}, kLayoutCases[0], {{100}}}});
  twins.cuda.step({.max_grad_norm = 1.0});
  cuda_sim::forget_calls();
  twins.cuda.step({.max_grad_norm = 1.0});
  expect_nothing_but_launches(2 + 1 + 1);
}

TEST(SteadyStep, ReadsDeviceScalarsWithoutWaiting) {
  Twins twins(all_variants());
  DeviceScalar<float> found_inf(0), inverse_scale(1), lr(0.01f);
  twins.cuda.group("adam").set_lr_source(lr.view());
  const StepOptions options{.skip_source = found_inf.view(),
                            .grad_multiplier_source = inverse_scale.view()};
  twins.cuda.step(options);
  cuda_sim::forget_calls();
  twins.cuda.step(options);
  expect_nothing_but_launches(1 + 8);
}

TEST(SteadyStep, UploadsOnlyWhatHasChanged) {
  Twins twins(all_variants());
  twins.cuda.step();
  twins.cuda.group("adam").set_lr(0.5);
  cuda_sim::forget_calls();
  twins.cuda.step();
  EXPECT_EQ(1, cuda_sim::calls("cudaMemcpyAsync")) << cuda_sim::call_list();
  EXPECT_EQ(0, cuda_sim::calls("cudaMallocAsync")) << cuda_sim::call_list();
  twins.use_grads(1);
  cuda_sim::forget_calls();
  twins.cuda.step();
  EXPECT_EQ(1, cuda_sim::calls("cudaMemcpyAsync")) << cuda_sim::call_list();
  EXPECT_EQ(0, cuda_sim::calls("cudaMallocAsync")) << cuda_sim::call_list();
  EXPECT_EQ(0, cuda_sim::calls("cudaStreamSynchronize")) << cuda_sim::call_list();
}

TEST(SteadyStep, FreezingAndThawingAllocatesNothing) {
  Twins twins(all_variants());
  twins.cuda.step();
  twins.cuda.freeze("adam");
  twins.cuda.step();
  twins.cuda.thaw("adam");
  cuda_sim::forget_calls();
  twins.cuda.step();
  EXPECT_EQ(0, cuda_sim::calls("cudaMallocAsync")) << cuda_sim::call_list();
}

TEST(SteadyStep, NothingRunsUntilSomebodyWaits) {
  cuda_sim::reset(1, cuda_sim::Policy::kLate);
  Twins twins(all_variants());
  cudaDeviceSynchronize();
  ASSERT_EQ(0u, cuda_sim::pending());
  for (int i = 0; i < 10; ++i) twins.step({.max_grad_norm = 1.0});
  EXPECT_GT(cuda_sim::pending(), 90u);
  twins.expect_equal_values("at the end");
}

TEST(Capture, AsksForNothingButLaunches) {
  Twins twins(all_variants());
  cudaStream_t captured = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&captured, cudaStreamNonBlocking), cudaSuccess);
  const Stream streams[] = {{Device::cuda(), captured}};
  twins.step({.max_grad_norm = 1.0});
  ASSERT_EQ(cudaStreamBeginCapture(captured, cudaStreamCaptureModeGlobal), cudaSuccess);
  cuda_sim::forget_calls();
  twins.cuda.step({.max_grad_norm = 1.0, .streams = streams});
  expect_nothing_but_launches(2 + 1 + 8);
  EXPECT_EQ(0, cuda_sim::calls("cudaStreamWaitEvent")) << cuda_sim::call_list();
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(captured, &graph), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  twins.expect_equal_values("nothing has run");
  EXPECT_EQ(cudaStreamDestroy(captured), cudaSuccess);
}

}  // namespace
}  // namespace fusestep::test
