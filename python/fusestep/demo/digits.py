# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits, a small network for them, and an ordinary training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sklearn.datasets
import sklearn.model_selection
import torch
from tqdm import tqdm

from fusestep import History

BATCH = 32


@dataclass(frozen=True)
class Digits:
    """Images [count, 1, 8, 8] from 0 to 1, and labels that begin with 0."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """In an order that depends on the epoch alone."""
        order = torch.randperm(len(self.labels), generator=torch.Generator("cpu").manual_seed(epoch), device="cpu")
        for chosen in order.to(self.labels.device).split(BATCH):
            yield self.images[chosen], self.labels[chosen]


def load_digits(first: int, last: int, device: torch.device) -> Digits:
    """Those from `first` to `last` of the 1797 that scikit-learn ships; a third of them is for testing."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    wanted = (first <= labels) & (labels <= last)
    x = torch.tensor(images[wanted] / 16, dtype=torch.float32, device="cpu").reshape(-1, 1, 8, 8)
    y = torch.tensor(labels[wanted] - first, device="cpu")
    train, test = sklearn.model_selection.train_test_split(range(len(y)), test_size=1 / 3, random_state=0, stratify=y)
    return Digits(*(part.to(device) for part in (x[train], y[train], x[test], y[test])))


class Network(torch.nn.Module):
    """Smooth throughout: at a kink, of ReLU say, rounding alone decides which gradient there is."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16), torch.nn.GELU()),
            *(torch.nn.Conv2d(16, 32, 3, padding=1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.GELU()),
            *(torch.nn.AvgPool2d(2), torch.nn.Flatten()),
        )
        self.head = torch.nn.Linear(32 * 4 * 4, 5)

    def forward(self, images):
        return self.head(self.backbone(images))


def fit(model, optimizer, scheduler, digits: Digits, epochs: int, title: str) -> tuple[History, list[float]]:
    """Trains, and returns what happened in every epoch and the loss of every step."""
    history, losses = History(optimizer, model), []
    for epoch in tqdm(range(epochs), title, unit="epoch", leave=False, disable=None):
        _set_mode(model)
        for images, labels in digits.batches(epoch):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        steps = len(losses) // (epoch + 1)
        history.record(loss=torch.stack(losses[-steps:]).mean(), accuracy=accuracy(model, digits))
        scheduler.step()
    return history, torch.stack(losses).tolist()


def _set_mode(model):
    """What is frozen is not in training mode, or the running statistics of its normalisations change."""
    for part in model.children():
        part.train(any(p.requires_grad for p in part.parameters()))


@torch.no_grad()
def accuracy(model: torch.nn.Module, digits: Digits) -> float:
    """On the images kept for testing, from 0 to 1."""
    model.eval()
    return (model(digits.test_images).argmax(1) == digits.test_labels).float().mean().item()
