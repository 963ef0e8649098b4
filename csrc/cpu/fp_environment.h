// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cfenv>

namespace fusestep::detail {

/// Rounding to nearest, subnormals kept, no traps while it lives; then the caller's environment
/// again.
class DefaultFpEnvironment {
 public:
  DefaultFpEnvironment() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFpEnvironment() { std::fesetenv(&callers_); }
  DefaultFpEnvironment(const DefaultFpEnvironment&) = delete;
  DefaultFpEnvironment& operator=(const DefaultFpEnvironment&) = delete;

 private:
  std::fenv_t callers_;
};

}  // namespace fusestep::detail
