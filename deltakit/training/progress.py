"""How far a run is, on stderr: a live display on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltakit.training.watch import metrics_of

if TYPE_CHECKING:
    from deltakit.training.trainer import SparseTrainer

_SECONDS, _PART = 10.0, 0.05  # between lines about the loss: so long, or such a part of all steps
_REDRAW = 0.1  # seconds between two states of the live display


@contextmanager
def showing(trainer: SparseTrainer, metric: str, *, quiet: bool) -> Iterator[None]:
    """Show a trainer's progress meanwhile, and leave the terminal as it was, whatever happens.

    metric: the one that the live display keeps in sight. quiet: show nothing.
    """
    if quiet:
        yield
        return
    live = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    progress = LiveProgress(trainer, metric) if live else PlainProgress(trainer)
    trainer.add_callback(progress)
    try:
        yield
    finally:
        progress.close()
        trainer.remove_callback(progress)


class PlainProgress(TrainerCallback):
    """Lines for logs: every evaluation, and the loss from time to time. No control characters."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self.trainer = trainer
        self._began = self._told = time.monotonic()
        self._first = self._last = 0
        self.rate: float | None = None  # examples per second

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began = self._told = time.monotonic()
        self._first = self._last = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what was measured."""
        record = state.log_history[-1]
        metrics = metrics_of(record)
        if metrics:
            at = f"budget {record['budget_entries']:,.0f} " if "budget_entries" in record else ""
            self.tell(self._line(state, f"{at}evaluated: {_shown(metrics)}"))
        elif "loss" in record:
            self.rate = record.get("examples_per_second", self.rate)
            if self._due(state):
                self._told, self._last = time.monotonic(), state.global_step
                said = f"loss {record['loss']:.4g}  lr {record['learning_rate']:.2g}"
                self.tell(self._line(state, said, *self._pace(state)))

    def tell(self, line: str) -> None:
        """Print one line."""
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left to be taken away."""

    def _due(self, state: TrainerState) -> bool:
        steps, seconds = state.global_step - self._last, time.monotonic() - self._told
        return seconds >= _SECONDS or steps >= _PART * state.max_steps

    def _line(self, state: TrainerState, *said: str) -> str:
        where = f"{_clock(self._elapsed):>6}  step {state.global_step}/{state.max_steps}"
        return "  ".join([where, *said[:1], self._entries(), *said[1:]])

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _entries(self) -> str:
        tuner = self.trainer.tuner
        return f"entries {tuner.unmasked:,}/{tuner.budget:,}"

    def _pace(self, state: TrainerState) -> list[str]:
        """Throughput and the time left, as far as they are known."""
        done = state.global_step - self._first
        left = state.max_steps - state.global_step
        told = [] if self.rate is None else [f"{self.rate:,.4g} examples/s"]
        return [*told, f"{_clock(left * self._elapsed / done)} left"] if done and left else told


class LiveProgress(PlainProgress):
    """Two lines that follow every step in place, below a line for every evaluation."""

    def __init__(self, trainer: SparseTrainer, metric: str) -> None:
        super().__init__(trainer)
        self.metric = metric
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False
        )
        self._drawn = 0.0
        self._batches = 0  # evaluated since training last went on
        self._known: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the display."""
        super().on_train_begin(args, state, control, **kwargs)
        self._live.start()
        self._draw(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the step."""
        self._batches = 0
        self._draw(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show that an evaluation goes on."""
        self._batches += 1
        self._draw(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep loss and metric for the display; evaluations have a line that stays, too."""
        record = state.log_history[-1]
        if "loss" in record:
            self._known["loss"] = f"{record['loss']:.4g}"
            self.rate = record.get("examples_per_second", self.rate)
        elif self.metric in (metrics := metrics_of(record)):
            self._known[self.metric] = f"{metrics[self.metric]:.4f}"
        if "loss" not in record:
            super().on_log(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the display away."""
        self.close()

    def tell(self, line: str) -> None:
        """Print one line above the display."""
        self._console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        """Take the display away and give the cursor back."""
        self._live.stop()

    def _draw(self, state: TrainerState) -> None:
        now = time.monotonic()
        if self._live.is_started and now - self._drawn >= _REDRAW:
            self._drawn = now
            self._live.update(self._display(state), refresh=True)

    def _display(self, state: TrainerState) -> Group:
        steps = f"step {state.global_step}/{state.max_steps}"
        epoch = f"epoch {state.epoch or 0:.2f}/{state.num_train_epochs:g}"
        bar = ProgressBar(state.max_steps, state.global_step)
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, overflow="ellipsis")
        where = Text.assemble((steps, "bold"), f"  {epoch}  {_clock(self._elapsed)}")
        head.add_row(bar, where)
        known = [f"{name} {value}" for name, value in self._known.items()]
        evaluating = [f"evaluating, batch {self._batches}"] if self._batches else []
        said = "  ".join([*evaluating, *known, self._entries(), *self._pace(state)])
        return Group(head, Text(said, no_wrap=True, overflow="ellipsis"))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _shown(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
