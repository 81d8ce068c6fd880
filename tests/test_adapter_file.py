"""Adapter deltas in files: what describes them comes back, and nothing else gets by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_deltas import INITIAL, SHAPES, adapter_delta

from deltakit import SparseDelta, load, save, truncate
from deltakit.adapters.initial import (
    all_initial_values,
    initial_values,
    trained_values,
)
from deltakit.errors import BaseMismatchError, DeltaError, FormatError
from deltakit.formats import header_json
from deltakit.formats.sdelta import encode, parse_header


def test_a_file_gives_the_adapter_back(tmp_path: Path) -> None:
    delta = adapter_delta()
    save(delta, tmp_path / "a.sdelta")
    assert load(tmp_path / "a.sdelta").equals(delta)


def test_only_files_with_an_adapter_are_of_version_2() -> None:
    def version(delta: SparseDelta) -> int:
        data = encode(delta)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]["sdelta"]
        return int(json.loads(metadata)["header"]["version"])

    assert version(adapter_delta()) == 2
    assert version(replace(adapter_delta(), adapter=None)) == 1


def _with_header(delta: SparseDelta, **members: object) -> bytes:
    data = encode(delta)
    header, _ = parse_header(data, len(data), "here")
    content = json.loads(header_json.dumps(header))["header"] | members
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    header_json.loads(f'{{"header":{text},"sha256":"{header_json.digest(text.encode())}"}}', "here")
    return data


@pytest.mark.parametrize(
    "members",
    [
        {"version": 1},
        {"adapter": None},
        {"adapter": {}},
        {"adapter": {"kind": "lora"}},
        *(
            {"adapter": {"kind": "l", "config": {}, "seed": 0, "check": "0" * 16, **wrong}}
            for wrong in (
                {"initial": {}},
                {"initial": []},
                {"initial": {"lora_A.weight": {"constant": 0}}},  # lora_B has no rule
                {"initial": {**INITIAL, "lora_B.weight": {"uniform": 0}}},
                {"initial": {**INITIAL, "lora_B.weight": {"uniform": 1, "constant": 1}}},
                {"initial": {**INITIAL, "lora_B.weight": {"normal": 1}}},
                {"initial": INITIAL, "seed": -1},
                {"initial": INITIAL, "seed": 2**64},
                {"initial": INITIAL, "seed": True},
                {"initial": INITIAL, "check": "0"},
                {"initial": INITIAL, "config": []},
                {"initial": INITIAL, "more": 1},
            )
        ),
    ],
)
def test_a_broken_description_is_refused(members: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        _with_header(adapter_delta(), **members)


def test_a_sound_description_is_not_refused() -> None:
    _with_header(adapter_delta(), provenance={"a": 1})


def test_uniform_values_fill_their_range_evenly() -> None:
    values = initial_values({"uniform": 0.5}, "w", (200, 500), "float32", 3)
    assert values.dtype == np.float32 and (values != 0).all()
    assert np.abs(values).max() < 0.5
    counts, _ = np.histogram(values, bins=20, range=(-0.5, 0.5))
    assert np.abs(counts - 5000).max() < 5 * np.sqrt(5000)


def test_initial_values_are_those_of_the_specification() -> None:
    """Word by word in Python's own integers and NumPy's float32, for fan-in 9."""
    from deltakit.formats.seeded import philox_words

    words = philox_words(11, "m.lora_A.weight", 4, "adapter initial values")
    scale = np.float32((1 / 9**0.5) / 2**24)
    expected = [np.float32(2 * (int(w) >> 40) + 1 - 2**24) * scale for w in words]
    found = initial_values({"uniform": "fan-in"}, "m.lora_A.weight", (4, 9), "float32", 11)
    assert found.reshape(-1)[:4].tolist() == [float(v) for v in expected]


def test_the_check_value_proves_seed_config_names_and_shapes() -> None:
    delta = adapter_delta()
    assert delta.adapter is not None
    all_initial_values(delta)
    for wrong in (
        replace(delta.adapter, seed=8),
        replace(delta.adapter, config={"r": 5}),
        replace(delta.adapter, kind="dora"),
        replace(delta.adapter, initial={**INITIAL, "lora_B.weight": {"constant": 1.0}}),
    ):
        with pytest.raises(BaseMismatchError, match="check value"):
            all_initial_values(replace(delta, adapter=wrong))
    fewer = {n: t for n, t in delta.tensors.items() if t.nnz}
    with pytest.raises(BaseMismatchError, match="check value"):
        all_initial_values(replace(delta, tensors=fewer))


def test_entries_alone_differ_from_the_initial_values() -> None:
    delta = adapter_delta()
    before, after = all_initial_values(delta), trained_values(delta)
    for name, tensor in delta.tensors.items():
        expected = before[name].copy().reshape(-1)
        expected[tensor.indices] = expected[tensor.indices] + tensor.values
        assert after[name].reshape(-1).tobytes() == expected.tobytes()


def test_truncation_keeps_the_adapter_whole() -> None:
    small = truncate(adapter_delta(), 1)
    assert small.nnz == 1 and list(small.tensors) == list(SHAPES)
    all_initial_values(small)


def test_tensors_of_no_adapter_are_refused() -> None:
    delta = adapter_delta()
    assert delta.adapter is not None
    other = replace(delta.adapter, initial={"x": {"constant": 0}})
    with pytest.raises(DeltaError, match="parameters are"):
        replace(delta, adapter=other)
