"""`--lr auto` in a run folder, and `deltakit lr-find`: sweep, say so, and keep what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltakit.errors import DataError, OutputExistsError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.parallel.processes import is_first, refuse_several
from deltakit.training.build import Plan, Subject, build_trainer
from deltakit.training.calibration import TrainerCalibration
from deltakit.training.config import TrainConfig
from deltakit.training.config_file import write_file
from deltakit.training.curvature import SupportHessian, largest_eigenvalue
from deltakit.training.folder import RunFolder
from deltakit.training.lr_search import LrSearch
from deltakit.training.lr_trial import Trial
from deltakit.training.prepare import Say, prepare
from deltakit.training.pretrained import with_weights
from deltakit.training.quiet import quieten
from deltakit.training.settings import AUTO
from deltakit.training.trainer import SparseTrainer


@dataclass(frozen=True, slots=True)
class Found:
    """What `deltakit lr-find` reports: the sweep, and the curvature of its support at the start.

    lambda_max: largest eigenvalue of the loss's Hessian on that support, on one batch. Gradient
    descent (not Adam) is stable up to 2 / lambda_max (Xu and Zhang 2024, figure 4a).
    """

    search: LrSearch
    lambda_max: float

    @property
    def bound(self) -> float | None:
        """2 / lambda_max; None where the loss curves downwards everywhere."""
        return 2 / self.lambda_max if self.lambda_max > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        curvature = {"lambda_max": self.lambda_max, "two_over_lambda_max": self.bound}
        return {**self.search.as_dict(), **curvature}


def known_rate(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """The settings of a run to resume, with the rate that its sweep found in place of auto."""
    if config.lr != AUTO or not folder.lr.is_file():
        return config
    return replace(config, lr=_read(folder.lr)[0])


def settle_rate(
    config: TrainConfig, trainer: SparseTrainer, folder: RunFolder, say: Say
) -> TrainConfig:
    """Sweep if the rate is to be found, and record it; the settings with the rate as a number.

    Writes lr.json, lr.png and config.yaml. The trainer's model, data order and random numbers are
    as before, so that the run has the bits of one that was given this number.
    """
    if folder.lr.is_file():  # of the run that is being resumed
        trainer.take_on(*_read(folder.lr))
        return config
    if config.lr != AUTO:
        return config
    search = trainer.find_lr(seed=config.seed, say=_teller(say))
    say(f"lr auto: {search.reason}")
    config = replace(config, lr=search.rate)
    if is_first():
        write_file(config, folder.config, {"lr": "found by auto, see lr.json"})
        search.plot(folder.lr_plot)
        search.save(folder.lr)
    return config


def find_for(config: TrainConfig, *, force: bool, say: Say) -> Found:
    """Sweep for a run with these settings, and write lr.json and lr.png into its output folder.

    Raises OutputExistsError when the folder holds a run, or an earlier sweep without `force`.
    """
    refuse_several("lr-find")
    folder = RunFolder(Path(config.output_dir))
    folder.check_free(force=False)
    if folder.config.exists() or (folder.lr.exists() and not force):
        raise OutputExistsError(
            f"{folder.path} holds {'a run' if folder.config.exists() else folder.lr.name}; give "
            f"another folder{'' if folder.config.exists() else ', or --force to replace it'}"
        )
    quieten()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    prepared = prepare(config, say)
    base = Checkpoint(with_weights(prepared.located).folder)
    subject = Subject(config, prepared, base)
    plan = Plan.of(config, subject.total_weights)
    trainer = build_trainer(subject, plan, folder)
    search = trainer.find_lr(seed=config.seed, say=_teller(say))
    found = Found(search, _lambda_max(trainer, search, config.seed))
    folder.path.mkdir(parents=True, exist_ok=True)
    search.plot(folder.lr_plot)
    search.save(folder.lr)
    return found


def _lambda_max(trainer: SparseTrainer, search: LrSearch, seed: int) -> float:
    data = TrainerCalibration(trainer)
    batch = next(data.batches(seed))
    model: Any = trainer.model
    model.eval()
    return largest_eigenvalue(
        SupportHessian(model, lambda: data.loss(model, batch), search.support), iterations=20
    )


def _teller(say: Say) -> Callable[[Trial], None]:
    def tell(trial: Trial) -> None:
        what = f"held-out loss {trial.loss:.4f}" if trial.held_out else "diverged"
        say(f"lr {trial.rate:.2e}: {what}")

    return tell


def _read(path: Path) -> tuple[float, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return float(content["rate"]), str(content["reason"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what a sweep wrote ({error}); remove it") from None
