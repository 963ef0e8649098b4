// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Flat groups: values, gradients and slots in one buffer each. A step takes their parameters one by
// one as it does all others, so that norms, random bits and step counts are the same.
#include <algorithm>

#include "engine.h"

namespace fusestep::detail {
namespace {

/// Elements, with those up to where the next parameter is aligned in arrays of the smallest dtype.
std::int64_t room_for(std::int64_t elements, Backend::Placement placement) {
  const auto unit = static_cast<std::int64_t>(placement.alignment / size_of(DType::kBFloat16));
  return (elements + unit - 1) / unit * unit;
}

char* place(char* buffer, std::int64_t begin, DType dtype) {
  return buffer + static_cast<std::size_t>(begin) * size_of(dtype);
}

}  // namespace

/// Of parameters from `first` on, which are of the newest group.
void Engine::move_to_buffers(std::size_t first, std::span<const Stream> streams) {
  const std::size_t flats_before = flats_.size();
  std::size_t allocated = flats_before;
  try {
    for (std::size_t i = first; i < parameters_.size(); ++i) plan_place(static_cast<int>(i));
    on_device([&] {
      for (; allocated < flats_.size(); ++allocated) {
        DeviceRecord& device = *at(devices_, flats_[allocated]->device);
        device.store->allocate(*flats_[allocated], stream_of(streams, device.device));
      }
      for (std::size_t i = flats_before; i < flats_.size(); ++i) fill_buffer(*flats_[i], streams);
    });
    for (std::size_t i = flats_before; i < flats_.size(); ++i) move_to(*flats_[i]);
  } catch (...) {
    for (; allocated > flats_before; --allocated) {
      DeviceRecord& device = *at(devices_, flats_[allocated - 1]->device);
      device.store->undo_allocate(stream_of(streams, device.device));
    }
    flats_.resize(flats_before);
    throw;
  }
}

/// At the end of the buffer for its layout.
void Engine::plan_place(int index) {
  ParameterRecord& parameter = at(parameters_, index);
  const DType value = parameter.value.dtype;
  const DType grad = parameter.grad.present ? parameter.grad.dtype : value;
  const auto fits = [&](const std::unique_ptr<FlatRecord>& flat) {
    return flat->group == parameter.group && flat->device == parameter.device &&
           flat->value == value && flat->grad == grad;
  };
  auto flat = std::find_if(flats_.begin(), flats_.end(), fits);
  if (flat == flats_.end()) {
    flats_.push_back(
        std::make_unique<FlatRecord>(FlatRecord{parameter.group, parameter.device, value, grad}));
    flat = flats_.end() - 1;
  }
  parameter.flat_begin = (*flat)->size;
  (*flat)->parameters.push_back(index);
  (*flat)->size += room_for(parameter.size, device_of(parameter).backend->placement());
}

void Engine::move_to(FlatRecord& flat) {
  for (const int index : flat.parameters) {
    ParameterRecord& parameter = at(parameters_, index);
    parameter.flat = &flat;
    parameter.value.data = place(flat.values, parameter.flat_begin, flat.value);
    parameter.grad = parameter.value;
    parameter.grad.data = place(flat.grads, parameter.flat_begin, flat.grad);
    parameter.grad.dtype = flat.grad;
  }
}

void Engine::fill_buffer(const FlatRecord& flat, std::span<const Stream> streams) {
  DeviceRecord& device = *at(devices_, flat.device);
  void* const stream = stream_of(streams, device.device);
  for (const int index : flat.parameters) {
    const ParameterRecord& parameter = at(parameters_, index);
    if (parameter.size == 0) continue;
    device.backend->copy(place(flat.values, parameter.flat_begin, flat.value), parameter.value.data,
                         parameter.value.bytes(), stream);
    if (!parameter.grad.present) continue;
    device.backend->copy(place(flat.grads, parameter.flat_begin, flat.grad), parameter.grad.data,
                         parameter.grad.bytes(), stream);
  }
}

std::vector<FlatBuffer> Engine::flat_buffers(int group) const {
  std::vector<FlatBuffer> buffers;
  for (const auto& flat : flats_) {
    if (flat->group != group) continue;
    const Device device = at(devices_, flat->device)->device;
    const auto view_of = [&](char* data, DType dtype) {
      return TensorView{data, dtype, {flat->size}, device, true};
    };
    FlatBuffer buffer{view_of(flat->values, flat->value), view_of(flat->grads, flat->grad), {}, {}};
    for (const FlatRecord::SlotBuffer& slot : flat->slots) {
      buffer.slots[std::string(slot.name)] = view_of(slot.data, slot.dtype);
    }
    for (const int index : flat->parameters) {
      const ParameterRecord& parameter = at(parameters_, index);
      buffer.parts.push_back({parameter.name, parameter.flat_begin, parameter.size});
    }
    buffers.push_back(std::move(buffer));
  }
  return buffers;
}

void Engine::zero_grad(int group, std::span<const Stream> streams) {
  refuse_if_broken();
  check_streams(streams);
  bool is_flat = false;
  on_device([&] {
    for (const auto& flat : flats_) {
      if (flat->group != group) continue;
      is_flat = true;
      DeviceRecord& device = *at(devices_, flat->device);
      const std::size_t bytes = static_cast<std::size_t>(flat->size) * size_of(flat->grad);
      if (bytes != 0) {
        device.backend->clear(flat->grads, bytes, stream_of(streams, device.device));
      }
    }
  });
  if (is_flat) return;
  throw InvalidArgument("group '" + at(groups_, group).name +
                        "': zero_grad() clears the gradients of flat groups; those of this one are "
                        "the caller's memory");
}

}  // namespace fusestep::detail
