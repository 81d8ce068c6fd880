"""Laws of base identity: the right base passes, every other one is named, in O(entries)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors

from deltakit.delta import BaseIdentity, SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import BaseMismatchError, CoordinateError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import check_base, fingerprint, identify, sample_positions, without_support

SHAPE = (64, 50)
ENTRIES = np.array([1, 77, 3001], np.int64)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    rng = np.random.default_rng(3)
    tensors = {
        "w": random_array(rng, SHAPE, np.float32),
        "v": random_array(rng, (40,), ml_dtypes.bfloat16),
    }
    return Checkpoint(write_safetensors(tmp_path / "base.safetensors", tensors), model_id="o/m")


def changed(base: Checkpoint, name: str, indices: Array, path: Path) -> Checkpoint:
    """A copy of `base` with the lowest bit of some entries flipped."""
    arrays = {}
    for each, info in base.tensors.items():
        arrays[each] = base.read(each).view(info.kind.numpy).reshape(info.shape)
    arrays[name].reshape(-1).view(base.tensors[name].kind.words)[indices] ^= 1
    return Checkpoint(write_safetensors(path, arrays))


def delta_of(base: Checkpoint, trained: str = "float32", dtype: str = "float32") -> SparseDelta:
    tensor = TensorDelta(
        name="w",
        shape=SHAPE,
        dtype=dtype,
        mode="add",
        indices=ENTRIES,
        values=np.ones(3, np.float32),
        trained_dtype=trained,
    )
    identity = identify(base, {"w": ENTRIES}, {"w": trained})
    return SparseDelta(tensors={"w": tensor}, base=identity)


def test_sample_positions_never_change() -> None:
    """They are part of every file ever written: pinned."""
    assert sample_positions("w", (3, 4)).tolist() == list(range(12))
    assert sample_positions("w", ()).tolist() == [0]
    assert sample_positions("w", (0, 7)).tolist() == []
    positions = sample_positions("a.weight", (4096, 4096))
    assert positions[:5].tolist() == [23408, 29283, 36682, 78589, 92269]
    assert hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()[:16] == "7ad9e5a78daa523b"


def test_sample_positions_depend_on_name_and_shape_alone() -> None:
    one = sample_positions("a", (5000, 3))
    assert (np.diff(one) > 0).all()
    assert one.min() >= 0
    assert one.max() < 15000
    assert len(one) > 900
    assert np.array_equal(one, sample_positions("a", (5000, 3)))
    assert not np.array_equal(one, sample_positions("b", (5000, 3)))
    assert not np.array_equal(one, sample_positions("a", (3, 5000)))


def test_fingerprint_is_a_short_sha256_of_little_endian_values() -> None:
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    expected = hashlib.sha256(bytes([0xC0, 0x3F, 0x00, 0xC0])).hexdigest()[:16]
    assert fingerprint(values, None).sample == expected
    assert fingerprint(values, None).support is None
    assert fingerprint(values[:0], values).support == expected


def test_identity_records_where_the_base_comes_from(base: Checkpoint) -> None:
    identity = identify(base, {"w": ENTRIES, "v": None})
    assert (identity.model_id, identity.total_weights) == ("o/m", 3240)
    assert list(identity.tensors) == ["v", "w"]
    assert identity.tensors["v"].support is None
    assert identity.tensors["w"].support is not None
    with pytest.raises(CoordinateError, match="no tensor 'x'"):
        identify(base, {"x": None})


def test_the_right_base_passes_without_notes(base: Checkpoint) -> None:
    assert check_base(delta_of(base), base) == []


def test_a_change_at_the_entries_is_seen_only_by_the_support_digest(
    base: Checkpoint, tmp_path: Path
) -> None:
    delta = delta_of(base)
    unsampled = np.setdiff1d(ENTRIES, sample_positions("w", SHAPE))[:1]
    other = changed(base, "w", unsampled, tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatchError, match=r"tensor 'w' has other values \(support digest"):
        check_base(delta, other)
    assert check_base(replace(delta, base=without_support(delta.base)), other) == []
    notes = check_base(delta, other, allow=True)
    assert notes == [
        "tensor 'w': the base has other values than the delta's; used all the same, as asked"
    ]


def test_a_change_at_a_sampled_position_is_seen(base: Checkpoint, tmp_path: Path) -> None:
    at = sample_positions("w", SHAPE)[500:501]
    other = changed(base, "w", at, tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatchError, match=r"'w' has other values \(sample digest .*expected"):
        check_base(delta_of(base), other)


def test_a_copy_in_the_trained_dtype_is_the_same_base(base: Checkpoint, tmp_path: Path) -> None:
    """Digests are of the values cast to the dtype of training; applying says what happens."""
    delta = delta_of(base, trained="bfloat16")
    array = base.read("w").view(np.float32).reshape(SHAPE).astype(ml_dtypes.bfloat16)
    copy = Checkpoint(write_safetensors(tmp_path / "copy.safetensors", {"w": array}))
    assert check_base(delta, base) == []
    (note,) = check_base(delta, copy)
    assert "made for float32, applied to bfloat16, the dtype of training" in note


def test_another_dtype_is_refused_unless_allowed(base: Checkpoint, tmp_path: Path) -> None:
    array = base.read("w").view(np.float32).reshape(SHAPE).astype(np.float16)
    other = Checkpoint(write_safetensors(tmp_path / "half.safetensors", {"w": array}))
    delta = replace(delta_of(base), base=None)
    with pytest.raises(BaseMismatchError, match="tensor 'w' is float16, expected float32; --allow"):
        check_base(delta, other)
    assert "applied to float16 all the same" in check_base(delta, other, allow=True)[1]
    bits = replace(delta.tensors["w"], mode="set", values=np.ones(3, np.float32))
    with pytest.raises(BaseMismatchError, match=r"float16, expected float32$"):
        check_base(SparseDelta(tensors={"w": bits}), other, allow=True)


def test_names_and_shapes_must_exist_even_when_allowed(base: Checkpoint) -> None:
    tensor = delta_of(base).tensors["w"]
    moved = replace(tensor, name="w.weight")
    with pytest.raises(CoordinateError, match=r"changes tensor 'w.weight', which .* lacks"):
        check_base(SparseDelta(tensors={"w.weight": moved}), base, allow=True)
    turned = replace(tensor, shape=(50, 64))
    with pytest.raises(CoordinateError, match=r"\[50, 64\] in the delta and \[64, 50\] in"):
        check_base(SparseDelta(tensors={"w": turned}), base, allow=True)
    extra = SparseDelta(tensors={}, extras={"v": np.zeros((2, 20), np.float32)})
    with pytest.raises(CoordinateError, match=r"extra 'v' has shape \[2, 20\], in .* \[40\]"):
        check_base(extra, base, allow=True)


def test_what_is_not_recorded_is_said(base: Checkpoint) -> None:
    delta = delta_of(base)
    (note,) = check_base(replace(delta, base=None), base)
    assert note == "the delta records no base, so nothing shows that this is the right one"
    (note,) = check_base(replace(delta, base=BaseIdentity()), base)
    assert note == "tensor 'w': no base values are recorded, so they are not checked"
    assert without_support(None) is None
