# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""fusestep.Optimizer: saving, loading by name, and files and state_dicts of fusestep.optim."""

import copy

import numpy
import pytest
import safetensors.numpy
import torch

import fusestep
import support

pytestmark = pytest.mark.on_cpu

NAMES = ("stem.weight", "stem.bias", "head.weight", "head.bias", "scale", "empty")
SHAPES = dict(zip(NAMES, ((3, 4, 5), (3,), (4, 6), (4,), (), (0, 2)), strict=True))
SETTINGS = {name: {**support.FULLEST[name], "lr": 0.02, "weight_decay": 0.1} for name in support.NAMES}


def model(dtype=numpy.float32, names=NAMES):
    random = numpy.random.default_rng(0)
    values = {key: numpy.asarray(random.standard_normal(shape)).astype(dtype) for key, shape in SHAPES.items()}
    return {key: values[key] for key in names}


def grads_of(arrays, step):
    return {
        key: numpy.asarray(numpy.random.default_rng([step, NAMES.index(key)]).standard_normal(a.shape)).astype(a.dtype)
        for key, a in arrays.items()
    }


def optimizer_of(name, arrays, groups=None, **settings):
    """Groups are lists of names, the last with another learning rate; without them all are one group."""
    groups = [list(arrays)] if groups is None else groups
    listed = [{"params": {key: arrays[key] for key in group}} for group in groups]
    if len(groups) > 1:
        listed[-1]["lr"] = 0.5
    return fusestep.Optimizer(name, listed, **{**SETTINGS[name], **settings})


def train(arrays, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.step(grads_of(arrays, step))


def trained(name, steps=3, dtype=numpy.float32, names=NAMES, **kwargs):
    arrays = model(dtype, names)
    optimizer = optimizer_of(name, arrays, **kwargs)
    train(arrays, optimizer, steps)
    return arrays, optimizer


def contents(arrays, optimizer, values=True):
    """(name, slot) to array, as copies, and step counts."""
    found = {(key, "value"): array.copy() for key, array in arrays.items() if values}
    for key in arrays:
        found[key, "step"] = optimizer.step_count(key)
        found.update({(key, slot): value.copy() for slot, value in optimizer.slots(key).items()})
    return found


def everything(arrays, optimizer):
    groups = [optimizer.hyper(name) for name in optimizer._groups]
    return contents(arrays, optimizer), groups, [optimizer._core.frozen(key) for key in arrays]


def assert_bits(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        x, y = numpy.asarray(got[key]), numpy.asarray(value)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), key


def assert_same(got, expected):
    assert_bits(got[0], expected[0])
    assert repr(got[1:]) == repr(expected[1:])


# ---- the same as if nothing had happened ---------------------------------------------------------


def through_file(old, new, path):
    old.save(path)
    return new.load(path)


def through_async_file(old, new, path):
    old.save_async(path)
    old.wait_for_save()
    return new.load(path)


def through_state_dict(old, new, path):
    return new.load(old.state_dict())


def by_position(old, new, path):
    new.load_state_dict(old.state_dict())


def through_torch(old, new, path):
    """fusestep.optim reads the file, and writes one that is read here."""
    parameters = {key: torch.nn.Parameter(torch.from_numpy(array.copy())) for key, array in old._arrays.items()}
    between = support.ours(old.rule)(list(parameters.items())[::-1])
    old.save(path)
    assert between.load(path).complete
    assert all(between.param_groups[0][key] == value for key, value in old.hyper().items())
    between.save(path)
    return new.load(path)


def through_dict_of_torch(old, new, path):
    parameters = {key: torch.nn.Parameter(torch.from_numpy(array.copy())) for key, array in old._arrays.items()}
    between = support.ours(old.rule)(parameters.items())
    assert between.load(old.state_dict()).complete
    return new.load(between.state_dict())


HAND_OVERS = {
    function.__name__: function
    for function in (
        through_file,
        through_async_file,
        through_state_dict,
        by_position,
        through_torch,
        through_dict_of_torch,
    )
}


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64, numpy.float16])
@pytest.mark.parametrize("hand_over", HAND_OVERS)
def test_goes_on_with_the_same_bits(name, hand_over, dtype, tmp_path):
    arrays, optimizer = trained(name, steps=5, dtype=dtype)
    fresh = model(dtype)
    resumed = optimizer_of(name, fresh, lr=0.7)
    for key, array in fresh.items():
        array[...] = arrays[key]
    HAND_OVERS[hand_over](optimizer, resumed, tmp_path / "state")
    counted = name != "SGD" or hand_over in ("through_file", "through_async_file")  # torch's SGD does not count
    assert [resumed.step_count(key) for key in NAMES] == [5 if counted else 0] * len(NAMES)
    for side in ((arrays, optimizer), (fresh, resumed)):
        train(*side, 20, first=5)
    found, expected = contents(fresh, resumed), contents(arrays, optimizer)
    if not counted:
        found, expected = ({key: v for key, v in side.items() if key[1] != "step"} for side in (found, expected))
    assert_bits(found, expected)


@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_from_torch(name, flags):
    if name == "RMSprop" and "fused" in flags:
        pytest.skip("torch's RMSprop has no fused")
    arrays = model()
    parameters = {key: torch.nn.Parameter(torch.from_numpy(array)) for key, array in model().items()}
    before = support.theirs(name)(parameters.items(), **SETTINGS[name], **flags)

    def train_torch(steps, first):
        for step in range(first, first + steps):
            for key, grad in grads_of(arrays, step).items():
                parameters[key].grad = torch.from_numpy(grad)
            before.step()

    train_torch(5, 0)
    optimizer = optimizer_of(name, arrays)
    for key, array in arrays.items():
        array[...] = parameters[key].detach().numpy()
    optimizer.load(before.state_dict())
    train_torch(20, 5)
    train(arrays, optimizer, 20, first=5)
    for key, p in parameters.items():
        found = {"value": arrays[key], **optimizer.slots(key)}
        expected = {"value": p.detach(), **{k: v for k, v in before.state[p].items() if k != "step"}}
        support.assert_close({k: torch.from_numpy(v) for k, v in found.items()}, expected, 20, ulps=8)


@pytest.mark.parametrize("how", ["load", "load_state_dict"])
def test_counts_of_apex(how):
    arrays, optimizer = trained("Adam", steps=5)
    given = optimizer.state_dict()
    given["param_groups"][0]["step"] = 5
    for own in given["state"].values():
        del own["step"]
    resumed = optimizer_of("Adam", model())
    getattr(resumed, how)(given)
    assert [resumed.step_count(key) for key in NAMES] == [5] * len(NAMES)


# ---- by name ---------------------------------------------------------------------------------------

GROUPINGS = {
    "one group": [NAMES],
    "reversed": [NAMES[::-1]],
    "two groups": [NAMES[2:4], NAMES[:2] + NAMES[4:]],
    "a group each": [[key] for key in NAMES[::-1]],
}


@pytest.mark.parametrize("now", GROUPINGS)
@pytest.mark.parametrize("then", GROUPINGS)
@pytest.mark.parametrize("hand_over", ["file", "dict"])
def test_whatever_the_grouping(hand_over, then, now, tmp_path):
    arrays, optimizer = trained("Adam", groups=GROUPINGS[then])
    fresh = model()
    resumed = optimizer_of("Adam", fresh, GROUPINGS[now])
    expected = everything(fresh, resumed)[1]
    optimizer.save(tmp_path / "state")
    report = resumed.load(tmp_path / "state" if hand_over == "file" else optimizer.state_dict(), what="state")
    assert report.complete and sorted(report.loaded) == sorted(NAMES)
    assert everything(fresh, resumed)[1] == expected
    assert_bits(contents(fresh, resumed, values=False), contents(arrays, optimizer, values=False))


def test_first_the_head_then_the_whole_network(name, tmp_path):
    head, optimizer = trained(name, steps=7, names=NAMES[2:4])
    optimizer.save(tmp_path / "head")
    arrays = model()
    whole = optimizer_of(name, arrays, [NAMES[:2] + NAMES[4:], NAMES[2:4]])
    report = whole.load(tmp_path / "head", strict=False, what="state")
    assert (report.loaded, report.missing) == (list(NAMES[2:4]), ["stem.weight", "stem.bias", "scale", "empty"])
    train(arrays, whole, 1)
    assert [whole.step_count(key) for key in NAMES] == [1, 1, 8, 8, 1, 1]


@pytest.mark.parametrize("form", ["dict", "function"])
@pytest.mark.parametrize("hand_over", ["file", "dict"])
def test_rename(name, hand_over, form, tmp_path):
    arrays = model()
    before = fusestep.Optimizer(name, {f"module.{key}": a for key, a in arrays.items()}, **SETTINGS[name])
    before.freeze("module.head.bias")  # has no slots: its shape is known only by its name here
    before.step({f"module.{key}": grad for key, grad in grads_of(arrays, 0).items()})
    before.save(tmp_path / "state")
    rename = {f"module.{key}": key for key in NAMES}
    resumed = optimizer_of(name, model())
    source = tmp_path / "state" if hand_over == "file" else before.state_dict()
    report = resumed.load(source, rename=rename if form == "dict" else rename.get)
    assert report.complete and report.loaded == list(NAMES)
    assert resumed._core.frozen("head.bias") and not resumed.slots("head.bias")
    assert_bits(resumed.slots("scale"), before.slots("module.scale"))


def test_names_of_what_has_none(tmp_path):
    parameters = {key: torch.nn.Parameter(torch.from_numpy(array)) for key, array in model().items()}
    before = fusestep.optim.Adam(parameters.values())
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    before.step()
    before.save(tmp_path / "file")
    tensors = {f"{n}/exp_avg": own["exp_avg"].numpy() for n, own in enumerate(before.state.values())}
    safetensors.numpy.save_file(tensors, tmp_path / "plain")
    for source in (tmp_path / "file", tmp_path / "plain", before.state_dict()):
        arrays = model()
        resumed = fusestep.Optimizer("Adam", arrays)
        with pytest.raises(fusestep.InvalidArgument, match="the source has no names of parameters: give saved_names="):
            resumed.load(source)
        resumed.load(source, strict=False, saved_names=parameters.items())
        for key, p in parameters.items():
            assert numpy.array_equal(resumed.slots(key)["exp_avg"], before.state[p]["exp_avg"].numpy())


def test_never_stepped_parameters_of_others_are_unexpected():
    arrays, optimizer = trained("Adam")
    optimizer.add_group({"params": {"new": numpy.ones(2)}})
    resumed = optimizer_of("Adam", model())
    report = resumed.load(optimizer.state_dict(), strict=False)
    assert report.unexpected == ["new"] and report.loaded == list(NAMES)


# ---- what is taken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "dict"])
def test_what(name, form, tmp_path):
    arrays, optimizer = trained(name, lr=0.3)
    optimizer.freeze("scale")
    optimizer.save(tmp_path / "state")
    for what in ("all", "state", "hyper"):
        fresh = model()
        resumed = optimizer_of(name, fresh, lr=0.7)
        resumed.freeze("head.bias")
        report = resumed.load(tmp_path / "state" if form == "file" else optimizer.state_dict(), what=what)
        taken = what != "state"
        assert resumed.hyper()["lr"] == (0.3 if taken else 0.7)
        assert [(d.group, d.key, d.saved, d.here, d.taken) for d in report.hyper] == [("0", "lr", "0.3", "0.7", taken)]
        assert bool(resumed.slots("scale")) == (what != "hyper")
        assert [key for key in NAMES if resumed._core.frozen(key)] == ["scale" if what == "all" else "head.bias"]


@pytest.mark.parametrize("how", ["load", "load_state_dict"])
def test_dicts_that_do_not_know_what_was_frozen_leave_it(how):
    """torch's."""
    _, before = trained("Adam")
    before.freeze("scale")
    given = before.state_dict()
    given["param_groups"][0].pop("frozen")
    resumed = optimizer_of("Adam", model())
    resumed.freeze("head.bias")
    getattr(resumed, how)(given)
    assert [key for key in NAMES if resumed._core.frozen(key)] == ["head.bias"]


def test_frozen_and_never_stepped(name, tmp_path):
    arrays = model()
    optimizer = optimizer_of(name, arrays)
    optimizer.freeze("stem.bias")
    train(arrays, optimizer, 2)
    optimizer.freeze("head.weight")
    optimizer.save(tmp_path / "state")
    fresh, resumed = trained(name, steps=1)
    resumed.load(tmp_path / "state")
    assert [resumed._core.frozen(key) for key in NAMES] == [False, True, True, False, False, False]
    assert not resumed.slots("stem.bias") and resumed.step_count("stem.bias") == 0
    for key, array in fresh.items():
        array[...] = arrays[key]
    for side in ((arrays, optimizer), (fresh, resumed)):
        side[1].thaw("stem.bias")
        train(*side, 3, first=2)
    assert_bits(contents(fresh, resumed), contents(arrays, optimizer))


def test_strict_and_the_report(name, tmp_path):
    arrays, optimizer = trained(name, names=NAMES[:4])
    optimizer.save(tmp_path / "state", metadata={"epoch": 3})
    fresh = model(names=NAMES[1:5])
    fresh["head.weight"] = numpy.ones((7, 6), numpy.float32)
    resumed = optimizer_of(name, fresh, lr=0.7)
    before = everything(fresh, resumed)
    with pytest.raises(fusestep.LoadError) as caught:
        resumed.load(tmp_path / "state")
    assert_same(everything(fresh, resumed), before)
    report = caught.value.report
    assert report.mismatched == [("head.weight", "shape", "[4, 6]", "[7, 6]")]
    assert (report.loaded, report.missing) == (["stem.bias", "head.bias"], ["scale"])
    assert (report.unexpected, report.metadata) == (["stem.weight"], {"epoch": 3})
    assert str(caught.value).startswith(
        "the state does not match this optimizer, nothing was loaded (strict=False loads what matches):\nmatching    2 "
    )
    assert resumed.load(tmp_path / "state", strict=False) == report
    assert resumed.step_count("stem.bias") == 3 and resumed.step_count("head.weight") == 0


def test_other_dtypes_only_when_asked(name, tmp_path):
    arrays, optimizer = trained(name)
    optimizer.save(tmp_path / "state")
    resumed = optimizer_of(name, model(numpy.float64))
    with pytest.raises(fusestep.LoadError, match="dtype saved float32 here float64"):
        resumed.load(tmp_path / "state")
    assert resumed.load(tmp_path / "state", convert=True).converted
    for key in NAMES:
        for slot, value in resumed.slots(key).items():
            assert value.dtype == numpy.float64 and numpy.array_equal(value, optimizer.slots(key)[slot])


def test_values(name, tmp_path):
    arrays, optimizer = trained(name)
    optimizer.save(tmp_path / "with", values=True)
    optimizer.save(tmp_path / "without")
    for file, values, arrive in (("with", True, True), ("with", False, False), ("without", True, False)):
        fresh = model()
        optimizer_of(name, fresh).load(tmp_path / file, values=values)
        expected = arrays if arrive else model()
        assert all(numpy.array_equal(array, expected[key]) for key, array in fresh.items())


def test_public_reader_sees_the_same_numbers(name, tmp_path):
    arrays, optimizer = trained(name)
    optimizer.save(tmp_path / "state", values=True)
    found = safetensors.numpy.load_file(tmp_path / "state")
    expected = {f"{key}/{slot}": v for (key, slot), v in contents(arrays, optimizer).items() if slot != "step"}
    assert_bits(found, expected)


def test_metadata(tmp_path):
    arrays, optimizer = trained("Adam")
    given = {"text": "words", "looks like JSON": "12", "nested": {"a": [1, None]}}
    optimizer.save(tmp_path / "a", metadata=given)
    resumed = optimizer_of("Adam", model())
    assert resumed.load(tmp_path / "a").metadata == given
    resumed.save(tmp_path / "b", metadata={"more": 1})
    assert optimizer.load(tmp_path / "b").metadata == {**given, "more": 1}


def test_state_dict_has_torchs_structure_and_copies(name):
    arrays, optimizer = trained(name, groups=GROUPINGS["two groups"])
    optimizer.freeze("stem.bias")
    found = optimizer.state_dict()
    parameters = {key: torch.nn.Parameter(torch.from_numpy(array.copy())) for key, array in arrays.items()}
    groups = [{"params": [(key, parameters[key]) for key in group]} for group in GROUPINGS["two groups"]]
    torchs = support.theirs(name)(groups, **SETTINGS[name])
    assert [group["params"] for group in found["param_groups"]] == [[0, 1], [2, 3, 4, 5]]
    names = [key for group in found["param_groups"] for key in group["param_names"]]
    assert names == list(NAMES[2:4] + NAMES[:2] + NAMES[4:])
    for own, group in zip(found["param_groups"], torchs.param_groups, strict=True):
        known = set(own) - {"name", "frozen"}
        assert known <= set(group) and all(type(own[key]) is type(group[key]) for key in known - {"weight_decay"})
    assert found["param_groups"][1]["frozen"] == [False, True, False, False]
    for number, own in found["state"].items():
        slots = optimizer.slots(names[number])
        assert set(own) - {"step"} == set(slots) and ("step" in own) == (name != "SGD")
        for slot, value in slots.items():
            assert numpy.array_equal(own[slot], value) and own[slot].flags.writeable
            assert value.size == 0 or not numpy.shares_memory(own[slot], value)


# ---- refused, and nothing has changed ------------------------------------------------------------------


def edited(change):
    def apply(optimizer):
        given = copy.deepcopy(optimizer.state_dict())
        change(given)
        return given

    return apply


def in_group(key, value):
    return edited(lambda given: given["param_groups"][0].update({key: value}))


def in_state(key, value, index=3):
    return edited(lambda given: given["state"][index].update({key: value}))


class Odd:
    dtype, shape = numpy.dtype("float32"), (4,)

    def __array__(self, *args, **kwargs):
        raise TypeError("no array")


BAD_DICTS = {
    "empty": (edited(dict.clear), {}, "state_dict: has no 'param_groups'"),
    "group": (
        edited(lambda given: given.update(param_groups=[3])),
        {},
        r"state_dict: param_groups\[0\] must be a dict",
    ),
    "state": (edited(lambda given: given.update(state=3)), {}, "state_dict: state must be a dict"),
    "twice": (in_group("param_names", ["scale"] * 6), {}, "there are two parameters named 'scale'"),
    "lr": (in_group("lr", -1.0), {}, "group '0': lr must be >= 0, got -1"),
    "lr of text": (in_group("lr", "fast"), {}, 'lr must be a number, got "fast"'),
    "betas": (in_group("betas", (0.9,)), {}, r"betas must be two numbers, got \[0.9\]"),
    "step": (in_state("step", "three"), {}, "parameter 'head.bias': 'step' must be a number, got 'three'"),
    "step < 0": (in_state("step", -1), {}, "parameter 'head.bias': step must be a whole number >= 0, got -1"),
    "slot": (in_state("exp_avg", 3), {}, "parameter 'head.bias', 'exp_avg' is a int, which is not saved or loaded"),
    "object": (in_state("exp_avg", Odd()), {}, "parameter 'head.bias', 'exp_avg' is no array: no array"),
    "big-endian": (in_state("exp_avg", numpy.ones(4, ">f4")), {}, "head.bias.* has dtype >f4, expected float32"),
    "bfloat16": (in_state("exp_avg", torch.ones(4).bfloat16()), {}, "parameter 'head.bias', 'exp_avg' is no array: "),
    "shape": (in_state("exp_avg", numpy.zeros(5, "f4")), {}, r"  head.bias shape saved \[5\] here \[4\]"),
    "few names": (edited(lambda given: None), {"saved_names": NAMES[:4]}, "saved_names: there are 4 for 6 parameters"),
    "what": (edited(lambda given: None), {"what": "lr"}, "what must be 'all', 'state' or 'hyper', got 'lr'"),
    "what none": (edited(lambda given: None), {"what": None}, "what must be 'all', 'state' or 'hyper', got None"),
    "rename": (edited(lambda given: None), {"rename": 3}, "rename: expected a dict or a function, got int"),
    "rename to 3": (edited(lambda given: None), {"rename": lambda key: 3}, "rename: 'stem.weight' becomes 3, expected"),
    "rename twice": (edited(lambda g: None), {"rename": {"scale": "empty"}}, "rename: 'scale' and 'empty' both become"),
    "no source": (lambda optimizer: 3, {}, "expected a file's path or a state_dict, got int"),
}


@pytest.mark.parametrize("kind", BAD_DICTS)
def test_bad_dicts_and_arguments_change_nothing(kind):
    make, options, message = BAD_DICTS[kind]
    source = make(trained("Adam")[1])
    arrays, optimizer = trained("Adam", steps=2, lr=0.7)
    before = everything(arrays, optimizer)
    with pytest.raises(fusestep.InvalidArgument, match=message):
        optimizer.load(source, **options)
    assert_same(everything(arrays, optimizer), before)


@pytest.mark.parametrize("kind", ["flipped bit", "cut off", "gone", "errors of rename", "lr"])
@pytest.mark.parametrize("fresh", [False, True], ids=["stepped", "fresh"])
def test_bad_files_change_nothing(kind, fresh, tmp_path):
    path = tmp_path / "state"
    _, before = trained("Adam")
    before.save(path, values=True)
    arrays, optimizer = trained("Adam", steps=0 if fresh else 2, lr=0.7)
    optimizer.freeze("scale")
    expected = everything(arrays, optimizer)
    data = path.read_bytes()
    options, error, message = {}, fusestep.FileError, str(path)
    if kind == "gone":
        path.unlink()
    elif kind == "cut off":
        path.write_bytes(data[:-5])
    elif kind == "flipped bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif kind == "errors of rename":
        options, error, message = {"rename": {}.__getitem__}, KeyError, "stem.weight"
    else:
        parameters = [(key, torch.nn.Parameter(torch.from_numpy(array))) for key, array in model().items()]
        bad = fusestep.optim.Adam(parameters)
        bad.param_groups[0]["lr"] = -1.0
        bad.save(path)
        message = "group '0': lr must be >= 0, got -1"
    with pytest.raises(error, match=message):
        optimizer.load(path, **options)
    assert_same(everything(arrays, optimizer), expected)


POSITIONAL = {
    "groups": (
        edited(lambda given: given["param_groups"].append(given["param_groups"][0])),
        "loaded state dict has a different number of parameter groups",
    ),
    "size": (
        edited(lambda given: [given["param_groups"][0][key].pop() for key in ("params", "param_names")]),
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
    ),
    "shape": (in_state("exp_avg", numpy.zeros(5, "f4")), r"head.bias shape saved \[5\] here \[4\]"),
    "no state": (edited(lambda given: given.pop("state")), "state_dict: has no 'state'"),
}


@pytest.mark.parametrize("kind", POSITIONAL)
def test_load_state_dict_refuses(kind):
    make, message = POSITIONAL[kind]
    given = make(trained("Adam")[1])
    arrays, optimizer = trained("Adam", steps=2, lr=0.7)
    before = everything(arrays, optimizer)
    with pytest.raises(fusestep.LoadError if kind == "shape" else fusestep.InvalidArgument, match=message):
        optimizer.load_state_dict(given)
    assert_same(everything(arrays, optimizer), before)


def test_load_state_dict_goes_by_position():
    """Names in the dict do not matter."""
    before = fusestep.Optimizer("Adam", {"a": numpy.ones(2), "b": numpy.ones(2)})
    before.step({"a": numpy.ones(2), "b": numpy.full(2, 3.0)})
    now = fusestep.Optimizer("Adam", {"b": numpy.ones(2), "c": numpy.ones(2)})
    now.load_state_dict(before.state_dict())
    assert numpy.array_equal(now.slots("b")["exp_avg"], before.slots("a")["exp_avg"])
    assert numpy.array_equal(now.slots("c")["exp_avg"], before.slots("b")["exp_avg"])


@pytest.mark.parametrize("method", ["save", "save_async"])
@pytest.mark.parametrize(
    ("path", "metadata", "message"),
    [
        (3, None, "expected a file's path, got int"),
        (None, {"fusestep.x": 1}, "keys that begin with 'fusestep.' are reserved"),
        (None, {"x": object()}, r"metadata\['x'\] cannot be written as JSON"),
    ],
)
def test_bad_arguments_of_save(method, path, metadata, message, tmp_path):
    _, optimizer = trained("Adam")
    with pytest.raises(fusestep.InvalidArgument, match=message):
        getattr(optimizer, method)(path or tmp_path / "state", metadata=metadata)
    assert not list(tmp_path.iterdir())


# ---- saving in the background -------------------------------------------------------------------------


def test_save_async_holds_the_state_of_the_call(tmp_path):
    arrays = {"w": numpy.ones(4_000_000, numpy.float32)}
    optimizer = fusestep.Optimizer("Adam", arrays)
    grads = {"w": numpy.full(4_000_000, 0.5, numpy.float32)}
    optimizer.step(grads)
    expected = contents(arrays, optimizer)
    optimizer.save_async(tmp_path / "state", values=True)
    for _ in range(3):
        optimizer.step(grads)
    optimizer.wait_for_save()
    fresh = {"w": numpy.zeros(4_000_000, numpy.float32)}
    resumed = fusestep.Optimizer("Adam", fresh)
    resumed.load(tmp_path / "state")
    assert_bits(contents(fresh, resumed), expected)


def test_a_load_waits_for_the_save(tmp_path):
    arrays, optimizer = trained("Adam")
    optimizer.save_async(tmp_path / "state")
    assert optimizer.load(tmp_path / "state").complete


@pytest.mark.parametrize("call", ["save", "save_async", "load", "wait_for_save"])
def test_errors_of_save_async_come_at_the_next_call(call, tmp_path):
    arrays, optimizer = trained("Adam")
    given = {"load": (optimizer.state_dict(),), "wait_for_save": ()}.get(call, (tmp_path / "state",))
    optimizer.save_async(tmp_path / "no" / "such" / "folder")
    with pytest.raises(fusestep.FileError, match="cannot open its directory"):
        getattr(optimizer, call)(*given)
    assert not (tmp_path / "state").exists()
    getattr(optimizer, call)(*given)  # once
    optimizer.wait_for_save()
