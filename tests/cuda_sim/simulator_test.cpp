// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The simulated runtime finds what it is there to find: small wrong programs, each of which works
// on a GPU most of the time.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <utility>
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

// ---- captures ----------------------------------------------------------------------------------

class Captures : public Simulator {
 protected:
  void SetUp() override {
    Simulator::SetUp();
    origin_ = stream();
    data_ = device_floats();
    cudaMemsetAsync(data_, 0, kSize * sizeof(float), origin_);
    cudaDeviceSynchronize();
  }

  void begin(cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) const {
    EXPECT_EQ(cudaSuccess, cudaStreamBeginCapture(origin_, mode));
  }
  cudaGraphExec_t end() const {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    EXPECT_EQ(cudaSuccess, cudaStreamEndCapture(origin_, &graph));
    EXPECT_EQ(cudaSuccess, cudaGraphInstantiate(&exec, graph));
    EXPECT_EQ(cudaSuccess, cudaGraphDestroy(graph));
    return exec;
  }
  /// The capture is of no use any more.
  void expect_invalidated(cudaError_t at_the_end = cudaErrorStreamCaptureInvalidated) const {
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(at_the_end, cudaStreamEndCapture(origin_, &graph));
    EXPECT_EQ(nullptr, graph);
  }
  void increment(cudaStream_t on) const {
    EXPECT_EQ(cudaSuccess, fusestep::detail::launch(Increment{data_, kSize}, kBlocks, on));
  }
  static cudaEvent_t event() {
    cudaEvent_t made = nullptr;
    EXPECT_EQ(cudaSuccess, cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
    return made;
  }

  cudaStream_t origin_ = nullptr;
  float* data_ = nullptr;
};

TEST_F(Captures, NothingRunsBeforeAGraphIsLaunched) {
  begin();
  increment(origin_);
  const cudaGraphExec_t graph = end();
  EXPECT_EQ(0.0f, download(data_, origin_)[0]);
  for (int i = 1; i <= 3; ++i) {
    EXPECT_EQ(cudaSuccess, cudaGraphLaunch(graph, origin_));
    EXPECT_EQ(static_cast<float>(i), download(data_, origin_)[kSize - 1]);
  }
  cudaGraphLaunch(graph, origin_);
  cudaGraphExecDestroy(graph);  // what is under way goes on
  EXPECT_EQ(4.0f, download(data_, origin_)[0]);
  EXPECT_EQ(cudaErrorInvalidValue, cudaGraphLaunch(graph, origin_));
  expect_violation("a destroyed graph was launched");
}

TEST_F(Captures, RunsAreOnTheStreamThatLaunchesThem) {
  const cudaStream_t other = stream();
  begin();
  increment(origin_);
  const cudaGraphExec_t graph = end();
  fill(data_, 5, other);
  cudaGraphLaunch(graph, other);
  EXPECT_EQ(0.0f, download(data_, origin_)[0]);  // nobody has waited
  EXPECT_EQ(6.0f, download(data_, other)[0]);
}

TEST_F(Captures, RunsOfOneGraphAreOneAfterTheOther) {
  const cudaStream_t other = stream();
  begin();
  for (int i = 0; i < 4; ++i) increment(origin_);
  const cudaGraphExec_t graph = end();
  cudaGraphLaunch(graph, origin_);
  cudaGraphLaunch(graph, other);
  EXPECT_EQ(8.0f, download(data_, other)[0]);
}

TEST_F(Captures, StreamsThatWaitForItJoin) {
  const cudaStream_t branch = stream();
  const cudaEvent_t forked = event(), joined = event();
  float* other = device_floats();
  begin();
  fill(data_, 1, origin_);
  cudaEventRecord(forked, origin_);
  cudaStreamWaitEvent(branch, forked);
  fusestep::detail::launch(Copy{other, data_}, 1, branch);
  cudaEventRecord(joined, branch);
  cudaStreamWaitEvent(origin_, joined);
  fill(data_, 2, origin_);
  const cudaGraphExec_t graph = end();
  cudaGraphLaunch(graph, origin_);
  EXPECT_EQ(2.0f, download(data_, origin_)[0]);
  EXPECT_EQ(1.0f, download(other, origin_)[0]);
}

TEST_F(Captures, BranchesAreNotOrdered) {
  bool seen[2] = {};
  float* other = device_floats();
  for (std::uint64_t seed = 1; seed < 40; ++seed) {
    const cudaStream_t branch = stream();
    const cudaEvent_t forked = event(), joined = event();
    begin();
    cudaEventRecord(forked, origin_);
    cudaStreamWaitEvent(branch, forked);
    fill(data_, 1, branch);
    fusestep::detail::launch(Copy{other, data_}, 1, origin_);  // does not wait for the branch
    cudaEventRecord(joined, branch);
    cudaStreamWaitEvent(origin_, joined);
    const cudaGraphExec_t graph = end();
    fill(data_, 0, origin_);
    cudaGraphLaunch(graph, origin_);
    seen[download(other, origin_)[0] == 1.0f ? 1 : 0] = true;
  }
  EXPECT_TRUE(seen[0] && seen[1]);
}

TEST_F(Captures, BranchesMustJoinAgain) {
  const cudaStream_t branch = stream();
  const cudaEvent_t forked = event();
  begin();
  cudaEventRecord(forked, origin_);
  cudaStreamWaitEvent(branch, forked);
  fill(data_, 1, branch);
  expect_invalidated(cudaErrorStreamCaptureUnjoined);
  fill(data_, 3, branch);  // both streams are free again
  EXPECT_EQ(3.0f, download(data_, branch)[0]);
}

TEST_F(Captures, WaitingForWhatWasNotCapturedIsRefused) {
  const cudaEvent_t outside = event();
  begin();
  EXPECT_EQ(cudaSuccess, cudaStreamWaitEvent(origin_, outside));  // never recorded
  cudaGraphExecDestroy(end());
  cudaEventRecord(outside, stream());
  begin();
  EXPECT_EQ(cudaErrorStreamCaptureIsolation, cudaStreamWaitEvent(origin_, outside));
  EXPECT_EQ(cudaErrorStreamCaptureInvalidated,
            fusestep::detail::launch(Increment{data_, kSize}, kBlocks, origin_));
  expect_invalidated();
}

TEST_F(Captures, EventsOfACaptureMeanNothingOutsideOfIt) {
  const cudaEvent_t inside = event();
  begin(cudaStreamCaptureModeRelaxed);
  cudaEventRecord(inside, origin_);
  EXPECT_EQ(cudaErrorCapturedEvent, cudaEventQuery(inside));
  expect_invalidated();
  EXPECT_EQ(cudaErrorCapturedEvent, cudaEventSynchronize(inside));
  EXPECT_EQ(cudaErrorCapturedEvent, cudaStreamWaitEvent(origin_, inside));
  cudaEventRecord(inside, origin_);  // recorded outside, it is an ordinary one
  EXPECT_EQ(cudaSuccess, cudaEventSynchronize(inside));
}

TEST_F(Captures, DoNotMerge) {
  const cudaStream_t other = stream();
  const cudaEvent_t inside = event();
  begin();
  cudaEventRecord(inside, origin_);
  cudaStreamBeginCapture(other, cudaStreamCaptureModeGlobal);
  EXPECT_EQ(cudaErrorStreamCaptureMerge, cudaStreamWaitEvent(other, inside));
  expect_invalidated();
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaErrorStreamCaptureInvalidated, cudaStreamEndCapture(other, &graph));
}

TEST_F(Captures, EndWhereTheyBegan) {
  const cudaStream_t branch = stream();
  const cudaEvent_t forked = event();
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaErrorIllegalState, cudaStreamEndCapture(origin_, &graph));
  EXPECT_EQ(cudaErrorStreamCaptureUnsupported,
            cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal));
  begin();
  EXPECT_EQ(cudaErrorIllegalState, cudaStreamBeginCapture(origin_, cudaStreamCaptureModeGlobal));
  cudaEventRecord(forked, origin_);
  cudaStreamWaitEvent(branch, forked);
  EXPECT_EQ(cudaErrorStreamCaptureUnmatched, cudaStreamEndCapture(branch, &graph));
  cudaGraphExecDestroy(end());
}

TEST_F(Captures, WaitingForTheStreamOrTheDeviceInvalidates) {
  const std::function<cudaError_t()> calls[] = {
      [&] { return cudaStreamSynchronize(origin_); },
      [&] { return cudaStreamQuery(origin_); },
      [] { return cudaDeviceSynchronize(); },
  };
  for (const auto& call : calls) {
    begin(cudaStreamCaptureModeRelaxed);
    EXPECT_EQ(cudaErrorStreamCaptureUnsupported, call());
    expect_invalidated();
  }
}

TEST_F(Captures, UnsafeCallsAreUpToTheModes) {
  const cudaEvent_t outside = event();
  const cudaStream_t beside = stream();
  cudaEventRecord(outside, beside);
  void* memory = nullptr;
  const std::function<cudaError_t()> calls[] = {
      [&] {
        const cudaError_t code = cudaEventQuery(outside);
        return code == cudaErrorNotReady ? cudaSuccess : code;
      },
      [&] { return cudaEventSynchronize(outside); },
      [&] { return cudaMalloc(&memory, 4); },
      [&] { return cudaHostAlloc(&memory, 4, 0); },
      [&] { return cudaFreeHost(memory); },
      [&] { return cudaMallocAsync(&memory, 4, beside); },
      [&] { return cudaFreeAsync(std::exchange(memory, nullptr), beside); },
  };
  for (const auto& call : calls) {
    begin();
    EXPECT_EQ(cudaErrorStreamCaptureUnsupported, call());
    expect_invalidated();
    begin(cudaStreamCaptureModeRelaxed);
    EXPECT_EQ(cudaSuccess, call());
    cudaGraphExecDestroy(end());
    begin();
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    EXPECT_EQ(&call == &calls[4] ? cudaErrorInvalidValue : cudaSuccess, call());
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaGraphExecDestroy(end());
  }
  static_cast<void>(take_violations());  // memory that was freed already
}

TEST_F(Captures, OfOtherThreadsMatterIfBothAreGlobal) {
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal}) {
    begin(mode);
    cudaError_t code = cudaSuccess, ending = cudaSuccess;
    std::thread other([&] {
      void* memory = nullptr;
      cudaGraph_t graph = nullptr;
      ending = cudaStreamEndCapture(origin_, &graph);
      code = cudaMalloc(&memory, 4);
    });
    other.join();
    EXPECT_EQ(cudaErrorStreamCaptureWrongThread, ending);
    const bool global = mode == cudaStreamCaptureModeGlobal;
    EXPECT_EQ(global ? cudaErrorStreamCaptureUnsupported : cudaSuccess, code);
    if (global) expect_invalidated();
    if (!global) cudaGraphExecDestroy(end());
  }
}

TEST_F(Captures, TheDefaultStreamCannotWaitForThem) {
  origin_ = stream(cudaStreamDefault);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  begin();
  EXPECT_EQ(cudaErrorStreamCaptureImplicit, cudaStreamGetCaptureInfo(nullptr, &status));
  cudaGraphExecDestroy(end());  // to ask does no harm
  begin();
  EXPECT_EQ(cudaErrorStreamCaptureImplicit, cudaMemsetAsync(data_, 0, 4, nullptr));
  expect_invalidated();
}

TEST_F(Captures, SayWhichTheyAre) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long first = 0, second = 0;
  begin();
  cudaStreamGetCaptureInfo(origin_, &status, &first);
  EXPECT_EQ(cudaStreamCaptureStatusActive, status);
  cudaStreamSynchronize(origin_);
  cudaStreamGetCaptureInfo(origin_, &status, &first);
  EXPECT_EQ(cudaStreamCaptureStatusInvalidated, status);
  expect_invalidated();
  cudaStreamGetCaptureInfo(origin_, &status, &first);
  EXPECT_EQ(cudaStreamCaptureStatusNone, status);
  begin();
  cudaStreamGetCaptureInfo(origin_, &status, &second);
  EXPECT_NE(first, second);
  cudaGraphExecDestroy(end());
}

TEST_F(Captures, AllocationsInThemAreFound) {
  begin();
  void* memory = nullptr;
  EXPECT_EQ(cudaErrorStreamCaptureUnsupported, cudaMallocAsync(&memory, 4, origin_));
  expect_violation("an allocation was captured");
  EXPECT_EQ(cudaErrorStreamCaptureUnsupported, cudaFreeAsync(data_, origin_));
  expect_violation("a free was captured");
  cudaGraphExecDestroy(end());
}

TEST_F(Captures, MemoryFreedUnderAGraphIsFound) {
  float* pinned = nullptr;
  cudaHostAlloc(&pinned, kSize * sizeof(float), 0);
  begin();
  cudaMemsetAsync(data_, 0, 4, origin_);
  cudaMemcpyAsync(data_, pinned, 4, cudaMemcpyHostToDevice, origin_);
  const cudaGraphExec_t graph = end();
  cudaFreeHost(pinned);
  expect_violation("pinned memory was freed");
  cudaFree(data_);
  cudaGraphLaunch(graph, origin_);
  cudaStreamSynchronize(origin_);
  expect_violation("outside an allocation");
}

}  // namespace
}  // namespace cuda_sim
