# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Files that earlier versions have written load with the numbers they were written with.

golden/checkpoint-v1-*.safetensors are of version 0.1.0, and are never written again: a version that
changes the format adds files of its own. `python test_old_checkpoints.py FOLDER` writes this version's.
"""

import pathlib
import sys
import zlib

import numpy
import pytest
import torch

import fusestep
import support

pytestmark = pytest.mark.on_cpu

GOLDEN = pathlib.Path(__file__).parent / "golden"
# dtype, shape, dtype of the state, step count or None: never stepped.
PARAMETERS = {
    "stem.weight": (torch.float32, (2, 3), torch.float32, 7),
    "stem.bias": (torch.bfloat16, (2,), torch.float32, 7),
    "head/γ": (torch.float64, (3,), torch.float64, 5),
    "head.phase": (torch.complex64, (2,), torch.complex64, 7),
    "head.scale": (torch.float16, (), torch.float16, 2**24 + 2),
    "frozen": (torch.float32, (2, 2), torch.float32, 3),
    "unused": (torch.float32, (2,), None, None),
    "empty": (torch.float32, (0, 2), torch.float32, 1),
}
HEAD = ("head/γ", "head.phase", "head.scale")
SLOTS = {
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "SGD": ("momentum_buffer",),
    "RMSprop": ("square_avg", "momentum_buffer", "grad_avg"),
}
SETTINGS = {
    "Adam": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.25, "amsgrad": True},
    "AdamW": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.25, "amsgrad": True},
    "SGD": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.25, "maximize": True},
    "RMSprop": {"alpha": 0.75, "eps": 1e-6, "momentum": 0.5, "centered": True},
}
METADATA = {"epoch": 3, "commit": "0a1b2c", "nested": {"a": [1, None, "ü"]}, "looks like a number": "12"}


def numbers(name, slot, dtype, shape):
    """Exact in every dtype."""
    count = numpy.prod(shape, dtype=int)
    first = zlib.crc32(f"{name}/{slot}".encode()) % 8
    values = (first + torch.arange(count, dtype=torch.float64, device="cpu").reshape(shape)) / 4
    return torch.complex(values, -values / 2).to(dtype) if dtype.is_complex else values.to(dtype)


def parameters(value=None):
    return {
        key: torch.nn.Parameter(torch.zeros(shape, dtype=dtype) if value is None else value(key, "value", dtype, shape))
        for key, (dtype, shape, _, _) in PARAMETERS.items()
    }


def optimizer_of(rule, by_name, order, **settings):
    groups = [
        {"params": [(key, by_name[key]) for key in order if key not in HEAD], "name": "body"},
        {"params": [(key, by_name[key]) for key in order if key in HEAD], "name": "head"},
    ]
    return support.ours(rule)(groups, **settings)


def write(folder):
    for rule in support.NAMES:
        by_name = parameters(numbers)
        optimizer = optimizer_of(rule, by_name, PARAMETERS, **SETTINGS[rule], lr=0.125)
        optimizer.param_groups[1].update(lr=0.0625, initial_lr=0.5, layers=(3, "last"))
        for key, (_, shape, dtype, count) in PARAMETERS.items():
            if dtype is not None:
                step = {} if rule == "SGD" else {"step": torch.tensor(float(count))}
                optimizer.state[by_name[key]] = step | {slot: numbers(key, slot, dtype, shape) for slot in SLOTS[rule]}
        by_name["frozen"].requires_grad_(False)
        optimizer.save(pathlib.Path(folder) / f"checkpoint-v1-{rule}.safetensors", values=True, metadata=METADATA)


@pytest.mark.parametrize("version", ["v1"])
def test_loads_with_the_numbers_it_was_written_with(name, version):
    by_name = parameters()
    optimizer = optimizer_of(name, by_name, list(PARAMETERS)[::-1])
    report = optimizer.load(GOLDEN / f"checkpoint-{version}-{name}.safetensors")
    assert report.complete and sorted(report.loaded) == sorted(PARAMETERS)
    assert report.metadata == METADATA
    for key, (dtype, shape, state_dtype, count) in PARAMETERS.items():
        p = by_name[key]
        own = optimizer.state.get(p, {})
        assert torch.equal(p, numbers(key, "value", dtype, shape))
        assert p.requires_grad == (key != "frozen")
        assert set(own) - {"step"} == (set() if count is None else set(SLOTS[name])), key
        for slot in set(own) - {"step"}:
            expected = numbers(key, slot, state_dtype, shape)
            assert own[slot].dtype == state_dtype and torch.equal(own[slot], expected), (key, slot)
        if own and name != "SGD":
            assert own["step"].dtype == torch.float32 and own["step"] == count
    body, head = optimizer.param_groups
    for key, value in SETTINGS[name].items():
        assert body[key] == head[key] == value
    assert (body["lr"], head["lr"], head["initial_lr"], head["layers"]) == (0.125, 0.0625, 0.5, (3, "last"))
    assert "initial_lr" not in body
    for p in by_name.values():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    support.stepped_by_us(optimizer, steps=1, parameters=7)


@pytest.mark.parametrize("version", ["v1"])
def test_loads_into_arrays(name, version):
    known = {key: given for key, given in PARAMETERS.items() if given[0] in (torch.float32, torch.float64)}
    arrays = {key: torch.zeros(shape, dtype=dtype).numpy() for key, (dtype, shape, _, _) in known.items()}
    groups = [
        {"params": {key: array for key, array in arrays.items() if key not in HEAD}, "name": "body"},
        {"params": {key: array for key, array in arrays.items() if key in HEAD}, "name": "head"},
    ]
    optimizer = fusestep.Optimizer(name, groups)
    report = optimizer.load(GOLDEN / f"checkpoint-{version}-{name}.safetensors", strict=False)
    assert sorted(report.loaded) == sorted(known) and sorted(report.unexpected) == sorted(set(PARAMETERS) - set(known))
    for key, (dtype, shape, state_dtype, count) in known.items():
        slots = optimizer.slots(key)
        assert numpy.array_equal(arrays[key], numbers(key, "value", dtype, shape).numpy())
        assert set(slots) == (set() if count is None else set(SLOTS[name]))
        assert all(numpy.array_equal(slots[slot], numbers(key, slot, state_dtype, shape).numpy()) for slot in slots)
        assert optimizer.step_count(key) == (0 if count is None or name == "SGD" else count)
    for key, value in SETTINGS[name].items():
        found = optimizer.hyper("head")[key]
        assert (tuple(found) if key == "betas" else found) == value
    assert (optimizer.hyper("body")["lr"], optimizer.hyper("head")["lr"]) == (0.125, 0.0625)


if __name__ == "__main__":
    write(sys.argv[1])
