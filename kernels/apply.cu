// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "apply_table.h"

namespace fusestep::detail {

/// In apply_RULE.cu.
template <class R>
void add_kernels_of_rule(ApplyKernel (&kernels)[kLayouts]);

const ApplyKernels& apply_kernels() {
  static const ApplyKernels kernels = [] {
    ApplyKernels all{};
    Rules::for_each([&]<int kRule, class R>() { add_kernels_of_rule<R>(all.of[kRule]); });
    return all;
  }();
  return kernels;
}

}  // namespace fusestep::detail
