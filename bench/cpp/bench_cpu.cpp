// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// A step on the CPU beside the roof measured in the same run: an in-place axpy, y = a x + y, 12
// bytes an element, on the same threads. Steps and axpys alternate; the medians are compared.
//
//   bench_cpu --models_file=FILE [--models=...] [--rules=...] [--layouts=...]
//             [Google Benchmark's own options]
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>

#include "cpu/parallel_for.h"
#include "options.h"
#include "workload.h"

namespace fusestep::bench {
namespace {

constexpr int kRepeats = 21;

#if defined(__x86_64__)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
void axpy_piece(float* __restrict y, const float* __restrict x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) y[i] = 0.999f * x[i] + y[i];
}

/// y = a x + y over 64M elements on all threads; us.
class Axpy {
 public:
  static constexpr std::int64_t kElements = std::int64_t{64} << 20;
  static constexpr double kBytes = 12.0 * static_cast<double>(kElements);

  double run() {
    constexpr std::int64_t piece = 1 << 16;
    const auto begin = std::chrono::steady_clock::now();
    detail::parallel_for(static_cast<int>(kElements / piece), [&](int i) {
      axpy_piece(y_.data() + i * piece, x_.data() + i * piece, piece);
    });
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
        .count();
  }

 private:
  std::vector<float> x_ = std::vector<float>(kElements, 1e-3f);
  std::vector<float> y_ = std::vector<float>(kElements, 1.0f);
};

/// Random values in (-0.5, 0.5) of a dtype.
std::vector<char> random_values(std::size_t elements, DType dtype) {
  std::vector<char> data(elements * size_of(dtype));
  std::mt19937 random(1);
  std::vector<char> pattern(std::size_t{1} << 20);
  for (std::size_t i = 0; i < pattern.size(); i += size_of(dtype)) {
    store_random(random, dtype, pattern.data() + i);
  }
  for (std::size_t done = 0; done < data.size(); done += pattern.size()) {
    std::memcpy(data.data() + done, pattern.data(), std::min(pattern.size(), data.size() - done));
  }
  return data;
}

template <class F>
double us(F&& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
      .count();
}

void step(benchmark::State& state, const std::string& model, const std::string& models_file,
          const RuleCase& rule, const LayoutCase& layout) {
  const auto sizes = tensor_sizes(model, models_file);
  const Offsets offsets(sizes);
  const auto total = static_cast<std::size_t>(offsets.total);
  std::vector<char> values = random_values(total, layout.value);
  std::vector<char> grads = random_values(total, layout.grad);
  Optimizer optimizer =
      make_optimizer(sizes, offsets, rule, layout, values.data(), grads.data(), Device::cpu());
  static Axpy axpy;
  const double moved = static_cast<double>(offsets.elements) * bytes_per_element(rule, layout);
  for (auto _ : state) {
    optimizer.step();
    std::vector<double> steps, axpys, ratios;
    for (int i = 0; i < kRepeats; ++i) {
      axpys.push_back(axpy.run());
      steps.push_back(us([&] { optimizer.step(); }));
      ratios.push_back(moved / steps.back() / (Axpy::kBytes / axpys.back()));
    }
    const double time = median(steps), roof = Axpy::kBytes / median(axpys);
    state.SetIterationTime(time * 1e-6);
    state.counters["wall_us"] = time;
    state.counters["gbps"] = moved / time * 1e-3;
    state.counters["roof_gbps"] = roof * 1e-3;
    state.counters["roof_fraction"] = median(ratios);
    state.counters["bytes"] = moved;
    state.counters["elements"] = static_cast<double>(offsets.elements);
    state.counters["tensors"] = static_cast<double>(sizes.size());
  }
}

/// Host time of a step outside the kernels, nothing changed. Empty tensors are counted and prepared
/// as all others are; with one element each the dispatch of chunks is included, and a call of a
/// loop.
void host(benchmark::State& state, int tensors, std::int64_t elements) {
  const std::vector<std::int64_t> sizes(static_cast<std::size_t>(tensors), elements);
  const Offsets offsets(sizes);
  std::vector<float> values(static_cast<std::size_t>(offsets.total)), grads(values.size());
  Optimizer optimizer = make_optimizer(sizes, offsets, rule_cases()[0], layout_cases()[0],
                                       reinterpret_cast<char*>(values.data()),
                                       reinterpret_cast<char*>(grads.data()), Device::cpu());
  const int all_threads = num_threads();
  set_num_threads(1);
  optimizer.step();
  for (auto _ : state) {
    std::vector<double> times;
    constexpr int calls = 100;
    for (int i = 0; i < kRepeats; ++i) {
      times.push_back(us([&] {
                        for (int j = 0; j < calls; ++j) optimizer.step();
                      }) /
                      calls);
    }
    state.SetIterationTime(median(times) * 1e-6);
    state.counters["host_us"] = median(times);
    state.counters["host_us_per_100_tensors"] = median(times) * 100 / tensors;
  }
  set_num_threads(all_threads);
}

}  // namespace
}  // namespace fusestep::bench

int main(int argc, char** argv) {
  using namespace fusestep::bench;
  const std::string models_file = models_file_option(argc, argv);
  const auto models = option(argc, argv, "models", "one64m,resnet50,resnet152,gpt2,tiny10k");
  const auto rules = option(argc, argv, "rules", "all");
  const auto layouts = option(argc, argv, "layouts", "float32");
  for (const std::string& model : models) {
    for (const auto& layout : layout_cases()) {
      for (const auto& rule : rule_cases()) {
        if (!named(layouts, layout.name) || !named(rules, rule.name)) continue;
        run_once(case_name(rule.name, layout.name, model),
                 [=](benchmark::State& state) { step(state, model, models_file, rule, layout); });
      }
    }
  }
  for (const int tensors : {100, 1000, 10'000}) {
    for (const int elements : {0, 1}) {
      const std::string model = std::to_string(tensors) + "x" + std::to_string(elements);
      run_once(case_name("adam", "float32", model) + "/host",
               [=](benchmark::State& state) { host(state, tensors, elements); });
    }
  }
  return run_all(argc, argv,
                 {{"instruction_set", std::string(fusestep::instruction_set())},
                  {"threads", std::to_string(fusestep::num_threads())}});
}
