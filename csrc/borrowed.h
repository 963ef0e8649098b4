// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Steps tensors that belong to a framework altogether: values, gradients, slots and step counts.
// Their addresses may be others at every step; what has not changed since the last one costs a
// comparison.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine.h"

namespace fusestep::detail {

struct BorrowedTensor {
  void* value = nullptr;
  void* grad = nullptr;
  void* slot[kMaxSlots] = {};    // of the group's rule variant, in its order
  void* master = nullptr;        // float32, or null: the value is the parameter itself
  void* step_tensor = nullptr;   // float32 or float64, or null: the count is the engine's own
  std::int64_t size = 0;         // elements, laid out alike in all of them
  std::uint64_t noise_seed = 0;  // of stochastic rounding
  std::int32_t group = 0;
  Device device;
  DType dtype = DType::kFloat32;  // of the value
  DType grad_dtype = DType::kFloat32;
  DType slot_dtype = DType::kFloat32;
  bool step_is_double = false;
  bool buffer_filled = false;  // a momentum buffer that a step or a load has filled
  bool steps = false;          // has a gradient, and with it slots; else it rests

  friend bool operator==(const BorrowedTensor&, const BorrowedTensor&) = default;
};

struct BorrowedGroup {
  Hyper hyper;
  TensorView lr_source = {};  // absent: hyper's lr
  Rounding rounding = Rounding::kNearest;
};

LayoutKey layout_key(const BorrowedGroup& group, const BorrowedTensor& tensor);

/// Tensors of which no two share memory.
class BorrowedPass {
 public:
  void step(std::span<const BorrowedGroup> groups, std::span<const BorrowedTensor> tensors,
            const StepOptions& options);
  void step_again(std::span<const BorrowedGroup> groups, const StepOptions& options);
  /// Settings of the groups that were there at the last step, brought to the devices.
  void sync_hyper(std::span<const BorrowedGroup> groups, std::span<const Stream> streams);
  bool in_graphs() const;
  bool is_captured(std::span<const Stream> streams) {
    return now_.engine != nullptr && now_.engine->captured_device(streams) != nullptr;
  }

  bool copy_grad_norm(const TensorView& to, std::span<const Stream> streams);
  /// Waits for the devices.
  std::int64_t skipped_steps();

 private:
  /// An engine, and what it was told last of its groups.
  struct Known {
    std::unique_ptr<Engine> engine;
    std::vector<BorrowedGroup> groups;

    void reset_changed(std::span<const BorrowedGroup> now);
  };
  bool same_tensors(std::span<const BorrowedGroup> groups,
                    std::span<const BorrowedTensor> tensors) const;
  void rebuild(std::span<const BorrowedGroup> groups, std::span<const BorrowedTensor> tensors);

  Known now_;
  std::vector<BorrowedTensor> tensors_;
  std::vector<Known> of_graphs_;     // engines of other tensors, whose steps graphs still make
  std::int64_t skipped_before_ = 0;  // by engines that are gone
};

class BorrowedOptimizer {
 public:
  /// Settings are believed as they are: the framework has checked them, or let its user go on
  /// without. Tensors that share memory step one after the other, in their order.
  void step(std::span<const BorrowedGroup> groups, std::span<const BorrowedTensor> tensors,
            const StepOptions& options);
  /// The same with the tensors of the last call of step(), which has worked and took no turns; the
  /// groups' rules are those they had. What it costs does not depend on how many there are.
  void step_again(std::span<const BorrowedGroup> groups, const StepOptions& options) {
    passes_[0].step_again(groups, options);
    ++steps_;
  }
  /// Brings changed settings to the devices, for graphs that run after it.
  void sync_hyper(std::span<const BorrowedGroup> groups, std::span<const Stream> streams);
  /// Whether some step of its was captured, and graphs may still make it.
  bool in_graphs() const;
  /// Whether one of these streams is captured, of a device where it has stepped.
  bool is_captured(std::span<const Stream> streams);
  /// Whether tensors share memory: each pass then has a norm of its own, and options that need one
  /// are not for them.
  bool takes_turns(std::span<const BorrowedTensor> tensors) {
    find_turns(tensors);
    return !turns_.empty();
  }
  /// Whether every gradient can be stored as StepOptions::store_unscaled_grads asks for: there is
  /// such a layout, and no two gradients share memory.
  bool can_store_grads(std::span<const BorrowedGroup> groups,
                       std::span<const BorrowedTensor> tensors);
  /// The norm of the last step, which took no turns.
  bool copy_grad_norm(const TensorView& to, std::span<const Stream> streams) {
    return passes_[0].copy_grad_norm(to, streams);
  }
  std::int64_t skipped_steps() { return passes_[0].skipped_steps(); }
  /// Steps taken since it was made: a test's proof that it was this that stepped.
  std::int64_t steps() const { return steps_; }
  /// Whether the tensor at this place had this value at the last step.
  bool knows(std::size_t index, const BorrowedTensor& tensor) const {
    return index < memory_.size() && memory_[index] == Memory{tensor.value, tensor.size};
  }

 private:
  struct Memory {
    const void* value;
    std::int64_t size;
    friend bool operator==(const Memory&, const Memory&) = default;
  };
  void find_turns(std::span<const BorrowedTensor> tensors);
  bool grads_overlap(std::span<const BorrowedTensor> tensors);

  std::vector<BorrowedPass> passes_ = std::vector<BorrowedPass>(1);
  std::vector<BorrowedPass> of_graphs_;  // passes of other tensors
  std::vector<Memory> memory_;           // of every tensor of the last step
  std::vector<int> turns_;               // the pass of every tensor; empty: one for all
  std::vector<Memory> grads_;            // of the last question
  bool grads_overlap_ = false;           // its answer
  std::int64_t steps_ = 0;
};

}  // namespace fusestep::detail
