# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What a step does with gradients beside the rule: loss scale, norm, clipping.

The engine does it while it steps. Here is the rest: a norm of what no single pass of the engine sees
(parts on other ranks, tied parameters, parameters left to torch), and gradients that are divided apart.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ._core import InvalidArgument
from .dtensor import is_dtensor, local, whole
from .inference import is_read_only

Pairs = list[tuple[torch.Tensor, "torch.Tensor | None"]]
"""Parameters and what they step with."""


def check_limit(name: str, limit: Any) -> Any:
    """max_grad_norm or clip_value."""
    if limit is None:
        return None
    if isinstance(limit, numbers.Real) and not isinstance(limit, bool) and limit >= 0:
        with contextlib.suppress(OverflowError):
            return float(limit)
    raise InvalidArgument(f"{name} must be None or a number >= 0, got {limit!r}")


def check_flag(name: str, flag: Any) -> bool:
    """skip_nonfinite or keep_scaled_grads; NumPy's booleans too."""
    if isinstance(flag, (bool, int)) or type(flag).__name__ in ("bool", "bool_"):
        if flag in (0, 1):
            return bool(flag)
    raise InvalidArgument(f"{name} must be True or False, got {flag!r}")


def scalar_of(number: Any) -> torch.Tensor | None:
    """A loss scale as the engine reads it; None stays."""
    number = whole(number)
    if number is None or (torch.is_tensor(number) and number.dtype in (torch.float32, torch.float64)):
        return number
    if torch.is_tensor(number):
        return number.to(torch.float64)
    return torch.as_tensor(number, dtype=torch.float64, device="cpu")


# ---- divided apart -----------------------------------------------------------------------------


def unscale(groups: Iterable[dict], loss_scale: torch.Tensor, found_inf: Any) -> None:
    """Divides gradients by GradScaler's scale in place, as torch leaves them, unless the step is skipped.

    The step has been made when this is called: what cannot be written in place gets a quotient of its own.
    """
    grads: dict[tuple, dict[int, torch.Tensor]] = {}
    for group in groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if is_read_only(p.grad) or has_overlap(p.grad):
                p.grad = p.grad.clone()  # dense, and of this mode
            whole_grad = p.grad
            if whole_grad.layout is torch.sparse_coo:
                key, grad = id(whole_grad), whole_grad._values()  # an object of its own each time
            else:
                grad = local(whole_grad)
                key = id(grad)
            grads.setdefault((grad.device, grad.dtype), {})[key] = grad
    for (device, _), alike in grads.items():
        divisor = loss_scale.to(device).reshape(())
        if found_inf is not None:
            skipped = torch.as_tensor(found_inf, device=device).reshape(()) != 0
            divisor = torch.where(skipped, torch.ones_like(divisor), divisor)
        for together in _apart(list(alike.values())):
            torch._foreach_div_(together, divisor)


def has_overlap(grad: torch.Tensor) -> bool:
    """Of an expanded tensor, elements are one in memory."""
    grad = local(grad)
    if grad.layout is not torch.strided or grad.numel() == 0:
        return False
    return any(stride == 0 and extent > 1 for stride, extent in zip(grad.stride(), grad.shape, strict=True))


def _apart(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """All in one list, which one kernel may write at once; or if some share memory, each in its own."""
    extents = sorted(map(_extent, tensors))
    overlap = any(begin < end for (_, end), (begin, _) in itertools.pairwise(extents))
    return [[tensor] for tensor in tensors] if overlap else [tensors]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from which and to which its elements lie."""
    try:
        begin = tensor.data_ptr()
    except RuntimeError:  # it stands for others
        return 0, 0
    if begin == 0 or tensor.numel() == 0:
        return begin, begin
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


@contextlib.contextmanager
def scaled_grads(parameters: Iterable[tuple[torch.Tensor, bool]], multiplier: Any, clip_value: float | None):
    """`p.grad` as the rule is to see it, for torch's own step; afterwards it is what it was.

    Args:
        parameters: (parameter, whether autograd has to see what is done).
    """
    differentiable = dict(parameters)  # one may be listed twice
    before = {p: p.grad for p in differentiable}
    for p, grad in before.items():
        p.grad = grad  # raises where torch would not take it back
    try:
        for p, grad in before.items():
            with torch.set_grad_enabled(differentiable[p]):
                p.grad = _clamped(grad * multiplier.to(grad.device), clip_value)
        yield
    finally:
        for p, grad in before.items():
            p.grad = grad


def _clamped(grad, limit):
    if limit is None:
        return grad
    if grad.layout is torch.sparse_coo:
        grad = grad.coalesce()
        values = _clamped(grad.values(), limit)
        return torch.sparse_coo_tensor(
            grad.indices(), values, grad.shape, device=grad.device, check_invariants=False, is_coalesced=True
        )
    if grad.is_complex():
        return torch.view_as_complex(_clamped(torch.view_as_real(grad), limit))
    return grad.clamp(-limit, limit)


# ---- the norm over everything ------------------------------------------------------------------


class CommonNorm:
    """The 2-norm over the gradients of all parameters, on all ranks that share them; nothing waits for it.

    Sums are double. Of a DTensor every rank adds its part, and parts are summed over the dimensions of the
    mesh along which it is sharded: all ranks take part, with or without gradients, and get the same bits.

    Attributes:
        norm: after the division by the loss scale.
        nonfinite: not 0 if a gradient has an infinite or NaN element.
    """

    def __init__(self, pairs: Pairs, loss_scale: torch.Tensor | None) -> None:
        squares, self.nonfinite = _sums(pairs).unbind()
        self.norm = squares.sqrt()
        if loss_scale is not None:
            self.norm = self.norm / loss_scale.to(self.norm).reshape(()).abs()

    def coefficient(self, max_grad_norm: float | None) -> torch.Tensor | None:
        """What gradients are multiplied by: as clip_grad_norm_, but NaN stays NaN."""
        if max_grad_norm is None or math.isinf(max_grad_norm):
            return None
        coefficient = max_grad_norm / (self.norm + 1e-6)
        return torch.where(coefficient >= 1, torch.ones_like(coefficient), coefficient)

    def skip(self, found_inf: Any) -> torch.Tensor:
        """Not 0 if either says so."""
        if found_inf is None:
            return self.nonfinite
        return self.nonfinite + (torch.as_tensor(found_inf, device=self.nonfinite.device).reshape(()) != 0)


def is_sharded(pairs: Pairs) -> bool:
    return any(is_dtensor(p) for p, _ in pairs)


def _sums(pairs):
    """(sum of squares, number of tensors that are not finite)."""
    parts: dict[tuple, list] = {}
    for p, grad in pairs:
        part = parts.setdefault(_division(p), [local(p).device])
        if grad is not None:
            part.append(_values(grad))
    device = next(iter(parts.values()))[0]
    total = _new_sum(device)
    for (mesh, dimensions), (home, *grads) in parts.items():
        share = _new_sum(home)
        for one in _sums_here(grads):
            share += one.to(share)
        for dimension in dimensions:
            torch.distributed.all_reduce(share, group=mesh.get_group(dimension))
        total += share.to(total)
    return total


def _division(p):
    """The mesh a parameter is divided on, and along which of its dimensions."""
    if not is_dtensor(p) or p.device_mesh.get_coordinate() is None:
        return None, ()
    sharded = tuple(at for at, placement in enumerate(p.placements) if not placement.is_replicate())
    return (p.device_mesh, sharded) if sharded else (None, ())


def _values(grad):
    if grad.layout is torch.sparse_coo:
        grad = grad.coalesce().values()
    grad = local(grad.detach())
    return torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad


def _new_sum(device):
    return torch.zeros(2, dtype=sum_dtype(device), device=device)


def sum_dtype(device):
    return torch.float32 if device.type == "mps" else torch.float64  # which has no other


def _sums_here(grads) -> Iterator[torch.Tensor]:
    alike: dict[tuple, list] = {}
    for grad in grads:
        alike.setdefault((grad.device, grad.dtype, type(grad)), []).append(grad)
    for (device, dtype, kind), tensors in alike.items():
        wide = sum_dtype(device)
        if kind in (torch.Tensor, torch.nn.Parameter):
            norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=wide))
        else:
            norms = torch.stack([whole(torch.linalg.vector_norm(tensor)).to(wide) for tensor in tensors])
        finite = norms.isfinite()
        if dtype == torch.float64:  # its squares may be infinite where it is not
            finite = torch.stack([tensor.isfinite().all() for tensor in tensors])
        yield torch.stack([norms.square().sum(), finite.logical_not().sum().to(wide)])
