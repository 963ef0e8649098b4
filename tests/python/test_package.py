# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
import ast
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import fusestep
from fusestep import _core

PACKAGE = pathlib.Path(fusestep.__file__).parent
ROOT = pathlib.Path(__file__).resolve().parents[2]


def stub_names(body):
    """Public name to argument names for functions, to a nested dict for classes, to None otherwise."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = stub_names(node.body)
        elif isinstance(node, ast.FunctionDef):
            decorators = [decorator.id for decorator in node.decorator_list]
            arguments = [argument.arg for argument in node.args.args]
            found[node.name] = None if decorators == ["property"] else arguments
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = None
    return found


def real_names(owner):
    found = {}
    for name, value in vars(owner).items():
        if name.startswith("_") and name not in ("__init__", "__version__"):
            continue
        if inspect.isclass(value) and issubclass(value, Exception):
            found[name] = {}
        elif inspect.isclass(value):
            found[name] = real_names(value)
        elif callable(value):
            signature = re.search(r"\((.*)\) ->", value.__doc__.splitlines()[0]).group(1)
            found[name] = re.findall(r"(?:^|, )(\w+)(?=:)", signature)
        else:
            found[name] = None
    return found


def test_stub_matches_the_extension():
    stub = stub_names(ast.parse((PACKAGE / "_core.pyi").read_text()).body)
    assert stub == real_names(_core)


def test_typed():
    assert (PACKAGE / "py.typed").exists()


def run(*arguments, **kwargs):
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, **kwargs).stdout


def test_info():
    info = fusestep.info()
    expected = {
        "version",
        "python",
        "compiler",
        "instruction_set",
        "available_instruction_sets",
        "threads",
        "built_with_cuda",
        "cuda_devices",
        "cuda_status",
    }
    assert set(info) == expected
    assert info["version"] == fusestep.__version__
    assert info["instruction_set"] in info["available_instruction_sets"]
    assert info["cuda_status"]
    text = run("-m", "fusestep", "info")
    assert text == f"{info}\n" and "cuda status" in text
    assert json.loads(run("-m", "fusestep", "info", "--json")) == dict(info)


def test_unknown_command():
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run("-m", "fusestep", "nothing")
    assert "invalid choice" in caught.value.stderr


def test_imports_without_torch():
    program = """
import sys
sys.modules["torch"] = None
import numpy, fusestep
w = numpy.ones(3, numpy.float32)
fusestep.Optimizer("SGD", {"w": w}, lr=0.5).step({"w": w.copy()})
assert w.tolist() == [0.5] * 3
try:
    fusestep.optim
except ImportError as error:
    print(error)
"""
    assert "torch" in run("-c", program)
    assert run("-c", "import fusestep, sys; print('torch' in sys.modules, 'numpy' in sys.modules)") == "False False\n"


def public_things():
    for name in fusestep.__all__:
        if name not in ("__version__", "optim"):
            yield f"fusestep.{name}", getattr(fusestep, name)
    for name in fusestep.optim.__all__:
        yield f"fusestep.optim.{name}", getattr(fusestep.optim, name)
    for name, value in vars(fusestep.Optimizer).items():
        if not name.startswith("_"):
            yield f"fusestep.Optimizer.{name}", value
    own = ("step", "state_dict", "load_state_dict", "save", "save_async", "wait_for_save", "load")
    more = ("sync_hyper", "freeze", "thaw", "summary", "refresh_master_weights", "grad_norm", "skipped_steps")
    for name in (*own, *more):
        yield f"fusestep.optim.Adam.{name}", getattr(fusestep.optim.Adam, name)
    yield "fusestep.History.record", fusestep.History.record


def test_everything_public_is_documented():
    for name, value in public_things():
        doc = inspect.getdoc(value) or ""
        # What pybind11 writes by itself is the signature.
        text = [line for line in doc.splitlines() if line.strip() and "->" not in line]
        assert text, name


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'fusestep' has no attribute 'nothing'"):
        fusestep.nothing  # noqa: B018


def test_imports_without_rich_and_matplotlib():
    program = """
import sys
sys.modules["rich"] = sys.modules["matplotlib"] = None
import torch, fusestep
optimizer = fusestep.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
print(optimizer.summary().rows[0]["shape"])
"""
    assert run("-c", program) == "(2,)\n"
    program = "import fusestep.optim, sys; print({'rich', 'matplotlib'} & set(sys.modules))"
    assert run("-c", program) == "set()\n"


def code_blocks(page="python.md"):
    page = ROOT / "docs" / page
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("index", range(len(code_blocks())))
def test_documentation_runs(index):
    run("-W", "error", "-c", code_blocks()[index], cwd=ROOT)


@pytest.mark.parametrize("index", range(len(code_blocks("mixed_precision.md"))))
def test_mixed_precision_page_runs(index):
    run("-W", "error", "-c", code_blocks("mixed_precision.md")[index], cwd=ROOT)


def test_finetuning_page_runs(tmp_path):
    """Its blocks are one program."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "80"}
    printed = run("-W", "error", "-c", "".join(code_blocks("finetuning.md")), cwd=tmp_path, env=environment)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        *("finetuning.png", "finetuning.svg", "all.safetensors", "new-head.safetensors", "model.pt")
    }
    page = (ROOT / "docs" / "finetuning.md").read_text()
    shown = re.findall(r"^```text\n(.*?)^(?:\.\.\.\n)?```", page, re.MULTILINE | re.DOTALL)
    assert printed.startswith(shown[0]) and all(text in printed for text in shown)


def test_docstring_example():
    import doctest

    from fusestep import arrays

    assert doctest.testmod(arrays).failed == 0
