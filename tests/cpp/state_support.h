// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Models whose parameters are known by their names: the same numbers whatever group they are in.
#pragma once

#include <deque>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/dict.h"
#include "support.h"
#include "temporary_directory.h"

namespace fusestep::test {

struct ParameterSpec {
  std::string name;
  std::vector<std::int64_t> shape = {3};
  DType dtype = DType::kFloat32;
};

struct StateGroupSpec {
  std::string name;
  Hyper hyper;
  std::vector<ParameterSpec> parameters;
  SlotDType slots = SlotDType::kFloat32;
};

using ModelSpec = std::vector<StateGroupSpec>;

inline std::int64_t elements_of(const std::vector<std::int64_t>& shape) {
  return TensorView{nullptr, DType::kFloat32, shape, {}, true}.size();
}

/// Empty, or the first place where two texts differ.
inline std::string difference(const std::string& one, const std::string& other) {
  if (one == other) return "";
  const auto place = std::mismatch(one.begin(), one.end(), other.begin(), other.end()).first;
  const std::size_t at = static_cast<std::size_t>(place - one.begin());
  const auto excerpt = [&](const std::string& text) {
    std::string shown = text.substr(at < 60 ? 0 : at - 60, 100);
    for (char& c : shown) c = c >= ' ' && c < 0x7f ? c : '.';
    return shown;
  };
  return "at " + std::to_string(at) + ": " + excerpt(one) + "\n" + excerpt(other);
}

/// All of a StateDict as text and bytes.
inline std::string text_of(const StateDict& state) {
  std::string text = detail::to_json(detail::DictSource(state).description(), true).dump();
  for (const ParameterState& parameter : state.state) {
    for (const auto& [name, slot] : parameter.slots) {
      text += '\n' + parameter.name + '/' + name + ' ' +
              canonical(slot.data.data(), slot.dtype, elements_of(slot.shape));
    }
  }
  for (const auto& [key, value] : state.metadata) text += '\n' + key + '=' + value;
  return text;
}

class Model {
 public:
  explicit Model(const ModelSpec& groups) {
    for (const StateGroupSpec& group : groups) {
      std::vector<Parameter> parameters;
      for (const ParameterSpec& spec : group.parameters) {
        Tensor& tensor = tensors_.emplace_back(spec);
        tensor.value.fill_numbers(fnv(spec.name));
        tensor.grad.fill_numbers(fnv(spec.name) + 1);
        parameters.push_back(
            {spec.name, tensor.value.view(spec.shape), tensor.grad.view(spec.shape)});
      }
      optimizer.add_group(group.name, group.hyper, std::move(parameters), {group.slots});
    }
  }

  /// One step with gradients that follow from names and `number`.
  void step(std::uint64_t number, const StepOptions& options = {}) {
    for (Tensor& tensor : tensors_) tensor.grad.fill_numbers(fnv(tensor.spec.name) + 2 + number);
    optimizer.step(options);
  }
  void steps(std::uint64_t first, std::uint64_t count) {
    for (std::uint64_t i = 0; i < count; ++i) step(first + i);
  }
  void copy_values(Model& from) {
    for (Tensor& tensor : tensors_) {
      for (Tensor& other : from.tensors_) {
        if (other.spec.name != tensor.spec.name) continue;
        std::memcpy(tensor.value.data(), other.value.data(), tensor.value.bytes());
      }
    }
  }
  /// State and values: what the next steps follow from.
  std::string state() {
    std::string all = text_of(optimizer.state_dict());
    for (const Tensor& tensor : tensors_) all += '\n' + tensor.spec.name + canonical(tensor.value);
    return all;
  }
  /// All that can be seen of it, down to slots that no step has filled.
  std::string everything() {
    std::string all = state() + '\n' + snapshot(optimizer);
    for (const auto& [slot, bytes] : optimizer.memory_report()) {
      all += '\n' + slot + ' ' + std::to_string(bytes);
    }
    return all;
  }
  bool guards_intact() const {
    return std::all_of(tensors_.begin(), tensors_.end(), [](const Tensor& tensor) {
      return tensor.value.guards_intact() && tensor.grad.guards_intact();
    });
  }

  Optimizer optimizer;

 private:
  struct Tensor {
    explicit Tensor(const ParameterSpec& s)
        : spec(s), value(s.dtype, elements_of(s.shape)), grad(s.dtype, elements_of(s.shape)) {}
    ParameterSpec spec;
    Array value, grad;
  };
  std::deque<Tensor> tensors_;
};

}  // namespace fusestep::test
