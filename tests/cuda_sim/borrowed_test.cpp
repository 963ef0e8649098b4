// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Tensors that a framework owns, on a device: what costs an upload, and what ends it all.
#include "borrowed.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <vector>

#include "cuda_sim.h"
#include "fusestep/error.h"

namespace fusestep::test {
namespace {

using detail::BorrowedGroup;
using detail::BorrowedOptimizer;
using detail::BorrowedTensor;

class BorrowedTest : public testing::Test {
 protected:
  static constexpr std::int64_t kSize = 100;

  void SetUp() override {
    for (int i = 0; i < 3; ++i) tensors_.push_back(adam_tensor());
  }
  void TearDown() override {
    cuda_sim::clear_faults();
    for (void* memory : memory_) cudaFree(memory);
  }

  void* zeros(std::size_t bytes) {
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, bytes), cudaSuccess);
    EXPECT_EQ(cudaMemsetAsync(memory, 0, bytes), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
    memory_.push_back(memory);
    return memory;
  }

  BorrowedTensor adam_tensor() {
    BorrowedTensor tensor;
    tensor.value = zeros(4 * kSize);
    tensor.grad = zeros(4 * kSize);
    tensor.slot[0] = zeros(4 * kSize);
    tensor.slot[1] = zeros(4 * kSize);
    tensor.step_tensor = zeros(4);
    tensor.size = kSize;
    tensor.device = Device::cuda();
    tensor.buffer_filled = true;  // nothing fresh about it
    tensor.steps = true;
    return tensor;
  }

  float step_count(const BorrowedTensor& tensor) {
    float count = -1;
    EXPECT_EQ(cudaMemcpy(&count, tensor.step_tensor, 4, cudaMemcpyDeviceToHost), cudaSuccess);
    return count;
  }

  void step() { optimizer_.step(groups_, tensors_, {}); }

  std::vector<void*> memory_;
  std::vector<BorrowedGroup> groups_ = {{AdamHyper{}}};
  std::vector<BorrowedTensor> tensors_;
  BorrowedOptimizer optimizer_;
};

TEST_F(BorrowedTest, CountsInTheCallersTensor) {
  step();
  step();
  EXPECT_EQ(step_count(tensors_[0]), 2);
  const float set_by_caller = 41;
  ASSERT_EQ(cudaMemcpy(tensors_[1].step_tensor, &set_by_caller, 4, cudaMemcpyHostToDevice),
            cudaSuccess);
  step();
  EXPECT_EQ(step_count(tensors_[0]), 3);
  EXPECT_EQ(step_count(tensors_[1]), 42);
}

TEST_F(BorrowedTest, WhoRestsAndComesBackAllocatesNothing) {
  step();
  cuda_sim::forget_calls();
  for (int i = 0; i < 6; ++i) {
    tensors_[1].steps = i % 2 != 0;
    step();
    EXPECT_EQ(0, cuda_sim::calls("cudaMallocAsync")) << cuda_sim::call_list();
    EXPECT_EQ(0, cuda_sim::calls("cudaHostAlloc")) << cuda_sim::call_list();
    EXPECT_EQ(0, cuda_sim::calls("cudaStreamSynchronize")) << cuda_sim::call_list();
  }
  EXPECT_EQ(step_count(tensors_[0]), 7);
  EXPECT_EQ(step_count(tensors_[1]), 4);
}

TEST_F(BorrowedTest, AMovedGradientIsOneUpload) {
  step();
  tensors_[2].grad = zeros(4 * kSize);
  cuda_sim::forget_calls();
  step();
  EXPECT_EQ(1, cuda_sim::calls("cudaMemcpyAsync")) << cuda_sim::call_list();
}

TEST_F(BorrowedTest, AFailedDeviceEndsItForEver) {
  step();
  cuda_sim::fail_running_kernel(0);
  EXPECT_THROW(
      {
        for (int i = 0; i < 5; ++i) {
          step();
          cudaDeviceSynchronize();
        }
      },
      DeviceError);
  EXPECT_THROW(step(), DeviceError);
  tensors_.pop_back();  // other tensors make no other optimizer of it
  EXPECT_THROW(step(), DeviceError);
}

}  // namespace
}  // namespace fusestep::test
