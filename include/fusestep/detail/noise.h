// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The random bits of stochastic rounding: a function of (seed, parameter, step, element) and
// nothing else, so that they do not depend on launch shape, threads or device, and a resumed run
// goes on with those it would have had.
#pragma once

#include <cstdint>
#include <string_view>

#include "fusestep/detail/host_device.h"

namespace fusestep::detail {

/// Of one tensor and step; written by prepare().
struct NoiseKey {
  std::uint32_t first, second;
};

/// A bijection in which every output bit depends on every input bit (Stafford, "Better bit mixing",
/// variant 13; the mixer of SplitMix64).
FUSESTEP_HD std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// What a parameter's noise starts from: its name, not its place, so that a checkpoint that is
/// loaded into other groups goes on alike.
inline std::uint64_t noise_seed(std::uint64_t seed, std::string_view name) {
  std::uint64_t hash = mix(seed + 0x9e3779b97f4a7c15u);
  for (const char c : name) hash = mix(hash ^ static_cast<unsigned char>(c)) + 1;
  return hash;
}

FUSESTEP_HD NoiseKey noise_key(std::uint64_t seed, std::int64_t step) {
  const std::uint64_t key = mix(seed + 0x9e3779b97f4a7c15u * static_cast<std::uint64_t>(step));
  return {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)};
}

/// Of the elements from `first` up to the next multiple of 2^32, which are then numbered by their
/// lower 32 bits: loops over 32-bit numbers vectorise better.
FUSESTEP_HD NoiseKey noise_key_from(NoiseKey key, std::int64_t first) {
  const auto high = static_cast<std::uint32_t>(first >> 32);
  return {key.first ^ high * 0x85ebca6bu, key.second ^ high * 0xc2b2ae35u};
}

/// 16 bits for each of the arrays an element is stored to. Few operations, of 32 bits: with them a
/// step of bfloat16 computes a third more. A counter in steps of the golden ratio (as SplitMix
/// has it) goes through a mixer (shifts and factors: Ettinger & Wellons, "hash-prospector"), the
/// high halves of whose multiples are independent of each other.
struct Noise {
  std::uint32_t mixed;

  FUSESTEP_HD Noise(NoiseKey key, std::uint32_t element) {
    std::uint32_t x = element * 0x9e3779b9u + key.first;
    x ^= x >> 16;
    x = x * 0x21f0aaadu + key.second;
    x ^= x >> 15;
    mixed = x * 0xd35a2d97u;
  }

  FUSESTEP_HD std::uint32_t of_value() const { return mixed >> 16; }
  FUSESTEP_HD std::uint32_t of_slot(int slot) const {
    const std::uint32_t factor = slot == 0 ? 0x2c1b3c6du : slot == 1 ? 0x297a2d39u : 0x1b56c4e9u;
    return mixed * factor >> 16;
  }
};

}  // namespace fusestep::detail
