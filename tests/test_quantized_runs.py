"""`deltakit train --quantize` and `deltakit evaluate --quantize`, on every task's own path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_quantized_layers import write_opt
from tiny_models import (
    colour_rows,
    decoder_tokenizer,
    tagged_rows,
    write_bert,
    write_jsonl,
    write_llama,
    write_t5,
)
from train_lab import deltakit, evaluated, metrics, train_flags

import deltakit as dk


def _opt(folder: Path) -> Path:
    write_opt(folder)
    decoder_tokenizer().save_pretrained(folder)
    return folder


def _pairs(count: int) -> list[dict[str, Any]]:
    return [{"source": r["text"], "target": r["label"]} for r in colour_rows(count)]


def _prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": r["text"], "completion": r["label"]} for r in colour_rows(count)]


TASKS: dict[str, tuple[Any, Any, str]] = {
    "bert, sequences": (write_bert, colour_rows, "sequence-classification"),
    "bert, tokens": (write_bert, tagged_rows, "token-classification"),
    "t5": (write_t5, _pairs, "seq2seq-lm"),
    "opt": (_opt, _prompts, "causal-lm"),
    "llama": (write_llama, _prompts, "causal-lm"),
}


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_is_the_trained_model(name: str, tmp_path: Path) -> None:
    write, rows, task = TASKS[name]
    model, data = write(tmp_path / "base"), write_jsonl(tmp_path / "data.jsonl", rows(48))
    more = {"checkpoint_budgets": 100, "unmask_fraction": 1, "target": "all-linear"}
    flags = train_flags(model, data, tmp_path / "run", task=task, quantize="nf4", **more)
    result = deltakit("train", *flags)
    assert result.exit_code == 0, result.output
    found = metrics(tmp_path / "run")
    assert found["budget"]["reached"] == 300
    assert [mark["entries"] for mark in found["marks"]] == [100]
    assert found["quantization"]["kind"] == "nf4"
    delta = tmp_path / "run" / "delta.sdelta"
    assert dk.load(delta).provenance["quantization"] == found["quantization"]
    flags = ["--model", model, "--data", data, "--task", task, "--split", "validation"]
    flags += ["--delta", delta]
    full = deltakit("merge", model, delta, "-o", tmp_path / "merged")
    assert full.exit_code == 0, full.output
    again = evaluated(tmp_path / "p.jsonl", *flags, "--quantize", "nf4")
    assert again["metrics"] == pytest.approx(found["final"]["metrics"], abs=0)
    plain = evaluated(tmp_path / "q.jsonl", *flags)
    assert plain["logits_sha256"] != again["logits_sha256"]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    model, data = write_bert(tmp_path / "b"), write_jsonl(tmp_path / "d.jsonl", colour_rows(20))
    for more, told in [
        ({"double_quantization": "true"}, "setting double_quantization needs a quantised base"),
        ({"quantize": "int8", "compute_dtype": "bfloat16"}, "int8 has neither"),
        ({"quantize": "nf4", "hessian": "true"}, "hessian is measured on full-precision weights"),
    ]:
        result = deltakit("train", *train_flags(model, data, tmp_path / "run", **more))
        assert result.exit_code == 1
        assert told in result.output
        assert len(result.output.splitlines()) == 1
