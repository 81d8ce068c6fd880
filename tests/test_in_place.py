"""Laws of merging in place: the bits of a merge into a new file, and no other byte written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors, write_sharded
from merge_reference import adding, only

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array, dtype_of
from deltakit.errors import BaseMismatchError, ConfigError, DeltaError, OutputError
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.in_place.merge import merge_in_place
from deltakit.in_place.revert import revert
from deltakit.merging.merge import merge

FLOATS: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
OTHERS: dict[str, Any] = {
    "int64": np.int64,
    "int8": np.int8,
    "bool": np.bool_,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def setting(
    name: str, base: Array, rng: np.random.Generator, count: int, keep_base: bool = False
) -> TensorDelta:
    """A set delta of `count` random entries with random bits, NaN payloads among them."""
    kind = dtype_of(base)
    indices = np.sort(rng.choice(base.size, count, replace=False))
    bits = rng.integers(0, 256, count * kind.itemsize).astype(np.uint8).view(kind.words)
    return TensorDelta(
        name=name,
        shape=base.shape,
        dtype=kind.name,
        mode="set",
        indices=indices,
        values=bits % 2 if kind.name == "bool" else bits,
        base_values=base.reshape(-1)[indices] if keep_base else None,
    )


def identified(delta: SparseDelta, base: Path) -> SparseDelta:
    indices = {name: tensor.indices for name, tensor in delta.tensors.items()}
    return replace(delta, base=identify(Checkpoint(base), indices))


def files_of(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if ".undo" not in name}


def check_equal_to_a_new_file(
    path: Path, deltas: Sequence[SparseDelta], weights: Sequence[float]
) -> None:
    """In place the file becomes what a merge into a new file gives; reverted, what it was."""
    before, out = path.read_bytes(), path.with_name("out.safetensors")
    report = merge(path, deltas, out, weights=weights)
    told = merge_in_place(path, deltas, weights=weights)
    assert path.read_bytes() == out.read_bytes() != before
    assert (told.entries, told.tensors) == (report.entries, report.tensors)
    assert path.with_name(f"{path.name}.undo").is_dir()
    assert revert(path).entries == told.entries
    assert path.read_bytes() == before
    assert not path.with_name(f"{path.name}.undo").exists()


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("weights", [[1.0], [0.5, -0.3, 1.0]])
@pytest.mark.parametrize("pad", [True, False])
def test_floats_become_what_a_new_file_has(
    tmp_path: Path, kind: str, weights: list[float], pad: bool
) -> None:
    """Alone, with neighbours on a page, and all of a tensor; aligned or not."""
    rng = np.random.default_rng(50)
    tensors = {
        "odd": np.zeros(3, np.int8),
        "sparse": random_array(rng, (300, 900), FLOATS[kind]),
        "dense": random_array(rng, (1500,), FLOATS[kind]),
        "scalar": random_array(rng, (), FLOATS[kind]),
    }
    path = write_safetensors(tmp_path / "m.safetensors", tensors, {"format": "pt"}, pad)
    counts = {"sparse": 200, "dense": 1500, "scalar": 1}
    deltas = [only(*(adding(n, tensors[n], rng, c) for n, c in counts.items())) for _ in weights]
    check_equal_to_a_new_file(path, deltas, weights)


@pytest.mark.parametrize("kind", [*FLOATS, *OTHERS])
def test_bits_are_set_for_every_dtype(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(51)
    base = random_array(rng, (70, 90), (FLOATS | OTHERS)[kind])
    path = write_safetensors(tmp_path / "m.safetensors", {"w": base})
    check_equal_to_a_new_file(path, [only(setting("w", base, rng, 400))], [1.0])


def test_only_entries_are_written(tmp_path: Path) -> None:
    """Merging and reverting, the system is given pages with entries and no others."""
    rng = np.random.default_rng(52)
    base = np.zeros((64, 4096), np.float32)
    path = write_safetensors(tmp_path / "m.safetensors", {"w": base})
    os.truncate(path, path.stat().st_size - base.nbytes)  # the body becomes a hole
    os.truncate(path, path.stat().st_size + base.nbytes)
    os.sync()
    before = path.stat().st_blocks
    if before * 512 > base.nbytes:
        pytest.skip("this file system has no holes")
    delta = adding("w", base, rng, 8)
    merge_in_place(path, only(delta))
    os.sync()
    assert 0 < path.stat().st_blocks - before <= 2 * 8 * 4096 / 512


@pytest.fixture
def shards() -> list[dict[str, Array]]:
    rng = np.random.default_rng(53)
    return [
        {"a": random_array(rng, (40, 30), np.float32), "ids": np.arange(6, dtype=np.int64)},
        {"b": random_array(rng, (2000,), ml_dtypes.bfloat16)},
        {"head": random_array(rng, (2, 9), np.float32)},
    ]


@pytest.fixture
def base(tmp_path: Path, shards: list[dict[str, Array]]) -> Path:
    folder = write_sharded(tmp_path / "base", shards, {"num_labels": 2})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_sharded_folders_too(tmp_path: Path, base: Path, shards: list[dict[str, Array]]) -> None:
    """Also through the index itself; an extra that the base has is written whole."""
    rng = np.random.default_rng(54)
    before = files_of(base)
    delta = only(
        adding("a", shards[0]["a"], rng, 30),
        adding("b", shards[1]["b"], rng, 300),
        extras={"head": random_array(rng, (2, 9), np.float32)},
        config={"num_labels": 2},
    )
    merge(base, delta, tmp_path / "out")
    report = merge_in_place(base, delta)
    assert files_of(base) == files_of(tmp_path / "out") != before
    assert (report.entries, report.extras) == (330, ("head",))
    assert len(report.files) == 3
    assert Path(report.journal) == base / "model.safetensors.index.json.undo"
    assert sum(p.stat().st_size for p in Path(report.journal).iterdir()) == report.journal_bytes
    assert revert(base / "model.safetensors.index.json").files == report.files
    assert files_of(base) == before


@pytest.mark.parametrize("kind", FLOATS)
def test_one_after_the_other_equals_all_at_once(tmp_path: Path, kind: str) -> None:
    """Sums, bits that are set, weights, entries that meet and that do not; the base's identity is
    checked against the original bits each time."""
    rng = np.random.default_rng(55)
    base = random_array(rng, (50, 60), FLOATS[kind])
    path = write_safetensors(tmp_path / "m.safetensors", {"w": base, "v": base[0]})
    before = path.read_bytes()
    fine = random_array(rng, base.shape, FLOATS[kind])
    moved = replace(
        setting("w", base, rng, 700, keep_base=True),
        values=fine.reshape(-1)[:700],
    )
    given = [
        only(adding("w", base, rng, 900), adding("v", base[0], rng, 5)),
        only(moved),
        only(adding("w", base, rng, 900)),
        only(replace(setting("v", base[0], rng, 3), values=fine.reshape(-1)[:3])),
    ]
    deltas = [identified(delta, path) for delta in given]
    weights = [1.0, 1.0, 0.3, -0.7]
    for count in range(1, 5):
        out = tmp_path / f"{count}.safetensors"
        report = merge_in_place(path, deltas[count - 1], weights=[weights[count - 1]])
        assert len(report.merged_before) == count - 1
        original = write_safetensors(tmp_path / "o.safetensors", {"w": base, "v": base[0]})
        merge(original, deltas[:count], out, weights=weights[:count])
        assert path.read_bytes() == out.read_bytes()
    assert revert(path).deltas == ("delta 0",) * 4
    assert path.read_bytes() == before


def test_merged_twice_it_counts_twice_and_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(56)
    base = random_array(rng, (50,), np.float32)
    path = write_safetensors(tmp_path / "m.safetensors", {"w": base})
    delta = only(adding("w", base, rng, 9))
    merge(path, [delta, delta], tmp_path / "out.safetensors")
    merge_in_place(path, delta)
    notes = merge_in_place(path, delta).notes
    assert "delta 0 had been merged before; its changes count once more" in notes
    assert path.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_heads_are_chosen_across_merges(
    tmp_path: Path, base: Path, shards: list[dict[str, Array]]
) -> None:
    before = files_of(base)
    heads = [np.full((2, 9), n, np.float32) for n in (1, 2)]
    deltas = [only(extras={"head": head}) for head in heads]
    merge(base, deltas, tmp_path / "out", head=1)
    merge_in_place(base, deltas[0])
    with pytest.raises(DeltaError, match=r"extra 'head' differs between delta 0 and delta 0; choo"):
        merge_in_place(base, deltas[1])
    merge_in_place(base, deltas[1], head=0)
    assert files_of(base) == files_of(tmp_path / "out")
    rng = np.random.default_rng(57)
    merge_in_place(base, only(adding("a", shards[0]["a"], rng, 3)))  # the choice stays settled
    revert(base)
    assert files_of(base) == before


def test_what_needs_a_new_file_is_refused(base: Path, shards: list[dict[str, Array]]) -> None:
    before = files_of(base)
    for delta, text in (
        (only(extras={"new": np.zeros(2, np.float32)}), "extra 'new' is not in .* adds no tensors"),
        (only(extras={"head": np.zeros((2, 9))}), "extra 'head' is float64, in .* it is float32"),
        (only(config={"num_labels": 3}), r"change config.json \(num_labels\), and merging in pl"),
    ):
        with pytest.raises(ConfigError, match=f"{text}.*; merge into a new file instead"):
            merge_in_place(base, delta)
    assert files_of(base) == before
    assert not list(base.glob("*.undo"))


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(58)
    base = random_array(rng, (500,), np.float32)
    other = write_safetensors(tmp_path / "other.safetensors", {"w": base + 1})
    path = write_safetensors(tmp_path / "m.safetensors", {"w": base})
    before = path.read_bytes()
    stranger = identified(only(adding("w", base, rng, 9)), other)
    with pytest.raises(BaseMismatchError, match=r"m.safetensors is not the base of the delta"):
        merge_in_place(path, stranger)
    assert path.read_bytes() == before
    assert not (tmp_path / "m.safetensors.undo").exists()
    assert merge_in_place(path, stranger, allow_base_mismatch=True).base_mismatch_allowed
    fitting = identified(only(adding("w", base, rng, 9)), other)
    with pytest.raises(BaseMismatchError):
        merge_in_place(path, fitting)
    merge_in_place(path, only(adding("w", base, rng, 9)))  # what was allowed before stays so
    revert(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_links_are_refused_unless_forced(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(59)
    base = random_array(rng, (500,), np.float32)
    blob = write_safetensors(tmp_path / "blob", {"w": base})
    before = blob.read_bytes()
    (tmp_path / "snapshot").mkdir()
    path = tmp_path / "snapshot" / "model.safetensors"
    path.symlink_to(blob) if kind == "symbolic" else path.hardlink_to(blob)
    delta = only(adding("w", base, rng, 9))
    text = "a symbolic link to .*blob" if kind == "symbolic" else "one of 2 hard links"
    with pytest.raises(OutputError, match=f"model.safetensors is {text}.* merge into a new file"):
        merge_in_place(path.parent, delta)
    assert blob.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    merge_in_place(path.parent, delta, force=True)
    assert blob.read_bytes() != before
    revert(path)  # what was forced is taken back without force
    assert blob.read_bytes() == before
    if kind == "symbolic":
        assert path.is_symlink()


def test_a_dry_run_writes_nothing(base: Path, shards: list[dict[str, Array]]) -> None:
    rng = np.random.default_rng(60)
    before = files_of(base)
    delta = only(adding("a", shards[0]["a"], rng, 30))
    told = merge_in_place(base, delta, dry_run=True)
    assert files_of(base) == before
    assert not Path(told.journal).exists()
    done = merge_in_place(base, delta)
    assert told == replace(done, dry_run=True)


def test_deltas_are_taken_from_files(tmp_path: Path) -> None:
    """And are not needed any more afterwards."""
    rng = np.random.default_rng(61)
    base = random_array(rng, (500,), ml_dtypes.bfloat16)
    path = write_safetensors(tmp_path / "m.safetensors", {"w": base})
    files = [tmp_path / f"{n}.sdelta" for n in range(2)]
    for file in files:
        sdelta.save(only(adding("w", base, rng, 90)), file)
    merge(path, files, tmp_path / "out.safetensors")
    merge_in_place(path, files[0])
    files[0].unlink()
    report = merge_in_place(path, files[1])
    assert report.merged_before == (str(files[0]),)
    assert path.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_a_tensor_of_more_than_2_to_the_32_elements(tmp_path: Path) -> None:
    """20 GB of holes: entries at both ends and beyond 2^32, none of which moves another."""
    shape = (5, 2**31 - 7)
    numel = shape[0] * shape[1]
    text = f'{{"w":{{"dtype":"BF16","shape":{list(shape)},"data_offsets":[0,{2 * numel}]}}}}'
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        file.flush()
        try:
            file.truncate(8 + len(text) + 2 * numel)
        except OSError:
            pytest.skip("files of 20 GB are too large here")
    if path.stat().st_blocks > 2**20:
        pytest.skip("this file system has no holes")
    rng = np.random.default_rng(62)
    indices = np.unique([0, 1, 2**32 - 1, 2**32, numel - 1, *rng.integers(0, numel, 500)])
    values = rng.standard_normal(len(indices))
    delta = TensorDelta(
        name="w", shape=shape, dtype="bfloat16", mode="add", indices=indices, values=values
    )
    merge_in_place(path, identified(only(delta), path))
    checkpoint = Checkpoint(path)
    expected = values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert (checkpoint.gather("w", indices) == expected).all()
    neighbours = np.setdiff1d(np.concatenate([indices - 1, indices + 1]), [*indices, -1, numel])
    assert not checkpoint.gather("w", neighbours).any()
    assert path.stat().st_blocks * 512 < 600 * 2 * 4096
    revert(path)
    assert not Checkpoint(path).gather("w", indices).any()
