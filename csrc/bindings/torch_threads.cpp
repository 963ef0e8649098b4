// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "torch_threads.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include "fusestep/cpu.h"

namespace fusestep::bindings {
namespace {

/// What compilers call for `#pragma omp parallel`; GCC's and LLVM's runtimes have it. Looked up and
/// not linked: a second runtime would bring threads of its own.
struct OpenMp {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_number)();
  int (*max_threads)();

  bool is_there() const {
    return parallel != nullptr && thread_number != nullptr && max_threads != nullptr;
  }
};

template <typename Function>
void find(Function*& function, [[maybe_unused]] const char* name) {
#if defined(__unix__) || defined(__APPLE__)
  function = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
#else
  function = nullptr;
#endif
}

const OpenMp& openmp() {
  static const OpenMp found = [] {
    OpenMp names;
    find(names.parallel, "GOMP_parallel");
    find(names.thread_number, "omp_get_thread_num");
    find(names.max_threads, "omp_get_max_threads");
    return names;
  }();
  return found;
}

void run(int threads, ThreadWork work, void* context) {
  struct Call {
    ThreadWork work;
    void* context;
  } call{work, context};
  const auto on_each = [](void* data) {
    const auto* const made = static_cast<const Call*>(data);
    made->work(made->context, openmp().thread_number());
  };
  openmp().parallel(on_each, &call, static_cast<unsigned>(threads), 0);
}

}  // namespace

void use_threads_of_torch() {
  if (openmp().is_there()) set_thread_runner(run, openmp().max_threads);
}

}  // namespace fusestep::bindings
