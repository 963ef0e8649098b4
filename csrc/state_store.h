// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Where slots live: arenas, one per dtype each time parameters step for the first time; those of
// flat groups in a buffer per slot. The buffers of values and gradients of flat groups, too.
#pragma once

#include <cstddef>
#include <vector>

#include "fusestep/detail/backend.h"
#include "records.h"

namespace fusestep::detail {

class StateStore {
 public:
  explicit StateStore(Backend& backend) : backend_(backend) {}
  ~StateStore();
  StateStore(const StateStore&) = delete;
  StateStore& operator=(const StateStore&) = delete;

  struct Wanted {
    ParameterRecord* parameter;
    Slot slot;            // without an address
    bool spare = false;   // it had memory that lay idle
    bool placed = false;  // in a new buffer of its flat group
  };
  struct Growth {
    std::vector<Wanted> slots;
    std::size_t arenas_before = 0;
  };
  /// Gives every wanted slot zeroed memory where the backend's placement has it, all of one dtype
  /// in one allocation, and adds it to its parameter; memory that lies idle is used first. Throws
  /// OutOfMemory and changes nothing.
  Growth grow(std::vector<Wanted> wanted, void* stream);
  /// Takes the latest growth back.
  void undo(const Growth& growth, void* stream) noexcept;

  /// Makes its buffers of values and gradients, zeroed. Throws OutOfMemory and changes nothing.
  void allocate(FlatRecord& flat, void* stream);
  /// Takes the latest call back, if nothing was allocated since.
  void undo_allocate(void* stream) noexcept;

 private:
  struct Arena {
    char* data;
    std::size_t bytes;
  };
  char* allocate_buffer(const FlatRecord& flat, DType dtype, std::size_t position, void* stream);
  void place(Wanted& wanted, std::size_t arenas_before, void* stream);
  void allocate_arena(Growth& growth, DType dtype, void* stream);
  void free_arenas(std::size_t keep, void* stream) noexcept;

  Backend& backend_;
  std::vector<Arena> arenas_;
};

}  // namespace fusestep::detail
