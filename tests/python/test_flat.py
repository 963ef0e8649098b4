# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Flat groups: beside an optimizer that is not flat, to the last bit, whatever is done to both."""

import collections
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

import device
import fusestep
import ranks
import support
from fusestep.optim import flatten, freeze, thaw

SHAPES = ((33, 7), (5,), (), (0, 3), (300,))
BF16 = {"dtype": torch.bfloat16}
# Of parameters (dtype), optimizers, and what GradScaler says.
CASES = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "clipped": {"max_grad_norm": 0.5, "clip_value": 0.1, "skip_nonfinite": True},
    "scaled": {"scale": 64.0},
    "scaled, kept": {"scale": 64.0, "keep_scaled_grads": True, "max_grad_norm": 0.5},
    "bfloat16": BF16,
    "float32 state": {**BF16, "state_dtype": torch.float32, "scale": 8.0},
    "master weights": {**BF16, "state_dtype": torch.float32, "master_weights": True},
    "stochastic": {**BF16, "rounding": "stochastic", "seed": 3},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "complex": {"dtype": torch.complex64},
}
TRUSTS = pytest.mark.parametrize("trusts", [False, True], ids=["checked", "trusted"])


def make(rule, parameters, **options):
    return support.ours(rule)(parameters, lr=1e-2, **{**support.FULLEST[rule], **options})


def pair(rule="Adam", trusts=False, dtype=torch.float32, shapes=SHAPES, **options):
    """A flat optimizer, and one that is not."""
    parameters = support.tensors(*shapes, dtype=dtype)
    mine, plain = make(rule, parameters, **options), make(rule, support.twins(parameters), **options)
    flatten(mine, trust_gradients=trusts)
    return mine, plain


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_grads(mine, plain, seed, scale=1.0):
    """As backward does: where there is a gradient it is written to."""
    support.set_grads(params_of(plain), seed, scale)
    for p, q in zip(params_of(mine), params_of(plain), strict=True):
        if p.grad is None:
            p.grad = q.grad.clone()
        else:
            p.grad.copy_(q.grad)


def assert_same(mine, plain):
    support.assert_bits(support.all_state(mine), support.all_state(plain))
    for p, q in zip(params_of(mine), params_of(plain), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def train(mine, plain, steps=3, first=0, scale=None):
    for index in range(first, first + steps):
        give_grads(mine, plain, index, 1.0 if scale is None else scale)
        for optimizer in (mine, plain):
            if scale is not None:
                optimizer.grad_scale = torch.tensor(scale, device=device.DEFAULT)
                optimizer.found_inf = torch.tensor(float(index % 4 == 2), device=device.DEFAULT)
            optimizer.step()


def assert_in_place(optimizer):
    """Values, gradients and state of every parameter are views of the buffers."""
    found = 0
    grads = {p: p.grad for p in params_of(optimizer)}  # before anybody asks for those of a buffer
    for buffer in optimizer.flat_buffers:
        for p, offset in zip(buffer.params, buffer.offsets, strict=True):
            pieces = {"value": (p, buffer.values)}
            if grads.get(p) is not None:
                pieces["grad"] = (grads[p], buffer.grads)
            state = optimizer.state.get(p, {})
            pieces |= {name: (value, buffer.slots[name]) for name, value in state.items() if name != "step"}
            for name, (tensor, whole) in pieces.items():
                assert tensor.shape == p.shape and tensor.dtype == whole.dtype, name
                begin = whole.data_ptr() + offset * whole.element_size()
                assert tensor.numel() == 0 or tensor.data_ptr() == begin, name
                found += 1
    return found


def forbid_looking(optimizer, monkeypatch):
    """Any step that looks at everything fails from now on."""

    def looks(*_):
        raise AssertionError("the step has looked at everything")

    monkeypatch.setattr(type(optimizer), "_step_anew", looks)


@pytest.fixture(autouse=True)
def placed(monkeypatch):
    monkeypatch.setattr(fusestep.optim, "_complete", device.place_state(fusestep.optim._complete))


# ---- the same bits ------------------------------------------------------------------------------


@TRUSTS
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_other_groups(name, case, trusts):
    options = dict(CASES[case])
    scale = options.pop("scale", None)
    mine, plain = pair(name, trusts, **options)
    train(mine, plain, 6, scale=scale)
    assert_same(mine, plain)
    assert mine.skipped_steps == plain.skipped_steps
    if "max_grad_norm" in options:
        assert torch.equal(mine.grad_norm, plain.grad_norm)
    slots = len(mine.state[params_of(mine)[0]]) - ("step" in mine.state[params_of(mine)[0]])
    assert assert_in_place(mine) == len(SHAPES) * (2 + slots)


@TRUSTS
def test_state_that_exists_is_taken_along(name, trusts):
    parameters = support.tensors(*SHAPES)
    mine, plain = make(name, parameters), make(name, support.twins(parameters))
    train(mine, plain, 2)
    before = support.snapshot(mine)
    flatten(mine, trust_gradients=trusts)
    support.assert_bits(support.all_state(mine), before)
    assert_in_place(mine)
    train(mine, plain, 3, first=2)
    assert_same(mine, plain)


@TRUSTS
def test_a_step_of_the_same_tensors_does_not_look_again(name, trusts, monkeypatch):
    mine, plain = pair(name, trusts)
    train(mine, plain, 2)  # state is made, then found
    forbid_looking(mine, monkeypatch)
    for index in range(3):
        give_grads(mine, plain, index)
        for group in (*mine.param_groups, *plain.param_groups):
            group["lr"] *= 0.5
            group["weight_decay"] = 0.1 * index
        mine.step(lambda: None)
        fusestep.optim._FusedStep._step_anew.__wrapped__(plain, False)
    monkeypatch.undo()
    assert_same(mine, plain)


def test_groups_dtypes_and_layouts_have_buffers_of_their_own():
    single, half = support.tensors((5,), (4, 3, 2, 2)), support.tensors((5,), (7,), dtype=torch.bfloat16)
    single[1].data = single[1].data.to(memory_format=torch.channels_last)
    half[1].requires_grad_(False)
    optimizer = fusestep.optim.AdamW([{"params": [*single, *half]}, {"params": support.tensors((6,)), "lr": 0.5}])
    for p in single:
        p.grad = torch.ones_like(p)
    buffers = flatten(optimizer)
    assert [len(buffer.params) for buffer in buffers] == [2, 1, 1, 1]
    assert [buffer.grads is None for buffer in buffers] == [False, False, True, False]
    assert single[1].is_contiguous(memory_format=torch.channels_last)
    assert single[1].grad.is_contiguous(memory_format=torch.channels_last)
    assert all(offset % 32 == 0 for buffer in buffers for offset in buffer.offsets)
    optimizer.step()
    optimizer.step()
    assert assert_in_place(optimizer) == 2 * 4 + 3
    assert optimizer.flat_buffers[0] is buffers[0]
    assert "2 parameters of torch.float32" in repr(buffers[0])


def test_large_buffers_start_at_different_places_of_a_page():
    optimizer = fusestep.optim.Adam(support.tensors((100_003,)))
    params_of(optimizer)[0].grad = torch.ones(100_003)
    flatten(optimizer)
    optimizer.step()
    buffer = optimizer.flat_buffers[0]
    places = [t.data_ptr() % 4096 for t in (buffer.values, buffer.grads, *buffer.slots.values())]
    assert places == [position * 1088 % 4096 for position in range(4)] or device.KIND == "cuda"
    assert_in_place(optimizer)


# ---- parameters that others look at ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_parameters_have_storages_of_their_own(dtype):
    """Who looks for tied weights goes by them."""
    mine, plain = pair("SGD", dtype=dtype, shapes=(*SHAPES, (1, 3), (4, 1), (1, 1)))
    storages = [p.untyped_storage() for p in params_of(mine) if p.numel() != 0]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    for p, q in zip(params_of(mine), params_of(plain), strict=True):
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
        assert (p.shape, p.stride(), p.storage_offset()) == (q.shape, q.stride(), 0)
        assert len(saved(p)) <= len(saved(q)) + 200  # padding of torch's
    train(mine, plain)
    assert_same(mine, plain)
    assert_in_place(mine)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_values_outlive_what_made_them():
    mine, plain = pair("SGD", shapes=((100, 100), (5,)))
    parameters, values = params_of(mine), [p.detach().clone() for p in params_of(plain)]
    del mine
    gc.collect()
    torch.full((100, 200), 7.0), torch.full((5,), 7.0)
    for p, value in zip(parameters, values, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize("trusts", [False, True])
def test_zero_grad_of_parameters_that_came_past_the_optimizer(trusts):
    mine, plain = pair("SGD", trusts)
    train(mine, plain)
    for way in ("appended", "replaced", "taken out", "put back"):
        if way == "taken out":
            out = [optimizer.param_groups[0]["params"].pop(0) for optimizer in (mine, plain)]
        elif way == "put back":
            for optimizer, p in zip((mine, plain), out, strict=True):
                optimizer.param_groups[0]["params"].append(p)
        else:
            (new,) = support.tensors((4,))
            for optimizer, p in zip((mine, plain), (new, *support.twins([new])), strict=True):
                members = optimizer.param_groups[0]["params"]
                members[len(members) - (way == "replaced") :] = [p]
        for set_to_none in (True, False):
            train(mine, plain)
            assert_same(mine, plain)
            mine.zero_grad(set_to_none)
            assert all(p.grad is None or not p.grad.any() for p in params_of(mine)), way


@pytest.mark.parametrize("trusts", [False, True])
def test_a_parameter_may_refer_to_its_optimizer(trusts):
    mine, plain = pair("Adam", trusts)
    train(mine, plain)
    parameters = params_of(mine)
    parameters[0].optimizer = mine
    gone = [weakref.ref(one) for one in (mine, *parameters)]
    parameters, mine = None, None
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_garbage_may_be_collected_while_state_goes():
    """The collector sees what a step holds: nothing that goes just then (PYTHONMALLOC=debug would crash)."""
    mine, plain = pair("Adam", shapes=((3,),) * 10)
    train(mine, plain)
    for own in mine.state.values():
        for tensor in own.values():
            weakref.finalize(tensor, gc.collect)
    mine.load_state_dict(copy.deepcopy(mine.state_dict()))
    train(mine, plain)
    assert_same(mine, plain)


@pytest.mark.only_on("cpu", reason="memory that processes share")
def test_a_model_that_is_shared_with_processes_is_stepped_there():
    models, (mine, plain) = twin_models(False)
    for index in range(6):
        for optimizer in (mine, plain):
            optimizer.zero_grad()
        backward(models, index)
        if index == 3:
            models[0].share_memory()
        for optimizer in (mine, plain):
            optimizer.step()
    assert_same(mine, plain)
    assert all(p.is_shared() for p in params_of(mine))


def test_models_are_saved_by_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    (model, plain), (mine, _) = twin_models(False)
    safetensors.save_model(model, tmp_path / "model")
    safetensors.save_file(model.state_dict(), tmp_path / "file")
    for name in ("model", "file"):
        found = safetensors.load_file(tmp_path / name)
        support.assert_bits(found, {key: value.cpu() for key, value in plain.state_dict().items()})
    with torch.no_grad():
        for p in params_of(mine):
            p.zero_()
    safetensors.load_model(model, tmp_path / "model")
    support.assert_bits(model.state_dict(), plain.state_dict())
    assert_in_place(mine)


# ---- gradients ----------------------------------------------------------------------------------


def replace(p):
    p.grad = p.grad.clone()


def replace_data(p):
    p.grad.data = p.grad.data.clone()


def replace_strided(p):
    p.grad = torch.stack([p.grad, p.grad], dim=-1)[..., 0]


def replace_by_an_alias(p):
    p.grad = p.grad.detach()


def drop(p):
    p.grad = None


def swap(p):
    p.grad, other = p.grad.clone(), p.grad
    other.fill_(77.0)  # what was the gradient is not any more


REPLACEMENTS = [replace, replace_data, replace_strided, replace_by_an_alias, drop, swap]


@pytest.mark.parametrize("how", REPLACEMENTS, ids=lambda how: how.__name__)
@pytest.mark.parametrize("which", [[0], [1], [0, 1, 4], [4]], ids=str)
def test_a_gradient_that_was_replaced_is_noticed(how, which):
    mine, plain = pair("SGD")
    train(mine, plain, 3)
    for index in range(3):
        give_grads(mine, plain, 10 + index)
        for i in which:
            how(params_of(mine)[i])
            if how is drop:
                params_of(plain)[i].grad = None
        for optimizer in (mine, plain):
            optimizer.step()
        assert_same(mine, plain)
    assert_in_place(mine)


def exchange(optimizer):
    first, second, *_ = params_of(optimizer)
    first.grad, second.grad = second.grad, first.grad


def hand_down(optimizer):
    first, second, *_ = params_of(optimizer)
    old, first.grad = first.grad, torch.full_like(first, 0.5)
    second.grad = old


def rotate(optimizer):
    first, second, third = params_of(optimizer)
    first.grad, second.grad, third.grad = second.grad, third.grad, first.grad


def exchange_data(optimizer):
    first, second, *_ = (p.grad for p in params_of(optimizer))
    first.data, second.data = second.data, first.data


def share(optimizer):
    first, second, third = params_of(optimizer)
    first.grad = second.grad = third.grad


def give_and_drop(optimizer):
    first, second, _ = params_of(optimizer)
    first.grad, second.grad = second.grad, None


EXCHANGES = [exchange, hand_down, rotate, exchange_data, share, give_and_drop]


@pytest.mark.parametrize("how", EXCHANGES, ids=lambda how: how.__name__)
def test_gradients_that_change_places(how):
    mine, plain = pair("SGD", shapes=((4,), (4,), (4,)))
    for index in range(4):
        give_grads(mine, plain, index)
        for optimizer in (mine, plain):
            if index == 3:
                how(optimizer)
            optimizer.step()
    assert_same(mine, plain)
    assert_in_place(mine)


@support.needs_grad_dtype
def test_a_gradient_of_another_dtype_stays_where_it_is():
    mine, plain = pair("Adam", dtype=torch.bfloat16)
    for p, q in zip(params_of(mine), params_of(plain), strict=True):
        for tensor in (p, q):
            tensor.grad_dtype = None
    for index in range(3):
        support.set_grads(params_of(plain), index)
        for p, q in zip(params_of(mine), params_of(plain), strict=True):
            q.grad = q.grad.float()
            p.grad = q.grad.clone()
        for optimizer in (mine, plain):
            optimizer.step()
    assert_same(mine, plain)
    assert params_of(mine)[0].grad.dtype == torch.float32


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(device.DEFAULT)


def twin_models(trusts, cls=fusestep.optim.AdamW, **options):
    models = model_of(), model_of()
    mine, plain = (cls(model.named_parameters(), lr=0.1, **options) for model in models)
    flatten(mine, trust_gradients=trusts)
    return models, (mine, plain)


def backward(models, seed=0):
    x = torch.randn(4, 6, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(device.DEFAULT)
    for model in models:
        model(x).square().sum().backward()


@TRUSTS
@pytest.mark.parametrize("how", ["optimizer", "optimizer, zeros", "model", "none at all"])
def test_training_loops(how, trusts):
    models, (mine, plain) = twin_models(trusts)
    for index in range(5):
        for model, optimizer in zip(models, (mine, plain), strict=True):
            if how == "model":
                model.zero_grad()
            elif how != "none at all" or index % 2:
                optimizer.zero_grad(set_to_none=how == "optimizer")
        backward(models, index)
        for optimizer in (mine, plain):
            optimizer.step()
    assert_same(mine, plain)
    assert_in_place(mine)


@TRUSTS
def test_zero_grad_is_one_memset_and_keeps_the_views(trusts):
    models, (mine, _) = twin_models(trusts)
    backward(models)
    mine.step()
    grads = [p.grad for p in params_of(mine)]
    mine.flat_buffers[0].grads.fill_(3.0)
    mine.zero_grad()
    assert all(p.grad is grad and not grad.any() for p, grad in zip(params_of(mine), grads, strict=True))
    assert not mine.flat_buffers[0].grads.any()


@pytest.mark.parametrize("stepped", [0, 1, 3])
def test_zero_grad_clears_what_is_elsewhere_and_what_needs_no_gradient(stepped):
    models, (mine, _) = twin_models(False)
    for _ in range(stepped):
        backward(models)
        mine.step()
    first, second, third, fourth = params_of(mine)
    for p in params_of(mine):
        p.grad = torch.ones_like(p)
    mine.step()
    first.grad = torch.ones_like(first)
    second.requires_grad_(False)
    mine.zero_grad()
    assert first.grad is None and second.grad is None
    assert not third.grad.any() and not fourth.grad.any()
    first.grad, third.grad = torch.ones_like(first), torch.ones_like(third)
    mine.zero_grad(set_to_none=False)
    assert not first.grad.any() and not third.grad.any()


def test_trusted_gradients_exist_from_the_start():
    models, (mine, _) = twin_models(True)
    assert all(p.grad is not None and not p.grad.any() for p in params_of(mine))
    backward(models)
    assert_in_place(mine)


def test_untrusted_ones_appear_with_their_first_gradient():
    """A parameter without gradient does not step, weight decay included."""
    mine, plain = pair("AdamW", shapes=((3,), (4,)))
    for optimizer in (mine, plain):
        params_of(optimizer)[1].grad = torch.ones(4)
        optimizer.step()
    assert params_of(mine)[0].grad is None
    assert_same(mine, plain)


# ---- gradients reduced in their buffers -------------------------------------------------------------


def go_on(index, model, optimizer):
    """What else happens before a backward pass."""


def go_on_without_zero_grad(index, model, optimizer):
    for p in params_of(optimizer):
        if p.grad is not None:
            p.grad.zero_()


def zero_of_the_model(index, model, optimizer):
    model.zero_grad()


def zero_of_the_model_now_and_then(index, model, optimizer):
    if index in (2, 3, 5):
        model.zero_grad()


def add_a_group(index, model, optimizer):
    if index == 2:
        optimizer.add_param_group({"params": list(model[1].named_parameters(prefix="1")), "lr": 0.2})


def freeze_and_thaw(index, model, optimizer):
    if index == 2:
        optimizer.freeze("0.0.*", model)
    if index == 4:
        optimizer.thaw("0.0.*", model)


def thaw_what_was_frozen_at_first(index, model, optimizer):
    if index == 3:
        thaw(model[2])


def load_what_was_not_frozen(index, model, optimizer):
    if index == 1:
        optimizer.save(load_what_was_not_frozen.file)
        freeze(model[0][0])
    if index == 3:
        optimizer.load(load_what_was_not_frozen.file)


def require_gradients(index, model, optimizer):
    for p in model[0][2].parameters():
        p.requires_grad_(index % 3 != 1)
        if index % 3 == 1:
            p.grad = None


def drop_one(index, model, optimizer):
    if index % 2:
        model[0][0].weight.grad = None


def detach_one(index, model, optimizer):
    grad = model[0][0].weight.grad
    if index == 3 and grad is not None:
        grad.data = grad.data.clone()


def reach_more(index, model, optimizer):
    """Without effect before: model[3] has no gradient until then."""
    if index == 3:
        model[3].is_reached = True


HAPPENINGS = [
    go_on,
    go_on_without_zero_grad,
    add_a_group,
    freeze_and_thaw,
    thaw_what_was_frozen_at_first,
    load_what_was_not_frozen,
    reach_more,
    # Of these a tensor that was asked for before does not know.
    zero_of_the_model,
    zero_of_the_model_now_and_then,
    require_gradients,
    drop_one,
    detach_one,
]
NOTICED_WHEN_ASKED = HAPPENINGS[7:]


def reduced_pair(trusts, seed=0):
    """Models and optimizers. Of the model's parts 1 is in no group at first, 2 is frozen, 3 is not reached."""
    models = [torch.nn.ModuleList([model_of(seed + i) for i in range(4)]) for _ in range(2)]
    optimizers = []
    for model in models:
        freeze(model[2])
        held = [(name, p) for name, p in model.named_parameters() if not name.startswith("1.")]
        optimizers.append(fusestep.optim.SGD(held, lr=0.1))
    flatten(optimizers[0], trust_gradients=trusts)
    return models, optimizers


def backward_of_parts(model, seed):
    x = torch.randn(4, 6, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(device.DEFAULT)
    parts = [part for i, part in enumerate(model) if i < 3 or getattr(part, "is_reached", False)]
    sum(part(x).square().sum() for part in parts).backward()


def reduce_plain(optimizer, reduce):
    for p in params_of(optimizer):
        if p.grad is not None:
            reduce(p.grad)


def assert_buffers_hold_gradients(optimizer):
    for buffer in optimizer.flat_buffers:
        if buffer.grads is None:
            assert all(p.grad is None for p in buffer.params)
            continue
        parts = zip(buffer.params, buffer.offsets, strict=True)
        expected = torch.zeros_like(buffer.grads)
        for p, offset in parts:
            if p.grad is not None:
                expected[offset : offset + p.numel()] = p.grad.flatten()
        assert torch.equal(buffer.grads, expected)


@TRUSTS
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("asked", ["after", "before", "after each"])
@pytest.mark.parametrize("happens", HAPPENINGS, ids=lambda happens: happens.__name__)
def test_one_reduction_serves_a_buffer(happens, asked, passes, trusts, tmp_path):
    """What all-reduces would do to every gradient, done to the buffer: from the first step on, whatever happens."""
    if asked == "before" and happens in NOTICED_WHEN_ASKED:
        pytest.skip("docs/python.md: buffer.grads must be asked for again")
    if trusts and happens in (require_gradients, drop_one, detach_one):
        pytest.skip("what is trusted")
    models, (mine, plain) = reduced_pair(trusts)
    for index in range(6):
        for model, optimizer in zip(models, (mine, plain), strict=True):
            load_what_was_not_frozen.file = tmp_path / f"{optimizer is mine}"
            if happens is not go_on_without_zero_grad:
                optimizer.zero_grad()
            happens(index, model, optimizer)
        asked_before = [buffer.grads for buffer in mine.flat_buffers]
        for number in range(passes):
            for model in models:
                backward_of_parts(model, 10 * index + number)
            if asked == "after each":
                assert_buffers_hold_gradients(mine)
        for buffer, grads in zip(mine.flat_buffers, asked_before, strict=True):
            grads = grads if asked == "before" else buffer.grads
            if grads is not None:
                grads.mul_(0.5)
        reduce_plain(plain, lambda grad: grad.mul_(0.5))
        if asked != "before":
            assert_in_place(mine)
            assert_buffers_hold_gradients(mine)
        mine.step(), plain.step()
        support.assert_bits(support.all_state(mine), support.all_state(plain))


def run_on_ranks(rank, trusts):
    (mine_model, plain_model), (mine, plain) = reduced_pair(trusts)
    for index in range(6):
        for model, optimizer in zip((mine_model, plain_model), (mine, plain), strict=True):
            optimizer.zero_grad()
            for happens in (add_a_group, freeze_and_thaw, reach_more):
                happens(index, model, optimizer)
            backward_of_parts(model, 10 * index + rank)
        for buffer in mine.flat_buffers:
            if buffer.grads is not None:
                torch.distributed.all_reduce(buffer.grads)
        reduce_plain(plain, torch.distributed.all_reduce)
        mine.step(), plain.step()
        support.assert_bits(support.all_state(mine), support.all_state(plain))
    return [p.detach().numpy() for p in params_of(mine)]


def hooks_of(p):
    return p._post_accumulate_grad_hooks or {}


def test_first_gradients_are_waited_for_once():
    models, (mine, _) = twin_models(False)
    assert all(len(hooks_of(p)) == 1 for p in params_of(mine))
    for copied in (copy.deepcopy(models[0]), pickle.loads(pickle.dumps(models[0]))):
        backward([copied])
        assert not any(hooks_of(p) for p in copied.parameters())
    assert all(p.grad is None for p in params_of(mine))
    backward(models)
    assert assert_in_place(mine) == 2 * 4
    assert not any(hooks_of(p) for p in params_of(mine))
    mine.step()
    models[0].zero_grad()
    mine.step()  # which sees that they have none
    mine.step()
    assert all(len(hooks_of(p)) == 1 for p in params_of(mine))
    assert not mine.flat_buffers[0].grads.any()


def test_nobody_waits_for_parameters_that_have_left():
    models, (mine, _) = twin_models(False)
    left = mine.param_groups[0]["params"].pop()
    mine.zero_grad()
    assert not hooks_of(left)
    others = [hooks_of(p) for p in params_of(mine)]
    del mine
    gc.collect()
    backward(models)
    assert not any(others)
    assert_same_grads(*models)


def assert_same_grads(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@TRUSTS
def test_the_part_of_a_parameter_that_has_left_is_zero(trusts):
    models, (mine, plain) = twin_models(trusts)
    backward(models)
    left = [optimizer.param_groups[0]["params"].pop(1) for optimizer in (mine, plain)]
    mine.step(), plain.step()
    assert torch.equal(left[0].grad, left[1].grad)
    buffer = mine.flat_buffers[0]
    begin = buffer.offsets[1]
    assert buffer.grads.any() and not buffer.grads[begin : begin + left[0].numel()].any()


@pytest.mark.filterwarnings("ignore:fusestep.optim.SGD leaves parameters with sparse gradients")
def test_sparse_gradients_are_not_in_the_buffer():
    models = [torch.nn.Embedding(4, 3, sparse=True, _weight=torch.ones(4, 3)).to(device.DEFAULT) for _ in range(2)]
    mine, plain = (fusestep.optim.SGD(model.parameters(), lr=0.1) for model in models)
    flatten(mine)
    for _ in range(3):
        for model, optimizer in zip(models, (mine, plain), strict=True):
            optimizer.zero_grad()
            model(torch.tensor([1, 1, 2], device=device.DEFAULT)).sum().backward()
        assert not mine.flat_buffers[0].grads.any() and models[0].weight.grad.is_sparse
        mine.step(), plain.step()
        support.assert_bits(support.all_state(mine), support.all_state(plain))


def test_buffers_can_be_copied():
    models, (mine, _) = twin_models(False)
    backward(models)
    buffer = mine.flat_buffers[0]
    for copied in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert torch.equal(copied.values, buffer.values) and torch.equal(copied.grads, buffer.grads)


@pytest.mark.only_on("cpu", reason="gloo")
@TRUSTS
def test_ranks_that_reduce_buffers_stay_together(trusts):
    first, second = ranks.run(2, run_on_ranks, trusts)
    assert all((p == q).all() for p, q in zip(first, second, strict=True))


@TRUSTS
def test_autograd_is_told_unless_gradients_are_trusted(trusts):
    mine, plain = pair(trusts=trusts)
    train(mine, plain, 3)
    before = [p._version for p in params_of(mine)]
    mine.step()
    grown = [p._version > version for p, version in zip(params_of(mine), before, strict=True)]
    assert all(grown) if not trusts else not any(grown)


@TRUSTS
def test_grad_scaler(trusts):
    models, (mine, plain) = twin_models(trusts, max_grad_norm=0.5)
    scalers = [support.scaler(2.0**10) for _ in models]
    for index in range(8):
        for model, optimizer, scaler in zip(models, (mine, plain), scalers, strict=True):
            optimizer.zero_grad()
            x = torch.full((4, 6), torch.inf if index == 3 else 0.1 * index, device=device.DEFAULT)
            scaler.scale(model(x).square().sum()).backward()
            if index % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    support.assert_bits(support.all_state(mine), support.all_state(plain))
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**10


@pytest.mark.parametrize("asks", [False, True])
def test_second_derivatives_replace_gradients(asks):
    models, (mine, plain) = twin_models(False)
    for index in range(3):
        for model, optimizer in zip(models, (mine, plain), strict=True):
            optimizer.zero_grad()
            x = torch.full((4, 6), 0.1 + index, device=device.DEFAULT)
            model(x).square().sum().backward(create_graph=True)
            sum(p.grad.square().sum() for p in model.parameters()).backward()
        for buffer in mine.flat_buffers if asks else []:
            buffer.grads.mul_(0.5)
        for p in params_of(plain) if asks else []:
            p.grad.data.mul_(0.5)
        mine.step(), plain.step()
    assert_same(mine, plain)


# ---- values, state, groups that somebody else changes -----------------------------------------------


def change_value(optimizer):
    p = params_of(optimizer)[1]
    p.data = p.data.clone()


def change_slot(optimizer):
    state = optimizer.state[params_of(optimizer)[1]]
    state["exp_avg"] = state["exp_avg"] * 2


def change_slot_in_place(optimizer):
    optimizer.state[params_of(optimizer)[1]]["exp_avg_sq"].mul_(2)


def change_step(optimizer):
    optimizer.state[params_of(optimizer)[1]]["step"] = torch.tensor(40.0)


def drop_state(optimizer):
    del optimizer.state[params_of(optimizer)[1]]


def clear_state(optimizer):
    optimizer.state.clear()


def pop_slots(optimizer):
    optimizer.state[params_of(optimizer)[0]].clear()


def update_state(optimizer):
    optimizer.state.update({p: dict(state) for p, state in optimizer.state.items()})


def replace_state(optimizer):
    optimizer.state = collections.defaultdict(dict, {p: dict(state) for p, state in optimizer.state.items()})


def switch_variant(optimizer):
    optimizer.param_groups[0]["amsgrad"] ^= True


def switch_sign(optimizer):
    optimizer.param_groups[0]["maximize"] = True


def leave_group(optimizer):
    del optimizer.param_groups[0]["params"][0]


def other_list(optimizer):
    group = optimizer.param_groups[0]
    group["params"] = group["params"][1:]


def another_group(optimizer):
    p = support.tensors((9,), seed=5)[0]
    p.grad = torch.ones_like(p)
    optimizer.add_param_group({"params": [p], "lr": 0.5})


CHANGES = [
    change_value,
    change_slot,
    change_slot_in_place,
    change_step,
    drop_state,
    clear_state,
    pop_slots,
    update_state,
    replace_state,
    switch_variant,
    switch_sign,
    leave_group,
    other_list,
    another_group,
]


@TRUSTS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_between_steps_is_noticed(change, trusts):
    if trusts and change is change_value:
        pytest.skip("what is trusted")
    mine, plain = pair(trusts=trusts)
    train(mine, plain, 3)
    for optimizer in (mine, plain):
        change(optimizer)
    train(mine, plain, 3, first=3)
    assert_same(mine, plain)


@pytest.mark.parametrize("index", [0, -1])
def test_the_first_and_last_of_a_group_are_looked_at_even_if_trusted(index):
    mine, plain = pair(trusts=True)
    train(mine, plain, 3)
    replace(params_of(mine)[index])
    for optimizer in (mine, plain):
        optimizer.step()
    assert_same(mine, plain)
    assert_in_place(mine)


def test_state_that_was_removed_stays_what_it_was():
    """Its memory is not given to what comes after it."""
    mine, plain = pair()
    train(mine, plain, 2)
    removed = [optimizer.state.pop(params_of(optimizer)[0]) for optimizer in (mine, plain)]
    train(mine, plain, 2, first=2)
    support.assert_bits(removed[0], removed[1])
    assert_same(mine, plain)


# ---- memory that somebody else gives to tensors ----------------------------------------------------


def set_step_data(optimizer):
    optimizer.state[params_of(optimizer)[1]]["step"].data = torch.tensor(100.0)


def set_slot_data(optimizer):
    slot = optimizer.state[params_of(optimizer)[1]]["exp_avg"]
    slot.data = slot.data * 2


def set_slot_storage(optimizer):
    slot = optimizer.state[params_of(optimizer)[1]]["exp_avg_sq"]
    slot.set_(slot * 2)


def transpose_value(optimizer):
    p = params_of(optimizer)[0]
    p.data = p.data.t()


def transpose_grad_data(optimizer):
    p = params_of(optimizer)[0]
    p.grad.data = p.grad.data.t()


def transpose_grad(optimizer):
    params_of(optimizer)[0].grad.t_()


def narrow(optimizer):
    p = params_of(optimizer)[0]
    narrow.full = [*getattr(narrow, "full", []), p.data]
    p.data = p.data[:2]
    p.grad.data = p.grad.data[:2]
    for name, slot in optimizer.state[p].items():
        if name != "step":
            slot.data = slot.data[:2]


MEMORY = [transpose_value, transpose_grad_data, transpose_grad, narrow]


def step_among_allocations(mine, plain, steps):
    kept = []
    for index in range(steps):
        for p, q in zip(params_of(mine), params_of(plain), strict=True):
            q.grad.copy_(torch.sin(q.grad + index))
            p.grad.copy_(q.grad)
        kept += [torch.full((), float(n), device=device.DEFAULT) for n in range(50)]
        mine.step(), plain.step()


@pytest.mark.parametrize("change", MEMORY, ids=lambda change: change.__name__)
def test_tensors_with_other_memory_or_another_layout_are_noticed(change):
    narrow.full = []
    mine, plain = pair(shapes=((4, 4), (5,), (6,)))
    train(mine, plain, 3)
    for optimizer in (mine, plain):
        change(optimizer)
    step_among_allocations(mine, plain, 10)
    assert_same(mine, plain)
    if narrow.full:
        assert torch.equal(*narrow.full)


@TRUSTS
@pytest.mark.parametrize("change", [set_step_data, set_slot_data, set_slot_storage], ids=lambda change: change.__name__)
def test_memory_that_steps_still_write_to_is_kept(change, trusts):
    mine, plain = pair(shapes=((4, 4), (5,), (6,)), trusts=trusts)
    train(mine, plain, 3)
    before = support.twins([p.detach() for p in params_of(plain)])
    change(mine)
    step_among_allocations(mine, plain, 10)  # as if nothing had been changed
    for p, q in zip(params_of(mine), params_of(plain), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(before[0], params_of(plain)[0])


def keep_own_dict(optimizer):
    p = params_of(optimizer)[1]
    own = dict(optimizer.state[p])
    optimizer.state[p] = own
    return lambda: own.update(step=torch.tensor(30.0), exp_avg=own["exp_avg"] * 2)


def keep_the_state(optimizer):
    p = params_of(optimizer)[1]
    own = optimizer.state[p]
    optimizer.state[p] = own
    return lambda: own.update(step=torch.tensor(30.0), exp_avg=own["exp_avg"] * 2)


def keep_a_state_that_is_new(optimizer):
    p = params_of(optimizer)[1]
    del optimizer.state[p]
    own = optimizer.state[p]
    return lambda: own.update(step=torch.tensor(30.0))


@TRUSTS
@pytest.mark.parametrize(
    "keep", [keep_own_dict, keep_the_state, keep_a_state_that_is_new], ids=lambda keep: keep.__name__
)
def test_state_that_somebody_keeps_may_be_written_to_at_any_time(keep, trusts):
    mine, plain = pair(trusts=trusts)
    train(mine, plain, 3)
    change_mine, change_plain = keep(mine), keep(plain)
    train(mine, plain, 3, first=3)
    change_mine(), change_plain()
    train(mine, plain, 2, first=6)
    assert_same(mine, plain)


def test_states_are_copied_as_dicts_are():
    mine, plain = pair()
    train(mine, plain, 3)
    first, *_ = params_of(mine)
    other = {first: {"a": 1}, "b": {}}
    for copied in (mine.state.copy(), copy.copy(mine.state), mine.state | {}, {} | mine.state):
        assert type(copied) is collections.defaultdict and copied.default_factory is dict
        assert list(copied) == list(mine.state) and copied[first] is mine.state[first]
    assert (mine.state | other)[first] == {"a": 1} and "b" in (mine.state | other)
    assert (other | mine.state)[first] is mine.state[first] and "b" in (other | mine.state)
    train(mine, plain, 2, first=3)
    assert_same(mine, plain)


@TRUSTS
@pytest.mark.parametrize("stepped", [False, True])
def test_parameters_that_have_left_have_gradients_of_their_own(trusts, stepped):
    mine, plain = pair(trusts=trusts)
    train(mine, plain, 3)
    left = [optimizer.param_groups[0]["params"].pop(0) for optimizer in (mine, plain)]
    others = [make("SGD", [p]) for p in left]
    if stepped:
        mine.step(), plain.step()
        flatten(others[0])
    for p in left:
        p.grad = torch.ones_like(p) if p.grad is None else p.grad.fill_(1.0)
    mine.zero_grad(), plain.zero_grad(set_to_none=False)
    for optimizer in (mine, plain, *others):
        optimizer.step()
    assert left[0].grad.eq(1).all()
    assert_same(mine, plain), assert_same(*others)


@pytest.mark.parametrize("how", ["frozen", "stray", "stray and frozen"])
def test_zero_grad_with_zeros_keeps_gradients(how):
    mine, plain = pair("SGD")
    train(mine, plain, 3)
    kept = []
    for optimizer in (mine, plain):
        p = params_of(optimizer)[1]
        p.grad = p.grad if how == "frozen" else torch.ones_like(p)
        kept.append(p.grad)
        p.requires_grad_(how == "stray")
        optimizer.zero_grad(set_to_none=False)
        assert p.grad is kept[-1] and not p.grad.any()
    for _ in range(3):
        mine.step(), plain.step()
    assert_same(mine, plain)


def test_gradients_can_be_detached_in_place():
    mine, plain = pair()
    for index in range(3):
        train(mine, plain, 1, first=index)
        for p in params_of(mine):
            p.grad.detach_().zero_()
    assert_in_place(mine)
    assert not mine.flat_buffers[0].grads.any()


# ---- freezing -----------------------------------------------------------------------------------


@TRUSTS
@pytest.mark.parametrize("method", [False, True], ids=["functions", "methods"])
def test_freeze_and_thaw(trusts, method):
    models, (mine, plain) = twin_models(trusts)

    def train_on(first):
        for index in range(first, first + 3):
            for optimizer in (mine, plain):
                optimizer.zero_grad()
            backward(models, index)
            for optimizer in (mine, plain):
                optimizer.step()
        support.assert_bits(support.all_state(mine), support.all_state(plain))
        assert_in_place(mine)

    def both(function, *args, **kwargs):
        for model, optimizer in zip(models, (mine, plain), strict=True):
            getattr(optimizer, function.__name__)(*args, **kwargs) if method else function(
                *args, model, optimizer, **kwargs
            )

    train_on(0)
    both(freeze, "0.*")
    train_on(3)
    both(thaw, "0.weight")
    train_on(6)
    both(thaw, "0.*", lr=0.5, weight_decay=0.2)
    assert len(mine.param_groups) == 2
    train_on(9)
    both(freeze, "*")
    train_on_frozen = support.snapshot(mine)
    mine.step()
    support.assert_bits(support.all_state(mine), train_on_frozen)


def test_what_no_group_held_is_thawed_into_a_flat_group():
    models, (mine, plain) = twin_models(False)
    head = model_of(3), model_of(3)
    for optimizer, own in zip((mine, plain), head, strict=True):
        freeze(own)
        optimizer.thaw(own, torch.nn.ModuleDict({"head": own}), lr=0.3)
    for index in range(3):
        for optimizer in (mine, plain):
            optimizer.zero_grad()
        backward(models, index)
        backward(head, index)
        for optimizer in (mine, plain):
            optimizer.step()
    assert_same(mine, plain)
    assert len(mine.flat_buffers) == 2
    assert_in_place(mine)


def test_a_group_that_cannot_be_flat_is_refused_and_not_added():
    mine, plain = pair()
    train(mine, plain, 2)
    tied = support.tensors((4,))[0]
    with pytest.raises(fusestep.InvalidArgument, match="share memory"):
        mine.add_param_group({"params": [tied, torch.nn.Parameter(tied.detach()[1:])]})
    assert len(mine.param_groups) == 1
    train(mine, plain, 2, first=2)
    assert_same(mine, plain)


# ---- saving and loading -------------------------------------------------------------------------


@TRUSTS
def test_state_dicts_go_both_ways(name, trusts):
    mine, plain = pair(name, trusts)
    train(mine, plain, 2)
    for source, target in ((mine, plain), (plain, mine)):
        saved = io.BytesIO()
        torch.save(source.state_dict(), saved)
        saved.seek(0)
        train(mine, plain, 2, first=2)
        target.load_state_dict(torch.load(saved, weights_only=True))
        with torch.no_grad():
            for p, q in zip(params_of(target), params_of(source), strict=True):
                p.copy_(q)
        source.load_state_dict(copy.deepcopy(target.state_dict()))
        assert_in_place(mine)
        train(mine, plain, 3, first=5)
        assert_same(mine, plain)
    assert all(type(state) is dict for state in mine.state_dict()["state"].values())
    torchs = support.theirs(name)(support.twins(params_of(mine)), lr=1e-2, **support.FULLEST[name])
    torchs.load_state_dict(mine.state_dict())


@TRUSTS
def test_a_state_dict_that_was_taken_before_stays_what_it_was(trusts):
    """torch shares tensors with it as long as they are the optimizer's, and leaves them alone afterwards."""
    mine, plain = pair(trusts=trusts)
    train(mine, plain, 2)
    taken = [optimizer.state_dict() for optimizer in (mine, plain)]
    empty = [type(optimizer)(support.tensors(*SHAPES)).state_dict() for optimizer in (mine, plain)]
    for optimizer, state in zip((mine, plain), empty, strict=True):
        optimizer.load_state_dict(state)
    train(mine, plain, 2, first=2)
    for optimizer, state in zip((mine, plain), taken, strict=True):
        optimizer.load_state_dict(state)
    train(mine, plain, 2, first=4)
    assert_same(mine, plain)


@TRUSTS
def test_files_are_those_of_other_groups(trusts, tmp_path):
    models, (mine, plain) = twin_models(trusts)

    def step_both(index):
        for optimizer in (mine, plain):
            optimizer.zero_grad()
        backward(models, index)
        for optimizer in (mine, plain):
            optimizer.step()

    for index in range(2):
        step_both(index)
    mine.save(tmp_path / "mine", values=True)
    plain.save(tmp_path / "plain", values=True)
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "plain").read_bytes()
    for index in range(2, 4):
        step_both(index)
    mine.load(tmp_path / "plain")
    plain.load(tmp_path / "mine")
    assert_in_place(mine)
    for index in range(4, 6):
        step_both(index)
    support.assert_bits(support.all_state(mine), support.all_state(plain))
    mine.load(tmp_path / "plain", strict=False, rename=lambda name: name.replace("2.", "none."))
    plain.load(tmp_path / "mine", strict=False, rename=lambda name: name.replace("2.", "none."))
    step_both(6)
    support.assert_bits(support.all_state(mine), support.all_state(plain))
    assert_in_place(mine)


def test_copies_are_not_flat_and_go_on():
    mine, plain = pair()
    train(mine, plain, 2)
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert copied.flat_buffers == [] and all(type(state) is dict for state in copied.state.values())
        assert not set(params_of(copied)) & set(params_of(mine))
        other = copy.deepcopy(plain)
        train(copied, other, 2, first=2)
        support.assert_bits(support.all_state(copied), support.all_state(other))
        flatten(copied)
        train(copied, other, 2, first=4)
        support.assert_bits(support.all_state(copied), support.all_state(other))
    train(mine, plain, 2, first=2)
    assert_same(mine, plain)


# ---- what cannot be flat ------------------------------------------------------------------------


def one(*shape, **kwargs):
    return torch.nn.Parameter(torch.ones(*shape, device=device.DEFAULT, **kwargs))


def overlapping():
    whole = torch.ones(8, device=device.DEFAULT)
    return [torch.nn.Parameter(whole[:5]), torch.nn.Parameter(whole[4:])]


def of_another_optimizer():
    p = one(3)
    of_another_optimizer.kept = fusestep.optim.SGD([p])
    flatten(of_another_optimizer.kept)
    return [p]


def shared_between_processes():
    p = torch.nn.Parameter(torch.ones(3, device="cpu"))
    p.share_memory_()
    return [p]


def not_a_leaf():
    p = torch.ones(3, device=device.DEFAULT, requires_grad=True) * 2
    p.retain_grad()  # torch's optimizers take it
    return [p]


REFUSED = {
    "group 0, parameter 1: flatten: it was made under inference_mode": lambda: [
        one(3),
        support.of_inference_mode(one(3)),
    ],
    "group 0, parameter 0 and group 0, parameter 1 share memory": overlapping,
    "group 0, parameter 1: flatten: not for a tensor that is not dense in memory: shape .3., strides .2.": lambda: [
        one(3),
        torch.nn.Parameter(torch.ones(6, device=device.DEFAULT)[::2]),
    ],
    "strides .0.": lambda: [torch.nn.Parameter(torch.ones(1, device=device.DEFAULT).expand(4))],
    "only on cpu and cuda, got meta": lambda: [torch.nn.Parameter(torch.ones(3, device="meta"))],
    "it is in the buffer of another optimizer": of_another_optimizer,
    "group 0, parameter 0: flatten: it is not a leaf": not_a_leaf,
    "memory shared with other processes": shared_between_processes,
    "not initialized yet": lambda: [torch.nn.parameter.UninitializedParameter()],
    "sparse": lambda: [torch.nn.Parameter(torch.ones(3).to_sparse())],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    parameters = REFUSED[message]()
    optimizer = fusestep.optim.SGD(parameters, lr=0.1)
    strided = [p for p in parameters if p.layout is torch.strided and not torch.nn.parameter.is_lazy(p)]
    addresses = [p.data_ptr() for p in strided]
    with pytest.raises(fusestep.InvalidArgument, match=message):
        flatten(optimizer)
    assert optimizer.flat_buffers == []
    assert addresses == [p.data_ptr() for p in strided]


def test_refused_optimizers():
    p = one(3)
    with pytest.raises(fusestep.InvalidArgument, match="expected an optimizer of fusestep.optim, got SGD"):
        flatten(torch.optim.SGD([p]))
    with pytest.raises(fusestep.InvalidArgument, match="differentiable=True"):
        flatten(fusestep.optim.SGD([p], differentiable=True))
    optimizer = fusestep.optim.SGD([("w", p)])
    with pytest.raises(fusestep.InvalidArgument, match="trust_gradients must be True or False, got 1"):
        flatten(optimizer, trust_gradients=1)
    flatten(optimizer)
    with pytest.raises(fusestep.InvalidArgument, match="flat already"):
        flatten(optimizer)


def test_an_optimizer_that_is_gone_holds_nothing():
    p = one(3)
    for _ in range(3):
        optimizer = fusestep.optim.SGD([p], lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which makes a cycle
        flatten(optimizer)


def test_state_that_was_kept_does_not_hold_its_optimizer():
    p = one(3)
    optimizer = fusestep.optim.Adam([p])
    flatten(optimizer)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = dict(optimizer.state)
    del optimizer
    flatten(fusestep.optim.Adam([p]))
    saved[p]["step"] = torch.tensor(1.0)


def test_refused_in_inference_mode():
    p, q = one(3), one(4)
    optimizer = fusestep.optim.SGD([p], lr=0.1)
    with torch.inference_mode(), pytest.raises(fusestep.InvalidArgument, match="inference_mode"):
        flatten(optimizer)
    assert optimizer.flat_buffers == []
    flatten(optimizer)
    with torch.inference_mode(), pytest.raises(fusestep.InvalidArgument, match="inference_mode"):
        optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 1
    p.square().sum().backward()


def test_no_buffer_of_gradients_is_made_within_a_capture(monkeypatch):
    p = one(3).requires_grad_(False)
    optimizer = fusestep.optim.SGD([p], lr=0.1)
    (buffer,) = flatten(optimizer)
    assert "values)" in repr(buffer)
    monkeypatch.setattr(fusestep.flat, "_capturing", lambda: True)
    with pytest.raises(fusestep.InvalidArgument, match="while a CUDA graph is captured"):
        buffer.grad(0)
    monkeypatch.undo()
    assert buffer.grad(0).shape == (3,) and "values, grads)" in repr(buffer)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_is_refused():
    p = one(3)
    with pytest.raises(fusestep.InvalidArgument, match="'a' and group 0, parameter 'b' share memory"):
        flatten(fusestep.optim.SGD([("a", p), ("b", p)]))


# ---- beside others --------------------------------------------------------------------------------


def run_under_distributed_data_parallel(rank, trusts, as_views):
    models, (mine, plain) = twin_models(trusts)
    ddp = torch.nn.parallel.DistributedDataParallel(models[0], gradient_as_bucket_view=as_views)
    for index in range(5):
        for optimizer in (mine, plain):
            optimizer.zero_grad()
        backward((ddp, models[1]), index)
        for optimizer in (mine, plain):
            optimizer.step()
        assert_same(mine, plain)
    assert_in_place(mine)


@pytest.mark.parametrize("as_views", [False, True], ids=["copied", "gradient_as_bucket_view"])
@pytest.mark.only_on("cpu", reason="gloo")
@TRUSTS
def test_under_distributed_data_parallel(trusts, as_views):
    """In a process of its own: the reducer's end waits for threads that wait for Python."""
    ranks.run(1, run_under_distributed_data_parallel, trusts, as_views)


@TRUSTS
def test_schedules_and_averages(trusts):
    models, (mine, plain) = twin_models(trusts)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=12) for o in (mine, plain)]
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in models]
    for index in range(10):
        for optimizer in (mine, plain):
            optimizer.zero_grad()
        backward(models, index)
        for optimizer, schedule, average, model in zip((mine, plain), schedules, averages, models, strict=True):
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
    assert_same(mine, plain)
    for p, q in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        assert torch.equal(p, q)


@TRUSTS
def test_hooks_and_closures(trusts):
    models, (mine, plain) = twin_models(trusts)
    calls = []
    for optimizer in (mine, plain):
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for index in range(4):
        for optimizer, model in zip((mine, plain), models, strict=True):

            def closure(optimizer=optimizer, model=model, index=index):
                optimizer.zero_grad()
                loss = model(torch.full((4, 6), 0.1 * index, device=device.DEFAULT)).square().sum()
                loss.backward()
                return loss

            assert optimizer.step(closure).requires_grad
    assert len(calls) == 8
    assert_same(mine, plain)


@TRUSTS
@pytest.mark.parametrize("stepped", [False, True])
def test_zero_grad_of_a_gradient_that_was_given_other_memory(stepped, trusts):
    """It is not in the buffer any more, though it is the same tensor."""
    p, q = support.tensors((3,), (3,))
    optimizer = fusestep.optim.SGD([p, q], lr=0.1)
    fusestep.optim.flatten(optimizer, trust_gradients=trusts)
    (p.sum() + q.sum()).backward()
    if stepped:
        optimizer.step()
    p.grad.data = torch.full_like(p, 7.0)
    optimizer.zero_grad()
    if not trusts:
        assert p.grad is None or not p.grad.any()
    assert q.grad is not None and not q.grad.any()


def test_names_that_are_edited_change_the_random_bits():
    optimizers = []
    for flat in (False, True):
        p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device=device.DEFAULT))
        optimizers.append(fusestep.optim.SGD([("w", p)], lr=1e-3, rounding="stochastic"))
        if flat:
            fusestep.optim.flatten(optimizers[-1])
    for index in range(4):
        for optimizer in optimizers:
            (p,) = params_of(optimizer)
            p.grad = torch.ones_like(p) if p.grad is None else p.grad.fill_(1)
            if index == 2:
                optimizer.param_groups[0]["param_names"] = ["v"]
            optimizer.step()
        assert torch.equal(params_of(optimizers[0])[0], params_of(optimizers[1])[0])


def test_a_loaded_dict_keeps_its_step_counts():
    saved = torch.optim.Adam(support.tensors((3,)))
    give_grads(saved, saved, 0)
    saved.step()
    loaded = saved.state_dict()
    optimizer = fusestep.optim.Adam(support.tensors((3,)))
    fusestep.optim.flatten(optimizer)
    optimizer.load_state_dict(loaded)
    give_grads(optimizer, optimizer, 1)
    optimizer.step()
    assert loaded["state"][0]["step"] == 1 and optimizer.state[params_of(optimizer)[0]]["step"] == 2


def test_groups_beside_other_flat_optimizers_are_looked_at_once(monkeypatch):
    """For each parameter it took seconds for a few thousand."""
    other = fusestep.optim.SGD(support.tensors((3,)), lr=0.1)
    fusestep.optim.flatten(other)
    calls = []
    let_go = fusestep.flat.Flat.let_go
    monkeypatch.setattr(fusestep.flat.Flat, "let_go", lambda self: calls.append(self) or let_go(self))
    many = fusestep.optim.SGD(support.tensors(*[(2,)] * 50), lr=0.1)
    fusestep.optim.flatten(many)
    assert calls.count(other._flat) == 1


# ---- graphs ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@TRUSTS
def test_replays_are_steps(trusts):
    mine, plain = pair("SGD", trusts, max_grad_norm=0.5)
    train(mine, plain, 2)
    graph = device.capture(mine.step)
    for index in range(10):
        give_grads(mine, plain, 100 + index)
        for optimizer in (mine, plain):
            optimizer.param_groups[0]["lr"] *= 0.9
        mine.sync_hyper()
        graph.replay()
        plain.step()
        if index == 5:
            train(mine, plain, 1, first=50)
    assert_same(mine, plain)
