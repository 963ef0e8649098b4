#!/usr/bin/env bash
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
#
# `./dev gpu [--build] [options of run.py]`: builds what is missing, then runs it on the GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly build=build/gpu
only_build=''
if [ "${1:-}" = --build ]; then
  only_build=yes
  shift
fi
if [ -n "$only_build" ] || ! [ -x $build/bench/bench_cuda ]; then
  # Without a GPU here: for the H100 of the figures in docs/performance.md.
  architectures=90
  if command -v nvidia-smi >/dev/null; then architectures=native; fi
  cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DFUSESTEP_CUDA=ON \
    -DFUSESTEP_BUILD_TESTS=ON -DFUSESTEP_BUILD_BENCH=ON -DFUSESTEP_BUILD_EXAMPLES=OFF \
    -DCMAKE_CUDA_ARCHITECTURES="${FUSESTEP_GPU_ARCHITECTURES:-$architectures}"
  cmake --build $build --target gpu_programs
fi
if [ -n "$only_build" ]; then
  echo "the programs are in $build/bench and $build/tests"
  exit 0
fi
if ! command -v nvidia-smi >/dev/null; then
  echo "there is no NVIDIA GPU here; ./dev gpu --build makes the programs for a machine that has one" >&2
  exit 1
fi
exec python3 tests/gpu/run.py $build --out "${OUT:-out/gpu}" "$@"
