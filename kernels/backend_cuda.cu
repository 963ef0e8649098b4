// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A step on a CUDA device: tables kept there, one launch of prepare, one of apply per bucket.
// Nothing here waits for the device, but for reading something back and for a full upload ring.
#include <cuda_runtime.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "apply_table.h"
#include "cuda_check.h"
#include "device_table.h"
#include "fusestep/detail/backend.h"
#include "grad_norm.cuh"
#include "launch.cuh"
#include "prepare.cuh"
#include "tuning.h"
#include "widen.cuh"

namespace fusestep {
namespace detail {
namespace {

using SumGradients = SumBlocks<GradientSource>;
using SumSums = SumBlocks<SumSource>;

constexpr unsigned blocks_for(std::int64_t items, std::int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

/// cudaMallocAsync, from the device's default memory pool.
class PoolAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes, Stream stream) override {
    void* data = nullptr;
    cuda_check(cudaMallocAsync(&data, bytes, static_cast<cudaStream_t>(stream.handle)),
               stream.device.index, "allocating state");
    return data;
  }
  void deallocate(void* data, std::size_t, Stream stream) noexcept override {
    static_cast<void>(cudaFreeAsync(data, static_cast<cudaStream_t>(stream.handle)));
  }
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(int device, std::shared_ptr<Allocator> allocator)
      : device_(device), allocator_(std::move(allocator)) {
    if (allocator_ == nullptr) allocator_ = std::make_shared<PoolAllocator>();
    const DeviceGuard guard(device_);
    int has_pools = 0;
    cuda_check(cudaDeviceGetAttribute(&has_pools, cudaDevAttrMemoryPoolsSupported, device_),
               device_, "asking for memory pools");
    if (has_pools == 0) {
      throw DeviceError("cuda:" + std::to_string(device_) +
                        ": the device or its driver has no memory pools (cudaMallocAsync)");
    }
    cuda_check(load_kernel<Prepare>(), device_, "loading kernels");
    cuda_check(cudaEventCreateWithFlags(&last_work_, cudaEventDisableTiming), device_,
               "creating an event");
  }

  /// Waits for what was enqueued. Errors are ignored: the driver may be gone at the end of a
  /// process.
  ~CudaBackend() override {
    if (getpid() != process_) {  // a forked child cannot use its parent's context
      static_cast<void>(ring_.release());
      return;
    }
    static_cast<void>(cudaEventSynchronize(last_work_));
    try {
      const DeviceGuard guard(device_);
      release();
    } catch (const Error&) {
      release();
    }
  }

  int chunk_size(int layout) const override { return apply_kernels().of[0][layout].chunk; }
  int vector_width(int layout) const override { return apply_kernels().of[0][layout].width; }

  void* allocate(std::size_t bytes, void* stream) override {
    Work work(*this, stream);
    void* data = allocator_->allocate(bytes, {Device::cuda(device_), stream});
    if (data == nullptr) {
      throw OutOfMemory("cuda:" + std::to_string(device_) + ": no memory for " +
                        std::to_string(bytes) + " bytes of state");
    }
    try {
      cuda_check(cudaMemsetAsync(data, 0, bytes, work.stream()), device_, "clearing state");
      work.finish();
    } catch (...) {
      allocator_->deallocate(data, bytes, {Device::cuda(device_), stream});
      throw;
    }
    return data;
  }
  void deallocate(void* data, std::size_t bytes, void* stream) noexcept override {
    if (getpid() != process_) return;
    bool given_back = false;
    const auto give_back = [&] {
      given_back = true;
      allocator_->deallocate(data, bytes, {Device::cuda(device_), stream});
    };
    try {
      Work work(*this, stream);
      give_back();
      work.finish();
    } catch (const Error&) {
      if (given_back) return;
      // The stream cannot be made to wait for the work that uses it.
      static_cast<void>(cudaEventSynchronize(last_work_));
      give_back();
    }
  }

  void stage(const Tables& tables, void* stream) override {
    const auto states = static_cast<std::size_t>(tables.states);
    const auto norm_parts = static_cast<std::size_t>(tables.norm_parts);
    const bool nothing_changed = !tables.members_changed && !tables.norm_blocks_changed &&
                                 tables.changed_rows.end == 0 && tables.hypers.empty() &&
                                 states <= states_.capacity() &&
                                 norm_parts <= norm_parts_.capacity();
    plan_ = tables.plan;
    if (nothing_changed) return;

    Work work(*this, stream);
    const Plan& plan = *tables.plan;
    if (ring_ == nullptr) ring_ = std::make_unique<UploadRing>(device_, kRingBytes);
    control_.reserve(1, work.stream());
    tensors_.reserve(plan.tensors.size(), work.stream());
    prepare_.reserve(plan.prepare.size(), work.stream());
    scalars_.reserve(plan.tensors.size(), work.stream());
    chunks_.reserve(plan.chunks.size(), work.stream());
    hypers_.reserve(tables.hypers.size(), work.stream());
    states_.reserve(states, work.stream());
    norm_parts_.reserve(norm_parts, work.stream());
    if (tables.norm_blocks_changed) {
      norm_blocks_.reserve(plan.norm_blocks.size(), work.stream());
      norm_sums_[0].reserve(plan.norm_blocks.size(), work.stream());
      norm_sums_[1].reserve(blocks_for(std::ssize(plan.norm_blocks), kNormBlock), work.stream());
      cuda_check(load_kernel<SumGradients>(), device_, "loading kernels");
      cuda_check(load_kernel<SumSums>(), device_, "loading kernels");
    }
    if (tables.members_changed) {
      for (const Bucket& bucket : plan.buckets) {
        cuda_check(apply_kernels().of[bucket.rule][bucket.layout].load(), device_,
                   "loading kernels");
      }
      tensors_.upload(*ring_, plan.tensors, 0, work.stream());
      prepare_.upload(*ring_, plan.prepare, 0, work.stream());
      chunks_.upload(*ring_, plan.chunks, 0, work.stream());
    } else {
      const auto begin = static_cast<std::size_t>(tables.changed_rows.begin);
      const auto end = static_cast<std::size_t>(tables.changed_rows.end);
      tensors_.upload(*ring_, std::span(plan.tensors).subspan(begin, end - begin), begin,
                      work.stream());
    }
    if (tables.norm_blocks_changed) norm_blocks_.upload(*ring_, plan.norm_blocks, 0, work.stream());
    hypers_.upload(*ring_, tables.hypers, 0, work.stream());
    work.finish();
  }

  void sum_squares(int position, void* stream) override {
    Work work(*this, stream);
    const auto launch_sums = [&](const auto& body, unsigned blocks) {
      cuda_check(launch(body, blocks, work.stream()), device_, "launching the gradient norm");
    };
    NormSum* const part = norm_parts_.data() + position;
    auto count = std::ssize(plan_->norm_blocks);
    if (count == 0) {
      cuda_check(cudaMemsetAsync(part, 0, sizeof *part, work.stream()), device_, "clearing a norm");
    } else {
      NormSum* sums = count == 1 ? part : norm_sums_[0].data();
      NormSum* spare = norm_sums_[1].data();
      launch_sums(SumGradients{{norm_blocks_.data(), tensors_.data()}, sums},
                  static_cast<unsigned>(count));
      while (count > 1) {
        const unsigned blocks = blocks_for(count, kNormBlock);
        launch_sums(SumSums{{sums, count}, blocks == 1 ? part : spare}, blocks);
        std::swap(sums, spare);
        count = blocks;
      }
    }
    work.finish();
  }

  NormSum read_sum(int position, void* stream) override {
    return read_one(norm_parts_.data() + position, stream);
  }

  void copy_sum(int position, Backend& from, void* from_stream, void* stream) override {
    auto& other = static_cast<CudaBackend&>(from);
    {
      Work work(*this, stream);
      cuda_check(cudaStreamWaitEvent(work.stream(), other.last_work_, 0), device_,
                 "waiting for the norm of another device");
      cuda_check(cudaMemcpyPeerAsync(norm_parts_.data() + position, device_,
                                     other.norm_parts_.data() + position, other.device_,
                                     sizeof(NormSum), work.stream()),
                 device_, "copying the norm of another device");
      work.finish();
    }
    // The other device must not overwrite its sum before it has been copied.
    Work work(other, from_stream);
    cuda_check(cudaStreamWaitEvent(work.stream(), last_work_, 0), other.device_,
               "waiting for a copy of the norm");
    work.finish();
  }

  void write_sum(int position, NormSum sum, void* stream) override {
    Work work(*this, stream);
    norm_parts_.upload(*ring_, std::span(&sum, 1), static_cast<std::size_t>(position),
                       work.stream());
    work.finish();
  }

  void run(const StepRequest& request, void* stream) override {
    Work work(*this, stream);
    const auto tensors = static_cast<int>(plan_->tensors.size());
    const Prepare prepare{request,        norm_parts_.data(), prepare_.data(), hypers_.data(),
                          states_.data(), scalars_.data(),    control_.data(), tensors};
    cuda_check(launch(prepare, blocks_for(tensors, Prepare::kThreads), work.stream()), device_,
               "launching prepare");
    try {
      for (const Bucket& bucket : plan_->buckets) {
        const ApplyTables tables{chunks_.data() + bucket.first_chunk, tensors_.data(),
                                 scalars_.data(), control_.data()};
        cuda_check(
            apply_kernels().of[bucket.rule][bucket.layout].launch(
                tables, static_cast<unsigned>(bucket.chunks), bucket.elements, work.stream()),
            device_, "launching apply");
      }
      work.finish();
    } catch (const OutOfMemory& error) {
      throw DeviceError(error.what());  // the step is half done, whatever the reason
    }
  }

  StepState read_state(int index) override { return read_one(states_.data() + index, nullptr); }
  void write_state(int index, StepState state, void* stream) override {
    Work work(*this, stream);
    states_.upload(*ring_, std::span(&state, 1), static_cast<std::size_t>(index), work.stream());
    work.finish();
  }
  Control read_control() override {
    return control_.data() == nullptr ? Control{} : read_one(control_.data(), nullptr);
  }
  const void* read(const void* from, std::size_t bytes, void* stream) override {
    if (pinned_ == nullptr) {
      const DeviceGuard guard(device_);
      cuda_check(cudaHostAlloc(&pinned_, kReadBytes, cudaHostAllocPortable), device_,
                 "allocating pinned memory to read state");
    }
    read_into(pinned_, from, bytes, stream);
    return pinned_;
  }
  void end_reading() noexcept override {
    if (pinned_ == nullptr) return;
    if (getpid() == process_) {
      static_cast<void>(cudaEventSynchronize(last_work_));  // a read that has failed may still run
      static_cast<void>(cudaFreeHost(pinned_));
    }
    pinned_ = nullptr;
  }
  void begin_writing(void* stream) override {
    Work work(*this, stream);
    if (ring_ == nullptr) ring_ = std::make_unique<UploadRing>(device_, kRingBytes);
    work.finish();
  }
  void write(void* to, const void* from, std::size_t bytes, void* stream) override {
    Work work(*this, stream);
    ring_->upload(to, from, bytes, work.stream());
    work.finish();
  }
  void clear(void* data, std::size_t bytes, void* stream) override {
    Work work(*this, stream);
    cuda_check(cudaMemsetAsync(data, 0, bytes, work.stream()), device_, "clearing state");
    work.finish();
  }
  void widen(float* to, const void* from, DType dtype, std::int64_t count, void* stream) override {
    if (count == 0) return;
    Work work(*this, stream);
    cuda_check(
        launch(Widen{to, from, dtype, count}, blocks_for(count, Widen::kPerBlock), work.stream()),
        device_, "launching the widening of values");
    work.finish();
  }
  double read_scalar(const void* source, bool is_double, void* stream) override {
    return is_double ? read_one(static_cast<const double*>(source), stream)
                     : static_cast<double>(read_one(static_cast<const float*>(source), stream));
  }

 private:
  /// What is enqueued while it lives comes after everything enqueued for this optimizer before, on
  /// whichever stream that was.
  class Work {
   public:
    Work(CudaBackend& backend, void* stream)
        : backend_(check_process(backend)),
          guard_(backend.device_),
          stream_(static_cast<cudaStream_t>(stream)) {
      cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
      cuda_check(cudaStreamIsCapturing(stream_, &capturing), backend_.device_,
                 "asking whether the stream is captured");
      if (capturing != cudaStreamCaptureStatusNone) {
        throw InvalidArgument("cuda:" + std::to_string(backend_.device_) +
                              ": a step cannot be captured into a CUDA graph");
      }
      // Handles are used again after a stream is destroyed, ids are not.
      cuda_check(cudaStreamGetId(stream_, &id_), backend_.device_, "identifying the stream");
      if (backend_.last_stream_ == id_) return;
      cuda_check(cudaStreamWaitEvent(stream_, backend_.last_work_, 0), backend_.device_,
                 "waiting for earlier work");
    }
    ~Work() {
      if (finished_) return;
      // After an error: what was enqueued before it is still to be waited for.
      static_cast<void>(cudaEventRecord(backend_.last_work_, stream_));
      backend_.last_stream_ = id_;
    }
    Work(const Work&) = delete;
    Work& operator=(const Work&) = delete;

    cudaStream_t stream() const { return stream_; }
    void finish() {
      cuda_check(cudaEventRecord(backend_.last_work_, stream_), backend_.device_,
                 "recording the end of a step");
      backend_.last_stream_ = id_;
      finished_ = true;
    }

   private:
    static CudaBackend& check_process(CudaBackend& backend) {
      if (getpid() == backend.process_) return backend;
      throw DeviceError("cuda:" + std::to_string(backend.device_) +
                        ": a forked process cannot use the CUDA context of its parent");
    }

    CudaBackend& backend_;
    DeviceGuard guard_;
    cudaStream_t stream_;
    unsigned long long id_ = 0;
    bool finished_ = false;
  };

  template <class T>
  T read_one(const T* from, void* stream) {
    T value;
    read_into(&value, from, sizeof value, stream);
    return value;
  }

  void read_into(void* to, const void* from, std::size_t bytes, void* stream) {
    Work work(*this, stream);
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, work.stream()), device_,
               "reading from the device");
    cuda_check(cudaStreamSynchronize(work.stream()), device_, "waiting for the device");
    work.finish();
  }

  /// Nothing of it is in use any more.
  void release() noexcept {
    tensors_.release(nullptr);
    prepare_.release(nullptr);
    chunks_.release(nullptr);
    norm_blocks_.release(nullptr);
    hypers_.release(nullptr);
    states_.release(nullptr);
    scalars_.release(nullptr);
    for (auto& sums : norm_sums_) sums.release(nullptr);
    norm_parts_.release(nullptr);
    control_.release(nullptr);
    ring_.reset();
    end_reading();
    if (last_work_ != nullptr) static_cast<void>(cudaEventDestroy(last_work_));
    last_work_ = nullptr;
  }

  int device_;
  pid_t process_ = getpid();
  std::shared_ptr<Allocator> allocator_;
  cudaEvent_t last_work_ = nullptr;
  unsigned long long last_stream_ = ~0ull;
  const Plan* plan_ = nullptr;

  std::unique_ptr<UploadRing> ring_;
  void* pinned_ = nullptr;  // kReadBytes, while state is read
  DeviceTable<TensorRow> tensors_{device_};
  DeviceTable<PrepareRow> prepare_{device_};
  DeviceTable<Chunk> chunks_{device_};
  DeviceTable<Chunk> norm_blocks_{device_};
  DeviceTable<HyperRow> hypers_{device_};
  DeviceTable<StepState> states_{device_};
  DeviceTable<ScalarRow> scalars_{device_};
  DeviceTable<NormSum> norm_sums_[2] = {DeviceTable<NormSum>{device_},
                                        DeviceTable<NormSum>{device_}};
  DeviceTable<NormSum> norm_parts_{device_};
  DeviceTable<Control> control_{device_};
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(int index, std::shared_ptr<Allocator> allocator) {
  return std::make_unique<CudaBackend>(index, std::move(allocator));
}

}  // namespace detail

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  static_cast<void>(cudaGetLastError());
  return 0;
}

std::string cuda_status() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return std::string("CUDA is not used: ") + cudaGetErrorString(code);
  }
  return std::to_string(count) + (count == 1 ? " CUDA device" : " CUDA devices");
}

}  // namespace fusestep
