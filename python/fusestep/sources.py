# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What torch's optimizers load from: safetensors files, files of torch.save, state_dicts.

A source has a `description` of what is saved, the file's `metadata`, `knows_frozen`, and `slot()`, which
reads one slot of one parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from . import _core, state
from .dtensor import is_dtensor

PIECE = 4 << 20  # bytes of pinned memory that tensors of other devices go through

_TORCH_FILES = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # zip, and what torch wrote before; both by torch.save


def open_source(source: Any, rule: str, saved_names: Any) -> FileSource | DictSource:
    """The source that is meant by load's argument. A state_dict is taken to be of this rule."""
    if isinstance(source, Mapping):
        return DictSource(source, rule, saved_names)
    path = state.path_of(source, "a file's path or a state_dict")
    start = _first_bytes(path)
    if start in _TORCH_FILES:
        return DictSource(_torch_load(path, mmap=start == _TORCH_FILES[0]), rule, saved_names)
    return FileSource(path, saved_names)


class FileSource:
    """A safetensors file."""

    def __init__(self, path: str, saved_names: Any) -> None:
        self._file = _core.StateFileReader(path)
        self.description: state.Description = json.loads(self._file.description)
        self.metadata: dict[str, str] = self._file.metadata
        self.knows_frozen = all(group["rule"] for group in self.description)
        if saved_names is not None:
            state.name_all(self.description, saved_names)

    def slot(self, index: int, name: str, described: Mapping[str, Any], device: torch.device) -> torch.Tensor:
        """A new tensor with a slot's contents, in C order."""
        tensor = torch.empty(described["shape"], dtype=dtype_named(described["dtype"]), device=device)
        flat = bytes_of(tensor)
        if is_in_reach(flat):
            self._file.read_into(index, name, flat.data_ptr(), flat.numel())
            return tensor
        staging, done = staging_for(device), 0

        def take(size):
            nonlocal done
            flat[done : done + size].copy_(staging[:size])
            done += size

        self._file.read_through(index, name, staging.data_ptr(), PIECE, take)
        return tensor


class DictSource:
    """A state_dict of torch's structure."""

    knows_frozen = False

    def __init__(self, state_dict: Mapping[str, Any], rule: str, saved_names: Any) -> None:
        state.check_state_dict(state_dict)
        state_dict = state.counts_by_parameter(state_dict, float)
        self.metadata: dict[str, str] = {}
        self.description = state.describe_state_dict(state_dict, rule, state.names_in(state_dict, saved_names))
        self._parameters = state.parameters_of(self.description)
        self._states = [state_dict["state"].get(index, {}) for index in state.indices_of(state_dict)]

    def slot(self, index: int, name: str, described: Mapping[str, Any], device: torch.device) -> torch.Tensor:
        """A new tensor with a slot's contents, in C order; complex numbers as pairs."""
        where = f"parameter '{self._parameters[index]['name']}', '{name}'"
        saved = self._states[index][name]
        tensor = plain(saved if torch.is_tensor(saved) else torch.as_tensor(saved, device="cpu"), where)
        return tensor.to(device, copy=True, memory_format=torch.contiguous_format)


def _first_bytes(path):
    try:
        with open(path, "rb") as file:
            return file.read(4)
    except OSError:
        return b""  # the reader says what is wrong


def _torch_load(path, mmap):
    """mmap: the file's pages are read as they are copied, and not kept."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:
        raise _core.FileError(f"{path}: torch cannot load it: {error}") from None
    if not isinstance(contents, Mapping) or not {"state", "param_groups"} <= contents.keys():
        raise _core.FileError(
            f"{path}: has no optimizer's state_dict at its top: load it with torch.load and hand over the part "
            "that is one"
        )
    return contents


# ---- tensors as bytes --------------------------------------------------------------------------


def plain(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor's memory as real numbers; InvalidArgument for what has no memory of its own."""
    if is_dtensor(tensor):
        raise _core.InvalidArgument(f"{where} is distributed: use torch.distributed.checkpoint")
    if tensor.layout is not torch.strided:
        raise _core.InvalidArgument(f"{where}: its layout is {tensor.layout}, expected a dense tensor")
    try:
        has_memory = not tensor.is_meta and (tensor.numel() == 0 or tensor.data_ptr() != 0)
    except RuntimeError:
        has_memory = False
    if not has_memory:
        raise _core.InvalidArgument(f"{where}: a {type(tensor).__name__} without memory of its own")
    dense = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(dense) if dense.is_complex() else dense


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor."""
    flat = tensor.reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # one element may have any stride


def pieces_of(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(address, bytes) of CPU memory, in C order, each valid until the next is asked for."""
    flat = bytes_of(tensor.contiguous())
    if is_in_reach(flat):
        yield flat.data_ptr(), flat.numel()
        return
    staging = staging_for(flat.device)
    for piece in flat.split(PIECE):
        staging[: piece.numel()].copy_(piece)
        yield staging.data_ptr(), piece.numel()


def is_in_reach(tensor: torch.Tensor) -> bool:
    """Of a file: other memory is copied through a piece of the CPU's."""
    return tensor.device.type == "cpu"


def staging_for(device: torch.device) -> torch.Tensor:
    return torch.empty(PIECE, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")


def dtype_named(name: str) -> torch.dtype:
    """torch's dtype of this name; a file may have others."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise _core.InvalidArgument(f"there is no conversion from {name}")
    return dtype


def made_tensor(numbers: Any, dtype: str) -> torch.Tensor:
    """For settings and counts that were tensors, which a file has as numbers."""
    return torch.tensor(numbers, dtype=dtype_named(dtype), device="cpu")
