# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Training on several ranks. Each `run_...` is what one rank does.

Two comparisons. A `Shadow` is fed the whole gradients of every step and keeps whole parameters: its
gradients are equal, so its bits have to be. A run of one process over all data adds up gradients in
another order: it is compared in float64, within 1e-10.
"""

import copy
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist

import fusestep
import ranks

STEPS = 30
RULES = {
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
}
ROOT = pathlib.Path(__file__).resolve().parents[2]


# ---- what is trained ---------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Sizes that ranks do not divide, a parameter of fewer elements than ranks, a layer that rests."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 7, dtype=dtype)
        self.frozen = torch.nn.Linear(7, 7, dtype=dtype).requires_grad_(False)
        self.last = torch.nn.Linear(7, 1, dtype=dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


class Sequence(torch.nn.Module):
    """For tensor parallelism: the gradient of `norm` is a partial sum on every rank."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(6, dtype=dtype)
        self.first = torch.nn.Linear(6, 8, dtype=dtype)
        self.last = torch.nn.Linear(8, 2, dtype=dtype)

    def forward(self, x):
        return self.last(torch.tanh(self.first(self.norm(x))))


def batch(step, dtype, shape=(8, 6)):
    random = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def named_trainable(model):
    """By the names they have without DistributedDataParallel."""
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_over(rule, named, cls=None, **more):
    """Groups with settings of their own."""
    weights = [p for name, p in named.items() if name.endswith("weight")]
    others = [p for name, p in named.items() if not name.endswith("weight")]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "lr": 0.02}]
    return (cls or getattr(fusestep.optim, rule))(groups, **more, **RULES[rule])


def train(model, optimizer, part=slice(None), begin=0, end=STEPS, before_step=lambda: None, shape=(8, 6)):
    like = next(model.parameters())
    for step in range(begin, end):
        model(batch(step, like.dtype, shape)[part].to(like.device)).square().mean().backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def numbers(named, optimizer):
    """(name of parameter, name of state) to a whole tensor; `step` has to be a plain one."""
    found = {}
    for name, p in named.items():
        found[name, "value"] = whole(p.detach())
        for key, value in optimizer.state.get(p, {}).items():
            if key == "step":
                assert type(value) is torch.Tensor
            elif hasattr(p, "placements"):
                assert value.placements == p.placements and value._local_tensor.shape == p._local_tensor.shape
            found[name, key] = whole(value)
    return found


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")


def assert_near(got, expected):
    assert got.keys() == expected.keys()
    for key in expected:
        assert expected[key].dtype == torch.float64 or key[1] == "step"
        torch.testing.assert_close(
            got[key], expected[key], rtol=1e-10, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )


class Shadow:
    """The same optimizer on whole parameters with the whole gradients of every step."""

    def __init__(self, rule, named):
        self.named = {name: torch.nn.Parameter(whole(p.detach()).clone()) for name, p in named.items()}
        self.optimizer = optimizer_over(rule, self.named)
        self.source = named

    def step(self):
        for name, p in self.source.items():
            self.named[name].grad = whole(p.grad).clone()
        self.optimizer.step()

    def assert_equal(self, optimizer):
        assert_equal(numbers(self.source, optimizer), numbers(self.named, self.optimizer))


def assert_engine_stepped(optimizer, parameters, steps=STEPS):
    assert optimizer._stepper.steps == steps
    assert optimizer._stepper.stepped == parameters


def state_bytes(optimizer):
    """Of slots, on this rank."""
    total = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            here = getattr(value, "_local_tensor", value)
            total += here.numel() * here.element_size() if name != "step" else 0
    return total


def assert_state_is_shared_out(optimizer, shadow, largest):
    """Ranks hold all of it together, each at most `largest` of it."""
    mine, everything = state_bytes(optimizer), state_bytes(shadow.optimizer)
    total = torch.tensor(mine)
    dist.all_reduce(total)
    assert total == everything and mine <= largest * everything, (mine, int(total), everything)


def compare(rule, make, parameters, model_class=Net, part=slice(None), shape=(8, 6)):
    """Trains what `make` distributes beside a shadow; and in float64, beside one process."""
    warnings.filterwarnings("error", message=".*torch's own step")
    model = make(model_class())
    named = named_trainable(model)
    optimizer = optimizer_over(rule, named)
    shadow = Shadow(rule, named)
    train(model, optimizer, part, before_step=shadow.step, shape=shape)
    shadow.assert_equal(optimizer)
    assert_engine_stepped(optimizer, parameters)

    models = make(model_class(torch.float64)), model_class(torch.float64)
    optimizers = [optimizer_over(rule, named_trainable(model)) for model in models]
    train(models[0], optimizers[0], part, shape=shape)
    train(models[1], optimizers[1], shape=shape)
    got, expected = (numbers(named_trainable(model), of) for model, of in zip(models, optimizers, strict=True))
    assert_near(got, expected)
    return optimizer, shadow


def part_of(rank):
    return slice(rank, None, dist.get_world_size())


def rules():
    """All on two ranks; one on four, where what differs is how tensors are divided."""
    return RULES if dist.get_world_size() == 2 else ["Adam"]


# ---- FSDP2 -------------------------------------------------------------------------------------


def sharded(model, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def run_fsdp(rank):
    for rule in rules():
        optimizer, shadow = compare(rule, sharded, 4, part=part_of(rank))
        # Seven rows: the first rank has half of them, rounded up. Biases and the last layer are small.
        assert_state_is_shared_out(optimizer, shadow, 0.66 if dist.get_world_size() == 2 else 0.45)
    if dist.get_world_size() == 4 and rank == 3:  # 2 + 2 + 2 + 1 rows, and one element for four ranks
        empty = [p for p in shadow.source.values() if p._local_tensor.numel() == 0]
        assert len(empty) == 2 and all(optimizer.state[p]["step"] == STEPS for p in empty)


@pytest.mark.parametrize("world", [2, 4])
def test_fully_shard(world):
    ranks.run(world, run_fsdp)


def run_fsdp_policies(rank):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for rule in rules():
        for options in {"mp_policy": bfloat16}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}:
            # Not compare(): in 16 bits a run of one process is near and not more.
            model = sharded(Net(), **options)
            named = named_trainable(model)
            optimizer, shadow = optimizer_over(rule, named), Shadow(rule, named)
            train(model, optimizer, part_of(rank), before_step=shadow.step)
            shadow.assert_equal(optimizer)
            assert_engine_stepped(optimizer, 4)
            result = model(batch(STEPS, torch.float32)[part_of(rank)])
            assert result.dtype == (torch.bfloat16 if "mp_policy" in options else torch.float32)
            assert {p.dtype for p in named.values()} == {torch.float32}
            assert all(p.device.type == "cpu" and p.grad is None for p in named.values())


@pytest.mark.parametrize("world", [2, 4])
def test_policies_of_fully_shard(world):
    ranks.run(world, run_fsdp_policies)


def run_fsdp_in_backward(rank):
    model = sharded(Net())
    named = named_trainable(model)
    shadow = Shadow("Adam", named)
    optimizers = {p: fusestep.optim.Adam([p], **RULES["Adam"]) for p in named.values()}
    shadow.optimizer = fusestep.optim.Adam(shadow.named.values(), **RULES["Adam"])
    grads = {}

    def step(p):
        grads[p] = p.grad.full_tensor()
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in named.values():
        p.register_post_accumulate_grad_hook(step)
    for index in range(STEPS):
        model(batch(index, torch.float32)[part_of(rank)]).square().mean().backward()
        for name, p in named.items():
            assert p.grad is None
            shadow.named[name].grad = grads.pop(p)
        shadow.optimizer.step()
    for optimizer in optimizers.values():
        assert_engine_stepped(optimizer, 1)
    got = {key: value for p in named.values() for key, value in numbers(named, optimizers[p]).items() if len(key) > 1}
    assert_equal(got, numbers(shadow.named, shadow.optimizer))


def test_optimizer_in_backward():
    ranks.run(2, run_fsdp_in_backward)


# ---- tensor parallel ---------------------------------------------------------------------------


def parallel(model, mesh):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    plan = {"norm": SequenceParallel(), "first": ColwiseParallel(input_layouts=Shard(1)), "last": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def run_tensor_parallel(rank):
    world = dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (world,))
    for rule in rules():
        optimizer, _ = compare(rule, lambda model: parallel(model, mesh), 6, SequenceOnRanks, shape=(3, 4, 6))
        assert {type(p).__name__ for group in optimizer.param_groups for p in group["params"]} == {"DTensor"}


class SequenceOnRanks(Sequence):
    """Each rank is given its part of the sequence, if its layers are distributed."""

    def forward(self, x):
        if hasattr(self.norm.weight, "placements"):
            mesh = self.norm.weight.device_mesh
            x = x.chunk(mesh["tp"].size() if mesh.mesh_dim_names else mesh.size(), dim=1)[self.place()]
        return super().forward(x)

    def place(self):
        mesh = self.norm.weight.device_mesh
        return mesh.get_local_rank("tp") if mesh.mesh_dim_names else mesh.get_local_rank()


@pytest.mark.parametrize("world", [2, 4])
def test_parallelize_module(world):
    ranks.run(world, run_tensor_parallel)


def run_two_dimensions(rank):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    part = slice(mesh.get_local_rank("dp"), None, 2)

    def make(model):
        return fully_shard(parallel(model, mesh["tp"]), mesh=mesh["dp"])

    _, shadow = compare("Adam", make, 6, SequenceOnRanks, part, shape=(4, 4, 6))
    assert {p.device_mesh.ndim for p in shadow.source.values()} == {2}


def test_fully_shard_of_tensor_parallel():
    ranks.run(4, run_two_dimensions)


# ---- whole parameters on every rank ------------------------------------------------------------


def run_ddp(rank, bucket_view):
    def make(model):
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)

    for rule in RULES:
        _, shadow = compare(rule, make, 4, part=part_of(rank))
    model = make(Net())
    train(model, optimizer_over("Adam", named_trainable(model)), end=1)
    model(batch(1, torch.float32)).sum().backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in named_trainable(model).values()}
    assert len(storages) == (1 if bucket_view else 4)


@pytest.mark.parametrize("bucket_view", [False, True])
def test_distributed_data_parallel(bucket_view):
    ranks.run(2, run_ddp, bucket_view)


def run_zero(rank, bucket_view):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def zero_over(rule, named):
        options = {"optimizer_class": getattr(fusestep.optim, rule), "parameters_as_bucket_view": bucket_view}
        return optimizer_over(rule, named, ZeroRedundancyOptimizer, **options)

    for rule in RULES:
        model = torch.nn.parallel.DistributedDataParallel(Net())
        named = named_trainable(model)
        zero = zero_over(rule, named)
        shadow = Shadow(rule, named)
        train(model, zero, part_of(rank), before_step=shadow.step)
        assert_state_is_shared_out(zero.optim, shadow, 0.75)  # of 42, 7, 7 and 1 elements
        assert zero.optim._stepper.steps == STEPS and 0 < zero.optim._stepper.stepped < 4

        zero.consolidate_state_dict(to=0)
        saved = [zero.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(saved, src=0)
        resumed = zero_over(rule, named)
        resumed.load_state_dict(copy.deepcopy(saved[0]))
        train(model, resumed, part_of(rank), STEPS, STEPS + 3, before_step=shadow.step)
        for name, p in named.items():
            assert torch.equal(p, shadow.named[name])
            for key, value in resumed.optim.state.get(p, {}).items():
                assert torch.equal(value, shadow.optimizer.state[shadow.named[name]][key])


@pytest.mark.parametrize("bucket_view", [False, True])
def test_zero_redundancy_optimizer(bucket_view):
    ranks.run(2, run_zero, bucket_view)


# ---- checkpoints -------------------------------------------------------------------------------

KINDS = {
    "sharded": {},
    "full": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


def half_trained(rank, rule, dtype=torch.float32):
    model = sharded(Net(dtype))
    optimizer = optimizer_over(rule, named_trainable(model))
    train(model, optimizer, part_of(rank), end=STEPS // 2)
    return model, optimizer


def run_state_dict(rank, kind):
    from torch.distributed.checkpoint import state_dict as api

    get = api.StateDictOptions(**KINDS[kind])
    put = api.StateDictOptions(**KINDS[kind], broadcast_from_rank0=kind == "full")
    for rule in RULES:
        model, optimizer = half_trained(rank, rule)
        saved = copy.deepcopy(api.get_state_dict(model, optimizer, options=get))
        if kind == "full":
            assert bool(saved[1]) == (rank == 0)
        resumed_model = sharded(Net().apply(fill_with_one))
        resumed = optimizer_over(rule, named_trainable(resumed_model))
        # Not set_state_dict: where it is given nothing, as on rank 1, it leaves out the model's collectives.
        api.set_model_state_dict(resumed_model, saved[0], options=put)
        api.set_optimizer_state_dict(resumed_model, resumed, saved[1], options=put)
        both = (model, optimizer), (resumed_model, resumed)
        assert_equal(*(numbers(named_trainable(model), optimizer) for model, optimizer in both))
        for model, optimizer in both:
            train(model, optimizer, part_of(rank), begin=STEPS // 2)
        assert_equal(*(numbers(named_trainable(model), optimizer) for model, optimizer in both))
        assert resumed._stepper.stepped == 4


def fill_with_one(module):
    for p in module.parameters():
        torch.nn.init.ones_(p)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_of_distributed_checkpoint(kind):
    ranks.run(2, run_state_dict, kind)


def run_plain_state_dict(rank):
    """state_dict() and load_state_dict() of the optimizer itself."""
    model, optimizer = half_trained(rank, "Adam")
    other = sharded(Net())
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = optimizer_over("Adam", named_trainable(other))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for of, by in ((model, optimizer), (other, resumed)):
        train(of, by, part_of(rank), begin=STEPS // 2)
    assert_equal(numbers(named_trainable(other), resumed), numbers(named_trainable(model), optimizer))


def test_state_dict():
    ranks.run(2, run_plain_state_dict)


def run_save(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = half_trained(rank, "Adam", torch.float64)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=f"{folder}/checkpoint")
    found = numbers(named_trainable(model), optimizer)
    if rank == 0:
        torch.save(found, f"{folder}/expected")


def run_load(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = Net(torch.float64).apply(fill_with_one)
    if dist.get_world_size() > 1:
        model = sharded(model)
    optimizer = optimizer_over("Adam", named_trainable(model))
    of_model, of_optimizer = get_state_dict(model, optimizer)
    saved = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(saved, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    assert_equal(numbers(named_trainable(model), optimizer), torch.load(f"{folder}/expected"))

    train(model, optimizer, part_of(rank), begin=STEPS // 2)
    assert optimizer._stepper.stepped == 4
    alone = Net(torch.float64)
    by_one = optimizer_over("Adam", named_trainable(alone))
    train(alone, by_one)
    assert_near(numbers(named_trainable(model), optimizer), numbers(named_trainable(alone), by_one))


def test_another_number_of_ranks_goes_on(tmp_path):
    ranks.run(4, run_save, tmp_path)
    ranks.run(2, run_load, tmp_path)
    ranks.run(1, run_load, tmp_path)


def run_killed_in_save(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict import get_state_dict

    class Dying(FileSystemWriter):
        def write_data(self, plan, planner):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write_data(plan, planner)

    model, optimizer = half_trained(rank, "Adam", torch.float64)
    train(model, optimizer, part_of(rank), begin=STEPS // 2, end=STEPS // 2 + 1)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    newer = {"model": of_model, "optimizer": of_optimizer}
    dcp.save(newer, checkpoint_id=f"{folder}/newer", storage_writer=Dying(f"{folder}/newer"))


def test_a_rank_that_is_killed_in_a_save_leaves_the_older_checkpoint(tmp_path):
    ranks.run(2, run_save, tmp_path)
    with pytest.raises(AssertionError, match="rank 1: it died|Connection closed by peer"):
        ranks.run(2, run_killed_in_save, tmp_path)
    assert not (tmp_path / "newer" / ".metadata").exists()  # which makes a checkpoint of its files
    ranks.run(2, run_load, tmp_path)


# ---- GPUs --------------------------------------------------------------------------------------


def run_fsdp_over_nccl(rank):
    torch.cuda.set_device(rank)
    for rule in rules():
        compare(rule, lambda model: sharded(model.cuda()), 4, part=part_of(rank))


def run_ddp_over_nccl(rank, bucket_view):
    torch.cuda.set_device(rank)
    options = {"device_ids": [rank], "gradient_as_bucket_view": bucket_view}
    for rule in rules():
        compare(
            rule,
            lambda model: torch.nn.parallel.DistributedDataParallel(model.cuda(), **options),
            4,
            part=part_of(rank),
        )


def run_tensor_parallel_over_nccl(rank):
    torch.cuda.set_device(rank)
    mesh = dist.init_device_mesh("cuda", (dist.get_world_size(),))
    for rule in rules():
        compare(rule, lambda model: parallel(model.cuda(), mesh), 6, SequenceOnRanks, shape=(3, 4, 6))


@pytest.mark.gpu
@pytest.mark.only_on("cuda", reason="NCCL needs real devices")
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (run_fsdp_over_nccl, ()),
        (run_ddp_over_nccl, (False,)),
        (run_ddp_over_nccl, (True,)),
        (run_tensor_parallel_over_nccl, ()),
    ],
)
def test_over_nccl(function, arguments):
    ranks.run(min(2, torch.cuda.device_count()), function, *arguments, backend="nccl")  # one device: one rank


# ---- one tensor --------------------------------------------------------------------------------


def tensor_of(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_parameter(mesh, *placements):
    from torch.distributed.tensor import distribute_tensor

    return torch.nn.Parameter(distribute_tensor(tensor_of(0, 6, 4), mesh, placements))


def run_other_placements(rank):
    """Gradients distributed in every way, for every placement of their parameter."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    warnings.filterwarnings("error", message=".*torch's own step")
    mesh = dist.init_device_mesh("cpu", (2,))
    ways = (Replicate(), Shard(0), Shard(1))
    for rule, placement, way in itertools.product(("Adam", "SGD"), ways, (*ways, Partial(), Partial("avg"))):
        named = {"weight": one_parameter(mesh, placement)}
        optimizer = optimizer_over(rule, named)
        shadow = Shadow(rule, named)
        for step in range(2):
            if way.is_partial():
                grad = DTensor.from_local(tensor_of(2 * step + rank, 6, 4), mesh, [way], run_check=False)
            else:
                grad = distribute_tensor(tensor_of(step, 6, 4), mesh, [way])
            named["weight"].grad = grad
            shadow.step()
            optimizer.step()
            assert named["weight"].grad is grad
        shadow.assert_equal(optimizer)
        assert_engine_stepped(optimizer, 1, steps=2)


def test_gradients_placed_otherwise():
    ranks.run(2, run_other_placements)


def run_collectives_under_way(rank):
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    def part(seed):
        return DTensor.from_local(tensor_of(seed + rank, 6, 4), mesh, [Partial()], run_check=False)

    def under_way(tensor):
        return isinstance(tensor, functional.AsyncCollectiveTensor)

    warnings.filterwarnings("error", message=".*torch's own step")
    mesh = dist.init_device_mesh("cpu", (2,))
    value = part(100).redistribute(placements=[Replicate()], async_op=True)
    assert under_way(value._local_tensor)
    named = {
        "weight": one_parameter(mesh, Shard(0)),
        "plain": torch.nn.Parameter(tensor_of(0, 5)),
        "value": torch.nn.Parameter(value),
    }
    optimizer = optimizer_over("Adam", named)
    shadow = Shadow("Adam", named)
    for step in range(3):
        named["weight"].grad = part(step).redistribute(placements=[Shard(0)], async_op=True)
        named["plain"].grad = functional.all_reduce(tensor_of(step + rank, 5), "sum", mesh)
        named["value"].grad = part(step).redistribute(placements=[Replicate()], async_op=True)
        assert under_way(named["weight"].grad._local_tensor) and under_way(named["plain"].grad)
        optimizer.step()
        shadow.step()
    shadow.assert_equal(optimizer)
    assert_engine_stepped(optimizer, 3, steps=3)


def test_collectives_under_way():
    ranks.run(2, run_collectives_under_way)


def run_grad_scaler(rank):
    model = sharded(Net())
    named = named_trainable(model)
    optimizer = optimizer_over("Adam", named)
    shadow = Shadow("Adam", named)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(6):
        scaler.scale(model(batch(step, torch.float32)[part_of(rank)]).square().mean()).backward()
        if step in (0, 3):
            if rank == 1:
                named["first.weight"].grad._local_tensor[0, 0] = float("inf")
            before = numbers(named, optimizer)
            scaler.step(optimizer)
            assert_equal(numbers(named, optimizer), before)
            scaler.update()
        else:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            shadow.step()  # gradients have been divided in place
            assert scale == scaler.get_scale() == (512 if step < 3 else 256)
            scaler.update()
        optimizer.zero_grad()
    shadow.assert_equal(optimizer)


def test_grad_scaler():
    ranks.run(2, run_grad_scaler)


def run_dtensor_scale(rank):
    """GradScaler's numbers, by hand and as DTensors."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = dist.init_device_mesh("cpu", (2,))
    p, plain = one_parameter(mesh, Shard(0)), torch.nn.Parameter(tensor_of(0, 5))
    optimizer = fusestep.optim.SGD([p, plain], lr=1.0)

    def grads():
        p.grad, plain.grad = torch.full_like(p, 4.0), torch.full_like(plain, 4.0)

    def number(value, placement):
        return DTensor.from_local(torch.tensor(float(value)), mesh, [placement], run_check=False)

    expected = p.full_tensor(), plain.clone()
    grads()
    optimizer.grad_scale, optimizer.found_inf = number(2, Replicate()), number(rank == 1, Partial("max"))
    optimizer.step()
    assert torch.equal(p.full_tensor(), expected[0]) and torch.equal(plain, expected[1])
    assert torch.equal(p.grad.full_tensor(), torch.full((6, 4), 4.0))
    optimizer.found_inf = number(0, Partial("max"))
    optimizer.step()
    assert torch.equal(p.full_tensor(), expected[0] - 2) and torch.equal(plain, expected[1] - 2)


def test_scale_and_found_inf_as_dtensors():
    ranks.run(2, run_dtensor_scale)


def run_versions(rank):
    """The counters of a DTensor and of its local tensor are two, and graphs are built through both."""
    from torch.distributed.tensor import Shard

    mesh = dist.init_device_mesh("cpu", (1,))
    dense, strided = one_parameter(mesh, Shard(0)), one_parameter(mesh, Shard(0))
    strided._local_tensor = torch.zeros(6, 8)[:, ::2].copy_(strided._local_tensor)
    optimizer = fusestep.optim.Adam([dense, strided])
    for step in range(3):
        for p in (dense, strided):
            p.grad = torch.ones_like(p)
        before = [(p._version, p._local_tensor._version) for p in (dense, strided)]
        graphs = [(dense * dense).sum(), dense.to_local().square().sum()] if step == 2 else []
        optimizer.step()
        after = [(p._version, p._local_tensor._version) for p in (dense, strided)]
        assert [(a + 1, b + 1) for a, b in before] == after
        for graph in graphs:
            with pytest.raises(RuntimeError, match="modified.* inplace|modified by an inplace"):
                graph.backward()
    assert_engine_stepped(optimizer, 2, steps=3)
    assert torch.equal(dense._local_tensor, strided._local_tensor)


def test_versions():
    ranks.run(1, run_versions)


def run_left_to_torch(rank):
    """State that has the shape of its parameter's part, and other elements."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2, 2))
    placed, otherwise = (Shard(0), Replicate()), (Replicate(), Shard(0))
    values = []
    for cls in (fusestep.optim.Adam, torch.optim.Adam):
        misplaced, well = one_parameter(mesh, *placed), one_parameter(mesh, *otherwise)
        optimizer = cls([misplaced, well], lr=0.1)
        for step in range(3):
            for p in (misplaced, well):
                p.grad = distribute_tensor(tensor_of(step, 6, 4), mesh, p.placements)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            if step == 0:
                state = optimizer.state[misplaced]
                state["exp_avg"] = state["exp_avg"].redistribute(placements=otherwise)
                assert state["exp_avg"]._local_tensor.shape == misplaced._local_tensor.shape
            expected = [step == 1] if cls is fusestep.optim.Adam and step == 1 else []
            assert ["distributed otherwise" in str(each.message) for each in caught] == expected
        values.append((misplaced.full_tensor(), well.full_tensor()))
        if cls is fusestep.optim.Adam:
            assert_engine_stepped(optimizer, 1, steps=3)
    for mine, torchs in zip(*values, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_state_placed_otherwise_goes_to_torch():
    ranks.run(4, run_left_to_torch)


def run_wrapped_part(rank):
    """A DTensor whose local tensor stands for another in turn; beside one that is stepped."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    import test_stories

    mesh = dist.init_device_mesh("cpu", (1,))
    inner = tensor_of(0, 6, 4)
    expected = inner.clone().requires_grad_()

    def around(tensor):
        return DTensor.from_local(test_stories.Wrapped(tensor), mesh, [Replicate()], run_check=False)

    p, beside = torch.nn.Parameter(around(inner)), one_parameter(mesh, Shard(0))
    mine, torchs = fusestep.optim.SGD([p, beside], lr=0.1), torch.optim.SGD([expected], lr=0.1)
    p.grad, beside.grad, expected.grad = around(torch.ones(6, 4)), torch.ones_like(beside), torch.ones(6, 4)
    with pytest.warns(UserWarning, match="of the wrapper class Wrapped to torch's own step"):
        mine.step()
    torchs.step()
    torch.testing.assert_close(inner, expected.detach())
    assert_engine_stepped(mine, 1, steps=1)


def test_part_that_cannot_be_unwrapped_goes_to_torch():
    ranks.run(1, run_wrapped_part)


# ---- documentation -----------------------------------------------------------------------------


def test_documentation_runs(tmp_path):
    page = (ROOT / "docs" / "distributed.md").read_text()
    program = tmp_path / "program.py"
    program.write_text("\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    # A session of its own: ranks that hang end with their launcher.
    torchrun = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = torchrun.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(torchrun.pid, signal.SIGKILL)
        raise
    assert torchrun.returncode == 0, errors
    assert "torch's own step" not in errors
