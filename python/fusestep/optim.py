# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Drop-in classes for torch.optim: Adam, AdamW, SGD, RMSprop.

Each is a subclass of torch's class of the same name and takes its constructor, groups, state, hooks
and checkpoints from it; only `step` is ours: one call into C++ for all groups. What differs from torch
is listed in docs/differences.md.
"""

import collections
import contextlib
import functools
import inspect
import math
import os
import sys
import threading
import warnings

import torch
from torch.optim.optimizer import _device_dtype_check_for_fused

from . import _core, precision
from ._core import InvalidArgument
from .checkpoint import Checkpoints
from .dtensor import dtensor_class, grad_placed_as, is_dtensor, local, placed_alike, same_mesh, whole
from .flat import FlatBuffer, _capturing, flatten, plain_state
from .freezing import Freezable, freeze, thaw
from .gradients import (
    CommonNorm,
    check_flag,
    check_limit,
    has_overlap,
    is_sharded,
    scalar_of,
    scaled_grads,
    sum_dtype,
    unscale,
)
from .groups import param_groups_by
from .inference import has_version, tell_written
from .state import SLOTS
from .summary import Summarizable, Summary, summary
from .tables import shape_text

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "FlatBuffer",
    "RMSprop",
    "Summary",
    "flatten",
    "freeze",
    "param_groups_by",
    "summary",
    "thaw",
]

_core.use_threads_of_torch()
_core.find_torch_shim(torch.Tensor)  # now: later a mode of torch's may be in the way


def _outside_graphs(step):
    """Leaves `step` out of what torch.compile traces. Nothing does where torch._dynamo is not imported."""
    disabled = None

    @functools.wraps(step)
    def outside(self, closure=None):
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return step(self, closure)
            disabled = torch.compiler.disable(step)
        return disabled(self, closure)

    return outside


class _Setting:
    """An attribute that is checked when it is set, and read like any other: from the instance's dict."""

    def __init__(self, default, check):
        self.default, self._check = default, check

    def __set_name__(self, owner, name):
        self._name = name

    def __set__(self, optimizer, value):
        optimizer.__dict__[self._name] = self._check(self._name, value)


class _FusedStep(Checkpoints, Freezable, Summarizable):
    """`step` by the engine, for the torch class that is the next base."""

    _rule: str
    _torch_class: type
    _missing_keys = {}  # of groups, where torch's class is too old to have them
    _step_supports_amp_scaling = True  # GradScaler hands over its scale and found_inf

    max_grad_norm, clip_value = _Setting(None, check_limit), _Setting(None, check_limit)
    skip_nonfinite, keep_scaled_grads = _Setting(False, check_flag), _Setting(False, check_flag)
    _norm_apart = None  # of the last step, where the engine has not measured it
    _home = None  # device of the parameters that the last step has moved
    _skipped_apart = 0  # steps the engine has not seen
    _flat = None  # of flat groups
    _checked_options = None  # of all groups, at the last step

    def __init__(
        self,
        *args,
        state_dtype=None,
        master_weights=False,
        rounding="nearest",
        seed=0,
        max_grad_norm=None,
        clip_value=None,
        skip_nonfinite=False,
        keep_scaled_grads=False,
        **kwargs,
    ):
        self.max_grad_norm, self.clip_value = max_grad_norm, clip_value
        self.skip_nonfinite, self.keep_scaled_grads = skip_nonfinite, keep_scaled_grads
        options = {"state_dtype": state_dtype, "master_weights": master_weights, "rounding": rounding, "seed": seed}
        precision.check_group({**options, "params": []}, type(self).__name__)
        # torch's constructor adds groups.
        self._defaults_of_options = {**self._missing_keys, **precision.given(options)}
        super().__init__(*args, **kwargs)
        self.defaults.update(self.__dict__.pop("_defaults_of_options"))
        self._hand_out_portable_state()

    def __setstate__(self, state):
        """Of unpickling, copying, and of torch's load_state_dict, which has nothing but state and groups in it."""
        super().__setstate__(state)
        for name in _OWN_SETTINGS:  # pickles of before they existed lack them
            self.__dict__.setdefault(name, vars(_FusedStep)[name].default)
        self._hand_out_portable_state()
        for group in self.param_groups:
            group.update(self._missing_keys)  # a loaded one may be of the other class

    def add_param_group(self, param_group):
        """torch's add_param_group, and changes nothing for options its parameters cannot have."""
        if isinstance(param_group, dict):
            for name in param_group.keys() & set(_OWN_SETTINGS):
                raise InvalidArgument(f"group {len(self.param_groups)}: {name} is a setting of the whole optimizer")
            for name, value in self.__dict__.get("_defaults_of_options", {}).items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        try:
            precision.check_group(self.param_groups[-1], f"group {len(self.param_groups) - 1}")
            if precision.is_stochastic(self.param_groups[-1]):
                precision.check_noise(self.param_groups)
            if self._flat is not None:
                self._flat.add(self.param_groups)
        except Exception:
            del self.param_groups[-1]
            raise

    def refresh_master_weights(self):
        """Sets the master weights that exist to the parameters as they are now.

        For who has written to parameters himself: loaded weights, averaged models.
        """
        with torch.no_grad():
            for p, state in self.state.items():
                if isinstance(state, dict) and precision.MASTER in state:
                    state[precision.MASTER].copy_(p)

    @property
    def flat_buffers(self):
        """Those that `flatten` and groups added after it have made; a list of FlatBuffer."""
        return [] if self._flat is None else list(self._flat.buffers)

    @_outside_graphs
    def step(self, closure=None):
        """One step of every parameter that has a gradient.

        Args:
            closure: called first, with gradients enabled; its result is returned.

        While torch.cuda.graph captures, nothing is stepped: each replay is a step, with the settings that
        `sync_hyper` or a step outside of graphs brought last, of the parameters that have a gradient now.
        """
        loss = None
        try:
            capturing = _capturing()
            if "capturable" in self.defaults and self.param_groups:
                if capturing or self.param_groups[0]["capturable"]:
                    _check_capturable(self)
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with self._lock:
                self._step(capturing)
        except BaseException:  # Ctrl-C in a notebook as well
            self._let_go_of_scaler()
            raise
        return loss

    def _step(self, capturing):
        try:
            self._check_options()
            if self._flat is None or capturing or not self._step_again():
                try:
                    self._step_anew(capturing)
                finally:
                    written = self._stepper.written
                    self._home = written[0].device if written else None
                    self._stepper.let_go(self._flat is None or not self._flat.is_remembered)
        except (TypeError, ValueError, RuntimeError) as error:
            self._refuse_settings(error)
            raise

    def _check_options(self):
        """Those edited in `param_groups`, as the constructor does; nothing where they are what they were."""
        options = [precision.has_none(group) or precision.options_in(group) for group in self.param_groups]
        if not _are_same(options, self._checked_options):
            for index, group in enumerate(self.param_groups):
                precision.check_group(group, f"group {index}")
            precision.check_noise(self.param_groups)
            self._checked_options = options

    def _let_go_of_scaler(self):
        """GradScaler takes its scale away after steps that were made, and multiplies what it finds by the next one."""
        frame = sys._getframe()
        while (frame := frame.f_back) is not None:
            if frame.f_globals.get("__name__") == "torch.amp.grad_scaler":
                self.__dict__.pop("grad_scale", None)
                self.__dict__.pop("found_inf", None)

    def _refuse_settings(self, error):
        """Raises InvalidArgument where a setting is what made reading them fail."""
        for index, group in enumerate(self.param_groups):
            for name in _NUMBERS & self.defaults.keys() & group.keys():
                if not _is_number(group[name]):
                    raise InvalidArgument(f"group {index}: {name} must be a number, got {group[name]!r}") from error
            betas = group.get("betas")
            if betas is not None and not _are_two_numbers(betas):
                raise InvalidArgument(f"group {index}: betas must be two numbers, got {betas!r}") from error

    def _step_again(self):
        """A step of flat groups in which nothing is where it was not before; False: it may not be, and was not made."""
        loss_scale = scalar_of(getattr(self, "grad_scale", None))
        stores = loss_scale is not None and not self.keep_scaled_grads
        if not self._flat.is_unchanged(stores) or (stores and not self._stepper.can_store_grads()):
            return False
        self._run(whole(getattr(self, "found_inf", None)), loss_scale, stores, None, tells=not self._flat.trusts)
        return True

    @torch.no_grad()
    def _step_anew(self, capturing):
        """A step that looks at everything."""
        if capturing:
            self._refuse_missing_gradients()
        if self._flat is not None:
            self._flat.link_gradients()
        found_inf, loss_scale = whole(getattr(self, "found_inf", None)), scalar_of(getattr(self, "grad_scale", None))
        stores = loss_scale is not None and not self.keep_scaled_grads
        unready = self._stepper.gather(self.param_groups, self.state, dtensor_class(), stores)
        if unready and capturing:
            self._refuse_unready(unready)
        if unready:
            self._step_with_unready(unready, found_inf, loss_scale)
            return
        divides_apart = stores and not self._stepper.can_store_grads()
        norm = None
        if self._measures():
            pairs = self._pairs()
            if is_sharded(pairs) or self._stepper.takes_turns():
                norm = CommonNorm(pairs, loss_scale)
        self._run(found_inf, loss_scale, stores and not divides_apart, norm)
        if divides_apart:
            if self.skip_nonfinite:
                found_inf = (norm or CommonNorm(self._pairs(), None)).skip(found_inf)
            unscale(self.param_groups, loss_scale, found_inf)
        if self._flat is not None:
            self._flat.remember()

    def zero_grad(self, set_to_none=True):
        """torch's zero_grad; gradients are set to zero by one call for each device and dtype.

        Those of flat groups stay what they are, views of their buffer, and are zero.
        """
        if self._flat is not None:
            return self._flat.zero_grad(set_to_none)
        if set_to_none or not hasattr(self, "_zero_grad_profile_name"):
            return super().zero_grad(set_to_none)
        alike = {}
        with torch.autograd.profiler.record_function(self._zero_grad_profile_name):
            for group in self.param_groups:
                for p in group["params"]:
                    if (grad := p.grad) is None:
                        continue
                    if grad.requires_grad:
                        grad.requires_grad_(False) if grad.grad_fn is None else grad.detach_()
                    if type(grad) is not torch.Tensor or grad.is_sparse or grad.is_neg() or grad.is_conj():
                        grad.zero_()  # these cannot be in one call with others
                    elif grad.is_cpu:
                        alike.setdefault(None, []).append(grad)
                    else:
                        alike.setdefault((grad.device, grad.dtype), []).append(grad)
            for grads in alike.values():
                _zero(grads)
        return None

    def _stand_in(self):
        """A copy for torch's own methods: what is set on it is not set here."""
        stand_in = object.__new__(type(self))
        stand_in.__dict__.update(self.__dict__)
        return stand_in

    def sync_hyper(self):
        """Brings `lr` and other settings that have changed to the devices, for graphs replayed after it.

        A step outside of graphs does it by itself, and a tensor `lr` on the device is read there.
        """
        try:
            with self._lock:
                self._stepper.sync_hyper(self.param_groups)
        except (TypeError, ValueError, RuntimeError) as error:
            self._refuse_settings(error)
            raise

    def _refuse_missing_gradients(self):
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None and p.requires_grad:
                    raise _no_capture(self, p, index, "has no gradient; compute one, or freeze the parameter")

    def _refuse_unready(self, unready):
        index, _, p = unready[0]
        group, state = self.param_groups[index], self.state.get(p, {})
        why = _why_torch(p, state, group)
        if why is not None:
            raise _no_capture(self, p, index, f"is left to torch's own step, as one {why}")
        if any(state.get(name) is None for name in self._names_of_state(p, group)):
            raise _no_capture(self, p, index, "has no state yet; make one step outside of the capture first")
        raise _no_capture(self, p, index, "or its gradient or state is laid out so that the step must copy it")

    def _measures(self):
        return self.max_grad_norm is not None or self.skip_nonfinite

    def _placed_pairs(self):
        """With gradients of DTensors where their parameters are."""
        return [
            (p, grad_placed_as(p) if grad is not None and is_dtensor(p) and same_mesh(p, grad) else grad)
            for p, grad in self._pairs()
        ]

    def _pairs(self):
        return [(p, p.grad) for group in self.param_groups for p in group["params"]]

    def _run(self, found_inf, loss_scale, stores, norm, tells=True):
        """One call for what was taken. The norm is the engine's own where None is given; autograd is told or not."""
        if norm is None:
            norm_of_engine = self.max_grad_norm, self.clip_value, self.skip_nonfinite
            self._stepper.step(found_inf, loss_scale, stores, None, *norm_of_engine)
        else:
            skip = norm.skip(found_inf) if self.skip_nonfinite else found_inf
            coefficient = norm.coefficient(self.max_grad_norm)
            self._stepper.step(skip, loss_scale, stores, coefficient, None, self.clip_value, False)
        if norm is not None:
            self._norm_apart = norm.norm
        else:
            has_none = self._measures() and not self._stepper.written
            self._norm_apart = self._no_norm(0.0) if has_none else None
        if tells:
            tell_written(self._stepper.written)

    def _step_with_unready(self, unready, found_inf, loss_scale):
        """The step, where a parameter lacks state, or its memory cannot be stepped as it is."""
        if found_inf is not None and float(found_inf) != 0:
            # It has waited for the device, so that a skipped step makes no state.
            return self._skip(CommonNorm(self._placed_pairs(), loss_scale) if self._measures() else None)
        why = {p: _why_torch(p, self.state.get(p, {}), self.param_groups[index]) for index, _, p in unready}
        for index, _, p in unready:
            self._refuse_torch(why[p], index, p)
        # The engine has their addresses: they live until it has stepped.
        grads = {p: grad_placed_as(p) for _, _, p in unready if why[p] is None}
        norm, pairs = None, [(p, grads.get(p, grad)) for p, grad in self._pairs()]
        if self._measures() and (self.skip_nonfinite or is_sharded(pairs)):
            norm = CommonNorm(pairs, loss_scale)
            if self.skip_nonfinite and float(norm.nonfinite) != 0:
                return self._skip(norm)
        with _TentativeState(self.state, self._flat) as states:
            copies, left_to_torch = self._take(unready, why, grads, states)
            if self._measures():
                apart = is_sharded(pairs) or any(left_to_torch) or self._stepper.takes_turns()
                norm = (norm or CommonNorm(pairs, loss_scale)) if apart else None  # the engine's own bits are fixed
            self._step_by_torch(left_to_torch, states, norm, loss_scale)  # first: it may refuse
            self._run(None, loss_scale, False, norm)
        for copy in copies:
            copy.write_back()
        tell_written([copy.parameter for copy in copies if is_dtensor(copy.parameter)])
        if loss_scale is not None and not self.keep_scaled_grads:
            unscale(self.param_groups, loss_scale, None)

    def _take(self, unready, why, grads, states):
        """Makes their state and hands them to the engine: (copies to write back, who is left to torch by group)."""
        copies, left_to_torch, fresh = [], [[] for _ in self.param_groups], set()
        for index, position, p in unready:
            group, state = self.param_groups[index], states[p]
            if why[p] is None:
                if _complete(state, self._names_of_state(p, group), p, group, self._flat):
                    fresh.add(p)  # of a parameter that is listed twice, both times
                if self._stepper.add(index, position, p, grads[p], state, p in fresh):
                    continue
                names = {*self._names_of_state(p, group), precision.MASTER}
                written = {name: value for name, value in state.items() if name in names}
                self._refuse_known(index, p, _refused_as_copy(p, written))
                copy = _DenseCopy(p, grads[p], written)
                if self._stepper.add(index, position, copy.value, copy.grad, copy.state, p in fresh):
                    copies.append(copy)
                    continue
                why[p] = "whose gradient or state has another dtype or shape"
                self._refuse_torch(why[p], index, p)
                if p not in self.state:
                    states.take_back(p)  # torch makes its own
            reason = _refused_by_torch(p, states[p], self._state_names(group), group, self.defaults["differentiable"])
            self._refuse_known(index, p, reason)
            left_to_torch[index].append((p, why[p]))
        return copies, left_to_torch

    def _refuse_torch(self, why, index, p):
        """Raises InvalidArgument where torch's own step would leave out what the group asks for."""
        group, state = self.param_groups[index], self.state.get(p, {})
        needed = precision.effect_on(p, group, state)
        if why is None or needed is None:
            return
        where = precision.where(p, _place_in(group, p), group, f"group {index}")
        if precision.MASTER in state and precision.is_stochastic(group):
            text = "has a master weight in its state, which rounding='stochastic' is not for: delete one or the other"
            raise InvalidArgument(f"{where} {text}")
        misfit = precision.misfit(p, {name: state.get(name) for name in self._names_of_state(p, group)})
        if misfit is not None:
            raise InvalidArgument(f"{where}: {misfit}, with {needed}")
        raise InvalidArgument(f"{where} has {needed}, but parameters {why} are left to torch's own step, which has not")

    def _refuse_known(self, index, p, why):
        if why is not None:
            group = self.param_groups[index]
            raise InvalidArgument(f"{precision.where(p, _place_in(group, p), group, f'group {index}')}: {why}")

    def _skip(self, norm):
        """A step that the host knows to be skipped."""
        self._skipped_apart += 1
        self._norm_apart = self._no_norm() if norm is None else norm.norm

    def _step_by_torch(self, left, states, norm, loss_scale):
        """torch's own step for (parameter, why) of each group: on a stand-in, without hooks and GradScaler."""
        if not any(left):
            return
        members = [[p for p, _ in own] for own in left]
        multiplier = None if norm is None else norm.coefficient(self.max_grad_norm)
        if loss_scale is not None:
            wide = loss_scale if loss_scale.device.type == "mps" else loss_scale.double()
            multiplier = wide.reciprocal().reshape(()) * (1 if multiplier is None else multiplier)
        with contextlib.ExitStack() as stack:
            if multiplier is not None or self.clip_value is not None:
                pairs = zip(self.param_groups, members, strict=True)
                told = [(p, group["differentiable"]) for group, own in pairs for p in own]
                one = torch.ones((), dtype=torch.float64, device="cpu")
                stack.enter_context(scaled_grads(told, one if multiplier is None else multiplier, self.clip_value))
            try:
                self._run_torch(members, states)
            finally:  # whom it has moved before it raised has the state it was moved with
                states.keep(p for own in members for p in own)
        for why in {why for own in left for _, why in own} - {_DIFFERENTIABLE}:
            _warn_once(type(self).__name__, why)

    def _run_torch(self, members, states):
        stand_in = self._stand_in()
        stand_in.__dict__.pop("grad_scale", None)
        stand_in.__dict__.pop("found_inf", None)
        stand_in.state = states
        stand_in.param_groups = [
            {**group, "params": own, "foreach": False, "fused": False}
            for group, own in zip(self.param_groups, members, strict=True)
        ]
        _without_hooks(self._torch_class.step)(stand_in)

    @property
    def _names_of_slots(self):
        return (*SLOTS[self._torch_class.__name__], precision.MASTER)

    def _names_of_state(self, p, group):
        """What a parameter steps with, in the order in which it is made."""
        names = self._state_names(group)
        if precision.is_stochastic(group) and "step" not in names:
            names = ("step", *names)  # the random bits are a function of it
        return (*names, precision.MASTER) if precision.has_master(p, group) else names

    @property
    def grad_norm(self):
        """The norm over all gradients of the last step, divided by the loss scale, before clipping.

        A float64 scalar where the parameters are; reading it is what waits. NaN where the step has
        measured none: it does for `max_grad_norm` (infinite: measures, and clips nothing) and
        `skip_nonfinite`.
        """
        with self._lock:
            if self._norm_apart is not None:
                return self._norm_apart
            norm = self._no_norm()
            self._stepper.copy_grad_norm(norm)
        return norm

    def _no_norm(self, value=math.nan):
        """A number, where the parameters are."""
        devices = (p.device for group in self.param_groups for p in group["params"])
        device = self._home or next(devices, torch.device("cpu"))
        return torch.full((), value, dtype=sum_dtype(device), device=device)

    @property
    def skipped_steps(self):
        """Steps that `found_inf` or `skip_nonfinite` has skipped, since it was made or unpickled. Waits."""
        with self._lock:
            return self._skipped_apart + self._stepper.skipped_steps()

    def __getstate__(self):
        own = {name: self.__dict__[name] for name in _OWN_SETTINGS if name in self.__dict__}
        return {**super().__getstate__(), **own}

    def _hand_out_portable_state(self):
        """Before any hook of the user's sees a state_dict."""
        if _make_portable not in self._optimizer_state_dict_post_hooks.values():
            self.register_state_dict_post_hook(_make_portable, prepend=True)

    @staticmethod
    def _new_step(count, p, group):
        return _step_tensor(count, p, group)

    @property
    def _stepper(self):
        # Made where it is missing: pickling and copying leave it behind, and with it all addresses.
        try:
            return self.__dict__["_stepper_of_this_process"]
        except KeyError:
            return self.__dict__.setdefault("_stepper_of_this_process", _core.TorchStepper(self._rule, torch.Tensor))

    @property
    def _lock(self):
        """Of what the stepper has read: the engine steps without the GIL."""
        try:
            return self.__dict__[_lock_name]
        except KeyError:
            return self.__dict__.setdefault(_lock_name, threading.RLock())


_lock_name = f"_lock_of_process_{os.getpid()}"  # one that was held when the process was forked stays so


def _rename_lock():
    global _lock_name
    _lock_name = f"_lock_of_process_{os.getpid()}"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_rename_lock)

_OWN_SETTINGS = ("max_grad_norm", "clip_value", "skip_nonfinite", "keep_scaled_grads")


def _with_torchs_signature(cls):
    """The constructor has torch's arguments, and ours after them."""

    def __init__(self, *args, **kwargs):
        super(cls, self).__init__(*args, **kwargs)

    torchs = inspect.signature(cls._torch_class.__init__)
    own = [p for p in inspect.signature(_FusedStep.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    __init__.__signature__ = torchs.replace(parameters=[*torchs.parameters.values(), *own])
    cls.__init__ = __init__
    return cls


def _decoupled_weight_decay(value):
    """Before torch 2.7 AdamW was a class apart, and groups did not say whose they are."""
    name = "decoupled_weight_decay"
    return {} if name in inspect.signature(torch.optim.Adam).parameters else {name: value}


@_with_torchs_signature
class Adam(_FusedStep, torch.optim.Adam):
    __doc__ = torch.optim.Adam.__doc__
    _rule = "Adam"
    _torch_class = torch.optim.Adam
    _missing_keys = _decoupled_weight_decay(False)

    def _state_names(self, group):
        return ("step", "exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())


@_with_torchs_signature
class AdamW(_FusedStep, torch.optim.AdamW):
    __doc__ = torch.optim.AdamW.__doc__
    _rule = "Adam"
    _torch_class = torch.optim.AdamW
    _missing_keys = _decoupled_weight_decay(True)
    _state_names = Adam._state_names


@_with_torchs_signature
class SGD(_FusedStep, torch.optim.SGD):
    __doc__ = torch.optim.SGD.__doc__
    _rule = "SGD"
    _torch_class = torch.optim.SGD

    def _state_names(self, group):
        return ("momentum_buffer",) if group["momentum"] != 0 else ()


@_with_torchs_signature
class RMSprop(_FusedStep, torch.optim.RMSprop):
    __doc__ = torch.optim.RMSprop.__doc__
    _rule = "RMSprop"
    _torch_class = torch.optim.RMSprop

    def _state_names(self, group):
        names = ("step", "square_avg")
        if group["momentum"] > 0:
            names += ("momentum_buffer",)
        return names + (("grad_avg",) if group["centered"] else ())


# ---- CUDA graphs -------------------------------------------------------------------------------


def _zero(grads):
    """Fills them with zeros. torch 2.11 does not count that as a change on CUDA devices: it is counted here."""
    version = grads[0]._version if has_version(grads[0]) else None
    torch._foreach_zero_(grads)
    if version is not None and grads[0]._version == version:
        tell_written(grads)


def _check_capturable(optimizer):
    """torch's own check, under its name in this version of torch."""
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        check = getattr(optimizer, name, None)
        if check is not None:
            return check()


def _no_capture(optimizer, p, index, why):
    names = optimizer.param_groups[index].get("param_names")
    position = _place_in(optimizer.param_groups[index], p)
    name = f"'{names[position]}'" if names else str(position)
    return InvalidArgument(f"the step cannot be captured into a CUDA graph: parameter {name} of group {index} {why}")


# ---- settings ----------------------------------------------------------------------------------

_NUMBERS = {"lr", "eps", "weight_decay", "momentum", "dampening", "alpha"}


def _place_in(group, p):
    return next(i for i, member in enumerate(group["params"]) if member is p)


def _is_number(value):
    """Or a tensor of one."""
    if torch.is_tensor(value):
        return value.numel() == 1 and not value.is_meta
    try:
        math.fabs(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _are_same(options, before):
    try:
        return options == before
    except (RuntimeError, ValueError):  # tensors and arrays of several elements
        return False


def _are_two_numbers(values):
    try:
        return len(values) == 2 and all(map(_is_number, values))
    except TypeError:
        return False


# ---- state -------------------------------------------------------------------------------------


def _make_portable(optimizer, result):
    """Of torch's state_dict: state of CUDA parameters has `step` on the CPU, unless `fused` or `capturable`.

    On the device it lives for us, and torch's other modes refuse it there.
    """
    if optimizer._flat is not None:
        result["state"] = {index: plain_state(own) for index, own in result["state"].items()}
    for group in result["param_groups"]:
        if group.get("fused") or group.get("capturable"):
            continue
        for index in group["params"]:
            own = result["state"].get(index)
            step = None if own is None else own.get("step")
            if torch.is_tensor(step) and step.is_cuda:
                result["state"][index] = {**own, "step": step.cpu()}


class _TentativeState(collections.defaultdict):
    """`optimizer.state`, copied dict by dict. What is made in it is the optimizer's when the step has been made.

    A step that is refused, or fails for want of memory, has made none.
    """

    def __init__(self, states, flat):
        super().__init__()
        self._states, self._flat = states, flat
        self._handed_out = None if flat is None else flat.handed_out()

    def __missing__(self, p):
        own = self[p] = dict(self._states.get(p, ()))
        return own

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is None:
            self.keep(list(self))
        elif self._flat is not None:
            self._flat.take_back(self._flat.handed_out() - self._handed_out)

    def keep(self, parameters):
        for p in parameters:
            made = self.pop(p, {})
            if self._flat is not None:
                self._handed_out |= {(p, name) for name in made}
            own = self._states.get(p)
            if own is None and made:
                own = self._states[p] = {} if self._flat is None else self._flat.watched({})
            for name, value in made.items():
                if name not in own or own[name] is not value:
                    own[name] = value

    def take_back(self, p):
        """What was made for this parameter."""
        made = {(p, name) for name in self.pop(p)}
        if self._flat is not None:
            self._flat.take_back(made - self._handed_out)


def _complete(state, names, p, group, flat):
    """Makes what is missing and puts `step` where the parameter is; True if a momentum buffer was made."""

    def in_buffer(dtype):
        return None if flat is None else flat.new_slot(p, name, dtype)

    made_buffer = False
    for name in names:
        value = state.get(name)
        if name == "step":
            state[name] = _step_tensor(value, p, group)
        elif value is None and name == precision.MASTER:
            place = in_buffer(torch.float32)
            state[name] = precision.new_master(p) if place is None else place.copy_(p)
        elif value is None:
            others = (state.get(other) for other in names if other not in ("step", precision.MASTER, name))
            dtype = next((slot.dtype for slot in others if torch.is_tensor(slot)), precision.state_dtype(p, group))
            place = in_buffer(dtype)
            state[name] = (
                torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format) if place is None else place
            )
            made_buffer = made_buffer or name == "momentum_buffer"
    return made_buffer


def _step_tensor(value, p, group):
    value = whole(value)
    if not torch.is_tensor(value):
        double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
        dtype = torch.float64 if double else torch.float32
        return torch.tensor(0.0 if value is None else float(value), dtype=dtype, device=p.device)
    if value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float32)
    return value.to(p.device)


# ---- memory laid out otherwise -----------------------------------------------------------------


class _DenseCopy:
    """What is here of a parameter, its gradient and state, copied where it is not dense or not laid out alike."""

    def __init__(self, p, grad, state):
        self.parameter = p
        self._copied = []
        self._like = torch.empty_like(local(p))
        self.value = self._dense(local(p).detach(), written=True)
        self.grad = self._dense(local(grad).detach(), written=False)
        self.state = {name: self._dense(local(value), written=True) for name, value in state.items()}

    def _dense(self, tensor, written):
        if not torch.is_tensor(tensor) or tensor.shape != self._like.shape:
            return tensor
        plain = tensor.resolve_conj().resolve_neg()
        if plain is tensor and tensor.stride() == self._like.stride():
            return tensor
        copy = torch.empty_like(self._like, dtype=tensor.dtype).copy_(tensor)
        if written:
            self._copied.append((tensor, copy))
        return copy

    def write_back(self):
        for tensor, copy in self._copied:
            tensor.copy_(copy)


def _refused_as_copy(p, state):
    for name, tensor in {"the parameter": p, **state}.items():
        if torch.is_tensor(tensor) and has_overlap(tensor):
            return f"{name} is expanded: several of its elements are one in memory, and cannot be written"
    return None


# ---- torch's own step --------------------------------------------------------------------------

_DIFFERENTIABLE = "to be differentiated through"


def _why_torch(p, state, group):
    """Why raw memory cannot stand for this parameter, its gradient or state; None if it can."""
    if group["differentiable"]:
        return _DIFFERENTIABLE
    if any(t.layout is not torch.strided for t in (p, p.grad, *filter(torch.is_tensor, state.values()))):
        return "with sparse gradients"
    if p.device.type not in ("cpu", "cuda"):
        if group.get("fused"):
            _device_dtype_check_for_fused(p)
        return f"on {p.device.type}"
    if p.device.type == "cuda" and _core.cuda_device_count() == 0:
        return f"on cuda ({_core.cuda_status()})"
    if not (p.dtype.is_floating_point or p.dtype.is_complex) or p.dtype.itemsize == 1:
        return f"of {p.dtype}"
    for tensor in (local(p), local(p.grad)):
        if _is_wrapper(tensor):
            return f"of the wrapper class {type(tensor).__name__}"
    slots = [value for name, value in state.items() if name != "step" and torch.is_tensor(value)]
    if not same_mesh(p, p.grad) or not all(placed_alike(p, slot) for slot in slots):
        return "whose gradient or state is distributed otherwise"
    return None


def _is_wrapper(tensor):
    """A tensor that stands for others: it has elements and no memory, and its address is the offset in that."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    try:
        return tensor.numel() != 0 and tensor.data_ptr() == tensor.storage_offset() * tensor.element_size()
    except RuntimeError:
        return True


def _refused_by_torch(p, state, names, group, with_grad):
    """What torch's own step would raise only after it has begun; None if nothing is known.

    `with_grad`: it is made with gradients enabled, which the defaults say and not the group.
    """
    if group["differentiable"] and with_grad and p.is_leaf and p.requires_grad:
        return "a leaf that requires a gradient cannot be stepped in-place with differentiable=True"
    slots = {name: state[name] for name in names if name != "step" and state.get(name) is not None}
    for name, value in slots.items():
        if not torch.is_tensor(value):
            return f"its {name} must be a tensor, got {value!r}"
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in (p, p.grad, *slots.values())):
        return None  # what others can do is theirs to know
    for name, value in slots.items():
        if value.shape != p.shape:
            return f"its {name} must be of shape {shape_text(p.shape)}, got {shape_text(value.shape)}"
    is_promoted = group["weight_decay"] != 0 and not group.get("decoupled_weight_decay")  # by adding the parameter
    if "exp_avg" in names and not is_promoted:  # which goes towards the gradient by lerp_: of one dtype
        wanted = slots.get("exp_avg", p).dtype
        if p.grad.dtype != wanted:
            return precision.misfit(p, slots) or f"its gradient must be {wanted}, as its exp_avg, got {p.grad.dtype}"
    return None


def _without_hooks(step):
    """torch's step without the wrapper that would run hooks a second time."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


@functools.cache
def _warn_once(class_name, why):
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusestep", "torch"):
        frame, level = frame.f_back, level + 1
    text = f"fusestep.optim.{class_name} leaves parameters {why} to torch's own step"
    warnings.warn(text, stacklevel=level)
