"""Laws of diff: diff then merge gives the tuned tensors back, byte for byte."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, read_safetensors, write_safetensors, write_sharded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltakit.diffing.diff import diff
from deltakit.dtypes import DTYPES, Array
from deltakit.errors import ConfigError, CoordinateError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import check_base
from deltakit.merging.merge import merge

# Words that arithmetic would lose: zeros of both signs, infinities, NaNs with payloads.
ODD = {8: [0x00, 0x80, 0x7F, 0xFF], 16: [0x0000, 0x8000, 0x7F81, 0xFFC1, 0x7C01]}
ODD |= {32: [0, 0x80000000, 0x7F800001, 0xFFC00123], 64: [0, 2**63, 0x7FF0000000000001]}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    """Two tensors of one dtype and shape, equal in most places, with odd words here and there."""
    kind = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.sampled_from([(), (1,), (0, 3), (7, 5), (3, 4, 5), (200,)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    words = [random_array(rng, shape, kind.numpy).reshape(-1).view(kind.words) for _ in range(2)]
    if kind.name != "bool":
        odd = np.array(ODD[8 * kind.itemsize], kind.words)
        for side in words:
            some = rng.random(side.size) < 0.2
            side[some] = rng.choice(odd, int(some.sum()))
    same = rng.random(words[0].size) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    words[1][same] = words[0][same]
    one, other = (side.view(kind.numpy).reshape(shape) for side in words)
    return one, other


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs=st.lists(pairs(), min_size=1, max_size=3), mode=st.sampled_from(["set", "add"]))
def test_diff_then_merge_is_the_tuned_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[Array, Array]], mode: str
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    sides = [{f"t{i}": pair[n] for i, pair in enumerate(pairs)} for n in (0, 1)]
    base = write_safetensors(folder / "base.safetensors", sides[0])
    tuned = write_safetensors(folder / "tuned.safetensors", sides[1])
    delta = diff(base, tuned, mode=mode)  # type: ignore[arg-type]
    merge(base, delta, folder / "merged.safetensors")
    assert (folder / "merged.safetensors").read_bytes() == tuned.read_bytes()
    differing = 0
    for one, other in pairs:
        words = [side.reshape(-1).view(f"u{side.itemsize}") for side in (one, other)]
        differing += int((words[0] != words[1]).sum())
    assert delta.nnz == differing
    assert check_base(delta, Checkpoint(base)) == []


def test_set_keeps_the_base_beside_unless_told_not_to(tmp_path: Path) -> None:
    rng = np.random.default_rng(30)
    one, other = (random_array(rng, (20,), np.float16) for _ in range(2))
    base = write_safetensors(tmp_path / "base.safetensors", {"w": one})
    tuned = write_safetensors(tmp_path / "tuned.safetensors", {"w": other})
    kept = diff(base, tuned).tensors["w"]
    assert kept.base_values is not None
    assert np.array_equal(kept.base_values.view(np.float16), one[kept.indices])
    assert diff(base, tuned, keep_base=False).tensors["w"].base_values is None


def test_add_is_proven_per_tensor(tmp_path: Path) -> None:
    """Where base + v cannot give the tuned bits, that tensor is written as set."""
    good = (np.array([1.0, 2.0], np.float32), np.array([1.5, 2.0], np.float32))
    absorbed = (np.array([1e30], np.float32), np.array([1.0], np.float32))
    to_nan = (np.array([1.0], np.float32), np.array([np.nan], np.float32))
    to_negative_zero = (np.array([0.0], np.float32), np.array([-0.0], np.float32))
    byte = (np.array([1], np.int8), np.array([2], np.int8))
    cases = {"a": good, "b": absorbed, "c": to_nan, "d": to_negative_zero, "e": byte}
    base = write_safetensors(tmp_path / "base.safetensors", {n: c[0] for n, c in cases.items()})
    tuned = write_safetensors(tmp_path / "tuned.safetensors", {n: c[1] for n, c in cases.items()})
    delta = diff(base, tuned, mode="add")
    modes = {name: tensor.mode for name, tensor in delta.tensors.items()}
    assert modes == {"a": "add", "b": "set", "c": "set", "d": "set", "e": "set"}
    assert delta.tensors["a"].values.tolist() == [0.5]
    assert delta.tensors["a"].indices.tolist() == [0]


def test_sides_may_be_sharded_differently(tmp_path: Path) -> None:
    """Tensors that only the tuned side has become extras, with their part of the configuration."""
    rng = np.random.default_rng(31)
    a, b = random_array(rng, (9, 9), ml_dtypes.bfloat16), random_array(rng, (5,), np.float32)
    head = random_array(rng, (3, 2), np.float32)
    moved = b.copy()
    moved[3] += 1
    config = {"hidden": 4, "transformers_version": "4"}
    base = write_sharded(tmp_path / "base", [{"a": a, "b": b}], config)
    tuned_config = {"hidden": 4, "num_labels": 3, "transformers_version": "5"}
    tuned = write_sharded(tmp_path / "tuned", [{"b": moved}, {"head": head, "a": a}], tuned_config)
    delta = diff(base, tuned)
    assert list(delta.tensors) == ["b"]
    assert delta.config == {"num_labels": 3}
    merge(base, delta, tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    for name, array in {"a": a, "b": moved, "head": head}.items():
        assert merged.words(name).tobytes() == array.tobytes()
    assert merged.config() == {**config, "num_labels": 3}


def test_several_chunks_are_one_tensor(tmp_path: Path) -> None:
    one = np.zeros(2**21 + 5, np.uint8)
    other = one.copy()
    changed = [0, 2**20 - 1, 2**20, 2**21 + 4]
    other[changed] = 1
    base = write_safetensors(tmp_path / "base.safetensors", {"w": one})
    tuned = write_safetensors(tmp_path / "tuned.safetensors", {"w": other})
    seen: list[tuple[int, int]] = []
    delta = diff(base, tuned, progress=lambda *at: seen.append(at))
    assert delta.tensors["w"].indices.tolist() == changed
    assert seen == [(one.size, one.size)]


def test_what_cannot_be_a_delta_is_refused(tmp_path: Path) -> None:
    zeros = np.zeros((2, 3), np.float32)
    base = write_safetensors(tmp_path / "base.safetensors", {"w": zeros, "x": zeros})

    def tuned(**tensors: Array) -> Path:
        return write_safetensors(tmp_path / "tuned.safetensors", tensors)

    with pytest.raises(
        CoordinateError, match=r"lacks 1 tensors of .*base.safetensors: x; missing="
    ):
        diff(base, tuned(w=zeros))
    assert diff(base, tuned(w=zeros), missing="ignore").nnz == 0
    with pytest.raises(CoordinateError, match=r"'x' has shape \[2, 3\] in .* and \[3, 2\] in"):
        diff(base, tuned(w=zeros, x=zeros.T.copy()))
    with pytest.raises(DeltaError, match=r"'x' is float32 in .* and float16 in .*; convert one"):
        diff(base, tuned(w=zeros, x=zeros.astype(np.float16)))
    with pytest.raises(ConfigError, match="mode is add or set"):
        diff(base, base, mode="xor")  # type: ignore[arg-type]


def test_tensors_of_unreadable_dtypes_may_not_differ(tmp_path: Path) -> None:
    paths = []
    for number in (0, 1):
        text = b'{"q":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(len(text).to_bytes(8, "little") + text + bytes([7, number]))
    assert diff(paths[0], paths[0]).nnz == 0
    with pytest.raises(DeltaError, match="tensor 'q' differs, and its dtype F4 is not supported"):
        diff(*paths)
    assert read_safetensors(paths[0])["q"][2] == b"\x07\x00"
