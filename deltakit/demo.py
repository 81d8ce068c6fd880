"""The whole story on the embedded default: what `deltakit demo` does.

A small encoder, pretrained on the text of Python's standard library (see `demo_data/README.md`),
learns two tasks, each as a delta of a few hundred kilobytes at most.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltakit.budget import format_bytes
from deltakit.errors import OutputExistsError, TrainingError
from deltakit.formats.atomic_folder import replacing_folder

Tell = Callable[[str], None]

TASKS = ("family", "kind")
BUDGET, MARKS = 20_000, (5_000, 10_000)
SETTINGS: Mapping[str, Any] = {
    "task": "sequence-classification",
    "epochs": 3,
    "batch_size": 32,
    "max_length": 48,
    "eval_strategy": "budget",
    "threads": 1,  # so small a model loses more to the threads' meeting than it gains
}


def write_files(out: Path) -> None:
    """Put the embedded checkpoint into `out`/base and the tasks' data into `out`/tasks."""
    source = Path(str(files("deltakit") / "demo_data"))
    out.mkdir(parents=True, exist_ok=True)
    for name in ("base", "tasks"):
        with replacing_folder(out / name) as made:
            shutil.copytree(source / name, made, copy_function=shutil.copyfile, dirs_exist_ok=True)


def demo(
    out: Path,
    *,
    tell: Tell,
    force: bool = False,
    files_only: bool = False,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Train both tasks, inspect, truncate, merge, evaluate merged against live; the results.

    out: folder for everything. tell: takes the story line by line. files_only: write the embedded
    checkpoint and data and stop there. max_steps: shortens training. Raises OutputExistsError
    when `out` exists and is not empty (unless `force`), and TrainingError if a merged model
    differs from the live one in a single bit of its logits.
    """
    if out.exists() and any(out.iterdir()):
        if not force:
            raise OutputExistsError(f"{out} exists; give another folder or --force to replace it")
        shutil.rmtree(out)
    started = time.monotonic()
    write_files(out)
    tell(f"base: {out / 'base'}, {_size(out / 'base' / 'model.safetensors')}")
    if files_only:
        return {"output": str(out)}
    tasks = {name: _task(name, out, tell, max_steps) for name in TASKS}
    seconds = round(time.monotonic() - started, 1)
    tell(f"\nDone in {seconds:.0f} s. Everything is in {out}:")
    for name in TASKS:
        tell(f"  {out / name / 'delta.sdelta'}  {out / f'{name}-merged'}")
    return {"output": str(out), "seconds": seconds, "tasks": tasks}


def _task(name: str, out: Path, tell: Tell, max_steps: int | None) -> dict[str, Any]:
    from deltakit.formats.sdelta import load, save
    from deltakit.merging.merge import merge
    from deltakit.truncation import truncate

    base, data, run = out / "base", out / "tasks" / name, out / name
    tell(f"\n{name}: {data}")
    head = _train(name, base, data, out / f"{name}-head", max_steps, method="random", budget=1)
    tell(f"  head alone: accuracy {_accuracy(head['final']):.3f}")
    shutil.rmtree(out / f"{name}-head")
    marks = {"checkpoint_budgets": MARKS}
    record = _train(name, base, data, run, max_steps, method="id3", budget=BUDGET, **marks)
    for row in [*record["marks"], record["final"]]:
        tell(f"  {row['entries']:,} entries at step {row['step']}: accuracy {_accuracy(row):.3f}")
    delta = run / "delta.sdelta"
    tell(f"  inspect: {_inspected(delta)}")
    small = run / f"truncated-{BUDGET // 2}.sdelta"
    save(truncate(load(delta), BUDGET // 2), small)
    truncated = _evaluate(base, data, run / "truncated.jsonl", small)["metrics"]["accuracy"]
    tell(f"  truncated to {BUDGET // 2:,} entries, {_size(small)}: accuracy {truncated:.3f}")
    merged = out / f"{name}-merged"
    merge(base, [delta], merged)
    live = _evaluate(base, data, run / "live.jsonl", delta)
    reloaded = _evaluate(merged, data, run / "merged.jsonl")
    if live["logits_sha256"] != reloaded["logits_sha256"]:
        raise TrainingError(f"{merged} does not give the live model's logits; please report this")
    tell(f"  merged: accuracy {reloaded['metrics']['accuracy']:.3f}, every logit's bits as live")
    return {
        "head_alone": _accuracy(head["final"]),
        "marks": {row["entries"]: _accuracy(row) for row in record["marks"]},
        "final": _accuracy(record["final"]),
        "truncated": truncated,
        "live": live["metrics"]["accuracy"],
        "merged": reloaded["metrics"]["accuracy"],
        "logits_sha256": live["logits_sha256"],
        "delta_bytes": delta.stat().st_size,
        "delta": str(delta),
        "merged_model": str(merged),
    }


def _train(
    name: str, base: Path, data: Path, run: Path, max_steps: int | None, **settings: Any
) -> Mapping[str, Any]:
    from deltakit.training.config_file import resolve
    from deltakit.training.run import train

    config = resolve(
        {},
        {
            **SETTINGS,
            **settings,
            "model": str(base),
            "data": str(data),
            "output_dir": str(run),
            **({} if max_steps is None else {"max_steps": max_steps}),
        },
    )
    outcome = train(config)
    if outcome.record is None:
        raise KeyboardInterrupt
    return outcome.record


def _evaluate(model: Path, data: Path, predictions: Path, *deltas: Path) -> dict[str, Any]:
    from deltakit.training.evaluate import EvaluateConfig, evaluate

    config = EvaluateConfig(
        model=str(model),
        data=str(data),
        task=SETTINGS["task"],
        max_length=SETTINGS["max_length"],
    )
    return evaluate(config, deltas, split="validation", predictions=predictions)


def _inspected(path: Path) -> str:
    from deltakit.inspection import inspect

    found = inspect(path)
    return (
        f"{found.entries:,} entries in {len(found.tensors)} tensors, "
        f"{found.density_of_touched:.2%} of them; {found.extra_weights:,} weights of the head; "
        f"{format_bytes(found.file_bytes)}"
    )


def _accuracy(row: Mapping[str, Any]) -> float:
    return float(row["metrics"]["accuracy"])


def _size(path: Path) -> str:
    return format_bytes(path.stat().st_size)
