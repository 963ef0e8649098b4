#!/usr/bin/env python3
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Counts the instructions of steps under callgrind, and compares them with the committed table.

Instruction counts do not depend on how busy a machine is. They do on the compiler: where it is not the
table's, nothing is compared (exit status 77). AVX2 and one thread, since valgrind knows no AVX-512.

    instructions.py PROGRAM --compiler "GNU 12.2.0"
    instructions.py PROGRAM --compiler "GNU 12.2.0" --update "why they have changed"
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

TABLE = pathlib.Path(__file__).with_name("instructions.json")
ALLOWED = 0.05  # of the committed count, upwards; a count that falls by more asks for an update too
SKIPPED = 77


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="counted_steps")
    parser.add_argument("--compiler", required=True, help="its name and version")
    parser.add_argument("--update", metavar="REASON", help="write what is counted into the table")
    options = parser.parse_args()

    why_not = why_nothing_can_be_compared(options)
    if why_not:
        print(why_not)
        return SKIPPED
    counts = count(options.program)
    if options.update:
        write_table(options.compiler, options.update, counts)
        return 0
    return compare(json.loads(TABLE.read_text())["counts"], counts)


def why_nothing_can_be_compared(options):
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    flags = pathlib.Path("/proc/cpuinfo")
    if not flags.exists() or " avx2" not in flags.read_text():
        return "this processor has no AVX2"
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if not options.update and table.get("compiler") != options.compiler:
        return f"the table is of {table.get('compiler')}, this is {options.compiler}"
    return None


def count(program):
    """Case to instructions per item."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out")
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--combine-dumps=no"]
        command += ["--collect-atstart=no", "--toggle-collect=counted", "--dump-after=counted", program]
        run = subprocess.run(
            command, env={**os.environ, "FUSESTEP_ISA": "avx2"}, capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{run.stderr}")
        counts = {}
        for number, line in enumerate(run.stdout.splitlines(), start=1):
            name, items = line.split("\t")
            dump = pathlib.Path(f"{out}.{number}").read_text()
            total = int(re.search(r"^(?:totals|summary): (\d+)", dump, re.MULTILINE).group(1))
            counts[name] = round(total / int(items), 3)
    return counts


def write_table(compiler, reason, counts):
    table = {"compiler": compiler, "instruction set": "avx2", "reason": reason, "counts": counts}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def compare(expected, counts):
    failed = expected.keys() != counts.keys()
    print(f"{'instructions of one':58} {'table':>10} {'now':>10}")
    for name in {**expected, **counts}:
        before, now = expected.get(name), counts.get(name)
        changed = before is None or now is None or abs(now - before) > ALLOWED * before
        failed = failed or changed
        print(f"{name:58} {before!s:>10} {now!s:>10}{'  <--' if changed else ''}")
    if failed:
        print(f"\nmore than {ALLOWED:.0%} from the table: mend it, or --update with the reason")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
