# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""A step that is refused has not happened: it leaves nothing behind, and is made as if it were the first."""

import collections
import copy
import pickle

import pytest
import torch

import device
import fusestep
import support

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def half_gradient(optimizer):
    """float16 beside bfloat16."""
    p = params_of(optimizer)[-1]
    good = p.grad
    p.grad_dtype = None
    p.grad = good.to(F16)

    def undo():
        p.grad = good

    return undo


def sparse_gradient(optimizer):
    p = params_of(optimizer)[-1]
    good = p.grad
    p.grad = good.to_sparse()

    def undo():
        p.grad = good

    return undo


def setting(name, value):
    def spoil(optimizer):
        group = optimizer.param_groups[-1]
        before = dict(group)
        group[name] = value

        def undo():
            group.clear()
            group.update(before)

        return undo

    return spoil


def differentiable(optimizer):
    optimizer.defaults["differentiable"] = True  # torch goes by that
    undo_group = setting("differentiable", True)(optimizer)

    def undo():
        optimizer.defaults["differentiable"] = False
        undo_group()

    return undo


def spoilt_state(of_parameter):
    """Entries for the last parameter's state, over those that it has."""

    def spoil(optimizer):
        p = params_of(optimizer)[-1]
        before = dict(optimizer.state[p]) if p in optimizer.state else None
        optimizer.state[p] = {**(before or {}), **of_parameter(p)}

        def undo():
            if before is None:
                del optimizer.state[p]
            else:
                optimizer.state[p] = before

        return undo

    return spoil


state_of_another_shape = spoilt_state(lambda p: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(7, dtype=p.dtype)})
expanded_state = spoilt_state(lambda p: {"momentum_buffer": torch.zeros((), device=p.device).expand(p.shape)})


Case = collections.namedtuple("Case", "rule dtype options spoil error text", defaults=({}, None, None, None))
WRONG = fusestep.InvalidArgument
# What is wrong with the second group, or its last parameter, and what is said.
CASES = {
    "gradient beside float32 state": Case(
        "SGD",
        BF16,
        {"state_dtype": F32},
        half_gradient,
        WRONG,
        r"group 1, parameter 1 of shape 5 of torch.bfloat16: its gradient must be torch.bfloat16 or torch.float32, "
        r"got torch.float16",
    ),
    "gradient beside master weights": Case(
        "Adam", BF16, {"master_weights": True}, half_gradient, WRONG, "group 1, parameter 1 .*, got torch.float16"
    ),
    "gradient, torch's own step": Case(
        "Adam", BF16, {}, half_gradient, WRONG, "group 1, parameter 1 .*: its gradient must be .*, got torch.float16"
    ),
    "sparse gradient": Case("Adam", F32, {}, sparse_gradient, RuntimeError, "does not support sparse gradients"),
    "sparse gradient, weight decay": Case("SGD", F32, {"weight_decay": 0.1}, sparse_gradient, RuntimeError),
    "sparse gradient, master weights": Case(
        "SGD",
        BF16,
        {"master_weights": True},
        sparse_gradient,
        WRONG,
        r"group 1, parameter 1 of shape 5 of torch.bfloat16 has master weights, but parameters with sparse",
    ),
    "state": Case(
        "Adam",
        BF16,
        {"state_dtype": F32},
        state_of_another_shape,
        WRONG,
        r"its exp_avg must be of shape 5, got 7",
    ),
    "state, torch's own step": Case(
        "Adam", F32, {}, state_of_another_shape, WRONG, "group 1, parameter 1 .*: its exp_avg must be of shape 5, got 7"
    ),
    "expanded state": Case(
        "SGD", F32, {}, expanded_state, WRONG, "group 1, parameter 1 .*: momentum_buffer is expanded"
    ),
    "stochastic and master weights": Case(
        "Adam",
        BF16,
        {"rounding": "stochastic"},
        setting("master_weights", True),
        WRONG,
        "group 1: rounding='stochastic' is for parameters without master weights",
    ),
    "seed": Case(
        "SGD", BF16, {"rounding": "stochastic"}, setting("seed", -5), WRONG, "group 1: seed must be .*, got -5"
    ),
    "seed of text": Case(
        "SGD", BF16, {"rounding": "stochastic"}, setting("seed", "a"), WRONG, "group 1: seed must be .*, got 'a'"
    ),
    "rounding": Case("SGD", F32, {}, setting("rounding", "foo"), WRONG, "group 1: rounding must be .*, got 'foo'"),
    "rounding of float16": Case(
        "SGD", F16, {}, setting("rounding", "stochastic"), WRONG, "group 1, parameter 0 .* is for torch.bfloat16"
    ),
    "state_dtype": Case(
        "Adam", F16, {}, setting("state_dtype", BF16), WRONG, "group 1, parameter 0 .*: state_dtype=torch.bfloat16"
    ),
    "lr": Case("Adam", F32, {}, setting("lr", "x"), WRONG, "group 1: lr must be a number, got 'x'"),
    "weight decay": Case(
        "SGD", F32, {}, setting("weight_decay", None), WRONG, "group 1: weight_decay must be a number, got None"
    ),
    "betas": Case(
        "Adam", F32, {}, setting("betas", (0.9,)), WRONG, r"group 1: betas must be two numbers, got \(0.9,\)"
    ),
    "a beta": Case(
        "Adam", F32, {}, setting("betas", (0.9, None)), WRONG, r"group 1: betas must be two numbers, got \(0.9, None\)"
    ),
    "a leaf, differentiable": Case(
        "Adam", F32, {}, differentiable, WRONG, "group 1, parameter 0 .*: a leaf .* in-place"
    ),
}
AROUND = {
    "": {},
    "scaled": {},
    "scaled, kept": {"keep_scaled_grads": True},
    "clipped": {"max_grad_norm": 0.5},
    "scaled, clipped": {"max_grad_norm": 0.5, "clip_value": 0.25, "skip_nonfinite": True},
    "flat": {},
}


def make(case, around):
    first, second, third = (
        torch.nn.Parameter(p.detach().to(case.dtype)) for p in support.tensors((33, 7), (3,), (5,), seed=1)
    )
    settings = {**support.FULLEST[case.rule], **case.options, **AROUND[around]}
    mine = support.ours(case.rule)([{"params": [first]}, {"params": [second, third]}], lr=0.1, **settings)
    if around == "flat":
        fusestep.optim.flatten(mine)
    return mine


def give_gradients(optimizer, index, around):
    support.set_grads(params_of(optimizer), seed=index, scale=64.0 if "scaled" in around else 1.0)
    if "scaled" in around:
        optimizer.grad_scale = torch.tensor(64.0, device=device.DEFAULT)
        optimizer.found_inf = torch.tensor(0.0, device=device.DEFAULT)


def everything(optimizer):
    """What a step may change: bits, which tensors they are in, and what autograd counts."""
    found = {"state of": list(optimizer.state), "skipped": optimizer.skipped_steps}
    for index, p in enumerate(params_of(optimizer)):
        grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
        found[index] = [p.tolist(), p._version, grad.tolist()]
        if not optimizer.flat_buffers:  # where a step begins with copying gradients to their places
            found[index] += [id(p.grad), p.grad._version]
        own = optimizer.state.get(p, {})
        found[index, "state"] = {
            name: (id(value), value.tolist(), value._version) if torch.is_tensor(value) else value
            for name, value in own.items()
        }
    return found


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=support.needs_grad_dtype) if "gradient" in name else name for name in CASES]
)
@pytest.mark.parametrize("refused_at", [0, 2])
def test_a_refused_step_has_not_happened(name, around, refused_at):
    """Nothing has changed after it; and once what was wrong is gone, the run is the one without it."""
    case = CASES[name]
    mine, plain = make(case, around), make(case, around)
    for index in range(4):
        give_gradients(mine, index, around)
        give_gradients(plain, index, around)
        if index == refused_at:
            undo = case.spoil(mine)
            before = everything(mine)
            for _ in range(2):
                with pytest.raises(case.error, match=case.text):
                    mine.step()
                assert everything(mine) == before
            undo()
        mine.step()
        plain.step()
        support.assert_bits(support.all_state(mine), support.all_state(plain))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params_of(mine), params_of(plain), strict=True))


@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_scale_is_taken_back_by_whom_it_was_given(with_scaler):
    """GradScaler leaves its own behind if a step raises, and would multiply it by the next one."""
    (p,) = support.tensors((3,))
    mine = fusestep.optim.SGD([p], lr=1.0)
    scaler = support.scaler(1024.0)
    scaler.scale(torch.ones(1, device=device.DEFAULT))
    p.grad = torch.full_like(p, 1024.0)
    before = p.detach().clone()
    for wrong in (True, False):
        mine.param_groups[0]["lr"] = "x" if wrong else 1.0
        if not with_scaler and wrong:
            mine.grad_scale, mine.found_inf = torch.tensor(1024.0, device=device.DEFAULT), None
        step = (lambda: scaler.step(mine)) if with_scaler else mine.step
        if wrong:
            with pytest.raises(WRONG):
                step()
    step()
    assert torch.equal(p.detach(), before - 1) and (p.grad == 1).all()


# ---- memory ------------------------------------------------------------------------------------


def failing(function, calls):
    """The function, which has no memory from that call on."""
    left = [calls]

    def called(*args, **kwargs):
        if left[0] == 0:
            raise torch.OutOfMemoryError("no memory")
        left[0] -= 1
        return function(*args, **kwargs)

    return called


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("rule", support.FULLEST)
def test_a_step_without_memory_for_its_state_has_not_happened(rule, around, monkeypatch):
    """Part of it was made. In a flat group it is found in the buffer again."""
    case = Case(rule, BF16, {"state_dtype": F32, "master_weights": True})
    mine, plain = make(case, around), make(case, around)
    for optimizer in (mine, plain):
        give_gradients(optimizer, 0, around)
    before = everything(mine)
    for calls in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(fusestep.optim, "_complete", failing(fusestep.optim._complete, calls))
            with pytest.raises(torch.OutOfMemoryError):
                mine.step()
        assert everything(mine) == before
    with monkeypatch.context() as patch:  # and in the midst of a parameter's
        patch.setattr(fusestep.precision, "new_master", failing(fusestep.precision.new_master, 0))
        if around != "flat":
            with pytest.raises(torch.OutOfMemoryError):
                mine.step()
        assert everything(mine) == before
    mine.step()
    plain.step()
    support.assert_bits(support.all_state(mine), support.all_state(plain))
    for buffer in mine.flat_buffers:
        for name, slot in buffer.slots.items():
            memory = slot.untyped_storage().data_ptr()
            assert all(mine.state[p][name].untyped_storage().data_ptr() == memory for p in buffer.params)


def test_a_step_of_torchs_without_memory_has_not_happened(monkeypatch):
    """torch makes its state before it moves anything of a group."""
    dense, other = support.tensors((4,), (3,))
    mine = fusestep.optim.Adam([{"params": [dense]}, {"params": [other], "differentiable": True}])
    for p in (dense, other):
        p.grad = torch.ones_like(p)
    other.requires_grad_(False)  # a leaf that requires one is refused
    before = everything(mine)
    monkeypatch.setattr(torch.optim.Adam, "_init_group", failing(torch.optim.Adam._init_group, 1))
    with pytest.raises(torch.OutOfMemoryError):
        mine.step()
    assert everything(mine) == before


# ---- attributes --------------------------------------------------------------------------------

WRONG_ATTRIBUTES = [
    ("max_grad_norm", -1.0, "max_grad_norm must be None or a number >= 0, got -1.0"),
    ("max_grad_norm", True, "max_grad_norm must be None or a number >= 0, got True"),
    ("max_grad_norm", 10**400, "max_grad_norm must be None or a number >= 0, got 1000"),
    ("max_grad_norm", torch.tensor(1.0), "max_grad_norm must be None or a number >= 0, got tensor"),
    ("clip_value", "1", "clip_value must be None or a number >= 0, got '1'"),
    ("skip_nonfinite", "no", "skip_nonfinite must be True or False, got 'no'"),
    ("keep_scaled_grads", None, "keep_scaled_grads must be True or False, got None"),
]


@pytest.mark.parametrize("attribute, value, text", WRONG_ATTRIBUTES, ids=str)
def test_attributes_are_checked_when_they_are_set(attribute, value, text):
    with pytest.raises(WRONG, match=text):
        fusestep.optim.SGD(support.tensors((2,)), lr=0.1, **{attribute: value})
    mine = fusestep.optim.SGD(support.tensors((2,)), lr=0.1)
    before = getattr(mine, attribute)
    with pytest.raises(WRONG, match=text):
        setattr(mine, attribute, value)
    assert getattr(mine, attribute) is before


def test_flags_of_numpy_are_flags():
    numpy = pytest.importorskip("numpy")
    mine = fusestep.optim.SGD(support.tensors((2,)), lr=0.1, skip_nonfinite=numpy.bool_(True))
    assert mine.skip_nonfinite is True


def test_settings_are_named_where_a_graphs_are_brought_along():
    mine = fusestep.optim.SGD(support.tensors((2,)), lr=0.1)
    mine.param_groups[0]["momentum"] = "x"
    with pytest.raises(WRONG, match="group 0: momentum must be a number, got 'x'"):
        mine.sync_hyper()


def test_an_expanded_parameter_is_refused_before_others_move():
    (q,) = support.tensors((3,))
    p = torch.nn.Parameter(torch.ones(1, device=device.DEFAULT).expand(3))
    q.grad, p.grad = torch.ones_like(q), torch.ones(3, device=device.DEFAULT)
    optimizer = fusestep.optim.SGD([p, q], lr=0.1, momentum=0.9)
    before = everything(optimizer)
    with pytest.raises(WRONG, match="group 0, parameter 0 .*: the parameter is expanded"):
        optimizer.step()
    assert everything(optimizer) == before


@pytest.mark.filterwarnings("ignore:fusestep.optim")
def test_torchs_own_step_that_raises_leaves_alone_whom_it_does_not_step(monkeypatch):
    """Of those that it steps one has moved and one has not, as with torch."""
    table, other, dense = support.tensors((4, 2), (4, 2), (5,))
    for p in (table, other):
        p.grad = torch.ones_like(p).to_sparse(1)
    dense.grad = torch.ones_like(dense)
    optimizer = fusestep.optim.SGD([dense, table, other], lr=0.1, momentum=0.9)
    before = [p.detach().clone() for p in (dense, table, other)]
    add = torch.Tensor.add_
    monkeypatch.setattr(torch.Tensor, "add_", lambda p, *a, **k: 1 / 0 if p is other else add(p, *a, **k))
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    moved = [not torch.equal(p, start) for p, start in zip((dense, table, other), before, strict=True)]
    assert moved == [False, True, False]
    assert dense not in optimizer.state


def test_a_closures_own_error_is_not_taken_for_a_settings():
    optimizer = fusestep.optim.SGD(support.tensors((2,)), lr=0.1)
    optimizer.param_groups[0]["momentum"] = "x"

    def closure():
        raise ValueError("bad batch")

    with pytest.raises(ValueError, match="bad batch"):
        optimizer.step(closure)


def test_a_step_of_no_groups_is_none():
    optimizer = fusestep.optim.Adam(support.tensors((2,)))
    optimizer.param_groups.clear()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:fusestep.optim")
def test_what_torch_steps_is_not_refused():
    """A group's flag alone does not make torch's step differentiable; coupled weight decay promotes gradients."""
    (p,) = support.tensors((3,))
    start = p.detach().clone()
    optimizer = fusestep.optim.Adam([p], lr=0.1)
    optimizer.param_groups[0]["differentiable"] = True
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(p, start - 0.1, atol=1e-5)


@support.needs_grad_dtype
@pytest.mark.filterwarnings("ignore:fusestep.optim")
def test_gradients_that_weight_decay_promotes_are_stepped():
    found = []
    for cls in (fusestep.optim.Adam, torch.optim.Adam):
        p = torch.nn.Parameter(torch.ones(3, device=device.DEFAULT))
        p.grad_dtype = BF16
        p.grad = torch.ones(3, dtype=BF16, device=device.DEFAULT)
        optimizer = cls([p], lr=0.1, weight_decay=0.1)
        for _ in range(2):
            optimizer.step()
        found.append(p.detach().clone())
    assert torch.allclose(*found)


def test_state_of_a_users_own_may_be_expanded():
    (p,) = support.tensors((4, 3))
    optimizer = fusestep.optim.Adam([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["mask"] = torch.ones(1).expand(7)
    p.grad = torch.ones(3, 4, device=device.DEFAULT).t()
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_state_that_is_no_tensor_is_named():
    (p,) = support.tensors((4,))
    optimizer = fusestep.optim.Adam([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = 0.0
    with pytest.raises(WRONG, match="group 0, parameter 0 .*: its exp_avg must be a tensor, got 0.0"):
        optimizer.step()


def test_settings_that_older_pickles_lack():
    mine = fusestep.optim.SGD(support.tensors((2,)), lr=0.1, max_grad_norm=1.0, skip_nonfinite=1)
    params_of(mine)[0].grad = torch.ones(2)
    mine.step()
    kept = {name: value for name, value in mine.__getstate__().items() if name not in fusestep.optim._OWN_SETTINGS}
    other = object.__new__(fusestep.optim.SGD)
    other.__setstate__(kept)
    assert (other.max_grad_norm, other.clip_value, other.skip_nonfinite, other.keep_scaled_grads) == (
        None,
        None,
        False,
        False,
    )
    other.step()


@pytest.mark.parametrize("again", [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_settings_stay_when_a_state_dict_is_loaded(again):
    settings = {"max_grad_norm": 2.0, "clip_value": 0.5, "skip_nonfinite": True, "keep_scaled_grads": True}
    optimizer = again(fusestep.optim.SGD(support.tensors((4,)), lr=1.0, **settings))
    optimizer.load_state_dict(optimizer.state_dict())
    assert {name: getattr(optimizer, name) for name in settings} == settings


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("read_only", ["of inference mode", "the same, moved", "expanded"])
def test_gradients_that_cannot_be_divided_in_place(read_only, momentum):
    """They are stepped with, and replaced by what GradScaler would leave."""
    (p,) = support.tensors((4,))
    before = p.detach().clone()
    optimizer = fusestep.optim.SGD([p], lr=1.0, momentum=momentum)
    for step in (1, 2):
        with torch.inference_mode(read_only != "expanded"):
            p.grad = torch.full((1,), 4.0, device=device.DEFAULT).expand(4)
            if read_only != "expanded":
                p.grad = p.grad.clone()
        if read_only == "the same, moved":
            p.grad.data = p.grad.data.clone()
        optimizer.grad_scale = torch.tensor(4.0, device=device.DEFAULT)
        optimizer.step()
        assert p.grad.tolist() == [1.0] * 4
        assert optimizer.state[p].get("momentum_buffer", torch.ones(())).max() == (1.0 if step == 1 else 1 + momentum)
    assert torch.allclose(before - p, torch.full_like(p, 2.0 + momentum))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_scale_is_taken_back_whatever_was_raised(error, monkeypatch):
    (p,) = support.tensors((4,))
    optimizer = fusestep.optim.SGD([p], lr=1.0)
    scaler = support.scaler(4.0)
    scaler.scale(torch.ones((), device=device.DEFAULT))
    p.grad = torch.ones_like(p)

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_step_anew", fails)
        with pytest.raises(error):
            scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")


def test_state_dicts_may_be_taken_within_each_other():
    optimizer = fusestep.optim.SGD(support.tensors((4,)), lr=1.0)
    seen = []

    def register(_):
        if not seen:
            seen.append("registered")
            optimizer.register_state_dict_post_hook(lambda *_: seen.append("called"))
            optimizer.state_dict()

    optimizer.register_state_dict_pre_hook(register)
    optimizer.state_dict()
    optimizer.state_dict()
    assert seen == ["registered", "called", "called", "called"]


def test_options_that_cannot_be_compared_are_refused():
    optimizer = fusestep.optim.SGD(support.tensors((4,), dtype=BF16), lr=1.0, rounding="stochastic")
    params_of(optimizer)[0].grad = torch.ones_like(params_of(optimizer)[0])
    optimizer.step()
    optimizer.param_groups[0]["seed"] = torch.tensor([1, 2])
    with pytest.raises(WRONG, match="seed"):
        optimizer.step()
