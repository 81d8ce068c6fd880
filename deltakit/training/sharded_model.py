"""Splitting a transformers model among processes by FSDP2, block by block."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def shard_model(model: torch.nn.Module) -> None:
    """Split every tensor by rows among all processes of torch.distributed's default group.

    Every block of layers is a unit of its own, whose whole weights exist only while it computes;
    what lies outside blocks (embeddings, norms, heads) is one more. All processes hold the same
    model when they call.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The members of the outermost lists of modules, that share no tensor with the rest."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, torch.nn.ModuleList) or id(module) in inside:
            continue
        inside |= {id(inner) for inner in module.modules()}
        for block in module:
            tied = any(owners[id(parameter)] > 1 for parameter in block.parameters())
            if not tied and any(True for _ in block.parameters()):
                yield block
