# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m fusestep demo`, run for real, and the traps of its story one by one."""

import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import fusestep
import support
from fusestep import demo
from fusestep.__main__ import main

PACKAGE = pathlib.Path(fusestep.__file__).parent


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "80"}
    command = [sys.executable, "-m", "fusestep", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


# ---- all of it ---------------------------------------------------------------------------------


def test_demo(tmp_path):
    """The default: what it prints is what it promises, and the page needs nothing else."""
    done = run("--quick", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bars: stderr is no terminal
    assert "ValueError: loaded state dict has a different number of parameter groups" in done.stdout
    assert re.search(r"^    matching    2     head.weight, head.bias$", done.stdout, re.MULTILINE)
    assert re.search(
        r"\nGood: losses differ by [^\n]+\n[^\n]+\n[0-9.]+ s, report: build/demo/report.html\n\Z", done.stdout
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
    out = tmp_path / "build" / "demo"
    for phase in demo.PHASES:
        assert {f"{phase}.png", f"{phase}.svg", f"{phase}.json"} <= {path.name for path in out.iterdir()}
    _assert_self_contained((out / "report.html").read_text(encoding="utf-8"))
    records = [json.loads((out / f"{phase}.json").read_text()) for phase in demo.PHASES]
    assert all(0 < record["difference"] <= 1e-3 for record in records)  # not 0: two programs have run


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", demo.OPTIMIZERS)
def test_every_optimizer(optimizer, tmp_path):
    done = run("--optimizer", optimizer, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)
    assert results["good"] and results["seconds"] < 600
    assert all(difference <= 1e-3 for difference in results["largest_loss_difference"].values())


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources, self.counts = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _assert_self_contained(text):
    page = _Page()
    page.feed(text)
    assert page.open == [] and page.counts["img"] == 3 and page.counts["table"] >= 6
    assert page.counts.keys().isdisjoint(("script", "link", "iframe"))
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "url(" not in text and "@import" not in text


# ---- when it is not good -----------------------------------------------------------------------


def _record(difference=1e-6, accuracies=(0.98, 0.98)):
    history = {library: {"accuracy": [a]} for library, a in zip(("fusestep", "torch"), accuracies, strict=True)}
    return {"phase": "finetune", "difference": difference, "history": history}


@pytest.mark.parametrize(
    ("record", "good"),
    [
        (_record(), True),
        (_record(difference=1.001e-3), False),
        (_record(difference=float("nan")), False),
        (_record(accuracies=(0.98, 0.976)), True),
        (_record(accuracies=(0.98, 0.974)), False),
        (_record(accuracies=(0.5, 0.5)), False),
    ],
)
def test_bounds(record, good):
    from fusestep.demo.run import _results

    assert _results([record])["good"] == good


def test_exit_code_tells(monkeypatch):
    from fusestep.demo import run as module

    monkeypatch.setattr(module, "run", lambda options, say: {"good": False})
    assert main(["demo"]) == 1


def test_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDED", {"torch": "torch", "no_such_module": "scikit-learn"})
    assert main(["demo"]) == 2
    expected = "python -m fusestep demo: needs scikit-learn: pip install fusestep[demo]\n"
    assert capsys.readouterr() == ("", expected)


# ---- the traps of its story --------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def stepped(optimizer, net, times, scheduler=None):
    for seed in range(times):
        support.set_grads([p for p in net.parameters() if p.requires_grad], seed)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return optimizer


def test_head_only_checkpoint_into_the_full_optimizer(name, tmp_path):
    """torch refuses, or takes state for the wrong parameters; load puts it where its name says."""
    net = model()
    settings = {"lr": 0.01, **support.FULLEST[name]}
    head = support.ours(name)([(f"1.{key}", p) for key, p in net[1].named_parameters()], **settings)
    stepped(head, net, 3)
    head.save(tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="parameter group"):
        support.theirs(name)(net.named_parameters(), **settings).load_state_dict(head.state_dict())

    full = support.ours(name)(net.named_parameters(), **settings)
    with pytest.raises(fusestep.LoadError, match=r"(?s)nothing was loaded.*missing +2 +0.weight, 0.bias"):
        full.load(tmp_path / "head.safetensors")
    assert not full.state
    report = full.load(tmp_path / "head.safetensors", strict=False, what="state")
    assert (report.loaded, report.missing) == (["1.weight", "1.bias"], ["0.weight", "0.bias"])
    for p in net[1].parameters():
        support.assert_bits(dict(full.state[p]), dict(head.state[p]))
    assert net[0].weight not in full.state
    stepped(full, net, 1)
    if name != "SGD":
        assert [int(full.state[p]["step"]) for p in net.parameters()] == [1, 1, 4, 4]


def test_checkpoint_of_another_model_is_refused_with_names(name, tmp_path):
    settings, net = {"lr": 0.01, **support.STATEFUL[name]}, model()
    optimizer = stepped(support.ours(name)(net.named_parameters(), **settings), net, 1)
    optimizer.save(tmp_path / "one.safetensors")
    other = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(3, 2, bias=False))
    other.add_module("norm", torch.nn.LayerNorm(2))
    full = support.ours(name)(other.named_parameters(), **settings)
    with pytest.raises(fusestep.LoadError) as refused:
        full.load(tmp_path / "one.safetensors")
    report = refused.value.report
    assert (report.missing, report.unexpected) == (["norm.weight", "norm.bias"], ["1.bias"])
    assert [(row.name, row.what) for row in report.mismatched] == [("0.weight", "shape"), ("0.bias", "shape")]
    assert "0.weight shape saved [3, 4] here [5, 4]" in str(refused.value)
    assert not full.state


def test_steplr_through_freeze_save_load_and_thaw(tmp_path):
    """The rates of one run, and of one that was saved and went on in a new optimizer, are the same."""

    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)

    def rates(optimizer):
        return [group["lr"] for group in optimizer.param_groups]

    def first_half():
        net = model()
        optimizer = fusestep.optim.AdamW(net.named_parameters(), lr=0.1)
        scheduler = schedule(optimizer)
        optimizer.freeze("0")
        return net, stepped(optimizer, net, 4, scheduler), scheduler

    def second_half(net, optimizer, scheduler):
        seen = [rates(optimizer)]
        optimizer.thaw("0", lr=0.01, scheduler=scheduler)
        for _ in range(4):
            stepped(optimizer, net, 1, scheduler)
            seen.append(rates(optimizer))
        return seen

    net, optimizer, scheduler = first_half()
    optimizer.save(tmp_path / "half.safetensors", values=True, metadata={"scheduler": scheduler.state_dict()})
    expected = second_half(net, optimizer, scheduler)
    assert expected == [[0.05], [0.05, 0.01], *[[0.025, 0.005]] * 3]

    again = model()
    loaded = fusestep.optim.AdamW(again.named_parameters(), lr=0.7)
    report = loaded.load(tmp_path / "half.safetensors")
    assert [p.requires_grad for p in again.parameters()] == [False, False, True, True]
    resumed = schedule(loaded)
    resumed.load_state_dict(report.metadata["scheduler"])
    assert second_half(again, loaded, resumed) == expected
    support.assert_bits(support.all_state(loaded), support.all_state(optimizer))
