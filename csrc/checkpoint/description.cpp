// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/description.h"

#include <charconv>
#include <cmath>
#include <set>

#include "fusestep/detail/hyper_fields.h"
#include "fusestep/error.h"

namespace fusestep::detail {
namespace {

constexpr int kMaxDepth = 64;

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
    if (!extent.is_number_integer() || extent.get<double>() < 0) {
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

Json to_json(const ParameterDescription& parameter, bool with_slots) {
  Json json = {
      {"name", parameter.name}, {"dtype", parameter.value.dtype}, {"shape", parameter.value.shape}};
  if (parameter.step) json["step"] = number_to_json(*parameter.step);
  if (parameter.frozen) json["frozen"] = true;
  if (with_slots) {
    Json& slots = json["slots"] = Json::object();
    for (const auto& [name, slot] : parameter.slots) slots[name] = tensor_to_json(slot);
  }
  json.update(parameter.unknown);
  return json;
}

ParameterDescription parameter_from_json(Json json, int group, const std::string& group_text) {
  if (!json.is_object()) throw InvalidArgument(group_text + ": a parameter must be an object");
  ParameterDescription parameter;
  parameter.group = group;
  parameter.name = text(take(json, "name"), group_text + ": a parameter's name");
  const std::string where = group_text + ", parameter '" + parameter.name + "'";
  parameter.value = {text(take(json, "dtype"), where + ": dtype"),
                     shape_from_json(take(json, "shape"), where + ": shape")};
  if (const Json step = take(json, "step"); !step.is_null()) {
    parameter.step = number_from_json(step, where + ": step");
    if (!(*parameter.step >= 0 && *parameter.step <= 0x1p62)) {
      throw InvalidArgument(where + ": step must be >= 0, got " + step.dump());
    }
  }
  if (const Json frozen = take(json, "frozen"); !frozen.is_null()) {
    parameter.frozen = as<bool>(frozen, where + ": frozen", "true or false");
  }
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
  parameter.slot_shape = parameter.value.shape;
  if (const Json shape = take(json, "slot_shape"); !shape.is_null()) {
    parameter.slot_shape = shape_from_json(shape, where + ": slot_shape");
  }
  parameter.unknown = std::move(json);
  return parameter;
}

std::string number_text(double number) {
  char digits[32];
  return {digits, std::to_chars(digits, digits + sizeof digits, number).ptr};
}

}  // namespace

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

Description description_from_json(const Json& json) {
  if (!json.is_array()) throw InvalidArgument("groups must be a list");
  Description description;
  std::set<std::string> names;
  for (Json group : json) {
    const int index = static_cast<int>(description.groups.size());
    std::string where = "group " + std::to_string(index);
    if (!group.is_object()) throw InvalidArgument(where + " must be an object");
    GroupDescription read;
    read.name = text(take(group, "name"), where + ": name");
    where = "group '" + read.name + "'";
    read.rule = text(take(group, "rule"), where + ": rule");
    read.hyper = take(group, "hyper");
    if (!read.hyper.is_object()) throw InvalidArgument(where + ": hyper must be an object");
    const Json params = take(group, "params");
    if (!params.is_array()) throw InvalidArgument(where + ": params must be a list");
    for (const Json& parameter : params) {
      description.parameters.push_back(parameter_from_json(parameter, index, where));
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

Hyper hyper_from_json(std::string_view rule, const Json& json) {
  Hyper hyper;
  if (!default_hyper(rule, hyper)) {
    throw InvalidArgument("there is no rule named '" + std::string(rule) + "'");
  }
  std::visit(
      [&](auto& settings) {
        for_each_field(settings, [&](const char* name, auto& field) {
          const auto found = json.find(name);
          if (found == json.end()) return;
          using Field = std::remove_cvref_t<decltype(field)>;
          if constexpr (std::is_same_v<Field, double>) {
            field = number_from_json(*found, name);
          } else if constexpr (std::is_same_v<Field, bool>) {
            field = as<bool>(*found, name, "true or false");
          } else {
            if (!found->is_array() || found->size() != 2) {
              throw InvalidArgument(std::string(name) + " must be two numbers, got " +
                                    found->dump());
            }
            for (std::size_t i = 0; i < 2; ++i) field[i] = number_from_json((*found)[i], name);
          }
        });
      },
      hyper);
  return hyper;
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
