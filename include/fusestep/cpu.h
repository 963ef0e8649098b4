// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Settings of the CPU backend. Results depend on none of them.
#pragma once

#include <string_view>
#include <vector>

#include "fusestep/export.h"

namespace fusestep {

/// Threads a step on the CPU may use, the calling one included; all of the machine's (as far as
/// this process may run on them) until set. Holds for the process. Throws InvalidArgument below 1.
FUSESTEP_API void set_num_threads(int threads);
FUSESTEP_API int num_threads();

/// The instruction set in use: "avx512", "avx2" or "baseline". The best the processor has, or the
/// one the environment variable FUSESTEP_ISA names when the first CPU parameter is added to an
/// optimizer; a name this processor or build cannot serve is an InvalidArgument there.
FUSESTEP_API std::string_view instruction_set();

/// What this build can use on this processor, best first.
FUSESTEP_API std::vector<std::string_view> available_instruction_sets();

}  // namespace fusestep
