// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Every allocation of a save or a load fails once: what is there stays as it was. Small ones are
// left alone: destructors of the JSON library make some, and cannot fail.
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <new>

#include "state_support.h"

namespace {

constexpr std::size_t kSmall = 512;

/// Allocations of this thread until one fails; negative: none does.
thread_local std::int64_t allocations_left = -1;
thread_local std::int64_t planned = 0;
thread_local bool has_failed = false;

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (bytes >= kSmall && allocations_left == 0) {
    allocations_left = -1;  // what handles it has memory again
    has_failed = true;
    return nullptr;
  }
  if (bytes >= kSmall && allocations_left > 0) --allocations_left;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  return std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
}

void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* data = allocate(bytes, alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

/// The planned allocation fails while it lives.
struct Armed {
  Armed() { allocations_left = planned; }
  ~Armed() { allocations_left = -1; }
};

constexpr std::size_t kDefault = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace

void* operator new(std::size_t bytes) { return allocate_or_throw(bytes, kDefault); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes, kDefault);
}
void* operator new(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }

namespace fusestep::test {
namespace {

const ModelSpec kHere = {
    {"body", AdamHyper{.lr = 0.125}, {{"w", {20, 30}}, {"b", {300}, DType::kFloat64}}},
    {"a group whose name is too long to be stored in place",
     SgdHyper{.lr = 0.25, .momentum = 0.5},
     {{"a parameter whose name is too long to be stored in place", {500}, DType::kBFloat16}}}};
/// The same with slots that have to be converted.
ModelSpec narrow() {
  ModelSpec spec = kHere;
  spec[0].parameters[1].dtype = DType::kFloat32;
  spec[1].slots = SlotDType::kLikeParameter;
  return spec;
}

struct Row {
  const char* name;
  ModelSpec spec;
  std::uint64_t steps;  ///< before the call
  std::function<void(Optimizer&, const TemporaryDirectory&)> call;
  bool may_end_its_use = false;  ///< it overwrites
};
void PrintTo(const Row& row, std::ostream* out) { *out << row.name; }

std::vector<Row> rows() {
  const auto load = [](Optimizer& o, const TemporaryDirectory& directory) {
    const std::filesystem::path file = directory / "state";
    const Armed armed;
    o.load(file, {.convert = true});
  };
  const auto load_not_strict = [](Optimizer& o, const TemporaryDirectory& directory) {
    const std::filesystem::path file = directory / "other";
    const auto rename = [](const std::string& name) { return name + " under another name"; };
    const LoadOptions options{.strict = false, .rename = rename};
    const Armed armed;
    o.load(file, options);
  };
  const auto load_dict = [](Optimizer& o, const TemporaryDirectory&) {
    Model from(kHere);
    from.steps(0, 2);
    const StateDict state = from.optimizer.state_dict();
    const Armed armed;
    o.load_state_dict(state);
  };
  const auto state_dict = [](Optimizer& o, const TemporaryDirectory&) {
    const Armed armed;
    o.state_dict();
  };
  const auto save = [](Optimizer& o, const TemporaryDirectory& directory) {
    const std::filesystem::path file = directory / "new";
    const SaveOptions options{.values = true, .metadata = {{"a", "b"}}};
    const Armed armed;
    o.save(file, options);
  };
  const auto save_async = [](Optimizer& o, const TemporaryDirectory& directory) {
    const std::filesystem::path file = directory / "new";
    const SaveOptions options{.values = true, .metadata = {{"a", "b"}}};
    const Armed armed;
    o.save_async(file, options);
    o.wait_for_save();
  };
  return {
      {"load_of_new_slots", kHere, 0, load},
      {"load_in_place", kHere, 2, load, true},
      {"load_converted", narrow(), 0, load},
      {"load_converted_in_place", narrow(), 2, load, true},
      {"load_of_little", kHere, 2, load_not_strict},
      {"load_state_dict", kHere, 0, load_dict},
      {"state_dict", kHere, 2, state_dict},
      {"save", kHere, 2, save},
      {"save_async", kHere, 2, save_async},
  };
}

class EveryAllocation : public testing::TestWithParam<Row> {};

TEST_P(EveryAllocation, FailsOnceAndChangesNothing) {
  const TemporaryDirectory directory;
  ModelSpec other = kHere;
  other[0].parameters[0].name = "somebody else";
  for (const auto& [name, spec] : {std::pair("state", kHere), std::pair("other", other)}) {
    Model from(spec);
    from.steps(0, 2);
    from.optimizer.save(directory / name, {.metadata = {{"epoch", "3"}}});
  }
  const std::set<std::string> files = directory.names();
  int refused = 0;
  for (std::int64_t allocation = 0;; ++allocation) {
    SCOPED_TRACE("allocation " + std::to_string(allocation));
    Model here(GetParam().spec), control(GetParam().spec);
    here.steps(50, GetParam().steps);
    control.steps(50, GetParam().steps);
    const std::string before = here.everything();
    bool out_of_memory = false, device_error = false;
    std::string text;
    has_failed = false;
    planned = allocation;
    try {
      GetParam().call(here.optimizer, directory);
    } catch (const OutOfMemory& error) {
      out_of_memory = true;
      text = error.what();
    } catch (const DeviceError& error) {
      device_error = true;
      text = error.what();
    } catch (const std::exception& error) {
      FAIL() << "an exception of another kind: " << error.what();
    }
    if (!has_failed) {
      EXPECT_GT(allocation, 4);
      break;
    }
    if (!out_of_memory && !device_error) continue;  // it went on without, as sorting does
    if (device_error) {
      ++refused;
      ASSERT_TRUE(GetParam().may_end_its_use) << text;
      ASSERT_THROW(here.optimizer.state_dict(), DeviceError);
      continue;
    }
    ASSERT_EQ("", difference(here.everything(), before)) << text;
    ASSERT_EQ(directory.names(), files);
    here.steps(60, 2);
    control.steps(60, 2);
    ASSERT_EQ("", difference(here.everything(), control.everything()));
  }
  // Once something is overwritten there is next to nothing left to allocate.
  EXPECT_LT(refused, 40);
}

INSTANTIATE_TEST_SUITE_P(Calls, EveryAllocation, testing::ValuesIn(rows()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace fusestep::test
