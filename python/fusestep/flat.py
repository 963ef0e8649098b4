# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Flat groups: parameters, gradients and state in one buffer each, of which torch's tensors are views.

The engine steps the tensors one by one as it does all others, so that norms, random bits and step counts
are the same. What is saved is finding out again, at every step, where they are.
"""

from __future__ import annotations

import collections
import functools
import gc
import itertools
import weakref
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from . import freezing
from ._core import InvalidArgument
from .dtensor import is_dtensor
from .inference import is_read_only

# As csrc/state_store.cpp, csrc/cpu/tuning.h and kernels/tuning.h have it. Elements of which parameters begin at a
# multiple: 64 bytes of the smallest dtype, 256 on CUDA.
_ALIGNMENT = {"cpu": 32, "cuda": 128}
# Bytes. Arrays of one loop must not start at the same place of a page.
_PAGE, _SKEW, _SKEWED_FROM = 4096, 1088, 256 << 10

_flattened: weakref.WeakSet[Flat] = weakref.WeakSet()


def flatten(optimizer: torch.optim.Optimizer, *, trust_gradients: bool = False) -> list[FlatBuffer]:
    """Moves parameters, gradients and state of an optimizer into few buffers, of which they are views then.

    `zero_grad` is one memset a buffer then, and one all-reduce of `buffer.grads` serves all its parameters. Steps,
    state_dicts and files are what they were, bit for bit. Groups that are added later are flat too.

    Args:
        optimizer: of `fusestep.optim`.
        trust_gradients: steps do not look whether every gradient is still in its place, and cost the same for any
            number of parameters: for who never replaces or deletes a gradient. All parameters that require a
            gradient have one from now on, zero at first, and step.

    Returns the buffers, which `optimizer.flat_buffers` has too.

    Raises InvalidArgument for an optimizer of another class or flat already, and for parameters that are not dense in
    memory of their own on a CPU or CUDA device. Nothing has changed then.
    """
    if not hasattr(optimizer, "flat_buffers"):
        raise InvalidArgument(f"flatten: expected an optimizer of fusestep.optim, got {type(optimizer).__name__}")
    if not isinstance(trust_gradients, bool):
        raise InvalidArgument(f"flatten: trust_gradients must be True or False, got {trust_gradients!r}")
    if optimizer.flat_buffers:
        raise InvalidArgument("flatten: the optimizer is flat already; groups that are added later are, too")
    if _capturing():
        raise InvalidArgument("flatten: not while a CUDA graph is captured: call it before")
    optimizer.__dict__["_flat"] = Flat(optimizer, trust_gradients)
    return optimizer.flat_buffers


class FlatBuffer:
    """Parameters of one group, device, dtype and dtype of gradients, one after the other in memory.

    All buffers have a parameter's elements at the same place, from `offsets` on; what is between two
    parameters is zero.

    Attributes:
        params: in the order of the group.
        offsets: of their first elements.
        values: one dimension.
        grads: as long; None until a parameter that did not require a gradient at first may have one. Asking for it
            brings gradients that are elsewhere to their places; where a parameter has none it is zero.
        slots: as long, by name: `exp_avg`, ...; made when a parameter first needs them.
    """

    _flat = None  # a reference: who gives the parameters their gradients
    _seen = None  # of gradients, when all were in their places

    def __init__(self, params: list[torch.Tensor], grad_dtype: torch.dtype, with_grads: bool) -> None:
        self.params = params
        self.offsets: list[int] = []
        self.slots: dict[str, torch.Tensor] = {}
        self._layouts = [(p.shape, p.stride()) for p in params]
        alignment = _ALIGNMENT[params[0].device.type]
        self._size = 0
        for p in params:
            self.offsets.append(self._size)
            self._size += -(-p.numel() // alignment) * alignment
        self._grad_dtype = grad_dtype
        self.values = self._new(params[0].dtype, params[0].device, 0)
        self.grads_as_they_are = self._new(grad_dtype, params[0].device, 1) if with_grads else None

    def __repr__(self) -> str:
        arrays = ", ".join(["values", *(["grads"] if self.grads_as_they_are is not None else []), *self.slots])
        about = f"{len(self.params)} parameters of {self.values.dtype} on {self.values.device}"
        return f"FlatBuffer({about}: {arrays})"

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_flat", "_seen")}

    @property
    def grads(self) -> torch.Tensor | None:
        flat = None if self._flat is None else self._flat()
        if flat is not None:
            flat.link_gradients_of(self)
        return self.grads_as_they_are

    def _new(self, dtype, device, position):
        """Zeros; position among the arrays of a loop."""
        if device.type != "cpu" or self._size * dtype.itemsize < _SKEWED_FROM:
            return torch.zeros(self._size, dtype=dtype, device=device)
        memory = torch.zeros(self._size + _PAGE // dtype.itemsize, dtype=dtype, device=device)
        begin = (position * _SKEW - memory.data_ptr()) % _PAGE // dtype.itemsize
        return memory[begin : begin + self._size]

    def _part(self, buffer, index):
        return buffer.as_strided(*self._layouts[index], buffer.storage_offset() + self.offsets[index])

    def layout(self, index: int) -> tuple[torch.Size, tuple[int, ...]]:
        return self._layouts[index]

    def value(self, index: int) -> torch.Tensor:
        """In a storage of its own, which begins there: parameters that share one are taken for tied weights."""
        begin = self.offsets[index]
        part = self.values[begin : begin + self.params[index].numel()]
        # Of one dimension: DLPack has no strides of dimensions without neighbours.
        return from_dlpack(to_dlpack(part)).as_strided(*self._layouts[index])

    def make_grads(self) -> torch.Tensor:
        if self.grads_as_they_are is None:
            if _capturing():
                raise InvalidArgument("flat groups: the first gradients of a buffer, while a CUDA graph is captured")
            self.grads_as_they_are = self._new(self._grad_dtype, self.values.device, 1)
        return self.grads_as_they_are

    def grad(self, index: int) -> torch.Tensor:
        return self._part(self.make_grads(), index).data  # not a view for autograd: those refuse detach_()

    def is_grad(self, tensor: torch.Tensor, index: int) -> bool:
        """Whether it is the view of `grads` that `grad` gives."""
        whole = self.make_grads()
        begin = whole.data_ptr() + self.offsets[index] * whole.element_size()
        in_place = tensor.numel() == 0 or tensor.data_ptr() == begin
        return in_place and (tensor.shape, tensor.stride()) == self._layouts[index] and tensor.dtype == whole.dtype

    def see(self, links: int, places: list[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """Remembers gradients as they are after so many links; (parameter, its gradient's place)."""
        addresses = [None if p.grad is not place or place is None else place.data_ptr() for p, place in places]
        self._seen = links, [(p, p.grad, address) for (p, _), address in zip(places, addresses, strict=True)]

    def is_as_seen(self, links: int, looks_at_all: bool) -> bool:
        """As a step looks: at the first and the last, or at all."""
        if self._seen is None or self._seen[0] != links:
            return False
        seen = self._seen[1]
        looked_at = seen if looks_at_all else seen[:: max(len(seen) - 1, 1)]
        return all(p.grad is grad and (at is None or grad.data_ptr() == at) for p, grad, at in looked_at)

    def slot(self, name: str, dtype: torch.dtype, index: int) -> torch.Tensor | None:
        """None where the buffer of this name has another dtype."""
        if name not in self.slots:
            self.slots[name] = self._new(dtype, self.values.device, 2 + len(self.slots))
        buffer = self.slots[name]
        return self._part(buffer, index) if buffer.dtype == dtype else None


class Flat:
    """What makes an optimizer's groups flat, and notices what is not in place any more."""

    def __init__(self, optimizer: torch.optim.Optimizer, trust_gradients: bool) -> None:
        self.trusts = trust_gradients
        self.buffers: list[FlatBuffer] = []
        self._optimizer = weakref.ref(optimizer)
        self._places: dict[torch.Tensor, tuple[FlatBuffer, int]] = {}
        self._grads: dict[torch.Tensor, torch.Tensor] = {}  # places that are not known to be zero
        self._unused: list[torch.Tensor] = []  # places that are to be zero, when nobody reads them any more
        self._awaited: dict[torch.Tensor, _FirstGradient] = {}
        self._links = 0  # times that anything was brought to its place
        self._handed_out: set[tuple[torch.Tensor, str]] = set()  # parts of slots that somebody may still hold
        self.is_remembered = False
        self.add(optimizer.param_groups)
        self.take_state()
        _flattened.add(self)

    def __contains__(self, p: torch.Tensor) -> bool:
        return p in self._places

    def is_used(self) -> bool:
        """State that somebody has kept knows us longer than the optimizer lives."""
        return self._optimizer() is not None

    # ---- parameters ----------------------------------------------------------------------------

    def add(self, groups: list[dict]) -> None:
        """Moves the parameters of these groups that are not flat yet; raises, and changes nothing."""
        if torch.is_inference_mode_enabled():
            raise InvalidArgument("flatten: not under torch.inference_mode(), whose tensors autograd refuses")
        elsewhere = _flat_elsewhere([p for group in groups for p in group["params"] if p not in self._places])
        parts = [part for index, group in enumerate(groups) for part in self._divided(index, group, elsewhere)]
        _refuse_shared(groups)
        new = [FlatBuffer(*part) for part in parts]
        self.forget()
        for buffer in new:
            self._enter(buffer)
        self.link_gradients()

    def _divided(self, index, group, elsewhere):
        """(parameters, dtype of their gradients, whether there are any) of every new buffer."""
        parts: dict[tuple, list] = {}
        if group.get("differentiable"):
            raise InvalidArgument(f"group {index}: flatten: not with differentiable=True, torch's own step")
        for position, p in enumerate(group["params"]):
            if p in self._places:
                continue
            why = _why_not(p) or ("it is in the buffer of another optimizer" if p in elsewhere else None)
            if why is not None:
                raise InvalidArgument(f"{_where(index, group, position)}: flatten: {why}")
            grad_dtype = (getattr(p, "grad_dtype", None) or p.dtype) if p.grad is None else p.grad.dtype
            has_grad = p.requires_grad or p.grad is not None
            parts.setdefault((p.device, p.dtype, grad_dtype, has_grad), []).append(p)
        return [(params, *key[2:]) for key, params in parts.items()]

    def _enter(self, buffer):
        self.buffers.append(buffer)
        buffer._flat = weakref.ref(self)
        with torch.no_grad():
            for index, p in enumerate(buffer.params):
                value = buffer.value(index)
                value.copy_(p.detach())
                p.data = value
                self._places[p] = (buffer, index)

    def let_go(self) -> None:
        """Parameters that have left the groups get gradients of their own."""
        if self._holds_same():
            return
        members = {id(p) for p in self._params()}
        for p in [p for p in self._places if id(p) not in members]:
            buffer, index = self._places.pop(p)
            self._cancel(p)
            if self._grads.pop(p, None) is not None:
                self._unused.append(buffer.grad(index))
                if p.grad is not None:
                    with torch.no_grad():
                        p.grad = self._apart(p.grad)

    def _holds_same(self):
        """Whether the groups hold the parameters of the last step."""
        return self.is_remembered and self._stepper.holds_same(self._optimizer().param_groups)

    # ---- gradients -----------------------------------------------------------------------------

    def link_gradients_of(self, buffer: FlatBuffer) -> None:
        """Before somebody reads it: gradients may have come since the last step."""
        if self.is_used() and not buffer.is_as_seen(self._links, not self.trusts):
            self.link_gradients()
            for linked in self.buffers:
                linked.see(self._links, [(p, self._grads.get(p)) for p in linked.params if p in self._places])

    def link_gradients(self) -> None:
        """Copies gradients that are elsewhere to their places. What does not fit there stays where it is."""
        self.let_go()
        moves, missing = [], []
        with torch.no_grad():
            for p, (buffer, index) in self._places.items():
                grad = p.grad
                if grad is None and not (self.trusts and p.requires_grad):
                    self._free(p)
                    self._await(p)
                    continue
                place = self._grads.get(p)
                if place is None or not buffer.is_grad(place, index):
                    place = buffer.grad(index)  # somebody has set its data, if there was one
                if grad is None:
                    missing.append((p, place))
                elif grad is not place:
                    moves.append((p, place, grad))
            # Places are written to when nothing is read from them any more.
            for position, (p, place, grad) in enumerate(moves):
                if not _is_in(grad, place):
                    moves[position] = p, place, self._apart(grad)
            for p, place, grad in moves:
                if not _fits(grad, place):
                    p.grad = grad
                    self._free(p)
            self._links += bool(moves or missing or self._unused)
            for place in self._unused:
                place.zero_()
            self._unused.clear()
            for p, place in missing:
                p.grad = self._grads[p] = place.zero_()
            for p, place, grad in moves:
                if _fits(grad, place):
                    self._link(p, place, grad)

    def _link(self, p, place, grad):
        if not _is_in(grad, place):
            place.copy_(grad)
        p.grad = self._grads[p] = place
        self._cancel(p)

    def _free(self, p):
        """The place of a parameter that has no gradient there."""
        if self._grads.pop(p, None) is not None:
            buffer, index = self._places[p]
            self._unused.append(buffer.grad(index))

    def _await(self, p):
        """Autograd puts a first gradient elsewhere: it is to be in its place before the buffer is reduced."""
        if p.requires_grad and p in self._places and p not in self._awaited:
            self._places[p][0].make_grads()  # now: backward passes may have several threads
            self._awaited[p] = _FirstGradient(self, p)

    def _cancel(self, p):
        awaited = self._awaited.pop(p, None)
        if awaited is not None:
            awaited.remove()

    def take_first(self, p: torch.Tensor) -> None:
        """Links what a backward pass has made; a gradient that is differentiated through is left to the step."""
        grad, at = p.grad, self._places.get(p)
        if at is None or grad is None or grad.requires_grad:
            return
        buffer, index = at
        place = buffer.grad(index)
        if _fits(grad, place):
            with torch.no_grad():
                self._link(p, place, grad)
            self._links += 1

    def _apart(self, grad):
        """A copy of a gradient that lies in one of the buffers."""
        if grad.layout is not torch.strided or not _has_memory(grad):
            return grad
        memory = grad.untyped_storage().data_ptr()
        wholes = (buffer.grads_as_they_are for buffer in self.buffers if buffer.grads_as_they_are is not None)
        return grad.clone() if any(memory == whole.untyped_storage().data_ptr() for whole in wholes) else grad

    def zero_grad(self, set_to_none: bool) -> None:
        """One memset for every buffer; what is not in one is cleared as torch does it."""
        are_same = self._holds_same()
        if not are_same:
            self.let_go()
        with torch.no_grad():
            for buffer in self.buffers:
                if buffer.grads_as_they_are is not None:
                    buffer.grads_as_they_are.zero_()
            self._unused.clear()
            for p in [] if self.trusts and are_same else self._strays():
                if set_to_none:
                    p.grad = None
                    self._await(p)
                    continue
                if p.grad.grad_fn is not None:
                    p.grad.detach_()
                else:
                    p.grad.requires_grad_(False)
                p.grad.zero_()

    def _strays(self):
        """Parameters with a gradient that is not in its place, or that require none: a step does not ask for that."""
        found = self._stepper.strays(self._optimizer().param_groups)
        if found is not None:
            return found
        return [p for p in self._params() if p.grad is not None and not (p.requires_grad and self._is_in_place(p))]

    def _is_in_place(self, p):
        place, at = self._grads.get(p), self._places.get(p)
        return p.grad is place and at is not None and at[0].is_grad(place, at[1])

    # ---- state ---------------------------------------------------------------------------------

    def take_state(self) -> None:
        """Moves state that exists to buffers made for it: who holds the tensors of before keeps them."""
        optimizer = self._optimizer()
        self.forget()
        self._stepper.forget()  # which holds the memory of before
        self._handed_out.clear()
        for buffer in self.buffers:
            buffer.slots = {}
        with torch.no_grad():
            for p, (buffer, index) in self._places.items():
                own = optimizer.state.get(p, {})
                for name, value in list(own.items()):
                    if name in optimizer._names_of_slots and _fits(value, p, any_dtype=True):
                        place = self._slot(p, name, value.dtype, buffer, index)
                        if place is not None:
                            own[name] = place.copy_(value)
                if torch.is_tensor(own.get("step")):
                    own["step"] = own["step"].clone()
        optimizer.state = _States(optimizer.state, self)
        self.link_gradients()  # what was loaded may have thawed some

    def watched(self, state: dict) -> _State:
        """A copy that says when it changes."""
        own = _State(state)
        own.watcher = self
        return own

    def new_slot(self, p: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Zeros for state that a parameter has not had yet, or None."""
        place = self._places.get(p)
        if place is None:
            return None
        is_laid_out_as_ever = (p.shape, p.stride()) == place[0].layout(place[1]) and p.device == place[0].values.device
        return self._slot(p, name, dtype, *place) if is_laid_out_as_ever else None

    def _slot(self, p, name, dtype, buffer, index):
        if (p, name) in self._handed_out:
            return None
        self._handed_out.add((p, name))
        return buffer.slot(name, dtype, index)

    # ---- what the last step has seen -------------------------------------------------------------

    def handed_out(self) -> set[tuple[torch.Tensor, str]]:
        """(parameter, slot) whose place in a buffer somebody may hold."""
        return set(self._handed_out)

    def take_back(self, places: set[tuple[torch.Tensor, str]]) -> None:
        """Of state that was made for a step that was none."""
        self._handed_out -= places

    def forget(self) -> None:
        """The next step looks at everything."""
        self.is_remembered = False

    def is_unchanged(self, stores: bool) -> bool:
        """Whether the next step is one of the same tensors as the last."""
        optimizer = self._optimizer()
        return (
            self.is_remembered
            and type(optimizer.state) is _States
            and optimizer.state.watcher is self
            and optimizer._stepper.is_unchanged(optimizer.param_groups, stores, not self.trusts)
        )

    def remember(self) -> None:
        """After such a step."""
        optimizer = self._optimizer()
        if type(optimizer.state) is not _States or optimizer.state.watcher is not self:
            optimizer.state = _States(optimizer.state, self)
        self.is_remembered = optimizer.state.are_watched() and optimizer._stepper.remember(
            optimizer.param_groups, self._expected(), optimizer.state
        )

    @property
    def _stepper(self):
        return self._optimizer()._stepper

    def _params(self):
        return [p for group in self._optimizer().param_groups for p in group["params"]]

    def _expected(self):
        return [self._grads.get(p) for p in self._params()]


class _FirstGradient:
    """A hook of autograd's, until a parameter's gradient is in its place. Copies of the parameter do not have it."""

    def __init__(self, flat, p):
        self._flat = weakref.ref(flat)
        self._handle = p.register_post_accumulate_grad_hook(self)

    def __call__(self, p):
        if torch.compiler.is_compiling():
            return  # compiled autograd cannot trace it; the gradient is linked when `grads` is asked for
        flat = self._flat()
        if flat is None or not flat.is_used():
            self.remove()
        else:
            flat.take_first(p)

    def remove(self):
        self._handle.remove()


@freezing.on_change
def _follow(parameters):
    """Frozen parameters have no gradients any more, thawed ones will."""
    for flat in list(_flattened):
        if flat.is_used() and any(p in flat for p in parameters):
            flat.forget()
            flat.link_gradients()


def _capturing():
    """Whether the current stream is captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# ---- what can be flat ------------------------------------------------------------------------------


def _why_not(p):
    """Why a parameter cannot be moved; None if it can."""
    if torch.nn.parameter.is_lazy(p):
        return "it is not initialized yet: make a forward pass first"
    if not p.is_leaf:
        return "it is not a leaf of autograd's graph"
    if is_read_only(p):
        return "it was made under inference_mode, and autograd refuses such tensors"
    if is_dtensor(p):
        return "not for DTensors, of which other ranks have parts"
    if p.device.type not in ("cpu", "cuda"):
        return f"only on cpu and cuda, got {p.device}"
    if p.layout is not torch.strided or not _has_memory(p):
        return f"not for tensors without memory of their own, as a {type(p).__name__} of {p.layout}"
    if not (p.is_floating_point() or p.is_complex()) or p.dtype.itemsize == 1:
        return f"not for {p.dtype}"
    if p.is_neg() or p.is_conj() or not _is_dense(p):
        return f"not for a tensor that is not dense in memory: shape {list(p.shape)}, strides {list(p.stride())}"
    if p.device.type == "cpu" and p.is_shared():
        return "it lies in memory shared with other processes, and would not any more"
    return None


def _flat_elsewhere(parameters):
    """Those in buffers of optimizers. One that nobody has any more may live on in a cycle, as schedules make them."""
    for collects in (True, False):
        used = [flat for flat in _flattened if flat.is_used()]
        for flat in used:
            flat.let_go()
        found = {p for p in parameters if any(p in flat for flat in used)}
        if not found:
            break
        if collects:
            gc.collect()
    return found


def _has_memory(p):
    try:
        return p.numel() == 0 or p.data_ptr() != 0
    except RuntimeError:
        return False


def _is_dense(p):
    expected = 1
    for stride, extent in sorted((s, n) for n, s in zip(p.shape, p.stride(), strict=True) if n != 1):
        if stride != expected:
            return p.numel() == 0
        expected *= extent
    return True


def _refuse_shared(groups):
    """Tied weights would not be tied any more."""
    places = [
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), _where(index, group, position))
        for index, group in enumerate(groups)
        for position, p in enumerate(group["params"])
        if p.numel() != 0 and _has_memory(p)
    ]
    places.sort()
    for (device, _, end, first), (other_device, begin, _, second) in itertools.pairwise(places):
        if device == other_device and begin < end:
            raise InvalidArgument(f"flatten: {first} and {second} share memory")


def _where(index, group, position):
    names = group.get("param_names")
    name = f"'{names[position]}'" if names else position
    return f"group {index}, parameter {name}"


def _fits(tensor, place, any_dtype=False):
    """Whether it can be copied there and be stepped from there."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.shape == place.shape
        and tensor.device == place.device
        and (any_dtype or tensor.dtype == place.dtype)
    )


def _is_in(grad, place):
    return _fits(grad, place) and grad.data_ptr() == place.data_ptr() and grad.stride() == place.stride()


# ---- state that says when it changes ---------------------------------------------------------------


def _announced(method):
    """A method of dict that changes it."""

    @functools.wraps(method)
    def changing(self, *args, **kwargs):
        if self.watcher is not None:
            self.watcher.forget()
        return method(self, *args, **kwargs)

    return changing


class _State(dict):
    """A parameter's state. A copy of it is a dict."""

    watcher = None

    def __reduce__(self):
        return dict, (dict(self),)

    __setitem__, __delitem__, __ior__ = map(_announced, (dict.__setitem__, dict.__delitem__, dict.__ior__))
    pop, popitem, clear = map(_announced, (dict.pop, dict.popitem, dict.clear))
    update, setdefault = map(_announced, (dict.update, dict.setdefault))


class _States(collections.defaultdict):
    """`optimizer.state`. A copy of it is a defaultdict."""

    def __init__(self, states, watcher):
        super().__init__(dict)
        self.watcher = watcher
        for p, own in states.items():
            self[p] = watcher.watched(own) if isinstance(own, dict) else own

    def are_watched(self):
        """Whether all say when they change: not a dict that somebody has put here, and may go on writing to."""
        return all(type(own) is _State and own.watcher is self.watcher for own in self.values())

    def __reduce__(self):
        return collections.defaultdict, (dict, dict(self))

    def copy(self):
        return collections.defaultdict(dict, self)

    __copy__ = copy

    def __or__(self, other):
        return self.copy() | other if isinstance(other, dict) else NotImplemented

    def __ror__(self, other):
        return collections.defaultdict(dict, {**other, **self}) if isinstance(other, dict) else NotImplemented

    def __setitem__(self, p, own):
        super().__setitem__(p, own)
        self.watcher.forget()

    def __missing__(self, p):
        self[p] = self.watcher.watched({})
        return self[p]

    def update(self, *args, **kwargs):
        for p, own in dict(*args, **kwargs).items():
            self[p] = own

    def __ior__(self, other):
        self.update(other)
        return self

    def setdefault(self, p, default=None):
        if p not in self:
            self[p] = default
        return self[p]

    __delitem__ = _announced(dict.__delitem__)
    pop, popitem, clear = map(_announced, (dict.pop, dict.popitem, dict.clear))


def plain_state(own: Any) -> Any:
    """For state_dicts: torch.load knows no class of ours."""
    return dict(own) if type(own) is _State else own
