"""LT-SFT differences: every generation gives what composable-sft itself would have applied."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import (
    SparseTensorDifference,
    dense,
    earliest_encoding,
    lt_sft_encoding,
    random_entries,
    save_as,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_bert
from transformers import BertForSequenceClassification

import deltakit as dk
from deltakit.conversion import convert
from deltakit.errors import DeltakitError, FormatError
from deltakit.formats.bridges import BRIDGES, Options, recognise
from deltakit.formats.bridges.lt_sft import _row_major
from deltakit.formats.checkpoint import Checkpoint

GENERATIONS: dict[str, Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], Any]] = {
    "diffs": lambda d, w: {"diffs": encoded(d), "abs": w},
    "body": lambda d, w: {"body": encoded(d), "head": w},
    "body in lists": lambda d, w: {
        "body": {name: earliest_encoding(change) for name, change in d.items()},
        "head": w,
    },
    "body of objects": lambda d, w: {
        "body": {n: SparseTensorDifference(earliest_encoding(change)) for n, change in d.items()},
        "head": w,
    },
}
WEIGHT = "bert.encoder.layer.1.output.dense.weight"


def encoded(changes: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: lt_sft_encoding(change) for name, change in changes.items()}


def read(path: Path, base: Path | None = None) -> dk.SparseDelta:
    checkpoint = None if base is None else Checkpoint(base)
    return BRIDGES["lt-sft"]().read(path, base=checkpoint, options=Options()).delta


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_model_is_equal_before_and_after(tmp_path: Path, generation: str) -> None:
    """The trained classifier of an encoder saved without a head, by the peer's own rule
    (parameter += difference; head copied) and merged from the conversion: the same bits."""
    base = write_bert(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    names = ["bert.embeddings.word_embeddings.weight", WEIGHT, "bert.pooler.dense.bias"]
    changes = {
        name: dense(model.get_parameter(name).shape, random_entries((p.numel(),), 9, seed))
        for seed, (name, p) in enumerate((n, model.get_parameter(n)) for n in names)
    }
    head = {
        f"classifier.{part}": torch.randn(s)
        for part, s in {"weight": (3, 16), "bias": (3,)}.items()
    }
    source = tmp_path / "sft"
    source.mkdir()
    save_as(
        source / "pytorch_diff.bin", GENERATIONS[generation](changes, head), SparseTensorDifference
    )
    with torch.no_grad():
        for name, change in changes.items():
            parameter = model.get_parameter(name)
            parameter += change
        for name, value in head.items():
            model.get_parameter(name).copy_(value)

    report = convert(source, tmp_path / "out.sdelta", base=base)
    assert (report.from_format, report.entries, report.extra_weights) == ("lt-sft", 27, 51)
    dk.merge(base, dk.load(tmp_path / "out.sdelta"), tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    for name, parameter in model.named_parameters():
        stored = name if name in merged.tensors else name.removeprefix("bert.")
        assert merged.read(stored).tobytes() == parameter.detach().numpy().tobytes(), name


def test_the_earliest_files_are_the_tensors_alone(tmp_path: Path) -> None:
    change = dense((4, 5), random_entries((4, 5), 6, 0))
    path = save_as(tmp_path / "a.bin", {"w": earliest_encoding(change)})
    tensor = read(path).tensors["w"]
    assert recognise(path)[0] == "lt-sft"
    assert tensor.shape == (4, 5)
    assert tensor.indices.tolist() == change.flatten().nonzero().flatten().tolist()
    assert tensor.values.tolist() == change[change != 0].tolist()


@given(st.data())
def test_columns_first_becomes_rows_first(data: st.DataObject) -> None:
    """Against coordinates in plain Python, up to four dimensions."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    flat = sorted(data.draw(st.sets(st.integers(0, prod(shape) - 1), min_size=1)))
    expected = []
    for number in flat:
        coordinates = []
        for size in shape:
            coordinates.append(number % size)
            number //= size
        row_major = 0
        for size, coordinate in zip(shape, coordinates, strict=True):
            row_major = row_major * size + coordinate
        expected.append(row_major)
    steps = np.diff(np.array(flat, np.int64), prepend=0)
    assert _row_major("w", shape, steps).tolist() == expected


@given(st.integers(0, 2**20 - 1), st.integers(0, 2**22 - 1))
def test_tensors_beyond_32_bits(row: int, column: int) -> None:
    """2^42 elements: a column-major index far beyond what int32 holds."""
    shape = (2**20, 2**22)
    found = _row_major("w", shape, np.array([column * shape[0] + row]))
    assert found.tolist() == [row * shape[1] + column]


def test_a_large_tensor_is_read_by_its_shape_alone(tmp_path: Path) -> None:
    rows, columns = 70_000, 40_000
    flat = [5, columns * rows - 1]
    steps = [np.int64(flat[0]), flat[1] - flat[0]]
    content = {"size": torch.Size((rows, columns)), "index_steps": steps, "values": torch.ones(2)}
    tensor = read(save_as(tmp_path / "a.bin", {"diffs": {"w": content}, "abs": {}})).tensors["w"]
    assert tensor.indices.tolist() == [5 * columns, rows * columns - 1]


@pytest.mark.parametrize("encode", [lt_sft_encoding, earliest_encoding])
def test_long_lists_are_recognised_by_what_stands_before_them(
    tmp_path: Path, encode: Callable[[torch.Tensor], dict[str, Any]]
) -> None:
    path = save_as(tmp_path / "a.bin", {"body": {"w": encode(torch.ones(300, 400))}, "head": {}})
    assert recognise(path)[0] == "lt-sft"
    assert read(path).nnz == 120_000


def test_without_a_base_names_and_dtype_are_the_files_own(tmp_path: Path) -> None:
    change = dense((4, 5), random_entries((4, 5), 6, 0, torch.bfloat16))
    path = save_as(
        tmp_path / "a.bin", {"diffs": encoded({"w": change, "n": change * 0}), "abs": {}}
    )
    report = convert(path, tmp_path / "out.sdelta")
    delta = dk.load(tmp_path / "out.sdelta")
    assert list(delta.tensors) == ["w"]  # one without entries is left out
    assert delta.tensors["w"].dtype == "bfloat16"
    assert any("do not name their base" in note for note in report.notes)


GOOD = {"size": torch.Size((2, 3)), "index_steps": [0, 2], "values": torch.ones(2)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"index_steps": [0, 6]}, "do not lead through 6 elements"),
        ({"index_steps": [-1, 2]}, "do not lead through 6 elements"),
        ({"index_steps": [2, -1]}, "do not lead through 6 elements"),
        ({"index_steps": [2, 0]}, "do not lead through 6 elements"),
        ({"index_steps": [2**62, 2**62, 2**62, 2**62], "values": torch.ones(4)}, "do not lead"),
        ({"index_steps": [2**70]}, "does not fit into 64 bits"),
        ({"index_steps": [0.5, 1.0]}, "expected a list of int numbers"),
        ({"index_steps": torch.ones(2)}, "expected a list of int numbers"),
        ({"index_steps": [0]}, r"found int64 \[1\] and float32 \[2\]"),
        ({"values": torch.ones(2, dtype=torch.int64)}, "expected floats"),
        ({"values": torch.tensor([1.0, torch.nan])}, "not finite"),
        ({"values": None}, "expected a tensor"),
        ({"size": torch.Size((2**40, 2**40))}, "is not possible"),
        ({"size": [2, "3"]}, "is not possible"),
        ({"size": 6}, "is not possible"),
        ({"size": None}, "is not possible"),
    ],
)
def test_what_does_not_add_up_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = save_as(tmp_path / "a.bin", {"diffs": {"w": GOOD | fields}, "abs": {}})
    with pytest.raises(DeltakitError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"size": [2, 3], "indices": [[0, 0], [1, 1]], "values": [1.0, 2.0]}, "stands twice"),
        ({"size": [2, 3], "indices": [[0, 2], [1, 1]], "values": [1.0, 2.0]}, "out of range"),
        ({"size": [2, 3], "indices": [[0, 1]], "values": [1.0, 2.0]}, "per dimension"),
        ({"size": [2, 3], "indices": [[0, 1], [1]], "values": [1.0, 2.0]}, "per dimension"),
        ({"size": [2, 3], "values": [1.0]}, "per dimension"),
        ({"size": [2, 3], "indices": [[0], [1]], "values": ["1"]}, "float numbers"),
        ([1, 2], "no difference of any known generation"),
    ],
)
def test_lists_that_do_not_add_up_are_refused(
    tmp_path: Path, difference: Any, message: str
) -> None:
    path = save_as(tmp_path / "a.bin", {"body": {"w": difference}})
    with pytest.raises(FormatError, match=message):
        read(path)


def test_lists_that_hold_themselves_take_no_memory(tmp_path: Path) -> None:
    """Forty nested pairs of one list would be 2^40 numbers."""
    nested: list[Any] = [0]
    for _ in range(40):
        nested = [nested, nested]
    difference = {"size": [2], "indices": [nested], "values": [1.0]}
    with pytest.raises(FormatError, match="expected a list of int numbers"):
        read(save_as(tmp_path / "a.bin", {"body": {"w": difference}}))


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = write_bert(tmp_path / "base")
    change = dense((4, 5), random_entries((4, 5), 6, 0))
    path = save_as(tmp_path / "a.bin", {"diffs": encoded({WEIGHT: change}), "abs": {}})
    with pytest.raises(DeltakitError, match=r"has shape \[4, 5\] in the file and \[16, 32\]"):
        read(path, base)
    path = save_as(tmp_path / "b.bin", {"diffs": encoded({"w": change}), "abs": {}})
    with pytest.raises(DeltakitError, match="has no tensor 'w'"):
        read(path, base)
