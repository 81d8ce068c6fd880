"""Interrupted runs of `deltakit train` go on to the same bits."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_lab import deltakit, metrics, train_flags


def _start(arguments: list[str], until: str) -> subprocess.Popen[str]:
    """Run deltakit in a process of its own until a line of its stderr matches."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deltakit.cli", "train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if re.search(until, line):
            return process
    pytest.fail(f"ended before {until!r}: {seen}")


def test_interrupted_run_resumes_to_the_same_bits(
    bert: Path, colours: Path, tmp_path: Path
) -> None:
    """Stopped by SIGTERM, set back to an earlier checkpoint as if killed, and resumed."""
    more = {
        "threads": 1,
        "max_steps": 80,
        "save_steps": 7,  # at the end of every epoch, where the run is evaluated
        "logging_steps": 1,
        "checkpoint_budgets": "100,200",
        "unmask_fraction": 0.9,
        "gradient_accumulation": 2,
        "batch_size": 8,
    }
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    again = [str(broken / "config.yaml"), "--resume"]
    threads = torch.get_num_threads()
    try:
        assert deltakit("train", *train_flags(bert, colours, straight, **more)).exit_code == 0
        process = _start(train_flags(bert, colours, broken, **more), r"step 1[2-9]/80")
        process.terminate()
        _, rest = process.communicate()
        assert process.returncode == 128 + signal.SIGTERM
        assert re.search(r"Interrupted and saved at step \d+; deltakit train \S+ --resume", rest)
        assert not (broken / "metrics.json").exists()
        result = deltakit("train", *train_flags(bert, colours, broken, **more))
        assert "--resume to go on" in result.stderr
        result = deltakit("train", *again, "--lr", 0.1)
        assert "setting lr was 0.05 when the run started and is 0.1 now" in result.stderr
        newest = max(broken.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        shutil.rmtree(newest)
        half = broken / "checkpoint-70"  # what a kill while it was saved left
        half.mkdir()
        (half / "optimizer.pt").write_bytes(b"half")
        result = deltakit("train", *again)
        assert result.exit_code == 0, result.output
        assert not list(broken.glob("checkpoint-*"))
    finally:
        torch.set_num_threads(threads)
    for name in ("delta.sdelta", "best.sdelta", "budget-100.sdelta", "budget-200.sdelta"):
        assert (broken / name).read_bytes() == (straight / name).read_bytes(), name
    one, two = metrics(straight), metrics(broken)
    assert [m["metrics"] for m in one["marks"]] == [m["metrics"] for m in two["marks"]]
    assert one["final"]["metrics"] == two["final"]["metrics"]
    assert one["best"]["step"] == two["best"]["step"]
    assert _logged(straight) == _logged(broken)


def _logged(run: Path) -> list[dict[str, Any]]:
    """All that the log tells but times."""
    lines = (run / "log.jsonl").read_text().splitlines()
    clocks = ("runtime", "seconds", "per_second", "bytes", "preparation_time")
    records = [json.loads(line) for line in lines]
    told = [{k: v for k, v in r.items() if not k.endswith(clocks)} for r in records]
    return [record for record in told if "train_loss" not in record]


def test_resume_without_a_run(bert: Path, colours: Path, tmp_path: Path) -> None:
    """There is nothing to go on with."""
    result = deltakit("train", *train_flags(bert, colours, tmp_path / "none"), "--resume")
    assert result.exit_code == 1
    assert "holds no run to resume; leave out --resume" in result.stderr
