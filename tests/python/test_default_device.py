# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""torch.set_default_device moves the tensors a program makes, and none of ours: what is read stays on the CPU, what
belongs to a parameter is where it is. "meta" is the default here, whose tensors have nothing in them."""

import copy
import math

import pytest
import torch

import fusestep
import support
from fusestep.convert import convert
from fusestep.diff import diff

pytestmark = pytest.mark.on_cpu

SHAPES = ((3, 2), (4,))


@pytest.fixture(autouse=True)
def meta():
    with torch.device("meta"):
        yield


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def trained(name, dtype=torch.float32, steps=2, **options):
    optimizer = support.ours(name)(support.tensors(*SHAPES, dtype=dtype), **{**support.FULLEST[name], **options})
    for seed in range(steps):
        support.set_grads(params_of(optimizer), seed)
        optimizer.step()
    return optimizer


def everything_is_on_the_cpu(optimizer):
    found = [value for value in support.all_state(optimizer).values() if torch.is_tensor(value)]
    assert found and {tensor.device.type for tensor in found} == {"cpu"}


def goes_on_as(optimizer, other):
    for each in (optimizer, other):
        support.set_grads(params_of(each), seed=9)
        each.step()
    everything_is_on_the_cpu(optimizer)
    with torch.device("cpu"):
        support.assert_bits(support.all_state(optimizer), support.all_state(other))


def fresh(name, optimizer, **options):
    return support.ours(name)(support.twins(params_of(optimizer)), **{**support.FULLEST[name], **options})


OPTIONS = {
    "float32": {},
    "master": {"dtype": torch.bfloat16, "master_weights": True, "state_dtype": torch.float32},
    "lr tensor": {"lr": torch.tensor(0.25, device="cpu")},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_files_of_fusestep(name, options, tmp_path):
    mine = trained(name, **OPTIONS[options])
    mine.save(tmp_path / "state.safetensors", values=True)
    kwargs = {"lr": torch.tensor(1.0, device="cpu")} if options == "lr tensor" else {}
    for source in (tmp_path / "state.safetensors", copy.deepcopy(mine.state_dict())):
        loaded = fresh(name, mine, **kwargs)
        loaded.load(source)
        goes_on_as(loaded, copy.deepcopy(mine))
    assert diff(tmp_path / "state.safetensors", tmp_path / "state.safetensors").unchanged == len(SHAPES)


@pytest.mark.parametrize("options", ["float32", "master"])
def test_files_of_torch(name, options, tmp_path):
    mine = trained(name, **OPTIONS[options])
    torch.save(mine.state_dict(), tmp_path / "torch.pt")
    convert(str(tmp_path / "torch.pt"), str(tmp_path / "state.safetensors"), rule=mine._torch_class.__name__)
    convert(str(tmp_path / "state.safetensors"), str(tmp_path / "back.pt"))
    for file in ("torch.pt", "state.safetensors", "back.pt"):
        loaded = fresh(name, mine)
        loaded.load(tmp_path / file)
        goes_on_as(loaded, copy.deepcopy(mine))


def test_counts_that_groups_have(tmp_path):
    mine = trained("Adam")
    given = copy.deepcopy(mine.state_dict())
    given["param_groups"][0]["step"] = 2
    for own in given["state"].values():
        del own["step"]
    for way in ("load", "load_state_dict"):
        loaded = fresh("Adam", mine)
        getattr(loaded, way)(copy.deepcopy(given))
        goes_on_as(loaded, copy.deepcopy(mine))


def test_scale_norm_and_skips(name):
    mine = support.ours(name)(support.tensors(*SHAPES), **support.FULLEST[name], max_grad_norm=1.0, skip_nonfinite=True)
    assert mine.grad_norm.device.type == "cpu" and math.isnan(mine.grad_norm)
    support.set_grads(params_of(mine), seed=0)
    mine.grad_scale, mine.found_inf = 2.0, 1.0
    mine.step()
    assert mine.grad_norm.device.type == "cpu" and mine.skipped_steps == 1
    mine.found_inf = 0.0
    for _ in range(3):
        mine.step()
        assert mine.grad_norm > 0
    everything_is_on_the_cpu(mine)


@pytest.mark.filterwarnings("ignore:.*leaves parameters with sparse gradients")
def test_what_is_left_to_torch():
    (p,) = support.tensors((6, 2))
    mine = fusestep.optim.SGD([p], lr=1.0, clip_value=0.25, max_grad_norm=100.0)
    before = p.detach().clone()
    p.grad = torch.ones(6, 2, device="cpu").to_sparse(1)
    mine.grad_scale = torch.tensor(2.0, device="cpu")
    mine.step()
    assert torch.equal(p, before - 0.25)
