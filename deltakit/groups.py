"""The tensors of a delta counted together, by block of layers or by kind of tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deltakit.formats.header import TensorRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Some tensors under one name."""

    name: str
    tensors: tuple[TensorRecord, ...]

    @property
    def entries(self) -> int:
        """Entries over the group's tensors."""
        return sum(t.nnz for t in self.tensors)

    @property
    def density(self) -> float:
        """Entries as a share of all elements of the group's (touched) tensors."""
        elements = sum(t.numel for t in self.tensors)
        return self.entries / elements if elements else 0.0


def by_block(tensors: Iterable[TensorRecord]) -> list[Group]:
    """One group per block: all that shares a name up to its first number, or a module."""
    return _grouped(tensors, block_of)


def by_kind(tensors: Iterable[TensorRecord]) -> list[Group]:
    """One group per kind: all whose names differ in numbers only."""
    return _grouped(tensors, kind_of)


def block_of(name: str) -> str:
    """`encoder.layer.3.output.dense.weight` -> `encoder.layer.3`; without a number, the module."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: at + 1])
    return ".".join(parts[:-1]) or name


def kind_of(name: str) -> str:
    """`encoder.layer.3.output.dense.weight` -> `encoder.layer.*.output.dense.weight`."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _grouped(tensors: Iterable[TensorRecord], key: Callable[[str], str]) -> list[Group]:
    """Groups in natural order, so that layer 10 comes after layer 9."""
    members: dict[str, list[TensorRecord]] = {}
    for tensor in tensors:
        members.setdefault(key(tensor.name), []).append(tensor)
    return [
        Group(name=name, tensors=tuple(members[name]))
        for name in sorted(members, key=natural_order)
    ]


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key by which numbers compare by their digits (of any length) and stand after words."""
    return [_digits(part) if part.isdecimal() else (-1, part) for part in name.split(".")]


def _digits(number: str) -> tuple[int, str]:
    return len(number.lstrip("0")), number
