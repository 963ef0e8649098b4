// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A StateDict as a source of state, and made from one.
#pragma once

#include "checkpoint/source.h"

namespace fusestep::detail {

class DictSource final : public StateSource {
 public:
  /// Throws InvalidArgument where positions, sizes or steps in it do not agree.
  explicit DictSource(const StateDict& dict);

  const Description& description() const override { return description_; }
  const Metadata& metadata() const override { return dict_.metadata; }
  void read(int parameter, const std::string& slot, ByteRange range,
            const TakePiece& take) override;
  void verify(int, const std::string&, ByteRange) override {}

 private:
  const StateDict& dict_;
  Description description_;
  std::vector<std::size_t> positions_;  // in dict_.state, of every parameter of the description
};

StateDict to_dict(StateSource& source);

}  // namespace fusestep::detail
