// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A launch as the simulated runtime sees it.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <vector>

namespace cuda_sim {

/// The blocks of a grid in the order they are to run, and which way its threads go.
struct GridOrder {
  std::vector<unsigned> blocks;
  bool backwards;
};

/// Enqueues; `run` is called when the stream gets there.
cudaError_t launch_kernel(const char* name, unsigned blocks, cudaStream_t stream,
                          std::function<void(const GridOrder&)> run);
cudaError_t load_kernel(const char* name);

}  // namespace cuda_sim
