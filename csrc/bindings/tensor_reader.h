// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Where a torch.Tensor's memory is and how it is laid out, without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
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
  /// One whose shape and strides are its own.
  TensorInfo kept() const;
};

/// Where reading went the last time, to ask for the same memory before it comes to it again. Hints
/// alone: nothing is read through what is remembered, so that it may be out of date.
class Trail {
 public:
  void begin() {
    before_.swap(now_);
    now_.clear();
    is_followed_ = true;
  }
  void end() { is_followed_ = false; }
  void touch(PyObject* tensor) {
    if (!is_followed_) return;
    const std::size_t ahead = now_.size() + kAhead;
    if (ahead < before_.size()) before_[ahead].prefetch();
    now_.push_back(Place::of(tensor));
  }

 private:
  static constexpr std::size_t kAhead = 24;  // tensors: those of five parameters of Adam's

  /// A Python object, and what its first fields point to: torch has the tensor there.
  struct Place {
    const void* object;
    const void* fields[2];

    static Place of(PyObject* tensor) {
      Place place{tensor, {}};
      const auto size = static_cast<std::size_t>(Py_TYPE(tensor)->tp_basicsize);
      if (size >= sizeof(PyObject) + sizeof place.fields) {
        std::memcpy(place.fields, tensor + 1, sizeof place.fields);
      }
      return place;
    }
    void prefetch() const {
      __builtin_prefetch(object);
      for (const void* field : fields) {
        for (int line = 0; line < 3; ++line) {
          __builtin_prefetch(static_cast<const char*>(field) + 64 * line);
        }
      }
    }
  };

  std::vector<Place> before_, now_;
  bool is_followed_ = false;
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

  /// What is read while it lives is about what was read in the pass before.
  class Pass {
   public:
    explicit Pass(const TensorReader& reader) : trail_(reader.trail_) { trail_.begin(); }
    ~Pass() { trail_.end(); }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;

   private:
    Trail& trail_;
  };

  /// Whether a tensor has the same memory as when it was read, of the same kind and layout.
  bool is_as_it_was(PyObject* tensor, const TensorInfo& before) const;

  /// torch's current stream of a CUDA device.
  void* current_stream(Device device) const;

 private:
  std::optional<TensorInfo> read_by_exchange(PyObject* tensor) const;
  std::optional<TensorInfo> read_by_methods(PyObject* tensor) const;

  const dlpack::ExchangeApi* api_ = nullptr;
  mutable Trail trail_;
};

}  // namespace fusestep::bindings
