// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Runs tests on simulated devices: each starts afresh, with an order of its own drawn from
// FUSESTEP_SIM_SEED (1 where it is not set), and fails where it does what a correct program never
// does.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "cuda_sim.h"

namespace {

class SimulatorListener : public testing::EmptyTestEventListener {
 public:
  explicit SimulatorListener(std::uint64_t seed) : seed_(seed) {}

  void OnTestStart(const testing::TestInfo&) override {
    cuda_sim::reset(seed_, static_cast<cuda_sim::Policy>(seed_ % 3));
  }
  void OnTestEnd(const testing::TestInfo& info) override {
    cuda_sim::check_guards();
    for (const std::string& text : cuda_sim::take_violations()) ADD_FAILURE() << text;
    if (info.result()->Failed()) std::printf("FUSESTEP_SIM_SEED=%ju\n", std::uintmax_t{seed_});
  }

 private:
  std::uint64_t seed_;
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const char* seed = std::getenv("FUSESTEP_SIM_SEED");
  testing::UnitTest::GetInstance()->listeners().Append(
      new SimulatorListener(seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10)));
  return RUN_ALL_TESTS();
}
