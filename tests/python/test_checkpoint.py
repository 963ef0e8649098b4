# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""fusestep.optim: saving, loading by name, and state_dicts from and to torch's classes."""

import copy
import functools
import io
import json
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import threading
import time
import warnings

import numpy
import pytest
import safetensors
import safetensors.torch
import torch
from torch.optim import lr_scheduler

import fusestep
import support

pytestmark = pytest.mark.on_cpu

NAMES = ("stem.weight", "stem.bias", "head.weight", "head.bias", "scale", "empty")
SHAPES = dict(zip(NAMES, ((2, 3, 4, 5), (3,), (4, 6), (4,), (), (0, 2)), strict=True))
SETTINGS = {
    name: {**support.FULLEST[name], "lr": 0.02, "weight_decay": 0.1, **({"eps": 1e-3} if name != "SGD" else {})}
    for name in support.NAMES
}


# ---- machinery: models by name, and what there is of them ----------------------------------------


def plain_layout(tensor):
    return tensor


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() >= 2 else tensor


def model(dtype=torch.float32, layout=plain_layout, names=NAMES):
    """Names to parameters, whatever the names: the same values for the same names."""
    values = dict(zip(NAMES, support.tensors(*SHAPES.values(), dtype=dtype), strict=True))
    return {name: torch.nn.Parameter(layout(values[name].detach().clone())) for name in names}


def optimizer_of(name, parameters, groups=None, cls=None, named=True, **settings):
    """Groups are lists of names, the last with another learning rate; without them all are one group."""
    groups = [list(parameters)] if groups is None else groups
    chosen = [[(key, parameters[key]) if named else parameters[key] for key in group] for group in groups]
    listed = [{"params": group} for group in chosen]
    if len(groups) > 1:
        listed[-1]["lr"] = 0.5
    return (cls or support.ours(name))(listed, **{**SETTINGS[name], **settings})


def train(parameters, optimizer, steps, first=0):
    """Gradients depend on the parameter's name and the step; those that require none have none."""
    for step in range(first, first + steps):
        for name, p in parameters.items():
            support.set_grads([p], seed=100 * step + NAMES.index(name))
            if not p.requires_grad:
                p.grad = None
        optimizer.step()


def contents(parameters, optimizer):
    """(name, slot) to tensor, as copies."""
    return {
        (name, slot): copy.deepcopy(value)
        for name, p in parameters.items()
        for slot, value in [("value", p.detach()), *optimizer.state.get(p, {}).items()]
    }


def state_only(found):
    return {key: value for key, value in found.items() if key[1] != "value"}


def everything(parameters, optimizer):
    """All that a refused load must leave."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return contents(parameters, optimizer), copy.deepcopy((groups, [p.requires_grad for p in parameters.values()]))


def assert_same(got, expected):
    support.assert_bits(got[0], expected[0])
    assert repr(got[1]) == repr(expected[1])


def settings_of(optimizer):
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def widen(optimizer):
    """float32 state, as some programs give 16-bit parameters."""
    for own in optimizer.state.values():
        own.update({key: value.float() for key, value in own.items() if key != "step"})


def trained(name, steps=3, **kwargs):
    parameters = model(**{key: kwargs.pop(key) for key in ("dtype", "layout", "names") if key in kwargs})
    optimizer = optimizer_of(name, parameters, **kwargs)
    train(parameters, optimizer, steps)
    return parameters, optimizer


# ---- the same as if nothing had happened ---------------------------------------------------------


def through_file(old, new, path):
    old.save(path)
    return new.load(path)


def through_async_file(old, new, path):
    old.save_async(path)
    old.wait_for_save()
    return new.load(path)


def through_plain_safetensors(old, new, path):
    """As another program would write it, which knows no settings."""
    tensors, metadata = {}, {"format": "pt"}
    for group in old.param_groups:
        for key, p in zip(group["param_names"], group["params"], strict=True):
            for slot, value in old.state.get(p, {}).items():
                value = torch.view_as_real(value) if value.is_complex() else value
                tensors[f"{key}/{slot}"] = value.contiguous()
    safetensors.torch.save_file(tensors, path, metadata)
    return new.load(path)


def through_torch_file(old, new, path):
    torch.save(old.state_dict(), path)
    return new.load(path)


def through_old_torch_file(old, new, path):
    torch.save(old.state_dict(), path, _use_new_zipfile_serialization=False)
    return new.load(path)


def through_state_dict(old, new, path):
    return new.load(old.state_dict())


def by_position(old, new, path):
    new.load_state_dict(copy.deepcopy(old.state_dict()))


HAND_OVERS = {
    function.__name__: function
    for function in (
        through_file,
        through_async_file,
        through_plain_safetensors,
        through_torch_file,
        through_old_torch_file,
        through_state_dict,
        by_position,
    )
}
KINDS = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "complex64": {"dtype": torch.complex64},
    "channels_last": {"layout": channels_last},
    "transposed": {"layout": transposed},
}


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16 with wide state", "float16 with wide state"])
@pytest.mark.parametrize("hand_over", HAND_OVERS)
def test_goes_on_with_the_same_bits(name, hand_over, kind, tmp_path):
    given = KINDS[kind.split()[0]]
    parameters, optimizer = trained(name, steps=4, **given)
    if kind.endswith("wide state"):
        widen(optimizer)
    train(parameters, optimizer, 1, first=4)
    fresh = model(**given)
    resumed = optimizer_of(name, fresh)
    with torch.no_grad():
        for key, p in fresh.items():
            p.copy_(parameters[key])
    HAND_OVERS[hand_over](optimizer, resumed, tmp_path / "state")
    support.assert_bits(contents(fresh, resumed), contents(parameters, optimizer))
    own, other = ({id(v.untyped_storage()) for s in o.state.values() for v in s.values()} for o in (optimizer, resumed))
    assert not own & other
    for key in parameters:
        for slot, value in resumed.state[fresh[key]].items():
            assert value.stride() == optimizer.state[parameters[key]][slot].stride(), (key, slot)
    for side in ((parameters, optimizer), (fresh, resumed)):
        train(*side, 20, first=5)
    support.stepped_by_us(resumed, steps=20, parameters=len(NAMES))
    support.assert_bits(contents(fresh, resumed), contents(parameters, optimizer))


FLAGS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {},
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("hand_over", ["through_torch_file", "through_state_dict", "by_position"])
def test_from_torch_and_back(name, hand_over, flags, tmp_path):
    if name == "RMSprop" and flags == "fused":
        pytest.skip("torch's RMSprop has no fused")
    parameters, before = trained(name, steps=5, cls=support.theirs(name), **FLAGS[flags])
    given = copy.deepcopy(before)
    given.param_groups[0]["capturable"] = flags == "capturable"
    between = {key: torch.nn.Parameter(p.detach().clone()) for key, p in parameters.items()}
    optimizer = optimizer_of(name, between)
    HAND_OVERS[hand_over](given, optimizer, tmp_path / "state")
    train(between, optimizer, 20, first=5)
    support.stepped_by_us(optimizer, steps=20, parameters=len(NAMES))
    train(parameters, before, 20, first=5)
    support.assert_close(contents(between, optimizer), contents(parameters, before), 20, ulps=8)

    after = {key: torch.nn.Parameter(p.detach().clone()) for key, p in between.items()}
    torchs = optimizer_of(name, after, cls=support.theirs(name))
    torchs.load_state_dict(optimizer.state_dict())
    torchs.param_groups[0].update(capturable=False)
    train(after, torchs, 20, first=25)
    train(parameters, before, 20, first=25)
    support.assert_close(contents(after, torchs), contents(parameters, before), 40, ulps=8)


def as_apex(state_dict):
    """FusedAdam's: one integer count a group, settings it does not have left out."""
    for group in state_dict["param_groups"]:
        group["step"] = 5
        group["bias_correction"] = True
        for key in ("amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused"):
            group.pop(key, None)
    for own in state_dict["state"].values():
        own.pop("step")
    return state_dict


def as_apex_capturable(state_dict):
    for group in as_apex(state_dict)["param_groups"]:
        group["step"] = torch.tensor([5], dtype=torch.int32)
    return state_dict


def as_deepspeed(state_dict):
    """Counts in the state, as integers; and in the group."""
    for group in state_dict["param_groups"]:
        group["step"] = 5
    for own in state_dict["state"].values():
        own["step"] = 5
    return state_dict


@pytest.mark.parametrize("by", ["name", "position"])
@pytest.mark.parametrize("form", [as_apex, as_apex_capturable, as_deepspeed])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_counts_of_apex_and_deepspeed(name, form, by):
    parameters, optimizer = trained(name, steps=5, amsgrad=False)
    given = form(copy.deepcopy(optimizer.state_dict()))
    kept = copy.deepcopy(given)
    fresh = {key: torch.nn.Parameter(p.detach().clone()) for key, p in parameters.items()}
    resumed = optimizer_of(name, fresh, amsgrad=False)
    resumed.load(given) if by == "name" else resumed.load_state_dict(given)
    assert repr(given) == repr(kept)
    for side in ((parameters, optimizer), (fresh, resumed)):
        train(*side, 3, first=5)
    support.stepped_by_us(resumed, steps=3)
    assert all(own["step"] == 8 for own in resumed.state.values())
    support.assert_bits(contents(fresh, resumed), contents(parameters, optimizer))
    if form is not as_deepspeed:
        assert "step" not in resumed.param_groups[0]


@pytest.mark.parametrize("name", support.NAMES)
def test_a_setting_named_step_stays(name):
    parameters, optimizer = trained(name)
    optimizer.param_groups[0]["step"] = 17
    resumed = optimizer_of(name, model())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["step"] == 17


# ---- by name ---------------------------------------------------------------------------------------

GROUPINGS = {
    "one group": [NAMES],
    "reversed": [NAMES[::-1]],
    "two groups": [NAMES[2:4], NAMES[:2] + NAMES[4:]],
    "a group each": [[key] for key in NAMES[::-1]],
}


@pytest.mark.parametrize("now", GROUPINGS)
@pytest.mark.parametrize("then", GROUPINGS)
@pytest.mark.parametrize("hand_over", ["through_file", "through_torch_file", "through_plain_safetensors"])
def test_whatever_the_grouping(hand_over, then, now, tmp_path):
    parameters, optimizer = trained("Adam", groups=GROUPINGS[then])
    fresh = model()
    resumed = optimizer_of("Adam", fresh, GROUPINGS[now])
    expected = settings_of(resumed)
    if hand_over == "through_plain_safetensors":
        through_plain_safetensors(optimizer, resumed, tmp_path / "state")
    else:
        path = tmp_path / "state"
        optimizer.save(path) if hand_over == "through_file" else torch.save(optimizer.state_dict(), path)
        resumed.load(path, what="state")
    assert settings_of(resumed) == expected
    assert state_only(contents(parameters, optimizer)).keys() == state_only(contents(fresh, resumed)).keys()
    support.assert_bits(state_only(contents(fresh, resumed)), state_only(contents(parameters, optimizer)))


def test_first_the_head_then_the_whole_network(name, tmp_path):
    """The head's moments and count arrive; the rest starts fresh."""
    parameters = model()
    head = {key: parameters[key] for key in ("head.weight", "head.bias")}
    optimizer = optimizer_of(name, head)
    train(head, optimizer, 7)
    optimizer.save(tmp_path / "head")
    saved = contents(head, optimizer)
    rest = [key for key in NAMES if key not in head]
    whole = optimizer_of(name, parameters, [rest, list(head)])
    report = whole.load(tmp_path / "head", strict=False, what="state")
    assert (report.loaded, report.missing, report.unexpected) == (list(head), rest, [])
    assert not report.complete
    support.assert_bits(contents(head, whole), saved)
    assert not any(whole.state.get(parameters[key]) for key in rest)
    train(parameters, whole, 1)
    if name != "SGD":
        assert [int(whole.state[p]["step"]) for p in parameters.values()] == [1, 1, 8, 8, 1, 1]


@pytest.mark.parametrize("form", ["pairs", "list", "module"])
def test_names_of_a_plain_torch_checkpoint(name, form, tmp_path):
    """Saved by torch without names, loaded by name: the caller knows the names there were."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    before = support.theirs(name)(network.parameters(), **SETTINGS[name])
    network(torch.ones(2, 3)).sum().backward()
    before.step()
    torch.save(before.state_dict(), tmp_path / "state")
    names = {
        "pairs": network.named_parameters(),
        "list": [key for key, _ in network.named_parameters()],
        "module": network,
    }
    optimizer = support.ours(name)(list(network.named_parameters())[::-1], **SETTINGS[name])
    report = optimizer.load(tmp_path / "state", saved_names=names[form])
    assert report.loaded == [key for key, _ in network.named_parameters()][::-1]
    for p in network.parameters():
        for slot, value in before.state[p].items():
            assert torch.equal(optimizer.state[p][slot], value)


def test_state_of_one_element_with_a_stride(name, tmp_path):
    p = torch.nn.Parameter(torch.zeros(1, 2)[..., 1])
    optimizer = support.ours(name)([p], lr=0.1, **support.FULLEST[name])
    p.grad = torch.ones(1)
    optimizer.step()
    optimizer.save(tmp_path / "file", values=True)
    other = support.ours(name)([torch.nn.Parameter(torch.zeros(1))], lr=0.1, **support.FULLEST[name])
    assert other.load(tmp_path / "file").complete
    assert torch.equal(other.param_groups[0]["params"][0], p)


def test_names_given_to_save_and_load(name, tmp_path):
    """An optimizer that was made of parameters knows no names: the model does."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = support.ours(name)(network.parameters(), **SETTINGS[name])
    network(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.save(tmp_path / "state", names=network)
    assert {key.split("/")[0] for key in safetensors.torch.load_file(tmp_path / "state")} == {
        key for key, _ in network.named_parameters()
    }
    resumed = support.ours(name)(list(network.parameters())[::-1], **SETTINGS[name])
    for names in (network, network.named_parameters()):
        resumed.load(tmp_path / "state", names=names)
        for p in network.parameters():
            for slot, value in optimizer.state[p].items():
                assert torch.equal(resumed.state[p][slot], value)


def test_numbers_where_nobody_has_names(name, tmp_path):
    parameters, optimizer = trained(name, named=False)
    optimizer.save(tmp_path / "state")
    fresh = model()
    assert optimizer_of(name, fresh, named=False).load(tmp_path / "state").loaded == list("012345")
    named = optimizer_of(name, fresh)
    named.load(tmp_path / "state", saved_names=fresh.items())
    support.assert_bits(state_only(contents(fresh, named)), state_only(contents(parameters, optimizer)))
    tensors = {f"{n}/{slot}": value for n, own in enumerate(optimizer.state.values()) for slot, value in own.items()}
    safetensors.torch.save_file(tensors, tmp_path / "plain")
    named.load(tmp_path / "plain", saved_names=list(fresh))
    support.assert_bits(state_only(contents(fresh, named)), state_only(contents(parameters, optimizer)))
    # One that has never stepped has no tensors, and the others keep their numbers.
    safetensors.torch.save_file({key: v for key, v in tensors.items() if key[0] in "24"}, tmp_path / "plain")
    named = optimizer_of(name, model())
    report = named.load(tmp_path / "plain", strict=False, saved_names=list(fresh))
    assert report.loaded == [NAMES[2], NAMES[4]]


def test_state_dict_by_names(name):
    """As torch.distributed.checkpoint.state_dict makes it, with names for numbers."""
    parameters, optimizer = trained(name, named=False)
    given = optimizer.state_dict()
    given["state"] = {NAMES[index]: own for index, own in given["state"].items()}
    given["param_groups"][0]["params"] = list(NAMES)
    fresh = model()
    resumed = optimizer_of(name, fresh, [NAMES[::-1]])
    resumed.load(given)
    support.assert_bits(state_only(contents(fresh, resumed)), state_only(contents(parameters, optimizer)))


def test_names_that_are_numbers():
    """Those of a ParameterList are names, and no positions."""
    parameters = torch.nn.ParameterList([torch.ones(2), torch.ones(2), torch.ones(2)])
    before = fusestep.optim.Adam(parameters.named_parameters())
    for p in parameters:
        p.grad = torch.ones(2)
    before.step()
    (_, first), *rest = parameters.named_parameters()
    now = fusestep.optim.Adam([{"params": rest}, {"params": [("0", first)]}])
    assert now.load(before.state_dict(), what="state").loaded == ["1", "2", "0"]


RENAMES = {
    "dict": {f"module.{key}": key for key in NAMES},
    "function": lambda key: key.removeprefix("module."),
}


@pytest.mark.parametrize("form", RENAMES)
@pytest.mark.parametrize("hand_over", ["through_file", "through_state_dict"])
def test_rename(name, hand_over, form, tmp_path):
    parameters = {f"module.{key}": p for key, p in model().items()}
    optimizer = optimizer_of(name, parameters)
    train({key.removeprefix("module."): p for key, p in parameters.items()}, optimizer, 2)
    optimizer.state.pop(parameters["module.head.bias"])  # its shape is known only by its name here
    optimizer.save(tmp_path / "state")
    source = tmp_path / "state" if hand_over == "through_file" else optimizer.state_dict()
    fresh = model()
    resumed = optimizer_of(name, fresh)
    report = resumed.load(source, rename=RENAMES[form])
    assert report.complete and report.loaded == list(NAMES)
    support.assert_bits(
        state_only(contents(fresh, resumed)),
        state_only(contents({key.removeprefix("module."): p for key, p in parameters.items()}, optimizer)),
    )


def test_other_order_warns_and_names_the_first_few(name):
    parameters, optimizer = trained(name)
    same = optimizer_of(name, model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(optimizer.state_dict())
        optimizer_of(name, model(), named=False).load_state_dict(optimizer.state_dict())
    square = {key: torch.nn.Parameter(torch.ones(2)) for key in NAMES}
    before = optimizer_of(name, square)
    now = optimizer_of(name, square, [["stem.bias", "stem.weight", "head.bias", "empty", "head.weight", "scale"]])
    with pytest.warns(UserWarning) as caught:
        now.load_state_dict(before.state_dict())
    assert [str(warning.message) for warning in caught] == [
        "load_state_dict goes by position, and the names of parameters are others there: "
        "'stem.weight' becomes 'stem.bias', 'stem.bias' becomes 'stem.weight', "
        "'head.weight' becomes 'head.bias' and 3 more. load() goes by name"
    ]
    assert caught[0].filename == __file__


# ---- what is taken ---------------------------------------------------------------------------------


def test_what(name, tmp_path):
    parameters, optimizer = trained(name, lr=0.3)
    optimizer.param_groups[0]["initial_lr"] = 0.4
    parameters["scale"].requires_grad_(False)
    optimizer.save(tmp_path / "state")
    for source in (tmp_path / "state", optimizer.state_dict()):
        for what in ("all", "state", "hyper"):
            fresh = model()
            fresh["head.bias"].requires_grad_(False)
            resumed = optimizer_of(name, fresh, lr=0.7)
            report = resumed.load(source, what=what)
            taken = what != "state"
            assert resumed.param_groups[0]["lr"] == (0.3 if taken else 0.7)
            assert ("initial_lr" in resumed.param_groups[0]) == taken
            assert [(d.group, d.key, d.saved, d.here, d.taken) for d in report.hyper] == [
                ("0", "initial_lr", "0.4", "", taken),
                ("0", "lr", "0.3", "0.7", taken),
            ]
            assert bool(resumed.state) == (what != "hyper")
            told = what == "all" and not isinstance(source, dict)  # torch's dicts do not know
            assert [key for key, p in fresh.items() if not p.requires_grad] == ["scale" if told else "head.bias"]
            assert report.complete and report.loaded == ([] if what == "hyper" else list(NAMES))


def test_execution_flags_stay_as_they_are(tmp_path):
    parameters, optimizer = trained("Adam", fused=True)
    optimizer.save(tmp_path / "state")
    resumed = optimizer_of("Adam", model(), foreach=True)
    assert resumed.load(tmp_path / "state").hyper == []
    assert resumed.param_groups[0]["foreach"] is True and resumed.param_groups[0]["fused"] is None


def test_strict_and_the_report(name, tmp_path):
    parameters, optimizer = trained(name, names=NAMES[:4])
    optimizer.save(tmp_path / "state", metadata={"epoch": 3})
    fresh = model(names=NAMES[1:5])
    fresh["head.weight"] = torch.nn.Parameter(torch.ones(7, 6))
    resumed = optimizer_of(name, fresh, lr=0.7)
    before = everything(fresh, resumed)
    with pytest.raises(fusestep.LoadError) as caught:
        resumed.load(tmp_path / "state")
    assert_same(everything(fresh, resumed), before)
    report = caught.value.report
    assert isinstance(caught.value, fusestep.InvalidArgument)
    assert report.loaded == ["stem.bias", "head.bias"]
    assert (report.missing, report.unexpected) == (["scale"], ["stem.weight"])
    assert report.mismatched == [("head.weight", "shape", "[4, 6]", "[7, 6]")]
    assert report.mismatched[0].saved == "[4, 6]"
    assert [difference.key for difference in report.hyper] == ["lr"]
    assert report.metadata == {"epoch": 3} and not report.complete
    assert str(report) == (
        "matching    2     stem.bias, head.bias\n"
        "missing     1     scale\n"
        "unexpected  1     stem.weight\n"
        "does not fit\n"
        "  head.weight shape saved [4, 6] here [7, 6]\n"
        "settings of groups\n"
        "  0 lr saved 0.02 here 0.7 taken"
    )
    assert str(caught.value) == (
        "the state does not match this optimizer, nothing was loaded (strict=False loads what matches):\n" + str(report)
    )
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.report) == (str(caught.value), report)
    loose = resumed.load(tmp_path / "state", strict=False)
    assert loose == report
    expected = contents(parameters, optimizer)
    found = state_only(contents(fresh, resumed))
    assert {key for key, _ in found} == {"stem.bias", "head.bias"}
    support.assert_bits(found, {key: expected[key] for key in found})
    assert resumed.param_groups[0]["lr"] == 0.02


def test_other_dtypes_only_when_asked(name, tmp_path):
    parameters, optimizer = trained(name)
    optimizer.save(tmp_path / "state")
    slots = sorted(set(next(iter(optimizer.state.values()))) - {"step"})
    fresh = model(torch.float64)
    resumed = optimizer_of(name, fresh)
    with pytest.raises(fusestep.LoadError) as caught:
        resumed.load(tmp_path / "state")
    assert caught.value.report.mismatched[0] == (f"stem.weight/{slots[0]}", "dtype", "float32", "float64")
    report = resumed.load(tmp_path / "state", convert=True)
    assert report.converted[: len(slots)] == [f"stem.weight/{slot}" for slot in slots]
    for key, value in state_only(contents(fresh, resumed)).items():
        expected = optimizer.state[parameters[key[0]]][key[1]]
        assert value.dtype == (torch.float32 if key[1] == "step" else torch.float64)
        assert torch.equal(value.double(), expected.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_state_of_16_bit_parameters_stays(name, dtype):
    """torch rounds it; the order of a state's entries stays too."""
    parameters, optimizer = trained(name, dtype=dtype)
    widen(optimizer)
    given = optimizer.state_dict()
    fresh = model(dtype)
    resumed = optimizer_of(name, fresh)
    seen = []
    resumed.register_load_state_dict_post_hook(lambda own: seen.append(contents(fresh, own)))
    resumed.load_state_dict(given)
    found = contents(fresh, resumed)
    support.assert_bits(state_only(found), state_only(contents(parameters, optimizer)))
    support.assert_bits(seen[0], found)
    assert [list(own) for own in resumed.state.values()] == [list(own) for own in optimizer.state.values()]


def test_frozen_and_never_stepped(name, tmp_path):
    """Frozen with state, frozen from the start, and not yet stepped: all as they were."""
    parameters = model()
    parameters["stem.bias"].requires_grad_(False)
    optimizer = optimizer_of(name, parameters)
    train(parameters, optimizer, 2)
    parameters["head.weight"].requires_grad_(False)
    parameters["head.bias"].requires_grad_(True)
    optimizer.state.pop(parameters["head.bias"])
    optimizer.save(tmp_path / "state")
    fresh, resumed = trained(name, steps=1)
    resumed.load(tmp_path / "state")
    assert {key: p.requires_grad for key, p in fresh.items()} == {key: p.requires_grad for key, p in parameters.items()}
    assert fresh["head.weight"].grad is None  # a step would use it
    for key in ("stem.bias", "head.bias"):
        assert not resumed.state.get(fresh[key])
    support.assert_bits(state_only(contents(fresh, resumed)), state_only(contents(parameters, optimizer)))
    with torch.no_grad():
        for key, p in fresh.items():
            p.copy_(parameters[key])
    for side in ((parameters, optimizer), (fresh, resumed)):
        train(*side, 3, first=2)
    support.assert_bits(contents(fresh, resumed), contents(parameters, optimizer))


def test_values(name, tmp_path):
    parameters, optimizer = trained(name)
    optimizer.save(tmp_path / "with", values=True)
    optimizer.save(tmp_path / "without")
    for file, values, arrive in (("with", True, True), ("with", False, False), ("without", True, False)):
        fresh = model()
        resumed = optimizer_of(name, fresh)
        versions = [p._version for p in fresh.values()]
        resumed.load(tmp_path / file, values=values)
        expected = parameters if arrive else model()
        assert all(torch.equal(p, expected[key]) for key, p in fresh.items())
        assert [p._version > v for p, v in zip(fresh.values(), versions, strict=True)] == [arrive] * len(NAMES)
        assert all(p.requires_grad and p.is_leaf for p in fresh.values())


def test_amsgrad_switched_on_at_the_load(tmp_path):
    """What was not saved is missing, and starts at zero where that is accepted."""
    parameters, optimizer = trained("Adam", amsgrad=False)
    optimizer.save(tmp_path / "state")
    fresh = model()
    resumed = optimizer_of("Adam", fresh)
    with pytest.raises(fusestep.LoadError) as caught:
        resumed.load(tmp_path / "state", what="state")
    assert caught.value.report.missing == [f"{key}/max_exp_avg_sq" for key in NAMES]
    assert resumed.load(tmp_path / "state", what="state", strict=False).loaded == list(NAMES)
    train(fresh, resumed, 1, first=3)
    own = resumed.state[fresh["scale"]]
    assert own["step"] == 4 and torch.equal(own["max_exp_avg_sq"], own["exp_avg_sq"])


def test_adamw_stays_adamw(tmp_path):
    """Settings of an Adam do not take its decoupled decay away, as in torch."""
    parameters, optimizer = trained("Adam")
    optimizer.save(tmp_path / "state")
    for source in (tmp_path / "state", optimizer.state_dict()):
        resumed = optimizer_of("AdamW", model())
        assert resumed.load(source).hyper == []
        assert resumed.param_groups[0]["decoupled_weight_decay"] is True


def test_order_of_state_entries(name, tmp_path):
    parameters, optimizer = trained(name)
    optimizer.save(tmp_path / "state")
    resumed = optimizer_of(name, model())
    resumed.load(tmp_path / "state")
    assert [list(own) for own in resumed.state.values()] == [list(own) for own in optimizer.state.values()]


OWN_STATE = {
    "ema": lambda p: p.detach().clone(),
    "aaa": lambda p: torch.arange(3),  # before the rule's slots wherever names are sorted
    "count": lambda p: torch.tensor(7, dtype=torch.int64),
    "flags": lambda p: torch.tensor([[True, False]]),
    "rate": lambda p: torch.tensor(0.5, dtype=torch.float64),
    "phase": lambda p: torch.tensor([1 + 2j, 3j], dtype=torch.complex64),
    "half": lambda p: torch.ones(2, dtype=torch.bfloat16),
    "grad_avg": lambda p: torch.ones(5),  # a slot of RMSprop
    "none": lambda p: torch.empty(0, 3),
}


def own_state(name, p):
    of_rule = fusestep.state.SLOTS[name]
    return {slot: make(p) for slot, make in OWN_STATE.items() if slot not in of_rule}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("hand_over", [through_file, through_async_file, through_torch_file, through_state_dict])
def test_state_of_the_users_own_comes_back(name, hand_over, dtype, strict, tmp_path):
    """Whatever a user keeps in optimizer.state[p] belongs to it, as in torch's load_state_dict."""
    parameters, optimizer = trained(name, dtype=dtype)
    for p in parameters.values():
        optimizer.state[p].update(own_state(name, p))
    resumed_parameters = model(dtype=dtype)
    for key, p in parameters.items():
        resumed_parameters[key].data.copy_(p)
    resumed = optimizer_of(name, resumed_parameters)
    resumed.load = functools.partial(resumed.load, strict=strict)
    report = hand_over(optimizer, resumed, tmp_path / "state")
    assert report.complete and report.left_out == [] and sorted(report.loaded) == sorted(parameters)
    for key, p in parameters.items():
        before, after = optimizer.state[p], resumed.state[resumed_parameters[key]]
        assert set(before) == set(after)
        for slot in before:
            assert before[slot].dtype == after[slot].dtype, slot
            assert before[slot].shape == after[slot].shape and torch.equal(before[slot], after[slot]), slot
    for trainee in (parameters, optimizer), (resumed_parameters, resumed):
        train(*trainee, 2, first=3)
    assert_same(everything(resumed_parameters, resumed), everything(parameters, optimizer))


def test_a_parameter_with_nothing_but_state_of_the_users_own(name, tmp_path):
    """It has never stepped, and has not when it is loaded."""
    parameters = model()
    optimizer = optimizer_of(name, parameters)
    optimizer.state[parameters["scale"]]["ema"] = torch.ones(3)
    optimizer.save(tmp_path / "state")
    for source in (tmp_path / "state", optimizer.state_dict()):
        fresh = model()
        resumed = optimizer_of(name, fresh)
        assert resumed.load(source).complete
        assert {key: list(resumed.state[p]) for key, p in fresh.items() if p in resumed.state} == {"scale": ["ema"]}


def test_arrays_leave_state_of_the_users_own_out(name, tmp_path):
    parameters, optimizer = trained(name)
    optimizer.state[parameters["scale"]]["count"] = torch.tensor(3)
    optimizer.save(tmp_path / "state")
    arrays = {key: p.detach().numpy() for key, p in model().items()}
    resumed = fusestep.Optimizer(name, arrays, lr=0.02)
    report = resumed.load(tmp_path / "state", what="state")
    assert report.complete and report.left_out == ["scale/count"]
    assert "left out    1     scale/count" in str(report)
    assert set(resumed.slots("scale")) == set(optimizer.state[parameters["scale"]]) - {"step", "count"}


# ---- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", [0.5, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)], ids=repr)
@pytest.mark.parametrize("saved", [0.25, torch.tensor(0.25), torch.tensor([[0.25]])], ids=repr)
def test_tensor_lr(name, saved, here, tmp_path):
    """A tensor stays the tensor it is: a schedule or the user's code knows it."""
    parameters, optimizer = trained(name, lr=copy.deepcopy(saved))
    optimizer.save(tmp_path / "state")
    resumed = optimizer_of(name, model(), lr=copy.deepcopy(here))
    lr = resumed.param_groups[0]["lr"]
    resumed.load(tmp_path / "state")
    now = resumed.param_groups[0]["lr"]
    assert float(now) == 0.25
    if torch.is_tensor(here):
        assert now is lr and now.dtype == here.dtype and now.shape == here.shape
    else:
        assert type(now) is type(saved)


def test_tensor_lr_that_groups_share(tmp_path):
    shared = torch.tensor(0.1)
    parameters = model()
    before = optimizer_of("Adam", parameters, GROUPINGS["two groups"], lr=0.3)
    before.save(tmp_path / "state")
    now = fusestep.optim.Adam(
        [{"params": [(key, parameters[key]) for key in group]} for group in GROUPINGS["two groups"]], lr=shared
    )
    now.load(tmp_path / "state", what="hyper")
    rates = [group["lr"] for group in now.param_groups]
    assert [round(float(rate), 6) for rate in rates] == [0.3, 0.5]
    assert all(torch.is_tensor(rate) for rate in rates) and float(shared) == pytest.approx(0.1)


SETTINGS_KEPT = {
    "none": None,
    "text": "a",
    "numbers": (1, 2.5, -0.0, float("inf")),
    "nested": {"a": (1, {"b": None})},
    "tensor": torch.tensor([[1.0, 2.0]]),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "big": 2**60,
    "tiny": 5e-324,
}


def test_settings_of_other_programs_come_back(tmp_path):
    parameters, optimizer = trained("SGD")
    optimizer.param_groups[0].update(copy.deepcopy(SETTINGS_KEPT), nesterov=0, rate=numpy.float32(0.25))
    optimizer.save(tmp_path / "state")
    resumed = optimizer_of("SGD", model())
    resumed.load(tmp_path / "state")
    group = resumed.param_groups[0]
    assert repr({key: group[key] for key in SETTINGS_KEPT}) == repr(SETTINGS_KEPT)
    assert group["nesterov"] is False and group["rate"] == 0.25
    train(parameters, resumed, 1)


def test_what_a_file_cannot_have_does_not_hinder_loading(tmp_path):
    parameters, optimizer = trained("Adam")
    optimizer.save(tmp_path / "state")
    fresh = model()
    resumed = optimizer_of("Adam", fresh)
    resumed.param_groups[0]["callback"] = print
    resumed.state[fresh["scale"]]["note"] = "mine"
    resumed.load(tmp_path / "state")
    assert resumed.param_groups[0]["callback"] is print
    support.assert_bits(state_only(contents(fresh, resumed)), state_only(contents(parameters, optimizer)))


SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=14),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[6]
    ),
}


@pytest.mark.parametrize("when", ["before", "after"], ids=lambda when: f"scheduler-made-{when}")
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.filterwarnings("ignore:The epoch parameter", "ignore:Detected call of")
def test_schedules_go_on(kind, when, tmp_path):
    """Trained 5 steps, saved, loaded with the scheduler's state, 7 more: as without a stop."""
    make = SCHEDULES[kind]

    def go(parameters, optimizer, scheduler, steps, first):
        rates = []
        for step in range(first, first + steps):
            train(parameters, optimizer, 1, step)
            scheduler.step(1.0) if kind == "ReduceLROnPlateau" else scheduler.step()
            rates.append([group["lr"] for group in optimizer.param_groups])
        return rates

    parameters = model()
    optimizer = optimizer_of("AdamW", parameters, GROUPINGS["two groups"])
    scheduler = make(optimizer)
    go(parameters, optimizer, scheduler, 5, 0)
    optimizer.save(tmp_path / "state", values=True)
    saved = copy.deepcopy(scheduler.state_dict())

    fresh = model()
    resumed = optimizer_of("AdamW", fresh, GROUPINGS["two groups"], lr=0.9)
    if when == "before":
        again = make(resumed)
        resumed.load(tmp_path / "state")
    else:
        resumed.load(tmp_path / "state")
        again = make(resumed)
        resumed.load(tmp_path / "state", what="hyper")  # a new scheduler begins by setting its first rate
    again.load_state_dict(saved)
    assert go(fresh, resumed, again, 7, 5) == go(parameters, optimizer, scheduler, 7, 5)
    support.assert_bits(contents(fresh, resumed), contents(parameters, optimizer))


def test_a_schedule_resumes_at_last_epoch(tmp_path):
    """torch's KeyError about initial_lr does not come."""
    parameters, optimizer = trained("SGD")
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.save(tmp_path / "state")
    optimizer.step()
    scheduler.step()
    resumed = optimizer_of("SGD", model(), lr=0.9)
    resumed.load(tmp_path / "state")
    again = lr_scheduler.StepLR(resumed, 1, 0.5, last_epoch=0)
    assert again.base_lrs == scheduler.base_lrs and resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_under_a_grad_scaler(name, tmp_path):
    parameters, optimizer = trained(name)
    optimizer.save(tmp_path / "state", values=True)
    fresh = model()
    resumed = optimizer_of(name, fresh)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for side, scaled in (((parameters, optimizer), False), ((fresh, resumed), True)):
        if scaled:
            resumed.load(tmp_path / "state")
        for key, p in side[0].items():
            support.set_grads([p], seed=NAMES.index(key), scale=4.0 if scaled else 1.0)
        if scaled:
            scaler.scale(torch.zeros(()))
            scaler.step(side[1])
            scaler.update()
            assert scaler.get_scale() == 4.0
        else:
            side[1].step()
    support.stepped_by_us(resumed, steps=1)
    support.assert_bits(contents(fresh, resumed), contents(parameters, optimizer))


# ---- hooks, torch's messages -------------------------------------------------------------------------


def test_hooks_see_what_torchs_see(name):
    seen = {}
    for side in (support.ours(name), support.theirs(name)):
        parameters = model()
        optimizer = optimizer_of(name, parameters, cls=side)
        train(parameters, optimizer, 1)
        log = seen[side] = []

        def replaced(optimizer, state_dict, log=log):
            log.append(("load pre", list(state_dict), [list(own) for own in state_dict["state"].values()]))
            groups = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        def seen_second(optimizer, state_dict, log=log):
            log.append(("load pre 2", [group["lr"] for group in state_dict["param_groups"]]))

        def loaded(optimizer, log=log):
            log.append(("load post", [len(own) for own in optimizer.state.values()], optimizer.param_groups[0]["lr"]))

        optimizer.register_state_dict_pre_hook(lambda optimizer, log=log: log.append("pre"))
        optimizer.register_state_dict_post_hook(lambda optimizer, given, log=log: {**given, "extra": 1})
        optimizer.register_load_state_dict_pre_hook(replaced)
        optimizer.register_load_state_dict_pre_hook(seen_second)
        optimizer.register_load_state_dict_post_hook(loaded)
        given = optimizer.state_dict()
        log.append(sorted(given))
        optimizer.load_state_dict(state_dict=given)
        hooks = optimizer._optimizer_load_state_dict_pre_hooks, optimizer._optimizer_load_state_dict_post_hooks
        log.append([len(own) for own in hooks])
    mine, torchs = seen.values()
    assert mine == torchs


def without(key):
    return lambda given: given.pop(key)


def replaced_by(key, value):
    return lambda given: given.update({key: value})


TORCHS_REFUSALS = {
    "groups": lambda given: given["param_groups"].append(given["param_groups"][0]),
    "size": lambda given: given["param_groups"][0]["params"].pop(),
    "no groups": without("param_groups"),
    "no state": without("state"),
    "empty": dict.clear,
    "groups are none": replaced_by("param_groups", None),
    "state is a list": replaced_by("state", []),
    "group without params": lambda given: given["param_groups"][0].pop("params"),
    "group is a list": replaced_by("param_groups", [[1]]),
}


@pytest.mark.parametrize("kind", TORCHS_REFUSALS)
def test_load_state_dict_refuses_as_torch_does(name, kind):
    errors = []
    for cls in (support.ours(name), support.theirs(name)):
        parameters, optimizer = trained(name, cls=cls)
        given = copy.deepcopy(optimizer.state_dict())
        TORCHS_REFUSALS[kind](given)
        before = everything(parameters, optimizer)
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011
            optimizer.load_state_dict(given)
        errors.append((caught.type, str(caught.value)))
        assert_same(everything(parameters, optimizer), before)
    assert errors[0] == errors[1]


def test_torchs_two_messages():
    parameters, optimizer = trained("Adam")
    two = optimizer_of("Adam", parameters, GROUPINGS["two groups"])
    few = optimizer_of("Adam", model(names=NAMES[:2]))
    for other, message in (
        (two, "loaded state dict has a different number of parameter groups"),
        (few, "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            optimizer.load_state_dict(other.state_dict())


# ---- refused, and nothing has changed ------------------------------------------------------------------


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-5])


def no_file(path):
    path.unlink()


def nonsense(path):
    path.write_bytes(b"no checkpoint")


def rewritten(change):
    """A plain file, with its metadata and tensors changed."""

    def apply(path):
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        change(tensors)
        safetensors.torch.save_file(tensors, path)

    return apply


def torch_file(make):
    return lambda path: torch.save(make(), path)


def edited(change):
    """A state_dict with something changed."""

    def apply(optimizer):
        given = copy.deepcopy(optimizer.state_dict())
        change(given)
        return given

    return apply


def in_group(key, value):
    return edited(lambda given: given["param_groups"][0].update({key: value}))


def in_state(key, value, index=3):
    return edited(lambda given: given["state"][index].update({key: value}))


BAD_FILES = {
    "gone": (no_file, {}, "cannot be opened"),
    "nonsense": (nonsense, {}, "is no safetensors file"),
    "cut off": (cut_off, {}, "cut off"),
    "flipped bit": (flip_last_byte, {}, "the checksum differs"),
    "flipped bit, values": (flip_last_byte, {"values": False}, "the checksum differs"),
    "flipped bit, loose": (flip_last_byte, {"strict": False}, "the checksum differs"),
    "torch file of a tensor": (torch_file(lambda: torch.ones(2)), {}, "has no optimizer's state_dict at its top"),
    "torch file of a training state": (torch_file(lambda: {"optimizer": {}}), {}, "hand over the part that is one"),
    "torch file of code": (torch_file(lambda: {"state": pathlib.PurePath}), {}, "torch cannot load it"),
    "no slots": (rewritten(lambda t: t.update(a=t.popitem()[1]) or [t.pop(k) for k in list(t)[:-1]]), {}, "no tensor"),
}


def state_of_file(name, tmp_path):
    """A file, and another optimizer it would fit, with state of its own."""
    _, optimizer = trained(name)
    path = tmp_path / "state"
    optimizer.save(path, values=True)
    parameters, other = trained(name, steps=2, lr=0.7)
    parameters["scale"].requires_grad_(False)
    return path, parameters, other


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_change_nothing(name, kind, tmp_path):
    damage, options, message = BAD_FILES[kind]
    path, parameters, optimizer = state_of_file(name, tmp_path)
    if kind.startswith("flipped bit, values"):
        optimizer.save(path)  # without values the last tensor is a slot
    before = everything(parameters, optimizer)
    damage(path)
    with pytest.raises(fusestep.FileError, match=message) as caught:
        optimizer.load(path, **options)
    assert str(path) in str(caught.value) and isinstance(caught.value, OSError)
    assert_same(everything(parameters, optimizer), before)


@pytest.mark.parametrize("what", ["all", "state", "hyper"])
def test_an_unreadable_tensor_changes_nothing(what, tmp_path, monkeypatch):
    """The last of many."""
    path, parameters, optimizer = state_of_file("Adam", tmp_path)
    before = everything(parameters, optimizer)
    read = fusestep._core.StateFileReader.read_into
    calls = []

    def fail(self, index, slot, address, size):
        calls.append(slot)
        if len(calls) == 4 * len(NAMES):
            raise fusestep.FileError("gone")
        read(self, index, slot, address, size)

    monkeypatch.setattr(fusestep._core.StateFileReader, "read_into", fail)
    if what == "hyper":
        optimizer.load(path, what=what)
        assert not calls
    else:
        with pytest.raises(fusestep.FileError, match="gone"):
            optimizer.load(path, what=what)
        assert_same(everything(parameters, optimizer), before)


BAD_DICTS = {
    "empty": (edited(dict.clear), {}, "state_dict: has no 'param_groups'"),
    "no state": (edited(without("state")), {}, "state_dict: has no 'state'"),
    "groups": (edited(replaced_by("param_groups", 3)), {}, "state_dict: param_groups must be a list"),
    "group": (edited(replaced_by("param_groups", [3])), {}, r"state_dict: param_groups\[0\] must be a dict"),
    "params": (in_group("params", 3), {}, r"state_dict: param_groups\[0\]\['params'\] must be a list"),
    "index": (
        edited(lambda given: given["param_groups"][0].update(params=[[]], param_names=["a"])),
        {},
        r"state_dict: param_groups\[0\]\['params'\] has \[\]",
    ),
    "names": (in_group("param_names", ["a"]), {}, r"param_groups\[0\]\['param_names'\] must be a list of 6 names"),
    "state": (edited(replaced_by("state", 3)), {}, "state_dict: state must be a dict"),
    "state of one": (edited(lambda given: given["state"].update({3: 4})), {}, r"state_dict: state\[3\] must be a dict"),
    "twice": (in_group("param_names", ["scale"] * 6), {}, "there are two parameters named 'scale'"),
    "lr": (in_group("lr", -1.0), {}, "group '0': Invalid learning rate: -1.0"),
    "lr of text": (in_group("lr", "fast"), {}, "group '0': lr must be a number, got \"fast\""),
    "lr of nan": (in_group("lr", float("nan")), {}, "group '0': Invalid learning rate: nan"),
    "lr of many": (in_group("lr", torch.ones(2)), {}, "group '0': lr must be a number"),
    "betas": (in_group("betas", (0.9,)), {}, r"group '0': betas must be two numbers, got \[0.9\]"),
    "beta": (in_group("betas", (0.9, 1.5)), {}, "group '0': Invalid beta parameter at index 1: 1.5"),
    "code": (in_group("hook", print), {}, "group '0': hook is a builtin_function_or_method, which is not saved"),
    "hyper only": (in_group("eps", -1.0), {"what": "hyper"}, "group '0': Invalid epsilon value: -1.0"),
    "step": (in_state("step", "three"), {}, "parameter 'head.bias': 'step' must be a number, got 'three'"),
    "steps": (in_state("step", torch.ones(2)), {}, "parameter 'head.bias': 'step' must be a number, got tensor"),
    "step < 0": (in_state("step", -1), {}, "parameter 'head.bias': step must be a whole number >= 0, got -1"),
    "step nan": (
        in_state("step", float("nan")),
        {},
        "parameter 'head.bias': step must be a whole number >= 0, got nan",
    ),
    "slot": (in_state("exp_avg", 3), {}, "parameter 'head.bias', 'exp_avg' is a int, which is not saved or loaded"),
    "sparse": (
        in_state("exp_avg", torch.zeros(4).to_sparse()),
        {},
        "parameter 'head.bias', 'exp_avg': its layout is torch.sparse_coo, expected a dense tensor",
    ),
    "meta": (in_state("exp_avg", torch.zeros(4, device="meta")), {}, "'exp_avg': a Tensor without memory of its own"),
    "shape": (in_state("exp_avg", torch.zeros(5)), {}, r"does not fit\n  head.bias shape saved \[5\] here \[4\]"),
    "shape of second": (in_state("exp_avg_sq", torch.zeros(5)), {}, r"  head.bias/exp_avg_sq shape saved \[5\] here"),
    "lost slot": (edited(lambda given: given["state"][3].pop("exp_avg")), {}, "missing     1     head.bias/exp_avg\n?"),
    "slot named value": (
        in_state("value", torch.zeros(4)),
        {},
        "'head.bias' has state named 'value', as files name its own",
    ),
    "int": (in_state("exp_avg", torch.zeros(4).int()), {}, "head.bias/exp_avg dtype saved int32 here float32"),
    "no names": (edited(lambda g: g["param_groups"][0].pop("param_names")), {}, "the source has no names of parameter"),
    "few names": (edited(lambda given: None), {"saved_names": NAMES[:4]}, "saved_names: there are 4 for 6 parameters"),
    "names of 1": (edited(lambda given: None), {"saved_names": "abcdef"}, "saved_names: expected names of parameters"),
    "no pairs": (edited(lambda given: None), {"saved_names": [1] * 6}, "saved_names: expected names of parameters or"),
    "what": (edited(lambda given: None), {"what": "lr"}, "what must be 'all', 'state' or 'hyper', got 'lr'"),
    "what none": (edited(lambda given: None), {"what": None}, "what must be 'all', 'state' or 'hyper', got None"),
    "no text": (in_group("note", "\ud800"), {}, "names and settings must be text that UTF-8 can have"),
    "rename to 3": (
        edited(lambda given: None),
        {"rename": lambda key: 3},
        "rename: 'stem.weight' becomes 3, expected a",
    ),
    "rename": (edited(lambda given: None), {"rename": 3}, "rename: expected a dict or a function, got int"),
    "rename twice": (
        edited(lambda given: None),
        {"rename": {"scale": "empty"}},
        "rename: 'scale' and 'empty' both become 'empty'",
    ),
    "names here": (edited(lambda given: None), {"names": []}, r"names: parameter 0, of shape \[2, 3, 4, 5\], has none"),
    "names of what": (edited(lambda given: None), {"names": [3]}, "names: expected a model or its named_parameters()"),
    "no source": (lambda optimizer: 3, {}, "expected a file's path or a state_dict, got int"),
    "none": (lambda optimizer: None, {}, "expected a file's path or a state_dict, got NoneType"),
}


@pytest.mark.parametrize("kind", BAD_DICTS)
def test_bad_dicts_and_arguments_change_nothing(kind):
    make, options, message = BAD_DICTS[kind]
    _, other = trained("Adam")
    parameters, optimizer = trained("Adam", steps=2, lr=0.7)
    source = make(other)
    before = everything(parameters, optimizer)
    with pytest.raises(fusestep.InvalidArgument, match=message):
        optimizer.load(source, **options)
    assert_same(everything(parameters, optimizer), before)


def test_errors_of_rename_come_through():
    parameters, optimizer = trained("Adam")

    def rename(key):
        raise KeyError("mine")

    before = everything(parameters, optimizer)
    with pytest.raises(KeyError, match="mine"):
        optimizer.load(optimizer.state_dict(), rename=rename)
    assert_same(everything(parameters, optimizer), before)


def test_settings_of_a_file_are_checked(tmp_path):
    parameters, optimizer = trained("Adam", groups=GROUPINGS["two groups"])
    optimizer.param_groups[1]["lr"] = -3.0
    optimizer.save(tmp_path / "state")
    resumed = optimizer_of("Adam", model(), GROUPINGS["two groups"])
    before = everything(parameters, resumed)
    with pytest.raises(fusestep.InvalidArgument, match="group '1': Invalid learning rate: -3.0"):
        resumed.load(tmp_path / "state")
    assert_same(everything(parameters, resumed), before)
    resumed.load(tmp_path / "state", what="state")


def test_another_rule(tmp_path):
    parameters, optimizer = trained("SGD")
    optimizer.save(tmp_path / "state")
    resumed = optimizer_of("Adam", model())
    with pytest.raises(fusestep.LoadError) as caught:
        resumed.load(tmp_path / "state")
    assert caught.value.report.mismatched == [("0", "rule", "SGD", "Adam")]
    assert not resumed.load(tmp_path / "state", strict=False).loaded
    assert not resumed.state


def test_expanded_parameters_are_not_written(tmp_path):
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = fusestep.optim.SGD([("p", torch.nn.Parameter(p.detach().expand(3)))])
    optimizer.save(tmp_path / "state", values=True)
    with pytest.raises(fusestep.InvalidArgument, match="parameter 'p' is expanded: its value cannot be loaded"):
        optimizer.load(tmp_path / "state")
    optimizer.load(tmp_path / "state", values=False)


def of_inference_mode_moved(p):
    """torch knows it by its lack of a version counter alone."""
    moved = torch.nn.ParameterList([support.of_inference_mode(p)])
    return moved.to(torch.float64).to(torch.float32)[0]


def of_integers(p):
    return torch.nn.Parameter(p.detach().to(torch.int64), requires_grad=False)


THERE = "made under inference_mode: "
UNWRITABLE = {  # how the parameter is made, options of the load, whether it was frozen, message
    "value": (support.of_inference_mode, {"values": True}, True, THERE + "its value cannot be loaded"),
    "value, thawed": (support.of_inference_mode, {"values": True}, False, THERE + "its value cannot be loaded"),
    "value, moved": (of_inference_mode_moved, {"values": True}, True, THERE + "its value cannot be loaded"),
    "thawed": (support.of_inference_mode, {"values": False}, False, THERE + "it cannot require a gradient"),
    "thawed, moved": (of_inference_mode_moved, {"values": False}, False, THERE + "it cannot require a gradient"),
    "stays frozen": (support.of_inference_mode, {"values": False}, True, None),
    "state alone": (support.of_inference_mode, {"values": False, "what": "state"}, False, None),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_parameters_that_torch_does_not_write(kind, tmp_path):
    """It is known before anything is written."""
    make, options, frozen, message = UNWRITABLE[kind]
    parameters, optimizer = trained("Adam")
    parameters["scale"].requires_grad_(not frozen)
    optimizer.save(tmp_path / "state", values=True)
    here = model()
    here["scale"] = make(here["scale"])
    resumed = optimizer_of("Adam", here)
    before = everything(here, resumed)
    if message is None:
        resumed.load(tmp_path / "state", **options)
    else:
        with pytest.raises(fusestep.InvalidArgument, match=f"parameter 'scale' was {message}"):
            resumed.load(tmp_path / "state", **options)
        assert_same(everything(here, resumed), before)
        with torch.inference_mode():
            resumed.load(tmp_path / "state", **options)
    support.assert_bits(state_only(contents(here, resumed)), state_only(contents(parameters, optimizer)))


def test_parameters_of_integers_are_not_thawed(tmp_path):
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    fusestep.optim.SGD([("first", first), ("second", second)], lr=0.5).save(tmp_path / "state")
    first.requires_grad_(False)
    resumed = fusestep.optim.SGD([("first", first), ("second", of_integers(second))], lr=0.25)
    with pytest.raises(fusestep.InvalidArgument, match="'second' of torch.int64 cannot require a gradient"):
        resumed.load(tmp_path / "state", strict=False)
    assert not first.requires_grad and resumed.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("kind", ["of inference mode", "the same, moved", "of integers"])
def test_a_tensor_lr_that_cannot_be_filled(kind, tmp_path):
    parameters, optimizer = trained("Adam")
    optimizer.save(tmp_path / "state")
    with torch.inference_mode(kind != "of integers"):
        lr = torch.tensor(1, dtype=torch.int64 if kind == "of integers" else torch.float32)
    if kind == "the same, moved":
        lr.data = torch.ones(())
    resumed = optimizer_of("Adam", model(), lr=lr)
    resumed.load(tmp_path / "state")
    assert torch.is_tensor(resumed.param_groups[0]["lr"])
    assert resumed.param_groups[0]["lr"].item() == pytest.approx(SETTINGS["Adam"]["lr"])
    assert lr.item() == 1


NOT_NAMED = {
    "names only in the file": (True, False, {}, "this optimizer does not know its parameters' names: give names="),
    "names only here": (False, True, {}, "the source has no names of parameters: give saved_names="),
    "nowhere, other groups": (
        False,
        False,
        {},
        r"other sizes: \[6\] saved, \[4, 2\] here; give names= and saved_names=",
    ),
    "too few": (False, True, {"saved_names": NAMES[:3]}, "saved_names: there are 3 for 6 parameters"),
    "too many": (False, True, {"saved_names": NAMES + ("x",)}, "saved_names: there are 7 for 6 parameters"),
}


@pytest.mark.parametrize("form", ["file", "dict"])
@pytest.mark.parametrize("kind", NOT_NAMED)
def test_names_on_one_side_only(kind, form, tmp_path):
    then, now, options, message = NOT_NAMED[kind]
    parameters, optimizer = trained("Adam", named=then)
    optimizer.save(tmp_path / "state")
    source = tmp_path / "state" if form == "file" else optimizer.state_dict()
    groups = [NAMES[:4], NAMES[4:]] if "other groups" in kind else None
    resumed = optimizer_of("Adam", parameters, groups, named=now)
    with pytest.raises(fusestep.InvalidArgument, match=message):
        resumed.load(source, **options)


def test_saved_names_of_a_file_that_has_its_own(tmp_path):
    _, optimizer = trained("Adam")
    through_plain_safetensors(optimizer, optimizer_of("Adam", model()), tmp_path / "state")
    with pytest.raises(fusestep.InvalidArgument, match="saved_names: the file has names of its own; rename= gives oth"):
        optimizer.load(tmp_path / "state", saved_names=NAMES)
    safetensors.torch.save_file({"7/exp_avg": torch.ones(2)}, tmp_path / "state")
    with pytest.raises(fusestep.InvalidArgument, match="saved_names: there are 6 for 1 parameters"):
        optimizer.load(tmp_path / "state", saved_names=NAMES)


def test_dtypes_without_conversion(tmp_path):
    """convert= rounds numbers of the dtypes a slot can have, and no others."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = fusestep.optim.SGD([("p", p)], momentum=0.9)
    for dtype, name, size in (("F8_E8M0", "F8_E8M0", 1), ("U8", "uint8", 1), ("I32", "int32", 4)):
        described = {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}
        header = json.dumps({"p/momentum_buffer": described}).encode()
        (tmp_path / "state").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2 * size))
        for convert in (False, True):
            with pytest.raises(fusestep.LoadError, match=f"momentum_buffer dtype saved {name} here float32"):
                optimizer.load(tmp_path / "state", convert=convert)
        assert not optimizer.state[p]


# ---- saving ----------------------------------------------------------------------------------------------


def test_public_reader_sees_the_same_numbers(name, tmp_path):
    for kind, given in KINDS.items():
        parameters, optimizer = trained(name, **given)
        optimizer.save(tmp_path / "state", values=True, metadata={"run": 7})
        found = safetensors.torch.load_file(tmp_path / "state")
        expected = {}
        for (key, slot), value in contents(parameters, optimizer).items():
            if slot != "step":
                expected[f"{key}/{slot}"] = torch.view_as_real(value) if value.is_complex() else value
        assert found.keys() == expected.keys(), kind
        for key, value in expected.items():
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), (kind, key)
        with safetensors.safe_open(tmp_path / "state", "pt") as file:
            metadata = file.metadata()
        assert metadata["run"] == "7" and metadata["fusestep.version"] == "1"
        groups = json.loads(metadata["fusestep.groups"])
        assert groups[0]["hyper"]["lr"] == 0.02
        described = {p["name"]: p for p in groups[0]["params"]}
        assert list(described) == list(NAMES)
        assert [p.get("step") for p in described.values()] == ([None] if name == "SGD" else [3.0]) * len(NAMES)


METADATA = {
    "text": "words",
    "looks like JSON": "12",
    "also": "null",
    "number": 3.5,
    "none": None,
    "nested": {"a": [1, {"b": "c"}]},
    "ünïcode": "日本",
    "": "no key",
    "nan": "NaN",
}


def test_metadata_comes_back_and_is_kept(tmp_path):
    parameters, optimizer = trained("Adam")
    optimizer.save(tmp_path / "a", metadata=METADATA)
    resumed = optimizer_of("Adam", model())
    report = resumed.load(tmp_path / "a")
    assert report.metadata == METADATA
    resumed.save(tmp_path / "b", metadata={"text": "newer", "more": 1})
    assert optimizer.load(tmp_path / "b").metadata == {**METADATA, "text": "newer", "more": 1}
    optimizer.load(resumed.state_dict())
    optimizer.save(tmp_path / "c")
    assert optimizer.load(tmp_path / "c").metadata == {}


def test_metadata_of_other_programs_is_kept(tmp_path):
    parameters, optimizer = trained("Adam")
    through_plain_safetensors(optimizer, optimizer, tmp_path / "a")
    optimizer.save(tmp_path / "b")
    assert safetensors.safe_open(tmp_path / "b", "pt").metadata()["format"] == "pt"


BAD_SAVES = {
    "path": ({}, 3, "expected a file's path, got int"),
    "reserved": ({"metadata": {"fusestep.x": 1}}, None, "keys that begin with 'fusestep.' are reserved"),
    "object": ({"metadata": {"x": object()}}, None, r"metadata\['x'\] cannot be written as JSON"),
    "key": ({"metadata": {3: "x"}}, None, "metadata: keys must be strings, got 3"),
    "list": ({"metadata": [1]}, None, "metadata: expected a dict, got list"),
    "no text": ({"metadata": {"x": "\ud800"}}, None, r"metadata\['x'\] cannot be written as JSON: 'utf-8' codec"),
    "no text as key": ({"metadata": {"\ud800": "x"}}, None, "cannot be written as JSON: 'utf-8' codec"),
    "zero": ({}, "a\0b", r"no file can be named 'a\\x00b'"),
    "no name": ({}, "a\ud800", r"no file can be named 'a\\ud800'"),
    "names": ({"names": [("a", torch.ones(1))]}, None, r"names: parameter 0, of shape \[2, 3, 4, 5\], has none"),
}


@pytest.mark.parametrize("method", ["save", "save_async"])
@pytest.mark.parametrize("kind", BAD_SAVES)
def test_bad_arguments_of_save(kind, method, tmp_path):
    options, path, message = BAD_SAVES[kind]
    _, optimizer = trained("Adam")
    with pytest.raises(fusestep.InvalidArgument, match=message):
        getattr(optimizer, method)(path or tmp_path / "state", **options)
    assert not list(tmp_path.iterdir())


class Shadow(torch.Tensor):
    """Has elements and no memory."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    def __init__(self, like):
        pass

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(str(function))


UNSAVABLE = {
    "setting": (
        lambda optimizer, p: optimizer.param_groups[0].update(hook=print),
        "group '0': hook is a builtin_function_or_method, which is not saved or loaded",
    ),
    "slot": (
        lambda optimizer, p: optimizer.state[p].update(note="x"),
        "parameter 'stem.weight', 'note' is a str, which is not saved or loaded",
    ),
    "sparse slot": (
        lambda optimizer, p: optimizer.state[p].update(exp_avg=torch.zeros(3).to_sparse()),
        "parameter 'stem.weight', 'exp_avg': its layout is torch.sparse_coo, expected a dense tensor",
    ),
    "slot without memory": (
        lambda optimizer, p: optimizer.state[p].update(exp_avg=Shadow(torch.zeros(3))),
        "parameter 'stem.weight', 'exp_avg': a Shadow without memory of its own",
    ),
    "dtype": (
        lambda optimizer, p: optimizer.state[p].update(exp_avg=torch.zeros(3).to(torch.float8_e5m2)),
        "'stem.weight/exp_avg' cannot be saved: safetensors has no dtype for float8_e5m2",
    ),
    "state of nobody": (
        lambda optimizer, p: optimizer.state.update(total=3),
        r"state\['total'\] is of no parameter, and is not saved",
    ),
}


@pytest.mark.parametrize("method", ["save", "save_async"])
@pytest.mark.parametrize("kind", UNSAVABLE)
def test_what_cannot_be_saved_is_named(kind, method, tmp_path):
    change, message = UNSAVABLE[kind]
    parameters, optimizer = trained("Adam")
    path = tmp_path / "state"
    optimizer.save(path)
    older = path.read_bytes()
    change(optimizer, parameters["stem.weight"])
    with pytest.raises(fusestep.InvalidArgument, match=message):
        getattr(optimizer, method)(path)
        optimizer.wait_for_save()
    assert path.read_bytes() == older and list(tmp_path.iterdir()) == [path]


def test_a_failed_save_keeps_the_older_file(tmp_path, monkeypatch):
    """Also while somebody holds the exception."""
    parameters, optimizer = trained("Adam")
    path = tmp_path / "state"
    optimizer.save(path)
    older = path.read_bytes()
    pieces, calls = fusestep.sources.pieces_of, []

    def failing(tensor):
        calls.append(tensor)
        if len(calls) == 5:
            raise fusestep.FileError("disk full")
        yield from pieces(tensor)

    monkeypatch.setattr(fusestep.checkpoint, "pieces_of", failing)
    with pytest.raises(fusestep.FileError, match="disk full") as caught:
        optimizer.save(path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == older
    assert caught.value.__traceback__ is not None


class Slow:
    """A writer that waits to be let go."""

    def __init__(self, monkeypatch):
        self.go = threading.Event()
        self.writes = []
        outer = self

        class Writer(fusestep._core.StateFileWriter):
            def write(self, *args):
                outer.writes.append(args)
                assert outer.go.wait(30)
                super().write(*args)

        monkeypatch.setattr(fusestep._core, "StateFileWriter", Writer)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "channels_last", "complex64"])
def test_save_async_holds_the_state_of_the_call(name, kind, tmp_path, monkeypatch):
    parameters, optimizer = trained(name, **KINDS[kind])
    expected = contents(parameters, optimizer)
    slow = Slow(monkeypatch)
    optimizer.save_async(tmp_path / "state", values=True)
    train(parameters, optimizer, 3, first=3)  # while it is written
    optimizer.param_groups[0]["lr"] = 9.0
    assert not (tmp_path / "state").exists()
    slow.go.set()
    optimizer.wait_for_save()
    optimizer.wait_for_save()
    fresh = model(**KINDS[kind])
    resumed = optimizer_of(name, fresh)
    resumed.load(tmp_path / "state")
    assert resumed.param_groups[0]["lr"] == 0.02
    support.assert_bits(contents(fresh, resumed), expected)


def test_the_second_save_waits(tmp_path, monkeypatch):
    parameters, optimizer = trained("Adam")
    slow = Slow(monkeypatch)
    optimizer.save_async(tmp_path / "first")
    threading.Timer(0.2, slow.go.set).start()
    begun = time.monotonic()
    optimizer.save_async(tmp_path / "second")
    assert time.monotonic() - begun > 0.1 and (tmp_path / "first").exists()
    optimizer.wait_for_save()
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


NEXT_CALLS = {
    "save": lambda optimizer, path: optimizer.save(path),
    "save_async": lambda optimizer, path: optimizer.save_async(path),
    "load": lambda optimizer, path: optimizer.load(optimizer.state_dict()),
    "wait_for_save": lambda optimizer, path: optimizer.wait_for_save(),
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_errors_of_save_async_come_at_the_next_call(call, tmp_path):
    parameters, optimizer = trained("Adam")
    optimizer.save_async(tmp_path / "no" / "such" / "folder")
    with pytest.raises(fusestep.FileError, match="cannot open its directory"):
        NEXT_CALLS[call](optimizer, tmp_path / "state")
    assert not (tmp_path / "state").exists()
    NEXT_CALLS[call](optimizer, tmp_path / "state")  # once


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_while_a_save_is_in_flight(copier, tmp_path, monkeypatch):
    parameters, optimizer = trained("Adam")
    slow = Slow(monkeypatch)
    optimizer.save_async(tmp_path / "state")
    twin = copier(optimizer)
    twin.wait_for_save()  # has none
    assert not (tmp_path / "state").exists()
    assert vars(twin).keys() >= {"state", "param_groups", "defaults"}
    slow.go.set()
    optimizer.wait_for_save()
    twin.load(tmp_path / "state")
    support.assert_bits(
        {key: v for key, v in support.all_state(twin).items() if key[1] != "value"},
        {key: v for key, v in support.all_state(optimizer).items() if key[1] != "value"},
    )


def test_a_save_ends_before_the_program_does(tmp_path):
    program = f"""
import torch, fusestep
p = torch.nn.Parameter(torch.ones(3_000_000))
optimizer = fusestep.optim.Adam([("p", p)])
p.grad = torch.ones_like(p)
optimizer.step()
optimizer.save_async({str(tmp_path / "state")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=pathlib.Path(fusestep.__file__).parents[1])
    p = torch.nn.Parameter(torch.ones(3_000_000))
    assert fusestep.optim.Adam([("p", p)]).load(tmp_path / "state").complete


# ---- other devices, distributed tensors ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_memory_out_of_reach_goes_through_pieces(name, kind, tmp_path, monkeypatch):
    """What other devices do, here with memory that is said to be out of reach, in pieces of 24 bytes."""
    parameters, optimizer = trained(name, **KINDS[kind])
    optimizer.save(tmp_path / "whole", values=True)
    monkeypatch.setattr(fusestep.sources, "is_in_reach", lambda tensor: False)
    monkeypatch.setattr(fusestep.sources, "PIECE", 24)
    optimizer.save(tmp_path / "pieces", values=True)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    fresh = model(**KINDS[kind])
    resumed = optimizer_of(name, fresh)
    resumed.load(tmp_path / "pieces")
    support.assert_bits(contents(fresh, resumed), contents(parameters, optimizer))


@pytest.mark.gpu
@pytest.mark.only_on("cuda", reason="simulated devices are not torch's")
@pytest.mark.parametrize("method", ["save", "save_async"])
@pytest.mark.parametrize(("then", "now"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_from_device_to_device(name, then, now, method, tmp_path):
    sides = []
    for device in (then, now):
        parameters = {key: torch.nn.Parameter(p.detach().to(device)) for key, p in model(layout=channels_last).items()}
        sides.append((parameters, optimizer_of(name, parameters)))
    (parameters, optimizer), (fresh, resumed) = sides
    train(parameters, optimizer, 3)
    getattr(optimizer, method)(tmp_path / "state", values=True)
    train(parameters, optimizer, 1, first=3)
    optimizer.wait_for_save()
    resumed.load(tmp_path / "state")
    assert all(v.device.type == now for own in resumed.state.values() for v in own.values())
    train(fresh, resumed, 1, first=3)
    found, expected = ({key: v.cpu() for key, v in contents(*side).items()} for side in sides[::-1])
    support.assert_bits(found, expected)


DISTRIBUTED = """
import os, sys, pytest, torch, fusestep
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
optimizer = fusestep.optim.Adam([("p", p)])
p.grad = torch.ones_like(p)
optimizer.step()
for call in (lambda: optimizer.save(sys.argv[1] + "x"), lambda: optimizer.load(optimizer.state_dict())):
    with pytest.raises(fusestep.InvalidArgument, match="'p' is distributed: use torch.distributed.checkpoint"):
        call()
optimizer.load_state_dict(optimizer.state_dict())
plain = fusestep.optim.Adam([("p", torch.nn.Parameter(torch.ones(4, 2)))])
with pytest.raises(fusestep.InvalidArgument, match="parameter 'p', 'exp_avg' is distributed: use torch.distrib"):
    plain.load(optimizer.state_dict())
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_tensors_are_refused(tmp_path):
    path = pathlib.Path(fusestep.__file__).parents[1]
    subprocess.run([sys.executable, "-c", DISTRIBUTED, str(tmp_path / "store")], check=True, cwd=path)


# ---- memory --------------------------------------------------------------------------------------------------

PEAK = """
import sys, torch, fusestep
torch.set_num_threads(1)

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) // 1024

def peak(work):
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

p = torch.nn.Parameter(torch.ones(1 << 24))  # 64 MiB; state of twice that
q = torch.nn.Parameter(torch.ones(1 << 24))
path = sys.argv[1]

def make():
    return fusestep.optim.Adam([("p", p), ("q", q)])

optimizer = make()
p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
optimizer.step()
p.grad = q.grad = None
save = peak(lambda: optimizer.save(path))
given = optimizer.state_dict()
del optimizer
optimizer = make()
small = peak(lambda: make().load(path, what="hyper"))
load = peak(lambda: optimizer.load(path))
optimizer = make()
positional = peak(lambda: optimizer.load_state_dict(given))
print(save, small, load, positional)
"""


def test_memory(tmp_path):
    """Saving takes a piece; loading into a fresh optimizer takes the state and a piece."""
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    path = pathlib.Path(fusestep.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "state")], check=True, cwd=path, capture_output=True, text=True
    )
    save, small, load, positional = map(int, done.stdout.split())
    assert save < 24 and small < 24, done.stdout
    assert load < 256 + 24, done.stdout
    assert positional < 24, done.stdout


def test_loaded_state_is_a_copy(name, tmp_path):
    """Unlike load_state_dict, after which the dict and the optimizer share tensors, as in torch."""
    parameters, optimizer = trained(name)
    given = optimizer.state_dict()
    expected = copy.deepcopy(given)
    fresh = model()
    resumed = optimizer_of(name, fresh)
    resumed.load(given)
    train(fresh, resumed, 2)
    assert repr(given) == repr(expected)


def test_bytesio_is_no_path():
    _, optimizer = trained("Adam")
    with pytest.raises(fusestep.InvalidArgument, match="expected a file's path or a state_dict, got BytesIO"):
        optimizer.load(io.BytesIO())
