// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Every rule variant the library is compiled for. A new optimizer adds its line here.
#pragma once

#include <span>

#include "fusestep/detail/type_list.h"
#include "fusestep/rules/adam.h"
#include "fusestep/rules/rmsprop.h"
#include "fusestep/rules/rule.h"
#include "fusestep/rules/sgd.h"

namespace fusestep::detail {

using Rules = TypeList<       //
    Adam<false>, Adam<true>,  //
    Sgd<false>, Sgd<true>,    //
    Rmsprop<false, false>, Rmsprop<false, true>, Rmsprop<true, false>, Rmsprop<true, true>>;

inline constexpr int kRules = Rules::size;

/// Slot names of a variant, in its order.
using SlotNames = std::span<const std::string_view>;

struct RuleInfo {
  std::string_view name;
  SlotNames slots;
};

inline RuleInfo rule_info(int rule) {
  RuleInfo info{};
  Rules::for_each([&]<int kIndex, class R>() {
    static_assert(Rule<R>, "a type in the list of rules does not offer what rules/rule.h asks for");
    if (kIndex == rule) info = {R::kName, SlotNames(R::kSlotNames).first(R::kSlots)};
  });
  return info;
}

/// The variant a group with these settings uses: its position in `Rules`.
inline int find_rule(const Hyper& hyper) {
  int found = -1;
  Rules::for_each([&]<int kIndex, class R>() {
    const auto* settings = std::get_if<typename R::Hyper>(&hyper);
    if (settings != nullptr && R::matches(*settings)) found = kIndex;
  });
  return found;
}

}  // namespace fusestep::detail
