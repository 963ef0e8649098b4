// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What the engine knows of groups and parameters.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "at.h"
#include "fusestep/detail/layout.h"
#include "fusestep/detail/rule_list.h"
#include "fusestep/error.h"
#include "fusestep/hyper.h"
#include "fusestep/optimizer.h"
#include "fusestep/tensor_view.h"

namespace fusestep::detail {

struct Slot {
  std::string_view name;  // one of a rule's kSlotNames, or kMasterWeight
  DType dtype;
  void* data;
  bool bound;  // the caller's memory, not the state store's
};

/// Parameters of a flat group that share a layout, one after the other in one buffer of values, one
/// of gradients and one of each slot: all have an element at the same index.
struct FlatRecord {
  struct SlotBuffer {
    std::string_view name;
    DType dtype;
    char* data;
    std::size_t arena;  // index of its memory in the state store
  };
  int group;
  int device;  // index in Engine::devices_
  DType value, grad;
  std::int64_t size = 0;  // elements, those between parameters included
  char* values = nullptr;
  char* grads = nullptr;
  std::vector<SlotBuffer> slots = {};
  std::vector<int> parameters = {};

  const SlotBuffer* find_slot(std::string_view name, DType dtype) const {
    for (const SlotBuffer& slot : slots) {
      if (slot.name == name && slot.dtype == dtype) return &slot;
    }
    return nullptr;
  }
};

struct ParameterRecord {
  std::string name;
  int group;
  int device;  // index in Engine::devices_
  int state;   // index of its StepState on that device
  TensorView value;
  TensorView grad;  // absent: nothing to step with
  std::optional<Shard> shard;
  std::int64_t size;
  std::vector<Slot> slots;
  std::vector<Slot> spare_slots;  // memory a load has left without use
  std::string kept;               // JSON: what a loaded file said of it and we do not know
  void* step_tensor = nullptr;    // the caller's count, see PrepareRow
  bool step_is_double = false;
  std::uint64_t noise_seed = 0;  // of stochastic rounding
  FlatRecord* flat = nullptr;    // of a flat group: where its memory is
  std::int64_t flat_begin = 0;   // its first element there
  bool frozen = false;
  bool may_lack_grad = false;  // in a captured step; its framework has been asked
  bool grad_moved = false;     // since the plan was staged: it is in DeviceRecord::changed_grads
  int row = -1;                // in the device's plan; -1 if it does not step
  int layout = -1;             // there: position in Layouts

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

/// What a group's options make of the slots of a parameter of this dtype.
inline DType slot_dtype(const GroupOptions& options, DType value) {
  if (options.slots == SlotDType::kBFloat16) return DType::kBFloat16;
  const bool half = size_of(value) == 2;
  return half && options.slots == SlotDType::kFloat32 ? DType::kFloat32 : value;
}

inline bool has_master(const GroupOptions& options, DType value) {
  return options.master_weights && size_of(value) == 2;
}

/// Where nothing is rounded to 16 bits there is nothing to choose.
inline Extra extra_of(const GroupOptions& options, DType value, DType slots) {
  const bool rounds = size_of(value) == 2 || size_of(slots) == 2;
  return rounds && options.rounding == Rounding::kStochastic ? Extra::kStochasticRounding
                                                             : Extra::kNone;
}

/// That of a parameter and gradient of these dtypes.
inline LayoutKey layout_key(const GroupOptions& options, DType value, DType grad) {
  const DType slots = slot_dtype(options, value);
  return {value, grad, slots, has_master(options, value), extra_of(options, value, slots)};
}

struct SlotKind {
  std::string_view name;
  DType dtype;
};

/// The most slots a parameter has: its rule's and the master weight.
inline constexpr int kMaxSlotKinds = kMaxSlots + 1;

/// The slots a parameter steps with: its rule's, in their order, then the master weight.
class SlotKinds {
 public:
  SlotKinds(const GroupRecord& group, DType value) {
    const DType dtype = slot_dtype(group.options, value);
    for (const std::string_view name : rule_info(find_rule(group.hyper)).slots) {
      kinds_[size_++] = {name, dtype};
    }
    if (has_master(group.options, value)) kinds_[size_++] = {kMasterWeight, DType::kFloat32};
  }
  const SlotKind* begin() const { return kinds_; }
  const SlotKind* end() const { return kinds_ + size_; }
  const SlotKind* find(std::string_view name) const {
    const SlotKind* found =
        std::find_if(begin(), end(), [&](const SlotKind& kind) { return kind.name == name; });
    return found == end() ? nullptr : found;
  }

 private:
  SlotKind kinds_[kMaxSlotKinds];
  int size_ = 0;
};

}  // namespace fusestep::detail
