// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The gradient norm: its value, its bits, what is decided by it, and how devices share it.
#include <gtest/gtest.h>

#include <cmath>
#include <deque>

#include "own_stream.h"
#include "twins.h"

namespace fusestep::test {
namespace {

std::vector<GroupSpec> groups_of(const LayoutCase& layout) {
  return {{"a", AdamHyper{.lr = 1e-2}, layout, {{0}, {1}, {4095}, {4096}, {4097, 1, 3}}},
          {"b", SgdHyper{.lr = 1e-2}, layout, {{12289}, {700}, {700}, {5, 2, 7}}}};
}

class Norm : public testing::TestWithParam<LayoutCase> {
 protected:
  void SetUp() override { FUSESTEP_NEED_DEVICES(1); }
};

/// The square root of the sum over everything that steps now, in long double.
double reference_norm(Optimizer& cpu) {
  long double sum = 0;
  for (const GroupRef& group : cpu.groups()) {
    for (const ParameterRef& parameter : group.parameters()) {
      if (parameter.frozen() || !parameter.grad().present) continue;
      for (std::int64_t k = 0; k < parameter.grad().size(); ++k) {
        const long double g = read_element(parameter.grad().data, parameter.grad().dtype, k);
        sum += g * g;
      }
    }
  }
  return static_cast<double>(std::sqrt(sum));
}

TEST_P(Norm, IsRightAndHasTheBitsOfTheCpu) {
  Twins twins(groups_of(GetParam()));
  const std::vector<double> pool = ordinary_pool();
  for (std::uint64_t step = 0; step < 5; ++step) {
    twins.fill_grads(pool, step);
    const GradNorm cpu = twins.cpu.grad_norm(), cuda = twins.cuda.grad_norm();
    EXPECT_EQ(bits(cpu.norm), bits(cuda.norm));
    const double reference = reference_norm(twins.cpu);
    EXPECT_NEAR(cuda.norm, reference, reference * 1e-13);
    if (step == 2) twins.both([](Optimizer& o) { o.freeze("b.0"); });
    twins.step({.measure_grad_norm = true});
    EXPECT_EQ(bits(twins.cpu.last_grad_norm().norm), bits(twins.cuda.last_grad_norm().norm));
  }
  twins.step();
  EXPECT_TRUE(std::isnan(twins.cuda.last_grad_norm().norm));
}

TEST_P(Norm, ClipsAsTheCpuDoes) {
  Twins twins(groups_of(GetParam()));
  const std::vector<double> pool = ordinary_pool();
  for (std::uint64_t step = 0; step < 8; ++step) {
    twins.fill_grads(pool, step);
    twins.step({.grad_multiplier = step % 2 == 0 ? 1.0 : -0.25,
                .max_grad_norm = step % 4 == 3 ? 1e9 : 0.5});
  }
  twins.expect_equal("at the end");
}

TEST_P(Norm, CountsAndSkipsWhatIsNotFinite) {
  Twins twins(groups_of(GetParam()));
  const std::vector<double> ordinary = ordinary_pool();
  std::vector<double> spoilt = ordinary;
  spoilt[3] = HUGE_VAL;
  spoilt[1000] = std::nan("");
  spoilt[5000] = -HUGE_VAL;
  for (std::uint64_t step = 0; step < 6; ++step) {
    twins.fill_grads(step % 2 == 0 ? spoilt : ordinary, step / 2 * 20011);
    const std::string before = twins.values_on_device();
    twins.step({.skip_nonfinite = true});
    const GradNorm cpu = twins.cpu.last_grad_norm(), cuda = twins.cuda.last_grad_norm();
    EXPECT_EQ(cpu.nonfinite, cuda.nonfinite);
    EXPECT_EQ(step % 2 == 0, cuda.nonfinite != 0);
    EXPECT_EQ(step % 2 == 0, before == twins.values_on_device());
    twins.expect_equal("step " + std::to_string(step));
  }
  EXPECT_EQ(3, twins.cuda.skipped_steps());
}

TEST_P(Norm, InTwoHalvesIsTheSame) {
  Twins twins(groups_of(GetParam()));
  const std::vector<double> pool = ordinary_pool();
  for (std::uint64_t step = 0; step < 6; ++step) {
    twins.fill_grads(pool, step);
    if (step == 2) twins.both([](Optimizer& o) { o.freeze("b.0"); });
    twins.cuda.norm_begin(step % 2 == 0 ? Device::cuda(0) : Device::cpu());
    twins.cuda.norm_end();
    twins.step({.max_grad_norm = 0.5, .skip_nonfinite = true});
    EXPECT_EQ(bits(twins.cpu.last_grad_norm().norm), bits(twins.cuda.last_grad_norm().norm));
  }
  twins.expect_equal("at the end");
}

INSTANTIATE_TEST_SUITE_P(Layouts, Norm, testing::ValuesIn(kLayoutCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(NormOfManyBlocks, TakesSeveralRounds) {
  FUSESTEP_NEED_DEVICES(1);
  // More sums than one block of the second round adds.
  Twins twins({{"many", SgdHyper{}, kLayoutCases[3], {{4096 * 4096 + 77}, {513}}}});
  twins.fill_grads(ordinary_pool(), 1);
  const GradNorm cpu = twins.cpu.grad_norm(), cuda = twins.cuda.grad_norm();
  EXPECT_EQ(bits(cpu.norm), bits(cuda.norm));
}

/// The sums of another process arrive on the stream after norm_begin() and norm_end() have
/// returned.
TEST(NormHalves, AreWhatTheyAreWhenTheStreamGetsThere) {
  FUSESTEP_NEED_DEVICES(1);
  const OwnStream own;
  const Stream streams[] = {own.view()};
  Twins twins({{"g", AdamHyper{.lr = 1e-2}, kLayoutCases[0], {{5000}, {17}}}});
  std::deque<DeviceMemory> sent;
  const double sums[][2] = {{100.0, 0.0}, {1e-3, 0.0}, {100.0, 1.0}, {HUGE_VAL, 2.0}, {0.25, 0.0}};
  std::int64_t skipped = 0;
  for (const auto& reduced : sums) {
    twins.fill_grads(ordinary_pool(), static_cast<std::uint64_t>(skipped));
    DeviceMemory& others = sent.emplace_back(sizeof reduced, 0);
    others.upload(reduced);
    check(cudaDeviceSynchronize());
    const TensorView on_host = twins.cpu.norm_begin();
    const TensorView on_device = twins.cuda.norm_begin(Device::cuda(0), streams);
    EXPECT_EQ(on_device.shape, (std::vector<std::int64_t>{2}));
    EXPECT_EQ(on_device.device, Device::cuda(0));
    std::memcpy(on_host.data, reduced, sizeof reduced);
    check(cudaMemcpyAsync(on_device.data, others.data(), sizeof reduced, cudaMemcpyDeviceToDevice,
                          own.get()));
    twins.cpu.norm_end();
    twins.cuda.norm_end();
    const StepOptions options{.max_grad_norm = 0.5, .skip_nonfinite = true};
    twins.cpu.step(options);
    StepOptions on_stream = options;
    on_stream.streams = streams;
    twins.cuda.step(on_stream);
    const GradNorm cpu = twins.cpu.last_grad_norm(), cuda = twins.cuda.last_grad_norm();
    EXPECT_EQ(bits(cpu.norm), bits(std::sqrt(reduced[0])));
    EXPECT_EQ(bits(cpu.norm), bits(cuda.norm));
    EXPECT_EQ(cuda.nonfinite, static_cast<std::int64_t>(reduced[1]));
    skipped += reduced[1] != 0 ? 1 : 0;
    EXPECT_EQ(twins.cuda.skipped_steps(), skipped);
    EXPECT_EQ(twins.cpu.skipped_steps(), skipped);
    check(cudaDeviceSynchronize());
    twins.expect_equal("sum of squares " + std::to_string(reduced[0]));
  }
}

/// One tensor per device, the same numbers on CPU memory for one optimizer that has them all; two
/// sets of gradients, of which one is larger.
class Devices {
 public:
  Devices(const std::vector<Device>& devices, const Hyper& hyper) {
    std::vector<Parameter> mine, control;
    for (std::size_t i = 0; i < devices.size(); ++i) {
      Member& member = members_.emplace_back();
      member.value = std::make_unique<Pair>(devices[i], i + 1, 1.0);
      member.grads[0] = std::make_unique<Pair>(devices[i], i + 10, 1.0);
      member.grads[1] = std::make_unique<Pair>(devices[i], i + 20, 64.0);
      control.push_back({name(i), member.value->host.view(), member.grads[0]->host.view()});
      mine.push_back({name(i), member.value->view, member.grads[0]->view});
    }
    mixed.add_group("g", hyper, std::move(mine));
    cpu.add_group("g", hyper, std::move(control));
  }

  void use_grads(int set) {
    for (std::size_t i = 0; i < members_.size(); ++i) {
      cpu.parameter(name(i)).set_grad(members_[i].grads[set]->host.view());
      mixed.parameter(name(i)).set_grad(members_[i].grads[set]->view);
    }
  }
  void step(const StepOptions& options) {
    cpu.step(options);
    mixed.step(options);
  }
  void expect_equal(const std::string& when) {
    for (const Member& member : members_) {
      EXPECT_TRUE(member.value->host.raw() == member.value->download())
          << when << ": on " << to_string(member.value->view.device);
    }
  }
  void expect_near(const std::string& when) {
    for (const Member& member : members_) {
      const std::string bytes = member.value->download();
      for (std::int64_t k = 0; k < kSize; ++k) {
        const double expected = member.value->host.get(k);
        ASSERT_NEAR(expected, read_element(bytes.data(), DType::kFloat32, k), 1e-5)
            << when << ": on " << to_string(member.value->view.device) << ", element " << k;
      }
    }
  }

  Optimizer cpu, mixed;

 private:
  static constexpr std::int64_t kSize = 9000;
  /// An array on the CPU, and its copy somewhere.
  struct Pair {
    Pair(Device device, std::uint64_t seed, double scale)
        : host(DType::kFloat32, kSize), there(DType::kFloat32, kSize), view(there.view()) {
      host.fill([&](std::uint64_t i) { return scale * number(seed, i); });
      view.device = device;
      if (device.is_cuda()) {
        memory = std::make_unique<DeviceMemory>(host.bytes(), device.index);
        memory->upload(host.data());
        view.data = memory->data();
      } else {
        std::memcpy(view.data, host.data(), host.bytes());
      }
    }
    std::string download() const {
      if (memory == nullptr) return there.raw();
      const CurrentDevice current(memory->device());
      check(cudaDeviceSynchronize());
      return memory->download();
    }

    Array host, there;
    std::unique_ptr<DeviceMemory> memory;
    TensorView view;
  };
  struct Member {
    std::unique_ptr<Pair> value, grads[2];
  };

  static std::string name(std::size_t i) { return "p" + std::to_string(i); }

  std::vector<Member> members_;
};

void expect_devices_share_everything(Devices& devices) {
  for (int i = 0; i < 4; ++i) {
    // The order of the sum over devices is not that of one list of blocks: clip by what is
    // exact in both.
    devices.step({.max_grad_norm = i % 2 == 0 ? HUGE_VAL : 1e9});
    devices.expect_equal("step " + std::to_string(i));
    const GradNorm one = devices.cpu.grad_norm(), all = devices.mixed.grad_norm();
    EXPECT_NEAR(one.norm, all.norm, one.norm * 1e-14);
  }
  devices.step({.skip = true});
  EXPECT_EQ(1, devices.mixed.skipped_steps());
}

TEST(DevicesOfOneOptimizer, CpuAndCuda) {
  FUSESTEP_NEED_DEVICES(1);
  Devices devices({Device::cuda(0), Device::cpu(), Device::cuda(0)}, AdamHyper{});
  expect_devices_share_everything(devices);
}

TEST(DevicesOfOneOptimizer, ThreeCuda) {
  FUSESTEP_NEED_DEVICES(3);
  Devices devices({Device::cuda(2), Device::cuda(0), Device::cuda(1)}, AdamHyper{});
  expect_devices_share_everything(devices);
}

TEST(DevicesOfOneOptimizer, CpuAndThreeCuda) {
  FUSESTEP_NEED_DEVICES(3);
  Devices devices({Device::cuda(1), Device::cpu(), Device::cuda(2), Device::cuda(0)}, AdamHyper{});
  expect_devices_share_everything(devices);
}

TEST(DevicesOfOneOptimizer, TakeTheSumsOfAllProcesses) {
  FUSESTEP_NEED_DEVICES(3);
  for (const Device where : {Device::cuda(0), Device::cuda(1), Device::cpu()}) {
    for (const bool with_cpu : {false, true}) {
      std::vector<Device> devices_of = {Device::cuda(1), Device::cuda(2), Device::cuda(0)};
      if (with_cpu) devices_of.push_back(Device::cpu());
      Devices devices(devices_of, SgdHyper{.lr = 1.0});
      const double norm = devices.cpu.grad_norm().norm;
      for (int i = 0; i < 3; ++i) {
        const TensorView cpu = devices.cpu.norm_begin(), mixed = devices.mixed.norm_begin(where);
        double sums[2] = {};
        if (where.is_cuda()) {
          const CurrentDevice current(where.index);
          check(cudaDeviceSynchronize());
          check(cudaMemcpy(sums, mixed.data, sizeof sums, cudaMemcpyDeviceToHost));
        } else {
          std::memcpy(sums, mixed.data, sizeof sums);
        }
        EXPECT_NEAR(sums[0], static_cast<double*>(cpu.data)[0], sums[0] * 1e-14);
        std::memcpy(cpu.data, sums, sizeof sums);
        devices.cpu.norm_end();
        devices.mixed.norm_end();
        devices.step({.max_grad_norm = norm / 3});
        devices.expect_equal("step " + std::to_string(i) + ", sums on " + to_string(where));
      }
    }
  }
}

TEST(DevicesOfOneOptimizer, NormWhereNothingSteps) {
  FUSESTEP_NEED_DEVICES(3);
  Devices devices({Device::cuda(1)}, SgdHyper{});
  EXPECT_THROW(devices.mixed.norm_begin(Device::cuda(2)), InvalidArgument);
  EXPECT_THROW(devices.mixed.norm_begin(Device::cuda(77)), InvalidArgument);
  devices.step({.max_grad_norm = 1.0});  // as if it had not been asked for
  devices.mixed.freeze("p0");
  const TensorView none = devices.mixed.norm_begin(Device::cuda(1));
  const CurrentDevice current(1);
  check(cudaDeviceSynchronize());
  double sums[2] = {1, 1};
  check(cudaMemcpy(sums, none.data, sizeof sums, cudaMemcpyDeviceToHost));
  EXPECT_EQ(sums[0], 0.0);
  EXPECT_EQ(sums[1], 0.0);
  devices.mixed.norm_end();
  devices.mixed.step({.max_grad_norm = 1.0});
}

TEST(DevicesOfOneOptimizer, ClipByTheNormOfAll) {
  FUSESTEP_NEED_DEVICES(3);
  for (int repeat = 0; repeat < 8; ++repeat) {
    std::vector<Device> where = {Device::cuda(0), Device::cuda(1), Device::cuda(2)};
    if (repeat == 7) where.push_back(Device::cpu());
    Devices devices(where, SgdHyper{.lr = 1.0, .weight_decay = 0.01});
    const double norm = devices.cpu.grad_norm().norm;
    // Nothing waits for the devices in between, and every step has another norm.
    for (int i = 0; i < 6; ++i) {
      devices.use_grads(i % 2);
      devices.step({.max_grad_norm = norm / 3});
    }
    devices.expect_near("clipped");
    const double last = devices.cpu.last_grad_norm().norm;
    EXPECT_NEAR(last, devices.mixed.last_grad_norm().norm, last * 1e-14);
  }
}

}  // namespace
}  // namespace fusestep::test
