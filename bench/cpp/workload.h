// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What the benchmarks step: parameter lists of real models, and every rule.
#pragma once

#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "fusestep/fusestep.h"

namespace fusestep::bench {

/// Elements of every tensor of a model; `models_file` is python/fusestep/benchmark/shapes.json.
inline std::vector<std::int64_t> tensor_sizes(const std::string& model,
                                              const std::string& models_file) {
  if (model == "one64m") return {std::int64_t{64} << 20};
  if (model == "tiny10k") return std::vector<std::int64_t>(10'000, 1'000);
  std::ifstream file(models_file);
  if (!file) throw std::runtime_error("cannot read " + models_file);
  std::vector<std::int64_t> sizes;
  const nlohmann::json all_models = nlohmann::json::parse(file);
  for (const auto& parameter : all_models.at(model)) {
    std::int64_t size = 1;
    for (const auto& extent : parameter.at(1)) size *= extent.get<std::int64_t>();
    sizes.push_back(size);
  }
  return sizes;
}

struct RuleCase {
  std::string name;
  Hyper hyper;
  int slots;
};

inline const std::vector<RuleCase>& rule_cases() {
  static const std::vector<RuleCase> cases = {
      {"adam", AdamHyper{.weight_decay = 1e-2}, 2},
      {"adamw", AdamWHyper{}, 2},
      {"amsgrad", AdamHyper{.amsgrad = true}, 3},
      {"sgd", SgdHyper{}, 0},
      {"sgd_momentum", SgdHyper{.momentum = 0.9}, 1},
      {"sgd_nesterov", SgdHyper{.momentum = 0.9, .nesterov = true}, 1},
      {"rmsprop", RmspropHyper{}, 1},
      {"rmsprop_momentum", RmspropHyper{.momentum = 0.9}, 2},
      {"rmsprop_centered", RmspropHyper{.centered = true}, 2},
      {"rmsprop_momentum_centered", RmspropHyper{.momentum = 0.9, .centered = true}, 3},
  };
  return cases;
}

struct LayoutCase {
  std::string name;
  DType value, grad;
  GroupOptions options;

  std::size_t slot_bytes() const {
    if (options.slots == SlotDType::kBFloat16) return 2;
    const bool is_wide = options.slots == SlotDType::kFloat32 && size_of(value) == 2;
    return is_wide ? 4 : size_of(value);
  }
};

inline const std::vector<LayoutCase>& layout_cases() {
  constexpr auto f64 = DType::kFloat64, f32 = DType::kFloat32, bf16 = DType::kBFloat16,
                 f16 = DType::kFloat16;
  const GroupOptions wide, like{.slots = SlotDType::kLikeParameter};
  static const std::vector<LayoutCase> cases = {
      {"float32", f32, f32, wide},
      {"float64", f64, f64, wide},
      {"bfloat16_float32", bf16, bf16, wide},
      {"bfloat16", bf16, bf16, like},
      {"float16_float32", f16, f16, wide},
      {"float16", f16, f16, like},
      {"float32_bfloat16", f32, f32, {.slots = SlotDType::kBFloat16}},
      {"bfloat16_float32_master", bf16, bf16, {.master_weights = true}},
      {"bfloat16_master", bf16, bf16, {.slots = SlotDType::kBFloat16, .master_weights = true}},
      {"bfloat16_float32_master_grad_float32", bf16, f32, {.master_weights = true}},
      {"bfloat16_stochastic",
       bf16,
       bf16,
       {.slots = SlotDType::kBFloat16, .rounding = Rounding::kStochastic}},
  };
  return cases;
}

/// Bytes a step must move per element: the gradient read, the slots and what is stepped read and
/// written; that is a master weight where there is one, and then the parameter is written.
inline double bytes_per_element(const RuleCase& rule, const LayoutCase& layout) {
  const std::size_t value =
      layout.options.master_weights ? 8 + size_of(layout.value) : 2 * size_of(layout.value);
  const std::size_t slots = static_cast<std::size_t>(2 * rule.slots) * layout.slot_bytes();
  return static_cast<double>(size_of(layout.grad) + value + slots);
}

/// Where each tensor starts in one allocation, in elements: multiples of 64, as torch aligns.
struct Offsets {
  std::vector<std::int64_t> begin;
  std::int64_t total = 0;     // with padding
  std::int64_t elements = 0;  // without

  explicit Offsets(const std::vector<std::int64_t>& sizes) {
    for (const std::int64_t size : sizes) {
      begin.push_back(total);
      total += (size + 63) / 64 * 64;
      elements += size;
    }
  }
};

constexpr int kGroups = 8;

/// As `python -m fusestep bench` names it: docs/benchmarking.md.
inline std::string case_name(const std::string& rule, const std::string& layout,
                             const std::string& model) {
  return rule + "/" + layout + "/" + model + "/groups=" + std::to_string(kGroups);
}

/// The tensors of one model in groups, values and gradients in two allocations.
inline Optimizer make_optimizer(const std::vector<std::int64_t>& sizes, const Offsets& offsets,
                                const RuleCase& rule, const LayoutCase& layout, char* values,
                                char* grads, Device device, int groups = kGroups) {
  Optimizer optimizer;
  std::vector<std::vector<Parameter>> members(static_cast<std::size_t>(groups));
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const auto tensor = [&](char* base, DType dtype) {
      const std::size_t offset = static_cast<std::size_t>(offsets.begin[i]) * size_of(dtype);
      return TensorView{base + offset, dtype, {sizes[i]}, device, true};
    };
    members[i % members.size()].push_back(
        {"p" + std::to_string(i), tensor(values, layout.value), tensor(grads, layout.grad)});
  }
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (members[i].empty()) continue;
    optimizer.add_group("group" + std::to_string(i), rule.hyper, std::move(members[i]),
                        layout.options);
  }
  return optimizer;
}

}  // namespace fusestep::bench
