// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "remembered_step.h"

#include <algorithm>
#include <utility>

#include "python_objects.h"

namespace py = pybind11;

namespace fusestep::bindings {

bool RememberedStep::see(const py::list& groups, const py::list& places, const py::dict& state,
                         const std::vector<std::vector<PyObject*>>& state_keys) {
  overlook();
  std::vector<Group> seen;
  std::vector<Held> held;
  if (!see_all(groups, places, state, state_keys, seen, held)) {
    forget();
    return false;
  }
  groups_ = std::move(seen);
  held_ = std::move(held);
  return true;
}

bool RememberedStep::see_all(const py::list& groups, const py::list& places, const py::dict& state,
                             const std::vector<std::vector<PyObject*>>& state_keys,
                             std::vector<Group>& seen, std::vector<Held>& held) const {
  std::size_t position = 0;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const py::object group = groups[i];
    seen.push_back({py::reinterpret_borrow<py::object>(item(group.ptr(), keys().params)), {}});
    for (const py::handle value : py::reinterpret_borrow<py::list>(seen.back().params)) {
      const py::object grad = attribute(value.ptr(), keys().grad);
      if (!grad.is_none() && (position >= places.size() || !grad.is(places[position]))) {
        return false;
      }
      auto seen_value = see_one(value.ptr());
      auto seen_grad = grad.is_none() ? std::nullopt : see_one(grad.ptr());
      if (!seen_value || (!grad.is_none() && !seen_grad)) return false;
      if (!hold(value.ptr(), held)) return false;
      if (!grad.is_none() &&
          !hold_state(state_keys.at(i), state_of(state.ptr(), value.ptr()), held)) {
        return false;
      }
      seen.back().places.push_back({std::move(*seen_value), grad, std::move(seen_grad)});
      ++position;
    }
  }
  return true;
}

std::optional<RememberedStep::Seen> RememberedStep::see_one(PyObject* tensor) const {
  const auto info = reader_.read(tensor);
  if (!info) return {};
  return Seen{py::reinterpret_borrow<py::object>(tensor), info->kept()};
}

/// Making an alias costs more than all else that is remembered: that of the last time serves again.
bool RememberedStep::hold(PyObject* tensor, std::vector<Held>& held) const {
  const auto info = reader_.read(tensor);
  if (!info) return false;
  if (held.size() < held_.size()) {
    const Held& before = held_[held.size()];
    if (before.tensor.ptr() == tensor && before.data == info->data) {
      held.push_back(before);
      return true;
    }
  }
  auto alias = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, keys().detach));
  if (!alias) throw py::error_already_set();
  held.push_back({py::reinterpret_borrow<py::object>(tensor), std::move(alias), info->data});
  return true;
}

bool RememberedStep::hold_state(const std::vector<PyObject*>& keys, PyObject* state,
                                std::vector<Held>& held) const {
  return state == nullptr || std::all_of(keys.begin(), keys.end(), [&](PyObject* key) {
           PyObject* const tensor = find_item(state, key);
           return is_none_or_missing(tensor) || hold(tensor, held);
         });
}

void RememberedStep::overlook() { drop(groups_); }

void RememberedStep::forget() {
  drop(groups_);
  drop(held_);
}

bool RememberedStep::knows(const py::list& groups) const {
  return !groups_.empty() && groups.size() == groups_.size();
}

bool RememberedStep::is_list_of(std::size_t group, PyObject* params) const {
  const Group& seen = groups_[group];
  return params == seen.params.ptr() && PyList_Check(params) &&
         PyList_GET_SIZE(params) == static_cast<Py_ssize_t>(seen.places.size());
}

bool RememberedStep::is_there(std::size_t group, PyObject* params, bool looks_at_all,
                              AttributeOf& grad_of) const {
  const std::vector<Place>& places = groups_[group].places;
  const std::size_t last = places.empty() ? 0 : places.size() - 1;
  const std::size_t step = looks_at_all ? 1 : std::max<std::size_t>(last, 1);
  for (std::size_t i = 0; i < places.size(); i += step) {
    PyObject* const value = PyList_GET_ITEM(params, static_cast<Py_ssize_t>(i));
    const Place& place = places[i];
    if (value != place.value.tensor.ptr() || !place.value.is_there(reader_)) return false;
    if (!place.has(grad_of(value), reader_)) return false;
  }
  return true;
}

bool RememberedStep::holds_same(const py::list& groups) const {
  if (!knows(groups)) return false;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    PyObject* const params = item(py::object(groups[i]).ptr(), keys().params);
    if (!is_list_of(i, params)) return false;
    const std::vector<Place>& places = groups_[i].places;
    for (std::size_t j = 0; j < places.size(); ++j) {
      PyObject* const now = PyList_GET_ITEM(params, static_cast<Py_ssize_t>(j));
      if (now != places[j].value.tensor.ptr()) return false;
    }
  }
  return true;
}

py::list RememberedStep::strays() const {
  py::list found;
  AttributeOf grad_of(keys().grad), requires_grad_of(keys().requires_grad);
  for (const Group& group : groups_) {
    for (const Place& place : group.places) {
      PyObject* const value = place.value.tensor.ptr();
      const py::object grad = grad_of(value);
      if (grad.is_none()) continue;
      if (place.has(grad, reader_) && is_true(requires_grad_of(value).ptr())) continue;
      found.append(py::handle(value));
    }
  }
  return found;
}

int RememberedStep::visit(visitproc visit, void* arg) const {
  for (const Held& held : held_) {
    Py_VISIT(held.tensor.ptr());
    Py_VISIT(held.alias.ptr());
  }
  for (const Group& group : groups_) {
    Py_VISIT(group.params.ptr());
    for (const Place& place : group.places) {
      Py_VISIT(place.value.tensor.ptr());
      Py_VISIT(place.grad.ptr());
      if (place.seen_grad) Py_VISIT(place.seen_grad->tensor.ptr());
    }
  }
  return 0;
}

bool RememberedStep::Seen::is_there(const TensorReader& reader) const {
  const auto now = reader.read(tensor.ptr());
  return now && now->is_same_as(info);
}

bool RememberedStep::Place::has(const py::object& now, const TensorReader& reader) const {
  return now.is(grad) && (!seen_grad || seen_grad->is_there(reader));
}

}  // namespace fusestep::bindings
