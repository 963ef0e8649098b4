// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A copy of a source in the host's memory: what a save in the background writes.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/source.h"

namespace fusestep::detail {

class Snapshot final : public StateSource {
 public:
  explicit Snapshot(StateSource& source)
      : description_(source.description()), metadata_(source.metadata()) {
    for (std::size_t i = 0; i < description_.parameters.size(); ++i) {
      for (const auto& [name, slot] : description_.parameters[i].slots) {
        const int parameter = static_cast<int>(i);
        std::vector<std::byte>& copy = contents_[{parameter, name}];
        copy.reserve(bytes_of(dtype_from_name(slot.dtype, name), slot.shape, name));
        source.read(parameter, name, {}, [&](const void* data, std::size_t bytes) {
          const auto* first = static_cast<const std::byte*>(data);
          copy.insert(copy.end(), first, first + bytes);
        });
      }
    }
  }

  const Description& description() const override { return description_; }
  const Metadata& metadata() const override { return metadata_; }
  void read(int parameter, const std::string& slot, ByteRange range,
            const TakePiece& take) override {
    const std::vector<std::byte>& copy = contents_.at({parameter, slot});
    take_pieces(copy.data(), copy.size(), range, take);
  }
  void verify(int, const std::string&, ByteRange) override {}

 private:
  Description description_;
  Metadata metadata_;
  std::map<std::pair<int, std::string>, std::vector<std::byte>> contents_;
};

}  // namespace fusestep::detail
