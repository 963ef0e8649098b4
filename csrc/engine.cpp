// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The step: what is validated, allocated, brought to the devices and run, in this order.
#include "engine.h"

#include <algorithm>
#include <cmath>
#include <new>

#include "cpu/fp_environment.h"
#include "fusestep/detail/rule_list.h"
#include "plan.h"

namespace fusestep::detail {
namespace {

HyperRow hyper_row(const GroupRecord& group) {
  HyperRow row{};
  std::visit(
      [&](const auto& settings) {
        row.set(settings);
        row.maximize = settings.maximize;
      },
      group.hyper);
  if (group.lr_source.present) {
    row.lr_source = group.lr_source.data;
    row.lr_is_double = group.lr_source.dtype == DType::kFloat64;
  }
  return row;
}

bool needs_norm(const StepOptions& options) {
  return options.max_grad_norm < HUGE_VAL || options.skip_nonfinite || options.measure_grad_norm;
}

/// The flag has this value until the end of a step.
class Capturing {
 public:
  Capturing(bool& flag, bool value) : flag_(flag) { flag_ = value; }
  ~Capturing() { flag_ = false; }
  Capturing(const Capturing&) = delete;
  Capturing& operator=(const Capturing&) = delete;

 private:
  bool& flag_;
};

}  // namespace

void Engine::step(const StepOptions& options) {
  refuse_if_broken();
  check(options);
  list_working_devices();
  const Capturing capturing(capturing_, is_captured(options.streams));
  refuse_between_halves();
  const bool is_reduced = norm_half_ == NormHalf::kEnded;
  const bool with_norm = needs_norm(options) || is_reduced;
  if (capturing_) refuse_what_a_graph_cannot_do(options, with_norm);
  if (options.skip) {
    norm_half_ = NormHalf::kNone;
    ++skipped_by_caller_;
    return;
  }
  choose_kernels(options);
  keep_growth_if(options.streams, [&] {
    refresh(options.streams, with_norm ? static_cast<int>(working_.size()) : 0);
    const DefaultFpEnvironment environment;
    on_device([&] { run(options, with_norm, is_reduced); });
  });
  decided_ = working_;
  norm_half_ = NormHalf::kNone;
}

void Engine::run(const StepOptions& options, bool with_norm, bool is_reduced) {
  if (is_reduced) {
    take_reduced_sums(options.streams);
  } else if (with_norm) {
    sum_squares(options.streams);
  }
  const int norm_parts = is_reduced ? 1 : with_norm ? static_cast<int>(working_.size()) : 0;
  // All requests first: finding one out may wait for another device.
  requests_.clear();
  for (const DeviceRecord* device : working_) {
    requests_.push_back(request_for(*device, options, norm_parts));
    requests_.back().counts_skips = requests_.size() == 1;
  }
  for (std::size_t i = 0; i < working_.size(); ++i) {
    try {
      working_[i]->backend->run(requests_[i], stream_of(options.streams, working_[i]->device));
    } catch (const OutOfMemory& error) {
      if (i == 0) throw;
      throw DeviceError(error.what());  // the devices before this one have stepped
    }
  }
}

/// In the order in which their shares of the norm are added. This alone says who has work in the
/// step at hand; where the set of parameters has changed, plans are still those of the last one.
void Engine::list_working_devices() {
  on_device([&] {
    working_.clear();
    decided_.reserve(devices_.size());  // nothing can fail after a step
    for (const auto& device : devices_) {
      device->works =
          plan_is_stale(*device) ? stepping_on(*device) != nullptr : !device->plan.tensors.empty();
      if (device->works) working_.push_back(device.get());
    }
  });
  if (working_.size() < 2) return;
  std::sort(working_.begin(), working_.end(),
            [](const auto* a, const auto* b) { return a->device < b->device; });
}

/// A norm asks nothing of kernels, so a plan that is made for it is of a step that stores nothing:
/// there is one for every layout.
void Engine::choose_kernels_for_norm() {
  for (const auto& device : devices_) {
    if (!device->stores_grads || !plan_is_stale(*device)) continue;
    device->stores_grads = false;
    device->members_changed = true;
  }
}

GradNorm Engine::grad_norm(std::span<const Stream> streams) {
  begin_outside_captures("grad_norm()", streams);
  list_working_devices();
  choose_kernels_for_norm();
  const DefaultFpEnvironment environment;
  NormSum total;
  keep_growth_if(streams, [&] {
    refresh(streams, static_cast<int>(working_.size()));
    on_device([&] {
      int position = 0;
      for (DeviceRecord* device : working_) {
        void* stream = stream_of(streams, device->device);
        device->backend->sum_squares(position, stream);
        total = add(total, device->backend->read_sum(position, stream));
        ++position;
      }
    });
  });
  return {std::sqrt(total.squares), total.nonfinite};
}

GradNorm Engine::last_grad_norm() {
  if (decided_.empty()) return {std::nan(""), 0};
  Control control{};
  on_device([&] { control = decided_.front()->backend->read_control(); });
  return {control.grad_norm, control.nonfinite};
}

bool Engine::copy_grad_norm(const TensorView& to, std::span<const Stream> streams) {
  const auto found = std::find_if(decided_.begin(), decided_.end(),
                                  [&](const auto* device) { return device->device == to.device; });
  if (found == decided_.end()) return false;
  on_device([&] {
    (*found)->backend->copy_grad_norm(static_cast<double*>(to.data), stream_of(streams, to.device));
  });
  return true;
}

std::int64_t Engine::skipped_steps() {
  std::int64_t skipped = skipped_by_caller_;
  on_device([&] {
    for (const auto& device : devices_) skipped += device->backend->read_control().skipped_steps;
  });
  return skipped;
}

void Engine::check(const StepOptions& options) {
  const auto check_source = [&](const std::string& name, const TensorView& source) {
    if (!source.present) return;
    check_scalar(name, source);
    device_index(source.device, name);
  };
  check_source("skip_source", options.skip_source);
  check_source("grad_multiplier_source", options.grad_multiplier_source);
  check_source("loss_scale_source", options.loss_scale_source);
  if (std::isnan(options.grad_multiplier)) {
    throw InvalidArgument("grad_multiplier must be a number, got NaN");
  }
  if (!(options.max_grad_norm >= 0)) {
    throw InvalidArgument("max_grad_norm must be >= 0, got " +
                          std::to_string(options.max_grad_norm));
  }
  if (!(options.clip_value >= 0)) {
    throw InvalidArgument("clip_value must be >= 0, got " + std::to_string(options.clip_value));
  }
  const auto is_planned = [&](const auto& device) {
    return device->stores_grads && !plan_is_stale(*device);
  };
  if (options.store_unscaled_grads && !std::all_of(devices_.begin(), devices_.end(), is_planned)) {
    if (const ParameterRecord* refused = first_that_cannot_store()) refuse_to_store(*refused);
  }
  check_streams(options.streams);
}

void Engine::check_streams(std::span<const Stream> streams) {
  for (const Stream& stream : streams) {
    const auto same_device = [&](const Stream& other) { return other.device == stream.device; };
    if (std::count_if(streams.begin(), streams.end(), same_device) != 1) {
      throw InvalidArgument("there are two streams of " + to_string(stream.device));
    }
    if (!stream.device.is_cuda()) {
      throw InvalidArgument("a stream must belong to a CUDA device, got one of " +
                            to_string(stream.device));
    }
  }
}

/// Of the parameters that step; null if all can.
const ParameterRecord* Engine::first_that_cannot_store() const {
  const auto found = std::find_if(parameters_.begin(), parameters_.end(), [&](const auto& one) {
    return one.steps() && !layout_of(at(groups_, one.group), one, true);
  });
  return found == parameters_.end() ? nullptr : &*found;
}

void Engine::refuse_to_store(const ParameterRecord& parameter) const {
  const GroupOptions& options = at(groups_, parameter.group).options;
  const LayoutKey key = layout_key(options, parameter.value.dtype, parameter.grad.dtype);
  throw InvalidArgument(where(parameter) + ": store_unscaled_grads cannot be had for " +
                        to_string(key) + "; it can for " + layouts_with(Extra::kStoreGrad));
}

/// Those that store gradients are others.
void Engine::choose_kernels(const StepOptions& options) {
  for (const auto& device : devices_) {
    if (device->stores_grads == options.store_unscaled_grads) continue;
    device->stores_grads = options.store_unscaled_grads;
    device->members_changed = true;
  }
}

/// Brings every device up to date with groups, settings and gradients. Within keep_growth_if() it
/// changes nothing where it fails.
void Engine::refresh(std::span<const Stream> streams, int norm_parts) {
  if (memory_is_checked_) {
    on_device([&] {
      for (const auto& device : devices_) {
        if (plan_is_stale(*device) || !device->changed_grads.empty()) check_no_overlap(*device);
      }
    });
  }
  on_device([&] {
    for (const auto& device : devices_) {
      if (plan_is_stale(*device)) grow_state(*device, stream_of(streams, device->device));
    }
    for (const auto& device : devices_) {
      // What a capture may not bring has been refused, or is of devices that do not work in it.
      if (capturing_ && (!device->works || device->changed_grads.empty())) continue;
      stage(*device, stream_of(streams, device->device), norm_parts);
    }
  });
  forget_changed_settings();
}

/// One that was frozen or without a gradient for a while, and is as the plan has it, is no reason.
bool Engine::plan_is_stale(const DeviceRecord& device) const {
  if (device.members_changed || !device.stepping_changed) return device.members_changed;
  return std::any_of(parameters_.begin(), parameters_.end(), [&](const ParameterRecord& parameter) {
    if (parameter.device != device.index) return false;
    const bool is_planned = parameter.row >= 0;
    return parameter.steps() != is_planned ||
           (is_planned && parameter.grad.dtype != key_at(parameter.layout).grad);
  });
}

/// Values and slots are sorted when they have changed, gradients whenever one has moved.
void Engine::check_no_overlap(DeviceRecord& device) const {
  if (device.members_changed || !device.ranges_are_known) {
    device.ranges = value_and_slot_ranges(device.device);
    refuse_overlap(device.ranges);
    device.ranges_are_known = true;
  }
  std::vector<MemoryRange> grads;
  grads.reserve(parameters_.size());
  for_each_stepping(device.index, groups_, parameters_,
                    [&](int index, const ParameterRecord& parameter) {
                      grads.push_back(range_of(index, "gradient", parameter.grad));
                    });
  refuse_overlap(grads);
  Overlap overlap;
  if (find_overlap(device.ranges, grads, overlap)) refuse(overlap);
}

/// Slots of parameters that step for the first time, or with a rule variant that has more of them.
void Engine::grow_state(DeviceRecord& device, void* stream) {
  std::vector<StateStore::Wanted> wanted;
  for_each_stepping(device.index, groups_, parameters_, [&](int, ParameterRecord& parameter) {
    const GroupRecord& group = at(groups_, parameter.group);
    for (const SlotKind& kind : SlotKinds(group, parameter.value.dtype)) {
      if (parameter.find_slot(kind.name) != nullptr) continue;
      wanted.push_back({&parameter, {kind.name, kind.dtype, nullptr, false}});
    }
  });
  if (wanted.empty()) return;
  device.growth = device.store->grow(std::move(wanted), stream);
  device.ranges_are_known = false;
  for (const StateStore::Wanted& grown : device.growth.slots) {
    if (grown.slot.name == kMasterWeight) fill_master(*grown.parameter, grown.slot, stream);
  }
}

void Engine::fill_master(const ParameterRecord& parameter, const Slot& master, void* stream) {
  device_of(parameter).backend->widen(static_cast<float*>(master.data), parameter.value.data,
                                      parameter.value.dtype, parameter.size, stream);
}

void Engine::refresh_master_weights(std::span<const Stream> streams) {
  begin_outside_captures("refresh_master_weights()", streams);
  on_device([&] {
    for (const ParameterRecord& parameter : parameters_) {
      const Slot* master = parameter.find_slot(kMasterWeight);
      if (master == nullptr) continue;
      fill_master(parameter, *master, stream_of(streams, parameter.value.device));
    }
  });
}

void Engine::stage(DeviceRecord& device, void* stream, int norm_parts) {
  Backend::Tables tables{};
  if (plan_is_stale(device)) {
    device.members_changed = true;  // until all of it has arrived
    device.plan =
        build_plan(device.index, *device.backend, groups_, parameters_, device.stores_grads);
    device.norm_blocks_staged = false;
  } else {
    tables.changed_rows =
        refresh_rows(device.plan, device.changed_grads, *device.backend, groups_, parameters_);
  }
  const bool with_norm_blocks = norm_parts != 0 && !device.norm_blocks_staged;
  if (with_norm_blocks) {
    device.plan.norm_blocks = build_norm_blocks(device.index, groups_, parameters_);
  }

  const std::vector<HyperRow> hypers = changed_hypers(device);
  tables.plan = &device.plan;
  tables.members_changed = device.members_changed;
  tables.norm_blocks_changed = with_norm_blocks;
  tables.hypers = hypers;
  tables.states = device.states;
  tables.norm_parts = norm_parts;
  device.backend->stage(tables, stream);

  device.staged_states = device.states;
  // Those that wait in a capture are of parameters that do not step in it.
  if (!capturing_) bring_given_states(device, stream);
  device.members_changed = device.stepping_changed = device.hypers_changed = false;
  device.norm_blocks_staged = device.norm_blocks_staged || with_norm_blocks;
  device.staged_norm_parts = std::max(device.staged_norm_parts, norm_parts);
  for (const int changed : device.changed_grads) {
    at(parameters_, changed).grad_moved = false;
  }
  device.changed_grads.clear();
}

/// One by one: where one fails, those that are there have been counted on by graphs since.
void Engine::bring_given_states(DeviceRecord& device, void* stream) {
  auto given = device.given_states.begin();
  while (given != device.given_states.end() && given->first < device.staged_states) {
    device.backend->write_state(given->first, given->second, stream);
    given = device.given_states.erase(given);
  }
}

std::vector<HyperRow> Engine::changed_hypers(const DeviceRecord& device) const {
  std::vector<HyperRow> rows;
  if (!device.hypers_changed) return rows;
  for (const GroupRecord& group : groups_) rows.push_back(hyper_row(group));
  return rows;
}

/// A device on which nothing has stepped yet may never hear of them.
void Engine::forget_changed_settings() {
  for (const auto& device : devices_) {
    if (device->hypers_changed && device->staged_states != 0) return;
  }
  for (GroupRecord& group : groups_) group.settings_changed = false;
}

/// What graphs read when they run: settings and step counts. Devices on which nothing has stepped
/// get all they need with their first step.
void Engine::sync_hyper(std::span<const Stream> streams) {
  begin_outside_captures("sync_hyper()", streams);
  on_device([&] {
    for (const auto& device : devices_) {
      const std::vector<HyperRow> hypers = changed_hypers(*device);
      if (device->staged_states == 0 || (hypers.empty() && device->given_states.empty())) continue;
      void* const stream = stream_of(streams, device->device);
      Backend::Tables tables{};
      tables.plan = &device->plan;
      tables.hypers = hypers;
      tables.states = device->staged_states;
      device->backend->stage(tables, stream);
      device->hypers_changed = false;
      bring_given_states(*device, stream);
    }
  });
  forget_changed_settings();
}

/// Every device gets the sums of all devices.
void Engine::sum_squares(std::span<const Stream> streams) {
  const std::vector<DeviceRecord*>& devices = working_;
  for (int i = 0; i < static_cast<int>(devices.size()); ++i) {
    at(devices, i)->backend->sum_squares(i, stream_of(streams, at(devices, i)->device));
  }
  if (devices.size() < 2) return;
  for (int i = 0; i < static_cast<int>(devices.size()); ++i) {
    DeviceRecord& from = *at(devices, i);
    send_sum(i, from, stream_of(streams, from.device), streams);
  }
}

/// To all other devices with work.
void Engine::send_sum(int position, DeviceRecord& from, void* from_stream,
                      std::span<const Stream> streams) {
  for (DeviceRecord* to : working_) {
    if (to == &from) continue;
    void* stream = stream_of(streams, to->device);
    if (to->device.type == from.device.type) {
      to->backend->copy_sum(position, *from.backend, from_stream, stream);
    } else {  // between the CPU and a GPU the host has to wait
      to->backend->write_sum(position, from.backend->read_sum(position, from_stream), stream);
    }
  }
}

StepRequest Engine::request_for(const DeviceRecord& device, const StepOptions& options,
                                int norm_parts) {
  const auto scalar = [&](double value, const TensorView& source) -> StepScalar {
    if (!source.present) return {value};
    const bool is_double = source.dtype == DType::kFloat64;
    if (source.device == device.device) return {value, source.data, is_double};
    Backend& there = *at(devices_, device_index(source.device, "step"))->backend;
    return {value *
            there.read_scalar(source.data, is_double, stream_of(options.streams, source.device))};
  };
  StepRequest request;
  request.grad_multiplier = scalar(options.grad_multiplier, options.grad_multiplier_source);
  request.loss_scale = scalar(1.0, options.loss_scale_source);
  request.skip = options.skip_source.present ? scalar(1.0, options.skip_source) : StepScalar{0.0};
  request.max_grad_norm = options.max_grad_norm;
  request.clip_value = options.clip_value;
  request.skip_nonfinite = options.skip_nonfinite;
  request.norm_parts = norm_parts;
  return request;
}

void Engine::refuse_if_broken() const {
  if (broken_.empty()) return;
  throw DeviceError("this optimizer cannot be used any more: " + broken_);
}

}  // namespace fusestep::detail
