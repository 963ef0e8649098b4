// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What the engine knows of groups and parameters.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fusestep/error.h"
#include "fusestep/hyper.h"
#include "fusestep/optimizer.h"
#include "fusestep/tensor_view.h"

namespace fusestep::detail {

struct Slot {
  std::string_view name;  // one of a rule's kSlotNames
  DType dtype;
  void* data;
  bool bound;  // the caller's memory, not the state store's
};

struct ParameterRecord {
  std::string name;
  int group;
  int device;  // index in Engine::devices_
  int state;   // index of its StepState on that device
  TensorView value;
  TensorView grad;  // absent: nothing to step with
  std::int64_t size;
  std::vector<Slot> slots;
  std::vector<Slot> spare_slots;  // memory a load has left without use
  std::string kept;               // JSON: what a loaded file said of it and we do not know
  void* step_tensor = nullptr;    // the caller's count, see PrepareRow
  bool step_is_double = false;
  bool frozen = false;
  bool may_lack_grad = false;  // in a captured step; its framework has been asked
  bool grad_moved = false;     // since the plan was staged: it is in DeviceRecord::changed_grads
  int row = -1;                // in the device's plan; -1 if it does not step

  std::size_t value_bytes() const { return static_cast<std::size_t>(size) * size_of(value.dtype); }
  bool steps() const { return !frozen && grad.present; }
  const Slot* find_slot(std::string_view slot_name) const {
    for (const Slot& slot : slots) {
      if (slot.name == slot_name) return &slot;
    }
    return nullptr;
  }
  /// One that is there.
  const Slot& slot(std::string_view slot_name) const {
    const Slot* found = find_slot(slot_name);
    if (found == nullptr) throw Error("slot '" + std::string(slot_name) + "' is missing");
    return *found;
  }
};

struct GroupRecord {
  std::string name;
  Hyper hyper;
  TensorView lr_source;  // absent: hyper's lr
  GroupOptions options;
  std::vector<int> parameters;
  std::optional<double> initial_lr = {};  // what a schedule multiplies
  std::string kept = {};                  // JSON: what a loaded file said of it and we do not know
  bool settings_changed = true;           // since they were brought to the devices
};

/// float64 parameters have float64 slots, float32 ones float32; for the others the group chooses.
inline DType slot_dtype(const GroupRecord& group, DType value) {
  const bool half = size_of(value) == 2;
  return half && group.options.slots == SlotDType::kFloat32 ? DType::kFloat32 : value;
}

}  // namespace fusestep::detail
