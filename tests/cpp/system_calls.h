// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Stands between the library and the system: what a program that links system_calls.cpp does to
// files is written down, and can be made to fail or to be the last thing it does.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <vector>

namespace fusestep::test::system_calls {

struct Call {
  std::string name;  // one of kNames
  std::string file;  // of the descriptor; for those that take a name: that
};

/// Notes all calls while `work` runs.
std::vector<Call> recorded(const std::function<void()>& work);

/// The nth call of this name (from 0), and all after it unless `once`, fails with `error` while
/// `work` runs.
void failing(const std::string& name, int nth, int error, bool once,
             const std::function<void()>& work);

/// Writes do at most so many bytes a call while `work` runs.
void writing_at_most(std::size_t bytes, const std::function<void()>& work);

/// `then` happens before the first call of this name while `work` runs.
void before(const std::string& name, const std::function<void()>& then,
            const std::function<void()>& work);

/// Kills the process when it makes the nth call of all (from 0), before the call is made.
void die_before(int nth);

/// The call the process is in, as an index into kNames, or -1; in memory that a forked child
/// shares with the one who sets it.
inline constexpr const char* kNames[] = {"openat",   "fchmod",   "pwrite", "fsync",
                                         "renameat", "unlinkat", "flock"};
void publish_in(std::atomic<int>* place);

}  // namespace fusestep::test::system_calls
