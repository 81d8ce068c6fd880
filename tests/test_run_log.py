"""What a run records of itself while it trains, and that nothing of it is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from train_lab import deltakit, metrics, train_flags

import deltakit.training.build as deltakit_build
from deltakit.errors import DataError, MissingFileError
from deltakit.formats.sdelta import load
from deltakit.run_record import RunRecord, read_log, thinned

MARKED = {"checkpoint_budgets": "100", "unmask_fraction": 0.5}
_CLOCKS = ("seconds", "runtime", "per_second", "bytes", "preparation_time")


def _losses(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(run / "log.jsonl") if "loss" in record]


def _told(run: Path) -> list[dict[str, Any]]:
    """All that the log tells but costs, without the Trainer's summary of a session."""
    records = [record for record in read_log(run / "log.jsonl") if "train_loss" not in record]
    return [{k: v for k, v in r.items() if not k.endswith(_CLOCKS)} for r in records]


@pytest.fixture(scope="module")
def run(bert: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 14 steps, which 4 does not divide."""
    folder = tmp_path_factory.mktemp("out") / "run"
    flags = train_flags(bert, colours, folder, save_steps=5, **MARKED)
    assert deltakit("train", *flags, "--quiet").exit_code == 0
    return folder


def test_every_step_is_in_one_record(run: Path) -> None:
    """The loss is logged every 4 steps, before evaluations (7) and checkpoints (5, 10), and at the
    end; entries never leave, and time goes on."""
    records = _losses(run)
    assert [record["step"] for record in records] == [4, 5, 7, 8, 10, 12, 14]
    for record in records:
        assert record["examples_per_second"] > 0
        assert record["tokens_per_second"] > record["examples_per_second"]
        assert 0 < record["resident_bytes"] <= record["peak_resident_bytes"]
        assert {"learning_rate", "grad_norm", "epoch"} <= set(record)
    assert records[-1]["entries"] == 300
    for before, after in pairwise(read_log(run / "log.jsonl")):
        assert before["entries"] <= after["entries"]
        assert before["seconds"] <= after["seconds"]


def test_start_of_a_run(run: Path) -> None:
    """run.json says what was known when training began."""
    told = json.loads((run / "run.json").read_text())
    results = metrics(run)
    assert told["max_steps"] == 14
    assert told["budget"]["resolved"] == 300 and told["budget"]["marks"] == [100]
    assert told["metrics"] == list(results["final"]["metrics"])
    assert told["environment"]["versions"] == results["versions"]
    assert [session["step"] for session in told["sessions"]] == [0]


def test_a_killed_run_resumes_to_a_whole_log(bert: Path, colours: Path, tmp_path: Path) -> None:
    """SIGKILL between checkpoints and a torn last line: what was taken again is logged once."""
    more = {"threads": 1, "max_steps": 60, "save_steps": 10, "logging_steps": 3, "epochs": 9}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    command = [sys.executable, "-m", "deltakit.cli", "train", "--quiet"]
    log = broken / "log.jsonl"
    process = subprocess.Popen(
        [*command, *train_flags(bert, colours, broken, **more)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (log.exists() and read_log(log)[-1:] and read_log(log)[-1]["step"] > 12):
        assert process.poll() is None, "ended before it could be killed"
    process.kill()
    process.wait()
    with log.open("a") as stream:
        stream.write('{"loss": 0.12, "st')
    assert RunRecord.read(broken).step > 12
    threads = torch.get_num_threads()
    try:
        result = deltakit("train", broken / "config.yaml", "--resume", "--quiet")
        assert result.exit_code == 0, result.output
        assert deltakit("train", *train_flags(bert, colours, straight, **more), "-q").exit_code == 0
    finally:
        torch.set_num_threads(threads)
    assert _told(broken) == _told(straight)
    assert (broken / "delta.sdelta").read_bytes() == (straight / "delta.sdelta").read_bytes()
    seconds = [record["seconds"] for record in read_log(log)]
    assert seconds == sorted(seconds)
    sessions = json.loads((broken / "run.json").read_text())["sessions"]
    assert [session["step"] % 10 for session in sessions] == [0, 0]
    assert sessions[1]["step"] > 0


def test_what_is_logged_changes_no_bit(
    run: Path, bert: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long runs have their loss logged at longer intervals; the delta is the same."""
    monkeypatch.setattr(deltakit_build, "LINES", 2)
    flags = train_flags(bert, colours, tmp_path / "run", logging_steps=1, **MARKED)
    assert deltakit("train", *flags, "--quiet").exit_code == 0
    assert [record["step"] for record in _losses(tmp_path / "run")] == [7, 14]
    one, two = load(run / "delta.sdelta"), load(tmp_path / "run" / "delta.sdelta")
    for name, tensor in one.tensors.items():
        assert (tensor.indices == two.tensors[name].indices).all()
        assert tensor.values.tobytes() == two.tensors[name].values.tobytes()


def test_damaged_logs_are_told_apart_from_torn_ones(tmp_path: Path) -> None:
    """Only a last line may be broken."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"loss": 1.0, "step": 1}\n{"loss": 0.5, "st')
    assert read_log(log) == [{"loss": 1.0, "step": 1}]
    log.write_text('{"loss": 1.0}\n{"loss": 0.5, "step": 2}\n')
    with pytest.raises(DataError, match=r"log\.jsonl line 1 is no record of a step"):
        read_log(log)
    with pytest.raises(MissingFileError, match="holds no run"):
        RunRecord.read(tmp_path)


@pytest.mark.parametrize("count", [0, 1, 7, 10, 11, 1000])
def test_thinned_curves_keep_mean_and_end(count: int) -> None:
    """At most ten points; the mean of equally many neighbours each, the last step kept."""
    steps, values = list(range(1, count + 1)), [float(n % 13) for n in range(count)]
    told_steps, told = thinned(steps, values, 10)
    assert len(told_steps) == len(told) <= 10
    assert told_steps[-1:] == steps[-1:]
    size = -(-count // 10) or 1
    assert told == [
        sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, count, size)
    ]
