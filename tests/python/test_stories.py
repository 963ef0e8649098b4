# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What training programs do around an optimizer: one test for each, against torch's class."""

import collections
import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import device
import fusestep
import support

SHAPES = ((5, 3), (4,), ())


def make_pair(name, shapes=SHAPES, dtype=torch.float32, **kwargs):
    """Our optimizer and torch's, over equal parameters; both with a momentum of SGD's."""
    kwargs = {**support.STATEFUL[name], **kwargs}
    mine = support.ours(name)(support.tensors(*shapes, dtype=dtype), **kwargs)
    torchs = support.theirs(name)(support.tensors(*shapes, dtype=dtype), **kwargs, foreach=False)
    return mine, torchs


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_both(pair, steps=1, seed=0):
    for index in range(steps):
        support.set_grads(params_of(pair[0]), seed=seed + index)
        support.give_same_grads(params_of(pair[0]), params_of(pair[1]))
        for optimizer in pair:
            optimizer.step()


def assert_alike(pair, steps=10):
    further = support.ulps_of_fused(pair[1])
    support.assert_close(support.all_state(pair[0]), support.all_state(pair[1]), steps, ulps_of_averages=further)
    support.stepped_by_us(pair[0])


# ---- construction ------------------------------------------------------------------------------


def test_is_torchs_class_in_all_but_the_step(name):
    mine, torchs = make_pair(name)
    assert isinstance(mine, support.theirs(name))
    assert type(mine).__name__ == name
    assert [list(group) for group in mine.param_groups] == [list(group) for group in torchs.param_groups]
    assert list(mine.defaults) == list(torchs.defaults)
    assert repr(mine) == repr(support.theirs(name)(params_of(mine), **support.STATEFUL[name]))
    ours = [list(inspect.signature(of(name)).parameters.values()) for of in (support.ours, support.theirs)]
    assert ours[0][: len(ours[1])] == ours[1]  # ours has more, by keyword
    assert all(added.kind is added.KEYWORD_ONLY for added in ours[0][len(ours[1]) :])
    assert isinstance(support.ours("AdamW")(params_of(mine)), torch.optim.Adam)


def test_constructor_errors_are_torchs(name):
    for case in support.error_inputs(name):
        given = case.optimizer_error_input
        messages = []
        for cls in (support.ours(name), support.theirs(name)):
            with (
                pytest.raises(case.error_type, match=case.error_regex)
                if not issubclass(case.error_type, Warning)
                else pytest.warns(case.error_type, match=case.error_regex) as caught
            ):
                cls(given.params, **given.kwargs)
            messages.append(str(getattr(caught, "value", None)))
        assert messages[0] == messages[1]


WRONG = [
    {"lr": -1.0},
    {"lr": torch.tensor([0.1, 0.2])},
    {"weight_decay": -1},
    {"eps": -1.0},
    {"betas": (1.0, 0.9)},
    {"betas": (0, 0.9)},
    {"momentum": -1.0},
    {"nesterov": True},
    {"alpha": -1.0},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"no_such": 1},
]


@pytest.mark.parametrize("kwargs", WRONG, ids=str)
def test_wrong_arguments(name, kwargs):
    def outcome(cls):
        try:
            cls(support.tensors((2,)), **kwargs)
        except Exception as error:
            return type(error), str(error)
        return None

    assert outcome(support.ours(name)) == outcome(support.theirs(name))


def test_state_is_torchs(name):
    mine, torchs = make_pair(name, **support.FULLEST[name])
    assert mine.state == {}
    step_both((mine, torchs))
    for p, q in zip(params_of(mine), params_of(torchs), strict=True):
        described = [
            [(key, value.dtype, value.shape) for key, value in optimizer.state[x].items()]
            for optimizer, x in ((mine, p), (torchs, q))
        ]
        assert described[0] == described[1]
        assert all(value.device == p.device for value in mine.state[p].values())


def test_no_state_without_momentum():
    (p,) = support.tensors((3,))
    mine = support.ours("SGD")([p], lr=0.1)
    support.set_grads([p], seed=0)
    mine.step()
    assert mine.state == {} and mine.state_dict()["state"] == {}
    support.stepped_by_us(mine, steps=1)


@pytest.mark.parametrize("fused", [None, True])
def test_default_dtype_of_step(fused):
    torch.set_default_dtype(torch.float64)
    try:
        (p,) = support.tensors((3,))
        mine = support.ours("Adam")([p], fused=fused)
        support.set_grads([p], seed=0)
        mine.step()
        assert mine.state[p]["step"].dtype == (torch.float32 if fused else torch.float64)
        assert mine.state[p]["step"] == 1
        assert mine.state[p]["exp_avg"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_flags_are_stored_and_ignored(name, flag):
    if name == "RMSprop" and flag == "fused":
        pytest.skip("torch's RMSprop has no fused")
    mine, torchs = make_pair(name, **({flag: True} if flag == "fused" else {}))
    mine.param_groups[0][flag] = True
    step_both((mine, torchs), 3)
    assert mine.param_groups[0][flag] is True
    assert_alike((mine, torchs))


# ---- hyperparameters ---------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {"total_iters": 2},
    "LinearLR": {"total_iters": 3},
    "ExponentialLR": {"gamma": 0.8},
    "PolynomialLR": {"total_iters": 4},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 1e-2, "total_steps": 20},
    "ReduceLROnPlateau": {"patience": 1},
    "SequentialLR": None,
    "ChainedScheduler": None,
}


def test_no_scheduler_is_left_out():
    classes = {key for key in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, key))}
    assert set(SCHEDULERS) == classes - {"LRScheduler"}


def make_scheduler(kind, optimizer):
    if kind in ("SequentialLR", "ChainedScheduler"):
        parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        if kind == "SequentialLR":
            return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
        return lr_scheduler.ChainedScheduler(parts, optimizer)
    return getattr(lr_scheduler, kind)(optimizer, **SCHEDULERS[kind])


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(name, kind, lr):
    pair = [
        cls(support.tensors(*SHAPES), lr=copy.deepcopy(lr), **support.STATEFUL[name], foreach=False)
        for cls in (support.ours(name), support.theirs(name))
    ]
    lr_object = pair[0].param_groups[0]["lr"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "To get the last learning rate")
        warnings.filterwarnings("ignore", "The epoch parameter")
        schedulers = [make_scheduler(kind, optimizer) for optimizer in pair]
        for index in range(6):
            step_both(pair, seed=index)
            for scheduler in schedulers:
                scheduler.step(1.0) if kind == "ReduceLROnPlateau" else scheduler.step()
    assert kind == "ReduceLROnPlateau" or pair[0]._opt_called
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    if torch.is_tensor(lr):
        assert pair[0].param_groups[0]["lr"] is lr_object
    # A tensor lr is float32 arithmetic in torch: two roundings more a step.
    support.assert_close(support.all_state(pair[0]), support.all_state(pair[1]), 6, ulps=8)
    support.stepped_by_us(pair[0], steps=6)


@pytest.mark.parametrize("dims", [0, 1, 2])
def test_tensor_lr(name, dims):
    pair = [
        cls(
            support.tensors(*SHAPES),
            lr=torch.tensor(0.01).reshape([1] * dims),
            **support.STATEFUL[name],
            foreach=False,
        )
        for cls in (support.ours(name), support.theirs(name))
    ]
    step_both(pair, 3)
    support.assert_close(support.all_state(pair[0]), support.all_state(pair[1]), 3, ulps=8)
    support.stepped_by_us(pair[0], steps=3)


def test_tensor_betas():
    betas = (torch.tensor(0.9), torch.tensor([0.99]))
    pair = [
        cls(support.tensors(*SHAPES), betas=betas, foreach=False)
        for cls in (support.ours("Adam"), support.theirs("Adam"))
    ]
    step_both(pair, 3)
    # Here torch's bias corrections are float32, of numbers near 1: 2^-23 / (1 - 0.99) off.
    support.assert_close(support.all_state(pair[0]), support.all_state(pair[1]), 3, ulps=100)


@pytest.mark.parametrize("lr", [0, 0.0, -0.01, float("nan")])
def test_lr_that_torch_lets_pass(name, lr):
    """Only the constructor checks hyperparameters."""
    pair = make_pair(name)
    for optimizer in pair:
        optimizer.param_groups[0]["lr"] = lr
    before = [p.detach().clone() for p in params_of(pair[0])]
    step_both(pair, 2)
    if lr == 0:
        assert all(torch.equal(p, q) for p, q in zip(params_of(pair[0]), before, strict=True))
    elif lr == lr:
        assert_alike(pair)
    else:
        assert all(p.isnan().all() for p in params_of(pair[0]))


def test_edited_hyperparameters_count_at_once():
    pair = make_pair("Adam")
    for index, (key, value) in enumerate([("lr", 0.1), ("betas", (0.5, 0.9)), ("eps", 1e-2), ("maximize", True)]):
        for optimizer in pair:
            optimizer.param_groups[0][key] = value
        step_both(pair, seed=index)
    assert_alike(pair)


def test_amsgrad_switched_on_later():
    """torch raises KeyError here; the maximum starts at the second moments to come."""
    (p,) = support.tensors((4,))
    mine = support.ours("Adam")([p])
    for amsgrad in (False, True):
        mine.param_groups[0]["amsgrad"] = amsgrad
        support.set_grads([p], seed=0)
        mine.step()
    assert torch.equal(mine.state[p]["max_exp_avg_sq"], mine.state[p]["exp_avg_sq"])


# ---- GradScaler --------------------------------------------------------------------------------


def scaled_pair(name, dtype=torch.float32, scale=8.0):
    mine, torchs = make_pair(name, dtype=dtype)
    scalers = [support.scaler(scale) for _ in range(2)]
    return (mine, torchs), scalers


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(name, unscale_first):
    pair, scalers = scaled_pair(name)
    for index in range(4):
        bad = index == 1
        for optimizer, scaler in zip(pair, scalers, strict=True):
            support.set_grads(params_of(optimizer), seed=index, scale=8.0)
            if bad:
                params_of(optimizer)[0].grad[0, 0] = torch.inf
            scaler.scale(torch.zeros(()))  # makes the scale
            if unscale_first:
                scaler.unscale_(optimizer)
            before = support.snapshot(optimizer)
            grads = [p.grad.clone() for p in params_of(optimizer)]
            scaler.step(optimizer)
            if bad:
                support.assert_bits(support.all_state(optimizer), before)
            if bad and optimizer is pair[0]:
                assert all(torch.equal(p.grad, g) for p, g in zip(params_of(optimizer), grads, strict=True))
            scaler.update()
            assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        if not bad:
            for p, q in zip(*map(params_of, pair), strict=True):
                assert torch.equal(p.grad, q.grad)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 4.0
    assert_alike(pair)


def test_grad_scaler_with_half_gradients():
    """The scale may be more than float16 holds: 65536 is GradScaler's first."""
    (p,) = support.tensors((5,), dtype=torch.float16)
    p.grad = torch.full((5,), 32768.0, dtype=torch.float16)
    mine = support.ours("SGD")([p], lr=1.0)
    before = p.detach().clone()
    mine.grad_scale, mine.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    mine.step()
    assert torch.equal(p.grad, torch.full((5,), 0.5, dtype=torch.float16))
    assert torch.equal(p, before - 0.5)


def test_grad_scaler_without_gradients(name):
    mine, _ = make_pair(name)
    scaler = support.scaler(8.0)
    scaler.scale(torch.zeros(()))
    scaler.step(mine)  # found_inf is the int 0 here
    assert mine.state == {}


FOUND = {
    "0-dim": torch.tensor(1.0),
    "one element": torch.ones(1),
    "sum over devices": torch.tensor(3.0),
    "float64": torch.tensor(1.0, dtype=torch.float64),
    "bool": torch.tensor(True),
    "int": 1,
    "float": 1.0,
    "nan": torch.tensor(float("nan")),
}


@pytest.mark.parametrize("first_step", [True, False])
@pytest.mark.parametrize("form", FOUND)
def test_found_inf_changes_nothing(name, form, first_step):
    """Nor does a skipped first step make state: the next one is the first."""
    mine, torchs = make_pair(name, **support.FULLEST[name])
    if not first_step:
        step_both((mine, torchs))
    before = support.snapshot(mine)
    support.set_grads(params_of(mine), seed=9)
    grads = [p.grad.clone() for p in params_of(mine)]
    mine.grad_scale, mine.found_inf = torch.tensor(2.0), FOUND[form]
    mine.step()
    del mine.grad_scale, mine.found_inf
    support.assert_bits(support.all_state(mine), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(params_of(mine), grads, strict=True))
    step_both((mine, torchs), 2, seed=3)
    support.assert_close(support.all_state(mine), support.all_state(torchs), 3)


@pytest.mark.parametrize("zero", [torch.tensor(0.0), torch.zeros(1), 0, 0.0], ids=str)
@pytest.mark.parametrize("scale", [None, torch.tensor(4.0), torch.full((1,), 4.0)], ids=str)
def test_no_inf_found_steps(name, zero, scale):
    mine, torchs = make_pair(name)
    support.set_grads(params_of(mine), seed=0)
    support.give_same_grads(params_of(mine), params_of(torchs))
    if scale is not None:
        for p in params_of(mine):
            p.grad *= 4
    mine.grad_scale, mine.found_inf = scale, zero
    mine.step()
    torchs.step()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(params_of(mine), params_of(torchs), strict=True))
    assert_alike((mine, torchs))


# ---- hooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ours", "left to torch", "differentiable"])
def test_step_hooks_fire_once_and_in_order(way):
    support.theirs("SGD")(support.tensors((2,)))  # from now on torch's own step runs hooks too
    p = torch.ones(4, 3)
    mine = support.ours("SGD")([p], differentiable=way == "differentiable")
    support.set_grads([p], seed=0)
    if way == "left to torch":
        p.grad = p.grad.to_sparse()
    seen = []

    def note(text):
        return lambda optimizer, args, kwargs: seen.append((text, optimizer is mine))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        mine.register_step_pre_hook(note("pre")),
        mine.register_step_post_hook(note("post")),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine.step()
    for handle in handles:
        handle.remove()
    assert seen == [(text, True) for text in ("global pre", "pre", "post", "global post")]


def test_state_dict_hooks(name):
    mine, _ = make_pair(name)
    seen = []
    mine.register_state_dict_pre_hook(lambda optimizer: seen.append("pre"))
    mine.register_state_dict_post_hook(lambda optimizer, state: {**state, "extra": seen.append("post") or 1})
    mine.register_load_state_dict_pre_hook(lambda optimizer, state: seen.append("load pre"))
    mine.register_load_state_dict_post_hook(lambda optimizer: seen.append("load post"))
    saved = mine.state_dict()
    assert saved["extra"] == 1
    mine.load_state_dict(state_dict=saved)
    assert seen == ["pre", "post", "load pre", "load post"]


@pytest.mark.parametrize("hook", [lambda _, state: {"optimizer": state}, lambda _, state: {}, lambda _, state: None])
def test_state_dict_hooks_may_return_anything(name, hook):
    mine, reference = make_pair(name)
    for optimizer in (mine, reference):
        optimizer.register_state_dict_post_hook(hook)
    assert mine.state_dict().keys() == reference.state_dict().keys()


def test_named_parameters(name):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    mine = support.ours(name)(model.named_parameters(), lr=0.1)
    names = [key for key, _ in model.named_parameters()]
    assert mine.param_groups[0]["param_names"] == names
    model(torch.ones(2, 3)).sum().backward()
    mine.step()
    support.stepped_by_us(mine, steps=1, parameters=4)
    assert mine.state_dict()["param_groups"][0]["param_names"] == names


def test_optimizer_in_backward(name):
    def train(cls):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        optimizers = {p: cls([p], lr=0.01, foreach=False) for p in model.parameters()}

        def hook(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        for _ in range(4):
            model(torch.ones(2, 3)).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        return list(model.parameters()), optimizers

    mine, optimizers = train(support.ours(name))
    torchs, _ = train(support.theirs(name))
    for p, q in zip(mine, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        support.stepped_by_us(optimizers[p], steps=4, parameters=1)


# ---- saving, loading, copying ------------------------------------------------------------------


def test_save_and_load_with_weights_only(name):
    pair = make_pair(name)
    step_both(pair, 2)
    file = io.BytesIO()
    torch.save(pair[0].state_dict(), file)
    file.seek(0)
    resumed = support.ours(name)(support.twins(params_of(pair[0])), **support.STATEFUL[name])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    step_both((pair[0], resumed), 3, seed=5)
    support.assert_bits(support.all_state(resumed), support.all_state(pair[0]))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(name, copier):
    mine, _ = make_pair(name)
    step_both((mine, mine))
    optimizer = copier(mine)
    assert {key for key in vars(optimizer) if key[0] != "_"} == {key for key in vars(mine) if key[0] != "_"}
    step_both((mine, optimizer), 3, seed=4)
    support.assert_bits(support.all_state(optimizer), support.all_state(mine))
    support.stepped_by_us(optimizer, steps=3)


@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_state_from_torch_and_back(name, flags):
    if name == "RMSprop" and "fused" in flags:
        pytest.skip("torch's RMSprop has no fused")
    kwargs = {**support.STATEFUL[name], **flags}
    torchs = support.theirs(name)(support.tensors(*SHAPES), **kwargs)
    support.set_grads(params_of(torchs), seed=0)
    torchs.step()
    mine = support.ours(name)(support.twins(params_of(torchs)), **support.STATEFUL[name])
    mine.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert {key: mine.param_groups[0][key] for key in flags} == flags
    step_both((mine, torchs), 2, seed=1)
    back = support.theirs(name)(support.twins(params_of(mine)), **kwargs)
    back.load_state_dict(copy.deepcopy(mine.state_dict()))
    step_both((back, mine), 2, seed=7)
    further = support.ulps_of_fused(back)
    support.assert_close(support.all_state(mine), support.all_state(back), 5, ulps_of_averages=further)
    support.stepped_by_us(mine, steps=4)


def test_older_state_dicts(name):
    mine, torchs = make_pair(name)
    step_both((mine, torchs))
    saved = copy.deepcopy(mine.state_dict())
    for key in ("maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(key, None)
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = float(state["step"])
    mine.load_state_dict(saved)
    step_both((mine, torchs), 2, seed=1)
    assert_alike((mine, torchs))


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64)])
def test_forms_of_step(step):
    mine, torchs = make_pair("Adam")
    step_both((mine, torchs))
    for optimizer, value in ((mine, step), (torchs, torch.tensor(3.0))):
        for p in params_of(optimizer):
            optimizer.state[p]["step"] = copy.deepcopy(value)
    step_both((mine, torchs), 2, seed=1)
    for p, q in zip(*map(params_of, (mine, torchs)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert mine.state[p]["step"] == 5


# ---- memory that changes under the optimizer ---------------------------------------------------


def replaced_data(pair):
    for optimizer in pair:
        for p in params_of(optimizer):
            p.data = p.data * 2


def swapped(pair):
    for optimizer in pair:
        for p in params_of(optimizer):
            p.grad = None
            other = torch.nn.Parameter(p.detach() + 1)
            torch.utils.swap_tensors(p, other)


def replaced_state(pair):
    for optimizer in pair:
        for p in params_of(optimizer):
            optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}


def cleared(pair):
    for optimizer in pair:
        optimizer.state.clear()


def new_default(pair):
    for optimizer in pair:
        optimizer.state = collections.defaultdict(dict)


def new_plain_dict(pair):
    pair[0].state = {}
    pair[1].state = collections.defaultdict(dict)


def deleted_entry(pair):
    for optimizer in pair:
        del optimizer.state[params_of(optimizer)[1]]


def emptied_entry(pair):
    for optimizer in pair:
        optimizer.state[params_of(optimizer)[1]].clear()


def user_state(pair):
    for optimizer in pair:
        for p in params_of(optimizer):
            optimizer.state[p]["mine"] = "a string"
        optimizer.state["note"] = 1


def in_place_state(pair):
    for optimizer in pair:
        for p in params_of(optimizer):
            for value in optimizer.state[p].values():
                value.mul_(2)


def absent_gradient(pair):
    """Freezing: the parameter rests, and its step count with it."""
    for index in range(3):
        support.set_grads(params_of(pair[0]), seed=20 + index)
        support.give_same_grads(params_of(pair[0]), params_of(pair[1]))
        for optimizer in pair:
            params_of(optimizer)[index].grad = None
            optimizer.step()


def late_group(pair):
    for optimizer in pair:
        optimizer.add_param_group({"params": support.tensors((6,), seed=5), "lr": 0.3})


@pytest.mark.parametrize(
    "event",
    [
        replaced_data,
        swapped,
        replaced_state,
        cleared,
        new_default,
        new_plain_dict,
        deleted_entry,
        emptied_entry,
        user_state,
        in_place_state,
        absent_gradient,
        late_group,
    ],
    ids=lambda event: event.__name__,
)
def test_changes_between_steps(name, event):
    pair = make_pair(name, **support.FULLEST[name])
    for index in range(3):
        step_both(pair, 2, seed=2 * index)
        event(pair)
    step_both(pair, 2, seed=50)
    mine, torchs = (
        {key: value for key, value in support.all_state(optimizer).items() if key[1] != "mine"} for optimizer in pair
    )
    support.assert_close(mine, torchs, 14, ulps=16)
    support.stepped_by_us(pair[0])


def test_cleared_momentum_is_first_again():
    """Also where the new buffer gets the address of the old: dampening must not act on it."""
    (p,) = support.tensors((8,))
    mine = support.ours("SGD")([p], lr=1.0, momentum=0.9, dampening=0.5)
    for index in range(5):
        support.set_grads([p], seed=index)
        before = p.detach().clone()
        mine.step()
        torch.testing.assert_close(p.detach(), before - p.grad, rtol=0, atol=1e-6)
        mine.state.clear()


def test_user_provided_state(name):
    (p,) = support.tensors((4,))
    mine = support.ours(name)([p], **support.FULLEST[name])
    given = {key: torch.zeros(4) for key in mine._state_names(mine.param_groups[0]) if key != "step"}
    mine.state[p] = dict(given)
    support.set_grads([p], seed=0)
    mine.step()
    assert all(mine.state[p][key] is value and value.any() for key, value in given.items())


def test_zero_grad(name):
    mine, _ = make_pair(name)
    support.set_grads(params_of(mine), seed=0)
    mine.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params_of(mine))
    mine.zero_grad()
    assert all(p.grad is None for p in params_of(mine))
    mine.step()
    assert mine.state == {}


def test_zero_grad_is_one_call_for_alike_gradients(name, monkeypatch):
    """With what a gradient may be besides plain: part of a graph, sparse, of another dtype."""

    def with_grads():
        plain = support.tensors((3,), (2, 2), (4,), (5,), (2, 3))
        double, embedding = support.tensors((3,), dtype=torch.float64), support.tensors((6, 2))
        parameters = [*plain, *double, *embedding]
        support.set_grads(parameters, seed=1)
        plain[0].grad = 2 * plain[0]  # has a grad_fn
        plain[1].grad.requires_grad_()
        plain[2].grad = None
        plain[4].grad = plain[4].grad.t().contiguous().t()
        dense = embedding[0].grad
        embedding[0].grad = dense.to_sparse()
        return parameters

    mine, torchs = support.ours(name)(with_grads()), support.theirs(name)(with_grads())
    calls, zero = [], torch._foreach_zero_
    monkeypatch.setattr(torch, "_foreach_zero_", lambda grads: calls.append(len(grads)) or zero(grads))
    before = [[p.grad for p in params_of(optimizer)] for optimizer in (mine, torchs)]
    versions = [[None if grad is None else grad._version for grad in grads] for grads in before]
    for optimizer in (mine, torchs):
        optimizer.zero_grad(set_to_none=False)
    assert sum(calls) == 5 and len(calls) <= 2  # one sparse gradient, one missing
    for p, q, mine_before, version, torchs_version in zip(
        params_of(mine), params_of(torchs), before[0], *versions, strict=True
    ):
        assert p.grad is mine_before
        if q.grad is None:
            continue
        assert not p.grad.to_dense().any() and p.grad.layout == q.grad.layout
        assert p.grad.requires_grad == q.grad.requires_grad and p.grad.grad_fn is q.grad.grad_fn
        assert (p.grad._version > version) == (q.grad._version > torchs_version)


def test_state_without_elements_is_not_expanded():
    """A stride of 0 makes no two of its elements one; the gradient's memory makes the step copy."""
    p, q = torch.nn.Parameter(torch.empty(3, 0).t()), torch.nn.Parameter(torch.ones(2))
    optimizer = support.ours("Adam")([p, q])
    p.grad, q.grad = torch.empty(0, 3), torch.ones(2)
    optimizer.step()
    for slot in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][slot] = torch.empty(0, 3).as_strided((0, 3), (1, 0))
    p.grad = torch.empty(0, 3, dtype=torch.complex64).conj().imag
    before = q.detach().clone()
    optimizer.step()
    assert not torch.equal(q, before) and optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_a_step_count_of_another_dtype_at_the_same_address(first):
    memory = torch.zeros(1, dtype=torch.float64)
    views = {torch.float32: memory.view(torch.float32)[0], torch.float64: memory[0]}
    (p,) = support.tensors((3,))
    (q,) = support.twins([p])
    optimizer, twin = support.ours("Adam")([p]), support.ours("Adam")([q])
    for dtype, count in ((first, 1.0), (torch.float64 if first == torch.float32 else torch.float32, 1000.0)):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        for one in (optimizer, twin):
            one.step()
        optimizer.state[p]["step"] = views[dtype].fill_(count)
        twin.state[q]["step"] = torch.tensor(count)
        for one in (optimizer, twin):
            one.step()
        assert views[dtype].item() == count + 1
        assert torch.equal(p, q)


def test_zero_grad_of_memory_that_stands_for_its_negative(name):
    p, q = support.tensors((3,), (3,))
    optimizer = support.ours(name)([p, q])
    p.grad, q.grad = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag, torch.ones(3)
    assert p.grad.is_neg()
    optimizer.zero_grad(set_to_none=False)
    assert not p.grad.any() and not q.grad.any()


def test_zero_grad_after_pickling(name):
    mine = pickle.loads(pickle.dumps(make_pair(name)[0]))
    support.set_grads(params_of(mine), seed=0)
    mine.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params_of(mine))


def test_closure(name):
    mine, torchs = make_pair(name)

    def closure_of(optimizer):
        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params_of(optimizer))
            loss.backward()
            return loss

        return closure

    losses = [optimizer.step(closure=closure_of(optimizer)) for optimizer in (mine, torchs)]
    assert losses[0] == losses[1] and losses[0].requires_grad
    assert_alike((mine, torchs))


def test_step_of_zero_lr_and_zero_gradients_changes_no_bit(name):
    """How torch.distributed.checkpoint makes an optimizer create its state."""
    mine, _ = make_pair(name, weight_decay=0.1)
    params_of(mine)[0].data[0, 0] = -0.0
    before = [p.detach().clone() for p in params_of(mine)]
    for p in params_of(mine):
        p.grad = torch.zeros_like(p)
    mine.param_groups[0]["lr"] = 0.0
    mine.step(closure=None)
    for p, old in zip(params_of(mine), before, strict=True):
        assert torch.equal(p.detach().view(torch.int32), old.view(torch.int32))
        assert len(mine.state[p]) > 0


def test_autograd_notices_the_step(name):
    mine, _ = make_pair(name)
    (p, *_) = params_of(mine)
    for first in (True, False):
        support.set_grads(params_of(mine), seed=0)
        loss = (p * p).sum()
        versions = [q._version for q in params_of(mine)]
        mine.step()
        assert all(q._version > v for q, v in zip(params_of(mine), versions, strict=True)), first
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_compiled_model(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    mine = support.ours(name)(model.parameters())
    compiled = torch.compile(model, backend="eager")
    before = model.weight.detach().clone()
    for _ in range(2):
        compiled(torch.ones(2, 3)).sum().backward()
        mine.step()
    assert not torch.equal(before, model.weight)
    support.stepped_by_us(mine, steps=2, parameters=2)


def test_step_inside_a_compiled_function(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [support.ours(name)(model.parameters()) for model in models]

    def train(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo does not know")  # it has not tried to trace ours
        for _ in range(3):
            torch.compile(train, backend="eager")(models[0], optimizers[0])
            train(models[1], optimizers[1])
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    support.stepped_by_us(optimizers[0], steps=3, parameters=2)


# ---- what is left to torch ---------------------------------------------------------------------


def sparse_grads(parameters, seed):
    support.set_grads(parameters, seed)
    for p in parameters:
        p.grad[::2] = 0
        p.grad = p.grad.to_sparse()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_gradients_of_sgd(momentum, scaled):
    pair = [
        cls(support.tensors((6, 3), (4,)), lr=0.1, momentum=momentum)
        for cls in map(lambda f: f("SGD"), (support.ours, support.theirs))
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(3):
            for optimizer in pair:
                sparse_grads(params_of(optimizer)[:1], index)
                support.set_grads(params_of(optimizer)[1:], index)
            if scaled:
                pair[0].grad_scale, pair[0].found_inf = torch.tensor(4.0), torch.tensor(0.0)
                for p in params_of(pair[0]):
                    p.grad = p.grad * 4
            for optimizer in pair:
                optimizer.step()
            if scaled:
                for p, q in zip(*map(params_of, pair), strict=True):
                    assert torch.equal(p.grad.to_dense(), q.grad.to_dense())
    ours = [w for w in caught if "fusestep" in str(w.message)]
    assert len(ours) == 1 and "sparse gradients to torch's own step" in str(ours[0].message)
    assert ours[0].filename == __file__
    for p, q in zip(*map(params_of, pair), strict=True):
        torch.testing.assert_close(p, q)
    support.stepped_by_us(pair[0], steps=3, parameters=1)


def test_sparse_then_dense_momentum():
    """A sparse momentum buffer is torch's to step, also when the gradient is dense: it refuses."""
    pair = [cls(support.tensors((6, 3)), lr=0.1, momentum=0.9) for cls in (support.ours("SGD"), support.theirs("SGD"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        texts = []
        for optimizer in pair:
            sparse_grads(params_of(optimizer), 0)
            optimizer.step()
            support.set_grads(params_of(optimizer), 1)
            with pytest.raises(RuntimeError) as caught:
                optimizer.step()
            texts.append(str(caught.value))
    assert texts[0] == texts[1]
    torch.testing.assert_close(params_of(pair[0])[0], params_of(pair[1])[0])


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_sparse_gradients_of_others_are_refused_before_anything_moves(name):
    mine, torchs = make_pair(name)
    before = support.snapshot(mine)
    for optimizer in (mine, torchs):
        support.set_grads(params_of(optimizer), 0)
        sparse_grads(params_of(optimizer)[:1], 0)
    texts = []
    for optimizer in (mine, torchs):
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert {key: value for key, value in support.all_state(mine).items() if key[1] == "value"}.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(support.all_state(mine)[key], value)


@pytest.mark.parametrize("registered_before", [False, True])
def test_differentiable_runs_torchs_code(name, registered_before, monkeypatch):
    """Whether or not torch has put its hooks around its own step yet."""
    support.theirs(name)(support.tensors((2,)))
    if not registered_before:
        monkeypatch.setattr(support.theirs(name), "step", support.theirs(name).step.__wrapped__)

    def hypergradient(cls):
        weight = torch.tensor([1.0, 2.0], requires_grad=True)
        p = weight.clone()
        lr = 0.1
        optimizer = cls([p], lr=lr, differentiable=True, **support.STATEFUL[name])
        p.grad = (weight**2).clone()
        optimizer.step()
        p.sum().backward()
        return weight.grad

    assert torch.equal(hypergradient(support.ours(name)), hypergradient(support.theirs(name)))


@pytest.mark.filterwarnings("ignore:fusestep")
def test_meta_parameters_with_fused():
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    texts = []
    for cls in (support.ours("Adam"), support.theirs("Adam")):
        optimizer = cls([p], fused=True)
        p.grad = torch.ones(3, device="meta")
        with pytest.raises(RuntimeError, match="fused=True") as caught:
            optimizer.step()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_meta_parameters(name):
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    mine = support.ours(name)([p])
    p.grad = torch.ones(3, device="meta")
    with pytest.warns(UserWarning, match="on meta to torch's own step"):
        mine.step()


@pytest.mark.parametrize("cls, other, decoupled", [("Adam", "AdamW", False), ("AdamW", "Adam", True)])
def test_the_class_alone_decouples_weight_decay_where_torch_is_old(cls, other, decoupled, monkeypatch):
    """Before torch 2.7 groups did not say it: ours do, and a loaded group does not make one class the other."""
    monkeypatch.setattr(support.ours(cls), "_missing_keys", {"decoupled_weight_decay": decoupled})
    mine = support.ours(cls)(support.tensors((3,)))
    mine.add_param_group({"params": support.tensors((3,))})
    assert [group["decoupled_weight_decay"] for group in mine.param_groups] == [decoupled, decoupled]
    mine = support.ours(cls)(support.tensors((3,)))
    mine.load_state_dict(support.ours(other)(support.tensors((3,))).state_dict())
    assert mine.param_groups[0]["decoupled_weight_decay"] is decoupled


class Wrapped(torch.Tensor):
    """A tensor that stands for another, as DTensor does."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        from torch.utils._pytree import tree_map

        def unwrap(x):
            return x.inner if isinstance(x, Wrapped) else x

        out = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        if function.__name__.split(".")[0].endswith("_"):
            return args[0]
        return tree_map(lambda x: Wrapped(x) if type(x) is torch.Tensor else x, out)


@pytest.mark.parametrize("offset", [0, 4])
def test_wrapper_subclass(name, offset):
    """Of no memory torch says the address 0, or the offset in it."""
    inner, plain = torch.linspace(-1, 1, 5 + offset)[offset:], support.tensors((3,))[0]
    mine = support.ours(name)([Wrapped(inner).requires_grad_(), plain])
    torchs = support.theirs(name)([torch.nn.Parameter(inner.clone()), support.tensors((3,))[0]])
    for optimizer in (mine, torchs):
        first, second = params_of(optimizer)
        grad = torch.full((5 + offset,), 0.5)[offset:]
        first.grad = Wrapped(grad) if optimizer is mine else grad
        second.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="of the wrapper class Wrapped"):
        mine.step()
    torchs.step()
    torch.testing.assert_close(inner, params_of(torchs)[0].detach())
    torch.testing.assert_close(plain, params_of(torchs)[1])
    support.stepped_by_us(mine, steps=1, parameters=1)


class Plain(torch.nn.Parameter):
    """A subclass with memory of its own."""


def test_plain_subclass_steps_on_its_memory(name):
    p = Plain(torch.ones(4))
    mine = support.ours(name)([p])
    p.grad = torch.ones(4)
    mine.step()
    support.stepped_by_us(mine, steps=1, parameters=1)
    assert not torch.equal(p.detach(), torch.ones(4))


def test_subclass_of_our_class():
    class Mine(fusestep.optim.Adam):
        def step(self, closure=None):
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    (p,) = support.tensors((4,))
    mine = Mine([p])
    support.set_grads([p], seed=0)
    mine.step()
    assert mine.calls == 1
    support.stepped_by_us(mine, steps=1)


RESETS = {
    "load_state_dict": lambda o, empty: o.load_state_dict(empty),
    "clear": lambda o, empty: o.state.clear(),
    "pop": lambda o, empty: o.state.pop(o.param_groups[0]["params"][0]),
    "another dict": lambda o, empty: setattr(o, "state", collections.defaultdict(dict)),
    "the buffer": lambda o, empty: o.state[o.param_groups[0]["params"][0]].pop("momentum_buffer"),
    "None": lambda o, empty: o.state[o.param_groups[0]["params"][0]].update(momentum_buffer=None),
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_a_first_step_is_one_again_after_state_has_gone(reset, flat):
    """New state may be at the address of the old."""
    found = []
    for cls in (fusestep.optim.SGD, torch.optim.SGD):
        p = torch.nn.Parameter(torch.zeros(1000, device=device.DEFAULT))
        optimizer = cls([p], lr=1.0, momentum=0.9, dampening=0.5)
        if flat and cls is fusestep.optim.SGD:
            fusestep.optim.flatten(optimizer)
        empty = copy.deepcopy(optimizer.state_dict())
        for _ in range(5):
            p.grad = torch.ones_like(p) if p.grad is None else p.grad.fill_(1)
            optimizer.step()
            assert optimizer.state[p]["momentum_buffer"][0] == 1
            RESETS[reset](optimizer, empty)
        found.append(p.detach().clone())
    assert torch.equal(*found)
