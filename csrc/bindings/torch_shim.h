// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// torch's own C interface, of a stable ABI (torch/csrc/inductor/aoti_torch/c/shim.h): looked up in
// the torch that is loaded, and not linked, so that one build serves every version.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "tensor_info.h"

namespace fusestep::bindings {

class TorchShim {
 public:
  /// Nothing where torch has no such interface, or where a tensor of `tensor_type` is not read as
  /// its methods have it.
  static std::optional<TorchShim> find(const pybind11::object& tensor_type);

  /// Of a tensor's Python object. Nothing for one that is not strided, of another type, without
  /// memory or a backend for its device. Shape and strides are borrowed from the tensor.
  std::optional<TensorInfo> read(PyObject* tensor) const;

  /// Where torch has the tensor that the Python object stands for.
  const char* impl_of(PyObject* tensor) const;

 private:
  /// An at::Tensor.
  using Handle = const void*;
  /// Returns 0, or another number for an exception.
  template <typename Value>
  using Getter = std::int32_t (*)(Handle, Value*);

  bool find_functions();
  bool is_strided(PyObject* tensor) const;
  const TorchType* type_of(Handle handle) const;
  bool agrees_on(const pybind11::object& tensor) const;
  Handle handle_of(PyObject* tensor) const {
    return reinterpret_cast<const char*>(tensor) + handle_offset_;
  }

  Getter<std::int32_t> layout_;  // null in torch 2.7 and before
  Getter<std::int32_t> device_type_, device_index_, dtype_;
  Getter<std::int64_t> dim_, storage_offset_;
  Getter<std::int64_t*> sizes_, strides_;
  Getter<void*> data_ptr_;
  std::int32_t strided_, cpu_, cuda_;
  std::array<std::int32_t, kTorchTypes.size()> types_;
  PyTypeObject* tensor_type_;
  PyObject *name_of_layout_, *strided_layout_;  // Python's, kept for ever like the type
  std::size_t handle_offset_ = 0;               // in Python's object
};

}  // namespace fusestep::bindings
