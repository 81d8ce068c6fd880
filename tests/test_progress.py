"""What `deltakit train` shows while it trains: plain lines in logs, a live display on terminals."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from train_lab import deltakit, train_flags
from transformers import TrainerCallback

from deltakit.formats.checkpoint import Checkpoint
from deltakit.run_record import read_log
from deltakit.training import progress
from deltakit.training.build import Plan, Subject, build_trainer
from deltakit.training.config_file import resolve
from deltakit.training.folder import RunFolder
from deltakit.training.prepare import prepare
from deltakit.training.progress import showing
from deltakit.training.trainer import SparseTrainer

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-8]|4[0-8]|9[0-7])[0-9;]*m")


def _trainer(bert: Path, colours: Path, folder: Path, **more: Any) -> SparseTrainer:
    settings = {"model": bert, "data": colours, "output_dir": folder}
    config = resolve(
        {},
        {
            **{name: str(path) for name, path in settings.items()},
            "task": "sequence-classification",
            "budget": 300,
            "max_steps": 12,
            **more,
        },
    )
    prepared, base = prepare(config, lambda text: None), Checkpoint(bert)
    subject = Subject(config, prepared, base)
    folder.mkdir()
    return build_trainer(subject, Plan.of(config, base.total_weights), RunFolder(folder))


@contextmanager
def _terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[list[str]]:
    """stderr is a terminal meanwhile; gives what it was sent, complete afterwards."""
    master, slave = pty.openpty()
    seen: list[str] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # Linux says so when the other end is closed
                return
            if not chunk:
                return
            seen.append(chunk.decode())

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, open(slave, "w") as stream:  # noqa: PTH123
        patch.setenv("COLUMNS", str(columns))  # rich asks the process's own streams otherwise
        patch.setenv("TERM", "xterm-256color")
        patch.setattr(sys, "stderr", stream)
        yield seen
    reader.join()
    os.close(master)


class _Interrupted(TrainerCallback):
    """What a second Ctrl-C raises, in the middle of a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("columns", [40, 120])
def test_live_display_and_the_terminal_after_it(
    columns: int,
    bert: Path,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps, entries and evaluations are shown; the cursor is back at the end, and nothing of the
    display is wider than the terminal."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(progress, "_REDRAW", 0.0)  # or steps that follow fast are left out
    trainer = _trainer(bert, colours, tmp_path / "run", eval_strategy="steps", eval_steps=6)
    with _terminal(monkeypatch, columns) as seen:
        with showing(trainer, "accuracy", quiet=False):
            trainer.train()
        sys.stderr.write("after")
    shown = "".join(seen)
    assert shown.count(HIDE) == shown.count(SHOW) == 1
    assert shown.index(HIDE) < shown.index("step 1/12") < shown.rindex(SHOW)
    assert shown.endswith("after")
    assert "entries " in shown
    assert shown.count("  evaluated: ") == 2
    assert not COLOUR.search(shown)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    display = [line for line in re.split(r"[\r\n]+", plain) if "evaluated:" not in line]
    assert max(map(len, display)) <= columns


def test_interrupted_display_gives_the_cursor_back(
    bert: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends training, stderr is itself again."""
    trainer = _trainer(bert, colours, tmp_path / "run", eval_strategy="no")
    trainer.add_callback(_Interrupted())
    with _terminal(monkeypatch, 80) as seen:
        stream = sys.stderr
        with pytest.raises(KeyboardInterrupt), showing(trainer, "accuracy", quiet=False):
            trainer.train()
        assert sys.stderr is stream
    shown = "".join(seen)
    assert shown.rindex(SHOW) > shown.rindex(HIDE)


def test_dumb_terminals_get_lines(
    bert: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TERM=dumb cannot move its cursor; -q says nothing even on a good one."""
    trainer = _trainer(bert, colours, tmp_path / "run", eval_strategy="no", max_steps=4)
    with _terminal(monkeypatch, 80) as seen:
        monkeypatch.setenv("TERM", "dumb")
        with showing(trainer, "accuracy", quiet=False):
            trainer.train()
    assert "step 4/4" in "".join(seen) and "\x1b" not in "".join(seen)
    with _terminal(monkeypatch, 80) as seen, showing(trainer, "accuracy", quiet=True):
        pass
    assert seen == []


def test_logs_get_few_plain_lines(bert: Path, colours: Path, tmp_path: Path) -> None:
    """At most one line about the loss per twentieth of the steps or ten seconds, and every
    evaluation; stdout holds the results alone."""
    more = {"max_steps": 80, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 40}
    flags = train_flags(bert, colours, tmp_path / "run", **more)
    result = deltakit("train", *flags, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("{") and result.stdout.endswith("}\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", result.stderr)
    losses = [line for line in result.stderr.splitlines() if "  loss " in line]
    seconds = read_log(tmp_path / "run" / "log.jsonl")[-1]["seconds"]
    assert 20 <= len(losses) <= 20 + seconds / 10
    assert re.search(
        r"step 76/80  loss \S+  lr \S+  entries 300/300  .*examples/s  \d+:\d\d left", result.stderr
    )
    assert result.stderr.count("  evaluated: ") == 2
