"""Several methods on one task at equal budget with several seeds: `deltakit train --compare`."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltakit.budget import format_bytes
from deltakit.errors import ConfigError, nearest
from deltakit.figures import can_draw, drawn, metric_label
from deltakit.formats.atomic import write_bytes
from deltakit.pages.methods_page import methods_page
from deltakit.selection import METHODS
from deltakit.selection.recipe import settings_of
from deltakit.training.cells import Cell, run_cells
from deltakit.training.config_file import resolve
from deltakit.training.config_method import METHOD_SETTINGS
from deltakit.training.peers import PEERS, RATES
from deltakit.training.prepare import Say
from deltakit.training.presets import PRESETS
from deltakit.training.report_page import try_page
from deltakit.training.settings import AUTO
from deltakit.training.watch import finite

# What only some methods have, or would let runs differ in more than their method.
_LEFT_OUT = ("checkpoint_budgets", "early_stopping_patience", "seed")
_COSTS = ("train_seconds", "peak_bytes_above_model")


def compare_methods(
    file: Mapping[str, Any],
    flags: Mapping[str, Any],
    methods: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Mapping[str, Any] | None = None,
    force: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Train every method with every seed and write compare.json, compare.csv and compare.png.

    file, flags: settings as for `resolve`; each goes to the methods that take it, and every method
    has its own preset beneath. methods: names of methods, presets and peers. rates: method ->
    learning rate (of the head alone for the peer "head"). Runs go to `output_dir`/METHOD/seed-N; a
    finished one is not done again, and one that was interrupted goes on. Returns the content of
    compare.json. Raises ConfigError and OutputExistsError before anything is run.
    """
    given = dict(rates or {})
    _check(methods, seeds, given, flags)
    cells = [
        method_cell(name, seed, file, flags, given.get(name)) for name in methods for seed in seeds
    ]
    config = cells[0].config
    if config.eval_strategy == "no":
        raise ConfigError("compare: eval_strategy is no, so that there is nothing to compare")
    records = run_cells(cells, force=force, say=say)
    rows = [
        _row(name, seeds, records[number * len(seeds) : (number + 1) * len(seeds)])
        for number, name in enumerate(methods)
    ]
    metrics = [record["metric"] for record in records if "metric" in record]
    found = {
        "version": 1,
        "task": config.task,
        "model": config.model,
        "data": config.data,
        "budget": config.budget,
        "seeds": list(seeds),
        "metric": metrics[0] if metrics else None,
        "methods": rows,
    }
    folder = Path(cells[0].config.output_dir).parents[1]
    text = json.dumps(finite(found), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(folder / "compare.json", f"{text}\n".encode())
    write_bytes(folder / "compare.csv", _csv(found).encode())
    _plot(found, folder / "compare.png")
    try_page(folder / "report.html", lambda: methods_page(found), say)
    return found


def method_cell(
    name: str, seed: int, file: Mapping[str, Any], flags: Mapping[str, Any], rate: Any
) -> Cell:
    """The run of one method, preset or peer with one seed; see `compare_methods`.

    What the file says of its own method's settings is left to that method.
    """
    peer = name if name in PEERS.names() else None
    own: dict[str, Any] = {"seed": seed}
    if peer:  # the targets of a random mask; the rest of the method is not used
        own |= {"method": "random", "lr": RATES.get(name, 1e-3)}
    elif name in PRESETS:
        own |= {"method": PRESETS[name]["method"], "preset": name}
    else:
        own["method"] = name
    if rate is not None:
        own["head_lr" if name == "head" else "lr"] = rate
    takes = settings_of(own["method"])
    if "heuristic" in takes:
        takes = settings_of(own["method"], flags.get("heuristic", file.get("heuristic")))
    left_out = {*_LEFT_OUT, *METHOD_SETTINGS} - set(() if peer else takes)
    below = {key: value for key, value in file.items() if key not in left_out}
    left_out |= {"method", "preset"}
    above = {key: value for key, value in flags.items() if key not in left_out}
    config = resolve(below, {**above, **own})
    folder = Path(config.output_dir) / name.replace(":", "-") / f"seed-{seed}"
    settings = {**config.as_dict(), "output_dir": str(folder)}
    return Cell(f"{name}, seed {seed}", resolve(settings, {}), peer)


def comparison_table(found: Mapping[str, Any]) -> list[list[str]]:
    """One row per method under a heading: mean ± standard deviation over seeds, and costs.

    found: as in compare.json. All columns but the first are numbers.
    """
    rows = [["method", "trained", str(found["metric"]), "seconds", "peak memory", "file"]]
    for row in found["methods"]:
        mean, deviation = row["mean"], row["deviation"]
        shown = "failed" if mean is None else f"{mean:.4f}"
        shown += "" if deviation is None else f" ± {deviation:.4f}"
        trained = "" if row["trained"] is None else f"{row['trained']:,}"
        seconds = "" if row["train_seconds"] is None else f"{row['train_seconds']:.1f}"
        sizes = [_size(row[name]) for name in ("peak_bytes_above_model", "bytes")]
        rows.append([row["method"], trained, shown, seconds, *sizes])
    return rows


def _check(
    methods: Sequence[str], seeds: Sequence[int], rates: Mapping[str, Any], flags: Mapping[str, Any]
) -> None:
    known = [*PEERS.names(), *METHODS.names(), *PRESETS]
    for name in [*methods, *rates]:
        if name not in known or name not in methods:
            hint = nearest(name, known if name not in known else list(methods))
            raise ConfigError(f"compare: {name!r} is none of the methods to compare{hint}")
    if any(not given or len(set(given)) < len(given) for given in (methods, seeds)):
        raise ConfigError("compare: expected every method and every seed once, and one at least")
    if flags.get("lr", AUTO) != AUTO:
        raise ConfigError(f"compare: one lr for all methods; use --compare-lr {methods[0]}=...")


def _row(name: str, seeds: Sequence[int], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of a method; null where no seed, or for a deviation only one, succeeded."""
    runs: list[dict[str, Any]] = []
    for seed, record in zip(seeds, records, strict=True):
        if "error" in record:
            runs.append({"seed": seed, "error": record["error"]})
            continue
        final = record["final"]
        costs = {key: None if record["resumed"] else record[key] for key in _COSTS}
        runs.append(
            {
                "seed": seed,
                "metrics": final["metrics"],
                "value": final["metrics"][record["metric"]],
                "trained": record["budget"]["reached"],
                "extras": record["extras"]["weights"],
                "bytes": final["bytes"],
                **costs,
            }
        )
    values = [run["value"] for run in runs if "value" in run]
    return {
        "method": name,
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        **{key: _mean(runs, key) for key in _COSTS},
        **{key: _mean(runs, key, whole=True) for key in ("trained", "extras", "bytes")},
        "runs": runs,
    }


def _mean(runs: Sequence[Mapping[str, Any]], key: str, *, whole: bool = False) -> Any:
    known = [run[key] for run in runs if run.get(key) is not None]
    if not known:
        return None
    return round(statistics.fmean(known)) if whole else statistics.fmean(known)


def _csv(found: Mapping[str, Any]) -> str:
    """One line per run."""
    runs = [(row["method"], run) for row in found["methods"] for run in row["runs"]]
    names = next((list(run["metrics"]) for _, run in runs if "metrics" in run), [])
    plain = ("trained", "extras", "bytes", *_COSTS, "error")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", *names, *plain])
    for method, run in runs:
        metrics = [run.get("metrics", {}).get(name) for name in names]
        writer.writerow([method, run["seed"], *metrics, *(run.get(key) for key in plain)])
    return text.getvalue()


def _plot(found: Mapping[str, Any], path: Path) -> bool:
    """Draw every run as a point and every method's mean and deviation; False without matplotlib."""
    rows = [row for row in found["methods"] if row["mean"] is not None]
    if not rows or not can_draw():
        return False
    with drawn(path, 2 + 0.8 * len(rows), 4) as [axes]:
        places = range(len(rows))
        deviations = [row["deviation"] or 0.0 for row in rows]
        axes.errorbar(places, [row["mean"] for row in rows], deviations, fmt="o", capsize=4)
        for place, row in zip(places, rows, strict=True):
            values = [run["value"] for run in row["runs"] if "value" in run]
            axes.plot([place + 0.15] * len(values), values, "k.", markersize=3)
        axes.set_xticks(places, [row["method"] for row in rows], rotation=30, ha="right")
        axes.set_ylabel(metric_label(found["metric"]))
        axes.set_title(f"{found['task']}, {found['budget']} entries")
    return True


def _size(count: float | None) -> str:
    return "" if count is None else format_bytes(round(count))
