"""RAM: changes of one delta alone stay whole, shared ones are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from deltakit.combine.method import METHODS, Flavours, Method
from deltakit.combine.tasks import Tasks, Union, Vector
from deltakit.dtypes import Array
from deltakit.errors import ConfigError


@METHODS.register("ram", "unique changes whole, shared ones averaged", "arXiv 2601.13572, 2026")
@dataclass(frozen=True, kw_only=True)
class Ram(Method):
    """tau = scale * sum_t tau_t / c per entry, c = |{t: |tau_t| > threshold}|; only those c count.

    Weights multiply tau_t beforehand. Unlike a mean over all deltas this does not shrink what only
    one of them learnt.

    Source: arXiv 2601.13572 (2026).
    """

    flavours: ClassVar[Flavours] = {"mergekit": {}}

    threshold: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0:
            raise ConfigError(f"threshold {self.threshold} is negative")

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return {
            name: Vector(union.indices, self._mean(union, self.held(union)))
            for name, union in tasks.unions(tasks.vectors())
        }

    def held(self, union: Union) -> list[Array]:
        """For each part the mask [n] of the changes that count."""
        return [np.abs(part.weighted) > self.threshold for part in union.parts]

    def _mean(self, union: Union, held: list[Array]) -> Array:
        terms = (np.where(mask, p.weighted, 0) for p, mask in zip(union.parts, held, strict=True))
        return union.total(terms) / np.maximum(union.total(held), 1)


@METHODS.register("ram-plus", "RAM with unique changes strengthened", "arXiv 2601.13572, 2026")
@dataclass(frozen=True, kw_only=True)
class RamPlus(Ram):
    """RAM, where unique changes of delta t are multiplied by 1 + strength * min(rho_t, bound).

    rho_t is the number of entries that t shares with others over the number that are its own, in
    the whole delta (count_scope="global") or in each tensor ("tensor", as in mergekit).

    Source: arXiv 2601.13572 (2026), RAM+.
    """

    flavours: ClassVar[Flavours] = {"mergekit": {"count_scope": "tensor"}}

    strength: float = 0.1
    bound: float = 0.2
    count_scope: Literal["global", "tensor"] = "global"

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        made, owners = {}, {}
        counts = {}  # tensor -> how many entries each delta shares and owns, int64 [2, deltas]
        for name, union in tasks.unions(tasks.vectors()):
            held = self.held(union)
            made[name] = Vector(union.indices, self._mean(union, held))
            owners[name], counts[name] = _owners(union, held, len(tasks))
        whole = np.sum([*counts.values(), np.zeros((2, len(tasks)), np.int64)], axis=0)
        for name, vector in made.items():
            factors = self._factors(whole if self.count_scope == "global" else counts[name])
            vector.values[:] *= factors.astype(vector.values.dtype)[owners[name]]
        return made

    def _factors(self, counts: Array) -> Array:
        """By what the unique changes of each delta grow, float64 [deltas + 1]; the last is 1."""
        shared, unique = counts
        ratio = np.divide(shared, unique, out=np.zeros(len(unique)), where=unique > 0)
        return np.append(1 + self.strength * np.clip(ratio, 0, self.bound), 1.0)


def _owners(union: Union, held: list[Array], deltas: int) -> tuple[Array, Array]:
    """The delta that alone holds each entry, int16 [u], -1 where several or none do; and how many
    entries each delta shares and owns, int64 [2, deltas]."""
    contributors = np.zeros(len(union.indices), np.int16)
    for part, mask in zip(union.parts, held, strict=True):
        contributors[part.place] += mask
    owners = np.full(len(union.indices), -1, np.int16)
    counts = np.zeros((2, deltas), np.int64)
    for part, mask in zip(union.parts, held, strict=True):
        alone = mask & (contributors[part.place] == 1)
        owners[part.place[alone]] = part.number
        unique = np.count_nonzero(alone)
        counts[:, part.number] = np.count_nonzero(mask) - unique, unique
    return owners, counts
