"""`dk.train` and `dk.evaluate` do what the commands do, with settings by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_lab import deltakit, metrics, train_flags

import deltakit as dk
from deltakit.errors import ConfigError

SETTINGS = {"task": "sequence-classification", "budget": 300, "epochs": 2, "lr": 0.05}


def trained(model: Path, data: Path, run: Path, **more: Any) -> Any:
    return dk.train(model=model, data=data, output_dir=run, **{**SETTINGS, **more})


def test_a_function_and_a_command_train_the_same_delta(
    tmp_path: Path, bert: Path, colours: Path
) -> None:
    record = trained(bert, colours, tmp_path / "a", logging_steps=4)
    assert deltakit("train", *train_flags(bert, colours, tmp_path / "b")).exit_code == 0
    files = [(tmp_path / run / "delta.sdelta").read_bytes() for run in "ab"]
    assert files[0] == files[1]
    assert record == metrics(tmp_path / "a")
    assert record["final"]["metrics"] == metrics(tmp_path / "b")["final"]["metrics"]


def test_settings_overrule_those_of_a_file(tmp_path: Path, bert: Path, colours: Path) -> None:
    trained(bert, colours, tmp_path / "a", max_steps=2)
    record = dk.train(tmp_path / "a" / "config.yaml", output_dir=tmp_path / "b", budget=200)
    assert (record["steps"], record["budget"]["resolved"]) == (2, 200)
    assert dk.load(tmp_path / "b" / "delta.sdelta").nnz == 200


def test_a_delta_in_memory_is_measured_as_its_file_is(
    tmp_path: Path, bert: Path, colours: Path
) -> None:
    record = trained(bert, colours, tmp_path / "run")
    path = tmp_path / "run" / "delta.sdelta"
    told = {"data": colours, "task": "sequence-classification", "split": "validation"}
    found = [
        dk.evaluate(bert, given, **told, predictions=tmp_path / f"{number}.jsonl")
        for number, given in enumerate([path, [path], dk.load(path)])
    ]
    assert [each.pop("deltas") for each in found] == [[str(path)], [str(path)], ["delta 0"]]
    assert found[0] == found[1] == found[2]
    assert found[0]["metrics"] == pytest.approx(record["final"]["metrics"])
    assert found[0]["entries"] == 300


def test_unknown_settings_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train: unknown setting 'buget'; nearest: budget"):
        dk.train(model=tmp_path, buget=3)
    with pytest.raises(ConfigError, match=r"^evaluate: unknown setting 'budget'; known: model, "):
        dk.evaluate(tmp_path, budget=3)
    with pytest.raises(ConfigError, match=r"^setting data is missing"):
        dk.evaluate(tmp_path)


@pytest.mark.parametrize(
    ("sent", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_an_interrupted_run_is_saved_and_goes_on(
    tmp_path: Path, bert: Path, colours: Path, sent: signal.Signals, raised: type[BaseException]
) -> None:
    whole = trained(bert, colours, tmp_path / "whole", max_steps=6)
    passes = 0

    def interrupt(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            os.kill(os.getpid(), sent)

    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: interrupt() if type(module).__name__ == "BertModel" else None
    )
    try:
        with pytest.raises(raised) as stopped:
            trained(bert, colours, tmp_path / "run", max_steps=6)
    finally:
        handle.remove()
    if sent == signal.SIGTERM:
        assert stopped.value.args == (128 + signal.SIGTERM,)
    record = dk.train(tmp_path / "run" / "config.yaml", resume=True)
    assert record["final"]["metrics"] == whole["final"]["metrics"]
    files = [(tmp_path / run / "delta.sdelta").read_bytes() for run in ("whole", "run")]
    assert files[0] == files[1]
