"""`dk.train` and `dk.evaluate`: the commands as functions, with settings by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from deltakit.errors import ConfigError, nearest
from deltakit.merging.inputs import Given
from deltakit.training import evaluate as evaluation
from deltakit.training import run
from deltakit.training.config import check_names
from deltakit.training.config_file import read_file, resolve
from deltakit.training.prepare import Say


def train(
    config: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
    say: Say = lambda text: None,
    **settings: Any,
) -> Mapping[str, Any]:
    """Train as `deltakit train` does; returns the content of the run's `metrics.json`.

    settings: those of docs/settings.md by name; model, data, task, budget and output_dir are needed,
    here or in `config`, a YAML file, which they overrule. resume: go on from the newest checkpoint,
    with the bits of a run that was never stopped. force: replace an earlier run. quiet: no progress
    on stderr. say: takes notes of one line.

    SIGINT and SIGTERM save the run after the current step, then raise KeyboardInterrupt or
    SystemExit. Raises ConfigError for settings, and the typed errors of what they name.
    """
    check_names(settings, "train")
    resolved = resolve({} if config is None else read_file(Path(config)), settings)
    outcome = run.train(resolved, resume=resume, force=force, say=say, quiet=quiet)
    if outcome.record is not None:
        return outcome.record
    if outcome.signal == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + (outcome.signal or 0))


def evaluate(
    model: str | os.PathLike[str],
    deltas: Given | Sequence[Given] = (),
    *,
    split: str | None = None,
    predictions: str | os.PathLike[str] | None = None,
    allow_base_mismatch: bool = False,
    say: Say = lambda text: None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a base with deltas applied in order as `deltakit evaluate` does; what `--json` prints.

    model: a folder, a Hub id or a location. deltas: SparseDelta objects or `.sdelta` files. split:
    "validation" by default where the data has one. predictions: a JSONL file to write, one line per
    example with the sha256 of its logits' bits. settings: data and task, which are needed, and what
    else an evaluation takes of docs/settings.md, by name. say: takes notes of one line. Raises
    ConfigError for settings, and the typed errors of what they name.
    """
    known = [field.name for field in fields(evaluation.EvaluateConfig)]
    for name in settings:
        if name not in known:
            hint = nearest(name, known) or f"; known: {', '.join(known)}"
            raise ConfigError(f"evaluate: unknown setting {name!r}{hint}")
    return evaluation.evaluate(
        evaluation.EvaluateConfig(**{"model": model, **settings}),
        deltas,
        split=split,
        predictions=None if predictions is None else Path(predictions),
        allow_base_mismatch=allow_base_mismatch,
        say=say,
    )
