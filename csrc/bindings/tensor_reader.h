// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Where a torch.Tensor's memory is and how it is laid out, without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "dlpack.h"
#include "fusestep/device.h"
#include "fusestep/dtype.h"
#include "torch_shim.h"
#include "trail.h"

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
  /// One whose shape and strides are its own.
  TensorInfo kept() const;
};

/// Reads tensors of one class (torch.Tensor and its subclasses): through torch's C interface where
/// it has one, else through its Python methods.
class TensorReader {
 public:
  explicit TensorReader(const pybind11::object& tensor_type);

  bool has_shim() const { return shim_.has_value(); }

  /// Nothing for what raw memory cannot stand for: sparse and meta tensors, wrapper subclasses,
  /// other dtypes, devices without a backend. Lazy conjugation and negation are the caller's to ask
  /// for.
  std::optional<TensorInfo> read(PyObject* tensor) const;

  /// While it lives, what is read is about what was read in the trail's last pass.
  class Pass {
   public:
    Pass(TensorReader& reader, Trail& trail) : reader_(reader) {
      trail.begin();
      reader_.trail_ = &trail;
    }
    ~Pass() { reader_.trail_ = nullptr; }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;

   private:
    TensorReader& reader_;
  };
  /// That a pass comes to a dict.
  void note_dict(PyObject* dict) const {
    if (trail_ != nullptr) trail_->note(Trail::Place::of_dict(dict));
  }

  /// Whether a tensor has the same memory as when it was read, of the same kind and layout.
  bool is_as_it_was(PyObject* tensor, const TensorInfo& before) const;

  /// torch's current stream of a CUDA device.
  void* current_stream(Device device) const;

 private:
  bool read_raw(PyObject* tensor, dlpack::Tensor& raw) const;
  std::optional<TensorInfo> read_by_methods(PyObject* tensor) const;

  pybind11::object tensor_type_;
  std::optional<TorchShim> shim_;
  const dlpack::ExchangeApi* exchange_ = nullptr;
  Trail* trail_ = nullptr;
};

}  // namespace fusestep::bindings
