# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
import inspect
import pathlib
import re
import sys

import pytest
import torch

import fusestep
import support
from fusestep.optim import param_groups_by, summary

GOLDEN = pathlib.Path(__file__).parent / "golden"


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64))
        self.a_module_with_rather_a_long_name = torch.nn.Linear(64, 1024)
        self.head = torch.nn.Linear(1024, 10)


def tuned(norms=False):
    """A model in the middle of being fine-tuned, with every condition and most traps; exact numbers."""
    model = Net()
    groups = param_groups_by(model, {"head": {"lr": 1e-3}, "*": {"lr": 1e-5, "weight_decay": 0.1}}, "*.bias")
    optimizer = fusestep.optim.AdamW(groups, amsgrad=True)
    optimizer.freeze("stem.0", model)
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.5)
        p.grad = torch.full_like(p, 0.25) if p.requires_grad else None
    model.stem[1].bias.grad = None
    for _ in range(3):
        optimizer.step()
    model.stem[0].weight.grad = torch.ones_like(model.stem[0].weight)
    model.extra = torch.nn.Linear(2, 2)
    optimizer.param_groups[2]["lr"] = 0
    support.stepped_by_us(optimizer, steps=3)
    return optimizer.summary(model, norms=norms)


# ---- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("norms", [False, True])
def test_table(width, norms, request):
    """Golden text; after a change on purpose: delete the file, run twice, and look at what git shows."""
    text = tuned(norms).text(width)
    assert max(map(len, text.splitlines())) <= width
    file = GOLDEN / f"summary{'_norms' if norms else ''}_{width}.txt"
    if not file.exists():
        file.write_text(text + "\n")
        pytest.fail(f"{file.name} was missing and has been written")
    assert text + "\n" == file.read_text()


def test_str_has_the_terminals_width(monkeypatch):
    made = tuned()
    for width in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        assert str(made) == repr(made) == made.text(width)
        assert max(map(len, str(made).splitlines())) <= width


def test_rich_prints_it():
    import io

    from rich.console import Console

    made = tuned()
    file = io.StringIO()
    Console(file=file, width=80, force_terminal=True).print(made)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert file.getvalue() != plain
    assert [line.rstrip() for line in plain.splitlines()] == made.text(80).splitlines()


def test_html():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("<b>&", torch.nn.Parameter(torch.ones(2)))

    model = Model()
    page = fusestep.optim.SGD(model.named_parameters(), lr=0).summary(norms=True)._repr_html_()
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page
    assert page.count("<table>") == page.count("</table>") == 2
    assert "<p>Warning: Group 0 has lr 0" in page
    assert tuned()._repr_html_().count("<tr>") == 4 + 8


def test_without_rich(monkeypatch):
    made = tuned()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"^the table of a summary needs rich: pip install fusestep\[torch\]$"):
        str(made)
    assert made.rows and made._repr_html_()


# ---- rows --------------------------------------------------------------------------------------


def test_rows():
    rows = tuned(norms=True).rows
    assert [(row["group"], row["index"], row["name"], row["condition"], row["step"]) for row in rows] == [
        (0, 0, "head.weight", "stepping", 3),
        (1, 1, "head.bias", "stepping", 3),
        (2, 2, "stem.0.weight", "frozen", None),
        (2, 3, "stem.1.weight", "stepping", 3),
        (2, 4, "a_module_with_rather_a_long_name.weight", "stepping", 3),
        (3, 5, "stem.0.bias", "frozen", None),
        (3, 6, "stem.1.bias", "no gradient", None),
        (3, 7, "a_module_with_rather_a_long_name.bias", "stepping", 3),
    ]
    row = rows[3]
    assert {key: row[key] for key in ("shape", "dtype", "device", "elements", "bytes", "lr", "weight_decay")} == {
        "shape": (64,),
        "dtype": "float32",
        "device": "cpu",
        "elements": 64,
        "bytes": 256,
        "lr": 0,
        "weight_decay": 0.1,
    }
    assert row["settings"]["betas"] == (0.9, 0.999) and row["settings"]["amsgrad"] is True
    assert row["state"] == {"exp_avg": 256, "exp_avg_sq": 256, "max_exp_avg_sq": 256}
    assert row["grad_norm"] == 0.25 * 8
    assert row["state_norms"]["exp_avg"] == pytest.approx((1 - 0.9**3) * 0.25 * 8)
    frozen = rows[5]
    assert frozen["norm"] == 0.5 * 8 and frozen["grad_norm"] is None and frozen["state_norms"] == {}
    assert "norm" not in tuned().rows[0]


def test_totals():
    groups = tuned().groups
    assert [(g["parameters"], g["elements"], g["bytes"], g["state_bytes"]) for g in groups] == [
        (1, 10240, 40960, 3 * 40960),
        (1, 10, 40, 3 * 40),
        (3, 1728 + 64 + 65536, 4 * 67328, 3 * 4 * 65600),
        (3, 64 + 64 + 1024, 4 * 1152, 3 * 4 * 1024),
    ]
    assert [(g["stepping"], g["frozen"], g["no_gradient"]) for g in groups] == [
        (1, 0, 0),
        (1, 0, 0),
        (2, 1, 0),
        (1, 1, 1),
    ]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.01), (1e-3, 0), (0, 0.1), (1e-5, 0)]
    assert groups[2]["state"] == dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), 4 * 65600)


def test_index_is_the_optimizers_not_the_models():
    """Two weights out of four parameters are 0 and 1."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = fusestep.optim.SGD([model[0].weight, model[1].weight], lr=0.1)
    made = summary(optimizer, model)
    assert [(row["index"], row["name"]) for row in made.rows] == [(0, "0.weight"), (1, "1.weight")]
    assert [index for group in optimizer.state_dict()["param_groups"] for index in group["params"]] == [0, 1]


def test_index_of_a_parameter_listed_twice_is_torchs():
    p, q = support.tensors((2,), (3,))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fusestep.optim.SGD([p, p, q], lr=0.1)
    assert [row["index"] for row in optimizer.summary().rows] == optimizer.state_dict()["param_groups"][0]["params"]


@pytest.mark.parametrize("named", [False, True])
def test_names(named):
    model = torch.nn.Linear(2, 2)
    optimizer = fusestep.optim.SGD(model.named_parameters() if named else model.parameters(), lr=0.1)
    assert [row["name"] for row in optimizer.summary().rows] == (["weight", "bias"] if named else ["", ""])
    assert [row["name"] for row in optimizer.summary(torch.nn.Sequential(model)).rows] == ["0.weight", "0.bias"]


def test_every_rule(name):
    parameters = support.tensors((4, 3), (), (0,))
    optimizer = support.ours(name)(parameters, **support.FULLEST[name])
    before = optimizer.summary(norms=True)
    assert [row["condition"] for row in before.rows] == ["no gradient"] * 3 and before.groups[0]["state"] == {}
    support.set_grads(parameters, seed=0)
    optimizer.step()
    support.stepped_by_us(optimizer, steps=1, parameters=3)
    optimizer.zero_grad()
    made = optimizer.summary(norms=True)
    for p, row in zip(parameters, made.rows, strict=True):
        slots = {slot: value for slot, value in optimizer.state[p].items() if slot != "step"}
        assert row["condition"] == "stepping"  # has stepped, and has no gradient just now
        assert row["step"] == (None if name == "SGD" else 1)
        assert row["state"] == {slot: value.nbytes for slot, value in slots.items()} != {}
        assert row["state_norms"] == {slot: pytest.approx(float(value.norm())) for slot, value in slots.items()}
    assert "All groups" not in made.text(80) and not made.warnings


def torch_optimizers():
    for name, cls in inspect.getmembers(torch.optim, inspect.isclass):
        if issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            yield name


@pytest.mark.parametrize("which", sorted(torch_optimizers()))
def test_any_optimizer_of_torch(which):
    shapes = ((4, 3), (2, 2)) if which == "Muon" else ((4, 3), (5,))
    parameters = support.tensors(*shapes)
    optimizer = getattr(torch.optim, which)(parameters, lr=0.01)
    support.set_grads(parameters, seed=0)
    if which == "SparseAdam":
        for p in parameters:
            p.grad = p.grad.to_sparse()
    optimizer.step(*[lambda: torch.ones(())] if which == "LBFGS" else [])
    made = summary(optimizer, norms=True)
    assert made.optimizer == which and [row["shape"] for row in made.rows] == list(shapes)
    assert all(row["grad_norm"] > 0 for row in made.rows)
    assert made.warnings == []
    assert made.text(80).startswith(f"{which}: 2 parameters, 1 group, ") and made._repr_html_()


def test_unusual_values():
    """Of dtypes and devices that differ, tensor settings, and what has no values."""
    half = torch.nn.Parameter(torch.full((300, 300), 300.0, dtype=torch.float16))  # its square overflows
    wave = torch.nn.Parameter(torch.tensor([3 + 4j]))
    ghost = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = fusestep.optim.Adam(
        [{"params": [half, wave]}, {"params": [ghost], "name": "ghosts"}, {"params": []}],
        lr=torch.tensor(0.5),
        betas=(torch.tensor(0.5), torch.tensor(0.75)),
    )
    made = optimizer.summary(norms=True)
    assert [row["norm"] for row in made.rows] == [90000.0, 5.0, None]
    assert made.rows[0]["lr"] == 0.5 and made.rows[0]["settings"]["betas"] == (0.5, 0.75)
    lines = made.text(80).splitlines()
    assert lines[3].split() == ["index", "name", "shape", "dtype", "device", "step", "condition", "state"]
    assert "Group 1: lr 0.5, weight_decay 0, name ghosts" in lines
    assert "Total: 0 parameters, 0 elements, 0 B; empty; no state" in lines


def test_changes_nothing(name):
    parameters = support.tensors((4, 3), (2,))
    optimizer = support.ours(name)(parameters, **support.STATEFUL[name])
    optimizer.summary(norms=True).text(80)
    assert dict(optimizer.state) == {}
    support.set_grads(parameters, seed=0)
    optimizer.step()
    before, grads = support.snapshot(optimizer), [p.grad.clone() for p in parameters]
    versions = [p._version for p in parameters]
    optimizer.summary(torch.nn.Linear(2, 2), norms=True).text(80)
    support.assert_bits(support.all_state(optimizer), before)
    assert all(map(torch.equal, [p.grad for p in parameters], grads))
    assert [p._version for p in parameters] == versions
    support.stepped_by_us(optimizer, steps=1)


# ---- traps -------------------------------------------------------------------------------------


def simple(frozen=(), **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    optimizer = fusestep.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **kwargs})
    for module in frozen:
        optimizer.freeze(str(module), model)
    return model, optimizer


def no_trap():
    return simple()


def frozen_well():
    model, optimizer = simple(frozen=[0, 1])
    model[1].eval()
    return model, optimizer


def frozen_parts_outside():
    model = simple()[0]
    model[0].requires_grad_(False)
    model[1].requires_grad_(False).eval()
    return model, fusestep.optim.SGD(model[2].parameters(), lr=0.1)


def in_no_group():
    model, optimizer = simple()
    model.append(torch.nn.Linear(2, 2))
    return model, optimizer


def replaced_head():
    model, optimizer = simple()
    model[2] = torch.nn.Linear(2, 3)
    return model, optimizer


def stale_gradient():
    model, optimizer = simple()
    model(torch.randn(4, 2)).exp().sum().backward()
    model[0].requires_grad_(False)
    return model, optimizer


def lr_of_zero():
    model, optimizer = simple()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": torch.tensor(0.0)})
    model.register_parameter("more", optimizer.param_groups[1]["params"][0])
    return model, optimizer


def state_that_does_not_fit():
    model, optimizer = simple()
    model(torch.randn(4, 2)).exp().sum().backward()
    optimizer.step()
    support.stepped_by_us(optimizer)
    model[2].weight.grad = None
    model[2].weight.data = torch.ones(5, 2)
    return model, optimizer


def moving_statistics():
    return simple(frozen=[0, 1])


def many_in_no_group():
    model, optimizer = simple()
    model.append(torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(4)]))
    return model, optimizer


TRAPS = [
    (no_trap, []),
    (frozen_well, []),
    (frozen_parts_outside, []),
    (in_no_group, ["3.weight, 3.bias: requires a gradient, but is in no group, so no step changes it."]),
    (
        replaced_head,
        [
            "2.weight, 2.bias: requires a gradient, but is in no group, so no step changes it.",
            "parameter 4, parameter 5: in a group, but not of the model.",
        ],
    ),
    (
        stale_gradient,
        ["0.weight, 0.bias: frozen, but with a gradient, so a step changes it; freeze() or p.grad = None helps."],
    ),
    (lr_of_zero, ["Group 1 has lr 0, so its parameters do not change."]),
    (state_that_does_not_fit, ["2.weight: momentum_buffer is of shape 2×2, the parameter of 5×2."]),
    (moving_statistics, ["1: frozen, but in training mode, so running statistics change; eval() helps."]),
    (
        many_in_no_group,
        [
            "3.0.weight, 3.0.bias, 3.1.weight, 3.1.bias, 3.2.weight and 3 more: "
            "requires a gradient, but is in no group, so no step changes it."
        ],
    ),
]


@pytest.mark.parametrize(("make", "expected"), TRAPS, ids=lambda value: getattr(value, "__name__", ""))
def test_warnings(make, expected):
    model, optimizer = make()
    assert summary(optimizer, model).warnings == expected


def test_what_is_warned_of_is_true():
    """That a step changes a frozen parameter with a stale gradient, and running statistics move."""
    model, optimizer = stale_gradient()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    support.stepped_by_us(optimizer)
    model, optimizer = moving_statistics()
    before = model[1].running_mean.clone()
    model(torch.randn(4, 2))
    assert not torch.equal(model[1].running_mean, before)
