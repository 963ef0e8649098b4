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

ApplyKernel apply_kernel(int rule, int layout) {
  ApplyKernel found{};
  Rules::for_each([&]<int kRule, class R>() {
    Layouts::for_each([&]<int kLayout, class L>() {
      if (rule == kRule && layout == kLayout) {
        found = {launch_apply<R, L>, load_kernel<Apply<R, L>>};
      }
    });
  });
  return found;
}

}  // namespace fusestep::detail
