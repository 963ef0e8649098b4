// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Device time of a step by events, beside the device-to-device copy measured in the same run.
//
//   bench_cuda --models_file=FILE [--models=gpt2,resnet152] [--rules=adam,...]
//              [--layouts=float32,...] [Google Benchmark's own options]
#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <map>

#include "device_time.h"
#include "options.h"
#include "workload.h"

namespace fusestep::bench {
namespace {

/// Host time of one call in us, the device kept busy behind it.
template <class F>
double host_us(F&& work, int calls = 50) {
  std::vector<double> times;
  for (int i = 0; i < 9; ++i) {
    check(cudaDeviceSynchronize());
    const auto begin = std::chrono::steady_clock::now();
    for (int j = 0; j < calls; ++j) work();
    const std::chrono::duration<double, std::micro> spent =
        std::chrono::steady_clock::now() - begin;
    times.push_back(spent.count() / calls);
  }
  check(cudaDeviceSynchronize());
  return median(times);
}

/// Device time of the prepare launch for so many tensors: a step of empty ones launches nothing
/// else.
double prepare_us(std::size_t tensors, const RuleCase& rule, const LayoutCase& layout) {
  static std::map<std::pair<std::size_t, std::string>, double> known;
  const auto [entry, missing] = known.try_emplace({tensors, rule.name}, 0.0);
  if (missing) {
    const std::vector<std::int64_t> sizes(tensors, 0);
    Optimizer optimizer =
        make_optimizer(sizes, Offsets(sizes), rule, layout, nullptr, nullptr, Device::cuda());
    entry->second = device_us([&] { optimizer.step(); });
  }
  return entry->second;
}

/// The tensors of one model on the device, filled, and their optimizer.
struct Workload {
  std::vector<std::int64_t> sizes;
  Offsets offsets;
  DeviceBuffer values, grads;
  Optimizer optimizer;

  Workload(std::vector<std::int64_t> tensors, const RuleCase& rule, const LayoutCase& layout)
      : sizes(std::move(tensors)),
        offsets(sizes),
        values(static_cast<std::size_t>(offsets.total) * size_of(layout.value)),
        grads(static_cast<std::size_t>(offsets.total) * size_of(layout.grad)),
        optimizer(make_optimizer(sizes, offsets, rule, layout, values.data(), grads.data(),
                                 Device::cuda())) {
    fill(values, layout.value);
    fill(grads, layout.grad);
  }
};

void report_bytes(benchmark::State& state, const Workload& work, double moved, double us) {
  state.counters["bytes"] = moved;
  state.counters["elements"] = static_cast<double>(work.offsets.elements);
  state.counters["tensors"] = static_cast<double>(work.sizes.size());
  state.counters["gbps"] = moved / us * 1e-3;
  state.counters["roof_gbps"] = copy_rate() * 1e-3;
  state.counters["roof_fraction"] = moved / us / copy_rate();
}

void step(benchmark::State& state, const std::string& model, const std::string& models_file,
          const RuleCase& rule, const LayoutCase& layout) {
  try {
    Workload work(tensor_sizes(model, models_file), rule, layout);
    const double moved =
        static_cast<double>(work.offsets.elements) * bytes_per_element(rule, layout);
    for (auto _ : state) {
      const double total = device_us([&] { work.optimizer.step(); });
      const double prepare = prepare_us(work.sizes.size(), rule, layout);
      state.SetIterationTime(total * 1e-6);
      state.counters["device_us"] = total;
      state.counters["prepare_us"] = prepare;
      state.counters["apply_us"] = total - prepare;
      state.counters["apply_roof_fraction"] = moved / (total - prepare) / copy_rate();
      report_bytes(state, work, moved, total);
      state.counters["launches"] = 2;  // prepare, and apply of the one bucket
      state.counters["host_us"] = host_us([&] { work.optimizer.step(); }, 5);
    }
  } catch (const std::exception& error) {
    check(cudaDeviceSynchronize());
    state.SkipWithError(error.what());
  }
}

/// The norm over all gradients, then clip and step, and the plain step beside it.
void clip(benchmark::State& state, const std::string& model, const std::string& models_file,
          const LayoutCase& layout) {
  try {
    const RuleCase& rule = rule_cases()[0];
    Workload work(tensor_sizes(model, models_file), rule, layout);
    const double elements = static_cast<double>(work.offsets.elements);
    const double read_by_norm = elements * static_cast<double>(size_of(layout.grad));
    const double moved = elements * bytes_per_element(rule, layout) + read_by_norm;
    for (auto _ : state) {
      const double plain = device_us([&] { work.optimizer.step(); });
      const double total = device_us([&] { work.optimizer.step({.max_grad_norm = 1.0}); });
      state.SetIterationTime(total * 1e-6);
      state.counters["device_us"] = total;
      state.counters["norm_us"] = total - plain;
      state.counters["norm_roof_fraction"] = read_by_norm / (total - plain) / copy_rate();
      report_bytes(state, work, moved, total);
    }
  } catch (const std::exception& error) {
    state.SkipWithError(error.what());
  }
}

/// Host time of a step, nothing changed and everything changed, for so many small tensors.
void host(benchmark::State& state, int tensors) {
  const std::vector<std::int64_t> sizes(static_cast<std::size_t>(tensors), 64);
  const Offsets offsets(sizes);
  const RuleCase& rule = rule_cases()[0];
  const LayoutCase& layout = layout_cases()[0];
  const std::size_t bytes = static_cast<std::size_t>(offsets.total) * size_of(layout.value);
  DeviceBuffer values(bytes), grads(2 * bytes);
  fill(values, layout.value);
  fill(grads, layout.grad);
  Optimizer optimizer =
      make_optimizer(sizes, offsets, rule, layout, values.data(), grads.data(), Device::cuda());
  std::vector<ParameterRef> parameters;
  for (GroupRef group : optimizer.groups()) {
    for (ParameterRef parameter : group.parameters()) parameters.push_back(parameter);
  }
  std::size_t other = 0;
  for (auto _ : state) {
    const double unchanged = host_us([&] { optimizer.step(); });
    double lr = 1e-3;
    const double new_lr = host_us([&] {
      for (GroupRef group : optimizer.groups()) group.set_lr(lr *= 0.999);
      optimizer.step();
    });
    const double new_grads = host_us([&] {
      other = bytes - other;
      for (ParameterRef& parameter : parameters) {
        TensorView grad = parameter.grad();
        grad.data =
            static_cast<char*>(grad.data) +
            (other == 0 ? -static_cast<std::ptrdiff_t>(bytes) : static_cast<std::ptrdiff_t>(bytes));
        parameter.set_grad(grad);
      }
      optimizer.step();
    });
    state.SetIterationTime(unchanged * 1e-6);
    state.counters["host_us"] = unchanged;
    state.counters["new_lr_us"] = new_lr;
    state.counters["moved_us"] = new_grads;
  }
}

}  // namespace
}  // namespace fusestep::bench

int main(int argc, char** argv) {
  using namespace fusestep::bench;
  const std::string models_file = models_file_option(argc, argv);
  const auto models = option(argc, argv, "models", "resnet152,gpt2,gpt2_xl,tiny10k");
  const auto rules = option(argc, argv, "rules", "all");
  const auto layouts = option(argc, argv, "layouts", "all");
  for (const std::string& model : models) {
    for (const auto& layout : layout_cases()) {
      if (!named(layouts, layout.name)) continue;
      for (const auto& rule : rule_cases()) {
        if (!named(rules, rule.name)) continue;
        run_once(case_name(rule.name, layout.name, model),
                 [=](benchmark::State& state) { step(state, model, models_file, rule, layout); });
      }
      run_once(case_name("adam", layout.name, model) + "/clip",
               [=](benchmark::State& state) { clip(state, model, models_file, layout); });
    }
  }
  for (const int tensors : {1, 100, 1000, 10'000}) {
    run_once(case_name("adam", "float32", std::to_string(tensors) + "x64") + "/host",
             [=](benchmark::State& state) { host(state, tensors); });
  }
  if (fusestep::cuda_device_count() == 0) {
    std::fprintf(stderr, "%s\n", fusestep::cuda_status().c_str());
    return 1;
  }
  cudaDeviceProp properties;
  const bool is_known = cudaGetDeviceProperties(&properties, 0) == cudaSuccess;
  return run_all(argc, argv, {{"device", is_known ? properties.name : "unknown"}});
}
