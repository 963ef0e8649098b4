// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The apply kernels as data: one entry per (rule variant, layout).
#pragma once

#include <cuda_runtime.h>

#include "apply.cuh"

namespace fusestep::detail {

struct ApplyKernel {
  /// `elements` are those of all chunks.
  cudaError_t (*launch)(const ApplyTables& tables, unsigned chunks, std::int64_t elements,
                        cudaStream_t stream);
  cudaError_t (*load)();
  int chunk;  // elements of a chunk
  int width;  // elements of a vector
};

/// Chunk and width depend on the layout alone.
struct ApplyKernels {
  ApplyKernel of[kRules][kLayouts];
};

const ApplyKernels& apply_kernels();

}  // namespace fusestep::detail
