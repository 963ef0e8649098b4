// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Marks what the shared library exports; everything else is hidden.
#if defined(__GNUC__)
#define FUSESTEP_API __attribute__((visibility("default")))
#else
#define FUSESTEP_API
#endif
