// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Sums of squares in the order of detail/norm.h. A thread takes the elements t, t + 128, ... of its
// block, so the first halvings stay in its registers; the others go through shared memory.
// Neighbouring threads read neighbouring elements whatever the alignment, and a thread has 32 loads
// under way.
#pragma once

#include <bit>

#include "fusestep/detail/norm.h"
#include "tuning.h"

namespace fusestep::detail {

inline constexpr int kNormPerThread = kNormBlock / kNormThreads;

/// What both kernels have in common; `Source` says what element i of a block is.
template <class Source>
struct SumBlocks {
  static constexpr int kThreads = kNormThreads;
  static constexpr int kMinBlocks = 4;
  static constexpr int kPhases = 2 + std::countr_zero(unsigned{kThreads});
  struct Shared {
    double squares[kThreads];
    std::int64_t nonfinite[kThreads];
  };

  Source source;
  NormSum* sums;  // one per block

  FUSESTEP_HD void operator()(unsigned block, unsigned thread, int phase, Shared& shared) const {
    if (phase == 0) {
      const NormSum own = source.sum_of_thread(block, static_cast<int>(thread));
      shared.squares[thread] = own.squares;
      shared.nonfinite[thread] = own.nonfinite;
    } else if (phase < kPhases - 1) {
      const unsigned half = static_cast<unsigned>(kThreads) >> phase;
      if (thread >= half) return;
      shared.squares[thread] += shared.squares[thread + half];
      shared.nonfinite[thread] += shared.nonfinite[thread + half];
    } else if (thread == 0) {
      sums[block] = {shared.squares[0], shared.nonfinite[0]};
    }
  }
};

/// x[0] + ... + x[kCount - 1], by halves.
template <int kCount>
FUSESTEP_HD double add_by_halves(double* x) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) x[i] += x[i + kCount / 2];
    return add_by_halves<kCount / 2>(x);
  }
}

/// Squares of gradients.
struct GradientSource {
  const Chunk* blocks;
  const TensorRow* tensors;

  FUSESTEP_HD NormSum sum_of_thread(unsigned block, int thread) const {
    const Chunk chunk = blocks[block];
    const TensorRow& row = tensors[chunk.tensor];
    switch (row.grad_dtype) {
      case DType::kFloat64: return sum<double>(row, chunk.index, thread);
      case DType::kBFloat16: return sum<bfloat16>(row, chunk.index, thread);
      case DType::kFloat16: return sum<float16>(row, chunk.index, thread);
      case DType::kFloat32: break;
    }
    return sum<float>(row, chunk.index, thread);
  }

 private:
  template <class Grad>
  FUSESTEP_HD static NormSum sum(const TensorRow& row, int index, int thread) {
    const std::int64_t begin = std::int64_t{index} * kNormBlock;
    const std::int64_t left = row.size - begin;
    const Grad* grad = static_cast<const Grad*>(row.grad) + begin;
    assume_global(grad);
    double squares[kNormPerThread];
#pragma unroll
    for (int k = 0; k < kNormPerThread; ++k) {
      const int i = thread + k * kNormThreads;
      squares[k] = i < left ? square(grad[i]).squares : 0.0;
    }
    NormSum sum{add_by_halves<kNormPerThread>(squares), 0};
    if (is_finite(sum.squares)) return sum;  // then all of them are
    for (int i = thread; i < kNormBlock && i < left; i += kNormThreads) {
      sum.nonfinite += square(grad[i]).nonfinite;
    }
    return sum;
  }
};

/// Between the shares of the norm and two doubles for a sum over processes.
struct ExchangeSums {
  static constexpr int kThreads = 32;
  static constexpr int kMinBlocks = 1;

  NormSum* parts;
  int count;
  double* sums;
  bool gathers;

  FUSESTEP_HD void operator()(unsigned, unsigned thread) const {
    if (thread != 0) return;
    if (gathers) {
      const NormSum total = add_all(parts, count);
      sums[0] = total.squares;
      sums[1] = static_cast<double>(total.nonfinite);
    } else {
      parts[0] = norm_sum_of(sums);
    }
  }
};

/// Sums of the round before.
struct SumSource {
  const NormSum* sums;
  std::int64_t count;

  FUSESTEP_HD NormSum sum_of_thread(unsigned block, int thread) const {
    double squares[kNormPerThread];
    std::int64_t nonfinite = 0;
#pragma unroll
    for (int k = 0; k < kNormPerThread; ++k) {
      const std::int64_t i = std::int64_t{block} * kNormBlock + thread + k * kNormThreads;
      const NormSum one = i < count ? sums[i] : NormSum{};
      squares[k] = one.squares;
      nonfinite += one.nonfinite;
    }
    return {add_by_halves<kNormPerThread>(squares), nonfinite};
  }
};

}  // namespace fusestep::detail
