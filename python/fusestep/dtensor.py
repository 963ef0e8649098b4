# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors that stand for others: torch's DTensor, of which every rank holds a part."""

import sys

import torch

_PLAIN = (type(None), torch.Tensor, torch.nn.Parameter)


def dtensor_class():
    """torch's class, or None where nobody has imported it: then no tensor is one."""
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):  # the second before torch 2.5
        found = getattr(sys.modules.get(name), "DTensor", None)
        if found is not None:
            return found
    return None


def is_dtensor(tensor):
    if type(tensor) in _PLAIN:
        return False
    known = dtensor_class()
    return known is not None and isinstance(tensor, known)


def local(tensor):
    """Of a DTensor the part on this rank, of any other tensor itself; a collective under way is waited for."""
    if is_dtensor(tensor):
        tensor = tensor._local_tensor
    # Of AsyncCollectiveTensor, which torch names so itself where it cannot import it.
    wait = getattr(tensor, "trigger_wait", None)
    return tensor if wait is None else wait()


def whole(number):
    """A DTensor of one element as a plain tensor. A collective on all ranks if parts have to be summed."""
    return number.full_tensor() if is_dtensor(number) else number


def placed_alike(p, tensor):
    """Whether local parts are the same elements of the whole."""
    if not is_dtensor(p) or not is_dtensor(tensor):
        return is_dtensor(p) == is_dtensor(tensor)
    return same_mesh(p, tensor) and p.placements == tensor.placements


def same_mesh(p, tensor):
    if not is_dtensor(p) or not is_dtensor(tensor):
        return is_dtensor(p) == is_dtensor(tensor)
    return p.device_mesh == tensor.device_mesh


def grad_placed_as(p):
    """The gradient where its parameter is: a partial sum is reduced, another sharding exchanged.

    A collective. All ranks come here in the order of parameters, since placements are the same on all.
    """
    if placed_alike(p, p.grad):
        return p.grad
    return p.grad.redistribute(placements=p.placements)
