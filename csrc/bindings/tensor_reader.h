// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Where a torch.Tensor's memory is and how it is laid out, without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "dlpack.h"
#include "fusestep/device.h"
#include "fusestep/dtype.h"

namespace fusestep::bindings {

/// Shape and strides are borrowed from the tensor, or stand in `owned`.
struct TensorInfo {
  void* data;
  std::int64_t elements;  // real numbers: a complex element is two
  fusestep::DType dtype;
  bool is_complex;
  Device device;
  int ndim;
  const std::int64_t* shape;
  const std::int64_t* strides;  // in elements
  std::vector<std::int64_t> owned = {};

  /// All elements in one stretch of memory, in whatever order of dimensions.
  bool dense() const;
  /// The same shape and, dimensions of extent 1 apart, the same strides, on the same device.
  bool laid_out_as(const TensorInfo& other) const;
};

/// Reads tensors of one class (torch.Tensor and its subclasses): through DLPack's exchange API
/// where the class offers it, else through its Python methods.
class TensorReader {
 public:
  explicit TensorReader(const pybind11::object& tensor_type);

  /// Nothing for what raw memory cannot stand for: sparse and meta tensors, wrapper subclasses,
  /// other dtypes, devices without a backend. Lazy conjugation and negation are the caller's to ask
  /// for.
  std::optional<TensorInfo> read(PyObject* tensor) const;

  /// The address alone, of a tensor that read() takes; null where it cannot be told.
  const void* data(PyObject* tensor) const;

  /// torch's current stream of a CUDA device.
  void* current_stream(Device device) const;

 private:
  std::optional<TensorInfo> read_by_exchange(PyObject* tensor) const;
  std::optional<TensorInfo> read_by_methods(PyObject* tensor) const;

  const dlpack::ExchangeApi* api_ = nullptr;
};

}  // namespace fusestep::bindings
