// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "group_reader.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "fusestep/detail/rule_list.h"
#include "python_objects.h"

namespace py = pybind11;

namespace fusestep::bindings {
namespace {

PyObject* slot_key(std::string_view name) {
  static const std::vector<std::pair<std::string_view, PyObject*>> table = [] {
    std::vector<std::pair<std::string_view, PyObject*>> made;
    for (int rule = 0; rule < detail::kRules; ++rule) {
      for (const std::string_view slot : detail::rule_info(rule).slots) {
        made.emplace_back(slot, PyUnicode_InternFromString(std::string(slot).c_str()));
      }
    }
    return made;
  }();
  const auto named = [&](const auto& entry) { return entry.first == name; };
  return std::find_if(table.begin(), table.end(), named)->second;
}

}  // namespace

detail::BorrowedGroup read_settings(PyObject* group, std::string_view rule,
                                    const TensorReader& reader) {
  const Keys& k = keys();
  const auto get = [&](PyObject* key) { return number(item(group, key)); };
  const auto flag = [&](PyObject* key) { return is_true(item(group, key)); };
  detail::BorrowedGroup read;
  double lr = 0;
  PyObject* const given_lr = item(group, k.lr);
  const bool lr_is_number = PyFloat_Check(given_lr) || PyLong_Check(given_lr);
  const auto lr_tensor = lr_is_number ? std::nullopt : reader.read(given_lr);
  if (lr_tensor && lr_tensor->device.is_cuda() && lr_tensor->elements == 1 &&
      size_of(lr_tensor->dtype) >= 4) {
    read.lr_source = {lr_tensor->data, lr_tensor->dtype, {}, lr_tensor->device, true};
  } else {
    lr = number(given_lr);
  }
  if (rule == "Adam") {
    const auto betas = py::reinterpret_steal<py::object>(
        PySequence_Fast(item(group, k.betas), "betas must be a sequence of two numbers"));
    if (!betas) throw py::error_already_set();
    if (PySequence_Fast_GET_SIZE(betas.ptr()) != 2) throw py::value_error("betas must be two");
    read.hyper = AdamHyper{lr,
                           {number(PySequence_Fast_GET_ITEM(betas.ptr(), 0)),
                            number(PySequence_Fast_GET_ITEM(betas.ptr(), 1))},
                           get(k.eps),
                           get(k.weight_decay),
                           flag(k.amsgrad),
                           flag(k.maximize),
                           flag(k.decoupled_weight_decay)};
  } else if (rule == "SGD") {
    read.hyper = SgdHyper{lr,
                          get(k.momentum),
                          get(k.dampening),
                          get(k.weight_decay),
                          flag(k.nesterov),
                          flag(k.maximize)};
  } else {
    read.hyper = RmspropHyper{lr,
                              get(k.alpha),
                              get(k.eps),
                              get(k.weight_decay),
                              get(k.momentum),
                              flag(k.centered),
                              flag(k.maximize)};
  }
  PyObject* const rounding = find_item(group, k.rounding);
  if (rounding != nullptr && PyUnicode_CompareWithASCIIString(rounding, "stochastic") == 0) {
    read.rounding = Rounding::kStochastic;
  }
  return read;
}

GroupKind read_kind(PyObject* group, std::string_view rule, const detail::BorrowedGroup& settings,
                    int first) {
  const Keys& k = keys();
  GroupKind kind;
  kind.first = first;
  kind.differentiable = is_true(item(group, k.differentiable));
  kind.master_weights = is_true(find_item(group, k.master_weights));
  kind.stochastic = settings.rounding == Rounding::kStochastic;
  kind.counts = rule != "SGD" || kind.stochastic;
  for (const std::string_view name : detail::rule_info(detail::find_rule(settings.hyper)).slots) {
    kind.slot_keys.push_back(slot_key(name));
  }
  if (!kind.stochastic) return kind;
  if (PyObject* const seed = find_item(group, k.seed)) {
    kind.seed = py::handle(seed).cast<std::uint64_t>();
  }
  if (PyObject* const names = find_item(group, k.param_names)) {
    kind.names = py::reinterpret_borrow<py::object>(names);
  }
  return kind;
}

bool GroupKind::operator==(const GroupKind& other) const {
  return first == other.first && differentiable == other.differentiable &&
         master_weights == other.master_weights && stochastic == other.stochastic &&
         counts == other.counts && seed == other.seed && names.is(other.names) &&
         slot_keys == other.slot_keys;
}

/// By the parameter's name, or where it has none by its place among all parameters.
std::uint64_t GroupKind::noise_seed_of(int position) const {
  if (!stochastic) return 0;
  if (names.is_none()) return detail::noise_seed(seed, std::to_string(position));
  const py::object name = names[py::int_(position - first)];
  return detail::noise_seed(seed, py::str(name).cast<std::string>());
}

std::vector<PyObject*> GroupKind::state_keys() const {
  std::vector<PyObject*> all = slot_keys;
  all.push_back(keys().master_weight);
  if (counts) all.push_back(keys().step);
  return all;
}

}  // namespace fusestep::bindings
