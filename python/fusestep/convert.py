# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Between files of torch.save and files of fusestep."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from . import _core, state
from .contents import RULES, Contents, contents, is_torch_file
from .sources import dtype_named, made_tensor, pieces_of


def convert(
    source: str, target: str, key: str | None = None, names: Sequence[str] | None = None, rule: str | None = None
) -> dict[str, Any]:
    """Writes a torch checkpoint's optimizer as a file of fusestep, or such a file as a checkpoint.

    Args:
        source: either. What it is shows in its first bytes.
        target: the other, by its ending: `.safetensors` or anything else. It appears whole or not at all.
        key: where in the checkpoint the optimizer's state_dict is, if there are several.
        names: of the parameters, if they have none.
        rule: one of RULES, if the settings do not tell.

    Returns what was written, as JSON can hold it; `notes` are sentences about what was not.

    Raises FileError for what cannot be read or written, InvalidArgument for what does not fit.
    """
    to_file = target.endswith(".safetensors")
    if is_torch_file(source) != to_file:
        is_, other = ("torch's", ".safetensors") if not to_file else ("a safetensors file", "another, such as .pt")
        raise _core.InvalidArgument(f"{source} is {is_}: the target's ending must be {other}")
    held = contents(source, key)
    if names is not None:
        held.name(names)
    for group in held.description:
        group["rule"] = rule or group["rule"]
        if not group["rule"]:
            raise _core.InvalidArgument(_unknown_rule(held, group))
    notes = list(_notes(held, to_file))
    _write_file(held, target) if to_file else _write_checkpoint(held, target)
    return {
        "source": held.label,
        "target": target,
        "rule": " and ".join(held.rules),
        "parameters": len(held.parameters),
        "groups": len(held.description),
        "notes": notes,
    }


def _unknown_rule(held, group):
    if not group["hyper"]:
        return f"{held.label}: has no settings, which a torch checkpoint needs"
    return f"{held.label}: it does not show which rule group '{group['name']}' is of; one of {', '.join(RULES)}?"


def _notes(held, to_file):
    if not held.has_names and held.parameters:
        yield "the parameters have no names and are numbered"
    if to_file:
        return
    if any("value" in parameter["slots"] for parameter in held.parameters):
        yield "the parameters' values were left out"
    if any(parameter.get("frozen") for parameter in held.parameters):
        yield "which parameters were frozen was left out"
    if held.metadata:
        yield f"the metadata were left out: {', '.join(held.metadata)}"


# ---- to safetensors ----------------------------------------------------------------------------


def _write_file(held: Contents, target):
    state.fill_unknown(held.description, {})
    file = _core.StateFileWriter(target, json.dumps(held.description), {})
    try:
        for index, parameter in enumerate(held.parameters):
            for slot in parameter["slots"]:
                for address, size in pieces_of(held.tensor(index, slot)):
                    file.write(index, slot, address, size)
        file.commit()
    finally:
        del file  # an exception keeps this frame, and must not keep what was written


# ---- to torch ----------------------------------------------------------------------------------


def _write_checkpoint(held: Contents, target):
    state_dict = _state_dict(held)
    path = pathlib.Path(target)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                torch.save(state_dict, file)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise _core.FileError(f"{target}: {error.strerror or error}") from None


def _state_dict(held):
    states, groups, index = {}, [], 0
    for group in held.description:
        indices = list(range(index, index + len(group["params"])))
        for parameter in group["params"]:
            own = _state_of(held, index, parameter, group)
            if own:
                states[index] = own
            index += 1
        named = {"param_names": [parameter["name"] for parameter in group["params"]]} if held.has_names else {}
        groups.append({**_settings_of(group), **named, "params": indices})
    return {"state": states, "param_groups": groups}


def _settings_of(group):
    """With what torch's class adds, in its order."""
    where = f"group '{group['name']}'"
    saved = {key: state.decode(value, f"{where}: {key}", made_tensor) for key, value in group["hyper"].items()}
    if isinstance(saved.get("state_dtype"), str):
        saved["state_dtype"] = dtype_named(saved["state_dtype"])
    defaults = getattr(torch.optim, group["rule"])([torch.zeros((), device="cpu")]).defaults
    named = {} if group["name"].isdecimal() else {"name": group["name"]}
    return {**defaults, **saved, **named}


def _state_of(held, index, parameter, group):
    tensors = {slot: held.tensor(index, slot) for slot in parameter["slots"] if slot != "value"}
    if parameter["dtype"].startswith("complex"):
        tensors = {slot: torch.view_as_complex(tensor) for slot, tensor in tensors.items()}
    stochastic = group["hyper"].get("rounding") == "stochastic"
    if not stochastic and (group["rule"] == "SGD" or not tensors):
        return tensors
    step = state.decode(parameter.get("step", 0.0), "step", made_tensor)
    return {"step": torch.tensor(float(step), device="cpu"), **tensors}
