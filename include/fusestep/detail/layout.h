// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The closed table of layouts: the dtypes of (parameter, gradient, slots, master weight).
#pragma once

#include <array>
#include <cstddef>
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

/// A number for every key there could be.
constexpr std::size_t packed(const LayoutKey& key) {
  std::size_t number = static_cast<std::size_t>(key.value);
  number = number * 4 + static_cast<std::size_t>(key.grad);
  number = number * 4 + static_cast<std::size_t>(key.slot);
  number = number * 2 + (key.master ? 1 : 0);
  return number * 3 + static_cast<std::size_t>(key.extra);
}
inline constexpr std::size_t kLayoutKeys = 4 * 4 * 4 * 2 * 3;

inline constexpr auto kLayoutOfKey = [] {
  std::array<std::int16_t, kLayoutKeys> layouts{};
  for (std::int16_t& layout : layouts) layout = -1;
  Layouts::for_each([&]<int kIndex, class L>() { layouts[packed(key_of<L>)] = kIndex; });
  return layouts;
}();

/// Position in `Layouts`, or nothing. Asked for every tensor of a step.
constexpr std::optional<int> find_layout(const LayoutKey& wanted) {
  const int found = kLayoutOfKey[packed(wanted)];
  return found < 0 ? std::nullopt : std::optional<int>(found);
}

inline constexpr auto kKeyOfLayout = [] {
  std::array<LayoutKey, kLayouts> keys{};
  Layouts::for_each([&]<int kIndex, class L>() { keys[kIndex] = key_of<L>; });
  return keys;
}();

constexpr const LayoutKey& key_at(int layout) {
  return kKeyOfLayout[static_cast<std::size_t>(layout)];
}

/// "bfloat16 with gradients of float32, slots of bfloat16 and master weights".
std::string to_string(const LayoutKey& key);

/// For messages: every layout there is with this extra, "; " between them.
std::string layouts_with(Extra extra);

}  // namespace fusestep::detail
