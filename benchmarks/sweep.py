"""The sweep behind the presets: settings of ID3 and random masks on half of the training texts.

    python benchmarks/sweep.py OUT [--threads 2] [--only NAME ...]

MiniLM-L6, docstring task, 100k entries, one epoch at batch 16 over the first half of the training
split; accuracy on the validation split. The test split is not read. Embeddings are left out of the
targets and the budget is shared by size unless the row says otherwise. What is done already in OUT
is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import docstrings

ID3 = ["--method", "id3", "--precondition", "none"]
FACTORED = ["--method", "id3", "--precondition", "factored"]
RANDOM = ["--method", "random"]
ROWS: dict[str, list[str]] = {
    "random, lr 1e-2": [*RANDOM, "--lr", "1e-2"],
    "random, lr 2e-2": [*RANDOM, "--lr", "2e-2"],
    "random, lr 3e-2": [*RANDOM, "--lr", "3e-2"],
    "ID3 exp 0, lr 1e-3": [*ID3, "--lr", "1e-3"],
    "ID3 exp 0, lr 3e-3": [*ID3, "--lr", "3e-3"],
    "ID3 exp 0, lr 1e-2": [*ID3, "--lr", "1e-2"],
    "ID3 exp -1, eps 1e-6, lr 1e-2": [*ID3, "--exp", "-1", "--eps", "1e-6", "--lr", "1e-2"],
    "ID3 exp 1, eps 1e-6, lr 1e-2": [*ID3, "--exp", "1", "--eps", "1e-6", "--lr", "1e-2"],
    "ID3 exp 2, eps 1e-6, lr 1e-2": [*ID3, "--exp", "2", "--eps", "1e-6", "--lr", "1e-2"],
    "ID3 exp 0, global, lr 3e-3": [*ID3, "--allocation", "global", "--lr", "3e-3"],
    "ID3 factored, lr 1e-2": [*FACTORED, "--lr", "1e-2"],
    "ID3 factored, lr 2e-2": [*FACTORED, "--lr", "2e-2"],
    "ID3 factored, lr 3e-2": [*FACTORED, "--lr", "3e-2"],
    "ID3 factored, lr 2e-2, 3 % of steps": [*FACTORED, "--lr", "2e-2", "--unmask-fraction", "0.03"],
    "ID3 factored, lr 2e-2, all steps": [*FACTORED, "--lr", "2e-2", "--unmask-fraction", "1"],
    "ID3 factored, lr 2e-2, shared step": [*FACTORED, "--lr", "2e-2", "--age", "shared"],
}


def half_of_the_data(out: Path) -> Path:
    """The first half of the training split and the validation split."""
    data = out / "data"
    if not data.exists():
        docstrings.write(out / "all")
        data.mkdir(parents=True)
        lines = (out / "all" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / "train.jsonl").write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
        (out / "all" / "validation.jsonl").rename(data / "validation.jsonl")
    return data


def accuracy(name: str, flags: list[str], data: Path, out: Path, threads: int) -> float:
    """Validation accuracy of one row, trained through the command line unless known already."""
    run = out / name.replace(" ", "_").replace(",", "").replace("%", "percent")
    metrics = run / "metrics.json"
    if not metrics.exists():
        command = [sys.executable, "-m", "deltakit", "train", "--quiet", "--json", "--force"]
        command += ["--model", str(docstrings.minilm_directory()), "--data", str(data)]
        command += ["--task", "sequence-classification", "--budget", "100k", "--epochs", "1"]
        command += ["--batch-size", "16", "--max-length", "64", "--eval-strategy", "budget"]
        command += ["--threads", str(threads), "--output-dir", str(run), *flags]
        subprocess.run(command, check=True, capture_output=True)
    return float(json.loads(metrics.read_text())["final"]["metrics"]["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    data = half_of_the_data(options.out)
    print(f"{'settings':40}validation accuracy, %")
    for name in options.only:
        found = accuracy(name, ROWS[name], data, options.out, options.threads)
        print(f"{name:40}{100 * found:.2f}", flush=True)


if __name__ == "__main__":
    main()
