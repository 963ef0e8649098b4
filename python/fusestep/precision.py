# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""The options of a group that say in which dtypes its parameters keep what they have learned.

`state_dtype`, `master_weights`, `rounding` and `seed` stand in `param_groups` and `defaults` where they were
given, and nowhere else.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ._core import InvalidArgument
from .tables import shape_text

MASTER = "master_weight"
DEFAULTS = {"state_dtype": None, "master_weights": False, "rounding": "nearest", "seed": 0}

_HALVES = (torch.bfloat16, torch.float16)
# Beside their own; of other dtypes state has the parameter's.
_OTHER_STATE = {
    torch.float32: torch.bfloat16,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that say something else than the default; a seed where it is of use."""
    found = {name: value for name, value in options.items() if value != DEFAULTS[name]}
    return {name: value for name, value in options.items() if name in found or (name == "seed" and "rounding" in found)}


def state_dtype(p: torch.Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Of slots that are made."""
    return group.get("state_dtype") or p.dtype


def has_master(p: torch.Tensor, group: Mapping[str, Any]) -> bool:
    return p.dtype in _HALVES and bool(group.get("master_weights"))


def is_stochastic(group: Mapping[str, Any]) -> bool:
    return group.get("rounding") == "stochastic"


def new_master(p: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(p.detach())


def loaded_dtype(p: torch.Tensor, group: Mapping[str, Any], saved: torch.dtype) -> torch.dtype:
    """What state of this dtype becomes: float32 is never rounded, and where it is asked for all becomes float32."""
    kept = saved == torch.float32 and p.dtype in _HALVES
    return saved if kept or saved == p.dtype == torch.float32 else state_dtype(p, group)


def loadable_dtypes(p: torch.Tensor, group: Mapping[str, Any]) -> list[torch.dtype]:
    """Those that are taken without being asked to convert: what is expected first."""
    possible = [state_dtype(p, group), p.dtype, *([torch.float32] if p.dtype in _HALVES else [])]
    return list(dict.fromkeys(possible))


def effect_on(p: torch.Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """What torch's own step would not do for this parameter; None if there is nothing."""
    if has_master(p, group) or (p.dtype in _HALVES and MASTER in state):
        return "master weights"
    if is_stochastic(group) and (p.dtype in _HALVES or state_dtype(p, group) == torch.bfloat16):
        return "stochastic rounding"
    return None if state_dtype(p, group) == p.dtype else f"state of {state_dtype(p, group)}"


def has_none(group: Mapping[str, Any]) -> bool:
    return group.keys().isdisjoint(DEFAULTS)


def options_in(group: Mapping[str, Any]) -> tuple:
    """What check_group() and check_noise() look at, parameters apart."""
    names = group.get("param_names") if is_stochastic(group) else None
    return (*map(group.get, DEFAULTS), group.get("differentiable"), names)


def where(p: torch.Tensor, index: int, group: Mapping[str, Any], group_text: str) -> str:
    """A parameter, for messages: by its name, or by its place in the group."""
    names = group.get("param_names", ())
    shape = "" if torch.nn.parameter.is_lazy(p) else f" of shape {shape_text(p.shape)}"
    name = f"'{names[index]}'" if index < len(names) else f"{index}{shape}"
    return f"{group_text}, parameter {name} of {p.dtype}"


def misfit(p: torch.Tensor, state: Mapping[str, Any]) -> str | None:
    """What does not go with the parameter, of its gradient and these slots; None if nothing is known."""
    wide = [torch.float32] if p.dtype in _HALVES else []
    of_slots = [p.dtype, *filter(None, [_OTHER_STATE.get(p.dtype)])]
    permitted = {"gradient": (p.grad, [p.dtype, *wide])}
    for name, value in state.items():
        if name != "step" and value is not None:
            permitted[name] = value, [torch.float32] if name == MASTER else of_slots
    for name, (tensor, dtypes) in permitted.items():
        if not torch.is_tensor(tensor):
            return f"its {name} must be a tensor, got {tensor!r}"
        if tensor.shape != p.shape:
            return f"its {name} must be of shape {shape_text(p.shape)}, got {shape_text(tensor.shape)}"
        if tensor.dtype not in dtypes:
            return f"its {name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}"
    slots = {name: tensor.dtype for name, (tensor, _) in permitted.items() if name not in ("gradient", MASTER)}
    if len(set(slots.values())) > 1:
        return f"its state must be of one dtype, got {', '.join(f'{name} of {dtype}' for name, dtype in slots.items())}"
    return None


def check_group(group: Mapping[str, Any], group_text: str) -> None:
    """Raises InvalidArgument for options that are none, and for those its parameters cannot have."""
    options = {name: group.get(name, default) for name, default in DEFAULTS.items()}
    _check_values(options, group_text)
    stochastic, master = is_stochastic(options), bool(options["master_weights"])
    if stochastic and master:
        raise InvalidArgument(
            f"{group_text}: rounding='stochastic' is for parameters without master weights, "
            "which lose nothing to be kept"
        )
    if group.get("differentiable") and given(options):
        text = f"{group_text}: {', '.join(given(options))}: not with differentiable=True, torch's own step"
        raise InvalidArgument(text)
    for index, p in enumerate(group["params"]):
        _check_parameter(p, options, where(p, index, group, group_text))


def check_noise(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises InvalidArgument for two parameters that would be rounded by the same random bits."""
    known: dict[tuple, torch.Tensor] = {}
    for index, group in enumerate(groups):
        if not is_stochastic(group):
            continue
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False):
            if torch.bfloat16 not in (p.dtype, state_dtype(p, group)):
                continue
            if known.setdefault((group.get("seed", 0), name), p) is not p:
                raise InvalidArgument(
                    f"group {index}, parameter '{name}': another has this name and seed too, and rounding='stochastic' "
                    "draws by both: give it another name, or its group another seed"
                )


def _check_values(options, where):
    def require(name, holds, expected):
        if not holds(options[name]):
            raise InvalidArgument(f"{where}: {name} must be {expected}, got {options[name]!r}")

    is_dtype = lambda dtype: dtype is None or isinstance(dtype, torch.dtype)  # noqa: E731
    require("state_dtype", is_dtype, "None or a dtype of torch")
    require("master_weights", lambda flag: isinstance(flag, (bool, int)) and flag in (0, 1), "True or False")
    require(
        "rounding",
        lambda name: isinstance(name, str) and name in ("nearest", "stochastic"),
        "'nearest' or 'stochastic'",
    )
    is_seed = lambda seed: isinstance(seed, numbers.Integral) and 0 <= seed < 2**64  # noqa: E731
    require("seed", is_seed, "an integer from 0 to 2**64 - 1")


def _check_parameter(p, options, where):
    dtype = options["state_dtype"]
    other = _OTHER_STATE.get(p.dtype)
    if dtype not in (None, p.dtype, other):
        possible = " or ".join(map(str, filter(None, (p.dtype, other))))
        raise InvalidArgument(f"{where}: state_dtype={dtype} is not to be had, {possible} is")
    if is_stochastic(options) and p.dtype == torch.float16:
        raise InvalidArgument(f"{where}: rounding='stochastic' is for torch.bfloat16; float16 has master_weights=True")
