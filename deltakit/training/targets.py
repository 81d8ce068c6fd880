"""Which of a model's tensors may hold entries, and which are trained densely."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.targets.patterns import matching
from deltakit.training.entries import Target

_TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def choose_targets(
    model: torch.nn.Module,
    names: Mapping[str, str | None],
    target: str | Iterable[str] | None,
    exclude: str | Iterable[str],
    extras: str | Iterable[str],
) -> tuple[list[Target], list[str]]:
    """Targets in tensor order, and the live names of extras in the model's order.

    names: live name -> name in the checkpoint, None for what the base lacks, which always is an
    extra. Raises ConfigError for patterns that match nothing and when no target is left.
    """
    live = dict(model.named_parameters())
    dense = {n for n, stored in names.items() if stored is None}
    dense |= matching(extras, names, "extras pattern", model).keys()
    parts = _without(
        matching(target, names, "target pattern", model),
        matching(exclude, names, "exclude pattern", model),
    )
    wanted = {n for n in parts.keys() - dense if live[n].dtype in _TRAINABLE and live[n].numel()}
    if not wanted:
        raise ConfigError("no tensor is left to train: target, exclude and extras rule all out")
    stored_names = {n: names[n] or n for n in wanted}
    ordered = sorted(wanted, key=lambda n: stored_names[n].encode())
    targets = []
    for number, name in enumerate(ordered):
        if not live[name].data.is_contiguous():
            raise ConfigError(
                f"parameter {name!r} is not contiguous and cannot be trained sparsely"
            )
        targets.append(Target(number, stored_names[name], name, live[name]))
        part = parts[name]
        if part is not None:
            outside = np.flatnonzero(~np.broadcast_to(part, targets[-1].shape))
            targets[-1].forbidden = torch.from_numpy(outside)
    return targets, [n for n in names if n in dense]


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
