// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Functions that run on the host and on a device, and the few operations they may use.
#pragma once

#include <cmath>
#include <cstdint>

/// Always inlined: the CPU objects are compiled for several instruction sets, and a function that
/// was not inlined would become a weak symbol of which the linker keeps any one for everybody.
#if defined(__CUDACC__)
#define FUSESTEP_HD __host__ __device__ __forceinline__
#else
#define FUSESTEP_HD inline __attribute__((always_inline))
#endif

namespace fusestep::detail {

/// Says that the address, which comes from a table, is in global memory: accesses to it are shorter
/// then.
FUSESTEP_HD void assume_global([[maybe_unused]] const void* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#endif
}

/// a * b + c, rounded once.
FUSESTEP_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
FUSESTEP_HD double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

/// IEEE square root.
FUSESTEP_HD float sqrt(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
FUSESTEP_HD double sqrt(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

/// base^exponent by repeated squaring: products only, so host and device round alike (pow does
/// not).
FUSESTEP_HD double power(double base, std::int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

/// a + w (b - a), from the nearer end: exactly b for w = 1 (a beta of 0), exactly a for w = 0.
template <class Real>
FUSESTEP_HD Real lerp(Real a, Real b, Real w) {
  const Real distance = b - a;
  return w < Real(0.5) ? fma(w, distance, a) : fma(w - Real(1), distance, b);
}

/// lerp(v, g^2, w), the square not rounded in between. Where the square or the second moment has
/// overflowed it is infinite, as in torch; the plain formula would give infinity - infinity.
template <class Real>
FUSESTEP_HD Real lerp_square(Real v, Real g, Real w) {
  const Real distance = fma(g, g, -v);
  const Real square = g * g;
  const Real next = w < Real(0.5) ? fma(w, distance, v) : fma(w - Real(1), distance, square);
  constexpr Real infinity = Real(__builtin_huge_val());
  return v < infinity && square < infinity ? next : v + square;
}

/// The larger one, NaN if either is (std::max would drop it).
template <class Real>
FUSESTEP_HD Real max_or_nan(Real a, Real b) {
  return b > a || b != b ? b : a;
}

/// The number in [-limit, limit] that is nearest to x; NaN stays NaN. The same function twice: host
/// compilers make a minimum and a maximum of the one, and with the other no kernel spills.
template <class Real>
FUSESTEP_HD Real clamp(Real x, Real limit) {
#if defined(__CUDA_ARCH__)
  return x > limit ? limit : x < -limit ? -limit : x;
#else
  x = limit < x ? limit : x;
  return -limit > x ? -limit : x;
#endif
}

}  // namespace fusestep::detail
