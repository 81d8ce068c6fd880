"""What inspecting a file tells is what the delta in it holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.changes import Changes
from deltakit.delta import BaseIdentity, Fingerprint, SparseDelta, TensorDelta
from deltakit.entropy import support_bits
from deltakit.errors import ChecksumError, FormatError, MissingFileError
from deltakit.formats.sdelta import save
from deltakit.groups import block_of, kind_of
from deltakit.inspection import inspect


def make(name: str, count: int, seed: int = 0) -> TensorDelta:
    """An add tensor [50, 40] with `count` entries at random places."""
    random = np.random.default_rng(seed)
    return TensorDelta(
        name=name,
        shape=(50, 40),
        dtype="float32",
        mode="add",
        indices=np.sort(random.choice(2000, count, replace=False)),
        values=random.standard_normal(count).astype(np.float32),
        order=random.integers(3, 90, count),
    )


@pytest.fixture
def delta() -> SparseDelta:
    names = ["model.layers.10.up.weight", "model.layers.2.up.weight", "model.layers.2.down.weight"]
    tensors = {n: make(n, 20 + 30 * i, i) for i, n in enumerate([*names, "model.embed.weight"])}
    prints = {n: Fingerprint(sample="0" * 16) for n in tensors}
    return SparseDelta(
        tensors=tensors,
        extras={"head": np.ones((3, 4), np.float32)},
        base=BaseIdentity(model_id="org/model", total_weights=100_000, tensors=prints),
        config={"num_labels": 3},
        provenance={"method": "id3"},
    )


@pytest.fixture
def path(tmp_path: Path, delta: SparseDelta) -> Path:
    target = tmp_path / "delta.sdelta"
    save(delta, target)
    return target


def test_counts_are_those_of_the_delta(path: Path, delta: SparseDelta) -> None:
    found = inspect(path)
    assert found.entries == delta.nnz == 260
    assert found.extra_weights == 12
    assert found.density_of_base == 260 / 100_000
    assert found.density_of_touched == 260 / 8000
    assert [t.name for t in found.tensors] == list(delta.tensors)
    assert found.header.config == {"num_labels": 3}
    assert found.header.base == delta.base


def test_parts_add_up_to_the_file(path: Path) -> None:
    found = inspect(path)
    assert found.file_bytes == path.stat().st_size == sum(found.parts.values())
    assert found.parts["values"] == 4 * 260
    assert found.parts["extras"] == 48
    assert found.raw_coo_bytes == 12 * 260


def test_indices_are_held_against_the_entropy_of_each_support(path: Path) -> None:
    found = inspect(path)
    bound = sum(support_bits(2000, t.nnz) for t in found.tensors) / 8
    assert found.entropy_bytes == pytest.approx(bound)
    assert found.parts["indices"] > bound * 0.9


def test_groups_cover_every_tensor_once_in_natural_order(path: Path, delta: SparseDelta) -> None:
    found = inspect(path)
    assert [g.name for g in found.blocks] == ["model.embed", "model.layers.2", "model.layers.10"]
    assert [g.name for g in found.kinds] == [
        "model.embed.weight",
        "model.layers.*.down.weight",
        "model.layers.*.up.weight",
    ]
    for groups in (found.blocks, found.kinds):
        assert sum(g.entries for g in groups) == delta.nnz
        assert sorted(t.name for g in groups for t in g.tensors) == sorted(delta.tensors)


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("encoder.layer.3.output.weight", "encoder.layer.3", "encoder.layer.*.output.weight"),
        ("h.0.mlp.experts.7.w1", "h.0", "h.*.mlp.experts.*.w1"),
        ("bert.pooler.dense.bias", "bert.pooler.dense", "bert.pooler.dense.bias"),
        ("weight", "weight", "weight"),
        ("9" * 5000, "9" * 5000, "*"),
    ],
)
def test_names_tell_block_and_kind(name: str, block: str, kind: str) -> None:
    assert (block_of(name), kind_of(name)) == (block, kind)


def test_changes_are_those_of_the_values(path: Path, delta: SparseDelta) -> None:
    found = inspect(path)
    sizes = np.abs(np.concatenate([t.values for t in delta.tensors.values()]))
    total = found.changes_in(found.tensors)
    assert (total.known, total.zeros, total.unknown) == (260, 0, 0)
    assert (total.least, total.most) == (sizes.min(), sizes.max())
    assert total.mean == pytest.approx(sizes.mean(dtype=np.float64))
    steps = np.concatenate([t.order for t in delta.tensors.values() if t.order is not None])
    assert (total.first_step, total.last_step) == (steps.min(), steps.max())


def test_the_header_is_read_without_the_body(path: Path) -> None:
    """Damage in the body goes unseen until the changes are asked for."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = inspect(path)
    assert found.entries == 260
    with pytest.raises(ChecksumError, match="bytes differ from their digest"):
        _ = found.changes


def test_as_dict_is_json_and_agrees(path: Path) -> None:
    found = inspect(path)
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["entries"] == sum(t["entries"] for t in told["tensors"]) == 260
    assert told["bytes"]["file"] == path.stat().st_size
    assert told["base"]["model_id"] == "org/model"
    assert told["tensors"][0]["changes"]["known"] == told["tensors"][0]["entries"]


def test_an_empty_delta_can_be_inspected(tmp_path: Path) -> None:
    save(SparseDelta(tensors={}), tmp_path / "empty.sdelta")
    found = inspect(tmp_path / "empty.sdelta")
    assert (found.entries, found.density_of_touched, found.density_of_base) == (0, 0.0, None)
    assert found.as_dict()["changes"]["mean"] is None


def test_what_is_no_delta_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is no delta at all")
    with pytest.raises(FormatError, match=r"text: not an \.sdelta file"):
        inspect(tmp_path / "text")
    with pytest.raises(MissingFileError, match="No such file"):
        inspect(tmp_path / "nothing")


def test_changes_of_a_set_tensor_are_against_its_base_values() -> None:
    values = np.array([2.0, 5.0, np.nan, 1.0], np.float32)
    tensor = TensorDelta(
        name="w",
        shape=(4,),
        dtype="float32",
        mode="set",
        indices=np.arange(4),
        values=values,
        base_values=np.array([2.0, 1.0, 0.0, np.inf], np.float32),
    )
    found = Changes.of(tensor)
    assert (found.known, found.non_finite, found.zeros, found.most) == (2, 2, 1, 4.0)
    bare = TensorDelta(
        name="w", shape=(4,), dtype="float32", mode="set", indices=np.arange(4), values=values
    )
    assert Changes.of(bare) == Changes(unknown=4)
    assert Changes.of(bare).as_dict()["most"] is None


@given(st.lists(st.lists(st.floats(-10, 10, width=32)), max_size=4))
def test_combining_tensors_equals_one_tensor(groups: list[list[float]]) -> None:
    def tensor(values: list[float]) -> TensorDelta:
        return TensorDelta(
            name="w",
            shape=(len(values),),
            dtype="float32",
            mode="add",
            indices=np.arange(len(values)),
            values=np.array(values, np.float32),
            order=np.arange(len(values)),
        )

    parts = Changes.combined(Changes.of(tensor(values)) for values in groups)
    whole = Changes.of(tensor([value for values in groups for value in values]))
    assert (parts.known, parts.zeros) == (whole.known, whole.zeros)
    assert (parts.least, parts.most) == (whole.least, whole.most)
    assert parts.mean == pytest.approx(whole.mean)
