"""The best delta of a run so far, told from the metrics in the Trainer's log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
            self.trainer.write_delta(self.path)
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
