// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>

#include "fusestep/cpu.h"
#include "fusestep/error.h"

namespace fusestep {
namespace detail {
namespace {

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned reported = std::thread::hardware_concurrency();
  return reported == 0 ? 1 : static_cast<int>(reported);
}

/// Workers sleep between jobs. A job is one range of indices per thread: everybody works through
/// his own, so that a thread walks through memory in one direction, and then helps with the
/// others'. There are tickets for workers: one that wakes when the work is done already finds none
/// and is not waited for.
class ThreadPool {
 public:
  /// False if the pool is at work for another caller.
  bool try_run(int count, int threads, void (*body)(void*, int), void* context) {
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_workers(threads - 1);
      body_ = body;
      context_ = context;
      divide(count, std::min(threads, workers_ + 1));
      tickets_ = shares_ - 1;
    }
    wake_.notify_all();
    work_on(0);
    std::unique_lock<std::mutex> lock(mutex_);
    tickets_ = 0;
    idle_.wait(lock, [&] { return active_ == 0; });
    return true;
  }

 private:
  /// Indices [next, end) of a job.
  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };

  void start_workers(int wanted) {
    for (; workers_ < wanted; ++workers_) {
      try {
        std::thread([this] { wait_for_work(); }).detach();
      } catch (const std::exception&) {
        return;  // fewer threads do the same work
      }
    }
  }

  void divide(int count, int shares) {
    if (shares > capacity_) {
      share_ = std::make_unique<Share[]>(static_cast<std::size_t>(shares));
      capacity_ = shares;
    }
    shares_ = shares;
    for (int i = 0; i < shares; ++i) {
      const auto first = [&](int share) {
        return static_cast<int>(std::int64_t{count} * share / shares);
      };
      share_[static_cast<std::size_t>(i)].next.store(first(i), std::memory_order_relaxed);
      share_[static_cast<std::size_t>(i)].end = first(i + 1);
    }
  }

  void wait_for_work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return tickets_ > 0; });
      const int own = tickets_--;
      ++active_;
      lock.unlock();
      work_on(own);
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  void work_on(int own) {
    for (int i = 0; i < shares_; ++i) {
      Share& share = share_[static_cast<std::size_t>((own + i) % shares_)];
      const auto take = [&] { return share.next.fetch_add(1, std::memory_order_relaxed); };
      for (int index = take(); index < share.end; index = take()) body_(context_, index);
    }
  }

  std::mutex owner_;  // held by the caller whose job it is
  std::mutex mutex_;  // of everything below
  std::condition_variable wake_, idle_;
  int workers_ = 0, tickets_ = 0, active_ = 0;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::unique_ptr<Share[]> share_;
  int shares_ = 0, capacity_ = 0;
};

/// Never destroyed: its sleeping workers outlive every static object. A forked child has none of
/// them, and perhaps locks that were held: it starts with a pool of its own.
std::atomic<ThreadPool*> current_pool{nullptr};

ThreadPool& pool() {
  ThreadPool* existing = current_pool.load(std::memory_order_acquire);
  if (existing != nullptr) return *existing;
#if defined(__unix__) || defined(__APPLE__)
  static const int forget_in_children =
      pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
  static_cast<void>(forget_in_children);
#endif
  auto* made = new ThreadPool;
  if (current_pool.compare_exchange_strong(existing, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *existing;
}

std::atomic<int> requested_threads{0};

}  // namespace

void parallel_for(int count, void (*body)(void*, int), void* context) {
  const int threads = std::min(num_threads(), count);
  try {
    if (threads > 1 && pool().try_run(count, threads, body, context)) return;
  } catch (const std::bad_alloc&) {
    // No memory for a pool, and nothing begun.
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
  static const int all = detail::usable_processors();
  const int requested = detail::requested_threads.load();
  return requested == 0 ? all : requested;
}

}  // namespace fusestep
