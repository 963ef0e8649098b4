// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Flat groups on a device: the same bits as ordinary groups there and on the CPU, their buffers
// made, filled and cleared in the order of the caller's stream, outside of graphs and in them.
#include <gtest/gtest.h>

#include "own_stream.h"
#include "twins.h"

namespace fusestep::test {
namespace {

const std::vector<TensorSpec> kTensors = {{5}, {1031, 1, 2}, {0}, {4100}};

std::vector<GroupSpec> all_layouts(bool stores_grads) {
  std::vector<GroupSpec> groups;
  for (const LayoutCase& layout : all_layout_cases()) {
    if (layout.stores_grads != stores_grads) continue;
    for (const RuleCase& rule : variant_cases()) {
      groups.push_back({rule.name + " " + layout.name, rule.hyper, layout, {{5}, {70, 1, 2}, {0}}});
    }
  }
  return groups;
}

/// Twins, and on the device a third optimizer of the same groups, flat.
class Triplets : public Twins {
 public:
  explicit Triplets(const std::vector<GroupSpec>& groups, std::span<const Stream> streams = {})
      : Twins(groups) {
    check(cudaDeviceSynchronize());
    for (const GroupSpec& group : groups) {
      std::vector<Parameter> parameters;
      for (const ParameterRef& p : cuda.group(group.name).parameters()) {
        parameters.push_back({p.name(), p.value(), p.grad()});
      }
      flat.add_flat_group(group.name, group.hyper, std::move(parameters), group.layout.options(),
                          streams);
    }
  }
  /// The gradients of the others, from the CPU's memory.
  void give_gradients() {
    for_each([&](ParameterRef& p, const ParameterRef& on_cpu) {
      const TensorView from = on_cpu.grad();
      check(cudaMemcpy(p.grad().data, from.data, from.bytes(), cudaMemcpyHostToDevice));
    });
    check(cudaDeviceSynchronize());  // it may return before all of it is there
  }
  void expect_flat_equal(const std::string& when) {
    check(cudaDeviceSynchronize());
    for_each([&](ParameterRef& p, const ParameterRef& on_cpu) {
      const StateRef state = flat.state(p.name()), expected = cpu.state(p.name());
      EXPECT_EQ(state.step(), expected.step()) << when << ": " << p.name();
      ASSERT_EQ(state.slot_names(), expected.slot_names()) << when << ": " << p.name();
      expect_same(p.value(), on_cpu.value(), when + ": value of " + p.name());
      expect_same(p.grad(), on_cpu.grad(), when + ": gradient of " + p.name());
      for (const std::string& slot : expected.slot_names()) {
        expect_same(state.slot(slot), expected.slot(slot), when + ": " + slot + " of " + p.name());
      }
    });
  }

  Optimizer flat;

 private:
  template <class F>
  void for_each(F&& f) {
    for (const GroupRef& group : flat.groups()) {
      for (ParameterRef& p : group.parameters()) f(p, cpu.parameter(p.name()));
    }
  }
  static void expect_same(const TensorView& got, const TensorView& expected,
                          const std::string& what) {
    ASSERT_EQ(got.bytes(), expected.bytes()) << what;
    std::string bytes(got.bytes(), '\0');
    if (bytes.empty()) return;
    check(cudaMemcpy(bytes.data(), got.data, bytes.size(), cudaMemcpyDeviceToHost));
    ASSERT_TRUE(canonical(bytes.data(), got.dtype, got.size()) == canonical(expected)) << what;
  }
};

class FlatOnDevice : public testing::Test {
 protected:
  void SetUp() override { FUSESTEP_NEED_DEVICES(1); }
};

TEST_F(FlatOnDevice, StepAsOthersDoForEveryRuleAndLayout) {
  for (const bool stores_grads : {false, true}) {
    Triplets all(all_layouts(stores_grads));
    const std::vector<double> pool = ordinary_pool();
    DeviceScalar<float> scale(4.0f);
    float scale_on_cpu = 4.0f;
    for (std::uint64_t step = 1; step <= 4; ++step) {
      all.fill_grads(pool, step);
      all.give_gradients();
      StepOptions options{.store_unscaled_grads = stores_grads};
      if (step > 2) options.max_grad_norm = 0.5;
      StepOptions on_cpu = options;
      if (stores_grads) {
        options.loss_scale_source = scale.view();
        on_cpu.loss_scale_source = view(&scale_on_cpu, {});
      }
      all.cpu.step(on_cpu);
      all.cuda.step(options);
      all.flat.step(options);
      if (step > 2) {
        EXPECT_EQ(bits(all.cpu.last_grad_norm().norm), bits(all.flat.last_grad_norm().norm));
      }
    }
    all.expect_flat_equal("after four steps");
  }
}

/// Small and large, plain and flat: what a warp reads is whole lines then.
TEST_F(FlatOnDevice, HaveStateThatBeginsAtLinesOfTheCacheAsThatOfOthers) {
  std::vector<GroupSpec> groups;
  for (const LayoutCase& layout : all_layout_cases()) {
    if (layout.stores_grads) continue;
    groups.push_back({layout.name, AdamHyper{}, layout, {{5}, {150'001}, {0}, {33}}});
  }
  Triplets all(groups);
  all.cuda.step();
  all.flat.step();
  const auto expect_aligned = [](const TensorView& memory, const std::string& what) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data) % 256, 0u) << what;
  };
  for (const GroupRef& group : all.flat.groups()) {
    for (const ParameterRef& p : group.parameters()) {
      expect_aligned(p.value(), p.name());
      expect_aligned(p.grad(), p.name());
      for (Optimizer* optimizer : {&all.cuda, &all.flat}) {
        const StateRef state = optimizer->state(p.name());
        for (const std::string& slot : state.slot_names()) {
          expect_aligned(state.slot(slot), slot + " of " + p.name());
        }
      }
    }
  }
}

/// What is enqueued before is what is moved; what is enqueued behind sees it moved.
TEST_F(FlatOnDevice, AreMadeInTheOrderOfTheStream) {
  const OwnStream stream;
  const std::vector<Stream> streams = {stream.view()};
  Triplets all({{"a", AdamHyper{}, kLayoutCases[0], kTensors}}, streams);
  const TensorView grads = all.flat.group("a").flat_buffers()[0].grads;
  check(cudaMemsetAsync(grads.data, 0x3f, grads.bytes(), stream.get()));
  all.flat.group("a").zero_grad(streams);
  all.flat.step({.streams = streams});
  for (const ParameterRef& p : all.cpu.group("a").parameters()) {
    const TensorView grad = p.grad();
    if (grad.bytes() != 0) std::memset(grad.data, 0, grad.bytes());
  }
  all.cpu.step();
  all.expect_flat_equal("cleared and stepped");
}

/// zero_grad(), something that writes gradients, and the step: as training steps are captured.
TEST_F(FlatOnDevice, StepInGraphsAfterAClearThatIsCapturedToo) {
  const OwnStream stream;
  const std::vector<Stream> streams = {stream.view()};
  Triplets all({{"a", AdamHyper{.lr = 1e-2}, kLayoutCases[0], kTensors},
                {"b", SgdHyper{.lr = 1e-2, .momentum = 0.9}, kLayoutCases[3], kTensors}},
               streams);
  const StepOptions options{.max_grad_norm = 0.5, .streams = streams};
  const auto clear_on_cpu = [&] {
    for (const GroupRef& group : all.cpu.groups()) {
      for (const ParameterRef& p : group.parameters()) {
        if (p.grad().bytes() != 0) std::memset(p.grad().data, 0, p.grad().bytes());
      }
    }
  };
  all.give_gradients();
  all.cpu.step({.max_grad_norm = 0.5});
  all.flat.step(options);

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
  all.flat.step(options);
  for (const char* name : {"a", "b"}) all.flat.group(name).zero_grad(streams);
  check(cudaStreamEndCapture(stream.get(), &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphDestroy(graph));
  for (int i = 0; i < 20; ++i) {
    if (i % 3 == 0) {
      check(cudaDeviceSynchronize());
      all.fill_grads(ordinary_pool(), static_cast<std::uint64_t>(i));
      all.give_gradients();
    }
    if (i % 5 == 0) {
      for (Optimizer* o : {&all.cpu, &all.flat}) o->group("a").set_lr(1e-2 / (i + 1));
      all.flat.sync_hyper(streams);
    }
    check(cudaGraphLaunch(exec, stream.get()));
    all.cpu.step({.max_grad_norm = 0.5});
    clear_on_cpu();
  }
  all.expect_flat_equal("twenty runs");
  check(cudaGraphExecDestroy(exec));
}

TEST_F(FlatOnDevice, AreNotMadeInACapture) {
  const OwnStream stream;
  const std::vector<Stream> streams = {stream.view()};
  Triplets all({{"a", AdamHyper{}, kLayoutCases[0], kTensors}});
  const TensorView value = all.cuda.parameter("a.0").value();
  check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
  EXPECT_THROW(all.flat.add_flat_group("late", AdamHyper{}, {{"late", value}}, {}, streams),
               InvalidArgument);
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream.get(), &graph));
  check(cudaGraphDestroy(graph));
  EXPECT_EQ(all.flat.groups().size(), 1u);
  all.flat.add_flat_group("late", AdamHyper{}, {{"late", value}});
}

}  // namespace
}  // namespace fusestep::test
