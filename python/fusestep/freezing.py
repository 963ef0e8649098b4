# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Freezing and thawing parameters under an optimizer that goes on.

`what` is a module, a parameter, a name such as `"layer4.0.conv1.weight"` or `"layer4"`, a pattern such as
`"layer4.*"`, or an iterable of these. Names are those of the model given, otherwise those of the
optimizer's groups, which have some if it was made with `model.named_parameters()`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import precision
from ._core import InvalidArgument
from .inference import is_read_only
from .names import Names, listed, names_of, parameters_of

# What schedulers keep for each group, in its order.
_RATES = ("base_lrs", "_last_lr")
_PER_GROUP = (*_RATES, "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


_followers: list[Callable[[list[torch.Tensor]], None]] = []


def on_change(follower: Callable[[list[torch.Tensor]], None]) -> Callable[[list[torch.Tensor]], None]:
    """Has it called with the parameters after every freeze and thaw."""
    _followers.append(follower)
    return follower


def _announce(parameters):
    for follower in _followers:
        follower(parameters)


def freeze(what: Any, model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Stops training parameters: they require no gradient and hold none.

    Groups and state stay as they are, and steps leave both alone, weight decay and momentum included.

    Args:
        what: a module, a parameter, a name, a pattern, or an iterable of these.
        model: whose names are meant.
        optimizer: whose names are meant if there is no model.

    Raises InvalidArgument, and changes nothing, if something matches no parameter, or one that is no leaf.
    """
    names = names_of(model, optimizer)
    parameters = parameters_of(what, model, names)
    for p in parameters:
        if not p.is_leaf and p.requires_grad:
            raise InvalidArgument(f"{_label(p, names)} is the result of others, which can be frozen: it is no leaf")
    for p in parameters:
        p.requires_grad_(False)
        p.grad = None  # a step does not look at requires_grad
    _announce(parameters)


def thaw(
    what: Any,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    lr: float | torch.Tensor | None = None,
    **settings: Any,
) -> None:
    """Trains parameters (again): they require gradients, and the optimizer holds them.

    State and step counts stay. Settings given move the parameters out of their groups: those of one
    group into one new group, at the end, with the other settings of the old one. A group that is
    thawed as a whole keeps its place and gets the settings. Parameters that no group held form a new
    group, with the optimizer's defaults.

    Args:
        what: a module, a parameter, a name, a pattern, or an iterable of these.
        model: whose names are meant, and which names parameters that no group held.
        optimizer: without one, only `requires_grad` is set.
        scheduler: one or several of this optimizer, to be told of new groups and rates.
        lr: the learning rate from now on.
        **settings: further settings of the group, such as `weight_decay`.

    Raises InvalidArgument for what matches no parameter, parameters of integers or made under inference_mode,
    and settings the optimizer does not have, and what torch raises for values it refuses; nothing has changed then.
    """
    if lr is not None:
        settings["lr"] = lr
    names = names_of(model, optimizer)
    parameters = parameters_of(what, model, names)
    for p in parameters:
        why = why_frozen_for_ever(p)
        if why is not None:
            raise InvalidArgument(f"{_label(p, names)} {why}")
    if optimizer is not None:
        _Regrouping(optimizer, parameters, settings, names, _several(scheduler)).apply()
    elif settings or scheduler is not None:
        raise InvalidArgument("settings and schedulers are those of an optimizer: pass optimizer=")
    for p in parameters:
        if not p.requires_grad:
            p.grad = None  # of before it was frozen
            p.requires_grad_(True)
    _announce(parameters)


class Freezable:
    """`freeze` and `thaw` as methods of an optimizer."""

    def freeze(self, what: Any, model: torch.nn.Module | None = None) -> None:
        """Stops training parameters: `fusestep.optim.freeze` for this optimizer."""
        freeze(what, model, self)

    def thaw(
        self,
        what: Any,
        model: torch.nn.Module | None = None,
        *,
        scheduler: Any = None,
        lr: float | torch.Tensor | None = None,
        **settings: Any,
    ) -> None:
        """Trains parameters (again), with settings of their own if given: `fusestep.optim.thaw`."""
        thaw(what, model, self, scheduler=scheduler, lr=lr, **settings)


class _Regrouping:
    """Which groups change and which are new: found and checked first, applied at once."""

    def __init__(self, optimizer, parameters, settings, names: Names, schedulers):
        self.optimizer, self.settings, self.schedulers = optimizer, settings, schedulers
        self.groups: list[dict] = optimizer.param_groups
        chosen = dict.fromkeys(parameters)
        self.moving: list[tuple[int, dict, dict]] = []  # index, what stays, what goes
        held = set()
        for index, group in enumerate(self.groups):
            held.update(group["params"])
            stay, go = _split(group, chosen)
            if settings and go["params"]:
                self.moving.append((index, stay, {**_own(group), **go}))
        self.unheld = [p for p in parameters if p not in held]
        self._check()
        self.added = self._group_of_unheld(names) if self.unheld else None
        for _, _, new in self.moving:
            self._set(new)

    def _check(self):
        known = set(self.optimizer.defaults).union(*self.groups) - {"params", "param_names"}
        for name in self.settings:
            if name not in known:
                close = difflib.get_close_matches(name, known) or sorted(known)
                raise InvalidArgument(
                    f"{type(self.optimizer).__name__} has no setting '{name}'; it has {listed(close)}"
                )
        for scheduler in self.schedulers:
            if scheduler.optimizer is not self.optimizer:
                raise InvalidArgument(f"the {type(scheduler).__name__} is of another optimizer")
        changed = [(index, {**new, **self.settings}) for index, _, new in self.moving]
        if self.unheld:
            changed.append((len(self.groups), {**self.optimizer.defaults, **self.settings, "params": self.unheld}))
        for index, group in changed:
            refuse_wrong_values(self.optimizer, group)
            precision.check_group(group, f"group {index}")

    def _group_of_unheld(self, names):
        new = {**self.optimizer.defaults, **self.settings, "params": self.unheld}
        if any("initial_lr" in group for group in self.groups):
            new.setdefault("initial_lr", new["lr"])
        if self.groups and "param_names" in self.groups[0]:
            for p in self.unheld:
                if p not in names:
                    raise InvalidArgument(f"the optimizer's groups have names: pass model= to name {_label(p, names)}")
            new["param_names"] = [names[p][0] for p in self.unheld]
        return {name: _copied(value) for name, value in new.items()}

    def _set(self, group):
        group.update({name: _copied(value) for name, value in self.settings.items()})
        if "lr" in self.settings and "initial_lr" in group and "initial_lr" not in self.settings:
            group["initial_lr"] = _copied(self.settings["lr"])

    def apply(self):
        before = [dict(group) for group in self.groups]
        try:
            told = self._regroup()
        except BaseException:  # of add_param_group, which may still refuse
            del self.groups[len(before) :]
            for group, own in zip(self.groups, before, strict=True):
                group.clear()
                group.update(own)
            raise
        for scheduler in self.schedulers:
            for source, index, lr in told:
                _tell(scheduler, source, index, lr)

    def _regroup(self):
        """What schedulers are to be told: group that it came from, group, learning rate."""
        told = []
        if self.added is not None:
            self.optimizer.add_param_group(self.added)
            told.append((0, len(self.groups) - 1, self.added["lr"]))
        for index, stay, new in self.moving:
            now = index
            if stay["params"]:
                self.groups[index].update(stay)
                self.optimizer.add_param_group(new)
                now = len(self.groups) - 1
            else:
                self.groups[index].update(new)
            told.append((index, now, self.settings.get("lr")))
        return told


def _split(group, chosen):
    """What of a group stays and what goes: `params`, and `param_names` where there are any."""
    halves = []
    for goes in (False, True):
        at = [i for i, p in enumerate(group["params"]) if (p in chosen) == goes]
        halves.append({key: [group[key][i] for i in at] for key in ("params", "param_names") if key in group})
    return halves


def _own(group):
    """Its settings, without sharing tensors: schedulers write a tensor lr in place."""
    return {name: _copied(value) for name, value in group.items() if name not in ("params", "param_names")}


def _copied(value):
    return value.clone() if torch.is_tensor(value) else value


def why_frozen_for_ever(p: torch.Tensor) -> str | None:
    """Why a parameter cannot be made to require a gradient; None if it can, or does."""
    if p.requires_grad:
        return None
    if not (p.is_floating_point() or p.is_complex()):
        return f"of {p.dtype} cannot require a gradient"
    return "was made under inference_mode: it cannot require a gradient" if is_read_only(p) else None


def refuse_wrong_values(optimizer, group):
    """Lets the constructor of torch's class judge, which add_param_group does not ask."""
    judge = next((base for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim.")), None)
    if judge in (None, torch.optim.Optimizer):
        return
    taken = set(inspect.signature(judge).parameters) - {"params", "foreach", "fused", "capturable", "differentiable"}
    judge([torch.zeros((), device="cpu")], **{name: value for name, value in group.items() if name in taken})


def _tell(scheduler, source, index, lr):
    """Enters group `index`, new or changed, in the lists a scheduler keeps; None: the lr of `source`."""
    for inner in getattr(scheduler, "_schedulers", ()):
        _tell(inner, source, index, lr)
    for name in _PER_GROUP:
        values = getattr(scheduler, name, None)
        knows = isinstance(values, list) and source < len(values) >= index  # it may be older than a group
        if knows:
            value = _copied(lr if lr is not None and name in _RATES else values[source])
            values[index : index + 1] = [value]


def _several(scheduler):
    if scheduler is None:
        return []
    return list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]


def _label(p, names):
    return names[p][0] if p in names else f"a parameter of shape {list(p.shape)}"
