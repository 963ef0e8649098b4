// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>

#include "fusestep/detail/layout.h"
#include "fusestep/detail/norm.h"
#include "fusestep/detail/rule_list.h"

namespace fusestep::detail {
namespace {

/// The first element at which every array of the row starts a vector of `width` elements. Accesses
/// have 16 bytes at most.
std::int32_t vector_head(const TensorRow& row, const LayoutKey& layout, int slots, int width) {
  const auto lines_up = [&](const void* data, DType dtype, int element) {
    const auto address = reinterpret_cast<std::uintptr_t>(data) +
                         static_cast<std::uintptr_t>(element) * size_of(dtype);
    return address % std::min<std::size_t>(16, static_cast<std::size_t>(width) * size_of(dtype)) ==
           0;
  };
  for (int element = 0; element < width; ++element) {
    bool all =
        lines_up(row.value, layout.value, element) && lines_up(row.grad, layout.grad, element);
    for (int i = 0; i < slots; ++i) all = all && lines_up(row.slot[i], layout.slot, element);
    if (layout.master) all = all && lines_up(row.master, DType::kFloat32, element);
    if (all) return element;
  }
  return kAllScalar;
}

TensorRow tensor_row(const ParameterRecord& parameter, const GroupRecord& group,
                     const Backend& backend) {
  TensorRow row{};
  row.value = parameter.value.data;
  row.grad = parameter.grad.data;
  row.size = parameter.size;
  row.grad_dtype = parameter.grad.dtype;
  const SlotNames names = rule_info(find_rule(group.hyper)).slots;
  for (std::size_t i = 0; i < names.size(); ++i) row.slot[i] = parameter.slot(names[i]).data;
  if (const Slot* master = parameter.find_slot(kMasterWeight)) row.master = master->data;
  row.head = vector_head(row, key_at(parameter.layout), static_cast<int>(names.size()),
                         backend.vector_width(parameter.layout));
  return row;
}

}  // namespace

std::optional<int> layout_of(const GroupRecord& group, const ParameterRecord& parameter,
                             bool stores_grads) {
  const SlotNames names = rule_info(find_rule(group.hyper)).slots;
  LayoutKey key = layout_key(group.options, parameter.value.dtype, parameter.grad.dtype);
  if (names.empty()) {
    key.slot = key.value;
  } else if (const Slot* slot = parameter.find_slot(names[0])) {
    key.slot = slot->dtype;
  }
  key.master = key.master || parameter.find_slot(kMasterWeight) != nullptr;
  key.extra = extra_of(group.options, key.value, key.slot);
  if (stores_grads && key.extra != Extra::kNone) return std::nullopt;
  if (stores_grads) key.extra = Extra::kStoreGrad;
  return find_layout(key);
}

Plan build_plan(int device, const Backend& backend, std::span<const GroupRecord> groups,
                std::vector<ParameterRecord>& parameters, bool stores_grads) {
  std::vector<std::vector<ParameterRecord*>> members(static_cast<std::size_t>(kRules * kLayouts));
  for (ParameterRecord& parameter : parameters) {
    if (parameter.device == device) parameter.row = -1;
  }
  for_each_stepping(device, groups, parameters, [&](int, ParameterRecord& parameter) {
    const GroupRecord& group = at(groups, parameter.group);
    // add_group(), borrow() and the step have refused what is not in the table.
    parameter.layout = layout_of(group, parameter, stores_grads).value();
    const int bucket = find_rule(group.hyper) * kLayouts + parameter.layout;
    at(members, bucket).push_back(&parameter);
  });

  Plan plan;
  for (int key = 0; key < kRules * kLayouts; ++key) {
    const int rule = key / kLayouts, layout = key % kLayouts;
    const auto first_chunk = static_cast<std::int64_t>(plan.chunks.size());
    const std::int64_t chunk_size = backend.chunk_size(layout);
    std::int64_t elements = 0;
    const bool wide = key_at(layout).value == DType::kFloat64;
    const bool noisy = key_at(layout).extra == Extra::kStochasticRounding;
    for (ParameterRecord* parameter : at(members, key)) {
      const int row = parameter->row = static_cast<int>(plan.tensors.size());
      plan.tensors.push_back(tensor_row(*parameter, at(groups, parameter->group), backend));
      plan.prepare.push_back({parameter->step_tensor, parameter->state, parameter->group,
                              static_cast<std::int16_t>(rule), static_cast<std::int8_t>(wide),
                              static_cast<std::int8_t>(parameter->step_is_double),
                              noisy ? parameter->noise_seed : 0});
      elements += parameter->size;
      const std::int64_t chunks = (parameter->size + chunk_size - 1) / chunk_size;
      for (std::int64_t i = 0; i < chunks; ++i) {
        plan.chunks.push_back({row, static_cast<std::int32_t>(i)});
      }
    }
    const auto chunks = static_cast<std::int64_t>(plan.chunks.size()) - first_chunk;
    if (chunks != 0) plan.buckets.push_back({rule, layout, first_chunk, chunks, elements});
  }
  return plan;
}

Backend::RowRange refresh_rows(Plan& plan, std::span<const int> changed, const Backend& backend,
                               std::span<const GroupRecord> groups,
                               const std::vector<ParameterRecord>& parameters) {
  Backend::RowRange rows;
  for (const int index : changed) {
    const ParameterRecord& parameter = at(parameters, index);
    const GroupRecord& group = at(groups, parameter.group);
    at(plan.tensors, parameter.row) = tensor_row(parameter, group, backend);
    rows.begin = rows.end == 0 ? parameter.row : std::min(rows.begin, parameter.row);
    rows.end = std::max(rows.end, parameter.row + 1);
  }
  return rows;
}

std::vector<Chunk> build_norm_blocks(int device, std::span<const GroupRecord> groups,
                                     const std::vector<ParameterRecord>& parameters) {
  std::vector<Chunk> blocks;
  for_each_stepping(device, groups, parameters, [&](int, const ParameterRecord& parameter) {
    const std::int64_t count = norm_blocks(parameter.size);
    for (std::int64_t i = 0; i < count; ++i) {
      blocks.push_back({parameter.row, static_cast<std::int32_t>(i)});
    }
  });
  return blocks;
}

}  // namespace fusestep::detail
