"""Gradients over calibration passes, summed tensor by tensor and freed as backward goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch

from deltakit.errors import ConfigError, TrainingError
from deltakit.gradient_hooks import after_accumulation
from deltakit.selection.scene import Calibration, Candidate, Scene

Sums = dict[int, torch.Tensor]  # tensor number -> flat float32 [numel], float64 for float64


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Flat [numel] in at least float32, sharing memory where it can."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).reshape(-1)


def zeros(targets: Sequence[Candidate]) -> Sums:
    """A flat zero per target, on its device."""
    return {t.number: torch.zeros_like(widened(t.parameter)) for t in targets}


@contextmanager
def taking_gradients(
    targets: Sequence[Candidate], take: Callable[[int, torch.Tensor], object]
) -> Iterator[None]:
    """Within it, backward hands every target's gradient to `take` and frees it at once.

    take: tensor number, gradient (flat, at least float32). To be entered inside `measuring`.
    """

    def run(number: int, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            take(number, widened(parameter.grad))
        parameter.grad = None

    handles = [after_accumulation(t.parameter, partial(run, t.number)) for t in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradient_sums(
    scene: Scene, model: torch.nn.Module, calibration: Calibration, num_batches: int, seed: int
) -> Sums:
    """The gradients of `num_batches` training batches, summed; without dropout.

    Called inside `measuring`. Raises TrainingError where a sum is not finite.
    """
    sums = zeros(scene.targets)
    model.eval()
    with taking_gradients(scene.targets, lambda number, g: sums[number].add_(g)):
        for batch in islice(calibration.batches(seed), num_batches):
            torch.autograd.backward(calibration.loss(model, batch))
    check_finite(scene, sums)
    return sums


def check_finite(scene: Scene, sums: Sums) -> None:
    """Raise TrainingError naming a tensor whose sums are infinite or no numbers."""
    for target in scene.targets:
        if not torch.isfinite(sums[target.number]).all():
            raise TrainingError(
                f"{target.name}: the gradient over calibration batches is not finite; look for "
                "broken inputs"
            )


def check_count(name: str, value: int | None) -> None:
    """Raise ConfigError for a count below one; None means that none was set."""
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be at least 1, found {value}")
