# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning in three phases, with fusestep and with torch.optim.

`pretrain` and `train_head` are the same code for both: `optim` is one of the two modules. The third
phase is another one for torch, which cannot load the checkpoint of the second.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field
from typing import Any

import torch

import fusestep.optim
from fusestep import History

from .digits import Network, fit, load_digits


@dataclass(frozen=True)
class Rule:
    """A class of torch.optim and of fusestep.optim, and settings for it."""

    name: str
    lr: float
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self, optim, params, lr=None):
        return getattr(optim, self.name)(params, lr=lr or self.lr, **self.settings)


RULES = {
    "adamw": Rule("AdamW", 2e-3),
    "adam": Rule("Adam", 2e-3),
    "amsgrad": Rule("Adam", 2e-3, {"amsgrad": True}),
    "sgd": Rule("SGD", 2e-2, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": Rule("RMSprop", 5e-4),
}


LOADED = "What fusestep loads, by name"
REFUSED = "What torch's load_state_dict says to the checkpoint of the head"


@dataclass
class Run:
    """One phase with one of the libraries.

    `losses` are those of all steps, `notes` what there is to tell besides: a heading, and something to print.
    """

    history: History
    losses: list[float]
    notes: list[tuple[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What a phase is to be run with."""

    rule: Rule
    device: torch.device
    folder: pathlib.Path  # for checkpoints
    epochs: int

    def schedule(self, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=max(self.epochs // 2, 1), gamma=0.5)


# ---- 1: all of the network, digits 0 to 4 ------------------------------------------------------


def pretrain(optim, setting: Setting, title: str) -> Run:
    torch.manual_seed(1)
    model = Network().to(setting.device)
    optimizer = setting.rule.make(optim, model.named_parameters())
    digits = load_digits(0, 4, setting.device)
    run = Run(*fit(model, optimizer, setting.schedule(optimizer), digits, setting.epochs, title))
    torch.save(model.state_dict(), setting.folder / "pretrained.pt")
    return run


# ---- 2: a new head for digits 5 to 9; the backbone is frozen -----------------------------------


def train_head(optim, setting: Setting, title: str) -> Run:
    model = Network().to(setting.device)
    model.load_state_dict(torch.load(setting.folder / "pretrained.pt", weights_only=True))
    torch.manual_seed(2)
    model.head = torch.nn.Linear(model.head.in_features, 5).to(setting.device)

    fusestep.optim.freeze("backbone", model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = setting.rule.make(optim, trained)
    digits = load_digits(5, 9, setting.device)
    run = Run(*fit(model, optimizer, setting.schedule(optimizer), digits, setting.epochs, title))

    torch.save(model.state_dict(), setting.folder / "head.pt")
    if optim is fusestep.optim:
        metadata = {"train_mode": "head only", "epochs": setting.epochs}
        optimizer.save(setting.folder / "head.safetensors", metadata=metadata)
    else:
        torch.save({"optimizer": optimizer.state_dict()}, setting.folder / "head-optimizer.pt")
    return run


# ---- 3: in a new process, all of it again; the backbone with a tenth of the rate ---------------


def finetune(optim, setting: Setting, title: str) -> Run:
    model = Network().to(setting.device)
    model.load_state_dict(torch.load(setting.folder / "head.pt", weights_only=True))
    go_on = _go_on_with_fusestep if optim is fusestep.optim else _go_on_with_torch
    optimizer, scheduler, notes = go_on(model, setting)
    digits = load_digits(5, 9, setting.device)
    run = Run(*fit(model, optimizer, scheduler, digits, setting.epochs, title), notes)
    if optim is fusestep.optim:
        optimizer.save(setting.folder / "all.safetensors", metadata={"train_mode": "all"})
    return run


def _go_on_with_fusestep(model, setting):
    lr = setting.rule.lr / 2
    optimizer = setting.rule.make(fusestep.optim, model.named_parameters(), lr)
    scheduler = setting.schedule(optimizer)
    report = optimizer.load(setting.folder / "head.safetensors", strict=False, what="state")

    if report.metadata["train_mode"] == "head only":
        optimizer.freeze("backbone")
        model.backbone.eval()
    before = optimizer.summary(model)
    optimizer.thaw("backbone", lr=lr / 10, scheduler=scheduler)  # into a group of its own
    model.backbone.train()
    after = optimizer.summary(model)
    notes = [(LOADED, report), ("The optimizer before the backbone thaws", before), ("The optimizer after it", after)]
    return optimizer, scheduler, notes


def _go_on_with_torch(model, setting):
    lr = setting.rule.lr / 2
    groups = [
        {"params": list(model.head.named_parameters(prefix="head"))},
        {"params": list(model.backbone.named_parameters(prefix="backbone")), "lr": lr / 10},
    ]
    optimizer = setting.rule.make(torch.optim, groups, lr)
    saved = torch.load(setting.folder / "head-optimizer.pt", weights_only=True)["optimizer"]
    try:
        optimizer.load_state_dict(saved)
        said = "nothing, it loads by now"
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    _transplant(saved, optimizer)
    return optimizer, setting.schedule(optimizer), [(REFUSED, said)]


def _transplant(saved, optimizer):
    """By hand what torch does not do: each parameter gets the state that was saved under its name."""
    by_name = {
        name: saved["state"][index]
        for group in saved["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if name in by_name:
                optimizer.state[p] = by_name[name]
