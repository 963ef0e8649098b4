// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// What fusestep throws. The library never prints and never aborts.
#pragma once

#include <stdexcept>

#include "fusestep/export.h"

namespace fusestep {

/// Base of everything the library throws.
class FUSESTEP_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller asked for something that makes no sense. Nothing was changed. The text names the
/// group and the parameter, what was expected and what came.
class FUSESTEP_API InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// Memory for state or tables could not be had. Parameters, state and step counts are as before the
/// call, unless its own description says otherwise, and the optimizer can be used on.
class FUSESTEP_API OutOfMemory : public Error {
 public:
  using Error::Error;
};

/// A device failed while it worked for us. Nobody can say what it has written: the optimizer
/// refuses every further step.
class FUSESTEP_API DeviceError : public Error {
 public:
  using Error::Error;
};

/// A file cannot be read or written, or what is in it is wrong. The text names the file, the tensor
/// where there is one, and what is wrong with it.
class FUSESTEP_API FileError : public Error {
 public:
  using Error::Error;
};

}  // namespace fusestep
