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
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import _core

Rename = Mapping[str, str] | Callable[[str], str] | None
Path = str | os.PathLike[str]
Description = list[dict[str, Any]]


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
    """What a load took, and what it did not. Printing it gives a table.

    `left_out` are slots of the user's own that this optimizer cannot hold; they hinder no load.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
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

    def __reduce__(self):
        return LoadError, (self.report,)


LoadError.__module__ = "fusestep"


def checked(report: LoadReport, strict: bool) -> LoadReport:
    """The report, or LoadError."""
    if strict and not report.complete:
        raise LoadError(report)
    return report


# ---- arguments ---------------------------------------------------------------------------------


def path_of(path: Any, what: str) -> str:
    """The path as text; `what` is what else was possible."""
    try:
        text = os.fsdecode(path)
        possible = b"\0" not in os.fsencode(text)
    except TypeError:
        raise _core.InvalidArgument(f"expected {what}, got {type(path).__name__}") from None
    except UnicodeError:
        possible = False
    if not possible:
        raise _core.InvalidArgument(f"no file can be named {path!r}")
    return text


def check_what(what: Any) -> None:
    if what not in ("all", "state", "hyper"):
        raise _core.InvalidArgument(f"what must be 'all', 'state' or 'hyper', got {what!r}")


def list_of_names(given: Any, what: str) -> list[str]:
    """Names of a list of names, or of pairs as `named_parameters()` has them."""
    try:
        names = [one if isinstance(one, str) else one[0] for one in given]
    except (TypeError, LookupError):
        names = [None]
    if isinstance(given, str) or not all(isinstance(name, str) for name in names):
        raise _core.InvalidArgument(f"{what}: expected names of parameters or named_parameters()")
    return names


def renaming(rename: Rename) -> Callable[[str], str] | None:
    """A function of what is a dict or one already."""
    if rename is None:
        return None
    if not isinstance(rename, Mapping) and not callable(rename):
        raise _core.InvalidArgument(f"rename: expected a dict or a function, got {type(rename).__name__}")

    def new_name(name):
        new = rename.get(name, name) if isinstance(rename, Mapping) else rename(name)
        if not isinstance(new, str):
            raise _core.InvalidArgument(f"rename: '{name}' becomes {new!r}, expected a name")
        return new

    return new_name


# ---- metadata: strings in a file, values here --------------------------------------------------


def encode_metadata(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Strings stay as they are, unless they would be read back as something else; the rest as JSON."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise _core.InvalidArgument(f"metadata: expected a dict, got {type(metadata).__name__}")
    encoded = {}
    for key, value in (metadata or {}).items():
        if not isinstance(key, str):
            raise _core.InvalidArgument(f"metadata: keys must be strings, got {key!r}")
        try:
            plain = isinstance(value, str) and decode_metadata({key: value})[key] == value
            encoded[key] = value if plain else json.dumps(value)
            (key + encoded[key]).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise _core.InvalidArgument(f"metadata['{key}'] cannot be written as JSON: {error}") from None
    _core.check_user_metadata(encoded)
    return encoded


def decode_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    decoded = {}
    for key, text in metadata.items():
        try:
            decoded[key] = json.loads(text)
        except (ValueError, RecursionError):
            decoded[key] = text
    return decoded


# ---- settings as JSON --------------------------------------------------------------------------

NOT_SETTINGS = ("params", "param_names", "name")
FLAGS = ("amsgrad", "centered", "decoupled_weight_decay", "maximize", "nesterov")


def encode_settings(group: Mapping[str, Any], where: str, pass_over: bool = False) -> dict[str, Any]:
    """The settings of a group. What cannot be JSON is refused, or passed over."""
    encoded = {}
    for key, value in group.items():
        if key in NOT_SETTINGS:
            continue
        try:
            # torch takes 0 and 1 too.
            encoded[key] = bool(value) if key in FLAGS else encode(value, f"{where}: {key}")
        except _core.InvalidArgument:
            if not pass_over:
                raise
    return encoded


def encode(value: Any, where: str) -> Any:
    """A setting of a group: numbers, flags, text, lists of them, small tensors."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if type(value).__name__ == "dtype" and type(value).__module__ == "torch":
        return name_of_dtype(value)
    if isinstance(value, numbers.Real):
        value = float(value)
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        return [encode(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item, where) for key, item in value.items()}}
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return {"tensor": dtype_name(value), "value": encode(value.tolist(), where)}
    raise _core.InvalidArgument(f"{where} is a {type(value).__name__}, which is not saved or loaded")


def decode(value: Any, where: str, make_tensor: Callable[[Any, str], Any]) -> Any:
    """The setting that `encode` made this of. make_tensor(list of numbers, dtype name)."""
    if isinstance(value, list):
        return tuple(decode(item, where, make_tensor) for item in value)
    if not isinstance(value, Mapping):
        return value
    try:
        if "float" in value:
            return float(value["float"])
        if "tensor" in value:
            return make_tensor(decode(value["value"], where, make_tensor), value["tensor"])
        return {key: decode(item, where, make_tensor) for key, item in value["dict"].items()}
    except (AttributeError, LookupError, TypeError, ValueError):
        raise _core.InvalidArgument(f"{where} is {json.dumps(value)}, which means nothing") from None


def dtype_name(array: Any) -> str:
    """ "float32" of tensors and arrays."""
    return name_of_dtype(array.dtype)


def name_of_dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# ---- slots -------------------------------------------------------------------------------------

# Of all variants of a rule, in the order in which steps make them. Others are the user's own.
SLOTS = {
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "SGD": ("momentum_buffer",),
    "RMSprop": ("square_avg", "momentum_buffer", "grad_avg"),
}


# ---- state_dicts -------------------------------------------------------------------------------


def check_state_dict(state_dict: Any) -> None:
    """Raises InvalidArgument for what has not the structure of a state_dict."""

    def require(holds, text):
        if not holds:
            raise _core.InvalidArgument(f"state_dict: {text}")

    for key in ("param_groups", "state"):
        require(key in state_dict, f"has no '{key}'")
    groups, states = state_dict["param_groups"], state_dict["state"]
    require(isinstance(groups, (list, tuple)), "param_groups must be a list")
    require(isinstance(states, Mapping), "state must be a dict")
    for number, group in enumerate(groups):
        require(isinstance(group, Mapping), f"param_groups[{number}] must be a dict")
        indices, names = group.get("params"), group.get("param_names")
        require(isinstance(indices, (list, tuple)), f"param_groups[{number}]['params'] must be a list")
        require(
            names is None or (isinstance(names, (list, tuple)) and len(names) == len(indices)),
            f"param_groups[{number}]['param_names'] must be a list of {len(indices)} names",
        )
        for index in indices:
            require(isinstance(index, (int, str)), f"param_groups[{number}]['params'] has {index!r}")
            require(isinstance(states.get(index, {}), Mapping), f"state[{index!r}] must be a dict")


def counts_by_parameter(state_dict: Mapping[str, Any], make_count: Callable[[Any], Any]) -> Mapping[str, Any]:
    """Where groups count steps, as apex's FusedAdam and DeepSpeed's do: the same with counts as torch has them."""
    states, groups = dict(state_dict["state"]), []
    for group in state_dict["param_groups"]:
        uncounted = [i for i in group["params"] if states.get(i) and "step" not in states[i]]
        if "step" in group and uncounted and "exp_avg" in states[uncounted[0]]:
            states.update({i: {"step": make_count(group["step"]), **states[i]} for i in uncounted})
            group = {key: value for key, value in group.items() if key != "step"}
        groups.append(group)
    return {**state_dict, "state": states, "param_groups": groups}


def indices_of(state_dict: Mapping[str, Any]) -> list[int | str]:
    """Of all parameters, group after group."""
    return [index for group in state_dict["param_groups"] for index in group["params"]]


def names_in(state_dict: Mapping[str, Any], saved_names: Any = None) -> list[str]:
    """Of all parameters, group after group: as given, or of the dict itself; numbers if there are none."""
    groups, indices = state_dict["param_groups"], indices_of(state_dict)
    if saved_names is not None:
        names = list_of_names(saved_names, "saved_names")
        if len(names) != len(indices):
            raise _core.InvalidArgument(f"saved_names: there are {len(names)} for {len(indices)} parameters")
        return names
    if all("param_names" in group for group in groups):
        return [str(name) for group in groups for name in group["param_names"]]
    return [index if isinstance(index, str) else str(number) for number, index in enumerate(indices)]


# ---- descriptions ------------------------------------------------------------------------------


def as_json(description: Description) -> str:
    """For C++, and for files."""
    try:
        json.dumps(description, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise _core.InvalidArgument(f"names and settings must be text that UTF-8 can have: {error}") from None
    return json.dumps(description)


def describe_state_dict(state_dict: Mapping[str, Any], rule: str, names: list[str]) -> Description:
    """The description of a state_dict of torch's structure, whose parameters have these names."""
    groups, name_of_next = [], iter(names)
    for number, group in enumerate(state_dict["param_groups"]):
        name = str(group.get("name", number))
        states = [state_dict["state"].get(index, {}) for index in group["params"]]
        groups.append(
            {
                "name": name,
                "rule": rule,
                "hyper": encode_settings(group, f"group '{name}'"),
                "params": [describe_state(next(name_of_next), own, SLOTS.get(rule)) for own in states],
            }
        )
    return groups


def describe_state(name: str, state: Mapping[str, Any], of_rule: Iterable[str] | None = None) -> dict[str, Any]:
    """The description of one parameter's state.

    dtype and shape are those of the first slot of the rule (None: whatever it is), or unknown.
    """
    slots, complex_slots, first = {}, [], None
    for key, value in state.items():
        if key == "step" or value is None:
            continue
        if not (hasattr(value, "dtype") and hasattr(value, "shape")):
            kind = type(value).__name__
            raise _core.InvalidArgument(f"parameter '{name}', '{key}' is a {kind}, which is not saved or loaded")
        if key == "value":
            raise _core.InvalidArgument(f"parameter '{name}' has state named 'value', as files name its own value")
        first = value if first is None and (of_rule is None or key in of_rule) else first
        slots[key] = describe_tensor(value)
        if dtype_name(value).startswith("complex"):
            complex_slots.append(key)
    marked = {"complex_slots": complex_slots} if complex_slots else {}
    value = {"dtype": "", "shape": []} if first is None else {"dtype": dtype_name(first), "shape": list(first.shape)}
    return {"name": name, **value, **describe_count(name, state.get("step")), "slots": slots, **marked}


def describe_count(name: str, step: Any) -> dict[str, Any]:
    """`step`, if there is one: a number, or a tensor of one."""
    if step is None:
        return {}
    try:
        return {"step": encode(float(step), "")}
    except (TypeError, ValueError, RuntimeError):
        raise _core.InvalidArgument(f"parameter '{name}': 'step' must be a number, got {step!r}") from None


def describe_tensor(tensor: Any) -> dict[str, Any]:
    """A slot; a complex one as pairs of reals."""
    dtype, shape = dtype_name(tensor), list(tensor.shape)
    if dtype.startswith("complex"):
        return {"dtype": f"float{int(dtype[7:]) // 2}", "shape": [*shape, 2]}
    return {"dtype": dtype, "shape": shape}


def parameters_of(description: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All parameters, group after group."""
    return [parameter for group in description for parameter in group["params"]]


def fill_unknown(saved: Description, here: Mapping[str, Mapping[str, Any]]) -> None:
    """Where only slots tell of a parameter, or nothing: it is taken to be what it is here, if they allow it."""
    for parameter in parameters_of(saved):
        known = here.get(parameter["name"], {"dtype": "float32", "shape": []})
        if not parameter["dtype"]:
            parameter["dtype"], parameter["shape"] = known["dtype"], known["shape"]
        elif parameter["shape"] == known.get("slot_shape"):
            parameter["shape"] = known["shape"]  # a complex one


def rename_all(description: Description, rename: Rename) -> None:
    """Gives saved parameters the names they have here."""
    new_name = renaming(rename)
    if new_name is None:
        return
    old_names: dict[str, str] = {}
    for parameter in parameters_of(description):
        old, new = parameter["name"], new_name(parameter["name"])
        if new in old_names:
            raise _core.InvalidArgument(f"rename: '{old_names[new]}' and '{old}' both become '{new}'")
        old_names[new], parameter["name"] = old, new


def name_all(description: Description, saved_names: Any) -> None:
    """Gives the parameters of a file names in the order the optimizer had them.

    A file of another program has no order; its parameters can only be numbers.
    """
    names, parameters = list_of_names(saved_names, "saved_names"), parameters_of(description)
    if all(group["rule"] for group in description):
        positions = list(range(len(parameters)))
        enough = len(names) == len(parameters)
    elif _are_numbers(parameters):
        positions = [int(parameter["name"]) for parameter in parameters]
        enough = max(positions) < len(names)
    else:
        raise _core.InvalidArgument("saved_names: the file has names of its own; rename= gives others")
    if not enough:
        raise _core.InvalidArgument(f"saved_names: there are {len(names)} for {len(parameters)} parameters")
    for position, parameter in zip(positions, parameters, strict=True):
        parameter["name"] = names[position]


def check_named_alike(saved: Description, here: Description, here_is_named: bool) -> None:
    """Raises InvalidArgument where numbers would be taken for names, or for positions in other groups."""
    sides = [parameters_of(saved), parameters_of(here)]
    if not all(sides):
        return
    saved_is_numbered, here_is_numbered = map(_are_numbers, sides)
    if saved_is_numbered and not here_is_numbered:
        raise _core.InvalidArgument(
            "the source has no names of parameters: give saved_names=, the named_parameters() the saved "
            "optimizer was made of, or load by position with load_state_dict"
        )
    if here_is_named:
        return
    if not saved_is_numbered:
        raise _core.InvalidArgument(
            "this optimizer does not know its parameters' names: give names=model, or make it of "
            "model.named_parameters()"
        )
    sizes = [[len(group["params"]) for group in side] for side in (saved, here)]
    if sizes[0] != sizes[1] and all(group["rule"] for group in saved):
        raise _core.InvalidArgument(
            "neither the source nor this optimizer has names of parameters, and their groups have other sizes: "
            f"{sizes[0]} saved, {sizes[1]} here; give names= and saved_names="
        )


def _are_numbers(parameters):
    return all(parameter["name"].isdecimal() for parameter in parameters)
