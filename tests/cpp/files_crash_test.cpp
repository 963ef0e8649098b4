// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A file under its name is whole, whatever happens while it is replaced: system calls that fail, a
// process that is killed, another one that saves too.
#include <gmock/gmock.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <new>
#include <random>
#include <thread>

#include "files_support.h"
#include "system_calls.h"

namespace fusestep::test {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

/// Every byte follows from the number, so that a mixture of two is recognised.
Content numbered(std::uint64_t number, std::size_t bytes = 100'000) {
  const std::size_t size = bytes + number % 3 * 4096;
  Content content;
  content.metadata["number"] = std::to_string(number);
  content.add("a", "U8", {static_cast<std::int64_t>(size)}, std::string(size, '\0'));
  for (std::size_t i = 0; i < size; ++i) {
    content.data[0][i] = static_cast<char>(number * 31 + i * (number % 7 + 1));
  }
  content.add("b", "F32", {2}, random_bytes(number, 8));
  return content;
}

/// The number of the content the file has; anything else is a failure.
std::uint64_t number_in(const path& file, std::size_t bytes = 100'000) {
  const SafetensorsReader reader(file);
  const std::uint64_t number = std::stoull(reader.metadata().at("number"));
  expect_content(reader, numbered(number, bytes));
  return number;
}

std::string problem_of_saving(const path& file, const Content& content) {
  try {
    save(file, content);
    return {};
  } catch (const FileError& error) {
    return error.what();
  }
}

// ---- the order of calls ---------------------------------------------------------------------

/// What the library does with names and descriptors, one line a call; runs of writes are one.
std::vector<std::string> trace_of_saving(const path& file) {
  const auto calls = system_calls::recorded([&] { save(file, numbered(1)); });
  std::vector<std::string> trace;
  for (const auto& call : calls) {
    const std::string line = call.name + " " + path(call.file).filename().string();
    if (trace.empty() || trace.back() != line) trace.push_back(line);
  }
  return trace;
}

TEST(Order, OfWriteSyncRenameSync) {
  const TemporaryDirectory directory;
  const std::string temporary = "model\\.[0-9a-f]+\\.tmp";
  const std::string folder = directory.name().filename().string();
  EXPECT_THAT(trace_of_saving(directory / "model"),
              ElementsAre(MatchesRegex("openat " + temporary), MatchesRegex("flock " + temporary),
                          MatchesRegex("pwrite " + temporary), MatchesRegex("fsync " + temporary),
                          MatchesRegex("renameat " + temporary + " -> model"), "fsync " + folder));
  EXPECT_THAT(trace_of_saving(directory / "model"),
              ElementsAre(MatchesRegex("openat " + temporary), MatchesRegex("flock " + temporary),
                          MatchesRegex("fchmod " + temporary), MatchesRegex("pwrite " + temporary),
                          MatchesRegex("fsync " + temporary),
                          MatchesRegex("renameat " + temporary + " -> model"), "fsync " + folder));
  EXPECT_THAT(directory.entries(), ElementsAre("model"));
}

// ---- calls that fail ------------------------------------------------------------------------

struct Failure {
  const char* call;
  int nth, error;
  const char* text;
};

TEST(Failure, OfACallLeavesTheOlderFile) {
  const TemporaryDirectory directory;
  const path file = directory / "model";
  const Failure failures[] = {
      {"openat", 0, EACCES, "cannot create a temporary file beside it: Permission denied"},
      {"openat", 0, EROFS, "cannot create a temporary file beside it: Read-only file system"},
      {"openat", 0, EEXIST, "cannot create a temporary file beside it: File exists"},
      {"fchmod", 0, EPERM, "cannot set permissions: Operation not permitted"},
      {"pwrite", 0, ENOSPC, "cannot write: No space left on device"},
      {"pwrite", 1, EIO, "cannot write: Input/output error"},
      {"pwrite", 2, EDQUOT, "cannot write: Disk quota exceeded"},
      {"fsync", 0, EIO, "cannot write it to the disk: Input/output error"},
      {"fsync", 0, ENOSPC, "cannot write it to the disk: No space left on device"},
      {"fsync", 0, EINVAL, "cannot write it to the disk: Invalid argument"},
      {"renameat", 0, EACCES, "cannot rename the temporary file: Permission denied"},
  };
  for (const bool existing : {false, true}) {
    if (existing) save(file, numbered(1));
    for (const auto& [call, nth, error, text] : failures) {
      if (!existing && call == std::string("fchmod")) continue;
      system_calls::failing(call, nth, error, false, [&, &expected = text] {
        EXPECT_EQ(problem_of_saving(file, numbered(2)),
                  "file '" + file.string() + "': " + std::string(expected));
      });
      EXPECT_EQ(directory.entries().size(), existing ? 1u : 0u) << call;
      if (!existing) continue;
      EXPECT_EQ(number_in(file), 1u) << call;
    }
  }
}

TEST(Failure, OfTheLastSyncLeavesTheNewFile) {
  const TemporaryDirectory directory;
  const path file = directory / "model";
  save(file, numbered(1));
  system_calls::failing("fsync", 1, EIO, false, [&] {
    EXPECT_EQ(problem_of_saving(file, numbered(2)),
              "file '" + file.string() +
                  "': is written, but its directory cannot be synced: Input/output error");
  });
  EXPECT_EQ(number_in(file), 2u);
  EXPECT_THAT(directory.entries(), ElementsAre("model"));
  system_calls::failing("fsync", 1, EINVAL, false,
                        [&] { EXPECT_EQ(problem_of_saving(file, numbered(3)), ""); });
  EXPECT_EQ(number_in(file), 3u);
}

TEST(Failure, OfWhatCanBeTriedAgain) {
  const TemporaryDirectory directory;
  const path file = directory / "model";
  std::uint64_t number = 0;
  for (const char* call : {"openat", "pwrite", "fsync"}) {
    system_calls::failing(call, 0, EINTR, true,
                          [&] { EXPECT_EQ(problem_of_saving(file, numbered(++number)), ""); });
    EXPECT_EQ(number_in(file), number) << call;
  }
  system_calls::failing("openat", 0, EEXIST, true,  // the name is taken
                        [&] { EXPECT_EQ(problem_of_saving(file, numbered(++number)), ""); });
  EXPECT_EQ(number_in(file), number);
  for (const int error : {EINTR, EWOULDBLOCK}) {  // the second: somebody is about to remove it
    system_calls::failing("flock", 0, error, true,
                          [&] { EXPECT_EQ(problem_of_saving(file, numbered(++number)), ""); });
    EXPECT_EQ(number_in(file), number) << error;
  }
  for (const int error : {EOPNOTSUPP, ENOLCK, ENOSYS}) {  // a file system without locks
    system_calls::failing("flock", 0, error, false,
                          [&] { EXPECT_EQ(problem_of_saving(file, numbered(++number)), ""); });
    EXPECT_EQ(number_in(file), number) << error;
  }
  system_calls::writing_at_most(
      1000, [&] { EXPECT_EQ(problem_of_saving(file, numbered(++number)), ""); });
  EXPECT_EQ(number_in(file), number);
  system_calls::writing_at_most(
      0, [&] { EXPECT_THAT(problem_of_saving(file, numbered(99)), HasSubstr("cannot write: ")); });
  EXPECT_EQ(number_in(file), number);
  EXPECT_THAT(directory.entries(), ElementsAre("model"));
}

/// A limit that is really there: the first part of the data fits.
TEST(Failure, OfTheSystemItself) {
  const TemporaryDirectory directory;
  const path file = directory / "model";
  save(file, numbered(1));
  struct rlimit before {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = before;
  small.rlim_cur = 300'000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  EXPECT_EQ(problem_of_saving(file, numbered(2, 1'000'000)),
            "file '" + file.string() + "': cannot write: File too large");
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(number_in(file), 1u);
  EXPECT_THAT(directory.entries(), ElementsAre("model"));
}

// ---- processes that are killed --------------------------------------------------------------

/// Runs `work` in a child.
pid_t start(const std::function<void()>& work) {
  const pid_t child = fork();
  if (child != 0) return child;
  alarm(120);  // nobody is left behind
  try {
    work();
  } catch (...) {
    _exit(1);
  }
  _exit(0);
}

/// Exit code, or the signal's number and 128.
int wait_for(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST(Killed, BeforeEveryCall) {
  const TemporaryDirectory directory;
  const path file = directory / "model";
  save(file, numbered(1));
  const auto calls = system_calls::recorded([&] { save(file, numbered(1)); });
  const auto renamed =
      std::find_if(calls.begin(), calls.end(),
                   [](const system_calls::Call& call) { return call.name == "renameat"; }) -
      calls.begin();
  const int count = static_cast<int>(calls.size());
  int left_over = 0;
  for (int nth = 0; nth <= count; ++nth) {
    save(file, numbered(1));
    ASSERT_THAT(directory.entries(), ElementsAre("model"));  // of the round before
    const int code = wait_for(start([&] {
      system_calls::die_before(nth);
      save(file, numbered(2));
    }));
    EXPECT_EQ(code, nth < count ? 128 + SIGKILL : 0) << nth;
    EXPECT_EQ(number_in(file), nth <= renamed ? 1u : 2u) << nth;
    left_over += directory.entries().size() > 1 ? 1 : 0;
  }
  EXPECT_EQ(left_over, renamed);
}

/// In memory that children share.
template <class T>
class Shared {
 public:
  Shared()
      : place_(
            mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) {
    new (place_) T;
  }
  ~Shared() { munmap(place_, sizeof(T)); }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  T* get() { return static_cast<T*>(place_); }

 private:
  void* place_;
};

constexpr int kSought[] = {2, 3, 4};  // pwrite, fsync, renameat

void wait_until_in(int call, const std::atomic<int>& stage) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
  while (stage.load() != call && std::chrono::steady_clock::now() < limit) {
  }
}

TEST(Killed, AtRandomMoments) {
  constexpr std::size_t bytes = 2'000'000;
  constexpr int rounds = repetitions(200);
  const TemporaryDirectory directory;
  const path file = directory / "model";
  Content contents[3];
  for (std::uint64_t i = 0; i < 3; ++i) contents[i] = numbered(i, bytes);
  save(file, contents[0]);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 5; ++i) save(file, contents[i % 3]);
  const double save_us =
      std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count() /
      5;

  const unsigned seed = std::random_device()();
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> delay(0, 3 * save_us);
  Shared<std::atomic<int>> stage;
  int hits[std::size(system_calls::kNames) + 1] = {};
  for (int round = 0; round < rounds; ++round) {
    stage.get()->store(-1);
    const pid_t child = start([&] {
      system_calls::publish_in(stage.get());
      for (std::size_t i = 0;; ++i) save(file, contents[i % 3]);
    });
    usleep(static_cast<useconds_t>(delay(random)));
    // Most of a save is the sync. Every other round waits for one of the calls that matter.
    if (round % 2 == 1) wait_until_in(kSought[round / 2 % 3], *stage.get());
    kill(child, SIGKILL);
    ASSERT_EQ(wait_for(child), 128 + SIGKILL);
    ++hits[stage.get()->load() + 1];
    number_in(file, bytes);
    ASSERT_FALSE(HasFailure()) << "round " << round << ", seed " << seed;
  }
  save(file, contents[0]);
  EXPECT_THAT(directory.entries(), ElementsAre("model"));
  std::printf("%d kills, seed %u, of saves of %.1f ms; outside of calls: %d", rounds, seed,
              save_us / 1000, hits[0]);
  for (std::size_t i = 0; i < std::size(system_calls::kNames); ++i) {
    std::printf(", in %s: %d", system_calls::kNames[i], hits[i + 1]);
  }
  std::printf("\n");
  for (const int call : kSought) {
    EXPECT_TRUE(rounds < 200 || hits[call + 1] > 0) << system_calls::kNames[call];
  }
}

// ---- what the killed leave ------------------------------------------------------------------

/// A child that has begun to save and waits: for a byte, with which it ends the save, or its death.
class HalfSaved {
 public:
  HalfSaved(const path& file, std::uint64_t number) {
    if (pipe(to_child_) != 0 || pipe(to_parent_) != 0) throw std::runtime_error("pipe");
    child_ = start([&] {
      const Content content = numbered(number);
      SafetensorsWriter writer(file, content.metadata, content.tensors);
      writer.write(0, content.data[0].data(), content.data[0].size());
      char byte = 0;
      if (write(to_parent_[1], &byte, 1) != 1 || read(to_child_[0], &byte, 1) != 1) _exit(2);
      writer.write(1, content.data[1].data(), content.data[1].size());
      writer.commit();
    });
    char byte = 0;
    if (read(to_parent_[0], &byte, 1) != 1) throw std::runtime_error("the child is gone");
  }
  ~HalfSaved() {
    for (const int end : {to_child_[0], to_child_[1], to_parent_[0], to_parent_[1]}) close(end);
  }
  HalfSaved(const HalfSaved&) = delete;
  HalfSaved& operator=(const HalfSaved&) = delete;
  int finish() {
    const char byte = 0;
    return write(to_child_[1], &byte, 1) == 1 ? wait_for(child_) : -1;
  }
  void die() {
    kill(child_, SIGKILL);
    wait_for(child_);
  }

 private:
  int to_child_[2], to_parent_[2];
  pid_t child_;
};

TEST(LeftOver, FilesOfTheDeadAreRemovedAndThoseOfTheLivingAreNot) {
  const TemporaryDirectory directory;
  const path file = directory / "model";
  HalfSaved living(file, 1), dead(file, 2), also_dead(file, 3);
  dead.die();
  also_dead.die();
  EXPECT_EQ(directory.entries().size(), 3u);
  save(file, numbered(4));
  EXPECT_EQ(directory.entries().size(), 2u);
  EXPECT_EQ(number_in(file), 4u);
  EXPECT_EQ(living.finish(), 0);
  EXPECT_EQ(number_in(file), 1u);
  EXPECT_THAT(directory.entries(), ElementsAre("model"));
}

/// Threads of one process are as apart as processes.
TEST(LeftOver, ASaveInTheSameProcessStays) {
  const TemporaryDirectory directory;
  const path file = directory / "model";
  const Content content = numbered(1);
  {
    SafetensorsWriter writer(file, content.metadata, content.tensors);
    save(file, numbered(2));
    for (std::size_t i = 0; i < 2; ++i) {
      writer.write(i, content.data[i].data(), content.data[i].size());
    }
    writer.commit();
  }
  EXPECT_EQ(number_in(file), 1u);
  EXPECT_THAT(directory.entries(), ElementsAre("model"));
}

TEST(LeftOver, OnlyWhatIsSurelyOurs) {
  const TemporaryDirectory directory;
  const std::string digits = "0123456789abcdef", ours = "model." + digits + ".tmp";
  std::vector<std::string> kept = {"model.tmp",
                                   "model." + digits,
                                   "model." + digits + "0.tmp",
                                   "model.0123456789abcdeF.tmp",
                                   "model.0123456789abcde.tmp",
                                   "xmodel." + digits + ".tmp",
                                   "model2." + digits + ".tmp",
                                   "model.a." + digits + ".tmp",
                                   "mode." + digits + ".tmp"};
  for (const std::string& name : kept) write_bytes(directory / name, "x");
  kept.push_back("model.aaaaaaaaaaaaaaaa.tmp");
  std::filesystem::create_directory(directory / kept.back());
  kept.push_back("model.bbbbbbbbbbbbbbbb.tmp");
  std::filesystem::create_symlink("model.tmp", directory / kept.back());
  write_bytes(directory / ours, "x");
  save(directory / "model", numbered(1));
  kept.push_back("model");
  std::sort(kept.begin(), kept.end());
  EXPECT_EQ(directory.entries(), kept);
}

TEST(LeftOver, OfAFailedSaveNothingElseIsRemoved) {
  const TemporaryDirectory directory;
  const std::string left_over = "model.0123456789abcdef.tmp";
  write_bytes(directory / left_over, "x");
  system_calls::failing("renameat", 0, EIO, false, [&] {
    EXPECT_NE(problem_of_saving(directory / "model", numbered(1)), "");
  });
  EXPECT_THAT(directory.entries(), ElementsAre(left_over));
  // Nor can a file that cannot be removed hinder a save.
  system_calls::failing("unlinkat", 0, EPERM, false, [&] {
    EXPECT_EQ(problem_of_saving(directory / "model", numbered(1)), "");
  });
  EXPECT_THAT(directory.entries(), ElementsAre("model", left_over));
}

/// Another save removes the file that this one has created and not locked yet.
TEST(LeftOver, RemovedBeforeItIsLocked) {
  const TemporaryDirectory directory;
  const path file = directory / "model";
  int others = 0;
  system_calls::before(
      "flock",
      [&] {
        EXPECT_EQ(wait_for(start([&] { save(file, numbered(2)); })), 0);
        ++others;
      },
      [&] { EXPECT_EQ(problem_of_saving(file, numbered(1)), ""); });
  EXPECT_EQ(others, 1);
  EXPECT_EQ(number_in(file), 1u);
  EXPECT_THAT(directory.entries(), ElementsAre("model"));
}

// ---- several at a time ----------------------------------------------------------------------

TEST(Concurrent, SavesOfTwoProcessesAndReads) {
  constexpr int saves = repetitions(60);
  const TemporaryDirectory directory;
  const path file = directory / "model";
  save(file, numbered(0));
  Shared<std::atomic<int>> finished;
  finished.get()->store(0);
  pid_t children[2];
  for (std::uint64_t i = 0; i < 2; ++i) {
    children[i] = start([&] {
      const Content content = numbered(i + 1);
      for (int j = 0; j < saves; ++j) save(file, content);
      ++*finished.get();
    });
  }
  int reads = 0;
  for (; reads < 10'000 && finished.get()->load() < 2; ++reads) {
    number_in(file);
    if (HasFailure()) break;
  }
  EXPECT_EQ(wait_for(children[0]), 0);
  EXPECT_EQ(wait_for(children[1]), 0);
  EXPECT_GT(reads, 0);
  EXPECT_GE(number_in(file), 1u);
  EXPECT_THAT(directory.entries(), ElementsAre("model"));
}

TEST(Concurrent, ReadsOfThreads) {
  const TemporaryDirectory directory;
  const Content content = numbered(5, 3'000'000);
  save(directory / "model", content);
  const SafetensorsReader reader(directory / "model");
  const std::size_t a = reader.find("a").value();
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] { good += tensor_bytes(reader, a) == content.data[0] ? 1 : 0; });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 4);
}

}  // namespace
}  // namespace fusestep::test
