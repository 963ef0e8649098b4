#!/usr/bin/env python3
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Builds the Python package with CUDA and runs its tests on the GPU.

    python_tests.py --build FOLDER [--junitxml FILE] [pytest's options]
    python_tests.py --build FOLDER --only-build
    python_tests.py --build FOLDER --run [arguments of python -m fusestep]

Of the Python that runs it torch, NumPy, pybind11 and pytest are needed; cmake, ninja and nvcc beside them.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUITES = [
    "test_cuda.py",
    "test_graphs.py",
    "test_parity.py",
    "test_stories.py",
    "test_gradients.py",
    "test_mixed_precision.py",
    "test_flat.py",
    "test_threads_memory.py",
    "test_distributed.py::test_over_nccl",
]
MISSING = 77


def missing_tools():
    modules = [name for name in ("torch", "numpy", "pybind11", "pytest") if importlib.util.find_spec(name) is None]
    return modules + [name for name in ("cmake", "ninja", "nvcc") if shutil.which(name) is None]


def build_package(build):
    """The package with its extension, apart from the source tree."""
    import pybind11

    package = build / "package" / "fusestep"
    package.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DFUSESTEP_CUDA=ON"]
    configure += ["-DFUSESTEP_BUILD_PYTHON=ON", "-DFUSESTEP_BUILD_TESTS=OFF", "-DFUSESTEP_BUILD_EXAMPLES=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}"]
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", build, "--target", "fusestep_core"], check=True)
    shutil.copytree(ROOT / "python" / "fusestep", package, ignore=shutil.ignore_patterns("*.so"), dirs_exist_ok=True)
    return package.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--only-build", action="store_true")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="of python -m fusestep, in place of the tests")
    options, for_pytest = parser.parse_known_args()
    missing = missing_tools()
    if missing:
        print("missing: " + ", ".join(missing))
        return MISSING
    try:
        package = build_package(options.build.resolve())
    except subprocess.CalledProcessError as error:
        print(f"the extension could not be built: {error}")
        return 1
    if options.only_build:
        return 0
    environment = {**os.environ, "PYTHONPATH": str(package)}
    if options.run:
        return subprocess.run([sys.executable, "-m", "fusestep", *options.run], env=environment).returncode
    suites = [ROOT / "tests" / "python" / name for name in SUITES]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *suites, *for_pytest]
    return subprocess.run(command, env={**environment, "FUSESTEP_TEST_DEVICE": "cuda"}, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
