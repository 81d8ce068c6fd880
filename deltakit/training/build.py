"""From settings to a `SparseTrainer`: the one place where their names meet the Trainer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PrinterCallback, TrainingArguments

from deltakit import __version__
from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import load
from deltakit.live.coordinates import checkpoint_names
from deltakit.parallel.processes import count, share_of
from deltakit.selection.methods import Method
from deltakit.selection.recipe import make_method
from deltakit.targets.patterns import matching
from deltakit.training.collate import Collator, Examples
from deltakit.training.config import TrainConfig
from deltakit.training.config_method import METHOD_SETTINGS
from deltakit.training.folder import RunFolder
from deltakit.training.metrics import greater_is_better
from deltakit.training.prepare import Prepared
from deltakit.training.presets import PRESETS
from deltakit.training.pretrained import empty_model, load_model
from deltakit.training.reporting import keep_events_in
from deltakit.training.settings import parse_option
from deltakit.training.sharded_model import load_sharded
from deltakit.training.step_log import LINES, StepLog
from deltakit.training.task import Live
from deltakit.training.trainer import SparseTrainer
from deltakit.training.watch import BestDelta

if TYPE_CHECKING:
    from deltakit.adapters.attach import Attached

# Settings that a delta remembers, so that its making can be told and repeated.
_REMEMBERED = (
    *("task", "method", "preset", *METHOD_SETTINGS, "age", "masked"),
    *("lr", "head_lr", "optimizer", "optimizer_options", "weight_decay"),
    *("warmup", "scheduler", "epochs", "max_steps"),
    *("batch_size", "gradient_accumulation", "max_length", "seed", "model", "data"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run trains, read and checked before the model is loaded or anything is written.

    marks: budgets of checkpoints, rising, all below the method's. init, avoid: the deltas that the
    run goes on from and keeps clear of.
    """

    method: Method
    marks: list[int]
    init: SparseDelta | None
    avoid: list[SparseDelta]

    @classmethod
    def of(cls, config: TrainConfig, total_weights: int) -> Plan:
        """The plan of these settings; raises the typed errors of settings and files.

        total_weights: those that a budget may be a share of.
        """
        budget, marks = config.budgets(total_weights)
        return cls(
            make_method(config.method, budget, config.method_settings()),
            [mark for mark in marks if mark < budget],
            None if config.init_delta is None else load(config.init_delta),
            [load(path) for path in config.avoid],
        )


@dataclass(frozen=True)
class Subject:
    """The model of a run, loaded and given its adapter when first asked for.

    torch's global generator is seeded first, because a new head is drawn from it.
    """

    config: TrainConfig
    prepared: Prepared
    base: Checkpoint

    @property
    def total_weights(self) -> int:
        """The weights that a budget may be a share of: the adapter's, or else the base's."""
        if self.adapter is None:
            return self.base.total_weights
        return sum(parameter.numel() for parameter in self.adapter.parameters.values())

    @cached_property
    def model(self) -> Any:
        """The model, as the problem wants it, without the adapter until that was asked for."""
        transformers.set_seed(self.config.seed)
        prepared = self.prepared
        config = self.config
        load = partial(
            load_model,
            prepared.located,
            prepared.config,
            prepared.problem,
            config.dtype,
            config.quantization,
        )
        if config.sharding == "none" or count() == 1:
            return load()
        return load_sharded(load, partial(empty_model, prepared.config, prepared.problem))

    @cached_property
    def adapter(self) -> Attached | None:
        """The adapter that the settings name, attached to the model."""
        config = self.config
        if config.adapter is None:
            return None
        from deltakit.adapters.attach import attach
        from deltakit.quantized.loftq import loftq

        attached = attach(
            self.model,
            config.adapter,
            config.adapter_settings(),
            target=config.target or None,
            exclude=exclusions(config, self.model, self.base),
            seed=config.seed if config.adapter_seed is None else config.adapter_seed,
            base=self.base,
        )
        return loftq(attached, self.base) if config.loftq else attached


def build_trainer(subject: Subject, plan: Plan, folder: RunFolder) -> SparseTrainer:
    """The subject's model with its trainer, ready to train or to resume."""
    config, prepared, model = subject.config, subject.prepared, subject.model
    adapter = subject.adapter
    layers = {} if adapter else {"target": config.target or None}
    trainer = SparseTrainer(
        model,
        arguments(config, folder, len(prepared.examples["train"])),
        method=plan.method,
        exclude=() if adapter else exclusions(config, model, subject.base),
        extras=config.extras,
        extras_lr=config.head_lr,
        checkpoint_budgets=plan.marks,
        age=config.age,
        optimizer=config.optimizer,
        optimizer_options=dict(parse_option(given) for given in config.optimizer_options),
        base=subject.base,
        init_delta=plan.init,
        avoid=plan.avoid,
        adapter=adapter,
        masked=config.masked,
        exchange=config.exchange,
        model_id=prepared.located.model_id,
        revision=prepared.located.revision,
        config=_config_changes(prepared.changes, model),
        provenance=_provenance(config),
        **layers,
        **feeding(config, prepared, model),
    )
    _watch(trainer, config, prepared.metric, folder)
    return trainer


def feeding(config: TrainConfig, prepared: Prepared, model: Any) -> dict[str, Any]:
    """What any Trainer needs to train and evaluate on the problem: data, collator and metrics."""
    validation = prepared.examples.get("validation")
    problem, live = prepared.problem, _live(model, config, prepared)
    return {
        "train_dataset": Examples(prepared.examples["train"]),
        "eval_dataset": None if _never(config) or validation is None else Examples(validation),
        "data_collator": Collator.of(model, prepared.processor),
        "compute_metrics": lambda p: {
            **problem.metrics(p.predictions, p.label_ids),
            **problem.live_metrics("validation", live),
        },
        "preprocess_logits_for_metrics": lambda logits, labels: problem.reduce(
            logits[0] if isinstance(logits, tuple) else logits, labels
        ),
    }


def arguments(config: TrainConfig, folder: RunFolder, examples: int) -> TrainingArguments:
    """The Trainer's own settings, for a number of training examples.

    Epochs are counted in steps: the Trainer saves before it evaluates an epoch, and a run resumed
    from there would miss that evaluation; with steps it evaluates first.
    """
    epoch = ceil(ceil(examples / config.batch_size) / config.gradient_accumulation)
    every = {"epoch": epoch, "steps": config.eval_steps}.get(config.eval_strategy)
    steps = config.max_steps or ceil(epoch * config.epochs)
    return TrainingArguments(
        output_dir=str(folder.path),
        learning_rate=0.0 if isinstance(config.lr, str) else config.lr,  # auto: not known yet
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        lr_scheduler_type=config.scheduler,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=share_of(config.batch_size),
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        bf16=config.mixed_precision == "bf16",
        max_grad_norm=config.gradient_clipping or 0.0,
        eval_strategy="no" if every is None else "steps",
        eval_steps=every,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=max(config.logging_steps, ceil(steps / LINES)),
        seed=config.seed,
        use_cpu=count() > 1 and not torch.cuda.is_available(),  # or accelerate takes each for alone
        disable_tqdm=True,
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _live(model: Any, config: TrainConfig, prepared: Prepared) -> Live:
    mixed = config.mixed_precision == "bf16"
    return Live(model, prepared.processor, prepared.longest, config.eval_batch_size, mixed)


def exclusions(config: TrainConfig, model: Any, base: Checkpoint) -> list[str]:
    """The patterns of `exclude`, less those of a preset that match nothing in this model."""
    preset = PRESETS.get(config.preset or "", {})
    if list(config.exclude) != preset.get("exclude"):
        return list(config.exclude)
    # A preset's patterns are written for every architecture; this one has only some of the names.
    names = checkpoint_names(model, base)
    return [pattern for pattern in config.exclude if _occurs(pattern, names, model)]


def _occurs(pattern: str, names: Mapping[str, str | None], model: torch.nn.Module) -> bool:
    try:
        return bool(matching(pattern, names, "exclude pattern", model))
    except ConfigError:
        return False


def _config_changes(changes: Mapping[str, Any], model: Any) -> dict[str, Any] | None:
    return {**changes, "architectures": [type(model).__name__]} if changes else None


def _provenance(config: TrainConfig) -> dict[str, Any]:
    settings = config.as_dict()
    told = {name: settings[name] for name in _REMEMBERED if settings[name] is not None}
    if config.adapter is None:
        del told["masked"]
    for name in ("model", "data", "mask"):  # a file that travels tells no folders of its maker
        if name in told and Path(told[name]).exists():
            told[name] = Path(told[name]).name
    return {"tool": f"deltakit {__version__}", **told}


def _never(config: TrainConfig) -> bool:
    return config.eval_strategy == "no"


def _watch(trainer: SparseTrainer, config: TrainConfig, metric: str, folder: RunFolder) -> None:
    trainer.remove_callback(PrinterCallback)  # prints to stdout, which is for results
    best = BestDelta(
        trainer,
        metric,
        folder.best,
        greater=greater_is_better(metric),
        patience=config.early_stopping_patience,
    )
    trainer.add_callback(best)
    trainer.add_callback(StepLog(folder.log))
    keep_events_in(trainer, folder.events)
