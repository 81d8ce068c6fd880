"""What a card tells of the deltas in a repository: read once, from the files and their run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any

from deltakit.errors import ConfigError
from deltakit.hub.location import Location
from deltakit.inspection import Inspection, inspect

_BLOCK = 2**20  # bytes hashed at a time


@dataclass(frozen=True, slots=True)
class DeltaFile:
    """A delta as it is published.

    name: in the repository. found: what its header says, and statistics of its changes. sha256: of
    the whole file, 64 hexadecimal digits. metrics: what an evaluation of this very file measured.
    """

    name: str
    found: Inspection
    sha256: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a card is written from; files[0] is the main delta."""

    repo_id: str
    files: tuple[DeltaFile, ...]
    run: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def main(self) -> DeltaFile:
        """The delta that stands for the repository."""
        return self.files[0]

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How the main delta came to be, as its file says."""
        return self.main.found.header.provenance

    @property
    def task(self) -> str | None:
        """The task that it was trained for, by deltakit's name."""
        told = (of.get("task") for of in (self.provenance, self.run, self.settings))
        return next((task for task in told if isinstance(task, str)), None)

    @property
    def base_on_hub(self) -> Location | None:
        """Where the base is on the Hub, at the revision recorded; None where that is not known."""
        base = self.main.found.header.base
        if base is None or base.model_id is None:
            return None
        return _location(base.model_id, base.revision)

    @property
    def dataset(self) -> str | None:
        """The id of the data on the Hub: runs record local files by their last name only."""
        data = self.provenance.get("data")
        return data if is_hub_id(data) else None

    def location(self, file: DeltaFile) -> str:
        """What commands call a delta; raises ConfigError for a name that cannot be one."""
        usual = "" if file.name == "delta.sdelta" else file.name
        return str(Location.parse(str(Location(self.repo_id, None, usual))))


def facts_of(
    files: Mapping[str, Path],
    repo_id: str,
    metrics: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
) -> Facts:
    """Read the deltas, every byte of them, and match them with what their run measured.

    files: name in the repository -> local file, the main one first. Raises MissingFileError and
    FormatError for files that are no sound deltas.
    """
    run = dict(metrics or {})
    deltas = []
    for name, path in files.items():
        sha256 = _sha256(path)
        found = _inspected(path, sha256)
        deltas.append(DeltaFile(name, found, sha256, _measured(run, path, found)))
    return Facts(repo_id, tuple(deltas), run, dict(settings or {}))


def is_hub_id(text: object) -> bool:
    """Whether a text has the form owner/name, which local files are not recorded by."""
    return isinstance(text, str) and _location(text, None) is not None


def _location(repo: str, revision: str | None) -> Location | None:
    """The whole of a repository, or None for names that cannot be one's."""
    meant = Location(repo, revision)
    try:
        return meant if Location.parse(str(meant)) == meant else None
    except ConfigError:
        return None


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one: records may be of other versions."""
    return value if isinstance(value, Mapping) else {}


@lru_cache(maxsize=16)
def _inspected(path: Path, sha256: str) -> Inspection:
    """What a file of this content holds: a push whose branch moves on writes its card again."""
    return inspect(path)


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _measured(run: Mapping[str, Any], path: Path, found: Inspection) -> dict[str, float]:
    """The metrics of the run's record that is about this file: of its name and its size."""
    marks = run.get("marks")
    for record in [run.get("final"), *(marks if isinstance(marks, list) else ()), run.get("best")]:
        told = mapping(record)
        if told.get("bytes") == found.file_bytes and Path(str(told.get("path"))).name == path.name:
            metrics = mapping(told.get("metrics"))
            return {str(name): float(v) for name, v in metrics.items() if _is_finite(v)}
    return {}


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
