# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
import concurrent.futures
import gc
import itertools
import tracemalloc

import pytest
import torch

import support


def train(name, seed, steps=40):
    parameters = support.tensors((1000,), (37, 5), (), dtype=torch.float32, seed=seed)
    optimizer = support.ours(name)(parameters, **support.FULLEST[name])
    for index in range(steps):
        support.set_grads(parameters, seed=seed * 1000 + index)
        if index % 7 == 3:
            parameters[1].grad = None
        optimizer.step()
    return support.all_state(optimizer)


def test_optimizers_in_parallel_threads_give_serial_bits(name):
    seeds = range(12)
    serial = [train(name, seed) for seed in seeds]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        parallel = list(pool.map(lambda seed: train(name, seed), seeds))
    for got, expected in zip(parallel, serial, strict=True):
        support.assert_bits(got, expected)


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.on_cpu
@pytest.mark.parametrize("kind", ["same memory", "new gradients", "copied", "skipped"])
def test_no_leak(kind):
    """10,000 steps, after the first thousand, cost neither Python objects nor resident memory."""
    parameters = support.tensors((300,), (5, 3))
    optimizer = support.ours("Adam")(parameters, amsgrad=True)

    def steps(count):
        for _ in range(count):
            if kind != "same memory" or parameters[0].grad is None:
                for p in parameters:
                    p.grad = torch.ones_like(p)
            if kind == "copied":
                parameters[1].grad = torch.ones(()).expand(5, 3)
            if kind == "skipped":
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
            optimizer.step()

    steps(1000)
    gc.collect()
    objects, resident = len(gc.get_objects()), resident_bytes()
    tracemalloc.start()
    traced = []
    for _ in range(4):
        steps(750)
        gc.collect()
        traced.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    steps(6000)
    gc.collect()
    # Objects that stood in free lists before the tracing come to be traced one after the other; a leak goes on.
    grown = min(after - before for before, after in itertools.pairwise(traced))
    assert grown < 750 * 16  # the smallest object, lost in each step
    assert len(gc.get_objects()) - objects < 50
    assert resident_bytes() - resident < 4_000_000


@pytest.mark.on_cpu
def test_optimizers_come_and_go():
    resident = None
    for index in range(600):
        parameters = support.tensors((20_000,))
        parameters[0].grad = torch.ones(20_000)
        support.ours("Adam")(parameters).step()
        if index == 100:
            gc.collect()
            resident = resident_bytes()
    gc.collect()
    assert resident_bytes() - resident < 8_000_000
