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
  for (const TorchType& known : kTorchTypes) {
    if (name == std::string("torch.") + known.name) return known.type;
  }
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
  const std::int64_t elements = count(*type, raw.shape, raw.ndim);
  // A wrapper subclass (DTensor) has elements and no memory, and nothing warns of it.
  if (raw.data == nullptr && elements != 0) return {};
  const auto device = device_of(raw);
  if (!device) return {};
  return TensorInfo{static_cast<char*>(raw.data) + raw.byte_offset,
                    elements,
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

TensorReader::TensorReader(const py::object& tensor_type)
    : tensor_type_(tensor_type), shim_(TorchShim::find(tensor_type)) {
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
  auto* header = static_cast<dlpack::ExchangeApi::Header*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->major != 1) header = header->previous;
  exchange_ = reinterpret_cast<const dlpack::ExchangeApi*>(header);
}

std::optional<TensorInfo> TensorReader::read(PyObject* tensor) const {
  if (!PyObject_TypeCheck(tensor, reinterpret_cast<PyTypeObject*>(tensor_type_.ptr()))) return {};
  if (!shim_) return read_by_methods(tensor);
  dlpack::Tensor raw;
  return read_raw(tensor, raw) ? info_of(raw) : std::nullopt;
}

bool TensorReader::read_raw(PyObject* tensor, dlpack::Tensor& raw) const {
  if (trail_ != nullptr) trail_->ask_ahead();
  if (!shim_->read(tensor, raw)) return false;
  if (trail_ != nullptr) trail_->note(Trail::Place::of_tensor(tensor, shim_->impl_of(tensor)));
  return true;
}

bool TensorReader::is_as_it_was(PyObject* tensor, const TensorInfo& before) const {
  if (!shim_) {
    const auto now = read_by_methods(tensor);
    return now && now->data == before.data && now->dtype == before.dtype &&
           now->is_complex == before.is_complex && now->laid_out_as(before);
  }
  dlpack::Tensor now;
  if (!read_raw(tensor, now)) return false;
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
  const auto address = tensor.attr("data_ptr")().cast<std::uintptr_t>();
  const auto offset = tensor.attr("storage_offset")().cast<std::uintptr_t>() * (type->bits / 8u);
  auto info =
      info_of({reinterpret_cast<void*>(address - offset), on_cuda ? dlpack::kCuda : dlpack::kCpu,
               on_cuda ? device.attr("index").cast<std::int32_t>() : 0, ndim, *type, extents.data(),
               extents.data() + ndim, offset});
  if (info) info->owned = std::move(extents);  // a move leaves the elements where they are
  return info;
}

void* TensorReader::current_stream(Device device) const {
  return bindings::current_stream(exchange_, device);
}

}  // namespace fusestep::bindings
