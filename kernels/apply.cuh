// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The kernel of the step: a few thread blocks for each chunk of each tensor, whatever group it
// belongs to.
#pragma once

#include "fusestep/detail/convert.h"
#include "fusestep/detail/layout.h"
#include "fusestep/detail/rule_list.h"
#include "fusestep/detail/tables.h"
#include "load_store.cuh"
#include "tuning.h"

namespace fusestep::detail {

/// Where the tables of a step lie on the device.
struct ApplyTables {
  const Chunk* chunks;  // of the bucket
  const TensorRow* tensors;
  const ScalarRow* scalars;
  const Control* control;
};

template <class R, class L, class Tuning = ApplyTuning<R, L>>
struct Apply {
  using Real = typename L::Real;
  using Value = typename L::Value;
  using Grad = typename L::Grad;
  using Slot = typename L::Slot;
  static constexpr int kThreads = Tuning::kThreads;
  static constexpr int kMinBlocks = Tuning::kMinBlocks;
  static constexpr int kWidth = Tuning::kWidth;
  static constexpr int kVectors = Tuning::kVectors;
  static constexpr int kChunk = Tuning::kChunk;

  /// log2 of the blocks for a chunk: enough for all its vectors at once. Chunks of less than
  /// kChunk elements, of many small tensors, get fewer.
  static constexpr unsigned blocks_log2_for(std::int64_t elements_per_chunk) {
    constexpr std::int64_t per_block = std::int64_t{kThreads} * kWidth * kVectors;
    unsigned log2 = 0;
    while (per_block << log2 < elements_per_chunk) ++log2;
    return log2;
  }

  ApplyTables tables;
  unsigned blocks_log2;  // of a chunk

  FUSESTEP_HD void operator()(unsigned block, unsigned thread) const {
    const int skip = tables.control->skip;  // looked at below: the loads do not wait for each other
    const Chunk chunk = tables.chunks[block >> blocks_log2];
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
    const unsigned block_of_chunk = block & ((1u << blocks_log2) - 1);
    const int first = static_cast<int>(block_of_chunk * kThreads + thread);
    const int stride = kThreads << blocks_log2;
    for (int i = first; i < vectors; i += kVectors * stride) {
      step_vectors(scalars, arrays, head, i, stride, vectors);
    }
    const int rest = count - vectors * kWidth;
    for (int i = first; i < rest; i += stride) {
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
      for (int k = 0; k < R::kSlots; ++k) {
        slot[k] = static_cast<Slot*>(row.slot[k]) + begin;
        assume_global(slot[k]);
      }
      assume_global(value);
      assume_global(parameter);
      assume_global(grad);
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

  /// What a thread holds of all arrays, as it is stored.
  struct Vectors {
    Vector<Parameter, kWidth> parameter;
    Vector<Slot, kWidth> slot[kMaxSlots];
    Vector<Grad, kWidth> grad;

    Vectors() = default;
    FUSESTEP_HD Vectors(const Arrays& arrays, int element)
        : parameter(load_vector<kWidth>(arrays.parameter + element)) {
#pragma unroll
      for (int k = 0; k < R::kSlots; ++k) slot[k] = load_vector<kWidth>(arrays.slot[k] + element);
      grad = load_vector<kWidth>(arrays.grad + element);
    }
  };

  /// Vectors i, i + stride, ..., as far as they exist: all are loaded before the first is stepped.
  FUSESTEP_HD static void step_vectors(const Scalars& scalars, const Arrays& arrays, int head,
                                       int i, int stride, int vectors) {
    Vectors loaded[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int vector = i + k * stride;
      if (vector < vectors) loaded[k] = Vectors(arrays, head + vector * kWidth);
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int vector = i + k * stride;
      if (vector < vectors) step_vector(scalars, arrays, head + vector * kWidth, loaded[k]);
    }
  }

  FUSESTEP_HD static void step_vector(const Scalars& scalars, const Arrays& arrays, int element,
                                      Vectors& x) {
    Vector<Value, kWidth> value;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      Real p = load_as<Real>(x.parameter[j]);
      const Real g = load_as<Real>(x.grad[j]);
      Real own[kMaxSlots];
#pragma unroll
      for (int k = 0; k < R::kSlots; ++k) own[k] = load_as<Real>(x.slot[k][j]);
      if constexpr (L::kExtra == Extra::kStoreGrad) {
        x.grad[j] = store_as<Grad>(scalars.grad_unscale * g);
      }
      R::template apply<Real>(scalars.rule, p, scaled_and_clipped(scalars, g), own);
      if constexpr (L::kHasMaster) x.parameter[j] = p;
      value[j] = rounded<Value>(p, arrays, element + j, 0);
#pragma unroll
      for (int k = 0; k < R::kSlots; ++k) {
        x.slot[k][j] = rounded<Slot>(own[k], arrays, element + j, k + 1);
      }
    }
    if constexpr (L::kExtra == Extra::kStoreGrad) store_vector(arrays.grad + element, x.grad);
    if constexpr (L::kHasMaster) store_vector(arrays.parameter + element, x.parameter);
    store_vector(arrays.value + element, value);
#pragma unroll
    for (int k = 0; k < R::kSlots; ++k) store_vector(arrays.slot[k] + element, x.slot[k]);
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
