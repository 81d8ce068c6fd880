"""The README's tour works as it stands: its commands and its Python, in order, in one folder."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(
    r"^```(bash|python)\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_the_tour_runs(tmp_path: Path) -> None:
    commands = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    assert len(commands) >= 9
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "deltakit", line
        run = subprocess.run(
            [sys.executable, "-m", "deltakit", *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, f"{line}\n{run.stderr}"
    live = (tmp_path / "live.jsonl").read_text()
    assert live == (tmp_path / "merged.jsonl").read_text()
    assert (tmp_path / "run" / "budget-5000.sdelta").exists()


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, text in BLOCKS:
        if kind == "python":
            (tmp_path / "tour.py").write_text(text)
            runpy.run_path(str(tmp_path / "tour.py"))
    assert (tmp_path / "python.sdelta").exists()
