// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The one header to include.
#pragma once

#include "fusestep/cpu.h"
#include "fusestep/device.h"
#include "fusestep/dtype.h"
#include "fusestep/error.h"
#include "fusestep/hyper.h"
#include "fusestep/optimizer.h"
#include "fusestep/schedule.h"
#include "fusestep/shard.h"
#include "fusestep/state_dict.h"
#include "fusestep/tensor_view.h"
