# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
import copy
import doctest
import json
import math
import pickle
import struct
import sys
import xml.etree.ElementTree

import pytest
import torch

import fusestep
import support
from fusestep import history as history_module
from fusestep import plot_history


def make(name, **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    return model, support.ours(name)(model.named_parameters(), lr=0.1, **kwargs)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(numbers, expected):
    return numbers == pytest.approx(expected, nan_ok=True, rel=1e-6)


# ---- what is recorded --------------------------------------------------------------------------


def test_values_given():
    history = fusestep.History()
    history.record(loss=1, accuracy=torch.tensor(0.5))
    history.record(loss=torch.tensor([0.5], requires_grad=True))
    history.record(loss=0.25, val_loss=2)
    assert list(history) == ["loss", "accuracy", "val_loss"]
    assert same(history["loss"], [1, 0.5, 0.25])
    assert same(history["accuracy"], [0.5, math.nan, math.nan])
    assert same(history["val_loss"], [math.nan, math.nan, 2])
    assert json.loads(json.dumps(history)).keys() == history.keys()


def test_rates_and_norms(name):
    model, optimizer = make(name)
    history = fusestep.History(optimizer, model)
    optimizer.freeze(model[0])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    norms = []
    for epoch in range(4):
        if epoch == 2:
            optimizer.thaw("0", lr=0.01)
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.ones(2, 3)).square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        optimizer.step()
        updates = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        optimizer.zero_grad()
        norms.append([norm(grads[:2]), norm(updates[:2] if epoch >= 2 else [None]), norm(grads[2:]), norm(updates[2:])])
        train(model, optimizer, steps=3)
        history.record(loss=epoch)
        scheduler.step()
    assert same(history["lr/0"], [0.1, 0.05, 0.025, 0.0125])
    assert same(history["lr/1"], [math.nan, math.nan, 0.01, 0.005])
    for index, key in enumerate(("grad_norm/0", "update_norm/0", "grad_norm/2", "update_norm/2")):
        assert same(history[key], [row[index] for row in norms]), key
    assert list(history) == ["loss", "lr/0", "grad_norm/0", "update_norm/0", "grad_norm/2", "update_norm/2", "lr/1"]
    support.stepped_by_us(optimizer, steps=16)


def norm(tensors):
    if any(t is None for t in tensors):
        return math.nan
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def test_without_names_or_norms():
    model = torch.nn.Linear(2, 2)
    for optimizer, kwargs in [
        (fusestep.optim.SGD(model.parameters(), lr=0.1), {}),
        (fusestep.optim.SGD(model.named_parameters(), lr=0.1), {"norms": False}),
    ]:
        history = fusestep.History(optimizer, **kwargs)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        history.record()
        assert history == {"lr/0": [0.1]}


def test_layers_that_no_group_holds():
    model, _ = make("SGD")
    optimizer = fusestep.optim.SGD(model[2].parameters(), lr=0.1)
    history = fusestep.History(optimizer, model)
    train(model, optimizer)  # all of the model gets gradients
    history.record()
    assert math.isnan(history["grad_norm/0"][0]) and history["grad_norm/2"][0] > 0


def test_a_skipped_step_is_not_the_sample(name):
    model, optimizer = make(name)
    history = fusestep.History(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (math.inf, 1.0):
        scaler.scale(model(torch.ones(2, 3)).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            expected = norm([p.grad for p in model[2].parameters()])  # unscaled by then
        optimizer.zero_grad()
    history.record()
    assert same(history["grad_norm/2"], [expected])
    assert history["update_norm/2"][0] > 0
    support.stepped_by_us(optimizer)


def test_does_not_change_training(name):
    runs = []
    for watched in (False, True):
        model, optimizer = make(name)
        history = fusestep.History(optimizer, model) if watched else None
        for _ in range(3):
            train(model, optimizer, 2)
            if watched:
                history.record()
        support.stepped_by_us(optimizer, steps=6)
        runs.append(support.snapshot(optimizer))
    support.assert_bits(*runs)


def test_an_epoch_without_a_step():
    model, optimizer = make("SGD")
    history = fusestep.History(optimizer, model)
    train(model, optimizer)
    history.record()
    history.record()
    assert history["grad_norm/2"][0] > 0 and math.isnan(history["grad_norm/2"][1])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["deepcopy", "pickle"])
def test_copies_are_plain_dicts(copier):
    model, optimizer = make("SGD")
    history = fusestep.History(optimizer, model)
    history.record(loss=1)
    copied = copier(history)
    assert type(copied) is dict and copied == dict(history) == {"loss": [1.0], "lr/0": [0.1]}
    assert copied["loss"] is not history["loss"]


# ---- the picture -------------------------------------------------------------------------------


def layers(count):
    return {f"{kind}_norm/layer{i}": [0.1 * i + 0.1, 1.0] for i in range(count) for kind in ("grad", "update")}


# description: (history, titles of the panels, with the number of curves in each)
PANELS = {
    "a loss": ({"loss": [1.0, 0.5]}, {"Loss": 1}),
    "losses and accuracies": (
        {"train_loss": [1.0, 0.5], "Loss/val": [2.0, 3.0], "acc": [0.0, 1.0], "top5_accuracy": [0.5, 1.0]},
        {"Loss": 2, "Accuracy": 2},
    ),
    "other values": ({"perplexity": [9.0, 8.0], "loss": [1.0, 0.5]}, {"Loss": 1, "Other values": 1}),
    "rates": ({"lr/0": [0.1, 0.01], "lr/1": [math.nan, 1e-5]}, {"Learning rate": 2}),
    "norms": (layers(3), {"Gradient norm of a step": 3, "Update norm of a step": 3}),
    "many layers": (
        {"loss": [1.0, 2.0], **layers(40)},
        {"Loss": 1, "Gradient norm of a step": 40, "Update norm of a step": 40},
    ),
    "a layer that never stepped": ({"grad_norm/a": [math.nan], "grad_norm/b": [1.0]}, {"Gradient norm of a step": 1}),
    "one record": ({"loss": [0.5]}, {"Loss": 1}),
    "zeros": ({"lr/0": [0.0, 0.1]}, {"Learning rate": 1}),
    "diverged": ({"loss": [1.0, math.inf, math.nan]}, {"Loss": 1}),
    "epochs of its own": ({"epoch": [10, 20], "loss": [1.0, 0.5]}, {"Loss": 1}),
}


@pytest.mark.parametrize("case", PANELS)
def test_plot(case, tmp_path, monkeypatch):
    history, expected = PANELS[case]
    figures = []
    make_figure = history_module._figure
    monkeypatch.setattr(history_module, "_figure", lambda *args: figures.append(make_figure(*args)) or figures[-1])
    files = plot_history(history, tmp_path / "new" / "run")
    assert files == [tmp_path / "new" / "run.png", tmp_path / "new" / "run.svg"]
    content = files[0].read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 900 and height >= 500
    assert xml.etree.ElementTree.parse(files[1]).getroot().tag.endswith("svg")
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes if axes.lines}
    assert {title: len(axes.lines) for title, axes in panels.items()} == expected
    for axes in panels.values():
        for line in axes.lines:
            assert list(line.get_xdata()) == list(history.get("epoch", range(1, len(line.get_xdata()) + 1)))
        named = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else None
        assert named is None if len(axes.lines) > 8 else named == [line.get_label() for line in axes.lines]


def test_scales():
    panels = history_module._panels({"lr/0": [1e-1, 1e-4], "loss": [1.0, 0.5], "acc": [0.01, 0.9]})
    scales = {axes.get_title(loc="left"): axes.get_yscale() for axes in history_module._figure(panels, None).axes}
    assert scales == {"Loss": "linear", "Accuracy": "linear", "Learning rate": "log"}
    panels = history_module._panels({"lr/0": [0.0, 0.1]})  # which a logarithm would hide
    assert [axes.get_yscale() for axes in history_module._figure(panels, None).axes] == ["linear"]


@pytest.mark.parametrize(("given", "stem"), [("a.png", "a"), ("a.svg", "a"), ("a", "a"), ("v0.1", "v0.1")])
def test_names_of_the_files(given, stem, tmp_path):
    files = plot_history({"loss": [1.0]}, str(tmp_path / given))
    assert [file.name for file in files] == [f"{stem}.png", f"{stem}.svg"] and all(file.exists() for file in files)


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"epoch": [1]}, fusestep.History()])
def test_nothing_to_plot(history, tmp_path):
    with pytest.raises(ValueError, match="the history is empty: nothing to plot"):
        plot_history(history, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^plot_history needs matplotlib: pip install fusestep\[plot\]$"):
        plot_history({"loss": [1.0]}, tmp_path / "a")


def test_docstring_example():
    assert doctest.testmod(history_module).failed == 0
