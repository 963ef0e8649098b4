# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What is CUDA's alone: streams, scalars and steps on the device, several devices. Also on simulated ones."""

import contextlib
import copy

import numpy
import pytest
import torch

import device
import fusestep
import support

pytestmark = pytest.mark.gpu

SHAPES = ((9, 4), (130,), (), (1031,))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
two_devices = pytest.mark.skipif(device.count() < 2, reason="needs two CUDA devices")


@pytest.fixture(autouse=True)
def as_late_as_can_be():
    """Nothing has run by chance when somebody should have waited for it."""
    if device.SIMULATED:
        device.start_simulation(seed=3)


def optimizer_on(places, name, dtype=torch.float32, **kwargs):
    """Over SHAPES, the parameters on these devices in turn; None is the CPU."""
    start = support.tensors(*SHAPES, dtype=dtype)
    placed = [device.place(p.detach(), places[i % len(places)]) for i, p in enumerate(start)]
    parameters = [torch.nn.Parameter(p) for p in placed]
    return support.ours(name)(parameters, **{**support.FULLEST[name], "weight_decay": 0.1, **kwargs})


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, steps, seed=0):
    for index in range(steps):
        support.set_grads(params_of(optimizer), seed=seed + index)
        optimizer.step()


def scalar(value, index):
    return device.place(torch.tensor(value), index)


def on_home(name, **kwargs):
    return optimizer_on([device.home()], name, **kwargs)


def on_cpu(name, **kwargs):
    return optimizer_on([None], name, **kwargs)


def assert_same(mine, reference):
    support.assert_bits(support.all_state(mine), support.all_state(reference))


def grads_later(optimizer, seed, index=None):
    """Gradients of a seed, that are NaN until the current stream gets there; of one device's parameters."""
    support.set_grads(params_of(optimizer), seed)
    for p in params_of(optimizer):
        grad = p.grad
        p.grad = device.beside(p, torch.full_like(p, torch.nan))
        device.later(lambda p=p.grad, grad=grad: p.copy_(grad), index)


# ---- bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_cpu(name, dtype):
    pair = on_home(name, dtype=dtype), on_cpu(name, dtype=dtype)
    for index in range(10):
        for optimizer in pair:
            if index == 4:
                optimizer.param_groups[0]["lr"] = 0.3
            support.set_grads(params_of(optimizer), seed=index, scale=10.0 ** (index % 3 - 1))
            if index % 3 == 2:
                params_of(optimizer)[index % 4].grad = None
            optimizer.step()
        assert_same(*pair)
    support.stepped_by_us(pair[0], steps=10)


# ---- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("through_methods", [False, True], ids=["shim", "methods"])
def test_step_follows_its_stream(name, through_methods):
    """Gradients that the stream has yet to write; first where state is made, then where it exists."""
    mine, reference = on_home(name), on_cpu(name)
    if through_methods:
        support.through_methods(mine)
    for index in range(4):
        with device.side_stream(), device.unsynchronised():
            grads_later(mine, seed=index)
            mine.step()
        train(reference, 1, seed=index)
        assert_same(mine, reference)


@pytest.mark.only_on("cuda_sim", reason="a device is free to be fast")
def test_nothing_has_happened_before_somebody_waits(name):
    mine, reference = on_home(name), on_cpu(name)
    train(mine, 1)
    train(reference, 2)
    before = support.snapshot(mine)
    versions = [p._version for p in params_of(mine)]
    support.set_grads(params_of(mine), seed=1)
    with device.unsynchronised():
        mine.step()
        assert device.sim.pending() > 0
        support.assert_bits(support.all_state(mine), before)
        assert [p._version for p in params_of(mine)] == [version + 1 for version in versions]
        assert mine._stepper.stepped == len(params_of(mine))
    assert device.sim.pending() == 0
    assert_same(mine, reference)
    assert all(state.get("step", 2) == 2 for state in mine.state.values())


@pytest.mark.only_on("cuda_sim", reason="counts calls of the runtime")
def test_a_steady_step_waits_for_nothing(name):
    lr, found_inf = scalar(0.01, device.home()), scalar(0.0, device.home())
    mine = on_home(name, lr=lr)
    train(mine, 2)
    mine.grad_scale, mine.found_inf = None, found_inf
    mine.step()
    for moved in (False, True):
        if moved:
            kept = [p.grad for p in params_of(mine)]
            support.set_grads(params_of(mine), seed=5)
        with device.unsynchronised():
            device.sim.forget_calls()
            mine.step()
            calls = {key: device.sim.calls(f"cuda{key}") for key in ("LaunchKernel", "MemcpyAsync", "MallocAsync")}
            waits = [device.sim.calls(f"cuda{key}Synchronize") for key in ("Stream", "Event", "Device")]
        assert calls == {"LaunchKernel": 2, "MemcpyAsync": int(moved), "MallocAsync": 0}
        assert waits == [0, 0, 0]
    del kept


@pytest.mark.only_on("cuda_sim", reason="counts calls of the runtime")
def test_a_clipped_steady_step_waits_for_nothing(name):
    """Two launches more, for the norm; handing it out is a copy on the device."""
    mine = on_home(name, max_grad_norm=0.5, skip_nonfinite=True)
    train(mine, 3)
    mine.grad_scale, mine.found_inf = scalar(2.0, device.home()), scalar(0.0, device.home())
    mine.step()
    with device.unsynchronised():
        device.sim.forget_calls()
        mine.step()
        stepped = {key: device.sim.calls(f"cuda{key}") for key in ("LaunchKernel", "MemcpyAsync", "MallocAsync")}
        norm = mine.grad_norm
        copied = device.sim.calls("cudaMemcpyAsync")
        waits = [device.sim.calls(f"cuda{key}Synchronize") for key in ("Stream", "Event", "Device")]
    assert stepped == {"LaunchKernel": 4, "MemcpyAsync": 0, "MallocAsync": 0}
    assert copied == 1 and waits == [0, 0, 0]
    assert float(norm) > 0


# ---- scalars on the device ---------------------------------------------------------------------


@pytest.mark.parametrize("first_step", [True, False])
def test_found_inf_is_read_on_the_device(name, first_step):
    """It is 0 until the stream gets there. Where state is missing, the host waits for it and makes none."""
    mine, reference = on_home(name), on_cpu(name)
    if not first_step:
        for optimizer in (mine, reference):
            train(optimizer, 2)
    before = support.snapshot(mine)
    found_inf = scalar(0.0, device.home())
    with device.side_stream(), device.unsynchronised():
        support.set_grads(params_of(mine), seed=7)
        device.later(lambda: found_inf.fill_(1.0))
        if first_step and device.SIMULATED:
            device.synchronize()  # what reading a tensor does elsewhere
        mine.grad_scale, mine.found_inf = None, found_inf
        mine.step()
    support.assert_bits(support.all_state(mine), before)
    with device.side_stream(), device.unsynchronised():
        device.later(lambda: found_inf.fill_(0.0))
        if first_step and device.SIMULATED:
            device.synchronize()
        mine.step()
    train(reference, 1, seed=7)
    assert_same(mine, reference)


def test_lr_is_read_on_the_device(name):
    lr = scalar(0.0, device.home())
    mine, reference = on_home(name, lr=lr), on_cpu(name, lr=0.25)
    for index in range(3):
        with device.side_stream(), device.unsynchronised():
            lr.fill_(0.0)
            support.set_grads(params_of(mine), seed=index)
            device.later(lambda: lr.fill_(0.25))
            mine.step()
        train(reference, 1, seed=index)
        assert_same(mine, reference)


@two_devices
def test_found_inf_of_a_device_without_parameters(name):
    """GradScaler keeps its scalars where the first loss was. They are of that device's stream."""
    mine, reference = optimizer_on([1], name), on_cpu(name)
    for optimizer in (mine, reference):
        train(optimizer, 2)
    found_inf = scalar(0.0, 0)
    for skipped in (True, False):
        with device.side_stream(0), device.side_stream(1), device.unsynchronised():
            support.set_grads(params_of(mine), seed=3)
            device.later(lambda value=float(skipped): found_inf.fill_(value), 0)
            mine.grad_scale, mine.found_inf = None, found_inf
            mine.step()
        if not skipped:
            train(reference, 1, seed=3)
        assert_same(mine, reference)


@pytest.mark.only_on("cuda", reason="a simulated device has torch's GradScaler of the CPU, as in the stories")
def test_grad_scaler_does_not_wait(name):
    """A step of half a second of the device's time returns at once, though it may be skipped."""
    mine = on_home(name)
    scaler = support.scaler(2.0)
    scaler.scale(torch.zeros(()))
    for late in (False, False, True):
        support.set_grads(params_of(mine), seed=1)
        torch.cuda.synchronize()
        if late:
            torch.cuda._sleep(500_000_000)
        done = torch.cuda.Event()
        done.record()
        scaler.step(mine)
        assert not late or not done.query()
        scaler.update()


# ---- state -------------------------------------------------------------------------------------


@pytest.mark.only_on("cuda", reason="simulated tensors do not say is_cuda")
@pytest.mark.parametrize("flag", [None, "fused", "capturable"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_step_is_on_the_device_and_saved_as_torch_keeps_it(name, flag):
    if name == "RMSprop" and flag == "fused":
        pytest.skip("torch's RMSprop has no fused")
    mine = on_home(name)
    train(mine, 2)
    if flag is not None:
        mine.param_groups[0][flag] = True
    assert all(state["step"].is_cuda for state in mine.state.values())
    saved = copy.deepcopy(mine.state_dict())
    assert {own["step"].is_cuda for own in saved["state"].values()} == {flag is not None}
    torchs = support.theirs(name)(support.twins(params_of(mine)), **support.FULLEST[name])
    torchs.load_state_dict(copy.deepcopy(saved))
    again = support.ours(name)(support.twins(params_of(mine)), **support.FULLEST[name])
    again.load_state_dict(copy.deepcopy(saved))
    for optimizer in (mine, torchs, again):
        train(optimizer, 2, seed=5)
    assert_same(again, mine)
    further = support.ulps_of_fused(torchs)
    support.assert_close(support.all_state(mine), support.all_state(torchs), 4, ulps=8, ulps_of_averages=further)


# ---- several devices ---------------------------------------------------------------------------


@two_devices
@pytest.mark.parametrize("places", [(0, 1), (1, 0), (1,), (None, 1, 0)], ids=str)
def test_parameters_on_several_devices(name, places):
    """Each device has a stream of its own, and gradients that are late."""
    mine, reference = optimizer_on(places, name), on_cpu(name)
    for index in range(4):
        with contextlib.ExitStack() as stack:
            for one in (0, 1):
                stack.enter_context(device.side_stream(one))
            stack.enter_context(device.unsynchronised())
            support.set_grads(params_of(mine), seed=index)
            for p, where in zip(params_of(mine), places * len(SHAPES), strict=False):
                if where is not None:
                    grad, p.grad = p.grad, device.beside(p, torch.full_like(p, torch.nan))
                    device.later(lambda p=p.grad, grad=grad: p.copy_(grad), where)
            mine.step()
        train(reference, 1, seed=index)
        assert_same(mine, reference)
    support.stepped_by_us(mine, steps=4, parameters=len(SHAPES))


@two_devices
@pytest.mark.parametrize("skipped", [False, True])
def test_scalars_of_one_device_for_parameters_of_two(name, skipped):
    lr, found_inf = scalar(0.25, 1), scalar(0.0, 0)
    mine, reference = optimizer_on([0, 1], name, lr=lr), on_cpu(name, lr=0.25)
    for optimizer in (mine, reference):
        train(optimizer, 2)
    support.set_grads(params_of(mine), seed=4)
    mine.grad_scale, mine.found_inf = None, found_inf
    with device.side_stream(0), device.side_stream(1), device.unsynchronised():
        device.later(lambda: found_inf.fill_(float(skipped)), 0)
        mine.step()
        lr.fill_(9.0)  # too late: the other device cannot read it where it is
    if not skipped:
        train(reference, 1, seed=4)
    assert_same(mine, reference)


@pytest.mark.parametrize("skipped", [False, True])
def test_cpu_and_cuda_in_one_optimizer(name, skipped):
    mine, reference = optimizer_on([None, device.home()], name), on_cpu(name)
    for optimizer in (mine, reference):
        train(optimizer, 3)
    found_inf = scalar(0.0, device.home())
    support.set_grads(params_of(mine), seed=4)
    mine.grad_scale, mine.found_inf = None, found_inf
    with device.side_stream(), device.unsynchronised():
        device.later(lambda: found_inf.fill_(float(skipped)))
        mine.step()
    if not skipped:
        train(reference, 1, seed=4)
    assert_same(mine, reference)


# ---- failures ----------------------------------------------------------------------------------


@pytest.mark.only_on("cuda_sim", reason="a device that has failed stays so for its process")
def test_a_failed_device_ends_the_optimizer():
    mine = on_home("Adam")
    train(mine, 1)
    with device.unsynchronised():
        device.sim.fail_running_kernel()
        mine.step()
        with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
            device.synchronize()
        with pytest.raises(fusestep.DeviceError, match="cudaErrorLaunchFailure"):
            mine.step()
        with pytest.raises(fusestep.DeviceError, match="cannot be used any more"):
            mine.step()
        del mine
        device.sim.replace_devices()


# ---- arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=two_devices)])
@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64, numpy.float16])
def test_cupy_arrays_on_the_current_stream(cupy, name, dtype, index):
    random = numpy.random.default_rng(1)
    start, *grads = (random.standard_normal((37, 3)).astype(dtype) for _ in range(4))
    expected = start.copy()
    reference = fusestep.Optimizer(name, {"w": expected}, **support.FULLEST[name])
    with cupy.cuda.Device(index):
        w, grad = cupy.asarray(start), cupy.asarray(grads[0])
        cupy.cuda.get_current_stream().synchronize()
        mine = fusestep.Optimizer(name, {"w": w}, **support.FULLEST[name])
        for values in grads:
            reference.step({"w": values})
            with cupy.cuda.Stream(non_blocking=True):
                grad.set(values)  # on that stream: before it the gradient is another
                mine.step({"w": grad})
                assert numpy.array_equal(w.get(), expected)
                slots = mine.slots("w")
                for slot, value in reference.slots("w").items():
                    assert numpy.array_equal(slots.pop(slot).get(), value)
                assert not slots
    assert mine.step_count("w") == 3
