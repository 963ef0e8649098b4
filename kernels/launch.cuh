// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A kernel is a struct: its arguments are its members, its body is a host+device function of block
// and thread index. So the tests run the very same bodies on a machine without a GPU.
//
//   static constexpr int kThreads, kMinBlocks;
//   FUSESTEP_HD void operator()(unsigned block, unsigned thread) const;
//
// or, where the threads of a block work together, in phases with a barrier after each:
//
//   struct Shared; static constexpr int kPhases;
//   FUSESTEP_HD void operator()(unsigned block, unsigned thread, int phase, Shared&) const;
#pragma once

#include <cuda_runtime.h>

#include "fusestep/detail/host_device.h"

#if defined(__CUDACC__)

namespace fusestep::detail {

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinBlocks)
    fusestep_kernel(const __grid_constant__ Body body) {
  if constexpr (requires { typename Body::Shared; }) {
    __shared__ typename Body::Shared shared;
#pragma unroll
    for (int phase = 0; phase < Body::kPhases; ++phase) {
      if (phase > 0) __syncthreads();
      body(blockIdx.x, threadIdx.x, phase, shared);
    }
  } else {
    body(blockIdx.x, threadIdx.x);
  }
}

/// `blocks` > 0.
template <class Body>
cudaError_t launch(const Body& body, unsigned blocks, cudaStream_t stream) {
  void* arguments[] = {const_cast<Body*>(&body)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&fusestep_kernel<Body>), dim3(blocks),
                          dim3(Body::kThreads), arguments, 0, stream);
}

/// Brings the kernel to the current device now, where a failure can still be undone.
template <class Body>
cudaError_t load_kernel() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&fusestep_kernel<Body>));
}

}  // namespace fusestep::detail

#else
#include "cuda_sim_launch.h"
#endif
