# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Training to the end: 10,000 steps in each dtype, and digits under autocast and GradScaler."""

import pathlib
import sys

import pytest
import torch

import fusestep
import support

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench" / "python"))
import long_runs

pytestmark = pytest.mark.on_cpu

# The last loss, as multiples of the float32 run's.
ARRIVES = {
    "float32, bf16 state": (0, 2),
    "float32, bf16 state, stochastic": (0, 2),
    "bf16": (50, 1e9),
    "bf16, float32 state": (50, 1e9),
    "bf16, float32 state, stochastic": (0, 4),
    "bf16, float32 state, master weights": (0, 2),
}


@pytest.mark.parametrize("optimizer", long_runs.OPTIMIZERS)
def test_where_plain_bf16_stalls_and_what_does_not(optimizer):
    expected = long_runs.losses(optimizer, "float32")
    assert expected[-1] < expected[0] / 100
    assert ARRIVES.keys() == long_runs.RUNS.keys() - {"float32"}
    for run, (least, most) in ARRIVES.items():
        factor = long_runs.losses(optimizer, run)[-1] / expected[-1]
        assert least <= factor <= most, (run, factor)


# ---- digits ------------------------------------------------------------------------------------


def accuracy_of_digits(cls, clip, **options):
    """Of a network trained under autocast and GradScaler, whose scale is too large at first; and skipped steps."""
    digits = pytest.importorskip("fusestep.demo.digits", reason="needs scikit-learn and tqdm")
    data = digits.load_digits(0, 9, torch.device("cpu"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 10))
    optimizer = cls(model.parameters(), lr=3e-3, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=50)
    skipped = 0
    for epoch in range(12):
        for images, labels in data.batches(epoch):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            skipped += scaler.get_scale() < before
    model.eval()
    return digits.accuracy(model, data), skipped, optimizer


@pytest.mark.parametrize("keep", [False, True])
def test_digits_under_autocast_and_grad_scaler(keep):
    """As accurate as torch's class with a pass for each, within 0.5 %; steps are skipped on the way."""
    expected, _, _ = accuracy_of_digits(torch.optim.AdamW, clip=True)
    options = {"max_grad_norm": 1.0, "keep_scaled_grads": keep}
    got, skipped, optimizer = accuracy_of_digits(fusestep.optim.AdamW, clip=False, **options)
    assert expected > 0.95 and abs(got - expected) <= 0.005
    assert skipped > 0 and optimizer.skipped_steps == skipped
    support.stepped_by_us(optimizer)
