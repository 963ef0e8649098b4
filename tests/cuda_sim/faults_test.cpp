// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Every call of the runtime that a whole life of an optimizer makes fails once. Whatever fails:
// the caller learns what and where, nothing leaks, and parameters and state are as before, or the
// optimizer refuses to go on.
#include <gtest/gtest.h>

#include <functional>
#include <optional>

#include "cuda_check.h"
#include "cuda_sim.h"
#include "temporary_directory.h"
#include "twins.h"

namespace fusestep::test {
namespace {

/// Something done to the optimizer on the devices or to the one on the CPU.
struct Action {
  const char* name;
  std::function<void(Optimizer&)> run;
};

/// Parameters on the host and on devices, and what happens to them.
class Life {
 public:
  virtual ~Life() = default;

  std::unique_ptr<Twins> twins = std::make_unique<Twins>();
  std::vector<Action> actions;
  /// All that a failed action must leave as it was.
  virtual void expect_equal(const std::string& when) {
    twins->expect_equal_memory(when);
    twins->expect_equal_steps(when);
    twins->expect_equal_slot_names(when);
  }
};

/// Two devices, two streams of the first one, steps of every kind.
class Training final : public Life {
 public:
  Training() {
    const std::vector<TensorSpec> tensors = {{700}, {3, 1, 2}};
    const int first = twins->prepare({{"a", AdamHyper{.lr = 1e-2}, kLayoutCases[0], tensors},
                                      {"b", SgdHyper{.momentum = 0.9}, kLayoutCases[2], tensors}},
                                     0);
    const int second = twins->prepare({{"c", AdamHyper{.lr = 1e-2}, kLayoutCases[0], tensors}}, 1);
    const int late = twins->prepare({{"d", RmspropHyper{}, kLayoutCases[1], {{70}, {9}, {5}}}}, 0);
    const int one_later = twins->prepare({{"e", AdamHyper{}, kLayoutCases[4], {{70}}}}, 1);
    for (cudaStream_t& stream : streams_) {
      check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    }
    for (int device = 0; device < cuda_sim::kDevices; ++device) {
      const CurrentDevice current(device);
      check(cudaDeviceSynchronize());
    }
    const auto join = [this](int batch) {
      return [this, batch](Optimizer& o) { twins->join(o, batch); };
    };
    const auto step = [this](int stream, StepOptions options = {}) {
      return [this, stream, options](Optimizer& o) { this->step(o, stream, options); };
    };
    actions = {
        {"add groups", join(first)},
        {"first step", step(0)},
        {"add a group on another device", join(second)},
        {"step on both", step(1)},
        {"set lr", [](Optimizer& o) { o.group("a").set_lr(3e-3); }},
        {"step on another stream", step(0)},
        {"add a late group", join(late)},
        {"step that measures", step(1, {.measure_grad_norm = true})},
        {"freeze", [](Optimizer& o) { o.freeze("a.0"); }},
        {"step with fewer", step(0, {.max_grad_norm = 1e9})},
        {"thaw", [](Optimizer& o) { o.thaw("a.0"); }},
        {"add one later", join(one_later)},
        {"step with all", step(-1, {.max_grad_norm = 1e9, .skip_nonfinite = true})},
        {"norm", [](Optimizer& o) { o.grad_norm(); }},
        {"last norm", [](Optimizer& o) { o.last_grad_norm(); }},
        {"set a step count", [](Optimizer& o) { o.state("c.1").set_step(7); }},
        {"read a step count", [](Optimizer& o) { o.state("c.0").step(); }},
        {"move gradients", [this](Optimizer& o) { twins->use_grads(o, 1); }},
        {"step with moved gradients", step(1)},
        {"steady step", step(1)},
        {"skipped", [](Optimizer& o) { o.skipped_steps(); }},
    };
  }
  ~Training() override {
    twins.reset();
    for (cudaStream_t stream : streams_) static_cast<void>(cudaStreamDestroy(stream));
  }
  Training(const Training&) = delete;
  Training& operator=(const Training&) = delete;

 private:
  void step(Optimizer& o, int stream, const StepOptions& wanted) {
    StepOptions options = wanted;
    std::vector<Stream> streams;
    if (&o == &twins->cuda && stream >= 0) {
      streams.emplace_back(Device::cuda(), static_cast<void*>(streams_[stream]));
    }
    options.streams = streams;
    o.step(options);
  }

  cudaStream_t streams_[2] = {};
};

/// State that comes and goes, on two devices.
class Checkpoints final : public Life {
 public:
  Checkpoints() {
    const std::vector<TensorSpec> tensors = {{70}, {0}};
    GroupSpec flat{"flat", AdamHyper{.lr = 1e-2}, kLayoutCases[0], {{70}, {33}}};
    flat.flat = true;
    const std::vector<GroupSpec> first = {{"a", AdamHyper{.lr = 1e-2}, kLayoutCases[2], tensors}};
    const std::vector<GroupSpec> second = {
        {"b", SgdHyper{.momentum = 0.9}, kLayoutCases[1], {{9}}}};
    const int batches[] = {twins->prepare(first, 0), twins->prepare(second, 1),
                           twins->prepare({flat}, 0)};
    Twins donor;
    for (const int batch :
         {donor.prepare(first, 0), donor.prepare(second, 1), donor.prepare({flat}, 0)}) {
      donor.join(donor.cpu, batch);
    }
    const StateDict fresh = donor.cpu.state_dict();
    donor.cpu.step();
    const StateDict stepped = donor.cpu.state_dict();
    const auto join = [this](int batch) {
      return [this, batch](Optimizer& o) { twins->join(o, batch); };
    };
    const auto load = [](const StateDict& state) {
      return [state](Optimizer& o) { o.load_state_dict(state); };
    };
    const auto step = [](Optimizer& o) { o.step(); };
    const auto file = [this](Optimizer& o) {
      return directory_ / (&o == &twins->cpu ? "cpu" : "cuda");
    };
    actions = {
        {"add a group", join(batches[0])},
        {"add a group on another device", join(batches[1])},
        {"add a flat group", join(batches[2])},
        {"load into what has never stepped", load(stepped)},
        {"step", step},
        {"take the state", [](Optimizer& o) { o.state_dict(); }},
        {"save", [file](Optimizer& o) { o.save(file(o), {.values = true}); }},
        {"step on", step},
        {"load over it", [file](Optimizer& o) { o.load(file(o)); }},
        {"load what has never stepped", load(fresh)},
        {"load again", load(stepped)},
        {"step again", step},
    };
    for (int device = 0; device < cuda_sim::kDevices; ++device) {
      const CurrentDevice current(device);
      check(cudaDeviceSynchronize());
    }
  }
  void expect_equal(const std::string& when) override { twins->expect_equal(when); }

 private:
  TemporaryDirectory directory_;
};

/// Steps in graphs, beside eager ones.
class Replays final : public Life {
 public:
  Replays() {
    const std::vector<TensorSpec> tensors = {{700}, {3, 1, 2}};
    const int first = twins->prepare({{"a", AdamHyper{.lr = 1e-2}, kLayoutCases[0], tensors},
                                      {"b", SgdHyper{.momentum = 0.9}, kLayoutCases[2], tensors}},
                                     0);
    const int late = twins->prepare({{"c", RmspropHyper{}, kLayoutCases[1], {{70}, {9}, {5}}}}, 0);
    check(cudaStreamCreate(&stream_));  // steps on the default stream come after runs on it
    check(cudaDeviceSynchronize());
    const auto join = [this](int batch) {
      return [this, batch](Optimizer& o) { twins->join(o, batch); };
    };
    const auto step = [this](Optimizer& o) { this->step(o); };
    const auto capture = [this](int graph) {
      return [this, graph](Optimizer& o) {
        if (on_device(o)) this->capture(o, graph);
      };
    };
    const auto run = [this](int graph) {
      return [this, graph](Optimizer& o) { this->run(o, graph); };
    };
    const auto sync = [this](Optimizer& o) { o.sync_hyper(streams(o)); };
    const auto count = [](Optimizer& o) { o.state("a.0").step(); };
    actions = {
        {"add groups", join(first)},
        {"first step", step},
        {"capture", capture(0)},
        {"run", run(0)},
        {"read a step count", count},
        {"set lr", [](Optimizer& o) { o.group("a").set_lr(3e-3); }},
        {"bring it", sync},
        {"run with it", run(0)},
        {"set a step count", [](Optimizer& o) { o.state("b.1").set_step(7); }},
        {"run with it", run(0)},
        {"other gradients", [this](Optimizer& o) { twins->use_grads(o, 1); }},
        {"capture with them", capture(1)},
        {"run the second", run(1)},
        {"eager step", step},
        {"run the first", [this](Optimizer& o) { run_first(o); }},
        {"take the state", [this](Optimizer& o) { o.state_dict(streams(o)); }},
        {"add a late group", join(late)},
        {"step with it", step},
        {"capture with all", capture(2)},
        {"run with all", run(2)},
        {"load", [this](Optimizer& o) { o.load_state_dict(o.state_dict(), streams(o)); }},
        {"run what was loaded", run(2)},
        {"norm", [](Optimizer& o) { o.last_grad_norm(); }},
        {"skipped", [](Optimizer& o) { o.skipped_steps(); }},
    };
  }
  ~Replays() override {
    twins.reset();
    for (const cudaGraphExec_t graph : graphs_) static_cast<void>(cudaGraphExecDestroy(graph));
    static_cast<void>(cudaStreamDestroy(stream_));
  }
  Replays(const Replays&) = delete;
  Replays& operator=(const Replays&) = delete;

 private:
  bool on_device(const Optimizer& o) const { return &o == &twins->cuda; }
  std::vector<Stream> streams(const Optimizer& o) const {
    if (!on_device(o)) return {};
    return {{Device::cuda(), static_cast<void*>(stream_)}};
  }
  void step(Optimizer& o) const {
    const std::vector<Stream> own = streams(o);
    o.step({.max_grad_norm = 1e9, .streams = own});
  }
  /// What fails here is not the optimizer's, but the caller's to handle as its errors are.
  static void call(cudaError_t code) { detail::cuda_check(code, 0, "the test's own call"); }
  void capture(Optimizer& o, int index) {
    call(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    cudaGraph_t graph = nullptr;
    const auto end = [&] {
      if (cudaStreamEndCapture(stream_, &graph) == cudaSuccess) return;
      static_cast<void>(cudaStreamEndCapture(stream_, &graph));  // the first was made to fail
    };
    try {
      step(o);
    } catch (...) {
      end();
      static_cast<void>(cudaGraphDestroy(graph));
      throw;
    }
    end();
    const cudaError_t code = cudaGraphInstantiate(&graphs_[index], graph, 0);
    static_cast<void>(cudaGraphDestroy(graph));
    call(code);
  }
  void run(Optimizer& o, int graph) const {
    if (on_device(o)) return call(cudaGraphLaunch(graphs_[graph], stream_));
    step(o);
  }
  /// The first graph has the first gradients.
  void run_first(Optimizer& o) {
    if (on_device(o)) return run(o, 0);
    twins->use_grads(o, 0);
    step(o);
    twins->use_grads(o, 1);
  }

  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graphs_[3] = {};
};

class Faults : public testing::Test {
 protected:
  /// A life in which `inject` was called first. False where the fault was not met any more.
  template <class SomeLife = Training>
  bool live_with(const std::function<void()>& inject, cudaError_t code, bool sticky) {
    SomeLife life;
    const cuda_sim::Live before = cuda_sim::live();
    inject();
    bool refused = false;
    for (const Action& action : life.actions) {
      if (!act(life, action, code, sticky, refused)) break;
    }
    const bool hit_before_end = !cuda_sim::faulted_call().empty();
    life.twins->cuda = Optimizer();  // waits for its work and frees everything
    const bool hit = !cuda_sim::faulted_call().empty();
    cuda_sim::clear_faults();
    if (sticky) return hit;
    EXPECT_EQ(cuda_sim::live().allocations, before.allocations) << "leak, " << where();
    EXPECT_EQ(cuda_sim::live().pinned, before.pinned) << "leak, " << where();
    EXPECT_EQ(cuda_sim::live().events, before.events) << "leak, " << where();
    int device = -1;
    check(cudaGetDevice(&device));
    if (cuda_sim::faulted_call() != "cudaSetDevice") {
      EXPECT_EQ(0, device) << "another device is current, " << where();
    }
    static_cast<void>(cudaSetDevice(0));
    if (hit && !hit_before_end && !refused)
      life.twins->expect_equal_values("destroyed, " + where());
    return hit;
  }

  static std::string where() { return "fault in " + cuda_sim::faulted_call() + context_; }

  /// False: the optimizer refuses to go on.
  bool act(Life& life, const Action& action, cudaError_t code, bool sticky, bool& refused) {
    Twins& twins = *life.twins;
    const auto text = [&] { return std::string(action.name) + ", " + where(); };
    std::optional<std::string> out_of_memory, device_error;
    try {
      action.run(twins.cuda);
    } catch (const OutOfMemory& error) {
      out_of_memory = error.what();
    } catch (const DeviceError& error) {
      device_error = error.what();
    } catch (const InvalidArgument& error) {
      // Without an answer there are no devices, and nothing has happened.
      // A kernel may also fail while that is asked.
      const std::string call = cuda_sim::faulted_call();
      EXPECT_TRUE(call == "cudaGetDeviceCount" || (sticky && call.empty()))
          << text() << ": " << error.what();
      if (sticky) return false;
      action.run(twins.cuda);
      action.run(twins.cpu);
      return !testing::Test::HasFailure();
    } catch (const std::exception& error) {
      ADD_FAILURE() << text() << ": an exception of another kind: " << error.what();
      return false;
    }
    if (!out_of_memory && !device_error) {
      action.run(twins.cpu);
      return true;
    }
    const std::string what = out_of_memory.value_or("") + device_error.value_or("");
    EXPECT_TRUE(what.find("cuda:") != std::string::npos) << text() << ": " << what;
    EXPECT_TRUE(what.find(cudaGetErrorName(code)) != std::string::npos) << text() << ": " << what;
    EXPECT_TRUE(!cuda_sim::faulted_call().empty() || sticky) << text() << ": " << what;
    if (sticky) {
      EXPECT_TRUE(device_error.has_value()) << text();
      if (!twins.cuda.groups().empty()) {
        EXPECT_THROW(twins.cuda.step(), DeviceError) << text();
      }
      refused = true;
      return false;
    }
    if (device_error) {
      try {
        twins.cuda.step();
        twins.cpu.step();  // it goes on: then it must be right
      } catch (const DeviceError&) {
        refused = true;
        return false;
      }
    }
    life.expect_equal("as before: " + text());
    if (testing::Test::HasFailure()) return false;
    action.run(twins.cuda);
    action.run(twins.cpu);
    twins.expect_equal("again: " + text());
    return !testing::Test::HasFailure();
  }

  template <class SomeLife = Training>
  void walk(cudaError_t code, bool sticky) {
    for (std::int64_t call = 0;; ++call) {
      cuda_sim::reset(static_cast<std::uint64_t>(call), static_cast<cuda_sim::Policy>(call % 3));
      context_ = ", call " + std::to_string(call);
      const bool met = live_with<SomeLife>(
          [&] {
            cuda_sim::inject({call, code, sticky});
          },
          code, sticky);
      if (HasFailure()) return;
      for (const std::string& violation : cuda_sim::take_violations()) {
        ADD_FAILURE() << violation << ": " << where();
      }
      if (HasFailure()) return;
      if (met) continue;
      EXPECT_GT(call, 200);
      return;
    }
  }

  static inline std::string context_;
};

TEST_F(Faults, OutOfMemoryInAnyCall) { walk(cudaErrorMemoryAllocation, false); }
TEST_F(Faults, ErrorOfAnyCall) { walk(cudaErrorUnknown, false); }
TEST_F(Faults, DeviceLostInAnyCall) { walk(cudaErrorLaunchFailure, true); }

TEST_F(Faults, OutOfMemoryInAnyCallOfACheckpoint) {
  walk<Checkpoints>(cudaErrorMemoryAllocation, false);
}
TEST_F(Faults, ErrorOfAnyCallOfACheckpoint) { walk<Checkpoints>(cudaErrorUnknown, false); }
TEST_F(Faults, DeviceLostInAnyCallOfACheckpoint) {
  walk<Checkpoints>(cudaErrorLaunchFailure, true);
}

TEST_F(Faults, OutOfMemoryInAnyCallAroundGraphs) {
  walk<Replays>(cudaErrorMemoryAllocation, false);
}
TEST_F(Faults, ErrorOfAnyCallAroundGraphs) { walk<Replays>(cudaErrorUnknown, false); }
TEST_F(Faults, DeviceLostInAnyCallAroundGraphs) { walk<Replays>(cudaErrorLaunchFailure, true); }

TEST_F(Faults, KernelThatFailsWhileItRuns) {
  for (std::int64_t launch = 0; launch < 40; ++launch) {
    cuda_sim::reset(static_cast<std::uint64_t>(launch), cuda_sim::Policy::kEager);
    context_ = ", launch " + std::to_string(launch);
    live_with([&] { cuda_sim::fail_running_kernel(launch); }, cudaErrorLaunchFailure, true);
    if (HasFailure()) return;
  }
}

/// Nothing runs in a capture: whatever fails, the optimizer is as it was and can be used.
TEST_F(Faults, AFailedCaptureIsNoFailedStep) {
  // The first two ask whether there is one: an error there is that of a step.
  for (std::int64_t call = 2;; ++call) {
    cuda_sim::reset(static_cast<std::uint64_t>(call), cuda_sim::Policy::kLate);
    Twins twins({{"a", AdamHyper{}, kLayoutCases[0], {{700}, {3}}},
                 {"b", SgdHyper{}, kLayoutCases[0], {{700}, {3}}}});
    cudaDeviceSynchronize();
    cudaStream_t handle = nullptr;
    check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking));
    const Stream stream{Device::cuda(), static_cast<void*>(handle)};
    const StepOptions options{.max_grad_norm = 1.0, .streams = {&stream, 1}};
    twins.cpu.step({.max_grad_norm = 1.0});
    twins.cuda.step(options);
    twins.use_grads(1);  // to be brought to the device
    check(cudaStreamBeginCapture(handle, cudaStreamCaptureModeGlobal));
    cuda_sim::inject({call, cudaErrorUnknown});
    bool failed = false;
    try {
      twins.cuda.step(options);
    } catch (const DeviceError&) {
      failed = true;
    }
    const bool met = !cuda_sim::faulted_call().empty();
    cuda_sim::clear_faults();
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(handle, &graph));
    check(cudaGraphDestroy(graph));
    twins.cpu.step({.max_grad_norm = 1.0});
    twins.cuda.step(options);
    check(cudaStreamSynchronize(handle));
    twins.expect_equal("call " + std::to_string(call) + (failed ? ", failed" : ""));
    check(cudaStreamDestroy(handle));
    if (HasFailure() || !met) {
      EXPECT_GT(call, 20);
      return;
    }
  }
}

/// A graph that was captured before, run after a call that had to make tables larger and failed,
/// and again when it is made once more.
class AfterGrowth : public Faults, public testing::WithParamInterface<bool> {};

TEST_P(AfterGrowth, GraphsRunOnThoughItFailed) {
  int failed = 0;
  for (std::int64_t call = 0;; ++call) {
    cuda_sim::reset(static_cast<std::uint64_t>(call), static_cast<cuda_sim::Policy>(call % 3));
    Twins twins({{"a", AdamHyper{.lr = 1e-2}, kLayoutCases[0], {{700}, {3}}}});
    std::vector<GroupSpec> late;
    for (int i = 0; i < 40; ++i) {
      late.push_back({"late" + std::to_string(i), AdamHyper{}, kLayoutCases[0], {{5}}});
    }
    check(cudaDeviceSynchronize());
    cudaStream_t handle = nullptr;
    check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking));
    const Stream stream{Device::cuda(), static_cast<void*>(handle)};
    const std::span<const Stream> streams(&stream, 1);
    twins.cpu.step();
    twins.cuda.step({.streams = streams});
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check(cudaStreamBeginCapture(handle, cudaStreamCaptureModeGlobal));
    twins.cuda.step({.streams = streams});
    check(cudaStreamEndCapture(handle, &graph));
    check(cudaGraphInstantiate(&exec, graph, 0));
    check(cudaGraphDestroy(graph));
    twins.add(late);
    check(cudaDeviceSynchronize());

    const auto bring = [&] {
      if (GetParam()) twins.cuda.step({.streams = streams});
      twins.cuda.sync_hyper(streams);
    };
    const auto run = [&](const std::string& when) {
      check(cudaGraphLaunch(exec, handle));
      for (const GroupSpec& group : late) twins.cpu.freeze(group.name);
      twins.cpu.step();
      for (const GroupSpec& group : late) twins.cpu.thaw(group.name);
      check(cudaStreamSynchronize(handle));
      twins.expect_equal_memory(when + std::to_string(call));
      twins.expect_equal_steps(when + std::to_string(call));
    };
    cuda_sim::inject({call, cudaErrorMemoryAllocation});
    bool out_of_memory = false, broken = false;
    try {
      bring();
    } catch (const OutOfMemory&) {
      out_of_memory = true;
    } catch (const DeviceError&) {
      broken = true;
    }
    const bool met = !cuda_sim::faulted_call().empty();
    cuda_sim::clear_faults();
    if (out_of_memory && twins.cuda.state("late0.0").slot_names().empty()) {
      ++failed;
      run("after a failure in call ");
      twins.cuda.sync_hyper(streams);  // brings the settings of the graph, and no plan
      run("after sync_hyper(), call ");
      bring();
    }
    if (!broken) {
      if (GetParam()) twins.cpu.step();
      run("at the end, call ");
    }
    check(cudaStreamSynchronize(handle));
    check(cudaGraphExecDestroy(exec));
    twins.cuda = Optimizer();
    check(cudaStreamDestroy(handle));
    for (const std::string& violation : cuda_sim::take_violations()) {
      ADD_FAILURE() << violation << ", call " << call;
    }
    if (HasFailure() || !met) {
      EXPECT_GT(failed, 5);
      return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Of, AfterGrowth, testing::Bool(),
                         [](const auto& about) { return about.param ? "Plans" : "Settings"; });

/// What a failed step has left on its stream must not come after the next step on another one.
TEST_F(Faults, AFailedStepIsOverBeforeTheNext) {
  for (std::int64_t call = 0;; ++call) {
    cuda_sim::reset(static_cast<std::uint64_t>(call), cuda_sim::Policy::kLate);
    const std::vector<TensorSpec> tensors = {{700}, {3}};
    Twins twins({{"a", AdamHyper{}, kLayoutCases[0], tensors},
                 {"b", SgdHyper{}, kLayoutCases[0], tensors}});
    cudaDeviceSynchronize();
    cudaStream_t handles[2] = {};
    for (cudaStream_t& handle : handles) cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking);
    const Stream here{Device::cuda(), static_cast<void*>(handles[0])};
    const Stream there{Device::cuda(), static_cast<void*>(handles[1])};
    twins.cpu.step();
    twins.cuda.step({.streams = {&here, 1}});
    twins.cuda.group("a").set_lr(0.5);
    twins.cuda.freeze("a.0");
    cuda_sim::inject({call, cudaErrorMemoryAllocation});
    bool failed = false;
    try {
      twins.cuda.step({.streams = {&there, 1}});
    } catch (const OutOfMemory&) {
      failed = true;
    } catch (const DeviceError&) {
    }
    const bool met = !cuda_sim::faulted_call().empty();
    cuda_sim::clear_faults();
    if (failed) {
      twins.cuda.group("a").set_lr(1e-3);
      twins.cuda.thaw("a.0");
      for (int i = 0; i < 2; ++i) {
        twins.cpu.step();
        twins.cuda.step({.streams = {&here, 1}});
        cudaStreamSynchronize(handles[0]);
        cudaDeviceSynchronize();
      }
      twins.expect_equal("call " + std::to_string(call));
    }
    if (HasFailure() || !met) return;
  }
}

}  // namespace
}  // namespace fusestep::test
