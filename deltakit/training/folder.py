"""RUN, the folder of a run: what is in it, whether a new run may use it, and where to resume."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from deltakit.errors import ConfigError, MissingFileError, OutputExistsError
from deltakit.training.config import TrainConfig
from deltakit.training.config_file import read_file, resolve

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
WHOLE = "whole"  # an empty file in a checkpoint that every process has finished writing
HARMLESS = (
    "logging_steps",
    "save_steps",
    "hessian",
    "report_to",
)  # may change on resuming: no bit depends on them


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings, reusable as CONFIG."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The results; a run that has them is finished."""
        return self.path / "metrics.json"

    @property
    def delta(self) -> Path:
        """The delta at the end of training."""
        return self.path / "delta.sdelta"

    @property
    def best(self) -> Path:
        """The delta of the best evaluation."""
        return self.path / "best.sdelta"

    @property
    def log(self) -> Path:
        """One JSON object per line: losses and evaluations with their steps."""
        return self.path / "log.jsonl"

    @property
    def start(self) -> Path:
        """What is known of the run when its training starts (`deltakit.run_record`)."""
        return self.path / "run.json"

    @property
    def report(self) -> Path:
        """Everything about the run on one page for a browser."""
        return self.path / "report.html"

    @property
    def events(self) -> Path:
        """TensorBoard's files, where `report_to` names it."""
        return self.path / "tensorboard"

    @property
    def plot(self) -> Path:
        """Budget against metric, where matplotlib is installed."""
        return self.path / "budget.png"

    @property
    def unmasking_plot(self) -> Path:
        """Where entries went over the steps, where matplotlib is installed and they joined late."""
        return self.path / "unmasking.png"

    @property
    def density_plot(self) -> Path:
        """Hessian norm and distance against density, where matplotlib is installed."""
        return self.path / "density.png"

    @property
    def lr(self) -> Path:
        """What the sweep for the learning rate found."""
        return self.path / "lr.json"

    @property
    def lr_plot(self) -> Path:
        """Loss against learning rate, where matplotlib is installed."""
        return self.path / "lr.png"

    def checkpoints(self) -> list[Path]:
        """Folders to resume from, the newest last; one that a kill left half-written is none."""
        return [path for path in self._begun_checkpoints() if (path / WHOLE).is_file()]

    def _begun_checkpoints(self) -> list[Path]:
        found = [p for p in self.path.glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name)]
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))

    def check_free(self, *, force: bool) -> None:
        """Raise OutputExistsError when an earlier run left results and `force` is not given."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputExistsError(f"{self.path} is a file; give another output folder")
        left = self._results()
        if left and not force:
            way = "--resume to go on, " if self.checkpoints() else ""
            raise OutputExistsError(
                f"{self.path} holds an earlier run ({left[0].name}); give another folder, "
                f"{way}or --force to replace it"
            )

    def clear(self) -> None:
        """Make the folder, without anything that an earlier run wrote."""
        plots = (self.plot, self.unmasking_plot, self.density_plot, self.lr_plot)
        others = (self.config, self.start, self.log, self.report, self.events, self.lr, *plots)
        for path in [*self._results(), *(path for path in others if path.exists())]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.path.mkdir(parents=True, exist_ok=True)

    def resume(self, config: TrainConfig) -> Path | None:
        """The checkpoint to resume from; None when the run was stopped before the first one.

        Raises MissingFileError when there is no run, OutputExistsError when it is finished and
        ConfigError when the settings are not those it was started with.
        """
        if not self.config.is_file():
            raise MissingFileError(f"{self.path} holds no run to resume; leave out --resume")
        if self.metrics.is_file():
            raise OutputExistsError(f"{self.path} is finished; its results are in {self.metrics}")
        before, now = resolve(read_file(self.config), {}).as_dict(), config.as_dict()
        for name, value in now.items():
            same = value == before[name] or name in (*HARMLESS, "output_dir")
            if not same:
                raise ConfigError(
                    f"setting {name} was {before[name]!r} when the run started and is {value!r} "
                    "now; a resumed run keeps its settings"
                )
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def drop_checkpoints(self) -> None:
        """Remove what only resuming needs, once the run is finished."""
        for path in self._begun_checkpoints():
            shutil.rmtree(path)

    def _results(self) -> list[Path]:
        budgets = sorted(self.path.glob("budget-*.sdelta"))
        files = (self.metrics, self.delta, self.best, *budgets, *self._begun_checkpoints())
        return [path for path in files if path.exists()]
