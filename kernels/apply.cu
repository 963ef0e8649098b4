// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "apply_table.h"
#include "launch.cuh"

namespace fusestep::detail {

template <class R, class L>
cudaError_t launch_apply(const ApplyTables& tables, unsigned blocks, std::int64_t elements,
                         cudaStream_t stream) {
  const unsigned threads = apply_threads<L>(elements / blocks);
  return launch(Apply<R, L>{tables, threads}, blocks, stream);
}

constexpr ApplyKernels make_kernels() {
  ApplyKernels kernels{};
  Rules::for_each([&]<int kRule, class R>() {
    Layouts::for_each([&]<int kLayout, class L>() {
      if constexpr (is_compiled<R, L>) {
        using Body = Apply<R, L>;
        kernels.of[kRule][kLayout] = {launch_apply<R, L>, load_kernel<Body>, Body::kChunk,
                                      Body::kWidth};
      }
    });
  });
  return kernels;
}

const ApplyKernels& apply_kernels() {
  static constexpr ApplyKernels kernels = make_kernels();
  return kernels;
}

}  // namespace fusestep::detail
