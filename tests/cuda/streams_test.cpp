// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Streams, threads and the current device: what a step waits for, and what it leaves as it was.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "own_stream.h"
#include "twins.h"

namespace fusestep::test {
namespace {

std::vector<GroupSpec> one_group() {
  return {{"g", AdamWHyper{.lr = 1e-2}, kLayoutCases[0], {{3000}, {5}, {70, 1, 1}}},
          {"s", SgdHyper{.lr = 1e-2, .momentum = 0.9}, kLayoutCases[1], {{3000}}}};
}

TEST(Streams, ConsecutiveStepsOnDifferentStreamsAreOrdered) {
  FUSESTEP_NEED_DEVICES(1);
  Twins twins(one_group());
  twins.fill_grads(ordinary_pool(), 1);
  check(cudaDeviceSynchronize());
  const OwnStream streams[3] = {OwnStream(), OwnStream(), OwnStream(cudaStreamDefault)};
  for (int i = 0; i < 40; ++i) {
    const int which = static_cast<int>(hash(3, static_cast<std::uint64_t>(i)) % 4);
    const Stream stream = which == 3 ? Stream{Device::cuda(), static_cast<void*>(cudaStream_t{})}
                                     : streams[which].view();
    const StepOptions options{.max_grad_norm = i % 4 == 0 ? 0.5 : HUGE_VAL,
                              .streams = {&stream, 1}};
    if (i % 5 == 0) twins.both([i](Optimizer& o) { o.group("g").set_lr(1e-2 / (i + 1)); });
    if (i % 7 == 3) twins.both([](Optimizer& o) { o.freeze("g.1"); });
    if (i % 7 == 5) twins.both([](Optimizer& o) { o.thaw("g.1"); });
    twins.cpu.step({.max_grad_norm = options.max_grad_norm});
    twins.cuda.step(options);
  }
  twins.expect_equal("at the end");
}

TEST(Streams, StepWaitsForGradientsOfItsStream) {
  FUSESTEP_NEED_DEVICES(1);
  Twins twins(one_group());
  const std::vector<double> pool = ordinary_pool();
  twins.fill_grads(pool, 1);
  check(cudaDeviceSynchronize());
  const OwnStream stream;
  const Stream view = stream.view();
  for (std::uint64_t step = 2; step < 6; ++step) {
    // Gradients that come late: a host function sleeps in front of their copy.
    const auto sleep = [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
    check(cudaLaunchHostFunc(stream.get(), sleep, nullptr));
    const auto staged = twins.enqueue_grads(pool, step, stream.get());
    twins.cpu.step();
    twins.cuda.step({.streams = {&view, 1}});
    check(cudaStreamSynchronize(stream.get()));
  }
  twins.expect_equal("at the end");
}

TEST(Streams, MayBeDestroyedBetweenSteps) {
  FUSESTEP_NEED_DEVICES(1);
  auto twins = std::make_unique<Twins>(one_group());
  twins->fill_grads(ordinary_pool(), 1);
  check(cudaDeviceSynchronize());
  for (int i = 0; i < 12; ++i) {
    const OwnStream stream;  // a handle that was used before, as often as not
    const Stream view = stream.view();
    twins->cpu.step();
    twins->cuda.step({.streams = {&view, 1}});
    if (i % 4 == 1) twins->both([](Optimizer& o) { o.group("g").set_lr(3e-3); });
    if (i == 6) twins->add({{"late", AdamHyper{}, kLayoutCases[0], {{33}}}});
    if (i == 6) check(cudaDeviceSynchronize());
  }
  twins->expect_equal("at the end");
  {
    const OwnStream stream;
    const Stream view = stream.view();
    twins->cuda.step({.streams = {&view, 1}});
  }
  twins.reset();
  check(cudaDeviceSynchronize());
}

TEST(Streams, CurrentDeviceIsLeftAlone) {
  FUSESTEP_NEED_DEVICES(2);
  for (const int current : {0, 1}) {
    check(cudaSetDevice(current));
    int now = -1;
    {
      Twins twins(one_group(), 1 - current);
      twins.fill_grads(ordinary_pool(), 1);
      twins.step({.measure_grad_norm = true});
      twins.expect_equal("on the other device");
      check(cudaGetDevice(&now));
      EXPECT_EQ(current, now);
    }
    check(cudaGetDevice(&now));
    EXPECT_EQ(current, now);
  }
  check(cudaSetDevice(0));
}

TEST(Streams, OptimizersAreIndependentOfEachOther) {
  FUSESTEP_NEED_DEVICES(1);
  const auto train = [](std::uint64_t seed) {
    const OwnStream stream;
    const Stream view = stream.view();
    Twins twins(one_group());
    const std::vector<double> pool = ordinary_pool();
    for (std::uint64_t step = 1; step <= 20; ++step) {
      twins.fill_grads(pool, step * seed);
      check(cudaDeviceSynchronize());
      twins.cpu.step({.max_grad_norm = 1.0});
      twins.cuda.step({.max_grad_norm = 1.0, .streams = {&view, 1}});
      check(cudaStreamSynchronize(stream.get()));
    }
    twins.expect_equal("of thread " + std::to_string(seed));
  };
  std::thread threads[] = {std::thread(train, 1), std::thread(train, 2)};
  for (std::thread& thread : threads) thread.join();
}

TEST(Streams, UploadsThatWaitDoNotOverwriteEachOther) {
  FUSESTEP_NEED_DEVICES(1);
  // The tables of so many groups fill the ring many times over before anything has run.
  std::vector<GroupSpec> groups;
  for (int i = 0; i < 300; ++i) {
    groups.push_back({"g" + std::to_string(i), SgdHyper{}, kLayoutCases[0], {{3}}});
  }
  Twins twins(groups);
  twins.fill_grads(ordinary_pool(), 1);
  for (int i = 0; i < 400; ++i) {
    twins.both([i](Optimizer& o) {
      o.group("g" + std::to_string(i % 300)).set_hyper(SgdHyper{.lr = 1e-3 * (i % 9 - 1 + 1)});
    });
    twins.step();
  }
  twins.expect_equal("at the end");
}

TEST(Streams, MovedGradientsOfOneStepAreNotThoseOfTheNext) {
  FUSESTEP_NEED_DEVICES(1);
  Twins twins(one_group());
  twins.fill_grads(ordinary_pool(), 1, 0);
  twins.fill_grads(ordinary_pool(), 2, 1);
  for (int i = 0; i < 3000; ++i) {
    twins.use_grads(i % 2);
    twins.step();
  }
  twins.expect_equal_values("at the end");
}

/// Counts what it gives out; can refuse.
class CountingAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes, Stream stream) override {
    streams.push_back(stream.handle);
    if (refuse) return nullptr;
    if (raise) throw OutOfMemory("the caller's allocator is empty");
    void* data = nullptr;
    check(cudaMallocAsync(&data, bytes, static_cast<cudaStream_t>(stream.handle)));
    live[data] = bytes;
    ++calls;
    return data;
  }
  void deallocate(void* data, std::size_t bytes, Stream stream) noexcept override {
    EXPECT_EQ(1u, live.count(data));
    EXPECT_EQ(live[data], bytes);
    live.erase(data);
    static_cast<void>(cudaFreeAsync(data, static_cast<cudaStream_t>(stream.handle)));
  }

  std::map<void*, std::size_t> live;
  std::vector<void*> streams;
  int calls = 0;
  bool refuse = false, raise = false;
};

TEST(CallersAllocator, GivesAllStateAndGetsItBack) {
  FUSESTEP_NEED_DEVICES(1);
  const auto allocator = std::make_shared<CountingAllocator>();
  {
    const OwnStream stream;
    const Stream view = stream.view();
    Twins twins(one_group(), 0, {.cuda_allocator = allocator});
    twins.fill_grads(ordinary_pool(), 1);
    check(cudaDeviceSynchronize());
    twins.cpu.step();
    twins.cuda.step({.streams = {&view, 1}});
    EXPECT_EQ(2, allocator->calls);  // one per dtype
    EXPECT_EQ(static_cast<void*>(stream.get()), allocator->streams.front());
    twins.expect_equal("at the end");
    for (const std::string& slot : twins.cuda.state("g.0").slot_names()) {
      const char* at = static_cast<char*>(twins.cuda.state("g.0").slot(slot).data);
      bool inside = false;
      for (const auto& [data, bytes] : allocator->live) {
        inside = inside || (at >= data && at < static_cast<char*>(data) + bytes);
      }
      EXPECT_TRUE(inside) << slot;
    }
  }
  EXPECT_TRUE(allocator->live.empty());
}

TEST(CallersAllocator, ThatFailsLeavesEverythingAsItWas) {
  FUSESTEP_NEED_DEVICES(1);
  const auto allocator = std::make_shared<CountingAllocator>();
  {
    Twins twins(one_group(), 0, {.cuda_allocator = allocator});
    twins.fill_grads(ordinary_pool(), 1);
    for (const bool raise : {false, true, false}) {
      allocator->refuse = !raise;
      allocator->raise = raise;
      EXPECT_THROW(twins.cuda.step(), OutOfMemory);
      twins.expect_equal("after a failure");
    }
    allocator->refuse = allocator->raise = false;
    twins.step();
    twins.expect_equal("after a success");
  }
  EXPECT_TRUE(allocator->live.empty());
}

}  // namespace
}  // namespace fusestep::test
