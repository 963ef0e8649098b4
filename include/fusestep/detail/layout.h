// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The closed table of layouts: the dtypes of (parameter, gradient, slots).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "fusestep/detail/type_list.h"
#include "fusestep/dtype.h"

namespace fusestep::detail {

template <class ValueT, class GradT, class SlotT>
struct Layout {
  using Value = ValueT;
  using Grad = GradT;
  using Slot = SlotT;
  /// The type of arithmetic and of the scalars.
  using Real = std::conditional_t<std::is_same_v<Value, double>, double, float>;
};

/// A further layout is one line here.
using Layouts = TypeList<                  //
    Layout<float, float, float>,           //
    Layout<double, double, double>,        //
    Layout<bfloat16, bfloat16, float>,     //
    Layout<bfloat16, bfloat16, bfloat16>,  //
    Layout<float16, float16, float>,       //
    Layout<float16, float16, float16>>;

inline constexpr int kLayouts = Layouts::size;

/// A layout as data.
struct LayoutDTypes {
  DType value, grad, slot;
  friend constexpr bool operator==(const LayoutDTypes&, const LayoutDTypes&) = default;
};

template <class L>
inline constexpr LayoutDTypes dtypes_of{dtype_of<typename L::Value>, dtype_of<typename L::Grad>,
                                        dtype_of<typename L::Slot>};

/// Position in `Layouts`, or nothing.
constexpr std::optional<int> find_layout(LayoutDTypes wanted) {
  std::optional<int> found;
  Layouts::for_each([&]<int kIndex, class L>() {
    if (dtypes_of<L> == wanted) found = kIndex;
  });
  return found;
}

constexpr LayoutDTypes layout_dtypes(int layout) {
  LayoutDTypes result{};
  Layouts::for_each([&]<int kIndex, class L>() {
    if (kIndex == layout) result = dtypes_of<L>;
  });
  return result;
}

}  // namespace fusestep::detail
