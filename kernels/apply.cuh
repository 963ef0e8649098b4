// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The kernel of the step: one chunk of one tensor per thread block, whatever group it belongs to.
#pragma once

#include "fusestep/detail/layout.h"
#include "fusestep/detail/rule_list.h"
#include "fusestep/detail/tables.h"
#include "load_store.cuh"
#include "tuning.h"

namespace fusestep::detail {

/// Where the tables of a step lie on the device.
struct ApplyTables {
  const Chunk* chunks;  // of the bucket: one per block
  const TensorRow* tensors;
  const ScalarRow* scalars;
  const Control* control;
};

template <class R, class L>
struct Apply {
  using Real = typename L::Real;
  using Value = typename L::Value;
  using Grad = typename L::Grad;
  using Slot = typename L::Slot;
  static constexpr int kThreads = ApplyTuning<L>::kThreads;
  static constexpr int kMinBlocks = ApplyTuning<L>::kMinBlocks;
  static constexpr int kWidth = ApplyTuning<L>::kWidth;
  static constexpr int kChunk = ApplyTuning<L>::kChunk;

  ApplyTables tables;
  unsigned threads;  // of a block, kThreads at most

  FUSESTEP_HD void operator()(unsigned block, unsigned thread) const {
    const int skip = tables.control->skip;  // looked at below: the loads do not wait for each other
    const Chunk chunk = tables.chunks[block];
    const TensorRow& row = tables.tensors[chunk.tensor];
    const RuleScalars<R, Real> scalars =
        tables.scalars[chunk.tensor].template as<RuleScalars<R, Real>>();
    if (skip != 0) return;
    const std::int64_t begin = std::int64_t{chunk.index} * kChunk;
    const std::int64_t left = row.size - begin;
    const int count = left < kChunk ? static_cast<int>(left) : kChunk;
    const Arrays arrays(row, begin);

    // A head up to the first aligned element, whole vectors, and a tail.
    const int head = row.head < count ? row.head : count;
    const int vectors = (count - head) / kWidth;
    const int stride = static_cast<int>(threads);
    for (int i = static_cast<int>(thread); i < vectors; i += stride) {
      step_vector(scalars, arrays, head + i * kWidth);
    }
    const int rest = count - vectors * kWidth;
    for (int i = static_cast<int>(thread); i < rest; i += stride) {
      step_element(scalars, arrays, i < head ? i : i + vectors * kWidth);
    }
  }

 private:
  struct Arrays {
    Value* value;
    const Grad* grad;
    Slot* slot[kMaxSlots];

    FUSESTEP_HD Arrays(const TensorRow& row, std::int64_t begin)
        : value(static_cast<Value*>(row.value) + begin),
          grad(static_cast<const Grad*>(row.grad) + begin) {
#pragma unroll
      for (int k = 0; k < R::kSlots; ++k) slot[k] = static_cast<Slot*>(row.slot[k]) + begin;
    }
  };

  FUSESTEP_HD static void step_vector(const RuleScalars<R, Real>& scalars, const Arrays& arrays,
                                      int element) {
    Real p[kWidth], g[kWidth], slot[kMaxSlots][kWidth];
    load_vector<kWidth>(arrays.value + element, p);
    load_vector<kWidth>(arrays.grad + element, g);
#pragma unroll
    for (int k = 0; k < R::kSlots; ++k) load_vector<kWidth>(arrays.slot[k] + element, slot[k]);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      Real own[kMaxSlots];
#pragma unroll
      for (int k = 0; k < R::kSlots; ++k) own[k] = slot[k][j];
      R::template apply<Real>(scalars.rule, p[j], scalars.grad_multiplier * g[j], own);
#pragma unroll
      for (int k = 0; k < R::kSlots; ++k) slot[k][j] = own[k];
    }
    store_vector<kWidth>(arrays.value + element, p);
#pragma unroll
    for (int k = 0; k < R::kSlots; ++k) store_vector<kWidth>(arrays.slot[k] + element, slot[k]);
  }

  FUSESTEP_HD static void step_element(const RuleScalars<R, Real>& scalars, const Arrays& arrays,
                                       int element) {
    Real p = load_as<Real>(arrays.value[element]);
    const Real g = scalars.grad_multiplier * load_as<Real>(arrays.grad[element]);
    Real own[kMaxSlots];
#pragma unroll
    for (int k = 0; k < R::kSlots; ++k) own[k] = load_as<Real>(arrays.slot[k][element]);
    R::template apply<Real>(scalars.rule, p, g, own);
    arrays.value[element] = store_as<Value>(p);
#pragma unroll
    for (int k = 0; k < R::kSlots; ++k) arrays.slot[k][element] = store_as<Slot>(own[k]);
  }
};

}  // namespace fusestep::detail
