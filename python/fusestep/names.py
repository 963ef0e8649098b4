# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Parameters by module, name or pattern."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from typing import Any

import torch

from ._core import InvalidArgument
from .tables import listed

Names = dict[torch.Tensor, list[str]]


def names_of(model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None = None) -> Names:
    """Every parameter with its names: of the model if there is one, otherwise of the optimizer's groups.

    A tied parameter has several, the first of which is that of `model.named_parameters()`.
    """
    names: Names = {}
    for name, p in _pairs(model, optimizer):
        names.setdefault(p, []).append(name)
    return names


def _pairs(model, optimizer):
    if model is not None:
        yield from model.named_parameters(remove_duplicate=False)
    elif optimizer is not None:
        for group in optimizer.param_groups:
            yield from zip(group.get("param_names", ()), group["params"], strict=False)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern, with `*`, `?` and `[...]` as in file names, names a parameter or a module it is in."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(len(parts), 0, -1))


def parameters_of(what: Any, model: torch.nn.Module | None, names: Names) -> list[torch.Tensor]:
    """The parameters meant by a module, a parameter, a name or pattern, or an iterable of these; each once.

    Raises InvalidArgument for what means no parameter.
    """
    return list(dict.fromkeys(_each(what, model, names)))


def _each(what, model, names):
    if isinstance(what, torch.Tensor):
        yield what
    elif isinstance(what, torch.nn.Module):
        found = list(what.parameters())
        if not found:
            raise InvalidArgument(f"the module {type(what).__name__} has no parameters")
        yield from found
    elif isinstance(what, str):
        yield from named(what, names)
    elif isinstance(what, Iterable):
        for one in what:
            yield from _each(one, model, names)
    else:
        raise InvalidArgument(f"expected a module, a parameter, a name or a list of these, got {what!r}")


def named(pattern: str, names: Names) -> list[torch.Tensor]:
    """The parameters whose name matches; InvalidArgument, with names that are near, if there is none."""
    if not names:
        raise InvalidArgument(
            f"'{pattern}' is a name, and these parameters have none: "
            "pass model=, or make the optimizer with model.named_parameters()"
        )
    found = [p for p, own in names.items() if any(matches(name, pattern) for name in own)]
    if not found:
        raise InvalidArgument(f"'{pattern}' matches no parameter; {near(pattern, names)}")
    return found


def near(pattern: str, names: Names) -> str:
    """Names that may have been meant, as the end of a message."""
    parameters = [name for own in names.values() for name in own]
    modules = dict.fromkeys(name[:at] for name in parameters for at, c in enumerate(name) if c == ".")
    close = difflib.get_close_matches(pattern.rstrip(".*"), [*modules, *parameters], n=3)
    if close:
        return f"near are {listed(close)}"
    return f"the names are under {listed(dict.fromkeys(name.split('.')[0] for name in parameters))}"
