"""Laws of what a merge writes where: names, refusals, dry runs, progress."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors
from merge_reference import adding, only

from deltakit.errors import ConfigError, MissingFileError, OutputError, OutputExistsError
from deltakit.formats import sdelta
from deltakit.merging.merge import merge


def test_dry_run_says_what_would_happen_and_writes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(15)
    array = random_array(rng, (500, 60), np.float32)
    path = write_safetensors(tmp_path / "base.safetensors", {"w": array})
    delta = only(adding("w", array, rng, 40), extras={"head": np.zeros((2, 2), np.float32)})
    out = tmp_path / "out.safetensors"
    told = merge(path, delta, out, dry_run=True)
    assert not out.exists()
    assert told.dry_run
    done = merge(path, delta, out)
    assert (done.bytes, told.bytes) == (out.stat().st_size, out.stat().st_size)
    assert replace(told, dry_run=False) == done
    with pytest.raises(OutputExistsError):
        merge(path, delta, out, dry_run=True)


def test_progress_counts_every_byte_of_the_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(16)
    array = random_array(rng, (2000, 300), np.float32)
    path = write_safetensors(tmp_path / "b.safetensors", {"w": array, "z": array[:9].copy()})
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out.safetensors"
    merge(path, only(adding("w", array, rng, 4)), out, progress=lambda *at: seen.append(at))
    assert seen[-1] == (out.stat().st_size, out.stat().st_size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_default_name_is_made_of_base_and_delta(tmp_path: Path) -> None:
    array = np.zeros(4, np.float32)
    path = write_safetensors(tmp_path / "base.safetensors", {"w": array})
    run = tmp_path / "RUN"
    run.mkdir()
    sdelta.save(only(), run / "budget-25.sdelta")
    assert merge(path, run / "budget-25.sdelta").output == str(run / "base-budget-25.safetensors")
    with pytest.raises(OutputExistsError, match=r"base-budget-25.safetensors exists; give another"):
        merge(path, run / "budget-25.sdelta")
    several = merge(path, [run / "budget-25.sdelta"] * 2)
    assert several.output == str(run / "base-merged.safetensors")
    assert merge(path, only()).output == str(tmp_path / "base-merged.safetensors")


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "base.safetensors", {"w": np.zeros(4, np.float32)})
    file = tmp_path / "d.sdelta"
    sdelta.save(only(), file)
    for out in (path, file, tmp_path / "x" / ".." / "base.safetensors"):
        with pytest.raises(OutputError, match="is an input of the merge"):
            merge(path, file, out, force=True)
    with pytest.raises(OutputError, match="holds the input"):
        merge(path, file, f"{tmp_path}/", force=True)
    with pytest.raises(MissingFileError, match=r"folder .*nowhere does not exist"):
        merge(path, file, tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(
        ConfigError, match=r"d.sdelta is a delta; the first argument .* is the base"
    ):
        merge(file, file, tmp_path / "out.safetensors")


def test_force_replaces_a_file_only(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "base.safetensors", {"w": np.zeros(4, np.float32)})
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(OutputExistsError, match=r"out.safetensors exists"):
        merge(path, only(), out)
    assert out.read_bytes() == b"old"
    merge(path, only(), out, force=True)
    assert out.read_bytes() == path.read_bytes()
    out.unlink()
    out.mkdir()
    with pytest.raises(OutputExistsError, match="exists and is a folder"):
        merge(path, only(), out, force=True)


def test_weights_must_fit(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "base.safetensors", {"w": np.zeros(4, np.float32)})
    with pytest.raises(ConfigError, match="2 weights for 1 deltas"):
        merge(path, only(), weights=[1, 2])
    with pytest.raises(ConfigError, match="weight nan is not finite"):
        merge(path, only(), weights=[float("nan")])
    with pytest.raises(ConfigError, match="no delta to merge"):
        merge(path, [])
