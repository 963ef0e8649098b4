// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A CUDA runtime without a GPU that behaves as badly as CUDA allows.
//
// Work is late and out of order: nothing on a stream runs before something waits for it, and what
// no stream, event or default-stream rule orders runs in an order drawn from a seed. Memory is
// unforgiving: fresh and freed device memory holds NaN, guard zones surround it, and the host
// cannot touch it. Any call can be made to fail. What CUDA forbids while a stream is captured fails
// with CUDA's error and, as there, invalidates the capture.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_sim {

inline constexpr int kDevices = 3;

/// When work runs that nobody waits for.
enum class Policy {
  kLate,      ///< never; and of the work somebody waits for, only what CUDA says must precede
  kShuffled,  ///< some of it when somebody waits for other work
  kEager      ///< some of it at every call, frees first
};

/// Forgets streams, events, memory, faults and counters, and starts again.
void reset(std::uint64_t seed, Policy policy);
/// Runs what is pending, and goes on with another order; everything else stays.
void reseed(std::uint64_t seed, Policy policy);

/// Call number `call` from now on (0: the next) that can fail returns `code`. A call that frees or
/// destroys does so nevertheless, as CUDA's may return errors of earlier work.
struct Fault {
  std::int64_t call;
  cudaError_t code;
  bool sticky = false;  ///< from then on every call returns it and nothing runs any more
};
void inject(Fault fault);
/// The kernel that runs `launches` launches from now fails while it runs: its error is sticky and
/// comes back from whichever call notices.
void fail_running_kernel(std::int64_t launches);
void clear_faults();
/// The name of the call that the injected fault has hit; empty while it has not.
std::string faulted_call();

/// Calls since reset() or forget_calls(), all of them or of one name; a launch of a kernel counts
/// as "cudaLaunchKernel".
std::int64_t calls();
std::int64_t calls(const std::string& name);
void forget_calls();
std::string call_list();

/// What exists now.
struct Live {
  std::int64_t allocations = 0, pinned = 0, events = 0, streams = 0, graphs = 0;
  friend bool operator==(const Live&, const Live&) = default;
};
Live live();
/// The most bytes of pinned memory there were at a time since reset().
std::size_t most_pinned_bytes();

/// What a correct program never does: handles or memory used after their end, copies whose
/// direction is wrong, writes to guard zones, pinned memory freed under a copy. The calls return
/// an error where CUDA's would.
std::vector<std::string> take_violations();
/// Looks for damaged guard zones in all device memory.
void check_guards();

/// Memory of a framework, which counts as memory of the device from now on; poison and guard zones
/// it has not, and the host can touch it. What overlaps with it is forgotten.
void adopt(const void* data, std::size_t bytes, int device);
void forget_adopted();

/// Operations that have been enqueued and have not run.
std::size_t pending();

}  // namespace cuda_sim
