"""Splitting a transformers model among processes by FSDP2, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from deltakit.errors import ConfigError
from deltakit.parallel.shards import all_processes

Load = Callable[[], Any]


def load_sharded(load: Load, empty: Callable[[torch.dtype], Any]) -> Any:
    """A model that the first process loads and all share, without any other ever holding it whole.

    load: the model. empty: the same without weights, given its dtype; called under torch's meta
    device. Weights go out tensor by tensor.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    ranks = all_processes()
    model = load() if ranks.rank == 0 else None
    dtype = ranks.gathered_texts("" if model is None else str(model.dtype))[0]
    weights: dict[str, Any] = {}
    if model is None:
        with torch.device("meta"):
            model = empty(getattr(torch, dtype.removeprefix("torch.")))
        shard_model(model)
        model.to_empty(device=_device())
    else:
        weights = model.state_dict()
        shard_model(model)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=whole)
    for buffer in model.buffers():  # those that no checkpoint holds, too
        ranks.from_first(buffer)
    return model


def shard_model(model: torch.nn.Module) -> None:
    """Split every tensor by rows among all processes of torch.distributed's default group.

    Every block of layers is a unit of its own, whose whole weights exist only while it computes;
    what lies outside blocks (embeddings, norms, heads) is one more. All processes hold the same
    model when they call. Raises ConfigError where torch is older than 2.6.
    """
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise ConfigError(
            f"sharding fsdp needs torch 2.6 or newer, found {torch.__version__}"
        ) from None
    mesh = init_device_mesh(_device(), (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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
