// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Memory for state on the CPU.
#pragma once

#include <cstddef>

namespace fusestep::detail {

/// Zeros, aligned to 64 bytes or more. Null when there is no memory. Where the system can give zero
/// pages, large ones are not written here: the thread that first uses a page takes it, from its own
/// node of memory, and what is read from a file is not written twice.
void* allocate_zeroed(std::size_t bytes) noexcept;

/// What allocate_zeroed() returned for as many bytes.
void deallocate_zeroed(void* data, std::size_t bytes) noexcept;

}  // namespace fusestep::detail
