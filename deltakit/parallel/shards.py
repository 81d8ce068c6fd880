"""The processes among which FSDP2 (`fully_shard`) has split a model's tensors by rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from deltakit.errors import ConfigError
from deltakit.parallel.ranks import Ranks


def is_split(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of the tensor only (it is a DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")  # where it is not, there is none
    return module is not None and isinstance(tensor, module.DTensor)


def held_here(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a split tensor that this process holds, sharing its memory; others as they are."""
    plain: Any = tensor.detach()
    local: torch.Tensor = plain.to_local() if is_split(tensor) else plain
    return local


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a split tensor, put together for the occasion: a collective. Others as they are."""
    plain: Any = tensor.detach()
    full: torch.Tensor = plain.full_tensor() if is_split(tensor) else plain
    return full


def picked(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor at flat positions int64 [n], with their bits; a collective if split."""
    if not is_split(tensor):
        return tensor.detach().view(-1)[positions.to(tensor.device)]
    local = held_here(tensor).view(-1)
    ranks = all_processes()
    start = int(ranks.before(torch.tensor(len(local), device=local.device)))
    here = positions.to(local.device) - start
    mine = (here >= 0) & (here < len(local))
    kind = _WORDS[local.element_size()]
    words = torch.zeros(len(here), dtype=torch.int64, device=local.device)
    words[mine] = local[here[mine]].view(kind).long()
    ranks.add(words)  # all but one are zero at each place
    return words.to(kind).view(local.dtype)


def reshard(model: torch.nn.Module) -> None:
    """Free the whole weights that a forward without a backward leaves behind."""
    for module in model.modules():
        if (free := getattr(module, "reshard", None)) is not None:
            free()


class Shards:
    """The split of a model's parameters; every process of the default group holds some rows of each.

    Every method is a collective: all processes call it, in the same order.
    """

    def __init__(self, ranks: Ranks, starts: Mapping[int, int]) -> None:
        self.ranks = ranks
        self._starts = starts

    @classmethod
    def of(cls, model: torch.nn.Module) -> Shards | None:
        """How a model is split, None where it is not.

        Raises ConfigError for a split other than `fully_shard`'s own, by rows among all processes:
        tensor parallelism, hybrid sharding, and models of which it has a part only.
        """
        parameters = dict(model.named_parameters())
        if not any(is_split(parameter) for parameter in parameters.values()):
            return None
        reshard(model)
        parameters = dict(model.named_parameters())
        for name in sorted(parameters, key=lambda name: not is_split(parameters[name])):
            _check_split(name, parameters[name])
        ranks = all_processes()
        device = next(iter(parameters.values())).device
        sizes = torch.tensor([held_here(p).numel() for p in parameters.values()], device=device)
        starts = ranks.before(sizes).tolist()
        return cls(ranks, {id(p): s for p, s in zip(parameters.values(), starts, strict=True)})

    def start(self, parameter: torch.nn.Parameter) -> int:
        """Where in a parameter, flat, the part held here begins; no collective."""
        return self._starts[id(parameter)]

    def joined(
        self, parts: Sequence[torch.Tensor], *, everywhere: bool = True
    ) -> Iterator[torch.Tensor]:
        """Each of these vectors [n_rank] as one of all processes, in order of rank.

        Where they are not wanted `everywhere` the first process gets them, others empty ones.
        """
        device = parts[0].device
        sizes = torch.tensor([len(part) for part in parts], dtype=torch.int64, device=device)
        counts = torch.stack(self.ranks.gathered(sizes)).tolist()
        for number, part in enumerate(parts):
            lengths = [row[number] for row in counts]
            padded = part.new_zeros(max(lengths))
            padded[: len(part)] = part
            if not len(padded):
                yield padded
                continue
            found = self.ranks.gathered(padded, everywhere=everywhere)
            yield torch.cat([part[:0], *(t[:n] for t, n in zip(found, lengths, strict=False))])


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def all_processes() -> Ranks:
    """torch.distributed's default group, of one process too."""
    return Ranks(dist.get_rank(), dist.get_world_size())


def _check_split(name: str, parameter: torch.Tensor) -> None:
    expected = f"fully_shard over all {dist.get_world_size()} processes, by rows"
    if not is_split(parameter):
        raise ConfigError(
            f"parameter {name!r} is not sharded while others are; expected {expected}: apply "
            "fully_shard to the whole model, without ignored_params"
        )
    split: Any = parameter
    placements, mesh = split.placements, split.device_mesh
    rows = len(placements) == 1 and placements[0].is_shard(0)
    if not rows or mesh.size() != dist.get_world_size() or type(placements[0]).__name__ != "Shard":
        raise ConfigError(
            f"parameter {name!r} is placed as {placements} on a mesh {tuple(mesh.shape)}; expected "
            f"{expected}: tensor parallelism and hybrid sharding are not supported"
        )
