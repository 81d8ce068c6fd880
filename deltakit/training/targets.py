"""Which of a model's tensors may hold entries, and which are trained densely."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.parallel.shards import is_split
from deltakit.quantized.stand_in import StandIn, whole_parameters
from deltakit.quantized.target import QuantisedTarget
from deltakit.targets.patterns import matching
from deltakit.training.shard_target import ShardTarget
from deltakit.training.target import Target

_TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def choose_targets(
    model: torch.nn.Module,
    names: Mapping[str, str | None],
    target: str | Iterable[str] | None,
    exclude: str | Iterable[str],
    extras: str | Iterable[str],
    among: Collection[str] | None = None,
) -> tuple[list[Target], list[str]]:
    """Targets in tensor order, and the live names of extras in the model's order.

    names: live name -> name in the checkpoint, None for what the base lacks, which always is an
    extra. among: the live names that may be targets; all by default. Raises ConfigError for patterns that match nothing and when no target is left.
    """
    live = whole_parameters(model)
    dense = {n for n, stored in names.items() if stored is None}
    dense |= matching(extras, names, "extras pattern", model).keys()
    _refuse_codes(dense, live)
    parts = _without(
        matching(target, names, "target pattern", model),
        matching(exclude, names, "exclude pattern", model),
    )
    wanted = {n for n in parts.keys() - dense if live[n].dtype in _TRAINABLE and live[n].numel()}
    wanted = wanted if among is None else wanted & set(among)
    if not wanted:
        raise ConfigError("no tensor is left to train: target, exclude and extras rule all out")
    stored_names = {n: names[n] or n for n in wanted}
    ordered = sorted(wanted, key=lambda n: stored_names[n].encode())
    targets = []
    for number, name in enumerate(ordered):
        kind = _kind(live[name])
        if kind is Target and not live[name].data.is_contiguous():
            raise ConfigError(
                f"parameter {name!r} is not contiguous and cannot be trained sparsely"
            )
        targets.append(kind(number, stored_names[name], name, live[name]))
        part = parts[name]
        if part is not None:
            outside = np.flatnonzero(~np.broadcast_to(part, targets[-1].shape))
            targets[-1].forbidden = torch.from_numpy(outside)
    return targets, [n for n in names if n in dense]


def _kind(parameter: torch.Tensor) -> type[Target]:
    if isinstance(parameter, StandIn):
        return QuantisedTarget
    return ShardTarget if is_split(parameter) else Target


def _refuse_codes(dense: Iterable[str], live: Mapping[str, torch.nn.Parameter]) -> None:
    for name in dense:
        if isinstance(live.get(name), StandIn):
            raise ConfigError(
                f"tensor {name!r} is quantised and cannot be an extra or missing in the base; train "
                "entries of it, or leave it out of quantising"
            )


def _without(
    taken: Mapping[str, Array | None], excluded: Mapping[str, Array | None]
) -> dict[str, Array | None]:
    """What is left of tensors or parts of them (see `matching`)."""
    left: dict[str, Array | None] = {}
    for name, part in taken.items():
        if name not in excluded:
            left[name] = part
            continue
        without = excluded[name]
        if without is not None:
            rest = ~without if part is None else part & ~without
            if rest.any():
                left[name] = rest
    return left
