// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// State as the caller sees it: step counts and slots by name.
#include <algorithm>

#include "engine.h"
#include "fusestep/detail/rule_list.h"

namespace fusestep::detail {

StepState Engine::read_state(int index) {
  const ParameterRecord& parameter = at(parameters_, index);
  DeviceRecord& device = device_of(parameter);
  const auto given = device.given_states.find(parameter.state);
  if (given != device.given_states.end()) return given->second;
  if (parameter.state >= device.staged_states) return {};
  StepState state;
  on_device([&] { state = device.backend->read_state(parameter.state); });
  return state;
}

void Engine::write_step(int index, std::int64_t step) {
  const ParameterRecord& parameter = at(parameters_, index);
  if (step < 0) {
    throw InvalidArgument(where(parameter) + ": step must be >= 0, got " + std::to_string(step));
  }
  StepState state = read_state(index);
  state.step = step;
  give_state(parameter, state);
}

/// It waits for the next step, except where graphs read it: they may run before that, and on any
/// stream. For them it is there when this returns.
void Engine::give_state(const ParameterRecord& parameter, StepState state) {
  DeviceRecord& device = device_of(parameter);
  if (!device.backend->in_graphs() || parameter.state >= device.staged_states) {
    device.given_states[parameter.state] = state;
    return;
  }
  on_device([&] {
    try {
      device.backend->write_state(parameter.state, state, nullptr);
      static_cast<void>(device.backend->read_control());
    } catch (const OutOfMemory& error) {
      throw DeviceError(error.what());  // nobody knows whether it is there
    }
  });
  device.given_states.erase(parameter.state);
}

TensorView Engine::slot(int index, std::string_view name) const {
  const ParameterRecord& parameter = at(parameters_, index);
  const Slot* slot = parameter.find_slot(name);
  if (slot == nullptr) {
    std::string present;
    for (const Slot& other : parameter.slots) {
      present += (present.empty() ? "" : ", ") + std::string(other.name);
    }
    throw InvalidArgument(where(parameter) + ": has no slot '" + std::string(name) +
                          "'; its slots are: " + (present.empty() ? "none yet" : present));
  }
  return {slot->data, slot->dtype, parameter.value.shape, parameter.value.device, true};
}

void Engine::bind_slot(int index, std::string_view name, const TensorView& memory) {
  ParameterRecord& parameter = at(parameters_, index);
  const GroupRecord& group = at(groups_, parameter.group);
  const SlotKinds kinds(group, parameter.value.dtype);
  const SlotKind* known = kinds.find(name);
  if (known == nullptr) {
    throw InvalidArgument(where(parameter) + ": " +
                          std::string(rule_info(find_rule(group.hyper)).name) + " has no slot '" +
                          std::string(name) + "'");
  }
  const std::string what = "slot '" + std::string(name) + "'";
  check_like(where(parameter), what, memory, known->dtype, parameter.value);

  const std::vector<Slot> before = parameter.slots;
  std::erase_if(parameter.slots, [&](const Slot& slot) { return slot.name == name; });
  parameter.slots.push_back({known->name, memory.dtype, memory.data, true});
  try {
    refuse_values_and_slots_that_overlap(memory.device);
    if (name == "momentum_buffer") {
      StepState state = read_state(index);
      state.buffer_filled = 1;
      give_state(parameter, state);
    }
  } catch (...) {
    parameter.slots = before;
    throw;
  }
  device_of(parameter).members_changed = true;
}

std::map<std::string, std::size_t> Engine::memory_report() const {
  std::map<std::string, std::size_t> bytes;
  for (const ParameterRecord& parameter : parameters_) {
    for (const Slot& slot : parameter.slots) {
      if (slot.bound) continue;
      bytes[std::string(slot.name)] +=
          static_cast<std::size_t>(parameter.size) * size_of(slot.dtype);
    }
  }
  return bytes;
}

}  // namespace fusestep::detail
