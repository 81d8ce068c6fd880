"""Deltas beside quantised weights of live models: the entries of S instead of words of W."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from deltakit.delta import TensorDelta
from deltakit.errors import ConfigError
from deltakit.quantized.addition import addition
from deltakit.quantized.stand_in import StandIn


def write_beside(name: str, whole: StandIn, indices: torch.Tensor, words: torch.Tensor) -> None:
    """Let S of a layer hold these entries alone: flat indices, sorted, and words of float32 [n].

    name: live, of the weight. Zeros are no entries; without any the layer is as it was made.
    """
    values = words.view(torch.float32)
    kept = values != 0
    found = addition(name, whole.layer, "applied")
    found.become(indices[kept], values[kept])
    if not len(found.indices):
        found.close()


def beside(
    tensors: Mapping[str, Sequence[TensorDelta]], live: Mapping[str, torch.Tensor]
) -> dict[str, Sequence[TensorDelta]]:
    """Tensors of a delta by live name, those of quantised weights as what they add."""
    return {
        name: [as_added(part) for part in parts] if isinstance(live[name], StandIn) else parts
        for name, parts in tensors.items()
    }


def as_added(tensor: TensorDelta) -> TensorDelta:
    """The tensor in mode add; ConfigError where a `set` tensor does not know its base values."""
    if tensor.mode == "add":
        return tensor
    if tensor.base_values is None:
        raise ConfigError(
            f"tensor {tensor.name!r} is quantised in the model and in set mode without base values "
            "in the delta, so its changes are not known; make the delta anew with its base values"
        )
    before = tensor.base_values.view(tensor.kind.numpy).astype(tensor.floats().dtype)
    values = tensor.floats() - before
    return replace(tensor, mode="add", values=values, base_values=None)


def refuse_whole(
    extras: Mapping[str, Sequence[TensorDelta]], live: Mapping[str, torch.Tensor]
) -> None:
    """Raise ConfigError for an extra that would take the place of codes."""
    for name in extras:
        if isinstance(live[name], StandIn):
            raise ConfigError(
                f"extra {name!r} is a whole tensor, and quantised in the model; load the model with "
                "that layer unquantised"
            )
