// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "header.h"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "crc32c.h"
#include "file_descriptor.h"
#include "fusestep/error.h"
#include "fusestep/tensor_view.h"

namespace fusestep::detail {
namespace {

constexpr StoredType kStoredTypes[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
};

/// False if the product leaves 64 bits.
bool multiply(std::uint64_t& product, std::uint64_t factor) {
  if (factor != 0 && product > std::numeric_limits<std::uint64_t>::max() / factor) return false;
  product *= factor;
  return true;
}

}  // namespace

const StoredType* find_stored_type(std::string_view name) {
  const auto* found = std::find_if(std::begin(kStoredTypes), std::end(kStoredTypes),
                                   [&](const StoredType& type) { return type.name == name; });
  return found == std::end(kStoredTypes) ? nullptr : found;
}

DataSize data_size(const TensorInfo& tensor) {
  const StoredType* type = find_stored_type(tensor.dtype);
  if (type == nullptr) return {0, "unknown dtype " + in_quotes(tensor.dtype)};
  const std::string shape = "shape " + to_string(tensor.shape) + " of " + tensor.dtype;
  std::uint64_t bits = 1;
  for (const std::int64_t extent : tensor.shape) {
    if (extent < 0) return {0, shape + " has a negative extent"};
    if (!multiply(bits, static_cast<std::uint64_t>(extent))) {
      return {0, shape + " is larger than any file"};
    }
  }
  if (!multiply(bits, type->bits)) return {0, shape + " is larger than any file"};
  if (bits % 8 != 0) return {0, shape + " does not end at a whole byte"};
  return {bits / 8, {}};
}

// ---- from values to text --------------------------------------------------------------------

namespace {

std::string hex(std::uint32_t value) {
  std::string digits(kDigits, '0');
  for (std::size_t i = 0; i < kDigits; ++i) {
    digits[kDigits - 1 - i] = "0123456789abcdef"[value >> 4 * i & 15];
  }
  return digits;
}

std::string little_endian(std::uint64_t value) {
  std::string bytes(kLengthBytes, '\0');
  for (std::size_t i = 0; i < kLengthBytes; ++i) bytes[i] = static_cast<char>(value >> 8 * i & 255);
  return bytes;
}

std::string json_string(const std::filesystem::path& file, const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    throw InvalidArgument(where(file) + ": a name or a text of the metadata is not UTF-8");
  }
}

/// {"w":"8a9136aa",...}
std::string checksums_text(const std::filesystem::path& file,
                           const std::vector<TensorInfo>& tensors,
                           const std::vector<std::uint32_t>& checksums) {
  std::string text = "{";
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (i > 0) text += ',';
    text += json_string(file, tensors[i].name) + ":\"" + hex(checksums[i]) + '"';
  }
  return text + "}";
}

std::string tensor_text(const TensorInfo& tensor) {
  std::string text = R"({"dtype":")" + tensor.dtype + R"(","shape":[)";
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
    if (i > 0) text += ',';
    text += std::to_string(tensor.shape[i]);
  }
  return text + R"(],"data_offsets":[)" + std::to_string(tensor.begin) + "," +
         std::to_string(tensor.end) + "]}";
}

/// Of length and header, with zeros in place of its own digits.
std::uint32_t header_checksum(std::string& bytes) {
  const std::string digits(kDigits, '0');
  bytes.replace(kLengthBytes + kHeaderStart.size(), kDigits, digits);
  return crc32c(0, bytes.data(), bytes.size());
}

}  // namespace

std::string header_bytes(const std::filesystem::path& file, const Metadata& metadata,
                         const std::vector<TensorInfo>& tensors,
                         const std::vector<std::uint32_t>& checksums) {
  std::string text(kHeaderStart);
  text += hex(0) + '"';
  Metadata all = metadata;
  all[std::string(kVersionKey)] = kVersion;
  all[std::string(kChecksumsKey)] = checksums_text(file, tensors, checksums);
  for (const auto& [key, value] : all) {
    text += ',';
    text += json_string(file, key) + ':' + json_string(file, value);
  }
  text += "}";
  for (const TensorInfo& tensor : tensors) {
    text += ',';
    text += json_string(file, tensor.name) + ':' + tensor_text(tensor);
  }
  text += "}";
  text.append((kDataAlignment - (kLengthBytes + text.size()) % kDataAlignment) % kDataAlignment,
              ' ');
  std::string bytes = little_endian(text.size()) + text;
  const std::string digits = hex(header_checksum(bytes));
  return bytes.replace(kLengthBytes + kHeaderStart.size(), kDigits, digits);
}

// ---- from text to values --------------------------------------------------------------------

namespace {

using Json = nlohmann::json;

/// Refuses all that a derived class does not expect.
class StrictEvents : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
  bool number_unsigned(number_unsigned_t) override { return unexpected("a number"); }
  bool number_float(number_float_t, const string_t&) override {
    return unexpected("a number that is no integer of 64 bits");
  }
  bool string(string_t&) override { return unexpected("a string"); }
  bool binary(binary_t&) override { return unexpected("binary data"); }
  bool start_object(std::size_t) override { return unexpected("an object"); }
  bool key(string_t&) override { return unexpected("a key"); }
  bool end_object() override { return unexpected("the end of an object"); }
  bool start_array(std::size_t) override { return unexpected("an array"); }
  bool end_array() override { return unexpected("the end of an array"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return refuse_byte(position);
  }
  bool refuse_byte(std::size_t position) {
    return refuse("is not JSON in UTF-8, at its byte " + std::to_string(position));
  }

 protected:
  // Both throw.
  virtual bool unexpected(const std::string& got) = 0;
  virtual bool refuse(const std::string& problem) = 0;
};

/// The parser would take a zero for the end of the text.
void parse_strictly(std::string_view text, StrictEvents& events) {
  const std::size_t zero = text.find('\0');
  if (zero != std::string_view::npos) events.refuse_byte(zero + 1);
  Json::sax_parse(text.begin(), text.end(), &events, nlohmann::detail::input_format_t::json);
}

/// The header as a whole. Depth is limited by what is expected where.
class HeaderEvents final : public StrictEvents {
 public:
  explicit HeaderEvents(const std::filesystem::path& file) : file_(file) {}
  ParsedHeader take() { return std::move(header_); }

  bool start_object(std::size_t) override {
    if (place_ == Place::kStart) {
      place_ = Place::kHeader;
    } else if (place_ == Place::kHeader && name_ == "__metadata__") {
      place_ = Place::kMetadata;
    } else if (place_ == Place::kHeader) {
      place_ = Place::kTensor;
      fields_.clear();
      header_.tensors.emplace_back().name = name_;
      offsets_.clear();
    } else {
      unexpected("an object");
    }
    return true;
  }

  bool key(string_t& name) override {
    if (place_ == Place::kHeader) {
      if (!names_.insert(name).second) refuse("has " + in_quotes(name) + " twice");
      name_ = std::move(name);
    } else if (place_ == Place::kMetadata) {
      if (header_.metadata.contains(name)) refuse("has the metadata " + in_quotes(name) + " twice");
      field_ = std::move(name);
    } else {
      if (name != "dtype" && name != "shape" && name != "data_offsets") {
        refuse_tensor("unknown key " + in_quotes(name));
      }
      if (!fields_.insert(name).second) refuse_tensor(in_quotes(name) + " stands there twice");
      field_ = std::move(name);
    }
    return true;
  }

  bool string(string_t& text) override {
    if (place_ == Place::kMetadata) {
      header_.metadata.emplace(field_, std::move(text));
    } else if (place_ == Place::kTensor && field_ == "dtype") {
      tensor().dtype = std::move(text);
    } else {
      unexpected("a string");
    }
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::kTensor || field_ == "dtype") unexpected("an array");
    place_ = field_ == "shape" ? Place::kShape : Place::kOffsets;
    return true;
  }

  bool number_unsigned(number_unsigned_t number) override {
    if (place_ == Place::kShape) {
      if (number > std::numeric_limits<std::int64_t>::max()) {
        refuse_tensor("an extent of " + std::to_string(number) + " is larger than any file");
      }
      tensor().shape.push_back(static_cast<std::int64_t>(number));
    } else if (place_ == Place::kOffsets) {
      if (offsets_.size() == 2) refuse_tensor("'data_offsets' has more than two numbers");
      offsets_.push_back(number);
    } else {
      unexpected("a number");
    }
    return true;
  }

  bool end_array() override {
    if (place_ == Place::kOffsets) {
      if (offsets_.size() != 2) refuse_tensor("'data_offsets' has less than two numbers");
      tensor().begin = offsets_[0];
      tensor().end = offsets_[1];
    }
    place_ = Place::kTensor;
    return true;
  }

  bool end_object() override {
    if (place_ == Place::kTensor) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        if (!fields_.contains(field)) refuse_tensor("'" + std::string(field) + "' is missing");
      }
    }
    place_ = place_ == Place::kHeader ? Place::kEnd : Place::kHeader;
    return true;
  }

 private:
  enum class Place { kStart, kHeader, kMetadata, kTensor, kShape, kOffsets, kEnd };

  TensorInfo& tensor() { return header_.tensors.back(); }

  [[noreturn]] bool refuse(const std::string& problem) override {
    throw FileError(where(file_) + ": its header " + problem);
  }
  [[noreturn]] void refuse_tensor(const std::string& problem) {
    throw FileError(where(file_, name_) + ": " + problem);
  }
  [[noreturn]] bool unexpected(const std::string& got) override {
    switch (place_) {
      case Place::kHeader:
        refuse("has " + got + " for " + in_quotes(name_) + ", which must be an object");
      case Place::kMetadata:
        refuse("has " + got + " for the metadata " + in_quotes(field_) +
               ", which must be a string");
      case Place::kTensor:
        refuse_tensor("'" + field_ + "' must be " + (field_ == "dtype" ? "a string" : "an array") +
                      ", got " + got);
      case Place::kShape:
      case Place::kOffsets:
        refuse_tensor("'" + field_ + "' must hold whole numbers of at least 0, got " + got);
      case Place::kStart:
      case Place::kEnd: break;
    }
    refuse("must be an object, got " + got);
  }

  const std::filesystem::path& file_;
  Place place_ = Place::kStart;
  std::string name_, field_;      // keys of the header and of what is in it
  std::set<std::string> names_;   // of the header
  std::set<std::string> fields_;  // of the tensor
  std::vector<std::uint64_t> offsets_;
  ParsedHeader header_;
};

/// {"w":"8a9136aa",...}
class ChecksumEvents final : public StrictEvents {
 public:
  explicit ChecksumEvents(const std::filesystem::path& file) : file_(file) {}
  std::map<std::string, std::string> take() { return std::move(checksums_); }

  bool start_object(std::size_t) override { return depth_++ == 0 || unexpected("an object"); }
  bool end_object() override { return true; }
  bool key(string_t& name) override {
    name_ = std::move(name);
    return true;
  }
  bool string(string_t& text) override {
    if (depth_ == 0) unexpected("a string");
    if (!checksums_.emplace(name_, std::move(text)).second) {
      refuse("has " + in_quotes(name_) + " twice");
    }
    return true;
  }

 private:
  [[noreturn]] bool refuse(const std::string& problem) override {
    throw FileError(where(file_) + ": '" + std::string(kChecksumsKey) + "' " + problem);
  }
  [[noreturn]] bool unexpected(const std::string& got) override {
    refuse("must be an object of strings, got " + got);
  }

  const std::filesystem::path& file_;
  int depth_ = 0;
  std::string name_;
  std::map<std::string, std::string> checksums_;
};

/// Lower case only: a bit flipped in a digit must not be another way to write it.
std::optional<std::uint32_t> parse_hex(std::string_view digits) {
  if (digits.size() != kDigits) return {};
  std::uint32_t value = 0;
  for (const char digit : digits) {
    const std::size_t found = std::string_view("0123456789abcdef").find(digit);
    if (found == std::string_view::npos) return {};
    value = value << 4 | static_cast<std::uint32_t>(found);
  }
  return value;
}

}  // namespace

ParsedHeader parse_header(const std::filesystem::path& file, std::string_view text) {
  // The parser would skip a byte order mark.
  if (!text.starts_with('{')) throw FileError(where(file) + ": its header does not begin with '{'");
  HeaderEvents events(file);
  parse_strictly(text, events);
  return events.take();
}

bool is_ours(const Metadata& metadata) {
  return std::any_of(metadata.begin(), metadata.end(),
                     [](const auto& entry) { return entry.first.starts_with(kReservedPrefix); });
}

namespace {

std::string_view ours(const std::filesystem::path& file, const Metadata& metadata,
                      std::string_view key) {
  const auto found = metadata.find(std::string(key));
  if (found != metadata.end()) return found->second;
  throw FileError(where(file) + ": has metadata of fusestep, but not '" + std::string(key) + "'");
}

void check_version(const std::filesystem::path& file, std::string_view version) {
  if (version == kVersion) return;
  throw FileError(where(file) + ": written by a newer fusestep: its format is " +
                  in_quotes(version) + ", this one reads '" + std::string(kVersion) + "'");
}

void check_header_checksum(const std::filesystem::path& file, std::string bytes,
                           std::string_view digits) {
  if (bytes.compare(kLengthBytes, kHeaderStart.size(), kHeaderStart) != 0) {
    throw FileError(where(file) + ": '" + std::string(kHeaderChecksumKey) +
                    "' is not the first thing in its header");
  }
  const std::optional<std::uint32_t> expected = parse_hex(digits);
  const std::uint32_t found = header_checksum(bytes);
  if (expected == found) return;
  throw FileError(where(file) + ": its header is damaged: its checksum is " + hex(found) +
                  ", the file says " + in_quotes(digits));
}

std::uint32_t checksum_of(const std::filesystem::path& file, const TensorInfo& tensor,
                          const std::map<std::string, std::string>& checksums) {
  const auto found = checksums.find(tensor.name);
  if (found == checksums.end()) {
    throw FileError(where(file, tensor.name) + ": has no checksum");
  }
  const std::optional<std::uint32_t> value = parse_hex(found->second);
  if (value) return *value;
  throw FileError(where(file, tensor.name) + ": its checksum " + in_quotes(found->second) +
                  " is not 8 hexadecimal digits");
}

}  // namespace

std::vector<std::uint32_t> check_our_header(const std::filesystem::path& file, std::string bytes,
                                            const ParsedHeader& header) {
  check_version(file, ours(file, header.metadata, kVersionKey));
  check_header_checksum(file, std::move(bytes), ours(file, header.metadata, kHeaderChecksumKey));
  ChecksumEvents events(file);
  parse_strictly(ours(file, header.metadata, kChecksumsKey), events);
  const std::map<std::string, std::string> texts = events.take();
  std::vector<std::uint32_t> checksums;
  for (const TensorInfo& tensor : header.tensors) {
    checksums.push_back(checksum_of(file, tensor, texts));
  }
  if (texts.size() != header.tensors.size()) {
    throw FileError(where(file) + ": '" + std::string(kChecksumsKey) +
                    "' has more names than there are tensors");
  }
  return checksums;
}

}  // namespace fusestep::detail
