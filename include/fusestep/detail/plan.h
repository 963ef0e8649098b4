// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What one device has to do in a step, as plain tables.
#pragma once

#include <cstdint>
#include <vector>

#include "fusestep/detail/tables.h"

namespace fusestep::detail {

/// Tensors that step with the same kernel; they and their chunks stand together in the plan.
struct Bucket {
  int rule;    // position in Rules
  int layout;  // position in Layouts
  std::int64_t first_chunk;
  std::int64_t chunks;
  std::int64_t elements;  // of all its tensors
};

struct Plan {
  std::vector<Bucket> buckets;
  std::vector<TensorRow> tensors;
  std::vector<PrepareRow> prepare;  // of tensors[i]
  std::vector<Chunk> chunks;        // of buckets
  std::vector<Chunk> norm_blocks;   // of kNormBlock elements, in the order of norm.h
};

}  // namespace fusestep::detail
