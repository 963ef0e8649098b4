// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace fusestep::detail {
namespace {

/// Workers sleep between jobs. There are tickets for them: one that wakes when the work is done
/// already finds none and is not waited for.
class ThreadPool {
 public:
  bool try_run(int threads, ThreadWork work, void* context) {
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_workers(threads - 1);
      work_ = work;
      context_ = context;
      tickets_ = std::min(threads - 1, workers_);
    }
    wake_.notify_all();
    work(context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    tickets_ = 0;
    idle_.wait(lock, [&] { return active_ == 0; });
    return true;
  }

 private:
  void start_workers(int wanted) {
    for (; workers_ < wanted; ++workers_) {
      try {
        std::thread([this] { wait_for_work(); }).detach();
      } catch (const std::exception&) {
        return;  // fewer threads do the same work
      }
    }
  }

  void wait_for_work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return tickets_ > 0; });
      const int thread = tickets_--;
      ++active_;
      lock.unlock();
      work_(context_, thread);
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex owner_;  // held by the caller whose job it is
  std::mutex mutex_;  // of everything below
  std::condition_variable wake_, idle_;
  int workers_ = 0, tickets_ = 0, active_ = 0;
  ThreadWork work_ = nullptr;
  void* context_ = nullptr;
};

/// Never destroyed: its sleeping workers outlive every static object. A forked child has none of
/// them, and perhaps locks that were held: it starts with a pool of its own.
std::atomic<ThreadPool*> current_pool{nullptr};

/// Null where there is no memory for one.
ThreadPool* pool() {
  ThreadPool* existing = current_pool.load(std::memory_order_acquire);
  if (existing != nullptr) return existing;
#if defined(__unix__) || defined(__APPLE__)
  static const int forget_in_children =
      pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
  static_cast<void>(forget_in_children);
#endif
  auto* made = new (std::nothrow) ThreadPool;
  if (current_pool.compare_exchange_strong(existing, made, std::memory_order_acq_rel)) return made;
  delete made;
  return existing;
}

}  // namespace

bool run_on_pool(int threads, ThreadWork work, void* context) {
  ThreadPool* const own = pool();
  return own != nullptr && own->try_run(threads, work, context);
}

}  // namespace fusestep::detail
