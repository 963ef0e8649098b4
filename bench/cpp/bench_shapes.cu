// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The apply kernel in shapes beside that of kernels/tuning.h, which is chosen from this, and with
// state placed in other ways: device time of each, as a fraction of a copy's speed in the same run.
// The contestants of a case take turns.
//
//   bench_shapes --models_file=FILE [--models=gpt2,resnet152] [Google Benchmark's own options]
#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <variant>

#include "apply.cuh"
#include "device_time.h"
#include "fusestep/detail/prepare.h"
#include "launch.cuh"
#include "options.h"
#include "workload.h"

namespace fusestep::bench {
namespace {

using namespace detail;

/// Threads of a block, blocks a multiprocessor, vectors of a thread; rounds of the loop in which a
/// block goes through its part of a chunk; how many times the library's elements a vector has, so
/// that narrow arrays are read by more bytes.
template <int kThreadsV, int kMinBlocksV, int kVectorsV, int kRoundsV = 1, int kWiden = 1,
          int kChunkV = 4096>
struct Shape {
  static constexpr int kRounds = kRoundsV;

  template <class R, class L>
  struct Tuning {
    static constexpr int kThreads = kThreadsV;
    static constexpr int kWidth = kWiden * ApplyTuning<R, L>::kWidth;
    static constexpr int kVectors = kVectorsV;
    static constexpr int kMinBlocks = kMinBlocksV;
    static constexpr int kChunk = kChunkV;
  };

  static std::string name() {
    std::string text = std::to_string(kThreadsV) + "x" + std::to_string(kMinBlocksV) + "x" +
                       std::to_string(kVectorsV);
    if (kRounds != 1) text += "_rounds" + std::to_string(kRounds);
    if (kWiden != 1) text += "_widened" + std::to_string(kWiden);
    if (kChunkV != 4096) text += "_chunk" + std::to_string(kChunkV);
    return text;
  }
};

/// That of the library.
struct Own {
  static constexpr int kRounds = 1;
  template <class R, class L>
  using Tuning = ApplyTuning<R, L>;
  static std::string name() { return "own"; }
};

/// More than 1,024 threads a multiprocessor would leave less than 64 registers to each.
using Shapes = TypeList<Own,                     //
                        Shape<64, 16, 1>,        //
                        Shape<128, 8, 1>,        //
                        Shape<128, 7, 2>,        //
                        Shape<256, 4, 1>,        //
                        Shape<256, 3, 2>,        //
                        Shape<512, 2, 1>,        //
                        Shape<512, 1, 2>,        //
                        Shape<512, 2, 1, 2>,     //
                        Shape<512, 1, 1, 1, 2>,  //
                        Shape<512, 1, 1, 2, 2, 8192>, Shape<256, 3, 2, 1, 1, 8192>>;

/// A table on the device.
template <class Row>
DeviceBuffer uploaded(const std::vector<Row>& rows) {
  DeviceBuffer buffer(rows.size() * sizeof(Row));
  check(cudaMemcpy(buffer.data(), rows.data(), buffer.bytes(), cudaMemcpyHostToDevice));
  return buffer;
}

/// The scalars of every tensor at its first step.
std::vector<ScalarRow> first_scalars(std::size_t tensors, const Hyper& settings) {
  HyperRow hyper{};
  std::visit([&](const auto& own) { hyper.set(own); }, settings);
  PrepareRow row{};
  row.rule = static_cast<std::int16_t>(find_rule(settings));
  std::vector<ScalarRow> scalars(tensors);
  const StepDecision decision = decide(StepRequest{}, nullptr);
  for (ScalarRow& own : scalars) prepare_tensor(row, hyper, decision, StepState{}, own);
  return scalars;
}

/// The tensors of a model, each array of all of them in an allocation, as the library has it.
template <class R, class L>
class Tensors {
 public:
  explicit Tensors(std::vector<std::int64_t> sizes) : sizes_(std::move(sizes)), offsets_(sizes_) {
    add<typename L::Value>();
    add<typename L::Grad>();
    for (int k = 0; k < R::kSlots; ++k) add<typename L::Slot>();
    if constexpr (L::kHasMaster) add<float>();
  }

  std::int64_t elements() const { return offsets_.elements; }

  /// Where values and gradients begin with their allocations, and each array of state so many bytes
  /// further than the one before.
  std::vector<TensorRow> rows(std::size_t skew) const {
    std::vector<TensorRow> rows;
    for (std::size_t i = 0; i < sizes_.size(); ++i) {
      TensorRow row{};
      row.value = at<typename L::Value>(0, 0, i);
      row.grad = at<typename L::Grad>(1, 0, i);
      for (int k = 0; k < R::kSlots; ++k) {
        const auto number = static_cast<std::size_t>(k);
        row.slot[k] = at<typename L::Slot>(2 + number, (1 + number) * skew, i);
      }
      if constexpr (L::kHasMaster) {
        row.master = at<float>(2 + R::kSlots, (1 + R::kSlots) * skew, i);
      }
      row.size = sizes_[i];
      rows.push_back(row);
    }
    return rows;
  }

  std::vector<Chunk> chunks(int elements) const {
    std::vector<Chunk> chunks;
    for (std::size_t i = 0; i < sizes_.size(); ++i) {
      for (std::int32_t j = 0; std::int64_t{j} * elements < sizes_[i]; ++j) {
        chunks.push_back({static_cast<std::int32_t>(i), j});
      }
    }
    return chunks;
  }

 private:
  template <class T>
  void add() {
    arrays_.push_back(std::make_unique<DeviceBuffer>(
        static_cast<std::size_t>(offsets_.total) * sizeof(T) + kRoom));
    fill(*arrays_.back(), dtype_of<T>);
  }
  template <class T>
  T* at(std::size_t array, std::size_t skew, std::size_t tensor) const {
    return reinterpret_cast<T*>(arrays_[array]->data() + skew) + offsets_.begin[tensor];
  }

  static constexpr std::size_t kRoom = std::size_t{16} << 10;  // bytes, for the skew

  std::vector<std::int64_t> sizes_;
  Offsets offsets_;
  std::vector<std::unique_ptr<DeviceBuffer>> arrays_;
};

/// A launch of one shape, with its table of chunks.
template <class Body>
class Launch {
 public:
  Launch(const std::vector<Chunk>& chunks, std::int64_t elements, int rounds)
      : chunks_(uploaded(chunks)), count_(static_cast<unsigned>(chunks.size())) {
    log2_ = Body::blocks_log2_for((elements + count_ - 1) / count_);
    for (int per_block = 1; per_block < rounds && log2_ > 0; per_block *= 2) --log2_;
  }

  void operator()(ApplyTables tables) const {
    tables.chunks = reinterpret_cast<const Chunk*>(chunks_.data());
    check(launch(Body{tables, log2_}, count_ << log2_, nullptr));
  }

 private:
  DeviceBuffer chunks_;
  unsigned count_, log2_ = 0;
};

struct Contestant {
  std::string name;
  std::function<void()> step;
  std::vector<double> times = {};
};

template <class R, class L, class S>
Contestant contestant(const Tensors<R, L>& tensors, const ApplyTables& tables,
                      const std::string& suffix = "") {
  using Body = Apply<R, L, typename S::template Tuning<R, L>>;
  const auto launch =
      std::make_shared<Launch<Body>>(tensors.chunks(Body::kChunk), tensors.elements(), S::kRounds);
  return {S::name() + suffix, [=] { (*launch)(tables); }};
}

template <class R, class L, class... S>
std::vector<Contestant> contestants(TypeList<S...>, const Tensors<R, L>& tensors,
                                    const ApplyTables& tables) {
  return {contestant<R, L, S>(tensors, tables)...};
}

template <class R, class L>
void compare(benchmark::State& state, const std::string& model, const std::string& models_file,
             const RuleCase& rule, const LayoutCase& layout) {
  try {
    const std::vector<std::int64_t> sizes = tensor_sizes(model, models_file);
    const Tensors<R, L> tensors(sizes);
    const DeviceBuffer scalars = uploaded(first_scalars(sizes.size(), rule.hyper));
    const DeviceBuffer control = uploaded(std::vector<Control>(1));
    std::vector<DeviceBuffer> row_tables;
    const auto tables_with = [&](std::size_t skew) {
      row_tables.push_back(uploaded(tensors.rows(skew)));
      ApplyTables tables{};
      tables.tensors = reinterpret_cast<const TensorRow*>(row_tables.back().data());
      tables.scalars = reinterpret_cast<const ScalarRow*>(scalars.data());
      tables.control = reinterpret_cast<const Control*>(control.data());
      return tables;
    };
    std::vector<Contestant> all = contestants(Shapes{}, tensors, tables_with(kCudaSkew));
    for (const std::size_t skew : {0, 1088}) {  // as torch has it; by halves of a cache line
      all.push_back(
          contestant<R, L, Own>(tensors, tables_with(skew), "_skew" + std::to_string(skew)));
    }
    for (Contestant& one : all) one.step();  // loads its code
    for (auto _ : state) {
      for (int i = 0; i < kRepeats; ++i) {
        for (Contestant& one : all) one.times.push_back(device_us(one.step, 1, 0));
      }
      const double moved =
          static_cast<double>(tensors.elements()) * bytes_per_element(rule, layout);
      for (const Contestant& one : all) {
        state.counters[one.name + "_fraction"] = moved / median(one.times) / copy_rate();
      }
      state.SetIterationTime(median(all.front().times) * 1e-6);
      state.counters["roof_gbps"] = copy_rate() * 1e-3;
    }
  } catch (const std::exception& error) {
    check(cudaDeviceSynchronize());
    state.SkipWithError(error.what());
  }
}

/// `rule` and `layout` as workload.h names them, of the types R and L.
template <class R, class L>
void add_case(const std::string& rule, const std::string& layout, const std::string& model,
              const std::string& models_file) {
  const auto find = [](const auto& cases, const std::string& name) {
    return *std::find_if(cases.begin(), cases.end(),
                         [&](const auto& one) { return one.name == name; });
  };
  run_once(case_name(rule, layout, model) + "/shapes",
           [=, own_rule = find(rule_cases(), rule),
            own_layout = find(layout_cases(), layout)](benchmark::State& state) {
             compare<R, L>(state, model, models_file, own_rule, own_layout);
           });
}

void add_cases(const std::string& model, const std::string& file) {
  constexpr auto kStochastic = Extra::kStochasticRounding;
  using Adam = Adam<false>;
  using Sgd = Sgd<false>;
  add_case<Adam, Layout<float, float, float>>("adam", "float32", model, file);
  add_case<Adam, Layout<bfloat16, bfloat16, float>>("adam", "bfloat16_float32", model, file);
  add_case<Adam, Layout<bfloat16, bfloat16, float, float>>("adam", "bfloat16_float32_master", model,
                                                           file);
  add_case<Adam, Layout<bfloat16, bfloat16, bfloat16, float>>("adam", "bfloat16_master", model,
                                                              file);
  add_case<Adam, Layout<bfloat16, bfloat16, bfloat16>>("adam", "bfloat16", model, file);
  add_case<Adam, Layout<bfloat16, bfloat16, bfloat16, void, kStochastic>>(
      "adam", "bfloat16_stochastic", model, file);
  add_case<Sgd, Layout<bfloat16, bfloat16, bfloat16>>("sgd", "bfloat16", model, file);
  add_case<Sgd, Layout<bfloat16, bfloat16, bfloat16, void, kStochastic>>(
      "sgd", "bfloat16_stochastic", model, file);
}

}  // namespace
}  // namespace fusestep::bench

int main(int argc, char** argv) {
  using namespace fusestep::bench;
  const std::string models_file = models_file_option(argc, argv);
  for (const std::string& model : option(argc, argv, "models", "gpt2,gpt2_xl,resnet152,tiny10k")) {
    add_cases(model, models_file);
  }
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    std::fprintf(stderr, "there is no CUDA device\n");
    return 1;
  }
  return run_all(argc, argv, {{"device", properties.name}});
}
