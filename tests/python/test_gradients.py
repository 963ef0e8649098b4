# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""GradScaler through the step, clipping by norm and value, skipping what is not finite."""

import copy
import fractions
import io
import math
import pickle
import weakref

import pytest
import torch

import device
import fusestep
import support
from fusestep import gradients

SHAPES = ((33, 7), (5,), (), (4100,))
SETTINGS = {**support.FULLEST, "SGD plain": {}}  # without slots too
RULES = sorted(SETTINGS)
EPS = 2.0**-24  # half a unit in the last place of float32, relative


def make(rule, parameters, **options):
    return support.ours(rule.split()[0])(parameters, lr=1e-2, **{**SETTINGS[rule], **options})


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def grads_of(optimizer):
    return [p.grad.detach().clone() for p in params_of(optimizer)]


def assert_same_grads(optimizer, expected):
    assert all(torch.equal(p.grad, g) for p, g in zip(params_of(optimizer), expected, strict=True))


def twin_optimizer(rule, dtype=torch.float32, **options):
    """The optimizer with the options, and one without."""
    parameters = support.tensors(*SHAPES, dtype=dtype)
    return make(rule, parameters, **options), make(rule, support.twins(parameters))


def scalar(value):
    return torch.tensor(value, dtype=torch.float32, device=device.DEFAULT)


# ---- GradScaler: divided while stepping ---------------------------------------------------------


def never(*_):
    raise AssertionError("gradients were divided in a pass of their own")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["divided", "kept"])
@pytest.mark.parametrize("rule", RULES)
def test_scaled_gradients_step_as_unscaled_ones(rule, keep, dtype, monkeypatch):
    """The same bits as of gradients that are divided before; in memory as GradScaler leaves them, or as they were."""
    mine, plain = twin_optimizer(rule, dtype, keep_scaled_grads=keep)
    for index in range(5):
        skipped = index in (0, 3)
        if index == 2:  # from then on there is state
            monkeypatch.setattr(fusestep.optim, "unscale", never)
        support.set_grads(params_of(mine), seed=index, scale=64.0)
        with_scale = grads_of(mine)
        unscaled = [g / 64 for g in with_scale]
        before = support.snapshot(mine)
        versions = [p.grad._version for p in params_of(mine)]
        mine.grad_scale, mine.found_inf = scalar(64.0), scalar(float(skipped))
        mine.step()
        assert_same_grads(mine, with_scale if skipped or keep else unscaled)
        if skipped:
            support.assert_bits(support.all_state(mine), before)
            continue
        if not keep and index == 4:
            assert all(p.grad._version > before for p, before in zip(params_of(mine), versions, strict=True))
        for p, g in zip(params_of(plain), unscaled, strict=True):
            p.grad = device.beside(p, g)
        plain.step()
        support.assert_bits(support.all_state(mine), support.all_state(plain))
    assert mine.skipped_steps == 2


def transposed(shape, dtype):
    return torch.nn.Parameter(torch.ones(shape[::-1], dtype=dtype).t())


def every_other(shape, dtype):
    return torch.nn.Parameter(torch.ones(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2])


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MASTERS = {"master_weights": True, "state_dtype": F32}
# Of the parameters, and whose gradients the step cannot store.
KEPT_OR_NOT = {
    "float32": (F32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (BF16, {}),
    "bfloat16, master": (BF16, MASTERS),
    "bfloat16, stochastic": (BF16, {"rounding": "stochastic"}),
    "float16": (F16, {}),
    "float16, state float32": (F16, {"state_dtype": F32}),
    "float16, master": (F16, MASTERS),
}


@pytest.mark.parametrize("limits", [{}, {"max_grad_norm": 1e-8}], ids=["", "clipped"])
@pytest.mark.parametrize("layout", KEPT_OR_NOT)
@pytest.mark.parametrize("rule", RULES)
def test_stored_gradients_are_rounded_after_the_step(rule, layout, limits):
    """keep_scaled_grads changes no bit, the first step included, of quotients that underflow in memory too."""
    dtype, options = KEPT_OR_NOT[layout]
    runs = []
    for keep in (False, True):
        parameters = [*support.tensors((33, 7), (5,)), transposed((6, 4), dtype), every_other((3, 5), dtype)]
        parameters = [torch.nn.Parameter(p.detach().to(dtype)) if p.dtype != dtype else p for p in parameters]
        runs.append(make(rule, parameters, **options, **limits, keep_scaled_grads=keep))
    for index in range(4):
        for mine in runs:
            support.set_grads(params_of(mine), seed=index, scale=1e-4)
            with_scale = grads_of(mine)
            mine.grad_scale, mine.found_inf = scalar(65536.0), scalar(0.0)
            mine.step()
            assert_same_grads(mine, with_scale if mine.keep_scaled_grads else [g / 65536 for g in with_scale])
        support.assert_bits(*map(support.all_state, runs))


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_that_underflow_when_they_are_divided_move_the_parameter(keep):
    """Every step of three, and the first one as much as the next."""
    (p,) = (torch.nn.Parameter(torch.ones(2, dtype=F16)),)
    mine = fusestep.optim.SGD([p], lr=1e6, **MASTERS, keep_scaled_grads=keep)
    for index in range(3):
        p.grad = torch.full((2,), 6e-5, dtype=F16)
        exact = 1 - (index + 1) * 1e6 * p.grad.double() / 65536
        mine.grad_scale, mine.found_inf = scalar(65536.0), scalar(0.0)
        mine.step()
        assert ((mine.state[p]["master_weight"] - exact).abs() < 1e-6).all()


@pytest.mark.filterwarnings("ignore:fusestep")
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("listed", [1, 2])
def test_torchs_own_step_divides_once(listed, keep):
    """A parameter that is listed twice steps twice, with the same gradient."""
    (p,) = support.tensors((6, 3))
    before = p.detach().clone()
    mine = fusestep.optim.SGD([p] * listed, lr=1.0, keep_scaled_grads=keep)
    p.grad = torch.full((6, 3), 8.0).to_sparse()
    mine.grad_scale, mine.found_inf = scalar(8.0), scalar(0.0)
    mine.step()
    assert (p.grad.to_dense() == (8 if keep else 1)).all()
    assert ((p.detach() - (before - listed)).abs() < 1e-6).all()


def shared_between_parameters(parameters):
    grad = torch.ones(12)
    parameters[0].grad, parameters[1].grad = grad[:8], grad[4:]


def shared_as_a_whole(parameters):
    parameters[0].grad = parameters[1].grad = torch.ones(8)


def wider(parameters):
    for p in parameters:
        p.grad_dtype = torch.float32
        p.grad = torch.ones(8)


def plain_grads(parameters):
    for p in parameters:
        p.grad = torch.ones_like(p)


# What the step divides itself, and what it cannot store.
DIVIDED = {
    "float32": (torch.float32, plain_grads, 0),
    "bfloat16": (torch.bfloat16, plain_grads, 0),
    "float64": (torch.float64, plain_grads, 1),
    "complex": (torch.complex64, plain_grads, 0),
    "float32 beside bfloat16": (torch.bfloat16, wider, 1),
    "gradients that overlap": (torch.float32, shared_between_parameters, 1),
    "one gradient of two": (torch.float32, shared_as_a_whole, 1),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=support.needs_grad_dtype) if "beside" in case else case for case in DIVIDED]
)
def test_who_divides(case, monkeypatch):
    """Memory that is shared is divided as torch does it: each tensor once."""
    dtype, set_grads, apart = DIVIDED[case]
    (first, second) = (torch.nn.Parameter(torch.ones(8, dtype=dtype)) for _ in range(2))
    mine = fusestep.optim.SGD([first, second], lr=1.0, momentum=0.5)
    calls = []
    unscale = fusestep.optim.unscale
    monkeypatch.setattr(fusestep.optim, "unscale", lambda *given: calls.append(1) or unscale(*given))
    for step in range(4):
        set_grads([first, second])
        before = [first.grad.clone(), second.grad.clone()]
        if step >= 2:  # now there is state
            mine.grad_scale, mine.found_inf = scalar(2.0), scalar(0.0)
        calls.clear()
        mine.step()
        assert len(calls) == (apart if step >= 2 else 0)
        if step < 2:
            continue
        expected = [g / 2 for g in before]
        if set_grads is shared_between_parameters:  # as a pass over the list of gradients leaves them
            expected[0][4:] /= 2
            expected[1][:4] /= 2
        assert_same_grads(mine, expected)
    support.stepped_by_us(mine)


def test_one_kernel_writes_no_memory_twice():
    """Where gradients share memory, each is divided by a call of its own: they would race on a GPU."""
    memory = torch.ones(12)
    strided, between = torch.ones(4, 6)[:, ::3], torch.ones(0)
    alone = [memory[:4], memory[4:8], memory[8:], strided, between, between]
    assert gradients._apart(alone) == [alone]
    for other in (memory[3:5], strided[2:], memory.view(3, 4)[:, 1:2]):
        assert gradients._apart([*alone, other]) == [[tensor] for tensor in [*alone, other]]


def test_gradients_that_begin_and_cease_to_overlap(monkeypatch):
    """The answer is remembered with the addresses it was given for."""
    parameters = support.tensors((8,), (8,))
    mine = fusestep.optim.SGD(parameters, lr=1.0)
    calls = []
    unscale = fusestep.optim.unscale
    monkeypatch.setattr(fusestep.optim, "unscale", lambda *given: calls.append(1) or unscale(*given))
    both = torch.ones(12)
    apart = [torch.ones(8), torch.ones(8)]
    for expected, grads in ((0, apart), (1, [both[:8], both[4:]]), (1, [both[:8], both[4:]]), (0, apart)):
        for p, g in zip(parameters, grads, strict=True):
            p.grad = device.beside(p, g)
        calls.clear()
        mine.grad_scale, mine.found_inf = scalar(2.0), None
        mine.step()
        assert len(calls) == expected


@pytest.mark.parametrize("scale", [3.0, torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64), torch.tensor(3)])
def test_any_scale(scale):
    """A scale that is no power of two rounds once: the quotient within a unit in the last place."""
    (p,) = support.tensors((100,))
    mine = fusestep.optim.SGD([p], lr=1.0)
    support.set_grads([p], seed=0)
    exact = p.grad.double() / 3
    mine.grad_scale, mine.found_inf = scale, None
    mine.step()
    assert ((p.grad.double() - exact).abs() <= exact.abs() * 3 * EPS).all()


# ---- clipping ----------------------------------------------------------------------------------


def exact_clipped(grads, limit, value=math.inf):
    """In double, as clip_grad_norm_ and then clip_grad_value_ define it; and the norm."""
    wide = [g.double() for g in grads]
    norm = math.sqrt(sum(float(g.square().sum()) for g in wide))
    coefficient = min(1.0, limit / (norm + 1e-6))
    return [(g * coefficient).clamp(-value, value) for g in wide], norm


@pytest.mark.parametrize("limit", [0.0, 0.5, 10.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_what_the_rule_sees(limit, dtype, scaled):
    """Seen through SGD's momentum buffer, which after the first step is the gradient, in steps of float32.

    The norm is summed in double and the coefficient rounded once to the type of arithmetic, the product
    once more, and once to the buffer's type: 3 roundings, each half a unit.
    """
    parameters = support.tensors(*SHAPES, dtype=dtype)
    options = {"keep_scaled_grads": True} if scaled else {}
    for p in parameters:  # state there is: it is the engine that multiplies
        p.grad = torch.zeros_like(p)
    mine = fusestep.optim.SGD(parameters, lr=0.0, momentum=0.5, max_grad_norm=limit, **options)
    mine.step()
    support.set_grads(parameters, seed=1, scale=8.0 if scaled else 1.0)
    before = grads_of(mine)
    expected, norm = exact_clipped([g.double() / (8 if scaled else 1) for g in before], limit)
    if scaled:
        mine.grad_scale, mine.found_inf = scalar(8.0), None
    mine.step()
    assert_same_grads(mine, before)
    assert mine.grad_norm.dtype == torch.float64 and mine.grad_norm.shape == ()
    assert float(mine.grad_norm) == pytest.approx(norm, rel=1e-13)
    arithmetic, storage = (2.0**-53, 2.0**-53) if dtype == torch.float64 else (EPS, torch.finfo(dtype).eps / 2)
    for p, exact in zip(parameters, expected, strict=True):
        bound = exact.abs() * (2.01 * arithmetic + 1.01 * storage + 1e-13) + torch.finfo(dtype).smallest_normal
        assert ((mine.state[p]["momentum_buffer"].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("limit", [0.5, 1e9])
@pytest.mark.parametrize("rule", RULES)
def test_clipped_steps_are_torchs(rule, limit):
    """clip_grad_norm_ and torch's step, within what torch's norm in float32 is off the exact one."""
    mine, _ = twin_optimizer(rule, max_grad_norm=limit)
    twins = support.twins(params_of(mine))
    torchs = support.theirs(rule.split()[0])(twins, lr=1e-2, **SETTINGS[rule])
    for index in range(5):
        support.set_grads(params_of(mine), seed=index)
        before = grads_of(mine)
        support.give_same_grads(params_of(mine), twins)
        theirs = torch.nn.utils.clip_grad_norm_(twins, limit)
        assert float(mine.grad_norm) != float(theirs) or index == 0  # of the step before
        mine.step()
        torchs.step()
        assert_same_grads(mine, before)
        assert float(mine.grad_norm) == pytest.approx(float(theirs), rel=1e-5)
    support.assert_close(support.all_state(mine), support.all_state(torchs), steps=5, ulps=16.0)


def test_the_bound_of_the_difference_to_torch():
    """Steps differ by lr times the clipped gradient times (what torch's norm is off + 4 half units)."""
    parameters = support.tensors((300, 300), (4100,), (7,))
    twins = support.twins(parameters)
    mine = fusestep.optim.SGD(parameters, lr=1.0, max_grad_norm=0.25)
    torchs = torch.optim.SGD(twins, lr=1.0)
    support.set_grads(parameters, seed=3)
    support.give_same_grads(parameters, twins)
    (expected, norm) = exact_clipped([p.grad for p in parameters], 0.25)
    before = [p.detach().clone() for p in parameters]
    theirs = float(torch.nn.utils.clip_grad_norm_(twins, 0.25))
    off = abs(theirs - norm) / norm
    mine.step()
    torchs.step()
    for p, q, exact, start in zip(parameters, twins, expected, before, strict=True):
        rounding = 2 * EPS * (start.abs() + exact.abs())  # of p - g, in either
        assert ((p - q).detach().abs() <= exact.abs() * (off + 4 * EPS) + rounding).all()


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e9])
@pytest.mark.parametrize("rule", RULES)
def test_clip_value(rule, limit):
    """The same bits as clip_grad_value_ before the step; gradients stay as they are."""
    mine, plain = twin_optimizer(rule, clip_value=limit)
    for index in range(3):
        support.set_grads(params_of(mine), seed=index)
        before = grads_of(mine)
        support.give_same_grads(params_of(mine), params_of(plain))
        torch.nn.utils.clip_grad_value_(params_of(plain), limit)
        mine.step()
        plain.step()
        assert_same_grads(mine, before)
    support.assert_bits(support.all_state(mine), support.all_state(plain))


def test_norm_first_then_value():
    parameters = support.tensors((50,))
    mine = fusestep.optim.SGD(parameters, lr=0.0, momentum=0.5, max_grad_norm=1.0, clip_value=0.1)
    support.set_grads(parameters, seed=0)
    (expected,), _ = exact_clipped([parameters[0].grad], 1.0, 0.1)
    mine.step()
    assert (mine.state[parameters[0]]["momentum_buffer"] - expected).abs().max() <= 0.1 * 3 * EPS
    assert (expected.abs() == 0.1).any() and (expected.abs() < 0.1).any()


def test_grad_norm_tells_what_was_measured(name):
    mine, plain = (make(name, support.tensors(*SHAPES), **options) for options in ({"max_grad_norm": math.inf}, {}))
    assert math.isnan(mine.grad_norm)
    for index in range(3):
        for optimizer in (mine, plain):
            support.set_grads(params_of(optimizer), seed=index)
            optimizer.step()
        assert float(mine.grad_norm) == pytest.approx(exact_clipped(grads_of(mine), 1)[1], rel=1e-13)
        assert mine.grad_norm.device == params_of(mine)[0].device
        assert math.isnan(plain.grad_norm)
    support.assert_bits(support.all_state(mine), support.all_state(plain))  # an infinite limit clips nothing


def test_limits_may_change_between_steps():
    parameters = support.tensors((9,))
    mine = fusestep.optim.SGD(parameters, lr=1.0, max_grad_norm=1.0)
    for limit in (1.0, 0.125, None):
        mine.max_grad_norm = limit
        before = parameters[0].detach().clone()
        parameters[0].grad = torch.full((9,), 2.0)
        mine.step()
        length = float((parameters[0].detach() - before).norm())
        assert length == pytest.approx(6.0 if limit is None else limit, rel=1e-5)


def several_groups(parameters, **options):
    groups = [{"params": [p], "lr": 10.0**-i} for i, p in enumerate(parameters)]
    return fusestep.optim.SGD(groups, lr=0.1, momentum=0.9, **options)


def test_one_norm_for_all_groups():
    """And those that lack a gradient or are frozen are no part of it."""
    parameters = support.tensors(*SHAPES)
    mine = several_groups(parameters, max_grad_norm=1.0)
    for index in range(3):
        support.set_grads(parameters, seed=index)
        parameters[index].grad = None
        _, norm = exact_clipped([p.grad for p in parameters if p.grad is not None], 1.0)
        mine.step()
        assert float(mine.grad_norm) == pytest.approx(norm, rel=1e-13)


# ---- not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("rule", RULES)
def test_skip_nonfinite(rule, bad):
    """A bad step changes nothing, the first one included."""
    mine, plain = twin_optimizer(rule, skip_nonfinite=True)
    for index in range(6):
        support.set_grads(params_of(mine), seed=index)
        skipped = index in (0, 1, 4)
        if skipped:
            params_of(mine)[index % 3].grad.view(-1)[-1] = bad
        before, grads = support.snapshot(mine), grads_of(mine)
        mine.step()
        assert_same_or_nan(grads_of(mine), grads)
        assert math.isfinite(mine.grad_norm) == (not skipped)
        if skipped:
            support.assert_bits(support.all_state(mine), before)
            assert mine.state == {} or index == 4
            continue
        support.give_same_grads(params_of(mine), params_of(plain))
        plain.step()
        support.assert_bits(support.all_state(mine), support.all_state(plain))
    assert mine.skipped_steps == 3 and plain.skipped_steps == 0


def assert_same_or_nan(got, expected):
    assert all(torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)) for x, y in zip(got, expected, strict=True))


def test_squares_that_overflow_are_finite():
    """float32's do not overflow in double; float64's do, and are still no reason to skip."""
    for dtype, large in ((torch.float32, 1e38), (torch.float64, 1e200)):
        p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        mine = fusestep.optim.SGD([p], lr=1.0, momentum=0.5, skip_nonfinite=True)
        for _ in range(2):
            p.grad = torch.full((3,), large, dtype=dtype)
            mine.step()
        assert mine.skipped_steps == 0 and bool((p != 0).all())


def test_without_skip_nonfinite_what_is_not_finite_goes_in_as_in_torch():
    for bad in (math.inf, math.nan):
        pair = []
        for optimizer in (fusestep.optim.SGD, torch.optim.SGD):
            p = torch.nn.Parameter(torch.zeros(3))
            p.grad = torch.tensor([1.0, bad, 2.0])
            made = optimizer([p], lr=1.0, **({"max_grad_norm": 1.0} if optimizer is fusestep.optim.SGD else {}))
            if optimizer is torch.optim.SGD:
                torch.nn.utils.clip_grad_norm_([p], 1.0)
            made.step()
            pair.append(p.detach())
        assert torch.equal(pair[0].nan_to_num(7.5), pair[1].nan_to_num(7.5))


# ---- what no single pass sees ------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_tied_parameters_have_one_norm(steps):
    """Two parameters in the same memory step one after the other, with the coefficient of all."""
    value = torch.randn(20, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(device.DEFAULT)
    tied = [torch.nn.Parameter(value[:12]), torch.nn.Parameter(value[8:])]
    for p, view in zip(tied, (value[:12], value[8:]), strict=True):
        p.data = view
    twins = torch.nn.Parameter(value.clone())
    mine = fusestep.optim.SGD(tied, lr=1.0, max_grad_norm=0.5, skip_nonfinite=True)
    with torch.no_grad():
        for index in range(steps):
            support.set_grads(tied, seed=index)
            (first, second), norm = exact_clipped([p.grad for p in tied], 0.5)
            twins[:12] -= first
            twins[8:] -= second
            mine.step()
            assert float(mine.grad_norm) == pytest.approx(norm, rel=1e-13)
            tied[1].grad[0] = torch.inf
            mine.step()
    assert (value - twins).abs().max() <= steps * 8 * EPS
    assert mine.skipped_steps == steps
    support.stepped_by_us(mine, steps=2 * steps)


def test_the_norm_of_tied_parameters_is_taken_once(monkeypatch):
    """Also where the step and the division of gradients after it ask for what is not finite; ranks wait for it."""
    value = torch.zeros(6, device=device.DEFAULT)
    tied = [torch.nn.Parameter(value[:4]), torch.nn.Parameter(value[2:])]
    for p, view in zip(tied, (value[:4], value[2:]), strict=True):
        p.data = view
    narrow_state = {"momentum": 0.5, "state_dtype": torch.bfloat16}  # gradients are divided after the step then
    mine = fusestep.optim.SGD(tied, lr=1.0, max_grad_norm=100.0, skip_nonfinite=True, **narrow_state)
    taken = []
    sums = fusestep.gradients._sums
    monkeypatch.setattr(fusestep.gradients, "_sums", lambda pairs: taken.append(0) or sums(pairs))
    for bad in (0.0, torch.inf, 0.0):
        for p in tied:
            p.grad = torch.full_like(p, 4.0) + bad
        mine.grad_scale, mine.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        mine.step()
        assert [p.grad[0].item() for p in tied] == [bad or 1.0] * 2
    assert len(taken) == 3
    assert mine.skipped_steps == 1


@pytest.mark.parametrize("tied", [False, True])
def test_found_inf_and_what_is_found_here(tied):
    """Either skips; GradScaler may have looked before the gradients changed."""
    value = torch.zeros(6)
    parameters = [torch.nn.Parameter(value[:4]), torch.nn.Parameter(value[2:] if tied else torch.zeros(4))]
    for p, view in zip(parameters[: 1 + tied], (value[:4], value[2:]), strict=False):
        p.data = view
    mine = fusestep.optim.SGD(parameters, lr=1.0, skip_nonfinite=True, keep_scaled_grads=True)
    skipped = 0
    for found_inf in (0.0, 1.0):
        for bad in (False, True):
            for p in parameters:
                p.grad = torch.ones(4)
            parameters[1].grad[3] = math.nan if bad else 1.0
            before = [p.detach().clone() for p in parameters]
            mine.grad_scale, mine.found_inf = scalar(1.0), scalar(found_inf)
            mine.step()
            skips = bad or found_inf != 0
            skipped += skips
            assert all(torch.equal(p, b) == skips for p, b in zip(parameters, before, strict=True))
    assert mine.skipped_steps == skipped == 3


def strided(shape):
    whole = torch.zeros(*shape[:-1], 2 * shape[-1])
    return torch.nn.Parameter(whole[..., ::2])


def test_copies_are_part_of_the_norm():
    dense = support.tensors((6,))[0]
    loose = strided((3, 5))
    mine = fusestep.optim.SGD([dense, loose], lr=1.0, max_grad_norm=0.5, skip_nonfinite=True)
    for index in range(3):
        before = [p.detach().clone() for p in (dense, loose)]
        for p in (dense, loose):
            p.grad = torch.full_like(p, float(index + 1))
        (first, second), norm = exact_clipped([dense.grad, loose.grad], 0.5)
        mine.step()
        assert float(mine.grad_norm) == pytest.approx(norm, rel=1e-13)
        assert (before[0] - first - dense).abs().max() <= 4 * EPS and (
            before[1] - second - loose
        ).abs().max() <= 4 * EPS
    loose.grad[0, 0] = math.nan
    mine.step()
    assert mine.skipped_steps == 1


@pytest.mark.parametrize("scaled", [None, False, True], ids=["", "scaled", "scaled, kept"])
def test_parameters_left_to_torch_are_part_of_the_norm(scaled):
    """A sparse gradient: torch's own step sees what the engine's would."""
    table = torch.nn.Embedding(6, 2, sparse=True)
    dense = torch.nn.Parameter(torch.ones(4))
    options = {"keep_scaled_grads": bool(scaled)}
    mine = fusestep.optim.SGD([table.weight, dense], lr=1.0, max_grad_norm=0.5, clip_value=0.3, **options)
    factor = 1.0 if scaled is None else 8.0
    before = [table.weight.detach().clone(), dense.detach().clone()]
    (table(torch.tensor([1, 4, 1])).sum() * factor + (dense * torch.tensor([1.0, 2, 3, 4])).sum() * factor).backward()
    sparse = table.weight.grad
    (first, second), norm = exact_clipped([sparse.to_dense() / factor, dense.grad / factor], 0.5, 0.3)
    if scaled is not None:
        mine.grad_scale, mine.found_inf = scalar(8.0), scalar(0.0)
    with pytest.warns(UserWarning, match="sparse gradients"):
        mine.step()
    assert float(mine.grad_norm) == pytest.approx(norm, rel=1e-13)
    assert table.weight.grad is sparse
    assert (before[0] - first - table.weight).abs().max() <= 4 * EPS
    assert (before[1] - second - dense).abs().max() <= 4 * EPS
    expected = factor if scaled in (None, True) else 1.0
    assert torch.equal(dense.grad, torch.tensor([1.0, 2, 3, 4]) * expected)


def test_differentiable_steps_are_clipped():
    """And autograd sees that they are."""
    leaf = torch.zeros(3, requires_grad=True)
    p = leaf.clone()
    grad = torch.full((3,), 2.0, requires_grad=True)
    mine = fusestep.optim.SGD([p], lr=1.0, differentiable=True, max_grad_norm=0.5)
    p.grad = grad.clone()
    mine.step()
    assert float(p.detach().norm()) == pytest.approx(0.5, rel=1e-5)
    (through,) = torch.autograd.grad(p.sum(), grad)
    assert torch.allclose(through, torch.full((3,), -0.5 / 12**0.5))  # the coefficient is a constant


# ---- the options themselves --------------------------------------------------------------------

WRONG = [
    ({"max_grad_norm": -1.0}, "max_grad_norm must be None or a number >= 0, got -1.0"),
    ({"max_grad_norm": math.nan}, "max_grad_norm must be None or a number >= 0, got nan"),
    ({"max_grad_norm": True}, "max_grad_norm must be None or a number >= 0, got True"),
    ({"clip_value": -0.5}, "clip_value must be None or a number >= 0, got -0.5"),
    ({"clip_value": "1"}, "clip_value must be None or a number >= 0, got '1'"),
]


@pytest.mark.parametrize("wrong, text", WRONG, ids=str)
def test_wrong_limits(name, wrong, text):
    with pytest.raises(fusestep.InvalidArgument, match=text):
        make(name, support.tensors((2,)), **wrong)


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved_whole(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled, saved_whole])
def test_copies_keep_the_options(name, again):
    options = {"max_grad_norm": 0.5, "clip_value": 0.1, "skip_nonfinite": True, "keep_scaled_grads": True}
    mine = make(name, support.tensors((8,)), **options)
    support.set_grads(params_of(mine), seed=0)
    mine.step()
    other = again(mine)
    assert {key: getattr(other, key) for key in options} == options
    for optimizer in (mine, other):
        support.set_grads(params_of(optimizer), seed=1)
        optimizer.step()
    support.assert_bits(support.all_state(other), support.all_state(mine))
    assert other.skipped_steps == 0 and float(other.grad_norm) == float(mine.grad_norm)


def test_groups_and_state_dict_are_torchs_with_limits(name):
    mine = make(name, support.tensors((8,)), max_grad_norm=1.0, skip_nonfinite=True)
    torchs = support.theirs(name)(support.tensors((8,)), lr=1e-2, **SETTINGS[name])
    assert mine.state_dict()["param_groups"][0].keys() == torchs.state_dict()["param_groups"][0].keys()


# ---- what a step leaves behind ------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_not_kept_alive(scaled, refused):
    """The next ones would exist beside them."""
    (p,) = support.tensors((8,))
    optimizer = fusestep.optim.Adam([p])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = scalar(4.0), scalar(0.0)
        optimizer.step()
    if refused:
        optimizer.param_groups[0]["lr"] = "x"
        with pytest.raises(fusestep.InvalidArgument):
            optimizer.step()
    grad = weakref.ref(p.grad)
    optimizer.zero_grad()
    assert grad() is None


def test_parameters_that_have_left_are_not_kept_alive():
    p, q = support.tensors((8,), (8,))
    optimizer = fusestep.optim.Adam([{"params": [p]}, {"params": [q]}])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    del optimizer.param_groups[1], optimizer.state[q]
    left = weakref.ref(q)
    del q
    assert left() is None


@support.needs_grad_dtype
def test_stray_gradients_of_flat_groups_are_not_kept_alive():
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16, device=device.DEFAULT))
    optimizer = fusestep.optim.SGD([p], lr=0.1)
    fusestep.optim.flatten(optimizer)
    p.grad_dtype = None
    for _ in range(2):
        p.grad = torch.ones(8, dtype=torch.float32, device=device.DEFAULT)
        optimizer.grad_scale, optimizer.found_inf = scalar(4.0), scalar(0.0)
        optimizer.step()
    grad = weakref.ref(p.grad)
    p.grad = None
    assert grad() is None


@pytest.mark.parametrize("found", [None, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_skipped_for_its_gradients_leaves_them_scaled(dtype, found):
    (p,) = support.tensors((2,), dtype=dtype)
    optimizer = fusestep.optim.SGD([p], lr=0.1, skip_nonfinite=True)
    for good in (False, True):
        grad = torch.tensor([8.0, 4.0 if good else math.inf], dtype=dtype, device=device.DEFAULT)
        p.grad = grad.clone()
        optimizer.grad_scale, optimizer.found_inf = scalar(4.0), None if found is None else scalar(found)
        optimizer.step()
        assert torch.equal(p.grad, grad / 4 if good else grad)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("listed", [1, 2])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_norm_of_no_gradients_is_zero(listed):
    optimizer = fusestep.optim.SGD(support.tensors((2,)) * listed, lr=0.1, max_grad_norm=1.0)
    assert math.isnan(optimizer.grad_norm)  # of no step
    optimizer.step()
    assert optimizer.grad_norm == torch.nn.utils.clip_grad_norm_(params_of(optimizer), 1.0) == 0
    optimizer.max_grad_norm = None
    optimizer.step()
    assert math.isnan(optimizer.grad_norm)


@pytest.mark.parametrize("first", [False, True], ids=["with state", "without"])
def test_the_norm_of_a_step_that_found_inf_skips(first):
    (p,) = support.tensors((2,))
    optimizer = fusestep.optim.SGD([p], lr=0.1, momentum=0.9, max_grad_norm=1.0)
    if not first:
        p.grad = torch.ones_like(p)
        optimizer.step()
    p.grad = torch.tensor([6.0, 8.0], device=device.DEFAULT)
    optimizer.grad_scale, optimizer.found_inf = scalar(2.0), scalar(1.0)
    optimizer.step()
    assert optimizer.grad_norm == 5.0


def test_limits_are_numbers_whatever_they_were_given_as():
    optimizer = fusestep.optim.SGD(support.tensors((2,)), lr=0.1, max_grad_norm=fractions.Fraction(1, 2), clip_value=1)
    assert (type(optimizer.max_grad_norm), type(optimizer.clip_value)) == (float, float)
    assert (optimizer.max_grad_norm, optimizer.clip_value) == (0.5, 1.0)


def test_conjugates_are_seen_where_memory_is_as_it_was():
    (p,) = support.tensors((3,), dtype=torch.complex64)
    q = torch.nn.Parameter(p.detach().clone())
    mine, torchs = fusestep.optim.SGD([p], lr=0.1, momentum=0.9), torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for index in range(4):
        for one, optimizer in ((p, mine), (q, torchs)):
            one.grad = torch.full_like(one, complex(1, 2))
            if index == 2:
                one.data = one.data.conj()
            if index == 3:
                optimizer.state[one]["momentum_buffer"] = optimizer.state[one]["momentum_buffer"].conj()
            optimizer.step()
    assert torch.allclose(p, q)


@pytest.mark.parametrize("seed", range(12))
def test_the_norm_does_not_depend_on_who_gets_state_in_the_step(seed):
    """Parameters are summed in their order, not those last that Python has looked at."""
    shapes = [(), (4, 5), (33,), (), (4, 5), (100,), (1,), (100,)]
    parameters = support.tensors(*shapes, dtype=torch.float64)
    optimizer = fusestep.optim.Adam(parameters, max_grad_norm=1.0)
    norms = []
    for index in range(3):
        support.set_grads(parameters, seed=seed)
        if index == 0:
            parameters[1].grad = None
        if index == 1:
            parameters[4].grad = parameters[4].grad.t().contiguous().t()
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
    assert norms[1] == norms[2]


@pytest.mark.parametrize("name", ["max_grad_norm", "clip_value", "skip_nonfinite", "keep_scaled_grads"])
def test_settings_of_the_optimizer_are_not_those_of_a_group(name):
    p, q = support.tensors((2,), (2,))
    text = f"group .: {name} is a setting of the whole optimizer"
    with pytest.raises(fusestep.InvalidArgument, match=text):
        fusestep.optim.SGD([{"params": [p], name: 1.0}], lr=0.1)
    optimizer = fusestep.optim.SGD([p], lr=0.1)
    with pytest.raises(fusestep.InvalidArgument, match=text):
        optimizer.add_param_group({"params": [q], name: 1.0})
    assert len(optimizer.param_groups) == 1
