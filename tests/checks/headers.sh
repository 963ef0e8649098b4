#!/usr/bin/env bash
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
#
# headers.sh COMPILER INCLUDE_DIR: every header compiles alone and twice, includes nothing of CUDA,
# torch or pybind11, and the installed ones include installed ones only.
set -euo pipefail
compiler=$1 include=$2
failed=0
cd "$include"

if grep -rnE '^ *# *include *[<"](cuda|cub/|thrust/|nv|torch/|ATen/|c10/|pybind11/|Python\.h)' .; then
  echo "include/ must not include CUDA, torch or pybind11"
  failed=1
fi
if grep -nE '^ *# *include *[<"]fusestep/(detail|rules)/' fusestep/*.h; then
  echo "an installed header includes one that is not installed"
  failed=1
fi
count=0
while read -r header; do
  count=$((count + 1))
  printf '#include "%s"\n#include "%s"\n' "$header" "$header" |
    "$compiler" -std=c++20 -fsyntax-only -Wall -Wextra -Werror -I. -x c++ - ||
    { echo "$header does not compile alone"; failed=1; }
done < <(find fusestep -name '*.h' | sort)
echo "$count headers"
[[ $count -gt 10 && $failed == 0 ]]
