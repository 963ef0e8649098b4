# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: parts of a model freeze and thaw while one optimizer goes on."""

import copy
import math

import pytest
import torch
from torch.optim import lr_scheduler

import fusestep
import support
from fusestep.optim import freeze, thaw

# With all that moves a parameter without a gradient of its own: momentum and weight decay.
MOVING = {
    "Adam": {"lr": 0.1, "weight_decay": 0.1},
    "AdamW": {"lr": 0.1, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9},
    "RMSprop": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9},
}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.backbone(x).relu())


BACKBONE = ["backbone.0.weight", "backbone.0.bias", "backbone.2.weight", "backbone.2.bias"]
HEAD = ["head.weight", "head.bias"]


def make(name, named=True, **kwargs):
    model = Net()
    parameters = model.named_parameters() if named else model.parameters()
    return model, support.ours(name)(parameters, **{**MOVING[name], **kwargs})


def train(model, optimizer, steps=1, seed=0, zero=True):
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        if zero:
            optimizer.zero_grad()
        model(torch.randn(5, 4, generator=random)).square().mean().backward()
        optimizer.step()


def values_and_state(optimizer, parameters):
    """By parameter, as copies."""
    return {
        (index, key): copy.deepcopy(value)
        for index, p in enumerate(parameters)
        for key, value in [("value", p.detach()), *optimizer.state.get(p, {}).items()]
    }


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


# ---- what is meant -----------------------------------------------------------------------------

# description: (what, from the model; names that are frozen)
TARGETS = {
    "module": (lambda m: m.backbone, BACKBONE),
    "model": (lambda m: m, BACKBONE + HEAD),
    "parameter": (lambda m: m.head.bias, ["head.bias"]),
    "name": (lambda m: "head.bias", ["head.bias"]),
    "name of a module": (lambda m: "backbone.0", BACKBONE[:2]),
    "pattern": (lambda m: "backbone.*", BACKBONE),
    "pattern across": (lambda m: "*.bias", ["backbone.0.bias", "backbone.2.bias", "head.bias"]),
    "list": (lambda m: [m.backbone[0], "head.bias", m.head.bias], [*BACKBONE[:2], "head.bias"]),
    "generator": (lambda m: m.backbone.parameters(), BACKBONE),
}


@pytest.mark.parametrize("by", ["model", "param_names"])
@pytest.mark.parametrize("case", TARGETS)
def test_targets(case, by):
    what, expected = TARGETS[case]
    model, optimizer = make("AdamW", named=by == "param_names")
    given = model if by == "model" else None
    optimizer.freeze(what(model), given)
    assert trained(model) == [name for name in BACKBONE + HEAD if name not in expected]
    optimizer.thaw(what(model), given)
    assert trained(model) == BACKBONE + HEAD
    assert len(optimizer.param_groups) == 1


# description: (what, model given?, message)
NOT_FOUND = {
    "near": ("bakbone.0.weight", True, "'bakbone.0.weight' matches no parameter; near are backbone.0.weight, "),
    "near module": ("backbon.*", True, "near are backbone"),
    "one of a list": (["head", "nothing"], True, "'nothing' matches no parameter; the names are under backbone, head"),
    "no names": ("head", False, "'head' is a name, and these parameters have none: pass model="),
    "wrong kind": (3, True, "expected a module, a parameter, a name or a list of these, got 3"),
    "no parameters": (torch.nn.ReLU(), True, "the module ReLU has no parameters"),
}


@pytest.mark.parametrize("case", NOT_FOUND)
def test_not_found_changes_nothing(case):
    what, with_model, message = NOT_FOUND[case]
    model, optimizer = make("AdamW", named=False)
    for method in (optimizer.freeze, optimizer.thaw):
        with pytest.raises(fusestep.InvalidArgument, match=message):
            method(what, model if with_model else None)
    assert trained(model) == BACKBONE + HEAD


def test_functions_without_an_optimizer():
    model = Net()
    freeze("backbone", model)
    assert trained(model) == HEAD
    thaw(model.backbone[0])
    assert trained(model) == BACKBONE[:2] + HEAD
    for wrong in ({"lr": 0.1}, {"scheduler": []}):
        with pytest.raises(fusestep.InvalidArgument, match="pass optimizer="):
            thaw(model, **wrong)


def test_tied_parameters_go_by_any_name():
    model = Net()
    model.copy = torch.nn.Linear(8, 3)
    model.copy.weight = model.head.weight
    freeze("copy.weight", model)
    assert not model.head.weight.requires_grad


# ---- freezing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [0, 3], ids=["frozen from the start", "frozen later"])
def test_frozen_backbone_does_not_change_by_a_bit(name, warm):
    model, optimizer = make(name)
    train(model, optimizer, warm)
    model(torch.ones(2, 4)).sum().backward()  # gradients that a step would use
    backbone, head = list(model.backbone.parameters()), list(model.head.parameters())
    assert all(p.grad is not None for p in backbone)
    optimizer.freeze("backbone.*")
    before, head_before = values_and_state(optimizer, backbone), values_and_state(optimizer, head)
    train(model, optimizer, 5, zero=False)
    support.assert_bits(values_and_state(optimizer, backbone), before)
    assert all(p.grad is None for p in backbone)
    assert not torch.equal(head[0], head_before[0, "value"])
    support.stepped_by_us(optimizer, steps=warm + 5, parameters=2)


def test_a_stale_gradient_would_have_moved_it(name):
    """The trap `freeze` is for: torch's way alone does not freeze."""
    model, optimizer = make(name)
    model(torch.ones(2, 4)).sum().backward()
    before = model.backbone[0].weight.detach().clone()
    model.backbone.requires_grad_(False)
    optimizer.step()
    assert not torch.equal(model.backbone[0].weight, before)
    support.stepped_by_us(optimizer, steps=1, parameters=6)


# ---- thawing -----------------------------------------------------------------------------------


def first_step_in_double(name, p, grad):
    """Of a parameter that never stepped, by the formulas."""
    s, g, value = {**MOVING[name]}, grad.double(), p.detach().double()
    lr, decay = s["lr"], s["weight_decay"]
    if name == "AdamW":
        value = value * (1 - lr * decay)
    else:
        g = g + decay * value
    if name in ("Adam", "AdamW"):
        m_hat, v_hat = (0.1 * g) / (1 - 0.9), (0.001 * g * g) / (1 - 0.999)
        return value - lr * m_hat / (v_hat.sqrt() + 1e-8)
    if name == "SGD":
        return value - lr * g
    return value - lr * g / ((0.01 * g * g).sqrt() + 1e-8)


@pytest.mark.parametrize("way", ["same group", "own group", "not held before"])
def test_thawed_parameters_begin_at_their_first_step(name, way):
    model = Net()
    parameters = list(
        model.head.named_parameters(prefix="head") if way == "not held before" else model.named_parameters()
    )
    optimizer = support.ours(name)(parameters, **MOVING[name])
    optimizer.freeze(model.backbone)
    train(model, optimizer, 20)
    assert all(p not in optimizer.state for p in model.backbone.parameters())
    settings = {"lr": MOVING[name]["lr"]} if way == "own group" else {}
    optimizer.thaw("backbone", model, **settings)
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    backbone = list(model.backbone.parameters())
    fresh_parameters = support.twins(backbone)
    support.give_same_grads(backbone, fresh_parameters)
    expected = [first_step_in_double(name, p, p.grad) for p in backbone]
    fresh = support.ours(name)(fresh_parameters, **MOVING[name])
    optimizer.step()
    fresh.step()
    support.assert_bits(values_and_state(optimizer, backbone), values_and_state(fresh, fresh_parameters))
    for p, wanted in zip(backbone, expected, strict=True):
        assert torch.allclose(p.double(), wanted, rtol=1e-6, atol=1e-7)
    if name != "SGD":
        assert {int(optimizer.state[p]["step"]) for p in backbone} == {1}
        assert {int(optimizer.state[p]["step"]) for p in model.head.parameters()} == {21}
    support.stepped_by_us(optimizer, steps=21, parameters=6)


def test_state_and_counts_go_along(name):
    """Moved with equal settings, a run goes on as if nothing had been moved: bit for bit."""
    model, optimizer = make(name)
    still, reference = make(name)
    for m, o in ((model, optimizer), (still, reference)):
        train(m, o, 4)
        o.freeze("backbone")
        train(m, o, 3)
        o.thaw("backbone", **({"lr": MOVING[name]["lr"]} if o is optimizer else {}))
        train(m, o, 4)
    assert len(optimizer.param_groups) == 2 and len(reference.param_groups) == 1
    support.assert_bits(
        values_and_state(optimizer, list(model.parameters())), values_and_state(reference, list(still.parameters()))
    )
    if name != "SGD":
        assert optimizer.state[model.backbone[0].weight]["step"] == 8
        assert optimizer.state[model.head.weight]["step"] == 11
    support.stepped_by_us(optimizer, steps=11, parameters=6)


def described(optimizer):
    return [(group["lr"], group["weight_decay"], group.get("param_names")) for group in optimizer.param_groups]


def test_groups_after_thawing_with_settings():
    model, optimizer = make("AdamW")
    optimizer.thaw("backbone.0", lr=0.01)
    assert described(optimizer) == [(0.1, 0.1, BACKBONE[2:] + HEAD), (0.01, 0.1, BACKBONE[:2])]
    optimizer.thaw("*.bias", weight_decay=0)  # of each group a new one: the rates differ
    assert described(optimizer) == [
        (0.1, 0.1, ["backbone.2.weight", "head.weight"]),
        (0.01, 0.1, ["backbone.0.weight"]),
        (0.1, 0, ["backbone.2.bias", "head.bias"]),
        (0.01, 0, ["backbone.0.bias"]),
    ]
    optimizer.thaw("head.bias", lr=0.02)
    optimizer.thaw(model.backbone[0].weight, lr=0.03)  # a whole group keeps its place
    assert described(optimizer) == [
        (0.1, 0.1, ["backbone.2.weight", "head.weight"]),
        (0.03, 0.1, ["backbone.0.weight"]),
        (0.1, 0, ["backbone.2.bias"]),
        (0.01, 0, ["backbone.0.bias"]),
        (0.02, 0, ["head.bias"]),
    ]
    by_name = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert all(by_name[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
        assert group["betas"] == (0.9, 0.999)


def test_positions_in_state_dict_follow_the_groups(name):
    """And an optimizer thawed alike takes the checkpoint."""
    model, optimizer = make(name)
    train(model, optimizer, 2)
    optimizer.thaw("backbone.0", lr=0.01)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2, 3], [4, 5]]
    assert [group["param_names"] for group in saved["param_groups"]] == [BACKBONE[2:] + HEAD, BACKBONE[:2]]
    slot = "momentum_buffer" if name == "SGD" else "exp_avg" if "Adam" in name else "square_avg"
    assert torch.equal(saved["state"][4][slot], optimizer.state[model.backbone[0].weight][slot])
    other, restored = make(name)
    restored.thaw("backbone.0", lr=0.5)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(saved))
    for m, o in ((model, optimizer), (other, restored)):
        train(m, o, 2, seed=7)
    support.assert_bits(support.all_state(restored), support.all_state(optimizer))


@pytest.mark.parametrize("named", [False, True])
def test_parameters_that_no_group_held_are_added(named):
    model = Net()
    optimizer = fusestep.optim.AdamW(
        model.head.named_parameters(prefix="head") if named else model.head.parameters(), lr=0.1
    )
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.thaw([model.backbone[2], "head.bias"], model, lr=0.01, weight_decay=0)
    assert described(optimizer) == [
        (0.05, 0.01, ["head.weight"] if named else None),
        (0.01, 0, ["backbone.2.weight", "backbone.2.bias"] if named else None),
        (0.01, 0, ["head.bias"] if named else None),
    ]
    optimizer.thaw("backbone.0", model)
    assert described(optimizer)[3] == (0.1, 0.01, BACKBONE[:2] if named else None)  # the constructor's settings
    train(model, optimizer, 2)
    support.stepped_by_us(optimizer, steps=2, parameters=6)


def test_added_parameters_have_an_initial_lr_where_others_do():
    model = Net()
    optimizer = fusestep.optim.SGD(model.head.parameters(), lr=0.1)
    optimizer.thaw("backbone.0", model, lr=0.01)
    assert "initial_lr" not in optimizer.param_groups[1]
    lr_scheduler.StepLR(optimizer, 2)
    optimizer.thaw("backbone.2", model, lr=0.02)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.01, 0.02]


def test_a_gradient_of_before_is_dropped_and_a_live_one_kept():
    model, optimizer = make("SGD")
    model(torch.ones(2, 4)).sum().backward()
    model.backbone.requires_grad_(False)
    optimizer.thaw(model)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


def test_tensor_lr_is_not_shared():
    model, optimizer = make("AdamW", lr=torch.tensor(0.1))
    optimizer.thaw("backbone", weight_decay=0)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert optimizer.param_groups[1]["lr"] == torch.tensor(0.1)
    rate = torch.tensor(0.2)
    optimizer.thaw("*.bias", lr=rate)
    rate.fill_(7)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5, 0.1, 0.2, 0.2])


# description: (arguments of thaw, error, message)
REFUSED = {
    "misspelt setting": (
        {"weight_decy": 0},
        fusestep.InvalidArgument,
        "AdamW has no setting 'weight_decy'; it has weight_decay",
    ),
    "no such setting": ({"zzz": 0}, fusestep.InvalidArgument, "has no setting 'zzz'; it has amsgrad, "),
    "params": ({"params": []}, fusestep.InvalidArgument, "has no setting 'params'"),
    "negative lr": ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "betas": ({"betas": (2.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 2.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_settings_change_nothing(case):
    arguments, error, message = REFUSED[case]
    model, optimizer = make("AdamW")
    optimizer.freeze("backbone")
    before = described(optimizer)
    with pytest.raises(error, match=message):
        optimizer.thaw("backbone", **arguments)
    assert described(optimizer) == before and trained(model) == HEAD


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"state_dtype": torch.float32}, {"state_dtype": torch.float16}),
        ({"state_dtype": torch.bfloat16}, {"differentiable": True}),
        ({"rounding": "stochastic", "seed": 1}, {"seed": -1}),
        ({"rounding": "stochastic", "seed": 1}, {"rounding": "up"}),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_refused_options_change_nothing(options, settings, flat, whole):
    p, q = support.tensors((3,), (4,))
    optimizer = fusestep.optim.Adam([p, q], **options)
    if flat:
        fusestep.optim.flatten(optimizer)
    p.requires_grad_(False)
    groups = described(optimizer)
    with pytest.raises(fusestep.InvalidArgument):
        optimizer.thaw([p, q] if whole else [p], **settings)
    assert described(optimizer) == groups
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [id(p), id(q)]
    assert not p.requires_grad


def test_a_group_that_add_param_group_refuses_changes_nothing(monkeypatch):
    p, q, new = support.tensors((3,), (4,), (5,))
    optimizer = fusestep.optim.SGD([p, q], lr=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    before, rates = described(optimizer), list(scheduler.base_lrs)
    adds = optimizer.add_param_group

    def add(group):
        if group["params"][0] is p:
            raise MemoryError
        adds(group)

    monkeypatch.setattr(optimizer, "add_param_group", add)
    with pytest.raises(MemoryError):
        thaw([new, p], optimizer=optimizer, lr=0.5, scheduler=scheduler)
    assert described(optimizer) == before and scheduler.base_lrs == rates


def test_a_scheduler_that_is_older_than_a_group():
    p, q, r = support.tensors((3,), (4,), (5,))
    optimizer = fusestep.optim.SGD([p], lr=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.add_param_group({"params": [q, r], "lr": 1.0, "initial_lr": 1.0})
    scheduler.step()
    thaw(q, optimizer=optimizer, weight_decay=0.1, scheduler=scheduler)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0, 0.1]
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 3


def test_refused_parameters_change_nothing():
    model, optimizer = make("AdamW")
    freeze(model)
    whole = torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    read_only = support.of_inference_mode(torch.ones(2))
    for wrong, message in [
        (whole, r"a parameter of shape \[2\] of torch.int64 cannot require a gradient"),
        (read_only, r"a parameter of shape \[2\] was made under inference_mode: it cannot require a gradient"),
        (torch.nn.Parameter(torch.ones(3)), r"pass model= to name a parameter of shape \[3\]"),
    ]:
        with pytest.raises(fusestep.InvalidArgument, match=message):
            optimizer.thaw([model.head, wrong], lr=0.01)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        model.extra = model.head
        optimizer.param_groups[0].pop("param_names")
        optimizer.thaw([model.head, torch.ones(2, requires_grad=True) * 2], lr=0.01)
    assert len(optimizer.param_groups) == 1 and trained(model) == []
    thaw(model)
    with pytest.raises(fusestep.InvalidArgument, match=r"a parameter of shape \[2\] is the result of others"):
        optimizer.freeze([model.head, torch.ones(2, requires_grad=True) * 2])
    assert trained(model) == BACKBONE + HEAD


# ---- schedulers --------------------------------------------------------------------------------


def test_step_lr_goes_on_through_freeze_and_thaw(name):
    model, optimizer = make(name)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    optimizer.freeze("backbone")
    seen = []
    for epoch in range(6):
        if epoch == 3:
            optimizer.thaw("backbone", lr=0.01)
        train(model, optimizer, 1, seed=epoch)
        seen.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    assert seen == [[0.1], [0.1], [0.05], [0.05, 0.01], [0.025, 0.005], [0.025, 0.005]]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    support.stepped_by_us(optimizer, steps=6, parameters=6)
    # A scheduler made anew in the middle, as after a restart, finds initial_lr in every group.
    again = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5, last_epoch=5)
    assert again.base_lrs == [0.1, 0.01]


# name: (how it is made, whether it goes on without being told of a new group)
SCHEDULERS = {
    "StepLR": (lambda o: lr_scheduler.StepLR(o, 2), True),
    "MultiStepLR": (lambda o: lr_scheduler.MultiStepLR(o, [4, 5]), True),
    "ExponentialLR": (lambda o: lr_scheduler.ExponentialLR(o, 0.9), True),
    "LinearLR": (lambda o: lr_scheduler.LinearLR(o), True),
    "PolynomialLR": (lambda o: lr_scheduler.PolynomialLR(o, 20), True),
    "ReduceLROnPlateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=1e-3), True),
    "ReduceLROnPlateau, by group": (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[1e-3]), False),
    "CosineAnnealingLR": (lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 1e-3), False),  # past its T_max
    "CosineAnnealingWarmRestarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5), False),
    "LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch), False),
    "MultiplicativeLR": (lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9), False),
    "CyclicLR": (lambda o: lr_scheduler.CyclicLR(o, 0.05, 0.1, step_size_up=4), False),
    "SequentialLR": (
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [5]),
        False,
    ),
    "ChainedScheduler": (
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.LambdaLR(o, lambda e: 0.9)]),
        False,
    ),
}


def run_schedule(case, tell, thaw_at=3, lr=None):
    model, optimizer = make("SGD")
    scheduler = SCHEDULERS[case][0](optimizer)
    seen = []
    for epoch in range(14):
        if epoch == thaw_at:
            optimizer.thaw("backbone", lr=lr or optimizer.param_groups[0]["lr"], scheduler=scheduler if tell else None)
        train(model, optimizer)
        scheduler.step(*[1.0] if "Plateau" in case else [])
        seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


@pytest.mark.parametrize("case", SCHEDULERS)
def test_schedulers_that_are_told_go_on(case):
    alone = run_schedule(case, tell=False, thaw_at=None)
    seen = run_schedule(case, tell=True, lr=0.01)
    assert [len(rates) for rates in seen] == [1] * 3 + [2] * 11
    assert [rates[0] for rates in seen] == [rates[0] for rates in alone]
    assert all(0 < rates[1] <= 0.11 for rates in seen[3:])


@pytest.mark.parametrize("case", SCHEDULERS)
def test_schedulers_that_are_not_told(case):
    if SCHEDULERS[case][1]:
        assert run_schedule(case, tell=False, lr=0.01) == run_schedule(case, tell=True, lr=0.01)
    else:
        with pytest.raises((ValueError, RuntimeError)):  # torch's, at some later step
            run_schedule(case, tell=False, lr=0.01)


def test_lambda_lr_takes_the_new_rate_as_its_base():
    model, optimizer = make("SGD")
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    optimizer.thaw("backbone", lr=0.01, scheduler=scheduler)
    optimizer.thaw("head", lr=0.2, scheduler=[scheduler])  # a whole group, in its place
    assert scheduler.base_lrs == [0.2, 0.01]
    train(model, optimizer)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.1, 0.005]


def test_one_cycle_lr_has_its_settings_in_the_group():
    model, optimizer = make("SGD")
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    optimizer.thaw("backbone", lr=0.001, initial_lr=0.001, max_lr=0.01, min_lr=1e-5)
    for _ in range(9):
        train(model, optimizer)
        scheduler.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert 0 < rates[1] <= 0.01 < 0.1 >= rates[0]
    assert rates[1] == pytest.approx(1e-5)


def test_scheduler_of_another_optimizer():
    model, optimizer = make("SGD")
    scheduler = lr_scheduler.StepLR(make("SGD")[1], 2)
    with pytest.raises(fusestep.InvalidArgument, match="the StepLR is of another optimizer"):
        optimizer.thaw("backbone", lr=0.01, scheduler=scheduler)
    assert len(optimizer.param_groups) == 1


# ---- growing -----------------------------------------------------------------------------------


def test_add_param_group_after_a_hundred_steps(name):
    model, optimizer = make(name)
    train(model, optimizer, 100)
    (new,) = support.tensors((3, 2), seed=5)
    optimizer.add_param_group({"params": [("extra", new)], "lr": 0.01})
    fresh = support.ours(name)(support.twins([new]), **{**MOVING[name], "lr": 0.01})
    (twin,) = fresh.param_groups[0]["params"]
    for seed in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        support.set_grads([new], seed)
        support.give_same_grads([new], [twin])
        optimizer.step()
        fresh.step()
    support.assert_bits(values_and_state(optimizer, [new]), values_and_state(fresh, [twin]))
    support.stepped_by_us(optimizer, steps=103, parameters=7)
    assert all(math.isfinite(p.sum().item()) for p in model.parameters())


def test_functions_serve_torchs_optimizers():
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    freeze("backbone", optimizer=optimizer)
    thaw("backbone.0", optimizer=optimizer, lr=0.01)
    assert trained(model) == BACKBONE[:2] + HEAD
    assert described(optimizer) == [(0.1, 0.01, BACKBONE[2:] + HEAD), (0.01, 0.01, BACKBONE[:2])]
