"""Stacking in the flavours of peft and mergekit against their own functions, on the same tensors.

    python benchmarks/stack_peers.py [--peer peft|mergekit]

For mergekit run it in an environment of its own that has mergekit and deltakit: it pins versions of
libraries that deltakit does not. Where a peer draws at random it is given deltakit's draws, so that
everything else is compared. Prints the largest difference over random tensors, dense and sparse,
relative to the largest value, and exits with 1 where that is more than 1e-5.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from deltakit.combine import METHODS
from deltakit.combine.drop import draws
from deltakit.combine.method import option_names
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.stacking import stack

SHAPE = (37, 53)
SEED = 5
UNWEIGHTED = ("ram", "ram-plus", "sce")  # in mergekit
Peer = Callable[[list[torch.Tensor], torch.Tensor, float], torch.Tensor]


def tasks(density: float, rng: np.random.Generator) -> list[Array]:
    """Three task vectors of normal values, zero outside a share of `density`."""
    inside = rng.random((3, *SHAPE)) < density
    return list(np.where(inside, rng.standard_normal((3, *SHAPE)), 0).astype(np.float32))


def delta_of(task: Array) -> SparseDelta:
    at = np.flatnonzero(task)
    tensor = TensorDelta(
        name="w",
        shape=SHAPE,
        dtype="float32",
        mode="add",
        indices=at,
        values=task.reshape(-1)[at],
    )
    return SparseDelta(tensors={"w": tensor})


class SameDraws:
    """Stands in for torch.bernoulli: uniform draws of deltakit below the chances."""

    def __init__(self, given: list[Array]) -> None:
        self._draws = self._of(given)

    @staticmethod
    def _of(given: list[Array]) -> Iterator[torch.Tensor]:
        for number, task in enumerate(given):
            drawn = np.ones(task.size)
            at = np.flatnonzero(task)
            drawn[at] = draws(SEED, "w", len(at), number)
            yield torch.from_numpy(drawn.reshape(SHAPE))

    def __call__(self, chances: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        chances = options["input"] if chances is None else chances
        return (next(self._draws) < chances).to(chances.dtype)


def of_peft() -> dict[str, Peer]:
    from peft.utils import merge_utils as peer

    return {
        "task-arithmetic": lambda t, w, d: peer.task_arithmetic(t, w),
        "magnitude": peer.magnitude_prune,
        "ties": peer.ties,
        "dare": peer.dare_linear,
        "dare-ties": peer.dare_ties,
    }


def of_mergekit() -> dict[str, Peer]:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import ParameterScope, TensorGroup

    names = {
        "task-arithmetic": "task_arithmetic",
        "ties": "ties",
        "dare": "dare_linear",
        "dare-ties": "dare_ties",
        "della": "della",
        "della-linear": "della_linear",
        "breadcrumbs": "breadcrumbs",
        "breadcrumbs-ties": "breadcrumbs_ties",
        "sce": "sce",
        "ram": "ram",
        "ram-plus": "ramplus_tl",
    }

    def peer(name: str) -> Peer:
        method = registry.get(name)

        def run(tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> Any:
            options = {p.name: p.default for p in method.spec.parameters}
            options |= {n: density for n in ("density", "select_topk") if n in options}
            for parameter in method.spec.parameters:
                if parameter.scope is ParameterScope.NON_BASE:
                    options[parameter.name] = dict.fromkeys(range(1, 4), options[parameter.name])
            if "weight" in options:
                options["weight"] = dict(enumerate(weights.tolist(), 1))
            inputs = [torch.zeros(SHAPE), *tensors]
            group = TensorGroup.from_tensors(inputs, ids=range(4), base_index=0)
            return method.merge_group(group, **options)

        return run

    return {ours: peer(theirs) for ours, theirs in names.items()}


def difference(name: str, peer: str, theirs: Peer, given: list[Array], density: float) -> float:
    weights = [1.0] * 3 if name in UNWEIGHTED else [1.0, 0.5, 2.0]
    takes = option_names(METHODS[name])
    options = {k: v for k, v in {"density": density, "seed": SEED}.items() if k in takes}
    drawn, torch.bernoulli = torch.bernoulli, SameDraws(given)  # type: ignore[assignment]
    try:
        tensors = [torch.from_numpy(task.copy()) for task in given]
        expected = theirs(tensors, torch.tensor(weights), density).numpy()
    finally:
        torch.bernoulli = drawn
    deltas = [delta_of(task) for task in given]
    made = stack(deltas, name, weights, flavour=peer, **options).tensors["w"]  # type: ignore[arg-type]
    found = np.zeros(SHAPE, np.float32)
    found.reshape(-1)[made.indices] = made.values
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=["peft", "mergekit"], default="peft")
    peer = parser.parse_args().peer
    worst = 0.0
    rng = np.random.default_rng(0)
    for name, theirs in {"peft": of_peft, "mergekit": of_mergekit}[peer]().items():
        found = [
            difference(name, peer, theirs, tasks(share, rng), density)
            for share in (1.0, 0.3)
            for density in (0.2, 0.5, 0.83)
        ]
        worst = max(worst, *found)
        print(f"{name:18} {max(found):.1e}")
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
