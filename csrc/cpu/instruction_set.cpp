// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Which compiled instruction set this process uses.
#include <cstdlib>
#include <string>

#include "fusestep/cpu.h"
#include "fusestep/error.h"
#include "kernels.h"

namespace fusestep {
namespace detail {
namespace {

std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&cpu_kernels_avx512());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&cpu_kernels_avx2());
  }
#endif
  found.push_back(&cpu_kernels_baseline());
  return found;
}

const CpuKernels& choose() {
  const std::vector<const CpuKernels*> kernels = available();
  const char* forced = std::getenv("FUSESTEP_ISA");
  if (forced == nullptr || *forced == '\0') return *kernels.front();
  std::string names;
  for (const CpuKernels* candidate : kernels) {
    if (candidate->name == forced) return *candidate;
    names += (names.empty() ? "" : ", ") + std::string(candidate->name);
  }
  throw InvalidArgument("FUSESTEP_ISA is '" + std::string(forced) +
                        "'; this build on this processor can use: " + names);
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace detail

std::string_view instruction_set() { return detail::cpu_kernels().name; }

std::vector<std::string_view> available_instruction_sets() {
  std::vector<std::string_view> names;
  for (const detail::CpuKernels* kernels : detail::available()) names.push_back(kernels->name);
  return names;
}

}  // namespace fusestep
