# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
import types

import pytest
import torch

import fusestep
import fusestep.optim
from fusestep import __main__ as command_line
from fusestep.benchmark import cases, contestants, devices, plots, workload

pytestmark = pytest.mark.on_cpu

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPERATIONS = ",".join(cases.OPERATIONS)
PICTURES = {f"{name}{end}" for name in ("time_against_bytes", "speedup", "host_time") for end in (".png", ".svg")}


def bench(*arguments, draw=False):
    """(exit status, standard output, standard error) of a run with one thread, a small roof, and no pictures."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(devices.Cpu, "roof_elements", 1 << 18)
        if not draw:
            patch.setattr(plots, "draw", lambda results, folder: [])
        try:
            status = command_line.main(["bench", "--threads", "1", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def tiny(folder, *arguments, **options):
    """The results of a run that has to succeed."""
    status, out, err = bench("--quick", "--models", "3x40", "--out", folder, *arguments, **options)
    assert status == 0, err
    return json.loads((folder / "benchmark.json").read_text()), out


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One run with every operation: its folder."""
    folder = tmp_path_factory.mktemp("bench")
    tiny(folder, "--optimizers", "adam", "--operations", OPERATIONS, "--groups", "2", draw=True)
    return folder


@pytest.fixture(scope="module")
def results(everything):
    return json.loads((everything / "benchmark.json").read_text())


# ---- what a run leaves -------------------------------------------------------------------------


def test_rows(results):
    assert results["schema"] == "fusestep-benchmark-1"
    names = {row["name"] for row in results["benchmarks"]}
    others = {f"adam/float32/3x40/groups=2/{name}" for name in cases.OPERATIONS if name != "step"}
    assert names == {"adam/float32/3x40/groups=2"} | others
    for row in results["benchmarks"]:
        clock = "host_us" if row["operation"] in cases.HOST_OPERATIONS else "wall_us"
        assert len(row["samples"][clock]) == results["context"]["rounds"] >= 20
        assert row[clock] == statistics.median(row["samples"][clock]) > 0
        low, high = row[f"{clock}_quartiles"]
        assert low <= row[clock] <= high
        assert row["tensors"] == 3 and row["elements"] == 120
        assert row["error_ulps"] < 2
        assert ("roof_fraction" in row) == (row["operation"] in ("step", "clip", "scaler", "zero_grad"))
        assert row["speedup"] == 1 or row["contestant"] != "fusestep"


def test_contestants(results):
    by_operation = {}
    for row in results["benchmarks"]:
        by_operation.setdefault(row["operation"], []).append(row["contestant"])
    four = ["fusestep", "torch fused", "torch foreach", "torch for-loop"]
    assert by_operation.pop("clip") == [*four, "fusestep.Optimizer"]
    assert by_operation.pop("save") == ["fusestep", "torch.save", "torch.save, fsync"]
    assert by_operation.pop("load") == ["fusestep", "torch.load"]
    flat = ["fusestep flat", "fusestep flat, trusted"]
    assert by_operation.pop("host") == ["fusestep", "fusestep, one group", *flat, *four[1:]]
    assert by_operation.pop("skipped") == ["fusestep", *flat, "torch fused"]
    of_groups = ["fusestep", "fusestep, one group", *four[1:]]
    assert by_operation.pop("step") == by_operation.pop("moved") == of_groups
    assert all(labels == four for labels in by_operation.values())
    assert not torch.distributed.is_initialized()


def test_flat_groups_step_models_of_many_small_tensors():
    def takes_part(model, operation="step"):
        return "fusestep flat" in contestants.labels(cases.Case("adam", "float32", model, 1, operation))

    assert takes_part("tiny10k") and takes_part("resnet152") and takes_part("200x6")
    assert not takes_part("199x6") and not takes_part("gpt2_xl") and not takes_part("tiny10k", "clip")


def test_the_machine_is_described(results):
    context = results["context"]
    for key in ("date", "command", "processor", "cores", "memory_bytes", "system", "threads", "torch", "load_after"):
        assert context[key], key
    assert context["fusestep"] == json.loads(json.dumps(fusestep.info())) | {"threads": context["fusestep"]["threads"]}


def test_table_and_pictures(everything, results):
    text = (everything / "benchmark.md").read_text()
    for row in results["benchmarks"]:
        assert f"`{row['name']}`" in text and row["contestant"] in text
    assert {path.name for path in everything.iterdir()} == PICTURES | {"benchmark.json", "benchmark.md"}
    for path in everything.glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_everything_is_made_of_the_json_alone(everything, tmp_path):
    """Without torch, and without the extension's help."""
    program = f"""
import sys
sys.modules["torch"] = None
from fusestep.__main__ import main
sys.exit(main(["bench", "--report", {str(everything / "benchmark.json")!r}, "--out", {str(tmp_path)!r}]))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    text = (everything / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.md").read_text() == text and run.stdout == text + "\n"
    assert {path.name for path in tmp_path.iterdir()} == PICTURES | {"benchmark.md"}


def test_without_matplotlib_and_tqdm_there_is_the_rest(everything, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.ticker", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    status, out, err = bench("--models", "2x3", "--optimizers", "sgd", "--out", tmp_path, draw=True)
    assert status == 0 and "## Step" in out and "no plots" in err
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.json", "benchmark.md"}


def test_nothing_but_the_files_is_told_where_there_is_no_terminal(tmp_path):
    _, _, err = bench("--models", "2x3", "--optimizers", "sgd", "--out", tmp_path)
    assert err == f"written to {tmp_path}: benchmark.json, benchmark.md\n"


# ---- fairness ----------------------------------------------------------------------------------


def wrong(rule, groups):
    return torch.optim.Adam([{"params": group} for group in groups], lr=1.1, **rule.settings)


def test_rounded_betas_have_a_bound_of_their_own():
    """Of others' kernels, which form 1 - beta2 of float32."""
    case = cases.Case("adam", "float32", "3x40", 1)
    assert workload.allowed_ulps(case, beta_is_rounded=False) == 2
    assert workload.allowed_ulps(case, beta_is_rounded=True) == 66
    assert workload.allowed_ulps(cases.Case("adam", "float64", "3x40", 1), beta_is_rounded=True) == 2
    assert 2 < workload.allowed_ulps(cases.Case("adam", "bfloat16", "3x40", 1), beta_is_rounded=True) < 2.01


def class_with(rule_class, **settings):
    """That has these, whatever it is given."""

    class Deaf(getattr(fusestep.optim, rule_class)):
        def __init__(self, params, **given):
            super().__init__(params, **{**given, **settings})

    return Deaf


class WithoutMaximum(torch.optim.Adam):
    """AMSGrad that keeps the slot, and divides by what every Adam divides by."""

    def __init__(self, params, **settings):
        super().__init__(params, **{**settings, "amsgrad": False})

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["max_exp_avg_sq"] = torch.maximum(
                state.get("max_exp_avg_sq", state["exp_avg_sq"]), state["exp_avg_sq"]
            )


class WithoutScale(fusestep.optim.Adam):
    def step(self, closure=None):
        self.grad_scale = None
        super().step(closure)


MISTAKES = {
    "AMSGrad is Adam": ("amsgrad", "step", class_with("Adam", amsgrad=False), "has no max_exp_avg_sq"),
    "AMSGrad without the maximum": ("amsgrad", "step", WithoutMaximum, "in the last place"),
    "no weight decay": ("adamw", "step", class_with("AdamW", weight_decay=0.0), "in the last place"),
    "weight decay is decoupled": ("adam", "step", class_with("AdamW"), "in the last place"),
    "eps is forgotten": ("adam", "step", class_with("Adam", eps=1e-8), "in the last place"),
    "beta2 is forgotten": ("adam", "step", class_with("Adam", betas=(0.75, 0.999)), "in the last place"),
    "Nesterov is momentum": ("sgd_nesterov", "step", class_with("SGD", nesterov=False), "in the last place"),
    "nothing is centered": ("rmsprop_centered", "step", class_with("RMSprop", centered=False), "has no grad_avg"),
    "the scale is ignored": ("adam", "scaler", WithoutScale, "in the last place"),
    "nothing is clipped": ("adam", "clip", class_with("Adam"), "in the last place"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, dtype, tmp_path, monkeypatch):
    rule, operation, cls, why = MISTAKES[mistake]
    monkeypatch.setattr(fusestep.optim, cases.RULES[rule].torch_class, cls)
    if operation == "clip":
        monkeypatch.setattr(cls, "max_grad_norm", property(lambda self: None, lambda self, value: None), raising=False)
    work = workload.Workload(cases.Case(rule, dtype, "4x500", 1, operation), "cpu")
    with pytest.raises(contestants.LeftOut, match=why):
        contestants.entered("fusestep", work, tmp_path, workload.references(work))


def test_a_wrong_contestant_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(contestants.FACTORIES, "wrong", wrong)
    results, out = tiny(tmp_path, "--optimizers", "adam", "--dtypes", "float32,bf16")
    assert "wrong" not in {row["contestant"] for row in results["benchmarks"]}
    refused = [entry for entry in results["left_out"] if entry["contestant"] == "wrong"]
    assert len(refused) == 2 and all("in the last place" in entry["why"] for entry in refused)
    assert "- wrong: its result is" in out


def test_a_wrong_fusestep_is_not_timed_and_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(contestants.FACTORIES, "fusestep", wrong)
    status, out, _ = bench("--models", "3x40", "--optimizers", "adam", "--out", tmp_path)
    assert status == 1 and "Nothing was measured." in out and "fusestep is wrong here" in out
    assert json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"] == []


@pytest.mark.parametrize("operation", ["zero_grad", "save"])
def test_other_results_are_checked_too(tmp_path, monkeypatch, operation):
    class Idle(fusestep.optim.Adam):
        def zero_grad(self, set_to_none=True):
            pass

        def load(self, path):
            pass

    monkeypatch.setattr(fusestep.optim, "Adam", Idle)
    status, out, _ = bench("--models", "3x40", "--optimizers", "adam", "--operations", operation, "--out", tmp_path)
    assert status == 1 and "fusestep is wrong here" in out


def test_a_slower_fusestep_is_printed_as_such(tmp_path, monkeypatch):
    class Slow(fusestep.optim.Adam):
        def step(self, closure=None):
            time.sleep(0.02)
            super().step(closure)

    monkeypatch.setattr(fusestep.optim, "Adam", Slow)
    results, out = tiny(tmp_path, "--optimizers", "adam")
    assert all(row["speedup"] < 1 for row in results["benchmarks"] if row["contestant"] != "fusestep")
    assert "slower in 1** of 1 cases" in out and "\n- slower: `adam/float32/3x40/groups=1`, 0." in out
    assert re.search(r"\| \*\*0\.\d\d x \(.*\), slower\*\*", out)


def test_half_stored_parameters_take_no_part(tmp_path):
    results, out = tiny(tmp_path, "--optimizers", "sgd", "--dtypes", "bf16")
    assert [row["contestant"] for row in results["benchmarks"]] == ["fusestep", "torch foreach", "torch for-loop"]
    assert "torch fused: its result is" in out


def test_all_rules_agree_with_torch_in_all_dtypes(tmp_path):
    for rule in cases.RULES:
        for dtype in cases.DTYPES:
            work = workload.Workload(cases.Case(rule, dtype, "4x500", 3), "cpu")
            references = workload.references(work)
            _, ulps = contestants.entered("fusestep", work, tmp_path, references)
            assert len(references) == (1 if rule == "sgd" else 2) and ulps < 1.5, (rule, dtype)


def test_samples_have_both_ends():
    work = workload.Workload(cases.Case("sgd", "float32", "1x100000", 1), "cpu")
    flat = work.params[0].detach()
    sample = work.sampled([flat])
    assert sample.numel() == workload.SAMPLED
    assert sample[0] == flat[0].double() and sample[-1] == flat[-1].double()


def test_gradients_move():
    work = workload.Workload(cases.Case("sgd", "float32", "2x10", 1, "moved"), "cpu")
    before = [(p.grad.data_ptr(), p.grad.tolist()) for p in work.params]
    work.move_grads()
    after = [(p.grad.data_ptr(), p.grad.tolist()) for p in work.params]
    assert [values for _, values in after] == [values for _, values in before]
    assert not {address for address, _ in after} & {address for address, _ in before}


def test_what_does_not_fit_is_left_out(tmp_path):
    results, out = tiny(tmp_path, "--models", "1x1000000000000", "--optimizers", "sgd")
    assert results["benchmarks"] == []
    assert re.search(r"needs about [\d.]+ GB of memory, [\d.]+ GB are free", out)


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    class Interrupted(fusestep.optim.SGD):
        def step(self, closure=None):
            raise KeyboardInterrupt

    monkeypatch.setattr(fusestep.optim, "SGD", Interrupted)
    status, out, _ = bench("--models", "3x40", "--optimizers", "adam,sgd,rmsprop", "--out", tmp_path)
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert status == 130 and {row["rule"] for row in results["benchmarks"]} == {"adam"}
    assert "- the run was interrupted (`sgd/float32/3x40/groups=1` and 1 more)" in out


def test_a_run_that_dies_leaves_what_it_has(tmp_path, monkeypatch):
    class Dies(fusestep.optim.SGD):
        def step(self, closure=None):
            raise SystemExit(3)

    monkeypatch.setattr(fusestep.optim, "SGD", Dies)
    status, _, _ = bench("--models", "3x40", "--optimizers", "adam,sgd", "--out", tmp_path)
    assert status == 3 and [path.name for path in tmp_path.iterdir()] == ["benchmark.json.part"]
    status, out, _ = bench("--report", tmp_path / "benchmark.json.part", "--out", tmp_path)
    assert status == 0 and "`adam/float32/3x40/groups=1`" in out


def test_what_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "Workload", None)  # whoever measures fails
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        status, out, err = bench("--models", "3x40", "--optimizers", "adam", "--out", folder)
        assert status == 2 and "cannot be written" in err and not out


def fake_package(**classes):
    optim = types.ModuleType("fake")
    vars(optim).update(classes)
    return optim


class WithBits(torch.optim.AdamW):
    def __init__(self, params, optim_bits, **settings):
        assert optim_bits == 32
        super().__init__(params, **settings)


class CpuAdam(torch.optim.Adam):
    """1 - beta2 is formed of a beta2 in float32, as DeepSpeed's."""

    def __init__(self, params, adamw_mode, **settings):
        super().__init__(params, decoupled_weight_decay=adamw_mode, **settings)

    def step(self, closure=None):
        super().step(closure)
        _, beta2 = self.param_groups[0]["betas"]
        rounded = 1 - torch.tensor(beta2).double().item()
        for p, state in self.state.items():
            state["exp_avg_sq"] += (rounded - (1 - beta2)) * p.grad**2


def test_installed_packages_take_part(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake_package())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", fake_package(AdamW=WithBits, RMSprop=None))
    for name in ("deepspeed", "deepspeed.ops"):
        monkeypatch.setitem(sys.modules, name, fake_package())
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", fake_package(DeepSpeedCPUAdam=CpuAdam))
    results, out = tiny(tmp_path, "--optimizers", "adam,adamw,rmsprop")
    found = [(row["rule"], row["contestant"]) for row in results["benchmarks"]]
    assert {("adamw", "bitsandbytes"), ("adam", "DeepSpeed"), ("adamw", "DeepSpeed")} <= set(found)
    assert ("adam", "bitsandbytes") not in found
    assert "bitsandbytes: it refuses: TypeError" in out and "apex: not installed" in out


# ---- cases -------------------------------------------------------------------------------------


def test_bytes_per_element():
    table = {  # of float32: gradient read, parameter and slots read and written
        "adam": 4 + 8 + 2 * 8,
        "adamw": 28,
        "amsgrad": 36,
        "sgd": 12,
        "sgd_momentum": 20,
        "sgd_nesterov": 20,
        "rmsprop": 20,
        "rmsprop_momentum": 28,
        "rmsprop_centered": 28,
        "rmsprop_momentum_centered": 36,
    }
    assert {rule: cases.bytes_per_element(rule, "float32") for rule in cases.RULES} == table
    assert cases.bytes_per_element("adam", "bfloat16") == 14
    assert cases.bytes_per_element("adam", "float64") == 56
    assert cases.bytes_per_element("adam", "float32", "clip") == 32
    assert cases.bytes_per_element("adam", "bfloat16", "scaler") == 18
    assert cases.bytes_per_element("adam", "float32", "zero_grad") == 4
    assert cases.bytes_per_element("amsgrad", "float32", "save") == 12
    assert cases.Case("adam", "float32", "tiny10k", 8).bytes == 280_000_000


def test_state_has_the_slots_of_the_table():
    for rule in cases.RULES.values():
        for cls in (getattr(torch.optim, rule.torch_class), getattr(fusestep.optim, rule.torch_class)):
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            optimizer = cls([p], lr=0.1, **rule.settings)
            optimizer.step()
            shaped = {name for name, value in optimizer.state[p].items() if torch.is_tensor(value) and value.dim()}
            assert shaped == set(rule.slots), rule


def test_the_programs_in_cpp_have_the_same_names():
    source = (ROOT / "bench" / "cpp" / "workload.h").read_text()
    rules = re.findall(r'\{"(\w+)", (?:Adam|AdamW|Sgd|Rmsprop)Hyper\{.*?\}, (\d)\}', source)
    assert {name: int(slots) for name, slots in rules} == {name: len(rule.slots) for name, rule in cases.RULES.items()}
    assert set(cases.DTYPES) <= set(re.findall(r'\{"(\w+)", \w+, \w+, ', source))


def test_models():
    assert cases.shapes("2x7") == [[7], [7]]
    assert cases.Case("sgd", "float32", "resnet152", 1).elements == 60_192_808
    assert len(cases.shapes("resnet152")) == 467
    assert cases.Case("sgd", "float32", "one64m", 1).elements == 64 << 20


@pytest.mark.parametrize("selection", [cases.quick(), cases.standard("cpu"), cases.standard("cuda"), cases.full()])
def test_selections_have_no_case_twice(selection):
    names = [case.name for case in selection]
    assert len(names) == len(set(names)) > 5


WRONG = {
    "unknown model 'gpt5', expected one of": ["--models", "gpt5"],
    "unknown model '0x3', expected one of": ["--models", "0x3"],
    "unknown optimizer 'lion', expected one of adam, ": ["--optimizers", "adam,lion"],
    "unknown dtype 'int8', expected one of float32, ": ["--dtypes", "int8"],
    "unknown operation 'jump', expected one of step, ": ["--operations", "jump"],
    "'0' is no number of groups": ["--groups", "0"],
    "--rounds 19 is too few, expected 20 or more": ["--rounds", "19"],
    "--threads 0 is not possible, expected 1 to ": ["--threads", "0"],
    "--threads 999999 is not possible, expected 1 to ": ["--threads", "999999"],
    "'\u00b2' is no number of groups": ["--groups", "\u00b2"],
    "--quick and --full exclude each other": ["--quick", "--full"],
    "nothing.json cannot be read": ["--report", "nothing.json"],
    "expected at least one name": ["--models", ","],
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_arguments(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = bench(*WRONG[text])
    assert status == 2 and text in err.splitlines()[-1] and not out
    assert not list(tmp_path.iterdir())


def test_a_file_of_something_else(tmp_path):
    for content in ("{}", "[]", "nonsense", '{"schema": "fusestep-benchmark-1", "context": {}, "left_out": []}'):
        (tmp_path / "x.json").write_text(content)
        status, _, err = bench("--report", tmp_path / "x.json")
        assert status == 2 and "x.json" in err.splitlines()[-1]


def test_json_is_printed_on_request(everything, tmp_path):
    status, out, _ = bench("--json", "--report", everything / "benchmark.json", "--out", tmp_path)
    assert status == 0 and json.loads(out) == json.loads((everything / "benchmark.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device(tmp_path):
    status, _, err = bench("--device", "cuda", "--out", tmp_path)
    assert status == 2 and "torch sees no CUDA device" in err


# ---- clocks ------------------------------------------------------------------------------------


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks")
def test_peak_memory_of_the_cpu():
    cpu = devices.Cpu(1)
    assert 39e6 < cpu.peak_bytes(lambda: torch.ones(10_000_000).sum()) < 60e6
    assert cpu.peak_bytes(lambda: None) < 4e6


def test_threads_are_put_back():
    before = torch.get_num_threads(), fusestep.num_threads()
    with devices.Cpu(1).in_use():
        assert (torch.get_num_threads(), fusestep.num_threads()) == (1, 1)
    assert (torch.get_num_threads(), fusestep.num_threads()) == before


def test_clocks_of_cuda_in_their_order(monkeypatch):
    """On a stand-in: what is recorded and awaited when."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("await")

        def elapsed_time(self, end):
            return 0.25

    cuda = types.SimpleNamespace(Event=Event, synchronize=lambda: events.append("synchronize"))
    scratch = types.SimpleNamespace(sum=lambda: events.append("flush"))
    stand_in = types.SimpleNamespace(cuda=cuda, ones=lambda *_, **__: scratch)
    monkeypatch.setattr(devices, "torch", stand_in)
    times = devices.Cuda().sample(lambda: events.append("call"))
    assert times["device_us"] == 250 and times["host_us"] <= times["wall_us"]
    first = ["flush", "synchronize", "call", "synchronize"]
    assert events == [*first, "flush", "record", "call", "record", "await"]
