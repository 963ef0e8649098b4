// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// State in safetensors files: a slot is the tensor `<parameter>/<slot>`, all else is metadata. See
// docs/files.md.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint/ranks.h"
#include "checkpoint/source.h"
#include "files/safetensors.h"

namespace fusestep::detail {

/// A file, or the files of several ranks by their index. Those are opened when they are needed.
class StateFileReader final : public StateSource {
 public:
  explicit StateFileReader(const std::filesystem::path& path);

  const Description& description() const override { return description_; }
  const Metadata& metadata() const override { return metadata_; }
  void read(int parameter, const std::string& slot, ByteRange range,
            const TakePiece& take) override;
  void read_into(int parameter, const std::string& slot, ByteRange range, void* to) override;
  void verify(int parameter, const std::string& slot, ByteRange range) override;
  std::uint64_t bytes(int parameter, const std::string& slot) const;
  /// Of a file of ours.
  std::string header_checksum() const;
  [[noreturn]] void refuse(const std::string& problem) const override;

 private:
  void describe_by_metadata();
  void describe_by_index(const std::string& index);
  void describe_by_names();
  void add_slots();
  std::int64_t read_step(std::size_t tensor);
  std::size_t tensor(int parameter, const std::string& slot) const;
  const SafetensorsReader& file_of_rank(std::size_t file);
  /// A tensor in a file, and bytes of it.
  struct Piece {
    const SafetensorsReader* file;
    std::size_t tensor;
    std::uint64_t begin, end;
  };
  std::vector<Piece> pieces(int parameter, const std::string& slot, ByteRange range);
  std::size_t tensor_of_rank(std::size_t file, const std::string& name, std::uint64_t bytes);

  std::filesystem::path path_;
  SafetensorsReader file_;
  Description description_;
  Metadata metadata_;  // without what the description was made from
  std::map<std::pair<int, std::string>, std::size_t> tensors_;
  // Of an index:
  bool is_index_ = false;
  RankIndex index_;
  std::vector<std::unique_ptr<SafetensorsReader>> files_;  // null: not open yet
  std::vector<std::vector<TensorPart>> parts_;             // of every parameter
};

class StateFileWriter {
 public:
  StateFileWriter(const std::filesystem::path& path, const Description& description,
                  const Metadata& metadata);
  /// The next bytes of a slot.
  void write(int parameter, const std::string& slot, const void* data, std::size_t bytes);
  /// The file is there, whole and on disk, when this returns.
  void commit() { file_.commit(); }

 private:
  struct Contents {
    Metadata metadata;
    std::vector<TensorInfo> tensors;
    std::map<std::pair<int, std::string>, std::size_t> positions;
  };
  static Contents contents(const Description& description, const Metadata& metadata);
  StateFileWriter(const std::filesystem::path& path, Contents contents);

  std::map<std::pair<int, std::string>, std::size_t> tensors_;
  SafetensorsWriter file_;
};

void write_file(StateSource& source, const Metadata& more, const std::filesystem::path& path);

/// `description` is of whole parameters, each with its parts.
void write_index(const std::filesystem::path& path, const Description& description,
                 const RankIndex& index, const Metadata& metadata);

/// Keys that begin with "fusestep." are not the user's: throws InvalidArgument.
void check_user_metadata(const Metadata& metadata);

/// '%', '/' and control characters as %XX, so that a tensor's name has one '/': between parameter
/// and slot.
std::string escape_name(std::string_view name);
std::string unescape_name(std::string_view escaped);

}  // namespace fusestep::detail
