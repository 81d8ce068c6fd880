"""Laws of verify by shares and by several workers: together they find what one verify finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from shard_lab import arrays, make_base, make_delta

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import ConfigError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def delta(tmp_path: Path, base: Path) -> Path:
    return make_delta(tmp_path / "d.sdelta", base)


@pytest.mark.parametrize("jobs", [1, 2, 5, 20])
@pytest.mark.parametrize("with_base", [True, False])
def test_shares_are_the_whole(delta: Path, base: Path, jobs: int, with_base: bool) -> None:
    given = base if with_base else None
    whole = dk.verify(delta, given)
    shares = [dk.verify(delta, given, shard=(n, jobs), workers=2) for n in range(1, jobs + 1)]
    assert all(share.ok for share in shares)
    assert [share.shard for share in shares] == [f"{n}/{jobs}" for n in range(1, jobs + 1)]
    for count in ("tensors", "extras", "entries"):
        assert sum(getattr(share, count) for share in shares) == getattr(whole, count)
    assert {share.notes for share in shares} == {whole.notes}


@pytest.mark.parametrize("workers", [1, 4])
def test_problems_are_found_once_and_told_in_tensor_order(
    tmp_path: Path, delta: Path, workers: int
) -> None:
    """Two files of another base, and a damaged stream in one of them."""
    changed = arrays()
    changed[1], changed[4] = arrays(9)[1], arrays(9)[4]
    other = make_base(tmp_path / "other", changed)
    data = bytearray(delta.read_bytes())
    data[-1] ^= 1
    delta.write_bytes(data)
    whole = dk.verify(delta, other, workers=workers)
    assert [problem.split("'")[1] for problem in whole.problems if "other values" in problem] == [
        "b.1",
        "b.4",
        "w.1",
    ]
    assert "tensor 'w.4'" in whole.problems[-1]
    assert "differ from their digest" in whole.problems[-1]
    assert len(whole.problems) == 4
    found = [dk.verify(delta, other, shard=(n, 5), workers=workers).problems for n in range(1, 6)]
    assert sorted(p for problems in found for p in problems) == sorted(whole.problems)
    assert whole == dk.verify(delta, other)


def test_progress_counts_the_share(delta: Path, base: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = dk.verify(
        delta, base, shard="2/3", workers=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (report.entries, report.entries)


def test_the_command(tmp_path: Path, delta: Path, base: Path) -> None:
    def run(*more: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(main, ["verify", str(delta), *more])
        return done.exit_code, done.stdout, done.stderr

    code, out, _ = run("--base", str(base), "--shard", "1/2", "--workers", "2")
    assert code == 0
    assert out.startswith(f"{delta}: shard 1/2 is sound, and {base} is its base; ")
    assert json.loads(run("--shard", "2/2", "--json")[1])["shard"] == "2/2"
    changed = arrays()
    changed[4] = arrays(9)[4]
    other = make_base(tmp_path / "other", changed)
    codes = [run("--base", str(other), "--shard", f"{n}/5")[0] for n in range(1, 6)]
    assert codes == [0, 0, 0, 0, 1]
    assert run("--shard", "0/4")[0] == 2
    with pytest.raises(ConfigError):
        dk.verify(delta, shard="0/4")
