// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Between memory and registers, a vector at a time. The compiler would take plain copies apart into
// accesses of 4 bytes, so the intrinsics say how wide they are.
#pragma once

#include <algorithm>
#include <cstddef>

#include "fusestep/detail/host_device.h"

namespace fusestep::detail {

/// Neighbouring elements as they are stored: one access where they have 16 bytes or fewer.
template <class T, int kWidth>
struct Vector {
  static constexpr std::size_t kAccessBytes = std::min<std::size_t>(kWidth * sizeof(T), 16);
  static constexpr int kPerAccess = static_cast<int>(kAccessBytes / sizeof(T));
  static constexpr int kAccesses = kWidth / kPerAccess;
  static_assert(kWidth % kPerAccess == 0);

  struct alignas(kAccessBytes) Piece {
    T element[kPerAccess];
  };
  Piece piece[kAccesses];

  FUSESTEP_HD T& operator[](int i) { return piece[i / kPerAccess].element[i % kPerAccess]; }
  FUSESTEP_HD const T& operator[](int i) const {
    return piece[i / kPerAccess].element[i % kPerAccess];
  }
};

#if defined(__CUDA_ARCH__)
template <std::size_t kBytes>
struct AccessOf;
template <>
struct AccessOf<8> {
  using Word = uint2;
};
template <>
struct AccessOf<16> {
  using Word = uint4;
};
#endif

/// kWidth elements from an address that is aligned to Vector::kAccessBytes.
template <int kWidth, class T>
FUSESTEP_HD Vector<T, kWidth> load_vector(const T* from) {
  using V = Vector<T, kWidth>;
  V to;
#pragma unroll
  for (int i = 0; i < V::kAccesses; ++i) {
#if defined(__CUDA_ARCH__)
    using Word = typename AccessOf<V::kAccessBytes>::Word;
    const Word word = __ldca(reinterpret_cast<const Word*>(from) + i);
    to.piece[i] = __builtin_bit_cast(typename V::Piece, word);
#else
    to.piece[i] = reinterpret_cast<const typename V::Piece*>(from)[i];
#endif
  }
  return to;
}

template <int kWidth, class T>
FUSESTEP_HD void store_vector(T* to, const Vector<T, kWidth>& from) {
  using V = Vector<T, kWidth>;
#pragma unroll
  for (int i = 0; i < V::kAccesses; ++i) {
#if defined(__CUDA_ARCH__)
    using Word = typename AccessOf<V::kAccessBytes>::Word;
    __stwb(reinterpret_cast<Word*>(to) + i, __builtin_bit_cast(Word, from.piece[i]));
#else
    reinterpret_cast<typename V::Piece*>(to)[i] = from.piece[i];
#endif
  }
}

}  // namespace fusestep::detail
