// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Element types, and the two 16-bit storage types C++20 does not have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "fusestep/export.h"

namespace fusestep {

enum class DType : std::uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

/// Storage only: the upper half of an IEEE binary32. Arithmetic is done in float.
struct bfloat16 {
  std::uint16_t bits;
};

/// Storage only: IEEE binary16. Arithmetic is done in float.
struct float16 {
  std::uint16_t bits;
};

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
  }
  return 0;
}

/// torch's and NumPy's names: "float32", "float64", "bfloat16", "float16".
FUSESTEP_API std::string_view name_of(DType dtype);

namespace detail {
template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
};
template <>
struct DTypeOf<bfloat16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct DTypeOf<float16> {
  static constexpr DType value = DType::kFloat16;
};
}  // namespace detail

/// The DType of a C++ element type.
template <class T>
inline constexpr DType dtype_of = detail::DTypeOf<T>::value;

}  // namespace fusestep
