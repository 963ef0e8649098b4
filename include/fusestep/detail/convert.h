// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Between storage types and the type of arithmetic. Rounding is to nearest even, subnormals are
// kept, NaN stays NaN (its payload does not). Integer code on the host, which the compiler can
// vectorise: x86's bf16 instructions flush subnormals, and the baseline has none for fp16. On a
// device the instruction `cvt.rn`, which is the same function: tests/gpu/convert_test.cu compares
// all 2^32 inputs.
#pragma once

#include <cstdint>

#include "fusestep/detail/host_device.h"
#include "fusestep/dtype.h"

namespace fusestep::detail {

FUSESTEP_HD std::uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  return __builtin_bit_cast(std::uint32_t, x);
#endif
}
FUSESTEP_HD float float_of(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

template <class Real, class Stored>
FUSESTEP_HD Real load_as(Stored x) {
  return Real(x);
}
template <>
FUSESTEP_HD float load_as<float, bfloat16>(bfloat16 x) {
  return float_of(std::uint32_t{x.bits} << 16);
}
template <>
FUSESTEP_HD float load_as<float, float16>(float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  constexpr std::uint32_t exponent_mask = 0x7c00u << 13;
  const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & exponent_mask;
  const std::uint32_t rebiased = magnitude + ((127u - 15u) << 23);
  const std::uint32_t infinite = rebiased + ((128u - 16u) << 23);
  // A subnormal is its significand in units of 2^-24: let a subtraction normalise it.
  const std::uint32_t subnormal = bits_of(float_of(rebiased + (1u << 23)) - float_of(113u << 23));
  const std::uint32_t result = exponent == exponent_mask ? infinite
                               : exponent == 0           ? subnormal
                                                         : rebiased;
  return float_of(result | (std::uint32_t{x.bits} & 0x8000u) << 16);
#endif
}

template <class Stored, class Real>
FUSESTEP_HD Stored store_as(Real x) {
  return Stored(x);
}
template <>
FUSESTEP_HD bfloat16 store_as<bfloat16, float>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  std::uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return {result};
#else
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
#endif
}
template <>
FUSESTEP_HD float16 store_as<float16, float>(float x) {
#if defined(__CUDA_ARCH__)
  std::uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return {result};
#else
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Rebias the exponent from 127 to 15 and round the 13 bits that go.
  const std::uint32_t normal =
      (magnitude + ((15u - 127u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 lines the significand up with 2^-24, and the addition rounds.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const std::uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t result = magnitude >= 0x47800000u  ? overflow   // 2^16, infinity, NaN
                               : magnitude < 0x38800000u ? subnormal  // 2^-14
                                                         : normal;
  return {static_cast<std::uint16_t>(result | (bits >> 16 & 0x8000u))};
#endif
}

/// Element `i` of 16-bit memory.
FUSESTEP_HD float load_widened(const void* memory, DType dtype, std::int64_t i) {
  return dtype == DType::kBFloat16 ? load_as<float>(static_cast<const bfloat16*>(memory)[i])
                                   : load_as<float>(static_cast<const float16*>(memory)[i]);
}

/// To one of the two neighbours, the nearer the likelier: `noise` is 16 random bits. What bfloat16
/// can hold stays, infinite too, and NaN is NaN.
FUSESTEP_HD bfloat16 store_stochastically(float x, std::uint32_t noise) {
  const std::uint32_t rounded = x != x ? 0x7fff0000u : bits_of(x) + noise;
  return {static_cast<std::uint16_t>(rounded >> 16)};
}

}  // namespace fusestep::detail
