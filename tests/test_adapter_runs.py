"""`deltakit train --adapter` on encoders and decoders: a run's file gives its metrics again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import (
    colour_rows,
    tagged_rows,
    write_bert,
    write_jsonl,
    write_llama,
    write_opt,
    write_t5,
)
from train_lab import deltakit, metrics

import deltakit as dk
from deltakit.adapters.initial import all_initial_values, trained_values

Write = Callable[[Path], Path]
LORA = ["--adapter", "lora", "--rank", "4"]
PFEIFFER = ["--adapter", "pfeiffer", "--adapter-options", "reduction_factor=4"]
NF4 = ["--quantize", "nf4"]
TASKS = {
    "sequence-classification": colour_rows(60),
    "token-classification": tagged_rows(60),
    "seq2seq-lm": [{"source": r["text"], "target": r["label"]} for r in colour_rows(60)],
    "causal-lm": [{"prompt": r["text"], "completion": f" {r['label']}"} for r in colour_rows(60)],
}
RUNS: dict[str, tuple[Write, str, list[str]]] = {
    "bert": (write_bert, "token-classification", LORA),
    "t5": (write_t5, "sequence-classification", LORA),
    "t5, tokens": (write_t5, "token-classification", PFEIFFER),
    "t5, targets": (write_t5, "seq2seq-lm", LORA),
    "t5, targets, nf4": (write_t5, "seq2seq-lm", [*LORA, *NF4]),
    "opt": (write_opt, "sequence-classification", PFEIFFER),
    "opt, nf4": (write_opt, "sequence-classification", [*PFEIFFER, *NF4]),
    "opt, text": (write_opt, "causal-lm", LORA),
    "opt, text, nf4": (write_opt, "causal-lm", [*LORA, *NF4]),
    "llama": (write_llama, "causal-lm", [*PFEIFFER]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_its_file_agree(name: str, tmp_path: Path) -> None:
    """A share of the adapter is the budget; evaluating the delta gives the run's own metrics."""
    write, task, flags = RUNS[name]
    model, run = write(tmp_path / "model"), tmp_path / "run"
    data = write_jsonl(tmp_path / "rows.jsonl", TASKS[task])
    shared = ["--model", model, "--data", data, "--task", task]
    if "--quantize" in flags:
        shared += NF4
    adapter = [flag for flag in flags if flag not in NF4]
    result = deltakit(
        *("train", *shared, *adapter, "--budget", "25%", "--epochs", "2", "--lr", "0.05"),
        *("--output-dir", run, "--json"),
    )
    assert result.exit_code == 0, result.output
    record = metrics(run)
    assert record["adapter"]["kind"] == adapter[1]
    delta = dk.load(run / "delta.sdelta")
    assert delta.nnz == record["adapter"]["weights"] // 4 == record["budget"]["resolved"]
    before, after = all_initial_values(delta), trained_values(delta)
    assert any((before[n] != after[n]).any() for n in before)
    told = deltakit(
        *("evaluate", *shared, "--delta", run / "delta.sdelta", "--split", "validation", "--json")
    )
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["metrics"] == record["final"]["metrics"]


def test_budget_checkpoints_nest(bert: Path, colours: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = deltakit(
        *("train", "--model", bert, "--data", colours, "--task", "sequence-classification"),
        *(*LORA, "--budget", "100", "--checkpoint-budgets", "40,70", "--unmask-fraction", "1"),
        *("--epochs", "2", "--lr", "0.05", "--output-dir", run),
    )
    assert result.exit_code == 0, result.output
    whole = dk.load(run / "delta.sdelta")
    for mark in (40, 70):
        part = dk.load(run / f"budget-{mark}.sdelta")
        assert part.nnz == mark and part.adapter == whole.adapter
        by_order = dk.truncate(whole, mark, by="order")
        for name, tensor in part.tensors.items():
            assert (tensor.indices == by_order.tensors[name].indices).all()


def test_presets_follow_the_adapter(bert: Path, colours: Path, tmp_path: Path) -> None:
    from deltakit.training.config_file import resolve

    given = {
        "model": str(bert),
        "data": str(colours),
        "task": "sequence-classification",
        "budget": "10",
        "output_dir": str(tmp_path),
    }
    assert resolve({}, given).preset == "id3-default"
    assert resolve({}, {**given, "adapter": "lora"}).preset == "id3-adapter"
    assert resolve({}, {**given, "adapter": "lora", "method": "random"}).preset == "random-adapter"
    assert resolve({**given, "preset": "id3-default"}, {"adapter": "lora"}).preset == "id3-adapter"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rank", "4"], "setting rank needs an adapter"),
        (["--adapter", "lorra"], "lora"),
        (["--adapter", "lora", "--adapter-options", "ranks=4"], "ranks"),
        (["--masked", "zero"], "masked zero"),
        ([*LORA, "--masked", "zero"], "chosen before training"),
        ([*LORA, "--budget", "200%"], "more than the whole"),
        ([*LORA, "--budget", "1m"], "budget 1000000 cannot be met"),
    ],
)
def test_mistakes_are_told_in_one_line(
    flags: list[str], said: str, bert: Path, colours: Path, tmp_path: Path
) -> None:
    result = deltakit(
        *("train", "--model", bert, "--data", colours, "--task", "sequence-classification"),
        *("--budget", "10", "--output-dir", tmp_path / "run", *flags),
    )
    assert result.exit_code in (1, 2)
    assert said in result.output.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "delta.sdelta").exists()
