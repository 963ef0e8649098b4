// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Tensors of more than 2^31 elements: the kernels' bodies are run for some chunks of memory that is
// almost all address space.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdint>

#include "apply.cuh"
#include "grad_norm.cuh"
#include "launch.cuh"

namespace fusestep::detail {
namespace {

/// Address space that reads as zero; pages become memory where they are written.
class Sparse {
 public:
  explicit Sparse(std::size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~Sparse() {
    if (exists()) munmap(data_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  bool exists() const { return data_ != MAP_FAILED; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  std::size_t bytes_;
  void* data_;
};

constexpr std::int64_t kSize = (std::int64_t{1} << 32) + 20011;  // beyond unsigned, too

constexpr unsigned kBlocksLog2 = 2;  // of a chunk

template <class Body>
void run_block(const Body& body, unsigned block) {
  cuda_sim::run_block(body, block, false);
}

TEST(HugeTensor, StepsAtTheRightAddresses) {
  using R = Sgd<true>;
  using L = Layout<bfloat16, bfloat16, float>;
  using Kernel = Apply<R, L>;
  const Sparse values(kSize * 2), grads(kSize * 2), slots(kSize * 4);
  if (!values.exists() || !grads.exists() || !slots.exists()) {
    GTEST_SKIP() << "no address space for a tensor of " << kSize << " elements";
  }
  TensorRow row{};
  row.value = values.as<bfloat16>();
  row.grad = grads.as<bfloat16>();
  row.slot[0] = slots.as<float>();
  row.size = kSize;
  row.head = 0;
  row.grad_dtype = DType::kBFloat16;

  const std::int64_t chunks = (kSize + Kernel::kChunk - 1) / Kernel::kChunk;
  const std::int64_t around_31 = (std::int64_t{1} << 31) / Kernel::kChunk;
  const std::vector<Chunk> table = {{0, static_cast<std::int32_t>(around_31)},
                                    {0, static_cast<std::int32_t>(2 * around_31)},
                                    {0, static_cast<std::int32_t>(chunks - 1)}};
  const auto end_of = [&](const Chunk& chunk) {
    return std::min(kSize, (std::int64_t{chunk.index} + 1) * Kernel::kChunk);
  };
  for (const Chunk& chunk : table) {
    for (std::int64_t i = std::int64_t{chunk.index} * Kernel::kChunk; i < end_of(chunk); ++i) {
      grads.as<bfloat16>()[i] = store_as<bfloat16>(1.0f);
    }
  }
  ScalarRow scalars{};
  scalars.set(
      RuleScalars<R, float>{1.0f, 1.0f, HUGE_VALF, {}, {0.0f, 0.9f, 1.0f, 0.0f, -0.5f, 1.0f}});
  const Control control{};
  const ApplyTables tables{table.data(), &row, &scalars, &control};
  const Kernel kernel{tables, kBlocksLog2};
  for (unsigned block = 0; block < table.size() << kBlocksLog2; ++block) run_block(kernel, block);

  for (const Chunk& chunk : table) {
    const std::int64_t begin = std::int64_t{chunk.index} * Kernel::kChunk;
    for (std::int64_t i = begin; i < end_of(chunk); ++i) {
      ASSERT_EQ(-0.5f, (load_as<float>(values.as<bfloat16>()[i]))) << i;
      ASSERT_EQ(1.0f, slots.as<float>()[i]) << i;
    }
  }
  const std::int64_t last = std::int64_t{table[0].index} * Kernel::kChunk;
  EXPECT_EQ(0, values.as<bfloat16>()[last - 1].bits);  // the chunk before was not to run
  EXPECT_EQ(0, values.as<bfloat16>()[0].bits);         // nor was the first
}

TEST(HugeTensor, NormReadsAtTheRightAddresses) {
  const Sparse grads(kSize * 4);
  if (!grads.exists()) GTEST_SKIP() << "no address space";
  TensorRow row{};
  row.grad = grads.as<float>();
  row.size = kSize;
  row.grad_dtype = DType::kFloat32;
  grads.as<float>()[kSize - 1] = 3;
  const Chunk block{0, static_cast<std::int32_t>(norm_blocks(kSize) - 1)};
  const Chunk before{0, block.index - 1};
  grads.as<float>()[std::int64_t{block.index} * kNormBlock - 1] = 4;
  for (const Chunk& chunk : {block, before}) {
    NormSum sum;
    run_block(SumBlocks<GradientSource>{{&chunk, &row}, &sum}, 0);
    const bool is_last = chunk.index == block.index;
    EXPECT_EQ(is_last ? 9.0 : 16.0, sum.squares);
  }
}

}  // namespace
}  // namespace fusestep::detail
