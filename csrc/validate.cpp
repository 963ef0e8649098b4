// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "validate.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>

#include "fusestep/error.h"

namespace fusestep::detail {

std::string where(const std::string& group, const std::string& parameter) {
  return "group '" + group + "', parameter '" + parameter + "'";
}

namespace {

/// Of a shape; nothing if no tensor has it.
std::optional<std::int64_t> elements_of(const std::vector<std::int64_t>& shape) {
  std::int64_t elements = 1;
  for (const std::int64_t extent : shape) {
    const bool too_many =
        extent > 0 && elements > std::numeric_limits<std::int64_t>::max() / 8 / extent;
    if (extent < 0 || too_many) return std::nullopt;
    elements *= extent;
  }
  return elements;
}

}  // namespace

void check_memory(const std::string& where, const std::string& what, const TensorView& memory) {
  for (const std::int64_t extent : memory.shape) {
    if (extent >= 0) continue;
    throw InvalidArgument(where + ": " + what + " has the negative extent " +
                          std::to_string(extent) + " in shape " + to_string(memory.shape));
  }
  const std::optional<std::int64_t> elements = elements_of(memory.shape);
  if (!elements) {
    throw InvalidArgument(where + ": " + what + " of shape " + to_string(memory.shape) +
                          " has more elements than can be addressed");
  }
  if (*elements == 0) return;
  if (memory.data == nullptr) {
    throw InvalidArgument(where + ": " + what + " of shape " + to_string(memory.shape) +
                          " is a null pointer");
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data);
  if (address % size_of(memory.dtype) != 0) {
    throw InvalidArgument(where + ": address of " + what + " must be a multiple of " +
                          std::to_string(size_of(memory.dtype)) + " for " +
                          std::string(name_of(memory.dtype)) + ", got " + std::to_string(address));
  }
}

void check_like(const std::string& where, const std::string& what, const TensorView& memory,
                DType dtype, const TensorView& value) {
  const auto refuse = [&](const std::string& property, const std::string& expected,
                          const std::string& got) {
    throw InvalidArgument(where + ": " + what + " has " + property + " " + got + ", expected " +
                          expected);
  };
  if (!memory.present) throw InvalidArgument(where + ": " + what + " is absent");
  if (memory.dtype != dtype) {
    refuse("dtype", std::string(name_of(dtype)), std::string(name_of(memory.dtype)));
  }
  if (memory.shape != value.shape) {
    refuse("shape", to_string(value.shape), to_string(memory.shape));
  }
  if (memory.device != value.device) {
    refuse("device", to_string(value.device), to_string(memory.device));
  }
  check_memory(where, what, memory);
}

void check_shard(const std::string& where, const Shard& shard, const TensorView& value) {
  const std::optional<std::int64_t> elements = elements_of(shard.whole_shape);
  if (!elements) {
    throw InvalidArgument(where + ": no tensor has the whole shape " +
                          to_string(shard.whole_shape));
  }
  const std::int64_t here = value.size();
  if (shard.offset >= 0 && here <= *elements && shard.offset <= *elements - here) return;
  throw InvalidArgument(where + ": a shard of " + std::to_string(here) + " elements at offset " +
                        std::to_string(shard.offset) + " is not within the whole tensor of shape " +
                        to_string(shard.whole_shape));
}

void check_scalar(const std::string& what, const TensorView& scalar) {
  const bool real = scalar.dtype == DType::kFloat32 || scalar.dtype == DType::kFloat64;
  const bool one = std::all_of(scalar.shape.begin(), scalar.shape.end(),
                               [](std::int64_t extent) { return extent == 1; });
  if (!real || !one) {
    throw InvalidArgument(what + " must be one float32 or float64 element, got shape " +
                          to_string(scalar.shape) + " of " + std::string(name_of(scalar.dtype)));
  }
  check_memory(what, "its memory", scalar);
}

bool find_overlap(std::vector<MemoryRange>& ranges, Overlap& found) {
  std::erase_if(ranges, [](const MemoryRange& range) { return range.bytes == 0; });
  std::sort(ranges.begin(), ranges.end(),
            [](const MemoryRange& a, const MemoryRange& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin - ranges[i - 1].begin >= ranges[i - 1].bytes) continue;
    found = {ranges[i - 1], ranges[i]};
    return true;
  }
  return false;
}

bool find_overlap(const std::vector<MemoryRange>& a, const std::vector<MemoryRange>& b,
                  Overlap& found) {
  const auto ends_before = [](const MemoryRange& first, const MemoryRange& second) {
    return first.begin + first.bytes <= second.begin;
  };
  for (std::size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (ends_before(a[i], b[j])) {
      ++i;
    } else if (ends_before(b[j], a[i])) {
      ++j;
    } else {
      found = {a[i], b[j]};
      return true;
    }
  }
  return false;
}

}  // namespace fusestep::detail
