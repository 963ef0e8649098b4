# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Parameter groups from patterns of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ._core import InvalidArgument
from .names import listed, matches, named, names_of


def param_groups_by(
    model: torch.nn.Module, patterns: Mapping[str, Mapping[str, Any]], no_decay: str | Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Groups for an optimizer, with names, from patterns of parameter names.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> groups = param_groups_by(model, {"1.*": dict(lr=1e-3), "*": dict(lr=1e-5)}, no_decay="*.bias")
    >>> [(group["lr"], [name for name, p in group["params"]]) for group in groups]
    [(0.001, ['1.weight']), (0.001, ['1.bias']), (1e-05, ['0.weight']), (1e-05, ['0.bias'])]

    Args:
        model: whose parameters are meant; all of them, those that are frozen too. A tied parameter
            appears once, under its first name.
        patterns: from pattern to settings of the group. Each parameter must match exactly one, in
            whatever order they stand; only a last `"*"` takes what the others leave.
        no_decay: patterns of parameters that form a group with `weight_decay=0` of their own, beside the
            others of their pattern.

    Returns one or two groups for each pattern, in their order, parameters in the model's.

    Raises InvalidArgument for parameters that match no pattern or several, and for patterns that match
    no parameter.
    """
    names = {p: own[:1] for p, own in names_of(model).items()}
    undecayed = {p for pattern in _several(no_decay) for p in _matching(pattern, names, model)}
    groups = []
    for pattern, members in _assigned(model, names, patterns).items():
        settings = dict(patterns[pattern])
        if "params" in settings:
            raise InvalidArgument(f"the settings of '{pattern}' have 'params', which the pattern is for")
        for further in ({}, {"weight_decay": 0.0}):
            pairs = [(names[p][0], p) for p in members if (p in undecayed) == bool(further)]
            if pairs:
                groups.append({"params": pairs, **settings, **further})
    return groups


def _assigned(model, names, patterns):
    """Pattern to its parameters."""
    *first, last = patterns or [None]
    if last is None:
        raise InvalidArgument("there are no patterns")
    if "*" in first:
        raise InvalidArgument("the pattern '*' takes what the others leave: it must be the last")
    specific = [*first] if last == "*" else [*first, last]
    assigned = {pattern: _matching(pattern, names, model) for pattern in specific}
    _refuse_double(assigned, names)
    taken = {p for members in assigned.values() for p in members}
    rest = [p for p in names if p not in taken]
    if last == "*":
        if not rest:
            raise InvalidArgument("the pattern '*' matches no parameter that the others leave")
        assigned["*"] = rest
    elif rest:
        raise InvalidArgument(
            f"no pattern matches {listed(names[p][0] for p in rest)}; a last pattern '*' would take them"
        )
    return assigned


def _matching(pattern, names, model):
    """Those of the pattern; says so if it is another name of a tied parameter that matches."""
    if not any(matches(own[0], pattern) for own in names.values()):
        for first, *others in names_of(model).values():
            for other in others:
                if matches(other, pattern):
                    raise InvalidArgument(f"'{pattern}' matches no parameter; {other} is tied to {first}")
    return named(pattern, names)


def _refuse_double(assigned, names):
    owner = {}
    for pattern, members in assigned.items():
        for p in members:
            if p in owner:
                raise InvalidArgument(f"{names[p][0]} matches both '{owner[p]}' and '{pattern}'")
            owner[p] = pattern


def _several(patterns):
    return [patterns] if isinstance(patterns, str) else list(patterns)
