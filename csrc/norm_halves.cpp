// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The norm of gradients that several processes have parts of: norm_begin(), the caller's sum over
// the processes, norm_end(), step.
#include <algorithm>

#include "engine.h"
#include "fusestep/detail/norm.h"

namespace fusestep::detail {

TensorView Engine::norm_begin(Device device, std::span<const Stream> streams) {
  begin_outside_captures("norm_begin()", streams);
  // The host's numbers need no backend of their own.
  if (device.is_cuda()) device_index(device, "norm_begin()");
  list_working_devices();
  const auto works = [&](const DeviceRecord* one) { return one->device == device; };
  const bool is_working = std::any_of(working_.begin(), working_.end(), works);
  if (device.is_cuda() && !is_working && !working_.empty()) {
    throw InvalidArgument("norm_begin(): no parameter that steps lives on " + to_string(device) +
                          ", but on " + to_string(working_.front()->device));
  }
  choose_kernels_for_norm();
  keep_growth_if(streams, [&] {
    refresh(streams, static_cast<int>(working_.size()));
    on_device([&] {
      sum_squares(streams);
      reduced_sums_ = device.is_cuda() ? sums_on(device, streams) : sums_on_host(streams);
    });
  });
  norm_half_ = NormHalf::kBegun;
  norm_device_ = device;
  return {reduced_sums_, DType::kFloat64, {2}, device, true};
}

/// Of all working devices, of which each has the sums of all.
double* Engine::sums_on(Device device, std::span<const Stream> streams) {
  DeviceRecord& there = *at(devices_, device_index(device, "norm_begin()"));
  return there.backend->gather_sums(static_cast<int>(working_.size()), stream_of(streams, device));
}

double* Engine::sums_on_host(std::span<const Stream> streams) {
  NormSum total;
  for (int i = 0; i < static_cast<int>(working_.size()); ++i) {
    DeviceRecord& first = *working_.front();
    total = add(total, first.backend->read_sum(i, stream_of(streams, first.device)));
  }
  host_sums_[0] = total.squares;
  host_sums_[1] = static_cast<double>(total.nonfinite);
  return host_sums_;
}

void Engine::norm_end() {
  if (norm_half_ == NormHalf::kBegun) {
    norm_half_ = NormHalf::kEnded;
    return;
  }
  throw InvalidArgument("norm_end() without norm_begin() since the last step");
}

void Engine::refuse_between_halves() const {
  if (norm_half_ != NormHalf::kBegun) return;
  throw InvalidArgument("step: norm_begin() waits for norm_end()");
}

/// Part 0 of every device is the sum over all processes.
void Engine::take_reduced_sums(std::span<const Stream> streams) {
  if (!norm_device_.is_cuda()) {
    const NormSum total = norm_sum_of(reduced_sums_);
    for (DeviceRecord* to : working_) {
      to->backend->write_sum(0, total, stream_of(streams, to->device));
    }
    return;
  }
  DeviceRecord& from = *at(devices_, device_index(norm_device_, "step"));
  void* from_stream = stream_of(streams, from.device);
  if (working_.empty()) return;
  from.backend->scatter_sums(from_stream);
  send_sum(0, from, from_stream, streams);
}

}  // namespace fusestep::detail
