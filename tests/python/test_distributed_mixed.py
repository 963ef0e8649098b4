# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Clipping, skipping and master weights on several ranks. Each `run_...` is what one rank does."""

import copy
import math

import pytest
import torch
import torch.distributed as dist

import fusestep
import ranks
from test_distributed import (
    Net,
    assert_equal,
    assert_near,
    batch,
    named_trainable,
    numbers,
    optimizer_over,
    part_of,
    sharded,
    tensor_of,
    whole,
)

LIMIT = 0.05  # below the norms of these gradients


def same_on_all_ranks(number):
    """To the last bit."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, float(number).hex())
    return len(set(found)) == 1


def shadow_of(named, rule, **options):
    """(parameters, optimizer) of whole tensors, to be given the whole gradients."""
    parameters = {name: torch.nn.Parameter(whole(p.detach()).clone()) for name, p in named.items()}
    return parameters, optimizer_over(rule, parameters, **options)


def give_whole_grads(named, parameters):
    for name, p in named.items():
        grad = None if p.grad is None else whole(p.grad)
        parameters[name].grad = None if grad is None else grad.clone()


def exact_norm(parameters):
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values() if p.grad is not None))


# ---- the norm is that of the whole -------------------------------------------------------------


def run_clipped_fsdp(rank, rule):
    """Uneven and empty shards; the whole optimizer measures its whole gradients in one process."""
    model = sharded(Net(torch.float64))
    named = named_trainable(model)
    optimizer = optimizer_over(rule, named, max_grad_norm=LIMIT, clip_value=LIMIT / 4)
    parameters, shadow = shadow_of(named, rule, max_grad_norm=LIMIT, clip_value=LIMIT / 4)
    for step in range(6):
        model(batch(step, torch.float64)[part_of(rank)]).square().mean().backward()
        give_whole_grads(named, parameters)
        before = {name: p.grad._local_tensor.clone() for name, p in named.items()}
        optimizer.step()
        shadow.step()
        norm = float(optimizer.grad_norm)
        assert norm > LIMIT and norm == pytest.approx(exact_norm(parameters), rel=1e-13)
        assert same_on_all_ranks(norm)
        assert all(torch.equal(p.grad._local_tensor, before[name]) for name, p in named.items())
        optimizer.zero_grad()
    assert_near(numbers(named, optimizer), numbers(parameters, shadow))
    assert optimizer._stepper.steps == 6


@pytest.mark.parametrize("world, rule", [(2, "Adam"), (2, "SGD"), (4, "RMSprop")])
def test_clipping_under_fully_shard(world, rule):
    ranks.run(world, run_clipped_fsdp, rule)


def run_placements(rank):
    """Every element is counted once, however often it is there."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    cases = [
        (mesh, (Replicate(), Replicate())),
        (mesh, (Shard(0), Replicate())),
        (mesh, (Replicate(), Shard(1))),
        (mesh, (Shard(0), Shard(1))),
        (mesh, (Shard(0), Shard(0))),
        (mesh["a"], (Shard(0),)),
        (mesh["b"], (Replicate(),)),
        (None, ()),
    ]
    values = [tensor_of(seed, 5, 3).double() for seed in range(len(cases))]

    def placed(case, value):
        mesh, placements = case
        return value.clone() if mesh is None else distribute_tensor(value, mesh, placements)

    parameters = [torch.nn.Parameter(placed(*pair)) for pair in zip(cases, values, strict=True)]
    optimizer = fusestep.optim.SGD(parameters, lr=1.0, max_grad_norm=1.0)
    expected = [value.clone() for value in values]
    for step in range(3):
        grads = [tensor_of(100 + 10 * step + i, 5, 3).double() for i in range(len(cases))]
        for p, case, grad in zip(parameters, cases, grads, strict=True):
            p.grad = placed(case, grad)
        # A partial sum is reduced before it is measured.
        halves = [Partial("sum"), Replicate()]
        parameters[1].grad = DTensor.from_local(grads[1] / 2, mesh, halves, run_check=False)
        if step == 1:
            parameters[3].grad, grads[3] = None, torch.zeros(5, 3, dtype=torch.float64)
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-13)
        for value, grad in zip(expected, grads, strict=True):
            value -= grad / (norm + 1e-6)
    for p, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(whole(p.detach()), value, rtol=1e-12, atol=1e-12)


def test_every_placement_is_counted_once():
    ranks.run(4, run_placements)


def run_without_gradients(rank):
    """A rank that has no gradient still takes part."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = dist.init_device_mesh("cpu", (2,))
    local = torch.ones(2 if rank == 0 else 0)
    p = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(2,), stride=(1,)))
    optimizer = fusestep.optim.SGD([p], lr=1.0, max_grad_norm=1.0, skip_nonfinite=True)
    for step in range(3):
        if rank == 0:
            p.grad = DTensor.from_local(
                torch.full((2,), 3.0), mesh, [Shard(0)], run_check=False, shape=(2,), stride=(1,)
            )
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(18)), step
    if rank == 0:
        assert torch.allclose(p._local_tensor, torch.full((2,), 1 - 3 / math.sqrt(2)))


def test_ranks_without_gradients_take_part():
    ranks.run(2, run_without_gradients)


def run_skips(rank):
    """What is not finite on one rank is skipped by all, the first step included."""
    model = sharded(Net())
    named = named_trainable(model)
    optimizer = optimizer_over("Adam", named, skip_nonfinite=True)
    parameters, shadow = shadow_of(named, "Adam")
    for step in range(6):
        model(batch(step, torch.float32)[part_of(rank)]).square().mean().backward()
        bad = step in (0, 3)
        if bad and rank == step % 2:
            named["first.weight"].grad._local_tensor[0, 0] = float("nan" if step == 0 else "inf")
        before = numbers(named, optimizer)
        give_whole_grads(named, parameters)
        optimizer.step()
        if bad:
            assert_equal(numbers(named, optimizer), before)
        else:
            shadow.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 2
    assert_equal(numbers(named, optimizer), numbers(parameters, shadow))


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_skip(world):
    ranks.run(world, run_skips)


def run_scaled(rank, keep):
    """GradScaler and a norm of all ranks, which means the unscaled gradients."""
    model = sharded(Net(torch.float64))
    named = named_trainable(model)
    optimizer = optimizer_over("SGD", named, max_grad_norm=LIMIT, keep_scaled_grads=keep)
    parameters, shadow = shadow_of(named, "SGD", max_grad_norm=LIMIT)
    for step in range(5):
        model(batch(step, torch.float64)[part_of(rank)]).square().mean().backward()
        give_whole_grads(named, parameters)
        for p in named.values():
            p.grad.mul_(8)
        before = {name: p.grad._local_tensor.clone() for name, p in named.items()}
        skipped = step in (0, 2)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(skipped))
        optimizer.step()
        factor = 1 if skipped or keep else 1 / 8
        assert all(torch.equal(p.grad._local_tensor, before[name] * factor) for name, p in named.items())
        if not skipped:
            shadow.step()
            assert float(optimizer.grad_norm) == pytest.approx(exact_norm(parameters), rel=1e-13)
        optimizer.zero_grad()
    assert_near(numbers(named, optimizer), numbers(parameters, shadow))
    assert optimizer.skipped_steps == 2


@pytest.mark.parametrize("keep", [False, True])
def test_scaled_gradients(keep):
    ranks.run(2, run_scaled, keep)


def run_data_parallel(rank):
    """Gradients are whole on every rank: each measures what it has."""
    model = torch.nn.parallel.DistributedDataParallel(Net(torch.float64))
    named = named_trainable(model)
    optimizer = optimizer_over("AdamW", named, max_grad_norm=LIMIT)
    for step in range(3):
        model(batch(step, torch.float64)[part_of(rank)]).square().mean().backward()
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(exact_norm(named), rel=1e-13)
        assert same_on_all_ranks(optimizer.grad_norm)
        optimizer.zero_grad()


def test_distributed_data_parallel():
    ranks.run(2, run_data_parallel)


# ---- state -------------------------------------------------------------------------------------

OPTIONS = {
    "master": {"master_weights": True, "state_dtype": torch.float32},
    "bf16 state": {"state_dtype": torch.bfloat16},
    "float32 state": {"state_dtype": torch.float32},
}


def run_options(rank, options):
    """State is placed like its parameter; elements are computed alone, so that bits are those of the whole."""
    model = sharded(Net(torch.bfloat16))
    named = named_trainable(model)
    optimizer = optimizer_over("Adam", named, **options)
    parameters, shadow = shadow_of(named, "Adam", **options)
    for step in range(8):
        model(batch(step, torch.bfloat16)[part_of(rank)]).square().mean().backward()
        give_whole_grads(named, parameters)
        optimizer.step()
        shadow.step()
        optimizer.zero_grad()
        if step == 3:  # goes on from a state_dict
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = optimizer_over("Adam", named)
            optimizer.load_state_dict(saved)
    found = numbers(named, optimizer)
    assert_equal(found, numbers(parameters, shadow))
    masters = [key for key in found if key[1] == "master_weight"]
    assert len(masters) == (len(named) if "master_weights" in options else 0)
    with torch.no_grad():
        for p in named.values():
            p.fill_(0.5)
    optimizer.refresh_master_weights()
    assert all((whole(optimizer.state[p]["master_weight"]) == 0.5).all() for p in named.values() if masters)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options_under_fully_shard(options):
    ranks.run(2, run_options, options)


def run_distributed_checkpoint(rank):
    """get_state_dict and set_state_dict carry options and master weights."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = sharded(Net(torch.bfloat16))
    named = named_trainable(model)
    optimizer = optimizer_over("AdamW", named, **OPTIONS["master"])

    def train(optimizer, begin, end):
        for step in range(begin, end):
            model(batch(step, torch.bfloat16)[part_of(rank)]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(optimizer, 0, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    values = {name: p.detach().clone() for name, p in named.items()}
    train(optimizer, 3, 6)
    expected = numbers(named, optimizer)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(values[name])
    resumed = optimizer_over("AdamW", named, **OPTIONS["master"])
    set_optimizer_state_dict(model, resumed, saved)
    train(resumed, 3, 6)
    assert_equal(numbers(named, resumed), expected)


def test_distributed_checkpoint():
    ranks.run(2, run_distributed_checkpoint)
