// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A step on a CUDA device: tables kept there, one launch of prepare, one of apply per bucket.
// Nothing here waits for the device, but for reading something back and for a full upload ring.
#include <cuda_runtime.h>
#include <unistd.h>

#include <optional>
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

/// A stream that nothing else is on.
class PrivateStream {
 public:
  explicit PrivateStream(int device) {
    const DeviceGuard guard(device);
    cuda_check(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking), device,
               "creating a stream");
  }
  ~PrivateStream() { static_cast<void>(cudaStreamDestroy(handle_)); }
  PrivateStream(const PrivateStream&) = delete;
  PrivateStream& operator=(const PrivateStream&) = delete;
  cudaStream_t get() const { return handle_; }

 private:
  cudaStream_t handle_ = nullptr;
};

/// For memory that nothing uses any more: the default stream, or where that would have to wait for
/// one that is captured, another. Of the current device.
class StreamToFreeOn {
 public:
  explicit StreamToFreeOn(int device) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t code = cudaStreamGetCaptureInfo(nullptr, &status, nullptr);
    if (code == cudaSuccess && status == cudaStreamCaptureStatusNone) return;
    static_cast<void>(cudaGetLastError());
    private_.emplace(device);
  }
  cudaStream_t get() const { return private_ ? private_->get() : nullptr; }

 private:
  std::optional<PrivateStream> private_;
};

/// The tables of one plan. Once a graph has them they stay as they are.
struct PlanTables {
  explicit PlanTables(int device)
      : tensors(device),
        prepare(device),
        chunks(device),
        scalars(device),
        norm_blocks(device),
        norm_sums{DeviceTable<NormSum>{device}, DeviceTable<NormSum>{device}},
        norm_parts(device) {}

  void release(cudaStream_t stream) noexcept {
    tensors.release(stream);
    prepare.release(stream);
    chunks.release(stream);
    scalars.release(stream);
    norm_blocks.release(stream);
    for (auto& sums : norm_sums) sums.release(stream);
    norm_parts.release(stream);
  }

  DeviceTable<TensorRow> tensors;
  DeviceTable<PrepareRow> prepare;
  DeviceTable<Chunk> chunks;
  DeviceTable<ScalarRow> scalars;
  DeviceTable<Chunk> norm_blocks;
  DeviceTable<NormSum> norm_sums[2];
  DeviceTable<NormSum> norm_parts;
  bool in_graph = false;
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(int device, std::shared_ptr<Allocator> allocator)
      : device_(device), allocator_(std::move(allocator)) {
    if (allocator_ == nullptr) allocator_ = std::make_shared<PoolAllocator>();
    const DeviceGuard guard(device_);
    const BesideCaptures beside;
    int has_pools = 0;
    cuda_check(cudaDeviceGetAttribute(&has_pools, cudaDevAttrMemoryPoolsSupported, device_),
               device_, "asking for memory pools");
    if (has_pools == 0) {
      throw DeviceError("cuda:" + std::to_string(device_) +
                        ": the device or its driver has no memory pools (cudaMallocAsync)");
    }
    cuda_check(load_kernel<Prepare>(), device_, "loading kernels");
    for (cudaEvent_t* event : {&last_work_, &last_captured_}) {
      const cudaError_t code = cudaEventCreateWithFlags(event, cudaEventDisableTiming);
      if (code != cudaSuccess) release(nullptr);
      cuda_check(code, device_, "creating an event");
    }
  }

  /// Waits for what was enqueued. Errors are ignored: the driver may be gone at the end of a
  /// process.
  ~CudaBackend() override {
    if (getpid() != process_) {  // a forked child cannot use its parent's context
      static_cast<void>(ring_.release());
      return;
    }
    const BesideCaptures beside;
    static_cast<void>(cudaEventSynchronize(last_work_));
    try {
      const DeviceGuard guard(device_);
      if (in_graphs_) static_cast<void>(cudaDeviceSynchronize());
      const StreamToFreeOn stream(device_);
      release(stream.get());
    } catch (const Error&) {
      release(nullptr);
    }
  }

  int chunk_size(int layout) const override { return apply_kernels().of[0][layout].chunk; }
  int vector_width(int layout) const override { return apply_kernels().of[0][layout].width; }
  Placement placement() const override { return {kCudaAlignment, kCudaSkew}; }

  unsigned long long capture_of(void* stream) override {
    check_process();
    const DeviceGuard guard(device_);
    return capture_id(static_cast<cudaStream_t>(stream));
  }
  bool in_graphs() const override { return in_graphs_; }

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
    const auto give_back = [&](void* on) {
      given_back = true;
      allocator_->deallocate(data, bytes, {Device::cuda(device_), on});
    };
    const BesideCaptures beside;
    try {
      wait_for_graphs();
      Work work(*this, stream);
      give_back(stream);
      work.finish();
    } catch (const Error&) {
      if (given_back) return;
      // The stream cannot be made to wait for the work that uses it.
      static_cast<void>(cudaEventSynchronize(last_work_));
      try {
        const DeviceGuard guard(device_);
        const StreamToFreeOn other(device_);
        give_back(other.get());
      } catch (const Error&) {
        if (!given_back) give_back(nullptr);
      }
    }
  }

  void stage(const Tables& tables, void* stream) override {
    const bool settings_changed = !tables.hypers.empty() ||
                                  static_cast<std::size_t>(tables.states) > states_.capacity() ||
                                  shared_has_moved();
    plan_ = tables.plan;
    if (!settings_changed && !plan_changed(tables)) return;
    if (capture_of(stream) == 0) return bring(tables, stream);
    // Into what the graph will read when it runs, and past its capture.
    const BesideCaptures beside;
    const PrivateStream aside(device_);
    bring(tables, aside.get());
    cuda_check(cudaStreamSynchronize(aside.get()), device_, "waiting for tables of a graph");
  }

  void sum_squares(int position, void* stream) override {
    Work work(*this, stream, Captured::kToo);
    const auto launch_sums = [&](const auto& body, unsigned blocks) {
      cuda_check(launch(body, blocks, work.stream()), device_, "launching the gradient norm");
    };
    NormSum* const part = tables_->norm_parts.data() + position;
    auto count = std::ssize(plan_->norm_blocks);
    if (count == 0) {
      cuda_check(cudaMemsetAsync(part, 0, sizeof *part, work.stream()), device_, "clearing a norm");
    } else {
      NormSum* sums = count == 1 ? part : tables_->norm_sums[0].data();
      NormSum* spare = tables_->norm_sums[1].data();
      launch_sums(SumGradients{{tables_->norm_blocks.data(), tables_->tensors.data()}, sums},
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
    return read_one(tables_->norm_parts.data() + position, stream);
  }

  void copy_sum(int position, Backend& from, void* from_stream, void* stream) override {
    auto& other = static_cast<CudaBackend&>(from);
    {
      Work work(*this, stream, Captured::kToo);
      cuda_check(cudaStreamWaitEvent(work.stream(), work.end_of(other), 0), device_,
                 "waiting for the norm of another device");
      cuda_check(cudaMemcpyPeerAsync(tables_->norm_parts.data() + position, device_,
                                     other.tables_->norm_parts.data() + position, other.device_,
                                     sizeof(NormSum), work.stream()),
                 device_, "copying the norm of another device");
      work.finish();
    }
    // The other device must not overwrite its sum before it has been copied.
    Work work(other, from_stream, Captured::kToo);
    cuda_check(cudaStreamWaitEvent(work.stream(), work.end_of(*this), 0), other.device_,
               "waiting for a copy of the norm");
    work.finish();
  }

  void write_sum(int position, NormSum sum, void* stream) override {
    Work work(*this, stream);
    tables_->norm_parts.upload(*ring_, std::span(&sum, 1), static_cast<std::size_t>(position),
                               work.stream());
    work.finish();
  }

  double* gather_sums(int parts, void* stream) override {
    Work work(*this, stream);
    reduced_.reserve(2, work.stream());
    exchange(parts, true, work.stream());
    work.finish();
    return reduced_.data();
  }
  void scatter_sums(void* stream) override {
    Work work(*this, stream);
    exchange(0, false, work.stream());
    work.finish();
  }

  void run(const StepRequest& request, void* stream) override {
    Work work(*this, stream, Captured::kToo);
    const auto tensors = static_cast<int>(plan_->tensors.size());
    const Prepare prepare{request,
                          tables_->norm_parts.data(),
                          tables_->prepare.data(),
                          shared(),
                          work.captured() ? shared_.data() : nullptr,
                          tables_->scalars.data(),
                          control_.data(),
                          tensors};
    cuda_check(launch(prepare, blocks_for(tensors, Prepare::kThreads), work.stream()), device_,
               "launching prepare");
    try {
      for (const Bucket& bucket : plan_->buckets) {
        const ApplyTables tables{tables_->chunks.data() + bucket.first_chunk,
                                 tables_->tensors.data(), tables_->scalars.data(), control_.data()};
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

  void copy_grad_norm(double* to, void* stream) override {
    Work work(*this, stream, Captured::kToo);
    cuda_check(cudaMemcpyAsync(to, &control_.data()->grad_norm, sizeof *to,
                               cudaMemcpyDeviceToDevice, work.stream()),
               device_, "copying the gradient norm");
    work.finish();
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
      const BesideCaptures beside;
      cuda_check(cudaHostAlloc(&pinned_, kReadBytes, cudaHostAllocPortable), device_,
                 "allocating pinned memory to read state");
    }
    read_into(pinned_, from, bytes, stream);
    return pinned_;
  }
  void end_reading() noexcept override {
    if (pinned_ == nullptr) return;
    if (getpid() == process_) {
      const BesideCaptures beside;
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
    Work work(*this, stream, Captured::kToo);
    cuda_check(cudaMemsetAsync(data, 0, bytes, work.stream()), device_, "clearing memory");
    work.finish();
  }
  void copy(void* to, const void* from, std::size_t bytes, void* stream) override {
    Work work(*this, stream);
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, work.stream()), device_,
               "copying values");
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
  /// What is captured does not run now: it can neither wait for what does nor be waited for.
  enum class Captured { kRefused, kToo };

  /// What is enqueued while it lives comes after everything enqueued for this optimizer before, on
  /// whichever stream that was. What is captured comes after what its stream has captured before;
  /// when the graph runs, its caller orders it.
  class Work {
   public:
    Work(CudaBackend& backend, void* stream, Captured capture = Captured::kRefused)
        : backend_((backend.check_process(), backend)),
          guard_(backend.device_),
          stream_(static_cast<cudaStream_t>(stream)),
          captured_(backend.capture_id(stream_) != 0) {
      if (captured_ && capture == Captured::kRefused) {
        throw InvalidArgument("cuda:" + std::to_string(backend_.device_) +
                              ": the stream is being captured into a CUDA graph, where only "
                              "step() and zero_grad() can be called: do this outside of the "
                              "capture");
      }
      if (captured_) {
        backend_.in_graphs_ = backend_.tables_->in_graph = true;
        return;
      }
      // Handles are used again after a stream is destroyed, ids are not.
      cuda_check(cudaStreamGetId(stream_, &id_), backend_.device_, "identifying the stream");
      if (backend_.last_stream_ == id_) return;
      cuda_check(cudaStreamWaitEvent(stream_, backend_.last_work_, 0), backend_.device_,
                 "waiting for earlier work");
    }
    ~Work() {
      if (finished_ || captured_) return;
      // After an error: what was enqueued before it is still to be waited for.
      static_cast<void>(cudaEventRecord(backend_.last_work_, stream_));
      backend_.last_stream_ = id_;
    }
    Work(const Work&) = delete;
    Work& operator=(const Work&) = delete;

    cudaStream_t stream() const { return stream_; }
    bool captured() const { return captured_; }
    /// What another device has enqueued, or in the same capture, captured.
    cudaEvent_t end_of(const CudaBackend& other) const {
      return captured_ ? other.last_captured_ : other.last_work_;
    }
    void finish() {
      cuda_check(cudaEventRecord(end_of(backend_), stream_), backend_.device_,
                 "recording the end of a step");
      if (captured_) return;
      backend_.last_stream_ = id_;
      finished_ = true;
    }

   private:
    CudaBackend& backend_;
    DeviceGuard guard_;
    BesideCaptures beside_;
    cudaStream_t stream_;
    bool captured_;
    unsigned long long id_ = 0;
    bool finished_ = false;
  };

  void check_process() const {
    if (getpid() == process_) return;
    throw DeviceError("cuda:" + std::to_string(device_) +
                      ": a forked process cannot use the CUDA context of its parent");
  }

  /// Of a stream of this device, which is current.
  unsigned long long capture_id(cudaStream_t stream) const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    const cudaError_t code = cudaStreamGetCaptureInfo(stream, &status, &id);
    const auto refuse = [&](const char* why) {
      throw InvalidArgument("cuda:" + std::to_string(device_) + ": " + why);
    };
    if (code == cudaErrorStreamCaptureImplicit) {
      static_cast<void>(cudaGetLastError());
      refuse(
          "the default stream cannot be used while a stream that it waits for is captured into a "
          "CUDA graph: pass the captured stream, or capture one made with cudaStreamNonBlocking");
    }
    cuda_check(code, device_, "asking whether the stream is captured");
    if (status == cudaStreamCaptureStatusInvalidated) {
      refuse("an earlier call has invalidated the capture of its stream: end it and begin again");
    }
    return status == cudaStreamCaptureStatusActive ? id : 0;
  }

  /// A graph runs on whichever stream its caller likes.
  void wait_for_graphs() {
    if (!in_graphs_) return;
    const DeviceGuard guard(device_);
    const cudaError_t code = cudaDeviceSynchronize();
    if (code == cudaErrorStreamCaptureUnsupported) {
      static_cast<void>(cudaGetLastError());
      throw InvalidArgument("cuda:" + std::to_string(device_) +
                            ": this waits for the device, which is not possible while a stream is "
                            "captured into a CUDA graph: do it outside of the capture");
    }
    cuda_check(code, device_, "waiting for graphs");
  }

  bool plan_changed(const Tables& tables) const {
    return tables.members_changed || tables.norm_blocks_changed || tables.changed_rows.end != 0 ||
           static_cast<std::size_t>(tables.norm_parts) > tables_->norm_parts.capacity();
  }

  void bring(const Tables& tables, void* stream) {
    const BesideCaptures beside;
    Work work(*this, stream);
    if (ring_ == nullptr) ring_ = std::make_unique<UploadRing>(device_, kRingBytes);
    control_.reserve(1, work.stream());
    bring_shared(tables, work.stream());
    if (plan_changed(tables)) bring_plan(tables, work.stream());
    work.finish();
  }

  SharedTables shared() const { return {hypers_.data(), states_.data()}; }
  bool shared_has_moved() const {
    return shared_known_.hypers != hypers_.data() || shared_known_.states != states_.data();
  }

  /// What is one for the steps of every plan, in graphs or not. Graphs follow shared_, so what it
  /// points to is freed when it points elsewhere, or stays.
  void bring_shared(const Tables& tables, cudaStream_t stream) {
    DeviceTable<HyperRow> hypers_before(device_);
    DeviceTable<StepState> states_before(device_);
    try {
      hypers_.grow(tables.hypers.size(), hypers_before, stream);
      states_.grow(static_cast<std::size_t>(tables.states), states_before, stream);
      shared_.reserve(1, stream);
      if (shared_has_moved()) {
        const SharedTables now = shared();
        shared_.upload(*ring_, std::span(&now, 1), 0, stream);
        shared_known_ = now;
      }
    } catch (...) {
      hypers_.restore(hypers_before, stream);
      states_.restore(states_before, stream);
      throw;
    }
    hypers_before.release(stream);
    states_before.release(stream);
    hypers_.upload(*ring_, tables.hypers, 0, stream);
  }

  /// Into tables of its own where graphs have those that there are.
  void bring_plan(const Tables& tables, cudaStream_t stream) {
    if (!tables_->in_graph) return fill(*tables_, tables, false, stream);
    auto fresh = std::make_unique<PlanTables>(device_);
    of_graphs_.reserve(of_graphs_.size() + 1);
    try {
      fresh->norm_parts.reserve(tables_->norm_parts.capacity(), stream);
      fill(*fresh, tables, true, stream);
    } catch (...) {
      fresh->release(stream);
      throw;
    }
    of_graphs_.push_back(std::exchange(tables_, std::move(fresh)));
  }

  void fill(PlanTables& to, const Tables& tables, bool whole, cudaStream_t stream) {
    const Plan& plan = *tables.plan;
    const bool norm_blocks = tables.norm_blocks_changed || (whole && !plan.norm_blocks.empty());
    to.tensors.reserve(plan.tensors.size(), stream);
    to.prepare.reserve(plan.prepare.size(), stream);
    to.scalars.reserve(plan.tensors.size(), stream);
    to.chunks.reserve(plan.chunks.size(), stream);
    to.norm_parts.reserve(static_cast<std::size_t>(tables.norm_parts), stream);
    if (norm_blocks) {
      to.norm_blocks.reserve(plan.norm_blocks.size(), stream);
      to.norm_sums[0].reserve(plan.norm_blocks.size(), stream);
      to.norm_sums[1].reserve(blocks_for(std::ssize(plan.norm_blocks), kNormBlock), stream);
    }
    if (tables.norm_blocks_changed) {
      cuda_check(load_kernel<SumGradients>(), device_, "loading kernels");
      cuda_check(load_kernel<SumSums>(), device_, "loading kernels");
    }
    if (tables.members_changed) {
      for (const Bucket& bucket : plan.buckets) {
        cuda_check(apply_kernels().of[bucket.rule][bucket.layout].load(), device_,
                   "loading kernels");
      }
    }
    if (tables.members_changed || whole) {
      to.tensors.upload(*ring_, plan.tensors, 0, stream);
      to.prepare.upload(*ring_, plan.prepare, 0, stream);
      to.chunks.upload(*ring_, plan.chunks, 0, stream);
    } else {
      const auto begin = static_cast<std::size_t>(tables.changed_rows.begin);
      const auto end = static_cast<std::size_t>(tables.changed_rows.end);
      to.tensors.upload(*ring_, std::span(plan.tensors).subspan(begin, end - begin), begin, stream);
    }
    if (norm_blocks) to.norm_blocks.upload(*ring_, plan.norm_blocks, 0, stream);
  }

  void exchange(int parts, bool gathers, cudaStream_t stream) {
    const ExchangeSums exchange{tables_->norm_parts.data(), parts, reduced_.data(), gathers};
    cuda_check(launch(exchange, 1, stream), device_, "launching the exchange of the norm");
  }

  template <class T>
  T read_one(const T* from, void* stream) {
    T value;
    read_into(&value, from, sizeof value, stream);
    return value;
  }

  void read_into(void* to, const void* from, std::size_t bytes, void* stream) {
    const BesideCaptures beside;
    Work work(*this, stream);
    wait_for_graphs();
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, work.stream()), device_,
               "reading from the device");
    cuda_check(cudaStreamSynchronize(work.stream()), device_, "waiting for the device");
    work.finish();
  }

  /// Nothing of it is in use any more.
  void release(cudaStream_t stream) noexcept {
    for (const auto& tables : of_graphs_) tables->release(stream);
    tables_->release(stream);
    hypers_.release(stream);
    states_.release(stream);
    shared_.release(stream);
    control_.release(stream);
    reduced_.release(stream);
    ring_.reset();
    end_reading();
    for (cudaEvent_t* event : {&last_work_, &last_captured_}) {
      if (*event != nullptr) static_cast<void>(cudaEventDestroy(*event));
      *event = nullptr;
    }
  }

  int device_;
  pid_t process_ = getpid();
  std::shared_ptr<Allocator> allocator_;
  cudaEvent_t last_work_ = nullptr;
  cudaEvent_t last_captured_ = nullptr;  // recorded in captures alone
  unsigned long long last_stream_ = ~0ull;
  const Plan* plan_ = nullptr;

  std::unique_ptr<UploadRing> ring_;
  void* pinned_ = nullptr;  // kReadBytes, while state is read
  std::unique_ptr<PlanTables> tables_ = std::make_unique<PlanTables>(device_);
  std::vector<std::unique_ptr<PlanTables>> of_graphs_;  // no longer ours to write
  bool in_graphs_ = false;                              // some step was captured
  DeviceTable<HyperRow> hypers_{device_};
  DeviceTable<StepState> states_{device_};
  DeviceTable<SharedTables> shared_{device_};
  SharedTables shared_known_{};  // what was uploaded
  DeviceTable<Control> control_{device_};
  DeviceTable<double> reduced_{device_};  // what gather_sums() gives out
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
