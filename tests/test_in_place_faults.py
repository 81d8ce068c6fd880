"""Laws of merging in place under faults: before or after, never in between, and always reported."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors
from merge_reference import adding, only

from deltakit.delta import SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import JournalError, OutputError
from deltakit.formats import sdelta
from deltakit.in_place.journal import Journal
from deltakit.in_place.merge import merge_in_place
from deltakit.in_place.revert import revert
from deltakit.in_place.weights import OpenWeights
from deltakit.merging.merge import merge

KILLS = Path(__file__).parents[1] / "benchmarks" / "in_place_kills.py"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses fork and limits")


@pytest.fixture
def base() -> Array:
    return random_array(np.random.default_rng(80), (400, 500), np.float32)


@pytest.fixture
def model(tmp_path: Path, base: Array) -> Path:
    return write_safetensors(tmp_path / "m.safetensors", {"v": base[0], "w": base})


@pytest.fixture
def deltas(base: Array) -> list[SparseDelta]:
    rng = np.random.default_rng(81)
    return [only(adding("v", base[0], rng, 5), adding("w", base, rng, 60)) for _ in range(2)]


@linux
def test_killed_at_any_instant_it_comes_back_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, KILLS, "--kills", "20", "--seed", "3", "--folder", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20 kills, every model whole: ")


@pytest.fixture
def dying_at_write(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes the n-th write to the weights, and all rolling back in this process, fail."""
    write = OpenWeights.write

    def die_at(number: int) -> None:
        left = number

        def dying(self: OpenWeights, name: str, indices: Array, words: Array) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OutputError("the disk is gone")
            write(self, name, indices, words)

        monkeypatch.setattr(OpenWeights, "write", dying)

    yield die_at
    monkeypatch.undo()


def interrupted(model: Path, delta: SparseDelta, die_at: Callable[[int], None]) -> None:
    """Leave a merge behind that has written one tensor of two."""
    before = model.read_bytes()
    die_at(1)
    with pytest.raises(OutputError, match=r"disk is gone; rolling the merge back failed as well.*"):
        merge_in_place(model, delta)
    assert model.read_bytes() != before


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("following", ["merge", "revert", "merge to a new file"])
def test_the_next_command_rolls_back(
    tmp_path: Path,
    model: Path,
    deltas: list[SparseDelta],
    dying_at_write: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    earlier: int,
    following: str,
) -> None:
    original = model.read_bytes()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(original)
    if earlier:
        merge_in_place(model, deltas[0])
    before = model.read_bytes()
    interrupted(model, deltas[1], dying_at_write)
    torn = model.read_bytes()
    monkeypatch.undo()
    with pytest.raises(JournalError, match="a part of a merge in place that was interrupted"):
        merge_in_place(model, deltas[1], dry_run=True)
    with pytest.raises(JournalError, match="a part of a merge in place that was interrupted"):
        merge(model, deltas[1], dry_run=True)
    assert model.read_bytes() == torn
    if following == "revert":
        report: Any = revert(model)
        assert model.read_bytes() == original
        assert not Journal(OpenedOnce(model).checkpoint).folder.exists()
    elif following == "merge":
        report = merge_in_place(model, deltas[1])
        merge(copy, deltas if earlier else deltas[1], tmp_path / "expected.safetensors")
        assert model.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    else:
        report = merge(model, only(), tmp_path / "out.safetensors")
        assert (tmp_path / "out.safetensors").read_bytes() == before == model.read_bytes()
    assert report.notes[0] == f"an interrupted merge into {model} was rolled back first"


class OpenedOnce:
    """The checkpoint of a model that is opened and closed again."""

    def __init__(self, model: Path) -> None:
        with OpenWeights(model) as opened:
            self.checkpoint = opened.checkpoint


def test_an_interrupted_revert_is_finished_first(
    tmp_path: Path,
    model: Path,
    deltas: list[SparseDelta],
    dying_at_write: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = model.read_bytes()
    merge(model, deltas[1], tmp_path / "expected.safetensors")
    for following in ("revert", "merge"):
        merge_in_place(model, deltas[0])
        dying_at_write(1)
        with pytest.raises(OutputError, match="the disk is gone"):
            revert(model)
        monkeypatch.undo()
        if following == "revert":
            notes = revert(model).notes
            assert model.read_bytes() == original
        else:
            notes = merge_in_place(model, deltas[1]).notes
            assert model.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
        assert notes[0] == f"an interrupted revert of {model} was finished first"


def test_words_half_written_are_taken_back_and_foreign_ones_are_not(
    model: Path,
    deltas: list[SparseDelta],
    dying_at_write: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = model.read_bytes()
    merge_in_place(model, deltas[0])
    merged = model.read_bytes()
    revert(model)
    dying_at_write(0)
    with pytest.raises(OutputError):
        merge_in_place(model, deltas[0])
    monkeypatch.undo()
    at = next(i for i in range(len(merged)) if merged[i] != original[i])
    with model.open("r+b") as file:
        file.seek(at)
        file.write(merged[at : at + 1])
    foreign = bytearray(model.read_bytes())
    foreign[at] = next(b for b in range(256) if b not in (merged[at], original[at]))
    torn = model.read_bytes()
    model.write_bytes(foreign)
    with pytest.raises(JournalError, match="was changed by something else since it was merged"):
        revert(model)
    assert model.read_bytes() == foreign
    model.write_bytes(torn)
    revert(model)
    assert model.read_bytes() == original


def test_an_exception_rolls_back_at_once(
    tmp_path: Path, model: Path, deltas: list[SparseDelta]
) -> None:
    """Ctrl-C, for one; the journal of an earlier merge stays as it was."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for earlier in (False, True):
        if earlier:
            merge_in_place(model, deltas[0])
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(KeyboardInterrupt):
            merge_in_place(model, deltas[1], progress=stop)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        assert (tmp_path / "m.safetensors.undo").exists() == earlier


def test_the_journal_is_on_the_disk_before_the_first_write(
    tmp_path: Path, model: Path, deltas: list[SparseDelta], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the weights are before the journal says so; a revert likewise."""
    events: list[str] = []
    fsync, write = os.fsync, OpenWeights.write

    def synced(handle: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        fsync(handle)

    def written(self: OpenWeights, name: str, indices: Array, words: Array) -> None:
        journal = Journal(self.checkpoint)
        events.append("write" + (" undo" if journal.undo.exists() else ""))
        write(self, name, indices, words)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(OpenWeights, "write", written)
    merge_in_place(model, deltas[0])
    first = events.index("write")
    folder = "sync m.safetensors.undo"
    assert events[0] == f"sync {tmp_path.name}"
    (temporary,) = [e for e in events if e.startswith("sync .next.sdelta.")]
    assert events[first - 2 : first] == [temporary, folder]
    assert events[first:] == ["write", "write", "sync m.safetensors", folder]
    events.clear()
    revert(model)
    assert events[:4] == [folder, "write", "write", "sync m.safetensors"]


@linux
@pytest.mark.parametrize("limit", [1000, 7000, 100_000])
def test_a_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, model: Path, base: Array, limit: int
) -> None:
    """A limit on file sizes stands in for the disk: it stops the journal's delta, its record, or
    the weights, of which only the first entries stand below the limit."""
    file = tmp_path / "d.sdelta"
    rng = np.random.default_rng(82)
    count = 3000 if limit < 10_000 else 50
    sdelta.save(only(adding("v", base[0], rng, 5), adding("w", base, rng, count)), file)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    told = refused(model, file, full)
    assert told.startswith("Error: cannot write ")
    assert "File too large" in told
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def refused(model: Path, file: Path, prepare: Callable[[], None]) -> str:
    """What the command says when it merges in place under conditions that do not allow it."""
    code = "from deltakit.cli.main import main; main()"
    command = [sys.executable, "-c", code, "merge", str(model), str(file), "--in-place"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=prepare)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@linux
@pytest.mark.parametrize("locked", ["m.safetensors", "."])
def test_a_read_only_target_is_said(model: Path, deltas: list[SparseDelta], locked: str) -> None:
    """The weights, or the folder that the journal would stand in."""

    def obey_permissions() -> None:
        """Root may write anywhere unless it gives up CAP_DAC_OVERRIDE before it executes."""
        if os.geteuid() == 0:
            ctypes.CDLL(None).prctl(24, 1)

    file = model.parent / "d.sdelta"
    sdelta.save(deltas[0], file)
    before = {p: p.read_bytes() for p in model.parent.iterdir()}
    (model.parent / locked).chmod(0o444 if locked != "." else 0o555)
    told = refused(model, file, obey_permissions)
    (model.parent / locked).chmod(0o755)
    named = model if locked != "." else f"{model}.undo"
    assert told.startswith(f"Error: cannot write {named}: Permission denied; nothing was ")
    assert {p: p.read_bytes() for p in model.parent.rglob("*")} == before


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_processes_do_not_work_on_one_model(model: Path, deltas: list[SparseDelta]) -> None:
    before = model.read_bytes()
    with OpenWeights(model):
        for command in (lambda: merge_in_place(model, deltas[0]), lambda: revert(model)):
            with pytest.raises(JournalError, match=r"another process is merging into .*m.safeten"):
                command()
    assert model.read_bytes() == before


def test_a_base_that_changes_underneath_is_noticed(
    tmp_path: Path,
    model: Path,
    deltas: list[SparseDelta],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Written to, or replaced, between the reading and the writing."""
    begin = Journal.begin
    other = write_safetensors(tmp_path / "o.safetensors", {"v": np.zeros(500, np.float32)})

    def meddling(self: Journal, kept: Any, record: bytes) -> None:
        begin(self, kept, record)
        other.replace(model)

    monkeypatch.setattr(Journal, "begin", meddling)
    data = other.read_bytes()
    with pytest.raises(JournalError, match=r"m.safetensors was changed by something else in the"):
        merge_in_place(model, deltas[0])
    assert model.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
