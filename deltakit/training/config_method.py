"""The settings that say which entries are trained: of the base's weights, or of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltakit.registry import Registry
from deltakit.targets.presets import TARGET_PRESETS
from deltakit.training.presets import PRESETS
from deltakit.training.settings import (
    Kind,
    choice,
    entry_count,
    many,
    one_of,
    option,
    real,
    setting,
    text,
    whole,
    yes_or_no,
)

METHOD, ADAPTER = "Method", "Adapter"
METHOD_SETTINGS = (
    *("heuristic", "eps", "exp", "precondition"),
    *("schedule", "allocation", "unmask_fraction", "every", "restore"),
    *("rate", "first_rate", "decay"),
    *("num_batches", "num_samples", "labels", "square", "difference"),
    *("dense_steps", "dense_fraction", "dense_lr", "iterations", "probability", "penalty"),
    *("mask", "order", "block_size", "n", "m", "pick", "mask_seed"),
)


def _methods() -> Registry[Any]:
    from deltakit.selection import METHODS  # imports torch, which help does without

    return METHODS


def _heuristics() -> list[str]:
    from deltakit.selection import HEURISTICS

    return HEURISTICS.names()


def _adapters() -> list[str]:
    from deltakit.adapters.kinds import KINDS

    return KINDS.names()


def _schedules() -> list[str]:
    from deltakit.selection.schedules import SCHEDULES

    return SCHEDULES.names()


def _allocation(value: Any) -> str | Mapping[str, float]:
    from deltakit.selection.allocation import parse_allocation

    if isinstance(value, Mapping):
        return parse_allocation({str(p): float(share) for p, share in value.items()})
    parse_allocation(str(value))
    return str(value)


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The method, its budget, and the tensors that it may choose from."""

    method: str = setting(
        "id3",
        choice(lambda: _methods().names(), "NAME"),
        METHOD,
        "how entries are chosen; docs/settings.md lists the methods",
    )
    preset: str | None = setting(
        None,
        choice(lambda: [*PRESETS, "none"], "NAME"),
        METHOD,
        "named settings, listed in docs/settings.md; METHOD-default if unset",
    )
    budget: str | int = setting(
        "", entry_count(), METHOD, "entries to train: 100k, 0.1% of the base, or 6% of the adapter"
    )
    heuristic: str | None = setting(
        None,
        choice(_heuristics),
        METHOD,
        "what makes an entry worth training, for static, increment, repeat and drop-and-grow",
    )
    eps: float | None = setting(None, real(above=True), METHOD, "eps of the D3 score")
    exp: float | None = setting(None, real(-100, 100), METHOD, "exponent of the D3 score")
    schedule: str | None = setting(
        None, choice(_schedules), METHOD, "how unmasking spreads over the steps"
    )
    allocation: str | Mapping[str, float] | None = setting(
        None,
        Kind(_allocation, "NAME|PATTERN=SHARE,..."),
        METHOD,
        "how the budget is shared among tensors",
    )
    unmask_fraction: float | None = setting(
        None, real(0, 1, above=True), METHOD, "share of all steps that unmask entries"
    )
    precondition: str | None = setting(
        None, one_of("none", "factored"), METHOD, "what the gradient is divided by for scoring"
    )
    every: int | None = setting(None, whole(1), METHOD, "steps from one selection to the next")
    restore: bool | None = setting(
        None, yes_or_no(), METHOD, "whether entries that repeat drops return to their base bits"
    )
    rate: float | None = setting(
        None, real(0, 1), METHOD, "share of entries that drop-and-grow exchanges at first"
    )
    first_rate: float | None = setting(
        None, real(0, 1), METHOD, "share that its very first exchange takes"
    )
    decay: str | None = setting(
        None, one_of("linear", "cosine"), METHOD, "how the exchanged share falls"
    )
    num_batches: int | None = setting(
        None, whole(1), METHOD, "batches whose gradients are summed before training"
    )
    num_samples: int | None = setting(
        None, whole(1), METHOD, "training examples that Fisher information is measured with"
    )
    labels: str | None = setting(
        None,
        one_of("empirical", "model", "expected"),
        METHOD,
        "labels of Fisher information: the data's, drawn from the model, or all by expectation",
    )
    square: bool | None = setting(
        None, yes_or_no(), METHOD, "whether Fisher information squares gradients"
    )
    difference: float | None = setting(
        None, real(above=True), METHOD, "step of grasp where a model has no second derivative: 1e-2"
    )
    dense_steps: int | None = setting(
        None, whole(1), METHOD, "steps of the dense phase before training"
    )
    dense_fraction: float | None = setting(
        None, real(above=True), METHOD, "the same, as a share of the training steps"
    )
    dense_lr: float | None = setting(
        None, real(above=True), METHOD, "learning rate of the dense phase"
    )
    iterations: int | None = setting(
        None, whole(1), METHOD, "dense phases of lt-sft, each of which adds its part of the budget"
    )
    probability: float | None = setting(
        None, real(0, 1, above=True), METHOD, "share of gradients that child-tuning-f keeps"
    )
    penalty: float | None = setting(None, real(), METHOD, "price of an open gate of diff-pruning")
    mask: str | None = setting(
        None, text("DELTA"), METHOD, "delta whose entries method mask trains, `budget` in all"
    )
    order: str | None = setting(
        None,
        one_of("random", "first", "last"),
        METHOD,
        "which rows, columns, heads or blocks a structured mask takes",
    )
    block_size: int | None = setting(None, whole(1), METHOD, "side of a block of method blocks: 16")
    n: int | None = setting(None, whole(1), METHOD, "entries that method n:m takes of a group: 2")
    m: int | None = setting(None, whole(1), METHOD, "consecutive weights in a group of n:m: 4")
    pick: str | None = setting(
        None,
        one_of("random", "largest", "smallest"),
        METHOD,
        "which weights of a group method n:m takes, by magnitude or at random",
    )
    mask_seed: int | None = setting(None, whole(0), METHOD, "seed of a mask; `seed` if unset")
    target: tuple[str, ...] = setting(
        (),
        many(text("PATTERN")),
        METHOD,
        f"tensors to train, by pattern or as {', '.join(TARGET_PRESETS)}; all if unset",
    )
    exclude: tuple[str, ...] = setting(
        (), many(text("PATTERN")), METHOD, "tensors to leave alone, named as those of target"
    )
    extras: tuple[str, ...] = setting(
        (), many(text("PATTERN")), METHOD, "tensors trained densely, beside those the base lacks"
    )
    age: str = setting(
        "entry", one_of("entry", "shared"), METHOD, "Adam's step count: per entry, or one for all"
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """An adapter whose tensors are trained instead of the base's."""

    adapter: str | None = setting(
        None,
        choice(_adapters),
        ADAPTER,
        "train entries of an adapter at the layers of target; docs/methods.md lists them",
    )
    rank: int | None = setting(None, whole(1), ADAPTER, "rank of the adapter, where it has one")
    adapter_options: tuple[str, ...] = setting(
        (), many(option()), ADAPTER, "option of the adapter, such as alpha=32 or reduction_factor=4"
    )
    adapter_seed: int | None = setting(
        None, whole(0), ADAPTER, "seed of the adapter's initial values; `seed` if unset"
    )
    loftq: bool | None = setting(
        None,
        yes_or_no(),
        ADAPTER,
        "start lora at a quantised base from what quantising has lost (LoftQ)",
    )
    masked: str = setting(
        "initial",
        one_of("initial", "zero"),
        ADAPTER,
        "what the adapter's other entries are: their initial values, or zero (SparseAdapter)",
    )
