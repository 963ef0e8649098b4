// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// fusestep._core: conversion and forwarding, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fusestep/detail/hyper_fields.h"
#include "fusestep/fusestep.h"
#include "state_files.h"
#include "torch_shim.h"
#include "torch_stepper.h"
#include "torch_threads.h"

namespace py = pybind11;

namespace fusestep::bindings {
namespace {

DType dtype_named(const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw InvalidArgument("dtype must be float32, float64, bfloat16 or float16, got " + name);
}

/// (address, dtype name, shape, CUDA device index or None) as arrays.py makes it; None is absent.
TensorView view_of(const py::object& memory) {
  if (memory.is_none()) return {};
  const auto parts = memory.cast<py::tuple>();
  return {reinterpret_cast<void*>(parts[0].cast<std::uintptr_t>()),
          dtype_named(parts[1].cast<std::string>()), parts[2].cast<std::vector<std::int64_t>>(),
          parts[3].is_none() ? Device::cpu() : Device::cuda(parts[3].cast<int>()), true};
}

py::tuple memory_of(const TensorView& view) {
  const py::object device =
      view.device.is_cuda() ? py::object(py::int_(view.device.index)) : py::none();
  return py::make_tuple(reinterpret_cast<std::uintptr_t>(view.data),
                        std::string(name_of(view.dtype)), py::tuple(py::cast(view.shape)), device);
}

py::dict dict_of(const Hyper& hyper) {
  py::dict settings;
  std::visit(
      [&](const auto& h) {
        detail::for_each_field(h, [&](const char* name, const auto& field) {
          if constexpr (std::is_array_v<std::remove_cvref_t<decltype(field)>>) {
            settings[name] = py::make_tuple(field[0], field[1]);
          } else {
            settings[name] = field;
          }
        });
      },
      hyper);
  return settings;
}

/// Refuses a setting the rule does not have: a misspelt one would silently do nothing.
void refuse_unknown(const std::string& rule, const py::dict& given, const py::dict& known) {
  for (const auto& [key, value] : given) {
    if (known.contains(key)) continue;
    throw InvalidArgument(rule + " has no hyperparameter '" + std::string(py::str(key)) + "'");
  }
}

Hyper hyper_of(const std::string& rule, const py::dict& given) {
  Hyper hyper;
  if (!detail::default_hyper(rule, hyper)) {
    throw InvalidArgument("rule must be Adam, AdamW, SGD or RMSprop, got " + rule);
  }
  refuse_unknown(rule, given, dict_of(hyper));
  std::visit(
      [&](auto& h) {
        detail::for_each_field(h, [&](const char* name, auto& field) {
          if (!given.contains(name)) return;
          using Field = std::remove_cvref_t<decltype(field)>;
          if constexpr (std::is_array_v<Field>) {
            const auto pair = given[name].template cast<std::pair<double, double>>();
            field[0] = pair.first;
            field[1] = pair.second;
          } else {
            field = given[name].template cast<Field>();
          }
        });
      },
      hyper);
  return hyper;
}

/// Of one group; those that are not given have fusestep's defaults.
GroupOptions options_of(const py::dict& given) {
  GroupOptions options;
  const auto one_of = [&](const char* key, auto names) {
    const py::object value = given[key];
    for (const auto& [name, meant] : names) {
      if (value.equal(name)) return meant;
    }
    throw InvalidArgument(std::string(key) + " cannot be " + std::string(py::repr(value)));
  };
  if (given.contains("state_dtype")) {
    options.slots = one_of("state_dtype", std::vector<std::pair<py::object, SlotDType>>{
                                              {py::none(), SlotDType::kLikeParameter},
                                              {py::str("float32"), SlotDType::kFloat32},
                                              {py::str("bfloat16"), SlotDType::kBFloat16}});
  }
  if (given.contains("rounding")) {
    options.rounding = one_of("rounding", std::vector<std::pair<py::object, Rounding>>{
                                              {py::str("nearest"), Rounding::kNearest},
                                              {py::str("stochastic"), Rounding::kStochastic}});
  }
  if (given.contains("master_weights")) {
    options.master_weights = given["master_weights"].cast<bool>();
  }
  if (given.contains("seed")) options.seed = given["seed"].cast<std::uint64_t>();
  return options;
}

using Named = std::pair<std::string, py::object>;

void bind_array_optimizer(py::module_& m) {
  py::class_<Optimizer> optimizer(m, "ArrayOptimizer");
  bind_state(optimizer);
  optimizer.def(py::init<>())
      .def(
          "add_group",
          [](Optimizer& self, const std::string& name, const std::string& rule,
             const py::dict& hyper, const std::vector<Named>& parameters, const py::dict& options) {
            std::vector<Parameter> members;
            for (const auto& [parameter, memory] : parameters) {
              members.push_back({parameter, view_of(memory), {}});
            }
            self.add_group(name, hyper_of(rule, hyper), std::move(members), options_of(options));
          },
          py::arg("name"), py::arg("rule"), py::arg("hyper"), py::arg("parameters"),
          py::arg("options"))
      .def(
          "set_hyper",
          [](Optimizer& self, const std::string& group, const std::string& rule,
             const py::dict& changed) {
            py::dict all = dict_of(self.group(group).hyper());
            for (const auto& [key, value] : changed) all[key] = value;
            self.group(group).set_hyper(hyper_of(rule, all));
          },
          py::arg("group"), py::arg("rule"), py::arg("changed"))
      .def(
          "hyper",
          [](Optimizer& self, const std::string& group) {
            return dict_of(self.group(group).hyper());
          },
          py::arg("group"))
      .def(
          "set_grad",
          [](Optimizer& self, const std::string& name, const py::object& grad) {
            self.parameter(name).set_grad(view_of(grad));
          },
          py::arg("name"), py::arg("grad"))
      .def("freeze", &Optimizer::freeze, py::arg("name"))
      .def("thaw", &Optimizer::thaw, py::arg("name"))
      .def(
          "frozen",
          [](Optimizer& self, const std::string& name) { return self.parameter(name).frozen(); },
          py::arg("name"))
      .def(
          "step",
          [](Optimizer& self, bool skip, double grad_multiplier, double max_grad_norm,
             double clip_value, bool skip_nonfinite, const Streams& given) {
            const std::vector<Stream> streams = streams_of(given);
            StepOptions options;
            options.skip = skip;
            options.grad_multiplier = grad_multiplier;
            options.max_grad_norm = max_grad_norm;
            options.clip_value = clip_value;
            options.skip_nonfinite = skip_nonfinite;
            options.streams = streams;
            follow_torch_in_this_thread();
            const py::gil_scoped_release release;
            self.step(options);
          },
          py::arg("skip"), py::arg("grad_multiplier"), py::arg("max_grad_norm"),
          py::arg("clip_value"), py::arg("skip_nonfinite"), py::arg("streams"))
      .def(
          "refresh_master_weights",
          [](Optimizer& self, const Streams& given) {
            const std::vector<Stream> streams = streams_of(given);
            const py::gil_scoped_release release;
            self.refresh_master_weights(streams);
          },
          py::arg("streams"))
      .def(
          "sync_hyper",
          [](Optimizer& self, const Streams& given) {
            const std::vector<Stream> streams = streams_of(given);
            const py::gil_scoped_release release;
            self.sync_hyper(streams);
          },
          py::arg("streams"))
      .def("last_grad_norm", [](Optimizer& self) { return self.last_grad_norm().norm; })
      .def("skipped_steps", &Optimizer::skipped_steps)
      .def("memory_report", &Optimizer::memory_report)
      .def(
          "step_count",
          [](Optimizer& self, const std::string& name) { return self.state(name).step(); },
          py::arg("name"))
      .def(
          "slot_names",
          [](Optimizer& self, const std::string& name) { return self.state(name).slot_names(); },
          py::arg("name"))
      .def(
          "slot",
          [](Optimizer& self, const std::string& name, const std::string& slot) {
            return memory_of(self.state(name).slot(slot));
          },
          py::arg("name"), py::arg("slot"));
}

/// Null while the object is made.
TorchStepper* stepper_of(PyObject* self) {
  const auto held = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return held.holder_constructed() ? static_cast<TorchStepper*>(held.value_ptr()) : nullptr;
}

/// A parameter may refer to its optimizer.
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    TorchStepper* const stepper = stepper_of(self);
    return stepper == nullptr ? 0 : stepper->visit(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (TorchStepper* const stepper = stepper_of(self)) stepper->clear();
    return 0;
  };
}

}  // namespace
}  // namespace fusestep::bindings

PYBIND11_MODULE(_core, m) {
  using namespace fusestep;
  using namespace fusestep::bindings;
  m.doc() = "C++ side of fusestep";

  // Bases by multiple inheritance, so that `except ValueError` works as people expect.
  const auto exception = [](const char* name, const char* doc, const py::object& bases) {
    return py::reinterpret_steal<py::object>(
        PyErr_NewExceptionWithDoc(name, doc, bases.ptr(), nullptr));
  };
  const py::object error = exception("fusestep.Error", "What fusestep raises.",
                                     py::reinterpret_borrow<py::object>(PyExc_RuntimeError));
  const auto both = [&](PyObject* builtin) { return py::make_tuple(error, py::handle(builtin)); };
  m.attr("Error") = error;
  m.attr("InvalidArgument") =
      exception("fusestep.InvalidArgument", "A wrong call; nothing has changed. A ValueError too.",
                both(PyExc_ValueError));
  m.attr("OutOfMemory") =
      exception("fusestep.OutOfMemory",
                "State could not be allocated; nothing has changed. A MemoryError too.",
                both(PyExc_MemoryError));
  m.attr("DeviceError") =
      exception("fusestep.DeviceError",
                "A device has failed; the optimizer that used it refuses further steps.", error);
  m.attr("FileError") = exception(
      "fusestep.FileError", "A file cannot be read or written, or is damaged. An OSError too.",
      both(PyExc_OSError));
  static PyObject* const invalid = py::object(m.attr("InvalidArgument")).release().ptr();
  static PyObject* const memory = py::object(m.attr("OutOfMemory")).release().ptr();
  static PyObject* const device = py::object(m.attr("DeviceError")).release().ptr();
  static PyObject* const file = py::object(m.attr("FileError")).release().ptr();
  static PyObject* const other = py::object(error).release().ptr();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const InvalidArgument& e) {
      PyErr_SetString(invalid, e.what());
    } catch (const OutOfMemory& e) {
      PyErr_SetString(memory, e.what());
    } catch (const DeviceError& e) {
      PyErr_SetString(device, e.what());
    } catch (const FileError& e) {
      PyErr_SetString(file, e.what());
    } catch (const Error& e) {
      PyErr_SetString(other, e.what());
    }
  });

  bind_array_optimizer(m);
  bind_state_files(m);
  py::class_<TorchStepper>(m, "TorchStepper", py::custom_type_setup(&make_collectable))
      .def(py::init<std::string, py::object>(), py::arg("rule"), py::arg("tensor_type"))
      .def("gather", &TorchStepper::gather, py::arg("groups"), py::arg("state"), py::arg("dtensor"),
           py::arg("writes_grads"))
      .def("add", &TorchStepper::add, py::arg("group"), py::arg("position"), py::arg("value"),
           py::arg("grad"), py::arg("state"), py::arg("fresh"))
      .def("remember", &TorchStepper::remember, py::arg("groups"), py::arg("places"),
           py::arg("state"))
      .def("forget", &TorchStepper::forget)
      .def("holds_same", &TorchStepper::holds_same, py::arg("groups"))
      .def("is_unchanged", &TorchStepper::is_unchanged, py::arg("groups"), py::arg("writes_grads"),
           py::arg("looks_at_all"))
      .def("strays", &TorchStepper::strays, py::arg("groups"))
      .def("takes_turns", &TorchStepper::takes_turns)
      .def("can_store_grads", &TorchStepper::can_store_grads)
      .def("step", &TorchStepper::step, py::arg("found_inf"), py::arg("loss_scale"),
           py::arg("store_unscaled_grads"), py::arg("grad_multiplier"), py::arg("max_grad_norm"),
           py::arg("clip_value"), py::arg("skip_nonfinite"))
      .def("sync_hyper", &TorchStepper::sync_hyper, py::arg("groups"))
      .def("copy_grad_norm", &TorchStepper::copy_grad_norm, py::arg("to"))
      .def("skipped_steps", &TorchStepper::skipped_steps)
      .def("let_go", &TorchStepper::let_go, py::arg("written"))
      .def_property_readonly("written", &TorchStepper::written)
      .def_property_readonly("stepped", &TorchStepper::stepped)
      .def_property_readonly("steps", &TorchStepper::steps)
      .def_property_readonly("reads_through_shim", &TorchStepper::reads_through_shim);

  m.def("set_num_threads", &set_num_threads, py::arg("threads"),
        "Threads of the CPU backend, for all optimizers. Results do not depend on it.");
  m.def(
      "num_threads",
      [] {
        follow_torch_in_this_thread();
        return num_threads();
      },
      "Threads that a step on the CPU may use, the calling one included.");
  m.def(
      "find_torch_shim",
      [](const py::object& tensor_type) { return TorchShim::find(tensor_type).has_value(); },
      py::arg("tensor_type"),
      "Whether tensors of this class are read through torch's C interface. Looked for until "
      "found.");
  m.def("use_threads_of_torch", &use_threads_of_torch,
        "Steps on the CPU run on torch's OpenMP threads from now on; nothing where it has none.");
  m.def(
      "instruction_set", [] { return std::string(instruction_set()); },
      "The instruction set of the CPU backend; FUSESTEP_ISA in the environment forces one.");
  m.def(
      "available_instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const std::string_view name : available_instruction_sets()) names.emplace_back(name);
        return names;
      },
      "The instruction sets this processor and build have.");
  m.def("cuda_device_count", &cuda_device_count, "CUDA devices that can be used.");
  m.def("cuda_status", &cuda_status, "Whether CUDA is used, and if not, why.");
  m.attr("__version__") = FUSESTEP_VERSION;
  m.attr("compiler") = FUSESTEP_COMPILER;
#if defined(FUSESTEP_WITH_CUDA)
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
}
