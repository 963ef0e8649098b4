// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What reading and writing of files share: an open file, and how errors name it.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

namespace fusestep::detail {

class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int number) : number_(number) {}
  FileDescriptor(FileDescriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~FileDescriptor();

  int get() const { return number_; }
  bool is_open() const { return number_ >= 0; }

 private:
  int number_ = -1;
};

/// Whether the last system call failed because of a signal.
bool interrupted();

/// Calls again what a signal interrupted.
template <class Call>
auto uninterrupted(Call&& call) {
  for (;;) {
    const auto result = call();
    if (result != -1 || !interrupted()) return result;
  }
}

/// In quotes; control characters escaped and what is too long cut: names come out of files.
std::string in_quotes(std::string_view name);

/// "file 'a.safetensors'", "file 'a.safetensors', tensor 'w'"
std::string where(const std::filesystem::path& file);
std::string where(const std::filesystem::path& file, std::string_view tensor);

/// A FileError: "file 'a.safetensors': cannot rename: Permission denied".
[[noreturn]] void throw_file_error(const std::filesystem::path& file, const std::string& what,
                                   int error);

}  // namespace fusestep::detail
