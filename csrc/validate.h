// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Checks of what the caller hands in. Each throws InvalidArgument and changes nothing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fusestep/shard.h"
#include "fusestep/tensor_view.h"

namespace fusestep::detail {

/// "group 'head', parameter 'fc.weight'"
std::string where(const std::string& group, const std::string& parameter);

/// Extents, address and alignment of memory named `what` ("value", "gradient", "slot 'exp_avg'").
void check_memory(const std::string& where, const std::string& what, const TensorView& memory);

/// Same dtype, shape and device as the parameter's value.
void check_like(const std::string& where, const std::string& what, const TensorView& memory,
                DType dtype, const TensorView& value);

/// That the value's elements are some of the whole tensor's.
void check_shard(const std::string& where, const Shard& shard, const TensorView& value);

/// One float32 or float64 element.
void check_scalar(const std::string& what, const TensorView& scalar);

/// A stretch of one device's memory and whose it is. Addresses are numbers here: pointers to
/// different arrays are not to be compared and subtracted.
struct MemoryRange {
  std::uintptr_t begin;
  std::size_t bytes;
  int parameter;
  std::string_view what;
};

/// The first two neighbours that overlap, or nothing. Sorts `ranges` and drops empty ones.
struct Overlap {
  MemoryRange first, second;
};
bool find_overlap(std::vector<MemoryRange>& ranges, Overlap& found);
/// The first of `a` and of `b` that overlap each other. Both have been sorted by find_overlap().
bool find_overlap(const std::vector<MemoryRange>& a, const std::vector<MemoryRange>& b,
                  Overlap& found);

}  // namespace fusestep::detail
