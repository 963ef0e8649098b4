# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What saving and loading have in common for torch's tensors and for arrays: reports, and state as JSON.

A description lists groups, each with `name`, `rule`, `hyper` and `params`; a parameter has `name`,
`dtype`, `shape`, `step`, `frozen`, and `slots` (names to dtype and shape). It is what a file says of its
tensors, see docs/files.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import _core

Rename = Mapping[str, str] | Callable[[str], str] | None


class Mismatch(NamedTuple):
    """What is saved and here, but does not fit: `what` is shape, dtype, rule or settings."""

    name: str
    what: str
    saved: str
    here: str


class HyperDifference(NamedTuple):
    """A setting that was saved with another value (as JSON; empty: not at all); taken or not."""

    group: str
    key: str
    saved: str
    here: str
    taken: bool


@dataclass(frozen=True)
class LoadReport:
    """What a load took, and what it did not. Printing it gives a table."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    hyper: list[HyperDifference] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    text: str = field(default="", repr=False)

    @property
    def complete(self) -> bool:
        """Nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        return self.text.rstrip("\n")

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> LoadReport:
        fields = {key: value for key, value in report.items() if key != "refused"}
        fields["mismatched"] = [Mismatch(**row) for row in fields["mismatched"]]
        fields["hyper"] = [HyperDifference(**row) for row in fields["hyper"]]
        fields["metadata"] = decode_metadata(fields["metadata"])
        return cls(**fields)


class LoadError(_core.InvalidArgument):
    """A strict load was refused and has changed nothing; `report` says why."""

    report: LoadReport

    def __init__(self, report: LoadReport) -> None:
        super().__init__(
            f"the state does not match this optimizer, nothing was loaded (strict=False loads what matches):\n{report}"
        )
        self.report = report


def checked(report: LoadReport, strict: bool) -> LoadReport:
    """The report, or LoadError."""
    if strict and not report.complete:
        raise LoadError(report)
    return report


# ---- metadata: strings in a file, values here --------------------------------------------------


def encode_metadata(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Strings stay as they are, unless they would be read back as something else; the rest as JSON."""
    encoded = {}
    for key, value in (metadata or {}).items():
        try:
            plain = isinstance(value, str) and decode_metadata({key: value})[key] == value
            encoded[str(key)] = value if plain else json.dumps(value)
        except (TypeError, ValueError) as error:
            raise _core.InvalidArgument(f"metadata['{key}'] cannot be written as JSON: {error}") from None
    _core.check_user_metadata(encoded)
    return encoded


def decode_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    decoded = {}
    for key, text in metadata.items():
        try:
            decoded[key] = json.loads(text)
        except ValueError:
            decoded[key] = text
    return decoded


# ---- settings as JSON --------------------------------------------------------------------------


def encode(value: Any, where: str) -> Any:
    """A setting of a group: numbers, flags, text, lists of them, small tensors."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        return [encode(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item, where) for key, item in value.items()}}
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return {"tensor": dtype_name(value), "value": encode(value.tolist(), where)}
    raise _core.InvalidArgument(f"{where} cannot be saved: a {type(value).__name__}")


def decode(value: Any, make_tensor: Callable[[Any, str], Any]) -> Any:
    """The setting that `encode` made this of. make_tensor(list of numbers, dtype name)."""
    if isinstance(value, list):
        return [decode(item, make_tensor) for item in value]
    if isinstance(value, Mapping):
        if "float" in value:
            return float(value["float"])
        if "tensor" in value:
            return make_tensor(decode(value["value"], make_tensor), value["tensor"])
        return {key: decode(item, make_tensor) for key, item in value["dict"].items()}
    return value


def dtype_name(array: Any) -> str:
    """ "float32" of tensors and arrays."""
    return str(array.dtype).removeprefix("torch.")


# ---- descriptions ------------------------------------------------------------------------------

NOT_SETTINGS = ("params", "param_names", "name", "frozen")


def describe_state_dict(state_dict: Mapping[str, Any], rule: str, names: list[str]) -> list[dict[str, Any]]:
    """The description of a state_dict of torch's structure, whose parameters have these names."""
    groups = []
    for number, group in enumerate(state_dict["param_groups"]):
        name = str(group.get("name", number))
        settings = {key: value for key, value in group.items() if key not in NOT_SETTINGS}
        groups.append(
            {
                "name": name,
                "rule": rule,
                "hyper": {key: encode(value, f"group '{name}': {key}") for key, value in settings.items()},
                "params": [
                    describe_state(names[index], state_dict["state"].get(index, {})) for index in group["params"]
                ],
            }
        )
    return groups


def describe_state(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The description of one parameter's state. dtype and shape are its first slot's, or unknown."""
    slots = {}
    for key, value in state.items():
        if key == "step" or value is None:
            continue
        if not (hasattr(value, "dtype") and hasattr(value, "shape")):
            raise _core.InvalidArgument(f"parameter '{name}': state '{key}' cannot be saved: a {type(value).__name__}")
        slots[key] = describe_tensor(value)
    first = next(iter(slots.values()), {"dtype": "", "shape": []})
    step = state.get("step")
    return {"name": name, **first, **({} if step is None else {"step": float(step)}), "slots": slots}


def describe_tensor(tensor: Any) -> dict[str, Any]:
    """A slot; a complex one as pairs of reals."""
    dtype, shape = dtype_name(tensor), list(tensor.shape)
    if dtype.startswith("complex"):
        return {"dtype": f"float{int(dtype[7:]) // 2}", "shape": [*shape, 2]}
    return {"dtype": dtype, "shape": shape}


def parameters_of(description: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All parameters, group after group."""
    return [parameter for group in description for parameter in group["params"]]


def fill_unknown(saved: list[dict[str, Any]], known: Mapping[str, Mapping[str, Any]]) -> None:
    """A parameter without slots in a state_dict is taken to have the dtype and shape it has here."""
    for parameter in parameters_of(saved):
        if parameter["dtype"]:
            continue
        here = known.get(parameter["name"], {"dtype": "unknown", "shape": []})
        parameter["dtype"], parameter["shape"] = here["dtype"], here["shape"]


def rename_all(description: list[dict[str, Any]], rename: Rename) -> None:
    """Gives saved parameters the names they have here."""
    if rename is None:
        return
    new_name = renaming(rename)
    names: dict[str, str] = {}
    for parameter in parameters_of(description):
        old = parameter["name"]
        parameter["name"] = new_name(old)
        if names.setdefault(parameter["name"], old) != old:
            raise _core.InvalidArgument(
                f"rename: '{names[parameter['name']]}' and '{old}' both become '{parameter['name']}'"
            )


def renaming(rename: Mapping[str, str] | Callable[[str], str]) -> Callable[[str], str]:
    """A function of what is a dict or one already."""
    return (lambda name: rename.get(name, name)) if isinstance(rename, Mapping) else rename
