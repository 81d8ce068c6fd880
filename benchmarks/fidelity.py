"""One method at one learning rate and seed on the docstring task, for tables of methods.

    python benchmarks/fidelity.py OUT ROW [--lr X] [--seed N] [--threads 2] [-- FLAG ...]

ROW is a row below, a method, a preset or a peer (full, head, lora, shira); FLAGs are those of
`deltakit train`. MiniLM-L6, 100k entries, two epochs at batch 32, 64 tokens, as in `real_run.py`.
Appends a line to OUT/fidelity.jsonl: accuracy on the validation and test splits, seconds of
training, peak memory above the loaded model, size of the file. A line that is there already is not
made again. Choose settings on the validation split; the test split is for what is reported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import docstrings

ROWS = {
    **{f"id3 exp {x}": ["--method", "id3", "--exp", x] for x in ("0", "1", "-1", "2")},
    **{f"id3-paper exp {x}": ["--preset", "id3-paper", "--exp", x] for x in ("0", "1", "-1", "2")},
    "static d3": ["--method", "static", "--heuristic", "d3"],
    "repeat d3": ["--method", "repeat", "--heuristic", "d3"],
}
SETTINGS = {
    "task": "sequence-classification",
    "budget": "100k",
    "epochs": 2,
    "batch_size": 32,
    "max_length": 64,
    "eval_strategy": "budget",
}
PEERS = ("full", "head", "lora", "shira")
METRIC = "accuracy"


def sparse(row: str, flags: list[str], given: dict[str, Any], run: Path) -> dict[str, Any]:
    """Train and evaluate on the test split, through the command line."""
    own = ROWS.get(row) or _named(row)
    told = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    record = _deltakit("train", *told, *own, *flags, "--output-dir", str(run), "--force")
    shared = [part for k in ("model", "data", "task") for part in (f"--{k}", str(given[k]))]
    test = _deltakit(
        *("evaluate", *shared, "--delta", str(run / "delta.sdelta"), "--split", "test"),
        *("--max-length", str(given["max_length"]), "--threads", str(given["threads"])),
    )
    return {**record, "test": test["metrics"][METRIC]}


def peer(row: str, flags: list[str], given: dict[str, Any], run: Path) -> dict[str, Any]:
    """Train a peer in this process, which does nothing else. flags: pairs of `--name value`."""
    from deltakit.training.collate import Examples
    from deltakit.training.config_file import resolve
    from deltakit.training.peer_run import train_peer
    from deltakit.training.peers import RATES
    from deltakit.training.prepare import prepare

    rate = given.pop("lr", None) or RATES.get(row, 1e-3)
    own = {"method": "random", "output_dir": str(run), "head_lr" if row == "head" else "lr": rate}
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
    own |= dict(zip(names, flags[1::2], strict=True))
    config = resolve(given, own)
    held_out = prepare(resolve(given, {**own, "validation_split": "test"}), lambda text: None)
    test = Examples(held_out.examples["validation"])
    return train_peer(
        row,
        config,
        examine=lambda trainer: {"test": trainer.evaluate(test)[f"eval_{METRIC}"]},
    )


def _named(row: str) -> list[str]:
    from deltakit.training.presets import PRESETS

    return ["--preset" if row in PRESETS else "--method", row]


def _deltakit(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "deltakit", *arguments, "--json", "--quiet"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("row")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    told = sys.argv[1:]
    cut = told.index("--") if "--" in told else len(told)
    options, flags = parser.parse_args(told[:cut]), told[cut + 1 :]
    key = {"row": options.row, "lr": options.lr, "seed": options.seed, "flags": flags}
    lines = options.out / "fidelity.jsonl"
    done = map(json.loads, lines.read_text().splitlines()) if lines.exists() else ()
    if any({name: line[name] for name in key} == key for line in done):
        print("done already", file=sys.stderr)
        return
    data = options.out / "data"
    if not data.exists():
        docstrings.write(data)
    given = {**SETTINGS, "model": str(docstrings.minilm_directory()), "data": str(data)}
    given |= {"seed": options.seed, "threads": options.threads}
    given |= {} if options.lr is None else {"lr": options.lr}
    parts = [options.row, options.lr, options.seed, *flags]
    run = options.out / "run" / "_".join(str(part).replace(" ", "-") for part in parts)
    if options.row in PEERS:
        record = peer(options.row, flags, given, run)
    else:
        record = sparse(options.row, flags, given, run)
    line = {
        **key,
        "rate": record.get("lr", options.lr),  # what auto found
        "entries": record["budget"]["reached"],
        "validation": record["final"]["metrics"][METRIC],
        "test": record["test"],
        "train_seconds": record["train_seconds"],
        "peak_bytes_above_model": record["peak_bytes_above_model"],
        "bytes": record["final"]["bytes"],
    }
    with lines.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    shutil.rmtree(run)  # 100 MB where a checkpoint of everything was saved


if __name__ == "__main__":
    main()
