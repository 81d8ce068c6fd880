"""What training costs while it goes on: time, throughput and memory, told with every log record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltakit.training.memory import memory_in_use


class Meter(TrainerCallback):
    """Counts examples and tokens, and the time that training steps take.

    Evaluating, saving and logging stand outside the throughput, but inside `seconds`. It is made
    the first callback, so that nothing that others do at the end of a step counts as the step's.
    """

    def __init__(self) -> None:
        self._began = self._mark = time.monotonic()
        self._earlier = 0.0
        self._processes = 1
        self._tokens: int | torch.Tensor | None = None
        self._start_over()

    @property
    def seconds(self) -> float:
        """Since training began, without the time between an interruption and its resuming."""
        return self._earlier + time.monotonic() - self._began

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Take note of one batch, before its forward pass.

        inputs: tensors, each with one row per example; tokens are those of `attention_mask`, or
        all of `input_ids`. Nothing waits for the accelerator: sums stay where the batch is.
        """
        rows = next((v for v in inputs.values() if isinstance(v, torch.Tensor) and v.dim()), None)
        self._examples += 0 if rows is None else len(rows)
        if isinstance(inputs.get("input_ids"), torch.Tensor):
            mask = inputs.get("attention_mask")
            tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
            self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def reading(self) -> dict[str, float]:
        """Throughput since the last reading, and memory; keys without an answer are left out."""
        told: dict[str, float] = {}
        if self._busy > 0 and self._examples:
            busy = self._busy / self._processes
            told["examples_per_second"] = round(self._examples / busy, 2)
            if self._tokens is not None:
                told["tokens_per_second"] = round(int(self._tokens) / busy, 1)
        self._start_over()
        return {**told, **memory_in_use()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, for a resumed run where its last record left off."""
        known = (record["seconds"] for record in reversed(state.log_history) if "seconds" in record)
        self._earlier = next(known, 0.0)
        self._began = self._mark = time.monotonic()
        self._processes = args.world_size  # each counts its own share of a batch
        self._start_over()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The time since the last thing that happened was this step's."""
        now = time.monotonic()
        self._busy += now - self._mark
        self._mark = now

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The time until now was not a step's."""
        self._mark = time.monotonic()

    on_evaluate = on_save = on_log

    def _start_over(self) -> None:
        self._examples, self._busy = 0, 0.0
        self._tokens = None
