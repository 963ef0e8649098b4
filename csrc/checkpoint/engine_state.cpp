// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/engine_state.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "cpu/fp_environment.h"
#include "fusestep/detail/convert.h"
#include "fusestep/detail/hyper_fields.h"
#include "fusestep/detail/rule_list.h"

namespace fusestep::detail {
namespace {

constexpr const char* kValue = "value";
constexpr const char* kMomentumBuffer = "momentum_buffer";

TensorDescription describe_tensor(DType dtype, const TensorView& value) {
  return {std::string(name_of(dtype)), value.shape};
}

/// What is in `kept` of a group: keys beside ours in it, and in its hyper.
constexpr const char* kHyper = "hyper";

Json kept_json(const std::string& kept) {
  return kept.empty() ? Json::object() : Json::parse(kept);
}

std::string kept_text(const Json& kept) { return kept.empty() ? "" : kept.dump(); }

/// Settings of a file that no rule here knows, such as those of a framework.
Json unknown_settings(const GroupDescription& group, const Hyper& known) {
  Json unknown = group.hyper;
  unknown.erase(kInitialLr);
  std::visit(
      [&](const auto& settings) {
        for_each_field(settings, [&](const char* name, const auto&) { unknown.erase(name); });
      },
      known);
  return unknown;
}

/// Calls visit with a zero of the C++ type.
template <class Visit>
void with_type(DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(float{});
    case DType::kFloat64: return visit(double{});
    case DType::kBFloat16: return visit(bfloat16{});
    case DType::kFloat16: return visit(float16{});
  }
}

/// To nearest, through float32 where the target is narrower. Neither side need be aligned.
template <class From, class To>
void convert(const void* data, std::size_t count, std::byte* converted) {
  using Real =
      std::conditional_t<std::is_same_v<From, double> && std::is_same_v<To, double>, double, float>;
  const auto* from = static_cast<const std::byte*>(data);
  for (std::size_t i = 0; i < count; ++i) {
    From element;
    std::memcpy(&element, from + i * sizeof element, sizeof element);
    const To stored = store_as<To>(load_as<Real>(element));
    std::memcpy(converted + i * sizeof stored, &stored, sizeof stored);
  }
}

void convert(const void* data, std::size_t bytes, DType from, DType to, std::byte* converted) {
  with_type(from, [&]<class From>(From) {
    with_type(to, [&]<class To>(To) { convert<From, To>(data, bytes / sizeof(From), converted); });
  });
}

/// Our own text for it, which lives for ever.
std::string_view slot_name(const std::string& name) {
  std::string_view found = kMasterWeight;
  for (int rule = 0; rule < kRules; ++rule) {
    for (const std::string_view slot : rule_info(rule).slots) {
      if (slot == name) found = slot;
    }
  }
  return found;
}

/// The bytes, of what was saved of a parameter, that are here.
ByteRange range_wanted(const ParameterDescription& from, const ParameterRecord& to, DType dtype) {
  if (!from.shard && !to.shard) return {};
  const std::int64_t offset = (to.shard ? to.shard->offset : 0) - range_of(from).begin;
  if (to.size == 0) return {0, 0};
  const std::uint64_t size = size_of(dtype);
  return {static_cast<std::uint64_t>(offset) * size,
          static_cast<std::uint64_t>(offset + to.size) * size};
}

}  // namespace

// ---- saving -------------------------------------------------------------------------------------

EngineSource::EngineSource(Engine& engine, bool values, std::span<const Stream> streams)
    : engine_(engine), streams_(streams) {
  engine_.begin_outside_captures("state_dict(), save() or load()", streams);
  for (const GroupRecord& group : engine_.groups_) description_.groups.push_back(describe(group));
  for (int i = 0; i < static_cast<int>(engine_.parameters_.size()); ++i) {
    description_.parameters.push_back(describe(i, values));
  }
}

EngineSource::~EngineSource() {
  for (const auto& device : engine_.devices_) device->backend->end_reading();
}

GroupDescription EngineSource::describe(const GroupRecord& group) {
  GroupDescription description;
  description.name = group.name;
  description.rule = rule_name(group.hyper);
  Hyper hyper = group.hyper;
  std::visit([&](auto& settings) { settings.lr = learning_rate_now(group); }, hyper);
  description.hyper = to_json(hyper);
  if (group.initial_lr) description.hyper[kInitialLr] = number_to_json(*group.initial_lr);
  description.unknown = kept_json(group.kept);
  if (const auto kept = description.unknown.find(kHyper); kept != description.unknown.end()) {
    description.hyper.update(*kept);
    description.unknown.erase(kept);
  }
  return description;
}

double EngineSource::learning_rate_now(const GroupRecord& group) {
  const TensorView& source = group.lr_source;
  if (!source.present) return learning_rate(group.hyper);
  double lr = 0;
  const auto first = static_cast<std::size_t>(group.parameters.front());
  Backend& backend = *engine_.device_of(engine_.parameters_[first]).backend;
  engine_.on_device([&] {
    lr = backend.read_scalar(source.data, source.dtype == DType::kFloat64,
                             stream_of(streams_, source.device));
  });
  return lr;
}

ParameterDescription EngineSource::describe(int index, bool value) {
  const ParameterRecord& record = at(engine_.parameters_, index);
  const GroupRecord& group = at(engine_.groups_, record.group);
  const StepState state = engine_.read_state(index);
  ParameterDescription description;
  description.name = record.name;
  description.group = record.group;
  description.value = describe_tensor(record.value.dtype, record.value);
  description.shard = record.shard;
  description.frozen = record.frozen;
  description.step = state.step;
  // One that no step has filled yet is none, as in torch.
  const bool counts_filling = std::holds_alternative<SgdHyper>(group.hyper);
  for (const Slot& slot : record.slots) {
    if (counts_filling && slot.name == kMomentumBuffer && state.buffer_filled == 0) continue;
    description.slots[std::string(slot.name)] = describe_tensor(slot.dtype, record.value);
  }
  if (value) description.slots[kValue] = description.value;
  description.unknown = kept_json(record.kept);
  description.slot_dtypes = {std::string(name_of(slot_dtype(group.options, record.value.dtype)))};
  description.master_weights = has_master(group.options, record.value.dtype);
  description.slot_shape = record.value.shape;
  return description;
}

void EngineSource::read(int index, const std::string& name, ByteRange range,
                        const TakePiece& take) {
  const ParameterRecord& record = at(engine_.parameters_, index);
  const TensorView memory = name == kValue ? record.value : engine_.slot(index, name);
  Backend& backend = *engine_.device_of(record).backend;
  const auto* data = static_cast<const std::byte*>(memory.data);
  const std::uint64_t end = std::min<std::uint64_t>(range.end, memory.bytes());
  for (std::uint64_t done = range.begin; done < end; done += kPieceBytes) {
    const std::size_t bytes = std::min<std::uint64_t>(kPieceBytes, end - done);
    const void* piece = nullptr;
    engine_.on_device(
        [&] { piece = backend.read(data + done, bytes, stream_of(streams_, memory.device)); });
    take(piece, bytes);
  }
}

// ---- loading ------------------------------------------------------------------------------------

LoadReport EngineLoader::load(StateSource& source, bool by_position) {
  const DefaultFpEnvironment environment;
  const Description saved = renamed(source.description());
  Match matched = match_or_refuse(source, saved, by_position);
  if (options_.strict && !matched.report.complete()) throw LoadError(std::move(matched.report));

  Metadata metadata = source.metadata();
  read_parameters(saved, matched.parameters);
  list_transfers(saved, matched.parameters);
  verify_what_is_overwritten(source);
  make_room_and_transfer(source);
  commit(metadata);
  bring_to_graphs();
  return std::move(matched.report);
}

/// What the source says and makes no sense is refused as the source does it.
Match EngineLoader::match_or_refuse(const StateSource& source, const Description& saved,
                                    bool by_position) {
  const EngineSource here(engine_, false, options_.streams);
  Match matched;
  try {
    matched = match(saved, here.description(),
                    {options_.what, options_.convert, options_.values, false, by_position});
    if (options_.what != LoadWhat::kState) read_settings(saved, matched.settings);
  } catch (const InvalidArgument& error) {
    source.refuse(error.what());
  }
  matched.report.metadata = source.metadata();
  for (LoadReport::HyperDifference& difference : matched.report.hyper) {
    const GroupRecord& group = at(engine_.groups_, engine_.find_group(difference.group));
    // The rate is still read from the caller's memory.
    if (difference.key == "lr" && group.lr_source.present) difference.taken = false;
  }
  return matched;
}

Description EngineLoader::renamed(const Description& saved) const {
  Description result = saved;
  if (!options_.rename) return result;
  std::set<std::string> names;
  for (ParameterDescription& parameter : result.parameters) {
    std::string name = options_.rename(parameter.name);
    if (!names.insert(name).second) {
      throw InvalidArgument("rename: there are two parameters named '" + name + "', one of them '" +
                            parameter.name + "'");
    }
    parameter.name = std::move(name);
  }
  return result;
}

void EngineLoader::read_settings(const Description& saved, const std::vector<int>& sources) {
  for (std::size_t i = 0; i < sources.size(); ++i) {
    if (sources[i] < 0) continue;
    const GroupDescription& from = at(saved.groups, sources[i]);
    const GroupRecord& group = engine_.groups_[i];
    const std::string where = "settings saved of group '" + from.name + "'";
    Settings settings{static_cast<int>(i),
                      hyper_from_json(from.rule, from.hyper, where),
                      initial_lr_from_json(from.hyper, where),
                      {}};
    validate(settings.hyper, where);
    if (!settings.initial_lr) settings.initial_lr = group.initial_lr;
    Json kept = from.unknown;
    if (Json unknown = unknown_settings(from, settings.hyper); !unknown.empty()) {
      kept[kHyper] = std::move(unknown);
    }
    settings.kept = kept_text(kept);
    settings_.push_back(std::move(settings));
  }
}

void EngineLoader::read_parameters(const Description& saved,
                                   const std::vector<Match::Pair>& pairs) {
  given_states_.resize(engine_.devices_.size());
  for (const Match::Pair& pair : pairs) {
    const ParameterDescription& from = at(saved.parameters, pair.saved);
    const bool has_settings = !at(saved.groups, from.group).rule.empty();
    const bool takes_frozen = options_.what == LoadWhat::kAll && has_settings;
    const bool filled = from.slots.count(kMomentumBuffer) != 0;
    Parameter parameter{pair.here,
                        {from.step.value_or(0), filled ? 1 : 0},
                        takes_frozen ? from.frozen : record(pair.here).frozen,
                        kept_text(from.unknown),
                        pair.slots};
    ParameterRecord& to = record(pair.here);
    to.spare_slots.reserve(kMaxSlotKinds);
    at(given_states_, to.device)[to.state] = parameter.state;
    parameters_.push_back(std::move(parameter));
  }
}

void EngineLoader::list_transfers(const Description& saved, const std::vector<Match::Pair>& pairs) {
  for (const Match::Pair& pair : pairs) {
    const ParameterDescription& from = at(saved.parameters, pair.saved);
    const ParameterRecord& to = record(pair.here);
    const GroupRecord& group = at(engine_.groups_, to.group);
    for (const std::string& name : pair.slots) {
      const DType dtype = name == kValue          ? to.value.dtype
                          : name == kMasterWeight ? DType::kFloat32
                                                  : slot_dtype(group.options, to.value.dtype);
      const DType saved_dtype = dtype_from_name(from.slots.at(name).dtype, name);
      const bool in_place = name == kValue || to.find_slot(name) != nullptr;
      transfers_.push_back({pair.saved, pair.here, name, saved_dtype, dtype,
                            range_wanted(from, to, saved_dtype), in_place});
    }
    for (const Slot& slot : to.slots) {
      const std::string name(slot.name);
      if (!slot.bound || std::find(pair.slots.begin(), pair.slots.end(), name) != pair.slots.end())
        continue;
      transfers_.push_back({-1, pair.here, name, slot.dtype, slot.dtype, {}, true});
    }
  }
  // What can be taken back comes first.
  std::stable_partition(transfers_.begin(), transfers_.end(),
                        [](const Transfer& t) { return !t.in_place; });
}

void EngineLoader::verify_what_is_overwritten(StateSource& source) {
  for (const Transfer& t : transfers_) {
    if (t.in_place && t.saved >= 0) source.verify(t.saved, t.name, t.range);
  }
}

/// For slots that are not there yet.
void EngineLoader::make_room() {
  std::vector<std::vector<StateStore::Wanted>> wanted(engine_.devices_.size());
  for (const Transfer& t : transfers_) {
    if (t.in_place) continue;
    ParameterRecord& to = record(t.here);
    at(wanted, to.device).push_back({&to, {slot_name(t.name), t.to, nullptr, false}});
  }
  growths_.reserve(wanted.size());
  engine_.on_device([&] {
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      DeviceRecord& device = *engine_.devices_[i];
      growths_.push_back(device.store->grow(std::move(wanted[i]), stream_for(device)));
    }
    if (transfers_.empty()) return;
    for (const auto& device : engine_.devices_) device->backend->begin_writing(stream_for(*device));
  });
}

/// Over what is there only when all else has worked; until then it is taken back.
void EngineLoader::make_room_and_transfer(StateSource& source) {
  try {
    make_room();
    transfer(source);
  } catch (const std::exception& error) {
    give_room_back();
    if (!overwriting_) throw;
    end_use(error);
    // These promise that nothing has changed.
    const bool no_memory = dynamic_cast<const OutOfMemory*>(&error) != nullptr ||
                           dynamic_cast<const std::bad_alloc*>(&error) != nullptr;
    if (no_memory) engine_.refuse_if_broken();
    throw;
  }
}

void EngineLoader::end_use(const std::exception& error) noexcept {
  try {
    engine_.broken_ = std::string("a load failed while it replaced state: ") + error.what();
  } catch (const std::bad_alloc&) {
    engine_.broken_ = "out of memory";  // short enough to need none
  }
}

void EngineLoader::give_room_back() noexcept {
  for (std::size_t i = 0; i < growths_.size(); ++i) {
    DeviceRecord& device = *engine_.devices_[i];
    device.store->undo(growths_[i], stream_for(device));
  }
}

std::byte* EngineLoader::memory_of(const Transfer& transfer) {
  const ParameterRecord& to = record(transfer.here);
  return static_cast<std::byte*>(transfer.name == kValue ? to.value.data
                                                         : to.slot(transfer.name).data);
}

void EngineLoader::transfer(StateSource& source) {
  std::vector<std::byte> converted;
  for (const Transfer& t : transfers_) {
    if (t.from != t.to) {
      converted.resize(std::max(converted.size(), kPieceBytes / size_of(t.from) * size_of(t.to)));
    }
  }
  for (const Transfer& t : transfers_) {
    std::byte* next = memory_of(t);
    if (t.saved < 0) {
      make_up(t, next);
      continue;
    }
    // Not over what is there: the first piece that arrives must be noticed.
    if (!t.in_place && t.from == t.to && !device_of(t.here).device.is_cuda()) {
      source.read_into(t.saved, t.name, t.range, next);
      continue;
    }
    source.read(t.saved, t.name, t.range, [&](const void* data, std::size_t bytes) {
      if (t.from != t.to) {
        convert(data, bytes, t.from, t.to, converted.data());
        data = converted.data();
        bytes = bytes / size_of(t.from) * size_of(t.to);
      }
      write(t, next, data, bytes);
      next += bytes;
    });
  }
}

/// What was not saved is as if it were made now: zero, and a master weight its parameter.
void EngineLoader::make_up(const Transfer& transfer, std::byte* to) {
  const ParameterRecord& parameter = record(transfer.here);
  if (parameter.size == 0) return;
  DeviceRecord& device = device_of(transfer.here);
  overwriting_ = true;
  engine_.on_device([&] {
    if (transfer.name == kMasterWeight) {
      return engine_.fill_master(parameter, parameter.slot(kMasterWeight), stream_for(device));
    }
    const auto bytes = static_cast<std::size_t>(parameter.size) * size_of(transfer.to);
    device.backend->clear(to, bytes, stream_for(device));
  });
}

void EngineLoader::write(const Transfer& transfer, std::byte* to, const void* from,
                         std::size_t bytes) {
  if (bytes == 0) return;
  DeviceRecord& device = device_of(transfer.here);
  overwriting_ = overwriting_ || transfer.in_place;
  engine_.on_device([&] { device.backend->write(to, from, bytes, stream_for(device)); });
}

void EngineLoader::commit(Metadata& metadata) noexcept {
  for (Settings& settings : settings_) {
    GroupRecord& group = at(engine_.groups_, settings.group);
    group.hyper = settings.hyper;
    group.settings_changed = true;
    group.initial_lr = settings.initial_lr;
    group.kept.swap(settings.kept);
  }
  for (Parameter& parameter : parameters_) {
    ParameterRecord& to = record(parameter.here);
    to.frozen = parameter.frozen;
    to.kept.swap(parameter.kept);
    // A slot that was not saved has no contents any more; its memory waits for the next step. The
    // caller's stays in use: make_up() has filled it.
    const auto stays = [&](const Slot& slot) {
      return slot.bound || std::find(parameter.slots.begin(), parameter.slots.end(), slot.name) !=
                               parameter.slots.end();
    };
    const auto dropped = std::stable_partition(to.slots.begin(), to.slots.end(), stays);
    to.spare_slots.insert(to.spare_slots.end(), dropped, to.slots.end());
    to.slots.erase(dropped, to.slots.end());
  }
  for (std::size_t i = 0; i < given_states_.size(); ++i) {
    DeviceRecord& device = *engine_.devices_[i];
    for (const auto& [state, value] : given_states_[i]) device.given_states.erase(state);
    device.given_states.merge(given_states_[i]);
  }
  for (const auto& device : engine_.devices_) {
    device->members_changed = device->hypers_changed = true;
  }
  engine_.metadata_.swap(metadata);
}

/// No step comes before the next run of a graph, to bring it what was loaded.
void EngineLoader::bring_to_graphs() {
  if (!engine_.in_graphs()) return;
  engine_.on_device([&] {
    try {
      engine_.sync_hyper(options_.streams);
    } catch (const OutOfMemory& error) {
      throw DeviceError(error.what());  // what was loaded is there in part
    }
  });
}

}  // namespace fusestep::detail
