# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""state_dtype, master_weights, rounding: what is stored in which dtype, and that it is kept."""

import copy
import io
import itertools
import pickle

import pytest
import torch

import device
import fusestep
import support
from fusestep.convert import convert

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = ((33, 7), (5,), (4100,))
RULES = {**support.FULLEST, "SGD plain": {}}
MASTER = "master_weight"

# dtype of the parameter, options: every layout, but for the gradient's dtype.
LAYOUTS = {
    "float32, state bf16": (F32, {"state_dtype": BF16}),
    "bf16": (BF16, {}),
    "bf16, state float32": (BF16, {"state_dtype": F32}),
    "bf16, master": (BF16, {"master_weights": True}),
    "bf16, state float32, master": (BF16, {"state_dtype": F32, "master_weights": True}),
    "fp16": (F16, {}),
    "fp16, state float32": (F16, {"state_dtype": F32}),
    "fp16, master": (F16, {"master_weights": True}),
    "fp16, state float32, master": (F16, {"state_dtype": F32, "master_weights": True}),
}
STOCHASTIC = {
    "float32, state bf16": (F32, {"state_dtype": BF16, "rounding": "stochastic", "seed": 5}),
    "bf16": (BF16, {"rounding": "stochastic", "seed": 5}),
    "bf16, state float32": (BF16, {"state_dtype": F32, "rounding": "stochastic", "seed": 5}),
}
EVERY = {**LAYOUTS, **{f"{case}, stochastic": given for case, given in STOCHASTIC.items()}}


def make(rule, parameters, **options):
    return support.ours(rule.split()[0])(parameters, lr=1e-2, **RULES[rule], **options)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def grads_for(parameters, seed, dtype=None):
    """Multiples of 2^-6 up to 4: the same number in every dtype."""
    random = torch.Generator("cpu").manual_seed(seed)
    for p in parameters:
        grad = torch.randint(-255, 256, p.shape, generator=random, device="cpu") / 64
        if dtype is not None:
            p.grad_dtype = dtype
        p.grad = device.beside(p, grad.to(dtype or p.dtype))


def train(optimizer, steps, first=0, dtype=None):
    for index in range(first, first + steps):
        grads_for(params_of(optimizer), index, dtype)
        optimizer.step()


# ---- against float32 ---------------------------------------------------------------------------


class Reference:
    """A float32 run, of which values and slots are rounded to what is stored after each step."""

    def __init__(self, rule, parameters, options):
        self.dtype = parameters[0].dtype
        self.master = options.get("master_weights", False)
        self.state_dtype = options.get("state_dtype") or self.dtype
        self.wide = [torch.nn.Parameter(p.detach().float()) for p in parameters]
        self.optimizer = make(rule, self.wide)

    def step(self, seed):
        grads_for(self.wide, seed)
        self.optimizer.step()
        for p in self.wide:
            for name, slot in self.optimizer.state.get(p, {}).items():
                if name != "step":
                    slot.copy_(slot.to(self.state_dtype))
            if not self.master:
                p.data.copy_(p.data.to(self.dtype))


def assert_follows(mine, reference):
    support.stepped_by_us(mine)
    for p, wide in zip(params_of(mine), reference.wide, strict=True):
        assert torch.equal(p.detach(), wide.detach().to(p.dtype))
        state, expected = mine.state.get(p, {}), reference.optimizer.state.get(wide, {})
        assert set(state) == set(expected) | ({MASTER} if reference.master else set())
        for name, slot in expected.items():
            if name == "step":
                assert state[name] == slot
                continue
            assert state[name].dtype == reference.state_dtype
            assert torch.equal(state[name].float(), slot)
        if reference.master:
            assert state[MASTER].dtype == F32 and torch.equal(state[MASTER], wide)
            assert state[MASTER].stride() == p.stride()


@pytest.mark.parametrize(
    "grad_dtype", [None, pytest.param(F32, marks=support.needs_grad_dtype)], ids=["", "gradients float32"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_every_layout_is_float32_rounded_where_it_is_stored(rule, layout, grad_dtype):
    """Bit for bit; with master weights they are the float32 run's parameters."""
    dtype, options = LAYOUTS[layout]
    parameters = support.tensors(*SHAPES, dtype=dtype)
    reference = Reference(rule, parameters, options)
    mine = make(rule, parameters, **options)
    for index in range(6):
        train(mine, 1, first=index, dtype=grad_dtype)
        reference.step(index)
        assert_follows(mine, reference)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_memory(layout):
    """Transposed, strided and empty parameters."""
    dtype, options = LAYOUTS[layout]
    values = [torch.randn(6, 4).t(), torch.randn(5, 8)[:, ::2], torch.empty(0, 3)]
    parameters = [torch.nn.Parameter(torch.empty_like(v, dtype=dtype).copy_(v)) for v in values]
    parameters[1] = torch.nn.Parameter(torch.zeros(5, 8, dtype=dtype)[:, ::2].copy_(values[1]))
    reference = Reference("Adam", parameters, options)
    mine = make("Adam", parameters, **options)
    for index in range(3):
        train(mine, 1, first=index)
        reference.step(index)
        for p, wide in zip(parameters, reference.wide, strict=True):
            assert torch.equal(p.detach(), wide.detach().to(dtype))


def test_groups_override_the_optimizer():
    first, second, third = support.tensors((4,), (4,), (4,), dtype=BF16)
    groups = [{"params": [first]}, {"params": [second], "master_weights": False, "state_dtype": BF16}]
    mine = fusestep.optim.Adam(groups, state_dtype=F32, master_weights=True)
    mine.add_param_group({"params": [third]})
    train(mine, 1)
    assert mine.state[first]["exp_avg"].dtype == mine.state[third]["exp_avg"].dtype == F32
    assert mine.state[second]["exp_avg"].dtype == BF16
    assert [MASTER in mine.state[p] for p in (first, second, third)] == [True, False, True]


def test_one_group_alone_may_have_options():
    first, second = support.tensors((4,), (4,), dtype=BF16)
    mine = fusestep.optim.SGD([{"params": [first]}, {"params": [second], "master_weights": True}], lr=0.1)
    train(mine, 1)
    assert mine.state[first] == {} and list(mine.state[second]) == [MASTER]
    assert "master_weights" not in mine.param_groups[0] and "master_weights" not in mine.defaults


def test_parameters_of_other_dtypes_have_no_master_weights():
    half, single, double = (support.tensors((4,), dtype=dtype)[0] for dtype in (F16, F32, F64))
    mine = fusestep.optim.Adam([half, single, double], master_weights=True)
    train(mine, 2)
    assert [MASTER in mine.state[p] for p in (half, single, double)] == [True, False, False]


def test_without_options_everything_is_torchs(name):
    """Keys of groups, of defaults and of state."""
    mine = support.ours(name)(support.tensors((4,), dtype=BF16))
    torchs = support.theirs(name)(support.tensors((4,), dtype=BF16))
    for optimizer in (mine, torchs):
        support.set_grads(params_of(optimizer), seed=0)
        optimizer.step()
    added = mine._missing_keys.keys()  # where torch is older than 2.7
    assert mine.param_groups[0].keys() - added == torchs.param_groups[0].keys() - added
    assert mine.defaults.keys() - added == torchs.defaults.keys() - added
    own, theirs = (optimizer.state.get(params_of(optimizer)[0], {}) for optimizer in (mine, torchs))
    assert set(own) == {key for key, value in theirs.items() if value is not None}


def test_gradscaler_divides_beside_master_weights(monkeypatch):
    mine = make("AdamW", support.tensors(*SHAPES, dtype=BF16), state_dtype=F32, master_weights=True)
    plain = copy.deepcopy(mine)
    for index in range(4):
        grads_for(params_of(mine), index)
        grads_for(params_of(plain), index)
        skipped = index in (0, 2)
        for p in params_of(mine):
            p.grad.mul_(16)
        before = support.snapshot(mine)
        mine.grad_scale, mine.found_inf = torch.tensor(16.0), torch.tensor(float(skipped))
        mine.step()
        if skipped:
            support.assert_bits(support.all_state(mine), before)
            continue
        plain.step()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params_of(mine), params_of(plain), strict=True))
        monkeypatch.setattr(fusestep.optim, "unscale", None)  # not used from now on
    support.assert_bits(support.all_state(mine), support.all_state(plain))


# ---- stochastic rounding -----------------------------------------------------------------------


def neighbours(exact):
    """The bf16 numbers at or next to float32 ones."""
    below = (exact.view(torch.int32) & -65536).view(F32)
    above = ((exact.view(torch.int32) & -65536) + 65536).view(F32)
    return torch.where(below == exact, exact, below), torch.where(below == exact, exact, above)


def test_stochastic_rounding_is_to_a_neighbour_and_unbiased():
    """A step of 1/8 of the distance of neighbours moves one element in eight, within 5 deviations."""
    count = 1 << 16
    p = torch.nn.Parameter(torch.ones(count, dtype=BF16))
    mine = fusestep.optim.SGD([p], lr=1.0, rounding="stochastic", seed=3)
    p.grad = torch.full((count,), -1 / 1024, dtype=BF16)  # ones are 2^-7 apart
    mine.step()
    moved = (p == 1 + 2.0**-7).sum().item()
    assert ((p == 1) | (p == 1 + 2.0**-7)).all()
    assert abs(moved - count / 8) < 5 * (count * 7 / 64) ** 0.5


@pytest.mark.parametrize("layout", STOCHASTIC)
@pytest.mark.parametrize("rule", RULES)
def test_stochastic_steps_are_near_the_exact_ones(rule, layout):
    """One step from equal values: everything stored in bf16 is a neighbour of what float32 gives."""
    dtype, options = STOCHASTIC[layout]
    parameters = support.tensors(*SHAPES, dtype=dtype)
    reference = Reference(rule, parameters, {"state_dtype": F32, "master_weights": True})
    mine = make(rule, parameters, **options)
    train(mine, 1)
    reference.step(0)
    for p, wide in zip(parameters, reference.wide, strict=True):
        exact = {"value": wide.detach(), **reference.optimizer.state.get(wide, {})}
        got = {"value": p.detach(), **mine.state.get(p, {})}
        assert ("step" in got) and got["step"] == 1
        for name in exact.keys() - {"step"}:
            below, above = neighbours(exact[name])
            is_neighbour = (got[name].float() == below) | (got[name].float() == above)
            assert is_neighbour.all() if got[name].dtype == BF16 else torch.equal(got[name], exact[name])


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64], ids=str)
def test_state_may_be_asked_for_in_the_parameters_own_dtype(dtype):
    (p,) = support.tensors((4,), dtype=dtype)
    optimizer = fusestep.optim.Adam([p], state_dtype=dtype)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == dtype


def test_a_master_weight_that_is_left_is_not_rounded_stochastically():
    p = torch.nn.Parameter(torch.ones(4, dtype=BF16, device=device.DEFAULT))
    optimizer = fusestep.optim.SGD([p], lr=1.0, master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0].update(master_weights=False, rounding="stochastic")
    before = p.detach().clone()
    with pytest.raises(fusestep.InvalidArgument, match="parameter 0 .* has a master weight in its state"):
        optimizer.step()
    assert torch.equal(p, before)
    del optimizer.state[p]["master_weight"]
    optimizer.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("added", [False, True])
def test_parameters_of_one_name_are_not_rounded_alike(added):
    a, b = (torch.nn.Parameter(torch.ones(64, dtype=BF16, device=device.DEFAULT)) for _ in range(2))
    groups = [{"params": [("w", a)]}, {"params": [("w", b)]}]
    text = "group 1, parameter 'w': another has this name and seed too"
    if added:
        optimizer = fusestep.optim.SGD(groups[:1], lr=1e-3, rounding="stochastic")
        with pytest.raises(fusestep.InvalidArgument, match=text):
            optimizer.add_param_group(groups[1])
        assert len(optimizer.param_groups) == 1
    else:
        with pytest.raises(fusestep.InvalidArgument, match=text):
            fusestep.optim.SGD(groups, lr=1e-3, rounding="stochastic")
    groups = [{"params": [("w", a)]}, {"params": [("w", b)], "seed": 1}]
    optimizer = fusestep.optim.SGD(groups, lr=1e-3, rounding="stochastic")
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert not torch.equal(a, b)
    optimizer.param_groups[1]["seed"] = 0
    with pytest.raises(fusestep.InvalidArgument, match=text):
        optimizer.step()
    optimizer.param_groups[1]["param_names"] = ["v"]
    optimizer.step()
    optimizer.param_groups[1]["param_names"] = ["w"]
    with pytest.raises(fusestep.InvalidArgument, match=text):
        optimizer.step()
    with pytest.raises(fusestep.InvalidArgument, match="group 0, parameter 'w': another"):
        fusestep.optim.SGD([("w", a), ("w", b)], lr=1e-3, rounding="stochastic")


def test_names_may_be_the_same_where_nothing_is_rounded():
    a, b = support.tensors((4,), (4,))
    optimizer = fusestep.optim.SGD([{"params": [("w", a)]}, {"params": [("w", b)]}], lr=0.1, rounding="stochastic")
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()


def test_a_parameter_that_became_float16_is_not_left_to_torch_with_stochastic_rounding():
    (p,) = support.tensors((4,))
    optimizer = fusestep.optim.SGD([p], lr=0.1, rounding="stochastic")
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data = p.data.half()
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(fusestep.InvalidArgument, match="stochastic"):
        optimizer.step()
    assert torch.equal(p, before)


def stochastic_run(seed=7, names=("a", "b"), split=False, order=(0, 1), threads=None):
    parameters = support.tensors((300,), (41, 5), dtype=BF16)
    named = [(names[i], parameters[i]) for i in order]
    groups = [{"params": [pair]} for pair in named] if split else named
    mine = fusestep.optim.SGD(groups, lr=0.01, rounding="stochastic", seed=seed)
    if threads:
        fusestep.set_num_threads(threads)
    for index in range(3):
        grads_for(parameters, index)
        mine.step()
    return torch.cat([p.detach().flatten() for p in parameters])


def test_random_bits_are_a_function_of_seed_name_step_and_element():
    expected = stochastic_run()
    before = fusestep.num_threads()
    try:
        for same in ({}, {"split": True}, {"order": (1, 0)}, {"threads": 1}, {"threads": 3}):
            assert torch.equal(stochastic_run(**same), expected), same
    finally:
        fusestep.set_num_threads(before)
    for other in ({"seed": 8}, {"names": ("a", "c")}):
        assert not torch.equal(stochastic_run(**other), expected), other


# ---- saved and restored ------------------------------------------------------------------------


def by_dict(optimizer, fresh, _):
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh


def by_torch_file(optimizer, fresh, _):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def by_file(optimizer, fresh, folder):
    optimizer.save(folder / "state.safetensors")
    fresh.load(folder / "state.safetensors")
    return fresh


def by_dict_by_name(optimizer, fresh, _):
    fresh.load(optimizer.state_dict())
    return fresh


def by_conversion(optimizer, fresh, folder):
    """From a file of fusestep to one of torch.save."""
    optimizer.save(folder / "state.safetensors")
    convert(str(folder / "state.safetensors"), str(folder / "state.pt"))
    fresh.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return fresh


def by_copy(optimizer, *_):
    return copy.deepcopy(optimizer)


def by_pickle(optimizer, *_):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("way", [by_dict, by_torch_file, by_file, by_dict_by_name, by_conversion, by_copy, by_pickle])
@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_uninterrupted_one(rule, layout, way, tmp_path):
    """To the last bit; a fresh optimizer without options gets them from what was saved."""
    dtype, options = EVERY[layout]
    whole = make(rule, support.tensors(*SHAPES, dtype=dtype), **options)
    train(whole, 3)
    for fresh_options in (options, {}):
        fresh = make(rule, support.twins(params_of(whole)), **fresh_options)
        resumed = way(whole, fresh, tmp_path)
        for key in options:
            assert resumed.param_groups[0][key] == options[key]
        continued = copy.deepcopy(whole)
        train(continued, 3, first=3)
        train(resumed, 3, first=3)
        support.assert_bits(support.all_state(resumed), support.all_state(continued))
        support.stepped_by_us(resumed)


# Saved by, loaded into: what becomes of the state. None: as it was.
LOADS = {
    "torch's bf16 into float32 state": (BF16, {}, {"state_dtype": F32}, F32),
    "float32 state into torch's": (BF16, {"state_dtype": F32}, {}, F32),
    "float32 state into bf16 state": (BF16, {"state_dtype": F32}, {"state_dtype": BF16}, F32),
    "torch's fp16 into float32 state": (F16, {}, {"state_dtype": F32}, F32),
    "torch's float32 into bf16 state": (F32, {}, {"state_dtype": BF16}, F32),
    "bf16 state into torch's": (F32, {"state_dtype": BF16}, {}, BF16),
}


@pytest.mark.parametrize("way", [by_dict, by_torch_file, by_file, by_dict_by_name])
@pytest.mark.parametrize("case", LOADS)
def test_state_between_options(case, way, tmp_path):
    """Values stay: float32 is never rounded, and becomes what is exact."""
    dtype, before, here, expected = LOADS[case]
    saved = make("Adam", support.tensors(*SHAPES, dtype=dtype), **before)
    train(saved, 2)
    if before == {"state_dtype": F32} and here == {"state_dtype": BF16}:
        expected_option = F32  # the saved one is restored
    else:
        expected_option = {**here, **before}["state_dtype"]
    loaded = way(saved, make("Adam", support.twins(params_of(saved)), **here), tmp_path)
    assert loaded.param_groups[0]["state_dtype"] == expected_option
    for p, q in zip(params_of(saved), params_of(loaded), strict=True):
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            got, was = loaded.state[q][name], saved.state[p][name]
            assert got.dtype == expected and torch.equal(got.float(), was.float())
    train(loaded, 2)
    support.stepped_by_us(loaded)


@pytest.mark.parametrize("way", [by_dict, by_torch_file, by_file, by_dict_by_name])
def test_master_weights_that_were_not_saved_are_made_of_the_parameters(way, tmp_path):
    saved = make("Adam", support.tensors(*SHAPES, dtype=BF16))
    train(saved, 2)
    loaded = way(saved, make("Adam", support.twins(params_of(saved)), master_weights=True), tmp_path)
    assert loaded.param_groups[0]["master_weights"] is True
    before = [p.detach().clone() for p in params_of(loaded)]
    reference = copy.deepcopy(loaded)
    for group in reference.param_groups:
        group["params"] = [torch.nn.Parameter(p.float()) for p in before]
    train(loaded, 1)
    assert all(MASTER in loaded.state[p] for p in params_of(loaded))


@pytest.mark.parametrize("way", [by_dict, by_torch_file])
def test_torchs_classes_load_and_go_on(way, tmp_path):
    """torch rounds what it does not know, and keeps the names; ours goes on from there."""
    mine = make("AdamW", support.tensors(*SHAPES, dtype=BF16), state_dtype=F32, master_weights=True)
    train(mine, 2)
    torchs = torch.optim.AdamW(support.twins(params_of(mine)), amsgrad=True)
    way(mine, torchs, tmp_path)
    support.set_grads(params_of(torchs), seed=0)
    torchs.step()
    back = way(torchs, make("AdamW", support.twins(params_of(torchs))), tmp_path)
    assert back.param_groups[0]["master_weights"] is True


def test_what_is_kept_of_this_program(tmp_path):
    """what="state" leaves the options here, and a master weight that was saved is used."""
    saved = make("Adam", support.tensors((6,), dtype=BF16), state_dtype=F32, master_weights=True)
    train(saved, 2)
    saved.save(tmp_path / "state.safetensors")
    loaded = make("Adam", support.twins(params_of(saved)))
    loaded.load(tmp_path / "state.safetensors", what="state")
    assert "master_weights" not in loaded.param_groups[0]
    for optimizer in (saved, loaded):
        train(optimizer, 3, first=2)
    support.assert_bits(support.all_state(loaded), support.all_state(saved))


def test_a_dict_whose_options_do_not_fit_changes_nothing():
    saved = make("SGD plain", support.tensors((6,), dtype=BF16), rounding="stochastic")
    train(saved, 1)
    mine = make("SGD plain", support.tensors((6,), dtype=F16))
    train(mine, 1)
    before, groups = support.snapshot(mine), copy.deepcopy(mine.state_dict()["param_groups"])
    with pytest.raises(fusestep.InvalidArgument, match=r"parameter 0 of shape .*float16: rounding='stochastic'"):
        mine.load_state_dict(saved.state_dict())
    support.assert_bits(support.all_state(mine), before)
    assert mine.state_dict()["param_groups"] == groups


def test_arrays_read_master_weights_of_torch(tmp_path):
    """The file is one for both; a float16 array gets the master weight of a float16 tensor."""
    numpy = pytest.importorskip("numpy")
    p = torch.nn.Parameter(torch.linspace(-1, 1, 9, device="cpu").half())
    saved = fusestep.optim.Adam([("w", p)], state_dtype=F32, master_weights=True)
    for _ in range(2):
        p.grad = torch.full_like(p, 0.25)
        saved.step()
    saved.save(tmp_path / "state.safetensors", values=True)
    w = numpy.zeros(9, numpy.float16)
    arrays = fusestep.Optimizer("Adam", {"w": w}, master_weights=True)
    arrays.load(tmp_path / "state.safetensors")
    assert set(arrays.slots("w")) == {"exp_avg", "exp_avg_sq", MASTER}
    p.grad = torch.full_like(p, 0.25)
    saved.step()
    arrays.step({"w": numpy.full(9, 0.25, numpy.float16)})
    assert (arrays.slots("w")[MASTER] == saved.state[p][MASTER].numpy()).all() and (w == p.detach().numpy()).all()


# ---- users who write to parameters -------------------------------------------------------------


def test_refresh_master_weights():
    mine = make("Adam", support.tensors(*SHAPES, dtype=BF16), master_weights=True)
    mine.refresh_master_weights()  # there are none yet
    train(mine, 2)
    with torch.no_grad():
        for p in params_of(mine):
            p.fill_(2.0)
    train(copy.deepcopy(mine), 1)
    mine.refresh_master_weights()
    assert all((mine.state[p][MASTER] == 2).all() for p in params_of(mine))
    grads_for(params_of(mine), 5)
    mine.step()
    assert all(((p - 2).abs() < 0.1).all() for p in params_of(mine))


def test_a_skipped_first_step_makes_no_master_weight():
    mine = make("SGD plain", support.tensors((4,), dtype=BF16), master_weights=True, skip_nonfinite=True)
    params_of(mine)[0].grad = torch.full((4,), torch.inf, dtype=BF16)
    mine.step()
    assert mine.state == {} and mine.skipped_steps == 1


def test_summary_shows_the_slot():
    pytest.importorskip("rich")
    mine = make("AdamW", support.tensors((100,), dtype=BF16), master_weights=True, state_dtype=F32)
    train(mine, 1)
    summary = mine.summary()
    assert summary.rows[0]["state"] == {**dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), 400), MASTER: 400}
    text = " ".join(str(summary).split())  # a narrow table breaks its lines
    assert "master_weight 400 B" in text and "master_weights True" in text.replace("=", " ")


# ---- errors ------------------------------------------------------------------------------------

WRONG = [
    (F32, {"state_dtype": "float16"}, "state_dtype must be None or a dtype of torch, got 'float16'"),
    (F32, {"state_dtype": F16}, "state_dtype=torch.float16 is not to be had, torch.float32 or torch.bfloat16 is"),
    (F32, {"state_dtype": "float32"}, "state_dtype must be .*, got 'float32'"),
    (BF16, {"master_weights": 2}, "master_weights must be True or False, got 2"),
    (BF16, {"rounding": "up"}, "rounding must be 'nearest' or 'stochastic', got 'up'"),
    (BF16, {"rounding": "stochastic", "seed": -1}, "seed must be an integer from 0 to .*, got -1"),
    (BF16, {"rounding": "stochastic", "seed": 0.5}, "seed must be an integer"),
    (BF16, {"rounding": "stochastic", "master_weights": True}, "without master weights"),
    (
        F16,
        {"state_dtype": BF16},
        "'w' of torch.float16: state_dtype=torch.bfloat16 .* torch.float16 or torch.float32 is",
    ),
    (F64, {"state_dtype": F32}, "'w' of torch.float64: state_dtype=torch.float32 .* torch.float64 is"),
    (torch.complex64, {"state_dtype": F32}, "'w' of torch.complex64: state_dtype=torch.float32"),
    (F16, {"rounding": "stochastic"}, "'w' of torch.float16: rounding='stochastic' is for torch.bfloat16"),
    (BF16, {"master_weights": True, "differentiable": True}, "master_weights: not with differentiable=True"),
]


@pytest.mark.parametrize("through", ["constructor", "group", "add_param_group"])
@pytest.mark.parametrize("dtype, wrong, text", WRONG, ids=lambda value: str(value)[:40])
def test_refusals(dtype, wrong, text, through):
    (p,), (other,) = support.tensors((2, 3), dtype=dtype), support.tensors((2,))
    if through == "constructor":
        with pytest.raises(fusestep.InvalidArgument, match=text):
            fusestep.optim.SGD([("w", p)], lr=0.1, **wrong)
    elif through == "group":
        with pytest.raises(fusestep.InvalidArgument, match=text):
            fusestep.optim.SGD([{"params": [("w", p)], **wrong}], lr=0.1)
    else:
        mine = fusestep.optim.SGD([("other", other)], lr=0.1)
        with pytest.raises(fusestep.InvalidArgument, match=text):
            mine.add_param_group({"params": [("w", p)], **wrong})
        assert len(mine.param_groups) == 1


def test_what_torchs_step_does_not_do_is_refused():
    """Sparse gradients, with an option that has an effect on their parameter."""
    for dtype, options, refused in [
        (BF16, {"master_weights": True}, "has master weights"),
        (BF16, {"rounding": "stochastic"}, "has stochastic rounding"),
        (F32, {"master_weights": True}, None),
    ]:
        table = torch.nn.Embedding(4, 2, sparse=True, dtype=dtype)
        mine = fusestep.optim.SGD(table.parameters(), lr=0.1, **options)
        table(torch.tensor([1])).sum().backward()
        before = table.weight.detach().clone()
        if refused is None:
            with pytest.warns(UserWarning, match="sparse"):
                mine.step()
            continue
        with pytest.raises(fusestep.InvalidArgument, match=refused):
            mine.step()
        assert torch.equal(table.weight, before)


@support.needs_grad_dtype
def test_half_gradients_beside_float32_are_torchs_affair():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad_dtype = BF16
    p.grad = torch.ones(3, dtype=BF16)
    mine = fusestep.optim.SGD([p], lr=0.5)
    with pytest.warns(UserWarning, match="another dtype or shape"):
        mine.step()
    assert torch.equal(p.detach(), torch.full((3,), 0.5))


@pytest.mark.parametrize("layout, rule", list(itertools.product(("bf16, master", "bf16, state float32"), RULES)))
def test_torch_reads_through_methods(layout, rule):
    """Where torch has no C interface."""
    dtype, options = LAYOUTS[layout]
    mine = make(rule, support.tensors(*SHAPES, dtype=dtype), **options)
    other = support.through_methods(copy.deepcopy(mine))
    for optimizer in (mine, other):
        train(optimizer, 3)
    support.assert_bits(support.all_state(other), support.all_state(mine))
