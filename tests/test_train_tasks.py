"""Every task from end to end: trained, merged, loaded by transformers, the same to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors import safe_open
from tiny_models import (
    bright_images,
    colour_rows,
    tagged_rows,
    write_bert,
    write_jsonl,
    write_llama,
    write_resnet,
    write_t5,
    write_vit,
)
from transformers import AutoModelForImageClassification, TrainingArguments, ViTImageProcessorPil

import deltakit as dk
from deltakit.cli.main import main
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.coordinates import checkpoint_names, live_tensors
from deltakit.training.collate import Examples

Write = Callable[[Path], Path]


def _sentences(path: Path) -> Path:
    rows = [{"source": r["text"], "target": r["label"]} for r in colour_rows(60)]
    return write_jsonl(path.with_suffix(".jsonl"), rows)


def _options(path: Path) -> Path:
    choices = ["red", "green", "blue"]
    rows = [
        {"prompt": r["text"] + " ", "choices": choices, "answer": choices.index(r["label"])}
        for r in colour_rows(60)
    ]
    return write_jsonl(path.with_suffix(".jsonl"), rows)


def _tags(path: Path) -> Path:
    return write_jsonl(path.with_suffix(".jsonl"), tagged_rows(60))


def _images(path: Path) -> Path:
    images, labels = bright_images(160)
    np.savez(path.with_suffix(".npz"), images=images, labels=labels)
    return path.with_suffix(".npz")


def _vit_with_processor(folder: Path) -> Path:
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return write_vit(folder, channels=3)


WRITTEN = ("--generate-metrics", "exact_match,bleu", "--max-new-tokens", "3")
RUNS: dict[str, tuple[str, Write, Write, tuple[str, ...], list[str]]] = {
    "tags": (
        "token-classification",
        write_bert,
        _tags,
        (),
        ["f1", "precision", "recall", "token_accuracy", "loss"],
    ),
    "targets": (
        "seq2seq-lm",
        write_t5,
        _sentences,
        WRITTEN,
        ["loss", "perplexity", "token_accuracy", "exact_match", "bleu"],
    ),
    "options": (
        "causal-lm",
        write_llama,
        _options,
        WRITTEN,
        [
            *("accuracy", "accuracy_norm", "loss", "perplexity", "token_accuracy"),
            *("exact_match", "bleu"),
        ],
    ),
    "options of an encoder and decoder": (
        "seq2seq-lm",
        write_t5,
        _options,
        (),
        ["accuracy", "accuracy_norm", "loss", "perplexity", "token_accuracy"],
    ),
    "images": (
        "image-classification",
        write_vit,
        _images,
        (),
        ["accuracy", "macro_f1", "matthews", "loss"],
    ),
    "images by the model's processor": (
        "image-classification",
        _vit_with_processor,
        _images,
        (),
        ["accuracy", "macro_f1", "matthews", "loss"],
    ),
    "images with BatchNorm": (
        "image-classification",
        write_resnet,
        _images,
        (),
        ["accuracy", "macro_f1", "matthews", "loss"],
    ),
}


def _deltakit(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("name", RUNS)
def test_train_merge_evaluate(name: str, tmp_path: Path) -> None:
    """The loss falls, the budget is met, and the merged model scores as the live one did."""
    task, write_model, write_data, more, metrics = RUNS[name]
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    run = tmp_path / "run"
    flags = {"model": model, "data": data, "task": task, "output-dir": run}
    flags |= {"budget": 400, "epochs": 4, "batch-size": 8, "lr": 0.02, "head-lr": 0.02}
    settings = [part for key, value in flags.items() for part in (f"--{key}", value)]
    result = _deltakit("train", *settings, *more, "--json")
    record = json.loads(result.stdout)
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [r["eval_loss"] for r in logged if "eval_loss" in r]
    assert losses[-1] < losses[0]
    assert record["budget"]["reached"] == 400
    assert record["metric"] == metrics[0]
    assert list(record["final"]["metrics"]) == metrics
    dk.merge(model, [run / "delta.sdelta"], tmp_path / "merged")
    common = ["--data", data, "--task", task, "--split", "validation", "--json", *more]
    found = []
    for number, which in enumerate(
        (["--model", model, "--delta", run / "delta.sdelta"], ["--model", tmp_path / "merged"])
    ):
        lines = tmp_path / f"{number}.jsonl"
        told = _deltakit("evaluate", *which, *common, "--predictions", lines)
        found.append((json.loads(told.stdout), lines.read_text()))
    (live, live_lines), (merged, merged_lines) = found
    assert live["metrics"] == merged["metrics"] == record["final"]["metrics"]
    assert live["logits_sha256"] == merged["logits_sha256"]
    assert live_lines == merged_lines


def test_tags_of_the_words_are_told(tmp_path: Path) -> None:
    """--predictions names them, one per word."""
    model = write_bert(tmp_path / "model")
    rows = tagged_rows(12)
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    common = ["--model", model, "--data", data, "--task", "token-classification"]
    run = tmp_path / "run"
    flags = ["--budget", 50, "--max-steps", 2, "--validation-fraction", 0, "--eval-strategy", "no"]
    _deltakit("train", *common, *flags, "--output-dir", run)
    delta = ["--delta", run / "delta.sdelta", "--predictions", tmp_path / "told.jsonl"]
    _deltakit("evaluate", *common, *delta, "--split", "train")
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert [line["label"] for line in told] == [row["tags"] for row in rows]
    assert [len(line["prediction"]) for line in told] == [len(row["tags"]) for row in rows]


@pytest.mark.parametrize("write", [write_vit, write_resnet])
def test_only_the_head_is_missing_from_the_checkpoint(write: Write, tmp_path: Path) -> None:
    """transformers renames a ViT's modules when it loads one; every tensor is met in the file."""
    base = write(tmp_path / "base")
    model = AutoModelForImageClassification.from_pretrained(base, num_labels=4)
    names = checkpoint_names(model, Checkpoint(base), buffers=True)
    new = {name for name, stored in names.items() if stored is None}
    assert new == {name for name in names if name.startswith("classifier.")}
    found = [stored for stored in names.values() if stored is not None]
    assert len(found) == len(set(found))
    file = safe_open(base / "model.safetensors", "pt")
    live = live_tensors(model)
    assert all(torch.equal(file.get_tensor(s), live[n]) for n, s in names.items() if s is not None)


def test_batch_norm_statistics_travel_with_the_delta(tmp_path: Path) -> None:
    """What training measured is what the merged model uses in evaluation, to the last bit."""
    base = write_resnet(tmp_path / "base")
    images, labels = bright_images(48)
    pixels = np.repeat(images[:, None], 3, axis=1).astype(np.float32) / 255 + 1  # off centre
    examples = [{"pixel_values": p, "labels": int(n)} for p, n in zip(pixels, labels, strict=True)]
    model = AutoModelForImageClassification.from_pretrained(base, num_labels=4)
    before = {n: b.clone() for n, b in model.named_buffers()}
    trainer = dk.SparseTrainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=8,
            max_steps=6,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
        method=dk.RandomMask(budget=60),
        base=base,
        train_dataset=Examples(examples),
    )
    trainer.train()
    delta = trainer.delta()
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert {name.rpartition(".")[2] for name in changed} == {
        *("running_mean", "running_var", "num_batches_tracked")
    }
    assert {name.removeprefix("resnet.") for name in changed} <= set(delta.extras)
    assert delta.nnz == 60
    dk.save(delta, tmp_path / "run.sdelta")
    dk.merge(base, [tmp_path / "run.sdelta"], tmp_path / "merged")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert type(merged) is transformers.ResNetForImageClassification
    batch = torch.from_numpy(pixels)
    with torch.no_grad():
        found = merged.eval()(pixel_values=batch).logits
        assert torch.equal(found, model.eval()(pixel_values=batch).logits)
        for name, buffer in model.named_buffers():  # without them it would be another model
            buffer.copy_(before[name])
        assert not torch.equal(found, model(pixel_values=batch).logits)
