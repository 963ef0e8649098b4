# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the phases of the story with both libraries, and compares them.

Each phase leaves a record, `<phase>.json`, in the directory of the demo: the third one runs in another
process, and the page is made of all three.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fusestep
from fusestep import plot_history

from . import PHASES, page, story

LARGEST_LOSS_DIFFERENCE = 1e-3
LARGEST_ACCURACY_DIFFERENCE = 0.005
LOWEST_ACCURACY = 0.9  # a network that learned nothing would agree with another
THREADS = 1  # more have nothing to do with images this small

LIBRARIES = {"fusestep": fusestep.optim, "torch": torch.optim}


class Phase(NamedTuple):
    title: str
    text: str
    run: Callable
    epochs: int
    quick: int


_PHASES = {
    "pretrain": Phase(
        "Phase 1: digits 0 to 4",
        "All of the network is trained.",
        *(story.pretrain, 8, 4),
    ),
    "head": Phase(
        "Phase 2: a new head, for 5 to 9",
        "The backbone is frozen. The optimizer of the head is saved at the end.",
        *(story.train_head, 8, 4),
    ),
    "finetune": Phase(
        "Phase 3: all thaws, in a new process",
        "The head's state is loaded into an optimizer of the whole network, and the backbone goes on with a tenth of "
        "the head's rate. torch refuses to load it; there, state is carried over by hand.",
        *(story.finetune, 8, 4),
    ),
}


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All phases, or one; what came out, as a dict. `say` gets the lines for people."""
    out = pathlib.Path(options.out)
    torch.set_num_threads(THREADS)
    fusestep.set_num_threads(THREADS)
    device = _device()
    if options.phase:
        return _phase(options.phase, options, out, device, say)
    start = time.monotonic()
    say(f"fusestep {fusestep.__version__} beside torch {torch.__version__}, {options.optimizer} on {_where(device)}\n")
    for phase in PHASES[:2]:
        _phase(phase, options, out, device, say)
    _in_a_new_process(PHASES[2], options)
    records = [json.loads((out / f"{phase}.json").read_text()) for phase in PHASES]
    results = _results(records)
    changes = fusestep.diff(out / "fusestep" / "head.safetensors", out / "fusestep" / "all.safetensors")
    say("What the last phase changed in the optimizer:\n\n" + _indented(changes.text(_width() - 4)) + "\n")
    results["seconds"] = round(time.monotonic() - start, 1)
    what = f"{options.optimizer} on {_where(device)}"
    page.write(out / "report.html", what, records, results["good"], _sentence(results), changes)
    say(_indented(f"{'Good' if results['good'] else 'NOT GOOD'}: {_sentence(results)}", 0))
    say(f"{results['seconds']} s, report: {out / 'report.html'}")
    return results


def _device():
    """The GPU, where both libraries can use it, and then with the same sums every time."""
    if not torch.cuda.is_available() or fusestep.info()["cuda_devices"] == 0:
        return torch.device("cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


def _where(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU ({fusestep.instruction_set()})"


def _phase(name, options, out, device, say):
    phase, rule = _PHASES[name], story.RULES[options.optimizer]
    say(f"{phase.title}\n\n{_indented(phase.text, 2)}\n")
    runs = {}
    for library, optim in LIBRARIES.items():
        folder = out / library
        folder.mkdir(parents=True, exist_ok=True)
        setting = story.Setting(rule, device, folder, phase.quick if options.quick else phase.epochs)
        runs[library] = phase.run(optim, setting, f"  {library}")
    record = _record(name, phase, runs)
    files = plot_history(_curves(record), out / name)
    (out / f"{name}.json").write_text(json.dumps({**record, "plot": files[1].name}))
    for text in _told(record):
        say(text)
    return record


def _in_a_new_process(name, options):
    command = [sys.executable, "-m", "fusestep", "demo", "--phase", name]
    command += ["--optimizer", options.optimizer, "--out", str(options.out)]
    command += ["--quick"] * options.quick
    sys.stdout.flush()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL if options.json else None)


# ---- what came of it ---------------------------------------------------------------------------


def _record(name, phase, runs):
    ours, theirs = runs["fusestep"], runs["torch"]
    differences = [abs(x - y) for x, y in zip(ours.losses, theirs.losses, strict=True)]
    steps = len(differences) // len(ours.history["loss"])
    return {
        "phase": name,
        "title": phase.title,
        "text": phase.text,
        "steps": len(differences),
        "difference": max(differences),
        "differences": [max(differences[at : at + steps]) for at in range(0, len(differences), steps)],
        "history": {library: dict(run.history) for library, run in runs.items()},
        "notes": [_note(heading, thing) for run in reversed(runs.values()) for heading, thing in run.notes],
    }


def _note(heading, thing):
    html = thing._repr_html_() if hasattr(thing, "_repr_html_") else None
    text = thing.text(_width() - 4) if html else str(thing)
    return {"heading": heading, "text": text, "html": html}


def _curves(record):
    """A history with torch's curves beside ours, for plot_history."""
    ours, theirs = record["history"]["fusestep"], record["history"]["torch"]
    beside = {f"{key} of torch": theirs[key] for key in ("loss", "accuracy")}
    shown = {key: ours[key] for key in ("loss", "accuracy")} | beside
    return shown | {"largest difference from torch": record["differences"]} | ours


def _told(record):
    yield f"  {'':10}{'loss':>9}{'accuracy':>11}"
    for library, history in record["history"].items():
        yield f"  {library:10}{history['loss'][-1]:9.4f}{100 * history['accuracy'][-1]:9.2f} %"
    yield f"  largest difference of the losses of {record['steps']} steps: {record['difference']:.1e}\n"
    for note in record["notes"]:
        yield f"  {note['heading']}:\n\n{_indented(note['text'])}\n"


def _indented(text, indent=4):
    """With long lines folded to the terminal."""
    fold = textwrap.TextWrapper(
        _width(), initial_indent=" " * indent, subsequent_indent=" " * indent, replace_whitespace=False
    )
    return "\n".join(fold.fill(line) for line in text.splitlines())


def _width():
    return shutil.get_terminal_size().columns


def _results(records):
    accuracies = {library: history["accuracy"][-1] for library, history in records[-1]["history"].items()}
    apart = abs(accuracies["fusestep"] - accuracies["torch"])
    differences = {record["phase"]: record["difference"] for record in records}
    good = (
        max(differences.values()) <= LARGEST_LOSS_DIFFERENCE
        and apart <= LARGEST_ACCURACY_DIFFERENCE
        and min(accuracies.values()) >= LOWEST_ACCURACY
    )
    return {
        "good": good,
        "largest_loss_difference": differences,
        "allowed_loss_difference": LARGEST_LOSS_DIFFERENCE,
        "accuracy": accuracies,
        "allowed_accuracy_difference": LARGEST_ACCURACY_DIFFERENCE,
    }


def _sentence(results):
    largest = max(results["largest_loss_difference"].values())
    ours, theirs = (100 * results["accuracy"][library] for library in LIBRARIES)
    return (
        f"losses differ by {largest:.1e} at most (allowed: {LARGEST_LOSS_DIFFERENCE:.0e}), and final accuracies are "
        f"{ours:.2f} % and {theirs:.2f} % (allowed: {100 * LARGEST_ACCURACY_DIFFERENCE} % apart)"
    )
