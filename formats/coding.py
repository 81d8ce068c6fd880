"""What an index coding is: a way to write the support of one tensor as bytes.

To add one: a class with `offer` and `decode` in a file of its own, a line in
`deltakit.formats.codings`, and a row in the table of `tests/test_codings.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

from deltakit.dtypes import Array


@dataclass(frozen=True, slots=True)
class Place:
    """What the header tells about a support beside its index stream.

    name: the tensor. shape: of the tensor. count: entries in the support. seed: for generated
    supports. where: the beginning of every message about it.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    seed: int | None = None
    where: str = ""

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Offer:
    """A coding's offer to write a support: the exact size in bytes, and how to get the bytes."""

    size: int
    encode: Callable[[], bytes]


class Coding(Protocol):
    """One index coding."""

    @staticmethod
    def offer(indices: Array, place: Place) -> Offer | None:
        """An offer to write `indices` (int64 [count], strictly increasing, below numel), or None
        where this coding cannot express them."""

    @staticmethod
    def decode(data: bytes, place: Place) -> Array:
        """The indices, int64 [count].

        Raises FormatError for bytes that are not exactly one encoding of `count` strictly
        increasing indices below numel. Memory stays within a small multiple of `count` and of
        `data`, whatever the shape.
        """
