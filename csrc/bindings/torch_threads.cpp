// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "torch_threads.h"

#include <pybind11/pybind11.h>

#include "fusestep/cpu.h"
#include "torch_library.h"

namespace fusestep::bindings {
namespace {

/// What compilers call for `#pragma omp parallel`; GCC's and LLVM's runtimes have it. It has to be
/// torch's: another runtime would bring threads of its own.
struct OpenMp {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_number)();
  int (*max_threads)();

  bool is_there() const {
    return parallel != nullptr && thread_number != nullptr && max_threads != nullptr;
  }
};

const OpenMp& openmp() {
  static const OpenMp found = [] {
    OpenMp names;
    look_up(names.parallel, "GOMP_parallel");
    look_up(names.thread_number, "omp_get_thread_num");
    look_up(names.max_threads, "omp_get_max_threads");
    return names;
  }();
  return found;
}

bool are_used = false;  // guarded by the GIL

void run(int threads, ThreadWork work, void* context) {
  struct Call {
    int threads;
    ThreadWork work;
    void* context;
  } call{threads, work, context};
  const auto on_each = [](void* data) {
    const auto* const made = static_cast<const Call*>(data);
    const int thread = openmp().thread_number();
    if (thread < made->threads) made->work(made->context, thread);
  };
  // 0: all that torch has. For a smaller team libgomp would end the other threads, and start them
  // again for torch.
  openmp().parallel(on_each, &call, 0, 0);
}

}  // namespace

void use_threads_of_torch() {
  if (!openmp().is_there()) return;
  set_thread_runner(run, openmp().max_threads);
  are_used = true;
}

void follow_torch_in_this_thread() {
  thread_local bool follows = false;
  if (follows || !are_used) return;
  pybind11::module_::import("torch").attr("get_num_threads")();
  follows = true;
}

}  // namespace fusestep::bindings
