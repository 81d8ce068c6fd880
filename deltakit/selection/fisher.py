"""Fisher information, the score of FISH masks: gradients of single examples, squared and summed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from sys import maxsize
from typing import Any

import torch

from deltakit.errors import ConfigError, DataError
from deltakit.selection.allocation import Allocation
from deltakit.selection.gradient_passes import check_count, check_finite, taking_gradients, zeros
from deltakit.selection.heuristics import HEURISTICS, Measurement
from deltakit.selection.methods import METHODS
from deltakit.selection.scene import Calibration, Scene, measuring
from deltakit.selection.static import Static

LABELS = {
    "empirical": "the labels of the data",
    "model": "one label drawn from the model's own distribution",
    "expected": "all labels, weighted by the model's own distribution",
}
MOST_PASSES = 1024  # backward passes per example that an exact expectation may take


@HEURISTICS.register("fisher", "large Fisher information", "FISH, Sung et al. 2021")
@dataclass(frozen=True, kw_only=True)
class Fisher:
    """The diagonal of the Fisher information (Sung et al. 2021, eq. 3-5), without dropout.

    num_samples: training examples, each passed alone; None for all of them. labels: "empirical"
    takes the data's (eq. 5), "model" draws one from the model, "expected" sums over all classes
    exactly (eq. 4), which costs a backward pass per class. square: sum g^2, or else |g|. seed: of
    the labels drawn. In float32 squares of |g| below 1e-23 count as zero.
    """

    num_samples: int | None = 1024
    labels: str = "empirical"
    square: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("num_samples", self.num_samples)
        if self.labels not in LABELS:
            raise ConfigError(f"labels must be one of {', '.join(LABELS)}, found {self.labels!r}")

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """Sums over the examples; DataError where there are none."""
        model, calibration = scene.calibrated("fisher")
        sums = zeros(scene.targets)

        def take(number: int, gradient: torch.Tensor) -> None:
            sums[number] += gradient.square() if self.square else gradient.abs()

        examples = 0
        with measuring(scene, model), taking_gradients(scene.targets, take):
            model.eval()
            torch.manual_seed(self.seed)
            for example in calibration.examples(self.num_samples or maxsize):
                examples += 1
                for term in self._terms(model, calibration, example):
                    torch.autograd.backward(term, retain_graph=self.labels == "expected")
        if not examples:
            raise DataError("fisher: there is no training example to measure with")
        check_finite(scene, sums)
        return Measurement(sums.__getitem__)

    def _terms(
        self, model: torch.nn.Module, calibration: Calibration, example: Any
    ) -> Iterator[torch.Tensor]:
        if self.labels == "empirical":
            yield calibration.loss(model, example)
            return
        logits = calibration.logits(model, example).float()
        places = logits.reshape(-1, logits.shape[-1])
        if places.shape[1] < 2:
            raise ConfigError(
                f"labels={self.labels} needs classes; this task has none: use empirical"
            )
        surprise = -places.log_softmax(-1)
        shares = (-surprise.detach()).exp()
        if self.labels == "model":
            drawn = torch.multinomial(shares.cpu(), 1).to(places.device)
            yield surprise.gather(1, drawn).mean()
        else:
            yield from self._expectation(surprise, shares)

    def _expectation(self, surprise: torch.Tensor, shares: torch.Tensor) -> Iterator[torch.Tensor]:
        """Labels of different places are independent, so cross terms of the square vanish."""
        if len(surprise) > 1 and not self.square:
            raise ConfigError("labels=expected with several labels per example needs square=True")
        if surprise.numel() > MOST_PASSES:
            raise ConfigError(
                f"labels=expected would take {surprise.numel()} backward passes for one example, "
                f"more than {MOST_PASSES}: use labels=model"
            )
        for place, row in enumerate(shares.tolist()):
            for label, share in enumerate(row):
                scale = share**0.5 if self.square else share  # squared, it is the share
                yield scale * surprise[place, label] / len(surprise)


@METHODS.register("fish", "largest Fisher information", "FISH, Sung et al. 2021")
def fish(
    *,
    budget: int,
    allocation: Allocation = "global",
    num_samples: int | None = 1024,
    labels: str = "empirical",
    square: bool = True,
    seed: int = 0,
) -> Static:
    """FISH mask (Sung et al. 2021): the entries of largest Fisher information; see `Fisher`."""
    fisher = Fisher(num_samples=num_samples, labels=labels, square=square, seed=seed)
    return Static(budget=budget, heuristic=fisher, allocation=allocation)
