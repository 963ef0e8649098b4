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

template <class L>
struct ApplyTuning {
  static constexpr int kThreads = 512;
  /// Per multiprocessor: two allow 64 registers a thread, which double arithmetic would spill.
  static constexpr int kMinBlocks = sizeof(typename L::Real) == 8 ? 1 : 2;
  /// Elements a thread handles at a time: one 16-byte access of the narrowest array.
  static constexpr int kNarrowest =
      std::min({sizeof(typename L::Value), sizeof(typename L::Grad), sizeof(typename L::Slot)});
  static constexpr int kWidth = 16 / kNarrowest;
  /// Elements of a thread block.
  static constexpr int kChunk = kNarrowest == 2 ? 8192 : 4096;
};

/// Threads of a block for chunks of so many elements on average: enough for all its vectors at
/// once, and no more, so that many small tensors share a multiprocessor. Full chunks get 512, as
/// the kernels that docs/performance.md quotes; what small ones gain has not been measured yet.
template <class L>
constexpr unsigned apply_threads(std::int64_t elements_per_chunk) {
  const std::int64_t vectors = elements_per_chunk / ApplyTuning<L>::kWidth;
  unsigned threads = ApplyTuning<L>::kThreads;
  while (threads > 128 && threads / 2 >= vectors) threads /= 2;
  return threads;
}

inline constexpr int kPrepareThreads = 128;
inline constexpr int kNormThreads = 128;

/// Bytes of pinned memory that uploads pass through. Holds the tables of 10,000 tensors.
inline constexpr std::size_t kRingBytes = std::size_t{2} << 20;

}  // namespace fusestep::detail
