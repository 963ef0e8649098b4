# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
import doctest

import pytest
import torch

import fusestep
import support
from fusestep import groups, names
from fusestep.optim import param_groups_by


class Net(torch.nn.Module):
    """Names: conv.weight, conv.bias, norm.weight, norm.bias, block.norm1.weight, ..., head.weight (= fc.weight)."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 1)
        self.norm = torch.nn.LayerNorm(2)
        self.block = torch.nn.ModuleDict({"norm1": torch.nn.LayerNorm(2), "fc": torch.nn.Linear(2, 2)})
        self.fc = torch.nn.Linear(2, 2)
        self.tied = torch.nn.Linear(2, 2, bias=False)
        self.tied.weight = self.fc.weight


ALL = [
    "conv.weight",
    "conv.bias",
    "norm.weight",
    "norm.bias",
    "block.norm1.weight",
    "block.norm1.bias",
    "block.fc.weight",
    "block.fc.bias",
    "fc.weight",
    "fc.bias",
]


def rest(*taken):
    return [name for name in ALL if name not in taken]


# description: (patterns, no_decay, (settings, names) of each group)
GROUPED = {
    "all": ({"*": {"lr": 1}}, (), [({"lr": 1}, ALL)]),
    "head and rest": (
        {"fc.*": {"lr": 1}, "*": {"lr": 2}},
        (),
        [({"lr": 1}, ["fc.weight", "fc.bias"]), ({"lr": 2}, rest("fc.weight", "fc.bias"))],
    ),
    "a module by name": (
        {"block": {"lr": 1}, "*": {}},
        (),
        [({"lr": 1}, [n for n in ALL if n.startswith("block")]), ({}, [n for n in ALL if not n.startswith("block")])],
    ),
    "without a rest, in any order": (
        {"*fc.*": {"lr": 1}, "*norm*": {"lr": 2}, "conv": {"lr": 3}},
        (),
        [
            ({"lr": 1}, ["block.fc.weight", "block.fc.bias", "fc.weight", "fc.bias"]),
            ({"lr": 2}, [n for n in ALL if "norm" in n]),
            ({"lr": 3}, ["conv.weight", "conv.bias"]),
        ],
    ),
    "first names of tied ones": (
        {"[ct]*": {"lr": 1}, "*": {}},
        (),
        [({"lr": 1}, ["conv.weight", "conv.bias"]), ({}, rest("conv.weight", "conv.bias"))],
    ),
    "no decay": (
        {"fc.*": {"lr": 1, "weight_decay": 0.5}, "*": {"lr": 2}},
        ["*.bias", "*norm*"],
        [
            ({"lr": 1, "weight_decay": 0.5}, ["fc.weight"]),
            ({"lr": 1, "weight_decay": 0.0}, ["fc.bias"]),
            ({"lr": 2}, ["conv.weight", "block.fc.weight"]),
            ({"lr": 2, "weight_decay": 0.0}, [n for n in ALL if "norm" in n or n in ("conv.bias", "block.fc.bias")]),
        ],
    ),
    "no decay for all of a pattern": (
        {"fc.bias": {"lr": 1}, "*": {}},
        "*.bias",
        [
            ({"lr": 1, "weight_decay": 0.0}, ["fc.bias"]),
            ({}, [n for n in ALL if n.endswith("weight")]),
            ({"weight_decay": 0.0}, [n for n in ALL if n.endswith("bias") and n != "fc.bias"]),
        ],
    ),
}


@pytest.mark.parametrize("case", GROUPED)
def test_groups(case):
    patterns, no_decay, expected = GROUPED[case]
    model = Net()
    model.conv.requires_grad_(False)  # frozen ones are grouped as well
    made = param_groups_by(model, patterns, no_decay)
    own = dict(model.named_parameters())
    assert [{key: value for key, value in group.items() if key != "params"} for group in made] == [
        s for s, _ in expected
    ]
    assert [[name for name, _ in group["params"]] for group in made] == [names for _, names in expected]
    assert all(p is own[name] for group in made for name, p in group["params"])


# description: (patterns, no_decay, message)
REFUSED = {
    "leftovers": ({"fc.bias": {}}, (), "no pattern matches conv.weight, .* and 4 more; a last pattern '\\*' would"),
    "double": ({"fc.*": {}, "*.bias": {}, "*": {}}, (), "fc.bias matches both 'fc.\\*' and '\\*.bias'"),
    "catch-all before others": ({"*": {}, "fc.*": {}}, (), "'\\*' takes what the others leave: it must be the last"),
    "no pattern": ({}, (), "there are no patterns"),
    "empty pattern": ({"blok.*": {}, "*": {}}, (), "'blok.\\*' matches no parameter; near are block"),
    "empty rest": ({"[!x]*": {}, "*": {}}, (), "'\\*' matches no parameter that the others leave"),
    "empty no_decay": ({"*": {}}, "*.bais", "'\\*.bais' matches no parameter"),
    "nothing near": (
        {"zzzz": {}, "*": {}},
        (),
        "'zzzz' matches no parameter; the names are under conv, norm, block, fc",
    ),
    "another name of a tied one": (
        {"tied.*": {}, "*": {}},
        (),
        "'tied.\\*' matches .*; tied.weight is tied to fc.weight",
    ),
    "params": ({"*": {"params": []}}, (), "the settings of '\\*' have 'params'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    patterns, no_decay, message = REFUSED[case]
    with pytest.raises(fusestep.InvalidArgument, match=message):
        param_groups_by(Net(), patterns, no_decay)


def test_an_optimizer_takes_them_with_names(name):
    model = Net()
    made = param_groups_by(model, {"fc.*": {"lr": 0.5}, "*": {"lr": 0.25}}, no_decay="*.bias")
    optimizer = support.ours(name)(made, weight_decay=0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.25, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.125, 0, 0.125, 0]
    assert optimizer.param_groups[0]["param_names"] == ["fc.weight"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(ALL)
    support.set_grads(parameters, seed=0)
    optimizer.step()
    support.stepped_by_us(optimizer, steps=1, parameters=len(ALL))


# (name, pattern, whether it matches)
MATCHES = [
    ("fc.weight", "fc.weight", True),
    ("fc.weight", "fc.*", True),
    ("fc.weight", "fc", True),
    ("fc.weight", "f", False),
    ("fc.weight", "weight", False),
    ("a.fc.weight", "fc.*", False),
    ("a.fc.weight", "*.fc.*", True),
    ("a.fc.weight", "a.?c", True),
    ("layer10.weight", "layer1", False),
    ("layer10.weight", "layer1*", True),
    ("FC.weight", "fc.*", False),
    ("", "*", True),
]


@pytest.mark.parametrize(("name", "pattern", "expected"), MATCHES)
def test_matches(name, pattern, expected):
    assert names.matches(name, pattern) is expected


def test_docstring_example():
    assert doctest.testmod(groups).failed == 0
