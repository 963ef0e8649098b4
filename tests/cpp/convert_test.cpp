// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Conversion between float32 and the 16-bit types against reference.h's, which is written from the
// definition of the formats.
#include "fusestep/detail/convert.h"

#include <gtest/gtest.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "support.h"

namespace fusestep::test {
namespace {

using detail::float_of;
using detail::load_as;
using detail::store_as;

template <class Half>
constexpr SmallFormat format_of() {
  return dtype_of<Half> == DType::kBFloat16 ? kBFloat16Format : kFloat16Format;
}

template <class Half>
bool is_nan(Half x) {
  return std::isnan(decode(format_of<Half>(), x.bits));
}

template <class Half>
class Convert : public ::testing::Test {};
using Halves = ::testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(Convert, Halves);

TYPED_TEST(Convert, LoadsEveryValue) {
  for (int i = 0; i < 65536; ++i) {
    const TypeParam half{static_cast<std::uint16_t>(i)};
    const float loaded = load_as<float>(half);
    const double expected = decode(format_of<TypeParam>(), half.bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(loaded)) << "bits " << i;
    } else {
      ASSERT_EQ(bits(static_cast<double>(loaded)), bits(expected)) << "bits " << i;
    }
  }
}

TYPED_TEST(Convert, StoresBackWhatItLoaded) {
  for (int i = 0; i < 65536; ++i) {
    const TypeParam half{static_cast<std::uint16_t>(i)};
    const TypeParam back = store_as<TypeParam>(load_as<float>(half));
    if (is_nan(half)) {
      ASSERT_TRUE(is_nan(back)) << "bits " << i;
    } else {
      ASSERT_EQ(back.bits, half.bits);
    }
  }
}

template <class Half>
void check_store(std::uint32_t bits_of_float) {
  const float x = float_of(bits_of_float);
  const Half stored = store_as<Half>(x);
  if (std::isnan(x)) {
    ASSERT_TRUE(is_nan(stored)) << std::hex << bits_of_float;
  } else {
    ASSERT_EQ(stored.bits, encode(format_of<Half>(), x))
        << std::hex << bits_of_float << " is " << std::hexfloat << x;
  }
}

/// For every sign and exponent, subnormals, infinities and NaN included: significands at and beside
/// every place where one of the formats rounds (ties, one below, one above), and others.
TYPED_TEST(Convert, StoresEveryExponent) {
  for (std::uint32_t high = 0; high < 512; ++high) {
    std::vector<std::uint32_t> significands = {0, 1, 2, 0x7fffff, 0x7ffffe, 0x400000, 0x3fffff};
    for (int place = 0; place < 23; ++place) {
      const std::uint32_t unit = std::uint32_t{1} << place;
      for (std::uint32_t odd = 0; odd < 4; ++odd) {
        const std::uint32_t tie = (2 * odd + 1) * unit;
        for (const std::uint32_t s : {tie - 1, tie, tie + 1, 0x800000 - tie, 0x7fffff - tie}) {
          significands.push_back(s & 0x7fffff);
        }
      }
    }
    for (std::uint32_t i = 0; i < 200; ++i) {
      significands.push_back(static_cast<std::uint32_t>(hash(high, i)) & 0x7fffff);
    }
    for (const std::uint32_t significand : significands) {
      ASSERT_NO_FATAL_FAILURE(check_store<TypeParam>(high << 23 | significand));
    }
  }
}

/// Between every two neighbours: their middle, and the floats beside it.
TYPED_TEST(Convert, StoresEveryTie) {
  const SmallFormat format = format_of<TypeParam>();
  const int infinity = format.top_exponent() << format.fraction_bits;
  for (int i = 0; i + 1 < infinity; ++i) {
    const double a = decode(format, static_cast<std::uint16_t>(i));
    const double b = decode(format, static_cast<std::uint16_t>(i + 1));
    const auto middle = detail::bits_of(static_cast<float>((a + b) / 2));
    for (const std::uint32_t x : {middle - 1, middle, middle + 1}) {
      ASSERT_NO_FATAL_FAILURE(check_store<TypeParam>(x));
      ASSERT_NO_FATAL_FAILURE(check_store<TypeParam>(x | 0x80000000u));
    }
  }
}

#if defined(__x86_64__)
__attribute__((target("f16c"))) void sweep_against_f16c() {
  for (std::uint64_t i = 0; i < (std::uint64_t{1} << 32); i += 97) {
    const auto x = static_cast<std::uint32_t>(i);
    const std::uint16_t expected = _cvtss_sh(float_of(x), _MM_FROUND_TO_NEAREST_INT);
    const std::uint16_t stored = store_as<float16>(float_of(x)).bits;
    if ((x & 0x7fffffffu) > 0x7f800000u) {
      ASSERT_GT(stored & 0x7fff, 0x7c00) << std::hex << x;
    } else {
      ASSERT_EQ(stored, expected) << std::hex << x;
    }
  }
}

TEST(ConvertFloat16, AgreesWithTheProcessor) {
  if (!__builtin_cpu_supports("avx2")) GTEST_SKIP() << "no F16C instructions on this processor";
  sweep_against_f16c();
}
#endif

}  // namespace
}  // namespace fusestep::test
