// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "schedule.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace cuda_sim {

void Schedule::reset(std::uint64_t seed, Policy policy) {
  for (const Ticket& operation : pending_) operation->after.clear();
  pending_.clear();
  random_.seed(seed);
  policy_ = policy;
}

void Schedule::add(Ticket operation) {
  operation->position = pending_.size();
  pending_.push_back(std::move(operation));
}

/// The operation and all it must follow that has not run, in no particular order.
std::vector<Ticket> Schedule::unfinished_ancestors(const Ticket& operation) const {
  std::vector<Ticket> found;
  if (operation == nullptr || operation->done) return found;
  std::unordered_set<const Operation*> seen{operation.get()};
  found.push_back(operation);
  for (std::size_t i = 0; i < found.size(); ++i) {
    const Ticket current = found[i];
    for (const Ticket& before : current->after) {
      if (!before->done && seen.insert(before.get()).second) found.push_back(before);
    }
  }
  return found;
}

void Schedule::force(const Ticket& operation) {
  if (policy_ == Policy::kShuffled && !running_) {
    for (int i = 0; i < 2 && !pending_.empty(); ++i) {
      if (chance(2)) pass_time();
    }
  }
  const std::vector<Ticket> needed = unfinished_ancestors(operation);
  std::unordered_map<const Operation*, std::vector<Ticket>> followers;
  std::unordered_map<const Operation*, std::size_t> waits_for;
  std::vector<Ticket> ready;
  for (const Ticket& one : needed) {
    std::size_t waits = 0;
    for (const Ticket& before : one->after) {
      if (before->done) continue;
      followers[before.get()].push_back(one);
      ++waits;
    }
    waits_for[one.get()] = waits;
    if (waits == 0) ready.push_back(one);
  }
  const std::uint64_t preference = chance(2) ? random_() : 0;
  while (!ready.empty()) {
    const Ticket next = take_next(ready, preference);
    finish(next);
    for (const Ticket& follower : followers[next.get()]) {
      if (--waits_for[follower.get()] == 0) ready.push_back(follower);
    }
  }
}

/// Any of them; or, with a preference, that of the preferred stream, so that some streams run far
/// ahead of others.
Ticket Schedule::take_next(std::vector<Ticket>& ready, std::uint64_t preference) {
  auto chosen = ready.begin() + static_cast<std::ptrdiff_t>(random_() % ready.size());
  if (preference != 0) {
    const auto rank = [&](const Ticket& one) { return (one->stream + 1) * (preference | 1); };
    chosen = std::max_element(ready.begin(), ready.end(),
                              [&](const Ticket& a, const Ticket& b) { return rank(a) < rank(b); });
  }
  std::swap(*chosen, ready.back());
  Ticket next = std::move(ready.back());
  ready.pop_back();
  return next;
}

void Schedule::finish(const Ticket& operation) {
  if (operation->done) return;
  running_ = true;
  const bool alive = runner_(*operation);
  running_ = false;
  operation->done = true;
  operation->run = nullptr;
  operation->after.clear();
  std::swap(pending_[operation->position], pending_.back());
  pending_[operation->position]->position = operation->position;
  pending_.pop_back();
  if (alive) return;
  for (const Ticket& lost : std::exchange(pending_, {})) {
    lost->done = true;
    lost->run = nullptr;
    lost->after.clear();
  }
}

void Schedule::force_all() {
  while (!pending_.empty()) force(pending_[random_() % pending_.size()]);
}

void Schedule::force_device(int device) {
  std::vector<Ticket> of_device;
  for (const Ticket& operation : pending_) {
    if (operation->stream_device == device) of_device.push_back(operation);
  }
  std::shuffle(of_device.begin(), of_device.end(), random_);
  for (const Ticket& operation : of_device) force(operation);
}

Ticket Schedule::pick() {
  for (const Ticket& operation : pending_) {
    if (operation->urgent && chance(2)) return operation;
  }
  return pending_[random_() % pending_.size()];
}

void Schedule::pass_time() {
  if (policy_ == Policy::kLate || pending_.empty() || running_) return;
  if (policy_ == Policy::kEager && chance(3)) return;
  const Policy policy = std::exchange(policy_, Policy::kLate);  // no time passes in here
  force(pick());
  policy_ = policy;
}

}  // namespace cuda_sim
