# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""The clocks, memory and roof of the CPU and of a CUDA device. Times are in us."""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
import re
import time
from collections.abc import Callable, Iterator

import torch

import fusestep

Call = Callable[[], object]


def _us(begin_ns: int, end_ns: int) -> float:
    return (end_ns - begin_ns) / 1e3


class Roof:
    """What the memory gives at best: a call that moves `bytes`."""

    def __init__(self, call: Call, moved: int) -> None:
        self.call = call
        self.bytes = moved


class Cpu:
    """Wall time, everybody with as many threads as the other."""

    name = "cpu"
    roof_is = "y.add_(x, alpha=a) of torch, in place, 12 bytes an element"
    roof_elements = 64 << 20

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._scratch = torch.ones(max(32 << 20, 2 * _largest_cache()) // 4, device="cpu")

    @contextlib.contextmanager
    def in_use(self, threads: int | None = None) -> Iterator[None]:
        """Both libraries with so many threads, by default all that were asked for."""
        before = torch.get_num_threads(), fusestep.num_threads()
        torch.set_num_threads(threads or self.threads)
        fusestep.set_num_threads(threads or self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            fusestep.set_num_threads(before[1])

    def free_bytes(self) -> int:
        """Of memory: what the system says is available, or what is left to this control group."""
        found = []
        with contextlib.suppress(OSError):
            found.append(_kib_of("/proc/meminfo", "MemAvailable"))
        with contextlib.suppress(OSError, ValueError):
            group = pathlib.Path("/sys/fs/cgroup")
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            found.append(limit - used)
        return min(found, default=4 << 30)

    def roof(self) -> Roof:
        elements = _not_too_many(self.roof_elements, self.free_bytes())
        x, y = (torch.full((elements,), value, device="cpu") for value in (1e-3, 1.0))
        return Roof(lambda: y.add_(x, alpha=0.999), 12 * elements)

    def sample(self, call: Call) -> dict[str, float]:
        """The same work of torch's threads comes before every sample, as a backward pass would: nobody
        finds his tensors in the caches, and the threads are in the same state for all."""
        self._scratch.add_(1e-3)
        begin = time.perf_counter_ns()
        call()
        return {"wall_us": _us(begin, time.perf_counter_ns())}

    def host_sample(self, call: Call) -> dict[str, float]:
        """Time of the calling thread's processor, so that other programs do not count."""
        begin = time.thread_time_ns()
        call()
        return {"host_us": _us(begin, time.thread_time_ns())}

    def synchronize(self) -> None:
        pass

    def peak_bytes(self, call: Call) -> int | None:
        """Resident memory at most while it runs, beyond what there was before; None where Linux is not.

        Counts pages that are touched: good to about half a MB.
        """
        try:
            ctypes.CDLL(None).malloc_trim(0)  # memory freed before counts anew
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
            before = _kib_of("/proc/self/status", "VmRSS")
            call()
            return max(0, _kib_of("/proc/self/status", "VmHWM") - before)
        except (OSError, AttributeError):
            return None

    def launches(self, call: Call) -> dict[str, int]:
        return {}


class Cuda:
    """Wall time to completion, host time to return, and device time by events."""

    name = "cuda"
    roof_is = "a copy from device memory to device memory, bytes read and written"
    roof_elements = 512 << 20

    def __init__(self) -> None:
        self._scratch = torch.ones(64 << 20, device="cuda")  # 256 MiB: more than any L2 cache holds
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    @contextlib.contextmanager
    def in_use(self, threads: int | None = None) -> Iterator[None]:
        yield

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def roof(self) -> Roof:
        elements = _not_too_many(self.roof_elements, self.free_bytes())
        source, target = (torch.ones(elements, device="cuda") for _ in range(2))
        return Roof(lambda: target.copy_(source), 8 * elements)

    def sample(self, call: Call) -> dict[str, float]:
        """Two calls: one on the host's clock, one between events. The L2 cache is cold for both."""
        self._flush_l2()
        times = self.host_sample(call)
        self._flush_l2()
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return {**times, "device_us": self._begin.elapsed_time(self._end) * 1e3}

    def _flush_l2(self):
        """By reading: what is written waits in the cache, and goes to memory in the time of the next call."""
        self._scratch.sum()

    def host_sample(self, call: Call) -> dict[str, float]:
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        call()
        returned = time.perf_counter_ns()
        torch.cuda.synchronize()
        return {"wall_us": _us(begin, time.perf_counter_ns()), "host_us": _us(begin, returned)}

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_bytes(self, call: Call) -> int:
        """Memory of torch's allocator at most while it runs, beyond what there was before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Call) -> dict[str, int]:
        """Kernels, and copies and fills, as torch.profiler counts them; nothing where it does not."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        try:
            with torch.profiler.profile(activities=activities) as profile:
                call()
                torch.cuda.synchronize()
            events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        except RuntimeError:
            return {}
        names = [event.name for event in events if not getattr(event, "is_user_annotation", False)]
        names = [name for name in names if not name.startswith("Optimizer.")]
        copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
        return {"launches": len(names) - copies, "copies": copies} if names else {}


def _not_too_many(elements: int, free_bytes: int) -> int:
    """An eighth of the memory for two arrays of float32 at most."""
    return max(1, min(elements, free_bytes // 64))


def _largest_cache() -> int:
    """Bytes of a processor's last cache; 0 where Linux does not tell."""
    caches = pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KM])", path.read_text().strip()) for path in caches]
    return max((int(size[1]) << (10 if size[2] == "K" else 20) for size in sizes if size), default=0)


def _kib_of(path: str, key: str) -> int:
    """The bytes of a line such as "VmRSS:  12 kB"."""
    for line in pathlib.Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"{path} has no {key}")
