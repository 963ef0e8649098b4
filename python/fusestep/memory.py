# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Where an array's memory is: (address, dtype name, shape, CUDA device index or None)."""

from __future__ import annotations

from typing import Any

from . import _core

Memory = tuple[int, str, tuple[int, ...], "int | None"]

_DTYPES = {"f4": "float32", "f8": "float64", "f2": "float16"}


def memory_of(what: str, array: Any, writable: bool) -> Memory:
    """Reads NumPy's and CuPy's array interfaces, and DLPack for what has neither.

    Raises InvalidArgument, beginning with `what`, for memory that is read-only (if `writable`), a copy,
    not contiguous, or of other dtypes than float32, float64, float16 and ml_dtypes' bfloat16.
    """

    def refuse(text):
        raise _core.InvalidArgument(f"{what} {text}")

    if type(array).__module__.split(".")[0] in ("jax", "jaxlib"):
        refuse("is a JAX array, and those are immutable: there is no memory to step in place")
    interface = getattr(array, "__cuda_array_interface__", None)
    device = None
    if interface is not None:
        device = getattr(getattr(array, "device", None), "id", None)
        if device is None:
            refuse(f"is GPU memory of a {type(array).__name__}, and of that only CuPy's arrays can be stepped")
    else:
        interface = getattr(array, "__array_interface__", None)
    if interface is None and hasattr(array, "__dlpack__"):
        return memory_of(what, _by_dlpack(array, refuse), writable)
    if interface is None:
        refuse(f"is a {type(array).__name__}, expected an array whose memory can be stepped in place")
    order, kind = interface["typestr"][0], interface["typestr"][1:]
    dtype = _DTYPES.get(kind)
    if kind == "V2" and str(getattr(array, "dtype", "")) == "bfloat16":  # of ml_dtypes; NumPy has no name for it
        dtype = "bfloat16"
    if dtype is None or order == ">":
        refuse(f"has dtype {interface['typestr']}, expected float32, float64, float16 or bfloat16 in native byte order")
    address, readonly = interface["data"]
    if writable and readonly:
        refuse("is read-only")
    shape = tuple(interface["shape"])
    if not _contiguous(shape, interface.get("strides"), int(kind[1])):
        refuse(f"is not contiguous (shape {list(shape)}, strides {list(interface['strides'])} bytes)")
    return address or 0, dtype, shape, device


def _contiguous(shape, strides, item):
    if strides is None or 0 in shape:
        return True
    expected = item
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


def _by_dlpack(array, refuse):
    import numpy

    try:
        return numpy.from_dlpack(array, copy=False)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        refuse(f"cannot be stepped in place through DLPack: {error}")
