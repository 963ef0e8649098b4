// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/state_file.h"

#include <algorithm>
#include <array>
#include <optional>
#include <set>

#include "at.h"
#include "files/header.h"
#include "fusestep/detail/rule_list.h"
#include "fusestep/error.h"

namespace fusestep::detail {
namespace {

constexpr std::string_view kReserved = "fusestep.";
constexpr const char* kGroups = "fusestep.groups";

/// torch's names of dtypes and those of safetensors. Complex numbers are stored as pairs of reals.
struct DTypeNames {
  std::string_view torch, file;
};
constexpr std::array<DTypeNames, 13> kDTypes = {{{"float32", "F32"},
                                                 {"float64", "F64"},
                                                 {"bfloat16", "BF16"},
                                                 {"float16", "F16"},
                                                 {"int64", "I64"},
                                                 {"int32", "I32"},
                                                 {"int16", "I16"},
                                                 {"int8", "I8"},
                                                 {"uint8", "U8"},
                                                 {"uint16", "U16"},
                                                 {"uint32", "U32"},
                                                 {"uint64", "U64"},
                                                 {"bool", "BOOL"}}};

std::string file_dtype(const std::string& torch, const std::string& tensor) {
  for (const DTypeNames& names : kDTypes) {
    if (names.torch == torch) return std::string(names.file);
  }
  throw InvalidArgument("'" + tensor + "' cannot be saved: safetensors has no dtype for " + torch);
}

/// Dtypes that have no name here keep the file's, and fit nowhere.
std::string torch_dtype(const std::string& file) {
  for (const DTypeNames& names : kDTypes) {
    if (names.file == file) return std::string(names.torch);
  }
  return file;
}

/// `<parameter>/<slot>`
struct TensorName {
  std::string parameter, slot;
};
std::optional<TensorName> split(const std::string& name) {
  const std::size_t end = name.rfind('/');
  if (end == std::string::npos) return {};
  return TensorName{unescape_name(name.substr(0, end)), unescape_name(name.substr(end + 1))};
}

bool is_step_of_plain_file(const TensorInfo& tensor, const std::string& slot) {
  const auto is_one = [](std::int64_t extent) { return extent == 1; };
  return slot == "step" && std::all_of(tensor.shape.begin(), tensor.shape.end(), is_one);
}

/// Slots of the user's own may have any shape.
bool is_like_value(const std::string& slot) {
  if (slot == "value") return true;
  bool found = false;
  for (int rule = 0; rule < kRules; ++rule) {
    for (const std::string_view name : rule_info(rule).slots) found = found || name == slot;
  }
  return found;
}

void check_utf8(const std::string& name, const std::string& what) {
  try {
    static_cast<void>(Json(name).dump());
  } catch (const Json::exception&) {
    const std::string shown = Json(name).dump(-1, ' ', true, Json::error_handler_t::replace);
    throw InvalidArgument(what + " " + shown + " cannot be saved: it must be valid UTF-8");
  }
}

/// What a file cannot have.
void check_names(const Description& description) {
  for (const GroupDescription& group : description.groups) check_utf8(group.name, "group");
  std::set<std::string_view> names;
  for (const ParameterDescription& parameter : description.parameters) {
    check_utf8(parameter.name, "parameter");
    if (names.insert(parameter.name).second) continue;
    throw InvalidArgument("there are two parameters named '" + parameter.name + "'");
  }
}

}  // namespace

std::string escape_name(std::string_view name) {
  constexpr char digits[] = "0123456789ABCDEF";
  std::string escaped;
  for (const char c : name) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '%' || c == '/' || byte < 0x20 || byte == 0x7f) {
      escaped += {'%', digits[byte >> 4], digits[byte & 15]};
    } else {
      escaped += c;
    }
  }
  return escaped;
}

std::string unescape_name(std::string_view escaped) {
  const auto digit = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
  };
  std::string name;
  for (std::size_t i = 0; i < escaped.size(); ++i) {
    if (escaped[i] == '%' && i + 2 < escaped.size() && digit(escaped[i + 1]) >= 0 &&
        digit(escaped[i + 2]) >= 0) {
      name += static_cast<char>(digit(escaped[i + 1]) * 16 + digit(escaped[i + 2]));
      i += 2;
    } else {
      name += escaped[i];
    }
  }
  return name;
}

void check_user_metadata(const Metadata& metadata) {
  for (const auto& [key, value] : metadata) {
    if (key.starts_with(kReserved)) {
      throw InvalidArgument("metadata: keys that begin with 'fusestep.' are reserved, got '" + key +
                            "'");
    }
  }
}

// ---- reading ------------------------------------------------------------------------------------

StateFileReader::StateFileReader(const std::filesystem::path& path)
    : path_(path), file_(path), metadata_(file_.metadata()) {
  const auto index = metadata_.find(kRanksKey);
  is_index_ = file_.has_checksums() && index != metadata_.end();
  if (is_index_) {
    describe_by_index(std::string(index->second));
  } else if (file_.has_checksums()) {
    describe_by_metadata();
  } else {
    describe_by_names();
  }
  if (!is_index_) add_slots();
  for (const char* key : {"fusestep.version", "fusestep.crc32c", "fusestep.header_crc32c",
                          static_cast<const char*>(kGroups)}) {
    metadata_.erase(key);
  }
}

void StateFileReader::describe_by_metadata() {
  const auto groups = metadata_.find(kGroups);
  if (groups == metadata_.end()) refuse("the metadata '" + std::string(kGroups) + "' is missing");
  try {
    description_ = description_from_json(parse_json(groups->second, kGroups), false);
  } catch (const InvalidArgument& error) {
    refuse(error.what());
  }
}

/// A file of other programs: one group without settings, of the parameters that tensors belong to.
/// A tensor `<parameter>/step` of one number is its step count.
void StateFileReader::describe_by_names() {
  std::map<std::string, std::size_t> known;
  for (std::size_t i = 0; i < file_.tensors().size(); ++i) {
    const TensorInfo& tensor = file_.tensors()[i];
    const std::optional<TensorName> name = split(tensor.name);
    if (!name) continue;
    const auto [found, is_new] = known.emplace(name->parameter, description_.parameters.size());
    if (is_new) {
      description_.parameters.emplace_back();
      description_.parameters.back().name = name->parameter;
    }
    ParameterDescription& parameter = description_.parameters[found->second];
    if (is_step_of_plain_file(tensor, name->slot)) {
      parameter.step = read_step(i);
    } else if (parameter.value.dtype.empty() || is_like_value(name->slot)) {
      parameter.value = {torch_dtype(tensor.dtype), tensor.shape};
    }
  }
  if (description_.parameters.empty()) refuse("no tensor is named '<parameter>/<slot>'");
  description_.groups.push_back({});
}

void StateFileReader::add_slots() {
  std::map<std::string, int> positions;
  for (std::size_t i = 0; i < description_.parameters.size(); ++i) {
    positions.emplace(description_.parameters[i].name, static_cast<int>(i));
  }
  const bool ours = file_.has_checksums();
  for (std::size_t i = 0; i < file_.tensors().size(); ++i) {
    const TensorInfo& tensor = file_.tensors()[i];
    const std::optional<TensorName> name = split(tensor.name);
    const auto found = name ? positions.find(name->parameter) : positions.end();
    if (found == positions.end()) {
      if (!ours) continue;
      refuse("tensor '" + tensor.name + "' belongs to no parameter");
    }
    if (!ours && is_step_of_plain_file(tensor, name->slot)) continue;
    if (!tensors_.emplace(std::pair(found->second, name->slot), i).second) {
      refuse("tensor '" + tensor.name + "' is there twice, once with other escapes in its name");
    }
    at(description_.parameters, found->second).slots[name->slot] = {torch_dtype(tensor.dtype),
                                                                    tensor.shape};
  }
}

std::int64_t StateFileReader::read_step(std::size_t tensor) {
  const TensorInfo& info = file_.tensors()[tensor];
  const std::string where = "tensor '" + info.name + "'";
  const auto step = [&]<class T>(T value) {
    file_.read(tensor, 0, &value, sizeof value);
    return step_from_number(static_cast<double>(value), where);
  };
  try {
    if (info.dtype == "F32") return step(0.0f);
    if (info.dtype == "F64") return step(0.0);
    if (info.dtype == "I64") return step(std::int64_t{0});
    if (info.dtype == "I32") return step(std::int32_t{0});
  } catch (const InvalidArgument& error) {
    refuse(error.what());
  }
  refuse(where + " must be of F32, F64, I64 or I32, got " + info.dtype);
}

void StateFileReader::refuse(const std::string& problem) const {
  throw FileError(where(path_) + ": " + problem);
}

std::size_t StateFileReader::tensor(int parameter, const std::string& slot) const {
  return tensors_.at({parameter, slot});
}

std::string StateFileReader::header_checksum() const {
  return file_.metadata().at(std::string(kHeaderChecksumKey));
}

std::uint64_t StateFileReader::bytes(int parameter, const std::string& slot) const {
  if (!is_index_) return file_.tensors()[tensor(parameter, slot)].bytes();
  const ParameterDescription& described = at(description_.parameters, parameter);
  return bytes_of(dtype_from_name(described.slots.at(slot).dtype, slot), described.value.shape,
                  slot);
}

// ---- several files ------------------------------------------------------------------------------

void StateFileReader::describe_by_index(const std::string& index) {
  try {
    index_ = rank_index_from_json(parse_json(index, kRanksKey));
    description_ = description_from_json(parse_json(metadata_.at(kGroups), kGroups));
    for (ParameterDescription& parameter : description_.parameters) {
      const std::string where = "parameter '" + parameter.name + "'";
      for (const auto& [name, slot] : parameter.slots) {
        if (slot.shape == parameter.value.shape) continue;
        throw InvalidArgument(where + ": slot '" + name + "' has another shape");
      }
      parts_.push_back(parts_from_json(parameter.unknown.value(kPartsKey, Json()),
                                       index_.files.size(), elements_of(parameter.value.shape),
                                       where));
      parameter.unknown.erase(kPartsKey);
    }
  } catch (const InvalidArgument& error) {
    refuse(error.what());
  } catch (const std::out_of_range&) {
    refuse("the metadata '" + std::string(kGroups) + "' is missing");
  }
  if (!file_.tensors().empty()) refuse("an index of ranks has tensors");
  files_.resize(index_.files.size());
  metadata_.erase(kRanksKey);
}

const SafetensorsReader& StateFileReader::file_of_rank(std::size_t number) {
  std::unique_ptr<SafetensorsReader>& file = files_[number];
  if (file) return *file;
  const RankFile& named = index_.files[number];
  std::filesystem::path path = path_;
  path.replace_filename(named.name);
  auto opened = std::make_unique<SafetensorsReader>(path);
  const auto checksum = opened->metadata().find(std::string(kHeaderChecksumKey));
  if (checksum == opened->metadata().end() || checksum->second != named.checksum) {
    throw FileError(where(path) + ": is not the file that the index " + where(path_) +
                    " was made of");
  }
  file = std::move(opened);
  return *file;
}

std::size_t StateFileReader::tensor_of_rank(std::size_t number, const std::string& name,
                                            std::uint64_t bytes) {
  const SafetensorsReader& file = file_of_rank(number);
  const auto found = file.find(name);
  if (found && bytes <= file.tensors()[*found].bytes()) return *found;
  refuse("tensor " + in_quotes(name) + " is missing or too short in " +
         in_quotes(index_.files[number].name));
}

std::vector<StateFileReader::Piece> StateFileReader::pieces(int parameter, const std::string& slot,
                                                            ByteRange range) {
  range.end = std::min(range.end, bytes(parameter, slot));
  if (!is_index_) {
    return {{&file_, tensor(parameter, slot), std::min(range.begin, range.end), range.end}};
  }
  const auto index = static_cast<std::size_t>(parameter);
  const ParameterDescription& described = description_.parameters[index];
  const std::uint64_t size = size_of(dtype_from_name(described.slots.at(slot).dtype, slot));
  const std::string name = escape_name(described.name) + "/" + escape_name(slot);
  std::vector<Piece> found;
  for (const TensorPart& part : parts_[index]) {
    const std::uint64_t first = static_cast<std::uint64_t>(part.first) * size;
    const std::uint64_t begin =
        std::max(range.begin, static_cast<std::uint64_t>(part.begin) * size);
    const std::uint64_t end = std::min(range.end, static_cast<std::uint64_t>(part.end) * size);
    if (begin >= end) continue;
    const std::size_t tensor = tensor_of_rank(part.file, name, end - first);
    found.push_back({files_[part.file].get(), tensor, begin - first, end - first});
  }
  return found;
}

void StateFileReader::read(int parameter, const std::string& slot, ByteRange range,
                           const TakePiece& take) {
  for (const Piece& piece : pieces(parameter, slot, range)) {
    std::uint64_t done = 0;
    piece.file->read_all(piece.tensor, [&](const void* data, std::size_t bytes) {
      const std::uint64_t begin = std::clamp(piece.begin, done, done + bytes);
      const std::uint64_t end = std::clamp(piece.end, done, done + bytes);
      if (begin < end) take(static_cast<const std::byte*>(data) + (begin - done), end - begin);
      done += bytes;
    });
  }
}

void StateFileReader::read_into(int parameter, const std::string& slot, ByteRange range, void* to) {
  auto* next = static_cast<std::byte*>(to);
  for (const Piece& piece : pieces(parameter, slot, range)) {
    piece.file->read_range(piece.tensor, piece.begin, piece.end, next);
    next += piece.end - piece.begin;
  }
}

void StateFileReader::verify(int parameter, const std::string& slot, ByteRange range) {
  for (const Piece& piece : pieces(parameter, slot, range)) piece.file->verify(piece.tensor);
}

// ---- writing ------------------------------------------------------------------------------------

StateFileWriter::StateFileWriter(const std::filesystem::path& path, const Description& description,
                                 const Metadata& metadata)
    : StateFileWriter(path, contents(description, metadata)) {}

StateFileWriter::StateFileWriter(const std::filesystem::path& path, Contents contents)
    : tensors_(std::move(contents.positions)),
      file_(path, std::move(contents.metadata), std::move(contents.tensors)) {}

StateFileWriter::Contents StateFileWriter::contents(const Description& description,
                                                    const Metadata& metadata) {
  check_names(description);
  Contents contents;
  contents.metadata = metadata;
  try {
    contents.metadata[kGroups] = to_json(description, false).dump();
  } catch (const Json::exception&) {
    throw InvalidArgument("settings in a file must be valid UTF-8");
  }
  for (std::size_t i = 0; i < description.parameters.size(); ++i) {
    const ParameterDescription& parameter = description.parameters[i];
    for (const auto& [slot, tensor] : parameter.slots) {
      const std::string name = escape_name(parameter.name) + "/" + escape_name(slot);
      contents.positions[{static_cast<int>(i), slot}] = contents.tensors.size();
      contents.tensors.push_back({name, file_dtype(tensor.dtype, name), tensor.shape, 0, 0});
    }
  }
  return contents;
}

void StateFileWriter::write(int parameter, const std::string& slot, const void* data,
                            std::size_t bytes) {
  file_.write(tensors_.at({parameter, slot}), data, bytes);
}

void write_index(const std::filesystem::path& path, const Description& description,
                 const RankIndex& index, const Metadata& metadata) {
  Metadata all = metadata;
  all[kGroups] = to_json(description, true).dump();
  all[kRanksKey] = to_json(index).dump();
  SafetensorsWriter(path, std::move(all), {}).commit();
}

void write_file(StateSource& source, const Metadata& more, const std::filesystem::path& path) {
  check_user_metadata(more);
  Metadata metadata = source.metadata();
  for (const auto& [key, value] : more) metadata[key] = value;
  const Description& description = source.description();
  StateFileWriter file(path, description, metadata);
  for (std::size_t i = 0; i < description.parameters.size(); ++i) {
    for (const auto& [slot, tensor] : description.parameters[i].slots) {
      const int parameter = static_cast<int>(i);
      source.read(parameter, slot, {}, [&, &name = slot](const void* data, std::size_t bytes) {
        file.write(parameter, name, data, bytes);
      });
    }
  }
  file.commit();
}

}  // namespace fusestep::detail
