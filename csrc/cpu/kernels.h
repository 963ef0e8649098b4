// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The loops of the CPU backend, compiled once per instruction set.
#pragma once

#include <cstdint>
#include <string_view>

#include "fusestep/detail/layout.h"
#include "fusestep/detail/rule_list.h"
#include "fusestep/detail/tables.h"

namespace fusestep::detail {

/// Elements [begin, begin + count) of one tensor.
using ApplyFunction = void (*)(const TensorRow& row, const ScalarRow& scalars, std::int64_t begin,
                               std::int64_t count);

/// Sum over one block of up to kNormBlock gradients, in the order of norm.h.
using NormFunction = NormSum (*)(const void* grads, int count);

struct CpuKernels {
  std::string_view name;
  ApplyFunction apply[kRules][kLayouts];
  NormFunction norm[4];  // by DType
  /// Sum over one block of up to kNormBlock sums, which are used up.
  NormSum (*add_sums)(NormSum* sums, int count);
};

const CpuKernels& cpu_kernels_baseline();
const CpuKernels& cpu_kernels_avx2();
const CpuKernels& cpu_kernels_avx512();

/// The instruction set in use; decided at the first call, see instruction_set() in cpu.h.
const CpuKernels& cpu_kernels();

}  // namespace fusestep::detail
