// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The public classes: each forwards to the engine.
#include "fusestep/optimizer.h"

#include <memory>
#include <system_error>

#include "checkpoint/dict.h"
#include "checkpoint/engine_state.h"
#include "checkpoint/snapshot.h"
#include "checkpoint/state_file.h"
#include "engine.h"

namespace fusestep {
namespace {

const detail::ParameterRecord& record(const detail::Engine* engine, int parameter) {
  return detail::at(engine->parameters(), parameter);
}

const detail::GroupRecord& group_record(const detail::Engine* engine, int group) {
  return detail::at(engine->groups(), group);
}

}  // namespace

std::int64_t StateRef::step() const { return engine_->read_state(parameter_).step; }
void StateRef::set_step(std::int64_t step) { engine_->write_step(parameter_, step); }
std::vector<std::string> StateRef::slot_names() const {
  std::vector<std::string> names;
  for (const detail::Slot& slot : record(engine_, parameter_).slots) names.emplace_back(slot.name);
  return names;
}
TensorView StateRef::slot(std::string_view name) const { return engine_->slot(parameter_, name); }
void StateRef::bind_slot(std::string_view name, const TensorView& memory) {
  engine_->bind_slot(parameter_, name, memory);
}

std::string ParameterRef::name() const { return record(engine_, parameter_).name; }
TensorView ParameterRef::value() const { return record(engine_, parameter_).value; }
TensorView ParameterRef::grad() const { return record(engine_, parameter_).grad; }
void ParameterRef::set_grad(const TensorView& grad) { engine_->set_grad(parameter_, grad); }
void ParameterRef::set_value(const TensorView& value) { engine_->set_value(parameter_, value); }
void ParameterRef::freeze() { engine_->set_frozen(parameter_, true); }
void ParameterRef::thaw() { engine_->set_frozen(parameter_, false); }
bool ParameterRef::frozen() const { return record(engine_, parameter_).frozen; }

std::string GroupRef::name() const { return group_record(engine_, group_).name; }
std::vector<ParameterRef> GroupRef::parameters() const {
  std::vector<ParameterRef> members;
  for (const int member : group_record(engine_, group_).parameters) {
    members.push_back(ParameterRef(engine_, member));
  }
  return members;
}
Hyper GroupRef::hyper() const { return group_record(engine_, group_).hyper; }
void GroupRef::set_hyper(const Hyper& hyper) { engine_->set_hyper(group_, hyper); }
double GroupRef::lr() const { return learning_rate(hyper()); }
void GroupRef::set_lr(double lr) { engine_->set_lr(group_, lr); }
void GroupRef::set_lr_source(const TensorView& source) { engine_->set_lr_source(group_, source); }
std::vector<FlatBuffer> GroupRef::flat_buffers() const { return engine_->flat_buffers(group_); }
void GroupRef::zero_grad(std::span<const Stream> streams) { engine_->zero_grad(group_, streams); }
void GroupRef::freeze() {
  for (ParameterRef member : parameters()) member.freeze();
}
void GroupRef::thaw() {
  for (ParameterRef member : parameters()) member.thaw();
}

Optimizer::Optimizer(OptimizerOptions options)
    : engine_(std::make_unique<detail::Engine>(std::move(options))) {}
Optimizer::~Optimizer() = default;
Optimizer::Optimizer(Optimizer&&) noexcept = default;
Optimizer& Optimizer::operator=(Optimizer&&) noexcept = default;

GroupRef Optimizer::add_group(std::string name, const Hyper& hyper,
                              std::vector<Parameter> parameters, GroupOptions options) {
  return {engine_.get(),
          engine_->add_group(std::move(name), hyper, std::move(parameters), options)};
}
GroupRef Optimizer::add_flat_group(std::string name, const Hyper& hyper,
                                   std::vector<Parameter> parameters, GroupOptions options,
                                   std::span<const Stream> streams) {
  return {engine_.get(),
          engine_->add_flat_group(std::move(name), hyper, std::move(parameters), options, streams)};
}
bool Optimizer::can_store_grads() const { return engine_->can_store_grads(); }
void Optimizer::refresh_master_weights(std::span<const Stream> streams) {
  engine_->refresh_master_weights(streams);
}
GroupRef Optimizer::group(std::string_view name) {
  return {engine_.get(), engine_->find_group(name)};
}
std::vector<GroupRef> Optimizer::groups() {
  std::vector<GroupRef> all;
  for (int i = 0; i < static_cast<int>(engine_->groups().size()); ++i) {
    all.push_back(GroupRef(engine_.get(), i));
  }
  return all;
}
ParameterRef Optimizer::parameter(std::string_view name) {
  return {engine_.get(), engine_->find_parameter(name)};
}
StateRef Optimizer::state(std::string_view parameter_name) {
  return {engine_.get(), engine_->find_parameter(parameter_name)};
}
void Optimizer::freeze(std::string_view name) { engine_->set_frozen(name, true); }
void Optimizer::thaw(std::string_view name) { engine_->set_frozen(name, false); }

void Optimizer::step(const StepOptions& options) { engine_->step(options); }
void Optimizer::sync_hyper(std::span<const Stream> streams) { engine_->sync_hyper(streams); }
GradNorm Optimizer::grad_norm(std::span<const Stream> streams) {
  return engine_->grad_norm(streams);
}
TensorView Optimizer::norm_begin(Device device, std::span<const Stream> streams) {
  return engine_->norm_begin(device, streams);
}
void Optimizer::norm_end() { engine_->norm_end(); }
GradNorm Optimizer::last_grad_norm() const { return engine_->last_grad_norm(); }
std::int64_t Optimizer::skipped_steps() const { return engine_->skipped_steps(); }
std::map<std::string, std::size_t> Optimizer::memory_report() const {
  return engine_->memory_report();
}

StateDict Optimizer::state_dict(std::span<const Stream> streams) {
  return detail::with_host_memory([&] {
    detail::EngineSource source(*engine_, false, streams);
    return detail::to_dict(source);
  });
}
void Optimizer::load_state_dict(const StateDict& state, std::span<const Stream> streams) {
  LoadOptions options;
  options.streams = streams;
  detail::with_host_memory([&] {
    detail::DictSource source(state);
    detail::EngineLoader(*engine_, options).load(source, true);
  });
}
LoadReport Optimizer::load(const std::filesystem::path& file, const LoadOptions& options) {
  wait_for_save();
  return detail::with_host_memory([&] {
    detail::StateFileReader source(file);
    return detail::EngineLoader(*engine_, options).load(source, false);
  });
}
LoadReport Optimizer::load(const StateDict& state, const LoadOptions& options) {
  wait_for_save();
  return detail::with_host_memory([&] {
    detail::DictSource source(state);
    return detail::EngineLoader(*engine_, options).load(source, false);
  });
}

void Optimizer::save(const std::filesystem::path& file, const SaveOptions& options) {
  wait_for_save();
  detail::with_host_memory([&] {
    const std::filesystem::path written =
        options.rank ? detail::file_to_save(file, *options.rank) : file;
    detail::EngineSource source(*engine_, options.values, options.streams);
    detail::write_file(source, options.metadata, written);
  });
}
void Optimizer::save_async(const std::filesystem::path& file, const SaveOptions& options) {
  wait_for_save();
  detail::check_user_metadata(options.metadata);
  detail::with_host_memory([&] {
    detail::EngineSource source(*engine_, options.values, options.streams);
    auto snapshot = std::make_shared<detail::Snapshot>(source);
    const std::filesystem::path written =
        options.rank ? detail::file_to_save(file, *options.rank) : file;
    const auto write = [snapshot, metadata = options.metadata, written] {
      detail::with_host_memory([&] { detail::write_file(*snapshot, metadata, written); });
    };
    try {
      engine_->set_saving(std::async(std::launch::async, write));
    } catch (const std::system_error& error) {
      throw Error(std::string("no thread to save in: ") + error.what());
    }
  });
}
void Optimizer::wait_for_save() { engine_->wait_for_save(); }

}  // namespace fusestep
