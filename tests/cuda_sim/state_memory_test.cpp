// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What saving and loading large state on a device takes of the host.
#include <gtest/gtest.h>

#include "cuda_sim.h"
#include "fusestep/detail/backend.h"
#include "temporary_directory.h"
#include "tuning.h"
#include "twins.h"

namespace fusestep::test {
namespace {

TEST(StateOnTheDevice, PassesThroughABoundedPieceOfPinnedMemory) {
  const TemporaryDirectory directory;
  const std::int64_t size = 3 * detail::kReadBytes / sizeof(float) + 7;
  Twins twins({{"g", AdamHyper{}, kLayoutCases[0], {{size}, {3}}}});
  twins.step();
  const cuda_sim::Live before = cuda_sim::live();
  const std::size_t bound = detail::kReadBytes + detail::kRingBytes;
  const auto expect_bounded = [&](const char* what) {
    EXPECT_LE(cuda_sim::most_pinned_bytes(), bound) << what;
    EXPECT_EQ(cuda_sim::live().pinned, before.pinned) << what;
  };
  twins.cuda.save(directory / "state", {.values = true});
  expect_bounded("save");
  const StateDict state = twins.cuda.state_dict();
  expect_bounded("state_dict");
  twins.cuda.load(directory / "state");
  expect_bounded("load");
  twins.cuda.load_state_dict(state);
  expect_bounded("load_state_dict");
  twins.cuda.save_async(directory / "state");
  expect_bounded("save_async");
  twins.cuda.wait_for_save();
  twins.expect_equal("at the end");
}

/// Without state on a device, or where nothing is read, there is no pinned memory for it.
TEST(StateOnTheDevice, IsReadWithoutPinnedMemoryWhereThereIsNone) {
  Twins twins({{"g", AdamHyper{}, kLayoutCases[0], {{70}}}});
  twins.cuda.state_dict();
  EXPECT_EQ(0u, cuda_sim::most_pinned_bytes());
}

TEST(StateOnTheDevice, CapturedStreamIsRefused) {
  Twins twins({{"g", AdamHyper{}, kLayoutCases[0], {{70}}}});
  twins.step();
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const Stream view{Device::cuda(), static_cast<void*>(stream)};
  const StateDict state = twins.cpu.state_dict();
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  EXPECT_THROW(twins.cuda.load_state_dict(state, {&view, 1}), InvalidArgument);
  EXPECT_THROW(twins.cuda.state_dict({&view, 1}), InvalidArgument);
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphDestroy(graph));
  twins.step();
  twins.expect_equal("after it");
}

}  // namespace
}  // namespace fusestep::test
