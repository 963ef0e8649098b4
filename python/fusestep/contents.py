# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What a file or a state_dict holds, without an optimizer to load it into.

torch is needed for files of torch.save and for tensors' values, not to see what a safetensors file has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import _core, state
from .tables import Part, Printed, count_text, listed, settings_text, shape_text, size_text, value_text

RULES = ("Adam", "AdamW", "SGD", "RMSprop")

_TORCH_FILES = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # zip, and what torch wrote before
_LARGEST_HEADER = 100_000_000  # bytes, as of the safetensors library


class Contents(Printed):
    """Groups, parameters and metadata of an optimizer's state. `print` shows them as tables.

    Attributes:
        label: the file's name, or "state_dict"; with the key in a checkpoint.
        kind: "fusestep" for its files, "safetensors" for such files of others, "torch" otherwise.
        description: groups with their parameters, see state.py.
        metadata: the user's own.
        parameters: those of all groups.
    """

    def __init__(self, label: str, kind: str, description: state.Description, metadata: Mapping[str, str]) -> None:
        self.label, self.kind, self.description = label, kind, description
        self.metadata = state.decode_metadata(metadata)
        self.parameters = state.parameters_of(description)
        self._source: Any = None

    @property
    def rules(self) -> list[str]:
        """The rules of the groups, each once; "" for what is not known."""
        return list(dict.fromkeys(group["rule"] for group in self.description))

    @property
    def has_settings(self) -> bool:
        return all(group["rule"] or group["hyper"] for group in self.description)

    @property
    def has_names(self) -> bool:
        """Otherwise parameters are numbered."""
        return not all(parameter["name"].isdecimal() for parameter in self.parameters)

    def name(self, names: Sequence[str]) -> None:
        """Gives parameters that are numbered names, in the order the optimizer had them."""
        if self.has_names:
            raise _core.InvalidArgument(f"{self.label}: its parameters have names already")
        if self.kind != "safetensors" and len(names) != len(self.parameters):
            raise _core.InvalidArgument(
                f"{self.label}: there are {len(names)} names for {count_text(len(self.parameters), 'parameter')}"
            )
        state.name_all(self.description, names)

    def tensor(self, index: int, slot: str) -> Any:
        """A slot of the parameter at this position, as a torch tensor on the CPU; complex ones as pairs."""
        import torch

        return self._source.slot(index, slot, self.parameters[index]["slots"][slot], torch.device("cpu"))

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it. Slots have dtype, shape and bytes."""
        return {
            "file": self.label,
            "kind": self.kind,
            "metadata": self.metadata,
            "groups": [_group_as_dict(group) for group in self.description],
        }

    def _parts(self) -> Iterator[Part]:
        yield Part("title", self._title())
        if self.metadata:
            yield Part("text", f"Metadata: {settings_text(self.metadata)}")
        for group in self.description:
            name = "" if len(self.description) == 1 and not group["hyper"] else f"Group {group['name']}: "
            yield Part("text", f"{name}{_settings(group) or 'no settings'}")
        if self.parameters:
            yield Part("table", self._table())
        slots: dict[str, int] = {}
        for parameter in self.parameters:
            for slot, described in parameter["slots"].items():
                slots[slot] = slots.get(slot, 0) + _bytes(described)
        if slots:
            yield Part("text", f"\nState: {', '.join(f'{slot} {size_text(size)}' for slot, size in slots.items())}")

    def _title(self):
        kinds = {"fusestep": "", "safetensors": "safetensors, ", "torch": "torch, "}
        rules = " and ".join(rule or "unknown rule" for rule in self.rules) if self.has_settings else "no settings"
        counts = [count_text(len(self.parameters), "parameter"), count_text(len(self.description), "group")]
        size = sum(map(_state_bytes, self.parameters))
        return f"{self.label}: {kinds[self.kind]}{rules}, {', '.join(counts)}, state {size_text(size)}"

    def _table(self):
        grouped = [(group["name"], parameter) for group in self.description for parameter in group["params"]]
        table = {"group": [name for name, _ in grouped]} if len(self.description) > 1 else {}
        table["name"] = [parameter["name"] for parameter in self.parameters]
        table["shape"] = [shape_text(p["shape"]) if p["dtype"] else "-" for p in self.parameters]
        table["dtype"] = [p["dtype"] or "-" for p in self.parameters]
        table["step"] = [_step(parameter) for parameter in self.parameters]
        if any("frozen" in parameter for parameter in self.parameters):
            table["condition"] = ["frozen" if parameter.get("frozen") else "thawed" for parameter in self.parameters]
        table["state"] = [size_text(_state_bytes(parameter)) for parameter in self.parameters]
        return table


class Tensors(Printed):
    """A safetensors file that is not of an optimizer: weights, as a rule."""

    def __init__(self, label: str, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        self.label, self.metadata = label, state.decode_metadata(metadata)
        self.tensors = [
            {"name": name, "dtype": found["dtype"], "shape": found["shape"], "bytes": _span(found)}
            for name, found in tensors.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.label, "kind": "tensors", "metadata": self.metadata, "tensors": self.tensors}

    def _parts(self) -> Iterator[Part]:
        size = size_text(sum(tensor["bytes"] for tensor in self.tensors))
        yield Part("title", f"{self.label}: {count_text(len(self.tensors), 'tensor')}, {size}, no optimizer's state")
        if self.metadata:
            yield Part("text", f"Metadata: {settings_text(self.metadata)}")
        table = {key: [str(tensor[key]) for tensor in self.tensors] for key in ("name", "dtype")}
        table["shape"] = [shape_text(tensor["shape"]) for tensor in self.tensors]
        table["size"] = [size_text(tensor["bytes"]) for tensor in self.tensors]
        if self.tensors:
            yield Part("table", table)


def contents(source: Any, key: str | None = None) -> Contents:
    """What a source holds.

    Args:
        source: a safetensors file, a file of torch.save, a state_dict, or what has one.
        key: where in a checkpoint the optimizer's state_dict is, such as `"optimizer"` or
            `"optimizers.0"`. Not needed if there is one only.

    Raises FileError for what cannot be read, InvalidArgument for what does not fit.
    """
    if hasattr(source, "state_dict"):
        source = source.state_dict()
    if isinstance(source, Mapping):
        return _of_torch("state_dict", source, key)
    path = state.path_of(source, "a file's path or a state_dict")
    if is_torch_file(path):
        return _of_torch(path, _torch_load(path), key)
    if key is not None:
        raise _core.InvalidArgument(f"{path}: a safetensors file has no keys")
    return _of_file(path)


def inspect(path: str, key: str | None = None) -> Contents | Tensors:
    """What a file holds; of a safetensors file that is not of an optimizer, its tensors."""
    tensors = None if is_torch_file(path) else _tensors_of_others(path)
    if tensors is None:
        return contents(path, key)
    metadata = tensors.pop("__metadata__", {})
    return Tensors(path, tensors, metadata)


def is_torch_file(path: str) -> bool:
    """Whether torch.save wrote it, by its first bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in _TORCH_FILES
    except OSError:
        return False  # the reader says what is wrong


# ---- safetensors -------------------------------------------------------------------------------


def _of_file(path):
    reader = _core.StateFileReader(path)
    description = json.loads(reader.description)
    kind = "fusestep" if all(group["rule"] for group in description) else "safetensors"
    made = Contents(path, kind, description, reader.metadata)
    made._source = _Lazy(path)
    return made


class _Lazy:
    """Opens the file for its tensors, which takes torch, when the first is asked for."""

    def __init__(self, path):
        self._path, self._source = path, None

    def slot(self, *arguments):
        if self._source is None:
            from .sources import FileSource

            self._source = FileSource(self._path, None)
        return self._source.slot(*arguments)


def _tensors_of_others(path):
    """The header of a safetensors file in which no tensor is `<parameter>/<slot>`; None for any other file."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _LARGEST_HEADER else None
        if not isinstance(header, dict) or "fusestep.version" in header.get("__metadata__", {}):
            return None
        names = [name for name in header if name != "__metadata__"]
        return None if any("/" in name for name in names) else header
    except (OSError, ValueError, RecursionError):
        return None


# ---- torch -------------------------------------------------------------------------------------


def _torch_load(path):
    try:
        import torch
    except ImportError:
        raise _core.FileError(f"{path}: a file of torch.save, which needs torch to be read") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise _core.FileError(f"{path}: torch cannot load it: {_first_sentence(error)}") from None


def _first_sentence(error):
    text = str(error).strip() or type(error).__name__
    if "weights_only" in text and "Unsupported global: GLOBAL" in text:
        found = text.split("Unsupported global: GLOBAL", 1)[1].split()[0]
        return f"it holds objects of other classes ({found}), and loading those can run any code"
    return text.splitlines()[0].split(". ")[0].rstrip(".")


def _of_torch(label, checkpoint, key):
    found = dict(_state_dicts_in(checkpoint))
    if key is not None and key not in found:
        what = f"there are {listed(map(_quoted, found))}" if any(found) else "there is none in it"
        raise _core.InvalidArgument(f"{label}: no optimizer's state_dict at key '{key}': {what}")
    if not found:
        what = listed(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise _core.FileError(f"{label}: has no optimizer's state_dict; it holds {what or 'nothing'}")
    if key is None and len(found) > 1:
        raise _core.InvalidArgument(f"{label}: has several optimizers' state_dicts, choose a key: {listed(found)}")
    key = next(iter(found)) if key is None else key
    return _of_state_dict(f"{label}, key '{key}'" if key else label, found[key])


def _quoted(key):
    return f"'{key}'" if key else "the checkpoint itself"


def _state_dicts_in(value, key=""):
    """(key, state_dict) of every optimizer in a checkpoint."""
    if isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys():
        yield key, value
        return
    inside = value.items() if isinstance(value, Mapping) else enumerate(value if isinstance(value, list) else ())
    for name, one in inside:
        if isinstance(one, (Mapping, list)):
            yield from _state_dicts_in(one, f"{key}.{name}" if key else str(name))


def _of_state_dict(label, state_dict):
    from .sources import DictSource

    source = DictSource(state_dict, "", None)
    for group in source.description:
        group["rule"] = rule_of(group)
    made = Contents(label, "torch", source.description, {})
    made._source = source
    return made


# Which settings and slots are whose. Others of torch's optimizers share some of them, but not all.
_SIGNS = {
    "Adam": ({"betas", "eps"}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "SGD": ({"momentum", "dampening", "nesterov"}, {"momentum_buffer"}),
    "RMSprop": ({"alpha", "centered"}, {"square_avg", "momentum_buffer", "grad_avg"}),
}
_OF_OTHERS = {"momentum_decay", "lambd", "rho", "etas"}


def rule_of(group: Mapping[str, Any]) -> str:
    """The rule of a group of a state_dict, by its settings; "" if it is none of ours."""
    settings, slots = group["hyper"], {slot for p in group["params"] for slot in p["slots"]}
    for rule, (wanted, possible) in _SIGNS.items():
        if wanted <= settings.keys() and slots <= possible and not _OF_OTHERS & settings.keys():
            if rule == "Adam" and not {"amsgrad", "bias_correction"} & settings.keys():
                return ""  # RAdam
            return "AdamW" if rule == "Adam" and settings.get("decoupled_weight_decay") else rule
    return ""


# ---- texts -------------------------------------------------------------------------------------


def _settings(group):
    shown = {key: _plain(value) for key, value in group["hyper"].items()}
    first = {key: shown.pop(key) for key in ("lr", "weight_decay") if key in shown}
    return settings_text({**first, **shown})


def _plain(value):
    """A setting as JSON, as people write it."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return _plain(value.get("float", value.get("value", value.get("dict"))))
    return value


def setting_text(value: Any) -> str:
    """A setting, as a file has it."""
    return "-" if value is None else value_text(_plain(value))


def _step(parameter):
    step = _plain(parameter.get("step"))
    return "-" if step is None else f"{float(step):g}" if float(step) < 1e6 else f"{float(step):.0f}"


def _bytes(described):
    return math.prod(described["shape"]) * _item_size(described["dtype"])


def _item_size(dtype):
    """Those of safetensors that torch's names do not have are of one byte."""
    digits = dtype[len(dtype.rstrip("0123456789")) :]
    return int(digits) // 8 if digits in ("16", "32", "64") else 1


def _span(found):
    first, last = found.get("data_offsets", (0, 0))
    return last - first


def _state_bytes(parameter):
    return sum(map(_bytes, parameter["slots"].values()))


def _group_as_dict(group):
    parameters = [
        {**p, "slots": {slot: {**described, "bytes": _bytes(described)} for slot, described in p["slots"].items()}}
        for p in group["params"]
    ]
    return {**group, "params": parameters}
