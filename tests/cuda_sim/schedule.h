// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Enqueued work as a graph: an operation runs after those it must follow, and otherwise whenever
// the policy likes.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "cuda_sim.h"

namespace cuda_sim {

struct Operation {
  Operation() = default;
  Operation(std::function<void()> what, unsigned on = 0, bool soon = false)
      : run(std::move(what)), devices(on), urgent(soon) {}

  std::function<void()> run;  // empty: only an edge of the graph
  unsigned devices = 0;       // bit d: touches the memory of device d
  int stream_device = 0;
  unsigned long long stream = 0;
  bool urgent = false;  // the eager policy runs it as early as it can
  std::vector<std::shared_ptr<Operation>> after;
  bool done = false;
  std::size_t position = 0;  // in Schedule::pending_
};
using Ticket = std::shared_ptr<Operation>;

class Schedule {
 public:
  /// Runs one operation; false: a device has failed, and nothing runs any more.
  using Runner = std::function<bool(const Operation&)>;
  explicit Schedule(Runner runner) : runner_(std::move(runner)) {}

  void reset(std::uint64_t seed, Policy policy);
  void add(Ticket operation);
  /// Returns when it has run.
  void force(const Ticket& operation);
  /// All of a device's streams.
  void force_device(int device);
  void force_all();
  /// Time passes: what the policy does with it.
  void pass_time();
  std::size_t pending() const { return pending_.size(); }
  std::mt19937_64& random() { return random_; }
  bool chance(unsigned one_in) { return random_() % one_in == 0; }

 private:
  Ticket pick();
  Ticket take_next(std::vector<Ticket>& ready, std::uint64_t preference);
  std::vector<Ticket> unfinished_ancestors(const Ticket& operation) const;
  void finish(const Ticket& operation);

  Runner runner_;
  Policy policy_ = Policy::kLate;
  std::mt19937_64 random_;
  std::vector<Ticket> pending_;
  bool running_ = false;
};

}  // namespace cuda_sim
