// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/ranks.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <optional>
#include <set>
#include <string_view>

#include "at.h"
#include "checkpoint/state_file.h"
#include "files/atomic_file.h"
#include "files/header.h"
#include "fusestep/error.h"
#include "fusestep/tensor_view.h"

namespace fusestep {
namespace detail {
namespace {

constexpr std::string_view kExtension = ".safetensors";

/// What the names of all files of a checkpoint begin with.
std::string stem_of(const std::filesystem::path& path) {
  const std::string name = path.filename().string();
  return name.ends_with(kExtension) ? name.substr(0, name.size() - kExtension.size()) : name;
}

void check(const SaveRank& rank) {
  if (rank.world >= 1 && rank.rank >= 0 && rank.rank < rank.world && rank.generation >= 0) return;
  throw InvalidArgument("rank " + std::to_string(rank.rank) + " of " + std::to_string(rank.world) +
                        ", generation " + std::to_string(rank.generation) +
                        ": expected 0 <= rank < world, and a generation >= 0");
}

/// A number at the start of the text, which is taken off; digits as we write them.
std::optional<std::int64_t> take_number(std::string_view& text) {
  std::int64_t number = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const auto digits = static_cast<std::size_t>(stop - text.data());
  const bool leading_zero = digits > 1 && text.front() == '0';
  if (error != std::errc() || number < 0 || text.front() == '-' || leading_zero) return {};
  text.remove_prefix(digits);
  return number;
}

bool take_text(std::string_view& text, std::string_view expected) {
  if (!text.starts_with(expected)) return false;
  text.remove_prefix(expected.size());
  return true;
}

/// What rank_file() made this name of.
std::optional<SaveRank> rank_of(std::string_view name, std::string_view stem) {
  if (!take_text(name, stem) || !take_text(name, ".")) return {};
  const auto generation = take_number(name);
  if (!generation || !take_text(name, ".")) return {};
  const auto rank = take_number(name);
  if (!rank || !take_text(name, "-of-")) return {};
  const auto world = take_number(name);
  if (!world || name != kExtension) return {};
  constexpr std::int64_t most = std::numeric_limits<int>::max();
  if (*world > most || *rank >= *world) return {};
  return SaveRank{static_cast<int>(*rank), static_cast<int>(*world), *generation};
}

std::string name_of(const std::filesystem::path& file) {
  return in_quotes(file.filename().string());
}

/// The state that the files of all ranks have together.
class Merge {
 public:
  void add(const StateFileReader& file, const std::filesystem::path& path) {
    names_.push_back(name_of(path));
    const Description& description = file.description();
    std::vector<int> groups;
    for (const GroupDescription& group : description.groups) groups.push_back(group_of(group));
    for (const ParameterDescription& parameter : description.parameters) {
      add(parameter, at(groups, parameter.group));
    }
  }

  Description finish() {
    for (Whole& whole : parameters_) whole.description.unknown[kPartsKey] = cover(whole);
    // Parameters stand in the order of their groups.
    std::stable_sort(parameters_.begin(), parameters_.end(), [](const Whole& a, const Whole& b) {
      return a.description.group < b.description.group;
    });
    for (Whole& whole : parameters_) {
      description_.parameters.push_back(std::move(whole.description));
    }
    return std::move(description_);
  }

 private:
  struct Piece {
    std::size_t file;
    std::int64_t begin, end;
  };
  struct Whole {
    ParameterDescription description;
    bool has_elements;  // of what it was described by
    std::size_t file;   // that did
    std::vector<Piece> pieces;
  };

  [[noreturn]] void refuse(const std::string& what, const std::string& one, std::size_t one_file,
                           const std::string& other, std::size_t other_file) const {
    throw InvalidArgument("the files of the ranks are not parts of one state: " + what + " is " +
                          one + " in " + names_[one_file] + ", and " + other + " in " +
                          names_[other_file]);
  }

  int group_of(const GroupDescription& group) {
    const std::size_t file = names_.size() - 1;
    for (std::size_t i = 0; i < description_.groups.size(); ++i) {
      const GroupDescription& known = description_.groups[i];
      if (known.name != group.name) continue;
      const std::string what = "group '" + group.name + "'";
      const auto text = [](const GroupDescription& g) { return g.rule + " " + g.hyper.dump(); };
      if (text(known) != text(group)) {
        refuse(what, text(known), group_files_[i], text(group), file);
      }
      return static_cast<int>(i);
    }
    description_.groups.push_back(group);
    group_files_.push_back(file);
    return static_cast<int>(description_.groups.size()) - 1;
  }

  void add(const ParameterDescription& given, int group) {
    const std::size_t file = names_.size() - 1;
    ParameterDescription whole = given;
    whole.group = group;
    whole.value.shape = whole.slot_shape = whole_shape(given);
    whole.shard = {};
    for (auto& [name, slot] : whole.slots) {
      if (slot.shape != given.value.shape) {
        throw InvalidArgument("file " + names_.back() + ", parameter '" + given.name + "': slot '" +
                              name + "' has shape " + to_string(slot.shape) + ", the value " +
                              to_string(given.value.shape));
      }
      slot.shape = whole.value.shape;
    }
    const ElementRange range = range_of(given);
    const bool has_elements = range.begin < range.end;
    const auto [found, is_new] = places_.emplace(given.name, parameters_.size());
    if (is_new) parameters_.push_back({whole, has_elements, file, {}});
    Whole& known = parameters_[found->second];
    if (!is_new) agree(known, whole, has_elements, file);
    if (has_elements) known.pieces.push_back({file, range.begin, range.end});
  }

  /// A rank that has no elements of a parameter may know nothing of its steps and slots.
  void agree(Whole& known, const ParameterDescription& given, bool has_elements, std::size_t file) {
    const std::string what = "parameter '" + given.name + "': its ";
    const auto same = [&](const std::string& property, const std::string& one,
                          const std::string& other) {
      if (one != other) refuse(what + property, one, known.file, other, file);
    };
    const ParameterDescription& one = known.description;
    same("group", at(description_.groups, one.group).name,
         at(description_.groups, given.group).name);
    same("dtype", one.value.dtype, given.value.dtype);
    same("whole shape", to_string(one.value.shape), to_string(given.value.shape));
    if (known.has_elements && has_elements) {
      same("step count", std::to_string(one.step.value_or(0)),
           std::to_string(given.step.value_or(0)));
      same("frozen flag", one.frozen ? "set" : "not set", given.frozen ? "set" : "not set");
      same("state", slots_text(one), slots_text(given));
    } else if (has_elements) {
      known.description = given;
      known.has_elements = true;
      known.file = file;
    }
  }

  static std::string slots_text(const ParameterDescription& parameter) {
    std::string text;
    for (const auto& [name, slot] : parameter.slots) {
      text += (text.empty() ? "" : ", ") + name + " of " + slot.dtype;
    }
    return text.empty() ? "none" : text;
  }

  /// Parts that have every element once, in order. What several ranks have is taken from the first
  /// that goes furthest.
  Json cover(Whole& whole) const {
    std::vector<Piece>& pieces = whole.pieces;
    std::stable_sort(pieces.begin(), pieces.end(),
                     [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
    const std::int64_t elements = elements_of(whole.description.value.shape);
    Json parts = Json::array();
    std::size_t next = 0;
    for (std::int64_t done = 0; done < elements;) {
      const Piece* best = nullptr;
      for (; next < pieces.size() && pieces[next].begin <= done; ++next) {
        if (best == nullptr || pieces[next].end > best->end) best = &pieces[next];
      }
      if (best == nullptr || best->end <= done) {
        throw InvalidArgument("the files of the ranks have not all of parameter '" +
                              whole.description.name + "' of shape " +
                              to_string(whole.description.value.shape) + ": element " +
                              std::to_string(done) + " is in none");
      }
      parts.push_back({best->file, best->begin, done, best->end});
      done = best->end;
    }
    return parts;
  }

  Description description_;
  std::vector<std::size_t> group_files_;
  std::vector<std::string> names_;  // of files
  std::vector<Whole> parameters_;
  std::map<std::string, std::size_t> places_;
};

/// The generation of the index that is there; nothing where there is none that can be read.
std::optional<std::int64_t> committed_generation(const std::filesystem::path& path) {
  try {
    const SafetensorsReader file(path);
    const auto found = file.metadata().find(kRanksKey);
    if (found == file.metadata().end()) return {};
    return rank_index_from_json(parse_json(found->second, kRanksKey)).generation;
  } catch (const Error&) {
    return {};
  }
}

void remove_older(const std::filesystem::path& path, int world, std::int64_t generation) {
  const std::string stem = stem_of(path);
  remove_files(path, [&](std::string_view name) {
    const std::optional<SaveRank> rank = rank_of(name, stem);
    return rank && (rank->generation < generation ||
                    (rank->generation == generation && rank->world != world));
  });
}

}  // namespace

Json to_json(const RankIndex& index) {
  Json files = Json::array();
  for (const RankFile& file : index.files) {
    files.push_back({{"name", file.name}, {"header_crc32c", file.checksum}});
  }
  return {{"generation", index.generation}, {"files", files}};
}

RankIndex rank_index_from_json(const Json& json) {
  RankIndex index;
  try {
    index.generation = json.at("generation").get<std::int64_t>();
    for (const Json& file : json.at("files")) {
      index.files.push_back(
          {file.at("name").get<std::string>(), file.at("header_crc32c").get<std::string>()});
    }
  } catch (const Json::exception& error) {
    throw InvalidArgument(std::string(kRanksKey) + ": " + error.what());
  }
  for (const RankFile& file : index.files) {
    // It stands beside the index, wherever that is.
    const bool is_name = std::filesystem::path(file.name).filename() == file.name;
    if (is_name && !file.name.empty() && file.name != "." && file.name != "..") continue;
    throw InvalidArgument(std::string(kRanksKey) + ": " + in_quotes(file.name) + " is no name");
  }
  return index;
}

std::vector<TensorPart> parts_from_json(const Json& json, std::size_t files, std::int64_t elements,
                                        const std::string& where) {
  std::vector<TensorPart> parts;
  std::int64_t done = 0;
  bool good = json.is_array();
  for (std::size_t i = 0; good && i < json.size(); ++i) {
    const Json& part = json[i];
    good = part.is_array() && part.size() == 4 &&
           std::all_of(part.begin(), part.end(), [](const Json& number) {
             return number.is_number_unsigned() ||
                    (number.is_number_integer() && number.get<std::int64_t>() >= 0);
           });
    if (!good) break;
    const TensorPart read{part[0].get<std::size_t>(), part[1].get<std::int64_t>(),
                          part[2].get<std::int64_t>(), part[3].get<std::int64_t>()};
    good = read.file < files && read.first >= 0 && read.first <= read.begin && read.begin == done &&
           read.end > read.begin;
    done = read.end;
    parts.push_back(read);
  }
  if (good && done == elements) return parts;
  throw InvalidArgument(where +
                        ": parts must be [file, first, begin, end] of every element once, " +
                        "got " + json.dump());
}

std::filesystem::path file_to_save(const std::filesystem::path& path, const SaveRank& rank) {
  check(rank);
  if (committed_generation(path) == rank.generation) {
    throw InvalidArgument("generation " + std::to_string(rank.generation) +
                          " is the checkpoint that is there, " + where(path) +
                          ": its files must stay until the next one is complete");
  }
  return rank_file(path, rank);
}

}  // namespace detail

std::filesystem::path rank_file(const std::filesystem::path& path, const SaveRank& rank) {
  detail::check(rank);
  std::filesystem::path file = path;
  file.replace_filename(detail::stem_of(path) + "." + std::to_string(rank.generation) + "." +
                        std::to_string(rank.rank) + "-of-" + std::to_string(rank.world) +
                        std::string(detail::kExtension));
  return file;
}

void commit_ranks(const std::filesystem::path& path, int world, std::int64_t generation) {
  using namespace detail;
  with_host_memory([&] {
    RankIndex index;
    index.generation = generation;
    Merge merge;
    Metadata metadata;
    for (int rank = 0; rank < std::max(world, 1); ++rank) {
      const std::filesystem::path name = rank_file(path, {rank, world, generation});
      const StateFileReader file(name);
      merge.add(file, name);
      if (rank == 0) metadata = file.metadata();
      index.files.push_back({name.filename().string(), file.header_checksum()});
    }
    write_index(path, merge.finish(), index, metadata);
    remove_older(path, world, generation);
  });
}

}  // namespace fusestep
