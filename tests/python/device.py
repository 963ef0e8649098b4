# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""The device the tests run on: FUSESTEP_TEST_DEVICE is cpu (where it is not set), cuda or cuda_sim.

cuda: torch's default device is the first GPU. cuda_sim: CPU tensors lie on simulated CUDA devices, by the
extension in the folder FUSESTEP_SIM_CORE, which takes the place of fusestep._core: import this before
fusestep.
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import pathlib
import sys

import torch

KIND = os.environ.get("FUSESTEP_TEST_DEVICE", "cpu")
SIMULATED = KIND == "cuda_sim"
DEFAULT = torch.device("cuda" if KIND == "cuda" else "cpu")  # in all threads; torch's own is of one
sim = None
_is_synchronised = True
_places = {}  # of simulated tensors that do not lie on the device of all others: by address


def _load(name, path):
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    sys.modules[name] = module
    return module


def _simulate(path):
    """Simulated work is done where a program would see it: after each step, before torch reads its tensors."""
    core = _load("fusestep._core", path)
    step = core.TorchStepper.step

    def synchronised_step(self, *arguments):
        try:
            step(self, *arguments)
        finally:
            if _is_synchronised:
                synchronize()

    let_go, stepped_last = core.TorchStepper.let_go, {}

    def remembering_let_go(self, written):
        stepped_last[id(self)] = self.written[0].data_ptr() if self.written else None
        let_go(self, written)

    copy_grad_norm = core.TorchStepper.copy_grad_norm

    def synchronised_copy(self, to):
        last = stepped_last.get(id(self))
        try:
            return copy_grad_norm(self, to if last is None else _beside(last, to))
        finally:
            if _is_synchronised:
                synchronize()

    core.TorchStepper.step = synchronised_step
    core.TorchStepper.let_go = remembering_let_go
    core.TorchStepper.copy_grad_norm = synchronised_copy
    return _load("_cuda_sim", path)


if KIND == "cuda":
    if not torch.cuda.is_available():
        raise RuntimeError("FUSESTEP_TEST_DEVICE is cuda, and torch has no CUDA device")
    torch.set_default_device(DEFAULT)
elif SIMULATED:
    sim = _simulate(str(next(pathlib.Path(os.environ["FUSESTEP_SIM_CORE"]).glob("_core*.so"))))
elif KIND != "cpu":
    raise RuntimeError(f"FUSESTEP_TEST_DEVICE must be cpu, cuda or cuda_sim, got {KIND}")


def count():
    return sim.devices if SIMULATED else torch.cuda.device_count() if KIND == "cuda" else 0


def home():
    """The index of the device on which tensors are that nobody places."""
    return sim.home() if SIMULATED else 0


def start_simulation(seed):
    _places.clear()
    sim.reset(seed, policy=seed % 3, home=seed // 3 % sim.devices)


@contextlib.contextmanager
def unsynchronised():
    """Simulated steps stay pending, as real ones do."""
    global _is_synchronised
    _is_synchronised = False
    try:
        yield
    finally:
        _is_synchronised = True
        synchronize()


def synchronize():
    """Waits for the current streams of all devices."""
    if SIMULATED:
        sim.synchronize()
        return
    for index in range(count()):
        torch.cuda.current_stream(index).synchronize()


# ---- places ------------------------------------------------------------------------------------


def place(tensor, index):
    """The tensor on a CUDA device, or on the CPU where index is None; a simulated one is the same object."""
    if not SIMULATED:
        return tensor.to("cpu" if index is None else f"cuda:{index}")
    _places[tensor.data_ptr()] = index
    sim.place(tensor.data_ptr(), index)
    return tensor


def beside(neighbour, tensor):
    """The tensor where its neighbour is."""
    if not SIMULATED:
        return tensor.to(neighbour.device)
    return _beside(neighbour.data_ptr(), tensor)


def _beside(address, tensor):
    return place(tensor, _places.get(address, home())) if _places else tensor


def place_state(complete):
    """fusestep.optim._complete, with new state where the parameter is."""

    def placed(state, names, p, group, flat):
        made = complete(state, names, p, group, flat)
        for name in names:
            beside(p, state[name])
        return made

    return placed if SIMULATED else complete


# ---- streams -----------------------------------------------------------------------------------


@contextlib.contextmanager
def side_stream(index=None):
    """A new stream is the current one."""
    index = home() if index is None else index
    if not SIMULATED:
        stream = torch.cuda.Stream(index)
        stream.wait_stream(torch.cuda.current_stream(index))
        before = torch.cuda.current_stream(index)
        with torch.cuda.device(index):
            torch.cuda.set_stream(stream)
        try:
            yield
        finally:
            stream.synchronize()
            with torch.cuda.device(index):
                torch.cuda.set_stream(before)
        return
    before = sim.set_stream(index, sim.make_stream(index))
    try:
        yield
    finally:
        synchronize()
        sim.set_stream(index, before)


def later(function, index=None):
    """Enqueues what the function does to tensors on the current stream, where it takes its time to run."""
    index = home() if index is None else index
    if SIMULATED:
        sim.enqueue(index, function)
        return
    with torch.cuda.device(index):
        torch.cuda._sleep(50_000_000)
        function()


# ---- graphs ------------------------------------------------------------------------------------


class _SimulatedGraph:
    def __init__(self, handle, index):
        self._handle, self._index = handle, index

    def replay(self):
        sim.launch(self._index, self._handle)
        if _is_synchronised:
            synchronize()


def capture(function, index=None):
    """A graph of what the function enqueues; `replay` runs it on the current stream.

    A simulated device captures what is ours alone: torch's operations run at once.
    """
    index = home() if index is None else index
    if not SIMULATED:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(index), torch.cuda.graph(graph):
            function()
        return graph
    import fusestep.optim

    capturing, fusestep.optim._capturing = fusestep.optim._capturing, lambda: True
    with unsynchronised():
        sim.begin_capture(index)
        try:
            function()
        finally:
            fusestep.optim._capturing = capturing
            handle = sim.end_capture(index)
    return _SimulatedGraph(handle, index)
