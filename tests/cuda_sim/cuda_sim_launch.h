// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What kernels/launch.cuh uses in place of a launch on a GPU: every block and every thread of it is
// run when the stream gets there, blocks in shuffled order, the threads of a phase forwards or
// backwards.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <typeinfo>

#include "grid.h"

namespace cuda_sim {

template <class Body>
void run_block(const Body& body, unsigned block, bool backwards) {
  constexpr unsigned threads = Body::kThreads;
  const auto index = [&](unsigned i) { return backwards ? threads - 1 - i : i; };
  if constexpr (requires { typename Body::Shared; }) {
    typename Body::Shared shared;
    std::memset(static_cast<void*>(&shared), 0xff, sizeof shared);
    for (int phase = 0; phase < Body::kPhases; ++phase) {
      for (unsigned i = 0; i < threads; ++i) body(block, index(i), phase, shared);
    }
  } else {
    for (unsigned i = 0; i < threads; ++i) body(block, index(i));
  }
}

}  // namespace cuda_sim

namespace fusestep::detail {

template <class Body>
cudaError_t launch(const Body& body, unsigned blocks, cudaStream_t stream) {
  return cuda_sim::launch_kernel(typeid(Body).name(), blocks, stream,
                                 [body](const cuda_sim::GridOrder& order) {
                                   for (const unsigned block : order.blocks) {
                                     cuda_sim::run_block(body, block, order.backwards);
                                   }
                                 });
}

template <class Body>
cudaError_t load_kernel() {
  return cuda_sim::load_kernel(typeid(Body).name());
}

}  // namespace fusestep::detail
