"""Laws of diff to a file and of diff under a budget, and the command."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import random_array, write_safetensors, write_sharded
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_diff import pairs

import deltakit as dk
from deltakit.cli.main import main
from deltakit.dtypes import Array
from deltakit.errors import BudgetError, ConfigError, DeltaError, OutputError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta_stream import sdelta_stream


def two_files(
    folder: Path, tensors: list[tuple[Array, Array]], **added: Array
) -> tuple[Path, Path]:
    """The pairs of `tensors` as base.safetensors and tuned.safetensors; `added` to the latter."""
    sides = [{f"t{i:02}": pair[n] for i, pair in enumerate(tensors)} for n in (0, 1)]
    base = write_safetensors(folder / "base.safetensors", sides[0])
    return base, write_safetensors(folder / "tuned.safetensors", sides[1] | added)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    tensors=st.lists(pairs(), min_size=1, max_size=3),
    mode=st.sampled_from(["set", "add"]),
    keep_base=st.booleans(),
    budget=st.sampled_from([None, 3, "5%"]),
)
def test_the_file_is_the_one_that_save_writes(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[Array, Array]],
    mode: Any,
    keep_base: bool,
    budget: Any,
) -> None:
    """Byte for byte, for all dtypes and with extras."""
    folder = tmp_path_factory.mktemp("pair")
    base, tuned = two_files(folder, tensors, x=np.ones(3, np.int8), a=np.zeros((2, 0)))
    delta = dk.diff(base, tuned, mode=mode, keep_base=keep_base, budget=budget)
    dk.save(delta, folder / "saved.sdelta")
    report = dk.diff(
        base, tuned, mode=mode, keep_base=keep_base, budget=budget, out=folder / "out.sdelta"
    )
    assert (folder / "out.sdelta").read_bytes() == (folder / "saved.sdelta").read_bytes()
    assert report.entries == delta.nnz
    assert report.bytes == (folder / "out.sdelta").stat().st_size
    assert sum(report.codings.values()) == report.tensors == len(delta.tensors)
    assert report.stayed_set == tuple(n for n, t in delta.tensors.items() if t.mode != mode)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    tensors=st.lists(pairs(), min_size=1, max_size=4),
    mode=st.sampled_from(["set", "add"]),
    budget=st.integers(0, 60),
)
def test_a_budget_keeps_what_truncating_the_exact_difference_keeps(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[Array, Array]],
    mode: Any,
    budget: int,
) -> None:
    """Exactly min(budget, nnz) entries, ties included, though most are dropped on the way."""
    base, tuned = two_files(tmp_path_factory.mktemp("pair"), tensors)
    exact = dk.diff(base, tuned)
    some = dk.diff(base, tuned, mode=mode, budget=budget)
    assert some.nnz == min(budget, exact.nnz)
    best = dk.truncate(exact, budget)
    assert list(some.tensors) == list(best.tensors)
    for name, tensor in some.tensors.items():
        assert np.array_equal(tensor.indices, best.tensors[name].indices)
        if tensor.mode == "set":
            assert tensor.equals(best.tensors[name])
    lossy = {"budget": budget, "by": "magnitude", "from": exact.nnz}
    assert some.provenance.get("lossy") == (lossy if budget < exact.nnz else None)


def test_density_is_a_share_of_the_base(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base, tuned = two_files(tmp_path, [(np.zeros(100), rng.standard_normal(100))])
    assert dk.diff(base, tuned, density=0.29).nnz == 29
    assert dk.diff(base, tuned, density=1).nnz == 100
    assert "lossy" not in dk.diff(base, tuned, density=1).provenance
    assert dk.diff(base, tuned, budget="29%").equals(dk.diff(base, tuned, budget=29))
    with pytest.raises(BudgetError, match=r"density 1\.5 is not a share"):
        dk.diff(base, tuned, density=1.5)
    with pytest.raises(ConfigError, match="budget and density are two ways"):
        dk.diff(base, tuned, density=0.5, budget=3)


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        rng = np.random.default_rng(2)
        folder = tmp_path / str(count)
        folder.mkdir()
        sides = [tuple(random_array(rng, (50_000,), np.float32) for _ in "ab")] * count
        base, tuned = two_files(folder, sides)  # type: ignore[arg-type]
        del sides
        tracemalloc.start()
        dk.diff(base, tuned, out=folder / "out.sdelta")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # imports
    small = peak(2)
    assert peak(10) < 1.3 * small


def test_nothing_is_left_behind_and_no_input_is_replaced(tmp_path: Path) -> None:
    paths = []
    for number in (0, 1):
        text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        text += b'"q":{"dtype":"F4","shape":[4],"data_offsets":[1,3]}}'
        paths.append(tmp_path / f"{number}.safetensors")
        body = bytes([number, 7, number])
        paths[-1].write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(DeltaError, match="tensor 'q' differs"):
        dk.diff(*paths, out=tmp_path / "out.sdelta")
    assert sorted(tmp_path.iterdir()) == paths
    with pytest.raises(OutputError, match="is one of the two checkpoints"):
        dk.diff(paths[0], paths[0], out=paths[0])


def test_a_stream_wants_tensors_in_order(tmp_path: Path) -> None:
    base, tuned = two_files(tmp_path, [(np.zeros(3), np.ones(3))] * 2)
    one, two = dk.diff(base, tuned).tensors.values()
    with (
        pytest.raises(DeltaError, match="'t00' comes after 't01', out of tensor order"),
        sdelta_stream(tmp_path / "out.sdelta") as stream,
    ):
        stream.add(two)
        stream.add(one)
    assert not (tmp_path / "out.sdelta").exists()


def test_keys_of_the_configuration_that_a_delta_cannot_remove_are_named(tmp_path: Path) -> None:
    """Where it changes the configuration at all, which it does for extras only."""
    old, head = {"a": np.zeros(3, np.float32)}, {"head": np.ones(2, np.float32)}
    config = {"b": None, "a": 1, "kept": 2, "torch_dtype": "float32"}
    base = write_sharded(tmp_path / "base", [old], config)
    tuned = write_sharded(tmp_path / "tuned", [old | head], {"kept": 3, "new": None})
    out = tmp_path / "out.sdelta"
    (note,) = dk.diff(base, tuned, out=out).notes
    assert note == (
        "config.json of the tuned side lacks a, b; a delta cannot remove keys, so merging keeps them "
        "as in the base"
    )
    dk.merge(base, out, tmp_path / "merged")
    assert Checkpoint(tmp_path / "merged").config() == {**config, "kept": 3, "new": None}
    (file,) = Checkpoint(tuned).files
    assert dk.diff(base, file, out=out).notes == ()
    assert dk.diff(tuned, base, out=out, missing="ignore").notes == (
        "the tuned side lacks head, which stay as in the base",
    )


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_command_says_what_was_lost_and_how_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = np.arange(1000, dtype=np.float32)
    other, huge = one + 1, np.array([1e30] + [0] * 99, np.float32)
    two_files(Path(), [(one, other), (huge, np.eye(1, 100, dtype=np.float32)[0])])
    files = ("base.safetensors", "tuned.safetensors")
    code, out, err = run("diff", *files, "-o", "few.sdelta", "--budget", "1%")
    assert (code, out[:52]) == (0, "few.sdelta: 11 of 1,001 entries in 2 tensors, 0 extr")
    assert err == (
        "Note: lossy: the 11 largest of 1,001 changes are kept, so merging does not give the tuned "
        "tensors back\n"
    )
    code, out, err = run("diff", *files, "-o", "all.sdelta", "--mode", "add")
    assert (code, out[:43]) == (0, "all.sdelta: 1,001 entries in 2 tensors, 0 e")
    assert err == (
        "Note: base + difference does not give the bits back in t01, which stay in set mode\n"
        "Note: positions in t00 are coded densely (in nothing or one bit per element), which is "
        "smaller than coordinates\n"
    )
    assert run("-q", "diff", *files, "-o", "q.sdelta", "--density", "0.01")[2] == ""
    told = json.loads(run("diff", *files, "-o", "j.sdelta", "--budget", "20", "--json")[1])
    assert (told["entries"], told["differing"], told["extras"]) == (20, 1001, [])
    assert sum(told["codings"].values()) == told["tensors"] == 2
    code, out, err = run("diff", *files, "-o", "x.sdelta", "--density", "2")
    assert (code, out) == (1, "")
    assert err == "Error: density 2.0 is not a share of the base's weights from 0 to 1\n"
    assert run("diff", *files, "-o", "x.sdelta", "--budget", "many")[0] == 2
    assert not Path("x.sdelta").exists()
