// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// State that lives on CUDA devices: saved and loaded with the bits of the CPU, in the order of the
// caller's streams.
#include <gtest/gtest.h>

#include "temporary_directory.h"
#include "twins.h"

namespace fusestep::test {
namespace {

class OwnStream {
 public:
  explicit OwnStream(int device = 0) : device_(device) {
    const CurrentDevice current(device);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~OwnStream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t get() const { return stream_; }
  Stream view() const { return {Device::cuda(device_), static_cast<void*>(stream_)}; }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
};

/// Names, settings, counts and bytes.
std::string text_of(const StateDict& state) {
  std::string text;
  for (const GroupState& group : state.param_groups) {
    text += "group " + group.name + " " + std::string(rule_name(group.hyper)) + " " +
            std::to_string(bits(learning_rate(group.hyper))) + "\n";
  }
  for (const ParameterState& p : state.state) {
    text += p.name + " " + std::string(name_of(p.dtype)) + to_string(p.shape) + " " +
            std::to_string(p.step) + (p.frozen ? " frozen\n" : "\n");
    for (const auto& [name, slot] : p.slots) {
      const auto size = static_cast<std::int64_t>(slot.data.size() / size_of(slot.dtype));
      text += "  " + name + " " + std::string(name_of(slot.dtype)) + to_string(slot.shape) + " " +
              std::to_string(fnv(canonical(slot.data.data(), slot.dtype, size))) + "\n";
    }
  }
  return text;
}

void expect_same_state(Optimizer& one, Optimizer& other, const std::string& when) {
  EXPECT_EQ(text_of(one.state_dict()), text_of(other.state_dict())) << when;
}

std::vector<GroupSpec> two_groups(const Hyper& hyper, const LayoutCase& layout) {
  Hyper faster = hyper;
  std::visit([](auto& h) { h.lr *= 3; }, faster);
  return {{"g", hyper, layout, {{700, 1}, {3}, {0}}}, {"h", faster, layout, {{5000}, {1}}}};
}

const std::set<std::string> kVariants = {"adam",
                                         "adamw",
                                         "amsgrad",
                                         "sgd",
                                         "sgd_momentum",
                                         "sgd_nesterov",
                                         "rmsprop",
                                         "rmsprop_momentum",
                                         "rmsprop_centered",
                                         "rmsprop_both"};

/// Every rule and dtype: device to host, host to device, device to device.
TEST(CudaState, GoesOnToTheBit) {
  FUSESTEP_NEED_DEVICES(1);
  const TemporaryDirectory directory;
  const std::vector<double> pool = ordinary_pool();
  for (const RuleCase& rule : rule_cases()) {
    if (kVariants.count(rule.name) == 0) continue;
    for (const LayoutCase& layout : kLayoutCases) {
      const std::string when = rule.name + ", " + layout.name;
      Twins twins(two_groups(rule.hyper, layout)), crossed(two_groups(rule.hyper, layout));
      twins.both([](Optimizer& o) { o.freeze("g.1"); });
      for (std::uint64_t i = 0; i < 3; ++i) {
        twins.fill_grads(pool, i);
        if (i == 2) twins.both([](Optimizer& o) { o.thaw("g.1"); });
        twins.step();
      }
      twins.both([](Optimizer& o) { o.freeze("h.1"); });
      expect_same_state(twins.cpu, twins.cuda, when + ", saved");
      twins.cuda.save(directory / "cuda", {.values = true});
      twins.cpu.save(directory / "cpu", {.values = true});
      EXPECT_TRUE(crossed.cpu.load(directory / "cuda").complete()) << when;
      EXPECT_TRUE(crossed.cuda.load(directory / "cpu").complete()) << when;
      for (Twins* pair : {&twins, &crossed}) {
        for (std::uint64_t i = 3; i < 9; ++i) {
          if (i == 6) pair->both([](Optimizer& o) { o.thaw("h"); });
          pair->fill_grads(pool, i);
          pair->step();
        }
        pair->expect_equal(when + ", later");
      }
      EXPECT_TRUE(twins.values_on_device() == crossed.values_on_device()) << when;
      // Over state that is there, and without what a step has skipped.
      float found = 1;
      Twins skipped(two_groups(rule.hyper, layout));
      skipped.step({.skip_source = view(&found, {})});
      expect_same_state(skipped.cpu, skipped.cuda, when + ", skipped");
      twins.cuda.load_state_dict(skipped.cpu.state_dict());
      twins.cpu.load_state_dict(skipped.cuda.state_dict());
      twins.step();
      twins.expect_equal(when + ", after a load of what was skipped");
      if (testing::Test::HasFailure()) return;
    }
  }
}

/// Nobody waits but state_dict, save and load themselves.
TEST(CudaState, IsOrderedOnTheCallersStreams) {
  FUSESTEP_NEED_DEVICES(1);
  const TemporaryDirectory directory;
  const std::vector<double> pool = ordinary_pool();
  Twins twins(two_groups(AdamHyper{.lr = 1e-2}, kLayoutCases[2]));
  check(cudaDeviceSynchronize());
  const OwnStream streams[3];
  std::vector<std::shared_ptr<void>> staged;
  for (int i = 0; i < 12; ++i) {
    const OwnStream& stream = streams[i % 3];
    const Stream here = stream.view(), there = streams[(i + 1) % 3].view();
    for (auto& memory : twins.enqueue_grads(pool, static_cast<std::uint64_t>(i), stream.get())) {
      staged.push_back(std::move(memory));
    }
    twins.cpu.step();
    twins.cuda.step({.streams = {&here, 1}});
    // The values are the caller's: work on them is ordered by the streams given.
    const std::span<const Stream> both[] = {{&here, 1}, {&there, 1}};
    const auto name = std::to_string(i);
    switch (i % 4) {
      case 0:
        EXPECT_EQ(text_of(twins.cpu.state_dict()), text_of(twins.cuda.state_dict(both[i % 8 / 4])));
        break;
      case 1:
        twins.cuda.save_async(directory / name, {.values = true, .streams = both[0]});
        twins.cpu.save_async(directory / (name + "cpu"), {.values = true});
        break;
      case 2:
        twins.both([](Optimizer& o) { o.wait_for_save(); });
        twins.cuda.load(directory / (std::to_string(i - 1) + "cpu"), {.streams = both[0]});
        twins.cpu.load(directory / std::to_string(i - 1));
        break;
      case 3: twins.cuda.load_state_dict(twins.cpu.state_dict(), both[0]); break;
    }
    // The next gradients come on another stream: they must not overtake this step.
    check(cudaStreamSynchronize(stream.get()));
  }
  check(cudaDeviceSynchronize());
  twins.expect_equal("at the end");
}

TEST(CudaState, OfSeveralDevices) {
  FUSESTEP_NEED_DEVICES(2);
  const TemporaryDirectory directory;
  const std::vector<double> pool = ordinary_pool();
  const auto groups = [](const char* name) {
    return std::vector<GroupSpec>{
        {name, RmspropHyper{.momentum = 0.9}, kLayoutCases[1], {{300}, {7}}}};
  };
  Twins twins, loaded;
  for (Twins* pair : {&twins, &loaded}) {
    for (const int batch : {pair->prepare(groups("a"), 0), pair->prepare(groups("b"), 1)}) {
      pair->join(pair->cpu, batch);
      pair->join(pair->cuda, batch);
    }
  }
  const OwnStream first(0), second(1);
  const Stream streams[] = {first.view(), second.view()};
  const auto synchronize = [] {
    for (const int device : {0, 1}) {
      const CurrentDevice current(device);
      check(cudaDeviceSynchronize());
    }
  };
  for (std::uint64_t i = 0; i < 3; ++i) {
    synchronize();
    twins.fill_grads(pool, i);
    synchronize();
    twins.cpu.step();
    twins.cuda.step({.streams = streams});
  }
  twins.cuda.save(directory / "state", {.values = true, .streams = streams});
  loaded.cuda.load(directory / "state", {.streams = streams});
  loaded.cpu.load(directory / "state");
  const StateDict state = twins.cuda.state_dict(streams);
  EXPECT_EQ(text_of(state), text_of(twins.cpu.state_dict()));
  loaded.cuda.load_state_dict(state, streams);
  synchronize();
  for (std::uint64_t i = 3; i < 6; ++i) {
    loaded.fill_grads(pool, i);
    twins.fill_grads(pool, i);
    for (Twins* pair : {&twins, &loaded}) {
      pair->cpu.step();
      pair->cuda.step();
    }
  }
  twins.expect_equal("whole");
  loaded.expect_equal("loaded");
  EXPECT_TRUE(twins.values_on_device() == loaded.values_on_device());
}

/// Gives memory so many times.
class EndingAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes, Stream stream) override {
    if (left-- <= 0) throw OutOfMemory("the caller's allocator is empty");
    void* data = nullptr;
    check(cudaMallocAsync(&data, bytes, static_cast<cudaStream_t>(stream.handle)));
    ++live;
    return data;
  }
  void deallocate(void* data, std::size_t, Stream stream) noexcept override {
    --live;
    static_cast<void>(cudaFreeAsync(data, static_cast<cudaStream_t>(stream.handle)));
  }
  int left = 1000, live = 0;
};

TEST(CudaState, AllocatorThatEndsLeavesEverythingAsItWas) {
  FUSESTEP_NEED_DEVICES(1);
  const std::vector<GroupSpec> groups = {{"a", AdamHyper{}, kLayoutCases[0], {{70}}},
                                         {"b", AdamHyper{}, kLayoutCases[1], {{9}}},
                                         {"c", SgdHyper{.momentum = 0.9}, kLayoutCases[3], {{9}}}};
  Twins donor(groups);
  donor.step();
  const StateDict state = donor.cuda.state_dict();
  for (const bool stepped : {false, true}) {
    const auto allocator = std::make_shared<EndingAllocator>();
    {
      Twins twins(groups, 0, {.cuda_allocator = allocator});
      twins.both([](Optimizer& o) { o.freeze("b"); });
      if (stepped) twins.step();  // a and c have slots, b has none
      const int live = allocator->live;
      for (int given = 0; given < (stepped ? 1 : 3); ++given) {
        allocator->left = given;
        EXPECT_THROW(twins.cuda.load_state_dict(state), OutOfMemory);
        EXPECT_EQ(live, allocator->live);
        twins.expect_equal("after a failure");
      }
      allocator->left = stepped ? 1 : 3;
      twins.cuda.load_state_dict(state);
      twins.cpu.load_state_dict(state);
      twins.expect_equal("after a success");
      allocator->left = 0;
      twins.step();  // needs nothing more
      twins.expect_equal("after a step");
    }
    EXPECT_EQ(0, allocator->live);
  }
}

/// Step counts are the device's until they are asked for; those a load gives are not lost.
TEST(CudaState, CountsThatNoStepHasSeen) {
  FUSESTEP_NEED_DEVICES(1);
  Twins twins(two_groups(AdamHyper{}, kLayoutCases[0]));
  twins.step();
  StateDict state = twins.cpu.state_dict();
  for (ParameterState& parameter : state.state) parameter.step = 41;
  twins.both([&](Optimizer& o) { o.load_state_dict(state); });
  twins.both([&](Optimizer& o) { EXPECT_EQ(41, o.state("h.0").step()); });
  expect_same_state(twins.cpu, twins.cuda, "not stepped yet");
  twins.step();
  twins.expect_equal("stepped");
}

}  // namespace
}  // namespace fusestep::test
