# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Host time of one optimizer step over many small tensors, next to torch's three implementations.

Tensors have 6 elements, so that nearly all of it is overhead. Contestants take turns, so that all see
the same machine; the first steps of a turn are not counted, so that each finds its own data in the
caches; times are of the calling thread's processor, so that other programs do not count.
With --dtensor they are DTensors, sharded over a mesh of this process alone.
Prints a table; --json FILE writes all medians and what they were measured on.

    PYTHONPATH=python python bench/python/bench_host.py [--tensors 1 100] [--rules Adam] [--dtensor]
        [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import time

import torch

import fusestep

RULES = {
    "Adam": ({}, 3),
    "Adam amsgrad": ({"amsgrad": True}, 4),
    "SGD": ({}, 0),
    "SGD momentum": ({"momentum": 0.9}, 1),
    "RMSprop": ({}, 2),
}
TARGET = {"fixed": 20.0, "parameter": 0.5, "slot": 0.15}  # us


def make(cls, count, kwargs, tensor):
    parameters = [torch.nn.Parameter(tensor()) for _ in range(count)]
    for p in parameters:
        p.grad = tensor()
    return cls(parameters, **kwargs)


def plain_tensor():
    return torch.randn(6)


def dtensor_maker():
    """What makes DTensors of a process group of one, as ranks hold them after fully_shard."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    return lambda: distribute_tensor(plain_tensor(), mesh, [Shard(0)])


def contestants(rule, count, tensor):
    name, (kwargs, _) = rule.split()[0], RULES[rule]
    theirs = getattr(torch.optim, name)
    yield "fusestep", make(getattr(fusestep.optim, name), count, kwargs, tensor)
    yield "for-loop", make(theirs, count, {**kwargs, "foreach": False}, tensor)
    yield "foreach", make(theirs, count, {**kwargs, "foreach": True}, tensor)
    if name != "RMSprop" and (name != "SGD" or tensor is plain_tensor):  # torch has no fused SGD of DTensors
        yield "fused", make(theirs, count, {**kwargs, "fused": True}, tensor)


def measure(optimizers, rounds, repeat):
    """Median us a step of each, over interleaved rounds of `repeat` steps."""
    times = {label: [] for label in optimizers}
    for optimizer in optimizers.values():
        for _ in range(3):
            optimizer.step()
    for _ in range(rounds):
        for label, optimizer in optimizers.items():
            optimizer.step()
            begin = time.thread_time_ns()
            for _ in range(repeat):
                optimizer.step()
            times[label].append((time.thread_time_ns() - begin) / 1000 / repeat)
    return {label: statistics.median(values) for label, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, nargs="+", default=[1, 100, 1000, 10_000])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--dtensor", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fusestep.set_num_threads(1)

    tensor = dtensor_maker() if options.dtensor else plain_tensor
    results = []
    print(f"{'us a step':<14}{'tensors':>8}{'target':>10}{'fusestep':>10}{'fused':>10}{'foreach':>10}{'for-loop':>10}")
    for rule in options.rules:
        for count in options.tensors:
            repeat = max(2, 1000 // count)
            medians = measure(dict(contestants(rule, count, tensor)), options.rounds, repeat)
            target = TARGET["fixed"] + count * (TARGET["parameter"] + TARGET["slot"] * RULES[rule][1])
            results.append({"rule": rule, "tensors": count, "target_us": target, "median_us": medians})
            row = "".join(
                f"{medians.get(label, float('nan')):>10.1f}" for label in ("fusestep", "fused", "foreach", "for-loop")
            )
            print(f"{rule:<14}{count:>8}{target:>10.1f}{row}", flush=True)
    if options.json:
        about = {
            "clock": "thread_time",
            "rounds": options.rounds,
            "dtensor": options.dtensor,
            "load": os.getloadavg(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            **fusestep.info(),
        }
        with open(options.json, "w") as file:
            json.dump({"about": about, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
