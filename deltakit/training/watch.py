"""What happens around a run's steps: progress on stderr, the log file, the best delta so far."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltakit.formats.atomic import write_bytes
from deltakit.formats.sdelta import save

if TYPE_CHECKING:
    from deltakit.training.trainer import SparseTrainer

_PREFIXES = ("eval_", "budget_")  # periodic evaluations, and those at budget marks
_CLOCKS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "entries")


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in one record of the Trainer's log, without prefix; empty for other records."""
    plain = {
        key.removeprefix(prefix): float(value)
        for prefix in _PREFIXES
        for key, value in record.items()
        if key.startswith(prefix)
    }
    return {key: value for key, value in plain.items() if key not in _CLOCKS}


def finite(value: Any) -> Any:
    """The value with every non-finite number replaced by None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class BestDelta(TrainerCallback):
    """Writes the delta of every evaluation that beats all before it; stops when none does.

    Everything is told from the Trainer's log, which its checkpoints keep, so resuming gives the
    same best delta. Ties stay with the earlier, smaller delta.
    """

    def __init__(
        self,
        trainer: SparseTrainer,
        metric: str,
        path: Path,
        *,
        greater: bool,
        patience: int | None = None,
    ) -> None:
        self.trainer, self.metric, self.path = trainer, metric, path
        self.greater, self.patience = greater, patience

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what was just logged."""
        if not state.log_history or self.metric not in metrics_of(state.log_history[-1]):
            return
        best = self.best()
        if best is state.log_history[-1]:
            save(self.trainer.delta(), self.path)
        elif self.patience is not None and self.evaluations_since(best) >= self.patience:
            control.should_training_stop = True

    def best(self) -> dict[str, Any] | None:
        """The record of the best evaluation so far; None before the first."""
        evaluations = self._evaluations()
        if not evaluations:
            return None
        return max(evaluations, key=self._quality)  # the first of equals

    def evaluations_since(self, record: dict[str, Any] | None) -> int:
        """Evaluations after the given record."""
        evaluations = self._evaluations()
        return len(evaluations) - 1 - next(i for i, r in enumerate(evaluations) if r is record)

    def _evaluations(self) -> list[dict[str, Any]]:
        return [r for r in self.trainer.state.log_history if self.metric in metrics_of(r)]

    def _quality(self, record: dict[str, Any]) -> float:
        value = metrics_of(record)[self.metric]
        if math.isnan(value):
            return -math.inf
        return value if self.greater else -value


class LogFile(TrainerCallback):
    """RUN/log.jsonl: one JSON object per line, the Trainer's records with their steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file with what a resumed run already logged, and nothing later."""
        write_bytes(self.path, "".join(map(_line, state.log_history)).encode())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append the newest record."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(state.log_history[-1]))


class Progress(TrainerCallback):
    """One line on stderr per log record; on a terminal also a line that follows every step."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self.trainer = trainer
        self.started = time.monotonic()
        self.live = sys.stderr.isatty()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """On a terminal, show the step in place."""
        if self.live:
            sys.stderr.write(f"\r\x1b[K{self._where(state)}  {self._entries()}")
            sys.stderr.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the line that followed the steps away."""
        if self.live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what was measured."""
        record = state.log_history[-1]
        metrics = metrics_of(record)
        if metrics:
            at = f"budget {record['budget_entries']:,.0f} " if "budget_entries" in record else ""
            said = f"{at}evaluated: {_shown(metrics)}"
        elif "loss" in record:
            said = f"loss {record['loss']:.4g}  lr {record['learning_rate']:.2g}"
        else:
            return
        clear = "\r\x1b[K" if self.live else ""
        print(f"{clear}{self._where(state)}  {said}  {self._entries()}", file=sys.stderr)

    def _where(self, state: TrainerState) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes:3d}:{seconds:02d}  step {state.global_step}/{state.max_steps}"

    def _entries(self) -> str:
        tuner = self.trainer.tuner
        return f"entries {tuner.unmasked:,}/{tuner.budget:,}"


def _shown(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(finite(record)) + "\n"
