// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "tensor_reader.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

#include "torch_device.h"

namespace py = pybind11;

namespace fusestep::bindings {
namespace {

struct RealType {
  fusestep::DType dtype;
  int per_element;  // 2 for complex numbers
};

std::optional<RealType> real_type(dlpack::DType type) {
  if (type.lanes != 1) return {};
  if (type.code == dlpack::kFloat && type.bits == 32) return {{fusestep::DType::kFloat32, 1}};
  if (type.code == dlpack::kFloat && type.bits == 64) return {{fusestep::DType::kFloat64, 1}};
  if (type.code == dlpack::kFloat && type.bits == 16) return {{fusestep::DType::kFloat16, 1}};
  if (type.code == dlpack::kBfloat && type.bits == 16) return {{fusestep::DType::kBFloat16, 1}};
  if (type.code == dlpack::kComplex && type.bits == 64) return {{fusestep::DType::kFloat32, 2}};
  if (type.code == dlpack::kComplex && type.bits == 128) return {{fusestep::DType::kFloat64, 2}};
  return {};
}

std::optional<dlpack::DType> type_named(const std::string& name) {
  if (name == "torch.float32") return {{dlpack::kFloat, 32, 1}};
  if (name == "torch.float64") return {{dlpack::kFloat, 64, 1}};
  if (name == "torch.float16") return {{dlpack::kFloat, 16, 1}};
  if (name == "torch.bfloat16") return {{dlpack::kBfloat, 16, 1}};
  if (name == "torch.complex64") return {{dlpack::kComplex, 64, 1}};
  if (name == "torch.complex128") return {{dlpack::kComplex, 128, 1}};
  return {};
}

std::int64_t count(RealType type, const std::int64_t* shape, int ndim) {
  std::int64_t elements = type.per_element;
  for (int i = 0; i < ndim; ++i) elements *= shape[i];
  return elements;
}

std::optional<TensorInfo> info_of(const dlpack::Tensor& raw) {
  const auto type = real_type(raw.dtype);
  if (!type) return {};
  const auto device = device_of(raw);
  if (!device) return {};
  return TensorInfo{static_cast<char*>(raw.data) + raw.byte_offset,
                    count(*type, raw.shape, raw.ndim),
                    type->dtype,
                    type->per_element == 2,
                    *device,
                    raw.ndim,
                    raw.shape,
                    raw.strides};
}

}  // namespace

bool TensorInfo::dense() const {
  if (elements == 0) return true;
  std::int64_t expected = 1;
  bool contiguous = true;
  for (int i = ndim - 1; i >= 0; --i) {
    contiguous = contiguous && (shape[i] == 1 || strides[i] == expected);
    expected *= shape[i];
  }
  if (contiguous) return true;
  std::vector<int> order(static_cast<std::size_t>(ndim));
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](int i) { return shape[i] == 1; });
  std::sort(order.begin(), order.end(), [&](int a, int b) { return strides[a] < strides[b]; });
  expected = 1;
  for (const int i : order) {
    if (strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

bool TensorInfo::laid_out_as(const TensorInfo& other) const {
  if (ndim != other.ndim || elements != other.elements || device != other.device) return false;
  for (int i = 0; i < ndim; ++i) {
    if (shape[i] != other.shape[i]) return false;
    if (shape[i] != 1 && elements != 0 && strides[i] != other.strides[i]) return false;
  }
  return true;
}

TensorInfo TensorInfo::kept() const {
  TensorInfo copy{data, elements, dtype, is_complex, device, ndim, nullptr, nullptr};
  copy.owned.reserve(2 * static_cast<std::size_t>(ndim));
  copy.owned.assign(shape, shape + ndim);
  copy.owned.insert(copy.owned.end(), strides, strides + ndim);
  copy.shape = copy.owned.data();
  copy.strides = copy.shape + ndim;
  return copy;
}

TensorReader::TensorReader(const py::object& tensor_type) {
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
  auto* header = static_cast<dlpack::ExchangeApi::Header*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->major != 1) header = header->previous;
  api_ = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  if (api_ != nullptr && api_->tensor_from_py_object == nullptr) api_ = nullptr;
}

std::optional<TensorInfo> TensorReader::read(PyObject* tensor) const {
  trail_.touch(tensor);
  std::optional<TensorInfo> info =
      api_ != nullptr ? read_by_exchange(tensor) : read_by_methods(tensor);
  // A wrapper subclass (DTensor) has elements and no memory, and nothing warns of it.
  if (info && info->data == nullptr && info->elements != 0) return {};
  return info;
}

std::optional<TensorInfo> TensorReader::read_by_exchange(PyObject* tensor) const {
  dlpack::Tensor raw;
  if (api_->tensor_from_py_object(tensor, &raw) != 0) {
    PyErr_Clear();
    return {};
  }
  return info_of(raw);
}

bool TensorReader::is_as_it_was(PyObject* tensor, const TensorInfo& before) const {
  if (api_ == nullptr) {
    const auto now = read_by_methods(tensor);
    return now && now->data == before.data && now->dtype == before.dtype &&
           now->is_complex == before.is_complex && now->laid_out_as(before);
  }
  dlpack::Tensor now;
  if (api_->tensor_from_py_object(tensor, &now) != 0) {
    PyErr_Clear();
    return false;
  }
  const auto type = real_type(now.dtype);
  if (static_cast<char*>(now.data) + now.byte_offset != before.data || now.ndim != before.ndim ||
      !type || type->dtype != before.dtype || (type->per_element == 2) != before.is_complex) {
    return false;
  }
  for (int i = 0; i < now.ndim; ++i) {
    if (now.shape[i] != before.shape[i] || now.strides[i] != before.strides[i]) return false;
  }
  return true;
}

std::optional<TensorInfo> TensorReader::read_by_methods(PyObject* object) const {
  const auto tensor = py::reinterpret_borrow<py::object>(object);
  const auto type = type_named(std::string(py::str(tensor.attr("dtype"))));
  const py::object device = tensor.attr("device");
  const std::string kind = py::str(device.attr("type"));
  const bool strided = py::str(tensor.attr("layout")).cast<std::string>() == "torch.strided";
  if (!type || !strided || (kind != "cpu" && kind != "cuda")) return {};
  auto extents = tensor.attr("shape").cast<std::vector<std::int64_t>>();
  const auto strides = tensor.attr("stride")().cast<std::vector<std::int64_t>>();
  const int ndim = static_cast<int>(extents.size());
  extents.insert(extents.end(), strides.begin(), strides.end());
  const bool on_cuda = kind == "cuda";
  auto info = info_of({reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>()),
                       on_cuda ? dlpack::kCuda : dlpack::kCpu,
                       on_cuda ? device.attr("index").cast<std::int32_t>() : 0, ndim, *type,
                       extents.data(), extents.data() + ndim, 0});
  if (info) info->owned = std::move(extents);  // a move leaves the elements where they are
  return info;
}

void* TensorReader::current_stream(Device device) const {
  return bindings::current_stream(api_, device);
}

}  // namespace fusestep::bindings
