"""SCE: select entries by variance, calculate weights by energy, erase minority signs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from deltakit.combine.method import METHODS, Flavours, Method
from deltakit.combine.tasks import Tasks, Union, Vector
from deltakit.combine.trim import check_density, share
from deltakit.dtypes import Array
from deltakit.truncation import top


@METHODS.register("sce", "entries of high variance, weighted by energy", "Wan et al., 2024")
@dataclass(frozen=True, kw_only=True)
class Sce(Method):
    """tau = scale * sum_{t in A} e_t tau_t / sum_{t in A} e_t in each tensor.

    Select the floor(density * n) entries of highest variance over all deltas, where n counts those
    of a variance other than 0 (density 1 selects everything); e_t = mean(tau_t^2) / sum_s
    mean(tau_s^2) of what is selected; A = {t: sgn tau_t = sgn sum_s tau_s}, where a sum of 0 counts
    as positive. Weights multiply tau_t beforehand. guard: below this sum of means all e_t are
    equal, and a sum of e_t is at least this (mergekit: 1e-6; it selects everything by default).

    Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models" (2024).
    """

    flavours: ClassVar[Flavours] = {"mergekit": {"density": 1.0, "guard": 1e-6}}

    density: float = 0.1
    guard: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)

    def stack(self, tasks: Tasks) -> dict[str, Vector]:
        return {
            name: self._combined(self._selected(union, len(tasks)), prod(tasks.shape(name)), tasks)
            for name, union in tasks.unions(tasks.vectors())
        }

    def _selected(self, union: Union, count: int) -> Union:
        if self.density == 1:
            return union
        variance = spread(union, count)
        return union.restricted(top(variance, share(self.density, int(np.count_nonzero(variance)))))

    def _combined(self, union: Union, numel: int, tasks: Tasks) -> Vector:
        terms = [part.weighted for part in union.parts]
        energies = np.array([np.square(term, dtype=np.float64).sum() for term in terms])
        if energies.sum() <= self.guard * numel:
            energies[:] = 1 / len(tasks)
        else:
            energies /= energies.sum()
        signs = np.where(union.total(terms) >= 0, 1, -1)
        total, divisor = np.zeros((2, len(union.indices)), union.dtype)
        for part, term, energy in zip(union.parts, terms, energies, strict=True):
            agree = np.sign(term) == signs[part.place]
            place, weight = part.place[agree], union.dtype.type(energy)
            total[place] += weight * term[agree]
            divisor[place] += weight
        np.maximum(divisor, self.guard, out=divisor)
        return Vector(union.indices, total / np.where(divisor > 0, divisor, 1))


def spread(union: Union, count: int) -> Array:
    """count^2 times the variance over `count` deltas (zeros where one has no entry), float64 [u].

    n sum(v^2) - (sum v)^2 is exactly 0 for float32 values that are all equal.
    """
    sums, squares = np.zeros((2, len(union.indices)))
    for part in union.parts:
        term = part.weighted.astype(np.float64)
        sums[part.place] += term
        squares[part.place] += term * term
    return np.maximum(count * squares - sums * sums, 0)
