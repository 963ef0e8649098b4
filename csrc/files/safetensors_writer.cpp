// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <numeric>
#include <set>

#include "crc32c.h"
#include "fusestep/error.h"
#include "header.h"
#include "safetensors.h"
#include "tuning.h"

namespace fusestep::detail {

static_assert(std::endian::native == std::endian::little, "data in files are little-endian");

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, Metadata metadata,
                                     std::vector<TensorInfo> tensors)
    : path_(path), metadata_(std::move(metadata)) {
  for (const std::string_view key : {kVersionKey, kChecksumsKey, kHeaderChecksumKey}) {
    metadata_.erase(std::string(key));
  }
  check_names(tensors);
  lay_out(std::move(tensors));
  progress_.resize(tensors_.size());
  data_begin_ = header().size();
  if (data_begin_ - kLengthBytes > kMaxHeaderBytes) {
    throw InvalidArgument(where(path_) + ": its header would have " + std::to_string(data_begin_) +
                          " bytes, more than readers take");
  }
  file_.emplace(path_);
}

void SafetensorsWriter::check_names(const std::vector<TensorInfo>& tensors) const {
  std::set<std::string_view> names = {"__metadata__"};
  for (const TensorInfo& tensor : tensors) {
    if (names.insert(tensor.name).second) continue;
    throw InvalidArgument(where(path_, tensor.name) + ": the name is taken");
  }
}

/// The public writer's order: by dtype, the largest first, then by name. So every tensor begins at
/// a multiple of its element.
void SafetensorsWriter::lay_out(std::vector<TensorInfo> tensors) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const StoredType* first = find_stored_type(tensors[a].dtype);
    const StoredType* second = find_stored_type(tensors[b].dtype);
    return first != second ? std::greater<>()(first, second) : tensors[a].name < tensors[b].name;
  });
  places_.resize(tensors.size());
  std::uint64_t end = 0;
  for (const std::size_t index : order) {
    TensorInfo& tensor = tensors[index];
    tensor.begin = end;
    end = tensor.end = end_of(tensor);
    places_[index] = tensors_.size();
    tensors_.push_back(std::move(tensor));
  }
}

std::uint64_t SafetensorsWriter::end_of(const TensorInfo& tensor) const {
  DataSize size = data_size(tensor);
  const std::uint64_t limit = std::numeric_limits<std::int64_t>::max() - 2 * kMaxHeaderBytes;
  if (size.problem.empty() && size.bytes > limit - tensor.begin) {
    size.problem = "the file would be larger than a file can be";
  }
  if (!size.problem.empty()) throw InvalidArgument(where(path_, tensor.name) + ": " + size.problem);
  return tensor.begin + size.bytes;
}

std::string SafetensorsWriter::header() const {
  std::vector<std::uint32_t> checksums;
  for (const Progress& progress : progress_) checksums.push_back(progress.crc);
  return header_bytes(path_, metadata_, tensors_, checksums);
}

void SafetensorsWriter::write(std::size_t tensor, const void* data, std::size_t bytes) {
  if (committed_) throw InvalidArgument(where(path_) + ": is committed already");
  if (tensor >= places_.size()) {
    throw InvalidArgument(where(path_) + ": has no tensor number " + std::to_string(tensor));
  }
  const TensorInfo& info = tensors_[places_[tensor]];
  Progress& progress = progress_[places_[tensor]];
  if (bytes > info.bytes() - progress.written) {
    throw InvalidArgument(where(path_, info.name) + ": takes " + std::to_string(info.bytes()) +
                          " bytes, got " + std::to_string(bytes) + " after " +
                          std::to_string(progress.written));
  }
  const auto* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const std::size_t piece = std::min(bytes, kFilePieceBytes);
    progress.crc = crc32c(progress.crc, from, piece);
    file_->write_at(data_begin_ + info.begin + progress.written, from, piece);
    progress.written += piece;
    from += piece;
    bytes -= piece;
  }
}

void SafetensorsWriter::commit() {
  if (committed_) throw InvalidArgument(where(path_) + ": is committed already");
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    if (progress_[i].written == tensors_[i].bytes()) continue;
    throw InvalidArgument(where(path_, tensors_[i].name) + ": takes " +
                          std::to_string(tensors_[i].bytes()) + " bytes, got " +
                          std::to_string(progress_[i].written));
  }
  // Of the length it had before the checksums were known: they have a fixed number of digits.
  const std::string bytes = header();
  file_->write_at(0, bytes.data(), bytes.size());
  committed_ = true;
  file_->commit();
}

}  // namespace fusestep::detail
