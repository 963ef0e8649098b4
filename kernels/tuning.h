// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Numbers that only change the speed of the CUDA backend. Measurements: docs/performance.md.
#pragma once

#include <algorithm>
#include <cstddef>

#include "fusestep/detail/layout.h"

namespace fusestep::detail {

/// Small blocks whose threads load once, compute and store: where a block goes round a loop
/// instead, its loads wait for the stores of the round before, and 4 to 12 % of the bandwidth are
/// lost. bench_shapes tries other shapes on the device at hand.
template <class R, class L>
struct ApplyTuning {
  static constexpr int kThreads = 128;
  /// Elements of a vector: one 16-byte access of the widest array. Wider vectors would read the
  /// wide arrays by half sectors.
  static constexpr int kWidth =
      16 / std::max({sizeof(typename L::Parameter), sizeof(typename L::Value),
                     sizeof(typename L::Grad), sizeof(typename L::Slot)});
  /// Vectors a thread loads before it computes: two, where both fit into 24 registers.
  static constexpr int kVectors = [] {
    const std::size_t bytes = kWidth * (sizeof(typename L::Parameter) + sizeof(typename L::Grad) +
                                        R::kSlots * sizeof(typename L::Slot));
    return 2 * bytes <= 24 * 4 ? 2 : 1;
  }();
  /// Per multiprocessor. Eight allow 64 registers a thread and seven 72, where eight would spill;
  /// four allow 128, for double arithmetic.
  static constexpr int kMinBlocks = sizeof(typename L::Real) == 8 ? 4 : 9 - kVectors;
  /// Elements of an entry in the table of chunks, which several blocks share.
  static constexpr int kChunk = 4096;
};

/// Bytes. What a warp reads by vectors, 256 or 512 bytes, then is whole lines of the cache, of 128.
inline constexpr std::size_t kCudaAlignment = 256;
inline constexpr std::size_t kCudaSkew = 5 * kCudaAlignment;

inline constexpr int kPrepareThreads = 128;
inline constexpr int kNormThreads = 128;

/// Bytes of pinned memory that uploads pass through. Holds the tables of 10,000 tensors.
inline constexpr std::size_t kRingBytes = std::size_t{2} << 20;

}  // namespace fusestep::detail
