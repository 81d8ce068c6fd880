"""GraSP: entries that keep the gradient's norm up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltakit.errors import ConfigError, TrainingError
from deltakit.selection.allocation import Allocation
from deltakit.selection.gradient_passes import (
    Sums,
    check_count,
    check_finite,
    gradient_sums,
    taking_gradients,
    widened,
    zeros,
)
from deltakit.selection.heuristics import HEURISTICS, Measurement
from deltakit.selection.methods import METHODS
from deltakit.selection.scene import Calibration, Scene, measuring
from deltakit.selection.static import Static


@HEURISTICS.register("grasp", "weights that keep the gradient flowing", "GraSP, Wang et al. 2020")
@dataclass(frozen=True, kw_only=True)
class Grasp:
    """w * (H g), with gradient g and Hessian H of the loss over `num_batches` training batches.

    Removing an entry changes |g|^2 in proportion to S = -w * (H g) (Wang et al. 2020, eq. 8), and
    the paper's algorithm 1 keeps the entries of least S, without which the gradient would shrink.
    The score is therefore -S, and the highest are chosen.

    difference: None differentiates twice, with attention computed by plain products. A step such
    as 1e-2 takes (g(w + d) - g(w - d)) / 2 instead, where d is that share of the norm of w along
    g: for models with operations that cannot be differentiated twice. seed: of the batches' order.
    """

    num_batches: int = 1
    difference: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("num_batches", self.num_batches)
        if self.difference is not None and not self.difference > 0:
            raise ConfigError(f"difference must be above 0, found {self.difference}")

    def measure(self, scene: Scene, budget: int) -> Measurement:
        """Scores from two passes over the batches, or three with `difference`."""
        model, calibration = scene.calibrated("grasp")
        scene.refuse_codes("grasp follows the gradient's own change with the weights")
        with measuring(scene, model, extras=self.difference is not None):
            # Extras stay fixed: the Hessian is that of the targets.
            sums = gradient_sums(scene, model, calibration, self.num_batches, self.seed)
            if self.difference is None:
                curved = self._product(scene, model, calibration, sums)
            else:
                curved = self._differences(scene, model, calibration, sums, self.difference)
        check_finite(scene, curved)
        targets = {t.number: t for t in scene.targets}
        return Measurement(lambda n: widened(targets[n].weights()) * curved[n])

    def _product(
        self, scene: Scene, model: torch.nn.Module, calibration: Calibration, sums: Sums
    ) -> Sums:
        curved = zeros(scene.targets)
        for batch in islice(calibration.batches(self.seed), self.num_batches):
            with sdpa_kernel(SDPBackend.MATH):
                loss = calibration.loss(model, batch)
                with taking_gradients(scene.targets, lambda n, g: curved[n].add_(g)):
                    _differentiate_twice(scene, loss, sums)
        return curved

    def _differences(
        self,
        scene: Scene,
        model: torch.nn.Module,
        calibration: Calibration,
        sums: Sums,
        relative: float,
    ) -> Sums:
        narrow = [t.name for t in scene.targets if t.parameter.dtype.itemsize < 4]
        if narrow:
            raise ConfigError(
                f"{narrow[0]}: a difference of gradients drowns in the rounding of "
                "16-bit weights; load the model in float32"
            )
        before = {t.number: t.parameter.detach().clone() for t in scene.targets}
        step = relative * _norm(before) / max(_norm(sums), 1e-30)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for target in scene.targets:
                    moved = sums[target.number].view(target.shape)
                    target.parameter.copy_(before[target.number].add(moved, alpha=sign * step))
            sides.append(gradient_sums(scene, model, calibration, self.num_batches, self.seed))
        return {
            number: (ahead - sides[1][number]) / (2 * step) for number, ahead in sides[0].items()
        }


def _differentiate_twice(scene: Scene, loss: torch.Tensor, along: Sums) -> None:
    """Leave H v in the targets' gradients."""
    parameters = [t.parameter for t in scene.targets]
    try:
        firsts = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        used = [
            (g.reshape(-1) * along[t.number]).sum()
            for t, g in zip(scene.targets, firsts, strict=True)
            if g is not None and g.requires_grad
        ]
        if used:
            # Not autograd.grad, which would pass over the error of a function that cannot do it.
            torch.autograd.backward(torch.stack(used).sum())
    except RuntimeError as error:
        raise TrainingError(
            f"grasp: the model cannot be differentiated twice ({error}); set difference=1e-2 to "
            "take differences of gradients instead"
        ) from error


def _norm(tensors: Sums) -> float:
    squares = [t.double().square().sum().item() for t in tensors.values()]
    return float(sum(squares) ** 0.5)


@METHODS.register("grasp", "weights that keep the gradient flowing", "GraSP, Wang et al. 2020")
def grasp(
    *,
    budget: int,
    allocation: Allocation = "global",
    num_batches: int = 1,
    difference: float | None = None,
    seed: int = 0,
) -> Static:
    """Gradient signal preservation (Wang et al. 2020, algorithm 1); see `Grasp`."""
    heuristic = Grasp(num_batches=num_batches, difference=difference, seed=seed)
    return Static(budget=budget, heuristic=heuristic, allocation=allocation)
