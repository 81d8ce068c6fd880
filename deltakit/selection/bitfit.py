"""BitFit: training bias terms only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltakit.selection.biases import OnBiases
from deltakit.selection.heuristics import Measurement
from deltakit.selection.methods import METHODS
from deltakit.selection.scene import Scene
from deltakit.selection.static import Static


@dataclass(frozen=True)
class EqualShares:
    """Ranks that give every tensor its share of any budget, in a random order within a tensor.

    The j-th entry drawn of n scores -(2 j + 1) / n (Webster 1832), so a smaller budget chooses a
    part of what a larger one does.
    """

    seed: int = 0

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """Scores from sizes and the seed alone."""
        parameters = {t.number: t.parameter for t in scene.targets}

        def scores(number: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(self.seed + 2**32 * number)
            size = parameters[number].numel()
            ranks = torch.randperm(size, generator=generator)
            return (-(2 * ranks + 1) / size).to(parameters[number].device)

        return Measurement(scores)


@METHODS.register("bitfit", "bias terms only", "BitFit, Ben-Zaken et al. 2022")
def bitfit(*, budget: int, seed: int = 0) -> Static:
    """The bias terms of all layers that are no normalisation (Ben-Zaken et al. 2022).

    A budget below all biases is shared among them in proportion to size, within each at random;
    one above them is refused with their number (BudgetError).
    """
    return Static(budget=budget, heuristic=OnBiases(EqualShares(seed)))
