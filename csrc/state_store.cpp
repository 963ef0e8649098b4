// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "state_store.h"

#include <algorithm>
#include <utility>

namespace fusestep::detail {
namespace {

constexpr std::size_t kPage = 4096;
/// Bytes. Smaller arrays stay in the cache together, and would waste memory.
constexpr std::size_t kSkewedFrom = std::size_t{256} << 10;

/// `unit`: a power of two.
constexpr std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) & ~(unit - 1);
}

std::size_t bytes_of(const StateStore::Wanted& wanted) {
  return static_cast<std::size_t>(wanted.parameter->size) * size_of(wanted.slot.dtype);
}

std::size_t padded_bytes(const StateStore::Wanted& wanted, Backend::Placement placement) {
  const std::size_t bytes = bytes_of(wanted);
  return bytes < kSkewedFrom ? round_up(bytes, placement.alignment)
                             : round_up(bytes, kPage) + placement.skew;
}

const Slot* find_spare(const StateStore::Wanted& wanted) {
  for (const Slot& spare : wanted.parameter->spare_slots) {
    if (spare.name == wanted.slot.name && spare.dtype == wanted.slot.dtype) return &spare;
  }
  return nullptr;
}

/// Of flat groups: those that this growth has made.
void forget_buffers(const StateStore::Growth& growth) noexcept {
  for (const StateStore::Wanted& w : growth.slots) {
    if (!w.placed) continue;
    std::erase_if(w.parameter->flat->slots,
                  [&](const auto& slot) { return slot.arena >= growth.arenas_before; });
  }
}

auto is_of(const StateStore::Wanted& wanted) {
  return [name = wanted.slot.name](const Slot& slot) { return slot.name == name; };
}

}  // namespace

/// On the default stream: the caller's may be gone.
StateStore::~StateStore() { free_arenas(0, nullptr); }

StateStore::Growth StateStore::grow(std::vector<Wanted> wanted, void* stream) {
  Growth growth{std::move(wanted), arenas_.size()};
  constexpr DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  for (Wanted& w : growth.slots) {
    w.parameter->slots.reserve(kMaxSlotKinds);
    w.parameter->spare_slots.reserve(kMaxSlotKinds);
    const Slot* spare = find_spare(w);
    if (spare == nullptr) continue;
    w.slot.data = spare->data;
    w.spare = true;
  }
  try {
    for (Wanted& w : growth.slots) {
      if (!w.spare && w.parameter->flat != nullptr) place(w, growth.arenas_before, stream);
    }
    for (const Wanted& w : growth.slots) {
      if (w.spare && bytes_of(w) != 0) backend_.clear(w.slot.data, bytes_of(w), stream);
    }
    for (const DType dtype : dtypes) allocate_arena(growth, dtype, stream);
  } catch (...) {
    forget_buffers(growth);
    free_arenas(growth.arenas_before, stream);
    throw;
  }
  for (const Wanted& w : growth.slots) {
    w.parameter->slots.push_back(w.slot);
    if (w.spare) std::erase_if(w.parameter->spare_slots, is_of(w));
  }
  return growth;
}

/// In the buffer of this slot, which the first parameter that needs it makes for all. What an
/// earlier one has made may have been used, as spare memory has.
void StateStore::place(Wanted& wanted, std::size_t arenas_before, void* stream) {
  FlatRecord& flat = *wanted.parameter->flat;
  const FlatRecord::SlotBuffer* buffer = flat.find_slot(wanted.slot.name, wanted.slot.dtype);
  if (buffer == nullptr) {
    flat.slots.reserve(flat.slots.size() + 1);
    const std::size_t position = flat.slots.size() + 2;  // after values and gradients
    char* const data = allocate_buffer(flat, wanted.slot.dtype, position, stream);
    flat.slots.push_back({wanted.slot.name, wanted.slot.dtype, data, arenas_.size() - 1});
    buffer = &flat.slots.back();
  }
  wanted.placed = buffer->arena >= arenas_before;
  wanted.spare = !wanted.placed;
  wanted.slot.data = buffer->data + static_cast<std::size_t>(wanted.parameter->flat_begin) *
                                        size_of(buffer->dtype);
}

char* StateStore::allocate_buffer(const FlatRecord& flat, DType dtype, std::size_t position,
                                  void* stream) {
  const std::size_t bytes = static_cast<std::size_t>(flat.size) * size_of(dtype);
  const Backend::Placement placement = backend_.placement();
  const std::size_t skew = bytes < kSkewedFrom ? 0 : position * placement.skew;
  const std::size_t all = std::max(bytes + skew, placement.alignment);  // of empty tensors too
  arenas_.reserve(arenas_.size() + 1);
  char* const data = static_cast<char*>(backend_.allocate(all, stream));
  arenas_.push_back({data, all});
  return data + skew;
}

void StateStore::allocate(FlatRecord& flat, void* stream) {
  const std::size_t before = arenas_.size();
  try {
    flat.values = allocate_buffer(flat, flat.value, 0, stream);
    flat.grads = allocate_buffer(flat, flat.grad, 1, stream);
  } catch (...) {
    free_arenas(before, stream);
    throw;
  }
}

void StateStore::undo_allocate(void* stream) noexcept { free_arenas(arenas_.size() - 2, stream); }

void StateStore::allocate_arena(Growth& growth, DType dtype, void* stream) {
  const auto needs_memory = [&](const Wanted& w) {
    return !w.spare && !w.placed && w.slot.dtype == dtype;
  };
  const Backend::Placement placement = backend_.placement();
  std::size_t bytes = 0;
  for (const Wanted& w : growth.slots) bytes += needs_memory(w) ? padded_bytes(w, placement) : 0;
  char* next = nullptr;
  if (bytes != 0) {
    arenas_.reserve(arenas_.size() + 1);
    next = static_cast<char*>(backend_.allocate(bytes, stream));
    arenas_.push_back({next, bytes});
  }
  for (Wanted& w : growth.slots) {
    if (!needs_memory(w)) continue;
    w.slot.data = next;
    next += padded_bytes(w, placement);
  }
}

void StateStore::undo(const Growth& growth, void* stream) noexcept {
  for (const Wanted& w : growth.slots) {
    std::erase_if(w.parameter->slots, is_of(w));
    if (w.spare) w.parameter->spare_slots.push_back(w.slot);
  }
  forget_buffers(growth);
  free_arenas(growth.arenas_before, stream);
}

void StateStore::free_arenas(std::size_t keep, void* stream) noexcept {
  for (; arenas_.size() > keep; arenas_.pop_back()) {
    backend_.deallocate(arenas_.back().data, arenas_.back().bytes, stream);
  }
}

}  // namespace fusestep::detail
