// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/match.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <unordered_map>

#include "at.h"
#include "fusestep/detail/rule_list.h"
#include "fusestep/error.h"
#include "fusestep/optimizer.h"
#include "fusestep/tensor_view.h"

namespace fusestep::detail {
namespace {

constexpr std::string_view kValue = "value";

/// Of torch's groups: how another program wanted to step. They steer nothing here.
constexpr std::array<std::string_view, 4> kExecutionFlags = {"foreach", "fused", "capturable",
                                                             "differentiable"};

constexpr std::array<std::string_view, 4> kConvertible = {"float32", "float64", "bfloat16",
                                                          "float16"};

bool is_one_of(const auto& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

struct SlotsOfRule {
  std::set<std::string_view> some, every;  // of its variants have them
};
SlotsOfRule slots_of_rule(std::string_view rule) {
  std::map<std::string_view, int> counts;
  int variants = 0;
  Rules::for_each([&]<int kIndex, class R>() {
    if (R::Hyper::kRule != canonical_rule(rule)) return;
    ++variants;
    for (const std::string_view name : rule_info(kIndex).slots) ++counts[name];
  });
  SlotsOfRule slots;
  for (const auto& [name, count] : counts) {
    slots.some.insert(name);
    if (count == variants) slots.every.insert(name);
  }
  return slots;
}

SlotNames slots_of_variant(std::string_view rule, const Json& hyper, const std::string& where) {
  return rule_info(find_rule(hyper_from_json(rule, hyper, where))).slots;
}

/// That of the pairs complex numbers are stored as; otherwise the same.
std::string dtype_of_reals(const std::string& dtype) {
  if (dtype == "complex64") return "float32";
  if (dtype == "complex128") return "float64";
  return dtype == "complex32" ? "float16" : dtype;
}

std::string json_text(const Json& object, const std::string& key) {
  const auto found = object.find(key);
  return found == object.end() ? "" : found->dump();
}

/// Settings that one has and the other has not, or has with another value.
std::set<std::string> differences(const Json& one, const Json& other) {
  std::set<std::string> keys;
  for (const auto& [key, value] : one.items()) keys.insert(key);
  for (const auto& [key, value] : other.items()) keys.insert(key);
  std::erase_if(keys, [&](const std::string& key) {
    if (is_one_of(kExecutionFlags, key)) return true;
    return one.contains(key) && other.contains(key) && one[key] == other[key];
  });
  return keys;
}

bool same_settings(const GroupDescription& one, const GroupDescription& other) {
  return canonical_rule(one.rule) == canonical_rule(other.rule) &&
         differences(one.hyper, other.hyper).empty();
}

std::string shard_text(const ParameterDescription& parameter) {
  const ElementRange range = range_of(parameter);
  return "elements " + std::to_string(range.begin) + " to " + std::to_string(range.end) + " of " +
         to_string(whole_shape(parameter));
}

class Matcher {
 public:
  Matcher(const Description& saved, const Description& here, const MatchOptions& options)
      : saved_(saved), here_(here), options_(options) {}

  Match run() {
    pair_up();
    match_settings();
    if (options_.what != LoadWhat::kHyper) {
      for (Match::Pair& pair : paired_) take_state(pair);
    }
    return std::move(result_);
  }

 private:
  const ParameterDescription& saved(const Match::Pair& pair) const {
    return at(saved_.parameters, pair.saved);
  }
  const ParameterDescription& here(const Match::Pair& pair) const {
    return at(here_.parameters, pair.here);
  }
  const GroupDescription& group_here(int index) const { return at(here_.groups, index); }
  const GroupDescription& saved_group(int index) const { return at(saved_.groups, index); }

  void pair_up() {
    if (options_.by_position) return pair_by_position();
    std::unordered_map<std::string_view, int> positions;
    for (std::size_t i = 0; i < saved_.parameters.size(); ++i) {
      const std::string& name = saved_.parameters[i].name;
      if (positions.emplace(name, static_cast<int>(i)).second) continue;
      throw InvalidArgument("there are two saved parameters named '" + name + "'");
    }
    std::vector<bool> known(saved_.parameters.size());
    for (std::size_t i = 0; i < here_.parameters.size(); ++i) {
      const auto found = positions.find(here_.parameters[i].name);
      if (found == positions.end()) {
        result_.report.missing.push_back(here_.parameters[i].name);
        continue;
      }
      at(known, found->second) = true;
      paired_.push_back({found->second, static_cast<int>(i)});
    }
    for (std::size_t i = 0; i < known.size(); ++i) {
      if (!known[i]) result_.report.unexpected.push_back(saved_.parameters[i].name);
    }
  }

  /// torch's two checks, in its words.
  void pair_by_position() {
    if (saved_.groups.size() != here_.groups.size()) {
      throw InvalidArgument("loaded state dict has a different number of parameter groups");
    }
    const auto groups_of = [](const Description& description) {
      std::vector<int> groups;
      for (const ParameterDescription& parameter : description.parameters) {
        groups.push_back(parameter.group);
      }
      return groups;
    };
    if (groups_of(saved_) != groups_of(here_)) {
      throw InvalidArgument(
          "loaded state dict contains a parameter group that doesn't match the size of "
          "optimizer's group");
    }
    for (int i = 0; i < static_cast<int>(here_.parameters.size()); ++i) paired_.push_back({i, i});
  }

  /// A group takes the settings its parameters had, where all that were saved had the same.
  void match_settings() {
    result_.settings.assign(here_.groups.size(), -1);
    other_rule_.assign(here_.groups.size(), false);
    for (const Match::Pair& pair : paired_) {
      int& from = at(result_.settings, here(pair).group);
      const int group = saved(pair).group;
      if (from < 0) from = group;
      if (from == group || from == kSeveral) continue;
      if (!same_settings(saved_group(from), saved_group(group))) from = kSeveral;
    }
    for (int i = 0; i < static_cast<int>(here_.groups.size()); ++i) {
      int& from = at(result_.settings, i);
      if (from == -1) continue;
      const GroupDescription& group = group_here(i);
      if (from == kSeveral) {
        if (options_.what != LoadWhat::kState) {
          report(group.name, "settings", "of several groups", "of one group");
        }
        from = -1;
        continue;
      }
      const GroupDescription& source = saved_group(from);
      if (source.rule.empty()) {  // a file of another program has no settings
        from = -1;
        continue;
      }
      if (canonical_rule(source.rule) != canonical_rule(group.rule)) {
        report(group.name, "rule", source.rule, group.rule);
        at(other_rule_, i) = true;
        from = -1;
        continue;
      }
      compare_settings(group, source);
      if (options_.what == LoadWhat::kState) from = -1;
    }
  }

  void compare_settings(const GroupDescription& group, const GroupDescription& source) {
    for (const std::string& key : differences(source.hyper, group.hyper)) {
      const std::string was = json_text(source.hyper, key), is = json_text(group.hyper, key);
      const bool taken = options_.what != LoadWhat::kState && !was.empty();
      result_.report.hyper.push_back({group.name, key, was, is, taken});
    }
  }

  /// All of a parameter's state, or nothing of it where something does not fit. A slot no variant
  /// of the rule has is the user's own: no step needs it. One that is missing starts at zero.
  void take_state(Match::Pair& pair) {
    const ParameterDescription& from = saved(pair);
    const ParameterDescription& to = here(pair);
    const GroupDescription& group = group_here(to.group);
    const std::string& saved_rule = saved_group(from.group).rule;
    if (!saved_rule.empty() && canonical_rule(saved_rule) != canonical_rule(group.rule)) {
      if (!at(other_rule_, to.group)) {
        report(to.name, "rule", saved_rule, group.rule);
      }
      return;
    }
    // A file of another program may have nothing but a step count.
    const bool has_shape = !from.value.dtype.empty();
    if (has_shape && whole_shape(from) != whole_shape(to)) {
      report(to.name, "shape", to_string(whole_shape(from)), to_string(whole_shape(to)));
      return;
    }
    const ElementRange there = range_of(from), wanted = range_of(to);
    const bool is_part = from.shard || to.shard;
    if (is_part && wanted.begin < wanted.end &&
        (wanted.begin < there.begin || wanted.end > there.end)) {
      report(to.name, "shard", shard_text(from), shard_text(to));
      return;
    }
    // Slots have the shape of what was saved, whatever part of it is wanted.
    const std::vector<std::int64_t>& slot_shape = is_part ? from.value.shape : to.slot_shape;
    const std::size_t before = result_.report.mismatched.size();
    const SlotsOfRule known = slots_of_rule(group.rule);
    for (const auto& [name, slot] : from.slots) {
      const std::string text = to.name + "/" + name;
      if (name == kValue) {
        if (!options_.values) continue;
        check_tensor(text, slot, slot_shape, {dtype_of_reals(to.value.dtype)});
      } else if (name == kMasterWeight && to.master_weights) {
        check_tensor(text, slot, slot_shape, {std::string(name_of(DType::kFloat32))});
      } else if (known.some.count(name) != 0) {
        check_tensor(text, slot, slot_shape, to.slot_dtypes);
      } else if (!options_.other_slots) {
        auto& list = name == kMasterWeight ? result_.report.unexpected : result_.report.left_out;
        list.push_back(text);
        continue;
      }
      pair.slots.push_back(name);
    }
    report_missing_slots(from, to, known.every);
    if (result_.report.mismatched.size() != before) return;
    result_.report.loaded.push_back(to.name);
    result_.parameters.push_back(std::move(pair));
  }

  void check_tensor(const std::string& text, const TensorDescription& slot,
                    const std::vector<std::int64_t>& shape,
                    const std::vector<std::string>& dtypes) {
    if (slot.shape != shape) {
      report(text, "shape", to_string(slot.shape), to_string(shape));
    } else if (is_one_of(dtypes, slot.dtype)) {
      return;
    } else if (options_.convert && is_one_of(kConvertible, slot.dtype)) {
      result_.report.converted.push_back(text);
    } else {
      report(text, "dtype", slot.dtype, dtypes.empty() ? "none" : dtypes.front());
    }
  }

  /// Of the slots it is stepped with here, those that were not there although they are needed: a
  /// variant that was switched on just before the save had no slot yet, and misses none.
  void report_missing_slots(const ParameterDescription& from, const ParameterDescription& to,
                            const std::set<std::string_view>& always) {
    const GroupDescription& group = group_here(to.group);
    const GroupDescription& source = saved_group(from.group);
    const int settings = at(result_.settings, to.group);
    const GroupDescription& then = settings < 0 ? group : saved_group(settings);
    SlotNames had;
    if (!source.rule.empty()) {
      had = slots_of_variant(source.rule, source.hyper,
                             "settings saved of group '" + source.name + "'");
    }
    const auto is_slot = [](const auto& slot) { return slot.first != kValue; };
    const bool has_any = std::any_of(from.slots.begin(), from.slots.end(), is_slot);
    const bool has_stepped = from.step.value_or(0) > 0;
    for (const std::string_view name :
         slots_of_variant(group.rule, then.hyper, "settings saved of group '" + then.name + "'")) {
      const std::string key(name);
      if (from.slots.count(key) != 0) continue;
      const bool stepped_without = has_stepped && !is_one_of(had, name);
      const bool lost = has_any && always.count(name) != 0 && (has_stepped || source.rule.empty());
      if (stepped_without || lost) result_.report.missing.push_back(to.name + "/" + key);
    }
  }

  void report(const std::string& name, const char* what, std::string saved, std::string here) {
    result_.report.mismatched.push_back({name, what, std::move(saved), std::move(here)});
  }

  static constexpr int kSeveral = -2;

  const Description& saved_;
  const Description& here_;
  const MatchOptions& options_;
  std::vector<Match::Pair> paired_;
  std::vector<bool> other_rule_;  // groups here whose parameters were saved by another rule
  Match result_;
};

}  // namespace

Match match(const Description& saved, const Description& here, const MatchOptions& options) {
  return Matcher(saved, here, options).run();
}

}  // namespace fusestep::detail
