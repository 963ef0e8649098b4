# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""The machinery of the tests: cases, twins of tensors, runs side by side, comparisons."""

import copy
import sys
import types
import unittest

import pytest
import torch

import device
import fusestep
from fusestep import _core

# torch's lists of optimizer inputs import torch's test utilities, which want this package.
if "expecttest" not in sys.modules:
    try:
        import expecttest  # noqa: F401
    except ImportError:
        stub = types.ModuleType("expecttest")
        stub.TestCase = type("TestCase", (unittest.TestCase,), {})
        sys.modules["expecttest"] = stub

from torch.testing._internal import common_optimizers  # noqa: E402

NAMES = ("Adam", "AdamW", "SGD", "RMSprop")
STATEFUL = {"Adam": {}, "AdamW": {}, "SGD": {"momentum": 0.9}, "RMSprop": {}}
# Of every rule the variant with the most slots.
FULLEST = {
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "SGD": {"momentum": 0.9, "dampening": 0.5},
    "RMSprop": {"momentum": 0.1, "centered": True},
}

needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype"
)


def ours(name):
    return getattr(fusestep.optim, name)


def theirs(name):
    return getattr(torch.optim, name)


def torch_inputs(name):
    """(description, kwargs) of every input torch lists, for any device; `capturable` is CUDA's alone."""
    listed = getattr(common_optimizers, f"optim_inputs_func_{name.lower()}")
    seen = []
    for given in listed("cpu") + listed("cuda"):
        kwargs = {key: value for key, value in given.kwargs.items() if key not in ("capturable", "fused", "foreach")}
        if repr(kwargs) not in [repr(other) for _, other in seen]:
            seen.append((" ".join(f"{key}={value}" for key, value in kwargs.items()) or "default", kwargs))
    return seen


def as_numbers(kwargs):
    """Tensor hyperparameters as doubles: torch's loop computes bias corrections in their float32."""

    def number(value):
        return tuple(map(number, value)) if isinstance(value, tuple) else float(value)

    return {key: value if isinstance(value, bool) else number(value) for key, value in kwargs.items()}


def error_inputs(name):
    """torch's wrong arguments: (constructor arguments, error type, regular expression)."""
    return getattr(common_optimizers, f"optim_error_inputs_func_{name.lower()}")("cpu", torch.float32)


def tensors(*shapes, dtype=torch.float32, seed=0):
    random = torch.Generator("cpu").manual_seed(seed)
    values = [torch.randn(shape, generator=random, dtype=dtype, device="cpu") for shape in shapes]
    return [torch.nn.Parameter(value.to(device.DEFAULT)) for value in values]


def of_inference_mode(p):
    """A frozen copy that torch writes under inference_mode alone."""
    with torch.inference_mode():
        return torch.nn.Parameter(p.detach().clone(), requires_grad=False)


def twins(parameters, dtype=None):
    return [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in parameters]


def scaler(scale):
    return torch.amp.GradScaler(device.DEFAULT.type, init_scale=scale)


def set_grads(parameters, seed, scale=1.0):
    random = torch.Generator("cpu").manual_seed(seed)
    for p in parameters:
        wide = torch.complex128 if p.dtype.is_complex else torch.float64
        grad = torch.randn(p.shape, generator=random, dtype=wide, device="cpu") * scale
        p.grad = device.beside(p, grad.to(p.dtype))


def give_same_grads(source, target):
    for p, q in zip(source, target, strict=True):
        q.grad = None if p.grad is None else device.beside(q, p.grad.detach().clone().to(q.dtype))


def stepped_by_us(optimizer, steps=None, parameters=None):
    """Asserts, by the private counter, that it was the engine that stepped."""
    stepper = optimizer._stepper
    assert isinstance(stepper, _core.TorchStepper)
    assert stepper.steps > 0 if steps is None else stepper.steps == steps
    if parameters is not None:
        assert stepper.stepped == parameters


def through_methods(optimizer):
    """Makes it read tensors through their methods, as it does where torch has no C interface."""
    optimizer._stepper_of_this_process = _core.TorchStepper(optimizer._rule, object)
    return optimizer


def all_state(optimizer):
    """(parameter index, name) to tensor or number; ("group", index, "params") for the values."""
    found = {}
    index = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            found[index, "value"] = p.detach()
            for name, value in optimizer.state.get(p, {}).items():
                found[index, name] = value
            index += 1
    return found


def snapshot(optimizer):
    return copy.deepcopy(all_state(optimizer))


def assert_bits(got, expected):
    """Equal bits, or NaN on both sides, in every value and state."""
    assert got.keys() == expected.keys()
    for key in expected:
        x, y = (torch.as_tensor(side[key]).cpu() for side in (got, expected))
        assert x.dtype == y.dtype and x.shape == y.shape, key
        assert torch.equal(torch.nan_to_num(x, nan=7.25), torch.nan_to_num(y, nan=7.25)), key


def ulps_of_fused(torchs):
    """What moving averages of torch's optimizer may be off by besides, in all.

    torch's fused Adam takes the betas for CUDA in float32 and 1 - beta from that: with 0.999 it is 1.3e-5 of itself
    too small, and exp_avg_sq with it, however many steps it makes.
    """
    betas = [
        beta
        for group in torchs.param_groups
        if group.get("fused") and any(p.is_cuda for p in group["params"])
        for beta in group.get("betas", ())
    ]
    return max((abs(float(torch.tensor(b, device="cpu")) - b) / (1 - b) * 2.0**23 for b in betas), default=0.0)


def assert_close(got, expected, steps, ulps=4.0, weight=None, ulps_of_averages=0.0):
    """Every tensor within `ulps` units in the last place of its largest element, for each step.

    One unit for each rounding of a step that torch and we may do differently: the products and sums
    of the moving averages, the root, the quotient, the update. float64 is allowed 1e-12 in all.
    weight: (key, tensor) to a factor by element, for differences a rule amplifies.
    ulps_of_averages: allowed besides, in all steps together: ulps_of_fused.
    """
    assert got.keys() == expected.keys()
    for key in expected:
        x, y = (torch.as_tensor(side[key]).cpu() for side in (got, expected))
        assert x.dtype == y.dtype and x.shape == y.shape, (key, x.dtype, y.dtype)
        if y.numel() == 0:
            continue
        single = y.dtype in (torch.float32, torch.complex64)
        further = ulps_of_averages if "exp_avg" in str(key) else 0.0
        relative = (ulps * steps + further) * 2.0**-23 if single else 1e-12
        bound = relative * y.abs().max().item()
        excess = (x - y).abs()
        if weight is not None:
            excess = excess / weight(key, y).cpu()
        assert excess.max().item() <= bound, f"{key}: {excess.max().item()} > {bound}"
