"""Scoring the gradients of one step into pools: one pool for all tensors, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import TrainingError
from deltakit.selection.heuristics import StepScore
from deltakit.selection.methods import Joining, Selector
from deltakit.selection.precondition import factored_rms
from deltakit.selection.topk import TopK


class Pools:
    """The best entries of one selection step.

    score: of entries. numels: elements per tensor, in tensor order. precondition: what scores are
    made of, "none" (the gradient) or "factored" (see `selection.precondition`). Per selection:
    `open`, then `offer` once for each tensor that has a gradient, in any order, then `best`.
    """

    def __init__(self, score: StepScore, numels: Sequence[int], precondition: str = "none") -> None:
        self.score = score
        self.precondition = precondition
        self.numels = list(numels)
        self._pools: list[TopK] = []

    @property
    def tensors(self) -> int:
        """How many tensors compete."""
        return len(self.numels)

    def open(self, counts: int | Sequence[int]) -> None:
        """Open the pools: one of so many entries for all tensors, or one of each tensor's own."""
        if isinstance(counts, int):
            self._pools = [TopK(counts)] * len(self.numels)
        else:
            self._pools = [TopK(int(k)) for k in counts]

    def offer(
        self,
        tensor: int,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        bounds: tuple[float, float],
        where: str,
    ) -> None:
        """Score a tensor's dense gradient and pool what may win.

        gradient: [R, C], zero at entries that must not be chosen; a vector is one row. weight:
        flat [R * C]. bounds: least and largest |w|. where: names the tensor in errors. Raises
        TrainingError for a gradient that is not finite.
        """
        pool = self._pools[tensor]
        if not pool.k:
            return
        for start, part, scored in self._parts(gradient):
            largest = max(abs(end.item()) for end in torch.aminmax(scored))
            if not np.isfinite(largest):
                raise TrainingError(
                    f"{where}: the gradient is not finite ({largest}); lower the learning rate, "
                    "clip gradients or look for broken inputs"
                )
            if largest > 0 and largest >= self.score.least_gradient(pool.threshold, *bounds):
                self._offer_part(pool, tensor, part, scored, weight, start, bounds)

    def magnitude(self, gradient: torch.Tensor) -> torch.Tensor:
        """|what is scored| of a gradient [R, C], flat float32."""
        return torch.cat([scored.abs() for _, _, scored in self._parts(gradient)])

    def _parts(self, gradient: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Pieces that stay within a core's cache: flat start, gradient [n], what is scored [n]."""
        size = 2**18 if gradient.device.type == "cpu" else 2**24
        if self.precondition == "none":
            flat = gradient.reshape(-1)
            for start in range(0, len(flat), size):
                part = flat[start : start + size].float()
                yield start, part, part
            return
        rows, columns = factored_rms(gradient)
        height, width = max(1, size // gradient.shape[1]), gradient.shape[1]
        for top in range(0, len(gradient), height):
            part = gradient[top : top + height].float()
            scored = part * rows[top : top + height] * columns
            yield top * width, part.reshape(-1), scored.reshape(-1)

    def _offer_part(
        self,
        pool: TopK,
        tensor: int,
        part: torch.Tensor,
        scored: torch.Tensor,
        weight: torch.Tensor,
        start: int,
        bounds: tuple[float, float],
    ) -> None:
        magnitude = scored.abs()
        if self.score.least_gradient(1.0, *bounds) == 1.0:  # the score is the magnitude itself
            pool.raise_threshold(magnitude)
        near = _where_at_least(magnitude, self.score.least_gradient(pool.threshold, *bounds))
        scores = self.score.score(scored[near], weight[start + near])
        pool.raise_threshold(scores)
        good = scores >= pool.threshold
        near = near[good]
        pool.offer(tensor, scores[good], start + near, part[near])

    def best(self, taken: Callable[[int], Array]) -> list[Joining]:
        """The best entries, as many as were asked for whatever the gradients were.

        taken: gives the flat indices of a tensor that must not be chosen; asked only when fewer
        entries score above zero than are wanted. The rest then comes in tie order: earlier
        tensor, lower index, with a gradient of zero.
        """
        chosen: list[Joining] = []
        for pool in dict.fromkeys(self._pools):
            owners, indices, gradients = pool.result()
            for tensor in torch.unique(owners).tolist():
                mine = owners == tensor
                chosen.append((tensor, indices[mine], gradients[mine]))
            missing = pool.k - len(owners)
            if missing:
                members = [n for n, p in enumerate(self._pools) if p is pool]
                chosen += self._first_free(missing, members, chosen, taken)
        self._pools = []
        return sorted(chosen, key=lambda c: c[0])

    def _first_free(
        self,
        missing: int,
        members: list[int],
        chosen: list[Joining],
        taken: Callable[[int], Array],
    ) -> list[Joining]:
        found: list[Joining] = []
        for tensor in members:
            blocked = [indices.cpu().numpy() for t, indices, _ in chosen if t == tensor]
            used = np.unique(np.concatenate([*blocked, taken(tensor)]))
            candidates = np.arange(min(self.numels[tensor], missing + len(used)))
            free = np.setdiff1d(candidates, used, assume_unique=True)[:missing]
            if len(free):
                found.append((tensor, torch.from_numpy(free), torch.zeros(len(free))))
                missing -= len(free)
        return found


class PoolSelector(Selector):
    """A selector that scores the gradients of its steps into pools."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def offer(
        self,
        tensor: int,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        bounds: tuple[float, float],
        where: str,
    ) -> None:
        """Score one tensor's gradient; see `Pools.offer`."""
        self._pools.offer(tensor, gradient, weight, bounds, where)

    def magnitude(self, gradient: torch.Tensor) -> torch.Tensor:
        """The size of what is scored."""
        return self._pools.magnitude(gradient)


def _where_at_least(magnitude: torch.Tensor, bound: float) -> torch.Tensor:
    if magnitude.device.type == "cpu":  # NumPy's flatnonzero is several times faster than torch's
        return torch.from_numpy(np.flatnonzero((magnitude >= bound).numpy()))
    return (magnitude >= bound).nonzero().view(-1)
