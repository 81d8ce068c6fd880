"""The figures of docs/concepts.md: python docs/figures/make.py [FOLDER]

Three are drawn from formulas. Two are measured on the embedded model, in a minute or two on an idle
machine: accuracy against budget, and where entries go under two allocations. Figures are SVGs whose
colours follow the reader's light or dark theme, where the browser tells it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.demo import write_files
from deltakit.figures import drawn
from deltakit.groups import kind_of
from deltakit.selection.schedules import SCHEDULES, unmasking_plan

# What the theme changes: paper, ink, and grids; the series' colours read well on both papers.
THEME = {"#ffffff": "#14171c", "#000000": "#e6e6e6", "#b0b0b0": "#6b7280"}
BUDGETS = (1_000, 2_000, 4_000, 8_000)
SETTINGS: Mapping[str, Any] = {
    "task": "sequence-classification",
    "max_length": 48,
    "batch_size": 16,
    "eval_strategy": "no",
    "threads": 1,
}


def delta(path: Path) -> None:
    """A base, a delta of twelve entries, and their sum."""
    random = np.random.default_rng(0)
    base = random.standard_normal((10, 14))
    flat = np.sort(random.choice(base.size, 12, replace=False))
    change = np.full(base.size, np.nan)
    change[flat] = np.where(random.random(12) < 0.5, -2.5, 2.5)
    change = change.reshape(base.shape)
    merged = base + np.nan_to_num(change)
    titles = ("base: 140 weights", "delta: 12 entries", "merged: 128 weights kept their bits")
    with drawn(path, 8.4, 2.3, panels=3) as panels:
        for panel, title, values in zip(panels, titles, (base, change, merged), strict=True):
            panel.grid(visible=False)
            panel.imshow(values, cmap="cividis", vmin=-3.5, vmax=3.5, interpolation="none")
            panel.set(title=title, xticks=[], yticks=[])


def schedules(path: Path) -> None:
    """Entries against steps, by schedule, and with budget checkpoints."""
    steps, budget = 40, 8_000
    at = np.arange(steps + 1)
    with drawn(path, 8.4, 3.0, panels=2) as (plain, marked):
        for name in SCHEDULES.names():
            plan = unmasking_plan(name, budget, steps)
            plain.plot(at, [0, *plan], label=name, markevery=8)
        marks = (1_000, 3_000)
        plan = unmasking_plan("linear", budget, 10, marks)
        marked.step(at[:11], [0, *plan], where="mid", marker=".")
        for mark in marks:
            marked.axhline(mark, linestyle=":", color="#D55E00")
        plain.set(title="schedules", xlabel="step", ylabel="entries unmasked")
        title = "linear in 10 steps, checkpoints at 1,000 and 3,000"
        marked.set(title=title, xlabel="step", ylabel="entries unmasked")
        plain.legend()


def late(path: Path) -> None:
    """How far an entry moves at each step after it joined, under a constant gradient of 1."""
    beta1, beta2, after = 0.9, 0.999, np.arange(1, 41)
    momentum, variance = 1 - beta1**after, 1 - beta2**after
    with drawn(path, 6.0, 3.0) as (panel,):
        for joined in (0, 100, 1_000, 10_000):
            step = joined + after  # the shared step corrects too little what is still young
            moved = momentum / (1 - beta1**step) / np.sqrt(variance / (1 - beta2**step))
            label = "age of its own" if joined == 0 else f"shared age, joined at step {joined:,}"
            panel.plot(after, moved, label=label, markevery=5)
        panel.set(xlabel="steps since the entry joined", ylabel="update (learning rates)")
        panel.set_ylim(0, 11)  # room for the legend
        panel.legend()


def measured(budgets: Path, spread: Path) -> None:
    """Train on the embedded model and draw what came out."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_files(work)
        _budgets(budgets, work)
        _spread(spread, work)


def _budgets(path: Path, work: Path) -> None:
    """Accuracy of checkpoints, and of the final delta truncated in two ways."""
    from deltakit.formats.sdelta import load, save
    from deltakit.truncation import truncate

    whole = 2 * BUDGETS[-1]
    marks = {"checkpoint_budgets": BUDGETS, "unmask_fraction": 0.8}
    run = _train(work, "run", budget=whole, max_steps=100, **marks)
    files = {"checkpoint of the run": [run / f"budget-{n}.sdelta" for n in BUDGETS]}
    trained = load(run / "delta.sdelta")
    for by in ("order", "magnitude"):
        made = [work / f"{by}-{n}.sdelta" for n in BUDGETS]
        for n, file in zip(BUDGETS, made, strict=True):
            save(truncate(trained, n, "order" if by == "order" else "magnitude"), file)
        files[f"truncated by {by}"] = made
    with drawn(path, 6.0, 3.2) as (panel,):
        for label, made in files.items():
            found = [_accuracy(work, file) for file in [*made, run / "delta.sdelta"]]
            print(label, dict(zip((*BUDGETS, whole), found, strict=True)))
            panel.plot((*BUDGETS, whole), found, label=label)
        panel.set(xscale="log", xlabel="entries", ylabel="accuracy (validation)")
        panel.legend()


def _spread(path: Path, work: Path) -> None:
    """Density of every kind of matrix under the two allocations."""
    from deltakit.formats.sdelta import load

    kinds: dict[str, dict[str, list[int]]] = {}
    recipes = {"global": "none", "proportional": "factored"}
    for allocation, precondition in recipes.items():
        recipe = {"allocation": allocation, "precondition": precondition}
        run = _train(work, allocation, budget=8_000, max_steps=30, **recipe)
        for name, tensor in load(run / "delta.sdelta").tensors.items():
            if len(tensor.shape) == 2:
                kind = kind_of(name).removeprefix("encoder.layer.*.").removesuffix(".weight")
                counts = kinds.setdefault(kind, {}).setdefault(allocation, [0, 0])
                counts[0] += tensor.nnz
                counts[1] += tensor.numel
    with drawn(path, 7.4, 3.2) as (panel,):
        rows = np.arange(len(kinds))
        for shift, allocation in zip((-0.2, 0.2), recipes, strict=True):
            shares = [counts.get(allocation, [0, 1]) for counts in kinds.values()]
            shown = [100 * entries / numel for entries, numel in shares]
            print(allocation, dict(zip(kinds, shown, strict=True)))
            panel.barh(rows + shift, shown, 0.4, label=f"{allocation}, {recipes[allocation]}")
        panel.set(yticks=rows, yticklabels=list(kinds), xlabel="share of weights chosen (%)")
        panel.invert_yaxis()
        panel.legend(title="allocation, precondition")


def _train(work: Path, name: str, **settings: Any) -> Path:
    from deltakit.training.config_file import resolve
    from deltakit.training.run import train

    places = {"model": work / "base", "data": work / "tasks" / "family", "output_dir": work / name}
    told = {key: str(place) for key, place in places.items()}
    train(resolve({}, {**SETTINGS, **told, **settings}), quiet=True)
    return work / name


def _accuracy(work: Path, file: Path) -> float:
    from deltakit.training.evaluate import EvaluateConfig, evaluate

    config = EvaluateConfig(
        model=str(work / "base"),
        data=str(work / "tasks" / "family"),
        task=SETTINGS["task"],
        max_length=SETTINGS["max_length"],
    )
    return float(evaluate(config, [file], split="validation")["metrics"]["accuracy"])


def themed(path: Path) -> None:
    """Let paper, ink and grids of an SVG follow the reader's theme."""
    text = path.read_text(encoding="utf-8")
    for number, colour in enumerate(THEME):
        text = text.replace(colour, f"var(--c{number}, {colour})")
    light = "; ".join(f"--c{n}: {colour}" for n, colour in enumerate(THEME))
    dark = "; ".join(f"--c{n}: {colour}" for n, colour in enumerate(THEME.values()))
    rules = f"svg {{ {light} }} text {{ fill: var(--c1) }} use {{ color: var(--c1) }}"
    style = f"<style>{rules} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    head, close, rest = text.partition("<defs>")
    path.write_text(f"{head}{style}\n {close}{rest}", encoding="utf-8")


def exact(folder: Path) -> list[Path]:
    """Draw the figures that need no training."""
    paths = []
    for draw in (delta, schedules, late):
        paths.append(folder / f"{draw.__name__}.svg")
        draw(paths[-1])
        themed(paths[-1])
    return paths


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    exact(out)
    measured(out / "budgets.svg", out / "spread.svg")
    themed(out / "budgets.svg")
    themed(out / "spread.svg")
