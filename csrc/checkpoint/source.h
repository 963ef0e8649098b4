// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Whatever state can be taken from: an optimizer, a file, a StateDict. Saving, loading and copying
// are written once over it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <string>

#include "checkpoint/description.h"
#include "fusestep/detail/backend.h"
#include "fusestep/error.h"
#include "fusestep/state_dict.h"

namespace fusestep::detail {

/// Bytes that are in memory at a time beside what is copied from and to: the bound of the extra
/// memory a save or a load needs.
inline constexpr std::size_t kPieceBytes = kReadBytes;

/// Of a slot; what is beyond its end does not count.
struct ByteRange {
  std::uint64_t begin = 0, end = ~std::uint64_t{0};
};

/// The next bytes of a tensor.
using TakePiece = std::function<void(const void* data, std::size_t bytes)>;

/// Of a slot in this process's memory.
inline void take_pieces(const void* data, std::uint64_t bytes, ByteRange range,
                        const TakePiece& take) {
  for (std::uint64_t done = range.begin, end = std::min(range.end, bytes); done < end;) {
    const std::size_t piece = std::min<std::uint64_t>(kPieceBytes, end - done);
    take(static_cast<const std::byte*>(data) + done, piece);
    done += piece;
  }
}

/// Without memory in this process `work` ends as without memory on a device.
template <class F>
auto with_host_memory(F&& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("no memory on the host for state");
  }
}

class StateSource {
 public:
  virtual ~StateSource() = default;
  virtual const Description& description() const = 0;
  virtual const Metadata& metadata() const = 0;
  /// Bytes of a slot that the description names, front to back, in pieces of at most kPieceBytes.
  /// What cannot be trusted throws at the end of the slot.
  virtual void read(int parameter, const std::string& slot, ByteRange range,
                    const TakePiece& take) = 0;
  /// The same, into this process's memory.
  virtual void read_into(int parameter, const std::string& slot, ByteRange range, void* to) {
    auto* next = static_cast<std::byte*>(to);
    read(parameter, slot, range, [&](const void* data, std::size_t bytes) {
      std::memcpy(next, data, bytes);
      next += bytes;
    });
  }
  /// Throws what read() would throw.
  virtual void verify(int parameter, const std::string& slot, ByteRange range) = 0;
  /// Throws: something is wrong with what the description says.
  [[noreturn]] virtual void refuse(const std::string& problem) const {
    throw InvalidArgument(problem);
  }
};

}  // namespace fusestep::detail
