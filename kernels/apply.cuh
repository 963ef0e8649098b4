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
    const Arrays arrays(row, scalars, begin);

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
  using Scalars = RuleScalars<R, Real>;
  using Parameter = typename L::Parameter;

  struct Arrays {
    Value* value;
    Parameter* parameter;  // the value itself, or its master weight
    Grad* grad;
    Slot* slot[kMaxSlots];
    NoiseKey noise;
    std::uint32_t first;  // element, of which the arrays start here

    FUSESTEP_HD Arrays(const TensorRow& row, const Scalars& scalars, std::int64_t begin)
        : value(static_cast<Value*>(row.value) + begin),
          parameter(static_cast<Parameter*>(L::kHasMaster ? row.master : row.value) + begin),
          grad(static_cast<Grad*>(row.grad) + begin),
          noise(noise_key_from(scalars.noise, begin)),
          first(static_cast<std::uint32_t>(begin)) {
#pragma unroll
      for (int k = 0; k < R::kSlots; ++k) slot[k] = static_cast<Slot*>(row.slot[k]) + begin;
    }
  };

  /// What element `i` is stored as in the array with this number: 0 for the value, then the slots.
  template <class Stored>
  FUSESTEP_HD static Stored rounded(Real x, const Arrays& arrays, int i, int array) {
    if constexpr (L::kExtra == Extra::kStochasticRounding && std::is_same_v<Stored, bfloat16>) {
      const Noise noise(arrays.noise, arrays.first + static_cast<std::uint32_t>(i));
      return store_stochastically(x, array == 0 ? noise.of_value() : noise.of_slot(array - 1));
    } else {
      return store_as<Stored>(x);
    }
  }

  FUSESTEP_HD static void step_vector(const Scalars& scalars, const Arrays& arrays, int element) {
    Real p[kWidth], g[kWidth], slot[kMaxSlots][kWidth];
    load_vector<kWidth>(arrays.parameter + element, p);
#pragma unroll
    for (int k = 0; k < R::kSlots; ++k) load_vector<kWidth>(arrays.slot[k] + element, slot[k]);
    // Last: in another order some kernels with three slots of float32 spill.
    load_vector<kWidth>(arrays.grad + element, g);
    if constexpr (L::kExtra == Extra::kStoreGrad) {
      store_vector(arrays.grad + element, g,
                   [&](Real x, int) { return store_as<Grad>(scalars.grad_unscale * x); });
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      Real own[kMaxSlots];
#pragma unroll
      for (int k = 0; k < R::kSlots; ++k) own[k] = slot[k][j];
      R::template apply<Real>(scalars.rule, p[j], scaled_and_clipped(scalars, g[j]), own);
#pragma unroll
      for (int k = 0; k < R::kSlots; ++k) slot[k][j] = own[k];
    }
    if constexpr (L::kHasMaster) {
      store_vector(arrays.parameter + element, p, [](Real x, int) { return x; });
    }
    store_vector(arrays.value + element, p,
                 [&](Real x, int j) { return rounded<Value>(x, arrays, element + j, 0); });
#pragma unroll
    for (int k = 0; k < R::kSlots; ++k) {
      store_vector(arrays.slot[k] + element, slot[k],
                   [&](Real x, int j) { return rounded<Slot>(x, arrays, element + j, k + 1); });
    }
  }

  FUSESTEP_HD static void step_element(const Scalars& scalars, const Arrays& arrays, int element) {
    Real p = load_as<Real>(arrays.parameter[element]);
    const Real g = load_as<Real>(arrays.grad[element]);
    Real own[kMaxSlots];
#pragma unroll
    for (int k = 0; k < R::kSlots; ++k) own[k] = load_as<Real>(arrays.slot[k][element]);
    if constexpr (L::kExtra == Extra::kStoreGrad) {
      arrays.grad[element] = store_as<Grad>(scalars.grad_unscale * g);
    }
    R::template apply<Real>(scalars.rule, p, scaled_and_clipped(scalars, g), own);
    if constexpr (L::kHasMaster) arrays.parameter[element] = p;
    arrays.value[element] = rounded<Value>(p, arrays, element, 0);
#pragma unroll
    for (int k = 0; k < R::kSlots; ++k) {
      arrays.slot[k][element] = rounded<Slot>(own[k], arrays, element, k + 1);
    }
  }
};

}  // namespace fusestep::detail
