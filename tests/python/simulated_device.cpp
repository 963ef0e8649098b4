// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// In place of csrc/bindings/torch_device.cpp: torch's CPU tensors lie on simulated CUDA devices,
// each of which has a current stream. The module _cuda_sim, in the same library, is the tests' hold
// on them.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_sim.h"
#include "torch_device.h"

namespace py = pybind11;

namespace fusestep::bindings {
namespace {

std::map<const void*, Device> placed;  // by the address of a tensor's first element
Device home = Device::cuda(0);         // of every other tensor
std::array<cudaStream_t, cuda_sim::kDevices> current{};
std::vector<cudaStream_t> streams;
std::vector<cudaGraphExec_t> graphs;
std::vector<std::string> failures;  // of enqueued functions

void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorName(code));
}

/// Makes it the current device while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~OnDevice() { static_cast<void>(cudaSetDevice(before_)); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

cudaStream_t& current_of(int device) { return current.at(static_cast<std::size_t>(device)); }

std::uintptr_t make_stream(int device) {
  const OnDevice guard(device);
  cudaStream_t made = nullptr;
  check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
  streams.push_back(made);
  return reinterpret_cast<std::uintptr_t>(made);
}

std::uintptr_t set_stream(int device, std::uintptr_t handle) {
  return reinterpret_cast<std::uintptr_t>(
      std::exchange(current_of(device), reinterpret_cast<cudaStream_t>(handle)));
}

/// Only the current streams: work on any other stays pending, as far as the policy likes.
void synchronize() {
  for (int device = 0; device < cuda_sim::kDevices; ++device) {
    const OnDevice guard(device);
    check(cudaStreamSynchronize(current_of(device)));
  }
  cuda_sim::forget_adopted();
}

void wait_for_all() {
  for (int device = 0; device < cuda_sim::kDevices; ++device) {
    const OnDevice guard(device);
    check(cudaDeviceSynchronize());
  }
}

void make_current_streams() {
  for (int device = 0; device < cuda_sim::kDevices; ++device) {
    set_stream(device, make_stream(device));
  }
}

/// A fresh start where nothing of earlier tests is left; else what is left stays as it is.
void reset(std::uint64_t seed, int policy, int home_device) {
  cuda_sim::clear_faults();
  for (const cudaGraphExec_t graph : std::exchange(graphs, {})) check(cudaGraphExecDestroy(graph));
  for (const cudaStream_t stream : std::exchange(streams, {})) check(cudaStreamDestroy(stream));
  cuda_sim::reseed(seed, static_cast<cuda_sim::Policy>(policy));
  if (cuda_sim::live() == cuda_sim::Live{}) {
    cuda_sim::reset(seed, static_cast<cuda_sim::Policy>(policy));
  }
  cuda_sim::forget_adopted();
  cuda_sim::forget_calls();
  placed.clear();
  home = Device::cuda(home_device);
  make_current_streams();
}

/// After a failure, once nobody uses them any more.
void replace_devices() {
  cuda_sim::reset(1, cuda_sim::Policy::kLate);
  streams.clear();
  graphs.clear();
  make_current_streams();
}

void place(std::uintptr_t address, std::optional<int> device) {
  placed[reinterpret_cast<const void*>(address)] = device ? Device::cuda(*device) : Device::cpu();
}

void run_enqueued(void* data) {
  const py::gil_scoped_acquire acquire;
  const auto function = py::reinterpret_steal<py::object>(static_cast<PyObject*>(data));
  try {
    function();
  } catch (const std::exception& error) {
    failures.push_back(std::string("an enqueued function has raised: ") + error.what());
  }
}

void enqueue(int device, py::object function) {
  check(cudaLaunchHostFunc(current_of(device), run_enqueued, function.release().ptr()));
}

void begin_capture(int device) {
  check(cudaStreamBeginCapture(current_of(device), cudaStreamCaptureModeGlobal));
}

std::uintptr_t end_capture(int device) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(current_of(device), &graph));
  cudaGraphExec_t exec = nullptr;
  check(cudaGraphInstantiate(&exec, graph));
  check(cudaGraphDestroy(graph));
  graphs.push_back(exec);
  return reinterpret_cast<std::uintptr_t>(exec);
}

void launch(int device, std::uintptr_t graph) {
  check(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(graph), current_of(device)));
}

std::vector<std::string> take_violations() {
  cuda_sim::check_guards();
  std::vector<std::string> all = cuda_sim::take_violations();
  for (std::string& failure : failures) all.push_back(std::move(failure));
  failures.clear();
  return all;
}

std::uintptr_t allocate(int device, std::size_t bytes) {
  const OnDevice guard(device);
  void* data = nullptr;
  check(cudaMallocAsync(&data, bytes, current_of(device)));
  return reinterpret_cast<std::uintptr_t>(data);
}

void deallocate(int device, std::uintptr_t address) {
  check(cudaFreeAsync(reinterpret_cast<void*>(address), current_of(device)));
}

void upload(int device, std::uintptr_t address, const std::string& bytes) {
  check(cudaMemcpyAsync(reinterpret_cast<void*>(address), bytes.data(), bytes.size(),
                        cudaMemcpyHostToDevice, current_of(device)));
}

py::bytes download(int device, std::uintptr_t address, std::size_t size) {
  std::string bytes(size, '\0');
  {
    const py::gil_scoped_release release;
    check(cudaMemcpyAsync(bytes.data(), reinterpret_cast<void*>(address), size,
                          cudaMemcpyDeviceToHost, current_of(device)));
  }
  return bytes;
}

}  // namespace

std::optional<Device> device_of(bool on_cuda, int /*index*/, const void* data, std::size_t bytes) {
  if (on_cuda) return {};
  const auto found = placed.find(data);
  const Device device = found == placed.end() ? home : found->second;
  if (device.is_cuda()) cuda_sim::adopt(data, bytes, device.index);
  return device;
}

void* current_stream(const dlpack::ExchangeApi*, Device device) { return current_of(device.index); }

}  // namespace fusestep::bindings

PYBIND11_MODULE(_cuda_sim, m) {
  using namespace fusestep::bindings;
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.attr("devices") = cuda_sim::kDevices;
  m.def("reset", reset, py::arg("seed"), py::arg("policy"), py::arg("home"), without_gil);
  m.def("synchronize", synchronize, without_gil);
  m.def("wait_for_all", wait_for_all, without_gil);
  m.def("fail_running_kernel", [] { cuda_sim::fail_running_kernel(0); });
  m.def("replace_devices", replace_devices);
  m.def("pending", cuda_sim::pending);
  m.def("live", [] {
    const cuda_sim::Live now = cuda_sim::live();
    return now.allocations + now.pinned + now.events + now.streams -
           static_cast<std::int64_t>(streams.size());
  });
  m.def("take_violations", take_violations);
  m.def("place", place, py::arg("address"), py::arg("device"));
  m.def("home", [] { return home.index; });
  m.def("make_stream", make_stream, py::arg("device"));
  m.def("set_stream", set_stream, py::arg("device"), py::arg("stream"));
  m.def(
      "stream", [](int device) { return reinterpret_cast<std::uintptr_t>(current_of(device)); },
      py::arg("device"));
  m.def("enqueue", enqueue, py::arg("device"), py::arg("function"));
  m.def("begin_capture", begin_capture, py::arg("device"));
  m.def("end_capture", end_capture, py::arg("device"));
  m.def("launch", launch, py::arg("device"), py::arg("graph"), without_gil);
  m.def("forget_calls", cuda_sim::forget_calls);
  m.def("calls", py::overload_cast<const std::string&>(cuda_sim::calls), py::arg("name"));
  m.def("allocate", allocate, py::arg("device"), py::arg("bytes"));
  m.def("deallocate", deallocate, py::arg("device"), py::arg("address"), without_gil);
  m.def("upload", upload, py::arg("device"), py::arg("address"), py::arg("bytes"), without_gil);
  m.def("download", download, py::arg("device"), py::arg("address"), py::arg("size"));
}
