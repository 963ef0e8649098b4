// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The calls of the runtime: what each does when it is called, and what it leaves to be done when
// its stream gets there.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <optional>
#include <set>
#include <utility>

#include "cuda_sim.h"
#include "device_memory.h"
#include "graph.h"
#include "grid.h"
#include "schedule.h"

struct CUstream_st {
  unsigned long long id;
  int device;
  bool blocking;
  cuda_sim::Ticket last;
  cuda_sim::CapturePoint captured = {};
};
struct CUevent_st {
  int device;
  cuda_sim::Ticket recorded;
  cuda_sim::CapturePoint captured = {};  // where it was recorded in a capture last
};
struct CUgraph_st {
  std::shared_ptr<const cuda_sim::Graph> graph;
};
struct CUgraphExec_st {
  std::shared_ptr<const cuda_sim::Graph> graph;
  cuda_sim::Ticket last;  // launches of one exec run one after the other
};

namespace cuda_sim {
namespace {

/// Handles are used again as soon as their object is destroyed, the latest first.
template <class Object>
class Handles {
 public:
  Object* create(Object object) {
    if (free_.empty()) {
      memory_.push_back(std::make_unique<Object>());
      free_.push_back(memory_.back().get());
    }
    Object* handle = free_.back();
    free_.pop_back();
    *handle = std::move(object);
    live_.insert(handle);
    return handle;
  }
  void destroy(Object* handle) {
    *handle = {};
    live_.erase(handle);
    free_.push_back(handle);
  }
  bool valid(Object* handle) const { return live_.count(handle) != 0; }
  std::size_t live() const { return live_.size(); }
  const std::set<Object*>& all() const { return live_; }
  void clear() {
    while (!live_.empty()) destroy(*live_.begin());
  }

 private:
  std::vector<std::unique_ptr<Object>> memory_;
  std::vector<Object*> free_;
  std::set<Object*> live_;
};

struct SimulatedDevice {
  DeviceMemory memory;
  CUstream_st legacy{};
  std::vector<CUstream_st*> blocking;
  std::vector<Ticket> orphans;  // the last work of destroyed blocking streams
};

struct Pinned {
  std::size_t bytes;
  std::shared_ptr<int> users = std::make_shared<int>(0);  // copies in flight, and in graphs
};

/// Pinned memory is in use while it lives.
class PinnedUse {
 public:
  explicit PinnedUse(const Pinned& block) : users_(block.users) { ++*users_; }
  ~PinnedUse() { --*users_; }
  PinnedUse(const PinnedUse&) = delete;
  PinnedUse& operator=(const PinnedUse&) = delete;

 private:
  std::shared_ptr<int> users_;
};

struct Adopted {
  std::size_t bytes;
  int device;
};

class Runtime {
 public:
  Runtime() : schedule([this](const Operation& operation) { return run(operation); }) {
    reset(1, Policy::kLate);
  }

  void reset(std::uint64_t seed, Policy policy) {
    schedule.reset(seed, policy);
    streams.clear();
    events.clear();
    graphs.clear();
    execs.clear();
    captures.clear();
    thread_mode = cudaStreamCaptureModeGlobal;
    for (int d = 0; d < kDevices; ++d) {
      devices[d].memory.clear();
      devices[d].legacy = {static_cast<unsigned long long>(d) + 1, d, true, nullptr};
      devices[d].blocking.clear();
      devices[d].orphans.clear();
    }
    for (const auto& [data, block] : pinned) std::free(data);
    pinned.clear();
    adopted.clear();
    most_pinned_bytes = 0;
    next_stream_id = 100;
    sticky = cudaSuccess;
    fault.reset();
    hit.clear();
    kernels_until_failure = -1;
    counts.clear();
    total = 0;
    violations.clear();
  }

  void violate(const std::string& text) { violations.push_back(text); }

  /// Runs one operation with the memory of its devices open, and no other.
  bool run(const Operation& operation) {
    if (sticky != cudaSuccess) return false;
    if (!operation.run) return true;
    open_memory(operation.devices);
    operation.run();
    return sticky == cudaSuccess;
  }

  /// Bit d of `wanted`: device d.
  void open_memory(unsigned wanted) {
    for (int d = 0; d < kDevices; ++d) devices[d].memory.open((wanted >> d & 1) != 0);
  }

  CUstream_st* find_stream(cudaStream_t handle) {
    if (handle == nullptr) return &devices[current].legacy;
    if (streams.valid(handle)) return handle;
    violate("a destroyed stream was used");
    stream_error = cudaErrorInvalidResourceHandle;
    return nullptr;
  }
  /// One that work can be enqueued on; otherwise null, and stream_error says why.
  CUstream_st* stream(cudaStream_t handle) {
    CUstream_st* const found = find_stream(handle);
    if (found == nullptr) return nullptr;
    if (found->captured.capture != nullptr && found->captured.capture->invalidated) {
      stream_error = cudaErrorStreamCaptureInvalidated;
      return nullptr;
    }
    if (handle == nullptr && blocking_capture(current) != nullptr) {
      while (Capture* capture = blocking_capture(current)) capture->invalidated = true;
      stream_error = cudaErrorStreamCaptureImplicit;
      return nullptr;
    }
    return found;
  }

  /// A capture of a stream that the default stream of this device would have to wait for.
  Capture* blocking_capture(int device) {
    for (const CUstream_st* other : devices[device].blocking) {
      Capture* const capture = other->captured.capture.get();
      if (capture != nullptr && !capture->invalidated) return capture;
    }
    return nullptr;
  }
  /// Of a capture under way: some call has done what it must not.
  static cudaError_t invalidate(Capture* capture, cudaError_t code) {
    if (capture != nullptr) capture->invalidated = true;
    return code;
  }
  /// What may disturb a capture is forbidden by the modes of threads and captures.
  cudaError_t forbidden_by_captures() {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    cudaError_t code = cudaSuccess;
    for (const auto& capture : captures) {
      if (capture->invalidated || capture->mode == cudaStreamCaptureModeRelaxed) continue;
      const bool own = capture->thread == std::this_thread::get_id();
      const bool both_global = thread_mode == cudaStreamCaptureModeGlobal &&
                               capture->mode == cudaStreamCaptureModeGlobal;
      if (own || both_global) {
        code = invalidate(capture.get(), cudaErrorStreamCaptureUnsupported);
      }
    }
    return code;
  }
  std::vector<CUstream_st*> streams_in(const Capture* capture) {
    std::vector<CUstream_st*> members;
    for (CUstream_st* one : streams.all()) {
      if (one->captured.capture.get() == capture) members.push_back(one);
    }
    return members;
  }

  /// CUDA's order: after what is on the stream; the legacy default stream after all blocking
  /// streams of its device, and they after it.
  Ticket enqueue(CUstream_st* stream, Operation operation) {
    if (CapturePoint& point = stream->captured; point.capture != nullptr) {
      operation.stream_device = stream->device;
      point.after = {point.capture->graph.add(std::move(operation), point.after)};
      return nullptr;
    }
    auto ticket = std::make_shared<Operation>(std::move(operation));
    const auto follow = [&](const Ticket& before) {
      if (before != nullptr && !before->done) ticket->after.push_back(before);
    };
    SimulatedDevice& device = devices[stream->device];
    ticket->stream_device = stream->device;
    ticket->stream = stream->id;
    follow(stream->last);
    if (stream == &device.legacy) {
      for (const CUstream_st* other : device.blocking) follow(other->last);
      for (const Ticket& orphan : device.orphans) follow(orphan);
      device.orphans.clear();
    } else if (stream->blocking) {
      follow(device.legacy.last);
    }
    stream->last = ticket;
    schedule.add(ticket);
    return ticket;
  }

  std::recursive_mutex mutex;
  Schedule schedule;
  SimulatedDevice devices[kDevices];
  Handles<CUstream_st> streams;
  Handles<CUevent_st> events;
  Handles<CUgraph_st> graphs;
  Handles<CUgraphExec_st> execs;
  std::vector<std::shared_ptr<Capture>> captures;  // under way
  cudaError_t stream_error = cudaSuccess;          // why stream() has found none
  unsigned long long next_capture_id = 1;
  std::map<void*, Pinned> pinned;
  std::map<const char*, Adopted> adopted;
  std::size_t most_pinned_bytes = 0;
  unsigned long long next_stream_id = 100;

  cudaError_t sticky = cudaSuccess;
  std::optional<Fault> fault;
  std::string hit;
  std::int64_t kernels_until_failure = -1;
  std::map<std::string, std::int64_t> counts;
  std::int64_t total = 0;
  std::vector<std::string> violations;

  static thread_local int current;
  static thread_local cudaError_t last_error;
  static thread_local bool in_host_function;
  static thread_local cudaStreamCaptureMode thread_mode;
};
thread_local cudaStreamCaptureMode Runtime::thread_mode = cudaStreamCaptureModeGlobal;
thread_local int Runtime::current = 0;
thread_local cudaError_t Runtime::last_error = cudaSuccess;
thread_local bool Runtime::in_host_function = false;

Runtime& runtime() {
  static Runtime* const instance = new Runtime;  // outlives static destructors
  return *instance;
}

/// Counts the call, lets time pass, and says which error it must return, if any.
cudaError_t enter(Runtime& r, const char* name) {
  if (r.in_host_function) {
    r.violate(std::string(name) + " was called by a host function");
    return cudaErrorNotPermitted;
  }
  ++r.total;
  ++r.counts[name];
  r.schedule.pass_time();
  if (r.sticky != cudaSuccess) return r.sticky;
  if (!r.fault || r.fault->call-- != 0) return cudaSuccess;
  r.hit = name;
  const Fault fault = *std::exchange(r.fault, std::nullopt);
  if (fault.sticky) r.sticky = fault.code;
  return fault.code;
}

cudaError_t leave(Runtime& r, cudaError_t code) {
  if (!r.in_host_function) r.open_memory(0);
  if (code != cudaSuccess && code != cudaErrorNotReady) r.last_error = code;
  return code;
}

/// A call that does nothing when it fails.
template <class F>
cudaError_t call(const char* name, F&& f) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  const cudaError_t refused = enter(r, name);
  const cudaError_t code = refused != cudaSuccess ? refused : f(r);
  return leave(r, r.sticky != cudaSuccess ? r.sticky : code);
}

/// A call that might disturb a capture under way.
template <class F>
cudaError_t unsafe_call(const char* name, F&& f) {
  return call(name, [&](Runtime& r) {
    const cudaError_t forbidden = r.forbidden_by_captures();
    return forbidden != cudaSuccess ? forbidden : f(r);
  });
}

/// A call that does its work even if it reports an error of earlier work.
template <class F>
cudaError_t releasing_call(const char* name, F&& f) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  const cudaError_t refused = enter(r, name);
  if (refused == cudaErrorNotPermitted || r.sticky != cudaSuccess) return leave(r, refused);
  const cudaError_t code = f(r);
  return leave(r, refused != cudaSuccess ? refused : code);
}

/// The entry that holds the address; end() if there is none.
template <class Map>
auto find_block(Map& map, const void* address) {
  auto block = map.upper_bound(static_cast<typename Map::key_type>(const_cast<void*>(address)));
  if (block == map.begin()) return map.end();
  --block;
  const char* const end = static_cast<const char*>(block->first) + block->second.bytes;
  return static_cast<const char*>(address) < end ? block : map.end();
}

void forget_overlapping(std::map<const char*, Adopted>& adopted, const void* data,
                        std::size_t bytes) {
  const char* const begin = static_cast<const char*>(data);
  auto first = find_block(adopted, data);
  if (first == adopted.end()) first = adopted.lower_bound(begin);
  adopted.erase(first, adopted.lower_bound(begin + bytes));
}

int device_of(const Runtime& r, const void* address) {
  for (int d = 0; d < kDevices; ++d) {
    if (r.devices[d].memory.contains(address)) return d;
  }
  const auto adopted = find_block(r.adopted, address);
  return adopted == r.adopted.end() ? -1 : adopted->second.device;
}

Pinned* pinned_block(Runtime& r, const void* address, std::size_t bytes) {
  const auto block = find_block(r.pinned, address);
  if (block == r.pinned.end()) return nullptr;
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(address) -
                                               static_cast<const char*>(block->first));
  if (bytes > block->second.bytes - offset) r.violate("a copy leaves its pinned memory");
  return &block->second;
}

/// When the stream gets there: do these bytes of device memory exist? Host addresses always do.
bool exists(Runtime& r, const char* what, const void* address, std::size_t bytes) {
  const int device = device_of(r, address);
  if (device < 0 || r.devices[device].memory.exists(address, bytes)) return true;
  const auto adopted = find_block(r.adopted, address);
  if (adopted != r.adopted.end() &&
      static_cast<const char*>(address) + bytes <= adopted->first + adopted->second.bytes) {
    return true;
  }
  r.violate(std::string(what) + " of " + std::to_string(bytes) +
            " bytes outside an allocation of device " + std::to_string(device));
  return false;
}

cudaError_t check_direction(Runtime& r, int to, int from, cudaMemcpyKind kind) {
  const bool fits = kind == cudaMemcpyDefault ||
                    (kind == cudaMemcpyHostToDevice && to >= 0 && from < 0) ||
                    (kind == cudaMemcpyDeviceToHost && to < 0 && from >= 0) ||
                    (kind == cudaMemcpyDeviceToDevice && to >= 0 && from >= 0) ||
                    (kind == cudaMemcpyHostToHost && to < 0 && from < 0);
  if (fits) return cudaSuccess;
  r.violate("the direction of a copy is not where its pointers lie");
  return cudaErrorInvalidMemcpyDirection;
}

unsigned bit_of(int device) { return device < 0 ? 0u : 1u << device; }

/// Pageable sources are copied at once (in a graph: read whenever it runs), pinned ones are read
/// when the copy runs; a copy to pageable memory has run when the call returns.
cudaError_t copy(Runtime& r, void* to, const void* from, std::size_t bytes, CUstream_st* stream,
                 bool wait) {
  if (stream == nullptr) return r.stream_error;
  if (bytes == 0) return cudaSuccess;
  const bool captured = stream->captured.capture != nullptr;
  const int to_device = device_of(r, to), from_device = device_of(r, from);
  Pinned* const to_pinned = to_device < 0 ? pinned_block(r, to, bytes) : nullptr;
  Pinned* const from_pinned = from_device < 0 ? pinned_block(r, from, bytes) : nullptr;
  auto staged = std::make_shared<std::vector<char>>();
  if (from_device < 0 && from_pinned == nullptr && !captured) {
    const auto* begin = static_cast<const char*>(from);
    staged->assign(begin, begin + bytes);
  }
  const auto use = [](const Pinned* block) {
    return block == nullptr ? nullptr : std::make_shared<PinnedUse>(*block);
  };
  const Ticket done = r.enqueue(
      stream, {[&r, to, from, bytes, staged, held = std::pair(use(to_pinned), use(from_pinned))] {
                 if (!exists(r, "copy to", to, bytes) || !exists(r, "copy from", from, bytes)) {
                   return;
                 }
                 std::memmove(to, staged->empty() ? from : staged->data(), bytes);
               },
               bit_of(to_device) | bit_of(from_device)});
  if (to_device < 0 && to_pinned == nullptr) wait = true;
  // A copy from pageable memory may return before the device has the bytes.
  if (wait && !(to_device >= 0 && from_device < 0 && from_pinned == nullptr)) {
    r.schedule.force(done);
  }
  return cudaSuccess;
}

cudaError_t allocate(Runtime& r, void** data, std::size_t bytes, CUstream_st* stream) {
  if (data == nullptr || bytes == 0) return cudaErrorInvalidValue;
  if (stream == nullptr) return r.stream_error;
  if (stream->captured.capture != nullptr) {
    r.violate("an allocation was captured: its memory is gone when the graph has run");
    return cudaErrorStreamCaptureUnsupported;
  }
  DeviceMemory& memory = r.devices[stream->device].memory;
  char* address = memory.reserve(bytes);
  if (address == nullptr) return cudaErrorMemoryAllocation;
  r.enqueue(stream, {[&memory, address] { memory.begin(address); }, bit_of(stream->device)});
  *data = address;
  return cudaSuccess;
}

cudaError_t deallocate(Runtime& r, void* data, CUstream_st* stream) {
  if (data == nullptr) return cudaSuccess;
  const int device = device_of(r, data);
  auto* address = static_cast<char*>(data);
  if (stream != nullptr && stream->captured.capture != nullptr) {
    r.violate("a free was captured");
    return cudaErrorStreamCaptureUnsupported;
  }
  if (device < 0 || !r.devices[device].memory.promise_free(address)) {
    r.violate("freed twice, or what was never allocated");
    return cudaErrorInvalidValue;
  }
  if (stream == nullptr) return r.stream_error;
  DeviceMemory& memory = r.devices[device].memory;
  r.enqueue(stream, {[&memory, address] { memory.end(address); }, bit_of(device), true});
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_kernel(const char* name, unsigned blocks, cudaStream_t handle,
                          std::function<void(const GridOrder&)> run) {
  return call("cudaLaunchKernel", [&](Runtime& r) {
    CUstream_st* stream = r.stream(handle);
    if (stream == nullptr) return r.stream_error;
    if (stream->device != r.current) return cudaErrorInvalidResourceHandle;
    if (blocks == 0) {
      r.violate(std::string("a launch of no blocks: ") + name);
      return cudaErrorInvalidValue;
    }
    r.enqueue(stream, {[&r, blocks, run = std::move(run)] {
                         if (r.kernels_until_failure >= 0 && r.kernels_until_failure-- == 0) {
                           r.sticky = cudaErrorLaunchFailure;
                           return;
                         }
                         GridOrder order{std::vector<unsigned>(blocks), r.schedule.chance(2)};
                         std::iota(order.blocks.begin(), order.blocks.end(), 0u);
                         std::shuffle(order.blocks.begin(), order.blocks.end(),
                                      r.schedule.random());
                         run(order);
                       },
                       bit_of(stream->device)});
    return cudaSuccess;
  });
}

cudaError_t load_kernel(const char*) {
  return unsafe_call("cudaFuncGetAttributes", [](Runtime&) { return cudaSuccess; });
}

void reset(std::uint64_t seed, Policy policy) {
  const std::lock_guard lock(runtime().mutex);
  runtime().reset(seed, policy);
  Runtime::current = 0;
  Runtime::last_error = cudaSuccess;
}

void reseed(std::uint64_t seed, Policy policy) {
  const std::lock_guard lock(runtime().mutex);
  runtime().schedule.force_all();
  runtime().open_memory(0);
  runtime().schedule.reset(seed, policy);
}

void adopt(const void* data, std::size_t bytes, int device) {
  const std::lock_guard lock(runtime().mutex);
  if (bytes == 0) return;
  forget_overlapping(runtime().adopted, data, bytes);
  runtime().adopted[static_cast<const char*>(data)] = {bytes, device};
}

void forget_adopted() {
  const std::lock_guard lock(runtime().mutex);
  runtime().adopted.clear();
}

void inject(Fault fault) {
  const std::lock_guard lock(runtime().mutex);
  runtime().fault = fault;
  runtime().hit.clear();
}

void fail_running_kernel(std::int64_t launches) {
  const std::lock_guard lock(runtime().mutex);
  runtime().kernels_until_failure = launches;
}

void clear_faults() {
  const std::lock_guard lock(runtime().mutex);
  runtime().fault.reset();
  runtime().kernels_until_failure = -1;
}

std::string faulted_call() { return runtime().hit; }

std::int64_t calls() { return runtime().total; }

std::int64_t calls(const std::string& name) {
  const std::lock_guard lock(runtime().mutex);
  const auto found = runtime().counts.find(name);
  return found == runtime().counts.end() ? 0 : found->second;
}

std::size_t most_pinned_bytes() {
  const std::lock_guard lock(runtime().mutex);
  return runtime().most_pinned_bytes;
}

void forget_calls() {
  const std::lock_guard lock(runtime().mutex);
  runtime().counts.clear();
  runtime().total = 0;
}

std::string call_list() {
  const std::lock_guard lock(runtime().mutex);
  std::string list;
  for (const auto& [name, count] : runtime().counts) {
    list += name + " x " + std::to_string(count) + "\n";
  }
  return list;
}

Live live() {
  const std::lock_guard lock(runtime().mutex);
  Live now;
  for (const auto& device : runtime().devices) {
    now.allocations += static_cast<std::int64_t>(device.memory.live());
  }
  now.pinned = static_cast<std::int64_t>(runtime().pinned.size());
  now.events = static_cast<std::int64_t>(runtime().events.live());
  now.streams = static_cast<std::int64_t>(runtime().streams.live());
  now.graphs = static_cast<std::int64_t>(runtime().graphs.live() + runtime().execs.live());
  return now;
}

std::vector<std::string> take_violations() {
  const std::lock_guard lock(runtime().mutex);
  return std::exchange(runtime().violations, {});
}

void check_guards() {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  for (auto& device : r.devices) {
    device.memory.check_guards([&](const std::string& text) { r.violate(text); });
  }
  r.open_memory(0);
}

std::size_t pending() {
  const std::lock_guard lock(runtime().mutex);
  return runtime().schedule.pending();
}

}  // namespace cuda_sim

using cuda_sim::call;
using cuda_sim::Capture;
using cuda_sim::releasing_call;
using cuda_sim::Runtime;
using cuda_sim::unsafe_call;

cudaError_t cudaGetDeviceCount(int* count) {
  return call("cudaGetDeviceCount", [&](Runtime&) {
    *count = cuda_sim::kDevices;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDevice(int* device) {
  return call("cudaGetDevice", [&](Runtime& r) {
    *device = r.current;
    return cudaSuccess;
  });
}

cudaError_t cudaSetDevice(int device) {
  return call("cudaSetDevice", [&](Runtime& r) {
    if (device < 0 || device >= cuda_sim::kDevices) return cudaErrorInvalidDevice;
    r.current = device;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return call("cudaDeviceSynchronize", [](Runtime& r) {
    cudaError_t code = cudaSuccess;
    for (const CUstream_st* stream : r.streams.all()) {
      Capture* const capture = stream->captured.capture.get();
      if (capture == nullptr || stream->device != r.current) continue;
      code = Runtime::invalidate(capture, cudaErrorStreamCaptureUnsupported);
    }
    if (code != cudaSuccess) return code;
    r.schedule.force_device(r.current);
    return cudaSuccess;
  });
}

cudaError_t cudaGetLastError() { return std::exchange(Runtime::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return Runtime::last_error; }

const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidMemcpyDirection: return "cudaErrorInvalidMemcpyDirection";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotPermitted: return "cudaErrorNotPermitted";
    case cudaErrorIllegalState: return "cudaErrorIllegalState";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureMerge: return "cudaErrorStreamCaptureMerge";
    case cudaErrorStreamCaptureUnmatched: return "cudaErrorStreamCaptureUnmatched";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    case cudaErrorStreamCaptureWrongThread: return "cudaErrorStreamCaptureWrongThread";
    case cudaErrorUnknown: return "cudaErrorUnknown";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorMemoryAllocation ? "out of memory" : "simulated";
}

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  return unsafe_call("cudaMalloc", [&](Runtime& r) {
    const cudaError_t code = cuda_sim::allocate(r, data, bytes, &r.devices[r.current].legacy);
    if (code == cudaSuccess) r.schedule.force(r.devices[r.current].legacy.last);
    return code;
  });
}

cudaError_t cudaFree(void* data) {
  return releasing_call("cudaFree", [&](Runtime& r) {
    if (const cudaError_t code = r.forbidden_by_captures(); code != cudaSuccess) return code;
    r.schedule.force_all();
    const int device = std::max(cuda_sim::device_of(r, data), 0);
    const cudaError_t code = cuda_sim::deallocate(r, data, &r.devices[device].legacy);
    r.schedule.force_all();
    return code;
  });
}

namespace {

/// Of a pool's memory on this stream: unsafe beside a capture, a part of the graph in one.
template <class F>
cudaError_t from_pool(Runtime& r, cudaStream_t handle, F&& f) {
  CUstream_st* stream = r.stream(handle);
  if (stream != nullptr && stream->captured.capture == nullptr) {
    if (const cudaError_t code = r.forbidden_by_captures(); code != cudaSuccess) return code;
  }
  return f(stream);
}

}  // namespace

cudaError_t cudaMallocAsync(void** data, std::size_t bytes, cudaStream_t handle) {
  return call("cudaMallocAsync", [&](Runtime& r) {
    return from_pool(r, handle,
                     [&](auto* stream) { return cuda_sim::allocate(r, data, bytes, stream); });
  });
}

cudaError_t cudaFreeAsync(void* data, cudaStream_t handle) {
  return releasing_call("cudaFreeAsync", [&](Runtime& r) {
    return from_pool(r, handle,
                     [&](auto* stream) { return cuda_sim::deallocate(r, data, stream); });
  });
}

cudaError_t cudaHostAlloc(void** data, std::size_t bytes, unsigned) {
  return unsafe_call("cudaHostAlloc", [&](Runtime& r) {
    void* memory = std::malloc(bytes);
    if (memory == nullptr) return cudaErrorMemoryAllocation;
    std::memset(memory, 0xff, bytes);
    r.pinned[memory] = {bytes};
    cuda_sim::forget_overlapping(r.adopted, memory, bytes);
    std::size_t pinned_bytes = 0;
    for (const auto& [address, block] : r.pinned) pinned_bytes += block.bytes;
    r.most_pinned_bytes = std::max(r.most_pinned_bytes, pinned_bytes);
    *data = memory;
    return cudaSuccess;
  });
}

cudaError_t cudaFreeHost(void* data) {
  return releasing_call("cudaFreeHost", [&](Runtime& r) {
    if (const cudaError_t code = r.forbidden_by_captures(); code != cudaSuccess) return code;
    if (data == nullptr) return cudaSuccess;
    const auto found = r.pinned.find(data);
    if (found == r.pinned.end()) {
      r.violate("cudaFreeHost of what is not pinned memory");
      return cudaErrorInvalidValue;
    }
    if (*found->second.users != 0) {
      r.violate("pinned memory was freed while a copy still had to use it");
      r.schedule.force_all();
    }
    std::memset(data, 0xff, found->second.bytes);
    std::free(data);
    r.pinned.erase(found);
    return cudaSuccess;
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return unsafe_call("cudaMemcpy", [&](Runtime& r) {
    const cudaError_t code = cuda_sim::check_direction(r, cuda_sim::device_of(r, to),
                                                       cuda_sim::device_of(r, from), kind);
    if (code != cudaSuccess) return code;
    return cuda_sim::copy(r, to, from, bytes, r.stream(nullptr), true);
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return call("cudaMemcpyAsync", [&](Runtime& r) {
    const cudaError_t code = cuda_sim::check_direction(r, cuda_sim::device_of(r, to),
                                                       cuda_sim::device_of(r, from), kind);
    if (code != cudaSuccess) return code;
    return cuda_sim::copy(r, to, from, bytes, r.stream(stream), false);
  });
}

cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device,
                                std::size_t bytes, cudaStream_t stream) {
  return call("cudaMemcpyPeerAsync", [&](Runtime& r) {
    if (cuda_sim::device_of(r, to) != to_device || cuda_sim::device_of(r, from) != from_device) {
      r.violate("cudaMemcpyPeerAsync names devices its pointers do not lie on");
      return cudaErrorInvalidValue;
    }
    return cuda_sim::copy(r, to, from, bytes, r.stream(stream), false);
  });
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t handle) {
  return call("cudaMemsetAsync", [&](Runtime& r) {
    CUstream_st* stream = r.stream(handle);
    const int device = cuda_sim::device_of(r, to);
    if (stream == nullptr) return r.stream_error;
    if (device < 0) {
      r.violate("cudaMemsetAsync of host memory");
      return cudaErrorInvalidValue;
    }
    r.enqueue(stream, {[&r, to, value, bytes] {
                         if (cuda_sim::exists(r, "memset", to, bytes)) {
                           std::memset(to, value, bytes);
                         }
                       },
                       cuda_sim::bit_of(device)});
    return cudaSuccess;
  });
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return unsafe_call("cudaStreamCreateWithFlags", [&](Runtime& r) {
    const bool blocking = (flags & cudaStreamNonBlocking) == 0;
    *stream = r.streams.create({r.next_stream_id++, r.current, blocking, nullptr});
    if (blocking) r.devices[r.current].blocking.push_back(*stream);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return releasing_call("cudaStreamDestroy", [&](Runtime& r) {
    if (const cudaError_t code = r.forbidden_by_captures(); code != cudaSuccess) return code;
    if (!r.streams.valid(stream)) {
      r.violate("a stream was destroyed twice");
      return cudaErrorInvalidResourceHandle;
    }
    if (Capture* const capture = stream->captured.capture.get(); capture != nullptr) {
      capture->invalidated = true;
      r.violate("a stream was destroyed while it was captured");
    }
    auto& device = r.devices[stream->device];
    if (stream->blocking) {
      std::erase(device.blocking, stream);
      if (stream->last != nullptr) device.orphans.push_back(stream->last);
    }
    r.streams.destroy(stream);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return unsafe_call("cudaStreamSynchronize", [&](Runtime& r) {
    CUstream_st* stream = r.stream(handle);
    if (stream == nullptr) return r.stream_error;
    if (Capture* const capture = stream->captured.capture.get(); capture != nullptr) {
      return Runtime::invalidate(capture, cudaErrorStreamCaptureUnsupported);
    }
    if (handle == nullptr)
      r.enqueue(stream, cuda_sim::Operation{});  // waits for the blocking streams, too
    r.schedule.force(stream->last);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return unsafe_call("cudaStreamQuery", [&](Runtime& r) {
    CUstream_st* stream = r.stream(handle);
    if (stream == nullptr) return r.stream_error;
    if (Capture* const capture = stream->captured.capture.get(); capture != nullptr) {
      return Runtime::invalidate(capture, cudaErrorStreamCaptureUnsupported);
    }
    return stream->last == nullptr || stream->last->done ? cudaSuccess : cudaErrorNotReady;
  });
}

namespace {

/// For an event that was recorded in a capture: the stream joins it.
cudaError_t wait_in_capture(CUstream_st& stream, const CUevent_st& event, cudaStream_t handle) {
  Capture* const capture = event.captured.capture.get();
  Capture* const own = stream.captured.capture.get();
  if (capture->ended) return Runtime::invalidate(own, cudaErrorCapturedEvent);
  if (capture->invalidated) return Runtime::invalidate(own, cudaErrorStreamCaptureInvalidated);
  if (own != nullptr && own != capture) {
    own->invalidated = true;
    return Runtime::invalidate(capture, cudaErrorStreamCaptureMerge);
  }
  if (handle == nullptr) return Runtime::invalidate(capture, cudaErrorStreamCaptureImplicit);
  stream.captured.capture = event.captured.capture;
  auto& after = stream.captured.after;
  after.insert(after.end(), event.captured.after.begin(), event.captured.after.end());
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  return call("cudaStreamWaitEvent", [&](Runtime& r) {
    CUstream_st* stream = r.stream(handle);
    if (!r.events.valid(event)) {
      r.violate("a destroyed event was used");
      return cudaErrorInvalidResourceHandle;
    }
    if (stream == nullptr) return r.stream_error;
    if (event->captured.capture != nullptr) return wait_in_capture(*stream, *event, handle);
    if (event->recorded == nullptr) return cudaSuccess;
    if (Capture* const capture = stream->captured.capture.get(); capture != nullptr) {
      return Runtime::invalidate(capture, cudaErrorStreamCaptureIsolation);
    }
    if (event->recorded->done) return cudaSuccess;
    cuda_sim::Operation wait;
    wait.after.push_back(event->recorded);
    r.enqueue(stream, std::move(wait));
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetId(cudaStream_t handle, unsigned long long* id) {
  return call("cudaStreamGetId", [&](Runtime& r) {
    const CUstream_st* stream = r.find_stream(handle);
    if (stream == nullptr) return r.stream_error;
    *id = stream->id;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id) {
  return call("cudaStreamGetCaptureInfo", [&](Runtime& r) {
    const CUstream_st* stream = r.find_stream(handle);
    if (stream == nullptr) return r.stream_error;
    if (handle == nullptr && r.blocking_capture(r.current) != nullptr) {
      return cudaErrorStreamCaptureImplicit;
    }
    const Capture* const capture = stream->captured.capture.get();
    *status = capture == nullptr     ? cudaStreamCaptureStatusNone
              : capture->invalidated ? cudaStreamCaptureStatusInvalidated
                                     : cudaStreamCaptureStatusActive;
    if (id != nullptr && capture != nullptr) *id = capture->id;
    return cudaSuccess;
  });
}

/// A setting of the thread: no device is asked.
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, Runtime::thread_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return call("cudaStreamBeginCapture", [&](Runtime& r) {
    CUstream_st* stream = r.find_stream(handle);
    if (stream == nullptr) return r.stream_error;
    if (handle == nullptr) return cudaErrorStreamCaptureUnsupported;
    if (stream->captured.capture != nullptr) return cudaErrorIllegalState;
    stream->captured = {std::make_shared<Capture>(Capture{r.next_capture_id++, mode, handle}), {}};
    r.captures.push_back(stream->captured.capture);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return call("cudaStreamEndCapture", [&](Runtime& r) {
    *graph = nullptr;
    CUstream_st* stream = r.find_stream(handle);
    if (stream == nullptr) return r.stream_error;
    const std::shared_ptr<Capture> capture = stream->captured.capture;
    if (capture == nullptr) return cudaErrorIllegalState;
    if (capture->origin != handle) return cudaErrorStreamCaptureUnmatched;
    if (capture->mode != cudaStreamCaptureModeRelaxed &&
        capture->thread != std::this_thread::get_id()) {
      return cudaErrorStreamCaptureWrongThread;
    }
    bool joined = true;
    for (CUstream_st* member : r.streams_in(capture.get())) {
      joined = joined && capture->graph.all_lead_to(member->captured.after, stream->captured.after);
    }
    for (CUstream_st* member : r.streams_in(capture.get())) member->captured = {};
    std::erase(r.captures, capture);
    capture->ended = true;
    if (capture->invalidated) return cudaErrorStreamCaptureInvalidated;
    if (!joined) return cudaErrorStreamCaptureUnjoined;
    *graph = r.graphs.create({std::make_shared<const cuda_sim::Graph>(std::move(capture->graph))});
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return unsafe_call("cudaGraphInstantiate", [&](Runtime& r) {
    if (!r.graphs.valid(graph)) return cudaErrorInvalidValue;
    *exec = r.execs.create({graph->graph, nullptr});
    return cudaSuccess;
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  return call("cudaGraphLaunch", [&](Runtime& r) {
    CUstream_st* stream = r.stream(handle);
    if (stream == nullptr) return r.stream_error;
    if (!r.execs.valid(exec)) {
      r.violate("a destroyed graph was launched");
      return cudaErrorInvalidValue;
    }
    if (stream->captured.capture != nullptr) {
      r.violate("a launch of a graph was captured, which is not simulated");
      return cudaErrorStreamCaptureUnsupported;
    }
    cuda_sim::Operation begin;
    if (exec->last != nullptr && !exec->last->done) begin.after.push_back(exec->last);
    const cuda_sim::Ticket before = r.enqueue(stream, std::move(begin));
    std::vector<cuda_sim::Ticket> nodes;
    cuda_sim::Operation end;
    for (const auto& node : exec->graph->nodes()) {
      auto ticket = std::make_shared<cuda_sim::Operation>(node.operation);
      ticket->stream = r.next_stream_id++;  // on no stream: branches go at their own pace
      ticket->after = {before};
      for (const std::size_t earlier : node.after) ticket->after.push_back(nodes[earlier]);
      r.schedule.add(ticket);
      nodes.push_back(ticket);
      end.after.push_back(ticket);
    }
    exec->last = r.enqueue(stream, std::move(end));
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return releasing_call("cudaGraphDestroy", [&](Runtime& r) {
    if (!r.graphs.valid(graph)) return cudaErrorInvalidValue;
    r.graphs.destroy(graph);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return releasing_call("cudaGraphExecDestroy", [&](Runtime& r) {
    if (!r.execs.valid(exec)) return cudaErrorInvalidValue;
    r.execs.destroy(exec);
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  return call("cudaDeviceGetAttribute", [&](Runtime&) {
    if (device < 0 || device >= cuda_sim::kDevices) return cudaErrorInvalidDevice;
    *value = 1;
    return cudaSuccess;
  });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  return call("cudaLaunchHostFunc", [&](Runtime& r) {
    CUstream_st* stream = r.stream(handle);
    if (stream == nullptr) return r.stream_error;
    r.enqueue(stream, {[function, data] {
                Runtime::in_host_function = true;
                function(data);
                Runtime::in_host_function = false;
              }});
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return call("cudaEventCreateWithFlags", [&](Runtime& r) {
    *event = r.events.create({r.current, nullptr});
    return cudaSuccess;
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return releasing_call("cudaEventDestroy", [&](Runtime& r) {
    if (!r.events.valid(event)) {
      r.violate("an event was destroyed twice");
      return cudaErrorInvalidResourceHandle;
    }
    r.events.destroy(event);
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  return call("cudaEventRecord", [&](Runtime& r) {
    CUstream_st* stream = r.stream(handle);
    if (!r.events.valid(event)) {
      r.violate("a destroyed event was used");
      return cudaErrorInvalidResourceHandle;
    }
    if (stream == nullptr) return r.stream_error;
    if (stream->device != event->device) return cudaErrorInvalidResourceHandle;
    event->captured = stream->captured;  // an event of a capture is a place in its graph
    if (stream->captured.capture != nullptr) return cudaSuccess;
    event->recorded = r.enqueue(stream, cuda_sim::Operation{});
    return cudaSuccess;
  });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return unsafe_call("cudaEventQuery", [&](Runtime& r) {
    if (!r.events.valid(event)) {
      r.violate("a destroyed event was used");
      return cudaErrorInvalidResourceHandle;
    }
    if (Capture* const capture = event->captured.capture.get(); capture != nullptr) {
      return Runtime::invalidate(capture, cudaErrorCapturedEvent);
    }
    if (event->recorded == nullptr || event->recorded->done) return cudaSuccess;
    if (!r.schedule.chance(4)) return cudaErrorNotReady;
    r.schedule.force(event->recorded);
    return cudaSuccess;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return unsafe_call("cudaEventSynchronize", [&](Runtime& r) {
    if (!r.events.valid(event)) {
      r.violate("a destroyed event was used");
      return cudaErrorInvalidResourceHandle;
    }
    if (Capture* const capture = event->captured.capture.get(); capture != nullptr) {
      return Runtime::invalidate(capture, cudaErrorCapturedEvent);
    }
    r.schedule.force(event->recorded);
    return cudaSuccess;
  });
}
