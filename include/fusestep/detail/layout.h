// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The closed table of layouts: the dtypes of (parameter, gradient, slots, master weight).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "fusestep/detail/type_list.h"
#include "fusestep/dtype.h"

namespace fusestep::detail {

/// What a kernel does beside stepping. Each is compiled for the layouts that need it.
enum class Extra : std::uint8_t {
  kNone,
  kStochasticRounding,  // of bfloat16 values and slots
  kStoreGrad            // the gradient is written back, divided by the loss scale
};

template <class ValueT, class GradT, class SlotT, class MasterT = void,
          Extra kExtraV = Extra::kNone>
struct Layout {
  using Value = ValueT;
  using Grad = GradT;
  using Slot = SlotT;
  /// float: the parameter itself, of which Value is a rounded copy. void: there is none.
  using Master = MasterT;
  static constexpr Extra kExtra = kExtraV;
  static constexpr bool kHasMaster = !std::is_void_v<Master>;
  /// The type of arithmetic and of the scalars.
  using Real = std::conditional_t<std::is_same_v<Value, double>, double, float>;
  /// What is read and written as the parameter.
  using Parameter = std::conditional_t<kHasMaster, Real, Value>;
};

/// A further layout is one line here. 19 combinations of dtypes; some come with an extra as well.
using Layouts = TypeList<                                                    //
    Layout<float, float, float>,                                             //
    Layout<float, float, bfloat16>,                                          //
    Layout<double, double, double>,                                          //
    Layout<bfloat16, bfloat16, float>,                                       //
    Layout<bfloat16, bfloat16, bfloat16>,                                    //
    Layout<bfloat16, bfloat16, float, float>,                                //
    Layout<bfloat16, bfloat16, bfloat16, float>,                             //
    Layout<bfloat16, float, float>,                                          //
    Layout<bfloat16, float, bfloat16>,                                       //
    Layout<bfloat16, float, float, float>,                                   //
    Layout<bfloat16, float, bfloat16, float>,                                //
    Layout<float16, float16, float>,                                         //
    Layout<float16, float16, float16>,                                       //
    Layout<float16, float16, float, float>,                                  //
    Layout<float16, float16, float16, float>,                                //
    Layout<float16, float, float>,                                           //
    Layout<float16, float, float16>,                                         //
    Layout<float16, float, float, float>,                                    //
    Layout<float16, float, float16, float>,                                  //
    Layout<float, float, bfloat16, void, Extra::kStochasticRounding>,        //
    Layout<bfloat16, bfloat16, float, void, Extra::kStochasticRounding>,     //
    Layout<bfloat16, bfloat16, bfloat16, void, Extra::kStochasticRounding>,  //
    Layout<bfloat16, float, float, void, Extra::kStochasticRounding>,        //
    Layout<bfloat16, float, bfloat16, void, Extra::kStochasticRounding>,     //
    Layout<float, float, float, void, Extra::kStoreGrad>,                    //
    Layout<bfloat16, bfloat16, float, void, Extra::kStoreGrad>,              //
    Layout<bfloat16, bfloat16, bfloat16, void, Extra::kStoreGrad>,           //
    Layout<bfloat16, bfloat16, float, float, Extra::kStoreGrad>,             //
    Layout<bfloat16, bfloat16, bfloat16, float, Extra::kStoreGrad>,          //
    Layout<float16, float16, float, void, Extra::kStoreGrad>,                //
    Layout<float16, float16, float16, void, Extra::kStoreGrad>,              //
    Layout<float16, float16, float, float, Extra::kStoreGrad>,               //
    Layout<float16, float16, float16, float, Extra::kStoreGrad>>;

inline constexpr int kLayouts = Layouts::size;

/// Of a rule without slots one layout stands for all dtypes they could have.
template <class R, class L>
inline constexpr bool is_compiled =
    R::kSlots > 0 || std::is_same_v<typename L::Slot, typename L::Value>;

/// A layout as data.
struct LayoutKey {
  DType value, grad, slot;
  bool master = false;  // float32 master weights
  Extra extra = Extra::kNone;
  friend constexpr bool operator==(const LayoutKey&, const LayoutKey&) = default;
};

template <class L>
inline constexpr LayoutKey key_of{dtype_of<typename L::Value>, dtype_of<typename L::Grad>,
                                  dtype_of<typename L::Slot>, L::kHasMaster, L::kExtra};

/// Position in `Layouts`, or nothing.
constexpr std::optional<int> find_layout(const LayoutKey& wanted) {
  std::optional<int> found;
  Layouts::for_each([&]<int kIndex, class L>() {
    if (key_of<L> == wanted) found = kIndex;
  });
  return found;
}

constexpr LayoutKey key_at(int layout) {
  LayoutKey result{};
  Layouts::for_each([&]<int kIndex, class L>() {
    if (kIndex == layout) result = key_of<L>;
  });
  return result;
}

/// "bfloat16 with gradients of float32, slots of bfloat16 and master weights".
std::string to_string(const LayoutKey& key);

/// For messages: every layout there is with this extra, "; " between them.
std::string layouts_with(Extra extra);

}  // namespace fusestep::detail
