// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include "fusestep/detail/host_device.h"

namespace fusestep::detail {

/// A list of types with positions: `for_each` calls `f.template operator()<position, Type>()`.
template <class... Ts>
struct TypeList {
  static constexpr int size = sizeof...(Ts);

  template <class F>
  FUSESTEP_HD static constexpr void for_each(F&& f) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
      (f.template operator()<kIndex, Ts>(), ...);
    }
    (std::make_integer_sequence<int, size>{});
  }
};

}  // namespace fusestep::detail
