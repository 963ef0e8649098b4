// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "file_descriptor.h"

#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "fusestep/error.h"

namespace fusestep::detail {

FileDescriptor::~FileDescriptor() {
  if (is_open()) close(number_);
}

bool interrupted() { return errno == EINTR; }

std::string in_quotes(std::string_view name) {
  constexpr std::size_t limit = 200;
  constexpr char digits[] = "0123456789abcdef";
  std::size_t end = name.size();
  if (end > limit) {
    end = limit;
    while (end > 0 && (static_cast<unsigned char>(name[end]) & 0xc0) == 0x80) --end;
  }
  std::string text = "'";
  for (const char c : name.substr(0, end)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7f) {
      text += c;
    } else {
      text += {'\\', 'x', digits[byte >> 4], digits[byte & 15]};
    }
  }
  return text + (end < name.size() ? "...'" : "'");
}

std::string where(const std::filesystem::path& file) { return "file '" + file.string() + "'"; }

std::string where(const std::filesystem::path& file, std::string_view tensor) {
  return where(file) + ", tensor " + in_quotes(tensor);
}

void throw_file_error(const std::filesystem::path& file, const std::string& what, int error) {
  throw FileError(where(file) + ": " + what + ": " + std::generic_category().message(error));
}

}  // namespace fusestep::detail
