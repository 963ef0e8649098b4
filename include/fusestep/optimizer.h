// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The optimizer: parameter groups, their state, and the step.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fusestep/device.h"
#include "fusestep/error.h"
#include "fusestep/export.h"
#include "fusestep/hyper.h"
#include "fusestep/shard.h"
#include "fusestep/state_dict.h"
#include "fusestep/tensor_view.h"

namespace fusestep {

/// A parameter as it is handed in. The memory is the caller's and must outlive its use here.
struct Parameter {
  std::string name;  ///< unique in the optimizer
  TensorView value;
  TensorView grad = {};  ///< absent: skipped by every step until set_grad()
  /// Set: value and gradient are a part of a tensor that other processes have the rest of. State is
  /// saved and found as that of the whole tensor.
  std::optional<Shard> shard = {};
};

/// The dtype of slots. Those of float64 parameters are float64 with either of the first two.
enum class SlotDType : std::uint8_t {
  kFloat32,        ///< moments keep what a 16-bit type would round away
  kLikeParameter,  ///< torch's convention
  kBFloat16        ///< of float32 and bfloat16 parameters
};

/// How a result is rounded to a 16-bit type.
enum class Rounding : std::uint8_t {
  kNearest,    ///< to nearest, ties to even
  kStochastic  ///< to either neighbour, the nearer the likelier, so that small updates are not lost
};

struct GroupOptions {
  SlotDType slots = SlotDType::kFloat32;
  /// Of bf16 and fp16 parameters a float32 copy is stepped, in the slot "master_weight", and the
  /// parameter is that, rounded. The copy is made of the parameter with its other slots, by the
  /// first step() that is called without `skip`, even if it is skipped when it runs; see
  /// Optimizer::refresh_master_weights().
  bool master_weights = false;
  /// kStochastic: for bf16 parameters without master weights; their slots too, if they are bf16.
  Rounding rounding = Rounding::kNearest;
  /// Of stochastic rounding. The random bits are a function of seed, the parameter's name, its step
  /// count and the element.
  std::uint64_t seed = 0;
};

/// The slot of GroupOptions::master_weights.
inline constexpr std::string_view kMasterWeight = "master_weight";

/// What one step does besides the rule. The rule sees `grad * grad_multiplier *
/// *grad_multiplier_source / *loss_scale_source`, clipped by norm, then by value.
struct StepOptions {
  /// Change nothing: no parameter, slot or step count.
  bool skip = false;
  /// float32 or float64 scalar, read where it lives when the step runs: not 0 means skip (a
  /// GradScaler's found_inf).
  TensorView skip_source = {};
  double grad_multiplier = 1.0;
  /// float32 or float64 scalar, read where it lives when the step runs.
  TensorView grad_multiplier_source = {};
  /// float32 or float64 scalar, read where it lives when the step runs: gradients are divided by it
  /// (a GradScaler's scale).
  TensorView loss_scale_source = {};
  /// Store the gradients divided by the loss scale, as torch's GradScaler leaves them: neither
  /// multiplied nor clipped, and not if the step is skipped. Not for every layout: see
  /// can_store_grads().
  bool store_unscaled_grads = false;
  /// Scale all gradients by min(1, max_grad_norm / (norm + 1e-6)), where norm is the 2-norm over
  /// all gradients that step now, after the multiplier. The gradients in memory stay as they are.
  double max_grad_norm = std::numeric_limits<double>::infinity();
  /// Limit every element of the gradients to [-clip_value, clip_value], after everything else.
  double clip_value = std::numeric_limits<double>::infinity();
  /// Skip if any element of a gradient in memory is infinite or NaN; decided on the device.
  bool skip_nonfinite = false;
  /// Compute the norm even if nothing above needs it.
  bool measure_grad_norm = false;
  /// The stream of each CUDA device; its default stream where none is given.
  std::span<const Stream> streams = {};
};

/// The 2-norm over all gradients and how many of their elements are infinite or NaN.
struct GradNorm {
  double norm = 0;
  std::int64_t nonfinite = 0;
};

namespace detail {
class Engine;
}

/// A handle to one parameter's state. Valid as long as the optimizer.
class FUSESTEP_API StateRef {
 public:
  /// Steps this parameter has taken. Waits for the device where the parameter lives on one.
  std::int64_t step() const;
  void set_step(std::int64_t step);

  /// Names of the slots that exist; none before the first step.
  std::vector<std::string> slot_names() const;
  /// A slot's memory, to read and to write: value's shape, on value's device.
  TensorView slot(std::string_view name) const;
  /// Use the caller's memory as this slot, with what it holds: value's shape and device, and the
  /// group's slot dtype. A momentum buffer counts as filled.
  void bind_slot(std::string_view name, const TensorView& memory);

 private:
  friend class Optimizer;
  StateRef(detail::Engine* engine, int parameter) : engine_(engine), parameter_(parameter) {}
  detail::Engine* engine_;
  int parameter_;
};

/// A handle to one parameter. Valid as long as the optimizer.
class FUSESTEP_API ParameterRef {
 public:
  std::string name() const;
  TensorView value() const;
  TensorView grad() const;

  /// Gradient for the next steps: value's shape and device, and its dtype or float32 (not for
  /// float64); an absent view means none.
  void set_grad(const TensorView& grad);
  void clear_grad() { set_grad({}); }
  /// The parameter has moved: same dtype, shape and device at another address. One of a flat group
  /// cannot move.
  void set_value(const TensorView& value);

  /// A frozen parameter is not read, written, decayed, counted or part of a norm. Its state stays
  /// and goes on when thawed.
  void freeze();
  void thaw();
  bool frozen() const;

 private:
  friend class Optimizer;
  friend class GroupRef;
  ParameterRef(detail::Engine* engine, int parameter) : engine_(engine), parameter_(parameter) {}
  detail::Engine* engine_;
  int parameter_;
};

/// Memory of a flat group: its parameters on one device with one dtype of values and one of
/// gradients, one after the other in one buffer each. All buffers have the elements of a parameter
/// at the same place; a parameter starts at a multiple of 32 elements (128 on CUDA devices), and
/// what is between two of them is zero.
struct FlatBuffer {
  struct Part {
    std::string parameter;
    std::int64_t begin;  ///< its first element
    std::int64_t size;
  };
  TensorView values;                        ///< one dimension
  TensorView grads;                         ///< as long
  std::map<std::string, TensorView> slots;  ///< as long; made when a parameter first needs them
  std::vector<Part> parts;                  ///< in the order they were added
};

/// A handle to one group. Valid as long as the optimizer.
class FUSESTEP_API GroupRef {
 public:
  std::string name() const;
  std::vector<ParameterRef> parameters() const;

  Hyper hyper() const;
  /// Counts from the next step. The rule stays what it was; amsgrad, momentum, centered may change,
  /// and slots that come to be needed start at zero.
  void set_hyper(const Hyper& hyper);
  /// The hyperparameter; set_lr_source() is not looked at.
  double lr() const;
  /// Ends set_lr_source().
  void set_lr(double lr);
  /// The learning rate is read from this float32 or float64 scalar whenever a step runs. It must
  /// live where the group's parameters live. An absent view returns to the hyperparameter.
  void set_lr_source(const TensorView& source);

  /// Of a group that add_flat_group() has made; of others none. They stay where they are as long as
  /// the optimizer lives.
  std::vector<FlatBuffer> flat_buffers() const;
  /// Clears the gradients of a flat group, on its devices' streams: one memset a buffer. May be
  /// captured into a CUDA graph. Throws InvalidArgument for other groups, whose gradients are the
  /// caller's.
  void zero_grad(std::span<const Stream> streams = {});

  /// All parameters of the group.
  void freeze();
  void thaw();

 private:
  friend class Optimizer;
  GroupRef(detail::Engine* engine, int group) : engine_(engine), group_(group) {}
  detail::Engine* engine_;
  int group_;
};

struct OptimizerOptions {
  /// Where slots of parameters on CUDA devices come from; cudaMallocAsync if null.
  std::shared_ptr<Allocator> cuda_allocator = nullptr;
};

/// Parameter groups and one step over all of them.
///
/// Not safe for use by two threads at a time; different optimizers are independent. Work on a CUDA
/// device is enqueued on the caller's stream and not waited for: parameters and gradients must stay
/// allocated until it has run, as for any kernel, and destroying the optimizer waits for its own.
class FUSESTEP_API Optimizer {
 public:
  explicit Optimizer(OptimizerOptions options = {});
  ~Optimizer();
  Optimizer(Optimizer&&) noexcept;
  Optimizer& operator=(Optimizer&&) noexcept;

  /// Adds parameters that step with these settings; at any time. Throws InvalidArgument and changes
  /// nothing for names that are taken, memory that is null or overlaps, dtypes or devices that
  /// cannot step, and settings torch would refuse.
  GroupRef add_group(std::string name, const Hyper& hyper, std::vector<Parameter> parameters,
                     GroupOptions options = {});

  /// The same for parameters that the optimizer moves into memory of its own: one buffer for
  /// values, one for gradients and one for each slot, of each device and layout. What value and
  /// gradient hold is copied, in the order of the streams; then ParameterRef::value() and grad()
  /// are where they lie, and the memory given is the caller's again. A gradient that is absent is
  /// zero there. One set_grad() gives elsewhere later is stepped with from where it is. Throws what
  /// add_group() throws, or OutOfMemory, and changes nothing then.
  GroupRef add_flat_group(std::string name, const Hyper& hyper, std::vector<Parameter> parameters,
                          GroupOptions options = {}, std::span<const Stream> streams = {});

  GroupRef group(std::string_view name);
  std::vector<GroupRef> groups();
  ParameterRef parameter(std::string_view name);
  StateRef state(std::string_view parameter_name);

  /// Freezes or thaws the parameter or the group of this name.
  void freeze(std::string_view name);
  void thaw(std::string_view name);

  /// One step of every parameter that is not frozen and has a gradient. An exception other than
  /// DeviceError leaves parameters, state and step counts as they were.
  ///
  /// Where the streams are being captured into a CUDA graph, nothing is stepped now: each run of
  /// the graph makes a step of the same parameters and gradients, with the options given here. What
  /// the step would have to bring to the devices, wait for or allocate is refused with
  /// InvalidArgument, and the capture can go on; after any other exception in a capture, end it and
  /// drop its graph. docs/cuda.md has the rules.
  void step(const StepOptions& options = {});
  /// Brings settings and step counts that were changed to the devices without a step, on their
  /// streams: graphs that run after it go by them. A step does it by itself.
  void sync_hyper(std::span<const Stream> streams = {});

  /// Whether StepOptions::store_unscaled_grads can be used: the gradients that step now have their
  /// parameter's dtype, no parameter is float64 or rounded stochastically, slots are float32 or
  /// of the parameter's dtype.
  bool can_store_grads() const;

  /// Sets the master weights that exist to the parameters as they are now: for who has written to
  /// parameters himself (loaded weights, averaged models). After OutOfMemory some may be set: call
  /// it again.
  void refresh_master_weights(std::span<const Stream> streams = {});

  /// The norm over the gradients that would step now, which get their slots if they have none yet.
  /// Waits for the device.
  GradNorm grad_norm(std::span<const Stream> streams = {});
  /// The norm the last step has computed (max_grad_norm, skip_nonfinite, measure_grad_norm); NaN if
  /// it did not. A step with `skip` set is none. Waits for the device.
  GradNorm last_grad_norm() const;
  /// Steps that changed nothing because of skip, skip_source or skip_nonfinite. Waits for the
  /// device.
  std::int64_t skipped_steps() const;

  /// The norm where several processes have parts of the parameters, in two halves with a sum over
  /// the processes between them. norm_begin() sums over the gradients here that would step now and
  /// gives two float64: the sum of squares, and how many elements are infinite or NaN. They are in
  /// memory of `device`, in the order of its stream, and nobody waits for it; on the CPU they are
  /// there, and for gradients on a GPU it waits. The caller adds those of all processes to them in
  /// place (an all-reduce) and calls norm_end(): the next step clips and skips by what they are
  /// when its stream gets there, so that all processes decide alike. Until then gradients and who
  /// steps must stay.
  TensorView norm_begin(Device device = Device::cpu(), std::span<const Stream> streams = {});
  void norm_end();

  /// Bytes of state by slot name; what was bound with bind_slot is not counted.
  std::map<std::string, std::size_t> memory_report() const;

  /// All state, copied; waits for the devices.
  StateDict state_dict(std::span<const Stream> streams = {});
  /// What state_dict() has given, matched by position: state, settings and frozen flags. The groups
  /// must have as many parameters, of the same shapes, whatever their names. Throws InvalidArgument
  /// and changes nothing.
  void load_state_dict(const StateDict& state, std::span<const Stream> streams = {});

  /// Matches by the parameters' names, whatever groups they were in: each group takes the settings
  /// its parameters were saved with. Throws LoadError (strict) or FileError, and has then changed
  /// nothing; but what fails while slots or values that exist are overwritten (the file changes, a
  /// device or its memory ends) ends the use of this optimizer.
  LoadReport load(const std::filesystem::path& file, const LoadOptions& options = {});
  LoadReport load(const StateDict& state, const LoadOptions& options = {});

  /// Writes a safetensors file: aside, then on disk, then in the place of `file`. Throws FileError;
  /// an older file then stays whole. With SaveOptions::rank it writes the file of that rank.
  void save(const std::filesystem::path& file, const SaveOptions& options = {});
  /// Copies the state to memory and writes it in the background. What goes wrong there is thrown by
  /// the next save, save_async, load or wait_for_save, which wait for it and then do nothing else.
  void save_async(const std::filesystem::path& file, const SaveOptions& options = {});
  void wait_for_save();

 private:
  friend class LrSchedule;
  std::unique_ptr<detail::Engine> engine_;
};

}  // namespace fusestep
