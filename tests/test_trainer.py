"""`SparseTrainer`: the Trainer's features on the sparse engine, and resuming to the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    EvalPrediction,
    TrainerCallback,
    TrainingArguments,
)

import deltakit as dk
from deltakit.errors import ConfigError, MissingFileError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.selection.methods import Method

STEPS = 8  # optimizer steps of a run: 64 examples, batches of 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder checkpoint without head, as pretrained models come."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    BertForSequenceClassification(config).bert.save_pretrained(path)
    return path


def _model(base: Path, **kwargs: Any) -> BertForSequenceClassification:
    torch.manual_seed(1)
    return BertForSequenceClassification.from_pretrained(base, num_labels=3, **kwargs)


def _examples(count: int = 64) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for _ in range(count):
        label = int(torch.randint(0, 3, (1,), generator=generator))
        tokens = torch.randint(5 + 15 * label, 20 + 15 * label, (9,), generator=generator)
        rows.append({"input_ids": tokens.tolist(), "labels": label})
    return rows


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _trainer(
    base: Path, out: Path, method: Method | None = None, model: Any = None, **kwargs: Any
) -> dk.SparseTrainer:
    options = {k: kwargs.pop(k) for k in list(kwargs) if k in TrainingArguments.__annotations__}
    args = TrainingArguments(
        output_dir=str(out),
        **{
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "seed": 5,
            **options,
        },
    )
    return dk.SparseTrainer(
        model or _model(base),
        args,
        method=method or dk.ID3(budget=200, unmask_fraction=0.5),
        train_dataset=_examples(),
        eval_dataset=_examples(24),
        compute_metrics=_accuracy,
        **kwargs,
    )


def test_a_run_meets_its_budget_and_merges_to_the_live_bits(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(base, tmp_path / "run", checkpoint_budgets=[70, 120, 999])
    trainer.train()
    delta = trainer.delta()
    assert delta.nnz == 200
    assert max(int(t.order.max()) for t in delta.tensors.values() if t.order is not None) == 3
    assert list(delta.extras) == ["classifier.bias", "classifier.weight"]
    assert all(not name.startswith("bert.") for name in delta.tensors)  # the file's own names
    assert [row["budget"] for row in trainer.budget_results] == [70, 120]
    for row in trainer.budget_results:
        assert dk.load(row["path"]).nnz == row["budget"]
        assert set(row["metrics"]) == {"loss", "accuracy"}
    path = tmp_path / "delta.sdelta"
    dk.save(delta, path)
    dk.merge(base, [path], tmp_path / "merged")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    live = trainer.model.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in merged.state_dict().items())


def test_budget_checkpoints_are_nested_by_order(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(base, tmp_path, checkpoint_budgets=[70, 120])
    trainer.train()
    for row in trainer.budget_results:
        marked, cut = dk.load(row["path"]), dk.truncate(trainer.delta(), row["budget"], by="order")
        assert list(marked.tensors) == list(cut.tensors)
        for name, tensor in marked.tensors.items():
            np.testing.assert_array_equal(tensor.indices, cut.tensors[name].indices)


@pytest.mark.parametrize("method", [dk.ID3(budget=200, steps=6), dk.RandomMask(budget=200)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resuming_equals_never_having_stopped(
    base: Path, tmp_path: Path, method: Method, accumulate: int
) -> None:
    """Bit for bit: support, values, extras, and the results of budget checkpoints."""
    marks = [] if isinstance(method, dk.RandomMask) else [50, 120]
    options: dict[str, Any] = {
        "gradient_accumulation_steps": accumulate,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "checkpoint_budgets": marks,
        "warmup_steps": 2,
        "weight_decay": 0.1,
    }
    straight = _trainer(base, tmp_path / "a", method, **options)
    straight.train()
    stop_at = 4
    first = _trainer(base, tmp_path / "b", method, callbacks=[_RaiseSignal(stop_at)], **options)
    first.train()
    assert first.interrupted == signal.SIGTERM and first.state.global_step == stop_at
    folder = tmp_path / "b" / f"checkpoint-{stop_at}"
    assert first.interrupted_checkpoint == folder
    assert dk.load(folder / "delta.sdelta").equals(first.delta())
    second = _trainer(base, tmp_path / "b", method, **options)
    second.train(resume_from_checkpoint=str(folder))
    assert second.state.global_step == straight.state.global_step
    assert second.delta().equals(straight.delta())
    results = [[{**row, "path": ""} for row in t.budget_results] for t in (straight, second)]
    assert results[0] == results[1] and len(results[0]) == len(marks)


class _RaiseSignal(TrainerCallback):
    """Sends this process a SIGTERM during a step, as a scheduler would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_are_given_back(base: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    _trainer(base, tmp_path, max_steps=1).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_best_checkpoint_is_loaded_at_the_end(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(
        base,
        tmp_path,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert dk.load(Path(best) / "delta.sdelta").equals(trainer.delta())
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_an_early_stop_records_budget_and_reached(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(
        base,
        tmp_path,
        dk.ID3(budget=200),
        num_train_epochs=4,
        learning_rate=0.0,
        extras_lr=0.0,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    trainer.train()
    stopped = trainer.state.global_step
    assert stopped < 32
    recorded = trainer.delta().provenance
    assert recorded["budget"] == 200
    assert recorded["reached"] == trainer.delta().nnz < 200


def test_bfloat16_autocast_and_bfloat16_weights(base: Path, tmp_path: Path) -> None:
    auto = _trainer(base, tmp_path / "a", bf16=True)
    auto.train()
    assert auto.delta().nnz == 200
    narrow = _trainer(base, tmp_path / "b", model=_model(base, dtype=torch.bfloat16))
    narrow.train()
    delta = narrow.delta()
    assert {(t.dtype, t.trained_dtype) for t in delta.tensors.values()} == {("float32", "bfloat16")}
    path = tmp_path / "narrow.sdelta"
    dk.save(delta, path)
    dk.merge(base, [path], tmp_path / "merged", dtype="trained")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    live = narrow.model.state_dict()
    for name, tensor in merged.state_dict().items():
        assert tensor.dtype == live[name].dtype and torch.equal(tensor, live[name]), name


def test_applying_a_delta_gives_the_trained_bits_and_takes_them_back(
    base: Path, tmp_path: Path
) -> None:
    trainer = _trainer(base, tmp_path)
    trainer.train()
    fresh = _model(base)
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    with dk.applied(fresh, trainer.delta()):
        live = trainer.model.state_dict()
        assert all(torch.equal(t, live[n]) for n, t in fresh.state_dict().items())
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())


def test_settings_that_cannot_work_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float16 loss scaling is not supported"):
        _trainer(base, tmp_path, fp16=True)
    with pytest.raises(ConfigError, match="leaves nothing to resume from"):
        _trainer(base, tmp_path, save_only_model=True)
    (tmp_path / "checkpoint-3").mkdir()
    trainer = _trainer(base, tmp_path)
    with pytest.raises(MissingFileError, match=r"holds no optimizer\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_identity_is_that_of_the_file(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(base, tmp_path)
    trainer.train()
    identity = trainer.delta().base
    assert identity is not None and identity.total_weights == Checkpoint(base).total_weights
    assert identity.model_id == base.name
