# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Steps in CUDA graphs. Also on simulated devices, which capture what is ours and not what is torch's."""

import gc
import pathlib
import re
import weakref

import numpy
import pytest
import torch

import device
import fusestep
import support
from test_cuda import assert_same, on_cpu, on_home, params_of, scalar, train

pytestmark = pytest.mark.gpu

CAPTURABLE = ("Adam", "AdamW", "RMSprop")
REFUSED = "the step cannot be captured into a CUDA graph: "


def capturable(name, **kwargs):
    """An optimizer on the device whose step torch lets be captured, and one on the CPU beside it."""
    flag = {"capturable": True} if name in CAPTURABLE else {}
    return on_home(name, **flag, **kwargs), on_cpu(name, **kwargs)


def grads_in_place(optimizer, seed):
    """Other gradients, where they lie."""
    grads = [p.grad for p in params_of(optimizer)]
    support.set_grads(params_of(optimizer), seed)
    for p, grad in zip(params_of(optimizer), grads, strict=True):
        grad.copy_(p.grad)
        p.grad = grad


def replay(graph, mine, reference, seed):
    """A replay, and a step on the CPU, with new gradients."""
    grads_in_place(mine, seed)
    graph.replay()
    train(reference, 1, seed=seed)


# ---- replays are steps -------------------------------------------------------------------------


GUARDED = {"max_grad_norm": 20.0, "clip_value": 0.5, "skip_nonfinite": True}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # replays are no calls of step
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("guards", [{}, GUARDED], ids=["plain", "guarded"])
def test_a_hundred_replays_are_a_hundred_steps(name, guards, scale):
    """With a schedule and skipped steps between, and with everything a step does besides its rule."""
    mine, reference = capturable(name, lr=0.1, **guards)
    scales = [None if scale is None else scalar(scale, where) for where in (device.home(), None)]
    for optimizer, own in zip((mine, reference), scales, strict=True):
        optimizer.grad_scale, optimizer.found_inf = own, scalar(0.0, None if optimizer is reference else device.home())
        train(optimizer, 2)
    graph = device.capture(mine.step)
    assert_same(mine, reference)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.7) for optimizer in (mine, reference)]
    skipped, clipped = 0, 0
    for index in range(100):
        mine.found_inf.fill_(float(index % 6 == 1))
        reference.found_inf.fill_(float(index % 6 == 1))
        support.set_grads(params_of(reference), seed=index, scale=1.0 + index % 2)
        if guards and index % 8 == 3:
            params_of(reference)[3].grad[5] = torch.inf
        for p, q in zip(params_of(mine), params_of(reference), strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
        reference.step()
        skipped += index % 6 == 1 or bool(guards and index % 8 == 3)
        if guards:
            norm = float(mine.grad_norm)
            assert norm == float(reference.grad_norm)
            clipped += 20.0 < norm < torch.inf
        for p, q in zip(params_of(mine), params_of(reference), strict=True):
            support.assert_bits({"grad": p.grad}, {"grad": q.grad})
        for schedule in schedules:
            schedule.step()
        mine.sync_hyper()
        if index % 25 == 0:
            assert_same(mine, reference)
    assert mine.param_groups[0]["lr"] < 0.002
    assert mine.skipped_steps == skipped == reference.skipped_steps
    assert not guards or scale or 10 < clipped < 90
    assert_same(mine, reference)


def test_a_tensor_lr_is_followed_without_sync(name):
    lr = scalar(0.0, device.home())
    mine, reference = capturable(name, lr=lr)[0], on_cpu(name)
    for index in range(5):
        value = 0.5 / (index + 1)
        reference.param_groups[0]["lr"] = value
        lr.fill_(value)
        if index == 0:
            for optimizer in (mine, reference):
                train(optimizer, 1)
            graph = device.capture(mine.step)
        replay(graph, mine, reference, seed=index)
    support.assert_close(support.all_state(mine), support.all_state(reference), steps=6)


def test_every_setting_is_followed(name):
    mine, reference = capturable(name)
    for optimizer in (mine, reference):
        train(optimizer, 1)
    graph = device.capture(mine.step)
    settings = {
        "Adam": {"betas": (0.5, 0.75), "eps": 1e-3},
        "SGD": {"momentum": 0.5, "dampening": 0.25},
        "RMSprop": {"alpha": 0.5, "eps": 1e-3, "momentum": 0.5},
    }
    for index, (key, value) in enumerate(
        {"weight_decay": 0.25, "maximize": True, **settings[name.removesuffix("W")]}.items()
    ):
        for optimizer in (mine, reference):
            optimizer.param_groups[0][key] = value
        mine.sync_hyper()
        replay(graph, mine, reference, seed=index)
        assert_same(mine, reference)


def test_eager_steps_come_between(name):
    mine, reference = capturable(name)
    for optimizer in (mine, reference):
        train(optimizer, 1)
    graph = device.capture(mine.step)
    for index in range(6):
        if index % 2:
            grads_in_place(mine, seed=index)
            mine.step()
            train(reference, 1, seed=index)
        replay(graph, mine, reference, seed=10 + index)
        assert_same(mine, reference)
    again = on_home(name)
    again.load_state_dict(mine.state_dict())
    for state in again.state.values():
        for value in state.values():
            device.beside(params_of(mine)[0], value)
    support.assert_bits(
        {key: value for key, value in support.all_state(again).items() if key[1] != "value"},
        {key: value for key, value in support.all_state(mine).items() if key[1] != "value"},
    )


def test_a_capture_keeps_its_gradients(name):
    """torch's recipe: there are none before it; the graph has those that come to be in it."""
    mine, reference = capturable(name)
    for optimizer in (mine, reference):
        train(optimizer, 1)
    mine.zero_grad(set_to_none=True)
    sources = [torch.zeros_like(p) for p in params_of(mine)]
    for p, source in zip(params_of(mine), sources, strict=True):
        device.beside(p, source)

    def compute_and_step():
        for p, source in zip(params_of(mine), sources, strict=True):
            p.grad = source if device.SIMULATED else source.clone()
        mine.step()

    graph = device.capture(compute_and_step)
    captured = [p.grad for p in params_of(mine)]
    for index in range(4):
        support.set_grads(params_of(mine), seed=index)
        for p, source in zip(params_of(mine), sources, strict=True):
            source.copy_(p.grad)
        if index % 2:  # an eager one with gradients elsewhere
            mine.step()
            train(reference, 1, seed=index)
        graph.replay()
        train(reference, 1, seed=index)
        assert_same(mine, reference)
    del captured


def test_who_rests_and_who_comes(name):
    """Frozen parameters rest in the graph; groups that come later are not in it, but do not disturb it."""
    mine, reference = capturable(name)
    for optimizer in (mine, reference):
        train(optimizer, 1)
        optimizer.freeze(params_of(optimizer)[1])
    for optimizer in (mine, reference):
        params_of(optimizer)[0].grad.zero_()
        optimizer.step()  # without the frozen one
    graph = device.capture(mine.step)
    for index in range(6):
        if index == 3:
            for optimizer in (mine, reference):
                late = torch.nn.Parameter(torch.ones(5, device=params_of(optimizer)[0].device))
                late.grad = torch.ones_like(late)
                for tensor in (late, late.grad):
                    device.beside(params_of(optimizer)[0], tensor)
                optimizer.add_param_group({"params": [late], "lr": 0.5})
                optimizer.step()
                late.grad = None
        for optimizer in (mine, reference):
            optimizer.param_groups[0]["lr"] = 0.1 / (index + 1)
        mine.sync_hyper()
        seeded = [p for p in params_of(mine) if p.grad is not None]
        for p, q in zip(params_of(mine), params_of(reference), strict=True):
            if p.grad is not None:
                value = torch.full_like(q, 0.5 - 0.1 * index)
                p.grad.copy_(value)
                q.grad = device.beside(q, value)
        graph.replay()
        reference.step()
        assert_same(mine, reference)
        assert len(seeded) == 3


# ---- what cannot be captured -------------------------------------------------------------------


def refusal(mine, error=fusestep.InvalidArgument):
    """The message; the capture itself is none the worse."""
    raised = []

    def step():
        with pytest.raises(error) as caught:
            mine.step()
        raised.append(str(caught.value))
        del caught  # whose frames hold torch's graph, which must not be collected in another capture

    device.capture(step).replay()
    return raised[0]


def test_missing_gradients_are_refused(name):
    mine, _ = capturable(name)
    train(mine, 1)
    before = support.snapshot(mine)
    params_of(mine)[2].grad = None
    assert refusal(mine) == REFUSED + ("parameter 2 of group 0 has no gradient; compute one, or freeze the parameter")
    mine.param_groups[0]["param_names"] = ["a", "b", "c.weight", "d"]
    assert "parameter 'c.weight' of group 0 has no gradient" in refusal(mine)
    support.assert_bits(support.all_state(mine), before)
    params_of(mine)[2].requires_grad_(False)
    mine.step()
    device.capture(mine.step).replay()


def test_missing_state_is_refused(name):
    mine, reference = capturable(name)
    support.set_grads(params_of(mine), seed=0)
    assert refusal(mine) == REFUSED + (
        "parameter 0 of group 0 has no state yet; make one step outside of the capture first"
    )
    assert not mine.state
    for optimizer in (mine, reference):
        train(optimizer, 1)
    replay(device.capture(mine.step), mine, reference, seed=1)
    assert_same(mine, reference)


def test_changed_settings_are_refused(name):
    mine, reference = capturable(name)
    for optimizer in (mine, reference):
        train(optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.03
    assert refusal(mine) == REFUSED + (
        f"settings of group '0' have changed and are not on cuda:{device.home()} yet; call sync_hyper() first"
    )
    mine.sync_hyper()
    replay(device.capture(mine.step), mine, reference, seed=1)
    assert_same(mine, reference)


def test_other_parameters_than_last_time_are_refused(name):
    mine, _ = capturable(name)
    train(mine, 1)
    mine.freeze(params_of(mine)[1])
    assert "which parameters step on cuda" in refusal(mine)
    mine.step()
    device.capture(mine.step).replay()


def test_tensors_that_came_since_the_last_step_are_refused():
    """Where there is no state to be missed."""
    mine, reference = on_home("SGD", momentum=0, dampening=0), on_cpu("SGD", momentum=0, dampening=0)
    for optimizer in (mine, reference):
        train(optimizer, 1)
        late = torch.nn.Parameter(torch.ones(5, device=params_of(optimizer)[0].device))
        device.beside(params_of(optimizer)[0], late)
        optimizer.add_param_group({"params": [late]})
        support.set_grads(params_of(optimizer), seed=1)
    assert refusal(mine) == REFUSED + (
        "its parameters, or their dtypes or rules, are not those of the last step; "
        "make one step outside of the capture first"
    )
    for optimizer in (mine, reference):
        optimizer.step()
    replay(device.capture(mine.step), mine, reference, seed=2)
    assert_same(mine, reference)


def test_what_torch_steps_is_refused(name):
    mine, _ = capturable(name)
    train(mine, 1)
    mine.param_groups[0]["differentiable"] = True
    assert refusal(mine) == REFUSED + (
        "parameter 0 of group 0 is left to torch's own step, as one to be differentiated through"
    )
    mine.param_groups[0]["differentiable"] = False
    p = params_of(mine)[0]
    grad, p.grad = p.grad, device.beside(p, torch.zeros(p.shape[::-1], device=p.device).t())
    assert "is laid out so that the step must copy it" in refusal(mine)
    p.grad = grad
    device.capture(mine.step).replay()


def test_sync_hyper_is_refused_in_a_capture(name):
    mine, _ = capturable(name)
    train(mine, 1)
    mine.param_groups[0]["lr"] = 0.03

    def sync():
        with pytest.raises(fusestep.InvalidArgument, match="sync_hyper.. cannot be captured"):
            mine.sync_hyper()

    device.capture(sync)


@pytest.mark.only_on("cuda", reason="torch knows of captures on its own devices alone")
@pytest.mark.parametrize("name", CAPTURABLE)
def test_torchs_check_of_capturable(name):
    mine = on_home(name)
    train(mine, 1)
    message = refusal(mine, RuntimeError)
    assert "capture of step() for an instance of" in message and "capturable is False" in message


@pytest.mark.only_on("cuda_sim", reason="a real capture is torch's to say")
def test_torchs_check_is_asked(name, monkeypatch):
    """Where torch has one: in captures, and where a group says it is capturable."""
    asked = []
    monkeypatch.setattr(
        torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: asked.append(self)
    )
    mine, plain = capturable(name)[0], on_home(name)
    for optimizer in (plain, mine):
        train(optimizer, 1)
    assert asked == ([mine] if name in CAPTURABLE else [])
    device.capture(plain.step)
    assert asked == ([mine, plain] if name in CAPTURABLE else [])


# ---- what comes between ------------------------------------------------------------------------


def test_optimizers_are_collected_in_a_capture(name):
    """The garbage collector comes when it likes; also to those whose steps are in graphs, and wait for them."""
    gc.collect()
    mine, reference = capturable(name)
    for optimizer in (mine, reference):
        train(optimizer, 1)
    collected = []
    for is_in_graph in (False, True):
        other, _ = capturable(name, max_grad_norm=1.0)
        train(other, 1)
        if is_in_graph:
            graph = device.capture(other.step)
            graph.replay()
            del graph  # torch's own, which may not be
        cycle = [other]
        cycle.append(cycle)
        collected.append(weakref.ref(other))
        del other, cycle

    def step():
        assert all(other() is not None for other in collected)
        gc.collect()
        assert all(other() is None for other in collected)
        mine.step()

    gc.disable()
    try:
        graph = device.capture(step)
    finally:
        gc.enable()
    replay(graph, mine, reference, seed=1)
    for optimizer in (mine, reference):  # which lets go of what was left
        train(optimizer, 1, seed=2)
    assert_same(mine, reference)


# ---- arrays ------------------------------------------------------------------------------------


def test_cupy_arrays_in_graphs(cupy, name):
    random = numpy.random.default_rng(1)
    start, *grads = (random.standard_normal((37, 3)).astype(numpy.float32) for _ in range(7))
    expected = start.copy()
    reference = fusestep.Optimizer(name, {"w": expected}, **support.FULLEST[name])
    w, grad = cupy.asarray(start), cupy.asarray(grads[0])
    cupy.cuda.get_current_stream().synchronize()
    mine = fusestep.Optimizer(name, {"w": w}, **support.FULLEST[name])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        with pytest.raises(fusestep.InvalidArgument, match="parameter 'w' has no gradient"):
            mine.step({})
        stream.end_capture()
        mine.step({"w": grad})
        reference.step({"w": grads[0]})
        stream.begin_capture()
        mine.step({"w": grad})
        graph = stream.end_capture()
        for index, values in enumerate(grads[1:]):
            for optimizer in (mine, reference):
                optimizer.set_hyper(lr=0.1 / (index + 1))
            reference.step({"w": values})
            mine.sync_hyper()
            grad.set(values)
            graph.launch()
            assert numpy.array_equal(w.get(), expected)
        assert mine.step_count("w") == len(grads)


# ---- as torch's documentation has it -----------------------------------------------------------


@pytest.mark.only_on("cuda", reason="a simulated device does not capture torch's operations")
@pytest.mark.parametrize("scaled", [False, True])
def test_whole_network_capture(name, scaled):
    """Forward, backward, GradScaler and step in one graph, beside an eager run of it."""
    torch.manual_seed(1)
    models = [torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    flag = {"capturable": True} if name in CAPTURABLE else {}
    optimizers = [support.ours(name)(model.parameters(), lr=1e-2, **flag) for model in models]
    scalers = [torch.amp.GradScaler("cuda", init_scale=64.0, enabled=scaled) for _ in models]
    static_input, static_target = torch.zeros(16, 9), torch.zeros(16, 4)

    def train_step(which):
        loss = torch.nn.functional.mse_loss(models[which](static_input), static_target)
        scalers[which].scale(loss).backward()
        scalers[which].step(optimizers[which])
        if scaled:
            scalers[which].update()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for which in range(2):
                optimizers[which].zero_grad(set_to_none=True)
                train_step(which)
    torch.cuda.current_stream().wait_stream(stream)
    optimizers[0].zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(0)
    for index in range(20):
        static_input.copy_(torch.randn(16, 9))
        static_target.copy_(torch.randn(16, 4))
        graph.replay()
        optimizers[1].zero_grad(set_to_none=True)
        train_step(1)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (index + 2)
        optimizers[0].sync_hyper()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.only_on("cuda", reason="a simulated device does not capture torch's operations")
def test_documentation_runs():
    page = pathlib.Path(__file__).parents[2] / "docs" / "cuda.md"
    (program,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(program, str(page), "exec"), {})
