// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What the engine asks of a device. One backend serves one optimizer on one device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "fusestep/detail/plan.h"
#include "fusestep/detail/prepare.h"
#include "fusestep/device.h"

namespace fusestep::detail {

/// The most Backend::read() gives at a time. A multiple of every element size.
inline constexpr std::size_t kReadBytes = std::size_t{4} << 20;

class Backend {
 public:
  virtual ~Backend() = default;

  /// Elements per chunk, and elements per vector access that rows are to be lined up for (1: none).
  virtual int chunk_size(int layout) const = 0;
  virtual int vector_width(int layout) const = 0;

  /// Where arrays of state begin, in bytes. Each starts at a multiple of `alignment` (a power of
  /// two); of arrays that one loop walks through, large ones start `skew` further into their pages
  /// than the one before.
  struct Placement {
    std::size_t alignment, skew;
  };
  virtual Placement placement() const = 0;

  /// The CUDA graph that the stream is being captured into; 0 if it is not.
  virtual unsigned long long capture_of(void*) { return 0; }
  /// A step was captured: it may run at any time from now on.
  virtual bool in_graphs() const { return false; }

  /// Memory for state, zeroed in stream order. Throws OutOfMemory.
  virtual void* allocate(std::size_t bytes, void* stream) = 0;
  virtual void deallocate(void* data, std::size_t bytes, void* stream) noexcept = 0;

  /// What has changed since the last call that succeeded, and where it stands now. `plan` stays
  /// where it is until the next call.
  struct RowRange {
    int begin = 0, end = 0;
  };
  struct Tables {
    const Plan* plan;
    bool members_changed;  // the whole plan, norm_blocks apart
    bool norm_blocks_changed;
    RowRange changed_rows;             // if members_changed is false: these rows of plan->tensors
    std::span<const HyperRow> hypers;  // empty: as before
    int states;                        // StepStates there must be; new ones are zero
    int norm_parts;                    // NormSums there must be room for; 0 if no norm is asked for
  };
  /// Bring that to the device. Throws OutOfMemory, and can be called again with the same.
  virtual void stage(const Tables& tables, void* stream) = 0;

  /// Sum the squares of the plan's gradients into part `position` of the norm.
  virtual void sum_squares(int position, void* stream) = 0;
  /// That sum in this process's memory; waits for the device.
  virtual NormSum read_sum(int position, void* stream) = 0;
  /// Part `position` is what `from`, another device of the same kind, has summed; no waiting here.
  /// Not asked of the CPU, of which there is only one.
  virtual void copy_sum(int, Backend&, void*, void*) {}
  /// Part `position` is this.
  virtual void write_sum(int position, NormSum sum, void* stream) = 0;
  /// Parts [0, parts) together, as two doubles that others may be added to: squares and nonfinite.
  /// On this device, where they stay for its life; no waiting here. Throws OutOfMemory. These two
  /// are not asked of the CPU, whose numbers the engine has itself.
  virtual double* gather_sums(int, void*) { return nullptr; }
  /// Part 0 is what these two are when the stream gets here.
  virtual void scatter_sums(void*) {}

  /// prepare, then apply for every bucket.
  virtual void run(const StepRequest& request, void* stream) = 0;
  /// Control::grad_norm of the last run, to memory of this device; no waiting here.
  virtual void copy_grad_norm(double* to, void* stream) = 0;

  /// In the order of the stream; no waiting here.
  virtual void write_state(int index, StepState state, void* stream) = 0;
  /// These wait for the device.
  virtual StepState read_state(int index) = 0;
  virtual Control read_control() = 0;
  /// Memory of the device where the host can read it, until the next call; at most kReadBytes.
  /// Waits for the device.
  virtual const void* read(const void* from, std::size_t bytes, void* stream) = 0;
  /// What read() has allocated is given back.
  virtual void end_reading() noexcept {}
  /// What write() needs of memory is there afterwards. Throws OutOfMemory.
  virtual void begin_writing(void* stream) = 0;
  /// `from` is the host's, and may be reused when this returns.
  virtual void write(void* to, const void* from, std::size_t bytes, void* stream) = 0;
  /// May be captured, as may a step.
  virtual void clear(void* data, std::size_t bytes, void* stream) = 0;
  /// Within this device.
  virtual void copy(void* to, const void* from, std::size_t bytes, void* stream) = 0;
  /// to[i] = from[i], of 16-bit floats.
  virtual void widen(float* to, const void* from, DType dtype, std::int64_t count,
                     void* stream) = 0;
  /// One float32 or float64 on this device.
  virtual double read_scalar(const void* source, bool is_double, void* stream) = 0;
};

std::unique_ptr<Backend> make_cpu_backend();
/// Throws DeviceError, with cuda_status(), where there is no such device.
std::unique_ptr<Backend> make_cuda_backend(int index, std::shared_ptr<Allocator> allocator);

}  // namespace fusestep::detail
