// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The simulated runtime finds what it is there to find: small wrong programs, each of which works
// on a GPU most of the time.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cuda_sim.h"
#include "fusestep/detail/host_device.h"
#include "launch.cuh"

namespace cuda_sim {
namespace {

struct Fill {
  static constexpr int kThreads = 32;
  float* data;
  int size;
  float value;
  void operator()(unsigned block, unsigned thread) const {
    const int i = static_cast<int>(block * kThreads + thread);
    if (i < size) data[i] = value;
  }
};

struct Increment {
  static constexpr int kThreads = 32;
  float* data;
  int size;
  void operator()(unsigned block, unsigned thread) const {
    const int i = static_cast<int>(block * kThreads + thread);
    if (i < size) data[i] += 1;
  }
};

struct Copy {
  static constexpr int kThreads = 1;
  float* to;
  const float* from;
  void operator()(unsigned, unsigned) const { *to = *from; }
};

/// Forgets the barrier: reads in the phase in which its neighbour writes.
struct WithoutBarrier {
  static constexpr int kThreads = 32, kPhases = 1;
  struct Shared {
    float x[kThreads];
  };
  float* data;
  void operator()(unsigned, unsigned thread, int, Shared& shared) const {
    shared.x[thread] = 1;
    data[thread] = shared.x[(thread + 1) % kThreads];
  }
};

constexpr int kSize = 100;
constexpr unsigned kBlocks = 4;

class Simulator : public testing::Test {
 protected:
  void SetUp() override { reset(1, Policy::kLate); }

  static float* device_floats(int size = kSize) {
    float* data = nullptr;
    EXPECT_EQ(cudaSuccess, cudaMalloc(&data, static_cast<std::size_t>(size) * sizeof(float)));
    return data;
  }
  static cudaStream_t stream(unsigned flags = cudaStreamNonBlocking) {
    cudaStream_t made = nullptr;
    EXPECT_EQ(cudaSuccess, cudaStreamCreateWithFlags(&made, flags));
    return made;
  }
  static std::vector<float> download(const float* data, cudaStream_t from) {
    std::vector<float> host(kSize);
    EXPECT_EQ(cudaSuccess, cudaMemcpyAsync(host.data(), data, kSize * sizeof(float),
                                           cudaMemcpyDeviceToHost, from));
    return host;
  }
  static void fill(float* data, float value, cudaStream_t on, int size = kSize) {
    EXPECT_EQ(cudaSuccess, fusestep::detail::launch(Fill{data, size, value}, kBlocks, on));
  }
  static void expect_violation(const std::string& part) {
    check_guards();
    std::string all;
    for (const std::string& text : take_violations()) all += text + "\n";
    EXPECT_NE(std::string::npos, all.find(part)) << "found: " << all;
  }
};

TEST_F(Simulator, NothingRunsBeforeSomebodyWaits) {
  float* data = device_floats();
  const cudaStream_t on = stream();
  fill(data, 1, on);
  EXPECT_EQ(1u, pending());
  EXPECT_EQ(1.0f, download(data, on)[kSize - 1]);
  EXPECT_EQ(0u, pending());
}

TEST_F(Simulator, StreamsThatDoNotWaitForEachOtherAreNotOrdered) {
  float* data = device_floats();
  const cudaStream_t producer = stream(), consumer = stream();
  fill(data, 1, producer);
  EXPECT_TRUE(std::isnan(download(data, consumer)[0]));  // the event is missing
}

TEST_F(Simulator, AWaitCapturesTheLatestRecord) {
  float* data = device_floats();
  const cudaStream_t producer = stream(), consumer = stream();
  cudaEvent_t event = nullptr;
  cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  cudaStreamWaitEvent(consumer, event, 0);  // nothing recorded yet: no wait
  fill(data, 1, producer);
  EXPECT_TRUE(std::isnan(download(data, consumer)[0]));
  cudaEventRecord(event, producer);
  cudaStreamWaitEvent(consumer, event, 0);
  fill(data, 2, producer);
  cudaEventRecord(event, producer);  // after the wait: does not count for it
  EXPECT_EQ(1.0f, download(data, consumer)[0]);
}

TEST_F(Simulator, AdoptedMemoryIsOfItsDevice) {
  std::vector<float> theirs(kSize), host(kSize, 1);
  const std::size_t bytes = kSize * sizeof(float);
  adopt(theirs.data(), bytes, 1);
  cudaMemcpy(host.data(), theirs.data(), bytes, cudaMemcpyDeviceToHost);
  EXPECT_EQ(0.0f, host[0]);
  cudaMemsetAsync(theirs.data() + kSize - 1, 0, sizeof(float));
  cudaDeviceSynchronize();
  EXPECT_TRUE(take_violations().empty());
  cudaMemsetAsync(theirs.data() + kSize - 1, 0, 2 * sizeof(float));
  cudaDeviceSynchronize();
  expect_violation("outside an allocation of device 1");

  adopt(theirs.data() + 10, sizeof(float), 2);  // other memory has come to lie there
  EXPECT_NE(cudaSuccess, cudaMemcpy(host.data(), theirs.data(), 4, cudaMemcpyDeviceToHost));
  expect_violation("the direction of a copy");
  forget_adopted();
  EXPECT_NE(cudaSuccess, cudaMemcpy(host.data(), theirs.data() + 10, 4, cudaMemcpyDeviceToHost));
  expect_violation("the direction of a copy");
}

TEST_F(Simulator, ReseedingRunsWhatIsPendingAndKeepsMemory) {
  float* data = device_floats();
  const cudaStream_t on = stream();
  fill(data, 1, on);
  reseed(7, Policy::kLate);
  EXPECT_EQ(0u, pending());
  EXPECT_EQ(1.0f, download(data, on)[kSize - 1]);
}

TEST_F(Simulator, TheDefaultStreamWaitsForBlockingStreamsOnly) {
  float* data = device_floats();
  fill(data, 1, stream(cudaStreamNonBlocking));
  EXPECT_TRUE(std::isnan(download(data, nullptr)[0]));
  fill(data, 2, stream(cudaStreamDefault));
  EXPECT_EQ(2.0f, download(data, nullptr)[0]);
  fill(data, 3, nullptr);
  EXPECT_EQ(3.0f, download(data, stream(cudaStreamDefault))[0]);
  fill(data, 4, nullptr);
  EXPECT_NE(4.0f, download(data, stream(cudaStreamNonBlocking))[0]);
}

TEST_F(Simulator, WorkOfADestroyedStreamStillRuns) {
  float* data = device_floats();
  const cudaStream_t on = stream(cudaStreamDefault);
  fill(data, 5, on);
  cudaStreamDestroy(on);
  EXPECT_EQ(5.0f, download(data, nullptr)[0]);
}

TEST_F(Simulator, PinnedMemoryIsReadWhenTheCopyRuns) {
  float* data = device_floats();
  float* pinned = nullptr;
  cudaHostAlloc(&pinned, kSize * sizeof(float), 0);
  const cudaStream_t on = stream();
  std::fill_n(pinned, kSize, 1.0f);
  cudaMemcpyAsync(data, pinned, kSize * sizeof(float), cudaMemcpyHostToDevice, on);
  std::fill_n(pinned, kSize, 2.0f);  // used again too early
  EXPECT_EQ(2.0f, download(data, on)[0]);
  std::vector<float> pageable(kSize, 3.0f);
  cudaMemcpyAsync(data, pageable.data(), kSize * sizeof(float), cudaMemcpyHostToDevice, on);
  pageable.assign(kSize, 4.0f);
  EXPECT_EQ(3.0f, download(data, on)[0]);
}

TEST_F(Simulator, PinnedMemoryFreedUnderACopyIsFound) {
  float* data = device_floats();
  float* pinned = nullptr;
  cudaHostAlloc(&pinned, kSize * sizeof(float), 0);
  cudaMemcpyAsync(data, pinned, kSize * sizeof(float), cudaMemcpyHostToDevice, stream());
  cudaFreeHost(pinned);
  expect_violation("pinned memory was freed");
}

TEST_F(Simulator, FreshMemoryReadsAsNan) {
  float* data = device_floats();
  fusestep::detail::launch(Increment{data, kSize}, kBlocks, nullptr);
  EXPECT_TRUE(std::isnan(download(data, nullptr)[0]));
}

TEST_F(Simulator, MemoryDoesNotExistBeforeItsStreamGetsThere) {
  const cudaStream_t here = stream(), there = stream();
  float* data = nullptr;
  cudaMallocAsync(&data, kSize * sizeof(float), here);
  cudaMemsetAsync(data, 0, kSize * sizeof(float), there);  // not ordered after the allocation
  cudaStreamSynchronize(there);
  expect_violation("outside an allocation");
}

TEST_F(Simulator, FreedMemoryReadsAsNan) {
  float* data = device_floats();
  const cudaStream_t on = stream(), other = stream();
  fill(data, 1, on);
  cudaStreamSynchronize(on);
  cudaFreeAsync(data, on);
  cudaStreamSynchronize(on);
#if !defined(__SANITIZE_ADDRESS__)  // which stops at the access
  float* copy = device_floats();
  fusestep::detail::launch(Copy{copy, data}, 1, other);
  EXPECT_TRUE(std::isnan(download(copy, other)[0]));
#endif
  cudaMemsetAsync(data, 0, 4, other);
  cudaStreamSynchronize(other);
  expect_violation("outside an allocation");
  cudaFree(data);
  expect_violation("freed twice");
}

TEST_F(Simulator, WritesBesideAnAllocationAreFound) {
#if defined(__SANITIZE_ADDRESS__)
  EXPECT_DEATH(
      {
        fill(device_floats(), 1, nullptr, kSize + 1);
        cudaDeviceSynchronize();
      },
      "use-after-poison");
#else
  fill(device_floats(), 1, nullptr, kSize + 1);
  cudaDeviceSynchronize();
  expect_violation("out of bounds");
#endif
  cudaMemsetAsync(device_floats(), 0, kSize * sizeof(float) + 1, nullptr);
  cudaDeviceSynchronize();
  expect_violation("outside an allocation");
}

TEST_F(Simulator, TheHostCannotTouchDeviceMemory) {
  EXPECT_DEATH(
      {
        float* data = device_floats();
        fill(data, 1, nullptr);
        cudaDeviceSynchronize();
        *static_cast<volatile float*>(data) = 0;
      },
      "");
}

TEST_F(Simulator, ADeviceCannotTouchTheMemoryOfAnother) {
  EXPECT_DEATH(
      {
        float* data = device_floats();
        cudaDeviceSynchronize();
        cudaSetDevice(1);
        fill(data, 1, nullptr);
        cudaDeviceSynchronize();
      },
      "");
}

TEST_F(Simulator, MissingBarriersAreFound) {
  float* data = device_floats(kSize);
  bool wrong = false;
  for (int i = 0; i < 8; ++i) {
    fusestep::detail::launch(WithoutBarrier{data}, 1, nullptr);
    wrong = wrong || std::isnan(download(data, nullptr)[7]);
  }
  EXPECT_TRUE(wrong);
}

TEST_F(Simulator, HandlesAreFoundAfterTheirEnd) {
  cudaEvent_t event = nullptr;
  cudaEventCreate(&event);
  cudaEventDestroy(event);
  EXPECT_EQ(cudaErrorInvalidResourceHandle, cudaEventRecord(event, nullptr));
  expect_violation("destroyed event");
  const cudaStream_t on = stream();
  unsigned long long id = 0, other = 0;
  cudaStreamGetId(on, &id);
  cudaStreamDestroy(on);
  EXPECT_EQ(cudaErrorInvalidResourceHandle, cudaStreamSynchronize(on));
  expect_violation("destroyed stream");
  const cudaStream_t again = stream();
  cudaStreamGetId(again, &other);
  EXPECT_EQ(on, again);  // a handle used before
  EXPECT_NE(id, other);
}

TEST_F(Simulator, DirectionsOfCopiesAreChecked) {
  float host[4] = {};
  float* data = device_floats();
  EXPECT_EQ(cudaErrorInvalidMemcpyDirection,
            cudaMemcpy(data, host, sizeof host, cudaMemcpyDeviceToHost));
  EXPECT_EQ(cudaErrorInvalidValue, cudaMemcpyPeerAsync(data, 1, data + 4, 0, 4, nullptr));
  EXPECT_EQ(2u, take_violations().size());
  EXPECT_EQ(cudaErrorInvalidValue, cudaGetLastError());
  EXPECT_EQ(cudaSuccess, cudaGetLastError());
}

TEST_F(Simulator, EventsAndStreamsBelongToDevices) {
  cudaEvent_t event = nullptr;
  cudaEventCreate(&event);
  cudaSetDevice(1);
  EXPECT_EQ(cudaErrorInvalidResourceHandle, cudaEventRecord(event, nullptr));
  EXPECT_EQ(cudaErrorInvalidDevice, cudaSetDevice(kDevices));
}

TEST_F(Simulator, CallsFailAsTold) {
  inject({1, cudaErrorMemoryAllocation});
  float* first = device_floats();
  void* second = nullptr;
  EXPECT_NE(nullptr, first);
  EXPECT_EQ(cudaErrorMemoryAllocation, cudaMalloc(&second, 4));
  EXPECT_EQ("cudaMalloc", faulted_call());
  EXPECT_EQ(cudaSuccess, cudaMalloc(&second, 4));
  inject({0, cudaErrorLaunchFailure, true});
  EXPECT_EQ(cudaErrorLaunchFailure, cudaDeviceSynchronize());
  EXPECT_EQ(cudaErrorLaunchFailure, cudaMalloc(&second, 4));
}

TEST_F(Simulator, KernelsFailLate) {
  float* data = device_floats();
  fail_running_kernel(1);
  fill(data, 1, nullptr);
  fill(data, 2, nullptr);
  EXPECT_EQ(cudaErrorLaunchFailure, cudaDeviceSynchronize());
}

TEST_F(Simulator, EveryBlockAndThreadRunsOnceUnderEveryPolicy) {
  for (const Policy policy : {Policy::kLate, Policy::kShuffled, Policy::kEager}) {
    reset(7, policy);
    float* data = device_floats();
    cudaMemsetAsync(data, 0, kSize * sizeof(float), nullptr);
    for (int i = 0; i < 50; ++i) {
      fusestep::detail::launch(Increment{data, kSize}, kBlocks, nullptr);
    }
    for (const float x : download(data, nullptr)) EXPECT_EQ(50.0f, x);
  }
}

TEST_F(Simulator, TheEagerPolicyRunsWorkNobodyWaitsFor) {
  reset(3, Policy::kEager);
  float* data = device_floats();
  for (int i = 0; i < 20; ++i) fill(data, 1, stream());
  EXPECT_LT(pending(), 20u);
}

}  // namespace
}  // namespace cuda_sim
