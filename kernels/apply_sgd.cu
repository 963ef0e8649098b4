// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "apply_rule.cuh"

namespace fusestep::detail {

template void add_kernels_of_rule<Sgd<false>>(ApplyKernel (&)[kLayouts]);
template void add_kernels_of_rule<Sgd<true>>(ApplyKernel (&)[kLayouts]);

}  // namespace fusestep::detail
