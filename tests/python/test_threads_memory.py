# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
import concurrent.futures
import gc
import itertools
import os
import subprocess
import sys
import threading
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


@pytest.mark.parametrize("other", ["step", "grad_norm", "skipped_steps", "sync_hyper"])
def test_one_optimizer_in_two_threads(other):
    """Either comes first; neither reads what the other is writing. (Gradients stay: torch itself does not bear that one
    thread replaces `p.grad` while another reads it.)"""
    parameters = support.tensors(*[(20_000,)] * 8)
    support.set_grads(parameters, seed=1, scale=1e-3)
    optimizer = support.ours("Adam")(parameters, max_grad_norm=1.0)
    does = {
        "step": optimizer.step,
        "grad_norm": lambda: optimizer.grad_norm,
        "skipped_steps": lambda: optimizer.skipped_steps,
        "sync_hyper": optimizer.sync_hyper,
    }[other]
    stop, errors = threading.Event(), []

    def others_work():
        try:
            while not stop.is_set():
                does()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=others_work)
    thread.start()
    try:
        for index in range(300):
            optimizer.param_groups[0]["params"][:] = parameters[: 4 + index % 5]
            optimizer.step()
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert all(p.isfinite().all() for p in parameters)


FORKED_MEANWHILE = """
import os, signal, threading, fusestep.optim, torch

p = torch.nn.Parameter(torch.ones(4))
p.grad = torch.ones(4)
optimizer = fusestep.optim.Adam([p])
optimizer.step()
held, done = threading.Event(), threading.Event()

def hold():
    with optimizer._lock:
        held.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    optimizer.step()
    os._exit(int(optimizer.state[p]["step"]))
_, status = os.waitpid(child, 0)
done.set()
thread.join()
assert os.waitstatus_to_exitcode(status) == 2, status
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_steps_though_another_thread_did_when_it_was_forked():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED_MEANWHILE], check=True, timeout=120)


ON_THREADS_OF_TORCH = """
import copy, os, threading, fusestep, fusestep.optim, numpy, torch

def alive():
    return len(os.listdir("/proc/self/task"))

def steps():
    for _ in range(3):
        p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    return p.detach().clone()

torch.set_num_threads(3)
p = torch.nn.Parameter(torch.ones(1 << 20))
p.grad = torch.full_like(p, 0.5)
p.grad.mul_(1)  # torch's threads exist
before = alive()
optimizer = fusestep.optim.Adam([p])
assert fusestep.num_threads() == 3, fusestep.num_threads()
steps()
assert alive() == before, (before, alive())
saved = {"p": p.detach().clone(), "state": copy.deepcopy(optimizer.state_dict())}
after = steps()

child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # the child has none of torch's threads, and torch would wait for them
    fusestep.set_num_threads(2)
with torch.no_grad():
    p.copy_(saved["p"])
optimizer.load_state_dict(saved["state"])
if child == 0:
    os._exit(0 if torch.equal(steps(), after) else 1)
assert os.waitpid(child, 0)[1] == 0

torch.set_num_threads(1)
assert fusestep.num_threads() == 1
p.grad = torch.full_like(p, 0.5)
in_thread = []
thread = threading.Thread(target=lambda: in_thread.extend((optimizer.step(), fusestep.num_threads())))
thread.start()
thread.join()
assert in_thread == [None, 1], in_thread
for _ in range(2):
    optimizer.step()
assert torch.equal(p, after)

arrays = fusestep.Optimizer("SGD", {"w": numpy.ones(1 << 20, numpy.float32)}, lr=0.5)
alive_in_thread = []
def step_arrays():
    others = alive()
    arrays.step({"w": numpy.ones(1 << 20, numpy.float32)})
    alive_in_thread.append(alive() - others)
thread = threading.Thread(target=step_arrays)
thread.start()
thread.join()
assert alive_in_thread == [0], alive_in_thread

fusestep.set_num_threads(2)
assert fusestep.num_threads() == 2
optimizer.step()
assert alive() <= before, (before, alive())
"""


@pytest.mark.on_cpu
@pytest.mark.skipif(
    "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info(), reason="torch without OpenMP"
)
def test_steps_run_on_the_threads_of_torch():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", ON_THREADS_OF_TORCH]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")


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
