// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A step that is captured into a CUDA graph: it runs later, any number of times, and what it lacks
// then nobody can bring it.
#include <algorithm>

#include "engine.h"
#include "plan.h"

namespace fusestep::detail {
namespace {

constexpr const char* kStepFirst = "make one step outside of the capture first";
constexpr const char* kStepAlikeFirst =
    "make one step with the same options outside of the capture first";

unsigned long long capture_of(const DeviceRecord& device, std::span<const Stream> streams) {
  return device.backend->capture_of(stream_of(streams, device.device));
}

}  // namespace

void Engine::refuse_capture(const std::string& why, const std::string& what_to_do) {
  throw InvalidArgument("the step cannot be captured into a CUDA graph: " + why + "; " +
                        what_to_do);
}

bool Engine::in_graphs() const {
  return std::any_of(devices_.begin(), devices_.end(),
                     [](const auto& device) { return device->backend->in_graphs(); });
}

/// Of every call that enqueues work, but step(), zero_grad() and copy_grad_norm().
void Engine::begin_outside_captures(const char* call, std::span<const Stream> streams) {
  refuse_if_broken();
  check_streams(streams);
  if (captured_device(streams) == nullptr) return;
  throw InvalidArgument(std::string(call) +
                        " cannot be captured into a CUDA graph: call it outside of the capture");
}

/// The first parameter that steps there; null if there is none.
const ParameterRecord* Engine::stepping_on(const DeviceRecord& device) const {
  const auto found =
      std::find_if(parameters_.begin(), parameters_.end(), [&](const ParameterRecord& parameter) {
        return parameter.device == device.index && parameter.steps();
      });
  return found == parameters_.end() ? nullptr : &*found;
}

const DeviceRecord* Engine::captured_device(std::span<const Stream> streams) {
  const DeviceRecord* captured = nullptr;
  on_device([&] {
    const auto found = std::find_if(devices_.begin(), devices_.end(), [&](const auto& device) {
      return capture_of(*device, streams) != 0;
    });
    if (found != devices_.end()) captured = found->get();
  });
  return captured;
}

void Engine::refuse_others_in_capture(std::span<const Stream> streams) {
  if (captured_device(streams) == nullptr) return;
  refuse_capture("its parameters, or their dtypes or rules, are not those of the last step",
                 kStepFirst);
}

/// Whether the streams of all devices with work are captured, into one graph.
bool Engine::is_captured(std::span<const Stream> streams) {
  const DeviceRecord* const captured = captured_device(streams);
  if (captured == nullptr) return false;
  for (const DeviceRecord* device : working_) {
    const ParameterRecord& parameter = *stepping_on(*device);
    if (!device->device.is_cuda()) {
      refuse_capture(where(parameter) + " lives on the CPU",
                     "freeze it, or step it with another optimizer");
    }
    if (capture_of(*device, streams) == capture_of(*captured, streams)) continue;
    refuse_capture(where(parameter) + " lives on " + to_string(device->device) +
                       ", whose stream is not captured into the graph that " +
                       to_string(captured->device) + "'s is",
                   "let it wait for an event that was recorded on the captured stream first");
  }
  return true;
}

/// Everything a step would wait for, allocate or bring to a device, gradients that have moved
/// apart; and what only the host can decide.
void Engine::refuse_what_a_graph_cannot_do(const StepOptions& options, bool with_norm) const {
  if (options.skip) {
    refuse_capture("skip is decided by the host, once for all runs of the graph",
                   "use skip_source");
  }
  if (norm_half_ != NormHalf::kNone) {
    refuse_capture("norm_end() has given its norm, of this time only",
                   "clip by the norm of one process");
  }
  for (const ParameterRecord& parameter : parameters_) {
    if (parameter.frozen || parameter.grad.present || parameter.may_lack_grad) continue;
    refuse_capture(where(parameter) + " has no gradient", "set one, or freeze the parameter");
  }
  for (const DeviceRecord* device : working_) refuse_what_is_pending(*device, options, with_norm);
  const auto refuse_foreign = [&](const char* name, const TensorView& source) {
    if (!source.present) return;
    for (const ParameterRecord& parameter : parameters_) {
      if (!parameter.steps() || parameter.value.device == source.device) continue;
      refuse_capture(std::string(name) + " lives on " + to_string(source.device) + ", and " +
                         where(parameter) + " on " + to_string(parameter.value.device),
                     "only a scalar of the same device can be read when the graph runs");
    }
  };
  refuse_foreign("loss_scale_source", options.loss_scale_source);
  refuse_foreign("skip_source", options.skip_source);
  refuse_foreign("grad_multiplier_source", options.grad_multiplier_source);
}

void Engine::refuse_what_is_pending(const DeviceRecord& device, const StepOptions& options,
                                    bool with_norm) const {
  const auto for_each = [&](auto&& refuse) {
    for_each_stepping(device.index, groups_, parameters_, refuse);
  };
  for_each([&](int, const ParameterRecord& parameter) {
    const GroupRecord& group = at(groups_, parameter.group);
    for (const SlotKind& kind : SlotKinds(group, parameter.value.dtype)) {
      if (parameter.find_slot(kind.name) != nullptr) continue;
      refuse_capture(where(parameter) + " has no slot '" + std::string(kind.name) + "' yet",
                     kStepFirst);
    }
    if (parameter.state >= device.staged_states) {
      refuse_capture(where(parameter) + " has not stepped yet", kStepFirst);
    }
  });
  if (plan_is_stale(device)) {
    refuse_capture("which parameters step on " + to_string(device.device) +
                       ", or where their values and slots lie, has changed since the last step",
                   kStepFirst);
  }
  for_each([&](int, const ParameterRecord& parameter) {
    if (device.given_states.count(parameter.state) == 0) return;
    refuse_capture("the step count of " + where(parameter) + " was set and is not on " +
                       to_string(device.device) + " yet",
                   "call sync_hyper() first");
  });
  if (device.hypers_changed) {
    const auto changed = std::find_if(groups_.begin(), groups_.end(),
                                      [](const auto& group) { return group.settings_changed; });
    const std::string whose =
        changed == groups_.end() ? "" : " of group '" + changed->name + "'";  // as after a load
    refuse_capture(
        "settings" + whose + " have changed and are not on " + to_string(device.device) + " yet",
        "call sync_hyper() first");
  }
  if (device.stores_grads != options.store_unscaled_grads) {
    refuse_capture("store_unscaled_grads is not as in the last step", kStepAlikeFirst);
  }
  const bool norm_is_ready =
      device.norm_blocks_staged && device.staged_norm_parts >= static_cast<int>(working_.size());
  if (with_norm && !norm_is_ready) {
    refuse_capture(
        "it is the first that needs the norm of the gradients on " + to_string(device.device),
        kStepAlikeFirst);
  }
}

}  // namespace fusestep::detail
