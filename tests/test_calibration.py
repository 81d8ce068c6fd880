"""Passes over training data: repeatable, on the model's device, and without a trace."""

from __future__ import annotations

from collections import namedtuple
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_bert, write_gpt2
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from deltakit.errors import ConfigError, DataError
from deltakit.training.calibration import Batches, TrainerCalibration

Pair = namedtuple("Pair", "x y")


def _mean(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch["x"]).mean()
    return loss


def test_a_list_is_shuffled_by_seed_and_never_ends() -> None:
    batches = Batches(list(range(6)), _mean)
    first = list(islice(batches.batches(3), 18))
    assert first == list(islice(batches.batches(3), 18))
    assert first != list(islice(batches.batches(4), 18))
    epochs = [first[:6], first[6:12], first[12:]]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_loader_shuffles_by_seed_and_leaves_the_generator_alone() -> None:
    loader = DataLoader(TensorDataset(torch.arange(8)), batch_size=2, shuffle=True)
    batches = Batches(loader, _mean)

    def order(seed: int) -> list[int]:
        return torch.cat([b[0] for b in islice(batches.batches(seed), 12)]).tolist()

    before = torch.get_rng_state()
    first = order(1)
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(first[:8]) == list(range(8)) and first[:8] != first[8:16]
    torch.rand(5)
    assert order(1) == first and order(2) != first
    assert [b[0].tolist() for b in batches.examples(3)] == [
        b[0].tolist() for b in batches.examples(3)
    ]


def test_examples_are_rows_of_any_nesting() -> None:
    x, y = torch.arange(6).view(3, 2), torch.arange(3)
    for batch in (
        (x, y),
        [x, y],
        Pair(x, y),
        {"x": x, "y": y, "scale": torch.tensor(2.0), "name": "n"},
        {"inputs": {"x": x}, "rest": (y, None)},
    ):
        rows = list(Batches([batch, batch], _mean).examples(5))
        assert len(rows) == 5 and type(rows[0]) is type(batch)
    rows = list(Batches([Pair(x, y)], _mean).examples(9))
    assert [r.x.tolist() for r in rows] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [r.y.tolist() for r in rows] == [[0], [1], [2]]
    with pytest.raises(DataError, match=r"one first dimension, found \[2, 3\]"):
        next(Batches([(x, y[:2])], _mean).examples(1))
    with pytest.raises(DataError, match="found none"):
        next(Batches(["text"], _mean).examples(1))


def test_batches_refuse_what_they_cannot_repeat_or_answer() -> None:
    with pytest.raises(ConfigError, match="only once"):
        Batches(iter([1, 2]), _mean)
    with pytest.raises(DataError, match="no batch"):
        next(Batches([], _mean).batches(0))
    with pytest.raises(ConfigError, match="logits="):
        Batches([1], _mean).logits(nn.Linear(1, 1), 1)


def test_batches_follow_the_model_to_its_device() -> None:
    """The meta device stands in for any other than the CPU."""
    model = nn.Linear(2, 1, device="meta")
    batches = Batches([{"x": torch.ones(3, 2)}], _mean, lambda m, b: m(b["x"]))
    batch = next(batches.batches(0))
    assert batches.loss(model, batch).device.type == "meta"
    assert batches.logits(model, batch).device.type == "meta"


def _trainer(model: Any, data: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=data)


def _rows(count: int, labels: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 20, (count, 5), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones(5, dtype=torch.long), "labels": labels(i)}
        for i, row in enumerate(tokens)
    ]


def test_a_trainers_data_comes_in_seeded_batches_of_its_size(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        write_bert(tmp_path / "base"), num_labels=3
    )
    data = _rows(7, lambda i: i % 3)
    trainer = _trainer(model, data, tmp_path / "run")
    calibration = TrainerCalibration(trainer)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order = [b["input_ids"] for b in islice(calibration.batches(5), 6)]
    assert torch.equal(before, torch.get_rng_state())
    assert [len(b) for b in order] == [3, 3, 1, 3, 3, 1]
    again = [b["input_ids"] for b in islice(calibration.batches(5), 6)]
    assert all(torch.equal(a, b) for a, b in zip(order, again, strict=True))
    other = [b["input_ids"] for b in islice(calibration.batches(6), 6)]
    assert not torch.equal(torch.cat(order), torch.cat(other))
    examples = list(calibration.examples(100))
    assert len(examples) == 7
    for example, row in zip(examples, data, strict=True):
        assert torch.equal(example["input_ids"][0], row["input_ids"])
        assert example["labels"].tolist() == [row["labels"]]
    model.eval()
    batch = next(calibration.batches(5))
    loss, logits = calibration.loss(model, batch), calibration.logits(model, batch)
    torch.testing.assert_close(loss, cross_entropy(logits, batch["labels"]))
    assert "labels" in batch and logits.shape == (3, 3)


def test_asking_does_not_disturb_the_order_of_training(tmp_path: Path) -> None:
    orders = []
    for asks in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(
            write_bert(tmp_path / "base"), num_labels=3
        )
        trainer = _trainer(model, _rows(7, lambda i: i % 3), tmp_path / "run")
        torch.manual_seed(0)
        if asks:
            calibration = TrainerCalibration(trainer)
            list(islice(calibration.batches(5), 9))
            list(calibration.examples(4))
        orders.append(torch.cat([b["input_ids"] for b in trainer.get_train_dataloader()]))
    assert torch.equal(*orders)


def test_token_labels_count_where_they_are_not_ignored(tmp_path: Path) -> None:
    model = AutoModelForTokenClassification.from_pretrained(
        write_bert(tmp_path / "base"), num_labels=3
    ).eval()
    data = _rows(4, lambda i: torch.tensor([-100, 0, 1, 2, -100]))
    calibration = TrainerCalibration(_trainer(model, data, tmp_path / "run"))
    batch = next(calibration.batches(0))
    logits = calibration.logits(model, batch)
    assert logits.shape == (9, 3)
    expected = cross_entropy(logits, torch.tensor([0, 1, 2] * 3))
    torch.testing.assert_close(calibration.loss(model, batch), expected)


def test_a_causal_model_predicts_from_the_place_before(tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(write_gpt2(tmp_path / "base")).eval()
    data = [{**row, "labels": row["input_ids"].clone()} for row in _rows(4, lambda i: 0)]
    data[0]["labels"][:3] = -100
    calibration = TrainerCalibration(_trainer(model, data, tmp_path / "run"))
    example = next(calibration.examples(1))
    logits = calibration.logits(model, example)
    assert logits.shape == (2, model.config.vocab_size)
    expected = cross_entropy(logits, data[0]["labels"][3:])
    torch.testing.assert_close(calibration.loss(model, example), expected)


def test_streams_come_in_order_and_missing_data_is_refused(tmp_path: Path) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(_rows(4, lambda i: i % 3))

    model = AutoModelForSequenceClassification.from_pretrained(
        write_bert(tmp_path / "base"), num_labels=3
    )
    calibration = TrainerCalibration(_trainer(model, Stream(), tmp_path / "run", max_steps=2))
    found = torch.cat([b["input_ids"] for b in islice(calibration.batches(1), 4)])
    rows = torch.stack([row["input_ids"] for row in _rows(4, lambda i: 0)])
    assert torch.equal(found, torch.cat([rows, rows]))
    with pytest.raises(ConfigError, match="no train_dataset"):
        TrainerCalibration(_trainer(model, None, tmp_path / "run"))
    with pytest.raises(ConfigError, match="the data has none"):
        calibration.logits(model, {"input_ids": rows})
    with pytest.raises(ConfigError, match="are not class scores"):
        calibration.logits(model, {"input_ids": rows, "labels": torch.rand(4, 3)})
