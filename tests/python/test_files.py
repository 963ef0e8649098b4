# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Files of the C++ layer and of the public safetensors package: each reads what the other writes.

FUSESTEP_FILE_PROBE names the program that the C++ build makes of tests/cpp/file_probe.cpp.
"""

import json
import os
import pathlib
import random
import struct
import subprocess

import numpy
import pytest
import safetensors
import safetensors.numpy

import fusestep

PROBE = os.environ.get("FUSESTEP_FILE_PROBE")
if PROBE is None:
    pytest.skip("FUSESTEP_FILE_PROBE is not set", allow_module_level=True)

# Names of dtypes in files, and what safetensors.serialize calls them.
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
SHAPES = [(), (1,), (0,), (2, 3), (3, 0, 2), (5, 1, 7)]
METADATA = {"maker": "test", "text": 'quotes " and \\ and \n and é and 🔥 and \x00', "": ""}


def probe(*arguments, stdin=None):
    done = subprocess.run([PROBE, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done
    return done.stdout


def contents():
    """(name, dtype, shape, bytes) of every dtype in every shape."""
    generator = random.Random(5)
    for dtype, (_, size) in DTYPES.items():
        for shape in SHAPES:
            name = f'{dtype} "{"x".join(map(str, shape))}" é'
            data = generator.randbytes(int(numpy.prod(shape, dtype=int)) * size)
            yield name, dtype, shape, bytes(byte % 2 for byte in data) if dtype == "BOOL" else data


def serialized(tensors, metadata=None):
    """The public writer's bytes. Its interface for raw data is a dict, and since 0.8 a TensorSpec."""
    described, alive = {}, []
    for name, dtype, shape, data in tensors:
        if hasattr(safetensors, "TensorSpec"):
            alive.append(numpy.frombuffer(data, numpy.uint8))
            described[name] = safetensors.TensorSpec(
                dtype=DTYPES[dtype][0], shape=list(shape), data_ptr=alive[-1].ctypes.data, data_len=len(data)
            )
        else:
            described[name] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data": data}
    return safetensors.serialize(described, metadata)


def test_probe_is_there():
    assert pathlib.Path(PROBE).is_file()


def test_the_public_reader_reads_our_files(tmp_path):
    file = tmp_path / "ours.safetensors"
    tensors = [
        {"name": name, "dtype": dtype, "shape": shape, "data": data.hex()} for name, dtype, shape, data in contents()
    ]
    assert probe("write", file, stdin=json.dumps({"metadata": METADATA, "tensors": tensors})) == ""
    found = dict(safetensors.deserialize(file.read_bytes()))
    assert len(found) == len(tensors)
    for name, dtype, shape, data in contents():
        assert found[name]["dtype"] == dtype
        assert tuple(found[name]["shape"]) == shape
        assert bytes(found[name]["data"]) == data
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata().items() >= METADATA.items()
        assert opened.metadata().keys() == METADATA.keys() | {
            "fusestep.version",
            "fusestep.crc32c",
            "fusestep.header_crc32c",
        }


def test_numbers_are_the_same(tmp_path):
    file = tmp_path / "ours.safetensors"
    values = {
        "f32": numpy.array([[1.5, -0.0, numpy.inf], [numpy.nan, 1e-45, 3.4e38]], numpy.float32),
        "f64": numpy.array(5e-324),
        "f16": numpy.array([65504, 6e-8], numpy.float16),
        "i64": numpy.array([-(2**63), 2**63 - 1]),
        "bool": numpy.array([True, False]),
    }
    names = {"f32": "F32", "f64": "F64", "f16": "F16", "i64": "I64", "bool": "BOOL"}
    tensors = [
        {"name": key, "dtype": names[key], "shape": value.shape, "data": value.tobytes().hex()}
        for key, value in values.items()
    ]
    probe("write", file, stdin=json.dumps({"metadata": {}, "tensors": tensors}))
    loaded = safetensors.numpy.load_file(file)
    for key, value in values.items():
        assert loaded[key].dtype == value.dtype
        numpy.testing.assert_array_equal(loaded[key], value)
        assert (numpy.signbit(loaded[key]) == numpy.signbit(value)).all() if value.dtype.kind == "f" else True


def test_we_read_files_of_the_public_writer(tmp_path):
    file = tmp_path / "theirs.safetensors"
    file.write_bytes(serialized(contents(), METADATA))
    found = json.loads(probe("list", file))
    assert found["metadata"] == METADATA
    assert found["has_checksums"] is False
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert len(by_name) == len(list(contents()))
    for name, dtype, shape, data in contents():
        assert by_name[name]["dtype"] == dtype
        assert tuple(by_name[name]["shape"]) == shape
        assert bytes.fromhex(by_name[name]["data"]) == data


def test_the_layout_is_the_public_writers(tmp_path):
    """Order of names and offsets; what differs is metadata and padding."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.write_bytes(serialized(contents()))
    listed = [
        {"name": name, "dtype": dtype, "shape": shape, "data": data.hex()} for name, dtype, shape, data in contents()
    ]
    probe("write", ours, stdin=json.dumps({"metadata": {}, "tensors": listed}))

    def header(file):
        raw = file.read_bytes()
        parsed = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        parsed.pop("__metadata__", None)
        return parsed

    assert list(header(ours).items()) == list(header(theirs).items())


def mutations(raw, count):
    """The file with a few bytes of its header changed, put in, or taken out."""
    generator = random.Random(7)
    (length,) = struct.unpack("<Q", raw[:8])
    fragments = [b"0", b"1", b"9", b"-", b'"', b",", b"[", b"]", b"{", b"}", b" ", b":", b"null", b"1.0", b"F16", b"\\"]
    for _ in range(count):
        header = bytearray(raw[8 : 8 + length])
        for _ in range(generator.choice((1, 1, 2))):
            place = generator.randrange(len(header))
            taken = generator.choice((0, 1, 1, 2))
            header[place : place + taken] = generator.choice(fragments)
        yield struct.pack("<Q", len(header)) + bytes(header) + raw[8 + length :]


def keys_are_odd(raw):
    """What we refuse on purpose: keys twice, unknown keys of a tensor, a null for the metadata, no '{' at first."""
    (length,) = struct.unpack("<Q", raw[:8])
    twice = []

    def remember(pairs):
        if len({key for key, _ in pairs}) != len(pairs):
            twice.append(pairs)
        return dict(pairs)

    header = json.loads(raw[8 : 8 + length], object_pairs_hook=remember)
    unknown = any(
        set(entry) != {"dtype", "shape", "data_offsets"} for key, entry in header.items() if key != "__metadata__"
    )
    return bool(twice) or unknown or header.get("__metadata__", {}) is None or raw[8:9] != b"{"


def test_we_accept_what_the_public_reader_accepts(tmp_path):
    generator = numpy.random.default_rng(3)
    raw = safetensors.numpy.save(
        {
            "a": generator.standard_normal((2, 3)).astype(numpy.float16),
            "b": numpy.zeros((0, 2), numpy.float32),
            "c": numpy.array(3.0),
        },
        {"k": "v"},
    )
    files = list(mutations(raw, 4000))
    for index, content in enumerate(files):
        (tmp_path / str(index)).write_bytes(content)
    names = "\n".join(str(tmp_path / str(index)) for index in range(len(files)))
    verdicts = probe("check", stdin=names + "\n").splitlines()
    assert len(verdicts) == len(files)
    accepted = 0
    for content, verdict in zip(files, verdicts, strict=True):
        try:
            safetensors.deserialize(content)
            theirs = True
        except safetensors.SafetensorError:
            theirs = False
        if theirs and verdict != "ok":
            assert keys_are_odd(content), (verdict, content)
        elif not theirs:
            assert verdict != "ok", content
        accepted += verdict == "ok"
    assert 100 < accepted < len(files) / 2


def test_python_loads_what_ranks_of_a_cpp_program_have_saved(tmp_path):
    torch = pytest.importorskip("torch")
    optim = pytest.importorskip("fusestep.optim")
    file = tmp_path / "state.safetensors"
    assert probe("ranks", file) == ""

    def parameters():
        return {"b": torch.nn.Parameter(torch.full((2,), 0.5)), "w": torch.nn.Parameter(torch.full((5, 2), 0.5))}

    control = parameters()
    expected = optim.Adam(control.items(), lr=0.125)
    control["w"].grad, control["b"].grad = torch.arange(10.0).reshape(5, 2), torch.ones(2)
    for _ in range(2):
        expected.step()
    loaded = parameters()
    optimizer = optim.Adam(loaded.items(), lr=0.5)
    report = optimizer.load(file)
    assert report.complete and report.metadata == {"epoch": 4} and optimizer.param_groups[0]["lr"] == 0.125
    arrays = {name: numpy.full(p.shape, 0.5, numpy.float32) for name, p in loaded.items()}
    other = fusestep.Optimizer("Adam", arrays)
    other.load(file)
    for name, p in loaded.items():
        assert torch.equal(p, control[name]) and numpy.array_equal(arrays[name], p.detach().numpy())
        assert other.step_count(name) == 2
        for slot, value in expected.state[control[name]].items():
            assert torch.equal(optimizer.state[p][slot], value)
            assert slot == "step" or numpy.array_equal(other.slots(name)[slot], value.numpy())
    # The file of one rank has a part of each: it fits nowhere else.
    with pytest.raises(fusestep.LoadError, match=r"w shard saved elements 3 to 6 of \[5, 2\] here elements 0 to 10 of"):
        optimizer.load(tmp_path / "state.7.1-of-3.safetensors")
