// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Groups, parameters and their settings: what the caller may hand in, and what a change means for
// the next step.
#include <utility>

#include "engine.h"
#include "fusestep/detail/layout.h"
#include "fusestep/detail/rule_list.h"

namespace fusestep::detail {
namespace {

int find(const std::unordered_map<std::string, int>& names, std::string_view kind,
         std::string_view name) {
  const auto found = names.find(std::string(name));
  if (found != names.end()) return found->second;
  throw InvalidArgument("there is no " + std::string(kind) + " named '" + std::string(name) + "'");
}

void check_layout(const std::string& where, const GroupOptions& options, DType value, DType grad) {
  const LayoutKey key = layout_key(options, value, grad);
  if (find_layout(key)) return;
  const bool stochastic = key.extra == Extra::kStochasticRounding;
  throw InvalidArgument(where + ": no layout for values of " + to_string(key) +
                        (stochastic ? ", rounded stochastically" : "") + "; there are " +
                        layouts_with(key.extra));
}

/// Of the value's dtype, or float32 beside 16-bit values.
void check_grad(const std::string& where, const GroupOptions& options, const TensorView& grad,
                const TensorView& value) {
  const bool other = grad.dtype == DType::kFloat32 && size_of(value.dtype) == 2;
  check_like(where, "gradient", grad, other ? grad.dtype : value.dtype, value);
  check_layout(where, options, value.dtype, grad.dtype);
}

}  // namespace

int Engine::add_group(std::string name, const Hyper& hyper, std::vector<Parameter> parameters,
                      GroupOptions options) {
  return enter(checked(std::move(name), hyper, std::move(parameters), options), [](std::size_t) {});
}

Engine::JoiningGroup Engine::checked(std::string name, const Hyper& hyper,
                                     std::vector<Parameter> parameters,
                                     const GroupOptions& options) {
  const std::string group_text = "group '" + name + "'";
  if (group_names_.count(name) != 0) {
    throw InvalidArgument(group_text + ": there is a group of this name already");
  }
  if (parameters.empty()) throw InvalidArgument(group_text + ": has no parameters");
  validate(hyper, group_text);

  const int group_index = static_cast<int>(groups_.size());
  GroupRecord group{std::move(name), hyper, {}, options, {}};
  std::vector<ParameterRecord> joining;
  std::unordered_map<std::string, int> names;
  for (Parameter& given : parameters) {
    const std::string text = detail::where(group.name, given.name);
    const int index = static_cast<int>(parameters_.size() + joining.size());
    if (parameter_names_.count(given.name) != 0 || !names.emplace(given.name, index).second) {
      throw InvalidArgument(text + ": there is a parameter of this name already");
    }
    if (!given.value.present) throw InvalidArgument(text + ": has no value");
    check_memory(text, "value", given.value);
    check_layout(text, options, given.value.dtype, given.value.dtype);
    if (given.grad.present) check_grad(text, options, given.grad, given.value);
    if (given.shard) check_shard(text, *given.shard, given.value);
    ParameterRecord record;
    record.name = std::move(given.name);
    record.group = group_index;
    record.noise_seed = noise_seed(options.seed, record.name);
    record.size = given.value.size();
    record.value = std::move(given.value);
    record.grad = std::move(given.grad);
    record.shard = std::move(given.shard);
    group.parameters.push_back(index);
    joining.push_back(std::move(record));
  }
  for (ParameterRecord& record : joining) {
    record.device = device_index(record.value.device, detail::where(group.name, record.name));
  }
  return {std::move(group), std::move(joining), std::move(names)};
}

/// lay_out(index of the first new parameter) comes last of what can fail.
template <class F>
int Engine::enter(JoiningGroup joining, F&& lay_out) {
  auto& [group, records, names] = joining;
  // Everything that can still fail happens on copies or is taken back.
  const int group_index = static_cast<int>(groups_.size());
  const std::size_t before = parameters_.size();
  group_names_.reserve(group_names_.size() + 1);
  parameter_names_.reserve(parameter_names_.size() + names.size());
  std::unordered_map<std::string, int> group_name{{group.name, group_index}};
  groups_.push_back(std::move(group));
  try {
    for (ParameterRecord& record : records) parameters_.push_back(std::move(record));
    for (const auto& device : devices_) refuse_values_and_slots_that_overlap(device->device);
    lay_out(before);
  } catch (...) {
    groups_.pop_back();
    parameters_.resize(before);
    throw;
  }
  group_names_.merge(group_name);  // moves nodes: allocates nothing
  parameter_names_.merge(names);
  for (std::size_t i = before; i < parameters_.size(); ++i) {
    DeviceRecord& device = device_of(parameters_[i]);
    parameters_[i].state = device.states++;
    device.members_changed = true;
  }
  for (const auto& device : devices_) device->hypers_changed = true;
  return group_index;
}

/// What add_group() would take, moved into buffers of its own. Where several devices are involved,
/// what was enqueued on one of them before another one failed reads the caller's memory and nobody
/// reads what it writes.
int Engine::add_flat_group(std::string name, const Hyper& hyper, std::vector<Parameter> parameters,
                           GroupOptions options, std::span<const Stream> streams) {
  begin_outside_captures("add_flat_group()", streams);
  JoiningGroup joining = checked(std::move(name), hyper, std::move(parameters), options);
  return enter(std::move(joining), [&](std::size_t first) { move_to_buffers(first, streams); });
}

int Engine::find_group(std::string_view name) const { return find(group_names_, "group", name); }

int Engine::find_parameter(std::string_view name) const {
  return find(parameter_names_, "parameter", name);
}

void Engine::set_hyper(int index, const Hyper& hyper) {
  GroupRecord& group = at(groups_, index);
  const std::string text = "group '" + group.name + "'";
  if (hyper.index() != group.hyper.index()) {
    throw InvalidArgument(text + ": its rule is " + std::string(rule_name(group.hyper)) +
                          " and cannot become " + std::string(rule_name(hyper)));
  }
  validate(hyper, text);
  const bool other_variant = find_rule(hyper) != find_rule(group.hyper);
  group.hyper = hyper;
  group.settings_changed = true;
  for (const auto& device : devices_) {
    device->hypers_changed = true;
    device->members_changed = device->members_changed || other_variant;
  }
}

void Engine::set_lr(int index, double lr) {
  Hyper changed = at(groups_, index).hyper;
  std::visit([&](auto& settings) { settings.lr = lr; }, changed);
  set_hyper(index, changed);
  set_lr_source(index, {});
}

void Engine::set_lr_source(int index, const TensorView& source) {
  GroupRecord& group = at(groups_, index);
  if (source.present) {
    const std::string text = "group '" + group.name + "': lr";
    check_scalar(text, source);
    for (const int parameter : group.parameters) {
      const TensorView& value = at(parameters_, parameter).value;
      if (value.device == source.device) continue;
      throw InvalidArgument(text + " must live where the group's parameters live, on " +
                            to_string(value.device) + ", got " + to_string(source.device));
    }
  }
  group.lr_source = source;
  group.settings_changed = true;
  for (const auto& device : devices_) device->hypers_changed = true;
}

void Engine::set_grad(int index, const TensorView& grad) {
  ParameterRecord& parameter = at(parameters_, index);
  if (grad.present) {
    const GroupRecord& group = at(groups_, parameter.group);
    check_grad(where(parameter), group.options, grad, parameter.value);
  }
  const bool steps_before = parameter.steps();
  // One that does not step now may still be in the plan, with the gradient it had when it did.
  const bool moved = !steps_before || grad.data != parameter.grad.data;
  const bool other_dtype = grad.present && grad.dtype != parameter.grad.dtype;
  DeviceRecord& device = device_of(parameter);
  if (grad.present && moved) device.note_moved_grad(parameter, index);
  parameter.grad = grad;
  if (parameter.steps() != steps_before || other_dtype) device.stepping_changed = true;
}

void Engine::set_value(int index, const TensorView& value) {
  ParameterRecord& parameter = at(parameters_, index);
  if (!value.present) throw InvalidArgument(where(parameter) + ": has no value");
  check_like(where(parameter), "value", value, parameter.value.dtype, parameter.value);
  if (parameter.flat != nullptr && value.data != parameter.value.data) {
    throw InvalidArgument(where(parameter) +
                          ": lies in a buffer of its flat group and cannot be moved");
  }
  TensorView before = std::exchange(parameter.value, value);
  try {
    refuse_values_and_slots_that_overlap(value.device);
  } catch (...) {
    parameter.value = std::move(before);
    throw;
  }
  device_of(parameter).members_changed = true;
}

void Engine::set_frozen(int index, bool frozen) {
  ParameterRecord& parameter = at(parameters_, index);
  if (parameter.frozen == frozen) return;
  parameter.frozen = frozen;
  device_of(parameter).stepping_changed = true;
}

void Engine::set_frozen(std::string_view name, bool frozen) {
  const auto parameter = parameter_names_.find(std::string(name));
  const auto group = group_names_.find(std::string(name));
  if (parameter != parameter_names_.end() && group != group_names_.end()) {
    throw InvalidArgument("both a group and a parameter are named '" + std::string(name) +
                          "': use group(name) or parameter(name)");
  }
  if (parameter != parameter_names_.end()) return set_frozen(parameter->second, frozen);
  if (group == group_names_.end()) {
    throw InvalidArgument("there is no group or parameter named '" + std::string(name) + "'");
  }
  for (const int member : at(groups_, group->second).parameters) {
    set_frozen(member, frozen);
  }
}

int Engine::device_index(Device device, const std::string& where) {
  for (std::size_t i = 0; i < devices_.size(); ++i) {
    if (devices_[i]->device == device) return static_cast<int>(i);
  }
  const bool exists = device.is_cuda() ? device.index >= 0 && device.index < cuda_device_count()
                                       : device.index == 0;
  if (!exists) {
    throw InvalidArgument(where + ": there is no device " + to_string(device) +
                          (device.is_cuda() ? " (" + cuda_status() + ")" : ""));
  }
  auto record = std::make_unique<DeviceRecord>();
  record->device = device;
  record->index = static_cast<int>(devices_.size());
  record->backend = device.is_cuda() ? make_cuda_backend(device.index, options_.cuda_allocator)
                                     : make_cpu_backend();
  record->store = std::make_unique<StateStore>(*record->backend);
  record->hypers_changed = true;
  devices_.push_back(std::move(record));
  return static_cast<int>(devices_.size()) - 1;
}

std::string Engine::where(const ParameterRecord& parameter) const {
  return detail::where(at(groups_, parameter.group).name, parameter.name);
}

MemoryRange Engine::range_of(int parameter, std::string_view what, const TensorView& memory) {
  return {reinterpret_cast<std::uintptr_t>(memory.data), memory.bytes(), parameter, what};
}

std::vector<MemoryRange> Engine::value_and_slot_ranges(Device device) const {
  std::vector<MemoryRange> ranges;
  for (int i = 0; i < static_cast<int>(parameters_.size()); ++i) {
    const ParameterRecord& parameter = at(parameters_, i);
    if (parameter.value.device != device) continue;
    ranges.push_back(range_of(i, "value", parameter.value));
    for (const Slot& slot : parameter.slots) {
      ranges.push_back({reinterpret_cast<std::uintptr_t>(slot.data),
                        static_cast<std::size_t>(parameter.size) * size_of(slot.dtype), i,
                        slot.name});
    }
  }
  return ranges;
}

void Engine::refuse_overlap(std::vector<MemoryRange>& ranges) const {
  Overlap overlap;
  if (find_overlap(ranges, overlap)) refuse(overlap);
}

void Engine::refuse(const Overlap& overlap) const {
  const auto text = [&](const MemoryRange& range) {
    return "'" + std::string(range.what) + "' of " + where(at(parameters_, range.parameter));
  };
  throw InvalidArgument("memory overlaps: " + text(overlap.first) + " and " + text(overlap.second));
}

}  // namespace fusestep::detail
