// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What a capture has recorded: operations and what each must follow, to be enqueued any number of
// times.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "schedule.h"

namespace cuda_sim {

class Graph {
 public:
  struct Node {
    Operation operation;
    std::vector<std::size_t> after;
  };

  /// Returns the place of the new node.
  std::size_t add(Operation operation, std::vector<std::size_t> after) {
    nodes_.push_back({std::move(operation), std::move(after)});
    return nodes_.size() - 1;
  }
  const std::vector<Node>& nodes() const { return nodes_; }

  /// Whether each of these nodes is one of `ends` or comes before one of them.
  bool all_lead_to(const std::vector<std::size_t>& these, std::vector<std::size_t> ends) const {
    std::vector<bool> reached(nodes_.size());
    while (!ends.empty()) {
      const std::size_t node = ends.back();
      ends.pop_back();
      if (reached[node]) continue;
      reached[node] = true;
      ends.insert(ends.end(), nodes_[node].after.begin(), nodes_[node].after.end());
    }
    return std::all_of(these.begin(), these.end(), [&](std::size_t node) { return reached[node]; });
  }

 private:
  std::vector<Node> nodes_;
};

/// From cudaStreamBeginCapture to cudaStreamEndCapture.
struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  cudaStream_t origin;
  std::thread::id thread = std::this_thread::get_id();
  bool invalidated = false;
  bool ended = false;
  Graph graph = {};
};

/// Where a stream or an event stands in a capture.
struct CapturePoint {
  std::shared_ptr<Capture> capture;  // null: in none
  std::vector<std::size_t> after;    // the nodes that what comes next must follow
};

}  // namespace cuda_sim
