// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A step on the CPU: decide, prepare, then the chunks of every bucket on all threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "at.h"
#include "fp_environment.h"
#include "fusestep/detail/backend.h"
#include "fusestep/detail/norm.h"
#include "fusestep/error.h"
#include "kernels.h"
#include "parallel_for.h"
#include "tuning.h"
#include "zeroed_memory.h"

namespace fusestep::detail {
namespace {

class CpuBackend final : public Backend {
 public:
  int chunk_size(int) const override { return kCpuChunk; }
  int vector_width(int) const override { return 1; }
  Placement placement() const override { return {kCpuAlignment, kCpuSkew}; }

  void* allocate(std::size_t bytes, void*) override {
    void* data = allocate_zeroed(bytes);
    if (data != nullptr) return data;
    throw OutOfMemory("no memory for " + std::to_string(bytes) + " bytes of state on cpu");
  }
  void deallocate(void* data, std::size_t bytes, void*) noexcept override {
    deallocate_zeroed(data, bytes);
  }

  void stage(const Tables& tables, void*) override {
    plan_ = tables.plan;
    if (!tables.hypers.empty()) hypers_.assign(tables.hypers.begin(), tables.hypers.end());
    states_.resize(static_cast<std::size_t>(tables.states));
    norm_parts_.resize(std::max(norm_parts_.size(), static_cast<std::size_t>(tables.norm_parts)));
    if (tables.members_changed) {
      scalars_.resize(plan_->tensors.size());
      cut_tasks();
    }
    if (tables.norm_blocks_changed) norm_sums_.resize(plan_->norm_blocks.size());
  }

  void sum_squares(int position, void*) override {
    const DefaultFpEnvironment environment;
    const auto blocks = static_cast<std::int64_t>(plan_->norm_blocks.size());
    constexpr std::int64_t per_task = kCpuTask / kNormBlock;
    parallel_for(static_cast<int>((blocks + per_task - 1) / per_task), [&](int task) {
      const DefaultFpEnvironment environment_of_thread;
      const std::int64_t end = std::min(blocks, (task + 1) * per_task);
      for (std::int64_t i = task * per_task; i < end; ++i) sum_block(i);
    });
    // The list of sums is summed in the same way until one is left.
    std::int64_t count = blocks;
    while (count > 1) {
      const std::int64_t groups = norm_blocks(count);
      for (std::int64_t i = 0; i < groups; ++i) {
        NormSum* first = norm_sums_.data() + i * kNormBlock;
        const auto size =
            static_cast<int>(std::min<std::int64_t>(kNormBlock, count - i * kNormBlock));
        at(norm_sums_, i) = kernels_.add_sums(first, size);
      }
      count = groups;
    }
    at(norm_parts_, position) = count == 0 ? NormSum{} : norm_sums_[0];
  }
  NormSum read_sum(int position, void*) override { return at(norm_parts_, position); }
  void write_sum(int position, NormSum sum, void*) override { at(norm_parts_, position) = sum; }

  void run(const StepRequest& request, void*) override {
    const DefaultFpEnvironment environment;
    const StepDecision decision = decide(request, norm_parts_.data());
    record(request, decision, control_);
    if (decision.skip) return;
    prepare(decision);
    parallel_for(static_cast<int>(tasks_.size()), [&](int task) {
      const DefaultFpEnvironment environment_of_thread;
      apply(at(tasks_, task));
    });
  }

  void copy_grad_norm(double* to, void*) override { *to = control_.grad_norm; }

  StepState read_state(int index) override { return at(states_, index); }
  void write_state(int index, StepState state, void*) override { at(states_, index) = state; }
  Control read_control() override { return control_; }
  const void* read(const void* from, std::size_t, void*) override { return from; }
  void begin_writing(void*) override {}
  void write(void* to, const void* from, std::size_t bytes, void*) override {
    std::memcpy(to, from, bytes);
  }
  void clear(void* data, std::size_t bytes, void*) override { std::memset(data, 0, bytes); }
  void copy(void* to, const void* from, std::size_t bytes, void*) override {
    std::memcpy(to, from, bytes);
  }
  void widen(float* to, const void* from, DType dtype, std::int64_t count, void*) override {
    const auto chunks = static_cast<int>((count + kCpuChunk - 1) / kCpuChunk);
    parallel_for(chunks, [&](int chunk) {
      const std::int64_t end = std::min<std::int64_t>(count, (chunk + std::int64_t{1}) * kCpuChunk);
      for (std::int64_t i = std::int64_t{chunk} * kCpuChunk; i < end; ++i) {
        to[i] = load_widened(from, dtype, i);
      }
    });
  }
  double read_scalar(const void* source, bool is_double, void*) override {
    return StepScalar{1.0, source, is_double}.get();
  }

 private:
  /// Chunks of one bucket that one thread does in a row.
  struct Task {
    const Bucket* bucket;
    std::int64_t first_chunk, end_chunk;
  };

  void cut_tasks() {
    tasks_.clear();
    for (const Bucket& bucket : plan_->buckets) {
      const std::int64_t end = bucket.first_chunk + bucket.chunks;
      std::int64_t first = bucket.first_chunk, elements = 0;
      for (std::int64_t i = first; i < end; ++i) {
        elements += chunk_elements(at(plan_->chunks, i));
        if (elements < kCpuTask && i + 1 < end) continue;
        tasks_.push_back({&bucket, first, i + 1});
        first = i + 1;
        elements = 0;
      }
    }
  }

  std::int64_t chunk_elements(Chunk chunk) const {
    const std::int64_t size = at(plan_->tensors, chunk.tensor).size;
    return std::min<std::int64_t>(kCpuChunk, size - std::int64_t{chunk.index} * kCpuChunk);
  }

  void sum_block(std::int64_t index) {
    const Chunk block = at(plan_->norm_blocks, index);
    const TensorRow& row = at(plan_->tensors, block.tensor);
    const std::int64_t begin = std::int64_t{block.index} * kNormBlock;
    const auto count = static_cast<int>(std::min<std::int64_t>(kNormBlock, row.size - begin));
    const char* grads = static_cast<const char*>(row.grad) +
                        static_cast<std::size_t>(begin) * size_of(row.grad_dtype);
    at(norm_sums_, index) = kernels_.norm[static_cast<int>(row.grad_dtype)](grads, count);
  }

  /// Tensors that follow each other mostly share group and step count: theirs are copied.
  void prepare(const StepDecision& decision) {
    const PrepareRow* previous = nullptr;
    StepState previous_before, after;
    for (std::size_t i = 0; i < plan_->prepare.size(); ++i) {
      const PrepareRow& row = plan_->prepare[i];
      const StepState before = state_before(row, states_.data());
      if (previous != nullptr && row.group == previous->group && row.rule == previous->rule &&
          row.wide == previous->wide && row.noise_seed == previous->noise_seed &&
          before == previous_before) {
        scalars_[i] = scalars_[i - 1];
      } else {
        after = prepare_tensor(row, at(hypers_, row.group), decision, before, scalars_[i]);
      }
      write_state_after(row, after, states_.data());
      previous = &row;
      previous_before = before;
    }
  }

  void apply(const Task& task) const {
    const ApplyFunction function = kernels_.apply[task.bucket->rule][task.bucket->layout];
    for (std::int64_t i = task.first_chunk; i < task.end_chunk; ++i) {
      const Chunk chunk = at(plan_->chunks, i);
      const auto tensor = static_cast<std::size_t>(chunk.tensor);
      function(plan_->tensors[tensor], scalars_[tensor], std::int64_t{chunk.index} * kCpuChunk,
               chunk_elements(chunk));
    }
  }

  const CpuKernels& kernels_ = cpu_kernels();
  const Plan* plan_ = nullptr;
  std::vector<HyperRow> hypers_;
  std::vector<StepState> states_;
  std::vector<ScalarRow> scalars_;
  std::vector<Task> tasks_;
  std::vector<NormSum> norm_sums_, norm_parts_;
  Control control_{};
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<CpuBackend>(); }

}  // namespace fusestep::detail
