// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Writes and reads safetensors files with checksums. Knows nothing of optimizers. The format, and
// what makes a file ours: docs/files.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "atomic_file.h"
#include "file_descriptor.h"

namespace fusestep::detail {

/// A tensor in a file.
struct TensorInfo {
  std::string name;
  std::string dtype;  // the format's names: "F32", "BF16", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // bytes, from the start of the data

  std::uint64_t bytes() const { return end - begin; }
};

/// Keys that begin with "fusestep." are for fusestep.
using Metadata = std::map<std::string, std::string>;

/// Writes a file that appears when it is committed, whole and on the disk. What the caller gets
/// wrong is an InvalidArgument; everything else a FileError, after which only destruction is left.
class SafetensorsWriter {
 public:
  /// `begin` and `end` of tensors are ignored; the layout is made here. The keys of the file layer
  /// (version and checksums) are added to the metadata, and replaced if they are there.
  SafetensorsWriter(const std::filesystem::path& path, Metadata metadata,
                    std::vector<TensorInfo> tensors);

  /// The next bytes of a tensor, named by its index in what the constructor got. Tensors may be
  /// written in any order and in turns.
  void write(std::size_t tensor, const void* data, std::size_t bytes);

  /// Throws InvalidArgument if bytes are missing. Nothing can be written afterwards.
  void commit();

 private:
  struct Progress {
    std::uint64_t written = 0;
    std::uint32_t crc = 0;
  };
  void check_names(const std::vector<TensorInfo>& tensors) const;
  void lay_out(std::vector<TensorInfo> tensors);
  std::uint64_t end_of(const TensorInfo& tensor) const;
  std::string header() const;

  const std::filesystem::path path_;
  Metadata metadata_;
  std::vector<TensorInfo> tensors_;  // in the order of the file
  std::vector<std::size_t> places_;  // in tensors_, of what the caller numbers
  std::vector<Progress> progress_;   // of tensors_
  std::uint64_t data_begin_ = 0;
  bool committed_ = false;
  std::optional<AtomicFile> file_;
};

/// Reads a file that need not fit into memory. The constructor validates everything but the data.
/// Everything wrong with the file is a FileError. Several threads may read at a time.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::filesystem::path& path);

  /// All of it, also keys nobody knows.
  const Metadata& metadata() const { return metadata_; }
  /// In the order of their data.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  std::optional<std::size_t> find(std::string_view name) const;
  /// True for files of ours, false for all others.
  bool has_checksums() const { return ours_; }

  /// A part of a tensor, whose checksum is not looked at.
  void read(std::size_t tensor, std::uint64_t offset, void* out, std::size_t bytes) const;

  /// All of a tensor; throws if its checksum differs. `bytes` is the room there is.
  void read_all(std::size_t tensor, void* out, std::size_t bytes) const;
  /// Bytes [begin, end) of a tensor, of which everything is read and checked in the same way.
  void read_range(std::size_t tensor, std::uint64_t begin, std::uint64_t end, void* out) const;
  /// All of a tensor in pieces, in order. What `take` got is worth nothing if this throws, which
  /// is known at the end.
  void read_all(std::size_t tensor,
                const std::function<void(const void* piece, std::size_t bytes)>& take) const;
  /// Reads all of a tensor and throws if its checksum differs.
  void verify(std::size_t tensor) const;

 private:
  void open();
  std::string read_header() const;
  void check_layout() const;
  void read_at(std::uint64_t offset, void* out, std::size_t bytes) const;
  void check_checksum(std::size_t tensor, std::uint32_t found) const;
  void check_unchanged() const;
  const TensorInfo& info(std::size_t tensor) const;

  const std::filesystem::path path_;
  FileDescriptor file_;
  std::uint64_t size_ = 0, data_begin_ = 0;
  std::int64_t modified_ = 0;  // ns
  Metadata metadata_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, std::size_t, std::less<>> by_name_;
  bool ours_ = false;
  std::vector<std::uint32_t> checksums_;  // of tensors_, if it is ours
};

}  // namespace fusestep::detail
