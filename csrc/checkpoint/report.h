// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "checkpoint/description.h"
#include "fusestep/state_dict.h"

namespace fusestep::detail {

/// The report's fields under their names, and "text".
Json to_json(const LoadReport& report);

}  // namespace fusestep::detail
