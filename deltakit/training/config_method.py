"""The settings that say which entries are trained: of the base's weights, or of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltakit.budget import ALLOCATIONS
from deltakit.registry import Registry, declared
from deltakit.targets.preset_names import TARGET_PRESETS
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

METHOD, SELECTION, ADAPTER = "Method", "Selection", "Adapter"
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
        choice(lambda: _methods().names(), quick=lambda: declared("deltakit.selection", "METHODS")),
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
    target: tuple[str, ...] = setting(
        (),
        many(text("PATTERN", lambda: TARGET_PRESETS)),
        METHOD,
        f"tensors to train, by pattern or as {', '.join(TARGET_PRESETS)}; all if unset",
    )
    exclude: tuple[str, ...] = setting(
        (),
        many(text("PATTERN", lambda: TARGET_PRESETS)),
        METHOD,
        "tensors to leave alone, named as those of target",
    )
    extras: tuple[str, ...] = setting(
        (),
        many(text("PATTERN", lambda: TARGET_PRESETS)),
        METHOD,
        "tensors trained densely, beside those the base lacks",
    )
    age: str = setting(
        "entry", one_of("entry", "shared"), METHOD, "Adam's step count: per entry, or one for all"
    )
    heuristic: str | None = setting(
        None,
        choice(_heuristics, quick=lambda: declared("deltakit.selection", "HEURISTICS")),
        SELECTION,
        "what makes an entry worth training, for static, increment, repeat and drop-and-grow",
    )
    eps: float | None = setting(None, real(above=True), SELECTION, "eps of the D3 score")
    exp: float | None = setting(None, real(-100, 100), SELECTION, "exponent of the D3 score")
    schedule: str | None = setting(
        None,
        choice(_schedules, quick=lambda: declared("deltakit.selection", "SCHEDULES")),
        SELECTION,
        "how unmasking spreads over the steps",
    )
    allocation: str | Mapping[str, float] | None = setting(
        None,
        Kind(_allocation, "NAME|PATTERN=SHARE,...", names=lambda: ALLOCATIONS),
        SELECTION,
        "how the budget is shared among tensors",
    )
    unmask_fraction: float | None = setting(
        None, real(0, 1, above=True), SELECTION, "share of all steps that unmask entries"
    )
    precondition: str | None = setting(
        None, one_of("none", "factored"), SELECTION, "what the gradient is divided by for scoring"
    )
    every: int | None = setting(None, whole(1), SELECTION, "steps from one selection to the next")
    restore: bool | None = setting(
        None, yes_or_no(), SELECTION, "whether entries that repeat drops return to their base bits"
    )
    rate: float | None = setting(
        None, real(0, 1), SELECTION, "share of entries that drop-and-grow exchanges at first"
    )
    first_rate: float | None = setting(
        None, real(0, 1), SELECTION, "share that its very first exchange takes"
    )
    decay: str | None = setting(
        None, one_of("linear", "cosine"), SELECTION, "how the exchanged share falls"
    )
    num_batches: int | None = setting(
        None, whole(1), SELECTION, "batches whose gradients are summed before training"
    )
    num_samples: int | None = setting(
        None, whole(1), SELECTION, "training examples that Fisher information is measured with"
    )
    labels: str | None = setting(
        None,
        one_of("empirical", "model", "expected"),
        SELECTION,
        "labels of Fisher information: the data's, drawn from the model, or all by expectation",
    )
    square: bool | None = setting(
        None, yes_or_no(), SELECTION, "whether Fisher information squares gradients"
    )
    difference: float | None = setting(
        None,
        real(above=True),
        SELECTION,
        "step of grasp where a model has no second derivative: 1e-2",
    )
    dense_steps: int | None = setting(
        None, whole(1), SELECTION, "steps of the dense phase before training"
    )
    dense_fraction: float | None = setting(
        None, real(above=True), SELECTION, "the same, as a share of the training steps"
    )
    dense_lr: float | None = setting(
        None, real(above=True), SELECTION, "learning rate of the dense phase"
    )
    iterations: int | None = setting(
        None,
        whole(1),
        SELECTION,
        "dense phases of lt-sft, each of which adds its part of the budget",
    )
    probability: float | None = setting(
        None, real(0, 1, above=True), SELECTION, "share of gradients that child-tuning-f keeps"
    )
    penalty: float | None = setting(
        None, real(), SELECTION, "price of an open gate of diff-pruning"
    )
    mask: str | None = setting(
        None, text("DELTA"), SELECTION, "delta whose entries method mask trains, `budget` in all"
    )
    order: str | None = setting(
        None,
        one_of("random", "first", "last"),
        SELECTION,
        "which rows, columns, heads or blocks a structured mask takes",
    )
    block_size: int | None = setting(
        None, whole(1), SELECTION, "side of a block of method blocks: 16"
    )
    n: int | None = setting(
        None, whole(1), SELECTION, "entries that method n:m takes of a group: 2"
    )
    m: int | None = setting(None, whole(1), SELECTION, "consecutive weights in a group of n:m: 4")
    pick: str | None = setting(
        None,
        one_of("random", "largest", "smallest"),
        SELECTION,
        "which weights of a group method n:m takes, by magnitude or at random",
    )
    mask_seed: int | None = setting(None, whole(0), SELECTION, "seed of a mask; `seed` if unset")


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
