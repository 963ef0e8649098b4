// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "tensor_reader.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "torch_device.h"

namespace py = pybind11;

namespace fusestep::bindings {
namespace {

const TorchType* type_named(const std::string& name) {
  const auto is_it = [&](const TorchType& type) {
    return name == std::string("torch.") + type.name;
  };
  const auto found = std::find_if(kTorchTypes.begin(), kTorchTypes.end(), is_it);
  return found == kTorchTypes.end() ? nullptr : &*found;
}

}  // namespace

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
  if (trail_ != nullptr) trail_->ask_ahead();
  auto info = shim_->read(tensor);
  if (info && trail_ != nullptr) {
    trail_->note(Trail::Place::of_tensor(tensor, shim_->impl_of(tensor)));
  }
  return info;
}

std::optional<TensorInfo> TensorReader::read_by_methods(PyObject* object) const {
  const auto tensor = py::reinterpret_borrow<py::object>(object);
  const TorchType* const type = type_named(py::str(tensor.attr("dtype")));
  const py::object device = tensor.attr("device");
  const std::string kind = py::str(device.attr("type"));
  const bool strided = py::str(tensor.attr("layout")).cast<std::string>() == "torch.strided";
  if (type == nullptr || !strided || (kind != "cpu" && kind != "cuda")) return {};
  TensorInfo info;
  info.owned = tensor.attr("shape").cast<std::vector<std::int64_t>>();
  info.ndim = static_cast<int>(info.owned.size());
  const auto strides = tensor.attr("stride")().cast<std::vector<std::int64_t>>();
  info.owned.insert(info.owned.end(), strides.begin(), strides.end());
  info.shape = info.owned.data();
  info.strides = info.shape + info.ndim;
  const auto address = tensor.attr("data_ptr")().cast<std::uintptr_t>();
  const auto offset = tensor.attr("storage_offset")().cast<std::uintptr_t>() * type->size();
  if (address != offset) info.data = reinterpret_cast<void*>(address);
  const bool on_cuda = kind == "cuda";
  const int index = on_cuda ? device.attr("index").cast<int>() : 0;
  if (!complete(info, *type, on_cuda, index)) return {};
  return info;  // a move leaves the elements of `owned` where they are
}

void* TensorReader::current_stream(Device device) const {
  return bindings::current_stream(exchange_, device);
}

}  // namespace fusestep::bindings
