# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""fusestep.Optimizer: arrays without torch."""

import gc
import threading
import time
import types
import weakref

import numpy
import pytest
import torch

import fusestep
import support

pytestmark = pytest.mark.on_cpu


def grads_like(arrays, seed):
    random = numpy.random.default_rng(seed)
    return {name: random.standard_normal(array.shape).astype(array.dtype) for name, array in arrays.items()}


def make_arrays(dtype=numpy.float32):
    random = numpy.random.default_rng(7)
    return {
        name: random.standard_normal(shape).astype(dtype) for name, shape in (("w", (9, 4)), ("b", (4,)), ("s", ()))
    }


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_same_bits_as_the_torch_front_end(name, dtype):
    arrays = make_arrays(dtype)
    parameters = [torch.nn.Parameter(torch.from_numpy(array.copy())) for array in arrays.values()]
    hyper = {**support.FULLEST[name], "lr": 0.02, "weight_decay": 0.1}
    mine, torchs = fusestep.Optimizer(name, arrays, **hyper), support.ours(name)(parameters, **hyper)
    for index in range(5):
        grads = grads_like(arrays, index)
        if index == 2:
            del grads["b"]
        mine.step(grads)
        for (key, _), p in zip(arrays.items(), parameters, strict=True):
            p.grad = torch.from_numpy(grads[key]) if key in grads else None
        torchs.step()
    for key, p in zip(arrays, parameters, strict=True):
        assert numpy.array_equal(arrays[key], p.detach().numpy())
        slots = mine.slots(key)
        assert set(slots) == set(torchs.state[p]) - {"step"}
        assert all(numpy.array_equal(value, torchs.state[p][slot].numpy()) for slot, value in slots.items())
        assert mine.step_count(key) == (4 if key == "b" else 5)


def test_memory_mapped(tmp_path):
    w = numpy.memmap(tmp_path / "w", dtype=numpy.float32, mode="w+", shape=(1000,))
    w[:] = 1
    fusestep.Optimizer("SGD", {"w": w}, lr=0.5).step({"w": numpy.ones(1000, numpy.float32)})
    w.flush()
    assert (numpy.fromfile(tmp_path / "w", numpy.float32) == 0.5).all()


def test_dlpack():
    w, grad = torch.ones(5), torch.ones(5)
    optimizer = fusestep.Optimizer("SGD", {"w": DlpackOnly(w)}, lr=0.25)
    optimizer.step({"w": DlpackOnly(grad)})
    assert torch.equal(w, torch.full((5,), 0.75))


class DlpackOnly:
    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_torch_tensor():
    w = torch.ones(5)
    fusestep.Optimizer("SGD", {"w": w}, lr=0.25).step({"w": torch.ones(5)})
    assert torch.equal(w, torch.full((5,), 0.75))


def read_only():
    array = numpy.ones(3, numpy.float32)
    array.flags.writeable = False
    return array


def jax_array():
    module = types.ModuleType("jaxlib.xla_extension")
    return type("ArrayImpl", (), {"__module__": module.__name__, "__dlpack__": None})()


def gpu_array():
    memory = {"data": (4096, False), "typestr": "<f4", "shape": (3,), "version": 3}
    return type("Array", (), {"__cuda_array_interface__": memory, "device": torch.device("cuda", 1)})()


REFUSED = {
    "read-only": (read_only, "parameter 'w' is read-only"),
    "read-only through DLPack": (lambda: DlpackOnlyNumpy(read_only()), "parameter 'w' is read-only"),
    "not contiguous": (
        lambda: numpy.ones(6, numpy.float32)[::2],
        r"parameter 'w' is not contiguous \(shape \[3\], strides \[8\] bytes\)",
    ),
    "Fortran order": (lambda: numpy.ones((2, 3), numpy.float32, order="F"), "is not contiguous"),
    "integers": (lambda: numpy.ones(3, numpy.int32), "has dtype <i4, expected float32, float64, float16 or bfloat16"),
    "other byte order": (lambda: numpy.ones(3, ">f4"), "has dtype >f4"),
    "GPU memory": (gpu_array, "is GPU memory of a Array, and of that only CuPy's arrays can be stepped"),
    "JAX": (jax_array, "is a JAX array, and those are immutable: there is no memory to step in place"),
    "a list": (lambda: [1.0, 2.0], "is a list, expected an array whose memory can be stepped in place"),
    "requires grad": (
        lambda: DlpackOnly(torch.ones(3, requires_grad=True)),
        "cannot be stepped in place through DLPack: Can't export tensors that require gradient",
    ),
    "meta": (lambda: DlpackOnly(torch.ones(3, device="meta")), "cannot be stepped in place through DLPack"),
    "bfloat16": (lambda: DlpackOnly(torch.ones(3, dtype=torch.bfloat16)), "cannot be stepped in place through DLPack"),
}


class DlpackOnlyNumpy(DlpackOnly):
    """NumPy's own, without the array interface."""


@pytest.mark.parametrize("case", REFUSED)
def test_refused_parameters(case):
    make, text = REFUSED[case]
    with pytest.raises(fusestep.InvalidArgument, match=text):
        fusestep.Optimizer("SGD", {"w": make()})


WRONG_GRADS = {
    "shape": (numpy.ones(4, numpy.float32), r"gradient has shape \[4\], expected \[3\]"),
    "dtype": (numpy.ones(3, numpy.float64), "gradient has dtype float64, expected float32"),
    "layout": (numpy.ones(6, numpy.float32)[::2], "gradient of parameter 'w' is not contiguous"),
    "kind": (1.0, "gradient of parameter 'w' is a float"),
}


@pytest.mark.parametrize("case", WRONG_GRADS)
def test_refused_gradients_change_nothing(case):
    w = numpy.ones(3, numpy.float32)
    grad, text = WRONG_GRADS[case]
    optimizer = fusestep.Optimizer("Adam", {"w": w})
    with pytest.raises(fusestep.InvalidArgument, match=text):
        optimizer.step({"w": grad})
    assert (w == 1).all() and optimizer.step_count("w") == 0
    optimizer.step({"w": w.copy()})
    assert optimizer.step_count("w") == 1


def test_read_only_gradients_are_read():
    w = numpy.zeros(3, numpy.float32)
    fusestep.Optimizer("SGD", {"w": w}, lr=1.0).step({"w": read_only()})
    assert (w == -1).all()


WRONG_CALLS = {
    "rule": (lambda w: fusestep.Optimizer("Lion", {"w": w}), "rule must be Adam, AdamW, SGD or RMSprop, got Lion"),
    "lr": (lambda w: fusestep.Optimizer("SGD", {"w": w}, lr=-1), "group '0': lr must be >= 0, got -1"),
    "misspelt": (lambda w: fusestep.Optimizer("SGD", {"w": w}, momentun=1), "SGD has no hyperparameter 'momentun'"),
    "no groups": (lambda w: fusestep.Optimizer("SGD", []), "there are no groups"),
    "no parameters": (lambda w: fusestep.Optimizer("SGD", {}), "has no parameters"),
    "overlap": (lambda w: fusestep.Optimizer("SGD", {"w": w, "v": w[1:]}), "memory overlaps"),
    "unknown": (lambda w: fusestep.Optimizer("SGD", {"w": w}).step({"v": w}), "gradients of unknown parameters: v"),
    "slot": (lambda w: fusestep.Optimizer("SGD", {"w": w}).freeze("v"), "there is no group or parameter named 'v'"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls(case):
    call, text = WRONG_CALLS[case]
    with pytest.raises(ValueError, match=text) as caught:
        call(numpy.ones(3, numpy.float32))
    assert isinstance(caught.value, fusestep.Error)


def test_groups():
    a, b, c = (numpy.zeros(2, numpy.float32) for _ in range(3))
    optimizer = fusestep.Optimizer(
        "SGD", [{"params": {"a": a}, "lr": 1.0}, {"params": {"b": b}, "name": "late"}], lr=2.0
    )
    optimizer.add_group({"params": {"c": c}, "lr": 3.0})
    ones = numpy.ones(2, numpy.float32)
    optimizer.step({"a": ones, "b": ones.copy(), "c": ones.copy()})
    assert (a[0], b[0], c[0]) == (-1, -2, -3)
    assert optimizer.hyper("late")["lr"] == 2.0
    optimizer.set_hyper("late", lr=10.0, momentum=0.5)
    assert optimizer.hyper("late") | {"lr": 10.0, "momentum": 0.5} == optimizer.hyper("late")
    optimizer.step({"b": ones})
    assert (a[0], b[0]) == (-1, -12)


def test_freeze_and_thaw():
    w, v = numpy.zeros(2, numpy.float32), numpy.zeros(2, numpy.float32)
    optimizer = fusestep.Optimizer("Adam", {"w": w, "v": v})
    ones = {"w": numpy.ones(2, numpy.float32), "v": numpy.ones(2, numpy.float32)}
    optimizer.step(ones)
    optimizer.freeze("w")
    before = w.copy()
    optimizer.step(ones)
    assert (w == before).all() and optimizer.step_count("w") == 1 and optimizer.step_count("v") == 2
    optimizer.thaw("w")
    optimizer.step(ones)
    assert (w != before).all() and optimizer.step_count("w") == 2


def test_slots_are_the_state_itself():
    w = numpy.zeros(3, numpy.float32)
    optimizer = fusestep.Optimizer("SGD", {"w": w}, lr=1.0, momentum=1.0)
    assert optimizer.slots("w") == {}
    optimizer.step({"w": numpy.ones(3, numpy.float32)})
    slots = optimizer.slots("w")
    slots["momentum_buffer"][:] = 10
    optimizer.step({"w": numpy.zeros(3, numpy.float32)})
    assert (w == -11).all()
    assert optimizer.memory_report() == {"momentum_buffer": 12}


def test_slots_keep_the_optimizer_alive():
    optimizer = fusestep.Optimizer("SGD", {"w": numpy.zeros(100_000, numpy.float32)}, momentum=0.9)
    optimizer.step({"w": numpy.ones(100_000, numpy.float32)})
    alive = weakref.ref(optimizer)
    slot = optimizer.slots("w")["momentum_buffer"]
    del optimizer
    gc.collect()
    assert alive() is not None and (slot == 1).all()
    del slot
    gc.collect()
    assert alive() is None


def test_arrays_are_kept_alive():
    class Array(numpy.ndarray):
        pass

    w = numpy.zeros(10, numpy.float32).view(Array)
    alive = weakref.ref(w)
    optimizer = fusestep.Optimizer("SGD", {"w": w})
    del w
    gc.collect()
    assert alive() is not None
    del optimizer
    gc.collect()
    assert alive() is None


def test_norm_clipping_and_skipping():
    w = numpy.zeros(2, numpy.float32)
    optimizer = fusestep.Optimizer("SGD", {"w": w}, lr=1.0)
    optimizer.step({"w": numpy.array([3, 4], numpy.float32)}, max_grad_norm=1.0)
    assert optimizer.last_grad_norm() == 5.0
    numpy.testing.assert_allclose(w, [-0.6, -0.8], rtol=1e-5)
    before = w.copy()
    optimizer.step({"w": numpy.array([numpy.inf, 4], numpy.float32)}, skip_nonfinite=True)
    optimizer.step({"w": numpy.ones(2, numpy.float32)}, skip=True)
    assert (w == before).all() and optimizer.skipped_steps() == 2
    optimizer.step({"w": numpy.ones(2, numpy.float32)}, grad_multiplier=0.5)
    numpy.testing.assert_array_equal(w, before - numpy.float32(0.5))


def test_gil_is_released():
    """Another thread counts while a long step runs."""
    w, grad = numpy.ones(20_000_000, numpy.float32), numpy.ones(20_000_000, numpy.float32)
    optimizer = fusestep.Optimizer("Adam", {"w": w})
    optimizer.step({"w": grad})
    ticks, running = [], threading.Event()

    def tick():
        running.set()
        while running.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    running.wait()
    begin = time.perf_counter()
    for _ in range(5):
        optimizer._core.step(False, 1.0, float("inf"), float("inf"), False, [])
    end = time.perf_counter()
    running.clear()
    thread.join()
    assert sum(begin < t < end for t in ticks) >= 5


# ---- mixed precision ---------------------------------------------------------------------------


def run_against_float32(dtype, **options):
    """(parameter, slots) of 5 steps, and the float32 run of the same gradients."""
    start = numpy.linspace(-1, 1, 64, dtype=numpy.float32).astype(dtype)
    w, wide = start.copy(), start.astype(numpy.float32)
    optimizer, reference = fusestep.Optimizer("Adam", {"w": w}, **options), fusestep.Optimizer("Adam", {"w": wide})
    for step in range(5):
        grad = (numpy.arange(64) % 7 - 3).astype(numpy.float32) / (step + 1)
        optimizer.step({"w": grad})
        reference.step({"w": grad})
    return w, optimizer.slots("w"), wide, reference.slots("w")


def test_master_weights_are_the_float32_run():
    w, slots, wide, expected = run_against_float32(numpy.float16, master_weights=True)
    assert (slots.pop("master_weight") == wide).all() and (w == wide.astype(numpy.float16)).all()
    assert all((slots[name] == expected[name]).all() for name in expected)


def test_bfloat16_arrays():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    w, slots, wide, _ = run_against_float32(ml_dtypes.bfloat16, master_weights=True, state_dtype="bfloat16")
    assert slots["exp_avg"].dtype == ml_dtypes.bfloat16 and w.dtype == ml_dtypes.bfloat16
    assert (w == slots["master_weight"].astype(ml_dtypes.bfloat16)).all()
    assert numpy.abs(slots["master_weight"] - wide).max() < 1e-4
    first, second, other = (
        run_against_float32(ml_dtypes.bfloat16, rounding="stochastic", seed=seed)[0] for seed in (1, 1, 2)
    )
    assert (first == second).all() and (first != other).any()


def test_refresh_master_weights():
    w = numpy.ones(4, numpy.float16)
    optimizer = fusestep.Optimizer("SGD", [{"params": {"w": w}, "master_weights": True}], lr=0.5)
    optimizer.step({"w": numpy.ones(4, numpy.float16)})
    w[:] = 3
    optimizer.refresh_master_weights()
    optimizer.step({"w": numpy.ones(4, numpy.float16)})
    assert (w == 2.5).all()


def test_clip_value():
    w = numpy.zeros(3, numpy.float32)
    optimizer = fusestep.Optimizer("SGD", {"w": w}, lr=1.0)
    optimizer.step({"w": numpy.array([-5, 0.25, 5], numpy.float32)}, clip_value=0.5)
    assert (w == [0.5, -0.25, -0.5]).all()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"state_dtype": "float64"}, "state_dtype cannot be 'float64'"),
        ({"rounding": "up"}, "rounding cannot be 'up'"),
        ({"state_dtype": "bfloat16"}, "parameter 'w'.*no layout for values of float16"),
        ({"rounding": "stochastic"}, "parameter 'w'.*no layout for values of float16"),
    ],
)
def test_options_that_are_refused(options, text):
    with pytest.raises(fusestep.InvalidArgument, match=text):
        fusestep.Optimizer("Adam", {"w": numpy.ones(3, numpy.float16)}, **options)
