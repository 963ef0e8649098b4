# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Who takes part, and how each does what is measured."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fusestep
import fusestep.optim

from . import report
from .cases import DTYPES, RULES, Case, Rule
from .report import ARRAYS, ONE_GROUP, OURS, OWN
from .workload import LEARNING_RATE, Reference, Workload, allowed_ulps, has_slot, worst_ulps

FLAT = {report.FLAT: False, report.TRUSTED: True}  # whether it trusts gradients
LOSS_SCALE = 4.0  # in the check


class LeftOut(Exception):
    """Why a contestant or a case does not take part."""


# ---- optimizers: (rule, groups of parameters) to an optimizer of torch's interface ---------------


def _groups(groups):
    return [{"params": group} for group in groups]


def _fusestep(rule: Rule, groups: Any) -> Any:
    return getattr(fusestep.optim, rule.torch_class)(_groups(groups), lr=LEARNING_RATE, **rule.settings)


def _torch(**how: bool) -> Callable:
    def make(rule, groups):
        cls = getattr(torch.optim, rule.torch_class)
        if "fused" in how and "fused" not in inspect.signature(cls).parameters:
            raise LeftOut(f"torch {torch.__version__.partition('+')[0]} has no fused {rule.torch_class}")
        return cls(_groups(groups), lr=LEARNING_RATE, **rule.settings, **how)

    return make


def _apex(rule: Rule, groups: Any) -> Any:
    optimizers = _installed("apex.optimizers")
    if groups[0][0].device.type != "cuda":
        raise LeftOut("its optimizers are for CUDA alone")
    settings = {**rule.settings, "lr": LEARNING_RATE}
    if rule.torch_class in ("Adam", "AdamW") and "amsgrad" not in settings:
        settings.setdefault("weight_decay", 1e-2 if rule.torch_class == "AdamW" else 0.0)
        return optimizers.FusedAdam(_groups(groups), adam_w_mode=rule.torch_class == "AdamW", **settings)
    if rule.torch_class == "SGD":
        return optimizers.FusedSGD(_groups(groups), **settings)
    raise LeftOut("it does not have the rule")


def _deepspeed(rule: Rule, groups: Any) -> Any:
    adam = _installed("deepspeed.ops.adam")
    if groups[0][0].device.type != "cpu":
        raise LeftOut("its Adam is for the CPU")
    if rule.torch_class not in ("Adam", "AdamW") or "amsgrad" in rule.settings:
        raise LeftOut("its Adam for the CPU does not have the rule")
    decoupled = rule.torch_class == "AdamW"
    settings = {"weight_decay": 1e-2 if decoupled else 0.0, **rule.settings}
    return adam.DeepSpeedCPUAdam(_groups(groups), lr=LEARNING_RATE, adamw_mode=decoupled, **settings)


def _bitsandbytes(rule: Rule, groups: Any) -> Any:
    optim = _installed("bitsandbytes.optim")
    offered = (RULES["adamw"], RULES["sgd_momentum"], RULES["rmsprop"])  # its Adam decouples weight decay
    if rule.formula not in [known.formula for known in offered]:
        raise LeftOut("it does not have the rule")
    settings = {"weight_decay": 1e-2 if rule.torch_class == "AdamW" else 0.0, **rule.settings}
    return getattr(optim, rule.torch_class)(_groups(groups), lr=LEARNING_RATE, optim_bits=32, **settings)


def _installed(name):
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        reason = "not installed" if (error.name or "").partition(".")[0] == package else f"it needs {error.name}"
    except Exception as error:  # whatever another package's import may raise
        reason = f"it cannot be imported: {_first_line(error)}"
    raise LeftOut(reason)


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


FACTORIES: dict[str, Callable[[Rule, Any], Any]] = {
    OURS: _fusestep,
    "torch fused": _torch(fused=True),
    "torch foreach": _torch(foreach=True),
    "torch for-loop": _torch(foreach=False),
    "apex": _apex,
    "DeepSpeed": _deepspeed,
    "bitsandbytes": _bitsandbytes,
}


# ---- operations --------------------------------------------------------------------------------


@dataclass
class Entry:
    """A contestant in a case: `call` is timed, `before` is not; `check` returns its error in ulps or raises LeftOut."""

    label: str
    call: Callable[[], Any]
    check: Callable[[Reference], float]
    optimizer: Any = None
    before: Callable[[], Any] | None = None

    @property
    def state_bytes(self) -> int | None:
        if self.optimizer is None:
            return None
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))


def labels(case: Case) -> list[str]:
    """Who is asked to take part."""
    if case.operation == "save":
        return [OURS, "torch.save", "torch.save, fsync"]
    if case.operation == "load":
        return [OURS, "torch.load"]
    if case.operation == "skipped":
        return [OURS, *FLAT, "torch fused"]
    if case.operation in ("host", "step", "moved"):
        may_be_flat = case.operation == "host" or (case.operation == "step" and case.is_of_many_small)
        of_ours = [ONE_GROUP] if case.groups > 1 else []
        of_ours += FLAT if may_be_flat else []
        return [OURS, *of_ours, *(label for label in FACTORIES if label != OURS)]
    own = [label for label in FACTORIES if label == OURS or label.startswith("torch")]
    return [*own, ARRAYS] if case.operation == "clip" else own


def entered(
    label: str, workload: Workload, folder: pathlib.Path, references: Sequence[Reference]
) -> tuple[Entry, float]:
    """The contestant with the last of the rules, ready to be timed, and its largest error in ulps. Raises LeftOut."""
    *others, timed = references
    try:
        errors = [enter(label, workload, folder, other.rule).check(other) for other in others]
        entry = enter(label, workload, folder, timed.rule)
        return entry, max([*errors, entry.check(timed)])
    except (LeftOut, torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever another library may raise
        if label in OWN:
            raise
        raise LeftOut(f"it refuses: {_first_line(error)}") from error


def enter(label: str, workload: Workload, folder: pathlib.Path, rule: Rule) -> Entry:
    """The contestant, ready to be checked."""
    case = workload.case
    if case.operation in ("save", "load"):
        return _file_entry(label, workload, folder)
    if label == ARRAYS:
        return _arrays_entry(workload, rule)
    if label in FLAT:  # parameters can be flat once
        workload = Workload(case, workload.params[0].device.type)
    groups = [workload.params] if label == ONE_GROUP else workload.groups
    optimizer = FACTORIES[OURS if label in OWN else label](rule, groups)
    if label in FLAT:
        fusestep.optim.flatten(optimizer, trust_gradients=FLAT[label])
    if case.operation == "zero_grad":
        call = functools.partial(optimizer.zero_grad, set_to_none=False)
        return Entry(label, call, _all_zero(workload, call), optimizer)
    call, checked = _CALLS.get(case.operation, _step)(optimizer, workload, label)
    check = _same_as_reference(label, workload, checked, optimizer)
    if case.operation == "skipped":
        check = _then_skipping(optimizer, check)
    before = workload.move_grads if case.operation == "moved" else None
    return Entry(label, call, check, optimizer, before)


# Each returns what is timed, and what is checked.


def _step(optimizer, workload, label):
    return optimizer.step, optimizer.step


def _clip_and_step(optimizer, workload, label):
    if label == OURS:
        optimizer.max_grad_norm = workload.max_norm
        return optimizer.step, optimizer.step
    foreach = label != "torch for-loop"

    def call():
        torch.nn.utils.clip_grad_norm_(workload.params, workload.max_norm, foreach=foreach)
        optimizer.step()

    return call, call


def _scaler_step(optimizer, workload, label):
    """Timed with a scale of 1, which leaves gradients as they are."""
    if workload.case.dtype == "float16":
        raise LeftOut("GradScaler refuses float16 gradients")
    device = workload.params[0].device.type
    scaler = torch.amp.GradScaler(device, init_scale=1.0, growth_interval=1 << 30)
    scaler.scale(torch.ones(1, device=device))  # makes its tensors

    def call():
        scaler.step(optimizer)
        scaler.update()

    def checked():
        for grad in workload.grads:
            grad.mul_(LOSS_SCALE)
        scaler.update(LOSS_SCALE)
        call()
        scaler.update(1.0)

    return call, checked


_CALLS = {"clip": _clip_and_step, "scaler": _scaler_step}


def _arrays_entry(workload, rule):
    """Clipping inside the step, on NumPy's views of the same tensors."""
    p = workload.params[0]
    if p.device.type != "cpu" or p.dtype == torch.bfloat16:
        raise LeftOut("fusestep.Optimizer steps NumPy arrays, which are on the CPU and not bfloat16")
    names = {p: f"p{index}" for index, p in enumerate(workload.params)}
    groups = [{"params": {names[p]: p.detach().numpy() for p in group}} for group in workload.groups]
    optimizer = fusestep.Optimizer(rule.torch_class, groups, lr=LEARNING_RATE, **rule.settings)
    grads = {f"p{index}": grad.numpy() for index, grad in enumerate(workload.grads)}

    def call():
        optimizer.step(grads, max_grad_norm=workload.max_norm)

    return Entry(ARRAYS, call, _same_as_reference(ARRAYS, workload, call, None))


def _file_entry(label, workload, folder):
    case = workload.case
    optimizer = FACTORIES[OURS if label == OURS else "torch for-loop"](RULES[case.rule], workload.groups)
    optimizer.step()
    path = folder / f"{label.replace(' ', '-')}.state"

    def save_fusestep():
        optimizer.save(path)

    def save_torch():
        torch.save(optimizer.state_dict(), path)

    def save_torch_durably():
        with open(path, "wb") as file:
            torch.save(optimizer.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())

    def load_fusestep():
        optimizer.load(path)

    def load_torch():
        optimizer.load_state_dict(torch.load(path))

    save = {OURS: save_fusestep, "torch.save, fsync": save_torch_durably}.get(label, save_torch)
    load = load_fusestep if label == OURS else load_torch
    if case.operation == "load":
        save()
    return Entry(label, save if case.operation == "save" else load, _comes_back(optimizer, save, load), optimizer)


# ---- checks ------------------------------------------------------------------------------------


def _same_as_reference(label, workload, call, optimizer):
    def check(reference):
        expected = reference.expected
        ulps = worst_ulps(workload, expected, call, optimizer)
        lacking = [slot for slot in reference.rule.slots if not has_slot(workload, optimizer, slot)]
        if lacking and optimizer is not None and (label in OWN or label.startswith("torch")):
            raise LeftOut(f"its state has no {', '.join(lacking)}")
        allowed = allowed_ulps(workload.case, beta_is_rounded=label not in OWN and not reference.is_telling)
        if ulps > allowed:
            settings = ", ".join(f"{name}={value}" for name, value in reference.rule.settings.items())
            raise LeftOut(
                f"its result is {ulps:.3g} units in the last place a step from torch's formula in double,"
                f" allowed are {allowed:g} ({settings or 'settings as usual'})"
            )
        return ulps

    return check


def _then_skipping(optimizer, check):
    """After the check every step is skipped."""

    def check_and_skip(reference):
        ulps = check(reference)
        first = optimizer.param_groups[0]["params"][0]
        optimizer.found_inf = torch.ones((), device=first.device)
        return ulps

    return check_and_skip


def _all_zero(workload, call):
    def check(_):
        call()
        if any(torch.count_nonzero(grad) for grad in workload.grads):
            raise LeftOut("a gradient is not zero after zero_grad")
        return 0.0

    return check


def _comes_back(optimizer, save, load):
    """What is loaded has the bits of what was saved."""

    def check(_):
        before = copy.deepcopy(_tensors(optimizer))
        save()
        for tensor in _tensors(optimizer).values():
            tensor.zero_()
        load()
        after = _tensors(optimizer)
        if before.keys() != after.keys() or not all(torch.equal(before[key], after[key]) for key in before):
            raise LeftOut("the state that is loaded differs from the state that was saved")
        return 0.0

    return check


def _tensors(optimizer):
    """(position of the parameter, slot) to tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        (number, slot): value
        for number, p in enumerate(parameters)
        for slot, value in optimizer.state.get(p, {}).items()
        if torch.is_tensor(value)
    }


def needed_bytes(case: Case) -> int:
    """Of memory, about: tensors, everybody's slots, what a step allocates for a while, and the check."""
    item, slots = DTYPES[case.dtype], len(RULES[case.rule].slots)
    asked = labels(case)
    sharing = sum(label == OURS or label.startswith("torch") for label in asked)
    flat = sum(label in FLAT for label in asked)
    tensors = 2 + slots * sharing + (2 + slots) * flat + 3
    if case.operation in ("save", "load"):
        tensors += 2 * slots  # a state_dict read from a file, and the copy it is compared with
    return case.elements * item * tensors + (1 << 28)
