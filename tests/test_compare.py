"""Laws of comparing deltas, against Python sets and dense vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_reference import only

import deltakit as dk
from deltakit.cli.main import main
from deltakit.comparing.compare import COLLISION
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.seeded import seeded_support
from deltakit.identity import identify


def tensor(name: str, indices: Any, values: Any, numel: int = 40, **more: Any) -> TensorDelta:
    return TensorDelta(
        name=name,
        shape=(numel,),
        dtype="float32",
        mode=more.pop("mode", "add"),
        indices=np.asarray(indices, np.int64),
        values=np.asarray(values, np.float32),
        **more,
    )


def drawn(rng: np.random.Generator) -> SparseDelta:
    """Entries, some of them zero, on some of three tensors of two kinds."""
    made = []
    for name in ("layer.0.w", "layer.1.w", "head"):
        indices = np.flatnonzero(rng.random(40) < rng.choice([0.0, 0.3, 0.8]))
        if indices.size:
            made.append(tensor(name, indices, rng.integers(-3, 4, len(indices))))
    return only(*made)


def entries(delta: SparseDelta, part: str = "") -> dict[tuple[str, int], float]:
    return {
        (name, int(i)): float(v)
        for name, t in delta.tensors.items()
        if name.startswith(part)
        for i, v in zip(t.indices, t.values, strict=True)
    }


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_numbers_equal_those_of_sets_and_vectors(seed: int) -> None:
    """In all and by kind, where the kinds' counts add up to the totals."""
    rng = np.random.default_rng(seed)
    deltas = [drawn(rng) for _ in range(3)]
    found = dk.compare(deltas)
    assert [(p.first, p.second) for p in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in found.pairs:
        one, other = deltas[pair.first], deltas[pair.second]
        for part, overlap in {"": pair.total, **pair.kinds}.items():
            a, b = (entries(side, part.split(".*")[0]) for side in (one, other))
            both = a.keys() & b.keys()
            assert (overlap.first, overlap.second) == (len(a), len(b))
            assert overlap.shared == overlap.signed == len(both)
            assert overlap.conflicts == sum(a[at] * b[at] < 0 for at in both)
            assert overlap.jaccard == (len(both) / len(a.keys() | b.keys()) if a or b else 0)
            assert overlap.first_contained == (len(both) / len(a) if a else 0)
            assert overlap.second_contained == (len(both) / len(b) if b else 0)
            lengths = np.linalg.norm([*a.values()]) * np.linalg.norm([*b.values()])
            dot = sum(a[at] * b[at] for at in both)
            if overlap.cosine is None:
                assert not lengths
            else:
                assert overlap.cosine == pytest.approx(dot / lengths)
        assert pair.total.shared == sum(part.shared for part in pair.blocks.values())


def test_expected_overlap_is_that_of_random_supports() -> None:
    """Seeded supports are expanded; over many draws the mean meets the expectation."""
    shared = []
    for seed in range(200):
        sides = [
            only(tensor("w", seeded_support(s, "w", 1000, 100), np.ones(100), 1000, seed=s))
            for s in (2 * seed, 2 * seed + 1)
        ]
        total = dk.compare(sides).pairs[0].total
        assert total.expected == 10.0
        shared.append(total.shared)
    assert np.mean(shared) == pytest.approx(10, abs=4 * np.std(shared) / np.sqrt(200))


def test_files_give_what_deltas_give(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    deltas = [drawn(rng), drawn(rng)]
    paths = [tmp_path / "a.sdelta", tmp_path / "b.sdelta"]
    for delta, path in zip(deltas, paths, strict=True):
        dk.save(delta, path)
    assert dk.compare(paths).pairs == dk.compare(deltas).pairs
    assert [d.label for d in dk.compare([deltas[0], paths[1]]).deltas] == ["delta 0", str(paths[1])]
    for few in ([], paths[:1], paths[0]):
        with pytest.raises(ConfigError, match="at least two deltas"):
            dk.compare(few)  # type: ignore[arg-type]


def test_set_mode_is_compared_as_far_as_its_changes_are_known() -> None:
    base = np.array([1, 1, 1], np.float32)
    known = only(tensor("w", [1, 2, 3], [2, 0, np.nan], mode="set", base_values=base))
    bare = only(tensor("w", [1, 2, 3], [2, 0, 5], mode="set"))
    added = only(tensor("w", [2, 3, 4], [1, 1, 1]))
    total = dk.compare([known, added]).pairs[0].total
    assert (total.shared, total.signed, total.conflicts, total.unknown) == (2, 1, 1, 1)
    assert (total.conflict_share, total.cosine) == (1.0, None)
    assert total.collision == (1 + 1 / 2) / 3
    found = dk.compare([bare, added])
    total = found.pairs[0].total
    assert (total.shared, total.signed, total.unknown, total.conflict_share) == (2, 0, 3, None)
    assert "delta 0 and delta 1: 3 changes are not known or not finite" in found.notes[-1]
    assert found.warning is not None
    assert "33 % of the smaller one's entries are, by estimate, moved" in found.warning
    whole = only(tensor("w", [1, 2], [2, 0], mode="set", base_values=base[:2]))
    assert dk.compare([whole, added]).pairs[0].total.cosine == pytest.approx(-1 / np.sqrt(6))


def test_bases_that_differ_are_said(
    checkpoint: Checkpoint, other_checkpoint: Checkpoint, delta_file: Path
) -> None:
    one = dk.load(delta_file)
    other = replace(one, base=identify(other_checkpoint, {"w": None}))
    found = dk.compare([one, other])
    assert found.pairs[0].base.verdict == "different"
    assert found.notes[0].startswith(
        "delta 0 and delta 1 belong to different bases: tensor 'w' has other base values (sample"
    )
    assert dk.compare([one, one]).pairs[0].base.verdict == "same"
    assert dk.compare([one, one]).notes == []
    halves = [replace(one, tensors={n: one.tensors[n]}) for n in ("w", "b")]
    assert dk.compare(halves).pairs[0].base == ("same", "both were made for org/base")
    nameless = [replace(h, base=identify(checkpoint, dict.fromkeys(h.tensors))) for h in halves]
    assert dk.compare(nameless).pairs[0].base.verdict == "unknown"
    bare = replace(one, base=None)
    assert dk.compare([one, bare]).pairs[0].base == ("unknown", "not every delta records its base")
    reshaped = only(tensor("w", [1, 2], [1, 1], 7))
    pair = dk.compare([one, reshaped]).pairs[0]
    assert (pair.base.verdict, pair.total.shared) == ("different", 0)
    assert pair.base.why == "tensor 'w' has shape [20, 30] and [7]"


def test_a_warning_where_a_tenth_of_the_smaller_delta_is_opposed() -> None:
    one = only(tensor("w", range(40), np.ones(40)))

    def against(opposed: int) -> dk.SparseDelta:
        values = np.ones(20)
        values[:opposed] = -1
        return only(tensor("w", range(20), values))

    assert COLLISION == 0.1
    assert dk.compare([one, against(1)]).warning is None
    told = dk.compare([one, against(2)]).warning
    assert told is not None
    assert told.startswith("delta 0 and delta 1 collide: 10 % of the smaller one's entries are")
    several = dk.compare([one, against(2), against(20)]).warning
    assert several is not None
    assert several.startswith("delta 0 and delta 2 collide: 100 % ")
    assert "; so do 2 other pairs; " in several


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three deltas of one kind and a head: the second opposes the first, the third stands apart."""
    monkeypatch.chdir(tmp_path)
    one = only(tensor("l.0.w", [1, 2, 3, 4], [1, 1, 1, 1]), tensor("l.1.w", [5], [1]))
    other = only(tensor("l.0.w", [3, 4], [-1, 1]), tensor("l.1.w", [5], [-1]))
    third = only(tensor("head", [0], [1]))
    names = ["a.sdelta", "b.sdelta", "c.sdelta"]
    for name, delta in zip(names, (one, other, third), strict=True):
        dk.save(delta, name)
    return names


def test_command_tells_pairs_and_kinds(files: list[str]) -> None:
    code, out, err = run("compare", *files[:2])
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert [
        "1-2",
        "3",
        "0.2",
        "0.600",
        "0.600",
        "1.000",
        "2",
        "0.667",
        "-0.258",
        "unknown",
    ] in lines
    assert [
        "l.*.w",
        "5",
        "3",
        "3",
        "0.2",
        "0.600",
        "0.600",
        "1.000",
        "2",
        "0.667",
        "-0.258",
    ] in lines
    assert err == (
        "Note: a.sdelta and b.sdelta may belong to different bases: not every delta records "
        "its base\n"
        "Warning: a.sdelta and b.sdelta collide: 67 % of the smaller one's entries are moved the "
        "opposite way by the other, and cancel in a sum; ties elects signs\n"
    )
    code, out, err = run("-q", "compare", *files)
    assert (code, err) == (0, "")
    assert "by kind" not in out
    out = run("compare", *files, "--by", "block")[1]
    assert [line.split("  ")[0] for line in out.splitlines() if " by block" in line] == [
        "1-2 by block",
        "1-3 by block",
        "2-3 by block",
    ]
    assert "l.1.w" in run("compare", *files, "--by", "tensor")[1]


def test_command_prints_json_and_nothing_else(files: list[str]) -> None:
    code, out, err = run("compare", *files, "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert [d["label"] for d in told["deltas"]] == files
    first, apart, _ = told["pairs"]
    assert (first["shared"], first["conflicts"], first["base"]) == (3, 2, "unknown")
    assert (apart["shared"], apart["conflict_share"], apart["cosine"]) == (0, None, 0.0)
    assert first["tensors"]["l.1.w"]["conflicts"] == 1
    assert told["warning"].startswith("a.sdelta and b.sdelta collide")


def test_command_draws_both_matrices(files: list[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run("compare", *files, "--plot", "out.png")[0] == 0
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    found = dk.compare(files)
    assert found.matrix(lambda p: p.jaccard, 1.0).tolist() == [[1, 0.6, 0], [0.6, 1, 0], [0, 0, 1]]
    code, _, err = run("compare", *files, "--plot", files[0])
    assert (code, err) == (1, "Error: a.sdelta is a delta to be read; give another output\n")
    conflicts = found.matrix(lambda p: p.conflict_share, 0.0)
    assert np.isnan(conflicts[0, 2])
    assert conflicts[1, 0] == conflicts[0, 1] == pytest.approx(2 / 3)


def test_command_refuses_what_it_cannot_compare(files: list[str]) -> None:
    assert run("compare", files[0])[0] == 2
    code, out, err = run("compare", files[0], "none.sdelta")
    assert (code, out) == (1, "")
    assert err == "Error: cannot read none.sdelta: No such file or directory\n"


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_an_output_never_replaces_a_delta(option: str, tmp_path: Path) -> None:
    """Not even with --force, and under whatever name."""
    deltas = [tmp_path / "a.svg", tmp_path / "b.sdelta"]
    for path in deltas:
        dk.save(SparseDelta(tensors={}), path)
    before = deltas[0].read_bytes()
    arguments = ["compare", *map(str, deltas), option, str(deltas[0]), "--force"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {deltas[0]} is a delta to be read; give another output\n"
    assert deltas[0].read_bytes() == before
