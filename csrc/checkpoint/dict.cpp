// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/dict.h"

#include <utility>

#include "at.h"
#include "checkpoint/state_file.h"
#include "fusestep/error.h"

namespace fusestep {
namespace detail {
namespace {

GroupDescription describe(const GroupState& group) {
  GroupDescription description{group.name, std::string(rule_name(group.hyper)),
                               to_json(group.hyper), Json::object()};
  if (group.initial_lr) description.hyper[kInitialLr] = number_to_json(*group.initial_lr);
  return description;
}

ParameterDescription describe(const ParameterState& state, int group) {
  const std::string where = "parameter '" + state.name + "'";
  ParameterDescription description;
  description.name = state.name;
  description.group = group;
  description.value = {std::string(name_of(state.dtype)), state.shape};
  description.shard = state.shard;
  description.frozen = state.frozen;
  description.step = state.step;
  if (state.step < 0) {
    throw InvalidArgument(where + ": step must be >= 0, got " + std::to_string(state.step));
  }
  for (const auto& [name, slot] : state.slots) {
    const std::string text = where + ", slot '" + name + "'";
    const std::size_t expected = bytes_of(slot.dtype, slot.shape, text);
    if (slot.data.size() != expected) {
      throw InvalidArgument(text + ": expected " + std::to_string(expected) + " bytes, got " +
                            std::to_string(slot.data.size()));
    }
    description.slots[name] = {std::string(name_of(slot.dtype)), slot.shape};
  }
  return description;
}

}  // namespace

DictSource::DictSource(const StateDict& dict) : dict_(dict) {
  std::vector<bool> seen(dict.state.size());
  for (const GroupState& group : dict.param_groups) {
    for (const std::int64_t position : group.params) {
      const auto index = static_cast<std::size_t>(position);
      if (position < 0 || index >= dict.state.size() || seen[index]) {
        throw InvalidArgument("group '" + group.name + "': params has " + std::to_string(position) +
                              ", expected every position in state once");
      }
      seen[index] = true;
      positions_.push_back(index);
      description_.parameters.push_back(
          describe(dict.state[index], static_cast<int>(description_.groups.size())));
    }
    description_.groups.push_back(describe(group));
  }
  if (positions_.size() != dict.state.size()) {
    throw InvalidArgument("state has " + std::to_string(dict.state.size()) +
                          " parameters, and groups have " + std::to_string(positions_.size()));
  }
}

void DictSource::read(int parameter, const std::string& slot, ByteRange range,
                      const TakePiece& take) {
  const ParameterState& state = dict_.state[at(positions_, parameter)];
  const std::vector<std::byte>& data = state.slots.at(slot).data;
  take_pieces(data.data(), data.size(), range, take);
}

StateDict to_dict(StateSource& source) {
  StateDict dict;
  dict.metadata = source.metadata();
  for (const GroupDescription& group : source.description().groups) {
    GroupState state;
    state.name = group.name;
    // A file of another program has no settings.
    const std::string where = "group '" + group.name + "'";
    if (!group.rule.empty()) state.hyper = hyper_from_json(group.rule, group.hyper, where);
    state.initial_lr = initial_lr_from_json(group.hyper, where);
    dict.param_groups.push_back(std::move(state));
  }
  const std::vector<ParameterDescription>& parameters = source.description().parameters;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const ParameterDescription& parameter = parameters[i];
    at(dict.param_groups, parameter.group).params.push_back(static_cast<std::int64_t>(i));
    ParameterState state;
    state.name = parameter.name;
    const std::string where = "parameter '" + parameter.name + "'";
    state.dtype = dtype_from_name(parameter.value.dtype, where);
    state.shape = parameter.value.shape;
    state.shard = parameter.shard;
    state.frozen = parameter.frozen;
    state.step = parameter.step.value_or(0);
    for (const auto& [name, tensor] : parameter.slots) {
      const std::string text = where + ", slot '" + name + "'";
      const DType dtype = dtype_from_name(tensor.dtype, text);
      StateTensor& slot = state.slots[name] = {dtype, tensor.shape, {}};
      slot.data.resize(bytes_of(dtype, tensor.shape, text));
      source.read_into(static_cast<int>(i), name, {}, slot.data.data());
    }
    dict.state.push_back(std::move(state));
  }
  return dict;
}

}  // namespace detail

StateDict read_state_dict(const std::filesystem::path& path) {
  return detail::with_host_memory([&] {
    detail::StateFileReader file(path);
    try {
      return detail::to_dict(file);
    } catch (const InvalidArgument& error) {
      file.refuse(error.what());
    }
  });
}

void write_state_dict(const StateDict& state, const std::filesystem::path& path) {
  detail::with_host_memory([&] {
    detail::DictSource source(state);
    detail::write_file(source, {}, path);
  });
}

}  // namespace fusestep
