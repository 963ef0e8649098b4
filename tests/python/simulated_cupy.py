# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""The part of CuPy that fusestep and its tests use, over the memory and streams of simulated devices."""

import sys
import types

import numpy

from device import sim

_current = 0


class Device:
    def __init__(self, index):
        self.id = index

    def __enter__(self):
        global _current
        self._before, _current = _current, self.id

    def __exit__(self, *_):
        global _current
        _current = self._before


class Stream:
    def __init__(self, non_blocking):
        assert non_blocking
        self._device, self.ptr = _current, sim.make_stream(_current)

    def __enter__(self):
        self._before = sim.set_stream(self._device, self.ptr)
        return self

    def __exit__(self, *_):
        sim.set_stream(self._device, self._before)

    def begin_capture(self):
        sim.begin_capture(self._device)

    def end_capture(self):
        return _Graph(self._device, sim.end_capture(self._device))


class _Graph:
    def __init__(self, device, handle):
        self._device, self._handle = device, handle

    def launch(self):
        sim.launch(self._device, self._handle)


class _Allocation:
    def __init__(self, size):
        self._device, self.ptr = _current, sim.allocate(_current, size)

    def __del__(self):
        sim.deallocate(self._device, self.ptr)


class UnownedMemory:
    def __init__(self, ptr, size, owner, device_id):
        self.ptr, self.owner, self.device_id = ptr, owner, device_id


class MemoryPointer:
    def __init__(self, mem, offset):
        assert offset == 0
        self.mem, self.ptr, self.device_id = mem, mem.ptr, mem.device_id


class ndarray:  # noqa: N801
    def __init__(self, shape, dtype, memptr):
        self.shape, self.dtype, self.data = tuple(shape), numpy.dtype(dtype), memptr
        self.device = Device(memptr.device_id)
        self.nbytes = int(numpy.prod(shape)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self):
        return {"data": (self.data.ptr, False), "typestr": self.dtype.str, "shape": self.shape, "version": 3}

    def set(self, array):
        sim.upload(self.device.id, self.data.ptr, array.tobytes())

    def get(self):
        data = sim.download(self.device.id, self.data.ptr, self.nbytes)
        return numpy.frombuffer(data, self.dtype).reshape(self.shape)


def asarray(array):
    memory = _Allocation(array.nbytes)
    made = ndarray(array.shape, array.dtype, MemoryPointer(UnownedMemory(memory.ptr, 0, memory, _current), 0))
    made.set(array)
    return made


def _current_stream():
    return types.SimpleNamespace(ptr=sim.stream(_current), synchronize=sim.synchronize)


cuda = types.SimpleNamespace(
    Device=Device,
    Stream=Stream,
    UnownedMemory=UnownedMemory,
    MemoryPointer=MemoryPointer,
    get_current_stream=_current_stream,
)
module = types.ModuleType("cupy")
module.__dict__.update(cuda=cuda, ndarray=ndarray, asarray=asarray)


def install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module
