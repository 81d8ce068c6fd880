"""Laws of `.sdelta` files: what is read is what was written, to the bit, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from golden_deltas import add, delta, golden, put, words
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakit.delta import BaseIdentity, Fingerprint, Mode, SparseDelta, TensorDelta
from deltakit.dtypes import DTYPES, Array, DType
from deltakit.errors import (
    ConfigError,
    CoordinateError,
    DeltaError,
    FormatError,
    MissingFileError,
)
from deltakit.formats.sdelta import SdeltaFile, encode, is_sdelta, load, parse_header, save
from deltakit.formats.seeded import seeded_support

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FLOATS = ("float32", "bfloat16", "float16", "float64")


def decoded(data: bytes, folder: Path) -> SparseDelta:
    path = folder / "x.sdelta"
    path.write_bytes(data)
    return load(path)


@st.composite
def tensors(draw: st.DrawFn, name: str) -> TensorDelta:
    """Any tensor: every dtype and mode, any shape of up to 2^62 elements, any streams."""
    kind = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    mode: Mode = draw(st.sampled_from(["add", "set"])) if kind.is_floating else "set"
    shapes = st.lists(st.integers(0, 5), max_size=3) | st.just([2**31, 2**31]) | st.just([2**33])
    shape = tuple(draw(shapes))
    numel = prod(shape)
    seed = None
    if numel and draw(st.integers(0, 5)) == 0:
        seed = draw(st.integers(0, 2**64 - 1))
        support = seeded_support(seed, name, numel, draw(st.integers(0, min(numel, 9))))
    elif numel < 200 and draw(st.booleans()):
        support = np.arange(numel, dtype=np.int64)
    else:
        chosen = (
            st.sets(st.integers(0, numel - 1), max_size=min(numel, 20)) if numel else st.just(set())
        )
        support = np.array(sorted(draw(chosen)), np.int64)
    count = len(support)
    values: Array = draw_words(draw, kind, count)
    if mode == "add":
        finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
        listed = draw(st.lists(finite, min_size=count, max_size=count))
        values = np.array(listed, kind.compute)
    steps = st.lists(st.integers(0, 2**63 - 1), min_size=count, max_size=count)
    return TensorDelta(
        name=name,
        shape=shape,
        dtype=kind.name,
        mode=mode,
        indices=support,
        values=values,
        order=draw(st.none() | steps.map(lambda given: np.array(given, np.int64))),
        base_values=draw_words(draw, kind, count) if draw(st.booleans()) else None,
        trained_dtype=draw(st.sampled_from(["", "bfloat16", kind.name])),
        seed=seed,
    )


def draw_words(draw: st.DrawFn, kind: DType, count: int) -> Array:
    size = kind.itemsize * count
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), kind.words)
    return raw & np.uint8(1) if kind.name == "bool" else raw


@st.composite
def deltas(draw: st.DrawFn) -> SparseDelta:
    """Any delta."""
    names = draw(st.lists(NAMES, unique=True, max_size=4))
    free = [n for n in draw(st.lists(NAMES, unique=True, max_size=3)) if n not in names]
    free = [n for n in free if not n.startswith("sdelta.") and n != "__metadata__"]
    extras = {}
    for name in free:
        kind = DTYPES[draw(st.sampled_from(list(DTYPES)))]
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        extras[name] = draw_words(draw, kind, prod(shape)).view(kind.numpy).reshape(shape)
    digests = st.integers(0, 2**64 - 1).map(lambda n: f"{n:016x}")
    prints = st.builds(Fingerprint, sample=digests, support=st.none() | digests)
    plain = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | NAMES
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
        max_leaves=4,
    )
    identity = st.builds(
        BaseIdentity,
        model_id=st.none() | NAMES,
        revision=st.none() | NAMES,
        total_weights=st.none() | st.integers(0, 2**62),
        tensors=st.dictionaries(st.sampled_from([*names, "other", ""]), prints, max_size=3),
    )
    return SparseDelta(
        tensors={name: draw(tensors(name)) for name in names},
        extras=extras,
        base=draw(st.none() | identity),
        config=draw(st.dictionaries(NAMES, plain, max_size=2)),
        provenance=draw(st.dictionaries(NAMES, plain, max_size=2)),
    )


@given(deltas())
def test_everything_comes_back(
    tmp_path_factory: pytest.TempPathFactory, given_: SparseDelta
) -> None:
    """Bit for bit; written again it is the same bytes; the safetensors library opens it."""
    data = encode(given_)
    found = decoded(data, tmp_path_factory.getbasetemp())
    assert found.equals(given_)
    assert encode(found) == data
    opened = dict(safetensors.deserialize(data))
    for name, array in given_.extras.items():
        assert (opened[name]["shape"], bytes(opened[name]["data"])) == (
            list(array.shape),
            array.tobytes(),
        )


@settings(max_examples=40)
@given(deltas(), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_narrow_values_are_rounded_to_nearest_even_or_refused(
    tmp_path_factory: pytest.TempPathFactory, given_: SparseDelta, stored: str
) -> None:
    kind = DTYPES[stored]
    with np.errstate(over="ignore"):
        fits = all(
            t.mode == "set" or np.isfinite(t.values.astype(kind.numpy)).all()
            for t in given_.tensors.values()
        )
    if not fits:
        with pytest.raises(DeltaError, match=f"is too large for {stored}"):
            encode(given_, values=stored)
        return
    found = decoded(encode(given_, values=stored), tmp_path_factory.getbasetemp())
    for name, tensor in given_.tensors.items():
        expected = tensor.values
        if tensor.mode == "add":  # drawn from float32, so float64 rounds only once
            expected = expected.astype(np.float32).astype(kind.numpy).astype(tensor.kind.compute)
        assert found.tensors[name].values.tobytes() == expected.tobytes()


def test_float64_is_rounded_once() -> None:
    """1 + 2^-8 + 2^-40 lies above a tie of bfloat16, which float32 would round it onto."""
    for sign in (1.0, -1.0):
        values = sign * np.array([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 3 * 2**-8 - 2**-40, 2**-200])
        data = encode(delta(add((4,), range(4), "float64", values=values)), values="bfloat16")
        header, body = parse_header(data, len(data), "x")
        stored = np.frombuffer(data[body : body + 8], ml_dtypes.bfloat16).astype(np.float64)
        assert header.tensors["w"].value_dtype == "bfloat16"
        assert (sign * stored).tolist() == [1 + 2**-7, 1.0, 1 + 2**-7, 0.0]


def test_a_value_that_becomes_infinite_is_refused_by_name() -> None:
    content = delta(add((9,), [3, 8], name="up.weight", values=[1.0, 7e4]))
    with pytest.raises(DeltaError, match=r"'up.weight': value 70000.0 at index 8 is too large"):
        encode(content, values="float16")
    for stored in ("bfloat16", "float32"):
        encode(content, values=stored)
    huge = delta(add((1,), [0], "float64", values=[1e300]))
    for stored in ("float16", "bfloat16", "float32"):
        with pytest.raises(DeltaError, match="is too large for"):
            encode(huge, values=stored)


def test_values_are_stored_as_asked() -> None:
    sizes = {}
    for stored in (None, "float32", "bfloat16", "float16"):
        data = encode(delta(add((100,), range(0, 100, 3))), values=stored)
        sizes[stored] = parse_header(data, len(data), "x")[0].tensors["w"].value_bytes
    assert sizes == {None: 136, "float32": 136, "bfloat16": 68, "float16": 68}
    with pytest.raises(ConfigError, match="'int8'; known: float32, bfloat16, float16"):
        encode(delta(add((3,), [0])), values="int8")


def test_set_mode_keeps_every_bit_whatever_values_are_asked_for(tmp_path: Path) -> None:
    """NaN payloads and infinities too."""
    content = delta(*(put(dtype) for dtype in DTYPES))
    for stored in (None, "bfloat16"):
        assert decoded(encode(content, values=stored), tmp_path).equals(content)


def test_order_and_base_values_can_be_left_out(tmp_path: Path) -> None:
    tensor = add((100,), [3, 5], order=[1, 0], base_values=words(2, 4))
    whole = encode(delta(tensor))
    for left_out in ("order", "base_values"):
        kept: dict[str, Any] = {left_out: False}
        data = encode(delta(tensor), **kept)
        found = decoded(data, tmp_path).tensors["w"]
        assert getattr(found, left_out) is None
        assert len(data) < len(whole)
    bare = encode(delta(tensor), order=False, base_values=False)
    assert bare == encode(delta(add((100,), [3, 5])))


def test_bytes_do_not_depend_on_the_order_of_anything() -> None:
    parts = [add((9,), [1], name=name) for name in ("b", "a", "é", "Z")]
    extras = {name: np.arange(2) for name in ("y", "x")}
    described: dict[str, Any] = {
        "provenance": {"b": 1, "a": {"d": 1, "c": 2}},
        "config": {"q": 1, "p": 2},
    }
    turned = {key: dict(reversed(value.items())) for key, value in described.items()}
    turned["provenance"]["a"] = {"c": 2, "d": 1}
    backwards = dict(reversed(extras.items()))
    assert encode(delta(*parts, extras=extras, **described)) == encode(
        delta(*reversed(parts), extras=backwards, **turned)
    )


def test_bytes_do_not_depend_on_the_process() -> None:
    """Two hash seeds, two fresh interpreters."""
    program = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "from golden_deltas import golden\n"
        "from deltakit.formats.sdelta import encode\n"
        "print([hashlib.sha256(encode(d, **how)).hexdigest() for d, how in golden().values()])\n"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_one_tensor_is_read_without_the_others(tmp_path: Path) -> None:
    """Every byte of the body that is not its own is spoiled, and it does not notice."""
    content, how = golden()["v1-many"]
    data = encode(content, **how)
    _, body = parse_header(data, len(data), "x")
    path = tmp_path / "a.sdelta"
    path.write_bytes(data)
    for name, tensor in content.tensors.items():
        with SdeltaFile(path) as file:
            own = [range(body + a, body + b) for a, b in file._extents[name].values()]
        spoiled = bytearray(byte ^ 0xFF for byte in data)
        spoiled[:body] = data[:body]
        for places in own:
            spoiled[places.start : places.stop] = data[places.start : places.stop]
        other = tmp_path / "spoiled.sdelta"
        other.write_bytes(spoiled)
        with SdeltaFile(other) as file:
            assert file.tensor(name).equals(tensor)
            assert file.tensors[name].nbytes == sum(map(len, own))


def test_the_header_alone_tells_what_is_in_a_file(tmp_path: Path) -> None:
    content, how = golden()["v1-many"]
    path = tmp_path / "a.sdelta"
    save(content, path, **how)
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header, body = parse_header(data[:size], len(data), "x")
    assert body == size
    with SdeltaFile(path) as file:
        assert file.header == header
        assert file.size == len(data)
        assert list(file.tensors) == list(content.tensors)
        assert {n: (e.dtype, e.shape) for n, e in file.extras.items()} == {
            "head.bias": ("float32", (3,))
        }
        assert file.header.nnz == content.nnz
        record = file.tensors["b"]
        described = (record.shape, record.dtype, record.mode, record.nnz, record.order_bits)
        assert described == ((40, 25), "float32", "add", 6, 3)
        assert (record.coding, record.value_bytes, record.order_bytes) == ("rice", 24, 3)
        total = sum(r.nbytes for r in file.tensors.values()) + file.extras["head.bias"].nbytes
        assert total == file.size - body


def test_streams_are_aligned_and_metadata_is_one_key() -> None:
    content, how = golden()["v1-set"]
    data = encode(content, **how)
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert list(outer.pop("__metadata__")) == ["sdelta"]
    bits = {"64": 8, "32": 4, "16": 2}
    for name, entry in outer.items():
        size = bits.get(entry["dtype"][-2:], 1)
        assert entry["data_offsets"][0] % size == 0, name


def test_arrays_that_were_read_can_be_written_to(tmp_path: Path) -> None:
    """torch refuses read-only arrays with a warning."""
    path = tmp_path / "a.sdelta"
    save(delta(put("bfloat16"), add((9,), [1], order=[2]), extras={"h": np.ones(2)}), path)
    found = load(path)
    arrays = [found.extras["h"]]
    for tensor in found.tensors.values():
        arrays += [tensor.indices, tensor.values]
        arrays += [a for a in (tensor.order, tensor.base_values) if a is not None]
    assert all(array.flags.writeable for array in arrays)


def test_saving_replaces_a_file_and_leaves_it_when_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sdelta"
    save(delta(add((9,), [1])), path)
    before = path.read_bytes()
    with pytest.raises(FormatError, match="provenance: nan is not JSON"):
        save(delta(provenance={"x": float("nan")}), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    save(delta(), path)
    assert load(path).nnz == 0
    with pytest.raises(MissingFileError, match="does not exist"):
        save(delta(), tmp_path / "no" / "a.sdelta")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"provenance": {"x": {1: 2}}}, "provenance: the key 1 is int, not str"),
        ({"config": {"x": np.int64(3)}}, "config: int64 is not JSON"),
        ({"config": {"x": "\ud800"}}, "config: .* holds a lone surrogate"),
        ({"provenance": {"x": 10**1000}}, "more than 1000 digits"),
        ({"base": BaseIdentity(model_id="\udfff")}, "lone surrogate"),
    ],
)
def test_descriptions_that_are_no_json_are_refused(described: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        encode(delta(**described))


def test_deep_nesting_is_refused_by_writer_and_allowed_up_to_the_limit(tmp_path: Path) -> None:
    def nested(levels: int) -> dict[str, Any]:
        return {"x": nested(levels - 1)} if levels else {}

    content = delta(provenance=nested(63))
    assert decoded(encode(content), tmp_path).equals(content)
    with pytest.raises(FormatError, match="provenance: JSON is nested deeper than 64 levels"):
        encode(delta(provenance=nested(64)))


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    numbers = [10**1000 - 1, 1 - 10**1000, 2**63, -0.0, 0.1, 5e-324, 1.7976931348623157e308, 1.0, 1]
    found = decoded(encode(delta(provenance={"x": numbers})), tmp_path).provenance["x"]
    assert [repr(number) for number in found] == [repr(number) for number in numbers]


def test_reserved_names_of_extras_are_refused() -> None:
    for name in ("sdelta.indices", "sdelta.", "__metadata__"):
        with pytest.raises(DeltaError, match="reserved"):
            encode(delta(extras={name: np.ones(2)}))


def test_a_seed_must_generate_its_indices() -> None:
    with pytest.raises(FormatError, match="seed 1 does not generate these 2 indices; clear"):
        encode(delta(add((1000,), [3, 4], seed=1)))


def test_sdelta_files_are_told_by_content(tmp_path: Path) -> None:
    path = tmp_path / "named.anything"
    save(delta(), path)
    other = tmp_path / "model.safetensors"
    other.write_bytes(safetensors.serialize({}, {"sdelta.not": "x"}))
    empty = tmp_path / "empty.sdelta"
    empty.write_bytes(b"")
    found = [is_sdelta(p) for p in (path, other, empty, tmp_path, tmp_path / "missing")]
    assert found == [True, False, False, False, False]


def test_missing_files_and_names_say_so(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"cannot read .*missing.sdelta: No such file"):
        load(tmp_path / "missing.sdelta")
    with pytest.raises(MissingFileError, match="Is a directory"):
        load(tmp_path)
    path = tmp_path / "a.sdelta"
    save(delta(add((9,), [1], name="up.weight"), extras={"head.weight": np.ones(1)}), path)
    with SdeltaFile(path) as file:
        with pytest.raises(CoordinateError, match=r"no tensor 'up.wieght' .*nearest: up.weight"):
            file.tensor("up.wieght")
        with pytest.raises(CoordinateError, match=r"no extra 'head' in this delta"):
            file.extra("head")
