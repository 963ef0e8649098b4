# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""The same results as torch's for-loop, and no further from the truth."""

import pytest
import torch

import support

STEPS = 50
DTYPES = (torch.float32, torch.float64, torch.complex64)
SHAPES = ((17, 5), (), (1,), (3, 4, 2), (0, 3), (130,), (33,))

INPUTS = [
    pytest.param(name, kwargs, id=f"{name}-{text}")
    for name in support.NAMES
    for text, kwargs in support.torch_inputs(name)
]


class Run:
    """An optimizer over SHAPES: groups 2 and 3 join at steps 10 and 20, gradients change and are absent."""

    def __init__(self, cls, kwargs, parameters):
        self.parameters = parameters
        self.optimizer = cls(parameters[:4], **kwargs, foreach=False)
        self.least_variance = {}

    def step(self, index, grads_of):
        late = {10: (self.parameters[4:6], 0.02), 20: (self.parameters[6:], 0.005)}
        if index in late:
            self.optimizer.add_param_group({"params": late[index][0], "lr": late[index][1]})
        support.give_same_grads(grads_of, self.parameters)
        self.optimizer.step()

    def note_variance(self):
        """For centered RMSprop: the least share of the second moment that was left as variance."""
        for position, p in enumerate(self.parameters):
            state = self.optimizer.state.get(p, {})
            if "grad_avg" not in state or p.numel() == 0:
                continue
            square, mean = (
                torch.view_as_real(t) if t.is_complex() else t for t in (state["square_avg"], state["grad_avg"])
            )
            share = (1 - mean * mean / square).nan_to_num(1.0, posinf=1.0, neginf=1.0).clamp(min=0)
            share = share.amin(-1) if p.is_complex() else share
            before = self.least_variance.get(position, torch.ones_like(share))
            self.least_variance[position] = torch.minimum(before, share)


def grads_for(parameters, index):
    support.set_grads(parameters, seed=1000 + index, scale=10.0 ** (index % 7 - 3))
    for position, p in enumerate(parameters):
        if (7 * index + 3 * position) % 5 == 0:
            p.grad = None


def test_tensors_are_read_through_torchs_c_interface():
    """Nobody would notice otherwise: through methods a step has the same bits and takes far longer."""
    assert support.ours("Adam")(support.tensors((3,)))._stepper.reads_through_shim
    assert not support.through_methods(support.ours("Adam")(support.tensors((3,))))._stepper.reads_through_shim


@pytest.mark.parametrize("through_methods", [False, True], ids=["shim", "methods"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "kwargs"), INPUTS)
def test_every_listed_input(name, kwargs, dtype, through_methods):
    start = support.tensors(*SHAPES, dtype=dtype)
    source = support.twins(start)
    mine = Run(support.ours(name), kwargs, support.twins(start))
    numbers = support.as_numbers(kwargs)
    torchs = Run(support.theirs(name), numbers, support.twins(start))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    truth = Run(support.theirs(name), numbers, support.twins(start, wide))
    if through_methods:
        support.through_methods(mine.optimizer)
    for index in range(STEPS):
        grads_for(source, index)
        for run in (mine, torchs, truth):
            run.step(index, source)
        truth.note_variance()
    support.stepped_by_us(mine.optimizer, steps=STEPS)

    def amplified(key, tensor):
        """Centered RMSprop loses what cancels: up to the inverse of the share that is left."""
        share = truth.least_variance.get(key[0])
        if share is None or key[1] not in ("value", "momentum_buffer"):
            return torch.ones(())
        return torch.where(share > 2.0**-10, 1 / share, torch.inf)

    support.assert_close(
        support.all_state(mine.optimizer), support.all_state(torchs.optimizer), STEPS, weight=amplified
    )


@pytest.mark.parametrize(("name", "kwargs"), INPUTS)
def test_as_near_to_the_truth_as_torch(name, kwargs):
    """The mean error against double precision is not larger than torch's, chance apart.

    Both round a parameter once a step, which is most of the error and differs by chance: the mean
    difference over 40,000 elements may be three of its standard errors.
    """
    numbers = support.as_numbers(kwargs)
    start = support.tensors((40_000,))
    parameters = [support.twins(start), support.twins(start), support.twins(start, torch.float64)]
    classes = [support.ours(name), support.theirs(name), support.theirs(name)]
    runs = [cls(own, **numbers, foreach=False) for cls, own in zip(classes, parameters, strict=True)]
    share = torch.ones(40_000, dtype=torch.float64)
    for index in range(STEPS):
        support.set_grads(start, seed=index, scale=10.0 ** (index % 3 - 1))
        for own, optimizer in zip(parameters, runs, strict=True):
            support.give_same_grads(start, own)
            optimizer.step()
        exact = runs[2].state[parameters[2][0]]
        if "grad_avg" in exact:
            share = torch.minimum(share, 1 - exact["grad_avg"] ** 2 / exact["square_avg"])
    support.stepped_by_us(runs[0], steps=STEPS)
    compared = share > 2.0**-10
    mine, torchs, truth = (support.all_state(optimizer) for optimizer in runs)
    for key in truth:
        if key[1] == "step":
            continue
        errors = [(side[key].double() - truth[key]).abs()[compared] for side in (mine, torchs)]
        difference = errors[0] - errors[1]
        chance = 3 * difference.std() / len(difference) ** 0.5
        assert difference.mean() <= chance, f"{key}: {errors[0].mean()} > {errors[1].mean()}"


# ---- sizes and memory layouts ------------------------------------------------------------------

LAYOUTS = {
    "one element": lambda: torch.randn(1),
    "0-dim": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2),
    "odd size": lambda: torch.randn(1031),
    "unaligned": lambda: torch.randn(1032)[1:],
    "sliced": lambda: torch.randn(10, 5, 2)[..., 0],
    "every other": lambda: torch.randn(64)[::2],
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(7, 9).t(),
    "permuted with an extent of 1": lambda: torch.randn(4, 1, 6).permute(2, 1, 0),
}
GRADS = {
    "like the parameter": lambda p: torch.randn_like(p),
    "contiguous": lambda p: torch.randn(p.shape),
    "expanded": lambda p: torch.randn(()).expand(p.shape),
    "strided": lambda p: torch.randn(*p.shape, 3)[..., 1],
    "negated lazily": lambda p: torch.randn(tuple(p.shape), dtype=torch.complex64).conj().imag,
}
FAST_LAYOUTS = set(LAYOUTS) - {"sliced", "every other"}


@pytest.mark.parametrize("through_methods", [False, True], ids=["shim", "methods"])
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name, layout, grad, through_methods):
    torch.manual_seed(3)
    data = LAYOUTS[layout]()
    start = torch.empty_strided(data.shape, data.stride()).copy_(data) if layout in FAST_LAYOUTS else data
    p = torch.nn.Parameter(start)
    # The other parameter goes the fast way, whatever this one does.
    mine = support.ours(name)([p, *support.tensors((5,))], **support.FULLEST[name], foreach=False)
    q = torch.nn.Parameter(p.detach().clone())
    torchs = support.theirs(name)([q, *support.tensors((5,))], **support.FULLEST[name], foreach=False)
    if through_methods:
        support.through_methods(mine)
    for index in range(5):
        p.grad = GRADS[grad](p)
        q.grad = p.grad.resolve_neg().clone()
        for optimizer in (mine, torchs):
            optimizer.param_groups[0]["params"][1].grad = torch.full((5,), 0.5 + index)
            optimizer.step()
    support.stepped_by_us(mine, steps=5, parameters=2)
    support.assert_close(support.all_state(mine), support.all_state(torchs), 5, ulps=8)
    assert p.stride() == start.stride()


def test_fast_layouts_are_not_copied(monkeypatch):
    monkeypatch.setattr(support.fusestep.optim, "_DenseCopy", None)
    for layout in FAST_LAYOUTS:
        p = torch.nn.Parameter(LAYOUTS[layout]())
        p.grad = torch.zeros_like(p)
        optimizer = support.ours("Adam")([p])
        optimizer.step()
        support.stepped_by_us(optimizer, steps=1, parameters=1)


@pytest.mark.parametrize("size", [2, 63, 64, 65, 4095, 4097, 65_537, 1_000_003, 10_000_000])
def test_sizes(size):
    mine, torchs = support.tensors((size,)), support.tensors((size,))
    optimizers = [support.ours("AdamW")(mine), support.theirs("AdamW")(torchs, foreach=False)]
    for index in range(2):
        support.set_grads(mine, seed=index)
        torchs[0].grad = mine[0].grad
        for optimizer in optimizers:
            optimizer.step()
    support.stepped_by_us(optimizers[0], steps=2, parameters=1)
    support.assert_close(*(support.all_state(optimizer) for optimizer in optimizers), 2)


class WithProperty(torch.nn.Parameter):
    """Its gradient is a property in Python."""

    reads = 0

    @property
    def grad(self):
        WithProperty.reads += 1
        return torch.Tensor.grad.__get__(self)

    @grad.setter
    def grad(self, value):
        torch.Tensor.grad.__set__(self, value)


def test_types_of_parameters_may_alternate(name):
    plain = support.tensors((5,), (6,), (7,), (8,))
    mixed = [WithProperty(p) if i % 2 else p for i, p in enumerate(support.twins(plain))]
    optimizers = [support.ours(name)(parameters, **support.FULLEST[name]) for parameters in (plain, mixed)]
    for index in range(3):
        support.set_grads(plain, seed=index)
        for p, q in zip(plain, mixed, strict=True):
            q.grad = GRADS["negated lazily"](q) if index == 1 else p.grad.clone()
            p.grad = q.grad.resolve_neg().clone()
        WithProperty.reads = 0
        for optimizer in optimizers:
            optimizer.step()
        assert WithProperty.reads >= 2
    support.assert_bits(*(support.all_state(optimizer) for optimizer in optimizers))


def test_mixed_dtypes_in_one_group(name):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
    mixed = [p for dtype in dtypes for p in support.tensors((6, 3), (4,), dtype=dtype)]
    frozen = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    mine = support.ours(name)([*mixed, frozen], **support.FULLEST[name])
    alone = [support.ours(name)([p], **support.FULLEST[name]) for p in support.twins(mixed)]
    for index in range(4):
        support.set_grads(mixed, seed=index)
        for p, optimizer in zip(mixed, alone, strict=True):
            support.give_same_grads([p], optimizer.param_groups[0]["params"])
            optimizer.step()
        mine.step()
    support.stepped_by_us(mine, steps=4, parameters=len(mixed))
    for p, optimizer in zip(mixed, alone, strict=True):
        q = optimizer.param_groups[0]["params"][0]
        assert torch.equal(p, q)
        assert {k: v.dtype for k, v in mine.state[p].items()} == {k: v.dtype for k, v in optimizer.state[q].items()}
    assert frozen not in mine.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name, dtype):
    """Against float32 arithmetic that rounds what is stored, at every step, to the 16-bit type.

    A stored value may then differ where the float32 results straddle a rounding boundary: by one unit
    in the last place each time, and by what that unit grows to; two units for every step are allowed.
    """
    steps, unit = 6, {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    kwargs = {**support.FULLEST[name], "lr": 1e-2} | ({} if name == "SGD" else {"eps": 1e-3})
    if name == "RMSprop":
        kwargs["centered"] = False  # its difference of squares amplifies the rounding of its slots
    start = support.tensors((211,), (8, 9), dtype=dtype)
    mine = support.ours(name)(support.twins(start), **kwargs)
    wide = support.theirs(name)(support.twins(start, torch.float32), **kwargs, foreach=False)
    for index in range(steps):
        for p, q in zip(mine.param_groups[0]["params"], wide.param_groups[0]["params"], strict=True):
            support.set_grads([p], seed=index)
            q.grad = p.grad.float()
        for optimizer in (mine, wide):
            optimizer.step()
        for key, value in support.all_state(wide).items():
            if key[1] != "step":
                value.copy_(value.to(dtype).float())
    support.stepped_by_us(mine, steps=steps, parameters=2)
    expected = support.all_state(wide)
    for key, value in support.all_state(mine).items():
        assert value.dtype == (torch.float32 if key[1] == "step" else dtype)
        exact = expected[key].cpu()
        bound = 2 * steps * unit * exact.abs().max()
        assert (value.cpu().float() - exact).abs().max() <= bound, key


def test_float32_slots_of_half_parameters(name):
    """Slots a hook or a user made in float32 are used as they are."""
    kwargs = support.STATEFUL[name]
    (p,) = support.tensors((40,), dtype=torch.bfloat16)
    optimizer = support.ours(name)([p], **kwargs)
    for slot in optimizer._state_names(optimizer.param_groups[0]):
        if slot != "step":
            optimizer.state[p][slot] = torch.zeros(40)
    support.set_grads([p], seed=1)
    optimizer.step()
    support.stepped_by_us(optimizer, steps=1, parameters=1)
    slots = {key: value for key, value in optimizer.state[p].items() if key != "step"}
    assert {value.dtype for value in slots.values()} == {torch.float32}
    assert all(value.any() for value in slots.values())


@pytest.mark.parametrize("tie", ["listed twice", "same memory", "overlapping views"])
def test_shared_memory_steps_in_order(name, tie):
    """A parameter that shares memory with an earlier one steps after it, as in torch's loop."""

    def parameters():
        memory = torch.linspace(-1, 1, 100_000)
        if tie == "listed twice":
            p = torch.nn.Parameter(memory)
            return [p, p]
        if tie == "same memory":
            return [torch.nn.Parameter(memory), torch.nn.Parameter(memory)]
        return [torch.nn.Parameter(memory[:70_000]), torch.nn.Parameter(memory[30_000:])]

    kwargs = {**support.FULLEST[name], "weight_decay": 0.1}
    with pytest.warns(UserWarning, match="duplicate") if tie == "listed twice" else pytest.MonkeyPatch.context():
        mine = support.ours(name)(parameters(), **kwargs)
        torchs = support.theirs(name)(parameters(), **kwargs, foreach=False)
    for index in range(4):
        for optimizer in (mine, torchs):
            support.set_grads(optimizer.param_groups[0]["params"], seed=index)
            optimizer.step()
    support.stepped_by_us(mine, steps=4, parameters=2)
    support.assert_close(support.all_state(mine), support.all_state(torchs), 8)
