# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""The command line, `python -m fusestep`.

Exit codes: 0, all is well; 1, `diff` has found a difference, a bound of `demo` is not kept, or `bench` has found
a wrong result; 2, wrong usage, or something that cannot be read or written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import sys
from typing import Any

from . import _core, benchmark, demo
from .contents import RULES, contents, inspect, is_torch_file
from .info import info
from .tables import count_text

GOOD, DIFFERENT, FAILED = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(FAILED, f"{self.prog}: {message} ({self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (_core.Error, ImportError) as error:
        needed = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        text = "this needs torch: pip install fusestep[torch]" if needed else " ".join(str(error).split())
        print(f"python -m fusestep {options.command}: {text}", file=sys.stderr)
        return FAILED


def _parser():
    parser = _Parser(prog="python -m fusestep", description="The optimizer step in one pass over memory.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, text, add_arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    return parser


# ---- commands ----------------------------------------------------------------------------------


def _info(options):
    _show(info(), dict(info()), options)
    return GOOD


def _inspect_arguments(parser):
    parser.add_argument("file", metavar="FILE", help="a safetensors file, or one of torch.save")
    _add_key(parser)


def _inspect(options):
    held = inspect(options.file, options.key)
    _show(held, held.to_dict(), options)
    return GOOD


def _diff_arguments(parser):
    parser.add_argument("before", metavar="A", help="a file as for inspect")
    parser.add_argument("after", metavar="B", help="another")
    _add_key(parser)
    parser.add_argument("--key-b", metavar="KEY", help="the same for B, if it is another")
    _add_names(parser)


def _diff(options):
    from .diff import diff_of

    before = contents(options.before, options.key if is_torch_file(options.before) else None)
    after = contents(options.after, (options.key_b or options.key) if is_torch_file(options.after) else None)
    found = diff_of(before, after, names=_names(options))
    _show(found, found.to_dict(), options)
    return GOOD if found.same else DIFFERENT


def _convert_arguments(parser):
    parser.add_argument("source", metavar="IN", help="a torch checkpoint, or a file of fusestep")
    parser.add_argument("target", metavar="OUT", help="a name that ends in .safetensors; otherwise a torch checkpoint")
    parser.add_argument("--rule", choices=RULES, help="what optimizer it is of, if that is not known")
    _add_key(parser)
    _add_names(parser)


def _convert(options):
    from .convert import convert

    done = convert(options.source, options.target, options.key, _names(options), options.rule)
    counts = [count_text(done[f"{noun}s"], noun) for noun in ("parameter", "group")]
    text = f"{done['target']}: {', '.join([done['rule'], *counts])}"
    _show("\n".join([text, *(f"Note: {note}." for note in done["notes"])]), done, options)
    return GOOD


def _demo(options):
    missing = demo.missing_packages()
    if missing:
        raise ImportError(f"needs {', '.join(missing)}: pip install fusestep[demo]")
    from .demo.run import run

    results = run(options, say=(lambda line: None) if options.json else _say)
    if options.json and not options.phase:
        _show(None, results, options)
    return GOOD if results.get("good", True) else DIFFERENT


_COMMANDS = {
    "info": (_info, "what this installation is and uses", lambda parser: None),
    "inspect": (_inspect, "what a file with an optimizer's state holds", _inspect_arguments),
    "diff": (_diff, "what differs between two such files; the exit code is 1 if anything does", _diff_arguments),
    "convert": (_convert, "a torch checkpoint to a safetensors file, or back", _convert_arguments),
    "demo": (_demo, "fine-tuning on handwritten digits, beside torch.optim", demo.add_arguments),
    "bench": (benchmark.run, "what a step costs here, beside torch.optim", benchmark.add_arguments),
}


# ---- what they share ---------------------------------------------------------------------------


def _add_key(parser):
    parser.add_argument("--key", help="where in a torch checkpoint the optimizer's state_dict is: a.b.0")


def _add_names(parser):
    parser.add_argument("--names", metavar="FILE", help="names for parameters that have none, one on each line")


def _names(options):
    if options.names is None:
        return None
    try:
        return pathlib.Path(options.names).read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise _core.FileError(f"{options.names}: {getattr(error, 'strerror', None) or error}") from None


def _say(line):
    print(line, flush=True)


def _show(text: Any, data: Any, options: argparse.Namespace) -> None:
    print(json.dumps(_strict(data), indent=1, ensure_ascii=False) if options.json else text)


def _strict(data):
    """Without NaN and infinities, for which JSON has no numbers."""
    if isinstance(data, dict):
        return {key: _strict(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return list(map(_strict, data))
    return repr(data) if isinstance(data, float) and not math.isfinite(data) else data


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(GOOD)
    except KeyboardInterrupt:
        sys.exit(130)
