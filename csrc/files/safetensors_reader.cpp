// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "crc32c.h"
#include "fusestep/error.h"
#include "fusestep/tensor_view.h"
#include "header.h"
#include "safetensors.h"
#include "tuning.h"

namespace fusestep::detail {
namespace {

static_assert(sizeof(off_t) == 8, "files may be larger than 2 GiB");

std::int64_t modification_time(const struct stat& status) {
#if defined(__APPLE__)
  const struct timespec& time = status.st_mtimespec;
#else
  const struct timespec& time = status.st_mtim;
#endif
  return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

void check_regular(const std::filesystem::path& path, const struct stat& status) {
  if (S_ISDIR(status.st_mode)) throw FileError(where(path) + ": is a directory");
  if (!S_ISREG(status.st_mode)) throw FileError(where(path) + ": is not a regular file");
}

std::uint64_t little_endian(const char* bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    value |= std::uint64_t{static_cast<unsigned char>(bytes[i])} << 8 * i;
  }
  return value;
}

std::string offsets_text(const TensorInfo& tensor) {
  return "data_offsets [" + std::to_string(tensor.begin) + ", " + std::to_string(tensor.end) + "]";
}

}  // namespace

SafetensorsReader::SafetensorsReader(const std::filesystem::path& path) : path_(path) {
  open();
  std::string bytes = read_header();
  data_begin_ = bytes.size();
  ParsedHeader header = parse_header(path_, std::string_view(bytes).substr(kLengthBytes));
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) {
              return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
            });
  ours_ = is_ours(header.metadata);
  if (ours_) checksums_ = check_our_header(path_, std::move(bytes), header);
  metadata_ = std::move(header.metadata);
  tensors_ = std::move(header.tensors);
  check_layout();
  check_unchanged();
  for (std::size_t i = 0; i < tensors_.size(); ++i) by_name_[tensors_[i].name] = i;
}

/// Looked at before it is opened, too: opening a device may do something to it.
void SafetensorsReader::open() {
  struct stat status {};
  if (stat(path_.c_str(), &status) != 0) throw_file_error(path_, "cannot be opened", errno);
  check_regular(path_, status);
  file_ = FileDescriptor(uninterrupted(
      [&] { return ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); }));
  if (!file_.is_open()) throw_file_error(path_, "cannot be opened", errno);
  if (fstat(file_.get(), &status) != 0) throw_file_error(path_, "cannot be read", errno);
  check_regular(path_, status);
  size_ = static_cast<std::uint64_t>(status.st_size);
  modified_ = modification_time(status);
}

/// The number of its bytes and the header.
std::string SafetensorsReader::read_header() const {
  if (size_ < kLengthBytes) {
    throw FileError(where(path_) + ": has " + std::to_string(size_) +
                    " bytes, too few for a safetensors file");
  }
  char length_bytes[kLengthBytes];
  read_at(0, length_bytes, kLengthBytes);
  const std::uint64_t length = little_endian(length_bytes);
  if (length > kMaxHeaderBytes || length > size_ - kLengthBytes) {
    throw FileError(where(path_) + ": is no safetensors file, or cut off: a header of " +
                    std::to_string(length) + " bytes in a file of " + std::to_string(size_));
  }
  std::string bytes(length_bytes, kLengthBytes);
  bytes.resize(kLengthBytes + length);
  read_at(kLengthBytes, bytes.data() + kLengthBytes, length);
  return bytes;
}

/// Every byte of the data belongs to one tensor.
void SafetensorsReader::check_layout() const {
  std::uint64_t end = 0;
  for (const TensorInfo& tensor : tensors_) {
    const DataSize size = data_size(tensor);
    if (!size.problem.empty()) throw FileError(where(path_, tensor.name) + ": " + size.problem);
    if (tensor.begin != end) {
      throw FileError(where(path_, tensor.name) + ": " + offsets_text(tensor) + ", but the data " +
                      (tensor.begin < end ? "of another tensor end at " : "before it end at ") +
                      std::to_string(end));
    }
    if (tensor.end < tensor.begin || tensor.bytes() != size.bytes) {
      throw FileError(where(path_, tensor.name) + ": " + offsets_text(tensor) + ", but shape " +
                      to_string(tensor.shape) + " of " + tensor.dtype + " takes " +
                      std::to_string(size.bytes) + " bytes");
    }
    end = tensor.end;
  }
  if (end == size_ - data_begin_) return;
  throw FileError(where(path_) + ": its tensors take " + std::to_string(end) +
                  " bytes, but there " + "are " + std::to_string(size_ - data_begin_) +
                  (end > size_ - data_begin_ ? ": it is cut off" : ""));
}

void SafetensorsReader::read_at(std::uint64_t offset, void* out, std::size_t bytes) const {
  auto* to = static_cast<char*>(out);
  while (bytes > 0) {
    // Some systems refuse more than 2 GiB in a call.
    const std::size_t asked = std::min(bytes, std::size_t{1} << 30);
    const ssize_t got =
        uninterrupted([&] { return pread(file_.get(), to, asked, static_cast<off_t>(offset)); });
    if (got < 0) throw_file_error(path_, "cannot be read", errno);
    if (got == 0) throw FileError(where(path_) + ": has become shorter while it was read");
    to += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::size_t>(got);
  }
}

void SafetensorsReader::check_unchanged() const {
  struct stat status {};
  if (fstat(file_.get(), &status) != 0) throw_file_error(path_, "cannot be read", errno);
  if (static_cast<std::uint64_t>(status.st_size) == size_ && modification_time(status) == modified_)
    return;
  throw FileError(where(path_) + ": has changed while it was read");
}

std::optional<std::size_t> SafetensorsReader::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  if (found == by_name_.end()) return {};
  return found->second;
}

const TensorInfo& SafetensorsReader::info(std::size_t tensor) const {
  if (tensor < tensors_.size()) return tensors_[tensor];
  throw InvalidArgument(where(path_) + ": has no tensor number " + std::to_string(tensor));
}

void SafetensorsReader::read(std::size_t tensor, std::uint64_t offset, void* out,
                             std::size_t bytes) const {
  const TensorInfo& read = info(tensor);
  if (offset > read.bytes() || bytes > read.bytes() - offset) {
    throw InvalidArgument(where(path_, read.name) + ": has " + std::to_string(read.bytes()) +
                          " bytes, asked for " + std::to_string(bytes) + " at " +
                          std::to_string(offset));
  }
  read_at(data_begin_ + read.begin + offset, out, bytes);
  check_unchanged();
}

void SafetensorsReader::read_all(std::size_t tensor, void* out, std::size_t bytes) const {
  const TensorInfo& read = info(tensor);
  if (bytes != read.bytes()) {
    throw InvalidArgument(where(path_, read.name) + ": has " + std::to_string(read.bytes()) +
                          " bytes, asked for " + std::to_string(bytes));
  }
  read_range(tensor, 0, bytes, out);
}

void SafetensorsReader::read_range(std::size_t tensor, std::uint64_t begin, std::uint64_t end,
                                   void* out) const {
  const TensorInfo& read = info(tensor);
  if (begin > end || end > read.bytes()) {
    throw InvalidArgument(where(path_, read.name) + ": has " + std::to_string(read.bytes()) +
                          " bytes, asked for " + std::to_string(begin) + " to " +
                          std::to_string(end));
  }
  const bool is_whole = begin == 0 && end == read.bytes();
  const std::unique_ptr<char[]> unwanted(is_whole ? nullptr : new char[kFilePieceBytes]);
  std::uint32_t crc = 0;
  for (std::uint64_t done = 0; done < read.bytes();) {
    const bool is_wanted = done >= begin && done < end;
    const std::uint64_t limit = is_wanted ? end : done < begin ? begin : read.bytes();
    const std::size_t piece = std::min<std::uint64_t>(limit - done, kFilePieceBytes);
    char* to = is_wanted ? static_cast<char*>(out) + (done - begin) : unwanted.get();
    read_at(data_begin_ + read.begin + done, to, piece);
    crc = crc32c(crc, to, piece);
    done += piece;
  }
  check_checksum(tensor, crc);
}

void SafetensorsReader::read_all(
    std::size_t tensor,
    const std::function<void(const void* piece, std::size_t bytes)>& take) const {
  const TensorInfo& read = info(tensor);
  const std::size_t room = std::min<std::uint64_t>(read.bytes(), kFilePieceBytes);
  const std::unique_ptr<char[]> piece(new char[room]);
  std::uint32_t crc = 0;
  for (std::uint64_t done = 0; done < read.bytes();) {
    const std::size_t bytes = std::min<std::uint64_t>(read.bytes() - done, room);
    read_at(data_begin_ + read.begin + done, piece.get(), bytes);
    crc = crc32c(crc, piece.get(), bytes);
    take(piece.get(), bytes);
    done += bytes;
  }
  check_checksum(tensor, crc);
}

void SafetensorsReader::verify(std::size_t tensor) const {
  read_all(tensor, [](const void*, std::size_t) {});
}

void SafetensorsReader::check_checksum(std::size_t tensor, std::uint32_t found) const {
  check_unchanged();
  if (!ours_ || checksums_[tensor] == found) return;
  throw FileError(where(path_, tensors_[tensor].name) + ": its data are damaged: the checksum " +
                  "differs");
}

}  // namespace fusestep::detail
