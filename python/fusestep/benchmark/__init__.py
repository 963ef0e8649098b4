# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m fusestep bench`: steps of fusestep and of others, in turns. docs/benchmarking.md has the method."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import sys

from .._core import FileError, InvalidArgument, num_threads

SCHEMA = "fusestep-benchmark-1"
LEAST_ROUNDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options. Nothing here imports torch."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small selection, for about a minute on a quiet machine")
    parser.add_argument("--full", action="store_true", help="everything: hours on a CPU")
    for name, example in (
        ("models", "resnet152,gpt2,tiny10k,100x64"),
        ("optimizers", "adam,sgd_momentum"),
        ("dtypes", "float32,bf16"),
        ("groups", "1,8"),
        ("operations", "step,clip"),
    ):
        text = f"such as {example}; any of these options replaces the selection by their combinations"
        parser.add_argument(f"--{name}", type=_listed, metavar="A,B,...", help=text)
    parser.add_argument("--rounds", type=int, default=21, help=f"samples of each, {LEAST_ROUNDS} or more")
    parser.add_argument("--threads", type=int, help="of everybody, on the CPU; by default all that may be used")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("fusestep-bench"), metavar="DIR")
    parser.add_argument("--report", type=pathlib.Path, metavar="FILE.json", help="measure nothing: draw and tabulate")


def run(options: argparse.Namespace) -> int:
    """Measures, writes the files, prints the table.

    Returns 1 if fusestep's results were wrong, 130 if Ctrl-C ended it early, otherwise 0. Raises InvalidArgument for
    wrong arguments, FileError where nothing can be written, and ImportError without torch.
    """
    _check(options)
    status = 0
    try:
        if options.report is not None:
            results, files = _read(options.report), []
        else:
            results, status, files = _measured(options)
        _show(results, options, files)
    except OSError as error:
        if isinstance(error, (FileError, BrokenPipeError)):
            raise
        raise FileError(f"{error.filename or options.out} cannot be written: {error.strerror}") from error
    return status


def _listed(text):
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected at least one name")
    return names


def _check(options):
    if options.rounds < LEAST_ROUNDS:
        raise InvalidArgument(f"--rounds {options.rounds} is too few, expected {LEAST_ROUNDS} or more")
    processors = os.cpu_count() or 1
    if options.threads is not None and not 1 <= options.threads <= processors:
        raise InvalidArgument(f"--threads {options.threads} is not possible, expected 1 to {processors}")
    if options.quick and options.full:
        raise InvalidArgument("--quick and --full exclude each other")


def _measured(options):
    """(what is in the file, the exit status, the file). It is written anew after every case, whatever comes then."""
    from . import cases

    chosen = cases.chosen(options)
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"the benchmark needs torch, which fusestep[bench] brings: {error}") from error
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("torch sees no CUDA device")
    from . import devices, machine, measure

    device = devices.Cuda() if options.device == "cuda" else devices.Cpu(options.threads or num_threads())
    context = machine.describe(device, shlex.join(["python", "-m", "fusestep", *sys.argv[1:]]))
    context["rounds"] = options.rounds
    if options.quick:
        device.roof_elements //= 4
    path, part = (options.out / f"benchmark.json{end}" for end in ("", ".part"))
    options.out.mkdir(parents=True, exist_ok=True)
    for results in measure.measure(chosen, device, options.rounds):
        context["load_after"] = machine.load()
        found = {"schema": SCHEMA, "context": context}
        found |= {"benchmarks": results.benchmarks, "left_out": results.left_out}
        part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    part.replace(path)
    return found, 1 if results.wrong else 130 if results.interrupted else 0, [path]


# ---- from the JSON -----------------------------------------------------------------------------


def _read(path):
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise InvalidArgument(f"{path} is not a file of `python -m fusestep bench`: its schema is not {SCHEMA}")
    lacking = {"context", "benchmarks", "left_out"} - results.keys()
    if lacking:
        raise InvalidArgument(f"{path} is not whole: it has no {', '.join(sorted(lacking))}")
    return results


def _show(results, options, files):
    """`files` have been written before."""
    from . import plots, report

    text = report.markdown(results)
    options.out.mkdir(parents=True, exist_ok=True)
    files = [*files, options.out / "benchmark.md"]
    files[-1].write_text(text)
    print(json.dumps(results, indent=1) if options.json else text)
    try:
        files += plots.draw(results, options.out)
    except ImportError as error:
        print(f"no plots: {error}; fusestep[bench] brings what they need", file=sys.stderr)
    print(f"written to {options.out}: {', '.join(path.name for path in files)}", file=sys.stderr)
