// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Master weights from 16-bit values: once per parameter, at its first step.
#pragma once

#include "fusestep/detail/convert.h"
#include "tuning.h"

namespace fusestep::detail {

struct Widen {
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocks = 1;
  static constexpr int kPerBlock = 16 * kThreads;

  float* to;
  const void* from;
  DType dtype;
  std::int64_t count;

  FUSESTEP_HD void operator()(unsigned block, unsigned thread) const {
    const std::int64_t begin = std::int64_t{block} * kPerBlock;
    const std::int64_t end = begin + kPerBlock < count ? begin + kPerBlock : count;
    for (std::int64_t i = begin + thread; i < end; i += kThreads) {
      to[i] = load_widened(from, dtype, i);
    }
  }
};

}  // namespace fusestep::detail
