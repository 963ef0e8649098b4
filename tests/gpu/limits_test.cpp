// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What only a real device can show: tensors of more than 2^32 elements, and no memory left.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fusestep/fusestep.h"

namespace fusestep {
namespace {

class LimitsTest : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda_device_count() == 0) GTEST_SKIP() << cuda_status();
  }

  static std::size_t free_bytes() {
    std::size_t free = 0, total = 0;
    EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    return free;
  }
};

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) { code = cudaMalloc(&data, bytes); }
  ~DeviceMemory() { cudaFree(data); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data = nullptr;
  cudaError_t code;
};

/// Values 1, gradients 1 and lr 0.5 give 0.5 everywhere: looked at around every power of two that
/// an index could overflow at, and at both ends.
template <class T>
void step_huge_tensor(T one, T half, std::size_t free_bytes) {
  constexpr std::int64_t size = (std::int64_t{1} << 32) + 5;
  const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
  if (free_bytes < 2 * bytes + (std::size_t{1} << 30)) {
    GTEST_SKIP() << "needs " << 2 * bytes << " bytes, the device has " << free_bytes;
  }
  const DeviceMemory value(bytes), grad(bytes);
  ASSERT_EQ(value.code, cudaSuccess);
  ASSERT_EQ(grad.code, cudaSuccess);
  const std::vector<T> ones(std::size_t{1} << 24, one);
  for (std::size_t done = 0; done < bytes; done += ones.size() * sizeof(T)) {
    const std::size_t piece = std::min(ones.size() * sizeof(T), bytes - done);
    for (void* to : {value.data, grad.data}) {
      ASSERT_EQ(
          cudaMemcpy(static_cast<char*>(to) + done, ones.data(), piece, cudaMemcpyHostToDevice),
          cudaSuccess);
    }
  }
  Optimizer optimizer;
  optimizer.add_group("g", SgdHyper{.lr = 0.5},
                      {{"huge", view(static_cast<T*>(value.data), {size}, Device::cuda()),
                        view(static_cast<T*>(grad.data), {size}, Device::cuda())}});
  optimizer.step();
  EXPECT_EQ(optimizer.grad_norm().norm, std::sqrt(static_cast<double>(size)));
  for (const std::int64_t middle : {std::int64_t{0}, std::int64_t{1} << 30, std::int64_t{1} << 31,
                                    std::int64_t{3} << 30, std::int64_t{1} << 32, size}) {
    const std::int64_t begin = std::max<std::int64_t>(0, middle - 10'000);
    const std::int64_t end = std::min(size, middle + 10'000);
    std::vector<T> seen(static_cast<std::size_t>(end - begin));
    ASSERT_EQ(cudaMemcpy(seen.data(), static_cast<T*>(value.data) + begin, seen.size() * sizeof(T),
                         cudaMemcpyDeviceToHost),
              cudaSuccess);
    for (const T& element : seen) ASSERT_EQ(std::memcmp(&element, &half, sizeof half), 0);
  }
}

TEST_F(LimitsTest, StepsMoreThan2To32Bfloat16Elements) {
  step_huge_tensor(bfloat16{0x3f80}, bfloat16{0x3f00}, free_bytes());
}

TEST_F(LimitsTest, StepsMoreThan2To32Float32Elements) {
  step_huge_tensor(1.0f, 0.5f, free_bytes());
}

TEST_F(LimitsTest, OutOfMemoryLeavesEverythingAsItWas) {
  constexpr std::int64_t size = std::int64_t{1} << 28;  // 1 GiB; Adam's slots take two more
  const DeviceMemory value(size * 4), grad(size * 4);
  ASSERT_EQ(value.code, cudaSuccess);
  ASSERT_EQ(grad.code, cudaSuccess);
  ASSERT_EQ(cudaMemset(value.data, 0, size * 4), cudaSuccess);
  ASSERT_EQ(cudaMemset(grad.data, 0, size * 4), cudaSuccess);
  const float one = 1.0f;
  ASSERT_EQ(cudaMemcpy(grad.data, &one, 4, cudaMemcpyHostToDevice), cudaSuccess);
  Optimizer optimizer;
  optimizer.add_group("g", AdamHyper{},
                      {{"w", view(static_cast<float*>(value.data), {size}, Device::cuda()),
                        view(static_cast<float*>(grad.data), {size}, Device::cuda())}});
  {
    const DeviceMemory all_but_one_gib(free_bytes() - (std::size_t{1} << 30));
    ASSERT_EQ(all_but_one_gib.code, cudaSuccess);
    EXPECT_THROW(optimizer.step(), OutOfMemory);
    EXPECT_TRUE(optimizer.state("w").slot_names().empty());
    EXPECT_EQ(optimizer.state("w").step(), 0);
  }
  optimizer.step();
  float stepped = 0;
  ASSERT_EQ(cudaMemcpy(&stepped, value.data, 4, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_FLOAT_EQ(stepped, -1e-3f);
  EXPECT_EQ(optimizer.state("w").step(), 1);
}

}  // namespace
}  // namespace fusestep
