# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What a run was measured on: everything that a reader needs to judge it, nothing that names the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import torch

import fusestep


def describe(device: Any, command: str) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "device": device.name,
        "processor": processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_before": load(),
        "threads": getattr(device, "threads", None),
        "roof_is": device.roof_is,
        "torch": torch.__version__,
        "fusestep": dict(fusestep.info()),
        "packages": packages(),
        **(gpu() if device.name == "cuda" else {}),
    }


def processor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def load() -> list[float] | None:
    """Mean number of processes that wanted to run, over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda_of_torch": torch.version.cuda,
    }


def packages() -> dict[str, str]:
    """Versions of those that take part where they are installed."""
    found = {}
    for name in ("apex", "deepspeed", "bitsandbytes", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
