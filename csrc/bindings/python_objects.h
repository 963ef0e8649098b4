// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What is asked of Python's objects with the C interface, where a step asks it of every parameter.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

namespace fusestep::bindings {

/// Names that are looked up for every group and parameter, made once and kept for ever.
struct Keys {
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* step = PyUnicode_InternFromString("step");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* is_conj = PyUnicode_InternFromString("is_conj");
  PyObject* local_tensor = PyUnicode_InternFromString("_local_tensor");
  PyObject* spec = PyUnicode_InternFromString("_spec");
  PyObject* placements = PyUnicode_InternFromString("placements");
  PyObject* mesh = PyUnicode_InternFromString("mesh");
  PyObject* differentiable = PyUnicode_InternFromString("differentiable");
  PyObject* lr = PyUnicode_InternFromString("lr");
  PyObject* betas = PyUnicode_InternFromString("betas");
  PyObject* eps = PyUnicode_InternFromString("eps");
  PyObject* weight_decay = PyUnicode_InternFromString("weight_decay");
  PyObject* amsgrad = PyUnicode_InternFromString("amsgrad");
  PyObject* maximize = PyUnicode_InternFromString("maximize");
  PyObject* decoupled_weight_decay = PyUnicode_InternFromString("decoupled_weight_decay");
  PyObject* momentum = PyUnicode_InternFromString("momentum");
  PyObject* dampening = PyUnicode_InternFromString("dampening");
  PyObject* nesterov = PyUnicode_InternFromString("nesterov");
  PyObject* alpha = PyUnicode_InternFromString("alpha");
  PyObject* centered = PyUnicode_InternFromString("centered");
  PyObject* master_weights = PyUnicode_InternFromString("master_weights");
  PyObject* master_weight = PyUnicode_InternFromString("master_weight");
  PyObject* rounding = PyUnicode_InternFromString("rounding");
  PyObject* seed = PyUnicode_InternFromString("seed");
  PyObject* param_names = PyUnicode_InternFromString("param_names");
  PyObject* detach = PyUnicode_InternFromString("detach");
};

inline const Keys& keys() {
  static const Keys keys;
  return keys;
}

inline bool is_none_or_missing(PyObject* object) { return object == nullptr || object == Py_None; }

inline PyObject* item(PyObject* group, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(group, key);
  if (value != nullptr) return value;
  if (PyErr_Occurred() == nullptr) PyErr_SetObject(PyExc_KeyError, key);
  throw pybind11::error_already_set();
}

/// Null where the group has no such key.
inline PyObject* find_item(PyObject* group, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(group, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return value;
}

inline bool is_true(PyObject* value) {
  const int truth = value == nullptr ? 0 : PyObject_IsTrue(value);
  if (truth < 0) throw pybind11::error_already_set();
  return truth == 1;
}

/// A Python number or a tensor of one element.
inline double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double read = PyFloat_AsDouble(value);
  if (read == -1.0 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return read;
}

/// torch.Tensor hashes by identity; asking its Python method for that would cost more than all else
/// that is done here for a parameter.
inline PyObject* state_of(PyObject* states, PyObject* parameter) {
  const auto hash = static_cast<Py_hash_t>(reinterpret_cast<std::intptr_t>(parameter));
  PyObject* const state = _PyDict_GetItem_KnownHash(states, parameter, hash);
  if (state == nullptr && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return state != nullptr && PyDict_Check(state) ? state : nullptr;
}

/// Nothing names the objects any more when they go: what they call then may collect garbage, which
/// visits what is named, or ask for a step.
template <class T>
inline void drop(T& held) {
  const T gone = std::exchange(held, T());
}

}  // namespace fusestep::bindings
