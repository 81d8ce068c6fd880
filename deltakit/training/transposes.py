"""Activations turned into one line per feature, for sampled products on CPUs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch

BUFFER = 2**20  # elements of one transposed block (or gathered chunk): 4 MiB in float32
KEPT = 2**23  # elements of activations whose transpose may be kept for the next layer
TILE = 128  # tokens transposed at once: their lines stay in the cache while they are written
NARROW = 1024  # features whose tile stays in the cache as it is
PADDING = 16  # features; without it lines a power of two apart would compete for the same places


def block_length(features: int) -> int:
    """Tokens per block: a multiple of TILE whose transpose fits the buffer."""
    return max(1, BUFFER // features // TILE) * TILE


def transposed(tokens: torch.Tensor, block: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """[..., features] as contiguous [features, at most `block`], one block of tokens at a time."""
    features = tokens.shape[-1]
    for part in torch.split(tokens.reshape(-1, features), block):
        turned = torch.empty(features, len(part), dtype=dtype, device=part.device)
        if part.device.type == "cpu" and part.dtype == dtype and features <= NARROW:
            _turn_narrow(part, turned)
        else:
            _turn(part, turned)
        yield turned


def _turn(part: torch.Tensor, turned: torch.Tensor) -> None:
    tile = part.new_empty(TILE, part.shape[1] + PADDING)[:, : part.shape[1]]
    for rows, to in zip(torch.split(part, TILE), torch.split(turned, TILE, 1), strict=True):
        to.copy_(tile[: len(rows)].copy_(rows).t())


def _turn_narrow(part: torch.Tensor, turned: torch.Tensor) -> None:
    """The same by NumPy, whose calls cost less than torch's."""
    source, target = part.detach().numpy(), turned.numpy()
    for start in range(0, len(source), 2 * TILE):
        target[:, start : start + 2 * TILE] = source[start : start + 2 * TILE].T


@dataclass(frozen=True, eq=False)
class _Turned:
    """The transpose of the activations that were used last."""

    source: weakref.ref[torch.Tensor]
    version: int
    block: int
    blocks: list[torch.Tensor]


_last: _Turned | None = None


def remembered(
    activations: torch.Tensor, block: int, dtype: torch.dtype
) -> Iterator[torch.Tensor] | list[torch.Tensor]:
    """The transposed blocks; layers that share their input (query, key, value) share them.

    Kept only while the activations themselves live.
    """
    global _last
    last = _last
    version = activations._version
    if last and last.source() is activations and (last.version, last.block) == (version, block):
        return last.blocks
    _last = None
    blocks = transposed(activations, block, dtype)
    if activations.numel() > KEPT:
        return blocks
    kept = list(blocks)
    _last = _Turned(weakref.ref(activations, _forget), version, block, kept)
    return kept


def _forget(source: weakref.ref[torch.Tensor]) -> None:
    global _last
    if _last is not None and _last.source is source:
        _last = None
