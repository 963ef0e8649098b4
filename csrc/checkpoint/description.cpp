// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/description.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <set>

#include "fusestep/detail/hyper_fields.h"
#include "fusestep/error.h"
#include "fusestep/tensor_view.h"

namespace fusestep::detail {
namespace {

constexpr int kMaxDepth = 64;
/// Up to here a double tells one number of steps from the next.
constexpr std::int64_t kMaxDoubleStep = std::int64_t{1} << 53;

/// A member of an object, taken out of it so that what is unknown remains.
Json take(Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) return nullptr;
  Json value = std::move(*found);
  object.erase(found);
  return value;
}

template <class T>
T as(const Json& value, const std::string& where, const char* expected) {
  try {
    return value.get<T>();
  } catch (const Json::exception&) {
    throw InvalidArgument(where + " must be " + expected + ", got " + value.dump());
  }
}

std::string text(const Json& value, const std::string& where) {
  return as<std::string>(value, where, "a string");
}

std::vector<std::int64_t> shape_from_json(const Json& value, const std::string& where) {
  if (!value.is_array()) throw InvalidArgument(where + " must be a list of extents");
  std::vector<std::int64_t> shape;
  for (const Json& extent : value) {
    // One that is too large for its type comes out negative.
    if (!extent.is_number_integer() || extent.get<std::int64_t>() < 0) {
      throw InvalidArgument(where + " must be a list of extents, got " + value.dump());
    }
    shape.push_back(extent.get<std::int64_t>());
  }
  return shape;
}

TensorDescription tensor_from_json(const Json& json, const std::string& where) {
  if (!json.is_object()) throw InvalidArgument(where + " must be an object");
  return {text(json.value("dtype", Json()), where + ": dtype"),
          shape_from_json(json.value("shape", Json()), where + ": shape")};
}

Json tensor_to_json(const TensorDescription& tensor) {
  return {{"dtype", tensor.dtype}, {"shape", tensor.shape}};
}

/// As a float where that is exact: so frameworks keep it.
Json step_to_json(std::int64_t step) {
  if (step <= kMaxDoubleStep) return static_cast<double>(step);
  return step;
}

std::int64_t step_from_json(const Json& json, const std::string& where) {
  if (json.is_number_integer() && json.get<std::int64_t>() >= 0) return json.get<std::int64_t>();
  return step_from_number(number_from_json(json, where), where);
}

constexpr const char* kShard = "shard";

Json to_json(const Shard& shard) {
  return {{"offset", shard.offset}, {"whole_shape", shard.whole_shape}};
}

Shard shard_from_json(const Json& json, const std::vector<std::int64_t>& shape,
                      const std::string& where) {
  if (!json.is_object()) throw InvalidArgument(where + " must be an object");
  const Shard shard{as<std::int64_t>(json.value("offset", Json()), where + ": offset", "a number"),
                    shape_from_json(json.value("whole_shape", Json()), where + ": whole_shape")};
  const std::int64_t whole = elements_of(shard.whole_shape), here = elements_of(shape);
  if (shard.offset >= 0 && here <= whole && shard.offset <= whole - here) return shard;
  throw InvalidArgument(where + ": " + std::to_string(here) + " elements at " +
                        std::to_string(shard.offset) + " are not within a tensor of shape " +
                        to_string(shard.whole_shape));
}

Json to_json(const ParameterDescription& parameter, bool with_slots) {
  Json json = {
      {"name", parameter.name}, {"dtype", parameter.value.dtype}, {"shape", parameter.value.shape}};
  if (parameter.shard) json[kShard] = to_json(*parameter.shard);
  if (parameter.step) json["step"] = step_to_json(*parameter.step);
  if (parameter.frozen) json["frozen"] = true;
  if (with_slots) {
    Json& slots = json["slots"] = Json::object();
    for (const auto& [name, slot] : parameter.slots) slots[name] = tensor_to_json(slot);
  }
  for (const auto& [key, value] : parameter.unknown.items()) {
    if (!json.contains(key)) json[key] = value;
  }
  return json;
}

/// What describes the slots themselves: not in files.
void read_slots(Json& json, const std::string& where, ParameterDescription& parameter) {
  if (const Json slots = take(json, "slots"); !slots.is_null()) {
    if (!slots.is_object()) throw InvalidArgument(where + ": slots must be an object");
    for (const auto& [name, slot] : slots.items()) {
      parameter.slots[name] = tensor_from_json(slot, where + ", slot '" + name + "'");
    }
  }
  if (const Json dtypes = take(json, "slot_dtypes"); !dtypes.is_null()) {
    parameter.slot_dtypes =
        as<std::vector<std::string>>(dtypes, where + ": slot_dtypes", "a list of names");
  }
  if (const Json master = take(json, "master_weights"); !master.is_null()) {
    parameter.master_weights = as<bool>(master, where + ": master_weights", "true or false");
  }
  if (const Json shape = take(json, "slot_shape"); !shape.is_null()) {
    parameter.slot_shape = shape_from_json(shape, where + ": slot_shape");
  }
}

ParameterDescription parameter_from_json(Json json, int group, const std::string& group_text,
                                         bool with_slots) {
  if (!json.is_object()) throw InvalidArgument(group_text + ": a parameter must be an object");
  ParameterDescription parameter;
  parameter.group = group;
  parameter.name = text(take(json, "name"), group_text + ": a parameter's name");
  const std::string where = group_text + ", parameter '" + parameter.name + "'";
  parameter.value = {text(take(json, "dtype"), where + ": dtype"),
                     shape_from_json(take(json, "shape"), where + ": shape")};
  if (const Json shard = take(json, kShard); !shard.is_null()) {
    parameter.shard = shard_from_json(shard, parameter.value.shape, where + ": shard");
  }
  if (const Json step = take(json, "step"); !step.is_null()) {
    parameter.step = step_from_json(step, where + ": step");
  }
  if (const Json frozen = take(json, "frozen"); !frozen.is_null()) {
    parameter.frozen = as<bool>(frozen, where + ": frozen", "true or false");
  }
  parameter.slot_shape = parameter.value.shape;
  if (with_slots) read_slots(json, where, parameter);
  parameter.unknown = std::move(json);
  return parameter;
}

std::string number_text(double number) {
  char digits[32];
  return {digits, std::to_chars(digits, digits + sizeof digits, number).ptr};
}

}  // namespace

std::int64_t elements_of(const std::vector<std::int64_t>& shape) {
  std::int64_t elements = 1;
  for (const std::int64_t extent : shape) {
    if (extent < 0 ||
        (extent != 0 && elements > std::numeric_limits<std::int64_t>::max() / 16 / extent)) {
      return 0;
    }
    elements *= extent;
  }
  return elements;
}

const std::vector<std::int64_t>& whole_shape(const ParameterDescription& parameter) {
  return parameter.shard ? parameter.shard->whole_shape : parameter.value.shape;
}

ElementRange range_of(const ParameterDescription& parameter) {
  const std::int64_t begin = parameter.shard ? parameter.shard->offset : 0;
  return {begin, begin + elements_of(parameter.value.shape)};
}

Json to_json(const Description& description, bool with_slots) {
  Json groups = Json::array();
  for (const GroupDescription& group : description.groups) {
    Json json = {{"name", group.name}, {"rule", group.rule}, {"hyper", group.hyper}};
    json.update(group.unknown);
    json["params"] = Json::array();
    groups.push_back(std::move(json));
  }
  for (const ParameterDescription& parameter : description.parameters) {
    groups.at(static_cast<std::size_t>(parameter.group))["params"].push_back(
        to_json(parameter, with_slots));
  }
  return groups;
}

Description description_from_json(Json json, bool with_slots) {
  if (!json.is_array()) throw InvalidArgument("groups must be a list");
  Description description;
  std::set<std::string> names;
  for (Json& group : json) {
    const int index = static_cast<int>(description.groups.size());
    std::string where = "group " + std::to_string(index);
    if (!group.is_object()) throw InvalidArgument(where + " must be an object");
    GroupDescription read;
    read.name = text(take(group, "name"), where + ": name");
    where = "group '" + read.name + "'";
    read.rule = text(take(group, "rule"), where + ": rule");
    read.hyper = take(group, "hyper");
    if (!read.hyper.is_object()) throw InvalidArgument(where + ": hyper must be an object");
    Json params = take(group, "params");
    if (!params.is_array()) throw InvalidArgument(where + ": params must be a list");
    for (Json& parameter : params) {
      description.parameters.push_back(
          parameter_from_json(std::move(parameter), index, where, with_slots));
      if (names.insert(description.parameters.back().name).second) continue;
      throw InvalidArgument(where + ": there are two parameters named '" +
                            description.parameters.back().name + "'");
    }
    read.unknown = std::move(group);
    description.groups.push_back(std::move(read));
  }
  return description;
}

Json number_to_json(double number) {
  if (std::isfinite(number)) return number;
  return {{"float", number_text(number)}};
}

double number_from_json(const Json& json, const std::string& where) {
  if (json.is_number()) return json.get<double>();
  if (json.is_object() && json.contains("float") && json["float"].is_string()) {
    const auto& digits = json["float"].get_ref<const std::string&>();
    double number = 0;
    const auto end = digits.data() + digits.size();
    const auto [stop, error] = std::from_chars(digits.data(), end, number);
    if (error == std::errc() && stop == end) return number;
  }
  if (json.is_object() && json.contains("tensor") && json.contains("value")) {
    const Json* value = &json["value"];
    while (value->is_array() && value->size() == 1) value = &value->front();
    if (!value->is_array()) return number_from_json(*value, where);
  }
  throw InvalidArgument(where + " must be a number, got " + json.dump());
}

std::int64_t step_from_number(double number, const std::string& where) {
  if (number >= 0 && number <= static_cast<double>(kMaxDoubleStep) &&
      number == std::trunc(number)) {
    return static_cast<std::int64_t>(number);
  }
  throw InvalidArgument(where + " must be a whole number >= 0, got " + number_text(number));
}

DType dtype_from_name(const std::string& name, const std::string& where) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw InvalidArgument(where + ": has dtype " + (name.empty() ? "none" : name) +
                        ", expected float32, float64, bfloat16 or float16");
}

std::size_t bytes_of(DType dtype, const std::vector<std::int64_t>& shape,
                     const std::string& where) {
  std::int64_t elements = 1;
  for (const std::int64_t extent : shape) {
    const bool fits =
        extent == 0 ||
        (extent > 0 && elements <= std::numeric_limits<std::int64_t>::max() / 8 / extent);
    if (!fits) throw InvalidArgument(where + ": no tensor has the shape " + to_string(shape));
    elements *= extent;
  }
  return static_cast<std::size_t>(elements) * size_of(dtype);
}

Json to_json(const Hyper& hyper) {
  Json json = Json::object();
  std::visit(
      [&](const auto& settings) {
        for_each_field(settings, [&](const char* name, const auto& field) {
          using Field = std::remove_cvref_t<decltype(field)>;
          if constexpr (std::is_same_v<Field, double>) {
            json[name] = number_to_json(field);
          } else if constexpr (std::is_same_v<Field, bool>) {
            json[name] = field;
          } else {
            json[name] = {number_to_json(field[0]), number_to_json(field[1])};
          }
        });
      },
      hyper);
  return json;
}

Hyper hyper_from_json(std::string_view rule, const Json& json, const std::string& where) {
  Hyper hyper;
  if (!default_hyper(rule, hyper)) {
    throw InvalidArgument(where + ": there is no rule named '" + std::string(rule) + "'");
  }
  std::visit(
      [&](auto& settings) {
        for_each_field(settings, [&](const char* name, auto& field) {
          const auto found = json.find(name);
          if (found == json.end()) return;
          using Field = std::remove_cvref_t<decltype(field)>;
          const std::string text = where + ": " + name;
          if constexpr (std::is_same_v<Field, double>) {
            field = number_from_json(*found, text);
          } else if constexpr (std::is_same_v<Field, bool>) {
            field = as<bool>(*found, text, "true or false");
          } else {
            if (!found->is_array() || found->size() != 2) {
              throw InvalidArgument(text + " must be two numbers, got " + found->dump());
            }
            for (std::size_t i = 0; i < 2; ++i) field[i] = number_from_json((*found)[i], text);
          }
        });
      },
      hyper);
  return hyper;
}

std::optional<double> initial_lr_from_json(const Json& hyper, const std::string& where) {
  const auto found = hyper.find(kInitialLr);
  if (found == hyper.end()) return {};
  const double lr = number_from_json(*found, where + ": " + kInitialLr);
  if (lr >= 0) return lr;
  throw InvalidArgument(where + ": " + kInitialLr + " must be >= 0, got " + number_text(lr));
}

std::string_view canonical_rule(std::string_view rule) {
  return rule == "AdamW" ? AdamHyper::kRule : rule;
}

Json parse_json(std::string_view source, const std::string& what) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxDepth) throw InvalidArgument(what + " nests too deeply");
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key &&
        !keys.back().insert(parsed.get_ref<const std::string&>()).second) {
      throw InvalidArgument(what + " has the key " + parsed.dump() + " twice");
    }
    return true;
  };
  try {
    return Json::parse(source, check);
  } catch (const Json::exception& error) {
    throw InvalidArgument(what + " is not JSON: " + error.what());
  }
}

}  // namespace fusestep::detail
