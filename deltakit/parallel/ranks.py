"""The processes that train one model together, as torch.distributed has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Ranks:
    """The default process group: every rank holds the whole model and sees its share of a batch.

    Each method is a collective: all ranks call it, in the same order, with tensors of one shape.
    """

    rank: int
    size: int

    @classmethod
    def together(cls) -> Ranks | None:
        """The initialised default group; None where this process trains alone."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        return cls(dist.get_rank(), dist.get_world_size())

    def average(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by its mean over ranks, with the same bits on all of them."""
        dist.all_reduce(tensor)
        tensor.div_(self.size)

    def add(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by its sum over ranks, with the same bits on all of them."""
        dist.all_reduce(tensor)

    def before(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the tensors of all ranks before this one."""
        earlier = self.gathered(tensor)[: self.rank]
        return torch.stack(earlier).sum(0) if earlier else torch.zeros_like(tensor)

    def from_first(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by rank 0's."""
        dist.broadcast(tensor, src=0)

    def gathered(self, tensor: torch.Tensor, *, everywhere: bool = True) -> list[torch.Tensor]:
        """Every rank's tensor, in order of rank; if not `everywhere`, for rank 0 and none for others."""
        wanted = everywhere or self.rank == 0
        found = [torch.empty_like(tensor) for _ in range(self.size if wanted else 0)]
        if everywhere:
            dist.all_gather(found, tensor)
        else:
            dist.gather(tensor, found or None, dst=0)
        return found

    def gathered_texts(self, text: str) -> list[str]:
        """Every rank's text, in order of rank."""
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, text)
        return found


def flattened(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All tensors one after another in a new flat one."""
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
