"""`deltakit train` on decoders and regression, and Hessian norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import colour_rows, write_gpt2, write_jsonl, write_llama
from train_lab import deltakit, evaluated, metrics, train_flags

from deltakit.formats.sdelta import load
from deltakit.merging.merge import merge


def test_hessian_norms_of_a_run(bert: Path, colours: Path, tmp_path: Path) -> None:
    """Rising numbers of entries, the support itself last; the run's bits are as without."""
    runs = {told: tmp_path / told for told in ("true", "false")}
    for told, run in runs.items():
        flags = train_flags(bert, colours, run, method="random", epochs=1, hessian=told)
        result = deltakit("train", *flags)
        assert result.exit_code == 0, result.output
    rows = metrics(runs["true"])["analyses"]["hessian"]
    assert [row["entries"] for row in rows] == [4, 18, 75, 300]
    assert 0 < rows[0]["norm"] < rows[-1]["norm"]
    assert (runs["true"] / "density.png").read_bytes().startswith(b"\x89PNG")
    assert not (runs["false"] / "density.png").exists()
    one, other = (load(run / "delta.sdelta") for run in runs.values())
    assert all((t.values == other.tensors[n].values).all() for n, t in one.tensors.items())


@pytest.mark.parametrize("form", ["chat", "completion", "text"])
def test_language_models(form: str, tmp_path: Path) -> None:
    """A decoder learns to answer; the loss falls, and merging gives the live logits."""
    model = write_llama(tmp_path / "llama")
    texts = [(f"the {c} cat", a) for c, a in (("red", "yes"), ("blue", "no")) for _ in range(20)]
    rows: dict[str, list[dict[str, Any]]] = {
        "completion": [
            {"prompt": p, "completion": f" {c}", "id": i} for i, (p, c) in enumerate(texts)
        ],
        "text": [{"text": f"{p} {c}", "id": i} for i, (p, c) in enumerate(texts)],
        "chat": [
            {
                "id": i,
                "messages": [
                    {"role": "user", "content": p},
                    {"role": "assistant", "content": c},
                ],
            }
            for i, (p, c) in enumerate(texts)
        ],
    }
    data = write_jsonl(tmp_path / "rows.jsonl", rows[form])
    flags = train_flags(model, data, tmp_path / "run", task="causal-lm", budget="5%", epochs=6)
    result = deltakit("train", *flags, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [r["eval_loss"] for r in logged if "eval_loss" in r]
    assert losses[-1] < losses[0]
    assert record["metric"] == "loss"
    assert record["best"]["metrics"]["loss"] == min(losses)
    merge(model, [tmp_path / "run/delta.sdelta"], tmp_path / "merged")
    data_flags = ["--data", data, "--task", "causal-lm", "--split", "validation"]
    delta = ["--delta", tmp_path / "run/delta.sdelta"]
    live = evaluated(tmp_path / "a.jsonl", "--model", model, *delta, *data_flags)
    merged = evaluated(tmp_path / "b.jsonl", "--model", tmp_path / "merged", *data_flags)
    assert live["metrics"] == merged["metrics"] == record["final"]["metrics"]
    assert live["logits_sha256"] == merged["logits_sha256"]


def test_decoder_with_a_new_head_merges_with_its_padding_token(tmp_path: Path) -> None:
    """A GPT-2 classifier needs a padding token in its config, which merging must write."""
    model = write_gpt2(tmp_path / "gpt2")
    data = write_jsonl(tmp_path / "rows.jsonl", colour_rows(40))
    result = deltakit("train", *train_flags(model, data, tmp_path / "run", max_steps=4))
    assert result.exit_code == 0, result.output
    merge(model, [tmp_path / "run/delta.sdelta"], tmp_path / "merged")
    data_flags = ["--data", data, "--task", "sequence-classification", "--split", "validation"]
    delta = ["--delta", tmp_path / "run/delta.sdelta"]
    live = evaluated(tmp_path / "a.jsonl", "--model", model, *delta, *data_flags)
    merged = evaluated(tmp_path / "b.jsonl", "--model", tmp_path / "merged", *data_flags)
    assert live["logits_sha256"] == merged["logits_sha256"]
    assert load(tmp_path / "run/delta.sdelta").config["pad_token_id"] == 5


def test_regression_and_early_stopping(bert: Path, tmp_path: Path) -> None:
    """Float labels give one output; training stops when the metric no longer improves."""
    rows = [{"text": r["text"], "label": len(r["text"]) / 10} for r in colour_rows(60)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = train_flags(bert, data, tmp_path / "run", epochs=30, early_stopping_patience=2, lr=1e-9)
    result = deltakit("train", *flags, "--head-lr", "1e-9", "--metric", "spearman", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert list(record["final"]["metrics"]) == ["pearson", "spearman", "mse"]
    assert record["steps"] < 30 * 4
    assert load(tmp_path / "run/delta.sdelta").config["problem_type"] == "regression"
