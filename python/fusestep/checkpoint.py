# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Saving and loading for the classes of fusestep.optim: by name, all or nothing, with a report."""

from __future__ import annotations

import collections
import json
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from . import _core, precision, state
from .dtensor import is_dtensor
from .freezing import refuse_wrong_values, why_frozen_for_ever
from .gradients import has_overlap
from .inference import is_read_only
from .names import listed
from .sources import dtype_named, made_tensor, open_source, pieces_of, plain
from .state import LoadReport, Path, Rename

Names = torch.nn.Module | Iterable[tuple[str, torch.Tensor]] | None
SavedNames = torch.nn.Module | Iterable[str] | Iterable[tuple[str, Any]] | None

# How another program wanted to step: of a loaded group they would steer nothing here.
EXECUTION_FLAGS = ("foreach", "fused", "capturable", "differentiable")


class Checkpoints:
    """save, load and load_state_dict of fusestep.optim's classes."""

    def save(
        self, path: Path, *, values: bool = False, metadata: Mapping[str, Any] | None = None, names: Names = None
    ) -> None:
        """Writes the optimizer's state to a safetensors file, which appears whole or not at all.

        Args:
            path: where; an older file stays until the new one is on the disk.
            values: the parameters' values too.
            metadata: the user's own, anything JSON can hold.
            names: the model or its `named_parameters()`. Not needed where the optimizer was made of
                `named_parameters()`; without either, parameters are numbered.

        Raises:
            fusestep.FileError: the file could not be written.
            fusestep.InvalidArgument: something cannot be saved.
        """
        self.wait_for_save()
        _Snapshot(self, names, values, metadata).write(state.path_of(path, "a file's path"))

    def save_async(
        self, path: Path, *, values: bool = False, metadata: Mapping[str, Any] | None = None, names: Names = None
    ) -> None:
        """Copies the state to the CPU's memory and writes it in the background.

        What goes wrong there is raised by the next save, save_async, load or wait_for_save, which wait
        for it and then do nothing else.
        """
        self.wait_for_save()
        snapshot = _Snapshot(self, names, values, metadata)
        path = state.path_of(path, "a file's path")
        snapshot.detach()
        executor = ThreadPoolExecutor(1, thread_name_prefix="fusestep-save")
        self.__dict__["_saving"] = executor.submit(snapshot.write, path)
        executor.shutdown(wait=False)

    def wait_for_save(self) -> None:
        """Waits for save_async, and raises what went wrong."""
        saving: Future | None = self.__dict__.get("_saving")
        if saving is not None:
            wait([saving])  # apart: an interrupt leaves it to the next call
            del self.__dict__["_saving"]
            saving.result()

    def load(
        self,
        source: Path | Mapping[str, Any],
        strict: bool = True,
        what: str = "all",
        rename: Rename = None,
        *,
        convert: bool = False,
        values: bool = True,
        names: Names = None,
        saved_names: SavedNames = None,
    ) -> LoadReport:
        """Takes state by the parameters' names, whatever groups and order they had when it was saved.

        Args:
            source: a file of `save`, any safetensors file with tensors named `<parameter>/<slot>`, a
                file torch.save has made of a state_dict, or a state_dict.
            strict: refuse if anything is missing, unexpected or of another shape or dtype; otherwise
                load what matches.
            what: 'all'; 'state' keeps the learning rates and other settings there are now; 'hyper'
                takes only settings. 'all' also freezes and thaws parameters as they were.
            rename: saved names to names here: a dict or a function.
            convert: round state of other dtypes. Otherwise it does not fit.
            values: parameters' values too, where they were saved.
            names: of this optimizer's parameters, as for `save`.
            saved_names: of the source's parameters, where it has none: the model or
                `named_parameters()` as the saved optimizer had them, or a list of names.

        Returns a report. Raises LoadError, which has it too, another InvalidArgument, or FileError; then
        nothing has changed.
        """
        state.check_what(what)
        self.wait_for_save()
        own_names, is_named = _names_here(self, names)
        here = _describe(self, own_names, for_file=False)
        source = open_source(source, _rule(self), _pairs(saved_names))
        saved = source.description
        if what == "all":
            _expect_saved_dtypes(here, saved)
        state.check_named_alike(saved, here, is_named)
        state.rename_all(saved, rename)
        state.fill_unknown(saved, {parameter["name"]: parameter for parameter in state.parameters_of(here)})
        if isinstance(self, torch.optim.AdamW):
            for group in saved:
                group["hyper"]["decoupled_weight_decay"] = True  # it is, also of a group that was Adam's
        descriptions = state.as_json(saved), state.as_json(here)
        matched = json.loads(_core.match_state(*descriptions, what, convert, values, other_slots=True))
        matched["report"]["metadata"] = source.metadata
        report = state.checked(LoadReport.from_json(matched["report"]), strict)
        new = _NewState(self, source, matched, what)
        with torch.no_grad():
            new.enter()
        if self._flat is not None:
            self._flat.take_state()
        self.__dict__["_kept_metadata"] = source.metadata
        return report

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """torch's load_state_dict: by position.

        Besides what torch takes: state of apex's and DeepSpeed's FusedAdam, whose step counts stand in
        the groups. float32 state of bf16 and fp16 parameters stays float32.
        """
        around = _AroundTorchsLoad()
        before = self.register_load_state_dict_pre_hook(around.before)
        after = self.register_load_state_dict_post_hook(around.after, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        if self._flat is not None:
            self._flat.take_state()
        if around.other_names:
            text = (
                "load_state_dict goes by position, and the names of parameters are others there: "
                f"{listed(around.other_names, 4)}. load() goes by name"
            )
            warnings.warn(text, stacklevel=2)


# ---- what is here ------------------------------------------------------------------------------


def _rule(optimizer):
    return optimizer._torch_class.__name__


def _pairs(names):
    return names.named_parameters() if isinstance(names, torch.nn.Module) else names


def _names_here(optimizer, names: Names) -> tuple[list[str], bool]:
    """Of every parameter, group after group; numbers, and False, where nobody knows."""
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    if names is not None:
        known = _names_by_id(names)
        for index, p in enumerate(parameters):
            if id(p) not in known:
                raise _core.InvalidArgument(f"names: parameter {index}, of shape {list(p.shape)}, has none")
        return [known[id(p)] for p in parameters], True
    if all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        return [name for group in groups for name in group.get("param_names", ())], True
    return [str(index) for index in range(len(parameters))], False


def _names_by_id(names):
    if isinstance(names, torch.nn.Module):
        names = names.named_parameters(remove_duplicate=False)
    known: dict[int, str] = {}
    try:
        for name, p in names:
            known.setdefault(id(p), name)
    except (TypeError, ValueError):
        raise _core.InvalidArgument("names: expected a model or its named_parameters()") from None
    return known


def _describe(optimizer, names: list[str], for_file: bool) -> state.Description:
    """Groups and parameters here. Settings that a file cannot have are refused for one, or passed over."""
    groups, name_of_next = [], iter(names)
    for number, group in enumerate(optimizer.param_groups):
        name = str(group.get("name", number))
        groups.append(
            {
                "name": name,
                "rule": _rule(optimizer),
                "hyper": state.encode_settings(group, f"group '{name}'", pass_over=not for_file),
                "params": [_describe_parameter(next(name_of_next), p, group) for p in group["params"]],
            }
        )
    return groups


def _describe_parameter(name, p, group):
    if is_dtensor(p):
        raise _core.InvalidArgument(f"parameter '{name}' is distributed: use torch.distributed.checkpoint")
    as_slot = state.describe_tensor(p)
    dtypes = [as_slot["dtype"]] if p.is_complex() else map(state.name_of_dtype, precision.loadable_dtypes(p, group))
    return {
        "name": name,
        "dtype": state.dtype_name(p),
        "shape": list(p.shape),
        "frozen": not p.requires_grad,
        "slots": {},
        "slot_dtypes": list(dtypes),
        "master_weights": p.dtype.itemsize == 2,  # one that was saved is used, whatever the options
        "slot_shape": as_slot["shape"],
    }


def _expect_saved_dtypes(here, saved):
    """float32 parameters may get bfloat16 state with the setting that says so."""
    if any(group["hyper"].get("state_dtype") == "bfloat16" for group in saved):
        for parameter in state.parameters_of(here):
            if parameter["dtype"] == "float32" and "bfloat16" not in parameter["slot_dtypes"]:
                parameter["slot_dtypes"].append("bfloat16")


# ---- saving ------------------------------------------------------------------------------------


class _Snapshot:
    """The optimizer's state at one moment, to be written."""

    def __init__(self, optimizer, names, values, metadata):
        self._metadata = {**optimizer.__dict__.get("_kept_metadata", {}), **state.encode_metadata(metadata)}
        self._description = _describe(optimizer, _names_here(optimizer, names)[0], for_file=True)
        self._tensors = {}  # by (parameter, slot)
        for key in optimizer.state:
            if not torch.is_tensor(key):
                raise _core.InvalidArgument(f"state[{key!r}] is of no parameter, and is not saved")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, described in enumerate(state.parameters_of(self._description)):
            self._add(index, described, parameters[index], optimizer.state.get(parameters[index], {}), values)

    def _add(self, index, described, p, own, values):
        found = state.describe_state(described["name"], own)
        described |= {key: found[key] for key in ("step", "slots", "complex_slots") if key in found}
        tensors = {slot: own[slot] for slot in described["slots"]}
        if values:
            tensors["value"] = p
            described["slots"]["value"] = state.describe_tensor(p)
        for slot, tensor in tensors.items():
            self._tensors[index, slot] = plain(tensor, f"parameter '{described['name']}', '{slot}'")

    def detach(self):
        """Nothing of the optimizer's own memory is used any more."""
        for key, tensor in self._tensors.items():
            self._tensors[key] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def write(self, path):
        file = _core.StateFileWriter(path, state.as_json(self._description), self._metadata)
        try:
            for (index, slot), tensor in self._tensors.items():
                for address, size in pieces_of(tensor):
                    file.write(index, slot, address, size)
            file.commit()
        finally:
            del file  # an exception keeps this frame, and must not keep what was written


# ---- loading -----------------------------------------------------------------------------------


class _NewState:
    """Everything that is to change, read and checked by the constructor; and entered by what cannot fail."""

    def __init__(self, optimizer, source, matched, what):
        self._optimizer = optimizer
        self._source = source
        self._saved = state.parameters_of(source.description)
        self._thaws = what == "all" and source.knows_frozen
        self._tensors_here = collections.Counter(
            id(value) for group in optimizer.param_groups for value in group.values() if torch.is_tensor(value)
        )
        groups = optimizer.param_groups
        places = [(group, p) for group in groups for p in group["params"]]
        self._settings = [
            self._settings_of(number, group, source.description[saved])
            for number, (group, saved) in enumerate(zip(groups, matched["settings"], strict=True))
            if saved >= 0
        ]
        self._check_options()
        self._states = [self._state_of(saved, slots, *places[here]) for saved, here, slots in matched["parameters"]]

    def _options_of(self, group):
        """The settings it will have."""
        taken = (taken for own, taken, _ in self._settings if own is group)
        return {**group, **next(taken, {})}

    def _check_options(self):
        for number, group in enumerate(self._optimizer.param_groups):
            precision.check_group(self._options_of(group), f"group '{group.get('name', number)}'")

    def _settings_of(self, number, group, saved):
        """(group, what it takes, numbers for tensors that stay the tensors they are: a schedule knows them)."""
        where = f"group '{group.get('name', number)}'"
        taken, filled = {}, []
        for key, encoded in saved["hyper"].items():
            if key in EXECUTION_FLAGS:
                continue
            value, now = state.decode(encoded, f"{where}: {key}", made_tensor), group.get(key)
            if key == "state_dtype" and value is not None:
                value = dtype_named(value)
            if not (torch.is_tensor(now) and now.numel() == 1 and _is_number(value)):
                taken[key] = value
            elif not now.is_floating_point() and not float(value).is_integer():
                taken[key] = torch.full_like(now, float(value), dtype=torch.float32)
            elif self._tensors_here[id(now)] == 1 and not is_read_only(now):
                filled.append((now, float(value)))
            else:
                taken[key] = torch.full_like(now, float(value))  # other groups share it, or it cannot be written
        values = {id(tensor): number for tensor, number in filled}
        try:
            refuse_wrong_values(self._optimizer, {k: values.get(id(v), v) for k, v in {**group, **taken}.items()})
        except Exception as error:
            raise _core.InvalidArgument(f"{where}: {error}") from None
        return group, taken, filled

    def _state_of(self, saved, slots, group, p):
        """(parameter, its new state, its new value or None, whether it was frozen)."""
        described = self._saved[saved]
        of_rule = (*state.SLOTS[_rule(self._optimizer)], *([precision.MASTER] if p.dtype.itemsize == 2 else []))
        group = self._options_of(group)
        ordered = [slot for slot in of_rule if slot in slots] + sorted(set(slots).difference(of_rule))
        tensors = {slot: self._read(saved, slot, p, slot in of_rule or slot == "value") for slot in ordered}
        value, frozen = tensors.pop("value", None), described.get("frozen", False)
        if value is not None and has_overlap(p):
            raise _core.InvalidArgument(f"parameter '{described['name']}' is expanded: its value cannot be loaded")
        why = why_frozen_for_ever(p) if self._thaws and not frozen else None
        if value is not None and is_read_only(p):
            why = "was made under inference_mode: its value cannot be loaded"
        if why is not None:
            raise _core.InvalidArgument(f"parameter '{described['name']}' {why}")
        own = {
            slot: _laid_out_like(p, tensor, group, slot) if slot in of_rule else tensor
            for slot, tensor in tensors.items()
        }
        counts = "step" in described or not own.keys().isdisjoint(of_rule)
        if (own or described.get("step")) and counts and "step" in self._optimizer._names_of_state(p, group):
            count = state.decode(described.get("step", 0.0), "step", made_tensor)
            own = {"step": self._optimizer._new_step(count, p, group), **own}
        return p, own, value, frozen

    def _read(self, saved, slot, p, is_like_p):
        described = self._saved[saved]
        tensor = self._source.slot(saved, slot, described["slots"][slot], p.device)
        is_complex = p.is_complex() if is_like_p else slot in described.get("complex_slots", ())
        return torch.view_as_complex(tensor) if is_complex else tensor

    def enter(self):
        for p, own, value, frozen in self._states:
            if own:
                self._optimizer.state[p] = own
            else:
                self._optimizer.state.pop(p, None)
            if value is not None:
                p.copy_(value)
            if self._thaws and p.is_leaf and p.requires_grad == frozen:
                p.grad = None  # a step does not look at requires_grad
                p.requires_grad_(not frozen)
        for group, taken, filled in self._settings:
            group.update(taken)
            for tensor, number in filled:
                tensor.fill_(number)


def _count_tensor(count):
    return torch.tensor(float(count), device="cpu")


def _is_number(value):
    return isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1)


def _laid_out_like(p, tensor, group, slot):
    """With p's strides, as state is made, and of a dtype that p can be stepped with."""
    dtype = torch.float32 if slot == precision.MASTER else precision.loaded_dtype(p, group, tensor.dtype)
    if tensor.dtype == dtype and tensor.stride() == torch.empty_like(p, device="meta").stride():
        return tensor
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(tensor)


# ---- load_state_dict ---------------------------------------------------------------------------


class _AroundTorchsLoad:
    """Hooks of one load_state_dict: what torch does not take is made so, what it would lose is kept."""

    def __init__(self):
        self.other_names = []
        self._kept = []  # parameter, all names of its state, those slots that torch would give another dtype

    def before(self, optimizer, state_dict):
        try:
            state.check_state_dict(state_dict)
        except _core.InvalidArgument:
            return None  # torch says what is wrong
        state_dict = state.counts_by_parameter(state_dict, _count_tensor)
        pairs = list(zip(state_dict["param_groups"], optimizer.param_groups, strict=False))
        self.other_names = [
            f"'{saved}' becomes '{here}'"
            for group, own in pairs
            for saved, here in zip(group.get("param_names", ()), own.get("param_names", ()), strict=False)
            if saved != here
        ]
        groups = [{**group, **_options_not_in(group, own)} for group, own in pairs]
        for number, (group, (_, own)) in enumerate(zip(groups, pairs, strict=True)):
            precision.check_group({**group, "params": own["params"]}, f"group {number}")
        for group, (_, own) in zip(groups, pairs, strict=True):
            for index, p in zip(group["params"], own["params"], strict=False):
                self._take_out(p, group, index, state_dict["state"])
        rest = state_dict["param_groups"][len(groups) :]  # there are none, or torch refuses
        return {**state_dict, "param_groups": groups + rest}

    def _take_out(self, p, group, index, states):
        own = states.get(index, {})
        kept = {key: dtype for key, value in own.items() if (dtype := _dtype_torch_would_lose(p, group, key, value))}
        if kept:
            self._kept.append((p, list(own), {key: (own[key], dtype) for key, dtype in kept.items()}))
            states[index] = {key: value for key, value in own.items() if key not in kept}

    def after(self, optimizer):
        for p, names, kept in self._kept:
            own = optimizer.state[p]
            optimizer.state[p] = {
                key: kept[key][0].to(p.device, kept[key][1]) if key in kept else own[key] for key in names
            }


def _options_not_in(saved, own):
    """Options of this optimizer's group, where the saved one comes of an optimizer without."""
    return {key: own[key] for key in precision.DEFAULTS if key in own and key not in saved}


def _dtype_torch_would_lose(p, group, key, value):
    """That of a slot for which torch would take the parameter's; None where that is right."""
    if key == "step" or not torch.is_tensor(value) or not (p.is_floating_point() and value.is_floating_point()):
        return None
    dtype = torch.float32 if key == precision.MASTER else precision.loaded_dtype(p, group, value.dtype)
    return None if dtype == p.dtype else dtype
