# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What this installation is and uses."""

import platform

from . import _core


class Info(dict):
    """A dict that prints as a table."""

    def __str__(self):
        width = max(len(key) for key in self)
        return "\n".join(f"{key.replace('_', ' '):<{width}}  {value}" for key, value in self.items())


def info() -> Info:
    """Version, compiler, instruction sets, threads, and whether and why CUDA is used."""
    return Info(
        version=_core.__version__,
        python=platform.python_version(),
        compiler=_core.compiler,
        instruction_set=_core.instruction_set(),
        available_instruction_sets=_core.available_instruction_sets(),
        threads=_core.num_threads(),
        built_with_cuda=_core.built_with_cuda,
        cuda_devices=_core.cuda_device_count(),
        cuda_status=_core.cuda_status(),
    )
