# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several ranks: processes of this machine, joined by gloo or NCCL."""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback

# Imported once, by the process all ranks are forked from.
PRELOAD = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
]


def run(world, function, *arguments, timeout=120, backend="gloo"):
    """The results of `function(rank, *arguments)` on every rank. The function is one of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name may lead nowhere
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            arguments_of_rank = (
                sender,
                rank,
                world,
                os.path.join(folder, "store"),
                function,
                arguments,
                timeout,
                backend,
            )
            process = context.Process(target=_run_rank, args=arguments_of_rank, daemon=True)
            process.start()
            sender.close()
            started.append((process, receiver))
        try:
            return _results(started, time.monotonic() + timeout)
        finally:
            for process, _ in started:
                process.kill()
                process.join()


def _results(started, deadline):
    waiting = {receiver: rank for rank, (_, receiver) in enumerate(started)}
    results = [None] * len(started)
    while waiting:
        ready = multiprocessing.connection.wait(waiting, timeout=deadline - time.monotonic())
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} do not finish")
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                error, results[rank] = receiver.recv()
            except EOFError:
                error = "it died"
            if error is not None:
                raise AssertionError(f"rank {rank}: {error}")
    return results


def _run_rank(sender, rank, world, store, function, arguments, timeout, backend):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(timeout - 5)  # where a collective waits for ever
    try:
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
        result = function(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send((traceback.format_exc(), None))
        return
    sender.send((None, result))
