"""What the folder of a run tells about it, finished or not, read back without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from deltakit.errors import DataError, MissingFileError

Record = Mapping[str, Any]
Curve = tuple[list[int], list[float]]

_EVALUATED = ("eval_", "budget_")  # periodic evaluations, and those at budget marks


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The files of one run, as they are.

    settings: config.yaml. start: run.json, empty before training began. log: log.jsonl, records of
    steps in their order. results: metrics.json, None until the run is finished. sweep: lr.json of
    `--lr auto`, or None. delta: the newest delta with all entries so far, or None.
    """

    folder: Path
    settings: Record
    start: Record
    log: Sequence[Record]
    results: Record | None
    sweep: Record | None
    delta: Path | None

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RunRecord:
        """Read a run's folder, also while it is written.

        Raises MissingFileError where there is no run and DataError for a damaged file.
        """
        path = Path(folder)
        if not (path / "config.yaml").is_file():
            raise MissingFileError(f"{path} holds no run (no config.yaml); name a run's folder")
        return cls(
            folder=path,
            settings=yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {},
            start=_json(path / "run.json") or {},
            log=read_log(path / "log.jsonl"),
            results=_json(path / "metrics.json"),
            sweep=_json(path / "lr.json"),
            delta=_newest_delta(path),
        )

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((int(record["step"]) for record in self.log), default=0)

    def evaluations(self, metrics: Iterable[str]) -> list[dict[str, Any]]:
        """Step, entries and the named metrics of every evaluation, one per step, in order.

        Where a budget mark and a periodic evaluation meet, they measured the same model.
        """
        wanted = list(metrics)
        found: dict[int, dict[str, Any]] = {}
        for record in self.log:
            plain = {
                name: record[prefix + name]
                for prefix in _EVALUATED
                for name in wanted
                if prefix + name in record
            }
            if plain:
                told = {"step": record["step"], "entries": record.get("entries"), **plain}
                found[record["step"]] = told
        return [found[step] for step in sorted(found)]

    def curve(self, key: str, points: int) -> Curve:
        """A logged quantity over steps, the last of each step: steps, values; see `thinned`."""
        told = [record for record in self.log if record.get(key) is not None]
        return thinned(
            [record["step"] for record in told], [record[key] for record in told], points
        )


def thinned(steps: Sequence[int], values: Sequence[float], points: int) -> Curve:
    """At most so many points: means of equally many neighbours, each at its last step."""
    size = max(1, ceil(len(steps) / points))
    starts = range(0, len(steps), size)
    ends = [steps[min(start + size, len(steps)) - 1] for start in starts]
    return ends, [fmean(values[start : start + size]) for start in starts]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, in order; none where there is no file.

    The last line may be torn, where a process was killed or is just writing it. Raises DataError
    for any other line that is no JSON object with a step.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise DataError(
                f"{path} line {number} is no record of a step; expected what a run writes"
            ) from None
        records.append(record)
    return records


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); a run writes it whole") from None
    return content


def _newest_delta(folder: Path) -> Path | None:
    """The final delta, else the one that was written last: a mark's, or the best so far."""
    if (folder / "delta.sdelta").is_file():
        return folder / "delta.sdelta"
    found = [*folder.glob("budget-*.sdelta"), *folder.glob("best.sdelta")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
