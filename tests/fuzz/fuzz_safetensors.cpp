// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Arbitrary bytes as a file: the reader refuses it with a FileError or reads all of it.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "files/crc32c.h"
#include "files/header.h"
#include "files/safetensors.h"
#include "fusestep/error.h"

namespace {

using namespace fusestep::detail;

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

/// A file in memory.
class MemoryFile {
 public:
  MemoryFile() : file_(memfd_create("fuzz", MFD_CLOEXEC)) {
    path_ = "/proc/self/fd/" + std::to_string(file_);
  }
  const std::string& write(const std::string& bytes) {
    const bool written =
        pwrite(file_, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()) &&
        ftruncate(file_, static_cast<off_t>(bytes.size())) == 0;
    check(written, "a file in memory can be written");
    return path_;
  }

 private:
  int file_;
  std::string path_;
};

/// Reads everything in every way; what the reader says of a file must be true.
void read(const std::string& content) {
  static MemoryFile file;
  try {
    const SafetensorsReader reader(file.write(content));
    std::uint64_t end = 0;
    for (std::size_t i = 0; i < reader.tensors().size(); ++i) {
      const auto& tensor = reader.tensors()[i];
      check(tensor.begin == end && tensor.end >= end, "tensors follow each other");
      end = tensor.end;
      check(tensor.end <= content.size(), "tensors are within the file");
      check(reader.find(tensor.name) == i, "tensors are found by their names");
      std::vector<char> bytes(tensor.bytes());
      reader.read(i, 0, bytes.data(), bytes.size());
      std::uint32_t crc = 0;
      reader.read_all(
          i, [&](const void* piece, std::size_t count) { crc = crc32c(crc, piece, count); });
      check(crc == crc32c(0, bytes.data(), bytes.size()), "reads agree");
      reader.read_all(i, bytes.data(), bytes.size());
      reader.verify(i);
    }
  } catch (const fusestep::FileError&) {
    // Refused.
  }
}

/// With the length that the header has: up to the last brace and the spaces behind it.
std::string fitted(std::string bytes) {
  const std::size_t brace = bytes.rfind('}');
  if (brace == std::string::npos || brace < kLengthBytes) return bytes;
  const std::size_t end = std::min(bytes.find_first_not_of(' ', brace + 1), bytes.size());
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    bytes[i] = static_cast<char>((end - kLengthBytes) >> 8 * i & 255);
  }
  return bytes;
}

/// With the right checksum of the header, which no fuzzer would find.
std::string sealed(std::string bytes) {
  const std::size_t place = kLengthBytes + kHeaderStart.size();
  if (bytes.compare(kLengthBytes, kHeaderStart.size(), kHeaderStart) != 0) return bytes;
  const std::size_t end = kLengthBytes + static_cast<unsigned char>(bytes[0]) +
                          static_cast<unsigned char>(bytes[1]) * std::size_t{256};
  if (end > bytes.size() || end < place + kDigits) return bytes;
  bytes.replace(place, kDigits, kDigits, '0');
  char digits[kDigits + 1];
  std::snprintf(digits, sizeof digits, "%08x", crc32c(0, bytes.data(), end));
  return bytes.replace(place, kDigits, digits);
}

}  // namespace

/// Stacks of allocations, and memory that is kept from use for long, cost much of the time.
extern "C" const char* __asan_default_options() {
  return "malloc_context_size=0:quarantine_size_mb=1";
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string given(reinterpret_cast<const char*>(data), size);
  read(given);
  if (size < kLengthBytes + kHeaderStart.size()) return 0;
  const std::string better = sealed(fitted(given));
  if (better != given) read(better);
  return 0;
}
