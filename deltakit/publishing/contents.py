"""What goes into a repository: deltas with what their run tells of itself, or a whole model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deltakit.errors import ConfigError, FormatError, MissingFileError
from deltakit.formats import strict_json
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import SdeltaFile
from deltakit.hub.branch import Content
from deltakit.hub.choice import DELTA, DESCRIPTION, WEIGHTS
from deltakit.hub.locate import Given, label_of, local_delta
from deltakit.hub.location import is_location
from deltakit.merging.carry import carried_files
from deltakit.publishing.travelling import fit_to_travel, holds_token

METRICS, SETTINGS = "metrics.json", "config.yaml"
_SETTINGS_HEAD = "# deltakit train: the settings of this run; local paths are cut to names\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files to publish, by their names in the repository, without the card.

    deltas: the local files of the deltas among them, the main one first; none for a model.
    metrics, settings: what the run recorded, fit to travel, as in `files`; None where unknown.
    notes: what is left out.
    """

    files: Mapping[str, Content]
    deltas: Mapping[str, Path] = field(default_factory=dict)
    metrics: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def gather(sources: Iterable[Given]) -> Contents:
    """The contents of .sdelta files, of the folder of a run, or of the folder of a model.

    Every delta is read whole and checked against its digests. Raises MissingFileError for what is
    not there, ConfigError for what cannot be published together, FormatError (ChecksumError) for
    a damaged file, and HubError for a delta on the Hub that cannot be had.
    """
    given = list(sources)
    for source in given:
        if not is_location(source) and not Path(source).exists():
            raise MissingFileError(f"no such file or folder: {source}")
    folders = [
        Path(source) for source in given if not is_location(source) and Path(source).is_dir()
    ]
    if not given or (folders and len(given) > 1):
        raise ConfigError(
            f"expected .sdelta files or one folder to publish, found {len(given)} paths with "
            f"{len(folders)} folders; publish a folder by itself"
        )
    return _of_folder(folders[0]) if folders else _of_files(given)


def check_delta(path: Path) -> None:
    """Read a delta whole; raises FormatError (ChecksumError), and ConfigError for a token in it."""
    with SdeltaFile(path) as file:
        for name in file.tensors:
            file.tensor(name)
        for name in file.extras:
            file.extra(name)
        if holds_token(json.dumps(dict(file.provenance), default=str)):
            raise ConfigError(
                f"{path}: an access token seems to stand in its provenance; it is not published. "
                "Revoke the token, load the delta and save it without"
            )


def _of_files(given: list[Given]) -> Contents:
    deltas: dict[str, Path] = {}
    for source in given:
        path = local_delta(source)
        name = path.name
        if not name.endswith(DELTA):
            raise ConfigError(
                f"{label_of(source)} is called no {DELTA} file; publish deltas, the folder of a run "
                "or the folder of a model"
            )
        if name in deltas:
            raise ConfigError(f"{deltas[name]} and {label_of(source)} would both become {name}")
        check_delta(path)
        deltas[name] = path
    ordered = main_first(deltas)
    return Contents(files=ordered, deltas=ordered)


def _of_folder(folder: Path) -> Contents:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    deltas = [path for path in files if path.suffix == DELTA]
    weights = [path for path in files if path.suffix == WEIGHTS]
    if deltas and weights:
        raise ConfigError(
            f"{folder} holds both deltas ({deltas[0].name}) and weights ({weights[0].name}); name "
            "the deltas to publish, or move one kind away"
        )
    if deltas:
        return _of_run(folder, {path.name: path for path in deltas})
    if weights:
        return _of_model(folder)
    raise ConfigError(f"{folder} holds nothing to publish: no {DELTA} and no {WEIGHTS} file")


def _of_run(folder: Path, deltas: Mapping[str, Path]) -> Contents:
    metrics, settings = folder / METRICS, folder / SETTINGS
    if settings.is_file() and not metrics.is_file():
        raise ConfigError(
            f"{folder} is a run without {METRICS}, so it is not finished; finish it (deltakit train "
            f"{settings} --resume), or name the {DELTA} files to publish"
        )
    for path in deltas.values():
        check_delta(path)
    ordered = main_first(deltas)
    told_metrics = parsed_metrics(metrics.read_bytes(), metrics) if metrics.is_file() else None
    told_settings = parsed_settings(settings.read_bytes(), settings) if settings.is_file() else None
    files: dict[str, Content] = {**ordered}
    if told_metrics is not None:
        text = json.dumps(told_metrics, indent=2, ensure_ascii=False, allow_nan=False)
        files[METRICS] = f"{text}\n".encode()
    if told_settings is not None:
        text = yaml.safe_dump(told_settings, sort_keys=False, allow_unicode=True, width=10**9)
        files[SETTINGS] = f"{_SETTINGS_HEAD}{text}".encode()
    return Contents(files=files, deltas=ordered, metrics=told_metrics, settings=told_settings)


def parsed_metrics(text: bytes, path: Path) -> dict[str, Any]:
    """The content of metrics.json, fit to travel; FormatError where it is none."""
    return _mapping(strict_json.loads(text, str(path)), path)


def parsed_settings(text: bytes, path: Path) -> dict[str, Any]:
    """The content of config.yaml, fit to travel; FormatError where it is none."""
    try:
        return _mapping(yaml.safe_load(text), path)
    except (yaml.YAMLError, UnicodeDecodeError):
        raise FormatError(f"{path} is no YAML") from None


def _mapping(content: object, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected names with values, found {type(content).__name__}")
    fit = fit_to_travel(content, folder=path.parent)
    return {str(name): value for name, value in fit.items()}


def _of_model(folder: Path) -> Contents:
    checkpoint = Checkpoint(folder)
    weights = [*checkpoint.files, *([] if checkpoint.index is None else [checkpoint.index])]
    files: dict[str, Content] = {path.name: path for path in weights}
    carried, _ = carried_files(checkpoint)
    left = []
    for file in carried:
        if file.source.name.startswith("."):
            continue
        if file.name.endswith((*DESCRIPTION, WEIGHTS)):
            files[file.name] = file.source
        else:
            left.append(file.name)
    listed = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
    notes = (f"not published: {listed}",) if left else ()
    return Contents(files={name: files[name] for name in sorted(files)}, notes=notes)


def main_first(deltas: Mapping[str, Path]) -> dict[str, Path]:
    """delta.sdelta, then the others by the numbers in their names: budget-9000 before -25000."""

    def rank(name: str) -> tuple[bool, list[int], str]:
        return name != f"delta{DELTA}", [int(n) for n in re.findall(r"\d+", name)], name

    return {name: deltas[name] for name in sorted(deltas, key=rank)}
