// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "atomic_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <new>
#include <random>
#include <string_view>
#include <vector>

#include "fusestep/error.h"
#include "tuning.h"

namespace fusestep::detail {
namespace {

static_assert(sizeof(off_t) == 8, "files may be larger than 2 GiB");

std::filesystem::path resolve_links(const std::filesystem::path& path) {
  std::filesystem::path target = path;
  for (int links = 0; links < 40; ++links) {
    std::error_code error;
    const std::filesystem::path next = std::filesystem::read_symlink(target, error);
    if (error) return target;  // not a link: a file, or nothing yet
    target = target.parent_path() / next;
  }
  throw_file_error(path, "cannot be written", ELOOP);
}

FileDescriptor open_directory_of(const std::filesystem::path& file) {
  const std::filesystem::path parent = file.has_parent_path() ? file.parent_path() : ".";
  return FileDescriptor(
      uninterrupted([&] { return open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
}

/// Names; none where the directory cannot be read.
std::vector<std::string> entries_of(int directory) {
  std::vector<std::string> names;
  const int descriptor = fcntl(directory, F_DUPFD_CLOEXEC, 0);
  if (descriptor < 0) return names;
  const auto close_stream = [](DIR* stream) { closedir(stream); };
  const std::unique_ptr<DIR, decltype(close_stream)> entries(fdopendir(descriptor), close_stream);
  if (!entries) {
    close(descriptor);
    return names;
  }
  while (const dirent* entry = readdir(entries.get())) names.emplace_back(entry->d_name);
  return names;
}

/// A temporary file is NAME.<16 hexadecimal digits>.tmp
constexpr std::size_t kTemporaryDigits = 16;
constexpr std::string_view kTemporaryEnd = ".tmp";

std::string temporary_start(const std::string& name) {
  constexpr std::size_t limit = 255 - 24;  // of a name, on every common file system
  return name.substr(0, limit) + ".";
}

/// Names differ between processes, threads and calls; O_EXCL has the last word.
std::string temporary_name(const std::string& name) {
  std::random_device random;
  char digits[kTemporaryDigits + 1];
  std::snprintf(digits, sizeof digits, "%08x%08x", random(), random());
  std::string temporary = temporary_start(name);
  temporary += digits;
  temporary += kTemporaryEnd;
  return temporary;
}

bool is_temporary_name(std::string_view entry, std::string_view start) {
  if (entry.size() != start.size() + kTemporaryDigits + kTemporaryEnd.size()) return false;
  if (!entry.starts_with(start) || !entry.ends_with(kTemporaryEnd)) return false;
  const std::string_view digits = entry.substr(start.size(), kTemporaryDigits);
  return digits.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

/// Removes a temporary file that no living process writes. Locking it first keeps a writer that has
/// created it and not locked it yet from using it.
void remove_if_left_over(int directory, const char* name) {
  const FileDescriptor file(uninterrupted([&] {
    return openat(directory, name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
  }));
  struct stat status {};
  if (!file.is_open() || fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) return;
  if (uninterrupted([&] { return flock(file.get(), LOCK_EX | LOCK_NB); }) != 0) return;
  unlinkat(directory, name, 0);
}

int sync_to_disk(int file) {
#if defined(F_FULLFSYNC)
  // What macOS calls fsync leaves data in the drive's cache. Not every file system has more.
  if (fcntl(file, F_FULLFSYNC) == 0) return 0;
#endif
  return uninterrupted([&] { return fsync(file); });
}

}  // namespace

AtomicFile::AtomicFile(const std::filesystem::path& path)
    : path_(path), target_(resolve_links(path)) {
  open_directory();
  create_temporary();
}

AtomicFile::~AtomicFile() { remove_temporary(); }

void AtomicFile::remove_temporary() noexcept {
  if (!temporary_.empty()) unlinkat(directory_.get(), temporary_.c_str(), 0);
  temporary_.clear();
}

/// Held open: the directory may be renamed while we write, and it must be possible to sync it.
void AtomicFile::open_directory() {
  directory_ = open_directory_of(target_);
  if (!directory_.is_open()) throw_file_error(path_, "cannot open its directory", errno);
}

/// Nothing if there is no target. Throws if it must not be replaced.
std::optional<mode_t> AtomicFile::target_permissions() const {
  const std::string name = target_.filename().string();
  struct stat target {};
  if (fstatat(directory_.get(), name.c_str(), &target, AT_SYMLINK_NOFOLLOW) != 0) {
    if (errno != ENOENT) throw_file_error(path_, "cannot be written", errno);
    return {};
  }
  if (S_ISDIR(target.st_mode)) throw_file_error(path_, "cannot be written", EISDIR);
  if (!S_ISREG(target.st_mode)) throw FileError(where(path_) + ": is not a regular file");
  // A rename would replace a file that is write-protected, too.
  if (faccessat(directory_.get(), name.c_str(), W_OK, AT_EACCESS) != 0) {
    throw_file_error(path_, "cannot be written", errno);
  }
  return static_cast<mode_t>(target.st_mode & 0777);
}

void AtomicFile::create_temporary() {
  const std::string name = target_.filename().string();
  if (name.empty()) throw_file_error(path_, "cannot be written", EISDIR);
  const std::optional<mode_t> kept = target_permissions();
  bool created = false;
  for (int attempts = 0; attempts < 100 && !created; ++attempts) {
    created = create_temporary_and_lock_it(name, kept.value_or(0666));
    if (!created && errno != EEXIST) break;
  }
  if (!created) throw_file_error(path_, "cannot create a temporary file beside it", errno);
  if (!kept || fchmod(file_.get(), *kept) == 0) return;  // the umask may have taken some
  const int error = errno;
  remove_temporary();
  throw_file_error(path_, "cannot set permissions", error);
}

/// False, with errno EEXIST, where another name may do: this one is taken, or between the two calls
/// somebody has locked the file to remove it. File systems without locks are written to without.
bool AtomicFile::create_temporary_and_lock_it(const std::string& name, mode_t permissions) {
  temporary_ = temporary_name(name);
  file_ = FileDescriptor(uninterrupted([&] {
    return openat(directory_.get(), temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC,
                  permissions);
  }));
  if (!file_.is_open()) {
    temporary_.clear();
    return false;
  }
  const bool is_lost = uninterrupted([&] { return flock(file_.get(), LOCK_EX | LOCK_NB); }) != 0 &&
                       errno == EWOULDBLOCK;
  struct stat status {};
  if (!is_lost && (fstat(file_.get(), &status) != 0 || status.st_nlink != 0)) return true;
  remove_temporary();
  errno = EEXIST;
  return false;
}

/// Has the disk begin with what was written in a row before, without waiting for it; otherwise it
/// would rest until commit(), which is where errors come out.
void AtomicFile::start_write_back(std::uint64_t begin, std::uint64_t end) {
  const std::uint64_t unsent = unsent_end_ - unsent_begin_;
  if (unsent >= kWriteBackBytes) {
#if defined(SYNC_FILE_RANGE_WRITE)
    sync_file_range(file_.get(), static_cast<off64_t>(unsent_begin_), static_cast<off64_t>(unsent),
                    SYNC_FILE_RANGE_WRITE);
#endif
    unsent_begin_ = unsent_end_;
  }
  if (begin != unsent_end_) unsent_begin_ = begin;
  unsent_end_ = end;
}

void AtomicFile::write_at(std::uint64_t offset, const void* data, std::size_t bytes) {
  const auto* from = static_cast<const char*>(data);
  start_write_back(offset, offset + bytes);
  while (bytes > 0) {
    // Some systems refuse more than 2 GiB in a call.
    const std::size_t asked = std::min(bytes, std::size_t{1} << 30);
    const ssize_t written =
        uninterrupted([&] { return pwrite(file_.get(), from, asked, static_cast<off_t>(offset)); });
    if (written < 0) throw_file_error(path_, "cannot write", errno);
    if (written == 0) throw_file_error(path_, "cannot write", EIO);
    from += written;
    offset += static_cast<std::uint64_t>(written);
    bytes -= static_cast<std::size_t>(written);
  }
}

/// The order is the point. Data that is not on the disk before the rename may be missing from the
/// file after a loss of power, and a rename is not on the disk before its directory is.
void AtomicFile::commit() {
  if (sync_to_disk(file_.get()) != 0) throw_file_error(path_, "cannot write it to the disk", errno);
  const std::string name = target_.filename().string();
  if (renameat(directory_.get(), temporary_.c_str(), directory_.get(), name.c_str()) != 0) {
    throw_file_error(path_, "cannot rename the temporary file", errno);
  }
  temporary_.clear();
  // Some file systems cannot sync a directory, and say EINVAL.
  if (sync_to_disk(directory_.get()) != 0 && errno != EINVAL) {
    throw_file_error(path_, "is written, but its directory cannot be synced", errno);
  }
  remove_left_over();
}

/// Of writers that were killed. The file is saved: what goes wrong here is left to the next time.
void AtomicFile::remove_left_over() const noexcept try {
  const std::string start = temporary_start(target_.filename().string());
  for (const std::string& entry : entries_of(directory_.get())) {
    if (is_temporary_name(entry, start)) remove_if_left_over(directory_.get(), entry.c_str());
  }
} catch (const std::bad_alloc&) {
}

void remove_files(const std::filesystem::path& path,
                  const std::function<bool(std::string_view name)>& unwanted) noexcept try {
  const FileDescriptor directory = open_directory_of(path);
  if (!directory.is_open()) return;
  constexpr std::size_t end = 1 + kTemporaryDigits + kTemporaryEnd.size();
  for (const std::string& entry : entries_of(directory.get())) {
    if (unwanted(entry)) {
      unlinkat(directory.get(), entry.c_str(), 0);
    } else if (entry.size() > end) {
      const std::string name = entry.substr(0, entry.size() - end);
      if (unwanted(name) && is_temporary_name(entry, name + ".")) {
        remove_if_left_over(directory.get(), entry.c_str());
      }
    }
  }
} catch (const std::bad_alloc&) {
}

}  // namespace fusestep::detail
