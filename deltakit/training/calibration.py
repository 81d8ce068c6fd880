"""Passes over the training data for methods that look at it before they choose entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from deltakit.errors import ConfigError, DataError
from deltakit.training.task import IGNORED

LossOf = Callable[[torch.nn.Module, Any], torch.Tensor]


class Batches:
    """Batches of a training loop of one's own, as a `Calibration`.

    batches: a list, a DataLoader or another iterable that can be run through again, of tensors or
    of (nested) tuples, lists and mappings of tensors whose first dimension counts the examples.
    loss: (model, batch) -> mean loss, a scalar. logits: (model, batch) -> class scores
    [..., classes], for methods that ask what the model itself would predict. Batches are moved to
    the model's device. Raises ConfigError for an iterator that can be run through only once.
    """

    def __init__(self, batches: Iterable[Any], loss: LossOf, logits: LossOf | None = None) -> None:
        if isinstance(batches, Iterator):
            raise ConfigError(
                f"batches can be run through only once ({type(batches).__name__}); give a list "
                "or a DataLoader"
            )
        self._batches, self._loss, self._logits = batches, loss, logits

    def batches(self, seed: int) -> Iterator[Any]:
        """All batches again and again; a list's are shuffled, others seed their own shuffling."""
        return _endless(self._epoch(seed + epoch) for epoch in count())

    def _epoch(self, seed: int) -> Iterator[Any]:
        if isinstance(self._batches, Sequence):
            generator = torch.Generator().manual_seed(seed)
            for at in torch.randperm(len(self._batches), generator=generator).tolist():
                yield self._batches[at]
            return
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws its order with the first batch
            torch.manual_seed(seed)
            epoch = iter(self._batches)
            first = list(islice(epoch, 1))
        yield from first
        yield from epoch

    def examples(self, count: int) -> Iterator[Any]:
        """The rows of the first batches, each as a batch of one."""
        rows = (row for batch in self._epoch_in_order() for row in _rows(batch))
        return islice(rows, count)

    def _epoch_in_order(self) -> Iterator[Any]:
        return iter(self._batches) if isinstance(self._batches, Sequence) else self._epoch(0)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The given loss."""
        return self._loss(model, moved(batch, _device(model)))

    def logits(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The given class scores; ConfigError where none were given."""
        if self._logits is None:
            raise ConfigError("the method needs the model's own predictions: pass Batches logits=")
        return self._logits(model, moved(batch, _device(model)))


class TrainerCalibration:
    """The training data of a `transformers.Trainer`, as a `Calibration`.

    Batches come from a seeded loader of their own over `train_dataset`, with the Trainer's
    collator and batch size, so that the order of training stays what it was.
    """

    def __init__(self, trainer: Any) -> None:
        if trainer.train_dataset is None:
            raise ConfigError("the trainer has no train_dataset, which the method looks at")
        self._trainer = trainer

    def batches(self, seed: int) -> Iterator[Any]:
        """Shuffled batches without end; a stream of data comes in its own order."""
        shuffle = not isinstance(self._trainer.train_dataset, IterableDataset)
        args = self._trainer.args
        whole = args.train_batch_size * args.world_size  # every process measures the same
        loader = self._loader(whole, seed, shuffle=shuffle)
        return _endless(iter(loader) for _ in count())

    def examples(self, count: int) -> Iterator[Any]:
        """The first examples of the data, each as a batch of one."""
        return islice(self._loader(1, 0, shuffle=False), count)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The Trainer's loss, in its precision."""
        with self._trainer.compute_loss_context_manager():
            loss: torch.Tensor = self._trainer.compute_loss(model, moved(batch, _device(model)))
        return loss

    def logits(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Class scores of the labels that count, [labels, classes].

        Labels may be one per text, or one per token with -100 for those that do not count; a
        causal language model predicts each from the place before. ConfigError for batches without
        labels and logits that fit neither.
        """
        batch = moved(batch, _device(model))
        if "labels" not in batch:
            raise ConfigError(
                "the model's own predictions are compared at labels; the data has none"
            )
        with self._trainer.compute_loss_context_manager():
            scores: torch.Tensor = model(**batch).logits
        labels = batch["labels"]
        if _is_causal(model):
            scores, labels = scores[:, :-1], labels[:, 1:]
        if scores.shape[:-1] != labels.shape:
            raise ConfigError(
                f"logits {list(scores.shape)} are not class scores of labels {list(labels.shape)}"
            )
        return scores[labels != IGNORED]

    def _loader(self, size: int, seed: int, *, shuffle: bool) -> DataLoader[Any]:
        trainer = self._trainer
        return DataLoader(
            trainer.train_dataset,
            batch_size=size,
            shuffle=shuffle,
            collate_fn=trainer._get_collator_with_removed_columns(trainer.data_collator),
            generator=torch.Generator().manual_seed(seed),
        )


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on one device; the containers are new."""
    return _mapped(batch, lambda tensor: tensor.to(device))


def _mapped(batch: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_mapped(value, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_mapped(value, change) for value in batch)
    return batch


def _rows(batch: Any) -> Iterator[Any]:
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> None:
        sizes.extend(tensor.shape[:1])

    _mapped(batch, note)
    if not sizes or len(set(sizes)) > 1:
        raise DataError(
            "a batch cannot be split into examples: expected tensors of one first dimension, "
            f"found {sorted(set(sizes)) or 'none'}; give batches of one example"
        )
    for row in range(sizes[0]):
        yield _mapped(batch, _row_of(row))


def _row_of(row: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor[row : row + 1] if tensor.dim() else tensor


def _endless(epochs: Iterable[Iterator[Any]]) -> Iterator[Any]:
    for epoch in epochs:
        empty = True
        for batch in epoch:
            empty = False
            yield batch
        if empty:
            raise DataError("the training data holds no batch")


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _is_causal(model: torch.nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
