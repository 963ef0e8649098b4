# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Builds the extension fusestep._core with CMake; everything else stands in pyproject.toml.

FUSESTEP_CMAKE_ARGS: further arguments for CMake, such as -DFUSESTEP_CUDA=OFF.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        target = pathlib.Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = pathlib.Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            # pip's ninja is at another place every time, and a cache from before has the old one.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DFUSESTEP_BUILD_PYTHON=ON",
            "-DFUSESTEP_BUILD_TESTS=OFF",
            "-DFUSESTEP_BUILD_EXAMPLES=OFF",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("FUSESTEP_CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "fusestep_core"], check=True)


version = re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text().split("project(")[1]).group(1)
setup(version=version, ext_modules=[Extension("fusestep._core", [])], cmdclass={"build_ext": CMakeBuild})
