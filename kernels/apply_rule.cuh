// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The apply kernels of one rule variant, in every layout. Each rule's are compiled in a file of its
// own: together they take minutes.
#pragma once

#include "apply_table.h"
#include "launch.cuh"

namespace fusestep::detail {

template <class Body>
cudaError_t launch_apply(const ApplyTables& tables, unsigned chunks, std::int64_t elements,
                         cudaStream_t stream) {
  const unsigned log2 = Body::blocks_log2_for((elements + chunks - 1) / chunks);
  return launch(Body{tables, log2}, chunks << log2, stream);
}

template <class R>
void add_kernels_of_rule(ApplyKernel (&kernels)[kLayouts]) {
  Layouts::for_each([&]<int kLayout, class L>() {
    if constexpr (is_compiled<R, L>) {
      using Body = Apply<R, L>;
      kernels[kLayout] = {launch_apply<Body>, load_kernel<Body>, Body::kChunk, Body::kWidth};
    }
  });
}

}  // namespace fusestep::detail
