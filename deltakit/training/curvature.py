"""Curvature of the loss on a support: why sparser masks need larger learning rates.

Xu and Zhang (2024, "Random masking finds winning tickets for parameter-efficient fine-tuning",
figure 4a) show that the Hessian restricted to a random mask has a norm that falls with the mask's
density; gradient descent is stable up to a rate of 2 / lambda_max.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltakit.errors import ConfigError, TrainingError
from deltakit.formats.seeded import seeded_support
from deltakit.quantized.layers import quantised_layers
from deltakit.selection.allocation import proportional_counts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltakit.training.tuner import SparseTuner

Support = Mapping[str, torch.Tensor]
_DIFFERENCE = 1e-3  # length of a finite-difference step, in units of the weights' root mean square


class SupportHessian:
    """The Hessian of a loss, restricted to a support, as a product with vectors.

    model: its parameters are looked up by name and left as they are. loss: recomputes the loss, a
    scalar, the same at every call (evaluation mode, one batch). support: parameter name -> flat
    indices, int64 [n]; vectors [k] list all of it in this order, in float32 (float64 for float64).
    differences: take products from gradients at two points near the weights (error of second
    order in their distance) instead of differentiating twice; where twice fails that is done
    anyway. Raises ConfigError for a support that names no parameter or no entry.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[], torch.Tensor],
        support: Support,
        *,
        differences: bool = False,
    ) -> None:
        live = dict(model.named_parameters())
        unknown = [name for name in support if name not in live]
        if unknown:
            raise ConfigError(f"support: the model has no parameter {unknown[0]!r}")
        codes = [name for name in support if name in quantised_layers(model)]
        if codes:
            raise ConfigError(f"support: {codes[0]!r} is quantised; load the base unquantised")
        self.size = sum(len(indices) for indices in support.values())
        if not self.size:
            raise ConfigError("support: expected at least one entry, found none")
        self._loss, self._differences = loss, differences
        self._parameters = [live[name] for name in support]
        self._indices = [
            indices.to(live[name].device, torch.int64) for name, indices in support.items()
        ]
        self._gradient: torch.Tensor | None = None

    @property
    def like(self) -> torch.Tensor:
        """An empty tensor of the vectors' dtype and device."""
        first = self._parameters[0]
        wide = first.dtype == torch.float64
        return torch.empty(0, dtype=torch.float64 if wide else torch.float32, device=first.device)

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """H v, [k]."""
        with self._differentiable():
            if not self._differences:
                try:
                    return self._twice(vector)
                except (NotImplementedError, RuntimeError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    self._differences, self._gradient = True, None
            return self._difference(vector)

    def _twice(self, vector: torch.Tensor) -> torch.Tensor:
        """Pearlmutter 1994: the gradient of gradient . v; the first graph is kept."""
        if self._gradient is None:
            self._gradient = self._gathered(self._gradients(create_graph=True))
        along = self._gradient @ vector
        second = torch.autograd.grad(
            along, self._parameters, retain_graph=True, materialize_grads=True
        )
        return self._gathered(second)

    @torch.no_grad()
    def _difference(self, vector: torch.Tensor) -> torch.Tensor:
        before = [p.view(-1)[i].clone() for p, i in self._places()]
        size = torch.cat([b.to(self.like) for b in before]).square().mean().sqrt().item() or 1.0
        step = _DIFFERENCE * size * self.size**0.5 / float(vector.norm())
        parts = torch.split(vector, [len(b) for b in before])
        sides: list[torch.Tensor] = []
        try:
            for sign in (step, -step):
                for (p, i), b, part in zip(self._places(), before, parts, strict=True):
                    p.view(-1)[i] = (b.to(self.like) + sign * part).to(p.dtype)
                with torch.enable_grad():
                    sides.append(self._gathered(self._gradients(create_graph=False)))
        finally:
            for (p, i), b in zip(self._places(), before, strict=True):
                p.view(-1)[i] = b
        product: torch.Tensor = (sides[0] - sides[1]) / (2 * step)
        return product

    def _gradients(self, *, create_graph: bool) -> Sequence[torch.Tensor]:
        # Fused attention has no second derivative; its plain form has.
        with sdpa_kernel(SDPBackend.MATH):
            gradients: Sequence[torch.Tensor] = torch.autograd.grad(
                self._loss(), self._parameters, create_graph=create_graph, materialize_grads=True
            )
        return gradients

    def _gathered(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = zip(gradients, self._indices, strict=True)
        return torch.cat([g.reshape(-1)[i].to(self.like) for g, i in parts])

    def _places(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        return zip((p.data for p in self._parameters), self._indices, strict=True)

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        flags = [p.requires_grad for p in self._parameters]
        try:
            for parameter in self._parameters:
                parameter.requires_grad_()
            yield
        finally:
            for parameter, flag in zip(self._parameters, flags, strict=True):
                parameter.requires_grad_(flag)


def largest_eigenvalue(
    hessian: SupportHessian, *, iterations: int = 30, tolerance: float = 1e-2, seed: int = 0
) -> float:
    """The largest eigenvalue (not magnitude) by power iteration, shifted if need be.

    Stops when the estimate changes by less than `tolerance` of itself, or after `iterations`
    products; a shift takes as many again. Estimates from below.
    """
    strongest = _power(hessian, 0.0, iterations, tolerance, seed)
    if strongest >= 0:
        return strongest
    shift = -strongest  # the strongest is negative: moved up by it, the largest is the strongest
    return _power(hessian, shift, iterations, tolerance, seed) - shift


def hessian_norm(
    model: torch.nn.Module,
    loss: Callable[[], torch.Tensor],
    support: Support,
    *,
    iterations: int = 30,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> float:
    """The spectral norm of the Hessian on a support, the y axis of figure 4a; see the classes."""
    return abs(_power(SupportHessian(model, loss, support), 0.0, iterations, tolerance, seed))


def norms_by_density(
    model: torch.nn.Module,
    loss: Callable[[], torch.Tensor],
    densities: Iterable[float],
    *,
    names: Iterable[str] | None = None,
    seed: int = 0,
    iterations: int = 30,
) -> list[tuple[float, float]]:
    """(density, Hessian norm) of random masks on the named parameters (all by default)."""
    live = dict(model.named_parameters())
    numels = {name: live[name].numel() for name in (live if names is None else names)}
    rows = []
    for density in densities:
        budget = max(1, round(density * sum(numels.values())))
        counts = dict(zip(numels, proportional_counts(list(numels.values()), budget), strict=True))
        support = {
            name: torch.from_numpy(seeded_support(seed, name, numels[name], int(count)))
            for name, count in counts.items()
            if count
        }
        rows.append((density, hessian_norm(model, loss, support, iterations=iterations)))
    return rows


def distance_travelled(tuner: SparseTuner) -> float:
    """How far the entries in training have gone from the base: the l2 norm of the delta."""
    entries = tuner.engine.entries
    return float(torch.linalg.vector_norm(entries.values.detach()[: entries.count]))


def _power(
    hessian: SupportHessian, shift: float, iterations: int, tolerance: float, seed: int
) -> float:
    """The Rayleigh quotient of the strongest eigenvector of H + shift."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(hessian.size, generator=generator, dtype=torch.float64).to(hessian.like)
    found = 0.0
    for _ in range(iterations):
        vector = vector / vector.norm()
        image = hessian.product(vector) + shift * vector
        before, found = found, float(vector @ image)
        length = float(image.norm())
        if not torch.isfinite(image.norm()):
            raise TrainingError("the Hessian of the loss is not finite at these weights")
        if length == 0 or abs(found - before) < tolerance * abs(found):
            break
        vector = image
    return found
