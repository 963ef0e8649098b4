// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What the tests of files share: directories that vanish, files as bytes, contents that are saved
// and found again.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "files/safetensors.h"
#include "fusestep/error.h"
#include "support.h"

namespace fusestep::test {

using detail::Metadata;
using detail::SafetensorsReader;
using detail::SafetensorsWriter;
using detail::TensorInfo;
using std::filesystem::path;

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "fusestep-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary directory");
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  path operator/(const std::string& name) const { return path_ / name; }
  const path& name() const { return path_; }
  /// Names of what is in it, sorted.
  std::vector<std::string> entries() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) {
      names.push_back(entry.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  }

 private:
  path path_;
};

inline std::string read_bytes(const path& file) {
  std::ifstream stream(file, std::ios::binary);
  std::stringstream bytes;
  bytes << stream.rdbuf();
  return bytes.str();
}

/// Into the file that is there, if there is one.
inline void overwrite_bytes(const path& file, std::string_view bytes) {
  std::ofstream stream(file, std::ios::binary | std::ios::trunc);
  stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!stream.flush()) throw std::runtime_error("cannot write " + file.string());
}

/// A new file: some file systems write a truncated one to the disk at once, which takes its time.
inline void write_bytes(const path& file, std::string_view bytes) {
  std::filesystem::remove(file);
  overwrite_bytes(file, bytes);
}

/// A header with its length in front of it.
inline std::string with_length(const std::string& header) {
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> 8 * i & 255);
  return length + header;
}

inline std::string random_bytes(std::uint64_t seed, std::size_t size) {
  std::string bytes(size, '\0');
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(hash(seed, i));
  return bytes;
}

struct Content {
  Metadata metadata;
  std::vector<TensorInfo> tensors;
  std::vector<std::string> data;

  void add(const std::string& name, const std::string& dtype, std::vector<std::int64_t> shape,
           std::string bytes) {
    tensors.push_back({name, dtype, std::move(shape)});
    data.push_back(std::move(bytes));
  }
};

inline void save(const path& file, const Content& content) {
  SafetensorsWriter writer(file, content.metadata, content.tensors);
  for (std::size_t i = 0; i < content.data.size(); ++i) {
    writer.write(i, content.data[i].data(), content.data[i].size());
  }
  writer.commit();
}

inline std::string tensor_bytes(const SafetensorsReader& reader, std::size_t tensor) {
  std::string bytes(reader.tensors()[tensor].bytes(), '\0');
  reader.read_all(tensor, bytes.data(), bytes.size());
  return bytes;
}

/// What is wrong with a file, in the words of the reader; empty: everything can be read.
inline std::string refusal(const path& file) {
  try {
    const SafetensorsReader reader(file);
    for (std::size_t i = 0; i < reader.tensors().size(); ++i) tensor_bytes(reader, i);
    return {};
  } catch (const FileError& error) {
    return error.what();
  }
}

inline void expect_content(const SafetensorsReader& reader, const Content& content) {
  EXPECT_TRUE(reader.has_checksums());
  for (const auto& [key, value] : content.metadata) EXPECT_EQ(reader.metadata().at(key), value);
  EXPECT_EQ(reader.metadata().size(), content.metadata.size() + 3);
  ASSERT_EQ(reader.tensors().size(), content.tensors.size());
  for (std::size_t i = 0; i < content.tensors.size(); ++i) {
    const auto found = reader.find(content.tensors[i].name);
    ASSERT_TRUE(found) << content.tensors[i].name;
    EXPECT_EQ(reader.tensors()[*found].dtype, content.tensors[i].dtype);
    EXPECT_EQ(reader.tensors()[*found].shape, content.tensors[i].shape);
    EXPECT_TRUE(tensor_bytes(reader, *found) == content.data[i]) << content.tensors[i].name;
  }
}

inline void expect_content(const path& file, const Content& content) {
  expect_content(SafetensorsReader(file), content);
}

/// A small file with a bit of everything.
inline Content small_content() {
  Content content;
  content.metadata = {{"maker", "test"}, {"fusestep.groups", R"([{"lr":"0.1"}])"}};
  content.add("w", "F32", {2, 3}, random_bytes(1, 24));
  content.add("b", "BF16", {3}, random_bytes(2, 6));
  content.add("step", "I64", {}, random_bytes(3, 8));
  content.add("empty", "F64", {0, 4}, "");
  return content;
}

}  // namespace fusestep::test
