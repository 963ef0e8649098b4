// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Indices are signed numbers in records, tables and files, -1 where there is none; std's are not.
#pragma once

#include <concepts>
#include <cstddef>

namespace fusestep::detail {

/// Unchecked, as rows[index] is.
template <class Rows>
decltype(auto) at(Rows& rows, std::integral auto index) {
  return rows[static_cast<std::size_t>(index)];
}

}  // namespace fusestep::detail
