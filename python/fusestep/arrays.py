# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizers for arrays without torch: NumPy, CuPy, and what DLPack can hand over in place."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import _core, state
from .memory import memory_of
from .state import LoadReport, Path, Rename

RULES = ("Adam", "AdamW", "SGD", "RMSprop")
_OPTIONS = ("state_dtype", "master_weights", "rounding", "seed")


class Optimizer:
    """Steps arrays in place, with torch's hyperparameter names and defaults.

    Args:
        rule: "Adam", "AdamW", "SGD" or "RMSprop".
        groups: a dict of names to arrays (one group), or a list of dicts with `params` (such a dict of
            names to arrays), optionally `name`, and hyperparameters of that group.
        **hyper: hyperparameters of groups that do not set them; and how they store, per group too:
            `state_dtype` ("float32", "bfloat16", or None: the parameter's; otherwise float32, of float64
            float64), `master_weights` (a float32 copy of 16-bit parameters is stepped, the slot
            `master_weight`), `rounding` ("nearest" or "stochastic", of bfloat16) and `seed`.

    Arrays are of NumPy, CuPy, or anything with DLPack in CPU memory; float32, float64, float16 or
    ml_dtypes' bfloat16, of any shape, contiguous and writable. They are stepped where they are, and kept
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
        self._devices: set[int] = set()  # CUDA devices that arrays are on
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
        options = {key: hyper.pop(key) for key in _OPTIONS if key in hyper}
        memory = [(key, memory_of(f"parameter '{key}'", array, writable=True)) for key, array in arrays.items()]
        self._core.add_group(name, self.rule, hyper, memory, options)
        self._groups.append(name)
        self._arrays.update(arrays)
        self._devices.update(device for _, (*_, device) in memory if device is not None)

    def step(
        self,
        grads: Mapping[str, Any],
        *,
        skip: bool = False,
        grad_multiplier: float = 1.0,
        max_grad_norm: float = float("inf"),
        clip_value: float = float("inf"),
        skip_nonfinite: bool = False,
    ) -> None:
        """One step.

        Args:
            grads: names to arrays of the parameters' shapes, and of their dtypes or float32; those left
                out or None rest.
            skip: changes nothing, and is counted.
            grad_multiplier: what gradients are multiplied by as they are read.
            max_grad_norm: clips the norm of all gradients, as torch's `clip_grad_norm_` does.
            clip_value: limits every element, after that.
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
        self._core.step(skip, grad_multiplier, max_grad_norm, clip_value, skip_nonfinite, _streams(self._devices))

    def refresh_master_weights(self) -> None:
        """Sets the master weights that exist to the parameters as they are now, for who has written to these."""
        self._core.refresh_master_weights(_streams(self._devices))

    def set_hyper(self, group: str | int = "0", **changed: Any) -> None:
        """Changes hyperparameters of a group from the next step on."""
        self._core.set_hyper(str(group), self.rule, changed)

    def sync_hyper(self) -> None:
        """Brings hyperparameters that have changed to the devices, for CUDA graphs that run after it."""
        self._core.sync_hyper(_streams(self._devices))

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

    def save(self, path: Path, *, values: bool = False, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes a safetensors file, which appears whole or not at all; an older one stays until then.

        Args:
            path: where.
            values: the parameters' values too.
            metadata: the user's own, anything JSON can hold.

        Raises:
            fusestep.FileError: the file could not be written.
        """
        self._save(path, values, metadata, in_background=False)

    def save_async(self, path: Path, *, values: bool = False, metadata: Mapping[str, Any] | None = None) -> None:
        """Copies the state and writes it in the background.

        What goes wrong there is raised by the next save, save_async, load or wait_for_save, which wait
        for it and then do nothing else.
        """
        self._save(path, values, metadata, in_background=True)

    def _save(self, path, values, metadata, in_background):
        encoded = state.encode_metadata(metadata)
        path = state.path_of(path, "a file's path")
        self._core.save(path, values, encoded, in_background, _streams(self._devices))

    def wait_for_save(self) -> None:
        """Waits for save_async, and raises what went wrong."""
        self._core.wait_for_save()

    def load(
        self,
        source: Path | Mapping[str, Any],
        strict: bool = True,
        what: str = "all",
        rename: Rename = None,
        *,
        convert: bool = False,
        values: bool = True,
        saved_names: Iterable[str] | Iterable[tuple[str, Any]] | None = None,
    ) -> LoadReport:
        """Takes state by the parameters' names, whatever groups they were in when it was saved.

        Args:
            source: a file of `save`, any safetensors file with tensors named `<parameter>/<slot>`, or
                what `state_dict` has given.
            strict: refuse if anything is missing, unexpected or of another shape or dtype; otherwise
                load what matches.
            what: 'all'; 'state' keeps the settings there are now; 'hyper' takes only settings. 'all'
                also freezes and thaws parameters as they were.
            rename: saved names to names here: a dict or a function.
            convert: round state of other dtypes. Otherwise it does not fit.
            values: parameters' values too, where they were saved.
            saved_names: of the source's parameters in their order, where it has none.

        Returns a report. Raises LoadError, which has it too, another InvalidArgument, or FileError; then
        nothing has changed.
        """
        state.check_what(what)
        self._core.wait_for_save()
        options = {"strict": strict, "what": what, "convert": convert, "values": values}
        if isinstance(source, Mapping):
            state.check_state_dict(source)
            description, arrays = self._packed(source, state.names_in(source, saved_names), rename)
            report = self._core.load_dict(description, _addresses(arrays), options, _streams(self._devices))
        else:
            path = state.path_of(source, "a file's path or a state_dict")
            options["rename"] = self._renaming_of(path, saved_names, rename)
            report = self._core.load_file(path, options, _streams(self._devices))
        return state.checked(LoadReport.from_json(json.loads(report)), strict)

    def state_dict(self) -> dict[str, Any]:
        """torch's structure, of copies: `state` by position, and `param_groups`.

        Groups also have `name` and `param_names`, which `load` goes by, and `frozen` where one is.
        """
        import numpy

        text, contents = self._core.state_dict(_streams(self._devices))
        groups, states, numbers = [], {}, itertools.count()
        for group in json.loads(text):
            frozen = [p.get("frozen", False) for p in group["params"]]
            indices = list(itertools.islice(numbers, len(frozen)))
            groups.append(
                {
                    "name": group["name"],
                    **{key: state.decode(value, key, numpy.asarray) for key, value in group["hyper"].items()},
                    **({"frozen": frozen} if any(frozen) else {}),
                    "param_names": [p["name"] for p in group["params"]],
                    "params": indices,
                }
            )
            for index, p in zip(indices, group["params"], strict=True):
                slots = {
                    slot: numpy.frombuffer(contents[index, slot], _numpy_dtype(described["dtype"])).reshape(
                        described["shape"]
                    )
                    for slot, described in p["slots"].items()
                }
                count = {} if self.rule == "SGD" else {"step": numpy.asarray(p["step"], numpy.float32)}
                if slots:
                    states[index] = {**count, **slots}
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes a state_dict by position, as torch does, with torch's checks. Changes nothing if refused."""
        state.check_state_dict(state_dict)
        names = list(self._arrays)
        if len(names) != len(state.indices_of(state_dict)):
            names = [str(number) for number, _ in enumerate(state.indices_of(state_dict))]  # is refused
        description, arrays = self._packed(state_dict, names, by_position=True)
        report = self._core.load_state_dict(description, _addresses(arrays), _streams(self._devices))
        state.checked(LoadReport.from_json(json.loads(report)), strict=True)

    def _check_named(self, description):
        here = [{"params": [{"name": name} for name in self._arrays]}]
        state.check_named_alike(description, here, here_is_named=True)

    def _renaming_of(self, path, saved_names, rename):
        """Names in the file to names here."""
        description = json.loads(_core.StateFileReader(path).description)
        old = [parameter["name"] for parameter in state.parameters_of(description)]
        if saved_names is not None:
            state.name_all(description, saved_names)
        self._check_named(description)
        state.rename_all(description, rename)
        new = [parameter["name"] for parameter in state.parameters_of(description)]
        return None if new == old else dict(zip(old, new, strict=True)).__getitem__

    def _packed(self, state_dict, names, rename=None, by_position=False):
        """(description, slots by position and name) of a state_dict, which may be torch's."""
        state_dict = state.counts_by_parameter(state_dict, float)
        description = state.describe_state_dict(state_dict, self.rule, names)
        if not by_position:
            self._check_named(description)
        state.rename_all(description, rename)
        state.fill_unknown(description, {name: _describe(name, array) for name, array in self._arrays.items()})
        frozen = [flag for group in state_dict["param_groups"] for flag in _frozen_flags(group)]
        arrays, indices = {}, state.indices_of(state_dict)
        for number, parameter in enumerate(state.parameters_of(description)):
            name = parameter["name"]
            here = name in self._arrays and self._core.frozen(name)
            parameter["frozen"] = here if frozen[number] is None else bool(frozen[number])
            for slot in parameter["slots"]:
                arrays[number, slot] = _as_numpy(state_dict["state"][indices[number]][slot], name, slot)
        return state.as_json(description), arrays


def _describe(name, array):
    _, dtype, shape, _ = memory_of(name, array, writable=False)
    return {"dtype": dtype, "shape": list(shape)}


def _frozen_flags(group):
    """Of each parameter; None where the dict does not say, as torch's."""
    flags, count = group.get("frozen"), len(group["params"])
    return flags if isinstance(flags, (list, tuple)) and len(flags) == count else [None] * count


def _as_numpy(value, name, slot):
    """In C order and CPU memory, a copy only if it must be."""
    import numpy

    try:
        value = value.detach() if hasattr(value, "detach") else value
        array = value.get() if hasattr(value, "get") else numpy.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _core.InvalidArgument(f"parameter '{name}', '{slot}' is no array: {error}") from None
    return numpy.ascontiguousarray(array).reshape(array.shape)


def _addresses(arrays):
    return {key: (array.ctypes.data, array.nbytes) for key, array in arrays.items()}


def _numpy_dtype(name):
    import numpy

    if name != "bfloat16":
        return numpy.dtype(name)
    import ml_dtypes  # NumPy has none of its own

    return numpy.dtype(ml_dtypes.bfloat16)


def _streams(devices):
    """CuPy's current stream of each device."""
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

        typestr = "<u2" if dtype == "bfloat16" else numpy.dtype(dtype).str
        interface = {"data": (address, False), "typestr": typestr, "shape": shape, "version": 3}
        holder = type("Slot", (), {"__array_interface__": interface, "owner": owner})()
        return numpy.asarray(holder).view(_numpy_dtype(dtype))
    import cupy

    elements = cupy.cuda.UnownedMemory(address, 0, owner, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(elements, 0))
