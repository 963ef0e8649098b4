// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What a step has seen of parameters, gradients and state. As long as it is so again, the next step
// need not read it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <optional>
#include <vector>

#include "found_in_type.h"
#include "tensor_reader.h"

namespace fusestep::bindings {

class RememberedStep {
 public:
  /// `reader` lives longer.
  explicit RememberedStep(const TensorReader& reader) : reader_(reader) {}

  /// Whether all gradients are in place, `places` having the tensor that each parameter's is to be,
  /// or None; if not, nothing is remembered. What is found in `state` under the keys of each group,
  /// and parameters, are held, and their memory, until this is called again or forget().
  bool see(const pybind11::list& groups, const pybind11::list& places, const pybind11::dict& state,
           const std::vector<std::vector<PyObject*>>& state_keys);
  /// Nothing is known any more. What was held still is, and serves again where it is seen again.
  void overlook();
  void forget();

  /// Whether anything is known, of as many groups.
  bool knows(const pybind11::list& groups) const;
  /// Whether it is the list of a group's parameters, and as long as it was.
  bool is_list_of(std::size_t group, PyObject* params) const;
  /// Whether values and gradients of a group are where they were: all of them, or the first and the
  /// last. `params` is_list_of() it.
  bool is_there(std::size_t group, PyObject* params, bool looks_at_all, AttributeOf& grad_of) const;
  /// Whether the groups hold the same parameters.
  bool holds_same(const pybind11::list& groups) const;
  /// Parameters whose gradient is not what was seen, or that require none, among those that have
  /// one. Of groups that holds_same() says of.
  pybind11::list strays() const;

  /// For Python's garbage collector.
  int visit(visitproc visit, void* arg) const;

 private:
  /// A tensor, and how it was.
  struct Seen {
    pybind11::object tensor;
    TensorInfo info;

    bool is_there(const TensorReader& reader) const;
  };
  /// A tensor, and where it was. `.data = t` gives it other memory; the alias keeps this.
  struct Held {
    pybind11::object tensor, alias;
    const void* data;
  };
  struct Place {
    Seen value;
    pybind11::object grad;  // or None
    std::optional<Seen> seen_grad;

    bool has(const pybind11::object& now, const TensorReader& reader) const;
  };
  struct Group {
    pybind11::object params;  // the list
    std::vector<Place> places;
  };

  bool see_all(const pybind11::list& groups, const pybind11::list& places,
               const pybind11::dict& state, const std::vector<std::vector<PyObject*>>& state_keys,
               std::vector<Group>& seen, std::vector<Held>& held) const;
  std::optional<Seen> see_one(PyObject* tensor) const;
  bool hold(PyObject* tensor, std::vector<Held>& held) const;
  bool hold_state(const std::vector<PyObject*>& keys, PyObject* state,
                  std::vector<Held>& held) const;

  const TensorReader& reader_;
  std::vector<Group> groups_;  // empty: nothing is known
  std::vector<Held> held_;
};

}  // namespace fusestep::bindings
