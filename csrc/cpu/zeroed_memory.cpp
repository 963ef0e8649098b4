// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "zeroed_memory.h"

// The address sanitizer sees what lies beyond memory of operator new, not beyond a mapping.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define FUSESTEP_MAPS_PAGES
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstring>
#include <new>

namespace fusestep::detail {
namespace {

constexpr std::align_val_t kAlignment{64};

#if defined(FUSESTEP_MAPS_PAGES)

/// Of x86-64, and of 64-bit Arm with pages of 4 KiB. Where huge pages have another size, the system
/// uses those it finds inside.
constexpr std::size_t kHugePage = std::size_t{2} << 20;

/// From here on what is cut off for whole huge pages is a small part.
constexpr std::size_t kMappedBytes = 4 * kHugePage;

std::size_t whole_pages(std::size_t bytes) {
  return (bytes + kHugePage - 1) / kHugePage * kHugePage;
}

/// mmap() promises no alignment beyond a page: one huge page more than wanted, less what sticks
/// out.
void* map_huge_pages(std::size_t bytes) noexcept {
  if (bytes > PTRDIFF_MAX) return nullptr;
  const std::size_t wanted = whole_pages(bytes);
  const std::size_t mapped = wanted + kHugePage;
  void* begin = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) return nullptr;
  auto* const first = static_cast<char*>(begin);
  const std::size_t before =
      (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(first, before);
  munmap(first + before + wanted, mapped - before - wanted);
  madvise(first + before, wanted, MADV_HUGEPAGE);  // a refusal changes nothing
  return first + before;
}

#endif

}  // namespace

void* allocate_zeroed(std::size_t bytes) noexcept {
#if defined(FUSESTEP_MAPS_PAGES)
  if (bytes >= kMappedBytes) return map_huge_pages(bytes);
#endif
  void* data = ::operator new(bytes, kAlignment, std::nothrow);
  if (data != nullptr) std::memset(data, 0, bytes);
  return data;
}

void deallocate_zeroed(void* data, std::size_t bytes) noexcept {
#if defined(FUSESTEP_MAPS_PAGES)
  if (bytes >= kMappedBytes) {
    munmap(data, whole_pages(bytes));
    return;
  }
#endif
  ::operator delete(data, kAlignment);
}

}  // namespace fusestep::detail
