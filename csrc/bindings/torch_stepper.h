// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// One step of a torch optimizer: reads param_groups and state as they are now, and hands addresses
// to the engine. What it cannot take on raw memory it returns to Python.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "borrowed.h"
#include "found_in_type.h"
#include "group_reader.h"
#include "remembered_step.h"
#include "tensor_reader.h"

namespace fusestep::bindings {

class TorchStepper {
 public:
  /// `rule`: "Adam", "SGD" or "RMSprop".
  TorchStepper(std::string rule, const pybind11::object& tensor_type);
  ~TorchStepper();
  TorchStepper(const TorchStepper&) = delete;
  TorchStepper& operator=(const TorchStepper&) = delete;

  /// Reads all groups, and takes every parameter with a gradient whose memory can be stepped as it
  /// is. Returns (group index, position among all, parameter) of the others: state is missing or
  /// elsewhere, the memory is not dense and of one layout, or the group is differentiable.
  /// `dtensor`: torch's class of that name, or None; of its tensors the local parts are stepped,
  /// where all are placed alike. `writes_grads`: the step will store gradients.
  pybind11::list gather(const pybind11::list& groups, const pybind11::dict& state,
                        const pybind11::object& dtensor, bool writes_grads);

  /// Takes one parameter more; false if it cannot be stepped as it is. `fresh`: its momentum buffer
  /// holds nothing yet.
  bool add(int group, int position, const pybind11::object& value, const pybind11::object& grad,
           const pybind11::dict& state, bool fresh);

  /// After a step that took everything: whether all gradients are in place, `places` having the
  /// tensor that each parameter's is to be, or None. Then is_unchanged() may be asked. What the
  /// step has found in `state` lives until the next remember(), or forget().
  bool remember(const pybind11::list& groups, const pybind11::list& places,
                const pybind11::dict& state);
  void forget();
  /// Whether step() may be called again without another gather(): the groups hold the same
  /// parameters with settings for the same kernels. `looks_at_all`: and every gradient and value is
  /// where it was; otherwise the first and the last of each group are looked at. That state holds
  /// the same tensors is the caller's to know; reading their addresses would double the cost.
  bool is_unchanged(const pybind11::list& groups, bool writes_grads, bool looks_at_all);
  /// Parameters whose gradient is not what remember() has seen, or that require none, among those
  /// that have one. None where the groups are others, or nothing is remembered.
  pybind11::object strays(const pybind11::list& groups) const;
  /// Whether the groups hold the parameters that remember() has seen.
  bool holds_same(const pybind11::list& groups) const;

  /// Of what was taken: see BorrowedOptimizer.
  bool takes_turns();
  bool can_store_grads();

  /// Steps what was taken. `found_inf` is None, a number or a tensor: not 0 changes nothing.
  /// `loss_scale` and `grad_multiplier` are None or tensors of one float32 or float64;
  /// `max_grad_norm` and `clip_value` None or numbers.
  void step(const pybind11::object& found_inf, const pybind11::object& loss_scale,
            bool store_unscaled_grads, const pybind11::object& grad_multiplier,
            const pybind11::object& max_grad_norm, const pybind11::object& clip_value,
            bool skip_nonfinite);

  /// The norm of the last step to a tensor of one float64, without waiting; false where that step
  /// has measured none on its device.
  bool copy_grad_norm(const pybind11::object& to);
  std::int64_t skipped_steps();

  /// Brings settings that have changed since the last step to the devices, for graphs.
  void sync_hyper(const pybind11::list& groups);

  /// Ends a step, made or not: gradients are no longer held, nor, with `written`, what it has
  /// written.
  void let_go(bool written);

  /// For Python's garbage collector: the tensors that live as long as this, which may refer back to
  /// their optimizer; and letting go of them, after which the next step looks at everything.
  int visit(visitproc visit, void* arg) const;
  void clear();

  /// Tensors whose values the step writes: what autograd has to be told of.
  const pybind11::list& written() const { return written_; }

  /// Parameters that the last step moved, and steps taken: a test's proof of who stepped.
  int stepped() const { return stepped_; }
  std::int64_t steps() const { return optimizer_.steps(); }
  bool reads_through_shim() const { return reader_.has_shim(); }

 private:
  bool is_dtensor(PyObject* tensor) const;
  pybind11::object local(PyObject* tensor) const;
  bool placed_alike(PyObject* a, PyObject* b);
  bool fill(PyObject* whole_value, PyObject* whole_grad, PyObject* state,
            detail::BorrowedTensor& tensor);
  bool fill_state(const GroupKind& kind, PyObject* whole_value, const TensorInfo& value,
                  PyObject* state, detail::BorrowedTensor& tensor);
  bool is_lazily_changed(PyObject* tensor, const TensorInfo& info);
  void take_settings(const pybind11::object& group);
  void rest(std::int32_t group, int position, PyObject* value);
  void take(int position, PyObject* value, PyObject* grad, const detail::BorrowedTensor& tensor);
  void put_in_order();
  void note_written(PyObject* tensor);
  bool is_captured(std::span<const Stream> streams);
  const std::vector<std::vector<Device>>& devices_of_groups();
  TensorView scalar(const char* name, const pybind11::object& tensor) const;
  void read_foreign_lr();
  void add_stream(Device device, std::vector<Stream>& streams) const;
  std::vector<Stream> streams_of_tensors();

  std::string rule_;
  TensorReader reader_;
  Trail gathered_, looked_at_;  // of gather() and is_unchanged()
  AnswerOf is_neg_, is_conj_;
  detail::BorrowedOptimizer optimizer_;
  std::vector<GroupKind> kinds_;
  std::vector<detail::BorrowedGroup> groups_;
  std::vector<detail::BorrowedTensor> tensors_;
  std::vector<int> positions_;                // of tensors_, among all parameters
  bool in_order_ = true;                      // of their positions
  std::vector<pybind11::object> lr_tensors_;  // by group, where the lr is read on the device
  pybind11::object dtensor_ = pybind11::none();
  std::vector<std::pair<pybind11::object, pybind11::object>> alike_;  // specs of DTensors
  std::size_t compared_ = 0;
  RememberedStep remembered_;
  bool steps_again_ = false;                  // tensors_ are those of the last step
  std::vector<std::vector<Device>> devices_;  // of tensors_, by group
  bool devices_are_known_ = false;
  std::optional<bool> can_store_grads_;  // tensors_
  pybind11::list written_;
  std::vector<pybind11::object> grads_;  // of taken tensors: another thread may drop them meanwhile
  bool writes_grads_ = false;
  int taken_ = 0;
  int stepped_ = 0;
};

}  // namespace fusestep::bindings
