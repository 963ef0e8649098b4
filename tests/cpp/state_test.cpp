// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// State as a value: what survives a round trip, what matches what, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <sstream>

#include "checkpoint/description.h"
#include "checkpoint/engine_state.h"
#include "files/safetensors.h"
#include "state_support.h"

namespace fusestep::test {
namespace {

using detail::Json;
using testing::HasSubstr;

Hyper with_lr(Hyper hyper, double factor) {
  std::visit([&](auto& h) { h.lr *= factor; }, hyper);
  return hyper;
}

// ---- training goes on to the last bit -----------------------------------------------------------

/// How state gets from one optimizer to another.
struct Way {
  std::string name;
  std::function<void(Model& from, Model& to, const TemporaryDirectory& directory)> carry;
};
void PrintTo(const Way& way, std::ostream* out) { *out << way.name; }

std::vector<Way> ways() {
  return {
      {"file",
       [](Model& from, Model& to, const TemporaryDirectory& directory) {
         from.optimizer.save(directory / "state", {.values = true});
         to.optimizer.load(directory / "state");
       }},
      {"background",
       [](Model& from, Model& to, const TemporaryDirectory& directory) {
         to.copy_values(from);
         from.optimizer.save_async(directory / "state");
         from.optimizer.wait_for_save();
         to.optimizer.load(directory / "state");
       }},
      {"by_position",
       [](Model& from, Model& to, const TemporaryDirectory&) {
         to.copy_values(from);
         to.optimizer.load_state_dict(from.optimizer.state_dict());
       }},
      {"by_name",
       [](Model& from, Model& to, const TemporaryDirectory&) {
         to.copy_values(from);
         EXPECT_TRUE(to.optimizer.load(from.optimizer.state_dict()).complete());
       }},
      {"file_of_a_dict",
       [](Model& from, Model& to, const TemporaryDirectory& directory) {
         to.copy_values(from);
         write_state_dict(from.optimizer.state_dict(), directory / "state");
         to.optimizer.load_state_dict(read_state_dict(directory / "state"));
       }},
      {"through_another",
       [](Model& from, Model& to, const TemporaryDirectory& directory) {
         from.optimizer.save(directory / "first", {.values = true});
         const StateDict dict = read_state_dict(directory / "first");
         write_state_dict(dict, directory / "second");
         to.optimizer.load(directory / "second");
         to.optimizer.save(directory / "third", {.values = true});
         to.optimizer.load(directory / "third");
       }},
  };
}

/// What an optimizer has been through when it is saved.
struct Past {
  const char* name;
  std::function<void(Model&)> live;
};

std::vector<Past> pasts() {
  return {
      {"never_stepped", [](Model&) {}},
      {"stepped", [](Model& m) { m.steps(0, 3); }},
      {"first_step_skipped",
       [](Model& m) {
         float found = 1;
         m.step(0, {.skip_source = view(&found, {})});
       }},
      {"each_its_own_count",
       [](Model& m) {
         m.optimizer.freeze("b");
         m.optimizer.freeze("e");
         m.steps(0, 2);
         m.optimizer.thaw("e");
         m.optimizer.freeze("a");
         m.step(2);
         m.optimizer.state("c").set_step(1000);
         m.optimizer.thaw("b");
         m.step(3);  // a stays frozen
       }},
      {"frozen_with_a_skip",
       [](Model& m) {
         m.optimizer.freeze("a");
         m.step(0);
         float found = 1;
         m.optimizer.thaw("a");
         m.step(1, {.skip_source = view(&found, {})});
         m.optimizer.freeze("c");
       }},
      {"step_count_given", [](Model& m) { m.optimizer.state("a").set_step(7); }},
  };
}

ModelSpec five_parameters(const Hyper& hyper, const LayoutCase& layout, double lr_factor = 1) {
  const DType dtype = layout.value;
  return {
      {"one", with_lr(hyper, lr_factor), {{"a", {4, 3}, dtype}, {"b", {1}, dtype}}, layout.slots},
      {"two",
       with_lr(hyper, 3 * lr_factor),
       {{"c", {}, dtype}, {"d", {0}, dtype}, {"e", {2, 17}, dtype}},
       layout.slots}};
}

class Continue : public testing::TestWithParam<Way> {};

TEST_P(Continue, ForEveryRuleDtypeAndPast) {
  const TemporaryDirectory directory;
  for (const RuleCase& rule : rule_cases()) {
    if (rule.name.ends_with("_maximize") && GetParam().name != "file") continue;
    for (const LayoutCase& layout : kLayoutCases) {
      for (const Past& past : pasts()) {
        SCOPED_TRACE(rule.name + ", " + layout.name + ", " + past.name);
        Model whole(five_parameters(rule.hyper, layout));
        Model other(five_parameters(rule.hyper, layout, 1.5));
        past.live(whole);
        GetParam().carry(whole, other, directory);
        ASSERT_EQ("", difference(whole.state(), other.state()));
        for (Model* model : {&whole, &other}) {
          model->steps(100, 8);
          model->optimizer.thaw("a");
          model->steps(200, 12);
        }
        ASSERT_EQ("", difference(whole.state(), other.state()));
        ASSERT_TRUE(other.guards_intact());
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ways, Continue, testing::ValuesIn(ways()),
                         [](const auto& info) { return info.param.name; });

/// What the optimizer had before leaves no trace.
TEST(Load, IntoAnOptimizerThatHasStepped) {
  for (const Way& way : ways()) {
    for (const RuleCase& rule : rule_cases()) {
      for (const Past& before : pasts()) {
        for (const Past& past : pasts()) {
          SCOPED_TRACE(way.name + ", " + rule.name + ", " + before.name + " becomes " + past.name);
          const TemporaryDirectory directory;
          Model whole(five_parameters(rule.hyper, kLayoutCases[0]));
          Model other(five_parameters(rule.hyper, kLayoutCases[0]));
          other.steps(50, 2);
          before.live(other);
          past.live(whole);
          way.carry(whole, other, directory);
          ASSERT_EQ("", difference(text_of(whole.optimizer.state_dict()),
                                   text_of(other.optimizer.state_dict())));
          for (Model* model : {&whole, &other}) {
            model->steps(100, 2);
            model->optimizer.thaw("one");
            model->optimizer.thaw("two");
            model->steps(200, 3);
          }
          ASSERT_EQ("", difference(text_of(whole.optimizer.state_dict()),
                                   text_of(other.optimizer.state_dict())));
        }
      }
      if (way.name != "file") break;
    }
  }
}

/// Slots that a load has dropped leave memory that is used again: loading in turns does not grow.
TEST(Load, UsesMemoryAgain) {
  const LayoutCase layout = kLayoutCases[0];
  Model never(five_parameters(AdamHyper{}, layout)), often(five_parameters(AdamHyper{}, layout));
  const StateDict fresh = never.optimizer.state_dict();
  often.steps(0, 2);
  const StateDict stepped = often.optimizer.state_dict();
  std::set<void*> addresses;
  for (int i = 0; i < 4; ++i) {
    often.optimizer.load_state_dict(fresh);
    EXPECT_TRUE(often.optimizer.state("a").slot_names().empty());
    often.optimizer.load_state_dict(stepped);
    for (const char* name : {"a", "e"}) {
      for (const char* slot : {"exp_avg", "exp_avg_sq"}) {
        addresses.insert(often.optimizer.state(name).slot(slot).data);
      }
    }
    EXPECT_EQ("", difference(text_of(often.optimizer.state_dict()), text_of(stepped)));
  }
  EXPECT_EQ(addresses.size(), 4u);
  often.optimizer.load_state_dict(fresh);
  never.steps(0, 3);
  never.copy_values(often);
  often.steps(0, 3);
  for (const char* name : {"a", "c", "e"}) {
    EXPECT_EQ(canonical(never.optimizer.state(name).slot("exp_avg")),
              canonical(often.optimizer.state(name).slot("exp_avg")));
  }
}

/// The caller's memory stays the slot; where nothing was saved it is zero.
TEST(Load, IntoMemoryOfTheCaller) {
  const ModelSpec spec = {{"g", SgdHyper{.momentum = 0.9}, {{"a"}, {"b"}}}};
  Model from(spec), to(spec);
  from.optimizer.freeze("b");
  from.steps(0, 2);
  from.optimizer.thaw("b");
  Array a(DType::kFloat32, 3), b(DType::kFloat32, 3);
  a.fill_numbers(1);
  b.fill_numbers(2);
  to.optimizer.state("a").bind_slot("momentum_buffer", a.view());
  to.optimizer.state("b").bind_slot("momentum_buffer", b.view());
  to.optimizer.load_state_dict(from.optimizer.state_dict());
  EXPECT_EQ(to.optimizer.state("a").slot("momentum_buffer").data, a.data());
  EXPECT_EQ(to.optimizer.state("b").slot("momentum_buffer").data, b.data());
  EXPECT_EQ(canonical(a), canonical(from.optimizer.state("a").slot("momentum_buffer")));
  EXPECT_EQ(canonical(b), canonical(Array(DType::kFloat32, 3)));
  to.copy_values(from);
  from.steps(10, 3);
  to.steps(10, 3);
  EXPECT_EQ("",
            difference(text_of(from.optimizer.state_dict()), text_of(to.optimizer.state_dict())));
  EXPECT_EQ(canonical(b), canonical(from.optimizer.state("b").slot("momentum_buffer")));
  EXPECT_TRUE(a.guards_intact() && b.guards_intact());
}

/// Tensors of several pieces, of which none has a round size.
TEST(Load, LargeTensors) {
  const std::int64_t size = (std::int64_t{9} << 17) + 5;  // of float64: two pieces and a bit
  const ModelSpec spec = {{"g", AdamHyper{}, {{"a", {size}, DType::kFloat64}, {"b", {7}}}}};
  const TemporaryDirectory directory;
  Model from(spec), to(spec);
  from.steps(0, 2);
  from.optimizer.save_async(directory / "state", {.values = true});
  from.optimizer.save(directory / "again", {.values = true});
  to.optimizer.load(directory / "state");
  EXPECT_EQ("", difference(from.everything(), to.everything()));
  to.step(5);
  to.optimizer.load(directory / "again");
  EXPECT_EQ("", difference(from.everything(), to.everything()));
}

// ---- what matches what --------------------------------------------------------------------------

/// The report in one line per list.
std::string digest(const LoadReport& report) {
  std::string text;
  const auto list = [&](const char* what, const std::vector<std::string>& names) {
    if (names.empty()) return;
    text += std::string(what) + ":";
    for (const std::string& name : names) text += " " + name;
    text += "\n";
  };
  list("loaded", report.loaded);
  list("missing", report.missing);
  list("unexpected", report.unexpected);
  for (const LoadReport::Mismatch& m : report.mismatched) {
    text += "mismatched: " + m.name + " " + m.what + " " + m.saved + ", here " + m.here + "\n";
  }
  list("converted", report.converted);
  for (const LoadReport::HyperDifference& d : report.hyper) {
    text += "hyper: " + d.group + " " + d.key + " " + d.saved + ", here " + d.here +
            (d.taken ? ", taken\n" : ", kept\n");
  }
  return text;
}

struct Story {
  std::string name;
  ModelSpec saved, here;
  std::string report;  ///< of a load that is not strict
  LoadOptions options = {};
  std::map<std::string, std::string> settings = {};  ///< group here: of this saved group
  std::uint64_t steps_here = 2;
  bool complete = true;
  bool values = false;
  std::set<std::string> frozen = {};  ///< of those saved
};
void PrintTo(const Story& story, std::ostream* out) { *out << story.name; }

const AdamHyper kSlow{.lr = 0.125}, kFast{.lr = 0.5};

std::vector<Story> stories() {
  const ParameterSpec w{"w", {2, 3}}, b{"b", {3}}, head{"head", {4}};
  const auto prefix = [](const std::string& name) { return "model." + name; };
  LoadOptions state{.what = LoadWhat::kState}, hyper{.what = LoadWhat::kHyper};
  return {
      {.name = "same",
       .saved = {{"g", kSlow, {w, b}}},
       .here = {{"g", kSlow, {w, b}}},
       .report = "loaded: w b\n",
       .settings = {{"g", "g"}}},
      {.name = "head_then_whole_network",
       .saved = {{"all", kFast, {head}}},
       .here = {{"body", kSlow, {w, b}}, {"head", kSlow, {head}}},
       .report = "loaded: head\nmissing: w b\nhyper: head lr 0.5, here 0.125, taken\n",
       .settings = {{"head", "all"}},
       .steps_here = 0,
       .complete = false},
      {.name = "whole_network_then_head",
       .saved = {{"body", kSlow, {w, b}}, {"head", kFast, {head}}},
       .here = {{"only", kSlow, {head}}},
       .report = "loaded: head\nunexpected: w b\nhyper: only lr 0.5, here 0.125, taken\n",
       .settings = {{"only", "head"}},
       .complete = false},
      {.name = "another_order_and_grouping",
       .saved = {{"x", kSlow, {w}}, {"y", kSlow, {b, head}}},
       .here = {{"p", kFast, {head, w, b}}},
       .report = "loaded: head w b\nhyper: p lr 0.125, here 0.5, taken\n",
       .settings = {{"p", "x"}}},
      {.name = "groups_in_another_order",
       .saved = {{"x", kSlow, {w}}, {"y", kFast, {b}}},
       .here = {{"y", kSlow, {b}}, {"x", kFast, {w}}},
       .report = "loaded: b w\nhyper: y lr 0.5, here 0.125, taken\n"
                 "hyper: x lr 0.125, here 0.5, taken\n",
       .settings = {{"x", "x"}, {"y", "y"}}},
      {.name = "one_group_of_two_settings",
       .saved = {{"x", kSlow, {w}}, {"y", kFast, {b}}},
       .here = {{"g", AdamHyper{.lr = 1}, {w, b}}},
       .report = "loaded: w b\nmismatched: g settings of several groups, here of one group\n",
       .complete = false},
      {.name = "one_group_of_two_settings_state_only",
       .saved = {{"x", kSlow, {w}}, {"y", kFast, {b}}},
       .here = {{"g", AdamHyper{.lr = 1}, {w, b}}},
       .report = "loaded: w b\n",
       .options = state},
      {.name = "state_keeps_learning_rates",
       .saved = {{"g", kSlow, {w}}},
       .here = {{"g", kFast, {w}}},
       .report = "loaded: w\nhyper: g lr 0.125, here 0.5, kept\n",
       .options = state,
       .frozen = {"w"}},
      {.name = "hyper_takes_no_state",
       .saved = {{"g", kSlow, {w}}},
       .here = {{"g", kFast, {w}}},
       .report = "hyper: g lr 0.125, here 0.5, taken\n",
       .options = hyper,
       .settings = {{"g", "g"}},
       .frozen = {"w"}},
      {.name = "rename",
       .saved = {{"g", kSlow, {w, b}}},
       .here = {{"g", kSlow, {{"model.b", {3}}, {"model.w", {2, 3}}, {"w", {2, 3}}}}},
       .report = "loaded: model.b model.w\nmissing: w\n",
       .options = {.rename = prefix},
       .settings = {{"g", "g"}},
       .complete = false},
      {.name = "shape",
       .saved = {{"g", kSlow, {w, b}}},
       .here = {{"g", kSlow, {{"w", {3, 2}}, b}}},
       .report = "loaded: b\nmismatched: w shape [2, 3], here [3, 2]\n",
       .settings = {{"g", "g"}},
       .complete = false},
      {.name = "shape_of_one_element",
       .saved = {{"g", kSlow, {{"w", {}}, {"b", {1}}}}},
       .here = {{"g", kSlow, {{"w", {1}}, {"b", {1, 1}}}}},
       .report = "mismatched: w shape [], here [1]\nmismatched: b shape [1], here [1, 1]\n",
       .settings = {{"g", "g"}},
       .complete = false},
      {.name = "dtype",
       .saved = {{"g", kSlow, {{"w", {2, 3}, DType::kFloat64}, b}}},
       .here = {{"g", kSlow, {w, b}}},
       .report = "loaded: b\nmismatched: w/exp_avg dtype float64, here float32\n"
                 "mismatched: w/exp_avg_sq dtype float64, here float32\n",
       .settings = {{"g", "g"}},
       .complete = false},
      {.name = "dtype_of_values",
       .saved = {{"g", kSlow, {{"w", {2, 3}, DType::kBFloat16}}}},
       .here = {{"g", kSlow, {w}}},
       .report = "mismatched: w/value dtype bfloat16, here float32\n",
       .settings = {{"g", "g"}},
       .complete = false,
       .values = true},
      {.name = "slots_fit_whatever_the_values",
       .saved = {{"g", kSlow, {{"w", {2, 3}, DType::kBFloat16}}}},
       .here = {{"g", kSlow, {w}}},
       .report = "loaded: w\n",
       .options = {.values = false},
       .settings = {{"g", "g"}},
       .values = true},
      {.name = "slots_of_another_dtype",
       .saved = {{"g", kSlow, {{"w", {2, 3}, DType::kBFloat16}}, SlotDType::kLikeParameter}},
       .here = {{"g", kSlow, {{"w", {2, 3}, DType::kBFloat16}}}},
       .report = "mismatched: w/exp_avg dtype bfloat16, here float32\n"
                 "mismatched: w/exp_avg_sq dtype bfloat16, here float32\n",
       .settings = {{"g", "g"}},
       .complete = false},
      {.name = "converted",
       .saved = {{"g", kSlow, {{"w", {2, 3}, DType::kFloat64}, b}}},
       .here = {{"g", kSlow, {w, b}}},
       .report = "loaded: w b\nconverted: w/exp_avg w/exp_avg_sq w/value\n",
       .options = {.convert = true},
       .settings = {{"g", "g"}},
       .values = true},
      {.name = "another_rule",
       .saved = {{"g", SgdHyper{.momentum = 0.5}, {w}}, {"h", kSlow, {b}}},
       .here = {{"g", kSlow, {w}}, {"h", kSlow, {b}}},
       .report = "loaded: b\nmismatched: g rule SGD, here Adam\n",
       .settings = {{"h", "h"}},
       .complete = false},
      {.name = "adam_of_adamw",
       .saved = {{"g", AdamWHyper{.lr = 0.25}, {w}}},
       .here = {{"g", AdamHyper{.lr = 0.25}, {w}}},
       .report = "loaded: w\nhyper: g decoupled_weight_decay true, here false, taken\n"
                 "hyper: g weight_decay 0.01, here 0.0, taken\n",
       .settings = {{"g", "g"}}},
      {.name = "variant_with_fewer_slots",
       .saved = {{"g", kSlow, {w}}},
       .here = {{"g", AdamHyper{.lr = 0.125, .amsgrad = true}, {w}}},
       .report = "loaded: w\nmissing: w/max_exp_avg_sq\nhyper: g amsgrad false, here true, kept\n",
       .options = state,
       .complete = false},
      {.name = "variant_with_more_slots",
       .saved = {{"g", AdamHyper{.lr = 0.125, .amsgrad = true}, {w}}},
       .here = {{"g", kSlow, {w}}},
       .report = "loaded: w\nhyper: g amsgrad true, here false, kept\n",
       .options = state},
      {.name = "variant_is_taken",
       .saved = {{"g", RmspropHyper{.lr = 0.5, .momentum = 0.5, .centered = true}, {w}}},
       .here = {{"g", RmspropHyper{.lr = 0.5}, {w}}},
       .report = "loaded: w\nhyper: g centered true, here false, taken\n"
                 "hyper: g momentum 0.5, here 0.0, taken\n",
       .settings = {{"g", "g"}}},
      {.name = "momentum_switched_on",
       .saved = {{"g", SgdHyper{.lr = 0.5}, {w}}},
       .here = {{"g", SgdHyper{.lr = 0.5, .momentum = 0.5}, {w}}},
       .report = "loaded: w\nmissing: w/momentum_buffer\n"
                 "hyper: g momentum 0.0, here 0.5, kept\n",
       .options = state,
       .steps_here = 0,
       .complete = false},
      {.name = "frozen_ones",
       .saved = {{"g", kSlow, {w, b}}},
       .here = {{"g", kSlow, {w, b}}},
       .report = "loaded: w b\n",
       .settings = {{"g", "g"}},
       .frozen = {"b"}},
      {.name = "nothing_in_common",
       .saved = {{"g", kSlow, {w}}},
       .here = {{"h", kFast, {b}}},
       .report = "missing: b\nunexpected: w\n",
       .complete = false},
  };
}

const ParameterState* find(const StateDict& dict, const std::string& name) {
  for (const ParameterState& parameter : dict.state) {
    if (parameter.name == name) return &parameter;
  }
  return nullptr;
}
const GroupState* find_group(const StateDict& dict, const std::string& name) {
  for (const GroupState& group : dict.param_groups) {
    if (group.name == name) return &group;
  }
  return nullptr;
}

double element(const StateTensor& tensor, std::int64_t i) {
  return read_element(reinterpret_cast<const unsigned char*>(tensor.data.data()), tensor.dtype, i);
}

void expect_same_slots(const ParameterState& saved, const ParameterState& after, bool convert) {
  ASSERT_EQ(saved.slots.size(), after.slots.size());
  for (const auto& [name, slot] : after.slots) {
    const StateTensor& source = saved.slots.at(name);
    ASSERT_EQ(source.shape, slot.shape);
    for (std::int64_t i = 0; i < elements_of(slot.shape); ++i) {
      double expected = element(source, i);
      if (convert) expected = static_cast<float>(expected);
      ASSERT_EQ(expected, element(slot, i)) << name;
    }
  }
}

class Matching : public testing::TestWithParam<Story> {};

TEST_P(Matching, ReportsWhatItDoesAndDoesIt) {
  const Story& story = GetParam();
  const TemporaryDirectory directory;
  Model from(story.saved);
  for (const std::string& name : story.frozen) from.optimizer.freeze(name);
  from.step(0);
  for (const std::string& name : story.frozen) from.optimizer.thaw(name);
  from.steps(1, 2);
  for (const std::string& name : story.frozen) from.optimizer.freeze(name);
  from.optimizer.save(directory / "state", {.values = story.values, .metadata = {{"epoch", "3"}}});
  const StateDict saved = from.optimizer.state_dict();

  Model here(story.here);
  here.steps(100, story.steps_here);
  const std::string before_text = here.everything();
  const StateDict before = here.optimizer.state_dict();

  LoadOptions strict = story.options;
  strict.strict = true;
  if (!story.complete) {
    try {
      here.optimizer.load(directory / "state", strict);
      FAIL() << "a strict load was not refused";
    } catch (const LoadError& error) {
      EXPECT_EQ(digest(error.report()), story.report);
      EXPECT_FALSE(error.report().complete());
      EXPECT_THAT(error.what(), HasSubstr(error.report().to_string()));
    }
    EXPECT_EQ("", difference(here.everything(), before_text));
    strict.strict = false;
  }
  const LoadReport report = here.optimizer.load(directory / "state", strict);
  EXPECT_EQ(digest(report), story.report);
  EXPECT_EQ(report.complete(), story.complete);
  EXPECT_EQ(report.metadata, (Metadata{{"epoch", "3"}}));

  const StateDict after = here.optimizer.state_dict();
  const std::set<std::string> loaded(report.loaded.begin(), report.loaded.end());
  for (const ParameterState& parameter : after.state) {
    SCOPED_TRACE(parameter.name);
    const ParameterState& was = *find(before, parameter.name);
    if (loaded.count(parameter.name) == 0) {
      EXPECT_EQ(parameter.step, was.step);
      EXPECT_EQ(parameter.frozen, was.frozen);
      expect_same_slots(was, parameter, false);
      continue;
    }
    const ParameterState* source = nullptr;
    for (const ParameterState& candidate : saved.state) {
      const auto& rename = story.options.rename;
      const std::string name = rename ? rename(candidate.name) : candidate.name;
      if (name == parameter.name) source = &candidate;
    }
    ASSERT_NE(source, nullptr);
    EXPECT_EQ(parameter.step, source->step);
    EXPECT_EQ(parameter.frozen, story.options.what == LoadWhat::kAll ? source->frozen : was.frozen);
    expect_same_slots(*source, parameter, story.options.convert);
  }
  for (const GroupState& group : after.param_groups) {
    const auto source = story.settings.find(group.name);
    const Hyper& expected = source == story.settings.end()
                                ? find_group(before, group.name)->hyper
                                : find_group(saved, source->second)->hyper;
    EXPECT_EQ(detail::to_json(group.hyper), detail::to_json(expected)) << group.name;
  }
  EXPECT_TRUE(here.guards_intact());
  here.steps(200, 2);

  // A StateDict is matched in the same way.
  if (story.values) return;
  Model again(story.here);
  again.steps(100, story.steps_here);
  EXPECT_EQ(digest(again.optimizer.load(saved, strict)), story.report);
  EXPECT_EQ(text_of(again.optimizer.state_dict()).find("epoch"), std::string::npos);
  again.steps(200, 2);
  StateDict last = here.optimizer.state_dict();
  last.metadata.clear();
  EXPECT_EQ("", difference(text_of(again.optimizer.state_dict()), text_of(last)));
}

INSTANTIATE_TEST_SUITE_P(Stories, Matching, testing::ValuesIn(stories()),
                         [](const auto& info) { return info.param.name; });

TEST(Report, IsATable) {
  LoadReport report;
  report.loaded = {"a", "b"};
  report.missing = {"head.weight"};
  report.mismatched = {{"fc.weight", "shape", "[10, 512]", "[7, 512]"},
                       {"x/exp_avg", "dtype", "bfloat16", "float32"}};
  report.hyper = {{"g", "lr", "0.1", "0.2", true}, {"group", "foreach", "", "true", false}};
  for (int i = 0; i < 12; ++i) report.unexpected.push_back("p" + std::to_string(i));
  const char* const expected =
      "matching    2     a, b\n"
      "missing     1     head.weight\n"
      "unexpected  12    p0, p1, p2, p3, p4, p5, p6, p7, ...\n"
      "does not fit\n"
      "  fc.weight shape saved [10, 512] here [7, 512]\n"
      "  x/exp_avg dtype saved bfloat16  here float32\n"
      "settings of groups\n"
      "  g     lr      saved 0.1  here 0.2  taken\n"
      "  group foreach saved none here true kept\n";
  EXPECT_EQ(report.to_string(), expected);
  std::ostringstream out;
  out << report;
  EXPECT_EQ(out.str(), expected);
  EXPECT_EQ(LoadReport().to_string(), "nothing was loaded\n");
}

/// torch's texts, and a mismatch of shapes that torch lets pass.
TEST(LoadStateDict, MatchesByPosition) {
  const ParameterSpec w{"w", {2, 3}}, b{"b", {3}};
  struct Row {
    const char* name;
    ModelSpec saved;
    const char* text;  // null: it is taken
  };
  const Row rows[] = {
      {"names_do_not_count", {{"x", kFast, {{"p", {2, 3}}}}, {"y", kSlow, {{"q", {3}}}}}, nullptr},
      {"fewer_groups",
       {{"g", kFast, {w, b}}},
       "loaded state dict has a different number of parameter groups"},
      {"more_groups",
       {{"g", kFast, {w}}, {"h", kFast, {b}}, {"i", kFast, {{"c"}}}},
       "loaded state dict has a different number of parameter groups"},
      {"sizes_of_groups",
       {{"g", kFast, {w, {"c"}}}, {"h", kFast, {b}}},
       "loaded state dict contains a parameter group that doesn't match the size of optimizer's "
       "group"},
      {"sizes_of_groups_in_all_equal",
       {{"g", kFast, {w, {"c"}}}, {"h", kFast, {b}}},
       "loaded state dict contains a parameter group that doesn't match the size of optimizer's "
       "group"},
      {"shape",
       {{"g", kFast, {{"w", {3, 2}}}}, {"h", kFast, {b}}},
       "does not fit\n  w shape saved [3, 2] here [2, 3]\n"},
      {"rule", {{"g", SgdHyper{}, {w}}, {"h", kFast, {b}}}, "g rule saved SGD here Adam"},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    Model from(row.saved), to({{"g", kSlow, {w}}, {"h", kSlow, {b}}});
    from.steps(0, 3);
    to.steps(0, 1);
    const std::string before = to.everything();
    const StateDict state = from.optimizer.state_dict();
    if (row.text == nullptr) {
      to.optimizer.load_state_dict(state);
      EXPECT_EQ(to.optimizer.state("w").step(), 3);
      EXPECT_EQ(to.optimizer.group("g").lr(), 0.5);
      EXPECT_EQ(to.optimizer.group("h").lr(), 0.125);
      EXPECT_EQ(canonical(to.optimizer.state("b").slot("exp_avg")),
                canonical(from.optimizer.state("q").slot("exp_avg")));
      continue;
    }
    try {
      to.optimizer.load_state_dict(state);
      ADD_FAILURE() << "nothing was thrown";
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(), HasSubstr(row.text));
    }
    EXPECT_EQ("", difference(to.everything(), before));
  }
}

/// What save has written load takes, also where slots had not been there yet.
TEST(Load, EverySavedStateIsComplete) {
  struct Row {
    const char* name;
    Hyper hyper;
    std::function<void(Model&)> live;
  };
  static Array bound(DType::kFloat32, 6);
  const Row rows[] = {
      {"amsgrad_just_switched_on", AdamHyper{},
       [](Model& m) {
         m.steps(0, 2);
         m.optimizer.group("g").set_hyper(AdamHyper{.amsgrad = true});
       }},
      {"momentum_just_switched_on", SgdHyper{},
       [](Model& m) {
         m.steps(0, 2);
         m.optimizer.group("g").set_hyper(SgdHyper{.momentum = 0.9});
       }},
      {"centered_just_switched_on", RmspropHyper{},
       [](Model& m) {
         m.steps(0, 2);
         m.optimizer.group("g").set_hyper(RmspropHyper{.momentum = 0.9, .centered = true});
       }},
      {"amsgrad_switched_off", AdamHyper{.amsgrad = true},
       [](Model& m) {
         m.steps(0, 2);
         m.optimizer.group("g").set_hyper(AdamHyper{});
       }},
      {"one_slot_bound", AdamHyper{},
       [](Model& m) {
         m.optimizer.state("w").bind_slot("exp_avg", bound.view({2, 3}));
       }},
      {"a_late_count", AdamHyper{},
       [](Model& m) { m.optimizer.state("w").set_step(std::int64_t{1} << 60); }},
  };
  const TemporaryDirectory directory;
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    const ModelSpec spec = {{"g", row.hyper, {{"w", {2, 3}}, {"b"}}}};
    Model from(spec), to(spec);
    row.live(from);
    from.optimizer.save(directory / "state", {.values = true});
    EXPECT_TRUE(to.optimizer.load(directory / "state").complete());
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(
          "", difference(text_of(from.optimizer.state_dict()), text_of(to.optimizer.state_dict())));
      from.steps(10, 3);
      to.steps(10, 3);
    }
  }
}

// ---- settings, names, metadata ------------------------------------------------------------------

/// Doubles come back to the bit, also those JSON has no number for.
TEST(Settings, SurviveToTheBit) {
  const auto seed = static_cast<std::uint64_t>(std::random_device()());
  SCOPED_TRACE("seed " + std::to_string(seed));
  const TemporaryDirectory directory;
  const auto positive = [&](std::uint64_t i) {
    return std::fabs(special_number(seed, i, DType::kFloat64));
  };
  for (std::uint64_t i = 0; i < 200; ++i) {
    AdamHyper hyper{.lr = positive(5 * i), .eps = positive(5 * i + 1)};
    hyper.betas[0] = std::fabs(number(seed, 5 * i + 2));
    hyper.weight_decay = positive(5 * i + 3);
    if (std::isnan(hyper.lr) || std::isnan(hyper.eps) || std::isnan(hyper.weight_decay)) continue;
    Model from({{"g", hyper, {{"w"}}}}), to({{"g", AdamHyper{}, {{"w"}}}});
    from.optimizer.save(directory / "state");
    to.optimizer.load(directory / "state");
    EXPECT_TRUE(std::get<AdamHyper>(to.optimizer.group("g").hyper()) == hyper)
        << detail::to_json(Hyper(hyper)).dump();
  }
}

/// A rate that lives in memory is saved as it is, and a load does not end its use.
TEST(Settings, LearningRateFromMemory) {
  double lr = 0.25, other_lr = 1.0;
  const ModelSpec spec = {{"g", AdamHyper{.lr = 0.5}, {{"w"}}}};
  Model from(spec), plain(spec), sourced(spec);
  from.optimizer.group("g").set_lr_source(view(&lr, {}));
  sourced.optimizer.group("g").set_lr_source(view(&other_lr, {}));
  const StateDict state = from.optimizer.state_dict();
  EXPECT_EQ(digest(plain.optimizer.load(state)), "loaded: w\nhyper: g lr 0.25, here 0.5, taken\n");
  EXPECT_EQ(plain.optimizer.group("g").lr(), 0.25);
  EXPECT_EQ(digest(sourced.optimizer.load(state)), "loaded: w\nhyper: g lr 0.25, here 1.0, kept\n");
  EXPECT_EQ(learning_rate(sourced.optimizer.state_dict().param_groups[0].hyper), 1.0);
}

TEST(Schedule, GoesOnAfterALoad) {
  const TemporaryDirectory directory;
  const ModelSpec spec = {{"slow", AdamHyper{.lr = 0.125}, {{"w"}}},
                          {"fast", AdamHyper{.lr = 0.5}, {{"b"}}}};
  Model from(spec);
  LrSchedule whole(from.optimizer, cosine_with_warmup(3, 40, 0.1));
  for (std::uint64_t i = 0; i < 10; ++i) {
    from.step(i);
    whole.step();
  }
  from.optimizer.save(directory / "state", {.values = true});
  ModelSpec other_rates = spec;
  other_rates[0].hyper = other_rates[1].hyper = AdamHyper{.lr = 7};
  for (const LoadWhat what : {LoadWhat::kAll, LoadWhat::kHyper}) {
    Model to(other_rates);
    to.optimizer.load(directory / "state", {.what = what});
    EXPECT_EQ(to.optimizer.group("slow").lr(), from.optimizer.group("slow").lr());
    LrSchedule resumed(to.optimizer, cosine_with_warmup(3, 40, 0.1), 10);
    EXPECT_EQ(resumed.base().at("slow"), 0.125);
    EXPECT_EQ(resumed.base().at("fast"), 0.5);
    for (int i = 0; i < 25; ++i) {
      resumed.step();
      whole.set_step(resumed.current_step());
      for (const char* group : {"slow", "fast"}) {
        ASSERT_EQ(bits(to.optimizer.group(group).lr()), bits(from.optimizer.group(group).lr()));
      }
    }
    whole.set_step(10);
    EXPECT_EQ(LrSchedule(to.optimizer, step_decay(1), 5, {{"slow", 2.0}}).base().at("slow"), 2.0);
  }
  // With the rates set now, the base is what it was, and a schedule from the start begins anew.
  Model state_only(other_rates);
  state_only.optimizer.load(directory / "state", {.what = LoadWhat::kState});
  EXPECT_EQ(LrSchedule(state_only.optimizer, step_decay(1), 10).base().at("slow"), 7);
  Model anew(other_rates);
  anew.optimizer.load(directory / "state");
  const double lr = anew.optimizer.group("slow").lr();
  EXPECT_EQ(LrSchedule(anew.optimizer, step_decay(1)).base().at("slow"), lr);
}

TEST(Schedule, ARateThatIsNoneChangesNoGroup) {
  Model model({{"g", AdamHyper{.lr = 0.5}, {{"w"}}}, {"h", AdamHyper{.lr = HUGE_VAL}, {{"b"}}}});
  LrSchedule schedule(model.optimizer, [](std::int64_t step) { return step == 0 ? 1.0 : 0.0; });
  EXPECT_THROW(schedule.step(), InvalidArgument);
  EXPECT_EQ(model.optimizer.group("g").lr(), 0.5);
  EXPECT_EQ(schedule.current_step(), 0);
}

TEST(Names, OfEveryKindSurvive) {
  const std::string names[] = {"",
                               "/",
                               "a/b",
                               "a%2Fb",
                               "%",
                               "%2",
                               "100%",
                               "a\nb",
                               "tab\there",
                               "\x7f",
                               "\x01",
                               "\"quoted\"",
                               "back\\",
                               "a/",
                               "/a",
                               "gewichtß",
                               "層.0",
                               "🙂",
                               "value",
                               "step",
                               "exp_avg",
                               "__metadata__",
                               "a.b.c",
                               "a//exp_avg",
                               std::string("nul\0inside", 10),
                               "%2F",
                               "%00",
                               "%zz"};
  ModelSpec spec = {{"group/%\n\"ß", AdamHyper{}, {}}};
  for (const std::string& name : names) spec[0].parameters.push_back({name});
  const TemporaryDirectory directory;
  Model from(spec), to(spec);
  from.steps(0, 2);
  from.optimizer.save(directory / "state", {.values = true});
  EXPECT_TRUE(to.optimizer.load(directory / "state").complete());
  EXPECT_EQ("", difference(from.everything(), to.everything()));
}

TEST(Names, ThatAreNotUtf8AreRefused) {
  const TemporaryDirectory directory;
  for (const std::string& name :
       {std::string("\xff"), std::string("a\xc3"), std::string("\xed\xa0\x80")}) {
    struct Row {
      ModelSpec spec;
      const char* text;
    };
    for (const Row& row : {Row{{{"g", AdamHyper{}, {{name}}}}, "parameter \""},
                           Row{{{name, AdamHyper{}, {{"w"}}}}, "group \""}}) {
      Model model(row.spec);
      model.step(0);
      const auto expect_refusal = [&](const std::function<void()>& save) {
        try {
          save();
          ADD_FAILURE() << "nothing was thrown";
        } catch (const InvalidArgument& error) {
          EXPECT_THAT(error.what(), HasSubstr(row.text));
          EXPECT_THAT(error.what(), HasSubstr("valid UTF-8"));
        }
      };
      expect_refusal([&] { model.optimizer.save(directory / "state"); });
      expect_refusal([&] {
        model.optimizer.save_async(directory / "state");
        model.optimizer.wait_for_save();
      });
      Model other(row.spec);
      other.optimizer.load(model.optimizer.state_dict());  // no file, no limit
      EXPECT_EQ(snapshot(other.optimizer).size(), snapshot(model.optimizer).size());
    }
  }
  EXPECT_TRUE(directory.names().empty());
}

TEST(Metadata, IsTheUsersAndStays) {
  const TemporaryDirectory directory;
  Model model({{"g", AdamHyper{}, {{"w"}}}});
  model.optimizer.save(directory / "1",
                       {.metadata = {{"epoch", "1"}, {"commit", "abc"}, {"", ""}}});
  Model next({{"g", AdamHyper{}, {{"w"}}}});
  EXPECT_EQ(next.optimizer.load(directory / "1").metadata,
            (Metadata{{"epoch", "1"}, {"commit", "abc"}, {"", ""}}));
  next.optimizer.save_async(directory / "2", {.metadata = {{"epoch", "2"}}});
  next.optimizer.wait_for_save();
  const StateDict state = read_state_dict(directory / "2");
  EXPECT_EQ(state.metadata, (Metadata{{"epoch", "2"}, {"commit", "abc"}, {"", ""}}));
  EXPECT_EQ(next.optimizer.state_dict().metadata.at("epoch"), "1");
  for (const char* key : {"fusestep.", "fusestep.groups", "fusestep.anything"}) {
    EXPECT_THROW(model.optimizer.save(directory / "3", {.metadata = {{key, ""}}}), InvalidArgument);
    EXPECT_THROW(model.optimizer.save_async(directory / "3", {.metadata = {{key, ""}}}),
                 InvalidArgument);
  }
  EXPECT_EQ(directory.names(), (std::set<std::string>{"1", "2"}));
}

// ---- files that are not as they should be -------------------------------------------------------

/// A file taken apart.
struct Contents {
  Metadata metadata;
  Json groups;
  std::vector<detail::TensorInfo> tensors;
  std::map<std::string, std::string> data;

  explicit Contents(const std::filesystem::path& path) {
    const detail::SafetensorsReader file(path);
    metadata = file.metadata();
    tensors = file.tensors();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      std::string& bytes = data[tensors[i].name];
      bytes.resize(tensors[i].bytes());
      file.read_all(i, bytes.data(), bytes.size());
    }
    groups = Json::parse(metadata.at("fusestep.groups"));
  }
  void write(const std::filesystem::path& path) {
    if (metadata.count("fusestep.groups") != 0 && !groups.is_null()) {
      metadata["fusestep.groups"] = groups.dump();
    }
    detail::SafetensorsWriter file(path, metadata, tensors);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const std::string& bytes = data.at(tensors[i].name);
      file.write(i, bytes.data(), bytes.size());
    }
    file.commit();
  }
  detail::TensorInfo& tensor(const std::string& name) {
    for (detail::TensorInfo& info : tensors) {
      if (info.name == name) return info;
    }
    throw std::logic_error("no tensor " + name);
  }
  void rename(const std::string& name, const std::string& to) {
    tensor(name).name = to;
    data[to] = data.at(name);
  }
  void remove(const std::string& name) {
    std::erase_if(tensors, [&](const auto& info) { return info.name == name; });
  }
};

const ModelSpec kWorld = {
    {"body", AdamHyper{.lr = 0.125}, {{"w", {2, 3}}, {"b", {3}}}},
    {"head", SgdHyper{.lr = 0.25, .momentum = 0.5}, {{"h", {4}, DType::kBFloat16}}}};

struct BadFile {
  const char* name;
  std::function<void(Contents&)> change;
  const char* text;
  bool only_strict = false;  ///< a LoadError
};
void PrintTo(const BadFile& row, std::ostream* out) { *out << row.name; }

Json& parameter(Contents& c) { return c.groups[0]["params"][0]; }

std::vector<BadFile> bad_files() {
  return {
      {"groups_are_no_list", [](Contents& c) { c.groups = Json::object(); },
       "groups must be a list"},
      {"groups_are_missing",
       [](Contents& c) {
         c.metadata.erase("fusestep.groups");
         c.groups = nullptr;
       },
       "the metadata 'fusestep.groups' is missing"},
      {"groups_are_no_json",
       [](Contents& c) {
         c.metadata["fusestep.groups"] = "[{]";
         c.groups = nullptr;
       },
       "fusestep.groups is not JSON"},
      {"a_key_twice",
       [](Contents& c) {
         c.metadata["fusestep.groups"] = R"([{"name":"a","name":"b"}])";
         c.groups = nullptr;
       },
       "fusestep.groups has the key \"name\" twice"},
      {"deep",
       [](Contents& c) {
         c.metadata["fusestep.groups"] = std::string(5000, '[') + std::string(5000, ']');
         c.groups = nullptr;
       },
       "fusestep.groups nests too deeply"},
      {"group_is_no_object", [](Contents& c) { c.groups[1] = 5; }, "group 1 must be an object"},
      {"group_without_name", [](Contents& c) { c.groups[1].erase("name"); },
       "group 1: name must be a string, got null"},
      {"name_is_a_number", [](Contents& c) { c.groups[0]["name"] = 7; },
       "group 0: name must be a string, got 7"},
      {"rule_is_missing", [](Contents& c) { c.groups[0].erase("rule"); },
       "group 'body': rule must be a string, got null"},
      {"hyper_is_a_list", [](Contents& c) { c.groups[0]["hyper"] = Json::array(); },
       "group 'body': hyper must be an object"},
      {"params_are_missing", [](Contents& c) { c.groups[0].erase("params"); },
       "group 'body': params must be a list"},
      {"parameter_is_no_object", [](Contents& c) { parameter(c) = "w"; },
       "group 'body': a parameter must be an object"},
      {"parameter_without_name", [](Contents& c) { parameter(c).erase("name"); },
       "group 'body': a parameter's name must be a string, got null"},
      {"dtype_is_a_number", [](Contents& c) { parameter(c)["dtype"] = 32; },
       "group 'body', parameter 'w': dtype must be a string, got 32"},
      {"shape_is_missing", [](Contents& c) { parameter(c).erase("shape"); },
       "group 'body', parameter 'w': shape must be a list of extents"},
      {"shape_of_text",
       [](Contents& c) {
         parameter(c)["shape"] = {2, "3"};
       },
       "group 'body', parameter 'w': shape must be a list of extents, got [2,\"3\"]"},
      {"negative_extent",
       [](Contents& c) {
         parameter(c)["shape"] = {-2, 3};
       },
       "group 'body', parameter 'w': shape must be a list of extents, got [-2,3]"},
      {"extent_beyond_int64", [](Contents& c) { parameter(c)["shape"] = {std::uint64_t{1} << 63}; },
       "shape must be a list of extents, got [9223372036854775808]"},
      {"frozen_is_text", [](Contents& c) { parameter(c)["frozen"] = "yes"; },
       "group 'body', parameter 'w': frozen must be true or false, got \"yes\""},
      {"negative_step", [](Contents& c) { parameter(c)["step"] = -1; },
       "group 'body', parameter 'w': step must be a whole number >= 0, got -1"},
      {"negative_zero_and_a_bit", [](Contents& c) { parameter(c)["step"] = -1e-300; },
       "group 'body', parameter 'w': step must be a whole number >= 0, got -1e-300"},
      {"half_a_step", [](Contents& c) { parameter(c)["step"] = 2.5; },
       "group 'body', parameter 'w': step must be a whole number >= 0, got 2.5"},
      {"step_is_nan",
       [](Contents& c) {
         parameter(c)["step"] = {{"float", "nan"}};
       },
       "group 'body', parameter 'w': step must be a whole number >= 0, got nan"},
      {"step_is_infinite",
       [](Contents& c) {
         parameter(c)["step"] = {{"float", "inf"}};
       },
       "group 'body', parameter 'w': step must be a whole number >= 0, got inf"},
      {"step_is_huge", [](Contents& c) { parameter(c)["step"] = 1e300; },
       "group 'body', parameter 'w': step must be a whole number >= 0, got 1e+300"},
      {"step_beyond_int64",
       [](Contents& c) { parameter(c)["step"] = (std::uint64_t{1} << 63) + 5; },
       "group 'body', parameter 'w': step must be a whole number >= 0"},
      {"step_is_text", [](Contents& c) { parameter(c)["step"] = "3"; },
       "group 'body', parameter 'w': step must be a number, got \"3\""},
      {"two_of_a_name", [](Contents& c) { c.groups[1]["params"].push_back(parameter(c)); },
       "group 'head': there are two parameters named 'w'"},
      {"tensor_of_no_parameter", [](Contents& c) { c.rename("w/exp_avg", "v/exp_avg"); },
       "tensor 'v/exp_avg' belongs to no parameter"},
      {"tensor_without_slash", [](Contents& c) { c.rename("w/exp_avg", "w"); },
       "tensor 'w' belongs to no parameter"},
      {"tensor_under_two_names",
       [](Contents& c) {
         c.tensors.push_back(c.tensor("w/exp_avg"));
         c.tensors.back().name = "%77/exp_avg";
         c.data["%77/exp_avg"] = c.data["w/exp_avg"];
       },
       "' is there twice, once with other escapes in its name"},
      {"lr_is_text", [](Contents& c) { c.groups[0]["hyper"]["lr"] = "fast"; },
       "settings saved of group 'body': lr must be a number, got \"fast\""},
      {"lr_is_negative", [](Contents& c) { c.groups[0]["hyper"]["lr"] = -1; },
       "settings saved of group 'body': lr must be >= 0, got -1"},
      {"lr_is_nan",
       [](Contents& c) {
         c.groups[0]["hyper"]["lr"] = {{"float", "nan"}};
       },
       "settings saved of group 'body': lr must be >= 0, got nan"},
      {"float_of_no_number",
       [](Contents& c) {
         c.groups[0]["hyper"]["lr"] = {{"float", "1x"}};
       },
       "settings saved of group 'body': lr must be a number, got {\"float\":\"1x\"}"},
      {"one_beta", [](Contents& c) { c.groups[0]["hyper"]["betas"] = {0.9}; },
       "settings saved of group 'body': betas must be two numbers, got [0.9]"},
      {"beta_of_one",
       [](Contents& c) {
         c.groups[0]["hyper"]["betas"] = {0.9, 1.0};
       },
       "settings saved of group 'body': betas[1] must be in [0, 1), got 1"},
      {"amsgrad_is_a_number", [](Contents& c) { c.groups[0]["hyper"]["amsgrad"] = 1; },
       "amsgrad must be true or false, got 1"},
      {"nesterov_without_momentum",
       [](Contents& c) {
         c.groups[1]["hyper"]["nesterov"] = true;
         c.groups[1]["hyper"]["momentum"] = 0;
       },
       "settings saved of group 'head': momentum must be > 0 with nesterov, got 0"},
      {"initial_lr_is_negative", [](Contents& c) { c.groups[1]["hyper"]["initial_lr"] = -0.5; },
       "settings saved of group 'head': initial_lr must be >= 0, got -0.5"},
      {"initial_lr_is_null", [](Contents& c) { c.groups[1]["hyper"]["initial_lr"] = nullptr; },
       "settings saved of group 'head': initial_lr must be a number, got null"},
      {"unknown_rule", [](Contents& c) { c.groups[0]["rule"] = "Lion"; },
       "body rule saved Lion here Adam", true},
      {"slot_of_another_shape", [](Contents& c) { c.tensor("w/exp_avg").shape = {6}; },
       "w/exp_avg shape saved [6] here [2, 3]", true},
      {"slot_of_another_dtype", [](Contents& c) { c.tensor("w/exp_avg").dtype = "I32"; },
       "w/exp_avg dtype saved int32 here float32", true},
      {"slot_of_a_dtype_nobody_has",
       [](Contents& c) {
         c.tensor("h/momentum_buffer").dtype = "F8_E4M3";
         c.tensor("h/momentum_buffer").shape = {16};
       },
       "h/momentum_buffer shape saved [16] here [4]", true},
      {"slot_is_missing", [](Contents& c) { c.remove("w/exp_avg_sq"); },
       "missing     1     w/exp_avg_sq", true},
      {"slot_of_another_rule", [](Contents& c) { c.rename("w/exp_avg", "w/momentum_buffer"); },
       "missing     1     w/exp_avg", true},
      {"shape_of_the_parameter",
       [](Contents& c) {
         parameter(c)["shape"] = {3, 2};
       },
       "w shape saved [3, 2] here [2, 3]", true},
  };
}

class BadFiles : public testing::TestWithParam<BadFile> {};

TEST_P(BadFiles, AreRefusedAndChangeNothing) {
  const TemporaryDirectory directory;
  Model from(kWorld);
  from.steps(0, 3);
  from.optimizer.save(directory / "good", {.values = true});
  Contents contents(directory / "good");
  GetParam().change(contents);
  contents.write(directory / "bad");
  const std::string where = "file '" + (directory / "bad").string() + "': ";

  for (const std::uint64_t steps : {0, 2}) {
    for (const bool strict : {true, false}) {
      if (GetParam().only_strict && !strict) continue;
      Model here(kWorld), control(kWorld);
      here.steps(50, steps);
      control.steps(50, steps);
      const std::string before = here.everything();
      try {
        here.optimizer.load(directory / "bad", {.strict = strict});
        ADD_FAILURE() << "nothing was thrown";
      } catch (const LoadError& error) {
        EXPECT_TRUE(GetParam().only_strict) << error.what();
        EXPECT_THAT(error.what(), HasSubstr(GetParam().text));
      } catch (const FileError& error) {
        EXPECT_FALSE(GetParam().only_strict) << error.what();
        EXPECT_THAT(error.what(), testing::StartsWith(where));
        EXPECT_THAT(error.what(), HasSubstr(GetParam().text));
      }
      EXPECT_EQ("", difference(here.everything(), before));
      here.steps(60, 2);
      control.steps(60, 2);
      EXPECT_EQ("", difference(here.everything(), control.everything()));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, BadFiles, testing::ValuesIn(bad_files()),
                         [](const auto& info) { return std::string(info.param.name); });

/// Settings that nobody takes may be what they are.
TEST(Files, BadSettingsDoNotMatterToStateAlone) {
  const TemporaryDirectory directory;
  Model from(kWorld), here(kWorld);
  from.steps(0, 3);
  from.optimizer.save(directory / "good", {.values = true});
  Contents contents(directory / "good");
  contents.groups[0]["hyper"]["lr"] = {{"float", "nan"}};
  contents.write(directory / "bad");
  here.optimizer.load(directory / "bad", {.what = LoadWhat::kState});
  EXPECT_EQ("", difference(here.everything(), from.everything()));
}

/// What a later version says is not lost on the way through this one.
TEST(Files, UnknownKeysStay) {
  const TemporaryDirectory directory;
  Model from(kWorld);
  from.steps(0, 2);
  from.optimizer.save(directory / "old");
  Contents contents(directory / "old");
  contents.metadata["fusestep.later"] = "words";
  contents.groups[0]["later"] = {{"a", {1, 2.5, nullptr}}};
  contents.groups[0]["hyper"]["later_setting"] = "x";
  parameter(contents)["later_too"] = {true};
  parameter(contents)["slots"] = {{"phantom", {{"dtype", "float32"}, {"shape", {6}}}}};
  parameter(contents)["slot_dtypes"] = {"float32"};
  contents.write(directory / "new");
  Model here(kWorld);
  EXPECT_TRUE(here.optimizer.load(directory / "new").complete());
  here.optimizer.save(directory / "again");
  const Contents again(directory / "again");
  EXPECT_EQ(again.groups[0]["later"].dump(), "{\"a\":[1,2.5,null]}");
  EXPECT_EQ(again.groups[0]["hyper"]["later_setting"], "x");
  EXPECT_EQ(again.groups[0]["params"][0]["later_too"].dump(), "[true]");
  EXPECT_EQ(again.groups[0]["params"][0]["slots"].size(), 1u);
  EXPECT_FALSE(again.groups[0]["params"][1].contains("later_too"));
  EXPECT_EQ(again.metadata.at("fusestep.later"), "words");
  // A load of settings alone takes those of groups; one of state alone those of parameters.
  Model hyper(kWorld);
  hyper.optimizer.load(directory / "new", {.what = LoadWhat::kHyper});
  hyper.optimizer.save_async(directory / "hyper");
  hyper.optimizer.wait_for_save();
  const Contents of_hyper(directory / "hyper");
  EXPECT_TRUE(of_hyper.groups[0].contains("later"));
  EXPECT_FALSE(of_hyper.groups[0]["params"][0].contains("later_too"));
}

/// safetensors of other programs: tensors `<parameter>/<slot>` and numbers `<parameter>/step`.
TEST(Files, OfOtherProgramsLoadByTheNamesOfTheirTensors) {
  using Tensors = std::vector<std::pair<detail::TensorInfo, std::string>>;
  const auto floats = [](std::vector<float> x) {
    return std::string(reinterpret_cast<const char*>(x.data()), x.size() * sizeof(float));
  };
  const auto doubles = [](double x) {
    return std::string(reinterpret_cast<const char*>(&x), sizeof x);
  };
  const auto ints = [](std::int64_t x) {
    return std::string(reinterpret_cast<const char*>(&x), sizeof x);
  };
  const std::string three = floats({1, 2, 3}), zero = floats({0});
  const Tensors whole = {
      {{"a.w/exp_avg", "F32", {3}}, three},        {{"a.w/exp_avg_sq", "F32", {3}}, three},
      {{"a.w/step", "F32", {}}, floats({5})},      {{"b/exp_avg", "F32", {1}}, floats({4})},
      {{"b/exp_avg_sq", "F32", {1}}, floats({6})}, {{"b/step", "I64", {1}}, ints(6)}};
  struct Row {
    const char* name;
    Hyper hyper;
    Tensors tensors;
    const char* report;  // of a load that is not strict
    const char* error;   // of a FileError
  };
  Tensors with_nan = whole, with_half = whole, with_text = whole, without_square = whole,
          with_more = whole;
  with_nan[2].second = floats({std::nanf("")});
  with_half[5] = {{"b/step", "F64", {1}}, doubles(0.5)};
  with_text[2] = {{"a.w/step", "U8", {}}, "x"};
  without_square.erase(without_square.begin() + 1);
  with_more.push_back({{"epoch", "I64", {}}, ints(3)});
  with_more.push_back({{"c/exp_avg", "F32", {1}}, zero});
  const Row rows[] = {
      {"whole", AdamHyper{.lr = 0.5}, whole, "loaded: a.w b\n", nullptr},
      {"steps_alone",
       SgdHyper{},
       {{{"a.w/step", "F32", {}}, floats({5})}, {{"b/step", "I32", {}}, floats({0})}},
       "loaded: a.w b\n",
       nullptr},
      {"a_slot_too_few", AdamHyper{}, without_square, "loaded: a.w b\nmissing: a.w/exp_avg_sq\n",
       nullptr},
      {"more", AdamHyper{}, with_more, "loaded: a.w b\nunexpected: c\n", nullptr},
      {"no_steps",
       AdamHyper{},
       {{{"b/exp_avg", "F32", {1}}, zero}},
       "loaded: b\nmissing: a.w b/exp_avg_sq\n",
       nullptr},
      {"step_is_nan", AdamHyper{}, with_nan, nullptr,
       "tensor 'a.w/step' must be a whole number >= 0, got nan"},
      {"half_a_step", AdamHyper{}, with_half, nullptr,
       "tensor 'b/step' must be a whole number >= 0, got 0.5"},
      {"step_of_bytes", AdamHyper{}, with_text, nullptr,
       "tensor 'a.w/step' must be of F32, F64, I64 or I32, got U8"},
      {"no_slots",
       AdamHyper{},
       {{{"weight", "F32", {3}}, three}},
       nullptr,
       "no tensor is named '<parameter>/<slot>'"},
  };
  const TemporaryDirectory directory;
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    std::string header = "{", data;
    for (const auto& [info, bytes] : row.tensors) {
      header += (data.empty() ? "\"" : ",\"") + info.name + R"(":{"dtype":")" + info.dtype +
                R"(","shape":)" + to_string(info.shape) + R"(,"data_offsets":[)" +
                std::to_string(data.size()) + "," + std::to_string(data.size() + bytes.size()) +
                "]}";
      data += bytes;
    }
    header += "}";
    const std::uint64_t length = header.size();
    std::ofstream out(directory / "plain", std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), 8);
    out << header << data;
    out.close();

    Model model({{"g", row.hyper, {{"a.w", {3}}, {"b", {1}}}}});
    model.optimizer.freeze("b");
    const std::string before = model.everything();
    if (row.error != nullptr) {
      try {
        model.optimizer.load(directory / "plain", {.strict = false});
        ADD_FAILURE() << "nothing was thrown";
      } catch (const FileError& error) {
        EXPECT_THAT(error.what(), HasSubstr(row.error));
      }
      EXPECT_EQ("", difference(model.everything(), before));
      continue;
    }
    const LoadReport report = model.optimizer.load(directory / "plain", {.strict = false});
    EXPECT_EQ(digest(report), row.report);
    EXPECT_TRUE(model.optimizer.parameter("b").frozen());  // the file does not say
    EXPECT_EQ(learning_rate(model.optimizer.group("g").hyper()), learning_rate(row.hyper));
    if (row.tensors.size() < 2) continue;
    EXPECT_EQ(model.optimizer.state("a.w").step(), 5);
    if (std::string(row.name) != "whole") continue;
    EXPECT_TRUE(report.complete());
    EXPECT_EQ(model.optimizer.state("b").step(), 6);
    EXPECT_EQ(canonical(model.optimizer.state("a.w").slot("exp_avg")), three);
    EXPECT_EQ(read_state_dict(directory / "plain").state.size(), 2u);
  }
}

/// The bytes change after the file was opened, before anything is taken from it.
TEST(Files, ThatChangeUnderALoadAreRefused) {
  const TemporaryDirectory directory;
  Model from(kWorld);
  from.steps(0, 2);
  for (const std::uint64_t steps : {0, 2}) {
    for (const bool keep_size : {true, false}) {
      from.optimizer.save(directory / "state", {.values = true});
      Model here(kWorld);
      here.steps(50, steps);
      const std::string before = here.everything();
      const auto damage = [&, done = false](const std::string& name) mutable {
        if (!std::exchange(done, true)) {
          const std::filesystem::path path = directory / "state";
          const auto size = std::filesystem::file_size(path);
          if (keep_size) {
            std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
            file.seekp(static_cast<std::streamoff>(size) - 1);
            file.put('\x55');
          } else {
            std::filesystem::resize_file(path, size - 1);
          }
        }
        return name;
      };
      EXPECT_THROW(here.optimizer.load(directory / "state", {.rename = damage}), FileError);
      EXPECT_EQ("", difference(here.everything(), before));
      here.steps(60, 1);
    }
  }
}

// ---- a source that fails ------------------------------------------------------------------------

/// Throws at the `fail_at`th thing it is asked for: a verification, one of two pieces, or what
/// comes after them.
class FailingSource final : public detail::StateSource {
 public:
  FailingSource(const StateDict& dict, int fail_at, bool no_memory)
      : source_(dict), left_(fail_at), no_memory_(no_memory) {}
  const detail::Description& description() const override { return source_.description(); }
  const Metadata& metadata() const override { return source_.metadata(); }
  void read(int parameter, const std::string& slot, detail::ByteRange range,
            const detail::TakePiece& take) override {
    source_.read(parameter, slot, range, [&](const void* data, std::size_t bytes) {
      const std::size_t half = bytes / 16 * 8;
      count();
      take(data, half);
      count();
      take(static_cast<const std::byte*>(data) + half, bytes - half);
    });
    count();  // a checksum that differs is known at the end
  }
  void verify(int, const std::string&, detail::ByteRange) override { count(); }
  bool has_failed() const { return left_ < 0; }

 private:
  void count() {
    if (left_-- != 0) return;
    if (no_memory_) throw std::bad_alloc();
    throw FileError("the file has changed");
  }
  detail::DictSource source_;
  int left_;
  bool no_memory_;
};

std::string everything_of(detail::Engine& engine) {
  detail::EngineSource source(engine, true, {});
  return text_of(detail::to_dict(source));
}

/// An engine with values a and b, b of which has stepped `steps` times.
struct BareEngine {
  Array a{DType::kFloat64, 64}, b{DType::kFloat64, 64};
  Array a_grad{DType::kFloat64, 64}, b_grad{DType::kFloat64, 64};
  detail::Engine engine{OptimizerOptions{}};
  explicit BareEngine(std::uint64_t steps) {
    a.fill_numbers(1);
    b.fill_numbers(2);
    a_grad.fill_numbers(3);
    b_grad.fill_numbers(4);
    engine.add_group("g", AdamHyper{.lr = 0.5},
                     {{"a", a.view(), a_grad.view()}, {"b", b.view(), b_grad.view()}}, {});
    engine.set_frozen("a", true);
    for (std::uint64_t i = 0; i < steps; ++i) engine.step({});
    engine.set_frozen("a", false);
  }
};

TEST(FailingLoads, LeaveEverythingAsItWasOrEndItsUse) {
  for (const bool no_memory : {false, true}) {
    for (const std::uint64_t steps : {0, 2}) {
      int unchanged = 0, refused = 0;
      for (int fail_at = 0;; ++fail_at) {
        SCOPED_TRACE("failure " + std::to_string(fail_at));
        BareEngine from(0), to(steps), control(steps);
        from.engine.step({});
        from.engine.set_lr(0, 0.25);
        detail::EngineSource source(from.engine, false, {});
        const StateDict dict = detail::to_dict(source);
        const std::string before = everything_of(to.engine);
        FailingSource failing(dict, fail_at, no_memory);
        const LoadOptions options;
        detail::EngineLoader loader(to.engine, options);
        try {
          loader.load(failing, false);
          ASSERT_FALSE(failing.has_failed());
          break;
        } catch (const FileError& error) {
          ASSERT_FALSE(no_memory);
        } catch (const std::bad_alloc&) {
          ASSERT_TRUE(no_memory);
        } catch (const DeviceError& error) {
          ASSERT_TRUE(no_memory) << error.what();  // OutOfMemory would say that nothing has changed
        }
        try {
          to.engine.refuse_if_broken();
          ASSERT_EQ("", difference(everything_of(to.engine), before));
          to.engine.step({});
          control.engine.step({});
          ASSERT_EQ("", difference(everything_of(to.engine), everything_of(control.engine)));
          ++unchanged;
        } catch (const DeviceError& error) {
          EXPECT_THAT(error.what(), HasSubstr("a load failed while it replaced state: "));
          EXPECT_THROW(to.engine.step({}), DeviceError);
          EXPECT_THROW(detail::EngineSource(to.engine, false, {}), DeviceError);
          EXPECT_THROW(detail::EngineLoader(to.engine, options).load(failing, false), DeviceError);
          ++refused;
        }
      }
      // Two slots of two parameters, three points each; in place two are verified, and all but the
      // first piece comes too late.
      EXPECT_EQ(unchanged, steps == 0 ? 12 : 2 + 6 + 1);
      EXPECT_EQ(refused, steps == 0 ? 0 : 5);
    }
  }
}

// ---- slots of the user's own
// ---------------------------------------------------------------------

/// A Python program keeps what it likes in optimizer.state[p]. No rule here has it: it is left out,
/// and nothing is refused for it.
TEST(Load, LeavesOutWhatNoRuleHasAndSaysSo) {
  const TemporaryDirectory directory;
  const ModelSpec spec = {{"g", AdamHyper{}, {{"w", {2, 3}}, {"b", {3}}}}};
  Model from(spec);
  from.steps(0, 2);
  StateDict dict = from.optimizer.state_dict();
  dict.state[0].slots["ema"] = {DType::kFloat64, {5}, std::vector<std::byte>(40)};
  dict.state[1].slots["grad_avg"] = {DType::kFloat32, {3}, std::vector<std::byte>(12)};
  write_state_dict(dict, directory / "state");
  const auto check = [&](const auto& source) {
    for (const bool strict : {true, false}) {
      Model to(spec);
      to.copy_values(from);
      to.step(7, {.skip = true});
      const LoadReport report = to.optimizer.load(source, {.strict = strict});
      EXPECT_EQ(report.left_out, (std::vector<std::string>{"w/ema", "b/grad_avg"}));
      EXPECT_TRUE(report.complete());
      EXPECT_THAT(report.to_string(), testing::HasSubstr("left out    2     w/ema, b/grad_avg\n"));
      EXPECT_EQ("", difference(to.everything(), from.everything()));
    }
  };
  check(directory / "state");
  check(dict);
  Model by_position(spec);
  by_position.copy_values(from);
  by_position.optimizer.load_state_dict(dict);
  EXPECT_EQ("", difference(by_position.everything(), from.everything()));
  // What is needed is missed whatever else is there.
  dict.state[0].slots.erase("exp_avg");
  EXPECT_THROW(from.optimizer.load(dict), LoadError);
}

// ---- saving in the background -------------------------------------------------------------------

TEST(SaveAsync, HoldsTheStateOfTheCall) {
  const TemporaryDirectory directory;
  const ModelSpec spec = {{"g", AdamHyper{}, {{"w", {300, 1000}}, {"b", {5}}}}};
  Model model(spec), control(spec);
  model.steps(0, 2);
  control.steps(0, 2);
  for (int i = 0; i < 5; ++i) {
    const std::string name = std::to_string(i);
    model.optimizer.save_async(directory / name, {.values = true});
    const std::string expected = control.everything();
    model.step(10);
    model.optimizer.group("g").set_lr(0.5);
    model.optimizer.freeze("b");
    Model loaded(spec);
    if (i == 4) model.optimizer.wait_for_save();
    if (i != 4) model.optimizer.save(directory / "other");  // waits for it
    loaded.optimizer.load(directory / name);
    EXPECT_EQ("", difference(loaded.everything(), expected));
    model.optimizer.thaw("b");
    control.step(10);
    control.optimizer.group("g").set_lr(0.5);
  }
}

TEST(SaveAsync, ErrorsComeWithTheNextCall) {
  struct Row {
    const char* name;
    std::function<void(Optimizer&, const std::filesystem::path&)> next;
  };
  const Row rows[] = {
      {"wait", [](Optimizer& o, const std::filesystem::path&) { o.wait_for_save(); }},
      {"save", [](Optimizer& o, const std::filesystem::path& path) { o.save(path); }},
      {"save_async", [](Optimizer& o, const std::filesystem::path& path) { o.save_async(path); }},
      {"load", [](Optimizer& o, const std::filesystem::path&) { o.load(o.state_dict()); }},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    const TemporaryDirectory directory;
    Model model(kWorld);
    model.optimizer.save_async(directory / "none/state");
    model.step(0);
    EXPECT_THROW(row.next(model.optimizer, directory / "state"), FileError);
    EXPECT_TRUE(directory.names().empty());  // it did nothing else
    model.optimizer.wait_for_save();         // it is said once
    row.next(model.optimizer, directory / "state");
    model.optimizer.wait_for_save();
  }
}

TEST(SaveAsync, ALoadWaitsForIt) {
  const TemporaryDirectory directory;
  const ModelSpec spec = {{"g", AdamHyper{}, {{"w", {3000, 1000}}}}};
  Model model(spec), control(spec);
  model.optimizer.save(directory / "state", {.values = true});
  model.steps(0, 2);
  control.steps(0, 2);
  model.optimizer.save_async(directory / "state", {.values = true});
  model.steps(5, 2);
  model.optimizer.load(directory / "state");  // not the older file
  EXPECT_EQ("", difference(model.everything(), control.everything()));
  EXPECT_EQ(directory.names(), std::set<std::string>{"state"});

  // Another file, which is read while this one is written no more.
  model.optimizer.save(directory / "other", {.values = true});
  model.optimizer.save_async(directory / "state", {.values = true});
  model.optimizer.load(directory / "other");
  EXPECT_EQ(directory.names(), (std::set<std::string>{"other", "state"}));
  model.optimizer.load(directory / "state");
  EXPECT_EQ("", difference(model.everything(), control.everything()));
}

TEST(SaveAsync, OutlivesTheOptimizer) {
  const TemporaryDirectory directory;
  std::string expected;
  {
    Model model(kWorld);
    model.steps(0, 2);
    expected = model.everything();
    model.optimizer.save_async(directory / "state", {.values = true});
    Optimizer moved = std::move(model.optimizer);
  }
  EXPECT_EQ(directory.names(), std::set<std::string>{"state"});
  Model loaded(kWorld);
  loaded.optimizer.load(directory / "state");
  EXPECT_EQ("", difference(loaded.everything(), expected));
}

}  // namespace
}  // namespace fusestep::test
