// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Settings of the CPU backend. Results depend on none of them.
#pragma once

#include <string_view>
#include <vector>

#include "fusestep/export.h"

namespace fusestep {

/// Threads a step on the CPU may use, the calling one included; until set, as many as the thread
/// runner has, and without one all of the machine's (as far as this process may run on them). Holds
/// for the process. Throws InvalidArgument below 1.
FUSESTEP_API void set_num_threads(int threads);
FUSESTEP_API int num_threads();

/// What a thread runner calls: once on each of its threads, with a number below `threads` that no
/// other has.
using ThreadWork = void (*)(void* context, int thread);
/// Calls work(context, i) for i below `threads` on threads that run side by side, and returns when
/// all have returned. Fewer threads do the same work; one must come. Must not throw. May be called
/// by several threads at the same time.
using ThreadRunner = void (*)(int threads, ThreadWork work, void* context);

/// Has steps run on the threads of the program instead of the library's own: where a training
/// program computes on OpenMP's, those wait for work for some milliseconds, spinning, and would
/// take the processors from others. `max_threads` is asked for their number at every step, by the
/// thread that steps. With OpenMP (without `num_threads(threads)`: for a team of another size GCC's
/// runtime ends threads and starts them anew):
///
///     fusestep::set_thread_runner(
///         [](int threads, fusestep::ThreadWork work, void* context) {
///     #pragma omp parallel
///           if (omp_get_thread_num() < threads) work(context, omp_get_thread_num());
///         },
///         omp_get_max_threads);
///
/// Holds for the process, until both are null; a forked child steps on as many threads of the
/// library's own. Threads that step meanwhile use the one or the other. Throws InvalidArgument if
/// one alone is null.
FUSESTEP_API void set_thread_runner(ThreadRunner run, int (*max_threads)());

/// The instruction set in use: "avx512", "avx2" or "baseline". The best the processor has, or the
/// one the environment variable FUSESTEP_ISA names when the first CPU parameter is added to an
/// optimizer; a name this processor or build cannot serve is an InvalidArgument there.
FUSESTEP_API std::string_view instruction_set();

/// What this build can use on this processor, best first.
FUSESTEP_API std::vector<std::string_view> available_instruction_sets();

}  // namespace fusestep
