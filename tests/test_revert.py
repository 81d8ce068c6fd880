"""Laws of taking merges in place back, and of the journal that makes it possible."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors, write_sharded
from click.testing import CliRunner
from merge_reference import adding, only

from deltakit.cli.main import main
from deltakit.delta import SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import (
    ChecksumError,
    FormatError,
    JournalError,
    MissingFileError,
    OutputError,
    UnsupportedVersionError,
)
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.in_place.merge import merge_in_place
from deltakit.in_place.revert import revert
from deltakit.merging.merge import merge


@pytest.fixture
def base() -> Array:
    return random_array(np.random.default_rng(70), (40, 50), np.float32)


@pytest.fixture
def model(tmp_path: Path, base: Array) -> Path:
    return write_safetensors(tmp_path / "m.safetensors", {"v": base[:3], "w": base})


@pytest.fixture
def deltas(base: Array) -> list[SparseDelta]:
    rng = np.random.default_rng(71)
    return [only(adding("w", base, rng, 60)) for _ in range(2)]


def overwrite(path: Path, name: str, index: int, value: bytes) -> None:
    info = Checkpoint(path).info(name)
    with path.open("r+b") as file:
        file.seek(info.offset + index * len(value))
        file.write(value)


def test_the_undo_record_is_a_delta_that_takes_the_merge_back(
    tmp_path: Path, model: Path, deltas: list[SparseDelta]
) -> None:
    before = model.read_bytes()
    merge_in_place(model, deltas[0])
    undo = tmp_path / "m.safetensors.undo" / "undo.sdelta"
    record = sdelta.load(undo).tensors["w"]
    assert record.mode == "set"
    assert (record.indices == deltas[0].tensors["w"].indices).all()
    merge(model, undo, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == before


def test_nothing_to_take_back_is_said(tmp_path: Path, model: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(MissingFileError, match=r"m.safetensors has no merge in place to be taken"):
        revert(model)
    with pytest.raises(MissingFileError, match="absent does not exist"):
        revert(tmp_path / "absent")
    assert model.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_weights_that_something_else_changed_are_left_alone(
    model: Path, deltas: list[SparseDelta]
) -> None:
    """Neither reverted nor merged into, unless forced; other entries may change freely."""
    before = model.read_bytes()
    merge_in_place(model, deltas[0])
    merged = model.read_bytes()
    mine = deltas[0].tensors["w"].indices
    free = int(np.setdiff1d(np.arange(2000), mine)[0])
    overwrite(model, "w", int(mine[7]), b"\x01\x02\x03\x04")
    overwrite(model, "w", free, b"\0\0\0\0")
    foreign = model.read_bytes()
    text = (
        rf"m.safetensors was changed by something else since .*: tensor 'w' holds 0x04030201 at "
        rf"index {mine[7]}, expected 0x[0-9a-f]{{8}}; deltakit revert --force"
    )
    with pytest.raises(JournalError, match=text):
        revert(model)
    with pytest.raises(JournalError, match=text):
        merge_in_place(model, deltas[1])
    assert model.read_bytes() == foreign
    revert(model, force=True)
    overwrite(model, "w", free, before[len(before) - 8000 + 4 * free :][:4])
    assert model.read_bytes() == before != merged


def test_a_fresh_copy_of_the_model_only_loses_its_journal(
    tmp_path: Path, model: Path, deltas: list[SparseDelta]
) -> None:
    before = model.read_bytes()
    merge_in_place(model, deltas[0])
    model.write_bytes(before)
    assert "have their original bits already" in revert(model).notes[0]
    assert model.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_record_from_elsewhere(tmp_path: Path, model: Path, deltas: list[SparseDelta]) -> None:
    before = model.read_bytes()
    merge_in_place(model, deltas[0])
    saved, journal = tmp_path / "saved.sdelta", tmp_path / "m.safetensors.undo"
    shutil.copy(journal / "undo.sdelta", saved)
    merge_in_place(model, deltas[1])
    with pytest.raises(JournalError, match=r"saved.sdelta is not what .*undo.sdelta tells of .*m."):
        revert(model, undo=saved)
    shutil.copy(journal / "undo.sdelta", saved)
    shutil.rmtree(journal)
    report = revert(model, undo=saved)
    assert model.read_bytes() == before
    assert len(report.deltas) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "saved.sdelta"]
    other = write_safetensors(tmp_path / "o.safetensors", {"w": np.zeros((2, 2), np.float32)})
    with pytest.raises(JournalError, match=r"o.safetensors is not the model .*found float32 \[2, "):
        revert(other, undo=saved)


def test_records_are_read_under_suspicion(
    tmp_path: Path, model: Path, deltas: list[SparseDelta]
) -> None:
    """Another delta, another version, damage: the weights stay as they are."""
    merge_in_place(model, deltas[0])
    merged, undo = model.read_bytes(), tmp_path / "m.safetensors.undo" / "undo.sdelta"
    plain = tmp_path / "plain.sdelta"
    sdelta.save(deltas[0], plain)
    with pytest.raises(FormatError, match=r"plain.sdelta is not the undo record of an in-place"):
        revert(model, undo=plain)
    record = sdelta.load(undo)
    for told, error, text in (
        ({"version": 2}, UnsupportedVersionError, "version 2 of the undo record is not known"),
        ({"version": 1, "merged": [{}]}, FormatError, "the undo record lacks"),
    ):
        odd = SparseDelta(tensors=record.tensors, provenance={"in_place": told})
        sdelta.save(odd, plain)
        with pytest.raises(error, match=text):
            revert(model, undo=plain)
    sdelta.save(SparseDelta(tensors=deltas[0].tensors, provenance=record.provenance), plain)
    with pytest.raises(FormatError, match="tensor 'w' does not hold both original and merged"):
        revert(model, undo=plain)
    data = bytearray(undo.read_bytes())
    data[-1] ^= 1
    undo.write_bytes(data)
    for command in (lambda: revert(model), lambda: merge_in_place(model, deltas[1])):
        with pytest.raises(ChecksumError, match=r"undo.sdelta: .*differ from their digest"):
            command()
    assert model.read_bytes() == merged


def test_deltas_of_the_journal_are_needed_for_further_merges_only(
    tmp_path: Path, model: Path, deltas: list[SparseDelta]
) -> None:
    before = model.read_bytes()
    merge_in_place(model, deltas[0])
    (kept,) = (p for p in (tmp_path / "m.safetensors.undo").iterdir() if p.name != "undo.sdelta")
    sdelta.save(deltas[1], kept)
    with pytest.raises(JournalError, match="is not the delta that was merged before"):
        merge_in_place(model, deltas[1])
    kept.unlink()
    with pytest.raises(MissingFileError, match="is missing, which was merged before"):
        merge_in_place(model, deltas[1])
    revert(model)
    assert model.read_bytes() == before


def test_a_shard_is_not_merged_into_behind_its_index(tmp_path: Path, base: Array) -> None:
    folder = write_sharded(tmp_path / "base", [{"w": base}, {"v": base[0]}])
    shard = folder / "model-00001-of-00002.safetensors"
    delta = only(adding("w", base, np.random.default_rng(72), 5))
    merge_in_place(folder, delta)
    for command in (lambda: merge_in_place(shard, delta), lambda: revert(shard)):
        with pytest.raises(
            JournalError, match=r"model-00001-of-00002.safetensors was merged into as a part of .*i"
        ):
            command()
    revert(folder)
    merge_in_place(shard, delta)
    with pytest.raises(JournalError, match="was merged into as a part of"):
        merge_in_place(folder, delta)


def test_links_made_after_the_merge_are_respected(
    tmp_path: Path, model: Path, deltas: list[SparseDelta]
) -> None:
    before = model.read_bytes()
    merge_in_place(model, deltas[0])
    (tmp_path / "kept").hardlink_to(model)
    with pytest.raises(OutputError, match="one of 2 hard links"):
        revert(model)
    revert(model, force=True)
    assert model.read_bytes() == before


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands(tmp_path: Path, model: Path, deltas: list[SparseDelta]) -> None:
    before = model.read_bytes()
    file = tmp_path / "d.sdelta"
    sdelta.save(deltas[0], file)
    merge(model, file, tmp_path / "out.safetensors")
    done = run("merge", model, file, "--in-place", "--dry-run")
    assert done.exit_code == 0
    assert "60 entries of 1 delta would be merged in place, in 1 file; " in done.stdout
    assert model.read_bytes() == before
    done = run("merge", model, file, "--in-place")
    assert (
        done.stdout.startswith(f"{model}: 60 entries of 1 delta merged in place, in 1 file; ")
        and done.exit_code == 0
    )
    assert model.read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    done = run("revert", model, "--json")
    assert json.loads(done.stdout)["entries"] == 60
    assert model.read_bytes() == before
    done = run("merge", model, file, "--in-place", "--json", "--weights", "0.5")
    assert json.loads(done.stdout)["weights"] == [0.5]
    done = run("revert", model)
    assert done.stdout == (
        f"{model}: 60 entries in 1 file have their original bits again, 1 delta taken back\n"
    )
    done = run("revert", model)
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--output=x", "--dtype=trained", "--workers=2"])
def test_options_that_need_a_new_file_are_wrong_usage(
    tmp_path: Path, model: Path, deltas: list[SparseDelta], option: str
) -> None:
    sdelta.save(deltas[0], tmp_path / "d.sdelta")
    done = run("merge", model, tmp_path / "d.sdelta", "--in-place", option)
    assert done.exit_code == 2
    assert f"{option.partition('=')[0]} does not go with --in-place" in done.stderr
