// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "apply_rule.cuh"

namespace fusestep::detail {

template void add_kernels_of_rule<Rmsprop<false, false>>(ApplyKernel (&)[kLayouts]);
template void add_kernels_of_rule<Rmsprop<false, true>>(ApplyKernel (&)[kLayouts]);
template void add_kernels_of_rule<Rmsprop<true, false>>(ApplyKernel (&)[kLayouts]);
template void add_kernels_of_rule<Rmsprop<true, true>>(ApplyKernel (&)[kLayouts]);

}  // namespace fusestep::detail
