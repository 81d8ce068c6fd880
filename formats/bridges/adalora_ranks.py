"""AdaLoRA's pruned ranks: PEFT leaves them out of its files, deltakit keeps them as zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError

_AXES = {"lora_A": 0, "lora_B": 1, "lora_E": 0}
MAX_RANK = 1024  # far beyond any adapter's: a mask of a few bytes must not cost much memory


def with_pruned_ranks(
    masks: Any, modules: Mapping[str, str], values: Mapping[str, Array], where: object
) -> dict[str, Array]:
    """The factors with zeros at the ranks that were pruned, as many ranks as before the pruning, by
    which AdaLoRA divides (Zhang et al., 2023, equation 3, as in PEFT).

    masks: `rank_pattern` of AdaLoRA, live name of a module's lora_E -> for each rank whether it is
    left. modules: live name -> name in the checkpoint. values: name of a tensor -> values. Raises
    FormatError for masks that do not fit.
    """
    whole = dict(values)
    if masks and not isinstance(masks, dict):
        raise FormatError(f"{where}: rank_pattern {masks!r} is none of AdaLoRA's")
    for key, mask in (masks or {}).items():
        module = modules.get(key.removesuffix(".lora_E"))
        if module is None or not _is_mask(mask):
            raise FormatError(f"{where}: rank_pattern of {key!r} is no list of ranks of a module")
        kept = np.array(mask, bool)
        for parameter, axis in _AXES.items():
            name = f"{module}.{parameter}"
            if name in whole:
                whole[name] = _spread(name, whole[name], kept, axis)
    return whole


def _is_mask(mask: Any) -> bool:
    return (
        isinstance(mask, list)
        and 0 < len(mask) <= MAX_RANK
        and all(type(kept) is bool for kept in mask)
    )


def _spread(name: str, values: Array, kept: Array, axis: int) -> Array:
    if values.ndim != 2 or values.shape[axis] not in (kept.sum(), len(kept)):
        raise FormatError(
            f"tensor {name!r} of shape {list(values.shape)} does not have the {kept.sum()} ranks "
            "that rank_pattern leaves"
        )
    if values.shape[axis] == len(kept):
        return values
    shape = tuple(len(kept) if n == axis else size for n, size in enumerate(values.shape))
    whole = np.zeros(shape, values.dtype)
    whole[(slice(None),) * axis + (kept,)] = values
    return whole
