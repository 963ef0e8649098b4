// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The memory of one simulated device. Between operations nobody can touch it; what is fresh, freed
// or beside an allocation reads as NaN, and the address sanitizer reports any access to it.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <string>

namespace cuda_sim {

class DeviceMemory {
 public:
  DeviceMemory();
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  /// Whether it can be touched.
  void open(bool wanted);

  /// An address; not memory yet. Null where there is no room.
  char* reserve(std::size_t bytes);
  /// The stream has reached the allocation: the memory exists and holds NaN.
  void begin(char* data);
  /// It will be freed: a second time is an error. False if there is no such allocation.
  bool promise_free(char* data);
  /// The stream has reached the free.
  void end(char* data);

  bool contains(const void* address) const;
  /// These bytes lie in one allocation that exists now.
  bool exists(const void* address, std::size_t bytes) const;
  /// Allocations nobody has promised to free.
  std::size_t live() const;
  /// Calls `report` for every damaged guard zone.
  void check_guards(const std::function<void(const std::string&)>& report);
  void clear();

 private:
  enum class Phase { kReserved, kExists, kFreed };
  struct Block {
    std::size_t bytes, span;  // span: with the guard zones
    Phase phase = Phase::kReserved;
    bool free_promised = false;
  };
  using Blocks = std::map<char*, Block>;

  char* take_quarantined(std::size_t span);
  void check_guards_of(const Blocks::value_type& block,
                       const std::function<void(const std::string&)>& report) const;

  char* base_;
  char* top_;                  // end of what has ever been handed out
  char* opened_to_ = nullptr;  // null: closed
  Blocks blocks_;
  std::deque<char*> quarantine_;  // freed blocks, oldest first
  std::size_t quarantined_ = 0;   // their bytes
  std::string damage_;            // found when blocks were freed
};

}  // namespace cuda_sim
