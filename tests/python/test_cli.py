# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m fusestep`: what it prints, says and returns; in this process, and some of it as a program."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import fusestep
import support
from fusestep.__main__ import main

PACKAGE = pathlib.Path(fusestep.__file__).parent
GOLDEN = pathlib.Path(__file__).parent / "golden"


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(64, 1024)
        self.a_module_with_rather_a_long_name = torch.nn.Linear(64, 64)
        self.head = torch.nn.Linear(1024, 10)
        for p in self.parameters():
            torch.nn.init.constant_(p, 0.5)


def step(optimizer, times, grad=0.25):
    for _ in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, grad) if p.requires_grad else None
        optimizer.step()


class NotPlain:
    """Something that weights_only refuses."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind, good and bad, with exact numbers in them."""
    folder = tmp_path_factory.mktemp("files")
    _write_ours(folder)
    _write_torchs(folder)
    save_file({"w/exp_avg": torch.ones(2, 3), "w/step": torch.tensor(7.0)}, folder / "plain.safetensors")
    save_file({"0/exp_avg": torch.ones(2)}, folder / "numbered.safetensors")
    weights = {"head.weight": torch.ones(10, 1024, dtype=torch.bfloat16), "head.bias": torch.ones(10)}
    save_file(weights, folder / "weights.safetensors", metadata={"format": "pt"})
    (folder / "note.txt").write_text("not a file of tensors, but long enough to have a header's length\n")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "cut.safetensors").write_bytes((folder / "head.safetensors").read_bytes()[:5000])
    (folder / "cut.pt").write_bytes((folder / "nameless.pt").read_bytes()[:1000])
    damaged = bytearray((folder / "head.safetensors").read_bytes())
    damaged[-100] ^= 1
    (folder / "damaged.safetensors").write_bytes(damaged)
    (folder / "names.txt").write_text("weight\nbias\n")
    (folder / "three.txt").write_text("a\nb\nc\n")
    return folder


def _write_ours(folder):
    model = Net()
    optimizer = fusestep.optim.AdamW([("head.weight", model.head.weight), ("head.bias", model.head.bias)], lr=1e-2)
    step(optimizer, 3)
    optimizer.save(folder / "head.safetensors", metadata={"train_mode": "head only", "epoch": 3})
    optimizer.thaw("*", model, lr=1e-3)
    optimizer.freeze("backbone.bias")
    optimizer.freeze("head.bias")
    step(optimizer, 2, grad=0.5)
    optimizer.save(folder / "all.safetensors", metadata={"train_mode": "all"})


def _write_torchs(folder):
    model = torch.nn.Linear(4, 2)
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.constant_(model.bias, 0.5)
    named = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9, nesterov=True)
    nameless = torch.optim.RMSprop(model.parameters(), lr=0.1)
    other = torch.optim.Adagrad(model.parameters(), lr=0.1)
    for optimizer in (named, nameless, other):
        step(optimizer, 2)
    checkpoint = {"model": model.state_dict(), "optimizer": named.state_dict(), "epoch": 3}
    torch.save(checkpoint, folder / "checkpoint.pt")
    torch.save(nameless.state_dict(), folder / "nameless.pt")
    torch.save(nameless.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"optimizers": [named.state_dict(), {"d": nameless.state_dict()}]}, folder / "several.pt")
    torch.save(other.state_dict(), folder / "other.pt")
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "weights.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"thing": NotPlain()}, folder / "code.pt")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command line among the files, in this process: torch is imported already."""

    def run(arguments, columns=120):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            code = main(arguments.split())
        except SystemExit as error:
            code = error.code
        return Done(code, *capsys.readouterr())

    return run


def run_program(folder, arguments, path=PACKAGE.parent):
    environment = {**os.environ, "PYTHONPATH": str(path), "COLUMNS": "120"}
    command = [sys.executable, "-W", "error::UserWarning:fusestep", "-m", "fusestep", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    return Done(done.returncode, done.stdout, done.stderr)


# ---- what works --------------------------------------------------------------------------------


class Good(NamedTuple):
    arguments: str
    shown: str = ""  # a regular expression
    code: int = 0


GOOD = [
    Good("--help", "info.*inspect.*diff.*convert.*demo"),
    Good("diff --help", "the exit code is 1"),
    Good("info", "cuda status"),
    Good("inspect head.safetensors", r"^head.safetensors: AdamW, 2 parameters, 1 group, state 80.1 KiB\n"),
    Good("inspect plain.safetensors", r"^plain.safetensors: safetensors, no settings.*w +2×3 +float32 +7 +24 B"),
    Good("inspect weights.safetensors", r"2 tensors, 20.0 KiB, no optimizer's state.*bias +F32.*weight +BF16 +10×1024"),
    Good("inspect checkpoint.pt", r"^checkpoint.pt, key 'optimizer': torch, SGD, .*nesterov True.*weight +2×4"),
    Good("inspect nameless.pt", r"^nameless.pt: torch, RMSprop.*\n0 +2×4 +float32 +2 +32 B"),
    Good("inspect old.pt", r"^old.pt: torch, RMSprop"),
    Good("inspect several.pt --key optimizers.1.d", r"^several.pt, key 'optimizers.1.d': torch, RMSprop"),
    Good("inspect other.pt", r"torch, unknown rule.*State: sum 40 B"),
    Good("diff head.safetensors head.safetensors", "No difference in 2 parameters"),
    Good("diff head.safetensors all.safetensors", "train_mode +head only +all", code=1),
    Good("diff old.pt nameless.pt", "No difference in 2 parameters"),
    Good("diff checkpoint.pt several.pt --key optimizer --key-b optimizers.0", "No difference in 2 parameters"),
    Good("diff head.safetensors several.pt --key optimizers.0", "Groups gone: 0\nNew groups: 0\n", code=1),
    Good("diff checkpoint.pt nameless.pt --names names.txt", "momentum_buffer.*square_avg", code=1),
    Good("diff plain.safetensors head.safetensors", "Parameters gone: w\nNew parameters: head.weight", code=1),
]


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.arguments)
def test_good(case, run):
    done = run(case.arguments)
    assert (done.returncode, done.stderr) == (case.code, "")
    assert re.search(case.shown, done.stdout, re.DOTALL), done.stdout


# ---- what does not -----------------------------------------------------------------------------


class Bad(NamedTuple):
    arguments: str
    said: str  # all of stderr, after the name of the program, as a regular expression


BAD = [
    Bad("", r": the following arguments are required: COMMAND \(python -m fusestep --help\)"),
    Bad("nothing", r": argument COMMAND: invalid choice: 'nothing' .*"),
    Bad("inspect", r" inspect: the following arguments are required: FILE .*"),
    Bad("diff head.safetensors", r" diff: the following arguments are required: B .*"),
    Bad("convert nameless.pt x.safetensors --rule Lion", r" convert: argument --rule: invalid choice: 'Lion' .*"),
    Bad("demo --optimizer lion", r" demo: argument --optimizer: invalid choice: 'lion' .*"),
    Bad("inspect nowhere", r" inspect: file 'nowhere': cannot be opened: No such file or directory"),
    Bad("inspect .", r" inspect: file '.'.*"),
    Bad("inspect note.txt", r" inspect: file 'note.txt': is no safetensors file, or cut off: .*"),
    Bad("inspect empty.pt", r" inspect: file 'empty.pt': has 0 bytes, too few for a safetensors file"),
    Bad("inspect cut.safetensors", r" inspect: file 'cut.safetensors': .*"),
    Bad("inspect cut.pt", r" inspect: cut.pt: torch cannot load it: .*"),
    Bad(
        "inspect code.pt",
        r" inspect: code.pt: torch cannot load it: it holds objects of other classes \(.*NotPlain\), .*",
    ),
    Bad("inspect weights.pt", r" inspect: weights.pt: has no optimizer's state_dict; it holds model, epoch"),
    Bad("inspect list.pt", r" inspect: list.pt: has no optimizer's state_dict; it holds list"),
    Bad(
        "inspect several.pt",
        r" inspect: several.pt: has several optimizers' state_dicts, choose a key: optimizers.0, optimizers.1.d",
    ),
    Bad(
        "inspect checkpoint.pt --key adam",
        r" inspect: checkpoint.pt: no optimizer's state_dict at key 'adam': there are 'optimizer'",
    ),
    Bad("inspect head.safetensors --key a", r" inspect: head.safetensors: a safetensors file has no keys"),
    Bad("diff head.safetensors nowhere", r" diff: file 'nowhere': cannot be opened: No such file or directory"),
    Bad(
        "diff head.safetensors damaged.safetensors",
        r" diff: file 'damaged.safetensors', tensor 'head.weight/exp_avg_sq': .*checksum.*",
    ),
    Bad(
        "diff checkpoint.pt nameless.pt",
        r" diff: nameless.pt: its parameters have no names, give names of them",
    ),
    Bad("diff nameless.pt old.pt --names nowhere", r" diff: nowhere: No such file or directory"),
    Bad("diff nameless.pt old.pt --names three.txt", r" diff: nameless.pt: there are 3 names for 2 parameters"),
    Bad("convert nowhere out.safetensors", r" convert: nowhere is a safetensors file: .*"),
    Bad("convert nameless.pt out.pt", r" convert: nameless.pt is torch's: the target's ending must be .safetensors"),
    Bad(
        "convert head.safetensors out.safetensors",
        r" convert: head.safetensors is a safetensors file: the target's ending must be another, such as .pt",
    ),
    Bad("convert plain.safetensors out.pt", r" convert: plain.safetensors: has no settings, .*"),
    Bad("convert other.pt out.safetensors", r" convert: other.pt: it does not show which rule group '0' is of; .*"),
    Bad(
        "convert checkpoint.pt out.safetensors --names names.txt",
        r" convert: checkpoint.pt, key 'optimizer': its parameters have names already",
    ),
    Bad("convert nameless.pt nowhere/out.safetensors", r" convert: file 'nowhere/out.safetensors': .*"),
    Bad("convert head.safetensors nowhere/out.pt", r" convert: nowhere/out.pt: No such file or directory"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.arguments)
def test_bad(case, run, folder):
    """Exit code 2, one line that says what is wrong, nothing else, and nothing written."""
    before = sorted(folder.iterdir())
    done = run(case.arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"python -m fusestep{case.said}\n", done.stderr), done.stderr
    assert sorted(folder.iterdir()) == before


# ---- what is printed ---------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["inspect all.safetensors", "diff head.safetensors all.safetensors"])
def test_golden(command, columns, run):
    """Golden text; after a change on purpose: delete the file, run twice, and look at what git shows."""
    text = run(command, columns).stdout
    assert max(map(len, text.splitlines())) <= columns
    file = GOLDEN / f"{command.split()[0]}_{columns}.txt"
    if not file.exists():
        file.write_text(text)
        pytest.fail(f"{file.name} was missing and has been written")
    assert text == file.read_text()


def test_json(run, folder):
    def shown(arguments):
        return json.loads(run(f"{arguments} --json").stdout)

    assert shown("info")["version"] == fusestep.__version__
    held = shown("inspect all.safetensors")
    assert (held["kind"], held["metadata"], len(held["groups"])) == ("fusestep", {"train_mode": "all"}, 2)
    assert held["groups"][0]["params"][1] == {
        **{"name": "head.bias", "dtype": "float32", "shape": [10], "frozen": True, "step": 3.0},
        "slots": {slot: {"dtype": "float32", "shape": [10], "bytes": 40} for slot in ("exp_avg", "exp_avg_sq")},
    }
    assert shown("inspect weights.safetensors")["tensors"][0]["shape"] == [10]
    found = shown("diff head.safetensors all.safetensors")
    same = fusestep.diff(folder / "head.safetensors", folder / "all.safetensors").to_dict()
    assert {**found, "before": "", "after": ""} == {**json.loads(json.dumps(same)), "before": "", "after": ""}
    assert shown("convert nameless.pt json.safetensors")["notes"] == ["the parameters have no names and are numbered"]


# ---- as a program ------------------------------------------------------------------------------

AS_PROGRAM = [
    ("", 2),
    ("info", 0),
    ("info --nothing", 2),
    ("inspect all.safetensors", 0),
    ("inspect nameless.pt", 0),
    ("inspect code.pt", 2),
    ("diff head.safetensors all.safetensors", 1),
    ("diff head.safetensors damaged.safetensors", 2),
    ("convert nameless.pt program.safetensors", 0),
    ("convert nowhere out.safetensors", 2),
]


@pytest.mark.parametrize(("arguments", "code"), AS_PROGRAM)
def test_as_a_program(arguments, code, run, folder):
    assert run_program(folder, arguments) == run(arguments)._replace(returncode=code)


def test_output_may_be_cut_off(folder):
    """As by `| head`."""
    command = f"{sys.executable} -m fusestep inspect all.safetensors | true"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.stderr == ""


def test_without_torch(folder):
    (folder / "no_torch").mkdir()
    (folder / "no_torch" / "torch.py").write_text("raise ModuleNotFoundError(name='torch')\n")
    path = f"{folder / 'no_torch'}{os.pathsep}{PACKAGE.parent}"
    assert run_program(folder, "inspect head.safetensors", path).returncode == 0
    done = run_program(folder, "inspect checkpoint.pt", path)
    expected = "python -m fusestep inspect: checkpoint.pt: a file of torch.save, which needs torch to be read\n"
    assert (done.returncode, done.stderr) == (2, expected)
    done = run_program(folder, "diff head.safetensors all.safetensors", path)
    assert (done.returncode, done.stderr) == (
        2,
        "python -m fusestep diff: this needs torch: pip install fusestep[torch]\n",
    )


# ---- convert -----------------------------------------------------------------------------------


def test_convert_there_and_back(name, run, folder):
    """A torch checkpoint, converted, loads by name; converted back, it is what it was."""
    model = torch.nn.Linear(3, 2)
    optimizer = support.theirs(name)(model.named_parameters(), **{"lr": 0.1, **support.FULLEST[name]})
    support.set_grads(model.parameters(), seed=0)
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, folder / "there.pt")
    done = run(f"convert there.pt {name}.safetensors")
    assert (done.returncode, done.stdout) == (0, f"{name}.safetensors: {name}, 2 parameters, 1 group\n")
    assert run(f"convert {name}.safetensors {name}.pt").returncode == 0

    ours = support.ours(name)(model.named_parameters(), lr=0.5)
    assert ours.load(folder / f"{name}.safetensors").complete
    support.assert_bits(support.all_state(ours), support.all_state(optimizer))
    back = torch.load(folder / f"{name}.pt", weights_only=True)
    again = support.theirs(name)(model.named_parameters(), lr=0.5)
    again.load_state_dict(back)
    support.assert_bits(support.all_state(again), support.all_state(optimizer))
    assert again.param_groups == optimizer.param_groups


def test_convert_with_names(run, folder):
    done = run("convert nameless.pt named.safetensors --names names.txt")
    assert done.stderr == "" and "Note" not in done.stdout
    model = torch.nn.Linear(4, 2)
    optimizer = fusestep.optim.RMSprop(model.named_parameters())
    assert optimizer.load(folder / "named.safetensors").loaded == ["weight", "bias"]


def test_convert_says_what_it_leaves_out(run):
    done = run("convert all.safetensors all.pt")
    assert done.stdout.splitlines() == [
        "all.pt: AdamW, 6 parameters, 2 groups",
        "Note: which parameters were frozen was left out.",
        "Note: the metadata were left out: train_mode.",
    ]


def test_convert_complex_and_16_bit(run, folder):
    parameters = [
        torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.ones(2)),  # without a gradient: no state
    ]
    optimizer = torch.optim.Adam(parameters, lr=torch.tensor(0.1), foreach=False, capturable=False)
    support.set_grads(parameters[:2], seed=0)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "kinds.pt")
    for source, target in (("kinds.pt", "kinds.safetensors"), ("kinds.safetensors", "kinds-back.pt")):
        assert run(f"convert {source} {target}").returncode == 0
    back, saved = (torch.load(folder / file, weights_only=True) for file in ("kinds-back.pt", "kinds.pt"))
    assert back["state"].keys() == saved["state"].keys()
    for index, own in saved["state"].items():
        for slot, value in own.items():
            assert torch.equal(back["state"][index][slot], value) and back["state"][index][slot].dtype == value.dtype
    assert back["param_groups"] == saved["param_groups"]
