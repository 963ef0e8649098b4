// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A torch optimizer's group as a step reads it: its settings, and which state its parameters have.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "borrowed.h"
#include "tensor_reader.h"

namespace fusestep::bindings {

/// `rule`: "Adam", "SGD" or "RMSprop". A tensor lr on a CUDA device is read there.
detail::BorrowedGroup read_settings(PyObject* group, std::string_view rule,
                                    const TensorReader& reader);

/// What of a group decides how its parameters are read, and on which kernels they step.
struct GroupKind {
  int first = 0;  // position of its first parameter among all
  bool differentiable = false;
  bool master_weights = false;
  bool stochastic = false;
  bool counts = true;  // steps, in the state's "step"
  std::uint64_t seed = 0;
  pybind11::object names = pybind11::none();  // of its parameters, where it needs them
  std::vector<PyObject*> slot_keys;           // of its rule variant

  /// Names are the same where the list of them is.
  bool operator==(const GroupKind& other) const;
  /// Of stochastic rounding, for a parameter at this position among all.
  std::uint64_t noise_seed_of(int position) const;
  /// Keys of all its parameters' state that a step may read.
  std::vector<PyObject*> state_keys() const;
};

GroupKind read_kind(PyObject* group, std::string_view rule, const detail::BorrowedGroup& settings,
                    int first);

}  // namespace fusestep::bindings
