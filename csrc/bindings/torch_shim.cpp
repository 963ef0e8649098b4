// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "torch_shim.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include <cstring>
#include <string>
#include <vector>

#include "found_in_type.h"

namespace py = pybind11;

namespace fusestep::bindings {
namespace {

/// Of the libraries that torch has loaded; null where there is no such function.
void* function_of_torch([[maybe_unused]] const std::string& name) {
#if defined(__unix__) || defined(__APPLE__)
  static void* const library = [] {
    const auto extension = py::module_::import("torch._C").attr("__file__").cast<std::string>();
    return dlopen(extension.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  }();
  return library == nullptr ? nullptr : dlsym(library, name.c_str());
#else
  return nullptr;
#endif
}

template <typename Function>
bool look_up(Function& function, const std::string& name) {
  function = reinterpret_cast<Function>(function_of_torch("aoti_torch_" + name));
  return function != nullptr;
}

bool look_up_constant(std::int32_t& value, const std::string& name) {
  std::int32_t (*function)();
  if (!look_up(function, name)) return false;
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
  look_up(layout_, "get_layout");
  return look_up(device_type_, "get_device_type") && look_up(device_index_, "get_device_index") &&
         look_up(dtype_, "get_dtype") && look_up(dim_, "get_dim") &&
         look_up(storage_offset_, "get_storage_offset") && look_up(sizes_, "get_sizes") &&
         look_up(strides_, "get_strides") && look_up(data_ptr_, "get_data_ptr") &&
         look_up_constant(strided_, "layout_strided") &&
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
  dlpack::Tensor raw;
  if (!read(tensor.ptr(), raw)) return false;
  const std::vector<std::int64_t> shape(raw.shape, raw.shape + raw.ndim);
  const std::vector<std::int64_t> strides(raw.strides, raw.strides + raw.ndim);
  return raw.data != nullptr && shape == tensor.attr("shape").cast<std::vector<std::int64_t>>() &&
         strides == tensor.attr("stride")().cast<std::vector<std::int64_t>>() &&
         reinterpret_cast<std::uintptr_t>(raw.data) ==
             tensor.attr("data_ptr")().cast<std::uintptr_t>();
}

/// The address comes last: torch writes to stderr that a tensor has none, in some of its versions.
/// Where a subclass has no memory, as FakeTensor, torch makes an address of the offset in it alone.
bool TorchShim::read(PyObject* tensor, dlpack::Tensor& raw) const {
  const Handle handle = handle_of(tensor);
  std::int32_t type, dtype;
  std::int64_t dim;
  if (!is_strided(tensor)) return false;
  if (device_type_(handle, &type) != 0 || (type != cpu_ && type != cuda_)) return false;
  raw.device_type = type == cpu_ ? dlpack::kCpu : dlpack::kCuda;
  raw.device_id = 0;
  if (type == cuda_ && device_index_(handle, &raw.device_id) != 0) return false;
  if (dtype_(handle, &dtype) != 0) return false;
  std::size_t i = 0;
  while (i < types_.size() && types_[i] != dtype) ++i;
  if (i == types_.size()) return false;
  raw.dtype = kTorchTypes[i].type;
  if (dim_(handle, &dim) != 0 || sizes_(handle, &raw.shape) != 0 ||
      strides_(handle, &raw.strides) != 0 || data_ptr_(handle, &raw.data) != 0) {
    return false;
  }
  raw.ndim = static_cast<std::int32_t>(dim);
  raw.byte_offset = 0;
  if (Py_IS_TYPE(tensor, tensor_type_)) return true;
  std::int64_t offset;
  if (storage_offset_(handle, &offset) != 0) return false;
  raw.byte_offset = static_cast<std::uint64_t>(offset) * (raw.dtype.bits / 8u);
  raw.data = reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(raw.data) - raw.byte_offset);
  return true;
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
