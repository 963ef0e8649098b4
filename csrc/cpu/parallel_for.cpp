// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "parallel_for.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <thread>

#include "at.h"
#include "fusestep/cpu.h"
#include "fusestep/error.h"
#include "thread_pool.h"

namespace fusestep {
namespace detail {
namespace {

/// One range of indices per thread: everybody works through his own, so that a thread walks through
/// memory in one direction, and at every step through the same; then he helps with the others'. So
/// it does not matter how many threads come.
class Loop {
 public:
  Loop(int count, int threads, void (*body)(void*, int), void* context)
      : body_(body),
        context_(context),
        shares_(threads),
        share_(new (std::nothrow) Share[static_cast<std::size_t>(threads)]) {
    if (!share_) return;
    const auto first = [&](int share) {
      return static_cast<int>(std::int64_t{count} * share / shares_);
    };
    for (int i = 0; i < shares_; ++i) {
      at(share_, i).next.store(first(i), std::memory_order_relaxed);
      at(share_, i).end = first(i + 1);
    }
  }

  bool has_memory() const { return share_ != nullptr; }

  /// A ThreadWork.
  static void work(void* loop, int thread) { static_cast<Loop*>(loop)->work_on(thread); }

 private:
  /// Indices [next, end).
  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };

  void work_on(int own) {
    for (int i = 0; i < shares_; ++i) {
      Share& share = at(share_, (own + i) % shares_);
      const auto take = [&] { return share.next.fetch_add(1, std::memory_order_relaxed); };
      for (int index = take(); index < share.end; index = take()) body_(context_, index);
    }
  }

  void (*body_)(void*, int);
  void* context_;
  int shares_;
  std::unique_ptr<Share[]> share_;
};

/// Null: the library's own threads.
std::atomic<ThreadRunner> given_runner{nullptr};
std::atomic<int (*)()> given_max_threads{nullptr};
std::atomic<int> requested_threads{0};

/// Of what a runner runs on, a forked child has one thread and perhaps locks that were held.
void forget_runner_in_children() {
#if defined(__unix__) || defined(__APPLE__)
  static const int forget = pthread_atfork(nullptr, nullptr, [] { given_runner.store(nullptr); });
  static_cast<void>(forget);
#endif
}

void run_on_threads(int threads, ThreadWork work, void* context) {
  if (const ThreadRunner runner = given_runner.load()) {
    runner(threads, work, context);
  } else if (!run_on_pool(threads, work, context)) {
    work(context, 0);
  }
}

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned reported = std::thread::hardware_concurrency();
  return reported == 0 ? 1 : static_cast<int>(reported);
}

}  // namespace

void parallel_for(int count, void (*body)(void*, int), void* context) {
  const int threads = std::min(num_threads(), count);
  if (threads > 1) {
    Loop loop(count, threads, body, context);
    if (loop.has_memory()) return run_on_threads(threads, Loop::work, &loop);
  }
  for (int i = 0; i < count; ++i) body(context, i);
}

}  // namespace detail

void set_num_threads(int threads) {
  if (threads < 1) {
    throw InvalidArgument("set_num_threads: threads must be >= 1, got " + std::to_string(threads));
  }
  detail::requested_threads.store(threads);
}

int num_threads() {
  if (const int requested = detail::requested_threads.load()) return requested;
  if (auto* const max_threads = detail::given_max_threads.load()) return std::max(1, max_threads());
  static const int all = detail::usable_processors();
  return all;
}

void set_thread_runner(ThreadRunner run, int (*max_threads)()) {
  if ((run == nullptr) != (max_threads == nullptr)) {
    throw InvalidArgument("set_thread_runner: run and max_threads must both be given or both null");
  }
  detail::forget_runner_in_children();
  detail::given_runner.store(run);
  detail::given_max_threads.store(max_threads);
}

}  // namespace fusestep
