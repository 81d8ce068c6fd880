"""LoftQ: low-rank factors that start from what quantising the base has lost (Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from deltakit.adapter import Adapter
from deltakit.adapters.initial import STORED, check_value
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.arrays import to_numpy, to_torch
from deltakit.quantized.layers import dequantised, is_transposed, quantised_layers

if TYPE_CHECKING:
    from deltakit.adapters.attach import Attached

_A, _B = "lora_A.weight", "lora_B.weight"


@torch.no_grad()
def loftq(attached: Attached, base: Checkpoint) -> Attached:
    """Start a new `lora` adapter on a quantised base from W - Q: scaling * B A is nearest to it.

    W is the full-precision weight, read from `base` one tensor at a time, Q what the codes stand
    for, B A the truncated singular value decomposition of their difference, its singular values
    shared in equal parts. This is algorithm 1 of Li et al. 2023 with T = 1: its further rounds
    would change the codes, which here are the same for whoever uses the base. The initial values go
    into the delta's extras, and merging adds what the factors have gained since.

    Raises ConfigError for other kinds and for a layer that is not quantised.
    """
    adapter = attached.adapter
    if adapter.kind != "lora" or not {_A, _B} <= adapter.initial.keys():
        raise ConfigError(
            f"LoftQ starts adapters of kind lora at linear layers, found {adapter.kind!r}"
        )
    layers, live = quantised_layers(attached.model), attached.where.live
    values = dict(attached.initial)
    for module, tensor in attached.modules.items():
        name = next(
            (n for n in (live.get(tensor), *_rearranged(attached, tensor)) if n in layers), None
        )
        if name is None:
            raise ConfigError(f"LoftQ: {tensor!r} is not quantised; leave it out of target")
        wrapper: Any = attached.model.get_submodule(name.removesuffix(".base_layer.weight"))
        lost = _full(base, tensor, layers[name]) - dequantised(layers[name]).float().cpu()
        down, up = factors(
            lost, len(values[f"{module}.{_A}"]), next(iter(wrapper.scaling.values()))
        )
        for part, found in ((_A, down), (_B, up)):
            kind = attached.parameters[f"{module}.{part}"].dtype
            values[f"{module}.{part}"] = to_numpy(found.to(kind))
    rules: Mapping[str, Any] = {**adapter.initial, _A: {"stored": True}, _B: {"stored": True}}
    check = check_value(adapter.kind, adapter.config, values)
    started = replace(
        attached,
        adapter=replace(adapter, initial=rules, check=check),
        initial=values,
        stored={STORED + n: v for n, v in values.items() if n.endswith((_A, _B))},
    )
    started.reset()
    return started


def check_codes(model: torch.nn.Module, adapter: Adapter, modules: Sequence[str]) -> None:
    """Raise ConfigError where an adapter of stored initial values would meet full weights.

    modules: live names. Those values make up for what quantising loses and would be added twice.
    """
    if not any("stored" in rule for rule in adapter.initial.values()):
        return
    layers = quantised_layers(model)
    plain = next((module for module in modules if f"{module}.weight" not in layers), None)
    if plain is not None:
        raise ConfigError(
            f"adapter {adapter.kind!r} started from what quantising its base lost, and {plain!r} is "
            "not quantised here; quantise the model as the delta's provenance says, or merge it "
            "into the full-precision base"
        )


def factors(lost: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] with scaling * B A nearest to `lost` [out, in], float32."""
    left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
    roots = (sizes[:rank] / scaling).sqrt()
    down, up = lost.new_zeros(rank, lost.shape[1]), lost.new_zeros(lost.shape[0], rank)
    down[: len(roots)] = roots[:, None] * right[:rank]
    up[:, : len(roots)] = left[:, :rank] * roots
    return down, up


def _rearranged(attached: Attached, tensor: str) -> list[str]:
    return [region.live for region in attached.where.by_stored.get(tensor, ())]


def _full(base: Checkpoint, tensor: str, layer: torch.nn.Module) -> torch.Tensor:
    info = base.info(tensor)
    whole = to_torch(base.read(tensor).view(info.kind.numpy).reshape(info.shape)).float()
    return whole.t() if is_transposed(layer) else whole
