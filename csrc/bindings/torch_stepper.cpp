// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "torch_stepper.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>

#include "at.h"
#include "fusestep/detail/layout.h"
#include "python_objects.h"
#include "torch_threads.h"

namespace py = pybind11;

namespace fusestep::bindings {
namespace {

bool equal_in(const py::object& a, const py::object& b, PyObject* name) {
  const py::object first = attribute(a.ptr(), name), second = attribute(b.ptr(), name);
  const int answer = PyObject_RichCompareBool(first.ptr(), second.ptr(), Py_EQ);
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

/// What could not be destroyed in a capture; at the end of the process left to it.
std::vector<detail::BorrowedOptimizer>& left_in_captures() {
  static auto* const left = new std::vector<detail::BorrowedOptimizer>;
  return *left;
}

}  // namespace

TorchStepper::TorchStepper(std::string rule, const py::object& tensor_type)
    : rule_(std::move(rule)),
      reader_(tensor_type),
      is_neg_(keys().is_neg),
      is_conj_(keys().is_conj),
      remembered_(reader_) {}

/// Whose steps are in graphs has to wait for the device, at which a capture under way is lost; and
/// the garbage collector asks nobody when it may come.
TorchStepper::~TorchStepper() {
  if (!optimizer_.in_graphs()) return;
  const py::error_scope keeps_the_error;
  try {
    if (is_captured(streams_of_tensors())) {
      left_in_captures().push_back(std::move(optimizer_));
    } else {
      left_in_captures().clear();
    }
  } catch (const std::exception&) {  // as at the end of a process
  }
}

/// Whether torch's current streams are: those of a thread that captures.
bool TorchStepper::is_captured(std::span<const Stream> streams) {
  try {
    return optimizer_.is_captured(streams);
  } catch (const InvalidArgument&) {  // a capture that is invalid, or that the stream must not meet
    return true;
  }
}

/// Memory that stands for its negative or conjugate.
bool TorchStepper::is_lazily_changed(PyObject* tensor, const TensorInfo& info) {
  return is_neg_(tensor) || (info.is_complex && is_conj_(tensor));
}

bool TorchStepper::is_dtensor(PyObject* tensor) const {
  return !dtensor_.is_none() &&
         PyObject_TypeCheck(tensor, reinterpret_cast<PyTypeObject*>(dtensor_.ptr()));
}

/// Of a DTensor the part that is on this rank; of any other tensor itself.
py::object TorchStepper::local(PyObject* tensor) const {
  if (is_dtensor(tensor)) return attribute(tensor, keys().local_tensor);
  return py::reinterpret_borrow<py::object>(tensor);
}

/// Whether the local parts of two tensors are the same elements of the whole. What was found alike
/// at this place of the last step is not compared again.
bool TorchStepper::placed_alike(PyObject* a, PyObject* b) {
  const bool is_part = is_dtensor(a);
  if (is_part != is_dtensor(b)) return false;
  if (!is_part) return true;
  if (compared_ == alike_.size()) alike_.emplace_back();
  auto& known = alike_[compared_++];
  const py::object first = attribute(a, keys().spec), second = attribute(b, keys().spec);
  if (first.is(second) || (known.first.is(first) && known.second.is(second))) return true;
  if (!equal_in(first, second, keys().mesh) || !equal_in(first, second, keys().placements)) {
    return false;
  }
  known = {first, second};
  return true;
}

bool TorchStepper::fill(PyObject* whole_value, PyObject* whole_grad, PyObject* state,
                        detail::BorrowedTensor& tensor) {
  if (!placed_alike(whole_value, whole_grad)) return false;
  const py::object local_value = local(whole_value), local_grad = local(whole_grad);
  PyObject* const value = local_value.ptr();
  PyObject* const grad = local_grad.ptr();
  const auto value_info = reader_.read(value);
  if (!value_info) return false;
  const auto grad_info = reader_.read(grad);
  if (!grad_info) return false;
  if (!value_info->dense() || !grad_info->laid_out_as(*value_info) ||
      grad_info->is_complex != value_info->is_complex) {
    return false;
  }
  tensor.value = value_info->data;
  tensor.grad = grad_info->data;
  tensor.size = value_info->elements;
  tensor.dtype = tensor.slot_dtype = value_info->dtype;
  tensor.grad_dtype = grad_info->dtype;
  tensor.device = value_info->device;
  tensor.steps = true;

  // A real value's memory is asked once; gradients are others at every step.
  const bool known = optimizer_.knows(tensors_.size(), tensor) && !value_info->is_complex;
  if (is_lazily_changed(grad, *grad_info)) return false;
  if (!known && is_lazily_changed(value, *value_info)) return false;

  const GroupKind& kind = detail::at(kinds_, tensor.group);
  if (!fill_state(kind, whole_value, *value_info, state, tensor)) return false;
  const detail::BorrowedGroup& group = detail::at(groups_, tensor.group);
  return detail::find_layout(detail::layout_key(group, tensor)).has_value();
}

/// Slots, master weight and step count, as far as the parameter steps with them.
bool TorchStepper::fill_state(const GroupKind& kind, PyObject* whole_value, const TensorInfo& value,
                              PyObject* state, detail::BorrowedTensor& tensor) {
  const bool may_have_master = size_of(value.dtype) == 2;
  const bool needs_master = may_have_master && kind.master_weights;
  if (state == nullptr) return kind.slot_keys.empty() && !kind.counts && !needs_master;
  reader_.note_dict(state);
  const auto read = [&](PyObject* slot) -> std::optional<TensorInfo> {
    if (!placed_alike(whole_value, slot)) return {};
    const py::object local_slot = local(slot);
    auto info = reader_.read(local_slot.ptr());
    const bool alike = info && info->laid_out_as(value) && info->is_complex == value.is_complex;
    if (!alike || (info->is_complex && is_conj_(local_slot.ptr()))) return {};
    return info;
  };
  for (std::size_t i = 0; i < kind.slot_keys.size(); ++i) {
    PyObject* const slot = find_item(state, kind.slot_keys[i]);
    if (is_none_or_missing(slot)) return false;
    const auto info = read(slot);
    if (!info || (i > 0 && info->dtype != tensor.slot_dtype)) return false;
    tensor.slot_dtype = info->dtype;
    tensor.slot[i] = info->data;
  }
  if (may_have_master) {  // one that is there is stepped, whatever the group says
    PyObject* const master = find_item(state, keys().master_weight);
    if (is_none_or_missing(master) && needs_master) return false;
    if (!is_none_or_missing(master)) {
      const auto info = read(master);
      if (!info || info->dtype != DType::kFloat32) return false;
      tensor.master = info->data;
    }
  }
  if (!kind.counts) return true;
  PyObject* const step = find_item(state, keys().step);
  if (is_none_or_missing(step)) return false;
  const auto step_info = reader_.read(step);
  if (!step_info || step_info->device != tensor.device || step_info->elements != 1 ||
      size_of(step_info->dtype) < 4) {
    return false;
  }
  tensor.step_tensor = step_info->data;
  tensor.step_is_double = step_info->dtype == DType::kFloat64;
  return true;
}

void TorchStepper::take(int position, PyObject* value, PyObject* grad,
                        const detail::BorrowedTensor& tensor) {
  in_order_ = in_order_ && (positions_.empty() || positions_.back() < position);
  tensors_.push_back(tensor);
  positions_.push_back(position);
  ++taken_;
  grads_.push_back(py::reinterpret_borrow<py::object>(grad));
  note_written(value);
  if (writes_grads_) note_written(grad);
}

/// Norms are summed in the order of parameters, not first those that gather() could take.
void TorchStepper::put_in_order() {
  if (in_order_) return;
  std::vector<std::size_t> order(positions_.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return positions_[a] < positions_[b]; });
  std::vector<detail::BorrowedTensor> tensors;
  tensors.reserve(order.size());
  for (const std::size_t at : order) tensors.push_back(tensors_[at]);
  tensors_ = std::move(tensors);
  std::sort(positions_.begin(), positions_.end());
  in_order_ = true;
}

bool TorchStepper::takes_turns() {
  put_in_order();
  return optimizer_.takes_turns(tensors_);
}

void TorchStepper::let_go(bool written) {
  drop(grads_);
  if (written) drop(written_);
}

void TorchStepper::note_written(PyObject* tensor) {
  if (PyList_Append(written_.ptr(), tensor) != 0) throw py::error_already_set();
  if (!is_dtensor(tensor)) return;
  // Its version counter and that of its local tensor are two; graphs are built through both.
  if (PyList_Append(written_.ptr(), local(tensor).ptr()) != 0) throw py::error_already_set();
}

/// A parameter without a gradient is handed over too: who comes and goes leaves the rest in place.
void TorchStepper::rest(std::int32_t group, int position, PyObject* value) {
  const auto info = reader_.read(local(value).ptr());
  if (!info) return;
  detail::BorrowedTensor tensor;
  tensor.group = group;
  tensor.value = info->data;
  tensor.size = info->elements;
  tensor.dtype = tensor.grad_dtype = tensor.slot_dtype = info->dtype;
  tensor.device = info->device;
  tensors_.push_back(tensor);
  positions_.push_back(position);
}

void TorchStepper::take_settings(const py::object& group) {
  if (!PyDict_Check(group.ptr())) throw py::type_error("param_groups must hold dicts");
  groups_.push_back(read_settings(group.ptr(), rule_, reader_));
  const bool lr_on_device = groups_.back().lr_source.present;
  lr_tensors_.push_back(lr_on_device
                            ? py::reinterpret_borrow<py::object>(item(group.ptr(), keys().lr))
                            : py::object());
}

py::list TorchStepper::gather(const py::list& groups, const py::dict& state,
                              const py::object& dtensor, bool writes_grads) {
  const TensorReader::Pass pass(reader_, gathered_);
  AttributeOf grad_of(keys().grad);
  dtensor_ = dtensor;
  writes_grads_ = writes_grads;
  groups_.clear();
  kinds_.clear();
  tensors_.clear();
  positions_.clear();
  in_order_ = true;
  drop(lr_tensors_);
  taken_ = 0;
  compared_ = 0;
  remembered_.overlook();
  steps_again_ = false;
  devices_are_known_ = false;
  can_store_grads_.reset();
  let_go(true);
  py::list unready;
  int position = 0;  // among all parameters
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const py::object group = groups[i];
    take_settings(group);
    kinds_.push_back(read_kind(group.ptr(), rule_, groups_.back(), position));

    const auto params = py::reinterpret_steal<py::object>(
        PySequence_Fast(item(group.ptr(), keys().params), "params must be a list"));
    if (!params) throw py::error_already_set();
    for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(params.ptr()); ++j, ++position) {
      // Held: torch may let other threads run meanwhile, and one may change the list.
      const auto held =
          py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(params.ptr(), j));
      PyObject* const value = held.ptr();
      const py::object grad = grad_of(value);
      if (grad.is_none()) {
        rest(static_cast<std::int32_t>(i), position, value);
        continue;
      }
      detail::BorrowedTensor tensor;
      tensor.group = static_cast<std::int32_t>(i);
      tensor.noise_seed = kinds_.back().noise_seed_of(position);
      tensor.buffer_filled = true;
      const bool ready = !kinds_.back().differentiable &&
                         fill(value, grad.ptr(), state_of(state.ptr(), value), tensor);
      if (ready) {
        take(position, value, grad.ptr(), tensor);
      } else {
        unready.append(py::make_tuple(i, position, py::handle(value)));
      }
    }
  }
  return unready;
}

bool TorchStepper::add(int group, int position, const py::object& value, const py::object& grad,
                       const py::dict& state, bool fresh) {
  detail::BorrowedTensor tensor;
  tensor.group = group;
  tensor.noise_seed = kinds_.at(static_cast<std::size_t>(group)).noise_seed_of(position);
  tensor.buffer_filled = !fresh;
  if (!fill(value.ptr(), grad.ptr(), state.ptr(), tensor)) return false;
  devices_are_known_ = false;
  can_store_grads_.reset();
  take(position, value.ptr(), grad.ptr(), tensor);
  return true;
}

bool TorchStepper::remember(const py::list& groups, const py::list& places, const py::dict& state) {
  if (takes_turns()) {
    forget();
    return false;
  }
  std::vector<std::vector<PyObject*>> state_keys;
  for (const GroupKind& kind : kinds_) state_keys.push_back(kind.state_keys());
  return remembered_.see(groups, places, state, state_keys);
}

void TorchStepper::forget() { remembered_.forget(); }

bool TorchStepper::is_unchanged(const py::list& groups, bool writes_grads, bool looks_at_all) {
  steps_again_ = false;
  if (!remembered_.knows(groups) || writes_grads != writes_grads_) return false;
  const TensorReader::Pass pass(reader_, looked_at_);
  groups_.clear();
  drop(lr_tensors_);
  AttributeOf grad_of(keys().grad);
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const py::object group = groups[i];
    take_settings(group);
    PyObject* const params = item(group.ptr(), keys().params);
    if (!remembered_.is_list_of(i, params) ||
        read_kind(group.ptr(), rule_, groups_.back(), kinds_[i].first) != kinds_[i] ||
        !remembered_.is_there(i, params, looks_at_all, grad_of)) {
      return false;
    }
  }
  steps_again_ = true;
  return true;
}

py::object TorchStepper::strays(const py::list& groups) const {
  if (!holds_same(groups)) return py::none();
  return remembered_.strays();
}

bool TorchStepper::holds_same(const py::list& groups) const {
  return remembered_.holds_same(groups);
}

int TorchStepper::visit(visitproc visit, void* arg) const {
  Py_VISIT(written_.ptr());
  for (const py::object& grad : grads_) Py_VISIT(grad.ptr());
  for (const py::object& lr : lr_tensors_) Py_VISIT(lr.ptr());
  return remembered_.visit(visit, arg);
}

void TorchStepper::clear() {
  forget();
  drop(lr_tensors_);
  drop(grads_);
  drop(written_);
}

bool TorchStepper::can_store_grads() {
  if (!can_store_grads_) can_store_grads_ = optimizer_.can_store_grads(groups_, tensors_);
  return *can_store_grads_;
}

/// Found anew where tensors were.
const std::vector<std::vector<Device>>& TorchStepper::devices_of_groups() {
  if (devices_are_known_) return devices_;
  devices_.assign(kinds_.size(), {});
  for (const detail::BorrowedTensor& tensor : tensors_) {
    std::vector<Device>& devices = detail::at(devices_, tensor.group);
    if (std::find(devices.begin(), devices.end(), tensor.device) == devices.end()) {
      devices.push_back(tensor.device);
    }
  }
  devices_are_known_ = true;
  return devices_;
}

/// A learning rate on one device for parameters on another is read here.
void TorchStepper::read_foreign_lr() {
  const std::vector<std::vector<Device>>& devices = devices_of_groups();
  for (std::size_t i = 0; i < std::min(groups_.size(), devices.size()); ++i) {  // others are gone
    detail::BorrowedGroup& group = groups_[i];
    const auto is_foreign = [&](Device device) { return group.lr_source.device != device; };
    if (!group.lr_source.present || std::none_of(devices[i].begin(), devices[i].end(), is_foreign))
      continue;
    const double lr = number(lr_tensors_[i].ptr());
    std::visit([&](auto& hyper) { hyper.lr = lr; }, group.hyper);
    group.lr_source = {};
  }
}

/// torch's current one.
void TorchStepper::add_stream(Device device, std::vector<Stream>& streams) const {
  const auto known = [&](const Stream& stream) { return stream.device == device; };
  if (!device.is_cuda() || std::any_of(streams.begin(), streams.end(), known)) return;
  streams.emplace_back(device, reader_.current_stream(device));
}

std::vector<Stream> TorchStepper::streams_of_tensors() {
  std::vector<Stream> streams;
  for (const std::vector<Device>& devices : devices_of_groups()) {
    for (const Device device : devices) add_stream(device, streams);
  }
  return streams;
}

void TorchStepper::sync_hyper(const py::list& groups) {
  groups_.clear();
  drop(lr_tensors_);
  for (const py::handle group : groups) take_settings(py::reinterpret_borrow<py::object>(group));
  read_foreign_lr();
  const std::vector<Stream> streams = streams_of_tensors();
  const py::gil_scoped_release release;
  optimizer_.sync_hyper(groups_, streams);
}

TensorView TorchStepper::scalar(const char* name, const py::object& tensor) const {
  if (tensor.is_none()) return {};
  const auto info = reader_.read(tensor.ptr());
  if (!info || info->elements != 1 || size_of(info->dtype) < 4) {
    throw py::value_error(std::string(name) + " must be one number of float32 or float64");
  }
  return {info->data, info->dtype, {}, info->device, true};
}

void TorchStepper::step(const py::object& found_inf, const py::object& loss_scale,
                        bool store_unscaled_grads, const py::object& grad_multiplier,
                        const py::object& max_grad_norm, const py::object& clip_value,
                        bool skip_nonfinite) {
  StepOptions options;
  options.loss_scale_source = scalar("the loss scale", loss_scale);
  options.grad_multiplier_source = scalar("the multiplier of gradients", grad_multiplier);
  options.store_unscaled_grads = store_unscaled_grads;
  options.measure_grad_norm = !max_grad_norm.is_none();
  if (!max_grad_norm.is_none()) options.max_grad_norm = number(max_grad_norm.ptr());
  if (!clip_value.is_none()) options.clip_value = number(clip_value.ptr());
  options.skip_nonfinite = skip_nonfinite;
  if (!found_inf.is_none()) {
    const bool is_number = PyFloat_Check(found_inf.ptr()) || PyLong_Check(found_inf.ptr());
    const auto info = is_number ? std::nullopt : reader_.read(found_inf.ptr());
    if (info && info->elements == 1 && size_of(info->dtype) >= 4) {
      options.skip_source = {info->data, info->dtype, {}, info->device, true};
    } else {
      options.skip = number(found_inf.ptr()) != 0;
    }
  }
  read_foreign_lr();
  std::vector<Stream> streams = streams_of_tensors();
  for (const TensorView* source :
       {&options.skip_source, &options.loss_scale_source, &options.grad_multiplier_source}) {
    if (source->present) add_stream(source->device, streams);
  }
  options.streams = streams;
  if (!left_in_captures().empty() && !is_captured(streams)) left_in_captures().clear();
  stepped_ = taken_;
  follow_torch_in_this_thread();
  const py::gil_scoped_release release;
  put_in_order();
  if (steps_again_) {
    optimizer_.step_again(groups_, options);
  } else {
    optimizer_.step(groups_, tensors_, options);
  }
}

bool TorchStepper::copy_grad_norm(const py::object& to) {
  const TensorView view = scalar("the tensor for the norm", to);
  std::vector<Stream> streams;
  if (view.device.is_cuda()) streams.emplace_back(view.device, reader_.current_stream(view.device));
  return optimizer_.copy_grad_norm(view, streams);
}

std::int64_t TorchStepper::skipped_steps() {
  const py::gil_scoped_release release;
  return optimizer_.skipped_steps();
}

}  // namespace fusestep::bindings
