// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "state_files.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/dict.h"
#include "checkpoint/match.h"
#include "checkpoint/report.h"
#include "checkpoint/state_file.h"
#include "fusestep/detail/hyper_fields.h"

namespace py = pybind11;

namespace fusestep::bindings {
namespace {

using detail::Json;

/// (parameter, slot) to (address, bytes) of memory in this process.
using Addresses = std::map<std::pair<int, std::string>, std::pair<std::uintptr_t, std::size_t>>;

/// State that Python holds.
class PythonSource final : public detail::StateSource {
 public:
  PythonSource(const std::string& description, const Addresses& addresses)
      : description_(detail::description_from_json(detail::parse_json(description, "description"))),
        addresses_(addresses) {}

  const detail::Description& description() const override { return description_; }
  const Metadata& metadata() const override { return metadata_; }
  void read(int parameter, const std::string& slot, detail::ByteRange range,
            const detail::TakePiece& take) override {
    const auto [address, bytes] = addresses_.at({parameter, slot});
    detail::take_pieces(reinterpret_cast<const void*>(address), bytes, range, take);
  }
  void verify(int, const std::string&, detail::ByteRange) override {}

 private:
  detail::Description description_;
  Metadata metadata_;
  const Addresses& addresses_;
};

LoadWhat what_named(const std::string& what) {
  if (what == "all") return LoadWhat::kAll;
  if (what == "state") return LoadWhat::kState;
  if (what == "hyper") return LoadWhat::kHyper;
  throw InvalidArgument("what must be 'all', 'state' or 'hyper', got '" + what + "'");
}

/// All of a slot into memory of exactly its size.
void read_into(detail::StateFileReader& file, int parameter, const std::string& slot,
               std::uintptr_t address, std::size_t bytes) {
  if (file.bytes(parameter, slot) > bytes) {
    throw InvalidArgument("there is no room for slot '" + slot + "'");
  }
  const py::gil_scoped_release release;
  file.read_into(parameter, slot, {}, reinterpret_cast<void*>(address));
}

/// All of a slot through a buffer: calls take(bytes) whenever it is full, and at the end.
void read_through(detail::StateFileReader& file, int parameter, const std::string& slot,
                  std::uintptr_t address, std::size_t size, const py::function& take) {
  auto* const buffer = reinterpret_cast<char*>(address);
  std::size_t filled = 0;
  const py::gil_scoped_release release;
  const auto hand_over = [&] {
    const py::gil_scoped_acquire acquire;
    take(filled);
    filled = 0;
  };
  file.read(parameter, slot, {}, [&](const void* data, std::size_t bytes) {
    for (std::size_t done = 0; done < bytes;) {
      const std::size_t now = std::min(bytes - done, size - filled);
      std::memcpy(buffer + filled, static_cast<const char*>(data) + done, now);
      filled += now;
      done += now;
      if (filled == size) hand_over();
    }
  });
  if (filled != 0) hand_over();
}

/// Settings of rules that are known have values of the right types.
void check_settings(const detail::Description& saved) {
  for (const detail::GroupDescription& group : saved.groups) {
    Hyper hyper;
    if (!detail::default_hyper(group.rule, hyper)) continue;
    detail::hyper_from_json(group.rule, group.hyper, "group '" + group.name + "'");
  }
}

std::string match_state(const std::string& saved, const std::string& here, const std::string& what,
                        bool convert, bool values, bool other_slots) {
  const auto read = [](const std::string& text) {
    return detail::description_from_json(detail::parse_json(text, "description"));
  };
  const detail::MatchOptions options{what_named(what), convert, values, other_slots, false};
  const detail::Description description = read(saved);
  if (options.what != LoadWhat::kState) check_settings(description);
  const detail::Match matched = detail::match(description, read(here), options);
  Json parameters = Json::array();
  for (const detail::Match::Pair& pair : matched.parameters) {
    parameters.push_back({pair.saved, pair.here, pair.slots});
  }
  return Json{{"report", detail::to_json(matched.report)},
              {"parameters", parameters},
              {"settings", matched.settings}}
      .dump();
}

/// strict, what, convert, values and, of files, rename (None or a callable).
LoadOptions load_options(const py::dict& given, const std::vector<Stream>& streams) {
  LoadOptions options;
  options.streams = streams;
  options.strict = given["strict"].cast<bool>();
  options.what = what_named(given["what"].cast<std::string>());
  options.convert = given["convert"].cast<bool>();
  options.values = given["values"].cast<bool>();
  if (given.contains("rename") && !given["rename"].is_none()) {
    const auto rename = given["rename"].cast<py::object>();
    options.rename = [rename](const std::string& name) {
      const py::gil_scoped_acquire acquire;
      return rename(name).cast<std::string>();
    };
  }
  return options;
}

StateDict dict_of(const std::string& description, const Addresses& addresses) {
  PythonSource source(description, addresses);
  return detail::to_dict(source);
}

/// The report, also of a load that was refused: Python has an error of its own for that.
template <class Load>
std::string report_of(Load&& load) {
  try {
    return detail::to_json(load()).dump();
  } catch (const LoadError& error) {
    return detail::to_json(error.report()).dump();
  }
}

}  // namespace

std::vector<Stream> streams_of(const Streams& given) {
  std::vector<Stream> streams;
  for (const auto& [device, handle] : given) {
    streams.emplace_back(Device::cuda(device), reinterpret_cast<void*>(handle));
  }
  return streams;
}

void bind_state_files(py::module_& m) {
  using detail::StateFileReader;
  using detail::StateFileWriter;
  py::class_<StateFileReader>(m, "StateFileReader")
      .def(py::init<std::filesystem::path>(), py::arg("path"))
      .def_property_readonly("description",
                             [](const StateFileReader& self) {
                               return detail::to_json(self.description(), true).dump();
                             })
      .def_property_readonly("metadata", &StateFileReader::metadata)
      .def("read_into", &read_into, py::arg("parameter"), py::arg("slot"), py::arg("address"),
           py::arg("bytes"))
      .def("read_through", &read_through, py::arg("parameter"), py::arg("slot"), py::arg("address"),
           py::arg("bytes"), py::arg("take"));
  py::class_<StateFileWriter>(m, "StateFileWriter")
      .def(py::init([](const std::filesystem::path& path, const std::string& description,
                       const Metadata& metadata) {
             return std::make_unique<StateFileWriter>(
                 path,
                 detail::description_from_json(detail::parse_json(description, "description")),
                 metadata);
           }),
           py::arg("path"), py::arg("description"), py::arg("metadata"))
      .def(
          "write",
          [](StateFileWriter& self, int parameter, const std::string& slot, std::uintptr_t address,
             std::size_t bytes) {
            self.write(parameter, slot, reinterpret_cast<const void*>(address), bytes);
          },
          py::arg("parameter"), py::arg("slot"), py::arg("address"), py::arg("bytes"),
          py::call_guard<py::gil_scoped_release>())
      .def("commit", &StateFileWriter::commit, py::call_guard<py::gil_scoped_release>());
  m.def("match_state", &match_state, py::arg("saved"), py::arg("here"), py::arg("what"),
        py::arg("convert"), py::arg("values"), py::arg("other_slots"));
  m.def("check_user_metadata", &detail::check_user_metadata, py::arg("metadata"));
}

void bind_state(py::class_<Optimizer>& optimizer) {
  optimizer
      .def(
          "save",
          [](Optimizer& self, const std::filesystem::path& path, bool values,
             const Metadata& metadata, bool in_background, const Streams& given) {
            const std::vector<Stream> streams = streams_of(given);
            const SaveOptions options{values, metadata, {}, streams};
            const py::gil_scoped_release release;
            in_background ? self.save_async(path, options) : self.save(path, options);
          },
          py::arg("path"), py::arg("values"), py::arg("metadata"), py::arg("in_background"),
          py::arg("streams"))
      .def("wait_for_save", &Optimizer::wait_for_save, py::call_guard<py::gil_scoped_release>())
      .def(
          "load_file",
          [](Optimizer& self, const std::filesystem::path& path, const py::dict& options,
             const Streams& given) {
            const std::vector<Stream> streams = streams_of(given);
            const LoadOptions wanted = load_options(options, streams);
            const py::gil_scoped_release release;
            return report_of([&] { return self.load(path, wanted); });
          },
          py::arg("path"), py::arg("options"), py::arg("streams"))
      .def(
          "load_dict",
          [](Optimizer& self, const std::string& description, const Addresses& addresses,
             const py::dict& options, const Streams& given) {
            const std::vector<Stream> streams = streams_of(given);
            const LoadOptions wanted = load_options(options, streams);
            const py::gil_scoped_release release;
            const StateDict state = dict_of(description, addresses);
            return report_of([&] { return self.load(state, wanted); });
          },
          py::arg("description"), py::arg("addresses"), py::arg("options"), py::arg("streams"))
      .def(
          "load_state_dict",
          [](Optimizer& self, const std::string& description, const Addresses& addresses,
             const Streams& given) {
            const std::vector<Stream> streams = streams_of(given);
            const py::gil_scoped_release release;
            const StateDict state = dict_of(description, addresses);
            return report_of([&] {
              self.load_state_dict(state, streams);
              return LoadReport{};
            });
          },
          py::arg("description"), py::arg("addresses"), py::arg("streams"))
      .def(
          "state_dict",
          [](Optimizer& self, const Streams& given) {
            const StateDict state = self.state_dict(streams_of(given));
            py::dict slots;
            for (std::size_t i = 0; i < state.state.size(); ++i) {
              for (const auto& [name, slot] : state.state[i].slots) {
                slots[py::make_tuple(i, name)] = py::bytearray(
                    reinterpret_cast<const char*>(slot.data.data()), slot.data.size());
              }
            }
            return py::make_tuple(
                detail::to_json(detail::DictSource(state).description(), true).dump(), slots);
          },
          py::arg("streams"));
}

}  // namespace fusestep::bindings
