"""One training run from settings to results: what `deltakit train` does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import load
from deltakit.parallel.processes import is_first, joined, wait
from deltakit.training.analysis_report import analyses, plot_unmasking
from deltakit.training.build import Plan, Subject, build_trainer
from deltakit.training.config import TrainConfig
from deltakit.training.config_file import write_file
from deltakit.training.density_report import hessian_norms, plot_density, travelled
from deltakit.training.environment import versions
from deltakit.training.folder import RunFolder
from deltakit.training.lr_run import known_rate, settle_rate
from deltakit.training.memory import PeakMemory
from deltakit.training.prepare import Say, prepare
from deltakit.training.pretrained import with_weights
from deltakit.training.progress import showing
from deltakit.training.quiet import quieten
from deltakit.training.report import plot, write_metrics
from deltakit.training.reporting import check_trackers
from deltakit.training.run_report import RunReport
from deltakit.training.trainer import SparseTrainer
from deltakit.training.watch import BestDelta, metrics_of


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. record: the content of metrics.json, or None when it was interrupted;
    of several processes that train together only the first has it, the others an empty one.

    signal: the number of the signal that interrupted it; step: the last optimizer step.
    """

    record: Mapping[str, Any] | None
    signal: int | None
    step: int


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    force: bool = False,
    say: Say = lambda text: None,
    quiet: bool = True,
) -> Outcome:
    """Train as the settings say and write everything into `config.output_dir`.

    resume: go on from the newest checkpoint, with the bits of a run that was never stopped.
    force: replace an earlier run. say: takes notes of one line; quiet: no progress on stderr.
    Everything about data and settings is checked before the model is loaded; raises the typed
    errors of `deltakit.errors`. Processes launched together (torchrun, `accelerate launch`) share
    every batch, and the first of them writes.
    """
    with joined():
        return _train(config, resume=resume, force=force, say=say, quiet=quiet)


def _train(config: TrainConfig, *, resume: bool, force: bool, say: Say, quiet: bool) -> Outcome:
    started = time.monotonic()
    folder = RunFolder(Path(config.output_dir))
    config = known_rate(config, folder) if resume else config
    checkpoint = folder.resume(config) if resume else None
    if not resume:
        folder.check_free(force=force)
    quieten()
    check_trackers(config.report_to)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    prepared = prepare(config, say)
    base = Checkpoint(with_weights(prepared.located).folder)
    subject = Subject(config, prepared, base)
    plan = Plan.of(config, subject.total_weights)
    wait()  # no process looks at the folder any more
    if not resume and is_first():
        folder.clear()
        write_file(config, folder.config)
    wait()
    trainer = build_trainer(subject, plan, folder)
    config = settle_rate(config, trainer, folder, say)
    report = RunReport(folder, subject, plan, say)
    if is_first():
        trainer.add_callback(report)
    memory, training = PeakMemory(), time.monotonic()
    with showing(trainer, prepared.metric, quiet=quiet or not is_first()):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.interrupted is not None and trainer.state.global_step < trainer.state.max_steps:
            return Outcome(None, trainer.interrupted, trainer.state.global_step)
        cost = {
            "resumed": checkpoint is not None,  # costs are then those since
            "train_seconds": round(time.monotonic() - training, 3),
            "peak_bytes_above_model": memory.above(),
        }
        evaluation = _last_evaluation(trainer)  # by all processes together, ...
        trainer.write_delta(folder.delta)  # ... and this
        if not is_first():
            return Outcome({}, None, trainer.state.global_step)
        record = _results(config, subject, trainer, folder, evaluation)
    record |= {**cost, "seconds": round(time.monotonic() - started, 3)}
    plot(record, folder.plot)
    found = record["analyses"]
    plot_unmasking(found, folder.unmasking_plot)
    plot_density(found["hessian"], found["travelled"], folder.density_plot)
    write_metrics(record, folder.metrics)
    report.write()
    folder.drop_checkpoints()
    return Outcome(record, None, trainer.state.global_step)


def _results(
    config: TrainConfig,
    subject: Subject,
    trainer: SparseTrainer,
    folder: RunFolder,
    evaluation: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of metrics.json; evaluation: the record of the one at the end."""
    prepared, base = subject.prepared, subject.base
    delta = load(folder.delta)
    step = trainer.state.global_step
    names = prepared.problem.metric_names
    last = _result(evaluation, step, names, folder.delta)
    marks = []
    for record in trainer.state.log_history:
        if "budget_entries" in record:
            entries = int(record["budget_entries"])
            result = _result(record, int(record["step"]), names, trainer.budget_path(entries))
            marks.append({"entries": entries, **result})
    files = {mark["entries"]: Path(mark["path"]) for mark in marks} | {delta.nnz: folder.delta}
    shapes = {target.name: target.shape for target in trainer.tuner.engine.entries.targets}
    total = base.total_weights
    found = {
        **analyses(delta, shapes),
        "travelled": travelled(files, total),
        "hessian": hessian_norms(trainer, total, config.seed) if config.hessian else [],
    }
    watcher = next(c for c in trainer.callback_handler.callbacks if isinstance(c, BestDelta))
    best = watcher.best()
    return {
        "version": 1,
        "task": config.task,
        "method": config.method,
        "preset": config.preset,
        "model": config.model,
        "data": config.data,
        "splits": dict(prepared.splits),
        "metric": prepared.metric,
        "budget": {
            "given": config.budget,
            "resolved": trainer.tuner.budget,
            "reached": delta.nnz,
            "base_weights": base.total_weights,
        },
        "quantization": delta.provenance.get("quantization"),
        "adapter": None if config.adapter is None else _adapter(config.adapter, subject),
        "extras": {"weights": delta.extra_weights, "names": list(delta.extras)},
        "analyses": found,
        "marks": marks,
        "final": {"entries": delta.nnz, **last},
        "best": None if best is None else _result(best, best["step"], names, folder.best),
        "steps": step,
        "lr": config.lr,
        "lr_auto": delta.provenance.get("lr_auto"),
        "versions": versions(),
    }


def _adapter(kind: str, subject: Subject) -> dict[str, Any]:
    return {"kind": kind, "weights": subject.total_weights, "masked": subject.config.masked}


def _result(
    record: Mapping[str, Any], step: int, names: Sequence[str], path: Path
) -> dict[str, Any]:
    found = metrics_of(record)
    metrics = {name: found[name] for name in names if name in found}
    return {"step": step, "metrics": metrics, "path": str(path), "bytes": path.stat().st_size}


def _last_evaluation(trainer: SparseTrainer) -> Mapping[str, Any]:
    """The record of the evaluation at the last step, made now where nothing has made it yet."""
    if trainer.eval_dataset is None:
        return {}
    for record in reversed(trainer.state.log_history):
        if record["step"] == trainer.state.global_step and metrics_of(record):
            return record
    metrics: Mapping[str, Any] = trainer.evaluate()
    return metrics
