"""Adapters that peft itself makes, saves, loads and merges, on tiny models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

State = dict[str, torch.Tensor]


@contextmanager
def quietly() -> Iterator[None]:
    """Without peft's warnings, which are errors in tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_trained(base: Path, kind: Any, config: Any, out: Path, **options: Any) -> State:
    """Save at `out` an adapter of the model at `base` whose weights were moved at random; the
    weights of the model with it merged by peft. options: of `kind.from_pretrained`."""
    with quietly():
        torch.manual_seed(1)
        adapted = get_peft_model(kind.from_pretrained(base, **options), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        adapted.save_pretrained(out)
        return weights(adapted.merge_and_unload())


def load_merged(base: Path, kind: Any, adapter: Path, **options: Any) -> State:
    """The weights of the model at `base` with the saved adapter loaded and merged by peft."""
    with quietly():
        adapted = PeftModel.from_pretrained(kind.from_pretrained(base, **options), adapter)
        return weights(adapted.merge_and_unload())


def load_plain(folder: Path, kind: Any, **options: Any) -> State:
    """The weights of the model at `folder`."""
    with quietly():
        return weights(kind.from_pretrained(folder, **options))


def weights(model: Any) -> State:
    """Copies of all weights of a model, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(one: State, other: State) -> list[str]:
    """Names of tensors that differ in a bit, or stand on one side only."""
    odd = sorted(set(one) ^ set(other))
    return odd + [n for n in one if n in other and not same_bits(one[n], other[n])]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and equal in every bit."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
