"""Evaluating a base with deltas applied: what `deltakit evaluate` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError, DataError
from deltakit.formats.atomic import write_bytes
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.apply import apply
from deltakit.merging.inputs import Given, read_inputs
from deltakit.quantized.scheme import Quantization
from deltakit.training.collate import Collator
from deltakit.training.config import TrainConfig, describe
from deltakit.training.data import Table, choose_split, read_splits
from deltakit.training.predict import Predictions, predict
from deltakit.training.prepare import Say
from deltakit.training.pretrained import (
    Located,
    apply_changes,
    head_of,
    load_config,
    load_model,
    load_processor,
    locate,
    longest_input,
    needs_padding_token,
    with_weights,
)
from deltakit.training.quiet import quieten
from deltakit.training.settings import parse_setting
from deltakit.training.splits import hold_out
from deltakit.training.task import Example, Live, Problem, TaskSettings
from deltakit.training.tasks import TASKS


def _as_in_training(name: str) -> Any:
    declared = next(f for f in fields(TrainConfig) if f.name == name)
    return field(default=declared.default, metadata=declared.metadata)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The settings of an evaluation, those of `TrainConfig` that it needs.

    Raises ConfigError as `TrainConfig` does.
    """

    model: str = _as_in_training("model")
    revision: str | None = _as_in_training("revision")
    dtype: str = _as_in_training("dtype")
    quantize: str | None = _as_in_training("quantize")
    double_quantization: bool | None = _as_in_training("double_quantization")
    compute_dtype: str | None = _as_in_training("compute_dtype")
    data: str = _as_in_training("data")
    data_name: str | None = _as_in_training("data_name")
    task: str = _as_in_training("task")
    validation_fraction: float = _as_in_training("validation_fraction")
    text_column: str | None = _as_in_training("text_column")
    text_pair_column: str | None = _as_in_training("text_pair_column")
    label_column: str | None = _as_in_training("label_column")
    prompt_column: str | None = _as_in_training("prompt_column")
    completion_column: str | None = _as_in_training("completion_column")
    messages_column: str | None = _as_in_training("messages_column")
    source_column: str | None = _as_in_training("source_column")
    target_column: str | None = _as_in_training("target_column")
    choices_column: str | None = _as_in_training("choices_column")
    image_column: str | None = _as_in_training("image_column")
    problem_type: str | None = _as_in_training("problem_type")
    max_length: int = _as_in_training("max_length")
    generate_metrics: tuple[str, ...] = _as_in_training("generate_metrics")
    max_new_tokens: int = _as_in_training("max_new_tokens")
    mixed_precision: str = _as_in_training("mixed_precision")
    eval_batch_size: int = _as_in_training("eval_batch_size")
    threads: int | None = _as_in_training("threads")

    def __post_init__(self) -> None:
        described = describe()
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if name in ("model", "data", "task") and value == "":
                raise ConfigError(f"setting {name} is missing; give --{name}")
            if value is not None:
                object.__setattr__(self, name, parse_setting(name, described[name], value))
        self.quantization  # noqa: B018 - checks the settings together

    @property
    def quantization(self) -> Quantization | None:
        """How the base is quantised, if it is."""
        return Quantization.of(
            self.quantize, double=self.double_quantization, compute_dtype=self.compute_dtype
        )


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A base and the data to measure it on, read once. base: its checkpoint on this machine.

    model_config: the base's, changed as deltas and data need. examples: those of `split`, of at
    most `longest` tokens each. Deltas are applied to `model` and taken back by whoever measures.
    """

    config: EvaluateConfig
    base: Checkpoint
    located: Located
    model_config: Any
    problem: Problem
    processor: Any
    longest: int
    split: str
    examples: Sequence[Example]

    @classmethod
    def of(
        cls, config: EvaluateConfig, deltas: Sequence[SparseDelta], split: str | None, say: Say
    ) -> Evaluator:
        """Read and check everything but the model itself.

        deltas: those to come, whose changes to the base's configuration the model is made with.
        split, say: see `evaluate`. Raises ConfigError, DataError or MissingFileError.
        """
        quieten()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        table, name = _rows(config, split, say)
        located = locate(config.model, config.revision)
        model_config = load_config(located)
        for delta in deltas:
            apply_changes(model_config, delta.config)
        head = head_of(model_config, config.task)
        if head is None and config.task.endswith("-classification"):
            raise ConfigError(
                f"model {config.model} has no classification head; give the delta that brings one, "
                "or a merged model"
            )
        problem = TASKS[config.task]({name: table}, TaskSettings.of(config), head)
        for note in problem.notes:
            say(note)
        processor = load_processor(located, model_config, problem)
        apply_changes(model_config, needs_padding_token(model_config, processor, problem))
        longest = longest_input(processor, model_config, config.max_length)
        return cls(
            config=config,
            base=Checkpoint(with_weights(located).folder),
            located=located,
            model_config=model_config,
            problem=problem,
            processor=processor,
            longest=longest,
            split=name,
            examples=problem.encode(processor, longest)[name],
        )

    @cached_property
    def model(self) -> Any:
        """The base model, loaded when first asked for, on the GPU where there is one."""
        config = self.config
        model = load_model(
            self.located, self.model_config, self.problem, config.dtype, config.quantization
        )
        return model.to("cuda") if torch.cuda.is_available() else model

    def predict(
        self, *, digests: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> Predictions:
        """What the model, as it stands, says about the examples; digests, progress: see `predict`."""
        return predict(
            self.model,
            self.problem,
            self.examples,
            Collator.of(self.model, self.processor),
            batch_size=self.config.eval_batch_size,
            mixed_precision=self._mixed,
            digests=digests,
            progress=progress,
        )

    def metrics(self, found: Predictions) -> dict[str, float]:
        """The metrics of what the model, as it still stands, said."""
        size, mixed = self.config.eval_batch_size, self._mixed
        live = Live(self.model, self.processor, self.longest, size, mixed)
        metrics = self.problem.metrics(found.reduced, found.labels)
        return {**metrics, **self.problem.live_metrics(self.split, live)}

    @property
    def _mixed(self) -> bool:
        return self.config.mixed_precision == "bf16"


def evaluate(
    config: EvaluateConfig,
    deltas: Given | Sequence[Given] = (),
    *,
    split: str | None = None,
    predictions: Path | None = None,
    allow_base_mismatch: bool = False,
    say: Say = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Load a base, apply deltas in order, and evaluate it; the result as for `--json`.

    deltas: SparseDelta objects or `.sdelta` files. split: "validation" by default where the data
    has one, else all of its only split; a validation split that the data lacks is held out as in
    training. predictions: a JSONL file to write, one line per example with prediction, label and
    the sha256 of its logits; with it, the result carries one sha256 over all logits. Data and
    deltas are checked before the model is loaded. progress: called with (examples done, examples in
    all). Raises the typed errors of `deltakit.errors`.
    """
    inputs = read_inputs(deltas) if not isinstance(deltas, Sequence) or deltas else []
    loaded = [each.delta for each in inputs]
    ready = Evaluator.of(config, loaded, split, say)
    if loaded:
        apply(ready.model, loaded, base=ready.base, allow_base_mismatch=allow_base_mismatch)
    found = ready.predict(digests=predictions is not None, progress=progress)
    if predictions is not None:
        _write_predictions(ready.problem, found, predictions)
    return {
        "model": config.model,
        "deltas": [each.label for each in inputs],
        "entries": sum(delta.nnz for delta in loaded),
        "task": config.task,
        "data": config.data,
        "split": ready.split,
        "examples": len(ready.examples),
        "metrics": ready.metrics(found),
        **({} if found.digest is None else {"logits_sha256": found.digest}),
    }


def _rows(config: EvaluateConfig, split: str | None, say: Say) -> tuple[Table, str]:
    splits = read_splits(config.data, config.data_name)
    if split is None:
        split = "validation" if "validation" in splits else next(iter(splits))
        if len(splits) > 1 and split != "validation":
            raise DataError(f"data {config.data} has splits {', '.join(splits)}; name one")
        say(f"evaluating on all rows of split {split}")
    if split == "validation" and split not in splits and config.validation_fraction:
        table = hold_out(choose_split(splits, "train", config.data), config.validation_fraction)[1]
        say(f"validation: {len(table.rows):,} rows held out by content, as in training")
        return table, split
    return choose_split(splits, split, config.data), split


def _write_predictions(problem: Problem, found: Predictions, path: Path) -> None:
    lines = []
    for number, digest in enumerate(found.digests):
        label = found.labels[number].item() if len(found.labels) else None
        told = problem.tell(found.reduced[number], label)
        lines.append(json.dumps({"row": number + 1, **told, "logits_sha256": digest}))
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
