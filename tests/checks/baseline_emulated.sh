#!/usr/bin/env bash
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
#
# baseline_emulated.sh PROBE RULES_TEST: on a processor without AVX the baseline is chosen, no
# instruction is met that such a processor does not have, and the bits are those of this machine.
set -euo pipefail
probe=$1 rules_test=$2
qemu=$(command -v qemu-x86_64 || command -v qemu-x86_64-static || true)
[[ -n $qemu ]] || { echo "skipped: qemu-x86_64 is not installed (qemu-user)"; exit 77; }

here=$("$probe")
for cpu in qemu64 Nehalem; do
  there=$("$qemu" -cpu "$cpu" "$probe")
  [[ ${there%% *} == baseline ]] || { echo "$cpu: '${there%% *}' was chosen, not baseline"; exit 1; }
  [[ ${there##* } == "${here##* }" ]] || { echo "$cpu: other bits: $there, here: $here"; exit 1; }
done
"$qemu" -cpu Nehalem "$rules_test" --gtest_brief=1 \
  --gtest_filter='*ShortRun/*_float32:*ShortRun/*_bfloat16:*ShortRun/*_float16'
