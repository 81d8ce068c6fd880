"""`SparseTrainer`: the sparse engine inside `transformers.Trainer`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError, MissingFileError, TrainingError
from deltakit.parallel.processes import wait
from deltakit.parallel.unwrapped import unwrapped
from deltakit.selection.fixed import Unresolved
from deltakit.selection.methods import Method
from deltakit.training.calibration import TrainerCalibration
from deltakit.training.callbacks import BudgetCheckpoints, StopOnSignal
from deltakit.training.folder import WHOLE
from deltakit.training.loss_scale import divides_by_count
from deltakit.training.lr_auto import search_rate
from deltakit.training.lr_search import LrSearch
from deltakit.training.meter import Meter
from deltakit.training.state_files import STATE_FILE, read_states, write_part
from deltakit.training.tuner import SparseTuner

_PASSED = (
    *("age", "base", "init_delta", "avoid", "optimizer", "optimizer_options", "adapter", "masked"),
    *("exchange", "model_id", "revision", "config", "provenance"),
)


class SparseTrainer(Trainer):
    """`transformers.Trainer` that trains `method.budget` entries and saves deltas, not models.

    Everything of the Trainer works as documented there: accumulation, bfloat16 autocast,
    schedulers, logging, evaluation, early stopping, checkpoints and resuming, which gives the
    same bits as never having stopped. `args.learning_rate`, `weight_decay`, `adam_*` and
    `max_grad_norm` are those of the entries; clipping sees chosen entries and extras only.

    method, target, exclude, extras, extras_lr, age, optimizer, optimizer_options, base, init_delta,
    avoid, adapter, masked, exchange, model_id, revision, config, provenance: see `SparseTuner`.
    checkpoint_budgets: when
    unmasking reaches such a mark, `budget-N.sdelta` is written to `args.output_dir` and evaluated
    (`budget_results`).

    Log records tell beside the Trainer's own how many entries are unmasked and the seconds of
    training so far; those of the loss also throughput and memory (`training.meter`).

    SIGINT and SIGTERM end training after the current step with a checkpoint: `interrupted` is
    then the signal's number and `interrupted_checkpoint` the folder to resume from.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        method: Method | Unresolved,
        target: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] = (),
        extras: str | Iterable[str] = (),
        extras_lr: float | None = None,
        checkpoint_budgets: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        _refuse_unsupported(args)
        self._tuner_options: dict[str, Any] = {n: kwargs.pop(n) for n in _PASSED if n in kwargs}
        self._tuner_options |= {"target": target, "exclude": exclude, "extras": extras}
        self._tuner_options["extras_lr"] = extras_lr
        self.method = method
        self.checkpoint_budgets = sorted(set(checkpoint_budgets))
        self._tuner: SparseTuner | None = None
        self.interrupted: int | None = None
        self.interrupted_checkpoint: Path | None = None
        super().__init__(model=model, args=args, **kwargs)
        several = args.world_size > 1 or args.gradient_accumulation_steps > 1
        self._scale_unknown = several and self.model_accepts_loss_kwargs
        self._meter = Meter()
        self.callback_handler.callbacks.insert(0, self._meter)
        self.add_callback(BudgetCheckpoints(self))
        self.add_callback(StopOnSignal(self))

    @property
    def tuner(self) -> SparseTuner:
        """The tuner of the run; TrainingError before `train` has started."""
        if self._tuner is None:
            raise TrainingError("training has not started, so there are no entries yet")
        return self._tuner

    @property
    def budget_results(self) -> list[dict[str, Any]]:
        """One row per budget checkpoint reached: budget, step, metrics, path of the delta."""
        rows = []
        for entry in self.state.log_history:
            if "budget_entries" in entry:
                told = {k: v for k, v in entry.items() if k.startswith("budget_")}
                metrics = {k.removeprefix("budget_"): v for k, v in told.items()}
                budget = int(metrics.pop("entries"))
                path = str(self.budget_path(budget))
                row = {"budget": budget, "step": entry["step"], "metrics": metrics, "path": path}
                rows.append(row)
        return rows

    def budget_path(self, budget: int) -> Path:
        """Where the delta of a budget checkpoint is written."""
        assert self.args.output_dir is not None
        return Path(self.args.output_dir) / f"budget-{budget}.sdelta"

    def delta(self) -> SparseDelta:
        """The entries trained so far, as a delta; TrainingError before `train`."""
        return self.tuner.delta()

    def write_delta(self, path: Path) -> None:
        """Write the entries trained so far; of several processes, which call together, the first."""
        self.tuner.save(path)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train`; on SIGINT or SIGTERM stop after the step, saved."""
        self.interrupted = self.interrupted_checkpoint = None
        stopper = next(c for c in self.callback_handler.callbacks if isinstance(c, StopOnSignal))
        with stopper.listening((signal.SIGINT, signal.SIGTERM)):
            return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with unwrapped(self.accelerator):
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Train on one batch as `Trainer.training_step`, and count it."""
        self._meter.count(inputs)
        if self._scale_unknown and "labels" in inputs:
            with self.compute_loss_context_manager():
                ready = self._prepare_inputs(inputs)
                self.model_accepts_loss_kwargs = divides_by_count(model, ready)
            self._scale_unknown = False
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log`, with entries, seconds and, beside a loss, throughput and memory."""
        if self._tuner is not None:
            self._tuner.engine.clipping.check()
            logs |= {"entries": self._tuner.unmasked, "seconds": round(self._meter.seconds, 3)}
            if "loss" in logs:
                logs |= self._meter.reading()
        super().log(logs, start_time)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The tuner's optimizer, made when the number of training steps is known."""
        if self._tuner is None:
            inside = self.accelerator.unwrap_model(self.model if model is None else model)
            marks = self.checkpoint_budgets
            rate, steps = self.args.learning_rate, self.state.max_steps
            self._tuner = self.make_tuner(rate, steps, model=inside, budget_checkpoints=marks)
            self.optimizer = self._tuner.optimizer
        assert self.optimizer is not None
        return self.optimizer

    def make_tuner(
        self,
        lr: float,
        total_steps: int,
        *,
        method: Method | Unresolved | None = None,
        model: torch.nn.Module | None = None,
        **more: Any,
    ) -> SparseTuner:
        """A tuner on the model, with the options of this trainer and its arguments."""
        args = self.args
        return SparseTuner(
            self.model if model is None else model,  # type: ignore[arg-type]
            method or self.method,
            lr=lr,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            adam_eps=args.adam_epsilon,
            max_grad_norm=args.max_grad_norm or None,
            accumulation_steps=args.gradient_accumulation_steps,
            total_steps=total_steps,
            calibration=None if self.train_dataset is None else TrainerCalibration(self),
            **more,
            **self._tuner_options,
        )

    def find_lr(self, **options: Any) -> LrSearch:
        """Sweep for the learning rate as `deltakit.find_lr` does, and take it on for `train`.

        options: steps, held_out, seed and say of `deltakit.find_lr`. The delta's provenance records
        rate and reason. Raises TrainingError once training has started.
        """
        if self._tuner is not None:
            raise TrainingError("training has started; find the learning rate before that")
        found = search_rate(self, **options)
        self.take_on(found.rate, found.reason)
        return found

    def take_on(self, rate: float, reason: str) -> None:
        """Train at a rate that a sweep found; the delta's provenance records both."""
        self.args.learning_rate = rate
        known = self._tuner_options.get("provenance") or {}
        self._tuner_options["provenance"] = {**known, "lr": rate, "lr_auto": reason}

    def _clip_grad_norm(self, model: torch.nn.Module) -> float | torch.Tensor:
        return self.tuner.engine.finish_gradients()

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: float | None = None
    ) -> float | torch.Tensor:
        return self.tuner.engine.finish_gradients()

    def _save(
        self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or os.fspath(self.args.output_dir or "."))
        folder.mkdir(parents=True, exist_ok=True)
        self.write_delta(folder / "delta.sdelta")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the delta; where each process holds a part of the model, all call together."""
        if self.tuner.is_sharded:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.tuner.is_sharded:
            write_part(self.tuner.state_dict(), Path(output_dir), self.args.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.tuner.load_state_dict(read_states(Path(checkpoint)))
            assert self.lr_scheduler is not None
            scheduler = Path(checkpoint) / SCHEDULER_NAME
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        wait()
        if self.args.should_save:
            folder = Path(os.fspath(self.args.output_dir or "."))
            (folder / f"checkpoint-{self.state.global_step}" / WHOLE).touch()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        if not (Path(resume_from_checkpoint) / STATE_FILE).is_file():
            raise MissingFileError(
                f"{resume_from_checkpoint} holds no {STATE_FILE}, so training cannot resume there; "
                "name a checkpoint-N folder that SparseTrainer wrote"
            )

    def _load_best_model(self) -> None:
        if self.interrupted is None and self.state.best_model_checkpoint is not None:
            self.tuner.load_state_dict(read_states(Path(self.state.best_model_checkpoint)))


def _refuse_unsupported(args: TrainingArguments) -> None:
    if args.fp16:
        raise ConfigError("float16 loss scaling is not supported; use bf16=True or float32")
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process has {args.n_gpu} devices; launch one per device (torchrun "
            f"--nproc-per-node {args.n_gpu} ...), or set CUDA_VISIBLE_DEVICES to one"
        )
    if args.deepspeed or args.fsdp:
        raise ConfigError(
            "DeepSpeed and the Trainer's own fsdp are not supported; give SparseTrainer a model that "
            "torch.distributed.fsdp.fully_shard has split, and leave these arguments out"
        )
    if args.save_only_model:
        raise ConfigError("save_only_model=True leaves nothing to resume from; leave it off")
