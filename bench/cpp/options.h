// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What the benchmark programs share besides their workload.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "fusestep/dtype.h"

namespace fusestep::bench {

/// Takes --name=a,b,c out of the arguments.
inline std::vector<std::string> option(int& argc, char** argv, const std::string& name,
                                       const std::string& fallback) {
  std::string text = fallback;
  const std::string prefix = "--" + name + "=";
  const auto end = std::remove_if(argv + 1, argv + argc, [&](const char* argument) {
    const std::string given = argument;
    if (given.rfind(prefix, 0) != 0) return false;
    text = given.substr(prefix.size());
    return true;
  });
  argc = static_cast<int>(end - argv);
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

/// --models_file=FILE: the parameter lists of models.
inline std::string models_file_option(int& argc, char** argv) {
  return option(argc, argv, "models_file", "python/fusestep/benchmark/shapes.json").front();
}

/// "all" names everything.
inline bool named(const std::vector<std::string>& names, const std::string& name) {
  return names.front() == "all" || std::find(names.begin(), names.end(), name) != names.end();
}

/// A benchmark that repeats and takes medians itself.
template <class F>
void run_once(const std::string& name, F&& body) {
  benchmark::RegisterBenchmark(name.c_str(), body)
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMicrosecond);
}

/// Names of cases alone: Google Benchmark would add "/iterations:1/manual_time".
template <class Reporter>
class WithPlainNames : public Reporter {
 public:
  void ReportRuns(const std::vector<benchmark::BenchmarkReporter::Run>& runs) override {
    auto plain = runs;
    for (auto& run : plain) {
      run.run_name.iterations.clear();
      run.run_name.time_type.clear();
    }
    Reporter::ReportRuns(plain);
  }
};

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Runs what was registered, to the console, and as JSON to the file of --benchmark_out. Returns
/// the exit status; `context` gives lines of the file's "context".
inline int run_all(int argc, char** argv,
                   const std::vector<std::pair<std::string, std::string>>& context) {
  const bool to_file = std::any_of(argv + 1, argv + argc, [](const std::string argument) {
    return argument.rfind("--benchmark_out=", 0) == 0;
  });
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("compiler", __VERSION__);
  for (const auto& [key, value] : context) benchmark::AddCustomContext(key, value);
  WithPlainNames<benchmark::ConsoleReporter> console;
  WithPlainNames<benchmark::JSONReporter> json;
  benchmark::RunSpecifiedBenchmarks(&console, to_file ? &json : nullptr);
  return 0;
}

/// A random value of either sign, of a magnitude below 1/2 (fp16: 2^-5 to 1). Zeros could run
/// faster than real data.
inline void store_random(std::mt19937& random, DType dtype, void* to) {
  const double value = (static_cast<double>(random()) + 0.5) / 4294967296.0 - 0.5;
  const float single = static_cast<float>(value);
  std::uint32_t bits = 0;
  std::memcpy(&bits, &single, sizeof bits);
  const auto brain = static_cast<std::uint16_t>(bits >> 16);
  const auto half =
      static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | (0x2800u + random() % 0x1400u));
  const void* source = &single;
  if (dtype == DType::kFloat64) source = &value;
  if (dtype == DType::kBFloat16) source = &brain;
  if (dtype == DType::kFloat16) source = &half;
  std::memcpy(to, source, size_of(dtype));
}

}  // namespace fusestep::bench
