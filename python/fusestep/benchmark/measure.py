# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Checks the contestants of a case, times them in turns, and makes rows of figures."""

from __future__ import annotations

import gc
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import cases, workload
from .cases import HOST_OPERATIONS, STATE_OPERATIONS, Case
from .contestants import OURS, Entry, LeftOut, entered, labels, needed_bytes
from .devices import Roof

WARM_UP = 2  # calls, besides those that are checked
ROOF = "roof"

Row = dict[str, Any]


@dataclass
class Results:
    """What is in the file, without the context."""

    benchmarks: list[Row] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    wrong: bool = False  # fusestep was refused by a check
    interrupted: bool = False

    def leave_out(self, name: str, contestant: str, why: object) -> None:
        self.left_out.append({"name": name, "contestant": contestant, "why": str(why)})


def measure(chosen: Iterable[Case], device: Any, rounds: int) -> Iterator[Results]:
    """Every case, one after the other, with a progress bar where there is a terminal. Ctrl-C ends it early.

    Yields all results so far, before the first case and after each.
    """
    chosen, results = list(chosen), Results()
    yield results  # so that who cannot keep them learns it now
    with _progress(len(chosen) * rounds) as bar, tempfile.TemporaryDirectory() as folder:
        with device.in_use():
            roof = device.roof()
        for number, case in enumerate(chosen):
            bar.set_description_str(case.name)
            try:
                _measure_case(case, device, roof, rounds, pathlib.Path(folder), results, bar)
            except LeftOut as why:
                results.leave_out(case.name, "", why)
            except (MemoryError, torch.cuda.OutOfMemoryError):
                results.leave_out(case.name, "", "the memory did not suffice")
            except KeyboardInterrupt:
                results.interrupted = True
                for left in chosen[number:]:
                    results.leave_out(left.name, "", "the run was interrupted")
            bar.update((number + 1) * rounds - bar.n)
            yield results
            if results.interrupted:
                break


def _progress(total):
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, unit="round", disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False)


class _NoBar:
    n = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set_description_str(self, text):
        pass

    def update(self, count=1):
        pass


# ---- one case ----------------------------------------------------------------------------------


def _measure_case(case, device, roof, rounds, folder, results, bar):
    _refuse_what_does_not_fit(case, device)
    on_host = case.operation in HOST_OPERATIONS
    with device.in_use(threads=1 if on_host else None), workload.process_group(case):
        tensors = workload.Workload(case, device.name)
        entries, ulps = _checked(case, tensors, folder, results)
        if case.operation not in HOST_OPERATIONS + STATE_OPERATIONS:
            entries.append(_roof_entry(roof))
        samples = _samples(entries, device, rounds, on_host, bar)
        moved = _Moved(case, roof, samples.pop(ROOF, None))
        for entry in entries:
            if entry.label != ROOF:
                row = {**_about(case), "contestant": entry.label, **_figures(entry.label, samples, moved)}
                row |= {"error_ulps": ulps[entry.label], "state_bytes": entry.state_bytes}
                row |= {"peak_bytes": _once(device.peak_bytes, entry), **_once(device.launches, entry)}
                results.benchmarks.append({**row, "samples": samples[entry.label]})


def _refuse_what_does_not_fit(case, device):
    gc.collect()  # what the case before has left
    needed, free = needed_bytes(case), device.free_bytes()
    if needed > free:
        raise LeftOut(f"needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def _checked(case, tensors, folder, results):
    """The contestants whose results are right, and their errors."""
    references, entries, ulps = workload.references(tensors), [], {}
    for label in labels(case):
        try:
            entry, ulps[label] = entered(label, tensors, folder, references)
            entries.append(entry)
        except LeftOut as why:
            results.leave_out(case.name, label, why)
            if label == OURS:
                results.wrong = True
                raise LeftOut(f"not timed, since fusestep is wrong here: {why}") from why
    return entries, ulps


def _roof_entry(roof: Roof) -> Entry:
    return Entry(ROOF, roof.call, lambda _: 0.0)


def _samples(entries, device, rounds, on_host, bar):
    """Label to clock to one time per round. In each round everybody has a turn, another one first."""
    for entry in entries:
        for _ in range(WARM_UP):
            entry.call()
    samples: dict[str, dict[str, list[float]]] = {entry.label: {} for entry in entries}
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(entries)
            for entry in entries[first:] + entries[:first]:
                if on_host:
                    entry.call()  # its own data are in the caches then
                if entry.before is not None:
                    entry.before()
                times = device.host_sample(entry.call) if on_host else device.sample(entry.call)
                for clock, us in times.items():
                    samples[entry.label].setdefault(clock, []).append(us)
            bar.update()
    finally:
        gc.enable()
    return samples


def _once(measurement, entry):
    if entry.before is not None:
        entry.before()
    return measurement(entry.call)


# ---- figures -----------------------------------------------------------------------------------


@dataclass
class _Moved:
    """Bytes of the case, and what the roof moved in the same rounds."""

    case: Case
    roof: Roof
    roof_samples: dict[str, list[float]] | None


def _about(case: Case) -> Row:
    tensors = len(cases.shapes(case.model))
    return {
        "name": case.name,
        "rule": case.rule,
        "dtype": case.dtype,
        "model": case.model,
        "groups": case.groups,
        "operation": case.operation,
        "tensors": tensors,
        "elements": case.elements,
        "bytes": case.bytes,
    }


def _figures(label: str, samples: dict[str, dict[str, list[float]]], moved: _Moved) -> Row:
    row: Row = {}
    for clock, times in samples[label].items():
        row |= _median(clock, times)
    clock = "wall_us" if moved.case.operation not in HOST_OPERATIONS else "host_us"
    ours, own = samples[OURS][clock], samples[label][clock]
    row |= _median("speedup", [theirs / us for us, theirs in zip(ours, own, strict=True)])
    if moved.roof_samples is not None:
        row |= _of_roof(samples[label], moved)
    return row


def _of_roof(own, moved):
    clock = "device_us" if "device_us" in own else "wall_us"
    times, roof_times = own[clock], moved.roof_samples[clock]
    rate = moved.roof.bytes / statistics.median(roof_times) / 1e3
    pairs = zip(times, roof_times, strict=True)
    fractions = [moved.case.bytes / us * roof_us / moved.roof.bytes for us, roof_us in pairs]
    gbps = moved.case.bytes / statistics.median(times) / 1e3
    return {"gbps": gbps, "roof_gbps": rate, **_median("roof_fraction", fractions)}


def _median(name: str, values: list[float]) -> Row:
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return {name: middle, f"{name}_quartiles": [first, third]}
