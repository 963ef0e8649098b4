// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Reads tensors, without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "dlpack.h"
#include "fusestep/device.h"
#include "tensor_info.h"
#include "torch_shim.h"
#include "trail.h"

namespace fusestep::bindings {

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

  /// torch's current stream of a CUDA device.
  void* current_stream(Device device) const;

 private:
  std::optional<TensorInfo> read_by_methods(PyObject* tensor) const;

  pybind11::object tensor_type_;
  std::optional<TorchShim> shim_;
  const dlpack::ExchangeApi* exchange_ = nullptr;
  Trail* trail_ = nullptr;
};

}  // namespace fusestep::bindings
