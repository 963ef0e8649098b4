#!/usr/bin/env python3
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the kernels, read from the library's sm_90 code.

Checks what speed and equal bits rest on, and compares the table of kernels with the committed one, so
that a change of it shows in review:

    kernels.py LIBRARY --table tests/checks/kernels_sm90.txt [--update] [--cuobjdump PATH]

Exits with 77 (skipped) where there is no cuobjdump; the PyPI package nvidia-cuda-cuobjdump has one.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
from collections import Counter

SIZES = {"float": 4, "double": 8, "bfloat16": 2, "float16": 2}
TABLE_HEAD = f"{'kernel':<88} {'regs':>4} {'stack':>5} {'loads':>5} {'stores':>6} {'per element':>11} {'fma':>4}"


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangle(names):
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, text.stdout.split("\n"), strict=False))


def short(name):
    """`Apply<Adam<false>, Layout<float, float, float> >` of the whole signature."""
    name = re.sub(r"fusestep::(detail::)?", "", name)
    match = re.search(r"fusestep_kernel<(.*)>\(", name)
    name = match.group(1).strip() if match else name
    name = re.sub(r", ApplyTuning<.*", " >", name)
    name = name.replace(", void, (Extra)0", "").replace(", (Extra)0", "")
    return name.replace("(Extra)1", "stochastic").replace("(Extra)2", "stores grad")


def functions(dump, start):
    """Mangled name -> lines, of a dump in which `start` introduces a function."""
    found, current = {}, None
    for line in dump.splitlines():
        match = re.search(start, line)
        if match:
            current = found.setdefault(match.group(1), [])
        elif current is not None:
            current.append(line)
    return found


def opcodes(lines):
    pattern = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    return [match.group(1) for line in lines if (match := pattern.search(line))]


class Kernel:
    def __init__(self, name, usage, sass, ptx):
        self.name = name
        self.registers = int(re.search(r"REG:(\d+)", usage).group(1))
        self.stack = int(re.search(r"STACK:(\d+)", usage).group(1))
        self.codes = opcodes(sass)
        self.ptx = ptx
        self.fmas = sum(1 for line in ptx if re.search(r"\bfma\.rn\.f(32|64)", line))
        layout = re.search(r"Layout<(.*?)>", name)
        self.layout = layout.group(1).split(", ") if layout else None
        self.loads = [i for i, code in enumerate(self.codes) if self.bits(code, "LDG")]
        self.stores = [i for i, code in enumerate(self.codes) if self.bits(code, "STG")]

    def bits(self, code, kind):
        """Of a vector access; None for others. Scalar ones of double have 64."""
        found = re.fullmatch(kind + r"\.E(?:\.\w+)*\.(64|128)(?:\.\w+)*", code)
        is_scalar = found and self.layout and self.layout[0] == "double" and found.group(1) == "64"
        return int(found.group(1)) if found and not is_scalar else None

    def count(self, pattern):
        return sum(1 for code in self.codes if re.fullmatch(pattern, code))

    @property
    def slots(self):
        rule = re.search(r"Apply<(\w+)<([^>]*)>", self.name)
        flags = rule.group(2).count("true")
        return {"Adam": 2 + flags, "Sgd": flags, "Rmsprop": 1 + flags}[rule.group(1)]

    @property
    def width(self):
        return 16 // max(SIZES[dtype] for dtype in self.layout[:3] + self.master)

    @property
    def vectors(self):
        """Loaded by a thread at a time, as kernels/tuning.h has it."""
        return 2 if 2 * self.width * sum(SIZES[dtype] for dtype in self.read) <= 96 else 1

    @property
    def blocks(self):
        """Of 128 threads that a multiprocessor is to hold."""
        return 9 - self.vectors if self.layout[0] != "double" else 4

    @property
    def master(self):
        return [dtype for dtype in self.layout[3:4] if dtype != "void"]

    @property
    def read(self):
        """Dtypes of the arrays: the parameter or its master weight, gradient, slots."""
        value, grad, slot = self.layout[:3]
        return (self.master or [value]) + [grad] + [slot] * self.slots

    @property
    def written(self):
        value, grad, slot = self.layout[:3]
        stored = [grad] if "stores grad" in self.layout else []
        return self.master + [value] + stored + [slot] * self.slots

    def accesses(self, dtypes):
        """Bits of the accesses that move what a thread holds at a time of each of these."""
        return sorted(8 * self.width * SIZES[dtype] for dtype in dtypes) * self.vectors

    def per_element(self):
        """Instructions from the first vector load to the last vector store, per element."""
        if self.layout is None or not self.stores:
            return 0.0
        last = max(self.stores)
        first = [i for i in self.loads if i < last][-len(self.accesses(self.read))]
        return (last - first + 1) / (self.vectors * self.width)

    def row(self):
        return (
            f"{self.name:<88} {self.registers:>4} {self.stack:>5} {len(self.loads):>5} {len(self.stores):>6} "
            f"{self.per_element():>11.1f} {self.fmas:>4}"
        )

    def faults(self):
        if self.stack != 0 or self.count(r"(LDL|STL)(\.\w+)*"):
            yield f"spills registers: {self.stack} bytes of stack"
        text = "\n".join(self.ptx)
        for pattern, what in [
            (r"\.ftz\b", "flushes subnormals"),
            (r"\b(div|sqrt|rcp|rsqrt)\.(approx|full)", "divides or takes roots approximately"),
            (r"\b(mul|add|sub)\.f(32|64)\b", "lets the assembler fuse products and sums"),
        ]:
            if re.search(pattern, text):
                yield what
        if self.layout is None:
            return
        if self.registers > 65536 // (128 * self.blocks) // 8 * 8:
            yield f"{self.registers} registers leave no room for {self.blocks} blocks of 128"
        if self.layout[0] != "double" and (self.count(r"D(ADD|MUL|FMA|SETP)(\.\w+)*") or re.search(r"\.f64\b", text)):
            yield "uses double precision"
        loads = Counter(self.bits(self.codes[i], "LDG") for i in self.loads)
        stores = Counter(self.bits(self.codes[i], "STG") for i in self.stores)
        wanted = Counter(self.accesses(self.read))
        if wanted - loads:  # it reads tables, too
            yield f"has loads of so many bits: {dict(loads)}, what a thread holds takes {dict(wanted)}"
        if stores != Counter(self.accesses(self.written)):
            yield f"has stores of so many bits: {dict(stores)}, expected {self.accesses(self.written)}"


def read_kernels(cuobjdump, library):
    def dump(what):
        return run(cuobjdump, what, "--gpu-architecture", "sm_90", library)

    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", dump("--dump-resource-usage")))
    sass = functions(dump("--dump-sass"), r"Function : (\S+)")
    ptx = functions(run(cuobjdump, "--dump-ptx", library), r"\.entry (\w+)\(")
    names = demangle(list(usage))
    kernels = [Kernel(short(names[n]), usage[n], sass[n], ptx.get(n, [])) for n in usage]
    return sorted(kernels, key=lambda kernel: kernel.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library")
    parser.add_argument("--table", type=pathlib.Path, required=True)
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing it")
    parser.add_argument("--cuobjdump", default="cuobjdump")
    parser.add_argument("--nvcc", default="nvcc")
    options = parser.parse_args()
    if shutil.which(options.cuobjdump) is None:
        print("skipped: there is no cuobjdump (pip install nvidia-cuda-cuobjdump)")
        return 77

    kernels = read_kernels(options.cuobjdump, options.library)
    if not kernels:
        print("skipped: the library has no code for sm_90")
        return 77
    compiler = re.search(r"V(\d+\.\d+\.\d+)", run(options.nvcc, "--version")).group(1)
    table = "\n".join([f"nvcc {compiler}, sm_90", TABLE_HEAD] + [k.row() for k in kernels]) + "\n"
    print(table)
    faults = [f"{kernel.name}: {fault}" for kernel in kernels for fault in kernel.faults()]
    if not any(kernel.layout for kernel in kernels):
        faults.append("the library has no apply kernels")
    if options.update:
        options.table.write_text(table)
    committed = options.table.read_text()
    if committed.split("\n")[0] != table.split("\n")[0]:
        print(f"not compared: the committed table is of {committed.splitlines()[0]}")
    elif committed != table:
        changed = sorted(set(table.splitlines()) ^ set(committed.splitlines()))
        faults.append("the table has changed (kernels.py --update, and say why):\n  " + "\n  ".join(changed))
    for fault in faults:
        print("FAULT", fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
