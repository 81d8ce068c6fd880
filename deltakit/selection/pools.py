"""Scoring the gradients of one step into pools: one pool for all tensors, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import TrainingError
from deltakit.kernels.dispatch import by_triton
from deltakit.parallel.global_best import Candidates, in_order, winners
from deltakit.parallel.ranks import Ranks
from deltakit.selection.heuristics import StepScore
from deltakit.selection.methods import Joining, Part, Selector
from deltakit.selection.precondition import factored_rms, factored_rms_of_part
from deltakit.selection.topk import TopK


class Pools:
    """The best entries of one selection step.

    score: of entries. numels: elements per tensor, in tensor order. precondition: what scores are
    made of, "none" (the gradient) or "factored" (see `selection.precondition`). Per selection:
    `open`, then `offer` once for each tensor that has a gradient, in any order, then `best`.

    After `split`, gradients, weights and indices are those of this process's parts of the tensors;
    the best are chosen of all processes', and each learns of its own.
    """

    def __init__(self, score: StepScore, numels: Sequence[int], precondition: str = "none") -> None:
        self.score = score
        self.precondition = precondition
        self.numels = list(numels)
        self._pools: list[TopK] = []
        self._ranks: Ranks | None = None
        self._parts_here: Sequence[Part] = ()

    def split(self, ranks: Ranks, parts: Sequence[Part]) -> None:
        """Choose together with other processes, each from its parts of the tensors."""
        self._ranks, self._parts_here = ranks, parts
        self.numels = [part.numel for part in parts]

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
        for start, part, scored in self._parts(tensor, gradient):
            if not len(part):
                continue
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
        return torch.cat([scored.abs() for _, _, scored in self._parts(0, gradient)])

    def _parts(
        self, tensor: int, gradient: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Pieces that stay within a core's cache: flat start, gradient [n], what is scored [n]."""
        size = 2**18 if gradient.device.type == "cpu" else 2**24
        if self.precondition == "none":
            flat = gradient.reshape(-1)
            for start in range(0, len(flat), size):
                part = flat[start : start + size].float()
                yield start, part, part
            return
        rows, columns = self._factors(tensor, gradient)
        width = max(1, gradient.shape[1])  # of a process that holds nothing of a vector: 0
        height = max(1, size // width)
        for top in range(0, len(gradient), height):
            part = gradient[top : top + height].float()
            scored = part * rows[top : top + height] * columns
            yield top * width, part.reshape(-1), scored.reshape(-1)

    def _factors(self, tensor: int, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._ranks is None:
            return factored_rms(gradient)
        is_row = self._parts_here[tensor].is_row
        return factored_rms_of_part(gradient, self._ranks.add, is_row=is_row)

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
        bound = self.score.least_gradient(pool.threshold, *bounds)
        near, found = _where_at_least(scored, magnitude, bound)
        scores = self.score.score(found, weight[start + near])
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
        pools = list(dict.fromkeys(self._pools))
        pool_of = [pools.index(pool) for pool in self._pools]
        found = [pool.scored() for pool in pools]
        lacking = [pool.k - len(scores) for pool, (scores, *_) in zip(pools, found, strict=True)]
        if self._ranks is not None:
            offered = [Candidates(scores, owners) for scores, owners, *_ in found]
            wanted = [pool.k for pool in pools]
            keep, lacking = winners(self._ranks, offered, wanted, pool_of)
            pairs = zip(found, keep, strict=True)
            found = [(s[k], o[k], i[k], g[k]) for (s, o, i, g), k in pairs]
        chosen: list[Joining] = []
        for _, owners, indices, gradients in found:
            for tensor in torch.unique(owners).tolist():
                mine = owners == tensor
                chosen.append((tensor, indices[mine], gradients[mine]))
        if any(lacking):
            chosen += self._first_free(lacking, pool_of, chosen, taken)
        self._pools = []
        return sorted(chosen, key=lambda c: c[0])

    def _first_free(
        self,
        lacking: Sequence[int],
        pool_of: Sequence[int],
        chosen: Sequence[Joining],
        taken: Callable[[int], Array],
    ) -> list[Joining]:
        """The first free entries of each pool's tensors, as many as it lacks."""
        used, free = [], []
        for tensor, pool in enumerate(pool_of):
            mine = [indices.cpu().numpy() for t, indices, _ in chosen if t == tensor]
            mine += [taken(tensor)] if lacking[pool] else []
            used.append(np.unique(np.concatenate([np.zeros(0, np.int64), *mine])))
            free.append(self.numels[tensor] - len(used[-1]))
        found: list[Joining] = []
        for tensor, count in enumerate(self._shared_out(free, pool_of, lacking)):
            candidates = np.arange(min(self.numels[tensor], count + len(used[tensor])))
            first = np.setdiff1d(candidates, used[tensor], assume_unique=True)[:count]
            if len(first):
                found.append((tensor, torch.from_numpy(first), torch.zeros(len(first))))
        return found

    def _shared_out(
        self, free: Sequence[int], pool_of: Sequence[int], lacking: Sequence[int]
    ) -> list[int]:
        """How many of each tensor's free entries (here) fill up the pools, in tensor order."""
        if self._ranks is not None:
            given: list[int] = in_order(self._ranks, torch.tensor(free), pool_of, lacking).tolist()
            return given
        left, given = list(lacking), []
        for room, pool in zip(free, pool_of, strict=True):
            given.append(min(room, left[pool]))
            left[pool] -= given[-1]
        return given


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


def _where_at_least(
    scored: torch.Tensor, magnitude: torch.Tensor, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the magnitude [n] of what is scored reaches a bound, in order, and what is there."""
    if by_triton(scored):
        from deltakit.kernels.at_least import at_least

        return at_least(scored, bound)
    if magnitude.device.type == "cpu":  # NumPy's flatnonzero is several times faster than torch's
        near = torch.from_numpy(np.flatnonzero((magnitude >= bound).numpy()))
    else:
        near = (magnitude >= bound).nonzero().view(-1)
    return near, scored[near]
