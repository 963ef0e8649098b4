# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""fusestep: the optimizer step of a training program in one pass over memory.

`fusestep.optim` has drop-in classes for `torch.optim`; it is imported on first use, and nothing else
here needs torch. `fusestep.Optimizer` steps NumPy and CuPy arrays.
"""

import importlib

from ._core import (
    DeviceError,
    Error,
    FileError,
    InvalidArgument,
    OutOfMemory,
    __version__,
    available_instruction_sets,
    instruction_set,
    num_threads,
    set_num_threads,
)
from .arrays import Optimizer
from .diff import Diff, diff
from .history import History, plot_history
from .info import info
from .state import LoadError, LoadReport

__all__ = [
    "DeviceError",
    "Diff",
    "Error",
    "FileError",
    "History",
    "InvalidArgument",
    "LoadError",
    "LoadReport",
    "Optimizer",
    "OutOfMemory",
    "__version__",
    "available_instruction_sets",
    "diff",
    "info",
    "instruction_set",
    "num_threads",
    "optim",
    "plot_history",
    "set_num_threads",
]


def __getattr__(name):
    if name == "optim":
        return importlib.import_module(".optim", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
