# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of a case, which all contestants step, and what has to come out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..dtensor import local
from . import cases

LEARNING_RATE = 1.0  # large enough for a small error to show in bfloat16
GRADIENT_SCALES = (1.0, -0.25, 0.125)  # of the steps that are checked: exact in every dtype
SAMPLED = 16_384  # elements of a tensor that are checked, evenly spaced, the first and last among them

_BLOCK = 1 << 20


class Workload:
    """Parameters and gradients of a model, each tensor allocated by itself, as a model's are."""

    def __init__(self, case: cases.Case, device: str) -> None:
        self.case = case
        dtype = getattr(torch, case.dtype)
        place = _shard_of(device) if case.operation == "dtensor" else lambda tensor: tensor
        empty = [place(torch.empty(shape, dtype=dtype, device=device)) for shape in cases.shapes(case.model)]
        self.params = [torch.nn.Parameter(tensor) for tensor in empty]
        self._gradients = [self._empty_gradients() for _ in range(2 if case.operation == "moved" else 1)]
        self._blocks = [_random_block(seed, dtype, device) for seed in (1, 2)]
        self._indices = [_evenly_spaced(p.numel(), device) for p in self.params]
        self.reset()
        # Half the norm: clipped gradients that were small beside weight decay would magnify rounding.
        self.max_norm = 0.5 * _norm(self.grads)

    def _empty_gradients(self) -> list[torch.Tensor]:
        return [torch.empty_like(p) for p in self.params]

    @property
    def groups(self) -> list[list[torch.nn.Parameter]]:
        """Parameters in turn to one group after the other; groups without any are left out."""
        return [group for group in (self.params[i :: self.case.groups] for i in range(self.case.groups)) if group]

    @property
    def grads(self) -> list[torch.Tensor]:
        return self._gradients[0]

    def reset(self) -> None:
        """Values and gradients as they were at first."""
        _fill([p.detach() for p in self.params], self._blocks[0])
        self.set_grads(1.0)

    def set_grads(self, scale: float) -> None:
        for grads in self._gradients:
            _fill(grads, self._blocks[1] * scale)
        self._attach()

    def move_grads(self) -> None:
        """The same gradients at other addresses."""
        self._gradients.reverse()
        self._attach()

    def _attach(self) -> None:
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad

    def sampled(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Elements of tensors shaped like the parameters, one after the other, as doubles on the CPU."""
        flat = [local(tensor.detach()).reshape(-1) for tensor in tensors]
        parts = [t if index is None else t[index] for t, index in zip(flat, self._indices, strict=True)]
        return torch.cat(parts).to("cpu", torch.float64)


def _shard_of(device: str) -> Any:
    """What makes a DTensor of a tensor, as ranks hold them after fully_shard."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = torch.distributed.init_device_mesh(device, (torch.distributed.get_world_size(),))
    return lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)


@contextlib.contextmanager
def process_group(case: cases.Case) -> Iterator[None]:
    """One of this process alone, where the case needs it and there is none."""
    if case.operation != "dtensor" or torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@functools.cache
def _random_block(seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Of either sign, magnitudes from 1/8 to 1/2: nothing vanishes in float16, and no zero makes it fast."""
    random = torch.Generator("cpu").manual_seed(seed)
    block = torch.rand(_BLOCK, generator=random, device="cpu") * 0.375 + 0.125
    signs = torch.randint(0, 2, (_BLOCK,), generator=random, device="cpu") * 2 - 1
    return (block * signs).to(device=device, dtype=dtype)


def _fill(tensors: Sequence[torch.Tensor], block: torch.Tensor) -> None:
    for number, tensor in enumerate(tensors):
        flat, start = local(tensor).view(-1), number * 4099 % (_BLOCK // 2)
        for begin in range(0, flat.numel(), _BLOCK // 2):
            piece = flat[begin : begin + _BLOCK // 2]
            piece.copy_(block[start : start + piece.numel()])


def _evenly_spaced(elements: int, device: str) -> torch.Tensor | None:
    if elements <= SAMPLED:
        return None
    steps = torch.arange(SAMPLED, dtype=torch.int64, device="cpu")
    return (steps * (elements - 1) // (SAMPLED - 1)).to(device)


# ---- what has to come out ----------------------------------------------------------------------


# With settings as usual, a formula that leaves out weight decay or AMSGrad's maximum differs from the right one by less
# than bfloat16 rounds. With these it differs by much. They are exact in binary, and 1 - beta2 is too.
TELLING = {"betas": (0.75, 0.5), "alpha": 0.75, "eps": 2.0**-6, "weight_decay": 0.25, "momentum": 0.5}


@dataclasses.dataclass(frozen=True)
class Reference:
    """`expected`: "value" and slots, of the sampled elements; None where the operation has another check."""

    rule: cases.Rule
    expected: dict[str, torch.Tensor] | None
    is_telling: bool = False


def references(workload: Workload) -> list[Reference]:
    """What has to come out with settings that tell formulas apart, and last with those that are timed."""
    rule = cases.RULES[workload.case.rule]
    if workload.case.operation in (*cases.STATE_OPERATIONS, "zero_grad"):
        return [Reference(rule, None)]
    telling = _telling(rule)
    rules = [telling] if telling == rule else [telling, rule]
    return [Reference(each, _stepped(workload, each), each == telling) for each in rules]


def _telling(rule: cases.Rule) -> cases.Rule:
    usual = getattr(torch.optim, rule.torch_class)([torch.zeros(1)], lr=LEARNING_RATE, **rule.settings).defaults
    telling = {name: value for name, value in TELLING.items() if usual.get(name)}
    return dataclasses.replace(rule, settings=rule.settings | telling)


def _stepped(workload: Workload, rule: cases.Rule) -> dict[str, torch.Tensor]:
    """Values and slots after the steps that are checked: torch's loop in double, on the sampled elements."""
    case = workload.case
    workload.reset()
    p = torch.nn.Parameter(workload.sampled(workload.params))
    settings = {"lr": LEARNING_RATE, **rule.settings}
    optimizer = getattr(torch.optim, rule.torch_class)([p], foreach=False, **settings)
    for scale in GRADIENT_SCALES:
        workload.set_grads(scale)
        clip = min(1.0, workload.max_norm / (_norm(workload.grads) + 1e-6)) if case.operation == "clip" else 1.0
        p.grad = workload.sampled(workload.grads) * clip
        optimizer.step()
    return {"value": p.detach(), **{slot: optimizer.state[p][slot] for slot in rule.slots}}


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(local(t), dtype=torch.float64).item() for t in tensors))


def worst_ulps(workload: Workload, expected: dict[str, torch.Tensor], call: Any, optimizer: Any) -> float:
    """Takes the steps that are checked; the largest error, in units in the last place and by step.

    Slots that the optimizer calls otherwise are not compared.
    """
    workload.reset()
    for scale in GRADIENT_SCALES:
        workload.set_grads(scale)
        call()
    errors = [_ulps(workload, workload.params, expected["value"])]
    for slot, value in expected.items():
        if slot != "value" and has_slot(workload, optimizer, slot):
            tensors = [optimizer.state[p][slot] for p in workload.params]
            errors.append(_ulps(workload, tensors, value))
    return max(errors)


def has_slot(workload: Workload, optimizer: Any, slot: str) -> bool:
    """Whether every parameter's state has it, in the parameter's shape."""
    state = getattr(optimizer, "state", {})
    tensors = [(state.get(p, {}).get(slot), p) for p in workload.params]
    return all(torch.is_tensor(t) and t.shape == p.shape for t, p in tensors)


def _ulps(workload: Workload, tensors: Sequence[torch.Tensor], expected: torch.Tensor) -> float:
    error = (workload.sampled(tensors) - expected).abs().max().item()
    unit = torch.finfo(workload.params[0].dtype).eps * expected.abs().max().item()
    ulps = error / unit / len(GRADIENT_SCALES)
    return ulps if math.isfinite(ulps) else math.inf


def allowed_ulps(case: cases.Case, beta_is_rounded: bool) -> float:
    """Of an error, in units in the last place of the largest element, a step: docs/benchmarking.md.

    torch sums the norm for clipping in float32, and we in double. `beta_is_rounded`: as some kernels do, 1 - beta2 may
    have been taken from beta2 in float32; with 0.999 exp_avg_sq is 1.3e-5 of itself off.
    """
    norm = 256.0 if case.operation == "clip" else 0.0
    beta = 64.0 if beta_is_rounded and case.dtype != "float64" else 0.0
    return 2.0 + (norm + beta) * 2.0**-23 / torch.finfo(getattr(torch, case.dtype)).eps
