// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The order in which the squares of gradients are summed. It is a function of the element's index
// alone, so that every instruction set, thread count, chunk size and device gives the same bits:
//
//   1. a tensor is cut into blocks of 4,096 elements, missing ones counting as 0;
//   2. a block is summed by halving: x[i] += x[i + half], half = 2048, 1024, ..., 1;
//   3. the blocks of all tensors, in the order groups and parameters were added, form a list, which
//      is summed in the same way, 4,096 at a time, until one sum is left.
//
// Squares and sums are double. The square of a float is exact in double. CUB's block reduction
// would be shorter, but its order is not documented and may change with its version.
#pragma once

#include <cstdint>

#include "fusestep/detail/convert.h"
#include "fusestep/detail/tables.h"

namespace fusestep::detail {

inline constexpr int kNormBlock = 4096;

FUSESTEP_HD NormSum add(NormSum a, NormSum b) {
  return {a.squares + b.squares, a.nonfinite + b.nonfinite};
}

/// The shares of all devices, in their order.
FUSESTEP_HD NormSum add_all(const NormSum* parts, int count) {
  NormSum total;
  for (int i = 0; i < count; ++i) total = add(total, parts[i]);
  return total;
}

/// Of two doubles that went through a sum over processes.
FUSESTEP_HD NormSum norm_sum_of(const double* sums) {
  return {sums[0], static_cast<std::int64_t>(sums[1])};
}

FUSESTEP_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
FUSESTEP_HD bool is_finite(double x) { return x - x == 0; }

/// One element's share.
template <class Grad>
FUSESTEP_HD NormSum square(Grad stored) {
  using Real = std::conditional_t<std::is_same_v<Grad, double>, double, float>;
  const Real g = load_as<Real>(stored);
  return {static_cast<double>(g) * static_cast<double>(g), is_finite(g) ? 0 : 1};
}

constexpr std::int64_t norm_blocks(std::int64_t elements) {
  return (elements + kNormBlock - 1) / kNormBlock;
}

}  // namespace fusestep::detail
