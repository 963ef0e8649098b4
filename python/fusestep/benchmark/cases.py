# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What is measured: rules, parameter lists, operations, and the selections a run may make of them."""

from __future__ import annotations

import functools
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .._core import InvalidArgument

SHAPES = pathlib.Path(__file__).with_name("shapes.json")
UNIFORM = "([1-9][0-9]*)x([1-9][0-9]*)"
ALIASES = {"one64m": f"1x{64 << 20}", "tiny10k": "10000x1000"}

# Bytes of an element.
DTYPES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
SHORT_DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Rule:
    """A class of torch.optim with settings; `slots` are its state buffers."""

    torch_class: str
    slots: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def formula(self) -> tuple[Any, ...]:
        """The same for all settings that are but numbers."""
        return self.torch_class, self.slots, bool(self.settings.get("nesterov"))


_MOMENTUM = "momentum_buffer"
RULES = {
    "adam": Rule("Adam", ("exp_avg", "exp_avg_sq"), {"weight_decay": 1e-2}),
    "adamw": Rule("AdamW", ("exp_avg", "exp_avg_sq")),
    "amsgrad": Rule("Adam", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), {"amsgrad": True}),
    "sgd": Rule("SGD"),
    "sgd_momentum": Rule("SGD", (_MOMENTUM,), {"momentum": 0.9}),
    "sgd_nesterov": Rule("SGD", (_MOMENTUM,), {"momentum": 0.9, "nesterov": True}),
    "rmsprop": Rule("RMSprop", ("square_avg",)),
    "rmsprop_momentum": Rule("RMSprop", ("square_avg", _MOMENTUM), {"momentum": 0.9}),
    "rmsprop_centered": Rule("RMSprop", ("square_avg", "grad_avg"), {"centered": True}),
    "rmsprop_momentum_centered": Rule(
        "RMSprop", ("square_avg", _MOMENTUM, "grad_avg"), {"momentum": 0.9, "centered": True}
    ),
}

OPERATIONS = {
    "step": "a step",
    "clip": "clipping by the global norm, then a step",
    "scaler": "GradScaler's step and update",
    "zero_grad": "zero_grad(set_to_none=False)",
    "save": "state to a file",
    "load": "state from a file",
    "host": "a step of small tensors, nothing changed since the last one",
    "skipped": "a step of small tensors that changes nothing, since found_inf says so: what is left is the host's work",
    "moved": "a step of small tensors, all gradients at other addresses than in the last one",
    "dtensor": "a step of small DTensors, sharded over a mesh of this process alone",
}
HOST_OPERATIONS = ("host", "skipped", "moved", "dtensor")
STATE_OPERATIONS = ("save", "load")


@dataclass(frozen=True)
class Case:
    """One line of the table: what every contestant does."""

    rule: str
    dtype: str
    model: str
    groups: int
    operation: str = "step"

    @property
    def name(self) -> str:
        beyond = "" if self.operation == "step" else f"/{self.operation}"
        return f"{self.rule}/{self.dtype}/{self.model}/groups={self.groups}{beyond}"

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in shapes(self.model))

    @property
    def is_of_many_small(self) -> bool:
        """Tensors whose number costs more than their size, so that flat groups are a way out."""
        tensors = len(shapes(self.model))
        return tensors >= 200 and self.elements <= tensors << 18

    @property
    def bytes(self) -> int:
        """That must be moved between memory and processor."""
        return self.elements * bytes_per_element(self.rule, self.dtype, self.operation)


def bytes_per_element(rule: str, dtype: str, operation: str = "step") -> int:
    """That must be moved: the parameter and each slot read and written, the gradient read.

    Clipping and GradScaler must have read all gradients before the first parameter may change: once more.
    GradScaler leaves them divided: written as well.
    """
    slots = len(RULES[rule].slots)
    accesses = 3 + 2 * slots
    if operation in ("clip", "scaler"):
        accesses += 1 if operation == "clip" else 2
    elif operation == "zero_grad":
        accesses = 1
    elif operation in STATE_OPERATIONS:
        accesses = slots
    return accesses * DTYPES[dtype]


def shapes(model: str) -> list[list[int]]:
    """Shapes of a model's parameters; "20x64" is 20 tensors of 64 elements."""
    uniform = re.fullmatch(UNIFORM, ALIASES.get(model, model))
    if uniform:
        return [[int(uniform[2])]] * int(uniform[1])
    return [shape for _, shape in _lists()[model]]


def models() -> list[str]:
    return [*_lists(), *ALIASES]


@functools.cache
def _lists():
    return json.loads(SHAPES.read_text())


# ---- selections --------------------------------------------------------------------------------


def product(
    rules: Iterable[str] = tuple(RULES),
    dtypes: Iterable[str] = ("float32",),
    models: Iterable[str] = ("resnet50",),
    groups: Iterable[int] = (1,),
    operations: Iterable[str] = ("step",),
) -> Iterator[Case]:
    for operation, dtype, model, rule, count in itertools.product(operations, dtypes, models, rules, groups):
        yield Case(rule, dtype, model, count, operation)


def _host(rules, counts, operations=("host", "moved")):
    return product(rules, models=[f"{count}x6" for count in counts], operations=operations)


_BESIDE_A_STEP = ("clip", "scaler", "zero_grad", "save", "load")


def quick() -> Iterator[Case]:
    """Chosen for a minute on two quiet cores."""
    yield from product(("adam", "sgd_momentum", "rmsprop"))
    yield from product(("adamw",), dtypes=("bfloat16",))
    yield from product(("adam",), models=("1000x1000",))
    yield from product(("adam",), models=("200x1000",), groups=(1, 8))
    yield from product(("adam",), models=("200x1000",), operations=_BESIDE_A_STEP)
    yield from _host(("adam",), (1, 10, 100, 1000))


def standard(device: str) -> Iterator[Case]:
    """Chosen for eight minutes on two quiet cores."""
    yield from product()
    yield from product(("adamw", "sgd_momentum", "rmsprop"), dtypes=("bfloat16",))
    yield from product(("adam",), models=("resnet152",), groups=(1, 8))
    yield from product(("adam", "amsgrad", "sgd"), models=("gpt2",))
    yield from product(("adam", "sgd_momentum"), models=("tiny10k",))
    yield from product(("adam",), models=("tiny10k",), groups=(8,))
    yield from product(("adam",), operations=_BESIDE_A_STEP)
    if device == "cuda":
        yield from _more_for_cuda()
    yield from _host(("adam", "sgd_momentum"), (1, 10, 100, 1000, 10_000))
    yield from _host(("adam",), (1, 1000, 10_000), operations=("skipped",))
    yield from _host(("adam",), (100, 1000), operations=("dtensor",))


def _more_for_cuda() -> Iterator[Case]:
    yield from product([rule for rule in RULES if rule != "adam"], models=("resnet152",))
    yield from product(("adam", "sgd_momentum", "rmsprop_momentum_centered"), models=("gpt2_xl",))
    yield from product(("adamw", "sgd_momentum", "rmsprop"), dtypes=("bfloat16",), models=("gpt2",))
    yield from product(("adam",), models=("resnet152", "gpt2_xl"), operations=("clip", "scaler"))


def full() -> Iterator[Case]:
    """Everything: hours on a CPU."""
    yield from product(
        dtypes=("float32", "bfloat16"), models=models(), groups=(1, 8), operations=("step", "clip", "scaler")
    )
    yield from product(models=("resnet50", "resnet152"), operations=("zero_grad", "save", "load"))
    yield from _host(RULES, (1, 10, 100, 1000, 10_000), HOST_OPERATIONS)


def chosen(options: Any) -> list[Case]:
    """The selection that the command line asks for. InvalidArgument names what is unknown."""
    _expect("optimizer", options.optimizers, RULES)
    _expect("dtype", options.dtypes, [*DTYPES, *SHORT_DTYPES])
    _expect("operation", options.operations, OPERATIONS)
    for model in options.models or ():
        if not re.fullmatch(UNIFORM, model) and model not in models():
            raise InvalidArgument(
                f"unknown model '{model}', expected one of {', '.join(models())}, or COUNTxELEMENTS such as 100x64"
            )
    for text in options.groups or ():
        if not re.fullmatch("[1-9][0-9]*", text):
            raise InvalidArgument(f"'{text}' is no number of groups")
    given = {
        "rules": options.optimizers,
        "dtypes": options.dtypes and [SHORT_DTYPES.get(name, name) for name in options.dtypes],
        "models": options.models,
        "groups": options.groups and [int(text) for text in options.groups],
        "operations": options.operations,
    }
    given = {key: dict.fromkeys(value) for key, value in given.items() if value}
    if given:
        return list(product(**given))
    return list(quick() if options.quick else full() if options.full else standard(options.device))


def _expect(what, names, known):
    for name in names or ():
        if name not in known:
            raise InvalidArgument(f"unknown {what} '{name}', expected one of {', '.join(known)}")
