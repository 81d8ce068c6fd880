"""D3, the score of ID3: large gradient on small weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.errors import ConfigError
from deltakit.selection.heuristics import HEURISTICS

_EXACT_POWERS = (-2.0, -1.0, 1.0, 2.0)


@HEURISTICS.register("d3", "large gradient on small weight", "ID3, Agarwal et al. 2024")
@dataclass(frozen=True, slots=True)
class D3:
    """H = |g| / (eps + |w|)^exp (Agarwal et al. 2024, ID3, eq. 1-2), in float32.

    exp 0 is the gradient's magnitude alone; a negative exp prefers large weights.
    """

    eps: float = 1.0
    exp: float = 0.0

    def __post_init__(self) -> None:
        if self.eps < 0 or (self.eps == 0 and self.exp != 0):
            raise ConfigError(f"eps must be above 0, found {self.eps}")

    def score(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Scores of entries: gradient [n], weight [n] of any floating dtype -> float32 [n].

        Integer powers are products, exactly rounded operations that agree on every platform;
        other powers are taken in float64 and rounded once.
        """
        magnitude = gradient.float().abs()
        if self.exp == 0:
            return magnitude
        return magnitude / self._denominator(weight)

    def least_gradient(self, score: float, smallest: float, largest: float) -> float:
        """A lower bound on |g| for entries that score at least `score`.

        smallest, largest: bounds of |w| over the tensor. Entries below the bound need no division
        and no power; the bound leaves room for rounding, so the filter never drops a winner.
        """
        if self.exp == 0:
            return score
        near = smallest if self.exp > 0 else largest
        return float(score * (self.eps + near) ** self.exp * (1 - 1e-5))

    def _denominator(self, weight: torch.Tensor) -> torch.Tensor:
        base = weight.float().abs() + self.eps
        if self.exp not in _EXACT_POWERS:
            return base.double().pow(self.exp).float()
        power = base if abs(self.exp) == 1 else base * base
        return power if self.exp > 0 else power.reciprocal()
