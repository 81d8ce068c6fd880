"""`torchrun -m deltakit train`: what one process trains, written once; killed ranks and resuming."""

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

import numpy as np
import pytest
from train_lab import deltakit, metrics, train_flags

import deltakit as dk

SETTINGS: dict[str, Any] = {
    "dtype": "float64",
    "threads": 1,
    "max_steps": 12,  # within the first epoch: its last batch is not the same for two
    "batch_size": 8,
    "save_steps": 4,
    "logging_steps": 1,
    "checkpoint_budgets": "100",
    "unmask_fraction": 0.5,
    "eval_strategy": "budget",
    "exclude": "*key.bias",  # whose gradients are rounding noise and nothing else
}


def start(*arguments: str) -> subprocess.Popen[str]:
    """Two processes; they speak on the stderr of the one that starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, "-m", "deltakit", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(*arguments: str) -> str:
    """Run two processes to their end; what they print."""
    process = start(*arguments)
    told, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    return told


def signal_second(process: subprocess.Popen[str], number: signal.Signals, once: str) -> None:
    """Send a signal to rank 1 of a start once a line of its stderr matches."""
    assert process.stderr is not None
    assert any(re.search(once, line) for line in process.stderr)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [child for child in children if "RANK=1" in environment(int(child))]
    os.kill(int(second), number)


def environment(process: int) -> list[str]:
    return Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")


@pytest.fixture(scope="module")
def still(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder without dropout, which processes would draw otherwise."""
    folder = tmp_path_factory.mktemp("still") / "model"
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        config[name] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def two(still: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes from start to end."""
    run = tmp_path_factory.mktemp("two") / "run"
    told = finish(*train_flags(still, colours, run, **SETTINGS), "--json")
    assert json.loads(told)["final"]["entries"] == 300  # printed once, and nothing else
    return run


def assert_near(run: Path, other: Path) -> None:
    """The same supports, values and metrics but for the order of sums."""
    for name in ("budget-100.sdelta", "delta.sdelta"):
        mine, its = dk.load(run / name), dk.load(other / name)
        assert list(mine.tensors) == list(its.tensors)
        for tensor, expected in its.tensors.items():
            np.testing.assert_array_equal(mine.tensors[tensor].indices, expected.indices)
            np.testing.assert_allclose(
                mine.tensors[tensor].values, expected.values, rtol=1e-5, atol=1e-8
            )
        for extra, values in its.extras.items():
            np.testing.assert_allclose(mine.extras[extra], values, rtol=1e-5, atol=1e-8)
    assert metrics(run)["final"]["metrics"] == pytest.approx(metrics(other)["final"]["metrics"])


def test_two_processes_train_what_one_does(
    still: Path, colours: Path, two: Path, tmp_path: Path
) -> None:
    result = deltakit("train", *train_flags(still, colours, tmp_path / "run", **SETTINGS))
    assert result.exit_code == 0, result.output
    assert_near(two, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert sorted(path.name for path in two.iterdir()) == names
    assert logged(two) == logged(tmp_path / "run")


def logged(run: Path) -> list[int]:
    """The step of every record of the log."""
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_signal_to_one_rank_stops_all_after_one_step(
    still: Path, colours: Path, two: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(*train_flags(still, colours, run, **{**SETTINGS, "max_steps": 4000}))
    signal_second(process, signal.SIGTERM, once=r"step \d+/4000")
    _, rest = process.communicate(timeout=300)
    step = re.search(r"Interrupted and saved at step (\d+); deltakit train", rest)
    assert step is not None, rest
    saved = torch_state(run / f"checkpoint-{step[1]}")
    assert saved["step"] == int(step[1])


def torch_state(checkpoint: Path) -> dict[str, Any]:
    import torch

    state: dict[str, Any] = torch.load(checkpoint / "optimizer.pt", weights_only=True)["sparse"]
    return state


@pytest.fixture(scope="module")
def split(still: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that share the model by FSDP2."""
    run = tmp_path_factory.mktemp("split") / "run"
    finish(*train_flags(still, colours, run, **SETTINGS, sharding="fsdp"))
    return run


def test_two_processes_that_share_the_model_train_what_one_does(split: Path, two: Path) -> None:
    assert_near(split, two)
    assert logged(split) == logged(two)
    assert sorted(path.name for path in split.iterdir()) == sorted(p.name for p in two.iterdir())


@pytest.mark.parametrize("whole", ["two", "split"])
def test_a_killed_rank_costs_nothing_but_the_time_since_the_last_save(
    whole: str, still: Path, colours: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Another run of two gives the same bits; one process can go on in the place of two."""
    straight: Path = request.getfixturevalue(whole)
    run = tmp_path / "run"
    settings = {**SETTINGS, "save_steps": 1, "sharding": "fsdp" if whole == "split" else "none"}
    process = start(*train_flags(still, colours, run, **settings))
    signal_second(process, signal.SIGKILL, once=r"step [3-9]/12")
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (run / "metrics.json").exists()
    shutil.copytree(run, tmp_path / "alone")
    finish(str(run / "config.yaml"), "--resume")
    for name in ("delta.sdelta", "best.sdelta", "budget-100.sdelta"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name
    config = tmp_path / "alone" / "config.yaml"
    result = deltakit("train", config, "--resume", "--output-dir", tmp_path / "alone")
    assert result.exit_code == 0, result.output
    assert_near(tmp_path / "alone", straight)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("adapter", "lora"), ("quantize", "nf4"), ("hessian", "true"), ("lr", "auto")],
)
def test_what_needs_the_whole_model_does_not_share_it(
    setting: str, value: str, still: Path, colours: Path, tmp_path: Path
) -> None:
    flags = {**SETTINGS, "sharding": "fsdp", setting: value}
    result = deltakit("train", *train_flags(still, colours, tmp_path / "run", **flags))
    assert result.exit_code == 1
    assert f"sharding fsdp splits the model among processes, and {setting} " in result.stderr


def test_what_runs_alone_says_so(
    still: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = train_flags(still, colours, tmp_path / "run", **SETTINGS)
    del flags[flags.index("--lr") : flags.index("--lr") + 2]
    for call in (["lr-find"], ["train", "--compare", "id3"]):
        result = deltakit(*call, *flags)
        assert result.exit_code == 1
        assert "runs in one process, found 2; launch it without torchrun" in result.stderr


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltakit.errors import ConfigError
    from deltakit.parallel.processes import share_of

    monkeypatch.setenv("WORLD_SIZE", "3")
    assert share_of(12) == 4
    with pytest.raises(ConfigError, match="8 examples cannot be shared equally by 3 processes"):
        share_of(8)


@pytest.mark.parametrize(
    ("size", "line"),
    [
        ("many", "environment variable WORLD_SIZE: expected a whole number, found 'many'"),
        ("2", "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set; launch by torchrun"),
    ],
)
def test_half_an_environment_of_a_launcher_is_told(
    size: str,
    line: str,
    still: Path,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    result = deltakit("train", *train_flags(still, colours, tmp_path / "run", **SETTINGS))
    assert (result.exit_code, result.stderr.startswith(f"Error: {line}")) == (1, True)
    assert not (tmp_path / "run").exists()
