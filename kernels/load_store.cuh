// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Between memory and registers, 16 bytes at a time. The addresses come from a table, so the
// compiler cannot know that they are global memory; the intrinsics say so, and that the data is
// used once.
#pragma once

#include "fusestep/detail/convert.h"
#include "fusestep/detail/host_device.h"

namespace fusestep::detail {

template <class T>
struct alignas(16) Vector16 {
  static constexpr int kElements = 16 / sizeof(T);
  T element[kElements];
};

template <class T>
FUSESTEP_HD Vector16<T> load_16_bytes(const T* from) {
#if defined(__CUDA_ARCH__)
  return __builtin_bit_cast(Vector16<T>, __ldcg(reinterpret_cast<const uint4*>(from)));
#else
  return *reinterpret_cast<const Vector16<T>*>(from);
#endif
}

template <class T>
FUSESTEP_HD void store_16_bytes(T* to, const Vector16<T>& vector) {
#if defined(__CUDA_ARCH__)
  __stcg(reinterpret_cast<uint4*>(to), __builtin_bit_cast(uint4, vector));
#else
  *reinterpret_cast<Vector16<T>*>(to) = vector;
#endif
}

/// kWidth elements from a 16-byte aligned address.
template <int kWidth, class Real, class T>
FUSESTEP_HD void load_vector(const T* from, Real (&to)[kWidth]) {
  constexpr int kPiece = Vector16<T>::kElements;
  static_assert(kWidth % kPiece == 0);
#pragma unroll
  for (int i = 0; i < kWidth; i += kPiece) {
    const Vector16<T> vector = load_16_bytes(from + i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) to[i + j] = load_as<Real>(vector.element[j]);
  }
}

/// `store(x, i)` makes the stored type of element i.
template <class T, int kWidth, class Real, class Store>
FUSESTEP_HD void store_vector(T* to, const Real (&from)[kWidth], Store store) {
  constexpr int kPiece = Vector16<T>::kElements;
#pragma unroll
  for (int i = 0; i < kWidth; i += kPiece) {
    Vector16<T> vector;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) vector.element[j] = store(from[i + j], i + j);
    store_16_bytes(to + i, vector);
  }
}

}  // namespace fusestep::detail
