// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fusestep::bindings {

/// Has steps on the CPU run on the threads of the OpenMP that torch computes with, and as many as
/// torch.set_num_threads() and OMP_NUM_THREADS allow it (fusestep's own setting, fewer): after a
/// backward pass those spin for some milliseconds, and other threads would have to share the
/// processors with them. A torch without OpenMP leaves the library its own.
void use_threads_of_torch();

/// torch gives a thread its number of threads when it first computes there, or is asked. To be
/// called before a step and before their number is told, by who holds the GIL; does nothing where
/// torch's threads are not used.
void follow_torch_in_this_thread();

}  // namespace fusestep::bindings
