// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Functions of the torch that is loaded, looked up by name and not linked.
#pragma once

#include <string>

namespace fusestep::bindings {

/// Of torch's extension module and the libraries it was linked with, OpenMP's among them. Null
/// where there is none of that name. Imports torch.
void* find_in_torch(const std::string& name);

/// False where there is none of that name.
template <typename Function>
bool look_up(Function*& function, const std::string& name) {
  function = reinterpret_cast<Function*>(find_in_torch(name));
  return function != nullptr;
}

}  // namespace fusestep::bindings
