// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The state of an engine: read as a whole, and replaced by what a source has.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/match.h"
#include "checkpoint/source.h"
#include "engine.h"

namespace fusestep::detail {

class EngineSource final : public StateSource {
 public:
  /// `values`: parameters' values are slots named "value". Waits for the devices.
  EngineSource(Engine& engine, bool values, std::span<const Stream> streams);
  ~EngineSource() override;
  EngineSource(const EngineSource&) = delete;
  EngineSource& operator=(const EngineSource&) = delete;

  const Description& description() const override { return description_; }
  const Metadata& metadata() const override { return engine_.metadata_; }
  void read(int parameter, const std::string& slot, ByteRange range,
            const TakePiece& take) override;
  void verify(int, const std::string&, ByteRange) override {}

 private:
  GroupDescription describe(const GroupRecord& group);
  ParameterDescription describe(int index, bool value);
  double learning_rate_now(const GroupRecord& group);

  Engine& engine_;
  std::span<const Stream> streams_;
  Description description_;
};

/// All or nothing: what can be known to be wrong is known before anything is changed.
class EngineLoader {
 public:
  EngineLoader(Engine& engine, const LoadOptions& options) : engine_(engine), options_(options) {}
  LoadReport load(StateSource& source, bool by_position);

 private:
  /// One tensor on its way from the source to its place here.
  struct Transfer {
    int saved, here;   // saved: -1 for the caller's memory of which nothing was saved: make_up()
    std::string name;  // of the slot, or "value"
    DType from, to;
    ByteRange range;  // of what was saved
    bool in_place;    // over something that is needed if the load fails
  };
  struct Settings {
    int group;
    Hyper hyper;
    std::optional<double> initial_lr;
    std::string kept;
  };
  struct Parameter {
    int here;
    StepState state;
    bool frozen;
    std::string kept;
    std::vector<std::string> slots;
  };

  Match match_or_refuse(const StateSource& source, const Description& saved, bool by_position);
  Description renamed(const Description& saved) const;
  void read_settings(const Description& saved, const std::vector<int>& sources);
  void read_parameters(const Description& saved, const std::vector<Match::Pair>& pairs);
  void list_transfers(const Description& saved, const std::vector<Match::Pair>& pairs);
  void verify_what_is_overwritten(StateSource& source);
  void make_room();
  void make_room_and_transfer(StateSource& source);
  void give_room_back() noexcept;
  void transfer(StateSource& source);
  void make_up(const Transfer& transfer, std::byte* to);
  void write(const Transfer& transfer, std::byte* to, const void* from, std::size_t bytes);
  void end_use(const std::exception& error) noexcept;
  void commit(Metadata& metadata) noexcept;
  void bring_to_graphs();

  ParameterRecord& record(int index) { return at(engine_.parameters_, index); }
  DeviceRecord& device_of(int index) { return engine_.device_of(record(index)); }
  std::byte* memory_of(const Transfer& transfer);
  void* stream_for(const DeviceRecord& device) const {
    return stream_of(options_.streams, device.device);
  }

  Engine& engine_;
  const LoadOptions& options_;
  std::vector<Settings> settings_;
  std::vector<Parameter> parameters_;
  std::vector<Transfer> transfers_;
  std::vector<StateStore::Growth> growths_;             // by device
  std::vector<std::map<int, StepState>> given_states_;  // by device
  bool overwriting_ = false;                            // of what was there, something may be gone
};

}  // namespace fusestep::detail
