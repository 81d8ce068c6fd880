"""`report_to`: the Trainer's own trackers, fed with all that the log tells."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from train_lab import deltakit, train_flags

from deltakit.errors import ConfigError
from deltakit.training.config_file import resolve
from deltakit.training.reporting import check_trackers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own imports
def test_tensorboard_holds_what_the_log_tells(bert: Path, colours: Path, tmp_path: Path) -> None:
    """Every loss record, number by number (float32), in RUN/tensorboard, which --force clears."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = train_flags(bert, colours, tmp_path / "run", max_steps=6, logging_steps=2)
    for again in ([], ["--force"]):
        result = deltakit("train", *flags, "--report-to", "tensorboard", "--quiet", *again)
        assert result.exit_code == 0, result.output
        events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        events.Reload()
        lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if "loss" in record]
        assert len(records) == 3
        for key in ("loss", "learning_rate", "entries", "tokens_per_second", "resident_bytes"):
            told = events.Scalars(f"train/{key}")
            assert {event.step for event in told} == {2, 4, 6}
            values = {event.step: event.value for event in told}
            assert [values[r["step"]] for r in records] == pytest.approx([r[key] for r in records])
        assert "eval/accuracy" in events.Tags()["scalars"]
    assert not (tmp_path / "run" / "runs").exists()


def test_unknown_and_missing_trackers(tmp_path: Path) -> None:
    """One line each, before anything is read."""
    given = {"model": "m", "data": "d", "task": "causal-lm", "budget": 1, "output_dir": tmp_path}
    with pytest.raises(ConfigError, match=r"report_to: .*tensorbord|did you mean tensorboard"):
        resolve({}, {**given, "report_to": "tensorbord", "output_dir": str(tmp_path)})
    assert find_spec("dvclive") is None
    with pytest.raises(ConfigError, match="report_to dvclive needs the package dvclive, which"):
        check_trackers(["dvclive"])
    check_trackers([])
