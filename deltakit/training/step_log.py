"""RUN/log.jsonl: what was measured at which step, kept through interruptions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltakit.formats.atomic import write_bytes
from deltakit.training.watch import finite

LINES = 10_000  # at most as many steps of a run are logged for their loss, evenly spaced


class StepLog(TrainerCallback):
    """One JSON object per line: the Trainer's records with their steps.

    A record of the loss stands for all steps since the one before it. Every checkpoint, evaluation
    and end of a run has one, so that nothing is lost where a run is resumed. The Trainer's
    checkpoints keep the records: a resumed run starts the file with those, atomically, and lines of
    steps that will be taken again are gone. A process that is killed may leave a torn last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file with what a resumed run already logged, and nothing later."""
        if state.is_world_process_zero:
            write_bytes(self.path, "".join(map(_line, state.log_history)).encode())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the loss logged before whatever a resumed run might start from."""
        if control.should_save or control.should_evaluate or control.should_training_stop:
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append the newest record."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(_line(state.log_history[-1]))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(finite(record)) + "\n"
