// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(address))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (static_cast<void>(address))
#endif

namespace cuda_sim {
namespace {

constexpr std::size_t kArena = std::size_t{8} << 30;  // addresses, not memory
constexpr std::size_t kGuard = 512;                   // on either side, at least
constexpr std::size_t kAlignment = 256;               // CUDA's
constexpr std::size_t kPage = 4096;
constexpr std::size_t kQuarantine = std::size_t{16} << 20;
constexpr int kPoison = 0xff;  // NaN in every floating-point type, -1 in integers

constexpr std::size_t round_up(std::size_t x, std::size_t to) { return (x + to - 1) / to * to; }

std::string text_of(const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

}  // namespace

DeviceMemory::DeviceMemory() {
  void* memory =
      mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no address space for device memory");
  base_ = top_ = static_cast<char*>(memory);
}

DeviceMemory::~DeviceMemory() {
  ASAN_UNPOISON_MEMORY_REGION(base_, static_cast<std::size_t>(top_ - base_));
  munmap(base_, kArena);
}

void DeviceMemory::open(bool wanted) {
  char* const top = base_ + round_up(static_cast<std::size_t>(top_ - base_), kPage);
  if (wanted && opened_to_ == top) return;
  if (!wanted && opened_to_ == nullptr) return;
  if (top != base_) {
    mprotect(base_, static_cast<std::size_t>(top - base_),
             wanted ? PROT_READ | PROT_WRITE : PROT_NONE);
  }
  opened_to_ = wanted ? top : nullptr;
}

char* DeviceMemory::reserve(std::size_t bytes) {
  if (bytes > kArena / 2) return nullptr;
  const std::size_t span = 2 * kGuard + round_up(bytes, kAlignment);
  char* start = take_quarantined(span);
  if (start == nullptr) {
    if (span > kArena - static_cast<std::size_t>(top_ - base_) - kPage) return nullptr;
    start = top_;
    top_ += span;
  }
  open(true);
  ASAN_UNPOISON_MEMORY_REGION(start, span);
  std::memset(start, kPoison, span);
  ASAN_POISON_MEMORY_REGION(start, span);
  char* data = start + kGuard;
  blocks_[data] = {bytes, span};
  return data;
}

/// A quarantined block of just this size, once enough has been freed after it.
char* DeviceMemory::take_quarantined(std::size_t span) {
  if (quarantined_ <= kQuarantine) return nullptr;
  for (auto at = quarantine_.begin(); at != quarantine_.end(); ++at) {
    const auto block = blocks_.find(*at);
    if (block->second.span != span) continue;
    char* start = *at - kGuard;
    quarantined_ -= span;
    blocks_.erase(block);
    quarantine_.erase(at);
    return start;
  }
  return nullptr;
}

void DeviceMemory::begin(char* data) {
  Block& block = blocks_.at(data);
  block.phase = Phase::kExists;
  open(true);
  ASAN_UNPOISON_MEMORY_REGION(data, block.bytes);
  std::memset(data, kPoison, block.bytes);
}

bool DeviceMemory::promise_free(char* data) {
  const auto found = blocks_.find(data);
  if (found == blocks_.end() || found->second.free_promised) return false;
  return found->second.free_promised = true;
}

void DeviceMemory::end(char* data) {
  const auto found = blocks_.find(data);
  open(true);
  check_guards_of(*found, [this](const std::string& text) { damage_ += text + "\n"; });
  std::memset(data, kPoison, found->second.bytes);
  ASAN_POISON_MEMORY_REGION(data, found->second.bytes);
  found->second.phase = Phase::kFreed;
  quarantine_.push_back(data);
  quarantined_ += found->second.span;
}

bool DeviceMemory::contains(const void* address) const {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  return at >= reinterpret_cast<std::uintptr_t>(base_) &&
         at < reinterpret_cast<std::uintptr_t>(base_) + kArena;
}

bool DeviceMemory::exists(const void* address, std::size_t bytes) const {
  auto* at = static_cast<char*>(const_cast<void*>(address));
  auto block = blocks_.upper_bound(at);
  if (block == blocks_.begin()) return false;
  --block;
  const auto offset = static_cast<std::size_t>(at - block->first);
  return block->second.phase == Phase::kExists && offset <= block->second.bytes &&
         bytes <= block->second.bytes - offset;
}

std::size_t DeviceMemory::live() const {
  return static_cast<std::size_t>(std::count_if(
      blocks_.begin(), blocks_.end(), [](const auto& b) { return !b.second.free_promised; }));
}

void DeviceMemory::check_guards_of(const Blocks::value_type& block,
                                   const std::function<void(const std::string&)>& report) const {
  const auto& [data, about] = block;
  char* const ends[][2] = {{data - kGuard, data}, {data + about.bytes, data - kGuard + about.span}};
  for (const auto& [from, to] : ends) {
    ASAN_UNPOISON_MEMORY_REGION(from, static_cast<std::size_t>(to - from));
    const char* damaged =
        std::find_if(from, to, [](char byte) { return byte != static_cast<char>(kPoison); });
    if (damaged != to) std::memset(from, kPoison, static_cast<std::size_t>(to - from));
    ASAN_POISON_MEMORY_REGION(from, static_cast<std::size_t>(to - from));
    if (damaged == to) continue;
    report("out of bounds: byte " + std::to_string(damaged - data) + " of an allocation of " +
           std::to_string(about.bytes) + " bytes at " + text_of(data) + " was written");
  }
}

void DeviceMemory::check_guards(const std::function<void(const std::string&)>& report) {
  if (!damage_.empty()) report(damage_);
  damage_.clear();
  open(true);
  for (const auto& block : blocks_) {
    if (block.second.phase == Phase::kExists) check_guards_of(block, report);
  }
}

void DeviceMemory::clear() {
  open(false);
  const auto used = static_cast<std::size_t>(top_ - base_);
  ASAN_UNPOISON_MEMORY_REGION(base_, used);
  if (used != 0) madvise(base_, round_up(used, kPage), MADV_DONTNEED);
  blocks_.clear();
  quarantine_.clear();
  quarantined_ = 0;
  damage_.clear();
  top_ = base_;
}

}  // namespace cuda_sim
