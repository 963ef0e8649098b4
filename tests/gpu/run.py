#!/usr/bin/env python3
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Everything there is to find out on a machine with a GPU, the most telling first.

    run.py BUILD --out FOLDER [--seconds 480] [--only WORD] [--list]

BUILD has the programs (`./dev gpu --build` makes them, also on a machine without a GPU: they then run
where neither GoogleTest nor Google Benchmark is installed). FOLDER gets a log and a JSON file of every
part, and summary.json; a table of all parts is printed last. Needs nothing but Python 3.10; the Python
tests and the comparison with torch.optim need more, and are reported as failed where it is missing. Their
extension is built while the first programs run.
"""

import argparse
import contextlib
import json
import pathlib
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree

import python_tests

ROOT = pathlib.Path(__file__).resolve().parents[2]

# name, seconds it may take, program, arguments. A program of compute-sanitizer names what it runs.
PARTS = [
    ("bits", 90, "cuda_gpu_bits", []),
    ("convert", 60, "gpu_convert_test", []),
    ("norm", 30, "cuda_gpu_norm", []),
    ("behaviour", 30, "cuda_gpu_behaviour", []),
    ("streams", 30, "cuda_gpu_streams", []),
    ("graphs", 60, "cuda_gpu_graphs", []),
    ("state", 60, "cuda_gpu_state", []),
    ("flat", 30, "cuda_gpu_flat", []),
    ("limits", 60, "gpu_limits_test", []),
    ("python", 300, "python_tests.py", []),
]
BENCHMARKS = [
    ("bench", 100, "bench_cuda", ["--models=gpt2,resnet152,tiny10k"]),
    ("bench XL", 60, "bench_cuda", ["--models=gpt2_xl", "--rules=adam,sgd,rmsprop_momentum_centered"]),
    ("bench shapes", 100, "bench_shapes", []),
    ("bench torch", 100, "fusestep", ["--quick"]),
    ("bench torch XL", 120, "fusestep", ["--models=gpt2_xl,resnet152", "--optimizers=adam", "--operations=step,clip"]),
    ("bench torch RMSprop", 60, "fusestep", ["--models=gpt2_xl", "--optimizers=rmsprop_momentum_centered"]),
    ("bench torch small", 60, "fusestep", ["--models=tiny10k", "--optimizers=adam"]),
]
PYTHON = ("python_tests.py", "fusestep")  # programs that need the package
SANITIZED = ("cuda_gpu_behaviour", [])  # with compute-sanitizer: every kind of launch, small tensors
SANITIZER_TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]


def find_program(build, name):
    return next((path for path in sorted(build.rglob(name)) if path.is_file()), None)


def python_build(build):
    return [sys.executable, python_tests.__file__, f"--build={build.parent / 'gpu-python'}"]


@contextlib.contextmanager
def building(options, end):
    """Builds the Python package meanwhile, where a part needs it; what is entered waits for that."""
    if not any(options.only in part[0] for part in PARTS + BENCHMARKS if part[2] in PYTHON):
        yield lambda: None
        return
    with (options.out / "python-build.log").open("w") as log:
        build = subprocess.Popen([*python_build(options.build), "--only-build"], stdout=log, stderr=log)

    def finish():
        with contextlib.suppress(subprocess.TimeoutExpired):
            build.wait(max(0, end - time.monotonic()))

    try:
        yield finish
        finish()
    finally:
        build.kill()


def command_of(part, build, out):
    name, _, program, arguments = part
    if program == "python_tests.py":
        return [*python_build(build), f"--junitxml={out / 'python.xml'}"]
    if program == "fusestep":
        arguments = ["bench", "--device=cuda", f"--out={out / name.replace(' ', '-')}", *arguments]
        return [*python_build(build), "--run", *arguments]
    path = find_program(build, program)
    if path is None:
        return None
    result = out / f"{name.replace(' ', '-')}.json"
    if program.startswith("bench_"):
        models = f"--models_file={ROOT / 'python/fusestep/benchmark/shapes.json'}"
        return [path, models, *arguments, f"--benchmark_out={result}", "--benchmark_out_format=json"]
    return [path, *arguments, f"--gtest_output=json:{result}", "--gtest_brief=1"]


def sanitizer_parts():
    for tool in SANITIZER_TOOLS:
        yield (f"compute-sanitizer {tool}", 60, tool)


def run(name, command, seconds, out):
    start = time.monotonic()
    log = out / f"{name.replace(' ', '-')}.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds).returncode
            outcome = "passed" if status == 0 else f"FAILED ({status})"
            if status == python_tests.MISSING:
                outcome = f"FAILED ({log.read_text().strip()})"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED (more than {seconds} s)"
    spent = time.monotonic() - start
    print(f"  {name:<32} {outcome:<24} {spent:6.1f} s", flush=True)
    return {"name": name, "outcome": outcome, "seconds": round(spent, 1)}


def count_tests(path):
    """(run, skipped) of GoogleTest's result or pytest's: a test without its device does not pass silently."""
    junit = path.with_suffix(".xml")
    if junit.exists():
        suite = xml.etree.ElementTree.parse(junit).getroot().find("testsuite")
        skipped = int(suite.get("skipped"))
        return int(suite.get("tests")) - skipped, skipped
    if not path.exists():
        return 0, 0
    tests = [test for suite in json.loads(path.read_text()).get("testsuites", []) for test in suite["testsuite"]]
    skipped = sum(test.get("result") == "SKIPPED" for test in tests)
    return len(tests) - skipped, skipped


def device():
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() or "none"


def print_benchmarks(out):
    for path in sorted(out.glob("bench*.json")):
        try:
            benchmarks = json.loads(path.read_text())["benchmarks"]
        except json.JSONDecodeError:
            continue
        for entry in benchmarks:
            name = entry["name"]
            if "apply_roof_fraction" in entry:
                print(
                    f"  {name:<52} apply {entry['apply_us']:9.1f} us  {entry['apply_roof_fraction']:.3f} of the copy"
                    f"  prepare {entry['prepare_us']:.1f} us"
                )
            else:
                figures = {k: round(v, 3) for k, v in entry.items() if k.endswith(("_us", "_fraction"))}
                print(f"  {name:<52} {figures or entry.get('error_message', '')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=int, default=480, help="for everything together")
    parser.add_argument("--only", default="", metavar="WORD", help="parts with this word in their names")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    options = parser.parse_args()
    if options.list:
        for name, seconds, program, arguments in PARTS + BENCHMARKS:
            print(f"{name:<12} {seconds:>4} s  {program} {' '.join(arguments)}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    results = []

    def attempt(name, seconds, command):
        if options.only not in name:
            return
        left = end - time.monotonic()
        if command is None:
            results.append({"name": name, "outcome": "FAILED (there is no such program)", "seconds": 0})
        elif left < 5:
            results.append({"name": name, "outcome": "FAILED (no time left)", "seconds": 0})
        else:
            results.append(run(name, command, min(seconds, left), options.out))

    with building(options, end) as finish_build:
        for part in PARTS:
            if part[2] == "python_tests.py":
                finish_build()
            attempt(part[0], part[1], command_of(part, options.build, options.out))
    program = find_program(options.build, SANITIZED[0])
    sanitizer = shutil.which("compute-sanitizer")
    for name, seconds, tool in sanitizer_parts():
        found = sanitizer and program
        result = options.out / f"{name.replace(' ', '-')}.json"
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", program, *SANITIZED[1]]
        command += [f"--gtest_output=json:{result}", "--gtest_brief=1"]
        attempt(name, seconds, command if found else None)

    for part in BENCHMARKS:
        attempt(part[0], part[1], command_of(part, options.build, options.out))

    for result in results:
        path = options.out / f"{result['name'].replace(' ', '-')}.json"
        if not result["name"].startswith("bench"):
            result["tests"], result["skipped"] = count_tests(path)
            if result["outcome"] == "passed" and result["tests"] == 0:
                result["outcome"] = "FAILED (no test has run)"
    summary = {"device": device(), "host": platform.platform(), "date": time.strftime("%Y-%m-%d"), "parts": results}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    print(f"\n{summary['device']}, {summary['date']}")
    print_benchmarks(options.out)
    for result in results:
        tests = f"{result['tests']} tests, {result['skipped']} skipped" if "tests" in result else ""
        print(f"  {result['name']:<32} {result['outcome']:<24} {result['seconds']:6.1f} s  {tests}")
    return 1 if any("FAILED" in result["outcome"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
