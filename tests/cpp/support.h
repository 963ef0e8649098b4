// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What the tests share: numbers from integers, arrays of any dtype, the table of rule variants.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "fusestep/detail/layout.h"
#include "fusestep/fusestep.h"
#include "reference.h"

#if defined(__has_feature)
#define FUSESTEP_HAS_FEATURE(x) __has_feature(x)
#else
#define FUSESTEP_HAS_FEATURE(x) 0
#endif

namespace fusestep::test {

#if defined(__SANITIZE_ADDRESS__) || FUSESTEP_HAS_FEATURE(address_sanitizer)
inline constexpr bool kAddressSanitizer = true;
#else
inline constexpr bool kAddressSanitizer = false;
#endif
#if defined(__SANITIZE_THREAD__) || FUSESTEP_HAS_FEATURE(thread_sanitizer)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

/// Repetitions under a sanitizer, which sees as much in fewer of them.
constexpr int repetitions(int count) {
  return kAddressSanitizer || kThreadSanitizer ? count / 10 : count;
}

/// splitmix64 of a counter (Steele, Lea & Flood, 2014): the same numbers from every compiler.
inline std::uint64_t hash(std::uint64_t seed, std::uint64_t counter) {
  std::uint64_t x = seed * 0x9e3779b97f4a7c15u + counter;
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// In [-1, 1), 21 significant bits, over eight binades: exact in float32 and float64.
inline double number(std::uint64_t seed, std::uint64_t counter) {
  const std::uint64_t bits = hash(seed, counter);
  const auto significand = static_cast<std::int64_t>(bits >> 43) - (std::int64_t{1} << 20);
  return std::ldexp(static_cast<double>(significand), -20 - static_cast<int>(bits & 7));
}

/// Numbers with every special value among them: zeros of both signs, subnormals, the largest ones,
/// infinities, NaN. `positive` for second moments.
inline double special_number(std::uint64_t seed, std::uint64_t counter, DType dtype,
                             bool positive = false) {
  const bool wide = dtype == DType::kFloat64, fp16 = dtype == DType::kFloat16;
  const double tiny = wide ? 4.9e-324 : fp16 ? std::ldexp(1.0, -24) : std::ldexp(1.0, -133);
  const double huge = wide ? 1.7e308 : fp16 ? 65504.0 : 3.3e38;
  const double values[] = {
      0.0,         -0.0,         tiny,       -tiny,           3 * tiny,         huge,
      -huge,       HUGE_VAL,     -HUGE_VAL,  std::nan(""),    huge * 0.5,       tiny * 200,
      -tiny * 77,  1.0,          -1.0,       tiny * 1024,     tiny * 1e5,       -tiny * 3e4,
      huge * 1e-3, -huge * 1e-4, tiny * 7e6, std::sqrt(huge), -std::sqrt(huge), tiny * 1.6e7};
  const std::uint64_t pick = hash(seed ^ 0x5555, counter);
  double x = pick % 3 == 0 ? number(seed, counter) : values[(pick >> 8) % std::size(values)];
  return positive && x < 0 ? -x : x;
}

/// Elements of one dtype, `offset` elements behind a 64-byte boundary, with a guard on both sides.
class Array {
 public:
  Array(DType dtype, std::int64_t size, int offset = 0)
      : dtype_(dtype),
        size_(size),
        offset_(offset),
        memory_((static_cast<std::size_t>(size + offset) * size_of(dtype)) / 64 + 3) {
    std::memset(memory_.data(), kGuard, memory_.size() * 64);
    std::memset(data(), 0, bytes());
  }

  DType dtype() const { return dtype_; }
  std::int64_t size() const { return size_; }
  std::size_t bytes() const { return static_cast<std::size_t>(size_) * size_of(dtype_); }
  unsigned char* data() {
    auto* const memory = reinterpret_cast<unsigned char*>(memory_.data());
    return memory + sizeof(Line) + static_cast<std::size_t>(offset_) * size_of(dtype_);
  }
  const unsigned char* data() const { return const_cast<Array*>(this)->data(); }
  TensorView view() { return view({size_}); }
  TensorView view(std::vector<std::int64_t> shape) {
    return {data(), dtype_, std::move(shape), Device::cpu(), true};
  }

  double get(std::int64_t i) const { return read_element(data(), dtype_, i); }
  void set(std::int64_t i, double x) { write_element(data(), dtype_, i, x); }
  template <class F>
  void fill(F&& f) {
    for (std::int64_t i = 0; i < size_; ++i) set(i, f(static_cast<std::uint64_t>(i)));
  }
  void fill_numbers(std::uint64_t seed) {
    fill([&](std::uint64_t i) { return number(seed, i); });
  }
  /// Nothing was written beside the elements.
  bool guards_intact() const {
    const auto* begin = reinterpret_cast<const unsigned char*>(memory_.data());
    const auto* end = begin + memory_.size() * 64;
    const auto guard = [](unsigned char byte) { return byte == kGuard; };
    return std::all_of(begin, data(), guard) && std::all_of(data() + bytes(), end, guard);
  }
  std::string raw() const { return {reinterpret_cast<const char*>(data()), bytes()}; }

 private:
  static constexpr unsigned char kGuard = 0xa5;
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  DType dtype_;
  std::int64_t size_;
  int offset_;
  std::vector<Line> memory_;
};

/// The bytes of `elements`, every NaN made the same: its payload may differ between processors.
inline std::string canonical(const void* elements, DType dtype, std::int64_t size) {
  const auto count = static_cast<std::size_t>(size) * size_of(dtype);
  std::string bytes(static_cast<const char*>(elements), count);
  for (std::int64_t i = 0; i < size; ++i) {
    if (!std::isnan(read_element(bytes.data(), dtype, i))) continue;
    write_element(bytes.data(), dtype, i, std::nan(""));
  }
  return bytes;
}
inline std::string canonical(const Array& array) {
  return canonical(array.data(), array.dtype(), array.size());
}
inline std::string canonical(const TensorView& view) {
  return canonical(view.data, view.dtype, view.size());
}

/// FNV-1a.
inline std::uint64_t fnv(std::string_view bytes, std::uint64_t state = 0xcbf29ce484222325u) {
  for (const char byte : bytes) {
    state = (state ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  }
  return state;
}

inline std::uint64_t bits(double x) { return std::bit_cast<std::uint64_t>(x); }

/// Parameters, slots and step counts of an optimizer as bytes.
inline std::string snapshot(Optimizer& optimizer) {
  std::string all;
  for (const GroupRef& group : optimizer.groups()) {
    for (const ParameterRef& parameter : group.parameters()) {
      all += canonical(parameter.value());
      StateRef state = optimizer.state(parameter.name());
      all += '#' + std::to_string(state.step());
      for (const std::string& slot : state.slot_names()) all += slot + canonical(state.slot(slot));
    }
  }
  return all;
}

/// The dtypes a group can have, and what else chooses its kernels.
struct LayoutCase {
  std::string name;
  DType value;
  SlotDType slots;
  DType slot;
  DType grad = value;
  bool master = false;
  Rounding rounding = Rounding::kNearest;
  bool stores_grads = false;

  GroupOptions options() const { return {slots, master, rounding, 7}; }
};
/// torch's dtypes and float32 slots.
inline const LayoutCase kLayoutCases[] = {
    {"float32", DType::kFloat32, SlotDType::kFloat32, DType::kFloat32},
    {"float64", DType::kFloat64, SlotDType::kFloat32, DType::kFloat64},
    {"bfloat16_float32", DType::kBFloat16, SlotDType::kFloat32, DType::kFloat32},
    {"bfloat16", DType::kBFloat16, SlotDType::kLikeParameter, DType::kBFloat16},
    {"float16_float32", DType::kFloat16, SlotDType::kFloat32, DType::kFloat32},
    {"float16", DType::kFloat16, SlotDType::kLikeParameter, DType::kFloat16},
};

/// Everything in the table of layouts that is not in kLayoutCases.
inline std::vector<LayoutCase> further_layout_cases() {
  std::vector<LayoutCase> cases;
  for (int i = 0; i < detail::kLayouts; ++i) {
    const detail::LayoutKey key = detail::key_at(i);
    const bool stochastic = key.extra == detail::Extra::kStochasticRounding;
    LayoutCase layout{
        "value_" + std::string(name_of(key.value)) + "_grad_" + std::string(name_of(key.grad)) +
            "_slots_" + std::string(name_of(key.slot)),
        key.value,
        key.slot == DType::kFloat32 || key.slot == DType::kFloat64 ? SlotDType::kFloat32
        : key.slot == key.value                                    ? SlotDType::kLikeParameter
                                                                   : SlotDType::kBFloat16,
        key.slot,
        key.grad,
        key.master,
        stochastic ? Rounding::kStochastic : Rounding::kNearest,
        key.extra == detail::Extra::kStoreGrad};
    if (layout.master) layout.name += "_master";
    if (stochastic) layout.name += "_stochastic";
    if (layout.stores_grads) layout.name += "_stores_grads";
    const bool plain = key.grad == key.value && !layout.master && key.extra == detail::Extra::kNone;
    const bool listed =
        plain &&
        std::any_of(std::begin(kLayoutCases), std::end(kLayoutCases), [&](const LayoutCase& known) {
          return known.value == key.value && known.slot == key.slot;
        });
    if (!listed) cases.push_back(std::move(layout));
  }
  return cases;
}

/// Both.
inline std::vector<LayoutCase> all_layout_cases() {
  std::vector<LayoutCase> all(std::begin(kLayoutCases), std::end(kLayoutCases));
  for (LayoutCase& layout : further_layout_cases()) all.push_back(std::move(layout));
  return all;
}

struct RuleCase {
  std::string name;
  Hyper hyper;
};

inline void PrintTo(const RuleCase& rule, std::ostream* out) { *out << rule.name; }
inline void PrintTo(const LayoutCase& layout, std::ostream* out) { *out << layout.name; }

/// Every rule and variant, each also with maximize. A new optimizer adds its lines here.
inline std::vector<RuleCase> rule_cases() {
  std::vector<RuleCase> cases = {
      {"adam", AdamHyper{}},
      {"adam_eps", AdamHyper{.lr = 1e-2, .betas = {0.8, 0.95}, .eps = 1e-2}},
      {"adam_l2", AdamHyper{.lr = 1e-2, .weight_decay = 1e-2}},
      {"adam_beta1_zero", AdamHyper{.lr = 1e-2, .betas = {0.0, 0.99}}},
      {"adam_betas_zero", AdamHyper{.lr = 1e-2, .betas = {0.0, 0.0}}},
      {"adam_betas_small", AdamHyper{.lr = 1e-2, .betas = {0.25, 0.4}}},
      {"adamw", AdamWHyper{.lr = 1e-2, .weight_decay = 0.1}},
      {"amsgrad", AdamHyper{.lr = 1e-2, .betas = {0.9, 0.9}, .amsgrad = true}},
      {"amsgrad_l2", AdamHyper{.lr = 1e-2, .weight_decay = 1e-2, .amsgrad = true}},
      {"amsgradw", AdamWHyper{.lr = 1e-2, .weight_decay = 0.1, .amsgrad = true}},
      {"sgd", SgdHyper{.lr = 1e-2}},
      {"sgd_l2", SgdHyper{.lr = 1e-2, .weight_decay = 1e-2}},
      {"sgd_momentum", SgdHyper{.lr = 1e-2, .momentum = 0.9}},
      {"sgd_dampening", SgdHyper{.lr = 1e-2, .momentum = 0.9, .dampening = 0.25}},
      {"sgd_dampening_l2",
       SgdHyper{.lr = 1e-2, .momentum = 0.8, .dampening = 0.5, .weight_decay = 1e-2}},
      {"sgd_nesterov", SgdHyper{.lr = 1e-2, .momentum = 0.9, .nesterov = true}},
      {"sgd_nesterov_l2",
       SgdHyper{.lr = 1e-2, .momentum = 0.9, .weight_decay = 1e-2, .nesterov = true}},
      {"rmsprop", RmspropHyper{.lr = 1e-3}},
      {"rmsprop_l2", RmspropHyper{.lr = 1e-3, .alpha = 0.9, .weight_decay = 1e-2}},
      {"rmsprop_momentum", RmspropHyper{.lr = 1e-3, .momentum = 0.9}},
      {"rmsprop_centered", RmspropHyper{.lr = 1e-3, .eps = 1e-4, .centered = true}},
      {"rmsprop_both",
       RmspropHyper{
           .lr = 1e-3, .eps = 1e-4, .weight_decay = 1e-2, .momentum = 0.9, .centered = true}},
  };
  const std::size_t plain = cases.size();
  for (std::size_t i = 0; i < plain; ++i) {
    RuleCase maximizing = cases[i];
    maximizing.name += "_maximize";
    std::visit([](auto& h) { h.maximize = true; }, maximizing.hyper);
    cases.push_back(std::move(maximizing));
  }
  return cases;
}

/// One setting per rule variant: what the library is compiled for.
inline std::vector<RuleCase> variant_cases() {
  return {{"adam", AdamWHyper{}},
          {"amsgrad", AdamHyper{.weight_decay = 1e-2, .amsgrad = true}},
          {"sgd", SgdHyper{}},
          {"sgd_momentum", SgdHyper{.momentum = 0.9, .nesterov = true}},
          {"rmsprop", RmspropHyper{}},
          {"rmsprop_momentum", RmspropHyper{.momentum = 0.9}},
          {"rmsprop_centered", RmspropHyper{.eps = 1e-4, .centered = true}},
          {"rmsprop_both", RmspropHyper{.eps = 1e-4, .momentum = 0.9, .centered = true}}};
}

}  // namespace fusestep::test
