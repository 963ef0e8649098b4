// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Numbers that only change the speed of the CUDA backend. Measurements: docs/performance.md.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "fusestep/detail/layout.h"

namespace fusestep::detail {

/// Small blocks whose threads load once, compute and store: where a block goes round a loop
/// instead, its loads wait for the stores of the round before, and 4 to 12 % of the bandwidth are
/// lost.
template <class L>
struct ApplyTuning {
  static constexpr int kThreads = 128;
  /// Elements of a vector: one 16-byte access of the widest array. Wider vectors would read the
  /// wide arrays by half sectors.
  static constexpr int kWidth =
      16 / std::max({sizeof(typename L::Parameter), sizeof(typename L::Value),
                     sizeof(typename L::Grad), sizeof(typename L::Slot)});
  /// Vectors a thread loads before it computes: two, where both fit into 24 registers.
  template <class R>
  static constexpr int kVectors = [] {
    const std::size_t bytes = kWidth * (sizeof(typename L::Parameter) + sizeof(typename L::Grad) +
                                        R::kSlots * sizeof(typename L::Slot));
    return 2 * bytes <= 24 * 4 ? 2 : 1;
  }();
  /// Per multiprocessor. Eight allow 64 registers a thread and seven 72, where eight would spill;
  /// four allow 128, for double arithmetic.
  template <class R>
  static constexpr int kMinBlocks = sizeof(typename L::Real) == 8 ? 4 : 9 - kVectors<R>;
  /// Elements of an entry in the table of chunks, which several blocks share.
  static constexpr int kChunk = 4096;
};

/// log2 of the blocks for a chunk: enough for all its vectors at once. Chunks of less than
/// kChunk elements, of many small tensors, get fewer.
template <class R, class L>
constexpr unsigned apply_blocks_log2(std::int64_t elements_per_chunk) {
  using Tuning = ApplyTuning<L>;
  constexpr std::int64_t per_block =
      std::int64_t{Tuning::kThreads} * Tuning::kWidth * Tuning::template kVectors<R>;
  unsigned log2 = 0;
  while (per_block << log2 < elements_per_chunk) ++log2;
  return log2;
}

inline constexpr int kPrepareThreads = 128;
inline constexpr int kNormThreads = 128;

/// Bytes of pinned memory that uploads pass through. Holds the tables of 10,000 tensors.
inline constexpr std::size_t kRingBytes = std::size_t{2} << 20;

}  // namespace fusestep::detail
