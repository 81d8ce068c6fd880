"""What the tests of pulling share: a folder to pull into, a family of deltas, the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

import deltakit as dk
from deltakit.cli.main import main
from deltakit.formats.sdelta import encode
from deltakit.hub import failures

ROOT = Path(__file__).resolve().parents[1]
OBJECT = "GET /object/"


def go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder that holds nothing; nobody waits before trying again."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: None)


def family_of(delta_file: Path) -> dict[str, bytes]:
    """A run's files: deltas of 110 (the last and the best), 50 and 25 entries, and its records."""
    whole = dk.load(delta_file)
    small = {f"budget-{n}.sdelta": encode(dk.truncate(whole, n)) for n in (50, 25)}
    data = delta_file.read_bytes()
    records = {"config.yaml": b"method: id3\n", "metrics.json": b"{}\n", "README.md": b"# news\n"}
    return {"delta.sdelta": data, "best.sdelta": data, **small, **records}


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deltakit ARGUMENTS`, in this process."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def here() -> list[str]:
    """Everything in the working directory."""
    return sorted(p.relative_to(".").as_posix() for p in Path().rglob("*"))


def blobs() -> list[Path]:
    """Whole files that the cache holds."""
    return [p for p in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if p.is_file()]
