# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Saving and loading for the classes of fusestep.optim: by name, all or nothing, with a report."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from . import _core, state
from .state import LoadReport, Rename

Path = str | os.PathLike[str]
Names = torch.nn.Module | Iterable[tuple[str, torch.Tensor]] | None

PIECE = 4 << 20  # bytes of pinned memory that state of other devices goes through
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
        _Snapshot(self, names, values, metadata).write(path)

    def save_async(
        self, path: Path, *, values: bool = False, metadata: Mapping[str, Any] | None = None, names: Names = None
    ) -> None:
        """Copies the state to the CPU's memory and writes it in the background.

        What goes wrong there is raised by the next save, save_async or wait_for_save, which wait for it
        and then do nothing else.
        """
        self.wait_for_save()
        snapshot = _Snapshot(self, names, values, metadata)
        snapshot.detach()
        executor = ThreadPoolExecutor(1, thread_name_prefix="fusestep-save")
        self.__dict__["_saving"] = executor.submit(snapshot.write, path)
        executor.shutdown(wait=False)

    def wait_for_save(self) -> None:
        """Waits for save_async, and raises what went wrong."""
        saving: Future | None = self.__dict__.pop("_saving", None)
        if saving is not None:
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
        saved_names: Iterable[str] | Iterable[tuple[str, Any]] | None = None,
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
            saved_names: of the source's parameters, in the order the optimizer had them: a list, or
                `named_parameters()` as they were. For a state_dict that has no names.

        Returns a report. Raises fusestep.LoadError, which has it too, or fusestep.FileError; then
        nothing has changed.
        """
        self.wait_for_save()
        here = _describe(self, _names_here(self, names))
        opened = _open(source, type(self), saved_names)
        saved = opened.description
        _check_named_alike(saved, here)
        state.rename_all(saved, rename)
        state.fill_unknown(saved, {parameter["name"]: parameter for parameter in state.parameters_of(here)})
        matched = json.loads(_core.match_state(json.dumps(saved), json.dumps(here), what, convert, values))
        matched["report"]["metadata"] = opened.metadata
        report = state.checked(LoadReport.from_json(matched["report"]), strict)
        commit = _Commit(self, opened, saved, matched, thaws=what == "all" and opened.knows_frozen)
        commit.run()
        self.__dict__["_kept_metadata"] = opened.metadata
        return report

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """torch's load_state_dict: by position.

        Besides what torch takes: state of apex's and DeepSpeed's FusedAdam, whose step counts stand in
        the groups. float32 state of bf16 and fp16 parameters stays float32.
        """
        found = {}

        def prepare(optimizer, given):
            found.update(_counts_by_parameter(given))
            _warn_of_other_order(optimizer, found)
            return found

        before = self.register_load_state_dict_pre_hook(prepare)
        after = self.register_load_state_dict_post_hook(lambda own: _keep_wide(own, found), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()


# ---- what is here ------------------------------------------------------------------------------


def _names_here(optimizer, names: Names) -> list[str]:
    """Of every parameter, group after group; numbers where nobody knows."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if names is not None:
        if isinstance(names, torch.nn.Module):
            names = names.named_parameters(remove_duplicate=False)
        known = {}
        for name, p in names:
            known.setdefault(id(p), name)
        for index, p in enumerate(parameters):
            if id(p) not in known:
                raise _core.InvalidArgument(f"names: parameter {index}, of shape {list(p.shape)}, has none")
        return [known[id(p)] for p in parameters]
    if all("param_names" in group for group in optimizer.param_groups):
        return [name for group in optimizer.param_groups for name in group["param_names"]]
    return [str(index) for index in range(len(parameters))]


def _describe(optimizer, names: list[str]) -> list[dict[str, Any]]:
    packed = {
        "state": dict(enumerate(optimizer.state.get(p, {}) for g in optimizer.param_groups for p in g["params"])),
        "param_groups": [],
    }
    first = 0
    for group in optimizer.param_groups:
        packed["param_groups"].append({**group, "params": range(first, first + len(group["params"]))})
        first += len(group["params"])
    description = state.describe_state_dict(packed, type(optimizer)._torch_class.__name__, names)
    for group, own in zip(description, optimizer.param_groups, strict=True):
        if issubclass(type(optimizer), torch.optim.AdamW):
            group["hyper"].setdefault("decoupled_weight_decay", True)
        for parameter, p in zip(group["params"], own["params"], strict=True):
            as_slot = state.describe_tensor(p)
            parameter["dtype"], parameter["shape"] = state.dtype_name(p), list(p.shape)
            parameter["frozen"] = not p.requires_grad
            parameter["slot_dtypes"] = [as_slot["dtype"]] + (["float32"] if p.dtype.itemsize == 2 else [])
            parameter["slot_shape"] = as_slot["shape"]
    return description


# ---- saving ------------------------------------------------------------------------------------


class _Snapshot:
    """The optimizer's state at one moment, to be written."""

    def __init__(self, optimizer, names, values, metadata):
        self._metadata = {**optimizer.__dict__.get("_kept_metadata", {}), **state.encode_metadata(metadata)}
        self._description = _describe(optimizer, _names_here(optimizer, names))
        described = state.parameters_of(self._description)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._tensors = {}
        for index, (p, parameter) in enumerate(zip(parameters, described, strict=True)):
            del parameter["slot_dtypes"], parameter["slot_shape"]
            for slot in parameter["slots"]:
                self._tensors[index, slot] = optimizer.state[p][slot]
            if values:
                parameter["slots"]["value"] = state.describe_tensor(p)
                self._tensors[index, "value"] = p
        for (index, slot), tensor in self._tensors.items():
            where = f"parameter '{described[index]['name']}', '{slot}'"
            self._tensors[index, slot] = _real(tensor.detach(), where)

    def detach(self):
        """Nothing of the optimizer's own memory is used any more."""
        self._tensors = {key: t.to("cpu", copy=True) for key, t in self._tensors.items()}

    def write(self, path):
        file = _core.StateFileWriter(os.fspath(path), json.dumps(self._description), self._metadata)
        for (index, slot), tensor in self._tensors.items():
            for address, size in _pieces(tensor):
                file.write(index, slot, address, size)
        file.commit()


def _real(tensor, where):
    """A plain tensor of real numbers; refuses what has no memory of its own."""
    if tensor.layout is not torch.strided:
        raise _core.InvalidArgument(f"{where} cannot be saved: its layout is {tensor.layout}")
    if hasattr(tensor, "to_local"):
        raise _core.InvalidArgument(f"{where} is distributed: save it with torch.distributed.checkpoint")
    plain = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(plain) if plain.is_complex() else plain


def _pieces(tensor) -> Iterator[tuple[int, int]]:
    """(address, bytes) of CPU memory, in C order, each valid until the next is asked for."""
    flat = _bytes_of(tensor.contiguous())
    if flat.device.type == "cpu":
        yield flat.data_ptr(), flat.numel()
        return
    staging = _staging(flat.device)
    for piece in flat.split(PIECE):
        staging[: piece.numel()].copy_(piece)
        yield staging.data_ptr(), piece.numel()


def _bytes_of(tensor):
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8)


def _staging(device):
    return torch.empty(PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda")


# ---- sources -----------------------------------------------------------------------------------


class _FileSource:
    """A safetensors file."""

    def __init__(self, path):
        self._file = _core.StateFileReader(os.fspath(path))
        self.description = json.loads(self._file.description)
        self.metadata = self._file.metadata
        self.knows_frozen = all(group["rule"] for group in self.description)

    def slot(self, index, name, described, device):
        """A new tensor with a slot's contents, in C order."""
        tensor = torch.empty(described["shape"], dtype=getattr(torch, described["dtype"]), device=device)
        flat = _bytes_of(tensor)
        if flat.device.type == "cpu":
            self._file.read_into(index, name, flat.data_ptr(), flat.numel())
            return tensor
        staging, done = _staging(flat.device), 0

        def take(size):
            nonlocal done
            flat[done : done + size].copy_(staging[:size])
            done += size

        self._file.read_through(index, name, staging.data_ptr(), PIECE, take)
        return tensor


class _DictSource:
    """A state_dict of torch's structure."""

    knows_frozen = False

    def __init__(self, state_dict, optimizer_class, saved_names):
        state_dict = _counts_by_parameter(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        names = _names_of(state_dict, saved_names, len(indices))
        rule = optimizer_class._torch_class.__name__
        self.description = state.describe_state_dict(state_dict, rule, dict(zip(indices, names, strict=True)))
        self.metadata = {}
        self._states = [state_dict["state"].get(index, {}) for index in indices]

    def slot(self, index, name, described, device):
        tensor = _real(torch.as_tensor(self._states[index][name]).detach(), f"state '{name}'")
        return tensor.to(device, copy=True, memory_format=torch.contiguous_format)


def _open(source, optimizer_class, saved_names):
    if isinstance(source, Mapping):
        return _DictSource(source, optimizer_class, saved_names)
    if _is_torch_file(source):
        try:
            contents = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise _core.FileError(f"{os.fspath(source)}: torch cannot load it: {error}") from None
        if not isinstance(contents, Mapping) or not {"state", "param_groups"} <= contents.keys():
            raise _core.FileError(
                f"{os.fspath(source)}: has no optimizer's state_dict at its top: load it with torch.load "
                "and hand over the part that is one"
            )
        return _DictSource(contents, optimizer_class, saved_names)
    opened = _FileSource(source)
    if saved_names is not None:
        names = _as_names(saved_names)
        for parameter, name in zip(_all_named(opened.description, len(names)), names, strict=True):
            parameter["name"] = name
    return opened


def _is_torch_file(path):
    """torch.save writes zip files; safetensors begin with a length."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False  # the reader says what is wrong


def _names_of(state_dict, saved_names, count):
    groups = state_dict["param_groups"]
    if saved_names is not None:
        names = _as_names(saved_names)
    elif all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    else:
        names = [str(number) for number in range(count)]
    if len(names) != count:
        raise _core.InvalidArgument(f"saved_names: there are {len(names)} for {count} parameters")
    return names


def _as_names(saved_names):
    return [given if isinstance(given, str) else given[0] for given in saved_names]


def _all_named(description, count):
    parameters = state.parameters_of(description)
    if len(parameters) != count:
        raise _core.InvalidArgument(f"saved_names: there are {count} for {len(parameters)} parameters")
    return parameters


def _check_named_alike(saved, here):
    """Numbers on one side and names on the other match nothing, or by accident."""
    numbered = [
        [p["name"] for p in side] == [str(number) for number in range(len(side))]
        for side in map(state.parameters_of, (saved, here))
    ]
    if numbered == [True, False]:
        raise _core.InvalidArgument(
            "the source has no names of parameters: give saved_names=, the named_parameters() the saved "
            "optimizer was made of, or load by position with load_state_dict"
        )
    if numbered == [False, True]:
        raise _core.InvalidArgument(
            "this optimizer does not know its parameters' names: give names=model, or make it of "
            "model.named_parameters()"
        )


# ---- taking over -------------------------------------------------------------------------------


class _Commit:
    """Everything that can fail, then the changes."""

    def __init__(self, optimizer, source, saved, matched, thaws):
        self._optimizer = optimizer
        self._source = source
        self._groups = saved
        self._parameters = state.parameters_of(saved)
        self._matched = matched
        self._thaws = thaws

    def run(self):
        places = [(group, p) for group in self._optimizer.param_groups for p in group["params"]]
        states = [self._read(saved, slots, *places[here]) for saved, here, slots in self._matched["parameters"]]
        settings = [
            (group, self._settings(self._groups[number]["hyper"]))
            for group, number in zip(self._optimizer.param_groups, self._matched["settings"], strict=True)
            if number >= 0
        ]
        with torch.no_grad():
            for p, own, value, frozen in states:
                self._take_state(p, own, value, frozen)
            for group, changed in settings:
                self._take_settings(group, changed)

    def _read(self, index, slots, group, p):
        """(parameter, its new state, its new value or None, whether it was frozen)."""
        parameter = self._parameters[index]
        tensors = {}
        for slot in slots:
            tensor = self._source.slot(index, slot, parameter["slots"][slot], p.device)
            if p.is_complex():
                tensor = torch.view_as_complex(tensor)
            tensors[slot] = tensor
        value = tensors.pop("value", None)
        own = {slot: _laid_out_like(p, tensor) for slot, tensor in tensors.items()}
        if own and "step" in self._optimizer._state_names(group):
            own = {"step": self._optimizer._new_step(parameter.get("step", 0.0), p, group), **own}
        return p, own, value, parameter.get("frozen", False)

    def _settings(self, saved):
        def make_tensor(numbers, dtype):
            return torch.tensor(numbers, dtype=getattr(torch, dtype))

        decoded = {key: state.decode(value, make_tensor) for key, value in saved.items() if key not in EXECUTION_FLAGS}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in decoded.items()}

    def _take_settings(self, group, changed):
        """A tensor stays the tensor it is: a captured graph or a schedule knows it."""
        for key, value in changed.items():
            now = group.get(key)
            if torch.is_tensor(now) and now.numel() == 1 and isinstance(value, (int, float, torch.Tensor)):
                now.fill_(float(value))
            else:
                group[key] = value

    def _take_state(self, p, own, value, frozen):
        if own:
            self._optimizer.state[p] = own
        else:
            self._optimizer.state.pop(p, None)
        if value is not None:
            p.copy_(value)
        if self._thaws:
            p.requires_grad_(not frozen)


def _laid_out_like(p, tensor):
    """With p's strides, as state is made, and of a dtype that p can be stepped with."""
    wide = p.dtype.itemsize == 2 and tensor.dtype == torch.float32
    dtype = tensor.dtype if wide else p.dtype
    if tensor.dtype == dtype and tensor.stride() == torch.empty_like(p, device="meta").stride():
        return tensor
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(tensor)


# ---- load_state_dict ---------------------------------------------------------------------------


def _counts_by_parameter(state_dict):
    """apex's FusedAdam counts steps by group, DeepSpeed's by group too or with integers: as torch does."""
    states, groups = dict(state_dict["state"]), []
    for group in state_dict["param_groups"]:
        count = group.get("step")
        groups.append({key: value for key, value in group.items() if key != "step"})
        for index in group["params"] if count is not None else ():
            if states.get(index) and "step" not in states[index]:
                states[index] = {**states[index], "step": torch.tensor(float(count))}
    return {**state_dict, "state": states, "param_groups": groups}


def _warn_of_other_order(optimizer, state_dict):
    """State goes by position; names that disagree with it say that it goes to the wrong parameters."""
    groups = zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
    different = [
        f"'{saved}' becomes '{here}'"
        for group, own in groups
        for saved, here in zip(group.get("param_names", ()), own.get("param_names", ()), strict=False)
        if saved != here
    ]
    if different:
        shown = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        text = (
            f"load_state_dict goes by position, and the names of parameters are others there: {shown}. "
            "load() goes by name"
        )
        warnings.warn(text, stacklevel=4)


def _keep_wide(optimizer, state_dict):
    """float32 state of 16-bit parameters as it was saved, which torch has rounded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for p, index in zip(parameters, indices, strict=True):
        if p.dtype not in (torch.bfloat16, torch.float16):
            continue
        for key, value in state_dict["state"].get(index, {}).items():
            if key != "step" and torch.is_tensor(value) and value.dtype == torch.float32:
                optimizer.state[p][key] = value.to(p.device)
