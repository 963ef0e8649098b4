# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""10,000 steps with each option of mixed precision: where plain bfloat16 stalls, and what does not.

The loss is half the squared distance to a target, its gradient noisy as that of a batch is. Parameters are
between 1 and 2, where bfloat16 numbers are 2^-7 apart, so that a step of less than 2^-8 is rounded away.

    python bench/python/long_runs.py docs/mixed_precision.svg
"""

import sys

import torch

import fusestep

STEPS = 10_000
EVERY = 50  # steps between two points of a curve
SIZE = 256

F32, BF16 = torch.float32, torch.bfloat16
# Label: dtype of the parameters, options.
RUNS = {
    "float32": (F32, {}),
    "float32, bf16 state": (F32, {"state_dtype": BF16}),
    "float32, bf16 state, stochastic": (F32, {"state_dtype": BF16, "rounding": "stochastic"}),
    "bf16": (BF16, {}),
    "bf16, float32 state": (BF16, {"state_dtype": F32}),
    "bf16, float32 state, stochastic": (BF16, {"state_dtype": F32, "rounding": "stochastic"}),
    "bf16, float32 state, master weights": (BF16, {"state_dtype": F32, "master_weights": True}),
}
OPTIMIZERS = {
    "Adam, lr 1e-4": (fusestep.optim.Adam, {"lr": 1e-4}),
    "SGD, lr 3e-4, momentum 0.5": (fusestep.optim.SGD, {"lr": 3e-4, "momentum": 0.5}),
}


def losses(optimizer: str, run: str, steps: int = STEPS) -> list[float]:
    """The mean loss of the parameters as they are stored, every EVERY steps."""
    cls, settings = OPTIMIZERS[optimizer]
    dtype, options = RUNS[run]
    random = torch.Generator().manual_seed(0)
    target = 1.25 + 0.5 * torch.rand(SIZE, generator=random)
    noise = 0.1 * torch.randn(100, SIZE, generator=random)
    p = torch.nn.Parameter((target + 0.25 * torch.randn(SIZE, generator=random).clamp(-1, 1)).to(dtype))
    optimizer = cls([p], **settings, **options)
    found = []
    for step in range(steps):
        gradient = p.detach() - target
        if step % EVERY == 0:
            found.append(gradient.square().mean().item() / 2)
        p.grad = gradient.add_(noise[step % len(noise)]).to(dtype)
        optimizer.step()
    return [*found, (p.detach() - target).square().mean().item() / 2]


def plot(path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fusestep"  # the same file from the same curves
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(OPTIMIZERS), figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, optimizer in zip(axes, OPTIMIZERS, strict=True):
        for run in RUNS:
            found = losses(optimizer, run)
            axis.plot([EVERY * i for i in range(len(found))], found, label=run, linewidth=1.2)
            print(f"{optimizer:28} {run:38} {found[-1]:.2e}")
        axis.set(title=optimizer, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss of the stored parameters")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    plot(sys.argv[1])
