// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What an optimizer or a file holds, apart from the numbers in its slots; and as JSON, which is how
// it stands in files and goes to and from Python.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fusestep/dtype.h"
#include "fusestep/hyper.h"
#include "fusestep/shard.h"

namespace fusestep::detail {

using Json = nlohmann::ordered_json;

/// What a schedule multiplies: it stands among a group's settings, as in torch.
inline constexpr const char* kInitialLr = "initial_lr";

struct TensorDescription {
  std::string dtype;  // torch's name: "float32", "complex64", ...
  std::vector<std::int64_t> shape;
};

struct ParameterDescription {
  std::string name;
  int group = 0;
  TensorDescription value;
  std::optional<Shard> shard;  // set: value and slots are a part of a tensor
  bool frozen = false;
  std::optional<std::int64_t> step;
  std::map<std::string, TensorDescription> slots;  // what there is; "value" where it was saved
  Json unknown = Json::object();                   // keys of a later version

  // Of an optimizer that state is to be loaded into:
  std::vector<std::string> slot_dtypes;  // what a slot of the rule may have
  bool master_weights = false;           // there may be a slot kMasterWeight, of float32
  std::vector<std::int64_t> slot_shape;  // value's, with a 2 at its end for complex ones
};

/// Of a tensor's elements in C order.
struct ElementRange {
  std::int64_t begin = 0, end = 0;
};
/// 0 for a shape that nothing has.
std::int64_t elements_of(const std::vector<std::int64_t>& shape);
/// Of the tensor that the parameter is, or is a part of.
const std::vector<std::int64_t>& whole_shape(const ParameterDescription& parameter);
/// What of it the description is about.
ElementRange range_of(const ParameterDescription& parameter);

struct GroupDescription {
  std::string name;
  std::string rule;  // "Adam", "AdamW", "SGD", "RMSprop"; empty where a file has no settings
  Json hyper = Json::object();
  Json unknown = Json::object();
};

/// Parameters stand in the order of their groups.
struct Description {
  std::vector<GroupDescription> groups;
  std::vector<ParameterDescription> parameters;
};

/// `with_slots`: in a file slots follow from its tensors.
Json to_json(const Description& description, bool with_slots);
/// Throws InvalidArgument that says where something is missing or of a wrong type. Without
/// `with_slots` what stands there of slots is as unknown as any other key.
Description description_from_json(Json json, bool with_slots = true);

/// Doubles JSON has no number for are {"float": "inf"}.
Json to_json(const Hyper& hyper);
/// Known settings of a rule; others in `json` are passed over, missing ones have their default.
/// Throws InvalidArgument, beginning with `where`.
Hyper hyper_from_json(std::string_view rule, const Json& json, const std::string& where);
std::optional<double> initial_lr_from_json(const Json& hyper, const std::string& where);
/// The rule's name without its variants: AdamW is Adam.
std::string_view canonical_rule(std::string_view rule);

Json number_to_json(double number);
/// Of a number, {"float": "inf"}, or a tensor of one element as Python writes it.
double number_from_json(const Json& json, const std::string& where);

/// A number of steps: whole and not negative.
std::int64_t step_from_number(double number, const std::string& where);

/// Of "float32" and so on. Throws InvalidArgument for what an optimizer's slots never are.
DType dtype_from_name(const std::string& name, const std::string& where);
/// Throws InvalidArgument for shapes that nothing has.
std::size_t bytes_of(DType dtype, const std::vector<std::int64_t>& shape, const std::string& where);

/// Text that is refused where it is not JSON, nests too deeply or has a key twice. Throws
/// InvalidArgument, beginning with `what`.
Json parse_json(std::string_view text, const std::string& what);

}  // namespace fusestep::detail
