"""Mistakes in calls of `deltakit train` and `deltakit evaluate`, told in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_bert
from train_lab import deltakit, train_flags

import deltakit as dk


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "gone.jsonl"}, "data gone.jsonl does not exist"),
        ({"text_column": "body"}, "has no column 'body'; found text, label"),
        ({"num_labels": 2}, "3 different labels, the model 2"),
        ({"validation_fraction": 0}, "has no validation data and validation_fraction is 0"),
        ({"train_split": "training"}, "has no split 'training'; found train"),
        ({"metric": "acuracy"}, "'acuracy' is no metric of this task; expected one of accuracy"),
        ({"init_delta": "gone.sdelta"}, "gone.sdelta"),
        ({"checkpoint_budgets": "1m"}, "must lie between 1 and the budget"),
        ({"target": "*.nothing"}, "target pattern '*.nothing' matches no tensor"),
    ],
)
def test_mistakes_are_one_line(
    change: dict[str, Any], message: str, bert: Path, colours: Path, tmp_path: Path
) -> None:
    """Exit code 1, no traceback, and nothing written."""
    result = deltakit("train", *train_flags(bert, colours, tmp_path / "run", **change), "--quiet")
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.sdelta"))


def test_data_mistakes_come_before_the_model(colours: Path, tmp_path: Path) -> None:
    """The model's weights are not even there."""
    model = write_bert(tmp_path / "model")
    (model / "model.safetensors").unlink()
    result = deltakit("train", *train_flags(model, colours, tmp_path / "run", label_column="y"))
    assert "has no column 'y'; found text, label" in result.stderr


def test_wrong_flags_are_wrong_usage() -> None:
    """Exit code 2, with the setting's own words."""
    result = deltakit("train", "--lr", "fast")
    assert result.exit_code == 2
    assert "setting lr: expected a number; found 'fast'" in result.stderr


def test_evaluating_a_base_without_a_head(bert: Path, colours: Path) -> None:
    """Only a delta can bring one."""
    result = deltakit(
        "evaluate", "--model", bert, "--data", colours, "--task", "sequence-classification"
    )
    assert result.exit_code == 1
    assert "has no classification head; give the delta that brings one" in result.stderr


def test_help_names_every_setting() -> None:
    """Without importing torch."""
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom deltakit.cli.main import main\n"
        "print(CliRunner().invoke(main, ['train', '--help']).output)\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for flag in ("--checkpoint-budgets", "--init-delta", "--early-stopping-patience", "--resume"):
        assert flag in done.stdout
    assert dk.__version__
