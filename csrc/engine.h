// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What stands behind Optimizer and its handles.
#pragma once

#include <future>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "fusestep/detail/backend.h"
#include "fusestep/detail/plan.h"
#include "fusestep/optimizer.h"
#include "fusestep/state_dict.h"
#include "records.h"
#include "state_store.h"
#include "validate.h"

namespace fusestep::detail {

/// One device that parameters live on, and what has changed there since the last step.
struct DeviceRecord {
  Device device;
  int index;  // in Engine::devices_
  std::unique_ptr<Backend> backend;
  std::unique_ptr<StateStore> store;
  Plan plan;
  StateStore::Growth growth = {};         // of the step at hand, until it has succeeded
  int states = 0;                         // StepStates given to parameters
  int staged_states = 0;                  // of them known to the backend
  std::map<int, StepState> given_states;  // set by the caller, not yet known to the backend

  bool works = false;             // in the step at hand: some parameter of it steps
  bool members_changed = false;   // with which rule who steps, or where values and slots are
  bool stepping_changed = false;  // who steps; perhaps back to what it was: see plan_is_stale()
  bool norm_blocks_staged = false;
  int staged_norm_parts = 0;
  bool hypers_changed = false;
  bool stores_grads = false;        // the plan's kernels do
  std::vector<int> changed_grads;   // parameters of the plan whose gradient is at another address
  std::vector<MemoryRange> ranges;  // values and slots, sorted
  bool ranges_are_known = false;

  /// Whoever is not in the plan comes into it with the gradient of that time.
  void note_moved_grad(ParameterRecord& parameter, int parameter_index) {
    if (parameter.row < 0) return;
    if (!parameter.grad_moved) changed_grads.push_back(parameter_index);
    parameter.grad_moved = true;
  }
};

struct BorrowedGroup;
struct BorrowedTensor;
class EngineSource;
class EngineLoader;

/// The caller's stream of this device; null, its default stream, where there is none.
inline void* stream_of(std::span<const Stream> streams, Device device) {
  for (const Stream& stream : streams) {
    if (stream.device == device) return stream.handle;
  }
  return nullptr;
}

class Engine {
 public:
  explicit Engine(OptimizerOptions options) : options_(std::move(options)) {}

  // groups.cpp: who is there, and with which settings
  int add_group(std::string name, const Hyper& hyper, std::vector<Parameter> parameters,
                GroupOptions options);
  int add_flat_group(std::string name, const Hyper& hyper, std::vector<Parameter> parameters,
                     GroupOptions options, std::span<const Stream> streams);
  int find_group(std::string_view name) const;
  int find_parameter(std::string_view name) const;
  void set_hyper(int group, const Hyper& hyper);
  void set_lr(int group, double lr);
  void set_lr_source(int group, const TensorView& source);
  void set_initial_lr(int group, double lr) { at(groups_, group).initial_lr = lr; }
  void set_grad(int parameter, const TensorView& grad);
  void set_value(int parameter, const TensorView& value);
  void set_frozen(int parameter, bool frozen);
  void set_frozen(std::string_view name, bool frozen);
  const std::vector<GroupRecord>& groups() const { return groups_; }
  const std::vector<ParameterRecord>& parameters() const { return parameters_; }

  // flat.cpp: groups whose memory is the optimizer's
  std::vector<FlatBuffer> flat_buffers(int group) const;
  void zero_grad(int group, std::span<const Stream> streams);

  // state.cpp: what has become of them
  StepState read_state(int parameter);
  void write_step(int parameter, std::int64_t step);
  TensorView slot(int parameter, std::string_view name) const;
  void bind_slot(int parameter, std::string_view name, const TensorView& memory);
  std::map<std::string, std::size_t> memory_report() const;

  // borrowed.cpp: groups and parameters of which nothing is ours
  void borrow(std::span<const BorrowedGroup> groups, std::span<const BorrowedTensor> tensors);
  void reset(int group, const BorrowedGroup& settings);
  void rebind(int parameter, const BorrowedTensor& tensor);

  // engine.cpp: the step
  void step(const StepOptions& options);
  void sync_hyper(std::span<const Stream> streams);
  GradNorm grad_norm(std::span<const Stream> streams);
  TensorView norm_begin(Device device, std::span<const Stream> streams);
  void norm_end();
  GradNorm last_grad_norm();
  /// The norm of the last step to a float64 scalar on a device that took part in it, without
  /// waiting; false if it is on another one.
  bool copy_grad_norm(const TensorView& to, std::span<const Stream> streams);
  std::int64_t skipped_steps();
  bool can_store_grads() const { return first_that_cannot_store() == nullptr; }
  void refresh_master_weights(std::span<const Stream> streams);
  void refuse_if_broken() const;
  /// Where the step at hand would be one of other tensors.
  void refuse_others_in_capture(std::span<const Stream> streams);
  /// The first whose stream is captured; null if none is.
  const DeviceRecord* captured_device(std::span<const Stream> streams);
  /// Whether a step was captured, and may run at any time.
  bool in_graphs() const;

  /// A save in the background. Waiting for it throws what it has thrown.
  void set_saving(std::future<void> saving) { saving_ = std::move(saving); }
  void wait_for_save() {
    if (saving_.valid()) saving_.get();
  }

 private:
  friend class EngineSource;  // checkpoint/: state as a whole
  friend class EngineLoader;

  /// A group that was checked and nobody knows of yet.
  struct JoiningGroup {
    GroupRecord group;
    std::vector<ParameterRecord> parameters;
    std::unordered_map<std::string, int> names;
  };
  JoiningGroup checked(std::string name, const Hyper& hyper, std::vector<Parameter> parameters,
                       const GroupOptions& options);
  template <class F>
  int enter(JoiningGroup joining, F&& lay_out);
  void move_to_buffers(std::size_t first, std::span<const Stream> streams);
  void plan_place(int parameter);
  void fill_buffer(const FlatRecord& flat, std::span<const Stream> streams);
  void move_to(FlatRecord& flat);

  // The phases of a step, in their order. Up to stage() nothing a caller could see has changed.
  void check(const StepOptions& options);
  static void check_streams(std::span<const Stream> streams);
  const ParameterRecord* first_that_cannot_store() const;
  [[noreturn]] void refuse_to_store(const ParameterRecord& parameter) const;
  void refresh(std::span<const Stream> streams, int norm_parts);
  void run(const StepOptions& options, bool with_norm, bool is_reduced);
  bool plan_is_stale(const DeviceRecord& device) const;
  void check_no_overlap(DeviceRecord& device) const;
  void list_working_devices();
  void choose_kernels(const StepOptions& options);
  void choose_kernels_for_norm();
  /// The slots that it has made are taken back where it fails.
  template <class F>
  void keep_growth_if(std::span<const Stream> streams, F&& succeeds);
  void grow_state(DeviceRecord& device, void* stream);
  void fill_master(const ParameterRecord& parameter, const Slot& master, void* stream);
  void stage(DeviceRecord& device, void* stream, int norm_parts);
  void bring_given_states(DeviceRecord& device, void* stream);
  std::vector<HyperRow> changed_hypers(const DeviceRecord& device) const;
  void forget_changed_settings();
  void give_state(const ParameterRecord& parameter, StepState state);
  void sum_squares(std::span<const Stream> streams);
  void refuse_between_halves() const;
  void send_sum(int position, DeviceRecord& from, void* from_stream,
                std::span<const Stream> streams);
  double* sums_on(Device device, std::span<const Stream> streams);
  double* sums_on_host(std::span<const Stream> streams);
  void take_reduced_sums(std::span<const Stream> streams);
  StepRequest request_for(const DeviceRecord& device, const StepOptions& options, int norm_parts);

  // capture.cpp: a step that runs later, in a CUDA graph
  bool is_captured(std::span<const Stream> streams);
  void begin_outside_captures(const char* call, std::span<const Stream> streams);
  const ParameterRecord* stepping_on(const DeviceRecord& device) const;
  void refuse_what_a_graph_cannot_do(const StepOptions& options, bool with_norm) const;
  void refuse_what_is_pending(const DeviceRecord& device, const StepOptions& options,
                              bool with_norm) const;
  [[noreturn]] static void refuse_capture(const std::string& why, const std::string& what_to_do);

  /// Remembers a DeviceError, after which refuse_if_broken() throws for ever; but not of a capture,
  /// in which nothing runs.
  template <class F>
  void on_device(F&& work);

  int device_index(Device device, const std::string& where);
  DeviceRecord& device_of(const ParameterRecord& parameter) {
    return *at(devices_, parameter.device);
  }
  std::string where(const ParameterRecord& parameter) const;
  static MemoryRange range_of(int parameter, std::string_view what, const TensorView& memory);
  std::vector<MemoryRange> value_and_slot_ranges(Device device) const;
  void refuse_values_and_slots_that_overlap(Device device) const {
    std::vector<MemoryRange> ranges = value_and_slot_ranges(device);
    refuse_overlap(ranges);
  }
  /// Sorts them.
  void refuse_overlap(std::vector<MemoryRange>& ranges) const;
  [[noreturn]] void refuse(const Overlap& overlap) const;

  OptimizerOptions options_;
  Metadata metadata_;         // of the file that was loaded last
  std::future<void> saving_;  // its destructor waits
  std::vector<std::unique_ptr<DeviceRecord>> devices_;
  std::vector<GroupRecord> groups_;
  std::vector<ParameterRecord> parameters_;
  std::vector<std::unique_ptr<FlatRecord>> flats_;
  std::unordered_map<std::string, int> group_names_, parameter_names_;
  std::string broken_;  // what a device reported; empty while all is well
  bool memory_is_checked_ = true;
  /// How far a norm over several processes is: norm_begin() has given its sums out, or norm_end()
  /// has said that they are the sums of all, for the next step.
  enum class NormHalf { kNone, kBegun, kEnded };
  NormHalf norm_half_ = NormHalf::kNone;
  Device norm_device_;  // where its sums are
  double* reduced_sums_ = nullptr;
  double host_sums_[2] = {};
  bool capturing_ = false;              // the step at hand
  std::vector<DeviceRecord*> working_;  // of the step at hand: devices with work, in norm order
  std::vector<StepRequest> requests_;   // to them
  std::vector<DeviceRecord*> decided_;  // of the last step: they know what it decided
  std::int64_t skipped_by_caller_ = 0;
};

template <class F>
void Engine::on_device(F&& work) {
  try {
    work();
  } catch (const DeviceError& error) {
    if (!capturing_) broken_ = error.what();
    throw;
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("no memory on the host for the tables of a step");
  }
}

template <class F>
void Engine::keep_growth_if(std::span<const Stream> streams, F&& succeeds) {
  try {
    succeeds();
  } catch (...) {
    for (const auto& device : devices_) {
      if (device->growth.slots.empty()) continue;
      device->store->undo(device->growth, stream_of(streams, device->device));
      device->growth.slots.clear();
      device->members_changed = true;  // its plan holds addresses that are gone
    }
    throw;
  }
  for (const auto& device : devices_) device->growth.slots.clear();
}

}  // namespace fusestep::detail
