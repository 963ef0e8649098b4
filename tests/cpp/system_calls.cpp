// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "system_calls.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <iterator>

namespace fusestep::test::system_calls {
namespace {

std::vector<Call>* notes = nullptr;
std::string failing_name;
int failing_after = 0, failing_error = 0, calls_until_death = -1;
bool failing_once = false;
std::size_t most = ~std::size_t{0};
std::atomic<int>* published = nullptr;
std::string awaited_name;
std::function<void()> happens_before;

std::string file_of(int descriptor) {
  char target[4096];
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  const ssize_t length = readlink(link.c_str(), target, sizeof target);
  return length < 0 ? "?" : std::string(target, static_cast<std::size_t>(length));
}

void publish(const char* name) {
  if (published == nullptr) return;
  const auto* found = std::find_if(std::begin(kNames), std::end(kNames),
                                   [&](const std::string& known) { return known == name; });
  published->store(static_cast<int>(found - std::begin(kNames)));
}

/// True if the call is to fail; errno is set.
bool enter(const char* name, const std::string& file) {
  if (calls_until_death >= 0 && calls_until_death-- == 0) raise(SIGKILL);
  if (notes != nullptr) notes->push_back({name, file});
  publish(name);
  if (name == awaited_name) {
    awaited_name.clear();
    happens_before();
  }
  if (name != failing_name || failing_after-- > 0) return false;
  if (failing_once) failing_name.clear();
  errno = failing_error;
  return true;
}

template <class Result>
Result leave(Result result) {
  if (published != nullptr) published->store(-1);
  return result;
}

template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

std::vector<Call> recorded(const std::function<void()>& work) {
  std::vector<Call> calls;
  notes = &calls;
  work();
  notes = nullptr;
  return calls;
}

void failing(const std::string& name, int nth, int error, bool once,
             const std::function<void()>& work) {
  failing_name = name;
  failing_after = nth;
  failing_error = error;
  failing_once = once;
  work();
  failing_name.clear();
}

void before(const std::string& name, const std::function<void()>& then,
            const std::function<void()>& work) {
  awaited_name = name;
  happens_before = then;
  work();
  awaited_name.clear();
}

void writing_at_most(std::size_t bytes, const std::function<void()>& work) {
  most = bytes;
  work();
  most = ~std::size_t{0};
}

void die_before(int nth) { calls_until_death = nth; }

void publish_in(std::atomic<int>* place) { published = place; }

}  // namespace fusestep::test::system_calls

// The program's own definitions come before those of the C library.
using namespace fusestep::test::system_calls;

extern "C" {

int openat(int directory, const char* name, int flags, ...) {
  mode_t mode = 0;
  if ((flags & O_CREAT) != 0) {
    va_list arguments;
    va_start(arguments, flags);
    mode = va_arg(arguments, mode_t);
    va_end(arguments);
  }
  const std::string other =
      (flags & O_CREAT) != 0 && (flags & O_EXCL) == 0 ? " (not exclusive)" : "";
  if (enter("openat", name + other)) return leave(-1);
  return leave(next<int(int, const char*, int, ...)>("openat")(directory, name, flags, mode));
}

int fchmod(int file, mode_t mode) noexcept {
  if (enter("fchmod", file_of(file))) return leave(-1);
  return leave(next<int(int, mode_t)>("fchmod")(file, mode));
}

ssize_t pwrite(int file, const void* data, size_t bytes, off_t offset) {
  if (enter("pwrite", file_of(file))) return leave(ssize_t{-1});
  return leave(next<ssize_t(int, const void*, size_t, off_t)>("pwrite")(
      file, data, std::min(bytes, most), offset));
}

int fsync(int file) {
  if (enter("fsync", file_of(file))) return leave(-1);
  return leave(next<int(int)>("fsync")(file));
}

int renameat(int from_directory, const char* from, int to_directory, const char* to) noexcept {
  if (enter("renameat", std::string(from) + " -> " + to)) return leave(-1);
  return leave(next<int(int, const char*, int, const char*)>("renameat")(from_directory, from,
                                                                         to_directory, to));
}

int unlinkat(int directory, const char* name, int flags) noexcept {
  if (enter("unlinkat", name)) return leave(-1);
  return leave(next<int(int, const char*, int)>("unlinkat")(directory, name, flags));
}

int flock(int file, int operation) noexcept {
  if (enter("flock", file_of(file))) return leave(-1);
  return leave(next<int(int, int)>("flock")(file, operation));
}

}  // extern "C"
