// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Two optimizers that must never differ by a bit: one on the CPU, one on a CUDA device.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "slab.h"

namespace fusestep::test {

struct TensorSpec {
  std::int64_t size;
  int value_offset = 0, grad_offset = 0;  // elements behind a 64-byte boundary
  std::array<int, 3> slot_offset = {};
  bool bind_slots = false;  // slots are the caller's
};

struct GroupSpec {
  std::string name;
  Hyper hyper;
  LayoutCase layout = kLayoutCases[0];
  std::vector<TensorSpec> tensors;
  bool with_grads = true;
  bool flat = false;  // values and gradients are copied when it joins, and stay what they are then
};

/// Skips the test where there is no device, or not enough of them.
#define FUSESTEP_NEED_DEVICES(wanted)                                                         \
  if (const int devices = ::fusestep::cuda_device_count(); devices < (wanted)) {              \
    GTEST_SKIP() << "needs " << (wanted) << " CUDA device(s): " << ::fusestep::cuda_status(); \
  }

class Twins {
 public:
  explicit Twins(const std::vector<GroupSpec>& groups = {}, int device = 0,
                 OptimizerOptions options = {})
      : cuda(std::move(options)), device_(device) {
    if (!groups.empty()) add(groups);
  }

  /// Tensors are named "<group>.0", "<group>.1", ...
  void add(const std::vector<GroupSpec>& groups) {
    const int batch = prepare(groups, device_);
    join(cpu, batch);
    join(cuda, batch);
  }
  /// The memory of groups that join later.
  int prepare(const std::vector<GroupSpec>& groups, int device) {
    Batch& batch = batches_.emplace_back();
    batch.groups = groups;
    batch.device = device;
    for (const GroupSpec& group : groups) {
      for (std::size_t i = 0; i < group.tensors.size(); ++i) {
        const TensorSpec& tensor = group.tensors[i];
        batch.names.push_back(group.name + "." + std::to_string(i));
        batch.values.add(group.layout.value, tensor.size, tensor.value_offset);
        for (Slab& grads : batch.grads) {
          grads.add(group.layout.grad, tensor.size, tensor.grad_offset);
        }
      }
    }
    for (Slab* slab : {&batch.values, &batch.grads[0], &batch.grads[1]}) {
      slab->allocate(device);
      slab->fill([&](int i, std::int64_t k) {
        return number(77 + static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(k));
      });
      slab->upload();
    }
    allocate_bound_slots(batch);
    return static_cast<int>(batches_.size()) - 1;
  }
  /// `to` is cpu or cuda.
  void join(Optimizer& to, int index) {
    Batch& batch = batches_[static_cast<std::size_t>(index)];
    const bool on_cpu = &to == &cpu;
    const auto view = [&](Slab& slab, int i) {
      return on_cpu ? slab.host_view(i) : slab.device_view(i);
    };
    int tensor = 0;
    for (const GroupSpec& group : batch.groups) {
      std::vector<Parameter> parameters;
      for (std::size_t k = 0; k < group.tensors.size(); ++k, ++tensor) {
        parameters.push_back({batch.name(tensor), view(batch.values, tensor),
                              group.with_grads ? view(batch.grads[0], tensor) : TensorView{}});
      }
      if (group.flat) {
        to.add_flat_group(group.name, group.hyper, std::move(parameters), group.layout.options());
      } else {
        to.add_group(group.name, group.hyper, std::move(parameters), group.layout.options());
      }
    }
    for (int i = 0; i < batch.slots.count(); ++i) {
      const auto& [parameter, slot] = batch.bound[static_cast<std::size_t>(i)];
      to.state(parameter).bind_slot(slot, view(batch.slots, i));
    }
    (on_cpu ? batch.joined_cpu : batch.joined_cuda) = true;
  }

  /// New gradients in set 0 or 1 for all groups: an excerpt of a pool, another for every step.
  void fill_grads(const std::vector<double>& pool, std::uint64_t step, int set = 0) {
    for (Batch& batch : batches_) {
      fill_from_pool(batch.grads[set], pool, step);
      batch.grads[set].upload();
    }
  }
  /// The same on a stream, from pinned memory that must live until the copy has run.
  std::vector<std::shared_ptr<void>> enqueue_grads(const std::vector<double>& pool,
                                                   std::uint64_t step, cudaStream_t stream) {
    std::vector<std::shared_ptr<void>> staged;
    for (Batch& batch : batches_) {
      Slab& grads = batch.grads[0];
      fill_from_pool(grads, pool, step);
      const std::size_t bytes = grads.memory().bytes();
      void* pinned = nullptr;
      check(cudaHostAlloc(&pinned, bytes, cudaHostAllocDefault));
      staged.emplace_back(pinned, [](void* data) { static_cast<void>(cudaFreeHost(data)); });
      std::memcpy(pinned, grads.host(), bytes);
      check(cudaMemcpyAsync(grads.memory().data(), pinned, bytes, cudaMemcpyHostToDevice, stream));
    }
    return staged;
  }
  /// From now on the gradients of every tensor are those of this set.
  void use_grads(int set) {
    use_grads(cpu, set);
    use_grads(cuda, set);
  }
  void use_grads(Optimizer& of, int set) {
    for (Batch& batch : batches_) {
      if (!(&of == &cpu ? batch.joined_cpu : batch.joined_cuda)) continue;
      Slab& grads = batch.grads[set];
      for (int i = 0; i < grads.count(); ++i) {
        of.parameter(batch.name(i))
            .set_grad(&of == &cpu ? grads.host_view(i) : grads.device_view(i));
      }
    }
  }
  void set_grad(const std::string& name, bool present) {
    for (Batch& batch : batches_) {
      for (int i = 0; i < batch.values.count(); ++i) {
        if (batch.name(i) != name) continue;
        cpu.parameter(name).set_grad(present ? batch.grads[0].host_view(i) : TensorView{});
        cuda.parameter(name).set_grad(present ? batch.grads[0].device_view(i) : TensorView{});
      }
    }
  }

  template <class F>
  void both(F&& f) {
    f(cpu);
    f(cuda);
  }
  void step(const StepOptions& options = {}) {
    cpu.step(options);
    cuda.step(options);
  }

  /// Parameters, gradients, slots, step counts, and nothing written beside them.
  void expect_equal(const std::string& when) {
    expect_equal_memory(when);
    for (Batch& batch : batches_) {
      if (!batch.joined_cpu || !batch.joined_cuda) continue;
      for (int i = 0; i < batch.values.count() && !testing::Test::HasFatalFailure(); ++i) {
        expect_equal_state(batch.name(i), batch.device, when);
      }
    }
  }
  /// Faster: of the slots, those of the caller; no step counts.
  void expect_equal_memory(const std::string& when) {
    expect_equal_values(when);
    for (Batch& batch : batches_) {
      batch.grads[0].expect_equal(when + ": gradients");
      if (batch.slots.count() != 0) batch.slots.expect_equal(when + ": slots");
    }
  }
  void expect_equal_steps(const std::string& when) {
    for (const GroupRef& group : cpu.groups()) {
      for (const ParameterRef& parameter : group.parameters()) {
        EXPECT_EQ(cpu.state(parameter.name()).step(), cuda.state(parameter.name()).step())
            << when << ": " << parameter.name();
      }
    }
  }
  void expect_equal_slot_names(const std::string& when) {
    for (const GroupRef& group : cpu.groups()) {
      for (const ParameterRef& parameter : group.parameters()) {
        EXPECT_EQ(cpu.state(parameter.name()).slot_names(),
                  cuda.state(parameter.name()).slot_names())
            << when << ": " << parameter.name();
      }
    }
  }
  /// Faster still: parameters only.
  void expect_equal_values(const std::string& when) {
    for (Batch& batch : batches_) {
      const CurrentDevice current(batch.device);
      check(cudaDeviceSynchronize());
      batch.values.expect_equal(when + ": values");
    }
  }
  /// The device's parameters as bytes.
  std::string values_on_device() {
    std::string all;
    for (Batch& batch : batches_) all += batch.values.download();
    return all;
  }

  Optimizer cpu, cuda;

 private:
  /// Tensors of groups that were added together.
  struct Batch {
    std::vector<GroupSpec> groups;
    int device = 0;
    std::vector<std::string> names;
    std::vector<std::pair<std::string, std::string>> bound;  // of slots: parameter, slot
    Slab values, grads[2], slots;
    bool joined_cpu = false, joined_cuda = false;
    const std::string& name(int i) const { return names[static_cast<std::size_t>(i)]; }
  };

  static void fill_from_pool(Slab& grads, const std::vector<double>& pool, std::uint64_t step) {
    grads.fill([&](int i, std::int64_t k) {
      return pool[(step * 7919 + static_cast<std::uint64_t>(i) * 613 +
                   static_cast<std::uint64_t>(k)) %
                  pool.size()];
    });
  }

  static void allocate_bound_slots(Batch& batch) {
    std::size_t index = 0;
    for (const GroupSpec& group : batch.groups) {
      const std::vector<std::string> names = slots_of(group.hyper);
      for (const TensorSpec& tensor : group.tensors) {
        const std::string& parameter = batch.names[index++];
        for (std::size_t k = 0; tensor.bind_slots && k < names.size(); ++k) {
          batch.slots.add(group.layout.slot, tensor.size, tensor.slot_offset[k]);
          batch.bound.emplace_back(parameter, names[k]);
        }
        if (!tensor.bind_slots || !group.layout.master) continue;
        batch.slots.add(DType::kFloat32, tensor.size, tensor.slot_offset[0]);
        batch.bound.emplace_back(parameter, kMasterWeight);
      }
    }
    if (batch.bound.empty()) return;
    batch.slots.allocate(batch.device);
    batch.slots.fill([](int i, std::int64_t k) {
      return std::fabs(number(99 + static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(k)));
    });
    batch.slots.upload();
  }

  static std::vector<std::string> slots_of(const Hyper& hyper) {
    if (const auto* adam = std::get_if<AdamHyper>(&hyper)) {
      if (adam->amsgrad) return {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
      return {"exp_avg", "exp_avg_sq"};
    }
    if (const auto* sgd = std::get_if<SgdHyper>(&hyper)) {
      return sgd->momentum != 0 ? std::vector<std::string>{"momentum_buffer"}
                                : std::vector<std::string>{};
    }
    const auto& rmsprop = std::get<RmspropHyper>(hyper);
    std::vector<std::string> names = {"square_avg"};
    if (rmsprop.momentum != 0) names.push_back("momentum_buffer");
    if (rmsprop.centered) names.push_back("grad_avg");
    return names;
  }

  void expect_equal_state(const std::string& name, int device, const std::string& when) {
    const StateRef on_cpu = cpu.state(name), on_cuda = cuda.state(name);
    EXPECT_EQ(on_cpu.step(), on_cuda.step()) << when << ": " << name;
    ASSERT_EQ(on_cpu.slot_names(), on_cuda.slot_names()) << when << ": " << name;
    const CurrentDevice current(device);
    const TensorView value = cuda.parameter(name).value();
    ASSERT_TRUE(same_elements(value, cpu.parameter(name).value())) << when << ": value of " << name;
    for (const std::string& slot : on_cpu.slot_names()) {
      ASSERT_TRUE(same_elements(on_cuda.slot(slot), on_cpu.slot(slot)))
          << when << ": " << slot << " of " << name;
    }
  }
  static bool same_elements(const TensorView& on_device, const TensorView& expected) {
    std::string bytes(on_device.bytes(), '\0');
    if (bytes.empty()) return true;
    check(cudaMemcpy(bytes.data(), on_device.data, bytes.size(), cudaMemcpyDeviceToHost));
    return std::memcmp(bytes.data(), expected.data, bytes.size()) == 0 ||
           canonical(bytes.data(), on_device.dtype, on_device.size()) == canonical(expected);
  }

  int device_;
  std::deque<Batch> batches_;
};

/// Numbers for gradients.
inline std::vector<double> ordinary_pool(std::size_t size = 20011) {
  std::vector<double> pool(size);
  for (std::size_t i = 0; i < size; ++i) pool[i] = number(5, i);
  return pool;
}
inline std::vector<double> special_pool(DType dtype, std::size_t size = 20011) {
  std::vector<double> pool(size);
  for (std::size_t i = 0; i < size; ++i) pool[i] = special_number(6, i, dtype);
  return pool;
}

}  // namespace fusestep::test
