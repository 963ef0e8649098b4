// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "torch_shim.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "found_in_type.h"
#include "torch_library.h"

namespace py = pybind11;

namespace fusestep::bindings {
namespace {

template <typename Function>
bool look_up_shim(Function*& function, const std::string& name) {
  return look_up(function, "aoti_torch_" + name);
}

bool look_up_constant(std::int32_t& value, const std::string& name) {
  std::int32_t (*function)();
  if (!look_up_shim(function, name)) return false;
  value = function();
  return true;
}

/// Where a tensor's Python object has the address that Python calls _cdata; 0 if nowhere.
std::size_t find_handle(const py::object& tensor) {
  const auto impl = tensor.attr("_cdata").cast<std::uintptr_t>();
  const auto* const object = reinterpret_cast<const char*>(tensor.ptr());
  const auto size = static_cast<std::size_t>(Py_TYPE(tensor.ptr())->tp_basicsize);
  for (std::size_t at = sizeof(PyObject); at + sizeof impl <= size; at += sizeof impl) {
    if (std::memcmp(object + at, &impl, sizeof impl) == 0) return at;
  }
  return 0;
}

}  // namespace

bool TorchShim::find_functions() {
  for (std::size_t i = 0; i < kTorchTypes.size(); ++i) {
    if (!look_up_constant(types_[i], std::string("dtype_") + kTorchTypes[i].name)) return false;
  }
  look_up_shim(layout_, "get_layout");
  return look_up_shim(device_type_, "get_device_type") &&
         look_up_shim(device_index_, "get_device_index") && look_up_shim(dtype_, "get_dtype") &&
         look_up_shim(dim_, "get_dim") && look_up_shim(storage_offset_, "get_storage_offset") &&
         look_up_shim(sizes_, "get_sizes") && look_up_shim(strides_, "get_strides") &&
         look_up_shim(data_ptr_, "get_data_ptr") && look_up_constant(strided_, "layout_strided") &&
         look_up_constant(cpu_, "device_type_cpu") && look_up_constant(cuda_, "device_type_cuda");
}

std::optional<TorchShim> TorchShim::find(const py::object& tensor_type) {
  static std::optional<TorchShim> found;  // guarded by the GIL
  if (!py::hasattr(tensor_type, "_cdata")) return {};
  if (found && found->tensor_type_ == reinterpret_cast<PyTypeObject*>(tensor_type.ptr())) {
    return found;
  }
  const py::object sample = tensor_type(2, 3);
  TorchShim shim;
  shim.tensor_type_ = reinterpret_cast<PyTypeObject*>(py::object(tensor_type).release().ptr());
  shim.name_of_layout_ = PyUnicode_InternFromString("layout");
  shim.strided_layout_ = py::object(py::module_::import("torch").attr("strided")).release().ptr();
  shim.handle_offset_ = find_handle(sample);
  if (shim.handle_offset_ == 0 || !shim.find_functions() || !shim.agrees_on(sample)) return {};
  found = shim;
  return found;
}

bool TorchShim::agrees_on(const py::object& tensor) const {
  const auto info = read(tensor.ptr());
  if (!info) return false;
  const std::vector<std::int64_t> shape(info->shape, info->shape + info->ndim);
  const std::vector<std::int64_t> strides(info->strides, info->strides + info->ndim);
  return shape == tensor.attr("shape").cast<std::vector<std::int64_t>>() &&
         strides == tensor.attr("stride")().cast<std::vector<std::int64_t>>() &&
         reinterpret_cast<std::uintptr_t>(info->data) ==
             tensor.attr("data_ptr")().cast<std::uintptr_t>();
}

/// The address comes last: torch writes to stderr that a tensor has none, in some of its versions.
/// Where a subclass has no memory, as FakeTensor, torch makes an address of the offset in it alone.
std::optional<TensorInfo> TorchShim::read(PyObject* tensor) const {
  const Handle handle = handle_of(tensor);
  std::int32_t kind, index = 0;
  if (!is_strided(tensor)) return {};
  if (device_type_(handle, &kind) != 0 || (kind != cpu_ && kind != cuda_)) return {};
  if (kind == cuda_ && device_index_(handle, &index) != 0) return {};
  const TorchType* const type = type_of(handle);
  if (type == nullptr) return {};
  TensorInfo info;
  std::int64_t dim, offset = 0;
  std::int64_t *shape, *strides;
  if (dim_(handle, &dim) != 0 || sizes_(handle, &shape) != 0 || strides_(handle, &strides) != 0 ||
      data_ptr_(handle, &info.data) != 0) {
    return {};
  }
  info.ndim = static_cast<int>(dim);
  info.shape = shape;
  info.strides = strides;
  if (!Py_IS_TYPE(tensor, tensor_type_)) {
    if (storage_offset_(handle, &offset) != 0) return {};
    const auto address = reinterpret_cast<std::uintptr_t>(info.data);
    if (address == static_cast<std::uintptr_t>(offset) * type->size()) info.data = nullptr;
  }
  if (!complete(info, *type, kind == cuda_, index)) return {};
  return info;
}

const TorchType* TorchShim::type_of(Handle handle) const {
  std::int32_t dtype;
  if (dtype_(handle, &dtype) != 0) return nullptr;
  const auto found = std::find(types_.begin(), types_.end(), dtype);
  return found == types_.end() ? nullptr
                               : &kTorchTypes[static_cast<std::size_t>(found - types_.begin())];
}

bool TorchShim::is_strided(PyObject* tensor) const {
  if (layout_ == nullptr) return attribute(tensor, name_of_layout_).ptr() == strided_layout_;
  std::int32_t layout;
  return layout_(handle_of(tensor), &layout) == 0 && layout == strided_;
}

const char* TorchShim::impl_of(PyObject* tensor) const {
  const char* impl;
  std::memcpy(&impl, handle_of(tensor), sizeof impl);
  return impl;
}

}  // namespace fusestep::bindings
