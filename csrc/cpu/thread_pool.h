// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The library's own threads. Why std::thread and not OpenMP or oneTBB: docs/performance.md.
#pragma once

#include "fusestep/cpu.h"

namespace fusestep::detail {

/// Calls work(context, 0) on the calling thread and work(context, i) for some of the other numbers
/// below `threads`, each on one of its own: those that are awake before that has returned. Returns
/// when all have. False, and nothing called, while the pool works for another caller, and without
/// memory for one.
bool run_on_pool(int threads, ThreadWork work, void* context);

}  // namespace fusestep::detail
