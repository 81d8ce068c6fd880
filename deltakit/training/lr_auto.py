"""The learning-rate sweep of a `SparseTrainer`: on its own data, loss, method and options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from deltakit.selection.fixed import Unresolved
from deltakit.selection.methods import Method
from deltakit.training.calibration import TrainerCalibration
from deltakit.training.lr_search import LrSearch, find_lr

if TYPE_CHECKING:
    from deltakit.training.trainer import SparseTrainer
    from deltakit.training.tuner import SparseTuner


def search_rate(trainer: SparseTrainer, **options: Any) -> LrSearch:
    """`find_lr` for the run that the trainer is about to make; its data order stays untouched.

    A method whose support grows runs whole within each trial: its steps are shortened with it.
    """
    total = planned_steps(trainer)

    def make_tuner(rate: float, steps: int) -> SparseTuner:
        method = compressed(trainer.method, steps / total)
        return trainer.make_tuner(rate, steps, method=method)

    return find_lr(
        make_tuner,
        TrainerCalibration(trainer),
        total_steps=total,
        accumulation_steps=trainer.args.gradient_accumulation_steps,
        **options,
    )


def planned_steps(trainer: SparseTrainer) -> int:
    """The optimizer steps of the trainer's run, counted as the Trainer does."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    dataset: Any = trainer.train_dataset
    size: int = args.train_batch_size * args.world_size
    batches = ceil(len(dataset) / size)
    if args.dataloader_drop_last:
        batches = len(dataset) // size
    epoch = max(1, ceil(batches / args.gradient_accumulation_steps))
    return ceil(args.num_train_epochs * epoch)


def compressed(method: Method | Unresolved, share: float) -> Method | Unresolved:
    """The method in a run of `share` of the steps, where it counts any; a fixed one is unchanged.

    A schedule that lists counts per step is kept as it is.
    """
    schedule = getattr(method, "schedule", None)
    listed = isinstance(schedule, Sequence) and not isinstance(schedule, str)
    if listed or not is_dataclass(method):
        return method
    counted = {
        field.name: max(1, round(getattr(method, field.name) * share))
        for field in fields(method)
        if field.name in ("steps", "every") and getattr(method, field.name) is not None
    }
    return replace(method, **counted)
