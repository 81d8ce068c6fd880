"""The commands and the Python of docs/adapters.md work as they stand, in order, in one folder."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from train_lab import deltakit

PAGE = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert deltakit("demo", "--files-only", "-o", "demo").exit_code == 0
    for kind, text in BLOCKS:
        if kind == "python":
            (tmp_path / "page.py").write_text(text)
            assert runpy.run_path(str(tmp_path / "page.py"))["delta"].nnz == 500
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "deltakit"
            result = deltakit(*arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"
    assert (tmp_path / "lora-peft" / "adapter_model.safetensors").exists()
    assert (tmp_path / "lora-merged" / "config.json").exists()
