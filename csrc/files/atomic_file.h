// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A file that appears whole or not at all, whenever the process or the machine stops.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "file_descriptor.h"

namespace fusestep::detail {

/// Written beside its target under a name of its own, synced, and then renamed over the target,
/// which stays as it was until then. A symbolic link is followed: the file it points to is
/// replaced. Errors are FileErrors, and leave the target as it was unless they say otherwise.
///
/// The temporary file is locked while it is written, and the system unlocks it when the process
/// ends, however it does: one that nobody has locked is left over, and the next commit() to the
/// same name removes it.
class AtomicFile {
 public:
  /// Creates the temporary file. It gets the permissions of the target where that exists.
  explicit AtomicFile(const std::filesystem::path& path);
  /// Removes the temporary file unless it was committed.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write_at(std::uint64_t offset, const void* data, std::size_t bytes);

  /// When it returns, the file stands under its name and survives a loss of power.
  void commit();

 private:
  void open_directory();
  std::optional<mode_t> target_permissions() const;
  void create_temporary();
  bool create_temporary_and_lock_it(const std::string& name, mode_t permissions);
  void start_write_back(std::uint64_t begin, std::uint64_t end);
  void remove_temporary() noexcept;
  void remove_left_over() const noexcept;

  const std::filesystem::path path_;    // as the caller has it, for messages
  const std::filesystem::path target_;  // without symbolic links
  FileDescriptor directory_, file_;
  std::uint64_t unsent_begin_ = 0, unsent_end_ = 0;  // written, and not on its way to the disk
  std::string temporary_;  // its name in the directory; empty: there is none
};

/// Removes files beside `path` whose names are wanted no more, and what killed writers of such
/// files have left. What cannot be removed stays.
void remove_files(const std::filesystem::path& path,
                  const std::function<bool(std::string_view name)>& unwanted) noexcept;

}  // namespace fusestep::detail
