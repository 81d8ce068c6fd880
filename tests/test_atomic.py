"""Laws of writing files whole: what a killed process leaves is removed, what a living one writes is
not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors
from merge_reference import adding, only

from deltakit.formats import atomic, sdelta
from deltakit.formats.atomic import replacing, write_bytes
from deltakit.merging.merge import merge

KILLED = """
import os, signal, sys
from deltakit.merging.merge import merge
base, delta, out = sys.argv[1:]
merge(base, delta, out, progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="no locks there")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@posix
def test_a_merge_removes_what_a_killed_one_has_left(tmp_path: Path) -> None:
    """Of the same output; what was left of another one stays until that is written."""
    rng = np.random.default_rng(100)
    array = random_array(rng, (100, 50), np.float32)
    base = write_safetensors(tmp_path / "base.safetensors", {"w": array})
    delta = tmp_path / "d.sdelta"
    sdelta.save(only(adding("w", array, rng, 9)), delta)
    outs = [tmp_path / "out" / f"{name}.safetensors" for name in "ab"]
    outs[0].parent.mkdir()
    for out in outs:
        done = subprocess.run([sys.executable, "-c", KILLED, base, delta, out], check=False)
        assert done.returncode == -signal.SIGKILL
    left = names(outs[0].parent)
    assert [name[:15] for name in left] == [".a.safetensors.", ".b.safetensors."]
    merge(base, delta, outs[0])
    assert names(outs[0].parent) == [left[1], "a.safetensors"]
    merge(base, delta, outs[1])
    assert names(outs[0].parent) == ["a.safetensors", "b.safetensors"]
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """Two writers of one path: each moves its own file there, the last one stays."""
    out = tmp_path / "out"
    with replacing(out) as first:
        first.write_bytes(b"first")
        write_bytes(out, b"second")
        assert out.read_bytes() == b"second" and first.read_bytes() == b"first"
    assert out.read_bytes() == b"first"
    assert names(tmp_path) == ["out"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    others = [
        ".out.x1.tmp",
        "out.x1.deltakit.tmp",
        ".out.x1.y.deltakit.tmp",
        ".out.x.a1.deltakit.tmp",
        ".outx.a1.deltakit.tmp",
        ".out.deltakit.tmp",
    ]
    for name in others:
        (tmp_path / name).touch()
    write_bytes(tmp_path / "out", b"")
    assert names(tmp_path) == sorted([*others, "out"])


def test_without_locks_nothing_is_taken_for_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows and on some network file systems."""
    monkeypatch.setattr(atomic, "try_lock", lambda handle: None)
    stale = tmp_path / ".out.a1_b2.deltakit.tmp"
    stale.touch()
    write_bytes(tmp_path / "out", b"new")
    assert stale.exists() and (tmp_path / "out").read_bytes() == b"new"
    monkeypatch.undo()
    write_bytes(tmp_path / "out", b"newer")
    assert stale.exists() == (sys.platform == "win32")


@posix
def test_a_file_that_another_process_took_for_stale_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its locking: it is gone, or the other one still has the lock."""
    lock, seen = atomic.try_lock, 0

    def disturbed(handle: int) -> bool | None:
        nonlocal seen
        seen += 1
        (path,) = tmp_path.glob(".out.*")
        if seen == 1:
            path.unlink()
        elif seen == 2:
            path.unlink()
            return False
        return lock(handle)

    monkeypatch.setattr(atomic, "try_lock", disturbed)
    write_bytes(tmp_path / "out", b"new")
    assert seen == 3 and (tmp_path / "out").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]
