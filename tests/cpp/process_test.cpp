// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Processes and threads: FUSESTEP_ISA, fork, several optimizers at once, exit with workers asleep,
// threads of the program's own.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iterator>
#include <memory>
#include <thread>

#include "support.h"

namespace fusestep::test {
namespace {

struct Output {
  int exit_code;
  std::string text;
};

/// Runs the probe with this FUSESTEP_ISA.
Output probe(const std::string& isa) {
  const std::string command = "FUSESTEP_ISA='" + isa + "' '" FUSESTEP_PROBE "'";
  std::FILE* pipe = popen(command.c_str(), "r");
  Output output{-1, {}};
  if (pipe == nullptr) return output;
  char buffer[512];
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) output.text += buffer;
  const int status = pclose(pipe);
  output.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return output;
}

TEST(InstructionSet, IsTheOneOfTheEnvironment) {
  std::string hash;
  for (const std::string_view name : available_instruction_sets()) {
    const Output output = probe(std::string(name));
    ASSERT_EQ(output.exit_code, 0) << output.text;
    const std::size_t space = output.text.find(' ');
    EXPECT_EQ(output.text.substr(0, space), name);
    if (hash.empty()) hash = output.text.substr(space);
    EXPECT_EQ(output.text.substr(space), hash) << name;
  }
}

TEST(InstructionSet, IsTheBestOneUnlessNamed) {
  const Output output = probe("");
  EXPECT_EQ(output.exit_code, 0);
  EXPECT_EQ(output.text.substr(0, output.text.find(' ')), available_instruction_sets().front());
  EXPECT_EQ(available_instruction_sets().back(), "baseline");
}

TEST(InstructionSet, OfAnUnknownNameIsRefused) {
  std::string names;
  for (const std::string_view name : available_instruction_sets()) {
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  for (const std::string wrong : {"avx1024", "AVX2", "baseline "}) {
    const Output output = probe(wrong);
    EXPECT_EQ(output.exit_code, 3) << wrong;
    EXPECT_EQ(output.text, "FUSESTEP_ISA is '" + wrong +
                               "'; this build on this processor can use: " + names + "\n");
  }
}

/// Enough elements for all threads.
struct Training {
  Array value{DType::kFloat32, 300'000}, grad{DType::kFloat32, 300'000};
  Optimizer optimizer;
  explicit Training(std::uint64_t seed) {
    value.fill_numbers(seed);
    grad.fill_numbers(seed + 1000);
    optimizer.add_group("g", AdamHyper{}, {{"p", value.view(), grad.view()}});
  }
  void steps(int count) {
    for (int i = 0; i < count; ++i) optimizer.step({.max_grad_norm = 1.0});
  }
  std::uint64_t hash() { return fnv(value.raw()); }
};

/// Runs `work` in a forked child: its exit code, or -1 if it has not ended within 30 seconds.
int in_child(const std::function<int()>& work) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // nobody is left behind
    _exit(work());
  }
  if (child < 0) return -2;
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  int status = 0;
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > limit) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      return -1;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

std::uint64_t serial_hash(std::uint64_t seed, int steps) {
  set_num_threads(1);
  Training training(seed);
  training.steps(steps);
  return training.hash();
}

constexpr const char* kNoThreadsInChildren =
    "the thread sanitizer has no threads in a child of a process with many";

TEST(Fork, TheChildStepsOn) {
  if (kThreadSanitizer) GTEST_SKIP() << kNoThreadsInChildren;
  const std::uint64_t expected = serial_hash(1, 4);
  set_num_threads(3);
  Training training(1);
  training.steps(2);  // the workers exist
  EXPECT_EQ(in_child([&] {
              training.steps(2);
              return training.hash() == expected ? 0 : 1;
            }),
            0);
  training.steps(2);  // and they still serve the parent
  EXPECT_EQ(training.hash(), expected);
  EXPECT_EQ(in_child([&] {  // a child of a child
              training.steps(1);
              return in_child([&] {
                training.steps(1);
                return 0;
              });
            }),
            0);
}

/// Threads of this process.
int threads_alive() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<int>(std::distance(begin(tasks), end(tasks)));
}

TEST(Fork, TheChildHasWorkersOfItsOwn) {
  if (kThreadSanitizer) GTEST_SKIP() << kNoThreadsInChildren;
  set_num_threads(3);
  Training training(1);
  training.steps(1);
  EXPECT_EQ(in_child([&] {
              if (threads_alive() != 1) return 100;
              training.steps(1);
              return threads_alive();
            }),
            3);
}

/// Workers on their way to sleep hold locks that nobody in the child would release.
TEST(Fork, RightAfterAStep) {
  if (kThreadSanitizer) GTEST_SKIP() << kNoThreadsInChildren;
  set_num_threads(4);
  Training training(1);
  for (int i = 0; i < 100; ++i) {
    training.steps(1);
    ASSERT_EQ(in_child([&] {
                training.steps(1);
                return 0;
              }),
              0);
  }
}

TEST(Fork, WhileAnotherThreadSteps) {
  if (kThreadSanitizer) GTEST_SKIP() << kNoThreadsInChildren;
  const std::uint64_t expected = serial_hash(2, 3);
  set_num_threads(3);
  Training busy(1);
  busy.steps(1);
  std::atomic<bool> stop{false};
  std::thread stepping([&] {
    while (!stop) busy.steps(1);
  });
  for (int i = 0; i < 40; ++i) {
    EXPECT_EQ(in_child([&] {
                Training own(2);
                own.steps(3);
                return own.hash() == expected ? 0 : 1;
              }),
              0);
  }
  stop = true;
  stepping.join();
}

/// A step that follows another at once finds workers that are still on their way to sleep.
TEST(Threads, ManyShortSteps) {
  set_num_threads(4);
  Training training(3);
  constexpr int steps = repetitions(300);
  training.steps(steps);
  EXPECT_EQ(training.hash(), serial_hash(3, steps));
}

TEST(Threads, TheirNumberMayChangeBetweenSteps) {
  Training training(4);
  for (const int threads : {4, 1, 2, 8, 3}) {
    set_num_threads(threads);
    EXPECT_EQ(num_threads(), threads);
    training.steps(1);
  }
  EXPECT_EQ(training.hash(), serial_hash(4, 5));
}

std::atomic<int> runs{0}, threads_run{0};

void run_on_new_threads(int threads, ThreadWork work, void* context) {
  ++runs;
  threads_run += threads;
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, context, i);
  work(context, 0);
  for (std::thread& other : others) other.join();
}

/// As in a parallel region inside another one.
void run_on_this_thread(int, ThreadWork work, void* context) {
  ++runs;
  work(context, 0);
}

void run_on_one_other_thread(int threads, ThreadWork work, void* context) {
  ++runs;
  std::thread(work, context, threads - 1).join();
}

/// While it lives, steps run on threads of the test.
struct Runner {
  explicit Runner(ThreadRunner run) {
    set_thread_runner(run, [] { return 5; });
    runs = threads_run = 0;
  }
  ~Runner() { set_thread_runner(nullptr, nullptr); }
};

TEST(Threads, OfTheProgramGiveTheSameBits) {
  const std::uint64_t expected = serial_hash(7, 3);
  set_num_threads(4);
  for (const ThreadRunner run : {run_on_new_threads, run_on_this_thread, run_on_one_other_thread}) {
    const Runner runner(run);
    Training training(7);
    training.steps(3);
    EXPECT_EQ(training.hash(), expected);
    EXPECT_GE(runs, 3);
  }
  Training training(7);
  training.steps(3);
  EXPECT_EQ(training.hash(), expected);
}

TEST(Threads, OptimizersInParallelGiveTheBitsOfSerialOnes) {
  constexpr int count = 4, steps = 10;
  std::vector<std::uint64_t> expected(count), found(count);
  for (int i = 0; i < count; ++i) {
    expected[static_cast<std::size_t>(i)] = serial_hash(static_cast<std::uint64_t>(i), steps);
  }
  const auto run_all = [&] {
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) {
      threads.emplace_back([&, i] {
        Training training(static_cast<std::uint64_t>(i));
        training.steps(steps);
        found[static_cast<std::size_t>(i)] = training.hash();
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(found, expected) << num_threads() << " threads";
  };
  for (const int number : {1, 2, 4}) {
    set_num_threads(number);
    run_all();
    const Runner runner(run_on_new_threads);
    run_all();
  }
}

TEST(Threads, OfTheProgramAreAsManyAsWereSet) {
  const Runner runner(run_on_new_threads);
  set_num_threads(4);
  Training training(8);
  training.steps(2);
  EXPECT_GE(runs, 2);
  EXPECT_EQ(threads_run, 4 * runs);
  set_num_threads(1);
  runs = 0;
  training.steps(2);
  EXPECT_EQ(runs, 0);
}

/// In a process where nobody has set their number.
TEST(Threads, AreAsManyAsTheProgramHas) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a new process, not a fork of this one
  EXPECT_EXIT(
      {
        const int all = num_threads();
        set_thread_runner(run_on_new_threads, [] { return 5; });
        const int given = num_threads();
        const int in_a_child = in_child([] { return num_threads(); });
        set_thread_runner(run_on_new_threads, [] { return 0; });
        const int least = num_threads();
        set_num_threads(3);
        const int wanted = num_threads();
        std::exit(all >= 1 && given == 5 && in_a_child == 5 && least == 1 && wanted == 3 ? 17 : 1);
      },
      ::testing::ExitedWithCode(17), "");
}

TEST(Fork, TheChildHasNoThreadsOfTheProgram) {
  if (kThreadSanitizer) GTEST_SKIP() << kNoThreadsInChildren;
  const std::uint64_t expected = serial_hash(9, 3);
  set_num_threads(3);
  const Runner runner(run_on_new_threads);
  Training training(9);
  training.steps(1);
  EXPECT_EQ(in_child([&] {
              runs = 0;
              training.steps(2);
              return runs == 0 && training.hash() == expected ? 0 : 1;
            }),
            0);
  training.steps(2);
  EXPECT_EQ(training.hash(), expected);
}

/// A static optimizer that is destroyed after main(), with workers asleep.
TEST(Exit, WhileWorkersExist) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a new process, not a fork of this one
  EXPECT_EXIT(
      {
        set_num_threads(4);
        static Training training(5);
        training.steps(2);
        std::exit(17);
      },
      ::testing::ExitedWithCode(17), "");
}

/// The steps of an optimizer whose thread is gone.
TEST(Exit, OfTheThreadThatSteppedFirst) {
  set_num_threads(3);
  Training training(6);
  std::thread([&] { training.steps(2); }).join();
  training.steps(2);
  EXPECT_EQ(training.hash(), serial_hash(6, 4));
}

}  // namespace
}  // namespace fusestep::test
