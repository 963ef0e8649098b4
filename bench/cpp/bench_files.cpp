// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Saving and loading, through the file layer (write, read) and of an optimizer's state (save_state,
// load_state: into an optimizer that has none yet), beside what the disk does in the same run:
// sequential writes of one buffer followed by one fsync, and sequential reads of the same file:
// another file may lie elsewhere, or in the cache of a virtual machine's host: roof_gbps. They
// alternate; roof_fraction is the median of the ratios of pairs. Before every read the file is
// dropped from the page cache as far as a program may do that for a file of its own
// (posix_fadvise). What load_state is compared with reads into new memory as well. A virtual
// machine may have to ask its host for every page it has not used lately, which can cost more than
// the disk: before each read as much memory as it needs is touched and given back.
//
//   bench_files [--gigabytes=1] [--repeats=5] [--directory=beside the program]
//               [Google Benchmark's own options]
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <new>
#include <span>
#include <system_error>

#include "cpu/zeroed_memory.h"
#include "files/crc32c.h"
#include "files/safetensors.h"
#include "fusestep/fusestep.h"
#include "options.h"

namespace fusestep::bench {
namespace {

constexpr std::size_t kTensorBytes = std::size_t{64} << 20;
constexpr std::size_t kCallBytes = std::size_t{1} << 20;  // of the plain reads and writes

[[noreturn]] void fail(const std::filesystem::path& file) {
  throw std::system_error(errno, std::generic_category(), file.string());
}

double seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// One tensor's data, written again and again under different names.
const std::vector<char>& tensor_data() {
  static const std::vector<char> data = [] {
    std::vector<char> bytes(kTensorBytes);
    std::mt19937_64 random(1);
    for (std::size_t i = 0; i < bytes.size(); i += 8) {
      const std::uint64_t word = random();
      std::memcpy(bytes.data() + i, &word, 8);
    }
    return bytes;
  }();
  return data;
}

void drop_from_cache(const std::filesystem::path& file) {
#if defined(POSIX_FADV_DONTNEED)
  const int descriptor = open(file.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail(file);
  posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
  close(descriptor);
#else
  static_cast<void>(file);
#endif
}

/// Memory as the library takes it for state.
class NewMemory {
 public:
  explicit NewMemory(std::size_t bytes) : bytes_(bytes), data_(detail::allocate_zeroed(bytes)) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~NewMemory() { detail::deallocate_zeroed(data_, bytes_); }
  NewMemory(const NewMemory&) = delete;
  NewMemory& operator=(const NewMemory&) = delete;
  std::span<char> bytes() const { return {static_cast<char*>(data_), bytes_}; }

 private:
  std::size_t bytes_;
  void* data_;
};

/// For the file's pages in the cache and for what is read from them.
void touch_memory(std::size_t bytes) {
  const NewMemory memory(bytes);
  for (std::size_t i = 0; i < bytes; i += 4096) memory.bytes()[i] = 1;
}

void write_plain(const std::filesystem::path& file, int tensors) {
  const int descriptor = open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (descriptor < 0) fail(file);
  for (int i = 0; i < tensors; ++i) {
    for (std::size_t done = 0; done < kTensorBytes;) {
      const ssize_t written = write(descriptor, tensor_data().data() + done, kCallBytes);
      if (written < 0) fail(file);
      done += static_cast<std::size_t>(written);
    }
  }
  if (fsync(descriptor) != 0) fail(file);
  close(descriptor);
}

/// Into all of `into` if the file fits, else again and again.
void read_plain(const std::filesystem::path& file, std::span<char> into) {
  const int descriptor = open(file.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail(file);
  for (std::size_t done = 0;;) {
    const ssize_t got = read(descriptor, into.data() + done % into.size(), kCallBytes);
    if (got < 0) fail(file);
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  close(descriptor);
}

void save(const std::filesystem::path& file, int tensors) {
  std::vector<detail::TensorInfo> infos;
  for (int i = 0; i < tensors; ++i) {
    infos.push_back({"tensor" + std::to_string(i), "F32", {kTensorBytes / 4}});
  }
  detail::SafetensorsWriter writer(file, {}, infos);
  for (std::size_t i = 0; i < infos.size(); ++i) {
    writer.write(i, tensor_data().data(), kTensorBytes);
  }
  writer.commit();
}

void load(const std::filesystem::path& file, std::vector<char>& into) {
  const detail::SafetensorsReader reader(file);
  for (std::size_t i = 0; i < reader.tensors().size(); ++i) {
    reader.read_all(i, into.data(), into.size());
  }
}

/// Adam over parameters with as many bytes of state as the tensors have.
class Training {
 public:
  explicit Training(int tensors) : elements_(static_cast<std::int64_t>(kTensorBytes / 8)) {
    for (int i = 0; i < tensors; ++i) {
      values_.emplace_back(static_cast<std::size_t>(elements_), 0.5f);
    }
    grad_.assign(static_cast<std::size_t>(elements_), 0.25f);
  }
  Optimizer optimizer() {
    Optimizer made;
    std::vector<Parameter> parameters;
    for (std::vector<float>& value : values_) {
      parameters.push_back(
          {"w" + std::to_string(parameters.size()), view(value.data(), {elements_})});
    }
    made.add_group("all", AdamHyper{}, std::move(parameters));
    return made;
  }
  /// One parameter after the other, so that one gradient is enough.
  Optimizer stepped() {
    Optimizer made = optimizer();
    for (ParameterRef parameter : made.group("all").parameters()) {
      parameter.set_grad(view(grad_.data(), {elements_}));
      made.step();
      parameter.clear_grad();
    }
    return made;
  }

 private:
  std::int64_t elements_;
  std::vector<std::vector<float>> values_;
  std::vector<float> grad_;
};

/// Removes what it names.
struct File {
  std::filesystem::path path;
  ~File() {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
  }
};

/// Pairs of both, each first in turn: what one leaves to the disk, the next one waits for.
void compare(benchmark::State& state, int repeats, double bytes,
             const std::function<double()>& ours, const std::function<double()>& plain) {
  std::vector<double> our_times, plain_times, ratios;
  for (int i = 0; i < repeats; ++i) {
    if (i % 2 == 0) plain_times.push_back(plain());
    our_times.push_back(ours());
    if (i % 2 == 1) plain_times.push_back(plain());
    ratios.push_back(plain_times.back() / our_times.back());
  }
  state.SetIterationTime(median(our_times));
  state.counters["gbps"] = bytes / median(our_times) * 1e-9;
  state.counters["roof_gbps"] = bytes / median(plain_times) * 1e-9;
  state.counters["roof_fraction"] = median(ratios);
}

void write_benchmark(benchmark::State& state, const std::filesystem::path& directory, int tensors,
                     int repeats) {
  const File ours{directory / "bench_files.safetensors"}, plain{directory / "bench_files.plain"};
  const auto measure = [&](const File& file, const auto& write) {
    std::filesystem::remove(file.path);
    return seconds([&] { write(file.path, tensors); });
  };
  for (auto _ : state) {
    compare(
        state, repeats, static_cast<double>(kTensorBytes) * tensors,
        [&] { return measure(ours, save); }, [&] { return measure(plain, write_plain); });
  }
}

void read_benchmark(benchmark::State& state, const std::filesystem::path& directory, int tensors,
                    int repeats, bool cached) {
  const File file{directory / "bench_files.safetensors"};
  save(file.path, tensors);
  std::vector<char> into(kTensorBytes);
  const std::size_t bytes = kTensorBytes * static_cast<std::size_t>(tensors);
  const auto measure = [&](const auto& read) {
    if (!cached) drop_from_cache(file.path);
    touch_memory(2 * bytes);
    return seconds([&] { read(file.path, into); });
  };
  for (auto _ : state) {
    compare(
        state, repeats, static_cast<double>(bytes), [&] { return measure(load); },
        [&] { return measure(read_plain); });
  }
}

void save_state_benchmark(benchmark::State& state, const std::filesystem::path& directory,
                          int tensors, int repeats) {
  const File ours{directory / "bench_files.safetensors"}, plain{directory / "bench_files.plain"};
  Training training(tensors);
  Optimizer optimizer = training.stepped();
  const auto measure = [&](const File& file, const auto& write) {
    std::filesystem::remove(file.path);
    return seconds([&] { write(file.path); });
  };
  for (auto _ : state) {
    compare(
        state, repeats, static_cast<double>(kTensorBytes) * tensors,
        [&] { return measure(ours, [&](const auto& path) { optimizer.save(path); }); },
        [&] { return measure(plain, [&](const auto& path) { write_plain(path, tensors); }); });
  }
}

void load_state_benchmark(benchmark::State& state, const std::filesystem::path& directory,
                          int tensors, int repeats, bool cached) {
  const File file{directory / "bench_files.safetensors"};
  Training training(tensors);
  training.stepped().save(file.path);
  const std::size_t bytes = kTensorBytes * static_cast<std::size_t>(tensors);
  const auto measure = [&](const auto& read) {
    if (!cached) drop_from_cache(file.path);
    touch_memory(2 * bytes);
    return seconds([&] { read(file.path); });
  };
  const auto load_state = [&] {
    Optimizer optimizer = training.optimizer();
    return measure([&](const auto& path) { optimizer.load(path); });
  };
  const auto read_into_new_memory = [&] {
    const NewMemory memory(bytes);
    return measure([&](const auto& path) { read_plain(path, memory.bytes()); });
  };
  for (auto _ : state) {
    compare(state, repeats, static_cast<double>(bytes), load_state, read_into_new_memory);
  }
}

void crc_benchmark(benchmark::State& state, bool portable, std::size_t bytes) {
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        (portable ? detail::crc32c_portable : detail::crc32c)(0, tensor_data().data(), bytes));
  }
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes));
}

}  // namespace
}  // namespace fusestep::bench

int main(int argc, char** argv) {
  using namespace fusestep::bench;
  const std::string here = std::filesystem::path(argv[0]).parent_path().string();
  const std::string directory = option(argc, argv, "directory", here.empty() ? "." : here).front();
  const double gigabytes = std::stod(option(argc, argv, "gigabytes", "1").front());
  const int repeats = std::stoi(option(argc, argv, "repeats", "5").front());
  const int tensors = std::max(1, static_cast<int>(gigabytes * 1e9 / kTensorBytes + 0.5));
  run_once("write", [=](auto& state) { write_benchmark(state, directory, tensors, repeats); });
  run_once("read", [=](auto& state) { read_benchmark(state, directory, tensors, repeats, false); });
  run_once("read_cached",
           [=](auto& state) { read_benchmark(state, directory, tensors, repeats, true); });
  run_once("save_state",
           [=](auto& state) { save_state_benchmark(state, directory, tensors, repeats); });
  run_once("load_state",
           [=](auto& state) { load_state_benchmark(state, directory, tensors, repeats, false); });
  run_once("load_state_cached",
           [=](auto& state) { load_state_benchmark(state, directory, tensors, repeats, true); });
  for (const bool portable : {false, true}) {
    for (const auto& [name, bytes] :
         {std::pair("256KiB", std::size_t{256} << 10), std::pair("64MiB", kTensorBytes)}) {
      const std::string full = std::string("crc32c") + (portable ? "_portable/" : "/") + name;
      benchmark::RegisterBenchmark(full.c_str(), crc_benchmark, portable, bytes);
    }
  }
  return run_all(argc, argv, {{"directory", directory}});
}
