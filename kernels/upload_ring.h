// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Uploads that return at once: what is to be sent is copied into a ring of pinned memory first.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <deque>
#include <vector>

#include "cuda_check.h"

namespace fusestep::detail {

/// Bytes of the ring that an upload in flight reads are not written again before it has run: where
/// the ring is full, the oldest upload is waited for.
class UploadRing {
 public:
  UploadRing(int device, std::size_t bytes) : device_(device), bytes_(bytes) {
    const BesideCaptures beside;
    void* data = nullptr;
    cuda_check(cudaHostAlloc(&data, bytes_, cudaHostAllocPortable), device_,
               "allocating pinned memory for uploads");
    data_ = static_cast<char*>(data);
  }
  ~UploadRing() {
    const BesideCaptures beside;
    for (const InFlight& upload : in_flight_) {
      static_cast<void>(cudaEventSynchronize(upload.done));
      static_cast<void>(cudaEventDestroy(upload.done));
    }
    for (const cudaEvent_t event : free_events_) static_cast<void>(cudaEventDestroy(event));
    static_cast<void>(cudaFreeHost(data_));
  }
  UploadRing(const UploadRing&) = delete;
  UploadRing& operator=(const UploadRing&) = delete;

  /// Enqueues a copy; `from` may be reused when this returns. Anything up to any size.
  void upload(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
    if (bytes == 0) return;
    const BesideCaptures beside;
    for (std::size_t done = 0; done < bytes;) {
      const std::size_t piece = std::min(bytes - done, bytes_ / 4);
      char* pinned = claim(piece);
      in_flight_.push_back({begin_, end_, take_event()});
      std::memcpy(pinned, static_cast<const char*>(from) + done, piece);
      const cudaError_t code = cudaMemcpyAsync(static_cast<char*>(to) + done, pinned, piece,
                                               cudaMemcpyHostToDevice, stream);
      if (code != cudaSuccess) in_flight_.pop_back();
      cuda_check(code, device_, "uploading tables");
      mark_end(stream);
      done += piece;
    }
  }

 private:
  /// [begin, end) of the ring is read by an upload until `done`.
  struct InFlight {
    std::size_t begin, end;
    cudaEvent_t done;
  };

  /// Of the latest upload, which is enqueued. Without a mark it is waited for, and is then there:
  /// OutOfMemory would say that it is not.
  void mark_end(cudaStream_t stream) {
    cudaError_t code = cudaEventRecord(in_flight_.back().done, stream);
    if (code == cudaSuccess) return free_events_.pop_back();
    in_flight_.pop_back();
    const cudaError_t waited = cudaStreamSynchronize(stream);
    if (code == cudaErrorMemoryAllocation) code = waited;
    static_cast<void>(cudaGetLastError());
    cuda_check(code, device_, "uploading tables");
  }

  /// Room for so many bytes that no upload in flight reads.
  char* claim(std::size_t bytes) {
    constexpr std::size_t alignment = 64;
    retire_finished();
    begin_ = (end_ + alignment - 1) / alignment * alignment;
    if (begin_ + bytes > bytes_) begin_ = 0;
    end_ = begin_ + bytes;
    const auto in_the_way = [&](const InFlight& other) {
      return other.begin < end_ && begin_ < other.end;
    };
    while (std::any_of(in_flight_.begin(), in_flight_.end(), in_the_way)) {
      cuda_check(cudaEventSynchronize(in_flight_.front().done), device_,
                 "waiting for an earlier upload");
      retire_oldest();
    }
    return data_ + begin_;
  }

  void retire_finished() {
    while (!in_flight_.empty()) {
      const cudaError_t code = cudaEventQuery(in_flight_.front().done);
      if (code == cudaErrorNotReady) return;
      cuda_check(code, device_, "asking for an earlier upload");
      retire_oldest();
    }
  }

  void retire_oldest() {
    free_events_.push_back(in_flight_.front().done);
    in_flight_.pop_front();
  }

  /// The last of the free ones.
  cudaEvent_t take_event() {
    if (free_events_.empty()) {
      cudaEvent_t event = nullptr;
      cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), device_,
                 "creating an event");
      free_events_.push_back(event);
    }
    return free_events_.back();
  }

  int device_;
  std::size_t bytes_;
  char* data_ = nullptr;
  std::size_t begin_ = 0, end_ = 0;  // of the latest claim
  std::deque<InFlight> in_flight_;   // oldest first
  std::vector<cudaEvent_t> free_events_;
};

}  // namespace fusestep::detail
