// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Flat groups: the same numbers as groups of the caller's memory, in one buffer for values, one for
// gradients and one for each slot.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>

#include "support.h"
#include "temporary_directory.h"

namespace fusestep::test {
namespace {

using ::testing::HasSubstr;

constexpr DType kF32 = DType::kFloat32, kF64 = DType::kFloat64, kBf16 = DType::kBFloat16;
constexpr std::int64_t kSizes[] = {5, 0, 64, 1, 131, 40};

/// Tensors "<group>.0", "<group>.1", ... of a layout.
class Tensors {
 public:
  Tensors(std::string group, const LayoutCase& layout) : group_(std::move(group)) {
    for (const std::int64_t size : kSizes) {
      values_.emplace_back(layout.value, size).fill_numbers(values_.size());
      grads_.emplace_back(layout.grad, size);
    }
    new_gradients(0);
  }
  std::string name(std::size_t i) const { return group_ + "." + std::to_string(i); }
  std::vector<Parameter> parameters() {
    std::vector<Parameter> all;
    for (std::size_t i = 0; i < values_.size(); ++i) {
      all.push_back({name(i), values_[i].view(), grads_[i].view()});
    }
    return all;
  }
  void new_gradients(std::uint64_t step) {
    for (std::size_t i = 0; i < grads_.size(); ++i) grads_[i].fill_numbers(1000 * step + i);
  }
  /// To where the optimizer has its gradients.
  void give_gradients(Optimizer& optimizer) const {
    for (std::size_t i = 0; i < grads_.size(); ++i) {
      const TensorView grad = optimizer.parameter(name(i)).grad();
      ASSERT_EQ(grad.bytes(), grads_[i].bytes());
      if (grad.bytes() != 0) std::memcpy(grad.data, grads_[i].data(), grad.bytes());
    }
  }

 private:
  std::string group_;
  std::deque<Array> values_, grads_;
};

/// An optimizer of ordinary groups, and one of flat groups with the same numbers.
class Pair {
 public:
  void add(const std::string& name, const Hyper& hyper, const LayoutCase& layout) {
    Tensors& own = tensors_.emplace_back(name, layout);
    Tensors moved(name, layout);  // its memory ends here
    plain.add_group(name, hyper, own.parameters(), layout.options());
    flat.add_flat_group(name, hyper, moved.parameters(), layout.options());
  }
  void step(std::uint64_t number, const StepOptions& options = {}) {
    for (Tensors& tensors : tensors_) {
      tensors.new_gradients(number);
      tensors.give_gradients(flat);
    }
    plain.step(options);
    flat.step(options);
  }
  void expect_equal(const std::string& when) {
    ASSERT_TRUE(snapshot(plain) == snapshot(flat)) << when;
    for (const GroupRef& group : plain.groups()) {
      for (const ParameterRef& parameter : group.parameters()) {
        ASSERT_TRUE(canonical(parameter.grad()) ==
                    canonical(flat.parameter(parameter.name()).grad()))
            << when << ": gradient of " << parameter.name();
      }
    }
    const GradNorm one = plain.last_grad_norm(), other = flat.last_grad_norm();
    EXPECT_EQ(bits(one.norm), bits(other.norm)) << when;
    EXPECT_EQ(plain.memory_report(), flat.memory_report()) << when;
  }

  Optimizer plain, flat;

 private:
  std::deque<Tensors> tensors_;
};

/// Every element of the buffer that is no parameter's.
void expect_zero_between(const FlatBuffer& buffer, const TensorView& memory) {
  std::vector<bool> is_between(static_cast<std::size_t>(memory.size()), true);
  for (const FlatBuffer::Part& part : buffer.parts) {
    for (std::int64_t i = 0; i < part.size; ++i) {
      is_between[static_cast<std::size_t>(part.begin + i)] = false;
    }
  }
  for (std::int64_t i = 0; i < memory.size(); ++i) {
    if (!is_between[static_cast<std::size_t>(i)]) continue;
    ASSERT_EQ(read_element(memory.data, memory.dtype, i), 0.0) << i;
  }
}

TEST(FlatGroups, StepAsOthersDoForEveryRuleAndLayout) {
  for (const LayoutCase& layout : all_layout_cases()) {
    for (const RuleCase& rule : variant_cases()) {
      SCOPED_TRACE(rule.name + " " + layout.name);
      Pair pair;
      pair.add("g", rule.hyper, layout);
      float scale = 4;
      StepOptions options{.store_unscaled_grads = layout.stores_grads};
      if (layout.stores_grads) options.loss_scale_source = view(&scale, {});
      for (std::uint64_t step = 1; step <= 4; ++step) pair.step(step, options);
      options.max_grad_norm = 0.5;
      options.skip_nonfinite = true;
      pair.step(5, options);
      pair.expect_equal("after five steps");
      for (const FlatBuffer& buffer : pair.flat.group("g").flat_buffers()) {
        expect_zero_between(buffer, buffer.values);
        expect_zero_between(buffer, buffer.grads);
        for (const auto& [name, slot] : buffer.slots) expect_zero_between(buffer, slot);
      }
    }
  }
}

TEST(FlatGroups, KeepEveryArrayOfALayoutInOneBuffer) {
  Optimizer optimizer;
  Tensors singles("single", kLayoutCases[0]), halves("half", kLayoutCases[2]);
  std::vector<Parameter> parameters = singles.parameters();
  for (Parameter& half : halves.parameters()) parameters.push_back(std::move(half));
  Array wide_grad(kF32, 5);  // float32 beside bfloat16
  wide_grad.fill_numbers(3);
  parameters[6].grad = wide_grad.view();
  GroupRef group =
      optimizer.add_flat_group("g", AdamHyper{}, std::move(parameters), {.master_weights = true});
  EXPECT_TRUE(group.flat_buffers()[1].slots.empty());
  optimizer.step();

  const std::vector<FlatBuffer> buffers = group.flat_buffers();
  ASSERT_EQ(buffers.size(), 3u);
  const std::pair<DType, DType> dtypes[] = {{kF32, kF32}, {kBf16, kF32}, {kBf16, kBf16}};
  const std::size_t counts[] = {6, 1, 5};
  for (std::size_t i = 0; i < 3; ++i) {
    const FlatBuffer& buffer = buffers[i];
    EXPECT_EQ(buffer.values.dtype, dtypes[i].first);
    EXPECT_EQ(buffer.grads.dtype, dtypes[i].second);
    EXPECT_EQ(buffer.parts.size(), counts[i]);
    EXPECT_EQ(buffer.slots.size(), i == 0 ? 2u : 3u);
    std::int64_t end = 0;
    for (const FlatBuffer::Part& part : buffer.parts) {
      EXPECT_EQ(part.begin % 32, 0);
      EXPECT_GE(part.begin, end);
      end = part.begin + part.size;
      ParameterRef parameter = optimizer.parameter(part.parameter);
      const auto expect_at = [&](const TensorView& memory, const TensorView& whole) {
        EXPECT_EQ(memory.data, static_cast<char*>(whole.data) +
                                   static_cast<std::size_t>(part.begin) * size_of(whole.dtype));
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data) % 64, 0u);
        EXPECT_EQ(memory.dtype, whole.dtype);
      };
      expect_at(parameter.value(), buffer.values);
      expect_at(parameter.grad(), buffer.grads);
      for (const auto& [name, slot] : buffer.slots) {
        expect_at(optimizer.state(part.parameter).slot(name), slot);
      }
    }
    EXPECT_LE(end, buffer.values.size());
    EXPECT_EQ(buffer.values.size(), buffer.grads.size());
  }
  EXPECT_EQ(canonical(optimizer.parameter("half.0").grad()), canonical(wide_grad));
  EXPECT_TRUE(optimizer.add_group("plain", SgdHyper{}, Tensors("p", kLayoutCases[0]).parameters())
                  .flat_buffers()
                  .empty());
}

TEST(FlatGroups, ClearTheirGradientsAtOnce) {
  Pair pair;
  pair.add("a", AdamHyper{}, kLayoutCases[0]);
  pair.add("b", AdamHyper{}, kLayoutCases[3]);
  pair.flat.group("a").zero_grad();
  const auto is_zero = [](const TensorView& memory) {
    for (std::int64_t i = 0; i < memory.size(); ++i) {
      if (read_element(memory.data, memory.dtype, i) != 0) return false;
    }
    return true;
  };
  EXPECT_TRUE(is_zero(pair.flat.group("a").flat_buffers()[0].grads));
  EXPECT_FALSE(is_zero(pair.flat.group("b").flat_buffers()[0].grads));
  try {
    pair.plain.group("a").zero_grad();
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), HasSubstr("group 'a': zero_grad() clears the gradients of flat"));
  }
}

TEST(FlatGroups, TakeAllOfAParameterWithoutGradient) {
  Array value(kF32, 7);
  value.fill_numbers(1);
  const std::string before = canonical(value);
  Optimizer optimizer;
  optimizer.add_flat_group("g", SgdHyper{.lr = 0.5}, {{"p", value.view({7})}});
  ParameterRef p = optimizer.parameter("p");
  ASSERT_TRUE(p.grad().present);
  optimizer.step();  // of a gradient that is zero
  EXPECT_EQ(canonical(p.value()), before);
  write_element(p.grad().data, kF32, 3, 2.0);
  optimizer.step();
  EXPECT_EQ(read_element(p.value().data, kF32, 3), value.get(3) - 1.0);
  EXPECT_EQ(canonical(value), before);  // the caller's is the caller's again
}

TEST(FlatGroups, StepGradientsElsewhereAndBackAgain) {
  Array value(kF32, 3), elsewhere(kF32, 3);
  elsewhere.fill([](std::uint64_t) { return 1.0; });
  Optimizer optimizer;
  optimizer.add_flat_group("g", SgdHyper{.lr = 1.0}, {{"p", value.view()}});
  ParameterRef p = optimizer.parameter("p");
  const TensorView own = p.grad();
  p.set_grad(elsewhere.view());
  optimizer.step();
  EXPECT_EQ(read_element(p.value().data, kF32, 0), -1.0);
  p.clear_grad();
  optimizer.step();
  p.set_grad(own);
  optimizer.step();
  EXPECT_EQ(read_element(p.value().data, kF32, 0), -1.0);
  EXPECT_EQ(optimizer.state("p").step(), 2);
}

/// Slots appear when a parameter first steps, in the buffer that the first one has made.
TEST(FlatGroups, FreezeAndThaw) {
  Pair pair;
  pair.add("g", AdamHyper{.lr = 1e-2, .weight_decay = 0.1}, kLayoutCases[0]);
  const auto both = [&](auto&& f) {
    f(pair.plain);
    f(pair.flat);
  };
  both([](Optimizer& o) { o.freeze("g.2"); });
  pair.step(1);
  const void* const buffer = pair.flat.group("g").flat_buffers()[0].slots.at("exp_avg").data;
  EXPECT_TRUE(pair.flat.state("g.2").slot_names().empty());
  pair.expect_equal("one frozen");
  both([](Optimizer& o) { o.freeze("g"); });
  pair.step(2);
  pair.expect_equal("all frozen");
  both([](Optimizer& o) { o.thaw("g"); });
  pair.step(3, {.max_grad_norm = 0.1});
  pair.step(4);
  pair.expect_equal("thawed");
  const FlatBuffer after = pair.flat.group("g").flat_buffers()[0];
  EXPECT_EQ(after.slots.at("exp_avg").data, buffer);
  EXPECT_EQ(pair.flat.state("g.2").slot("exp_avg").data,
            static_cast<float*>(after.slots.at("exp_avg").data) + after.parts[2].begin);
}

/// By name, to and from groups that are not flat.
TEST(FlatGroups, SaveAndLoad) {
  const TemporaryDirectory directory;
  for (const LayoutCase& layout : {kLayoutCases[0], kLayoutCases[2]}) {
    Pair saved, loaded;
    for (Pair* pair : {&saved, &loaded}) pair->add("g", AdamHyper{}, layout);
    for (std::uint64_t step = 1; step <= 3; ++step) saved.step(step);
    saved.plain.save(directory / "plain", {.values = true});
    saved.flat.save(directory / "flat", {.values = true});
    for (int times = 0; times < 2; ++times) {  // the second over slots that are there
      ASSERT_TRUE(loaded.plain.load(directory / "flat").complete());
      ASSERT_TRUE(loaded.flat.load(directory / "plain").complete());
      loaded.expect_equal("loaded");
      loaded.step(4);
      loaded.expect_equal("and stepped");
    }
    saved.step(4);
    EXPECT_TRUE(snapshot(saved.flat) == snapshot(loaded.flat));
    const FlatBuffer buffer = loaded.flat.group("g").flat_buffers()[0];
    EXPECT_EQ(loaded.flat.state("g.0").slot("exp_avg").data, buffer.slots.at("exp_avg").data);
  }
}

/// What a load leaves without state finds its place in the buffer again, empty.
TEST(FlatGroups, StartAnewWhereALoadHasNoState) {
  Pair pair;
  pair.add("g", SgdHyper{.momentum = 0.9}, kLayoutCases[0]);
  const StateDict fresh = pair.plain.state_dict();
  pair.step(1);
  const void* const before = pair.flat.state("g.4").slot("momentum_buffer").data;
  pair.plain.load_state_dict(fresh);
  pair.flat.load_state_dict(fresh);
  pair.expect_equal("without state");
  pair.step(2);
  pair.step(3);
  pair.expect_equal("again");
  EXPECT_EQ(pair.flat.state("g.4").slot("momentum_buffer").data, before);
}

TEST(FlatGroups, ChangeTheVariantOfTheirRule) {
  Pair pair;
  pair.add("g", AdamHyper{}, kLayoutCases[0]);
  pair.step(1);
  for (Optimizer* o : {&pair.plain, &pair.flat}) {
    o->group("g").set_hyper(AdamHyper{.amsgrad = true});
  }
  pair.step(2);
  pair.step(3);
  pair.expect_equal("AMSGrad");
  EXPECT_EQ(pair.flat.group("g").flat_buffers()[0].slots.size(), 3u);
}

TEST(FlatGroups, RefuseWhatCannotBeMovedAndChangeNothing) {
  Pair pair;
  pair.add("g", AdamHyper{}, kLayoutCases[0]);
  pair.step(1);
  const std::string before = snapshot(pair.flat);
  Array one(kF32, 10), other(kF32, 10);
  TensorView nowhere = view(static_cast<float*>(nullptr), {3});
  struct Bad {
    std::string message;
    std::string group = "new";
    std::vector<Parameter> parameters;
    Hyper hyper = AdamHyper{};
    GroupOptions options = {};
  };
  const std::vector<Bad> cases = {
      {"group 'g': there is a group of this name", "g", {{"x", one.view()}}},
      {"'x': there is a parameter of this name", "new", {{"x", one.view()}, {"x", other.view()}}},
      {"has no parameters", "new", {}},
      {"has no value", "new", {{"x", {}}}},
      {"null", "new", {{"x", nowhere}}},
      {"memory overlaps: 'value' of group 'new'", "new", {{"x", one.view()}, {"y", one.view()}}},
      {"memory overlaps", "new", {{"x", pair.flat.parameter("g.2").value()}}},
      {"shape", "new", {{"x", one.view(), other.view({2, 5})}}},
      {"lr", "new", {{"x", one.view()}}, AdamHyper{.lr = -1}},
      {"no layout",
       "new",
       {{"x", Array(kF64, 1).view()}},
       AdamHyper{},
       {.slots = SlotDType::kBFloat16}},
  };
  for (const Bad& bad : cases) {
    SCOPED_TRACE(bad.message);
    try {
      pair.flat.add_flat_group(bad.group, bad.hyper, bad.parameters, bad.options);
      ADD_FAILURE() << "not refused";
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(), HasSubstr(bad.message));
    }
    EXPECT_TRUE(snapshot(pair.flat) == before);
    EXPECT_EQ(pair.flat.groups().size(), 1u);
  }
  pair.step(2);
  pair.expect_equal("after refusals");
}

TEST(FlatGroups, RefuseToHaveTheirParametersElsewhere) {
  Pair pair;
  pair.add("g", AdamHyper{}, kLayoutCases[0]);
  ParameterRef p = pair.flat.parameter("g.2");
  const TensorView own = p.value();
  Array elsewhere(kF32, static_cast<std::size_t>(own.size()));
  try {
    p.set_value(elsewhere.view(own.shape));
    ADD_FAILURE() << "not refused";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(
        "group 'g', parameter 'g.2': lies in a buffer of its flat group and cannot be moved",
        error.what());
  }
  EXPECT_EQ(own.data, p.value().data);
  p.set_value(own);
  for (std::uint64_t step = 1; step <= 2; ++step) pair.step(step);
  pair.expect_equal("after a refusal");
}

/// Large ones, of which each buffer starts at another place of a page.
TEST(FlatGroups, OfLargeTensors) {
  Array value(kF32, 100'003), grad(kF32, 100'003);
  value.fill_numbers(1);
  grad.fill_numbers(2);
  Optimizer plain, flat;
  flat.add_flat_group("g", AdamHyper{}, {{"p", value.view(), grad.view()}});
  plain.add_group("g", AdamHyper{}, {{"p", value.view(), grad.view()}});
  for (int i = 0; i < 3; ++i) {
    plain.step();
    flat.step();
  }
  EXPECT_TRUE(snapshot(plain) == snapshot(flat));
  const FlatBuffer buffer = flat.group("g").flat_buffers()[0];
  std::vector<std::uintptr_t> places;
  for (const TensorView& memory :
       {buffer.values, buffer.grads, buffer.slots.at("exp_avg"), buffer.slots.at("exp_avg_sq")}) {
    places.push_back(reinterpret_cast<std::uintptr_t>(memory.data) % 4096);
  }
  std::sort(places.begin(), places.end());
  EXPECT_EQ(std::adjacent_find(places.begin(), places.end()), places.end());
}

}  // namespace
}  // namespace fusestep::test
