// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The tables of a step, for tensors that are too large to allocate too: no address is read.
#include "plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "cpu/zeroed_memory.h"
#include "fusestep/detail/layout.h"
#include "fusestep/detail/norm.h"
#include "fusestep/detail/rule_list.h"
#include "state_store.h"
#include "support.h"
#include "validate.h"

namespace fusestep::test {
namespace {

using namespace fusestep::detail;

/// A device that hands out addresses nobody may touch.
class PaperBackend final : public Backend {
 public:
  explicit PaperBackend(int chunk, int width = 1) : chunk_(chunk), width_(width) {}
  int chunk_size(int) const override { return chunk_; }
  int vector_width(int) const override { return width_; }
  Placement placement() const override { return {64, 128}; }
  void* allocate(std::size_t bytes, void*) override {
    if (bytes > limit) throw OutOfMemory("too much");
    allocated.push_back(bytes);
    char* memory = next_;
    next_ += bytes;
    return memory;
  }
  void deallocate(void*, std::size_t bytes, void*) noexcept override { freed.push_back(bytes); }
  void stage(const Tables&, void*) override {}
  void sum_squares(int, void*) override {}
  NormSum read_sum(int, void*) override { return {}; }
  void write_sum(int, NormSum, void*) override {}
  void run(const StepRequest&, void*) override {}
  void copy_grad_norm(double*, void*) override {}
  StepState read_state(int) override { return {}; }
  void write_state(int, StepState, void*) override {}
  Control read_control() override { return {}; }
  const void* read(const void* from, std::size_t, void*) override { return from; }
  void begin_writing(void*) override {}
  void write(void*, const void*, std::size_t, void*) override {}
  void clear(void*, std::size_t, void*) override {}
  void copy(void*, const void*, std::size_t, void*) override {}
  void widen(float*, const void*, DType, std::int64_t, void*) override {}
  double read_scalar(const void*, bool, void*) override { return 0; }

  std::size_t limit = ~std::size_t{0};
  std::vector<std::size_t> allocated, freed;

 private:
  int chunk_, width_;
  char* next_ = reinterpret_cast<char*>(std::uintptr_t{1} << 50);
};

template <class T>
TensorView at(std::uintptr_t address, std::int64_t size) {
  return view(reinterpret_cast<T*>(address), {size});
}

ParameterRecord record(int group, TensorView value, TensorView grad) {
  ParameterRecord parameter;
  parameter.group = group;
  parameter.device = 0;
  parameter.state = 0;
  parameter.size = value.size();
  parameter.value = std::move(value);
  parameter.grad = std::move(grad);
  return parameter;
}

constexpr std::uintptr_t kBase = std::uintptr_t{1} << 44;
constexpr std::uintptr_t kGrad = std::uintptr_t{1} << 45;

TEST(Plan, OfTensorsBeyondTwoToThe31) {
  const std::int64_t sizes[] = {(std::int64_t{1} << 31) - 1, std::int64_t{1} << 31,
                                (std::int64_t{1} << 31) + 1, (std::int64_t{1} << 32) + 12'345,
                                std::int64_t{5'000'000'000}};
  constexpr int chunk = 65'536;
  for (const std::int64_t size : sizes) {
    PaperBackend backend(chunk);
    StateStore store(backend);
    std::vector<GroupRecord> groups = {{"g", AdamHyper{}, {}, {}, {0}}};
    std::vector<ParameterRecord> parameters = {
        record(0, at<float>(kBase, size), at<float>(kGrad, size))};
    EXPECT_EQ(parameters[0].value.bytes(), 4 * static_cast<std::size_t>(size));
    store.grow({{&parameters[0], {"exp_avg", DType::kFloat32, nullptr, false}},
                {&parameters[0], {"exp_avg_sq", DType::kFloat32, nullptr, false}}},
               nullptr);
    ASSERT_EQ(backend.allocated.size(), 1u);
    EXPECT_GE(backend.allocated[0], 8 * static_cast<std::size_t>(size));
    const auto* first = static_cast<char*>(parameters[0].slots[0].data);
    const auto* second = static_cast<char*>(parameters[0].slots[1].data);
    EXPECT_GE(second - first, 4 * size);

    const Plan plan = build_plan(0, backend, groups, parameters, false);
    ASSERT_EQ(plan.tensors.size(), 1u);
    EXPECT_EQ(plan.tensors[0].size, size);
    const std::int64_t chunks = (size - 1) / chunk + 1;
    ASSERT_EQ(static_cast<std::int64_t>(plan.chunks.size()), chunks);
    ASSERT_EQ(plan.buckets.size(), 1u);
    EXPECT_EQ(plan.buckets[0].chunks, chunks);
    std::int64_t covered = 0;
    for (const Chunk& c : plan.chunks) {
      ASSERT_EQ(c.tensor, 0);
      ASSERT_EQ(std::int64_t{c.index} * chunk, covered);
      covered += std::min<std::int64_t>(chunk, size - covered);
    }
    EXPECT_EQ(covered, size);

    const std::vector<Chunk> blocks = build_norm_blocks(0, groups, parameters);
    ASSERT_EQ(static_cast<std::int64_t>(blocks.size()), (size - 1) / 4096 + 1);
    EXPECT_EQ(blocks.back().index, (size - 1) / 4096);
    EXPECT_EQ(norm_blocks(size), static_cast<std::int64_t>(blocks.size()));
  }
}

TEST(Plan, KeepsTheOrderAndBucketsWhatIsAlike) {
  PaperBackend backend(100);
  std::vector<GroupRecord> groups = {{"a", SgdHyper{}, {}, {}, {0, 3}},
                                     {"b", SgdHyper{.lr = 7}, {}, {}, {1, 2, 4, 5}}};
  std::vector<ParameterRecord> parameters;
  for (int i = 0; i < 6; ++i) {
    const auto base = kBase + static_cast<std::uintptr_t>(i) * 0x10000;
    const std::int64_t size = i == 4 ? 0 : 150 + i;
    parameters.push_back(i == 2 ? record(1, at<double>(base, size), at<double>(base + kGrad, size))
                                : record(i == 0 || i == 3 ? 0 : 1, at<float>(base, size),
                                         at<float>(base + kGrad, size)));
    parameters.back().state = 10 + i;
  }
  parameters[5].frozen = true;
  parameters[5].row = 3;
  const Plan plan = build_plan(0, backend, groups, parameters, false);
  EXPECT_EQ(parameters[5].row, -1);
  ASSERT_EQ(plan.tensors.size(), 5u);
  ASSERT_EQ(plan.buckets.size(), 2u);
  std::vector<int> states;
  for (const PrepareRow& row : plan.prepare) states.push_back(row.state);
  EXPECT_EQ(states, (std::vector<int>{10, 13, 11, 14, 12}));
  EXPECT_EQ(plan.prepare[0].group, 0);
  EXPECT_EQ(plan.prepare[2].group, 1);
  EXPECT_EQ(plan.prepare[4].wide, 1);
  EXPECT_EQ(plan.buckets[0].chunks, 6);
  EXPECT_EQ(plan.buckets[1].first_chunk, 6);
  EXPECT_EQ(plan.buckets[1].chunks, 2);
  std::vector<Chunk> expected;
  for (const int row : {0, 1, 2, 4}) {
    expected.push_back({row, 0});
    expected.push_back({row, 1});
  }
  EXPECT_EQ(plan.chunks, expected);
  const std::vector<Chunk> blocks = {{0, 0}, {1, 0}, {2, 0}, {4, 0}};  // groups in their order
  EXPECT_EQ(build_norm_blocks(0, groups, parameters), blocks);
}

TEST(Plan, OtherDevicesAreLeftOut) {
  PaperBackend backend(100);
  std::vector<GroupRecord> groups = {{"a", SgdHyper{}, {}, {}, {0, 1}}};
  std::vector<ParameterRecord> parameters = {record(0, at<float>(kBase, 10), at<float>(kGrad, 10)),
                                             record(0, at<float>(kBase, 10), at<float>(kGrad, 10))};
  parameters[0].device = 1;
  parameters[0].row = 42;
  EXPECT_EQ(build_plan(0, backend, groups, parameters, false).tensors.size(), 1u);
  EXPECT_EQ(parameters[0].row, 42);
  EXPECT_EQ(build_norm_blocks(0, groups, parameters).size(), 1u);
}

TEST(Plan, RefreshesTheRowsThatChanged) {
  PaperBackend backend(100, 4);
  std::vector<GroupRecord> groups = {{"a", SgdHyper{}, {}, {}, {0, 1, 2, 3}}};
  std::vector<ParameterRecord> parameters;
  for (std::uintptr_t i = 0; i < 4; ++i) {
    parameters.push_back(
        record(0, at<float>(kBase + i * 0x1000, 10), at<float>(kGrad + i * 0x1000, 10)));
  }
  Plan plan = build_plan(0, backend, groups, parameters, false);
  for (const int changed : {2, 1}) {
    parameters[static_cast<std::size_t>(changed)].grad = at<float>(kGrad + 0x80000, 10);
  }
  const int changed[] = {2, 1};
  const Backend::RowRange rows = refresh_rows(plan, changed, backend, groups, parameters);
  EXPECT_EQ(rows.begin, 1);
  EXPECT_EQ(rows.end, 3);
  EXPECT_EQ(plan.tensors, build_plan(0, backend, groups, parameters, false).tensors);
  const Backend::RowRange none = refresh_rows(plan, {}, backend, groups, parameters);
  EXPECT_EQ(none.begin, none.end);
}

struct HeadCase {
  std::uintptr_t value, grad;
  std::int32_t head;
};

/// Elements before the first at which value and gradient both start a vector of 16 bytes.
TEST(Plan, LinesUpVectors) {
  const HeadCase cases[] = {{0, 0, 0},          {4, 4, 3},          {8, 8, 2},   {12, 12, 1},
                            {0, 4, kAllScalar}, {8, 4, kAllScalar}, {16, 32, 0}, {20, 4, 3}};
  for (const HeadCase& c : cases) {
    PaperBackend backend(100, 4);
    std::vector<GroupRecord> groups = {{"a", SgdHyper{}, {}, {}, {0}}};
    std::vector<ParameterRecord> parameters = {
        record(0, at<float>(kBase + c.value, 10), at<float>(kGrad + c.grad, 10))};
    EXPECT_EQ(build_plan(0, backend, groups, parameters, false).tensors[0].head, c.head)
        << c.value << ' ' << c.grad;
  }
}

TEST(StateStore, TakesAGrowthBack) {
  PaperBackend backend(100);
  StateStore store(backend);
  ParameterRecord p = record(0, at<float>(kBase, 10), at<float>(kGrad, 10));
  store.grow({{&p, {"exp_avg", DType::kFloat32, nullptr, false}}}, nullptr);
  backend.limit = 100;
  // The float32 arena fits, the float64 one does not.
  EXPECT_THROW(store.grow({{&p, {"exp_avg_sq", DType::kFloat32, nullptr, false}},
                           {&p, {"max_exp_avg_sq", DType::kFloat64, nullptr, false}}},
                          nullptr),
               OutOfMemory);
  EXPECT_EQ(p.slots.size(), 1u);
  EXPECT_EQ(backend.freed, (std::vector<std::size_t>{64}));
  const StateStore::Growth growth =
      store.grow({{&p, {"exp_avg_sq", DType::kFloat32, nullptr, false}}}, nullptr);
  EXPECT_EQ(p.slots.size(), 2u);
  store.undo(growth, nullptr);
  EXPECT_EQ(p.slots.size(), 1u);
  EXPECT_EQ(p.slots[0].name, "exp_avg");
  EXPECT_EQ(backend.freed.size(), 2u);
}

TEST(Overlap, OfRanges) {
  const auto range = [](std::uintptr_t begin, std::size_t bytes) {
    return MemoryRange{begin, bytes, 0, "x"};
  };
  Overlap found;
  std::vector<MemoryRange> apart = {range(30, 10), range(10, 10), range(20, 10), range(15, 0)};
  EXPECT_FALSE(find_overlap(apart, found));
  std::vector<MemoryRange> touching = {range(30, 10), range(10, 11), range(20, 10)};
  EXPECT_TRUE(find_overlap(touching, found));
  std::vector<MemoryRange> inside = {range(10, 1000), range(500, 1)};
  EXPECT_TRUE(find_overlap(inside, found));
  std::vector<MemoryRange> same = {range(10, 4), range(10, 4)};
  EXPECT_TRUE(find_overlap(same, found));

  const std::vector<MemoryRange> two = {range(10, 10), range(40, 10)};
  EXPECT_FALSE(find_overlap(two, {range(0, 10), range(20, 20), range(50, 1)}, found));
  for (const MemoryRange& other : {range(9, 2), range(19, 1), range(15, 100), range(0, 41)}) {
    EXPECT_TRUE(find_overlap(two, {other}, found)) << other.begin;
    EXPECT_TRUE(find_overlap({other}, two, found)) << other.begin;
  }
}

/// On both sides of the size from which pages are mapped; of memory that was in use before, too.
TEST(ZeroedMemory, IsZeroAndAlignedEachTime) {
  constexpr std::size_t mib = std::size_t{1} << 20;
  for (const std::size_t bytes :
       {std::size_t{1}, std::size_t{321}, std::size_t{65'536}, 8 * mib - 1, 8 * mib, 9 * mib + 3}) {
    for (int again = 0; again < 3; ++again) {
      void* blocks[4];
      for (void*& data : blocks) {
        data = allocate_zeroed(bytes);
        ASSERT_NE(data, nullptr);
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 64, 0u);
        auto* const begin = static_cast<char*>(data);
        EXPECT_EQ(std::count(begin, begin + bytes, '\0'), static_cast<std::ptrdiff_t>(bytes));
        std::fill(begin, begin + bytes, '\1');
      }
      for (void* data : blocks) deallocate_zeroed(data, bytes);
    }
  }
#if !defined(__SANITIZE_ADDRESS__)  // whose operator new ends the process
  for (const std::size_t too_many : {std::size_t{1} << 60, SIZE_MAX - 100}) {
    EXPECT_EQ(allocate_zeroed(too_many), nullptr);
  }
#endif
}

}  // namespace
}  // namespace fusestep::test
