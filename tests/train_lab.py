"""Runs of `deltakit train` on tiny models, for the tests of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from deltakit.cli.main import main

ROWS = 120  # of the fixture `colours`


def deltakit(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def train_flags(model: Path, data: Path, run: Path, /, **more: Any) -> list[str]:
    settings = {
        "model": model,
        "data": data,
        "task": "sequence-classification",
        "budget": 300,
        "epochs": 2,
        "lr": 0.05,
        "logging_steps": 4,
        "output_dir": run,
        **more,
    }
    return [str(p) for k, v in settings.items() for p in (f"--{k.replace('_', '-')}", v)]


def metrics(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return content


def evaluated(predictions: Path, *arguments: Any) -> dict[str, Any]:
    result = deltakit("evaluate", *arguments, "--predictions", predictions, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content
