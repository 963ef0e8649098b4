// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "borrowed.h"

#include <algorithm>
#include <utility>

#include "fusestep/detail/layout.h"
#include "fusestep/detail/rule_list.h"

namespace fusestep::detail {

LayoutKey layout_key(const BorrowedGroup& group, const BorrowedTensor& tensor) {
  GroupOptions options;
  options.rounding = group.rounding;
  return {tensor.dtype, tensor.grad_dtype, tensor.slot_dtype, tensor.master != nullptr,
          extra_of(options, tensor.dtype, tensor.slot_dtype)};
}

void BorrowedOptimizer::step(std::span<const BorrowedGroup> groups,
                             std::span<const BorrowedTensor> tensors, const StepOptions& options) {
  find_turns(tensors);
  if (turns_.empty()) {
    passes_[0].step(groups, tensors, options);
  } else {
    for (int turn = 0; turn < static_cast<int>(passes_.size()); ++turn) {
      std::vector<BorrowedTensor> now;
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (turns_[i] == turn) now.push_back(tensors[i]);
      }
      at(passes_, turn).step(groups, now, options);
    }
  }
  ++steps_;
}

bool BorrowedOptimizer::can_store_grads(std::span<const BorrowedGroup> groups,
                                        std::span<const BorrowedTensor> tensors) {
  const bool have_layouts =
      std::all_of(tensors.begin(), tensors.end(), [&](const BorrowedTensor& tensor) {
        if (!tensor.steps) return true;
        LayoutKey key = layout_key(at(groups, tensor.group), tensor);
        if (key.extra != Extra::kNone) return false;
        key.extra = Extra::kStoreGrad;
        return find_layout(key).has_value();
      });
  return have_layouts && !grads_overlap(tensors);
}

/// Sorted again only where an address has changed.
bool BorrowedOptimizer::grads_overlap(std::span<const BorrowedTensor> tensors) {
  const auto bytes = [](const BorrowedTensor& tensor) {
    return static_cast<std::int64_t>(size_of(tensor.grad_dtype)) * tensor.size;
  };
  bool changed = false;
  std::size_t count = 0;
  for (const BorrowedTensor& tensor : tensors) {
    if (!tensor.steps || tensor.size == 0) continue;
    const Memory memory{tensor.grad, bytes(tensor)};
    if (count == grads_.size()) grads_.emplace_back();
    changed = changed || !(grads_[count] == memory);
    grads_[count++] = memory;
  }
  changed = changed || count != grads_.size();
  grads_.resize(count);
  if (!changed) return grads_overlap_;

  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> ranges;
  for (const Memory& memory : grads_) {
    const auto begin = reinterpret_cast<std::uintptr_t>(memory.value);
    ranges.emplace_back(begin, begin + static_cast<std::uintptr_t>(memory.size));
  }
  std::sort(ranges.begin(), ranges.end());
  const auto overlap = [](const auto& a, const auto& b) { return b.first < a.second; };
  grads_overlap_ = std::adjacent_find(ranges.begin(), ranges.end(), overlap) != ranges.end();
  return grads_overlap_;
}

/// Whose values share memory with those of an earlier tensor: a parameter listed twice, tied
/// weights.
void BorrowedOptimizer::find_turns(std::span<const BorrowedTensor> tensors) {
  const auto same = [](const Memory& memory, const BorrowedTensor& tensor) {
    return memory == Memory{tensor.value, tensor.size};
  };
  if (std::equal(memory_.begin(), memory_.end(), tensors.begin(), tensors.end(), same)) return;
  memory_.clear();
  for (const BorrowedTensor& tensor : tensors) memory_.push_back({tensor.value, tensor.size});

  const auto begin = [&](int i) { return reinterpret_cast<std::uintptr_t>(at(tensors, i).value); };
  const auto end = [&](int i) {
    const BorrowedTensor& tensor = at(tensors, i);
    return begin(i) + static_cast<std::size_t>(tensor.size) * size_of(tensor.dtype);
  };
  std::vector<int> order;
  for (int i = 0; i < static_cast<int>(tensors.size()); ++i) {
    if (at(tensors, i).size != 0) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) { return begin(a) < begin(b); });

  turns_.clear();
  int last = 0;
  for (std::size_t first = 0, next = 0; first < order.size(); first = next) {
    std::uintptr_t reach = end(order[first]);
    for (next = first + 1; next < order.size() && begin(order[next]) < reach; ++next) {
      reach = std::max(reach, end(order[next]));
    }
    if (next == first + 1) continue;
    turns_.resize(tensors.size());
    std::vector<int> together(order.begin() + static_cast<std::ptrdiff_t>(first),
                              order.begin() + static_cast<std::ptrdiff_t>(next));
    std::sort(together.begin(), together.end());
    for (const int later : together) {
      int& turn = at(turns_, later);
      for (const int earlier : together) {
        if (earlier == later) break;
        if (begin(earlier) >= end(later) || begin(later) >= end(earlier)) continue;
        turn = std::max(turn, at(turns_, earlier) + 1);
      }
      last = std::max(last, turn);
    }
  }
  const auto passes = static_cast<std::size_t>(last) + 1;
  for (; passes_.size() > passes; passes_.pop_back()) {
    if (passes_.back().in_graphs()) of_graphs_.push_back(std::move(passes_.back()));
  }
  passes_.resize(passes);
}

void BorrowedOptimizer::sync_hyper(std::span<const BorrowedGroup> groups,
                                   std::span<const Stream> streams) {
  for (BorrowedPass& pass : passes_) pass.sync_hyper(groups, streams);
  for (BorrowedPass& pass : of_graphs_) pass.sync_hyper(groups, streams);
}

bool BorrowedOptimizer::in_graphs() const {
  return !of_graphs_.empty() || std::any_of(passes_.begin(), passes_.end(),
                                            [](const auto& pass) { return pass.in_graphs(); });
}

bool BorrowedOptimizer::is_captured(std::span<const Stream> streams) {
  return std::any_of(passes_.begin(), passes_.end(),
                     [&](auto& pass) { return pass.is_captured(streams); });
}

void BorrowedPass::step(std::span<const BorrowedGroup> groups,
                        std::span<const BorrowedTensor> tensors, const StepOptions& options) {
  if (now_.engine != nullptr) now_.engine->refuse_if_broken();
  if (!same_tensors(groups, tensors)) {
    if (now_.engine != nullptr) now_.engine->refuse_others_in_capture(options.streams);
    rebuild(groups, tensors);
  } else {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      // State made anew may lie where that of before lay, whose buffer has been filled since.
      const bool starts_anew = tensors[i].steps && !tensors[i].buffer_filled;
      if (tensors[i] == tensors_[i] && !starts_anew) continue;
      now_.engine->rebind(static_cast<int>(i), tensors[i]);
      tensors_[i] = tensors[i];
    }
    now_.reset_changed(groups);
  }
  now_.engine->step(options);
}

void BorrowedPass::step_again(std::span<const BorrowedGroup> groups, const StepOptions& options) {
  now_.engine->refuse_if_broken();
  now_.reset_changed(groups);
  now_.engine->step(options);
}

/// Groups are known by their position; one whose rule has become another is left alone.
void BorrowedPass::Known::reset_changed(std::span<const BorrowedGroup> now) {
  for (std::size_t i = 0; i < std::min(now.size(), groups.size()); ++i) {
    BorrowedGroup& known = groups[i];
    if (find_rule(now[i].hyper) != find_rule(known.hyper)) continue;
    const TensorView &before = known.lr_source, &after = now[i].lr_source;
    if (now[i].hyper == known.hyper && after.data == before.data && after.dtype == before.dtype) {
      continue;
    }
    engine->reset(static_cast<int>(i), now[i]);
    known.hyper = now[i].hyper;
    known.lr_source = now[i].lr_source;
  }
}

void BorrowedPass::sync_hyper(std::span<const BorrowedGroup> groups,
                              std::span<const Stream> streams) {
  const auto sync = [&](Known& known) {
    if (known.engine == nullptr) return;
    known.reset_changed(groups);
    known.engine->sync_hyper(streams);
  };
  sync(now_);
  for (Known& known : of_graphs_) sync(known);
}

bool BorrowedPass::in_graphs() const {
  return !of_graphs_.empty() || (now_.engine != nullptr && now_.engine->in_graphs());
}

/// What a rebind cannot change: how many there are, and the kind of each.
bool BorrowedPass::same_tensors(std::span<const BorrowedGroup> groups,
                                std::span<const BorrowedTensor> tensors) const {
  if (now_.engine == nullptr) return false;
  const auto same_group = [](const BorrowedGroup& a, const BorrowedGroup& b) {
    return find_rule(a.hyper) == find_rule(b.hyper) && a.rounding == b.rounding;
  };
  const auto same_tensor = [](const BorrowedTensor& a, const BorrowedTensor& b) {
    return a.size == b.size && a.group == b.group && a.device == b.device && a.dtype == b.dtype &&
           a.noise_seed == b.noise_seed &&
           (!a.steps || !b.steps ||
            (a.slot_dtype == b.slot_dtype && a.grad_dtype == b.grad_dtype &&
             (a.master == nullptr) == (b.master == nullptr)));
  };
  return std::equal(groups.begin(), groups.end(), now_.groups.begin(), now_.groups.end(),
                    same_group) &&
         std::equal(tensors.begin(), tensors.end(), tensors_.begin(), tensors_.end(), same_tensor);
}

void BorrowedPass::rebuild(std::span<const BorrowedGroup> groups,
                           std::span<const BorrowedTensor> tensors) {
  auto engine = std::make_unique<Engine>(OptimizerOptions{});
  engine->borrow(groups, tensors);
  const bool goes = now_.engine != nullptr && !now_.engine->in_graphs();
  const std::int64_t skipped = goes ? now_.engine->skipped_steps() : 0;
  Known known{std::move(engine), {groups.begin(), groups.end()}};
  of_graphs_.reserve(of_graphs_.size() + 1);
  tensors_.assign(tensors.begin(), tensors.end());
  std::swap(now_, known);
  skipped_before_ += skipped;
  if (known.engine != nullptr && !goes) of_graphs_.push_back(std::move(known));
}

bool BorrowedPass::copy_grad_norm(const TensorView& to, std::span<const Stream> streams) {
  return now_.engine != nullptr && now_.engine->copy_grad_norm(to, streams);
}

std::int64_t BorrowedPass::skipped_steps() {
  std::int64_t skipped = skipped_before_;
  if (now_.engine != nullptr) skipped += now_.engine->skipped_steps();
  for (const Known& known : of_graphs_) skipped += known.engine->skipped_steps();
  return skipped;
}

void Engine::borrow(std::span<const BorrowedGroup> groups,
                    std::span<const BorrowedTensor> tensors) {
  memory_is_checked_ = false;  // frameworks share memory where they see fit
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const std::string name = std::to_string(i);
    GroupRecord group{name, groups[i].hyper, groups[i].lr_source, {}, {}};
    group.options.rounding = groups[i].rounding;
    groups_.push_back(std::move(group));
  }
  for (const BorrowedTensor& tensor : tensors) {
    const int index = static_cast<int>(parameters_.size());
    GroupRecord& group = groups_.at(static_cast<std::size_t>(tensor.group));
    ParameterRecord record;
    record.name = group.name + "." + std::to_string(group.parameters.size());
    record.group = tensor.group;
    record.size = tensor.size;
    record.value = {tensor.value, tensor.dtype, {tensor.size}, tensor.device, true};
    record.noise_seed = tensor.noise_seed;
    const LayoutKey key = layout_key(at(groups, tensor.group), tensor);
    if (!find_layout(key)) {
      throw InvalidArgument(where(record) + ": no layout for values of " + to_string(key));
    }
    record.device = device_index(tensor.device, where(record));
    record.state = at(devices_, record.device)->states++;
    record.may_lack_grad = true;
    group.parameters.push_back(index);
    parameters_.push_back(std::move(record));
    rebind(index, tensor);
  }
}

/// Of the same rule variant as before.
void Engine::reset(int index, const BorrowedGroup& settings) {
  GroupRecord& group = at(groups_, index);
  group.hyper = settings.hyper;
  group.lr_source = settings.lr_source;
  group.settings_changed = true;
  for (const auto& device : devices_) device->hypers_changed = true;
}

void Engine::rebind(int index, const BorrowedTensor& tensor) {
  ParameterRecord& parameter = at(parameters_, index);
  DeviceRecord& device = device_of(parameter);
  const SlotNames names = rule_info(find_rule(at(groups_, parameter.group).hyper)).slots;

  const auto same_slots = [&] {
    const std::vector<Slot>& slots = parameter.slots;  // in the rule's order, then the master
    if (slots.size() != names.size() + (tensor.master != nullptr ? 1 : 0)) return false;
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (slots[i].data != tensor.slot[i]) return false;
    }
    return tensor.master == nullptr || slots.back().data == tensor.master;
  };
  const bool only_grad = tensor.steps && parameter.steps() && tensor.buffer_filled &&
                         parameter.value.data == tensor.value &&
                         parameter.step_tensor == tensor.step_tensor &&
                         parameter.step_is_double == tensor.step_is_double && same_slots();
  if (only_grad) {
    if (parameter.grad.data != tensor.grad) device.note_moved_grad(parameter, index);
    parameter.grad.data = tensor.grad;
    return;
  }
  const Slot* buffer = parameter.find_slot("momentum_buffer");
  const void* buffer_before = buffer == nullptr ? nullptr : buffer->data;
  parameter.value.data = tensor.value;
  parameter.grad = {tensor.grad, tensor.grad_dtype, {tensor.size}, tensor.device, tensor.steps};
  parameter.step_tensor = tensor.step_tensor;
  parameter.step_is_double = tensor.step_is_double;
  parameter.slots.clear();
  if (tensor.steps) {
    for (std::size_t i = 0; i < names.size(); ++i) {
      parameter.slots.push_back({names[i], tensor.slot_dtype, tensor.slot[i], true});
    }
    if (tensor.master != nullptr) {
      parameter.slots.push_back({kMasterWeight, DType::kFloat32, tensor.master, true});
    }
  }
  buffer = parameter.find_slot("momentum_buffer");
  // A fresh one may have the address of the one it replaces.
  if (buffer != nullptr && (buffer->data != buffer_before || !tensor.buffer_filled)) {
    device.given_states[parameter.state] = {0,
                                            tensor.buffer_filled ? 1 : 0};  // SGD counts for nobody
  }
  device.members_changed = true;
}

}  // namespace fusestep::detail
