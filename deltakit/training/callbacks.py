"""Callbacks of `SparseTrainer`: budget checkpoints, and stopping cleanly on a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from deltakit.training.trainer import SparseTrainer


class BudgetCheckpoints(TrainerCallback):
    """Writes and evaluates a delta at the step whose unmasking reaches a budget mark.

    Results go to the Trainer's log history, which its checkpoints keep, so resuming keeps them.
    """

    def __init__(self, trainer: SparseTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look whether a mark has just been reached."""
        trainer = self.trainer
        done = {row["budget"] for row in trainer.budget_results}
        for mark in trainer.checkpoint_budgets:
            if mark == trainer.tuner.unmasked and mark < trainer.tuner.budget and mark not in done:
                trainer.write_delta(trainer.budget_path(mark))
                trainer.log({"budget_entries": float(mark), **self._evaluate()})

    def _evaluate(self) -> dict[str, float]:
        trainer = self.trainer
        if trainer.eval_dataset is None:
            return {}
        output = trainer.evaluation_loop(
            trainer.get_eval_dataloader(), description="Budget", metric_key_prefix="budget"
        )
        return output.metrics or {}


class StopOnSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, when a signal has come."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self.trainer = trainer

    @contextmanager
    def listening(self, signals: Sequence[signal.Signals]) -> Iterator[None]:
        """Take note of signals while training; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.signal(number, self._note) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the other processes of the run know by this step's exchange."""
        if (averaging := self.trainer.tuner.engine.averaging) is not None:
            averaging.wants_stop = self.trainer.interrupted is not None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer to save and stop; several processes do so after the same step."""
        averaging = self.trainer.tuner.engine.averaging
        if averaging and averaging.stopping and self.trainer.interrupted is None:
            self.trainer.interrupted = signal.SIGTERM  # another process got one
        agreed = averaging is None or averaging.stopping
        if self.trainer.interrupted is not None and agreed:
            control.should_save = control.should_training_stop = True
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self.trainer.interrupted_checkpoint = folder

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.trainer.interrupted is not None:
            raise KeyboardInterrupt
        self.trainer.interrupted = number
