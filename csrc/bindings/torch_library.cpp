// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "torch_library.h"

#include <pybind11/pybind11.h>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace py = pybind11;

namespace fusestep::bindings {

void* find_in_torch([[maybe_unused]] const std::string& name) {
#if defined(__unix__) || defined(__APPLE__)
  static void* const library = [] {
    const auto extension = py::module_::import("torch._C").attr("__file__").cast<std::string>();
    return dlopen(extension.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  }();
  return library == nullptr ? nullptr : dlsym(library, name.c_str());
#else
  return nullptr;
#endif
}

}  // namespace fusestep::bindings
