// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The device's conversions are those of the host, for every input there is.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <vector>

#include "fusestep/detail/convert.h"

namespace fusestep::detail {
namespace {

constexpr std::uint64_t kFloats = std::uint64_t{1} << 32;
constexpr std::uint64_t kPiece = std::uint64_t{1} << 26;

template <class Stored>
__global__ void store_all(std::uint64_t first, Stored* out) {
  const std::uint64_t i = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  out[i] = store_as<Stored>(float_of(static_cast<std::uint32_t>(first + i)));
}

template <class Stored>
__global__ void load_all(float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = load_as<float>(Stored{static_cast<std::uint16_t>(i)});
}

bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }

class DeviceConvertTest : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
  }

  template <class Stored>
  void compare_stores() {
    Stored* device = nullptr;
    ASSERT_EQ(cudaMalloc(&device, kPiece * sizeof(Stored)), cudaSuccess);
    std::vector<Stored> host(kPiece);
    std::uint64_t different = 0;
    for (std::uint64_t first = 0; first < kFloats; first += kPiece) {
      store_all<<<kPiece / 256, 256>>>(first, device);
      ASSERT_EQ(cudaMemcpy(host.data(), device, kPiece * sizeof(Stored), cudaMemcpyDeviceToHost),
                cudaSuccess);
      for (std::uint64_t i = 0; i < kPiece; ++i) {
        const float x = float_of(static_cast<std::uint32_t>(first + i));
        const Stored expected = store_as<Stored>(x);
        if (is_nan(x)) {
          different += is_nan(load_as<float>(host[i])) ? 0 : 1;
        } else {
          different += host[i].bits == expected.bits ? 0 : 1;
        }
      }
    }
    EXPECT_EQ(different, 0u) << "of 2^32 floats";
    EXPECT_EQ(cudaFree(device), cudaSuccess);
  }

  template <class Stored>
  void compare_loads() {
    constexpr int count = 65536;
    float* device = nullptr;
    ASSERT_EQ(cudaMalloc(&device, count * sizeof(float)), cudaSuccess);
    load_all<Stored><<<count / 256, 256>>>(device);
    std::vector<float> host(count);
    ASSERT_EQ(cudaMemcpy(host.data(), device, count * sizeof(float), cudaMemcpyDeviceToHost),
              cudaSuccess);
    for (int i = 0; i < count; ++i) {
      const float expected = load_as<float>(Stored{static_cast<std::uint16_t>(i)});
      const float got = host[static_cast<std::size_t>(i)];
      ASSERT_TRUE(bits_of(got) == bits_of(expected) || (is_nan(got) && is_nan(expected))) << i;
    }
    EXPECT_EQ(cudaFree(device), cudaSuccess);
  }
};

TEST_F(DeviceConvertTest, StoresBfloat16) { compare_stores<bfloat16>(); }
TEST_F(DeviceConvertTest, StoresFloat16) { compare_stores<float16>(); }
TEST_F(DeviceConvertTest, LoadsBfloat16) { compare_loads<bfloat16>(); }
TEST_F(DeviceConvertTest, LoadsFloat16) { compare_loads<float16>(); }

}  // namespace
}  // namespace fusestep::detail
