// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Steps that are captured into CUDA graphs: what runs of a graph do, what they follow, and what
// cannot be captured.
#include <gtest/gtest.h>

#include <functional>
#include <utility>

#include "own_stream.h"
#include "temporary_directory.h"
#include "twins.h"

namespace fusestep::test {
namespace {

const std::vector<TensorSpec> kTensors = {{5}, {1031}, {4100, 1, 2}};

std::vector<GroupSpec> two_groups() {
  return {{"body", AdamWHyper{.lr = 1e-2, .weight_decay = 0.1}, kLayoutCases[0], kTensors},
          {"head", SgdHyper{.lr = 1e-2, .momentum = 0.9}, kLayoutCases[2], kTensors}};
}

/// Every kernel, and with torch's dtypes every setting; those that store gradients apart.
std::vector<GroupSpec> everything(bool stores_grads) {
  std::vector<GroupSpec> groups;
  const auto add = [&](const std::vector<RuleCase>& rules, const LayoutCase& layout) {
    if (layout.stores_grads != stores_grads) return;
    for (const RuleCase& rule : rules) {
      groups.push_back({rule.name + " " + layout.name, rule.hyper, layout, {{70, 1, 2}, {9}}});
    }
  };
  for (const LayoutCase& layout : kLayoutCases) add(rule_cases(), layout);
  for (const LayoutCase& layout : further_layout_cases()) add(variant_cases(), layout);
  return groups;
}

/// What was copied to its memory is there for every stream.
struct ReadyTwins : Twins {
  explicit ReadyTwins(const std::vector<GroupSpec>& groups) : Twins(groups) {
    check(cudaDeviceSynchronize());
  }
};

constexpr double kMaxNorm = 7.0;

/// What was enqueued on a stream while it was captured.
class RecordedGraph {
 public:
  template <class F>
  RecordedGraph(const OwnStream& stream, F&& enqueue,
                cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream.get(), mode));
    try {
      enqueue();
    } catch (...) {
      EXPECT_EQ(cudaSuccess, cudaStreamEndCapture(stream.get(), &graph)) << "it was invalidated";
      static_cast<void>(cudaGraphDestroy(graph));
      throw;
    }
    check(cudaStreamEndCapture(stream.get(), &graph));
    check(cudaGraphInstantiate(&exec_, graph, 0));
    check(cudaGraphDestroy(graph));
  }
  ~RecordedGraph() { static_cast<void>(cudaGraphExecDestroy(exec_)); }
  RecordedGraph(const RecordedGraph&) = delete;
  RecordedGraph& operator=(const RecordedGraph&) = delete;

  void run(const OwnStream& stream) const { check(cudaGraphLaunch(exec_, stream.get())); }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

class Graphs : public testing::Test {
 protected:
  void SetUp() override {
    FUSESTEP_NEED_DEVICES(1);
    stream_ = std::make_unique<OwnStream>();
    view_ = stream_->view();
  }

  std::span<const Stream> streams() const { return {&view_, 1}; }
  StepOptions on_stream(StepOptions options = {}) const {
    options.streams = streams();
    return options;
  }
  /// A step outside of graphs, with new gradients.
  void eager_step(Twins& twins, const StepOptions& options = {}) {
    next_grads(twins);
    twins.cpu.step(options);
    twins.cuda.step(on_stream(options));
  }
  RecordedGraph capture(Optimizer& optimizer, const StepOptions& options = {}) const {
    return RecordedGraph(*stream_, [&] { optimizer.step(on_stream(options)); });
  }
  /// A run of the graph with new gradients, beside a step on the CPU.
  void run(Twins& twins, const RecordedGraph& graph, const StepOptions& on_cpu = {}) {
    next_grads(twins);
    twins.cpu.step(on_cpu);
    graph.run(*stream_);
  }
  void next_grads(Twins& twins) {
    const auto pinned = twins.enqueue_grads(pool_, ++step_, stream_->get());
    staged_.insert(staged_.end(), pinned.begin(), pinned.end());
  }
  void TearDown() override {
    static_cast<void>(cudaDeviceSynchronize());  // before pinned memory goes
    staged_.clear();
  }

  std::unique_ptr<OwnStream> stream_;
  Stream view_{Device::cuda(), static_cast<void*>(cudaStream_t{})};
  std::vector<double> pool_ = ordinary_pool();
  std::vector<std::shared_ptr<void>> staged_;
  std::uint64_t step_ = 0;
};

/// Numbers on the device, of which one after the other is copied to where a step reads it.
class Feed {
 public:
  explicit Feed(const std::vector<float>& values) : values_(4 * values.size()), now_(0) {
    values_.upload(values.data());
  }
  TensorView view() const { return now_.view(); }
  void next(cudaStream_t stream) {
    check(cudaMemcpyAsync(view().data, values_.data() + 4 * used_++, 4, cudaMemcpyDeviceToDevice,
                          stream));
  }

 private:
  DeviceMemory values_;
  DeviceScalar<float> now_;
  std::size_t used_ = 0;
};

// ---- runs are steps ----------------------------------------------------------------------------

class AHundredRuns : public Graphs, public testing::WithParamInterface<bool> {};

TEST_P(AHundredRuns, AreAHundredSteps) {
  ReadyTwins twins(everything(GetParam()));
  std::vector<float> skips, scales;
  for (int i = 0; i < 100; ++i) {
    skips.push_back(i % 7 == 0 ? 1.0f : 0.0f);  // the first of all, too
    scales.push_back(static_cast<float>(1 + i % 4));
  }
  Feed skip(skips), scale(scales);
  float skip_on_cpu = 0, scale_on_cpu = 1;
  StepOptions on_cuda{.grad_multiplier = 0.5,
                      .store_unscaled_grads = GetParam(),
                      .max_grad_norm = kMaxNorm,
                      .clip_value = 0.05,
                      .skip_nonfinite = true};
  StepOptions on_cpu = on_cuda;
  on_cuda.skip_source = skip.view();
  on_cuda.loss_scale_source = scale.view();
  on_cpu.skip_source = view(&skip_on_cpu, {});
  on_cpu.loss_scale_source = view(&scale_on_cpu, {});
  check(cudaDeviceSynchronize());

  // A step that is skipped brings everything to the device.
  float one = 1;
  StepOptions skipped = on_cuda;
  skipped.skip_source = view(&one, {});
  twins.cuda.step(on_stream(skipped));
  const std::vector<GroupRef> groups_on_cpu = twins.cpu.groups(), groups = twins.cuda.groups();
  const std::string first = groups[0].parameters()[0].name();
  EXPECT_EQ(0, twins.cuda.state(first).step());
  const RecordedGraph graph = capture(twins.cuda, on_cuda);

  std::vector<double> ordinary = pool_, with_inf = pool_;
  for (std::size_t i = 0; i < with_inf.size(); i += 50) with_inf[i] = HUGE_VAL;
  int clipped = 0;
  for (std::size_t i = 0; i < 100; ++i) {
    if (i % 3 == 1) {  // a schedule
      for (std::size_t g = 0; g < groups.size(); ++g) {
        const double lr = 1e-2 / static_cast<double>(i + g % 5);
        GroupRef(groups_on_cpu[g]).set_lr(lr);
        GroupRef(groups[g]).set_lr(lr);
      }
      twins.cuda.sync_hyper(streams());
    }
    pool_ = i % 11 == 5 ? with_inf : ordinary;
    skip_on_cpu = skips[i];
    scale_on_cpu = scales[i];
    skip.next(stream_->get());
    scale.next(stream_->get());
    run(twins, graph, on_cpu);
    const GradNorm norm = twins.cpu.last_grad_norm();
    clipped += norm.nonfinite == 0 && norm.norm > kMaxNorm ? 1 : 0;
  }
  twins.expect_equal("after a hundred runs");
  EXPECT_EQ(twins.cpu.skipped_steps() + 1, twins.cuda.skipped_steps());
  EXPECT_EQ(twins.cpu.last_grad_norm().norm, twins.cuda.last_grad_norm().norm);
  EXPECT_EQ(100 - 15 - 8, twins.cuda.state(first).step());
  EXPECT_GT(clipped, 10);
  EXPECT_LT(clipped, 90);
}

INSTANTIATE_TEST_SUITE_P(Gradients, AHundredRuns, testing::Bool(), [](const auto& about) {
  return about.param ? "AreStoredUnscaled" : "StayAsTheyAre";
});

TEST_F(Graphs, FollowSettingsOfEveryKind) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  const RecordedGraph graph = capture(twins.cuda);
  for (int i = 0; i < 20; ++i) {
    twins.both([i](Optimizer& o) {
      o.group("body").set_hyper(AdamHyper{.lr = 1e-2 / (i + 1),
                                          .betas = {0.9 - 0.01 * i, 0.99},
                                          .eps = 1e-8 * (i + 1),
                                          .weight_decay = 0.01 * i,
                                          .maximize = i % 5 == 4,
                                          .decoupled_weight_decay = i % 2 == 1});
      o.group("head").set_hyper(
          SgdHyper{.lr = 1e-3 * i, .momentum = 0.5 + 0.01 * i, .dampening = 0.1});
    });
    twins.cuda.sync_hyper(streams());
    run(twins, graph);
  }
  twins.expect_equal("at the end");
}

TEST_F(Graphs, FollowALearningRateOnTheDevice) {
  ReadyTwins twins(two_groups());
  std::vector<float> rates;
  for (int i = 0; i < 12; ++i) rates.push_back(0.01f / static_cast<float>(i + 1));
  Feed lr(rates);
  twins.cuda.group("body").set_lr_source(lr.view());
  check(cudaDeviceSynchronize());
  lr.next(stream_->get());
  twins.cpu.group("body").set_lr(rates[0]);
  eager_step(twins);
  const RecordedGraph graph = capture(twins.cuda);
  for (std::size_t i = 1; i < rates.size(); ++i) {
    twins.cpu.group("body").set_lr(rates[i]);
    lr.next(stream_->get());
    run(twins, graph);
  }
  twins.expect_equal("at the end");
}

TEST_F(Graphs, GoOnBetweenEagerStepsAndReads) {
  ReadyTwins twins(two_groups());
  eager_step(twins, {.measure_grad_norm = true});
  const StepOptions options{.max_grad_norm = 1.0};
  const RecordedGraph graph = capture(twins.cuda, options);
  std::int64_t steps = 1;
  EXPECT_EQ(steps, twins.cuda.state("head.1").step());  // nothing has run yet
  for (int i = 0; i < 12; ++i) {
    if (i % 3 == 2) {
      eager_step(twins, options);
      ++steps;
    }
    run(twins, graph, options);
    EXPECT_EQ(++steps, twins.cuda.state("head.1").step());
    EXPECT_EQ(twins.cpu.last_grad_norm().norm, twins.cuda.last_grad_norm().norm);
    if (i % 4 == 3) twins.expect_equal("run " + std::to_string(i));
  }
}

TEST_F(Graphs, RunOnAnyStreamAndAreReadWithoutWaiting) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  const RecordedGraph graph = capture(twins.cuda);
  check(cudaStreamSynchronize(stream_->get()));
  const TemporaryDirectory directory;
  for (int i = 0; i < 3; ++i) {
    const OwnStream other;  // which nobody waits for
    next_grads(twins);
    check(cudaStreamSynchronize(stream_->get()));
    twins.cpu.step();
    graph.run(other);
    if (i == 0) {
      EXPECT_EQ(2, twins.cuda.state("body.0").step());
    } else if (i == 1) {
      twins.cuda.save(directory / "state");
      twins.cpu.save(directory / "cpu");
      ReadyTwins loaded(two_groups());
      loaded.cuda.load(directory / "state");
      loaded.cpu.load(directory / "cpu");
      EXPECT_EQ(3, loaded.cuda.state("body.0").step());
      EXPECT_EQ(canonical(loaded.cpu.state("body.1").slot("exp_avg")),
                canonical(twins.cpu.state("body.1").slot("exp_avg")));
      loaded.cuda.step(on_stream());
      loaded.cpu.step();
    }
    check(cudaStreamSynchronize(other.get()));
  }
  twins.expect_equal("at the end");
}

TEST_F(Graphs, SkippedRunsLeaveSgdsBufferUnfilled) {
  ReadyTwins twins(
      {{"s", SgdHyper{.lr = 0.1, .momentum = 0.9, .dampening = 0.5}, kLayoutCases[0], {{100}}}});
  Feed skip({1, 1, 0, 0});
  check(cudaDeviceSynchronize());
  skip.next(stream_->get());
  twins.cuda.step(on_stream({.skip_source = skip.view()}));
  const RecordedGraph graph = capture(twins.cuda, {.skip_source = skip.view()});
  for (const bool skipped : {true, false, false}) {
    skip.next(stream_->get());
    run(twins, graph, {.skip = skipped});
  }
  twins.expect_equal("at the end");
  EXPECT_EQ(2, twins.cuda.skipped_steps());
  EXPECT_EQ(2, twins.cuda.state("s.0").step());
}

TEST_F(Graphs, SeveralGraphsOfOneOptimizer) {
  ReadyTwins twins(two_groups());
  eager_step(twins, {.measure_grad_norm = true});
  const RecordedGraph plain = capture(twins.cuda),
                      clipped = capture(twins.cuda, {.max_grad_norm = 0.1});
  for (int i = 0; i < 9; ++i) {
    if (i % 2 == 0) run(twins, plain);
    if (i % 2 == 1) run(twins, clipped, {.max_grad_norm = 0.1});
  }
  twins.expect_equal("at the end");
}

TEST_F(Graphs, SeveralStepsInOneGraph) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  const RecordedGraph graph(*stream_, [&] {
    for (int i = 0; i < 3; ++i) twins.cuda.step(on_stream());
  });
  for (int i = 0; i < 4; ++i) {
    next_grads(twins);
    for (int k = 0; k < 3; ++k) twins.cpu.step();
    graph.run(*stream_);
  }
  twins.expect_equal("at the end");
  EXPECT_EQ(13, twins.cuda.state("body.2").step());
}

TEST_F(Graphs, AGraphThatIsDroppedLeavesNothing) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  { const RecordedGraph dropped = capture(twins.cuda); }
  eager_step(twins);
  twins.expect_equal("at the end");
}

TEST_F(Graphs, ThatStillRunMayLoseTheirOptimizer) {
  // With state and without: what waits is not the same.
  for (const Hyper& hyper : {Hyper(AdamHyper{}), Hyper(SgdHyper{.lr = 1e-2})}) {
    ReadyTwins twins({{"g", hyper, kLayoutCases[0], kTensors}});
    eager_step(twins);
    const RecordedGraph graph = capture(twins.cuda);
    for (int i = 0; i < 2; ++i) run(twins, graph);
    twins.cuda = Optimizer();
    twins.expect_equal_values("afterwards");
  }
}

TEST_F(Graphs, CanBeCapturedInEveryMode) {
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
                          cudaStreamCaptureModeRelaxed}) {
    ReadyTwins twins(two_groups());
    eager_step(twins, {.measure_grad_norm = true});
    twins.use_grads(1);
    const RecordedGraph graph(
        *stream_, [&] { twins.cuda.step(on_stream({.max_grad_norm = 0.5})); }, mode);
    twins.cpu.step({.max_grad_norm = 0.5});
    graph.run(*stream_);
    twins.expect_equal("mode " + std::to_string(mode));
  }
}

TEST_F(Graphs, OtherOptimizersStepWhileOneIsCaptured) {
  ReadyTwins captured(two_groups()), other(two_groups());
  eager_step(captured);
  const OwnStream beside;
  const Stream view = beside.view();
  const RecordedGraph graph(*stream_, [&] {
    captured.cuda.step(on_stream());
    for (int i = 0; i < 3; ++i) {  // uploads, allocates
      other.both([i](Optimizer& o) { o.group("body").set_lr(1e-2 / (i + 1)); });
      other.cpu.step();
      other.cuda.step({.streams = {&view, 1}});
    }
  });
  run(captured, graph);
  check(cudaStreamSynchronize(beside.get()));
  captured.expect_equal("captured");
  other.expect_equal("other");
}

/// Whoever is captured, and on whichever kind of stream, waits for nobody.
TEST_F(Graphs, OtherOptimizersComeAndGoWhileOneIsCaptured) {
  for (const unsigned flags : {cudaStreamNonBlocking, cudaStreamDefault}) {
    stream_ = std::make_unique<OwnStream>(flags);
    view_ = stream_->view();
    ReadyTwins captured(two_groups()),
        others[2]{ReadyTwins(two_groups()), ReadyTwins(two_groups())};
    eager_step(captured);
    const OwnStream beside;
    const Stream view = beside.view();
    others[0].cuda.step({.streams = {&view, 1}});
    const RecordedGraph graph(*stream_, [&] {
      captured.cuda.step(on_stream());
      others[1].cuda.step({.max_grad_norm = 0.5, .streams = {&view, 1}});
      for (ReadyTwins& other : others) other.cuda = Optimizer();
    });
    run(captured, graph);
    captured.expect_equal("flags " + std::to_string(flags));
  }
}

// ---- what changes after a capture --------------------------------------------------------------

/// torch's recipe: the gradients of the graph are first there in its capture.
TEST_F(Graphs, KeepTheGradientsOfTheirCapture) {
  ReadyTwins twins(two_groups());
  for (const StepOptions& options : {StepOptions{}, StepOptions{.max_grad_norm = 0.3}}) {
    eager_step(twins, options);
    twins.fill_grads(pool_, 100 + step_, 1);
    check(cudaDeviceSynchronize());
    twins.use_grads(1);
    const RecordedGraph graph = capture(twins.cuda, options);
    for (int i = 0; i < 3; ++i) {
      twins.use_grads(1);
      twins.cpu.step(options);
      graph.run(*stream_);
      twins.use_grads(0);
      eager_step(twins, options);
    }
    twins.use_grads(1);  // another capture of the same ones needs nothing
    const RecordedGraph again = capture(twins.cuda, options);
    twins.cpu.step(options);
    again.run(*stream_);
    twins.use_grads(0);
    const RecordedGraph others = capture(twins.cuda, options);
    run(twins, others, options);
    twins.expect_equal("at the end");
  }
}

TEST_F(Graphs, StayAsTheyAreWhenTheOptimizerGrows) {
  ReadyTwins twins(two_groups());
  eager_step(twins, {.measure_grad_norm = true});
  const StepOptions options{.max_grad_norm = 0.7};
  const RecordedGraph graph = capture(twins.cuda, options);
  // On the CPU the same parameters step if the others are frozen.
  const auto only_first = [&](bool frozen) {
    for (const GroupRef& group : twins.cpu.groups()) {
      if (group.name() == "body" || group.name() == "head") continue;
      if (frozen) GroupRef(group).freeze();
      if (!frozen) GroupRef(group).thaw();
    }
  };
  for (int i = 0; i < 6; ++i) {
    check(cudaDeviceSynchronize());
    twins.add({{"late" + std::to_string(i), AdamHyper{.amsgrad = i % 2 == 1},
                kLayoutCases[static_cast<std::size_t>(i)],
                std::vector<TensorSpec>(std::size_t{1} << (2 * i), {3})}});
    check(cudaDeviceSynchronize());
    if (i % 2 == 0) eager_step(twins, options);
    twins.both([i](Optimizer& o) { o.group("body").set_lr(1e-2 / (i + 2)); });
    twins.cuda.sync_hyper(streams());
    only_first(true);
    for (int k = 0; k < 2; ++k) run(twins, graph, options);
    only_first(false);
    EXPECT_EQ(twins.cpu.state("head.0").step(), twins.cuda.state("head.0").step());
  }
  eager_step(twins, options);
  twins.expect_equal("at the end");
}

TEST_F(Graphs, StepWhatWasCapturedWhoeverIsFrozenLater) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  twins.both([](Optimizer& o) { o.freeze("body.1"); });
  eager_step(twins);
  const RecordedGraph without = capture(twins.cuda);
  run(twins, without);
  twins.both([](Optimizer& o) { o.thaw("body.1"); });
  eager_step(twins);
  const RecordedGraph with = capture(twins.cuda);
  run(twins, with);
  twins.cpu.freeze("body.1");
  run(twins, without);
  twins.cpu.thaw("body.1");
  twins.cuda.freeze("head");  // the graph does not hear of it
  run(twins, with);
  twins.cuda.thaw("head");
  eager_step(twins);
  twins.expect_equal("at the end");
}

/// With and without a norm, none of whose kernels is captured where nothing steps.
TEST_F(Graphs, AreEmptyWhereAllHasBeenFrozen) {
  for (const StepOptions& options : {StepOptions{}, StepOptions{.max_grad_norm = 0.5}}) {
    ReadyTwins twins(two_groups());
    eager_step(twins);
    twins.both([](Optimizer& o) {
      o.freeze("body");
      o.freeze("head");
    });
    const RecordedGraph graph = capture(twins.cuda, options);
    for (int i = 0; i < 2; ++i) run(twins, graph, options);
    EXPECT_EQ(1, twins.cuda.state("body.0").step());
    twins.both([](Optimizer& o) { o.thaw("body"); });
    eager_step(twins, options);
    twins.expect_equal("at the end");
  }
}

TEST_F(Graphs, LeaveAloneWhoHasBeenFrozenOnTheCpu) {
  ReadyTwins twins(two_groups());
  std::vector<float> value(3, 1.0f), grad(3, 1.0f);
  twins.cuda.add_group("host", AdamHyper{},
                       {{"h", view(value.data(), {3}), view(grad.data(), {3})}});
  eager_step(twins);
  const std::vector<float> before = value;
  twins.cuda.freeze("host");
  const RecordedGraph graph = capture(twins.cuda);
  for (int i = 0; i < 2; ++i) run(twins, graph);
  EXPECT_EQ(before, value);
  EXPECT_EQ(1, twins.cuda.state("h").step());
  twins.expect_equal("at the end");
}

TEST_F(Graphs, CanBeCapturedWhereWhoStepsIsAsBefore) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  twins.cuda.freeze("body");
  twins.set_grad("head.0", false);
  twins.cuda.thaw("body");
  twins.set_grad("head.0", true);
  const RecordedGraph graph = capture(twins.cuda);
  run(twins, graph);
  // And with gradients elsewhere, which were given meanwhile.
  twins.fill_grads(pool_, 100, 1);
  check(cudaDeviceSynchronize());
  twins.both([](Optimizer& o) {
    o.freeze("head");
    o.parameter("body.1").clear_grad();
  });
  twins.use_grads(1);
  twins.both([](Optimizer& o) { o.thaw("head"); });
  const RecordedGraph elsewhere = capture(twins.cuda);
  twins.cpu.step();
  elsewhere.run(*stream_);
  twins.use_grads(0);
  eager_step(twins);
  twins.expect_equal("at the end");
}

/// What waits for one that does not step waits for a step outside of captures.
TEST_F(Graphs, TakeMovedGradientsWhileCountsOfFrozenOnesWait) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  twins.both([](Optimizer& o) { o.freeze("head.1"); });
  eager_step(twins);
  twins.both([](Optimizer& o) { o.state("head.1").set_step(7); });
  twins.fill_grads(pool_, 100, 1);
  check(cudaDeviceSynchronize());
  twins.use_grads(1);
  const RecordedGraph graph = capture(twins.cuda);
  for (int i = 0; i < 2; ++i) {
    twins.cpu.step();
    graph.run(*stream_);
  }
  EXPECT_EQ(7, twins.cuda.state("head.1").step());
  twins.both([](Optimizer& o) { o.thaw("head.1"); });
  twins.use_grads(0);
  eager_step(twins);
  EXPECT_EQ(8, twins.cuda.state("head.1").step());
  twins.expect_equal("at the end");
}

TEST_F(Graphs, CountOnWhereSlotsAreBound) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  const RecordedGraph graph = capture(twins.cuda);
  run(twins, graph);
  std::int64_t steps = 2;
  std::vector<std::unique_ptr<DeviceMemory>> bound;
  for (const auto& [name, slot] : {std::pair("body.0", "exp_avg"), {"head.0", "momentum_buffer"}}) {
    StateRef state = twins.cuda.state(name);
    TensorView memory = state.slot(slot);
    bound.push_back(std::make_unique<DeviceMemory>(memory.bytes()));
    bound.back()->upload(std::string(memory.bytes(), '\0').data());
    memory.data = bound.back()->data();
    state.bind_slot(slot, memory);
    for (int i = 0; i < 2; ++i) run(twins, graph);
    steps += 2;
    EXPECT_EQ(steps, state.step()) << slot;
    run(twins, graph);
    twins.both([name = name](Optimizer& o) { o.state(name).set_step(100); });
    EXPECT_EQ(100, state.step()) << slot;
    ++steps;
  }
  eager_step(twins);
  twins.expect_equal_steps("at the end");
}

TEST_F(Graphs, FollowStepCountsThatAreSet) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  const RecordedGraph graph = capture(twins.cuda);
  run(twins, graph);
  twins.both([](Optimizer& o) { o.state("body.0").set_step(41); });
  EXPECT_EQ(41, twins.cuda.state("body.0").step());
  run(twins, graph);
  EXPECT_EQ(42, twins.cuda.state("body.0").step());
  twins.expect_equal("at the end");
}

TEST_F(Graphs, FollowStateThatIsLoaded) {
  ReadyTwins twins(two_groups());
  eager_step(twins);
  const RecordedGraph graph = capture(twins.cuda);
  const StateDict early = twins.cpu.state_dict();
  for (int i = 0; i < 3; ++i) run(twins, graph);
  twins.both([](Optimizer& o) { o.group("body").set_lr(0.5); });
  twins.cpu.load_state_dict(early);
  twins.cuda.load_state_dict(early, streams());
  EXPECT_EQ(1, twins.cuda.state("body.0").step());
  for (int i = 0; i < 3; ++i) run(twins, graph);
  EXPECT_EQ(4, twins.cuda.state("body.0").step());
  twins.expect_equal("at the end");
}

// ---- several devices ---------------------------------------------------------------------------

/// One optimizer on two devices, whose norm is one.
class TwoDevices {
 public:
  TwoDevices() {
    for (int device = 0; device < 2; ++device) {
      const std::string name = "on" + std::to_string(device);
      twins_.join(
          twins_.cuda,
          twins_.prepare({{name, AdamHyper{.lr = 1e-2}, kLayoutCases[0], kTensors}}, device));
    }
    wait();
  }
  void fill_grads(const std::vector<double>& pool, std::uint64_t step) {
    wait();
    twins_.fill_grads(pool, step);
    wait();
  }
  std::string values() {
    wait();
    return twins_.values_on_device();
  }
  Optimizer& optimizer() { return twins_.cuda; }

 private:
  static void wait() {
    for (int device = 0; device < 2; ++device) {
      const CurrentDevice current(device);
      check(cudaDeviceSynchronize());
    }
  }
  Twins twins_;
};

class GraphsOfTwoDevices : public testing::Test {
 protected:
  void SetUp() override {
    FUSESTEP_NEED_DEVICES(2);
    for (auto* event : {&forked_, &joined_}) {
      const CurrentDevice current(event == &forked_ ? 0 : 1);
      check(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    streams_[0] = std::make_unique<OwnStream>(cudaStreamNonBlocking, 0);
    streams_[1] = std::make_unique<OwnStream>(cudaStreamNonBlocking, 1);
    for (int i = 0; i < 2; ++i) views_.push_back(streams_[i]->view());
  }
  void TearDown() override {
    for (const cudaEvent_t event : {forked_, joined_}) {
      if (event != nullptr) static_cast<void>(cudaEventDestroy(event));
    }
  }
  void fork() const {
    check(cudaEventRecord(forked_, streams_[0]->get()));
    check(cudaStreamWaitEvent(streams_[1]->get(), forked_, 0));
  }
  void join() const {
    check(cudaEventRecord(joined_, streams_[1]->get()));
    check(cudaStreamWaitEvent(streams_[0]->get(), joined_, 0));
  }

  cudaEvent_t forked_ = nullptr, joined_ = nullptr;
  std::unique_ptr<OwnStream> streams_[2];
  std::vector<Stream> views_;
};

TEST_F(GraphsOfTwoDevices, ShareTheNorm) {
  TwoDevices eager, graphed;
  const StepOptions options{.max_grad_norm = 0.5, .skip_nonfinite = true, .streams = views_};
  for (TwoDevices* each : {&eager, &graphed}) {
    each->fill_grads(ordinary_pool(), 1);
    each->optimizer().step(options);
  }
  const RecordedGraph graph(*streams_[0], [&] {
    fork();
    graphed.optimizer().step(options);
    join();
  });
  std::vector<double> with_inf = ordinary_pool();
  for (std::size_t i = 0; i < with_inf.size(); i += 500) with_inf[i] = HUGE_VAL;
  for (std::uint64_t i = 0; i < 10; ++i) {
    for (TwoDevices* each : {&eager, &graphed}) {
      each->fill_grads(i % 4 == 3 ? with_inf : ordinary_pool(), i);
      each->optimizer().group("on1").set_lr(1e-2 / static_cast<double>(i + 1));
    }
    graphed.optimizer().sync_hyper(views_);
    eager.optimizer().step(options);
    graph.run(*streams_[0]);
    ASSERT_EQ(eager.values(), graphed.values()) << i;
  }
  EXPECT_EQ(2, graphed.optimizer().skipped_steps());
  EXPECT_EQ(9, graphed.optimizer().state("on1.0").step());
  EXPECT_EQ(eager.optimizer().last_grad_norm().norm, graphed.optimizer().last_grad_norm().norm);
}

/// Whether or not the other device's stream has joined the capture.
TEST_F(GraphsOfTwoDevices, AreOneDevicesWhereTheOthersHasBeenFrozen) {
  for (const bool joins : {false, true}) {
    TwoDevices eager, graphed;
    const StepOptions options{.max_grad_norm = 0.5, .streams = views_};
    for (TwoDevices* each : {&eager, &graphed}) {
      each->fill_grads(ordinary_pool(), 1);
      each->optimizer().step(options);
      each->optimizer().freeze("on1");
    }
    const RecordedGraph graph(*streams_[0], [&] {
      if (joins) fork();
      graphed.optimizer().step(options);
      if (joins) join();
    });
    for (std::uint64_t i = 0; i < 3; ++i) {
      for (TwoDevices* each : {&eager, &graphed}) each->fill_grads(ordinary_pool(), i);
      eager.optimizer().step(options);
      graph.run(*streams_[0]);
      ASSERT_EQ(eager.values(), graphed.values()) << i;
    }
    EXPECT_EQ(4, graphed.optimizer().state("on0.0").step());
    EXPECT_EQ(1, graphed.optimizer().state("on1.0").step());
    EXPECT_EQ(eager.optimizer().last_grad_norm().norm, graphed.optimizer().last_grad_norm().norm);
  }
}

TEST_F(GraphsOfTwoDevices, MustBeOneGraph) {
  TwoDevices both;
  const StepOptions options{.streams = views_};
  both.optimizer().step(options);
  const std::string before = both.values();
  const auto message = [&] {
    try {
      both.optimizer().step(options);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  std::string alone, apart;
  {
    const RecordedGraph graph(*streams_[0], [&] { alone = message(); });
  }
  {
    const RecordedGraph graph(
        *streams_[0], [&] { const RecordedGraph other(*streams_[1], [&] { apart = message(); }); },
        cudaStreamCaptureModeRelaxed);
  }
  EXPECT_EQ(
      "the step cannot be captured into a CUDA graph: group 'on1', parameter 'on1.0' lives on "
      "cuda:1, whose stream is not captured into the graph that cuda:0's is; let it wait for an "
      "event that was recorded on the captured stream first",
      alone);
  EXPECT_EQ(alone, apart);
  EXPECT_EQ(before, both.values());
}

// ---- what cannot be captured -------------------------------------------------------------------

class Refused : public Graphs {
 protected:
  void SetUp() override {
    Graphs::SetUp();
    if (IsSkipped()) return;
    twins_ = std::make_unique<ReadyTwins>(two_groups());
    eager_step(*twins_);
    check(cudaStreamSynchronize(stream_->get()));
  }

  /// Refused with this message; the capture can go on, nothing has changed, and after the remedy
  /// it works.
  void expect(const std::string& message, const StepOptions& options,
              const std::function<void(Optimizer&)>& remedy) {
    Optimizer& optimizer = twins_->cuda;
    check(cudaDeviceSynchronize());
    const std::string before = twins_->values_on_device();
    std::string got = "nothing was refused";
    {
      const RecordedGraph graph(*stream_, [&] {
        try {
          optimizer.step(on_stream(options));
        } catch (const InvalidArgument& error) {
          got = error.what();
        }
      });
      graph.run(*stream_);
      check(cudaStreamSynchronize(stream_->get()));
    }
    EXPECT_EQ("the step cannot be captured into a CUDA graph: " + message, got);
    EXPECT_EQ(before, twins_->values_on_device());
    remedy(optimizer);
    StepOptions possible = options;
    possible.skip = false;
    possible.skip_source = possible.grad_multiplier_source = possible.loss_scale_source = {};
    const std::int64_t steps = optimizer.state("head.0").step();
    const RecordedGraph graph = capture(optimizer, possible);
    graph.run(*stream_);
    EXPECT_EQ(steps + 1, optimizer.state("head.0").step());
  }
  static void nothing(Optimizer&) {}
  std::function<void(Optimizer&)> step() {
    return [this](Optimizer& o) { o.step(on_stream()); };
  }
  std::function<void(Optimizer&)> sync() {
    return [this](Optimizer& o) { o.sync_hyper(streams()); };
  }

  std::unique_ptr<Twins> twins_;
};

TEST_F(Refused, StateThatIsNotThereYet) {
  twins_->add({{"late", AdamHyper{}, kLayoutCases[0], {{3}}}});
  expect(
      "group 'late', parameter 'late.0' has no slot 'exp_avg' yet; make one step outside of the "
      "capture first",
      {}, step());
  twins_->add({{"later", SgdHyper{}, kLayoutCases[0], {{3}}}});
  expect(
      "group 'later', parameter 'later.0' has not stepped yet; make one step outside of the "
      "capture first",
      {}, step());
}

TEST_F(Refused, MissingGradients) {
  twins_->set_grad("head.1", false);
  expect("group 'head', parameter 'head.1' has no gradient; set one, or freeze the parameter", {},
         [&](Optimizer& o) {
           o.freeze("head.1");
           o.step(on_stream());
         });
}

TEST_F(Refused, OtherParametersThanLastTime) {
  twins_->cuda.freeze("head.1");
  expect(
      "which parameters step on cuda:0, or where their values and slots lie, has changed since the "
      "last step; make one step outside of the capture first",
      {}, step());
}

TEST_F(Refused, SettingsThatWait) {
  twins_->cuda.group("head").set_lr(0.5);
  expect("settings of group 'head' have changed and are not on cuda:0 yet; call sync_hyper() first",
         {}, sync());
  twins_->cuda.group("body").set_lr(0.5);
  expect("settings of group 'body' have changed and are not on cuda:0 yet; call sync_hyper() first",
         {}, step());
}

TEST_F(Refused, StepCountsThatWait) {
  twins_->cuda.state("body.1").set_step(9);
  expect(
      "the step count of group 'body', parameter 'body.1' was set and is not on cuda:0 yet; call "
      "sync_hyper() first",
      {}, sync());
  EXPECT_EQ(10, twins_->cuda.state("body.1").step());
}

TEST_F(Refused, ANormThatNoStepHasNeeded) {
  const StepOptions options{.max_grad_norm = 1.0};
  expect(
      "it is the first that needs the norm of the gradients on cuda:0; make one step with the same "
      "options outside of the capture first",
      options, [&](Optimizer& o) { o.step(on_stream(options)); });
}

TEST_F(Refused, OtherKernelsThanLastTime) {
  ASSERT_TRUE(twins_->cuda.can_store_grads());
  const StepOptions options{.store_unscaled_grads = true};
  expect(
      "store_unscaled_grads is not as in the last step; make one step with the same options "
      "outside of the capture first",
      options, [&](Optimizer& o) { o.step(on_stream(options)); });
}

TEST_F(Refused, WhatOnlyTheHostKnows) {
  float one = 1;
  expect("skip is decided by the host, once for all runs of the graph; use skip_source",
         {.skip = true}, nothing);
  expect(
      "skip_source lives on cpu, and group 'body', parameter 'body.0' on cuda:0; only a scalar of "
      "the same device can be read when the graph runs",
      {.skip_source = view(&one, {})}, step());
  expect(
      "loss_scale_source lives on cpu, and group 'body', parameter 'body.0' on cuda:0; only a "
      "scalar "
      "of the same device can be read when the graph runs",
      {.loss_scale_source = view(&one, {})}, nothing);
  expect(
      "grad_multiplier_source lives on cpu, and group 'body', parameter 'body.0' on cuda:0; only a "
      "scalar of the same device can be read when the graph runs",
      {.grad_multiplier_source = view(&one, {})}, nothing);
}

/// What a refused call has named makes no device one that a step is for.
TEST_F(Refused, WhateverWasRefusedBefore) {
  float one = 1;
  twins_->cuda.step(on_stream({.max_grad_norm = 1.0}));
  expect(
      "skip_source lives on cpu, and group 'body', parameter 'body.0' on cuda:0; only a scalar of "
      "the same device can be read when the graph runs",
      {.skip_source = view(&one, {}), .max_grad_norm = 1.0}, nothing);
  twins_->cuda.group("body").set_lr(0.5);
  sync()(twins_->cuda);
  twins_->cuda.group("head").set_lr(0.5);
  expect("settings of group 'head' have changed and are not on cuda:0 yet; call sync_hyper() first",
         {}, sync());
}

TEST_F(Refused, ParametersOfTheCpu) {
  std::vector<float> value(3, 1.0f), grad(3, 1.0f);
  twins_->cuda.add_group("host", AdamHyper{},
                         {{"h", view(value.data(), {3}), view(grad.data(), {3})}});
  twins_->cuda.step(on_stream());
  expect(
      "group 'host', parameter 'h' lives on the CPU; freeze it, or step it with another optimizer",
      {}, [&](Optimizer& o) {
        o.freeze("host");
        o.step(on_stream());
      });
}

TEST_F(Refused, EverythingElseOnACapturedStream) {
  const std::string state_as_a_whole =
      "state_dict(), save() or load() cannot be captured into a CUDA graph: call it outside of the "
      "capture";
  const StateDict state = twins_->cpu.state_dict();
  const std::pair<std::function<void(Optimizer&)>, std::string> calls[] = {
      {[&](Optimizer& o) { o.sync_hyper(streams()); },
       "sync_hyper() cannot be captured into a CUDA graph: call it outside of the capture"},
      {[&](Optimizer& o) { o.grad_norm(streams()); },
       "grad_norm() cannot be captured into a CUDA graph: call it outside of the capture"},
      {[&](Optimizer& o) { o.refresh_master_weights(streams()); },
       "refresh_master_weights() cannot be captured into a CUDA graph: call it outside of the "
       "capture"},
      {[&](Optimizer& o) { o.norm_begin(Device::cuda(), streams()); },
       "norm_begin() cannot be captured into a CUDA graph: call it outside of the capture"},
      {[&](Optimizer& o) { o.state_dict(streams()); }, state_as_a_whole},
      {[&](Optimizer& o) { o.load_state_dict(state, streams()); }, state_as_a_whole},
  };
  twins_->cuda.grad_norm();
  twins_->cuda.group("body").set_lr(1e-3);
  twins_->cpu.group("body").set_lr(1e-3);
  for (const auto& [call, message] : calls) {
    std::string got;
    const RecordedGraph graph(*stream_, [&, run = &call] {
      try {
        (*run)(twins_->cuda);
      } catch (const InvalidArgument& error) {
        got = error.what();
      }
    });
    EXPECT_EQ(message, got);
  }
  eager_step(*twins_);
  twins_->expect_equal("at the end");
}

/// The default stream waits for blocking ones, so it cannot be used while they are captured.
TEST_F(Refused, TheDefaultStreamBesideABlockingOne) {
  const OwnStream blocking(cudaStreamDefault);
  std::string got;
  const RecordedGraph graph(blocking, [&] {
    try {
      twins_->cuda.step();
    } catch (const InvalidArgument& error) {
      got = error.what();
    }
  });
  EXPECT_EQ(
      "cuda:0: the default stream cannot be used while a stream that it waits for is captured into "
      "a CUDA graph: pass the captured stream, or capture one made with cudaStreamNonBlocking",
      got);
  eager_step(*twins_);
  twins_->expect_equal("at the end");
}

TEST_F(Refused, ACaptureThatIsInvalid) {
  check(cudaStreamBeginCapture(stream_->get(), cudaStreamCaptureModeGlobal));
  EXPECT_NE(cudaSuccess, cudaStreamSynchronize(stream_->get()));
  static_cast<void>(cudaGetLastError());
  try {
    twins_->cuda.step(on_stream());
    ADD_FAILURE() << "was captured";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(
        "cuda:0: an earlier call has invalidated the capture of its stream: end it and begin again",
        error.what());
  }
  cudaGraph_t graph = nullptr;
  EXPECT_NE(cudaSuccess, cudaStreamEndCapture(stream_->get(), &graph));
  static_cast<void>(cudaGetLastError());
  eager_step(*twins_);
  twins_->expect_equal("at the end");
}

}  // namespace
}  // namespace fusestep::test
