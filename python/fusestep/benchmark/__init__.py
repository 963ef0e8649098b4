# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m fusestep bench`: steps of fusestep and of others, in turns. docs/benchmarking.md has the method."""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

SCHEMA = "fusestep-benchmark-1"
LEAST_ROUNDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options. Nothing here imports torch."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small selection, within a minute on a quiet machine")
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


def run(options: argparse.Namespace, refuse: Callable[[str], Any]) -> int:
    """Measures, writes the files, prints the table. The exit status is 1 if fusestep's results were wrong.

    Args:
        refuse: called with a sentence where the arguments are wrong; does not return.
    """
    if options.report is not None:
        return _report(_read(options.report, refuse), options.out)
    _check(options, refuse)
    try:
        import torch

        from . import cases
    except ImportError as error:
        return _fail(f"the benchmark needs torch: pip install fusestep[bench] ({error})")
    if options.device == "cuda" and not torch.cuda.is_available():
        return _fail("torch sees no CUDA device")
    try:
        chosen = cases.chosen(options)
    except ValueError as error:
        return refuse(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    results, wrong = _measured(options, chosen)
    (options.out / "benchmark.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return _report(results, options.out) or (1 if wrong else 0)


def _listed(text):
    return [part.strip() for part in text.split(",") if part.strip()]


def _check(options, refuse):
    if options.rounds < LEAST_ROUNDS:
        refuse(f"--rounds {options.rounds} is too few, expected {LEAST_ROUNDS} or more")
    if options.threads is not None and options.threads < 1:
        refuse(f"--threads {options.threads} is too few, expected 1 or more")
    if options.quick and options.full:
        refuse("--quick and --full exclude each other")


def _fail(text):
    print(f"fusestep bench: {text}", file=sys.stderr)
    return 1


def _measured(options, chosen):
    import fusestep

    from . import devices, machine, measure

    device = devices.Cuda() if options.device == "cuda" else devices.Cpu(options.threads or fusestep.num_threads())
    context = machine.describe(device, shlex.join(["python", "-m", "fusestep", *sys.argv[1:]]))
    elements = measure.ROOF_ELEMENTS // (4 if options.quick and device.name == "cpu" else 1)
    results = measure.measure(chosen, device, options.rounds, elements)
    context |= {"rounds": options.rounds, "load_after": machine.load()}
    found = {"schema": SCHEMA, "context": context}
    return found | {"benchmarks": results.benchmarks, "left_out": results.left_out}, results.wrong


# ---- from the JSON -----------------------------------------------------------------------------


def _read(path, refuse):
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return refuse(f"{path} cannot be read: {error}")
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        return refuse(f"{path} is not a file of `python -m fusestep bench`: its schema is not {SCHEMA}")
    return results


def _report(results, out):
    from . import plots, report

    text = report.markdown(results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark.md").write_text(text)
    print(text)
    try:
        files = plots.draw(results, out)
    except ImportError as error:
        print(f"no plots: {error}; pip install fusestep[bench] brings what they need", file=sys.stderr)
        files = []
    print(f"written: {', '.join(str(path) for path in sorted({*files, *out.glob('benchmark.*')}))}", file=sys.stderr)
    return 0
