# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizers for arrays without torch: NumPy, CuPy, and what DLPack can hand over in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import _core
from .memory import memory_of

RULES = ("Adam", "AdamW", "SGD", "RMSprop")


class Optimizer:
    """Steps arrays in place, with torch's hyperparameter names and defaults.

    Args:
        rule: "Adam", "AdamW", "SGD" or "RMSprop".
        groups: a dict of names to arrays (one group), or a list of dicts with `params` (such a dict of
            names to arrays), optionally `name`, and hyperparameters of that group.
        **hyper: hyperparameters of groups that do not set them.

    Arrays are of NumPy, CuPy, or anything with DLPack in CPU memory; float32, float64 or float16 (with
    float32 state), of any shape, contiguous and writable. They are stepped where they are, and kept
    alive. Errors are `fusestep.InvalidArgument` and change nothing.

    >>> import numpy, fusestep
    >>> w = numpy.ones(3, dtype=numpy.float32)
    >>> opt = fusestep.Optimizer("SGD", {"w": w}, lr=0.5)
    >>> opt.step({"w": numpy.ones(3, dtype=numpy.float32)})
    >>> w
    array([0.5, 0.5, 0.5], dtype=float32)
    """

    def __init__(self, rule: str, groups: Mapping[str, Any] | Sequence[Mapping[str, Any]], **hyper: Any) -> None:
        self.rule = rule
        self._core = _core.ArrayOptimizer()
        self._hyper = hyper
        self._arrays: dict[str, Any] = {}
        self._groups: list[str] = []
        groups = [{"params": groups}] if isinstance(groups, Mapping) and "params" not in groups else groups
        for group in [groups] if isinstance(groups, Mapping) else groups:
            self.add_group(group)
        if not self._groups:
            raise _core.InvalidArgument("there are no groups")

    def add_group(self, group: Mapping[str, Any]) -> None:
        """Adds a group, at any time: a dict as in the constructor's list."""
        hyper = {**self._hyper, **group}
        arrays = dict(hyper.pop("params"))
        name = str(hyper.pop("name", len(self._groups)))
        memory = [(key, memory_of(f"parameter '{key}'", array, writable=True)) for key, array in arrays.items()]
        self._core.add_group(name, self.rule, hyper, memory)
        self._groups.append(name)
        self._arrays.update(arrays)

    def step(
        self,
        grads: Mapping[str, Any],
        *,
        skip: bool = False,
        grad_multiplier: float = 1.0,
        max_grad_norm: float = float("inf"),
        skip_nonfinite: bool = False,
    ) -> None:
        """One step.

        Args:
            grads: names to arrays of the parameters' shapes and dtypes; those left out or None rest.
            skip: changes nothing, and is counted.
            grad_multiplier: what gradients are multiplied by as they are read.
            max_grad_norm: clips the norm of all gradients, as torch's `clip_grad_norm_` does.
            skip_nonfinite: skips if a gradient has an infinite or NaN element.

        The GIL is released while it works. On CuPy arrays the work is enqueued on CuPy's current stream.
        """
        unknown = set(grads) - set(self._arrays)
        if unknown:
            raise _core.InvalidArgument(f"gradients of unknown parameters: {', '.join(sorted(unknown))}")
        memory = {
            name: memory_of(f"gradient of parameter '{name}'", grad, writable=False)
            for name, grad in grads.items()
            if grad is not None
        }
        for name in self._arrays:
            self._core.set_grad(name, memory.get(name))
        self._core.step(skip, grad_multiplier, max_grad_norm, skip_nonfinite, _streams(memory.values()))

    def set_hyper(self, group: str | int = "0", **changed: Any) -> None:
        """Changes hyperparameters of a group from the next step on."""
        self._core.set_hyper(str(group), self.rule, changed)

    def hyper(self, group: str | int = "0") -> dict[str, Any]:
        """The hyperparameters of a group."""
        return self._core.hyper(str(group))

    def freeze(self, name: str) -> None:
        """Leaves a parameter, or all of a group, alone until `thaw`; its state stays."""
        self._core.freeze(name)

    def thaw(self, name: str) -> None:
        """Ends `freeze`."""
        self._core.thaw(name)

    def step_count(self, name: str) -> int:
        """Steps a parameter has taken."""
        return self._core.step_count(name)

    def slots(self, name: str) -> dict[str, Any]:
        """The state of a parameter: names to arrays, which are the state itself, not copies."""
        return {slot: _as_array(self, self._core.slot(name, slot)) for slot in self._core.slot_names(name)}

    def memory_report(self) -> dict[str, int]:
        """Bytes of state by slot name."""
        return self._core.memory_report()

    def last_grad_norm(self) -> float:
        """The norm the last step computed; NaN if it did not."""
        return self._core.last_grad_norm()

    def skipped_steps(self) -> int:
        """Steps that changed nothing."""
        return self._core.skipped_steps()


def _streams(memory):
    devices = {device for *_, device in memory if device is not None}
    if not devices:
        return []
    import cupy

    streams = []
    for device in devices:
        with cupy.cuda.Device(device):
            streams.append((device, cupy.cuda.get_current_stream().ptr))
    return streams


def _as_array(owner, memory):
    address, dtype, shape, device = memory
    if device is None:
        import numpy

        interface = {"data": (address, False), "typestr": numpy.dtype(dtype).str, "shape": shape, "version": 3}
        holder = type("Slot", (), {"__array_interface__": interface, "owner": owner})()
        return numpy.asarray(holder)
    import cupy

    elements = cupy.cuda.UnownedMemory(address, 0, owner, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(elements, 0))
